"""fastai's public calls under both imports, in one process: the same values, shapes, order of events and kinds of
errors.

A call is a name and a function of a library; what is meant to differ stands in docs/differences.csv, with the reason,
and is shown there to who comes from fastai. Every third call runs always, all of them with `make slow`.
"""

import contextlib
import csv
import io
import tempfile
import types
import warnings
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("cat", "dog", "eel")


@cache
def folder():
    "24 small images of three classes, and their masks"
    path, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    for part in ("train", "valid"):
        for n, c in enumerate(CLASSES):
            (path / part / c).mkdir(parents=True)
            for i in range(4):
                pixels = np.clip(rng.normal(60 + 60 * n, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path / part / c / f"{c}_{part}_{i}.png")
                Image.fromarray((pixels[..., 0] // 100).clip(0, 2)).save(path / part / c / f"mask_{part}_{i}.bmp")
    return path


def mask_of(p): return p.with_name(p.name.replace(p.name.split("_")[0], "mask")).with_suffix(".bmp")


def numbered(n=48):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.randn(n, 6, generator=g) + 2 * F.one_hot(y, 6), y


class Library:
    "The names of fastai or ftlib, and small things made by them"
    def __init__(self, name):
        module = __import__("ftlib") if name == "ftlib" else __import__("fastai.vision.all", fromlist=["all"])
        self.name, self.all = name, module
        self.tmp = Path(tempfile.mkdtemp())

    def __getattr__(self, n): return getattr(self.all, n)

    def rows(self, x=None, y=None, bs=16):
        x, y = (a if a is not None else b for a, b in zip((x, y), numbered()))
        data = TensorDataset(x, y)
        return self.DataLoaders.from_dsets(data, data, bs=bs, device="cpu", num_workers=0, shuffle=False)

    def net(self, out=3):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, out))

    def learner(self, dls=None, net=None, quiet=True, **kw):
        kw = dict(loss_func=self.CrossEntropyLossFlat(), metrics=self.accuracy, path=self.tmp) | kw
        learn = self.Learner(dls or self.rows(), net or self.net(), **kw)
        if quiet: learn.logger = self.noop
        return learn

    def halves(self, m): return [list(m[:3].parameters()), list(m[3:].parameters())]

    def files(self): return sorted(p for p in folder().rglob("*.png"))

    def images(self, **kw):
        kw = dict(item_tfms=self.Resize(32), bs=4, num_workers=0, seed=1, device=torch.device("cpu")) | kw
        return self.ImageDataLoaders.from_path_func(folder(), self.files(), lambda p: p.name.split("_")[0], **kw)

    def vision(self, dls=None, arch=None, **kw):
        torch.manual_seed(0)
        arch = arch or self.models.resnet18
        return self.vision_learner(dls or self.images(), arch,
                                   **(dict(pretrained=False, path=self.tmp, metrics=self.accuracy) | kw))

    def grey(self):
        block = self.DataBlock((self.ImageBlock(self.PILImageBW), self.CategoryBlock), get_items=lambda _: self.files(),
                               get_y=lambda p: p.name.split("_")[0], splitter=self.IndexSplitter(list(range(6))),
                               item_tfms=self.Resize(32, method="squish"))
        return block.dataloaders(folder(), bs=4, num_workers=0, device=torch.device("cpu"))

    def segmentation(self, **kw):
        block = self.DataBlock((self.ImageBlock, self.MaskBlock(list("abc"))), get_items=lambda _: self.files()[:8],
                               get_y=mask_of,
                               splitter=self.IndexSplitter([0, 1, 2, 3]),
                               **dict(item_tfms=self.Resize(32, method="squish")) | kw)
        return block.dataloaders(folder(), bs=4, num_workers=0, device=torch.device("cpu"))

    def block(self, target, get_y, **kw):
        block = self.DataBlock((self.ImageBlock, target), get_items=lambda _: self.files(), get_y=get_y,
                               splitter=self.IndexSplitter(list(range(6))),
                               item_tfms=self.Resize(32, method="squish"), **kw)
        return block.dataloaders(folder(), bs=4, num_workers=0, device=torch.device("cpu"))


CALLS = {}


def call(name, f=None):
    "Add a call to the table"
    if f is None: return partial(call, name)
    assert name not in CALLS, name
    CALLS[name] = f
    return f


# ---- fits

def scores(learn): return [float(v) for v in learn.validate()]
def trained(learn, how, *args, **kw):
    getattr(learn, how)(*args, **kw)
    recorder = learn.recorder
    return len(recorder.losses), [round(float(v), 6) for v in recorder.lrs], len(recorder.values), scores(learn)[0]


FITS = dict(fit=("fit", 2), fit_lr=("fit", 1, .01), fit_slice=("fit", 1, slice(1e-3, 1e-2)),
            fit_stop=("fit", 1, slice(1e-2)), fit_list=("fit", 1, [1e-3, 1e-2]),
            one_cycle=("fit_one_cycle", 2, .01), one_cycle_slice=("fit_one_cycle", 1, slice(1e-3, 1e-2)),
            flat_cos=("fit_flat_cos", 2, .01), sgdr=("fit_sgdr", 2, 1, .01))
for n, (how, *args) in FITS.items():
    call(f"{n}", lambda L, how=how, args=args: trained(L.learner(splitter=L.halves), how, *args))
for n, kw in dict(wd=dict(wd=.1), div=dict(div=10.), div_final=dict(div_final=1e3), pct=dict(pct_start=.5),
                  moms=dict(moms=(.9, .8, .9)), reset=dict(reset_opt=True)).items():
    call(f"one_cycle_{n}", lambda L, kw=kw: trained(L.learner(), "fit_one_cycle", 2, .01, **kw))
for n in ("Adam", "SGD", "RMSProp", "QHAdam", "RAdam", "Lamb", "ranger"):
    call(f"opt_{n}", lambda L, n=n: trained(L.learner(opt_func=getattr(L, n)), "fit", 2, .01))
for n, f in dict(mom=lambda L: partial(L.SGD, mom=.9), adam=lambda L: partial(L.Adam, eps=1e-3, sqr_mom=.95),
                 wd=lambda L: partial(L.SGD, wd=.1, decouple_wd=False),
                 wrapped=lambda L: partial(L.OptimWrapper, opt=torch.optim.AdamW)).items():
    call(f"opt_partial_{n}", lambda L, f=f: trained(L.learner(opt_func=f(L)), "fit", 2, .01))
call("lr_of_the_optimizer", lambda L: trained(L.learner(opt_func=partial(L.SGD, lr=.25)), "fit", 1))
call("lr_of_the_learner", lambda L: trained(L.learner(lr=.05), "fit", 1))
call("wd_of_the_learner", lambda L: trained(L.learner(wd=.3), "fit", 1, .01))
call("wd_bn_bias", lambda L: trained(L.learner(wd=.3, wd_bn_bias=True), "fit", 1, .01))
call("fine_tune", lambda L: trained(L.learner(splitter=L.halves, train_bn=True), "fine_tune", 1, .01))
call("fine_tune_freeze_epochs", lambda L: trained(L.learner(splitter=L.halves, train_bn=True), "fine_tune", 1, .01,
                                                  freeze_epochs=2))
call("start_epoch", lambda L: trained(L.learner(), "fit_one_cycle", 3, .01, start_epoch=1))
call("two_fits", lambda L: (trained(L.learner(), "fit", 1, .01), trained(L.learner(), "fit", 1, .01)))
call("no_epochs", lambda L: L.learner().fit(0))


# ---- order of events

def noting(L, **does):
    seen = []
    members = {e: (lambda self, e=e: (seen.append(e), does[e]() if e in does else None)[1]) for e in L.event.__dict__
               if e.startswith(("before_", "after_"))}
    cb = type("Noting", (L.Callback,), members)()
    return cb, seen


def raises(error):
    def act(): raise error()
    return act


def events(L, act, **does):
    cb, seen = noting(L, **{k: raises(getattr(L, v)) for k, v in does.items()})
    learn = L.learner(dls=L.rows(bs=24))
    learn.add_cb(cb)
    act(learn)
    return seen


call("events_fit", lambda L: events(L, lambda l: l.fit(2)))
call("events_one_cycle", lambda L: events(L, lambda l: l.fit_one_cycle(1)))
call("events_validate", lambda L: events(L, lambda l: l.validate()))
call("events_get_preds", lambda L: events(L, lambda l: l.get_preds()))
for at, error in (("before_batch", "CancelBatchException"), ("after_pred", "CancelBatchException"),
                  ("after_loss", "CancelBatchException"), ("before_step", "CancelStepException"),
                  ("before_backward", "CancelBackwardException"), ("before_train", "CancelTrainException"),
                  ("after_batch", "CancelTrainException"), ("before_epoch", "CancelEpochException"),
                  ("before_validate", "CancelValidException"), ("after_epoch", "CancelFitException"),
                  ("before_fit", "CancelFitException")):
    call(f"events_{error}_{at}", lambda L, at=at, error=error: events(L, lambda l: l.fit(1), **{at: error}))
call("after_create", lambda L: (lambda cb, seen: (L.learner(cbs=cb), seen)[1])(*noting(L)))
call("default_callbacks", lambda L: [cb.name for cb in L.learner().cbs][:1])
call("events_of_a_callback_class", lambda L: L.learner(cbs=L.TerminateOnNaNCallback).cbs[-1].name)


# ---- the optimizer

def made(L, **kw):
    learn = L.learner(splitter=L.halves, **kw)
    learn.create_opt()
    return learn


for n in ("Adam", "SGD", "RMSProp"):
    call(f"hypers_{n}", lambda L, n=n: [sorted(h) for h in made(L, opt_func=getattr(L, n)).opt.hypers])
call("hypers_values", lambda L: [{k: round(float(v), 6) for k, v in sorted(h.items())} for h in made(L).opt.hypers])
call("hypers_set", lambda L: (o := made(L).opt, o.hypers[0].__setitem__("lr", .5), [h["lr"] for h in o.hypers])[-1])
call("hypers_update", lambda L: (o := made(L).opt, o.hypers[1].update(lr=.5, wd=.2),
                                 [(h["lr"], h["wd"]) for h in o.hypers])[-1])
for n, v in dict(number=.1, list=[.1, .2], slice=slice(.1, .2), stop=slice(.2)).items():
    call(f"set_hyper_{n}", lambda L, v=v: (o := made(L).opt, o.set_hyper("lr", v),
                                           [float(h["lr"]) for h in o.hypers])[-1])
call("set_hypers", lambda L: (o := made(L).opt, o.set_hypers(lr=.3, wd=[.1, .2]),
                              [(h["lr"], h["wd"]) for h in o.hypers])[-1])
call("set_hyper_mom", lambda L: (o := made(L).opt, o.set_hyper("mom", .7), [h["mom"] for h in o.hypers])[-1])
call("set_hyper_too_many", lambda L: made(L).opt.set_hyper("lr", [.1, .2, .3]))
call("param_lists", lambda L: [[tuple(p.shape) for p in g] for g in made(L).opt.param_lists])
call("all_params", lambda L: len(made(L).opt.all_params()))
call("optimizer_state", lambda L: (l := made(L), l.fit(1), sorted(l.opt.state[next(l.model.parameters())]))[-1])
for n in (0, 1, -1, -2):
    call(f"freeze_to_{n}", lambda L, n=n: (l := made(L, train_bn=True), l.freeze_to(n),
                                           [p.requires_grad for p in l.model.parameters()])[-1])
call("freeze", lambda L: (l := made(L, train_bn=True), l.freeze(), [p.requires_grad for p in l.model.parameters()])[-1])
call("unfreeze", lambda L: (l := made(L), l.freeze(), l.unfreeze(),
                            [p.requires_grad for p in l.model.parameters()])[-1])
call("freeze_norms", lambda L: (l := made(L), l.freeze(), [p.requires_grad for p in l.model.parameters()])[-1])
call("requires_grad_by_hand", lambda L: (l := L.learner(), l.model[0].requires_grad_(False),
                                         w := l.model[0].weight.clone(), l.fit(1),
                                         bool((w == l.model[0].weight).all()))[-1])


# ---- predictions

LOSSES = dict(flat=(lambda L: L.CrossEntropyLossFlat(), 3, None), torch=(lambda L: nn.CrossEntropyLoss(), 3, None),
              function=(lambda L: F.cross_entropy, 3, None),
              smooth=(lambda L: L.LabelSmoothingCrossEntropyFlat(), 3, None),
              mse=(lambda L: L.MSELossFlat(), 1, lambda y: y[:, None].float()),
              l1=(lambda L: L.L1LossFlat(), 1, lambda y: y[:, None].float()),
              bce=(lambda L: L.BCEWithLogitsLossFlat(), 3, lambda y: F.one_hot(y, 3).float()),
              focal=(lambda L: L.FocalLossFlat(), 3, None))


@cache
def predictor(L, loss):
    make, out, targets = LOSSES[loss]
    x, y = numbered()
    learn = L.learner(L.rows(x, targets(y) if targets else y), L.net(out), loss_func=make(L), metrics=None)
    learn.fit(1, .01)
    return learn


for n in LOSSES: call(f"get_preds_{n}", lambda L, n=n: predictor(L, n).get_preds())
for n in ("flat", "bce", "focal", "mse"):
    call(f"decoded_{n}", lambda L, n=n: predictor(L, n).get_preds(with_decoded=True))
for n in ("flat", "mse", "smooth"): call(f"with_loss_{n}", lambda L, n=n: predictor(L, n).get_preds(with_loss=True))
for n, kw in dict(train=dict(ds_idx=0), inputs=dict(with_input=True), act=dict(act=torch.sigmoid),
                  all=dict(with_input=True, with_loss=True, with_decoded=True), unordered=dict(reorder=False),
                  no_targets=dict(with_targs=False), no_preds=dict(with_preds=False)).items():
    call(f"get_preds_of_{n}", lambda L, kw=kw: predictor(L, "flat").get_preds(**kw))
call("get_preds_dl", lambda L: (l := predictor(L, "flat"), l.get_preds(dl=l.dls.valid))[-1])
call("get_preds_no_loader", lambda L: predictor(L, "flat").get_preds(dl=3))
call("validate", lambda L: list(predictor(L, "flat").validate()))
call("validate_train", lambda L: list(predictor(L, "flat").validate(0)))
call("validate_dl", lambda L: (l := predictor(L, "flat"), list(l.validate(dl=l.dls.train)))[-1])
call("one_batch", lambda L: [tuple(o.shape) for o in predictor(L, "flat").dls.one_batch()])
for n in ("flat", "smooth", "mse"):
    call(f"loss_reduction_{n}", lambda L, n=n: (l := predictor(L, n), l.loss_func.reduction)[-1])


# ---- records

@cache
def fitted(L):
    learn = L.learner()
    learn.fit_one_cycle(2, .01)
    return learn


call("recorder_names", lambda L: list(fitted(L).recorder.metric_names))
call("recorder_values", lambda L: np.array(fitted(L).recorder.values, float))
call("recorder_losses", lambda L: [float(o) for o in fitted(L).recorder.losses])
call("recorder_lrs", lambda L: [float(o) for o in fitted(L).recorder.lrs])
call("recorder_iters", lambda L: [int(o) for o in fitted(L).recorder.iters])
call("recorder_log", lambda L: len(fitted(L).recorder.log))
call("final_record", lambda L: len(fitted(L).final_record))
call("plot_loss", lambda L: (L.plt.close("all"), fitted(L).recorder.plot_loss(), len(L.plt.gca().lines))[-1])
call("plot_sched", lambda L: (L.plt.close("all"), fitted(L).recorder.plot_sched(), len(L.plt.gcf().axes))[-1])
call("hps", lambda L: sorted(fitted(L).recorder.hps))
call("names_of_partials", lambda L: list(L.learner(metrics=[partial(L.top_k_accuracy, k=2),
                                                            L.error_rate]).metrics.attrgot("name")))
call("names_of_two_partials", lambda L: list(L.learner(metrics=[partial(L.top_k_accuracy, k=2),
    partial(L.top_k_accuracy, k=1)]).metrics.attrgot("name")))
call("train_metrics", lambda L: (l := L.learner(), setattr(l.recorder, "train_metrics", True), l.fit(1),
                                 list(l.recorder.metric_names))[-1])
for n, f in dict(f1=lambda L: L.F1Score(average="macro"), error=lambda L: L.error_rate, kappa=lambda L: L.CohenKappa(),
                 balanced=lambda L: L.BalancedAccuracy()).items():
    call(f"metric_{n}", lambda L, f=f: trained(L.learner(metrics=f(L)), "fit", 1, .01))


# ---- callbacks

CALLBACKS = dict(early=lambda L: L.EarlyStoppingCallback(patience=1), save=lambda L: L.SaveModelCallback(),
                 save_metric=lambda L: L.SaveModelCallback(monitor="accuracy"),
                 plateau=lambda L: L.ReduceLROnPlateau(patience=1, min_delta=10.),
                 nan=lambda L: L.TerminateOnNaNCallback(), accumulate=lambda L: L.GradientAccumulation(32),
                 clip=lambda L: L.GradientClip(.1), short=lambda L: L.ShortEpochCallback(.5),
                 freeze=lambda L: L.BnFreeze(), csv=lambda L: L.CSVLogger(),
                 every=lambda L: L.SaveModelCallback(every_epoch=True),
                 at_end=lambda L: L.SaveModelCallback(at_end=True), collect=lambda L: L.CollectDataCallback(),
                 mixup=lambda L: L.MixUp(), cutmix=lambda L: L.CutMix())
for n, f in CALLBACKS.items():
    if n != "cutmix": call(f"callback_{n}", lambda L, f=f: trained(L.learner(), "fit", 2, .01, cbs=f(L)))
call("own_metric_saved", lambda L: (acc := types.FunctionType((lambda p, t: (p.argmax(1) == t).float().mean()).__code__,
    globals(), "acc_camvid"), trained(L.learner(metrics=acc), "fit", 1, .01,
                                      cbs=L.SaveModelCallback(monitor="acc_camvid")))[-1])
call("partial_monitored", lambda L: trained(L.learner(metrics=partial(L.top_k_accuracy, k=2)), "fit", 1, .01,
                                            cbs=L.EarlyStoppingCallback(monitor="top_k_accuracy")))
call("monitor_unknown", lambda L: L.learner().fit(1, cbs=L.SaveModelCallback(monitor="accurcy")))
call("csv_columns", lambda L: (l := L.learner(), l.fit(1, cbs=L.CSVLogger()),
                               list(pd.read_csv(l.path / "history.csv").columns))[-1])
call("callback_error", lambda L: L.learner(cbs=noting(L, before_batch=raises(ZeroDivisionError))[0]).fit(1))
call("schedule", lambda L: trained(L.learner(), "fit", 1,
                                   cbs=L.ParamScheduler({"lr": L.combined_cos(.25, 1e-3, 1e-2, 1e-5)})))
call("added_cbs", lambda L: (l := L.learner(), n := len(l.cbs), l.added_cbs(L.BnFreeze()).__enter__(),
                             len(l.cbs) - n)[-1])
call("remove_cb", lambda L: (l := L.learner(cbs=L.BnFreeze()), n := len(l.cbs), l.remove_cb(L.BnFreeze),
                             len(l.cbs) - n)[-1])
call("no_bar", lambda L: (l := L.learner(), l.no_bar().__enter__() is l)[-1])
call("no_logging", lambda L: (l := L.learner(quiet=False), l.no_logging().__enter__() is l)[-1])
call("show_training_loop", lambda L: L.learner().show_training_loop())
call("name_of_a_callback", lambda L: hasattr(L.learner(cbs=L.GradientAccumulation()), "gradient_accumulation"))


# ---- learning rates, files

call("lr_find", lambda L: type(L.learner().lr_find(num_it=20, show_plot=False)).__name__)
call("lr_find_short", lambda L: type(L.learner().lr_find(num_it=8, show_plot=False)).__name__)
call("lr_find_suggests", lambda L: L.learner().lr_find(num_it=30, show_plot=False,
                                                       suggest_funcs=(L.minimum, L.steep, L.valley, L.slide))._fields)
call("lr_find_valley", lambda L: isinstance(float(L.learner().lr_find(num_it=40, show_plot=False).valley), float))
call("lr_find_trace", lambda L: (l := fitted(L), n := len(l.recorder.values), l.lr_find(num_it=20, show_plot=False),
                                 len(l.recorder.values) == n)[-1] if L.name == "ftlib" else True)
call("plot_lr_find", lambda L: (l := L.learner(), l.lr_find(num_it=20, show_plot=False),
                                l.recorder.plot_lr_find())[-1] is not None or L.name == "fastai")
call("save", lambda L: L.learner().save("model").name)
call("save_load", lambda L: (l := L.learner(), l.fit(1, .01), l.save("m"), s := scores(l), l.fit(1, .1), l.load("m"),
                             np.allclose(s, scores(l)))[-1])
call("load_without_opt", lambda L: (l := L.learner(), l.fit(1), l.save("bare", with_opt=False),
                                    l.load("bare") is l)[-1])
call("load_missing", lambda L: L.learner().load("never_saved"))
call("export", lambda L: (l := L.vision(), l.export("e.pkl"), type(L.load_learner(L.tmp / "e.pkl")).__name__)[-1])
call("load_model", lambda L: (l := L.learner(), l.fit(1), f := l.save("f"),
                              L.load_model(f, L.net(), None, with_opt=False))[-1])


# ---- networks for images

def shape(t): return tuple(t.shape) if hasattr(t, "shape") else t


@cache
def seen(L): return L.vision()


call("vision_parts", lambda L: len(seen(L).model))
call("vision_map", lambda L: shape(seen(L).model[0](torch.rand(2, 3, 64, 64))))
call("vision_head", lambda L: [type(m).__name__ for m in seen(L).model[1]])
call("vision_head_sizes", lambda L: [(m.in_features, m.out_features) for m in seen(L).model[1]
                                     if isinstance(m, nn.Linear)])
call("vision_out", lambda L: shape(seen(L).model.eval()(torch.rand(2, 3, 64, 64))))
call("vision_parameters", lambda L: sum(p.numel() for p in seen(L).model.parameters()))
call("vision_features", lambda L: L.num_features_model(seen(L).model[0]))
call("vision_cam", lambda L: (lambda h: (seen(L).model.eval()(torch.rand(2, 3, 64, 64)), shape(h.stored),
                                         h.remove())[1])(L.hook_output(seen(L).model[0])))
call("vision_hook_outputs", lambda L: (lambda h: (seen(L).model.eval()(torch.rand(2, 3, 64, 64)), len(h.stored),
                                                  h.remove())[1])(L.hook_outputs(list(seen(L).model))))
call("vision_default_split", lambda L: [len(g) for g in L.default_split(seen(L).model)])
call("vision_slice", lambda L: type(seen(L).model[1:]).__name__)
call("vision_script", lambda L: shape(torch.jit.script(L.vision().model.eval())(torch.rand(2, 3, 64, 64))))
call("vision_loss", lambda L: getattr(seen(L).loss_func, "reduction", None))
call("vision_vocab", lambda L: list(seen(L).dls.vocab))
call("vision_summary", lambda L: "Total params" in str(L.vision().summary()))
call("vision_predict", lambda L: (lambda p: (p[0] in CLASSES, shape(p[1]),
                                             shape(p[2])))(L.vision().predict(L.files()[0])))
call("vision_predict_input", lambda L: len(L.vision().predict(L.files()[0], with_input=True)))
call("vision_test_dl", lambda L: list(map(shape, (l := L.vision(), l.get_preds(dl=l.dls.test_dl(L.files()[:5])))[-1])))
call("vision_test_dl_labels", lambda L: list(map(shape,
                                                 (l := L.vision(),
                                                 l.get_preds(dl=l.dls.test_dl(L.files()[:5], with_labels=True)))[-1])))
call("vision_tta", lambda L: [shape(o) for o in L.vision().tta(n=2)])
call("vision_logger_attributes", lambda L: (l := seen(L), l.n_out, l.normalize, l.pretrained)[1:])
call("vision_normalized", lambda L: [type(f).__name__ for f in L.vision().dls.after_batch.fs])
call("vision_groups", lambda L: (l := L.vision(), l.create_opt(), len(l.opt.param_lists))[-1])
call("vision_three_lrs", lambda L: (l := L.vision(), l.fit(1, [1e-5, 1e-4, 1e-3]), float(l.opt.hypers[-1]["lr"]))[-1])
call("vision_splitter", lambda L: (l := L.vision(splitter=L.default_split), l.create_opt(), len(l.opt.param_lists))[-1])
for n, kw in dict(no_concat=dict(concat_pool=False), widths=dict(lin_ftrs=[32]), ps=dict(ps=.1),
    first=dict(first_bn=False), final=dict(bn_final=True), linear=dict(lin_first=True), y=dict(y_range=(0, 1)),
                  n_out=dict(n_out=7), no_init=dict(init=None)).items():
    call(f"vision_head_{n}", lambda L, kw=kw: (m := L.vision(**kw).model, [type(o).__name__ for o in m[1]],
                                               shape(m.eval()(torch.rand(2, 3, 64, 64))))[1:])
call("vision_head_grey", lambda L: (m := L.vision(L.grey(), n_in=1).model, [type(o).__name__ for o in m[1]],
                                    shape(m.eval()(torch.rand(2, 1, 64, 64))))[1:])
call("vision_other_channels", lambda L: type(L.vision(n_in=1)).__name__)


def flipped(image, **others):
    "Takes and gives arrays by name, as a transform of albumentations does"
    return {k: np.ascontiguousarray(v[:, ::-1]) for k, v in dict(image=image, **others).items()}


def arrays(L, masks):
    "The way of fastai's tutorial on albumentations: an item transform of both, image and target"
    class Both(L.ItemTransform):
        split_idx = 0
        def encodes(self, xy):
            x, y = xy
            if not masks: return L.PILImage.create(flipped(image=np.array(x))["image"]), y
            out = flipped(image=np.array(x), mask=np.array(y))
            return L.PILImage.create(out["image"]), L.PILMask.create(out["mask"])
    return [Both(), L.Resize(32, method="squish")]


call("arrays_batch", lambda L: L.images(item_tfms=arrays(L, False)).train.new(shuffle=False).one_batch()[0].mean(2))
call("arrays_trained", lambda L: (l := L.vision(L.images(item_tfms=arrays(L, False))), l.fit(1, .01),
                                  len(l.recorder.losses), len(l.recorder.values))[2:])
call("arrays_masks", lambda L: [o.float().mean(-1) for o in L.segmentation(item_tfms=arrays(L, True)).train.new(
    shuffle=False).one_batch()])


class Means(nn.Module):
    def __init__(self, n=512): super().__init__(); self.l = nn.Linear(n, 3)
    def forward(self, x): return self.l(x.mean((2, 3)))


call("head_own", lambda L: (l := L.vision(custom_head=Means()), l.fit(1), len(l.recorder.values))[-1])
call("head_own_pools", lambda L: shape(L.vision(custom_head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(512, 3))).model.eval()(torch.rand(2, 3, 64, 64))))
call("cut_function",
     lambda L: shape(L.vision(cut=lambda m: nn.Sequential(*list(m.children())[:-2])).model.eval()(torch.rand(2, 3, 64,
                                                                                                             64))))
call("cut_number", lambda L: shape(L.vision(cut=-3).model[0](torch.rand(2, 3, 64, 64))))


def small(pretrained=True):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 10))


call("arch_function", lambda L: shape(L.vision(arch=small).model.eval()(torch.rand(2, 3, 64, 64))))
call("arch_function_pretrained", lambda L: (l := L.vision(arch=small, pretrained=True), l.fit(1),
                                            len(l.recorder.values))[-1])
call("arch_name", lambda L: shape(L.vision(arch="resnet18").model.eval()(torch.rand(2, 3, 64, 64))))
call("arch_old_name", lambda L: shape(L.vision(arch="mobilenetv3_small_075").model.eval()(torch.rand(2, 3, 64, 64))))
call("arch_unknown", lambda L: L.vision(arch="resnet81"))


# ---- loaders and targets of every kind, trained

def frame(L):
    return pd.DataFrame(dict(name=[str(p.relative_to(folder())) for p in L.files()],
                             label=[p.parent.name for p in L.files()]))
def run(L, dls, **kw): return (l := L.vision(dls, **kw), l.fit(1), len(l.recorder.values), shape(l.get_preds()[0]))[2:]


IMAGES = dict(item=lambda L: dict(item_tfms=L.Resize(32), bs=4, num_workers=0, device=torch.device("cpu")))["item"]
LOADERS = dict(
    path_func=lambda L: L.images(), folder=lambda L: L.ImageDataLoaders.from_folder(folder(), **IMAGES(L)),
    name_func=lambda L: L.ImageDataLoaders.from_name_func(folder(), L.files(), lambda n: n.split("_")[0], seed=1,
                                                          **IMAGES(L)),
    name_re=lambda L: L.ImageDataLoaders.from_name_re(folder(), L.files(), r"^(.*?)_", seed=1, **IMAGES(L)),
    lists=lambda L: L.ImageDataLoaders.from_lists(folder(), L.files(), [p.parent.name for p in L.files()], seed=1,
                                                  **IMAGES(L)),
    df=lambda L: L.ImageDataLoaders.from_df(frame(L), folder(), seed=1, **IMAGES(L)),
    get_x=lambda L: L.DataBlock((L.ImageBlock, L.CategoryBlock), get_items=lambda _: list(frame(L).name),
        get_x=lambda n: folder() / n, get_y=lambda n: Path(n).parent.name, splitter=L.RandomSplitter(seed=1),
                                item_tfms=L.Resize(32)).dataloaders(folder(), bs=4, num_workers=0),
    augmented=lambda L: L.images(batch_tfms=L.aug_transforms(size=32)),
    grey=lambda L: L.block(L.CategoryBlock, lambda p: p.parent.name))
for n, f in LOADERS.items(): call(f"loaders_{n}", lambda L, f=f: run(L, f(L)))
for n, f in LOADERS.items():
    if n in ("folder", "df", "get_x"): call(f"frozen_{n}", lambda L, f=f: run(L, f(L), arch=small, pretrained=True))
call("frozen_mixup", lambda L: (l := L.vision(arch=small, pretrained=True), l.fit(1, cbs=L.MixUp()),
                                len(l.recorder.values))[-1])


def showing(L, seen):
    def after_epoch(self):
        seen.append(shape(self.dls.train.one_batch()[0])[1:])
        if len(seen) == 1: self.learn.show_results(max_n=2)
    return type("Showing", (L.Callback,), dict(after_epoch=after_epoch))()


call("frozen_callback_looks", lambda L: (s := [], L.vision(arch=small, pretrained=True).fit(1, cbs=showing(L, s)),
                                         s[-1])[-1])
call("frozen_by_hand", lambda L: (l := L.vision(arch=small, pretrained=True), l.model[0].requires_grad_(True),
                                  w := next(l.model[0].parameters()).clone(), l.fit(1, .1),
                                  bool((w != next(l.model[0].parameters())).any()))[-1])
call("several", lambda L: run(L, L.block(L.MultiCategoryBlock, lambda p: [p.parent.name]), metrics=L.accuracy_multi))
call("regression", lambda L: run(L, L.block(L.RegressionBlock, lambda p: float(len(p.name))), metrics=L.mse, n_out=1))
call("points", lambda L: run(L, L.block(L.PointBlock, lambda p: L.tensor([[3., 4.]])), metrics=None, n_out=2))
call("segmentation", lambda L: (l := L.unet_learner(L.segmentation(), L.models.resnet18, pretrained=False, path=L.tmp),
                                l.fit(1, cbs=L.SaveModelCallback()), shape(l.get_preds()[0]))[-1])
call("segmentation_show", lambda L: L.unet_learner(L.segmentation(), L.models.resnet18, pretrained=False,
                                                   path=L.tmp).show_results(max_n=2))
call("segmentation_groups", lambda L: (l := L.unet_learner(L.segmentation(), L.models.resnet18, pretrained=False),
                                       l.create_opt(), len(l.opt.param_lists))[-1])
call("show_batch", lambda L: L.images().show_batch(max_n=2))
call("show_results", lambda L: L.vision().show_results(max_n=2))


# ---- interpretation

@cache
def interpretation(L): return L.ClassificationInterpretation.from_learner(L.vision())


call("confusion_matrix", lambda L: int(interpretation(L).confusion_matrix().sum()))
call("most_confused", lambda L: isinstance(list(interpretation(L).most_confused()), list))
call("top_losses", lambda L: shape(interpretation(L).top_losses(3)[0]))
call("plot_top_losses", lambda L: interpretation(L).plot_top_losses(2))
call("plot_confusion_matrix", lambda L: interpretation(L).plot_confusion_matrix())
call("print_classification_report", lambda L: interpretation(L).print_classification_report())

# ---- errors

call("no_loss", lambda L: L.Learner(L.rows(), L.net()))
call("no_classes", lambda L: L.vision_learner(L.rows(), L.models.resnet18, pretrained=False))
call("unknown_event", lambda L: L.learner()("before_lunch"))
call("wrong_targets", lambda L: L.learner(L.rows(y=torch.arange(48) + 5)).fit(1))
call("wrong_inputs", lambda L: L.learner(L.rows(x=torch.rand(48, 7))).fit(1))
call("monitor_early", lambda L: L.learner().fit(1, cbs=L.EarlyStoppingCallback(monitor="acuracy")))


# ---- both, compared

# Calls that can not be done: both say so, in words of their own
FAIL = set("""set_hyper_too_many get_preds_no_loader monitor_unknown callback_error
           load_missing arch_unknown no_loss no_classes unknown_event wrong_targets
    wrong_inputs monitor_early events_CancelBatchException_before_batch
           events_CancelTrainException_after_batch events_CancelEpochException_before_epoch""".split())


def fails(v): return isinstance(v, str) and v.startswith("fails")


@cache
def library(name): return Library(name)


def plain(v):
    "Numbers, names and shapes of what a call gave"
    if isinstance(v, torch.Tensor): return v.detach().as_subclass(torch.Tensor).float().numpy()
    if isinstance(v, np.ndarray): return v
    if isinstance(v, dict): return {k: plain(o) for k, o in v.items()}
    if isinstance(v, (list, tuple)) or type(v).__name__ in ("L", "TfmdLists"): return [plain(o) for o in v]
    return v if isinstance(v, (str, bool, int, float, type(None))) else type(v).__name__


def same(a, b):
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.shape(a) == np.shape(b) and np.allclose(np.asarray(a, float), np.asarray(b, float), rtol=2e-3,
                                                          atol=1e-4, equal_nan=True)
    if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return bool(np.isclose(a, b, rtol=2e-3, atol=1e-4, equal_nan=True))
    return a == b


def outcome(f, L):
    "What a call gives, or that it fails"
    torch.manual_seed(0); np.random.seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try: return plain(f(L))
        except Exception as e: return f"fails: {type(e).__name__}: {str(e)[:150]}"
        finally: L.plt.close("all")


def differences():
    "What is meant to differ: calls, what either does, and why"
    with open(ROOT / "docs" / "differences.csv", newline="") as f:
        return {c: row for row in csv.DictReader(f) for c in row["calls"].split()}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("FTLIB_PRECISION", "fp32")
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path_factory.mktemp("cache")))


QUICK = [n for i, n in enumerate(CALLS) if i % 3 == 0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CALLS])
def test_a_call_is_the_same(name):
    theirs, ours = (outcome(CALLS[name], library(lib)) for lib in ("fastai", "ftlib"))
    meant = differences().get(name)
    if name in FAIL: assert fails(theirs) and fails(ours), f"fastai: {theirs}\nftlib: {ours}"
    elif meant is None: assert not fails(theirs) and same(theirs, ours), f"fastai: {theirs}\nftlib: {ours}"
    else: assert not same(theirs, ours), f"no difference any more: take it out of docs/differences.csv ({theirs})"


def test_there_are_enough_calls_and_every_difference_has_a_reason():
    assert len(CALLS) >= 150
    meant = differences()
    assert set(meant) <= set(CALLS), set(meant) - set(CALLS)
    assert all(len(row["why"]) > 20 and row["fastai"] and row["ftlib"] for row in meant.values())
