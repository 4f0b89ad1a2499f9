"""What fastai's trackers get wrong and ours get right: each test shows both, so that a claim that is out of date
fails."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.tracker import ReduceLROnPlateau as FastaiPlateau
from fastai.callback.tracker import SaveModelCallback as FastaiSaveModel
from fastai.data.core import DataLoaders
from fastai.learner import Learner as FastaiLearner
from fastai.metrics import mse
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from torch import nn

from ftlib.train.learner import Learner
from ftlib.errors import MetricError
from ftlib.callbacks.stopping import EarlyStopping
from ftlib.callbacks.trackers import ReduceLROnPlateau, SaveModelCallback

WAYS = {"fastai": (FastaiLearner, EarlyStoppingCallback), "ftlib": (Learner, EarlyStopping)}
SAVING = {"fastai": (FastaiLearner, FastaiSaveModel), "ftlib": (Learner, SaveModelCallback)}
PLATEAU = {"fastai": (FastaiLearner, FastaiPlateau), "ftlib": (Learner, ReduceLROnPlateau)}
BOTH = pytest.mark.parametrize("way", WAYS)


class Batches:
    "Tensors, in batches that are there already"
    def __init__(self, X, y, bs=32):
        self.X, self.y, self.bs, self.n, self.dataset, self.device = X, y, bs, len(X), X, X.device
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
            if self.learn.training and self.learn.epoch == 2: raise RuntimeError("here")
    learn, stop = learner(Learner), Fails(patience=3)
    learn.add_cb(stop)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(RuntimeError, match="here"): learn.fit(5, 1e-2)
        assert stop.best is None  # as before the fit
        stop.before_batch = lambda: None
        learn.fit(2, 1e-2)
        assert np.isclose(learn.validate()[0], stop.best, rtol=1e-5)


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).clone()


class Lost(Callback):
    "The loss is NaN from the second step on"
    def after_pred(self): self.learn.pred = self.learn.pred * (float("nan") if self.learn.train_iter else 1)


@BOTH
def test_only_what_a_fit_has_saved_is_loaded(way, tmp_path):
    cls, save = SAVING[way]
    learner(cls, 64, path=tmp_path).save("model")
    learn = learner(cls, 96, path=tmp_path, cbs=Lost())
    theirs = torch.load(tmp_path / "models" / "model.pth")
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=save())
    assert learn.model[0].weight.equal(theirs["0.weight"]) == (way == "fastai")


@BOTH
def test_looking_does_not_overwrite_the_best(way, tmp_path):
    "A look has no training loss: fastai then takes the metric, which is smaller, for the validation loss"
    cls, save = SAVING[way]
    def tenth(pred, y): return (pred - y).square().mean() / 10
    learn = learner(cls, path=tmp_path, cbs=save(monitor="valid_loss"), metrics=tenth)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2)
        kept = (tmp_path / "models" / "model.pth").read_bytes()
        with torch.no_grad(): learn.model[0].weight.mul_(.9)
        learn.validate()
    assert ((tmp_path / "models" / "model.pth").read_bytes() != kept) == (way == "fastai")


@BOTH
def test_the_best_of_both_phases_is_kept(way, tmp_path):
    cls, save = SAVING[way]
    learn = learner(cls, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.add_cb(save())
        learn.fit(3, 1e-3)
        best = learn.validate()[0]
        learn.fit(3, 3.)  # far too high
        assert (learn.validate()[0] > 1.01 * best) == (way == "fastai")


@BOTH
def test_the_rate_of_torchs_optimizers_comes_down(way):
    cls, plateau = PLATEAU[way]
    opt = (lambda params, **kw: OptimWrapper(params, torch.optim.SGD, **kw)) if way == "fastai" else torch.optim.SGD
    learn = learner(cls, opt_func=opt)
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-3, cbs=plateau(min_delta=9.))
    assert (learn.recorder.lrs[-1] < 1e-4) == (way == "ftlib")


@BOTH
def test_the_rate_comes_down_under_a_schedule(way):
    cls, plateau = PLATEAU[way]
    rates = []
    for cbs in (None, plateau(min_delta=9.)):
        learn = learner(cls)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 1e-3, cbs=cbs)
        rates.append(learn.recorder.lrs)
    assert (rates[0] == rates[1]) == (way == "fastai")


def test_a_loss_that_was_never_finite_ends_the_fit(capsys):
    learn = learner(Learner)
    with learn.no_bar(), pytest.warns(UserWarning, match="ended with a loss of"):
        learn.fit(6, 1e30, cbs=EarlyStopping(patience=2))
    assert len(learn.history) == 2 and "valid_loss was not finite for 2 epochs" in capsys.readouterr().out


# ---- earlier fits of the same network

def test_a_second_fit_knows_the_first(capsys):
    "Another callback, another fit, a worse network: the weights of the first fit come back"
    learn = learner(Learner)
    with learn.no_bar():
        learn.fit(8, 1e-2)
        best = learn.history.valid_loss.min()
        learn.fit(3, 1., cbs=EarlyStopping(patience=2))
    assert np.isclose(learn.validate()[0], best, rtol=1e-5) and "phase 1" in capsys.readouterr().out


def test_a_second_fit_that_is_better_counts():
    learn = learner(Learner)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4)
        learn.fit(8, 1e-2, cbs=EarlyStopping(patience=50))
    assert np.isclose(learn.validate()[0], learn.history.valid_loss[1:].min(), rtol=1e-5)


def test_a_file_of_the_best_knows_the_first_fit(tmp_path):
    learn = learner(Learner, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(8, 1e-2)
        best = learn.history.valid_loss.min()
        learn.fit(3, 1., cbs=SaveModelCallback())
        assert np.isclose(learn.validate()[0], best, rtol=1e-5)
        learn.load("model", with_opt=False)
    assert np.isclose(learn.validate()[0], best, rtol=1e-5)


def test_a_mode_of_the_users_own_starts_anew():
    "`max` of a loss is not what the earlier fits were judged by"
    learn = learner(Learner)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        stop = EarlyStopping(mode="max", patience=2)
        learn.fit(2, 1e-2, cbs=stop)
    assert stop.best_at[0] == 2
