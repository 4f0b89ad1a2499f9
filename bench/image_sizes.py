"""Small images first: `fine_tune(5, sizes=[128, 224])` beside `fine_tune(5)` at 224 pixels, with the same seed.

`large` trains on images of the last size alone, `small first` divides the epochs of the second phase among the sizes,
and `then the head` trains all of them on images of the first size, and then the head alone on cached features of the
last (FixRes, Touvron et al. 2019). Accuracy is that of the kept weights on validation images of the last size. `cpu` is
the seconds of this process on the processor, which other programs on the machine change less than `seconds`. A row is
written as each run ends; what is there already is not run again. Every run starts with empty caches.
"""

import time
from itertools import product

import pandas as pd
from fine_tune import chosen
from learners import empty_caches
from results import Results, arguments

import ftlib


def at_the_head(learn, sizes, epochs):
    "All epochs at the first size, then the head at the last"
    learn.fine_tune(0)
    with learn.at_size(sizes[0]): learn.fine_tune(epochs, freeze_epochs=0)
    learn.freeze()
    learn.fit_one_cycle(3, learn.fine_tuning.lr.iloc[-1])
    learn.restore_best()


WAYS = {"large": lambda learn, sizes, epochs: learn.fine_tune(epochs),
        "small first": lambda learn, sizes, epochs: learn.fine_tune(epochs, sizes=sizes),
        "then the head": at_the_head}


def trained(table, args, way, seed):
    dls = ftlib.image_data(table, size=args.pixels[-1], bs=args.bs, seed=seed, num_workers=0)
    learn = ftlib.vision_learner(dls, "resnet18", weights=args.weights, metrics=ftlib.accuracy, seed=seed)
    start = time.perf_counter(), time.process_time()
    with learn.no_bar(), learn.no_logging(): WAYS[way](learn, args.pixels, args.epochs)
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    return dict(accuracy=float(learn.validate()[1]), head=learn.history[learn.history.phase == 1].accuracy.max(),
                last=learn.history.accuracy.iloc[-1], seconds=spent[0], cpu=spent[1])


def summary(table):
    "By set: accuracy of each way, and its processor time as a share of that of large images alone"
    wide = table.pivot_table(index="set", columns="way", values=["accuracy", "cpu"], sort=False)
    shares = wide["cpu"].div(wide["cpu"]["large"], axis=0)
    return pd.concat({"accuracy": wide["accuracy"], "share of the time": shares}, axis=1)


def main():
    parser = arguments(__doc__, "image_sizes.csv", ["pets3", "food3", "cars20"], [0], bs=32)
    parser.add_argument("--pixels", nargs="+", type=int, default=[128, 224], help="sizes, the smallest first")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--images", type=int, default=600, help="training images at most")
    parser.add_argument("--valid", type=int, default=300, help="validation images at most")
    args = parser.parse_args()
    results = Results(args.out, "set", "pixels", "seed", "way")
    pixels = " → ".join(map(str, args.pixels))
    for seed, name, way in product(args.seeds, args.sets, args.ways):
        if results.has(name, pixels, seed, way): continue
        table = chosen(name, args.data, args.images, args.valid)
        with empty_caches(): found = trained(table, args, way, seed)
        results.add(set=name, pixels=pixels, seed=seed, way=way, epochs=args.epochs, bs=args.bs,
                    images=int((table.split == "train").sum()), **found)
    for pixels, part in results.table.groupby("pixels", sort=False):
        print(pixels, summary(part).round(3).to_string(), sep="\n")


if __name__ == "__main__": main()
