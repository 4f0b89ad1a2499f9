"""Ten epochs of the head alone, everything included, from the folder to the last figure: ftlib beside plain fastai.

Both at the same rate, one-cycle, same size and batches; fastai with its defaults (norms of the frozen body learn on,
images are decoded and the body is run in each epoch), ftlib with its own (images decoded once, features computed once
for each of `views` views). The ways alternate. `fastai still` is fastai with `train_bn=False`, the cheaper of its two
ways. Nothing is kept from run to run.
"""

import os
import tempfile
import time
from itertools import product

import torch
from learners import fastai_learner, ftlib_learner
from fastai.callback.progress import ProgressCallback
from results import Results, arguments

from ftlib.system.files import clear_cache
from ftlib.cache import features as frozen


def by_ftlib(*args, views, **kwargs):
    frozen.STORE.known.clear()
    clear_cache()
    learn = ftlib_learner(*args)
    learn.views = views
    return learn


def by_fastai(*args, views, train_bn):
    learn = fastai_learner(*args)
    learn.train_bn = train_bn
    learn.create_opt()
    learn.freeze()
    return learn


WAYS = {"ftlib": by_ftlib, "fastai": by_fastai, "fastai still": by_fastai}


def one(way, epochs, lr, views, *args):
    "Seconds, the last accuracy and loss"
    start = time.perf_counter()
    learn = WAYS[way](*args, views=views, **({} if way == "ftlib" else {"train_bn": way == "fastai"}))
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    row = learn.recorder.values[-1]
    return dict(seconds=time.perf_counter() - start, valid_loss=float(row[1]), accuracy=float(row[2]))


def main():
    parser = arguments(__doc__, "head_stage.csv", ["pets3", "food3", "ants_bees"], [0, 1, 2], size=224, bs=64)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3, help="rate of the head")
    parser.add_argument("--views", nargs="+", type=int, default=[2], help="views of an image that ftlib keeps")
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    results = Results(args.out, "set", "seed", "way", "views")
    for name, seed, way, views in product(args.sets, args.seeds, args.ways, args.views):
        if way != "ftlib": views = 0
        if results.has(name, seed, way, views): continue
        figures = one(way, args.epochs, args.lr, views, args.data / name, args.weights, seed, args.size, args.bs)
        results.add(set=name, seed=seed, way=way, views=views, threads=torch.get_num_threads(), **figures)
    table = results.table.groupby(["set", "way", "views"], sort=False)[["seconds", "accuracy", "valid_loss"]]
    print(table.agg(["median", "min", "max"]).round(3).to_string())


if __name__ == "__main__": main()
