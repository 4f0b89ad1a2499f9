"""What fastai's trackers get wrong and ours get right: each test shows both, so that a claim that is out of date fails."""

import numpy as np
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner as FastaiLearner
from fastai.metrics import mse
from fastai.torch_core import set_seed
from torch import nn

from ftlib.train.learner import Learner
from ftlib.train.metrics import MetricError
from ftlib.train.stopping import EarlyStopping

WAYS = {"fastai": (FastaiLearner, EarlyStoppingCallback), "ftlib": (Learner, EarlyStopping)}
BOTH = pytest.mark.parametrize("way", WAYS)


class Batches:
    "Tensors, in batches that are there already"
    def __init__(self, X, y, bs=32): self.X, self.y, self.bs, self.n, self.dataset, self.device = X, y, bs, len(X), X, X.device
    def __len__(self): return -(-self.n // self.bs)
    def __iter__(self): return zip(self.X.split(self.bs), self.y.split(self.bs))
    def to(self, device): return self


def learner(cls, n=96, **kwargs):
    "A network that soon learns its few noisy examples by heart"
    set_seed(0)
    X = torch.randn(2 * n, 10)
    y = X[:, :1] + torch.randn(2 * n, 1)
    net = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 1))
    dls = DataLoaders(Batches(X[:n], y[:n]), Batches(X[n:], y[n:]))
    return cls(dls, net, **dict(loss_func=nn.MSELoss(), metrics=mse) | kwargs)


def fitted(way, epochs=20, lr=1e-2, **kwargs):
    "The learner, its losses on the validation set by epoch, and the one that it ends with"
    cls, stop = WAYS[way]
    learn = learner(cls)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, cbs=stop(**kwargs))
        losses = [v[1] for v in learn.recorder.values]
        return losses, learn.validate()[0]


@BOTH
def test_the_best_weights_are_left(way):
    losses, last = fitted(way, patience=3)
    assert 3 < len(losses) < 20 and min(losses) < .99 * losses[-1]
    assert np.isclose(last, losses[-1] if way == "fastai" else min(losses), rtol=1e-5)


@BOTH
def test_the_best_weights_are_left_where_nothing_was_stopped(way):
    losses, last = fitted(way, patience=50)
    assert len(losses) == 20 and np.isclose(last, losses[-1] if way == "fastai" else min(losses), rtol=1e-5)


@BOTH
def test_the_direction_is_not_guessed_from_the_name(way):
    "`mse` is no loss by its name: fastai takes the largest for the best"
    losses, _ = fitted(way, monitor="mse", patience=3)
    assert (len(losses) == 4) == (way == "fastai") and (len(losses) == 4 or np.argmin(losses) == len(losses) - 4)


@BOTH
def test_a_mistyped_monitor_says_what_there_is(way):
    with pytest.raises((MetricError, IndexError, AssertionError)) as raised: fitted(way, monitor="valid_los")
    assert ("valid_loss" in str(raised.value)) == (way == "ftlib")


@BOTH
def test_one_cycle_is_not_stopped_at_its_peak(way):
    cls, stop = WAYS[way]
    learn = learner(cls)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(20, .3, cbs=stop(patience=2))
    rates = np.array(learn.recorder.lrs)
    assert (rates[-1] > .15) == (way == "fastai"), rates[-1]


def test_a_validation_in_between_counts_as_no_epoch():
    learn, stop = learner(Learner), EarlyStopping(patience=3)
    learn.add_cb(stop)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2)
        before = stop.best, stop.best_at, stop.waited
        learn.validate()
        learn.lr_find(show_plot=False)
        assert (stop.best, stop.best_at, stop.waited) == before
        learn.fit(3, 1e-2)
    assert stop.best == min(learn.history.valid_loss)


def test_an_error_in_a_fit_leaves_what_was_best():
    class Fails(EarlyStopping):
        def before_batch(self):
            super().before_batch()
            if self.learn.training and self.learn.epoch == 2: raise RuntimeError("here")
    learn, stop = learner(Learner), Fails(patience=3)
    learn.add_cb(stop)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(RuntimeError, match="here"): learn.fit(5, 1e-2)
        assert stop.best is None  # as before the fit
        stop.before_batch = lambda: None
        learn.fit(2, 1e-2)
        assert np.isclose(learn.validate()[0], stop.best, rtol=1e-5)
