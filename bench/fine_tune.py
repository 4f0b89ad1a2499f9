"""`fine_tune(5)` with nothing else given, beside fastai's `fine_tune(5)` and the head alone: accuracy, seconds, and
the largest validation loss on the way.

Both train the same network from the same weights on the same images, at the same size and batch size. All else is as
each library has it by default: precision, memory format, augmentation, normalization. `head` is what the first phase
of ftlib reached. Large sets are cut to `--images` training images and `--valid` validation images. A row is written
as each run ends; what is there already is not run again. Every run starts with empty caches.
"""

import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from learners import empty_caches, fastai_batches, fastai_head
from fastai.vision import all as fv
from results import Results, arguments

import ftlib
from ftlib.data.examples import solar_cells as demo
from ftlib.evaluate.intervals import mean_interval
from ftlib.train import fine_tune as fine_tuning


def images_of(folder):
    "path, label, split of a folder with train and valid"
    files = [p for p in sorted(Path(folder).glob("*/*/*")) if p.is_file()]
    return pd.DataFrame([dict(path=str(p), label=p.parent.name, split=p.parent.parent.name) for p in files])


def solar_cells():
    "The demo's cells, a quarter of them for validation"
    table = demo().source
    return table.assign(split=np.where(np.random.RandomState(0).rand(len(table)) < .25, "valid", "train"))


def chosen(name, data, n_train, n_valid):
    "The images of a set, cut to so many"
    table = solar_cells() if name == "solar" else images_of(data / name)
    parts = [part.sample(min(len(part), n), random_state=0) for (_, part),
             n in zip(table.groupby("split"), (n_train, n_valid), strict=True)]
    return pd.concat(parts).sort_index()


def by_ftlib(table, args, seed):
    dls = ftlib.image_data(table, size=args.size, bs=args.bs, seed=seed, num_workers=args.workers)
    learn = ftlib.vision_learner(dls, args.arch, weights=args.weights, metrics=fv.accuracy, seed=seed, bn=args.bn)
    fine_tuning.HARDLY = args.hardly
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(args.epochs)
    phases, history = learn.fine_tuning.set_index("phase"), learn.history
    peak = history[history.phase == history.phase.max()].valid_loss.max() / phases.valid_loss["head"]
    return dict(accuracy=learn.validate()[1], head=phases.accuracy["head"], whole=phases.accuracy["whole network"],
                peak=peak, kept=phases.kept.idxmax(), lr=phases.lr["whole network"])


def by_fastai(table, args, seed):
    fv.set_seed(seed)
    table = table.assign(is_valid=table.split == "valid")
    batches = fastai_batches(args.size, args.bs) | dict(num_workers=args.workers)
    dls = fv.ImageDataLoaders.from_df(table, path="/", fn_col="path", label_col="label", valid_col="is_valid",
                                      **batches)
    learn = fastai_head(dls, args.weights, args.arch)
    learn.remove_cb(fv.ProgressCallback)
    losses = []
    class Note(fv.Callback):
        order = 60  # after the recorder
        def after_epoch(self): losses.append(self.recorder.values[-1][1])
    with learn.no_logging(): learn.fine_tune(args.epochs, cbs=Note())
    return dict(accuracy=float(learn.recorder.values[-1][2]), peak=max(losses[1:]) / losses[0])


WAYS = {"ftlib": by_ftlib, "fastai": by_fastai}


def summary(table):
    "By set and way: mean accuracy and seconds, largest peak"
    return table.groupby(["set", "way"], sort=False).agg(runs=("seed", "size"), accuracy=("accuracy", "mean"),
                                                         head=("head", "mean"), peak=("peak", "max"),
                                                         seconds=("seconds", "mean"))


def differences(table):
    """ftlib less fastai, and ftlib less its head, on the same set and seed: mean and its 95 % interval, by set and
    over all; the ratio of seconds"""
    wide = table.pivot(index=["set", "seed"], columns="way",
                       values=["accuracy", "head", "seconds"]).dropna(subset=[("accuracy", "ftlib"),
                                                                              ("accuracy", "fastai")])
    rows = {}
    for name, part in [*wide.groupby("set", sort=False), ("all", wide)]:
        a = part["accuracy"]
        gains = {"over fastai": a["ftlib"] - a["fastai"], "over the head": a["ftlib"] - part["head"]["ftlib"]}
        rows[name] = dict(runs=len(part)) | {f"{k}{end}": v for k, o in gains.items() for end,
                                             v in zip(("", " low", " high"), mean_interval(o, within=(-1, 1)),
                                                      strict=True)}
        rows[name]["seconds, ftlib / fastai"] = (part["seconds"]["ftlib"] / part["seconds"]["fastai"]).median()
    return pd.DataFrame.from_dict(rows, orient="index")


def main():
    parser = arguments(__doc__, "fine_tune.csv", ["pets3", "food3", "ants_bees", "cars20", "flowers5", "cifar10_small",
                                                  "solar"], [0, 1, 2], size=64, bs=32)
    parser.add_argument("--arch", default="resnet18", help="a torchvision classifier; --weights is a file for it")
    parser.add_argument("--ways", nargs="+", default=["ftlib", "fastai"], choices=WAYS)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=600, help="training images at most")
    parser.add_argument("--valid", type=int, default=300, help="validation images at most")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--hardly", type=float, default=fine_tuning.HARDLY,
                        help="stages with less than this of the head's learning rate stay frozen")
    parser.add_argument("--bn", default="auto", help="batch-norm statistics: moving, still or auto")
    args = parser.parse_args()
    results = Results(args.out, "set", "arch", "seed", "way")
    for seed, name, way in product(args.seeds, args.sets, args.ways):
        if results.has(name, args.arch, seed, way): continue
        table = chosen(name, args.data, args.images, args.valid)
        with empty_caches():
            start = time.perf_counter()
            found = WAYS[way](table, args, seed)
        results.add(set=name, arch=args.arch, seed=seed, way=way, size=args.size, bs=args.bs, **found,
                    seconds=time.perf_counter() - start)
    print(summary(results.table).round(3).to_string())
    if set(args.ways) == set(WAYS): print("", differences(results.table).round(3).to_string(), sep="\n")


if __name__ == "__main__": main()
