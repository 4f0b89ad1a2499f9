"""What the learning rates that a sweep suggests lead to: accuracy after one cycle at each, beside a grid of 12 rates.

The head of a frozen network, on kept features: ftlib's suggestions and fastai's four out of sweeps of the same network in the same state, with
their defaults, and then the same three epochs at each rate. Suggestions of none count as the lowest rate of the grid, which is what
a user who is told nothing might take. Our curves are kept beside the table.
"""

import time
from itertools import product

import numpy as np
import torch
from fastai.metrics import accuracy
from lr_finder import FASTAI, by_fastai, by_ftlib, read
from results import Results, arguments

import ftlib

GRID = np.geomspace(1e-4, .3, 12)


def made(folder, arch, weights, seed, size, bs):
    "Makes learners that are all the same, dropout included, over the same data"
    dls = ftlib.image_data(folder, size=size, bs=bs, seed=seed)
    def make():
        torch.manual_seed(seed)
        learn = ftlib.vision_learner(dls, arch, weights=weights, metrics=accuracy, seed=seed)
        learn.model.to(memory_format=torch.channels_last)
        return learn
    return make


def reached(make, lr, epochs):
    "Accuracy and loss on the validation pictures after one cycle"
    learn = make()
    with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(epochs, lr)
    return learn.history[["accuracy", "valid_loss"]].iloc[-1].tolist()


def one(make, epochs, scratch):
    "The curve, and rows of way, rate, accuracy and loss"
    curve, _ = by_ftlib(make())
    told = read(curve) | {f"fastai {k}": v for k, v in by_fastai(make(), scratch).items() if k in FASTAI}
    rates = [(name, lr if np.isfinite(lr) else GRID[0]) for name, lr in told.items()] + [("grid", lr) for lr in GRID]
    return curve, [dict(way=way, lr=float(lr), **dict(zip(("accuracy", "loss"), reached(make, float(lr), epochs)))) for way, lr in rates]


def summary(table):
    "By way: mean accuracy, its share of the best of the grid, and how often it was within a hundredth of that"
    best = table[table.way == "grid"].groupby(["set", "arch", "seed"]).accuracy.max().rename("best")
    told = table[table.way != "grid"].join(best, on=["set", "arch", "seed"])
    told["share"], told["near"] = told.accuracy / told.best, told.accuracy >= told.best - .01
    return told.groupby("way", sort=False).agg(accuracy=("accuracy", "mean"), share=("share", "mean"), worst=("share", "min"), near=("near", "mean"),
                                               loss=("loss", "mean"))


def main():
    parser = arguments(__doc__, "lr_accuracy.csv", ["pets3", "food3", "ants_bees", "cars20"], [0, 1, 2, 3, 4], size=96, bs=16)
    parser.add_argument("--arch", default="resnet18", help="a torchvision or timm classifier; --weights is a file for it")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    results, curves = Results(args.out, "set", "arch", "seed", "way", "lr"), args.out.parent / "lr_accuracy_curves"
    curves.mkdir(parents=True, exist_ok=True)
    done = {(r["set"], r["arch"], r["seed"]) for r in results.rows}
    for seed, name in product(args.seeds, args.sets):
        if (name, args.arch, seed) in done: continue
        start = time.perf_counter()
        curve, rows = one(made(args.data / name, args.arch, args.weights, seed, args.size, args.bs), args.epochs, args.out.parent)
        curve.to_csv(curves / f"{name}_{args.arch}_{seed}.csv", index=False)
        results.rows += [dict(set=name, arch=args.arch, seed=seed, **row) for row in rows]
        results.table.to_csv(args.out, index=False)
        print(f"{name} {args.arch} {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(summary(results.table).round(4).to_string())
    print(results.table[results.table.way == "grid"].groupby("lr").accuracy.mean().round(4).to_string())


if __name__ == "__main__": main()
