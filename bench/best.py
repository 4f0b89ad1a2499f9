"""Accuracy against seconds: `best_classifier` in 1, 3 and 10 minutes, `learn.fine_tune`, fastai's `fine_tune`, a plain
PyTorch recipe, and the Trainer of Hugging Face where transformers is installed.

All start from the same file of weights of the same torchvision network, on the same images at the same size and batch
size, and all else is as each has it by default. A half of the validation images is for choices, as of epochs; the
accuracy is that on the other half, which none has seen. Seconds count all from the first look at the files to the
answers. A way is named with its amount: `best:3` has three minutes, `fastai:5` five epochs of the whole network. A row
is written as each run ends; what is there already is not run again. Every run starts with empty caches.
"""

import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torchvision
from fastai.vision import all as fv
from fine_tune import chosen
from learners import empty_caches, fastai_batches, fastai_head
from results import Results, arguments
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import ftlib
from ftlib.evaluate.intervals import wilson
from ftlib.experiment.best import best_classifier

MEAN, STD = (.485, .456, .406), (.229, .224, .225)


def with_test(table):
    "A half of the validation images of each class, at random, becomes the test set"
    valid = table[table["split"] == "valid"].sample(frac=1, random_state=0)
    half = valid.groupby("label").cumcount() % 2 == 1
    return table.assign(split=table["split"].where(~table.index.isin(half.index[half]), "test"))


# Each way is a function of the table, the options, a seed and its amount; it returns whether it names each test image
# right

def by_best(table, args, seed, minutes):
    found = best_classifier(table, minutes, {args.arch: args.weights}, size=args.size, bs=args.bs, seed=seed,
                            say=lambda line: None)
    return found.report.probs.argmax(1) == found.report.targets


def by_ftlib(table, args, seed, epochs):
    dls = ftlib.image_data(table, size=args.size, bs=args.bs, seed=seed, num_workers=args.workers)
    learn = ftlib.vision_learner(dls, args.arch, weights=args.weights, metrics=fv.accuracy, seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(int(epochs))
    report = learn.evaluate("test")
    return report.probs.argmax(1) == report.targets


def by_fastai(table, args, seed, epochs):
    fv.set_seed(seed)
    test, seen = table[table["split"] == "test"], table[table["split"] != "test"]
    dls = fv.ImageDataLoaders.from_df(seen.assign(is_valid=seen["split"] == "valid"), path="/", fn_col="path",
                                      label_col="label", valid_col="is_valid",
                                      **fastai_batches(args.size, args.bs) | dict(num_workers=args.workers))
    learn = fastai_head(dls, args.weights, args.arch)
    learn.remove_cb(fv.ProgressCallback)
    with learn.no_logging():
        learn.fine_tune(int(epochs))
        probs = learn.get_preds(dl=dls.test_dl(list(test["path"])))[0]
    return np.array(dls.vocab)[probs.argmax(1).numpy()] == test["label"].to_numpy()


class Images(Dataset):
    "Images of a table with their class numbers, for plain PyTorch"
    def __init__(self, table, classes, size, train):
        self.paths, self.targets = table["path"].tolist(), [classes.index(c) for c in table["label"]]
        crop = [v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)]
        if train: crop = [v2.RandomResizedCrop(size, (.35, 1.)), v2.RandomHorizontalFlip(), v2.ColorJitter(.2, .2)]
        as_floats = v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)
        self.transform = v2.Compose([v2.ToImage(), *crop, *as_floats])

    def __len__(self): return len(self.paths)

    def __getitem__(self, i):
        image = torchvision.io.decode_image(self.paths[i], "RGB")
        return dict(pixel_values=self.transform(image), labels=self.targets[i])


class Classifier(nn.Module):
    "A torchvision network with a new last layer, which returns what the Trainer of Hugging Face asks for"
    def __init__(self, arch, weights, n_out):
        super().__init__()
        self.net = torchvision.models.get_model(arch, weights=None)
        self.net.load_state_dict(torch.load(weights, weights_only=True))
        name, last = [(n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Linear)][-1]
        self.last = nn.Linear(last.in_features, n_out)
        self.net.set_submodule(name, self.last)

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return dict(loss=loss, logits=logits)


def parts_of(table, args):
    "Training and test images for plain PyTorch"
    classes = sorted(table["label"].unique())
    train, test = (table[table["split"] == s] for s in ("train", "test"))
    return classes, Images(train, classes, args.size, True), Images(test, classes, args.size, False)


def by_torch(table, args, seed, epochs):
    "AdamW, 1e-4 for the body and 1e-3 for the new layer, warm-up and cosine, standard augmentation; the last weights"
    torch.manual_seed(seed)
    classes, train, test = parts_of(table, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = Classifier(args.arch, args.weights, len(classes)).to(device)
    loader = DataLoader(train, args.bs, shuffle=True, num_workers=args.workers)
    new = set(net.last.parameters())
    groups = [dict(params=[p for p in net.parameters() if p not in new], lr=1e-4), dict(params=[*new], lr=1e-3)]
    opt, total = torch.optim.AdamW(groups, weight_decay=.01), int(epochs) * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, [g["lr"] for g in groups], total_steps=total, pct_start=.1,
                                                   cycle_momentum=False)
    for _ in range(int(epochs)):
        net.train()
        for batch in loader:
            net(**{k: v.to(device) for k, v in batch.items()})["loss"].backward()
            opt.step()
            schedule.step()
            opt.zero_grad()
    net.eval()
    with torch.no_grad():
        said = [net(b["pixel_values"].to(device))["logits"].argmax(1).cpu() for b in DataLoader(test, args.bs)]
    return torch.cat(said).numpy() == np.array(test.targets)


def by_hugging_face(table, args, seed, epochs):
    "The Trainer with its default settings"
    import tempfile

    from transformers import Trainer, TrainingArguments
    torch.manual_seed(seed)
    classes, train, test = parts_of(table, args)
    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(folder, num_train_epochs=int(epochs), per_device_train_batch_size=args.bs,
                                per_device_eval_batch_size=args.bs, dataloader_num_workers=args.workers, seed=seed,
                                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no")
        trainer = Trainer(Classifier(args.arch, args.weights, len(classes)), how, train_dataset=train)
        trainer.train()
        return trainer.predict(test).predictions.argmax(1) == np.array(test.targets)


WAYS = {"best": by_best, "ftlib": by_ftlib, "fastai": by_fastai, "torch": by_torch, "hf": by_hugging_face}


def summary(table):
    "By set and way: runs, mean accuracy, median seconds"
    return table.groupby(["set", "way"], sort=False).agg(runs=("seed", "size"), accuracy=("accuracy", "mean"),
                                                         seconds=("seconds", "median")).reset_index()


def draw(table, path):
    "Accuracy against seconds, a panel for each set and a line for each library"
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    sets = table["set"].unique()
    fig, axs = plt.subplots(1, len(sets), figsize=(3.6 * len(sets), 3.4), layout="constrained", squeeze=False)
    for ax, name in zip(axs[0], sets, strict=True):
        points = summary(table[table["set"] == name])
        kinds = points["way"].str.partition(":")[0]
        for i, kind in enumerate(WAYS):
            part = points[kinds == kind].sort_values("seconds")
            if len(part): ax.plot(part["seconds"], part["accuracy"], "o-", color=f"C{i}", label=kind)
            for row in part.itertuples():
                ax.annotate(row.way.partition(":")[2], (row.seconds, row.accuracy), textcoords="offset points",
                            xytext=(4, -9), fontsize=7)
        ax.set(xscale="log", xlabel="seconds", ylabel="accuracy on the test images", title=name)
    axs[0][0].legend(fontsize="small")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main():
    parser = arguments(__doc__, "best.csv", ["pets3", "food3", "ants_bees", "cars20", "flowers5"], [0, 1, 2], size=224,
                       bs=32)
    parser.add_argument("--arch", default="resnet18", help="a torchvision classifier; --weights is a file for it")
    parser.add_argument("--ways", nargs="+", metavar="WAY:AMOUNT",
                        default=["best:1", "best:3", "best:10", "ftlib:5", "fastai:1", "fastai:5", "fastai:10",
                                 "torch:5", "torch:10", "hf:5"],
                        help=f"{', '.join(WAYS)}, with minutes (best) or epochs (others)")
    parser.add_argument("--images", type=int, default=100_000, help="training images at most")
    parser.add_argument("--valid", type=int, default=100_000, help="validation and test images at most")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, except for best")
    parser.add_argument("--figure", type=Path, help="where to draw the results, as a PNG file")
    args = parser.parse_args()
    wrong = [w for w in args.ways if w.partition(":")[0] not in WAYS or not w.partition(":")[2]]
    if wrong: parser.error(f"{wrong[0]!r}: give one of {', '.join(WAYS)} with its amount, as best:3")
    results = Results(args.out, "set", "arch", "seed", "way")
    for seed, name, way in product(args.seeds, args.sets, args.ways):
        kind, _, amount = way.partition(":")
        if results.has(name, args.arch, seed, way): continue
        if kind == "hf" and find_spec("transformers") is None:
            print("transformers is not installed, so its Trainer does not take part: pip install transformers")
            continue
        table = with_test(chosen(name, args.data, args.images, args.valid))
        with empty_caches():
            start = time.perf_counter()
            right = WAYS[kind](table, args, seed, float(amount))
            seconds = time.perf_counter() - start
        low, high = (float(o) for o in wilson(right.sum(), len(right)))
        results.add(set=name, arch=args.arch, seed=seed, way=way, size=args.size, bs=args.bs, images=len(right),
                    accuracy=float(right.mean()), low=low, high=high, seconds=seconds)
    if not results.rows: return
    print(summary(results.table).round(3).to_string(index=False))
    if args.figure: draw(results.table, args.figure)


if __name__ == "__main__": main()
