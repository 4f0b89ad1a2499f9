"""How far the learning rates that a sweep suggests move when only the seed changes: ftlib's, and fastai's four.

The same network, in the same state, with the same batches, is swept by both, with their defaults. States: `frozen` (a
new head on ImageNet's body), `unfrozen` (the same, everything trains) and `trained` (after 2 epochs of the head and 3
of everything). The spread is the largest over the smallest; a suggestion of none is counted as `none`. Our curves are
kept beside the table, and what they say is read anew each time: sweeps take hours, reading them a moment.
"""

import functools
import time
from itertools import product

import numpy as np
import pandas as pd
import torch
from fastai.callback import schedule
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import accuracy
from results import Results, arguments

import ftlib
from ftlib.cache.session import on_features
from ftlib.lr.finder import HEAD_LR, WHOLE_LR, WITHIN

OURS, FASTAI = ["lr_min", "lr_steep", "suggested"], ["minimum", "steep", "valley", "slide"]


def by_ftlib(learn):
    start = time.perf_counter()
    with learn.no_logging(): found = learn.lr_find(show_plot=False)
    return found.curve, {"ftlib s": time.perf_counter() - start}


def read(curve, state):
    "What a curve suggests"
    usual, within = (HEAD_LR, 10.) if state == "frozen" else (WHOLE_LR, WITHIN)
    reading = ftlib.LRCurve(curve.lr, curve.loss, curve.start, usual, within)
    return {name: getattr(reading, name) for name in OURS}


def by_fastai(learn, folder):
    "fastai's own sweep of the same model, in a learner of its own"
    plain = Learner(learn.dls, learn.model, loss_func=learn.loss_func, splitter=learn.splitter, path=folder)
    plain.remove_cb(ProgressCallback)
    start = time.perf_counter()
    plain.create_opt()
    with plain.no_logging(), on_features(plain, valid=False) as session:  # the same batches, computed once for both
        if session: plain.model, plain.dls = session.tail, DataLoaders(*map(session.loader, plain.dls.loaders))
        found = plain.lr_find(suggest_funcs=[or_none(getattr(schedule, name)) for name in FASTAI], show_plot=False)
    return found._asdict() | {"fastai s": time.perf_counter() - start}


def or_none(func):
    "`func`, with nan in place of the error that fastai's raise for a sweep of a few points"
    @functools.wraps(func)
    def told(lrs, losses, num_it):
        try: return func(lrs, losses, num_it)
        except (IndexError, ValueError): return np.nan, None
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


def summary(table):
    "Largest over smallest suggestion of each kind, over the seeds"
    return table.groupby(["set", "state"], sort=False)[OURS + FASTAI].agg(spread)


def main():
    args = arguments(__doc__, "lr_finder.csv", ["food3", "ants_bees"], [0, 1, 2, 3, 4], bs=16).parse_args()
    results, curves = Results(args.out, "set", "seed", "state"), args.out.parent / "curves"
    for row in results.rows:
        row.update(read(pd.read_csv(curves / f"{row['set']}_{row['state']}_{row['seed']}.csv"), row['state']))
    for name, seed in product(args.sets, args.seeds):
        if results.has(name, seed, "trained"): continue
        for state, learn in states(args.data / name, args.weights, seed, args.size, args.bs):
            if results.has(name, seed, state): continue
            curve, seconds = by_ftlib(learn)
            curves.mkdir(exist_ok=True)
            curve.to_csv(curves / f"{name}_{state}_{seed}.csv", index=False)
            results.add(set=name, seed=seed, state=state, **read(curve, state), **seconds,
                        **by_fastai(learn, args.out.parent))
    print("largest / smallest suggestion over the seeds")
    print(summary(results.table).to_string())


if __name__ == "__main__": main()
