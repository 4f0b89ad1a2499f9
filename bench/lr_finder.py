"""How far the learning rates that a sweep suggests move when only the seed changes: ftlib's, and fastai's four.

The same network, in the same state, with the same batches, is swept by both, with their defaults. States: `frozen` (a new
head on ImageNet's body), `unfrozen` (the same, everything trains) and `trained` (after 2 epochs of the head and 3 of
everything). The spread is the largest over the smallest; a suggestion of none is counted as `none`.
"""

import argparse
import functools
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback import schedule
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.metrics import accuracy

import ftlib

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
OURS, FASTAI = ["lr_min", "lr_steep", "suggested"], ["minimum", "steep", "valley", "slide"]


def by_ftlib(learn):
    start = time.perf_counter()
    found = ftlib.train.lr_find.find_lr(learn, show_plot=False, quiet=True)
    return {name: getattr(found, name) for name in OURS} | {"ftlib s": time.perf_counter() - start}


def by_fastai(learn, folder):
    "fastai's own sweep of the same model, in a learner of its own"
    plain = Learner(learn.dls, learn.model, loss_func=learn.loss_func, splitter=learn.splitter, path=folder)
    plain.remove_cb(ProgressCallback)
    start = time.perf_counter()
    with plain.no_logging():
        found = plain.lr_find(suggest_funcs=[or_none(getattr(schedule, name)) for name in FASTAI], show_plot=False)
    return found._asdict() | {"fastai s": time.perf_counter() - start}


def or_none(func):
    "`func`, with nan in place of the error that fastai's raise for a sweep of a few points"
    @functools.wraps(func)
    def told(lrs, losses, num_it):
        try: return func(lrs, losses, num_it)
        except IndexError: return np.nan, None
    return told


def states(folder, weights, seed, size, bs):
    "The learner in each of the three states"
    dls = ftlib.image_data(folder, size=size, bs=bs, seed=seed)
    learn = ftlib.vision_learner(dls, "resnet18", weights=weights, metrics=accuracy, seed=seed)
    learn.model.to(memory_format=torch.channels_last)
    yield "frozen", learn
    learn.unfreeze()
    yield "unfrozen", learn
    learn.freeze()
    learn.fit_one_cycle(2, 3e-3)
    learn.unfreeze()
    learn.fit_one_cycle(3, slice(1e-5, 1e-3))
    yield "trained", learn


def spread(rates):
    rates = np.asarray(rates, float)
    told = rates[np.isfinite(rates)]
    if not len(told): return "none"
    return f"{told.max() / told.min():,.1f}" + (f" ({len(rates) - len(told)} none)" if len(told) < len(rates) else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of sets, each with train and valid folders")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights" / "resnet18-f37072fd.pth", help="a file for resnet18")
    parser.add_argument("--sets", nargs="+", default=["pets3", "ants_bees"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--bs", type=int, default=16, help="pictures in a batch")
    parser.add_argument("--out", type=Path, default=Path("runs/lr_finder.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    done = {(r["set"], r["seed"]) for r in rows}
    for name in args.sets:
        for seed in args.seeds:
            if (name, seed) in done: continue
            for state, learn in states(args.data / name, args.weights, seed, args.size, args.bs):
                rows.append(dict(set=name, seed=seed, state=state) | by_ftlib(learn) | by_fastai(learn, args.out.parent))
                print({k: f"{v:.1e}" if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            pd.DataFrame(rows).to_csv(args.out, index=False)
    table = pd.DataFrame(rows)
    print("largest / smallest suggestion over the seeds")
    print(table.groupby(["set", "state"], sort=False)[OURS + FASTAI].agg(spread).to_string())


if __name__ == "__main__": main()
