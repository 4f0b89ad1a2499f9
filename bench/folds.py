"""Five-fold cross-validation of a head, from the folder to the last figure: ftlib's one call beside five trainings by
fastai.

The same folds, network, size, batches, rate and epochs; each library with its own defaults. ftlib computes what is
frozen once, for all folds. The ways take turns, fold by fold, so that a busy machine is busy for both.
"""

import os
import tempfile
import time

import pandas as pd
import torch
from learners import fastai_batches, fastai_head
from fastai.callback.progress import ProgressCallback
from fastai.vision import all as fv
from results import Results, arguments

import ftlib
from ftlib.experiment.crossval import fold_table


def by_fastai(table, fold, args):
    "Seconds and accuracy of one fold"
    start = time.perf_counter()
    fv.set_seed(args.seeds[0])
    dls = fv.ImageDataLoaders.from_df(table.assign(held=table["fold"] == fold), path="/", fn_col="item",
                                      label_col="label", valid_col="held",
                                           **fastai_batches(args.size, args.bs))
    learn = fastai_head(dls, args.weights)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit_one_cycle(args.epochs, args.lr)
    return time.perf_counter() - start, float(learn.recorder.values[-1][2])


def main():
    parser = arguments(__doc__, "folds.csv", ["flowers5"], [0], size=96)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3, help="rate of the head")
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    results = Results(args.out, "set", "way", "fold")
    for name in args.sets:
        table = ftlib.read_source(args.data / name).table.reset_index(drop=True)
        table["fold"] = fold_table(table, args.folds, seed=42)

        def way(dls, seed):
            learn = ftlib.vision_learner(dls, "resnet18", weights=args.weights, metrics=fv.accuracy, seed=seed)
            learn.remove_cb(ProgressCallback)
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(args.epochs, args.lr)
            return learn

        def theirs(line):
            "Called as each fold of ours is done: then it is fastai's turn"
            nonlocal waited
            start, fold = time.perf_counter(), len(others)
            others.append(by_fastai(table, fold, args))
            waited += time.perf_counter() - start

        waited, others, start = 0., [], time.perf_counter()
        found = ftlib.cross_validate(way, table.assign(split=None), k=args.folds, size=args.size, bs=args.bs,
                                     path="item", label="label", split="split", say=theirs)
        whole = time.perf_counter() - start - waited
        assert (found.data["fold 0"].to_numpy() == table["fold"].to_numpy()).all(), "other folds than fastai's"
        for fold, (seconds, right) in enumerate(others):
            ours = found.folds.loc[fold]
            results.add(set=name, way="fastai", fold=fold, threads=torch.get_num_threads(), seconds=seconds,
                        accuracy=right)
            results.add(set=name, way="ftlib", fold=fold, threads=torch.get_num_threads(), seconds=ours["seconds"],
                        accuracy=ours["accuracy"])
        results.add(set=name, way="ftlib, the whole call", fold=-1, threads=torch.get_num_threads(), seconds=whole,
                    accuracy=found.folds["accuracy"].mean())
    print(summary(results.table).round(3).to_string())


def summary(table):
    "Seconds of all folds and mean accuracy, by way; the ratio of the whole"
    whole = table[table["fold"] < 0].set_index("set")
    fastai = table[table["way"] == "fastai"].groupby("set")
    return pd.DataFrame({"fastai, five trainings": fastai["seconds"].sum(), "ftlib, one call": whole["seconds"],
                         "ratio": fastai["seconds"].sum() / whole["seconds"],
                         "accuracy of fastai": fastai["accuracy"].mean(), "of ftlib": whole["accuracy"]})


if __name__ == "__main__": main()
