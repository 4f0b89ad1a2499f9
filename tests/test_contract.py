"""What every callback owes the learner, ftlib's and those of fastai that are used most: each goes the same course. New
ones of ftlib are found by themselves."""

import copy
import importlib
import pkgutil
from functools import partial

import pytest
import torch
from fastai.callback import all as fc
from fastai.callback.core import Callback, _events
from fastai.callback.tracker import ReduceLROnPlateau as FastaiPlateau
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn

import ftlib
from ftlib.models.network import Body, Network, Normalize
from ftlib.teach.distill import Distill
from ftlib.teach.hints import Hints
from ftlib.callbacks.best import BestWeights
from ftlib.callbacks.budget import Budget
from ftlib.persist.callback_state import callback_state
from ftlib.train.groups import EvalFrozenModules
from ftlib.callbacks.history import EpochLog, Recorder
from ftlib.train.learner import Learner
from ftlib.lr.finder import LRSweep
from ftlib.lr.rates import Schedule
from ftlib.callbacks.progress import Progress
from ftlib.callbacks.stopping import CheckFiniteLoss, EarlyStopping
from ftlib.callbacks.loggers import EpochLogger, MLflowLogger, WandbLogger
from ftlib.callbacks.trackers import MonitorCallback, ReduceLROnPlateau

# How those are made that want something said; the others are made of nothing.
MAKERS = {EarlyStopping: partial(EarlyStopping, "accuracy"),
          ReduceLROnPlateau: partial(ReduceLROnPlateau, patience=1, min_delta=9.),
          Schedule: lambda: Schedule({"lr": lambda share: 1. - share / 2}, [1e-3]),
          Distill: partial(Distill, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
          Budget: partial(Budget, 10.),
          Hints: lambda: Hints(TEACHER, 'fitnet')}
# Every learner has the first ones; of `MonitorCallback` and `EpochLogger` others are made, `LRSweep` belongs to the
# rate finder, and the loggers write to a service, see test_loggers.py
NOT_GIVEN = {Recorder, Progress, EpochLog, BestWeights, CheckFiniteLoss, EvalFrozenModules, MonitorCallback, LRSweep,
             EpochLogger, MLflowLogger, WandbLogger}
FASTAI = {"CSVLogger": fc.CSVLogger, "SaveModel": fc.SaveModelCallback,
          "EarlyStoppingCallback": partial(fc.EarlyStoppingCallback, patience=5),
          "fastai's plateau": partial(FastaiPlateau, patience=1), "TerminateOnNaN": fc.TerminateOnNaNCallback,
          "Tracker": fc.TrackerCallback, "MixUp": fc.MixUp,
          "CutMix": fc.CutMix, "GradientAccumulation": partial(fc.GradientAccumulation, 96),
          "GradientClip": fc.GradientClip, "BnFreeze": fc.BnFreeze,
          "ActivationStats": fc.ActivationStats, "ParamScheduler": partial(fc.ParamScheduler,
              {"lr": fc.combined_cos(.25, 1e-3, 1e-2, 1e-5)}), "FetchPreds": fc.FetchPredsCallback}


def ours():
    "Callbacks that ftlib defines"
    rooms = [importlib.import_module(m.name) for m in pkgutil.walk_packages(ftlib.__path__, "ftlib.")
             if "._modidx" not in m.name]
    found = {o for room in rooms for o in vars(room).values() if isinstance(o, type) and issubclass(o, Callback)
             and o.__module__.startswith("ftlib.")}
    return {cls.__name__: MAKERS.get(cls, cls) for cls in sorted(found - NOT_GIVEN, key=lambda c: c.__name__)}


CALLBACKS = ours() | FASTAI
EVERY = pytest.mark.parametrize("name", CALLBACKS)
EVENTS = [e for e in _events if not e.startswith(("after_cancel", "after_create"))]
X, y = (torch.tensor(o) for o in load_digits(return_X_y=True))
X = X.float().div(16).view(-1, 1, 8, 8)


class Bomb(Callback):
    "At an event of the second epoch, or of the fit"
    order = 1000
    def __init__(self, at, error=RuntimeError): self.moment, self.error = at, error
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def __call__(self, name):
        if name == self.moment and (name in ("before_fit", "after_fit") or self.learn.epoch == 1):
            raise self.error("here")


def network():
    def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())
    return Network(Body(Normalize([.3], [.35]), dict(stem=conv(1, 8), stage1=conv(8, 16), pool=nn.Flatten()), 64,
                        shapes=[(8, 4, 4), (16, 2, 2), (64,)]), nn.Linear(64, 10))


TEACHER = network()


def learner(path, cbs=None):
    set_seed(0)
    net = network()
    pairs = list(zip(X[:384], y[:384], strict=True))
    dls = DataLoaders.from_dsets(pairs[:256], pairs[256:], bs=64, device="cpu", num_workers=0)
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path, precision="fp32", cbs=cbs)


def fit(learn, epochs=2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, **kwargs)


def weights(learn): return [v.clone() for v in learn.model.state_dict().values()]


def same(a, b): return all(map(torch.equal, a, b))


def named(learn): return sorted(type(cb).__name__ for cb in learn.cbs)


def hooks(learn):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
               for m in learn.model.modules())


def assert_usable(learn, loss, names):
    "As before, and able to train, to look and to predict"
    assert learn.loss_func is loss and named(learn) == names and not hooks(learn)
    assert not torch.is_autocast_enabled("cpu") and learn.opt is not None
    assert all(p.grad is None for p in learn.model.parameters())
    rows, before = len(learn.history), weights(learn)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
    assert same(before, weights(learn)) and len(learn.history) == rows
    fit(learn, 1)
    assert len(learn.history) == rows + 1 and not same(before, weights(learn))


@EVERY
def test_success(name, tmp_path):
    learn = learner(tmp_path)
    loss, names = learn.loss_func, named(learn)
    fit(learn, cbs=CALLBACKS[name]())
    assert_usable(learn, loss, names)


@EVERY
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_at_each_event(name, error, tmp_path):
    learn = learner(tmp_path)
    loss, names = learn.loss_func, named(learn)
    for event in EVENTS if error is RuntimeError else ["after_batch", "after_validate"]:
        rows = len(learn.history)
        with pytest.raises(error, match="here"): fit(learn, 3, cbs=[CALLBACKS[name](), Bomb(event, error)])
        # Those that stop early may have ended the fit by then
        assert len(learn.history) - rows == {"before_fit": 0, "after_epoch": 2,
                                             "after_fit": len(learn.history) - rows}.get(event, 1)
        assert_usable(learn, loss, names)


@EVERY
def test_a_sweep_and_a_look_in_between(name, tmp_path):
    def run(between):
        learn = learner(tmp_path, cbs=CALLBACKS[name]())
        cb = learn.cbs[-1]
        fit(learn)
        before = str(callback_state(cb))
        if between:
            with learn.no_bar(), learn.no_logging():
                learn.lr_find(show_plot=False)
                learn.validate()
                learn.get_preds()
        assert str(callback_state(cb)) == before
        set_seed(1)
        fit(learn)
        return weights(learn), learn.history.drop(columns=["seconds"])
    (a, h), (b, g) = run(True), run(False)
    assert same(a, b) and h.equals(g)


# it holds on to an open file, which can't be copied
@pytest.mark.parametrize("name", [n for n in CALLBACKS if n != "CSVLogger"])
def test_two_fits_and_a_copy(name, tmp_path):
    learn = learner(tmp_path, cbs=CALLBACKS[name]())
    fit(learn)
    other, before = copy.deepcopy(learn), weights(learn)
    fit(other)
    assert same(before, weights(learn)) and learn.history.phase.max() == 1 and other.history.phase.max() == 2
    set_seed(2)
    fit(learn)
    assert learn.history.phase.max() == 2


@EVERY
def test_killed_and_resumed(name, tmp_path):
    def run(place, event=None, resume=False):
        learn = learner(tmp_path)
        fit(learn, 3, cbs=[CALLBACKS[name](), Bomb(event, KeyboardInterrupt)], checkpoint=tmp_path / place,
            resume=resume)
        return weights(learn), learn.history.drop(columns=["seconds"])
    whole, history = run("whole")
    for event in ("after_batch", "before_validate"):
        with pytest.raises(KeyboardInterrupt): run(event, event)
        again, rows = run(event, resume=True)
        assert same(again, whole) and rows.equals(history)


# ---- a look from within a fit

LOOKS = {"validate": lambda l: l.validate(), "get_preds": lambda l: l.get_preds(),
         "lr_find": lambda l: l.lr_find(num_it=10, show_plot=False),
         "get_preds of the training set": lambda l: l.get_preds(ds_idx=0)}


class Looks(Callback):
    "Asks something of the learner in the midst of a fit"
    order = 90
    def __init__(self, look, event): self.look, self.event, self.modes, self.busy = look, event, [], False
    def after_batch(self): self._ask("after_batch")
    def after_epoch(self): self._ask("after_epoch")

    def _ask(self, event):
        if event != self.event or self.busy or hasattr(self.learn, "lr_finder"): return
        if not self.learn.training and event == "after_batch": return
        self.busy, before = True, [m.training for m in self.learn.model.modules()]
        self.look(self.learn)
        self.busy = False
        assert [m.training for m in self.learn.model.modules()] == before


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("event", ["after_batch", "after_epoch"])
def test_a_look_from_within_a_fit_leaves_no_trace(look, event, tmp_path):
    if (look, event) == ("lr_find", "after_batch"): pytest.skip("a sweep trains; within a batch there is one already")
    def run(cbs):
        torch.manual_seed(0)
        learn = learner(tmp_path)
        learn.seed = 1
        fit(learn, 2, cbs=cbs)
        return weights(learn)
    assert same(run(None), run(Looks(LOOKS[look], event)))
