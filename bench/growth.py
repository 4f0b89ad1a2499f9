"""How time and memory grow with the number of images, of classes and of epochs: two epochs of the head of a frozen
network.

The images of a set are repeated under other names until there are enough, so each is read, decoded and computed as an
image of its own. Every point is a process of its own, whose largest resident memory is noted. `--out` gets the table,
and a plot of the same name.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import matplotlib
from results import Results, arguments

POINTS = [*(dict(images=n) for n in (500, 2_000, 10_000, 30_000, 100_000)), *(dict(classes=n) for n in (50, 500)),
          *(dict(epochs=n) for n in (8, 32))]
USUAL = dict(images=2_000, classes=5, epochs=2)


def repeated(source, folder, images, classes):
    "A folder of so many links to the files of `source`, in so many classes"
    files = sorted(p for p in source.rglob("*") if p.is_file())
    for i, file in enumerate(islice(cycle(files), images)):
        link = folder / f"{i % classes:04}" / f"{i:06}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


def one(args, images, classes, epochs):
    "Seconds of each part, and the most memory, in MB"
    import torch

    from ftlib import image_data, vision_learner
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FTLIB_CACHE"] = f"{folder}/cache"
        repeated(args.data / args.sets[0], Path(folder, "set"), images, classes)
        times = [time.perf_counter()]
        dls = image_data(Path(folder, "set"), size=args.size, bs=args.bs)
        times.append(time.perf_counter())
        learn = vision_learner(dls, "resnet18", weights=args.weights, views=1)
        with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3)
        times.append(time.perf_counter())
        filled, trained = learn.history.fill_seconds.sum(), learn.history.seconds.sum()
    return dict(data=times[1] - times[0], fill=filled, epoch=trained / epochs, all=times[-1] - times[0],
                features_mb=learn.history.fill_bytes.sum() / 1e6,
                before_mb=start / 1e3, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
                threads=torch.get_num_threads())


def figure(table):
    "Seconds and memory by images, classes, epochs"
    import matplotlib.pyplot as plt
    fig, axs = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharey="row")
    for column, name in zip(axs.T, USUAL):
        others = [k for k in USUAL if k != name]
        rows = table[(table[others] == [USUAL[k] for k in others]).all(axis=1)].sort_values(name)
        for part in ("data", "fill", "epoch", "all"): column[0].plot(rows[name], rows[part], "o-", ms=3, label=part)
        column[1].plot(rows[name], rows.peak_mb, "o-", ms=3, label="peak")
        column[1].plot(rows[name], rows.before_mb, "o--", ms=3, label="before any image")
        column[0].set(xscale="log", yscale="log", ylabel="seconds")
        column[1].set(xscale="log", xlabel=name, ylabel="MB", ylim=(0, None))
        for ax in column:
            ax.set_xticks(rows[name], [f"{v:,}" for v in rows[name]])
            ax.minorticks_off()
    for ax in axs[:, 0]: ax.legend()
    return fig


def main():
    parser = arguments(__doc__, "growth.csv", ["flowers5"], [0], size=48, bs=64)
    parser.add_argument("--points", type=json.loads, default=POINTS, help="list of {images|classes|epochs: number}")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(one(args, **args.one)))
    results = Results(args.out, *USUAL)
    for point in [USUAL | p for p in args.points]:
        if results.has(*point.values()): continue
        ran = subprocess.run([sys.executable, "-W", "ignore", *sys.argv, "--one", json.dumps(point)],
                             capture_output=True, text=True)
        if ran.returncode: raise SystemExit(f"{point}: {ran.stderr[-2000:]}")
        results.add(**point, **json.loads(ran.stdout.splitlines()[-1]))
    matplotlib.use("Agg")
    figure(results.table).savefig(args.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__": main()
