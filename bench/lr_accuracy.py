"""What the learning rates that a sweep suggests lead to: accuracy after one cycle at each, beside a grid of 12 rates.

The head of a frozen network, on kept features, or with `--unfrozen` everything at one rate: ftlib's suggestions and fastai's four out of sweeps of the same network in the same state, with
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


def made(folder, arch, weights, seed, size, bs, unfrozen=False):
    "Makes learners that are all the same, dropout included, over the same data"
    dls = ftlib.image_data(folder, size=size, bs=bs, seed=seed)
    def make():
        torch.manual_seed(seed)
        learn = ftlib.vision_learner(dls, arch, weights=weights, metrics=accuracy, seed=seed)
        learn.model.to(memory_format=torch.channels_last)
        if unfrozen: learn.unfreeze()
        return learn
    return make


def reached(make, lr, epochs):
    "Accuracy and loss on the validation pictures after one cycle"
    learn = make()
    with learn.no_logging(), learn.no_bar(): learn.fit_one_cycle(epochs, lr)
    return learn.history[["accuracy", "valid_loss"]].iloc[-1].tolist()


def one(make, epochs, scratch, grid):
    "The curve, and rows of way, rate, accuracy and loss"
    curve, _ = by_ftlib(make())
    told = read(curve) | {f"fastai {k}": v for k, v in by_fastai(make(), scratch).items() if k in FASTAI}
    rates = [(name, lr if np.isfinite(lr) else grid[0]) for name, lr in told.items()] + [("grid", lr) for lr in grid]
    return curve, [dict(way=way, lr=float(lr), **dict(zip(("accuracy", "loss"), reached(make, float(lr), epochs)))) for way, lr in rates]


def summary(table):
    "By way: mean accuracy, its share of the best of the grid, and how often it was within a hundredth of that"
    best = table[table.way == "grid"].groupby(["set", "arch", "seed"]).accuracy.max().rename("best")
    told = table[table.way != "grid"].join(best, on=["set", "arch", "seed"])
    told["share"], told["near"] = told.accuracy / told.best, told.accuracy >= told.best - .01
    return told.groupby("way", sort=False).agg(accuracy=("accuracy", "mean"), share=("share", "mean"), worst=("share", "min"), near=("near", "mean"),
                                               loss=("loss", "mean"))


def drawn(table):
    "By rate: the mean share of the best of the grid; a mark at each way's median rate"
    import matplotlib.pyplot as plt
    best = table[table.way == "grid"].groupby(["set", "arch", "seed"]).accuracy.max().rename("best")
    table = table.join(best, on=["set", "arch", "seed"])
    table["share"] = table.accuracy / table.best
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    table[table.way == "grid"].groupby("lr").share.mean().plot(ax=ax, logx=True, color="grey", marker=".", label="a rate of the grid for all runs")
    for way, rows in table[table.way != "grid"].groupby("way", sort=False):
        ax.plot(rows.lr.median(), rows.share.mean(), "s" if way.startswith("fastai") else "o", ms=8, label=way)
    ax.set(xlabel="learning rate (of suggestions the median)", ylabel="share of the best of the grid", ylim=(.55, 1))
    ax.legend(fontsize="small", loc="lower center", ncols=2)
    return fig


def main():
    parser = arguments(__doc__, "lr_accuracy.csv", ["pets3", "food3", "ants_bees", "cars20"], [0, 1, 2, 3, 4], size=96, bs=16)
    parser.add_argument("--arch", default="resnet18", help="a torchvision or timm classifier; --weights is a file for it")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--unfrozen", action="store_true")
    parser.add_argument("--grid", nargs=3, type=float, default=[1e-4, .3, 12], help="lowest and highest rate of the grid, and how many")
    args = parser.parse_args()
    results, curves = Results(args.out, "set", "arch", "seed", "way", "lr"), args.out.parent / "lr_accuracy_curves"
    curves.mkdir(parents=True, exist_ok=True)
    done = {(r["set"], r["arch"], r["seed"]) for r in results.rows}
    for seed, name in product(args.seeds, args.sets):
        if (name, args.arch, seed) in done: continue
        start = time.perf_counter()
        make = made(args.data / name, args.arch, args.weights, seed, args.size, args.bs, args.unfrozen)
        curve, rows = one(make, args.epochs, args.out.parent, np.geomspace(*args.grid[:2], int(args.grid[2])))
        curve.to_csv(curves / f"{name}_{args.arch}_{seed}.csv", index=False)
        results.rows += [dict(set=name, arch=args.arch, seed=seed, **row) for row in rows]
        results.table.to_csv(args.out, index=False)
        print(f"{name} {args.arch} {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    print(summary(results.table).round(4).to_string())
    print(results.table[results.table.way == "grid"].groupby("lr").accuracy.mean().round(4).to_string())


if __name__ == "__main__": main()
