"""Should batch-norm statistics of a pretrained body move while it trains? Accuracy by learning rate, still and
moving, from the same trained head.

Beside the sets as they are, `sketches` are the edges of flowers and `recoloured` pets in exchanged and inverted
colours: images unlike those the weights have seen. The whole network trains by one cycle; the first stage has a
hundredth of the head's learning rate. `peak` is the largest validation loss on the way, divided by the head's. A row
is written as each run ends; what is there already is not run again.
"""

import copy
import time
from itertools import product

import numpy as np
import torch
from fastai.metrics import accuracy
from fine_tune import chosen
from PIL import Image, ImageFilter, ImageOps
from results import Results, arguments

import ftlib


def edges(image): return ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")
def other_colours(image): return Image.fromarray(255 - np.asarray(image)[..., [2, 0, 1]])


VARIED = {"sketches": ("flowers5", edges), "recoloured": ("pets3", other_colours)}


def data_of(name, args, seed):
    "A set, or a variation of one, as images in memory"
    source, change = VARIED.get(name, (name, None))
    table = chosen(source, args.data, args.images, args.valid)
    if change is not None:
        images = [Image.open(p).convert("RGB") for p in table.path]
        for image in images: image.thumbnail((200, 200))
        table = {"image": [np.asarray(change(image)) for image in images], "label": table.label.tolist(),
                 "split": table.split.tolist()}
    return ftlib.image_data(table, size=args.size, bs=args.bs, seed=seed, num_workers=0)


def learner(dls, args, seed, **kwargs):
    torch.manual_seed(seed)
    weights = "imagenet" if str(args.weights) == "imagenet" else args.weights
    learn = ftlib.vision_learner(dls, args.arch, weights=weights, metrics=accuracy, seed=seed, **kwargs)
    learn.model.to(memory_format=torch.channels_last)
    return learn


def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(*args, **kwargs)
    return learn.history


def main():
    parser = arguments(__doc__, "batch_norm.csv", ["pets3", "cars20", "cifar10_small", "sketches", "recoloured",
                                                   "solar"], [0], size=64, bs=64)
    parser.add_argument("--arch", default="resnet18", help="a torchvision or timm classifier; --weights is a file for "
                        "it, or 'imagenet'")
    parser.add_argument("--lrs", nargs="+", type=float, default=[2e-4, 1e-3, 4e-3])
    parser.add_argument("--bn", nargs="+", default=["still", "moving"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=450, help="training images at most")
    parser.add_argument("--valid", type=int, default=150, help="validation images at most")
    args = parser.parse_args()
    results = Results(args.out, "set", "arch", "size", "bs", "seed", "bn", "lr")
    for seed, name in product(args.seeds, args.sets):
        todo = [(bn, lr) for bn, lr in product(args.bn, args.lrs)
                if not results.has(name, args.arch, args.size, args.bs, seed, bn, lr)]
        if not todo: continue
        dls = data_of(name, args, seed)
        learn = learner(dls, args, seed)
        head = fit(learn, 4, 4e-3).iloc[-1]
        start = copy.deepcopy(learn.model.state_dict())
        for bn, lr in todo:
            learn, began = learner(dls, args, seed, bn=bn), time.perf_counter()
            learn.model.load_state_dict(start)
            learn.unfreeze()
            rows = fit(learn, args.epochs, slice(lr / 100, lr), pct_start=.3, div=5.)
            results.add(set=name, arch=args.arch, size=args.size, bs=args.bs, seed=seed, bn=bn, lr=lr,
                        accuracy=rows.accuracy.iloc[-1], loss=rows.valid_loss.iloc[-1],
                        peak=rows.valid_loss.max() / head.valid_loss, head=head.accuracy, head_loss=head.valid_loss,
                        seconds=time.perf_counter() - began)
    shown = results.table.pivot_table(index=["set", "arch", "bs", "head"], columns=["bn", "lr"],
                                      values=["accuracy", "peak"])
    print(shown.round(3).to_string())


if __name__ == "__main__": main()
