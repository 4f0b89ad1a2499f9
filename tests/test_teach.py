"""Distillation: losses and gradients against formulas written out, what a teacher keeps, and a resumed distillation."""

from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ftlib.teach.distill import Distill
from ftlib.teach.losses import dkd, kd, standardised_kd
from ftlib.errors import CheckpointError
from ftlib.train.learner import Learner

CASES = given(n=st.integers(1, 6), c=st.integers(2, 12), T=st.floats(.3, 20), scale=st.floats(.1, 5),
              seed=st.integers(0, 10 ** 6))


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def divergence(p, q): return (p * (np.log(p) - np.log(q))).sum(1)


def by_formula_kd(s, t, y, T): return T ** 2 * divergence(softmax(t / T), softmax(s / T))


def by_formula_dkd(s, t, y, T, target=1., others=8.):
    (ps, pt), rows, found = (softmax(s / T), softmax(t / T)), np.arange(len(y)), []
    for i in rows:
        two = [np.array([[p[i, y[i]], 1 - p[i, y[i]]]]) for p in (pt, ps)]
        rest = [np.delete(p[i], y[i])[None] / np.delete(p[i], y[i]).sum() for p in (pt, ps)]
        found.append(T ** 2 * (target * divergence(*two)[0] + others * divergence(*rest)[0]))
    return np.array(found)


def by_formula_standardised(s, t, y, T):
    s, t = ((z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7) for z in (s, t))
    return by_formula_kd(s, t, y, T)


@pytest.mark.parametrize(("loss", "formula"), [(kd, by_formula_kd), (dkd, by_formula_dkd),
    (partial(dkd, target=.5, others=2.), partial(by_formula_dkd, target=.5, others=2.)),
                                               (standardised_kd, by_formula_standardised)],
                                               ids=["kd", "dkd", "dkd weighted", "standardised"])
@CASES
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_losses_and_gradients(loss, formula, n, c, T, scale, seed):
    rng = np.random.default_rng(seed)
    s, t, y = rng.normal(0, scale, (n, c)), rng.normal(0, scale, (n, c)), rng.integers(0, c, n)
    # Where a probability rounds to nothing the written-out formula has no digits left
    assume(min(softmax(z / T).min() for z in (s, t)) > 1e-9 and max(softmax(z / T).max() for z in (s, t)) < 1 - 1e-7)
    student = torch.tensor(s, requires_grad=True)
    found = loss(student, torch.tensor(t), torch.tensor(y), T)
    np.testing.assert_allclose(found.detach(), formula(s, t, y, T), rtol=1e-5, atol=1e-7)
    found.sum().backward()
    step, slopes = 1e-6, np.zeros_like(s)
    for i, j in np.ndindex(s.shape):
        up, down = s.copy(), s.copy()
        up[i, j] += step
        down[i, j] -= step
        slopes[i, j] = (formula(up, t, y, T) - formula(down, t, y, T)).sum() / (2 * step)
    np.testing.assert_allclose(student.grad, slopes, rtol=1e-3, atol=1e-3 * max(1, abs(slopes).max()))


def learner(path, seed=0):
    torch.manual_seed(0)
    X, y = torch.randn(128, 6), torch.arange(128) % 3
    pairs = list(zip(X, y, strict=True))
    dls = DataLoaders.from_dsets(pairs[:96], pairs[96:], bs=32, device="cpu", num_workers=0)
    return Learner(dls, nn.Linear(6, 3), loss_func=nn.CrossEntropyLoss(), path=path, precision="fp32", seed=seed)


def teacher(seed):
    torch.manual_seed(seed)
    return nn.Linear(6, 3)


class Killed(Exception): pass


def test_a_distillation_goes_on_with_the_same_teacher_only(tmp_path):
    def fit(learn, **kwargs):
        with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-1, checkpoint=tmp_path / "kept", **kwargs)
        return learn.model.weight.detach().clone()

    class Kills(Callback):
        def before_epoch(self):
            if self.epoch == 2 and not hasattr(self, "spared"): raise Killed

    whole = learner(tmp_path)
    with whole.no_bar(), whole.no_logging(): whole.fit(4, 1e-1, cbs=Distill(teacher(1), T=2., alpha=.7))
    kills = Kills()
    with pytest.raises(Killed): fit(learner(tmp_path), cbs=[Distill(teacher(1), T=2., alpha=.7), kills])
    kills.spared = True
    for other, said in ((Distill(teacher(2), T=2., alpha=.7), "teacher="),
                        (Distill(teacher(1), T=3., alpha=.7), "T=3.0")):
        with pytest.raises(CheckpointError, match=said): fit(learner(tmp_path), cbs=[other, kills], resume=True)
    assert torch.equal(fit(learner(tmp_path), cbs=[Distill(teacher(1), T=2., alpha=.7), kills], resume=True),
                       whole.model.weight)
