"""What fastai's learner gets wrong and ours gets right: each test shows both, so that a claim that is out of date
fails."""

import random
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import minimum, slide, steep, valley
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner as FastaiLearner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, top_k_accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed, tensor
from sklearn.datasets import load_digits
from torch import nn
from torch.overrides import TorchFunctionMode

from ftlib.models.network import Body, Network, Normalize
from ftlib.train.learner import Learner
from ftlib.lr.curve import LRCurve
from ftlib.lr.optimizer import TorchOptimizer
from ftlib.models.precision import PrecisionPolicy

BOTH = pytest.mark.parametrize("cls", [FastaiLearner, Learner])


def network():
    def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())
    stages = dict(stem=conv(1, 8), stage1=conv(8, 16), pool=nn.Flatten())
    return Network(Body(Normalize([.3], [.35]), stages, 64), nn.Linear(64, 10))


def learner(cls, path, bs=64, n=1400, **kwargs):
    set_seed(0)
    X, y = load_digits(return_X_y=True)
    pairs = list(zip(torch.tensor(X / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)))
    dls = DataLoaders.from_dsets(pairs[:n], pairs[1400:], bs=bs, device="cpu", num_workers=0)
    learn = cls(dls, network(), **dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path) | kwargs)
    return learn


def quietly(learn, call, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, call)(*args, **kwargs)


def weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])


class Fails(Callback):
    "Like a device without memory, or the stop button, at one step"
    def __init__(self, at, error=RuntimeError): self.at, self.error = at, error
    def before_batch(self):
        if self.learn.training and self.learn.train_iter == self.at: raise self.error("here")


# --- lr_find

@BOTH
def test_a_sweep_that_fails_puts_weights_and_rates_back(cls, tmp_path):
    learn = learner(cls, tmp_path)
    quietly(learn, "fit", 1, 1e-2)
    before, lrs = weights(learn), [h["lr"] for h in learn.opt.hypers]
    with learn.added_cbs(Fails(90)), pytest.raises(RuntimeError):
        quietly(learn, "lr_find", show_plot=False, stop_div=False)
    same = weights(learn).equal(before) and [h["lr"] for h in learn.opt.hypers] == lrs
    assert same == (cls is Learner)


@BOTH
def test_a_sweep_leaves_the_random_states(cls, tmp_path):
    learn = learner(cls, tmp_path)
    def states(): return random.getstate(), torch.get_rng_state().tolist(), learn.dls.train.rng.getstate()
    before = states()
    quietly(learn, "lr_find", show_plot=False)
    assert (states() == before) == (cls is Learner)


@BOTH
def test_a_sweep_leaves_history_and_log_file(cls, tmp_path):
    learn = learner(cls, tmp_path, cbs=CSVLogger())
    quietly(learn, "fit", 2, 1e-2)
    before = (tmp_path / "history.csv").read_text(), len(learn.recorder.losses), len(learn.recorder.values)
    quietly(learn, "lr_find", show_plot=False)
    after = (tmp_path / "history.csv").read_text(), len(learn.recorder.losses), len(learn.recorder.values)
    assert (after == before) == (cls is Learner)


def test_short_sweeps(tmp_path):
    theirs = learner(FastaiLearner, tmp_path)
    with pytest.raises(IndexError): quietly(theirs, "lr_find", start_lr=1, end_lr=1000, show_plot=False)
    with pytest.raises(IndexError): quietly(theirs, "lr_find", num_it=20, suggest_funcs=slide, show_plot=False)
    ours = learner(Learner, tmp_path)
    assert not quietly(ours, "lr_find", start_lr=1, end_lr=1000, show_plot=False).clear
    assert quietly(ours, "lr_find", num_it=20, suggest_funcs=slide, show_plot=False).slide > 0


def test_a_sweep_without_batches(tmp_path):
    def empty(cls): return learner(cls, tmp_path, n=10)
    for cls, error, says in ((FastaiLearner, ZeroDivisionError, "division"),
                             (Learner, ValueError, "10 training images")):
        learn = empty(cls)
        learn.dls.loaders[0] = learn.dls.train.new(bs=64, drop_last=True)
        with pytest.raises(error, match=says): quietly(learn, "lr_find")


def test_no_descent_is_said():
    lrs = np.geomspace(1e-7, 10, 100)
    rng = np.random.default_rng(0)
    flat = 2.3 + .02 * rng.standard_normal(100)
    rising = flat + 3 / (1 + (.05 / lrs) ** 2)
    for losses, told in ((flat, np.nan), (rising, 1e-2)):
        theirs = [float(f(tensor(lrs), tensor(losses), 100)[0]) for f in (minimum, steep, valley, slide)]
        assert np.isfinite(theirs).all(), "fastai tells a rate for any curve"
        curve = LRCurve(lrs, losses)
        assert not curve.descends and "No clear descent" in curve.verdict and np.isnan(curve.lr_steep)
        assert np.isnan(curve.suggested) if np.isnan(told) else told / 10 < curve.suggested < told


def test_an_infinite_tail_is_left_out():
    lrs = np.geomspace(1e-7, 10, 100)
    losses = 2.3 - 1.5 / (1 + (3e-3 / lrs) ** 2)
    cut = LRCurve(lrs[:92], losses[:92])
    losses[92:] = np.inf
    assert float(steep(tensor(lrs), tensor(losses), 100)[0]) > lrs[90], "fastai takes the first infinite point"
    curve = LRCurve(lrs, losses)
    assert (curve.lr_min, curve.lr_steep) == (cut.lr_min, cut.lr_steep)


def test_smoothing_does_not_lag():
    lrs = np.geomspace(1e-7, 10, 100)
    x = np.log10(lrs)
    losses = 2.3 - 1.5 * np.exp(-.5 * ((x + 2) / .8) ** 2)  # a valley whose lowest point is at 1e-2
    smoothed = torch.zeros(())
    theirs = []
    for i, loss in enumerate(losses):  # what fastai's recorder does to losses
        smoothed = torch.lerp(torch.tensor(loss, dtype=torch.float32), smoothed, .98)
        theirs.append(float(smoothed / (1 - .98 ** (i + 1))))
    assert lrs[int(np.argmin(theirs))] > 3e-2
    assert 8e-3 < 10 ** LRCurve(lrs, losses).x[LRCurve(lrs, losses).i_min] < 1.25e-2


def test_the_plot_marks_what_is_told(tmp_path):
    theirs = learner(FastaiLearner, tmp_path)
    told = quietly(theirs, "lr_find", suggest_funcs=minimum).minimum
    marked = [line.get_xdata()[0] for line in plt.gca().lines if len(line.get_xdata()) == 1]
    assert not np.isclose(told, marked).any(), "fastai tells a tenth and marks the minimum"
    plt.close("all")
    found = quietly(learner(Learner, tmp_path), "lr_find")
    found.plot()
    marks = [line.get_xdata()[0] for line in plt.gca().lines if len(line.get_xdata()) <= 2]
    plt.close("all")
    for rate in found: assert np.isclose(rate, marks).any()


def test_a_sweep_at_relative_rates(tmp_path):
    "The sweep is done at the rates that training will have, group by group"
    seen = []
    class Note(Callback):
        def after_batch(self): self.learn.training and seen.append([h["lr"] for h in self.learn.opt.hypers])
    learn = learner(Learner, tmp_path, cbs=Note())
    even = quietly(learn, "lr_find", show_plot=False)
    assert all(lrs[0] == lrs[-1] for lrs in seen)
    seen.clear()
    sliced = quietly(learn, "lr_find", show_plot=False, ratios=slice(1e-2, 1))
    assert all(np.isclose(lrs[0], lrs[-1] / 100) for lrs in seen)
    assert even.lr_min != sliced.lr_min


def test_a_sweep_needs_no_writable_folder(tmp_path):
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(FileExistsError): quietly(learner(FastaiLearner, tmp_path), "lr_find", show_plot=False)
    assert quietly(learner(Learner, tmp_path), "lr_find", show_plot=False).clear
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


@BOTH
def test_a_tracker_is_not_touched_by_a_sweep(cls, tmp_path):
    learn = learner(cls, tmp_path, cbs=SaveModelCallback())
    quietly(learn, "fit", 1, 1e-2)
    best, stamp = learn.save_model.best, (tmp_path / "models" / "model.pth").stat().st_mtime_ns
    quietly(learn, "lr_find", show_plot=False)
    same = learn.save_model.best == best and (tmp_path / "models" / "model.pth").stat().st_mtime_ns == stamp
    assert same == (cls is Learner)


# --- learner and recorder

@BOTH
@pytest.mark.parametrize("call", ["get_preds", "validate", "predict", "summary"])
def test_looking_does_not_wipe_the_recorder(cls, call, tmp_path):
    learn = learner(cls, tmp_path)
    quietly(learn, "fit", 1, 1e-2)
    before = len(learn.recorder.losses)
    if call == "predict": quietly(learn, "get_preds", dl=learn.dls.valid.new(shuffle=False))
    else: quietly(learn, call)
    assert before > 0
    assert (len(learn.recorder.losses) == before) == (cls is Learner)


@BOTH
def test_the_stop_button_during_mixup(cls, tmp_path):
    learn = learner(cls, tmp_path)
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt): quietly(learn, "fit", 1, 1e-2, cbs=[MixUp(), Fails(5, KeyboardInterrupt)])
    assert (learn.loss_func is loss) == (cls is Learner)
    if cls is Learner: quietly(learn, "fit", 1, 1e-2)
    else:
        with pytest.raises(Exception): quietly(learn, "fit", 1, 1e-2)


@BOTH
def test_what_a_callback_raises_is_what_arrives(cls, tmp_path):
    class Fussy(Callback):
        def before_batch(self): raise ValueError
    with pytest.raises(ValueError if cls is Learner else IndexError):
        quietly(learner(cls, tmp_path), "fit", 1, 1e-3, cbs=Fussy())


@BOTH
def test_a_callback_that_rests_comes_back_with_the_next_fit(cls, tmp_path):
    class Once(Callback):
        run_valid, seen = False, 0
        def after_batch(self): self.seen, self.run = self.seen + 1, False
    once = Once()
    learn = learner(cls, tmp_path, cbs=once)
    for fits in (1, 2):
        quietly(learn, "fit", 1, 1e-3)
        assert once.seen == fits


@BOTH
def test_torchs_cross_entropy(cls, tmp_path):
    learn = learner(cls, tmp_path, loss_func=nn.CrossEntropyLoss(label_smoothing=.1))
    if cls is Learner: quietly(learn, "fit", 1, 1e-2, cbs=MixUp())
    else:
        with pytest.raises(RuntimeError): quietly(learn, "fit", 1, 1e-2, cbs=MixUp())
        learn = learner(cls, tmp_path, loss_func=nn.CrossEntropyLoss(label_smoothing=.1))
    sums = quietly(learn, "get_preds")[0].sum(1)
    assert not torch.allclose(sums, torch.ones_like(sums)), "this loss has no activation, so they are scores"
    if cls is Learner:
        assert torch.allclose(quietly(learn, "get_preds", act=learn.probabilities_of)[0].sum(1), torch.ones_like(sums))


@BOTH
def test_two_metrics_have_two_names(cls, tmp_path):
    learn = learner(cls, tmp_path, metrics=[partial(top_k_accuracy, k=k) for k in (2, 5)])
    quietly(learn, "fit", 1, 1e-2)
    names = list(learn.recorder.metric_names)
    assert (len(set(names)) == len(names)) == (cls is Learner)
    if cls is Learner: assert {"top_k_accuracy(k=2)", "top_k_accuracy(k=5)"} < set(learn.history)


def test_history_over_fits(tmp_path):
    theirs = learner(FastaiLearner, tmp_path)
    for n in (1, 2): quietly(theirs, "fit", n, 1e-2)
    assert len(theirs.recorder.values) == 2
    ours = learner(Learner, tmp_path)
    quietly(ours, "fine_tune", 2, freeze_epochs=1)
    quietly(ours, "validate")
    assert list(ours.history.phase) == [1, 2, 2]


@BOTH
def test_validate_in_the_midst_of_a_fit(cls, tmp_path):
    "A callback that looks at other data after an epoch: the epoch's own row stays"
    class Looks(Callback):
        order = 70
        def after_epoch(self):
            if len(self.learn.cbs) and self.learn.epoch == 0 and not getattr(self, "done", False):
                self.done = True
                self.learn.validate(dl=self.learn.dls.train)
    learn = learner(cls, tmp_path)
    try: quietly(learn, "fit", 3, 1e-2, cbs=Looks())
    except Exception: assert cls is FastaiLearner
    whole = len(learn.recorder.values) == 3 and len(learn.recorder.losses) == 3 * len(learn.dls.train)
    assert whole == (cls is Learner)


# --- fits

class Reads(TorchFunctionMode):
    "Counts what makes the machine wait for a device: numbers and tensors that are brought over from it"
    waits = (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__,
        torch.Tensor.numpy)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.waits
        return func(*args, **kwargs or {})


@BOTH
def test_no_step_waits_for_the_device(cls, tmp_path):
    def reads(bs):
        learn = learner(cls, tmp_path, bs=bs, opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
        learn.dls.valid.bs = bs
        with Reads() as found: quietly(learn, "fit_one_cycle", 1, 1e-2)
        return found.count, len(learn.dls.train) + len(learn.dls.valid)
    (few, n), (many, m) = reads(200), reads(20)
    grown = (many - few) / (m - n)
    assert grown >= 1 if cls is FastaiLearner else grown == 0, f"{few} reads in {n} batches, {many} in {m}"


@BOTH
def test_an_optimizer_without_momentum(cls, tmp_path):
    learn = learner(cls, tmp_path, opt_func=partial(OptimWrapper, opt=torch.optim.Adagrad))
    if cls is Learner: quietly(learn, "fit_one_cycle", 1, 1e-2)
    else:
        with pytest.raises(KeyError): quietly(learn, "fit_one_cycle", 1, 1e-2)


@pytest.mark.parametrize("follows", [True, False])
def test_momenta_follow_weights_that_lie_in_another_way(follows, tmp_path, monkeypatch):
    if not follows: monkeypatch.setattr(TorchOptimizer, "follow_layout", lambda self: None)
    learns = [learner(Learner, tmp_path, precision="fp32") for _ in range(2)]
    for learn, layout in zip(learns, (torch.channels_last, torch.contiguous_format)):
        set_seed(1)
        quietly(learn, "fit", 1, 1e-3)
        learn.model.to(memory_format=layout)
        learn.precision_policy = PrecisionPolicy("fp32", layout is torch.channels_last)
        quietly(learn, "fit", 1, 1e-3)
    assert torch.allclose(*map(weights, learns), atol=1e-4) == follows


@BOTH
def test_the_same_seed_twice_over_the_same_loaders(cls, tmp_path):
    ends, learn = [], learner(cls, tmp_path, **(dict(seed=3) if cls is Learner else {}))
    start = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for _ in range(2):
        learn.model.load_state_dict(start)
        again = cls(learn.dls, learn.model, loss_func=CrossEntropyLossFlat(), path=tmp_path,
                    **(dict(seed=3) if cls is Learner else {}))
        if cls is FastaiLearner: set_seed(3, reproducible=True)
        else: again.dls.one_batch(), torch.rand(3), quietly(again, "lr_find", show_plot=False)
        quietly(again, "fit", 1, 1e-2)
        ends.append(weights(again))
    torch.use_deterministic_algorithms(False)
    assert torch.equal(*ends) == (cls is Learner)


@BOTH
def test_one_cycle_leaves_momentum(cls, tmp_path):
    learn = learner(cls, tmp_path)
    quietly(learn, "fit", 1, 1e-2)
    before = learn.opt.hypers[-1]["mom"]
    quietly(learn, "fit_one_cycle", 1, 1e-2)
    assert (learn.opt.hypers[-1]["mom"] == before) == (cls is Learner)


@BOTH
def test_flat_cos_starts_where_it_is_told(cls, tmp_path):
    learn = learner(cls, tmp_path)
    quietly(learn, "fit_flat_cos", 4, 1e-2, start_epoch=3)
    assert (len(learn.recorder.losses) == len(learn.dls.train)) == (cls is Learner)


@BOTH
def test_restarts_of_one_length(cls, tmp_path):
    learn = learner(cls, tmp_path)
    if cls is Learner: quietly(learn, "fit_sgdr", 2, 1, cycle_mult=1)
    else:
        with pytest.raises(ZeroDivisionError): quietly(learn, "fit_sgdr", 2, 1, cycle_mult=1)


@BOTH
def test_norms_and_biases_are_spared_decay(cls, tmp_path):
    learn = learner(cls, tmp_path, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), wd=.1)
    learn.create_opt()
    with torch.no_grad(): learn.model.head.bias.fill_(1.)
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.set_hyper("lr", 1e-2)
    learn.opt.set_hyper("wd", .1)
    learn.opt.step()
    assert bool((learn.model.head.bias == 1).all()) == (cls is Learner)


@pytest.mark.parametrize("way", ["fastai", "ftlib"])
def test_a_schedule_is_computed_without_tensors(way):
    "At each step, for each hyper-parameter: fastai makes several tensors to take one cosine"
    from fastai.callback.schedule import combined_cos
    from torch.utils._python_dispatch import TorchDispatchMode

    from ftlib.lr.schedule import OneCycle
    made = []
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **kwargs or {})
    one_cycle = OneCycle()
    f = combined_cos(.25, 1e-3, 1e-2, 1e-5) if way == "fastai" else lambda pct: one_cycle(pct * 10, 10)
    with Count(): [f(p) for p in np.linspace(0, .99, 20)]
    assert (len(made) > 20) == (way == "fastai")
