"""What a suggested learning rate leads to: the accuracy of a fit with it, divided by that of the best of a grid of
seven, 1e-4 to 1e-1.

`frozen` is a new head on cached features. `unfrozen` starts from a trained head, with a hundredth of the head's
learning rate for the first stage. Every fit of a row starts from the same weights. Beside `suggested` stand fastai's
`valley`, out of its own sweep of the same network in the same state, and two fits at the usual learning rate that
differ in nothing but the seed: their difference is what chance does to such a share. Large sets are cut to `--images`
training images and `--valid` validation images.
"""

import copy
import tempfile
from itertools import product

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import valley
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from fine_tune import chosen
from results import Results, arguments

import ftlib
from ftlib.cache.session import on_features
from ftlib.lr.finder import HEAD_LR, WHOLE_LR


def made(table, args, arch, weights, seed):
    "Makes learners that are all the same, dropout included, over the same data"
    dls = ftlib.image_data(table, size=args.size, bs=args.bs, seed=seed, num_workers=0)
    def make(seed=seed):
        torch.manual_seed(seed)
        learn = ftlib.vision_learner(dls, arch, weights=weights, metrics=accuracy, seed=seed)
        learn.model.to(memory_format=torch.channels_last)
        return learn
    return make


def fastai_valley(learn):
    "fastai's own sweep of a copy of the model, in a learner of its own"
    with tempfile.TemporaryDirectory() as folder:
        plain = Learner(learn.dls, copy.deepcopy(learn.model), loss_func=learn.loss_func, splitter=learn.splitter,
                        path=folder)
        plain.remove_cb(ProgressCallback)
        plain.create_opt()
        with plain.no_logging(), on_features(plain, valid=False) as session:
            if session: plain.model, plain.dls = session.tail, DataLoaders(*map(session.loader, plain.dls.loaders))
            try: return float(plain.lr_find(suggest_funcs=valley, show_plot=False).valley)
            except IndexError: return float("nan")  # a sweep of a few points


def rows(make, state, epochs, grid, seed):
    "One row for each learning rate: accuracy and validation loss after one cycle"
    learn, quiet = make(), dict(show_plot=False)
    if state == "unfrozen":
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, HEAD_LR)
        learn.unfreeze()
        quiet |= dict(ratios=slice(.01, 1.), for_epochs=epochs)
    start = copy.deepcopy(learn.model.state_dict())
    with learn.no_logging(): found = learn.lr_find(**quiet)
    usual = HEAD_LR if state == "frozen" else WHOLE_LR
    rates = [("suggested", found.suggested, seed), ("fastai valley", fastai_valley(learn), seed),
             ("usual", usual, seed), ("usual again", usual, seed + 100)]
    for way, lr, seed in rates + [("grid", lr, seed) for lr in grid]:
        lr = float(lr) if np.isfinite(lr) else grid[0]  # a suggestion of none counts as the lowest of the grid
        learn = make(seed)
        learn.model.load_state_dict(start)
        if state == "unfrozen": learn.unfreeze()
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, slice(lr / 100, lr) if state == "unfrozen" else lr)
        yield dict(way=way, lr=lr, accuracy=learn.history.accuracy.iloc[-1], loss=learn.history.valid_loss.iloc[-1])


def summary(table):
    """By state and way: mean accuracy, its share of the best of the grid (mean and worst), and the median learning
    rate, over combinations of set and network, each of which counts with the mean of its seeds"""
    keys = ["set", "arch", "state", "seed"]
    best = table[table.way == "grid"].groupby(keys).accuracy.max().rename("best")
    table = table[table.way != "grid"].join(best, on=keys)
    table["share"] = table.accuracy / table.best
    cells = table.groupby(["state", "way", "set", "arch"], sort=False)[["accuracy", "share", "lr"]].mean().reset_index()
    return cells.groupby(["state", "way"], sort=False).agg(combinations=("set", "size"), accuracy=("accuracy", "mean"),
                                                           share=("share", "mean"), worst=("share", "min"),
                                                           lr=("lr", "median"))


def main():
    parser = arguments(__doc__, "lr_accuracy.csv", ["pets3", "food3", "ants_bees", "cars20", "flowers5",
                                                    "cifar10_small", "solar"], [0], size=64, bs=32)
    parser.add_argument("--arch", default="resnet18", help="a torchvision or timm classifier; --weights is a file for "
                        "it, or 'imagenet'")
    parser.add_argument("--states", nargs="+", default=["frozen", "unfrozen"], choices=["frozen", "unfrozen"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=300, help="training images at most")
    parser.add_argument("--valid", type=int, default=300, help="validation images at most")
    parser.add_argument("--grid", nargs=3, type=float, default=[1e-4, .1, 7],
                        help="lowest and highest learning rate of the grid, and how many")
    args = parser.parse_args()
    results, weights = Results(args.out, "set", "arch", "state",
                               "seed"), "imagenet" if str(args.weights) == "imagenet" else args.weights
    grid = np.geomspace(*args.grid[:2], int(args.grid[2]))
    for seed, name, state in product(args.seeds, args.sets, args.states):
        if results.has(name, args.arch, state, seed): continue
        make = made(chosen(name, args.data, args.images, args.valid), args, args.arch, weights, seed)
        found = list(rows(make, state, args.epochs, grid, seed))
        for row in found: results.add(set=name, arch=args.arch, state=state, seed=seed, **row)
    print(summary(results.table).round(3).to_string())


if __name__ == "__main__": main()
