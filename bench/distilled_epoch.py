"""What an epoch costs when a student learns from a teacher too: ResNet-50 teaches ResNet-18.

Seconds an epoch, medians over epochs after the first. With a frozen body, features and the teacher's answers are kept
or (`cache=False`) computed anew in each epoch; with everything training, the teacher goes through each batch. No
weights are needed: time does not depend on them.
"""

import os
import tempfile
import time

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.vision.all import resnet50
from results import Results, arguments

import ftlib

WAYS = {"head, plain": (True, True, False), "head, distilled": (True, True, True),
        "head, distilled, nothing kept": (True, False, True),
        "everything, plain": (False, True, False), "everything, distilled": (False, True, True)}


class Clock(Callback):
    "Seconds of each epoch's training"
    order, uses_images, run_valid = 99, False, False
    def before_fit(self): self.seconds = []
    def before_train(self): self.start = time.perf_counter()
    def after_train(self): self.seconds.append(time.perf_counter() - self.start)


def main():
    parser = arguments(__doc__, "distilled_epoch.csv", ["pets3"], [0], size=96)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    results = Results(args.out, "set", "way")
    for name in args.sets:
        dls = ftlib.image_data(args.data / name, size=args.size, bs=args.bs, seed=0)
        teacher = ftlib.vision_learner(dls, resnet50, weights=None)
        for way, (frozen, cache, distilled) in WAYS.items():
            if results.has(name, way): continue
            learn = ftlib.vision_learner(dls, "resnet18", weights=None, cache=cache, seed=0, precision="fp32")
            if frozen: learn.freeze()
            clock = Clock()
            with learn.no_bar(), learn.no_logging():
                learn.fit(args.epochs, 1e-4, cbs=[clock, *([ftlib.Distill(teacher)] if distilled else [])])
            results.add(set=name, way=way, threads=torch.get_num_threads(),
                        seconds=pd.Series(clock.seconds[1:]).median())
    print(results.table.round(3).to_string())


if __name__ == "__main__": main()
