"""How long things take beside plain fastai and beside PyTorch by hand: the same work in turn in one process, medians.

Every row is a pair of callables over the same images, network, size and batches; a round runs each once, and the
ratio of the medians is what counts. `--rows` picks some; those against Lightning want it installed (`ftlib[bench]`).
Kept images and features go to a temporary folder.
"""

import copy
import io
import logging
import os
import tempfile
import time
from contextlib import contextmanager, redirect_stderr
from functools import partial
from statistics import median

import pandas as pd
import torch
from learners import fastai_learner, ftlib_learner
from fastai.callback.progress import ProgressCallback
from fastai.vision import all as fv
from results import arguments
from torch import nn

import ftlib
from ftlib.system.files import clear_cache
from ftlib.cache import features as frozen
from ftlib.lr.optimizer import build_optimizer

ROWS = {}


def row(against, reach):
    "Registers a function that yields the two callables, theirs first"
    def add(make):
        ROWS[make.__name__] = make, against, reach
        return make
    return add


@contextmanager
def silent(learn):
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(), learn.no_bar(): yield learn


def both(args):
    "fastai's learner and ours, both in channels-last"
    weights = args.weights if args.arch == "resnet18" else None  # speed does not ask what they are
    made = [make(args.data / args.sets[0], weights, 0, args.size, args.bs, args.arch)
            for make in (fastai_learner, ftlib_learner)]
    if weights is None: made[1].freeze()
    for learn in made: learn.model.to(memory_format=torch.channels_last)
    return made


def first(dl, n):
    "Takes n batches of a loader"
    for i, batch in enumerate(dl):
        if i + 1 == n: return batch


def steps(learn, n):
    "Trains on n batches"
    def stop(self):
        if self.iter + 1 == n: raise fv.CancelFitException
    with silent(learn): learn.fit(1, 1e-5, cbs=fv.Callback(after_batch=stop))


@row("fastai's loader, same transforms", "≥ 10")
def batches(args):
    theirs, ours = (learn.dls.train for learn in both(args))
    ours.decoded.ready()
    return partial(first, theirs, args.n), partial(first, ours, args.n)


@row("fastai's defaults", "≥ 2.5")
def unfrozen_steps(args):
    theirs, ours = both(args)
    for learn in (theirs, ours): learn.unfreeze()
    ours.dls.train.decoded.ready()
    return partial(steps, theirs, args.n), partial(steps, ours, args.n)


@row("the same steps of the last stage and the head, the stages before them run anew", "")
def last_stage(args):
    made = [both(args)[1] for _ in range(2)]
    made[0].cache = False
    for learn in made:
        learn.freeze_to(-2)
        learn.dls.train.decoded.ready()
    return tuple(partial(steps, learn, args.n) for learn in made)


@row("the same steps, not compiled", "")
def compiled(args):
    plain, ours = (both(args)[1] for _ in range(2))
    for learn in (plain, ours):
        learn.unfreeze()
        learn.dls.train.decoded.ready()
    ours.model.compile()
    return partial(steps, plain, args.n), partial(steps, ours, args.n)


@row("a loop by hand on the same loader, same settings", "≥ .95")
def unfrozen_by_hand(args):
    ours = both(args)[1]
    ours.unfreeze()
    ours.dls.train.decoded.ready()
    steps(ours, 1)  # chooses its arithmetic
    net, way = copy.deepcopy(ours.model), ours.precision_policy
    opt = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    def loop():
        net.train()
        for i, (x, y) in enumerate(ours.dls.train):
            with way.autocast(x.device): out = net(way.to_layout(x.as_subclass(torch.Tensor)))
            nn.functional.cross_entropy(out.float(), y.as_subclass(torch.Tensor)).backward()
            opt.step()
            opt.zero_grad()
            if i + 1 == args.n: return
    return loop, partial(steps, ours, args.n)


class Plain:
    "A loader's batches as plain tensors"
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return (tuple(o.as_subclass(torch.Tensor) for o in b) for b in self.dl)
    def __len__(self): return len(self.dl)


def lightning_module(net):
    "The network as Lightning takes one, and a function that makes a quiet trainer"
    import lightning
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.lr = net, 1e-5
        def training_step(self, batch, i): return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=self.lr, fused=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Module(), partial(lightning.Trainer, accelerator="cpu", **quiet)


def steps_by_lightning(net, data, n):
    module, trainer = lightning_module(net)
    return lambda: trainer(max_epochs=1, limit_train_batches=n).fit(module, data)


@row("Lightning's Trainer on the same loader, in single precision", "")
def unfrozen_lightning(args):
    ours = both(args)[1]
    ours.unfreeze()
    ours.dls.train.decoded.ready()
    return steps_by_lightning(copy.deepcopy(ours.model), Plain(ours.dls.train), args.n), partial(steps, ours, args.n)


@row("Lightning's Tuner.lr_find on the same frozen network and loader, ours with features kept", "")
def lr_find_lightning(args):
    from lightning.pytorch.tuner import Tuner
    ours = both(args)[1]
    ours.dls.train.decoded.ready()
    sweep(ours)
    module, trainer = lightning_module(copy.deepcopy(ours.model))
    def theirs():
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            Tuner(trainer(max_epochs=-1, default_root_dir=folder)).lr_find(module, Plain(ours.dls.train),
                num_training=100)
    return theirs, partial(sweep, ours)


def sweep(learn):
    with silent(learn): learn.lr_find(show_plot=False)


@row("fastai's lr_find, ours with nothing kept", "≥ 5")
def lr_find_cold(args):
    theirs, ours = both(args)
    def cold():
        clear_cache()
        frozen.STORE.known.clear()
        sweep(ours)
    return partial(sweep, theirs), cold


@row("fastai's lr_find, ours with features kept", "≥ 50")
def lr_find_warm(args):
    theirs, ours = both(args)
    sweep(ours)
    return partial(sweep, theirs), partial(sweep, ours)


def predictions(learn):
    with silent(learn): learn.get_preds()


@row("fastai's get_preds on the validation images", "≥ 4")
def get_preds(args):
    theirs, ours = both(args)
    ours.unfreeze()  # frozen, it would read kept features
    ours.dls.train.decoded.ready()
    return partial(predictions, theirs), partial(predictions, ours)


def one_image(learn, path):
    with silent(learn): learn.predict(path)


@row("fastai's predict of one file", "")
def predict(args):
    theirs, ours = both(args)
    path = ours.dls.valid_ds.tls[0].items[0].source
    return partial(one_image, theirs, path), partial(one_image, ours, path)


@row("the bare forward of one image", "≥ .67")
def predict_by_hand(args):
    ours = both(args)[1]
    x, path = ours.dls.valid.one_batch()[0][:1].as_subclass(torch.Tensor), ours.dls.valid_ds.tls[0].items[0].source
    def bare():
        with torch.no_grad(): ours.model.eval()(x)
    return bare, partial(one_image, ours, path)


@row("fastai's Adam, resnet50's parameters", "≥ 3")
def optimizer_step(args):
    def stepping(build):
        net = fv.resnet50()
        for p in net.parameters(): p.grad = torch.randn_like(p)
        opt = build(net)
        def step():
            for _ in range(5): opt.step()
        return step
    return (stepping(lambda net: fv.Adam([list(net.parameters())], lr=1e-3)),
            stepping(lambda net: build_optimizer(fv.Adam, [list(net.parameters())], net, lr=1e-3)))


class Ready:
    "A loader whose batches are there already"
    def __init__(self, n, bs=64):
        self.bs, self.n, self.dataset, self.device = bs, n * bs, range(n * bs), torch.device("cpu")
        self.made = [(torch.randn(bs, 3, 8, 8), torch.randint(0, 10, (bs,))) for _ in range(n)]
    def __iter__(self): return iter(self.made)
    def __len__(self): return len(self.made)
    def to(self, device): return self


def tiny(): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


@row("the same steps by hand, on a tiny network: 200 of them", "")
def tiny_steps(args):
    data, net = Ready(200), tiny()
    opt, learn = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True), ftlib.Learner(
        fv.DataLoaders(data, Ready(1)), tiny(), loss_func=fv.CrossEntropyLossFlat())
    def loop():
        for x, y in data:
            nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
    return loop, partial(steps, learn, 200)


@row("Lightning's steps on a tiny network: 200 of them", "")
def tiny_steps_lightning(args):
    data = Ready(200)
    learn = ftlib.Learner(fv.DataLoaders(data, Ready(1)), tiny(), loss_func=fv.CrossEntropyLossFlat())
    return steps_by_lightning(tiny(), data, 200), partial(steps, learn, 200)


@row("fastai's steps on a tiny network: 200 of them", "")
def tiny_steps_fastai(args):
    data = Ready(200)
    made = [cls(fv.DataLoaders(data, Ready(1)), tiny(), loss_func=fv.CrossEntropyLossFlat())
            for cls in (fv.Learner, ftlib.Learner)]
    return tuple(partial(steps, learn, 200) for learn in made)


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = arguments(__doc__, "speed.csv", ["flowers5"], [0], size=224, bs=32)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--arch", default="resnet18", help="a torchvision or timm classifier")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n", type=int, default=8, help="batches in a round")
    args = parser.parse_args()
    os.environ["FTLIB_CACHE"] = tempfile.mkdtemp()
    found = []
    for name in args.rows:
        make, against, reach = ROWS[name]
        pair = make(args)
        for call in pair: call()
        seconds = [[timed(call) for call in pair] for _ in range(args.rounds)]
        theirs, ours = (median(o) for o in zip(*seconds))
        found.append(dict(row=name, arch=args.arch, against=against, theirs=theirs, ours=ours, ratio=theirs / ours,
                          reach=reach,
                          threads=torch.get_num_threads()))
        print(f"{name:20} {theirs:8.3f} s  {ours:8.3f} s  × {theirs / ours:6.2f}  ({reach}; against {against})",
              flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(found).to_csv(args.out, index=False)


if __name__ == "__main__": main()
