"""What a short fine-tuning reaches on real photographs, beside plain fastai with the same budget: mean of several seeds.

Three ways, each with 3 epochs of the head and 3 of everything, pictures of the same size, batches and augmentation:
`ftlib` finds its rates by `lr_find`; `fastai` does the same with its own finder (its default, the valley);
`fine_tune` is fastai's call with its default rate. Single precision and channels-last for all of them.
A line is written to the CSV as each run ends; what is there already is not run again.
"""

import time
from itertools import product

import pandas as pd
import torch
from fastai.vision import all as fv
from results import Results, arguments

import ftlib
from ftlib.evaluate.intervals import mean_interval


def ftlib_learner(folder, weights, seed, size, bs, arch="resnet18"):
    dls = ftlib.image_data(folder, size=size, bs=bs, seed=seed)
    return ftlib.vision_learner(dls, arch, weights=weights, metrics=fv.accuracy, seed=seed)


def fastai_learner(folder, weights, seed, size, bs, arch="resnet18"):
    fv.set_seed(seed)
    return fastai_head(fv.ImageDataLoaders.from_folder(folder, train="train", valid="valid", **fastai_batches(size, bs)), weights, arch)


def fastai_batches(size, bs):
    "Arguments of fastai's data: its own augmentation, ImageNet's statistics"
    return dict(bs=bs, num_workers=2, item_tfms=fv.RandomResizedCrop(size, min_scale=.35), batch_tfms=[*fv.aug_transforms(), fv.Normalize.from_stats(*fv.imagenet_stats)])


def fastai_head(dls, weights, arch="resnet18"):
    "fastai's learner with the body of a file, frozen"
    learn = fv.vision_learner(dls, getattr(fv.models, arch, arch), pretrained=False, metrics=fv.accuracy)
    if weights is not None:
        net = getattr(fv.models, arch)()
        net.load_state_dict(torch.load(weights, weights_only=True))
        learn.model[0].load_state_dict(fv.create_body(net, pretrained=False).state_dict())
    learn.freeze()
    return learn


def accuracies(learn): return [float(row[2]) for row in learn.recorder.values]


def by_ftlib(learn):
    ftlib.fine_tune_run(learn, epochs=3, freeze_epochs=3, say=lambda line: None)
    scores = learn.history
    return [scores[scores.phase == p].accuracy.iloc[-1] for p in (1, 2)], scores.groupby("phase").lr.max().tolist()


def by_fastai(learn):
    scores, rates = [], []
    for phase in range(2):
        try: rates.append(learn.lr_find(show_plot=False).valley)
        except IndexError: rates.append(learn.lr)  # a curve without a descent: what is left is the default
        learn.fit_one_cycle(3, slice(rates[-1] / 100, rates[-1]) if phase else rates[-1])
        scores.append(accuracies(learn)[-1])
        learn.unfreeze()
    return scores, rates


def by_fine_tune(learn):
    scores = []
    class Note(fv.Callback):
        def after_fit(self): scores.append(accuracies(self.learn)[-1])
    learn.fine_tune(3, freeze_epochs=3, cbs=Note())
    return scores, [2e-3, 1e-3]


WAYS = {"ftlib": (ftlib_learner, by_ftlib), "fastai": (fastai_learner, by_fastai), "fine_tune": (fastai_learner, by_fine_tune)}


def one(way, folder, weights, seed, size, bs):
    "Accuracies after the head's epochs and at the end, and the seconds it took"
    make, train = WAYS[way]
    start = time.perf_counter()
    learn = make(folder, weights, seed, size, bs)
    learn.model.to(memory_format=torch.channels_last)
    learn.remove_cb(fv.ProgressCallback)
    with learn.no_logging(): (frozen, unfrozen), rates = train(learn)
    return dict(frozen=frozen, unfrozen=unfrozen, lr_head=rates[0], lr_all=rates[1], seconds=time.perf_counter() - start)


def summary(table):
    "Mean, least and most over the seeds"
    shown = [c for c in ("frozen", "unfrozen", "seconds") if c in table]
    return table.groupby(["set", "way"], sort=False)[shown].agg(["mean", "min", "max"])


def differences(table):
    "ftlib less fastai on the same set and seed: mean and its 95 % interval, by set and over all"
    wide = table.pivot(index=["set", "seed"], columns="way", values=["frozen", "unfrozen"])
    rows = {}
    for name, part in [*wide.groupby("set", sort=False), ("all", wide)]:
        gained = {k: mean_interval(part[k]["ftlib"] - part[k]["fastai"]) for k in ("frozen", "unfrozen")}
        rows[name] = dict(seeds=len(part)) | {f"{k}{end}": v for k, o in gained.items() for end, v in zip(("", " low", " high"), o, strict=True)}
    return pd.DataFrame.from_dict(rows, orient="index")


def main():
    parser = arguments(__doc__, "accuracy.csv", ["pets3", "food3", "ants_bees", "cars20"], [0, 1, 2], size=96, bs=16)
    parser.add_argument("--ways", nargs="+", default=["ftlib", "fastai"], choices=WAYS)
    args = parser.parse_args()
    results = Results(args.out, "set", "seed", "way")
    for name, seed, way in product(args.sets, args.seeds, args.ways):
        if results.has(name, seed, way): continue
        results.add(set=name, seed=seed, way=way, **one(way, args.data / name, args.weights, seed, args.size, args.bs))
    print(summary(results.table).round(3).to_string())


if __name__ == "__main__": main()
