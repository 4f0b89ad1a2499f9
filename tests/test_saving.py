"""What fastai's saving gets wrong and ours gets right: each test shows both, so that a claim that is out of date
fails."""

import sys
import types

import numpy as np
import pytest
import torch
from fastai.learner import load_learner as fastai_load_learner
from fastai.metrics import accuracy
from fastai.vision.learner import Learner as FastaiLearner
from torch import nn

from ftlib.data.images import image_data
from ftlib.train.learner import Learner, load_learner

WAYS = {"fastai": (FastaiLearner, fastai_load_learner), "ftlib": (Learner, load_learner)}
BOTH = pytest.mark.parametrize("way", WAYS)


def net(n=16, classes=2): return nn.Sequential(nn.Flatten(), nn.Linear(192, n), nn.ReLU(), nn.Linear(n, classes))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return image_data({"image": list(rng.integers(0, 255, (60, 8, 8, 3), "uint8")),
                       "label": [i % 2 for i in range(60)]}, size=8, bs=16)


@pytest.fixture
def learner(data, tmp_path):
    def make(cls, model=None, **kwargs):
        return cls(data, model or net(), **dict(loss_func=nn.CrossEntropyLoss(), metrics=accuracy, path=tmp_path)
                   | kwargs)
    return make


@BOTH
def test_an_export_that_fails_leaves_the_data(way, learner):
    learn = learner(WAYS[way][0])
    learn.create_opt()
    learn.odd = (i for i in ())  # no pickle of this
    with pytest.raises(TypeError): learn.export()
    assert (len(learn.dls.train_ds), learn.opt is None) == ((0, True) if way == "fastai" else (48, False))


@BOTH
def test_what_an_exported_learner_misses_is_named(way, learner, monkeypatch):
    module = types.ModuleType("left_behind")
    exec("class Head:\n def __init__(self): self.k = 1", module.__dict__)
    monkeypatch.setitem(sys.modules, "left_behind", module)
    learn = learner(WAYS[way][0])
    learn.of_another_module = module.Head()
    learn.export()
    monkeypatch.delitem(sys.modules, "left_behind")
    with pytest.raises((ImportError, UnboundLocalError)) as raised: WAYS[way][1](learn.path / "export.pkl")
    assert ("left_behind" in str(raised.value)) == (way == "ftlib"), raised.value


@BOTH
def test_weights_that_do_not_fit_change_nothing(way, learner):
    learner(WAYS[way][0]).save("one")
    other = learner(WAYS[way][0], net(classes=3))
    before = other.model[1].weight.detach().clone()
    with pytest.raises(RuntimeError, match="size mismatch"): other.load("one")
    assert other.model[1].weight.equal(before) == (way == "ftlib")


@BOTH
def test_the_state_of_another_optimizer_is_left_out(way, learner):
    cls, _ = WAYS[way]
    learn = learner(cls)
    learn.fit(1)
    learn.save("one")
    other = learner(cls, splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    other.create_opt()
    other.opt.set_hyper("lr", .5)
    with pytest.warns(UserWarning) as said: other.load("one")
    assert other.model[1].weight.cpu().equal(learn.model[1].weight.cpu())
    assert any("groups" in str(w.message) for w in said) == (way == "ftlib")
    assert [h["lr"] for h in other.opt.hypers] == [.5, .5]


@BOTH
def test_a_full_disk_keeps_the_file_of_before(way, learner, monkeypatch):
    learn = learner(WAYS[way][0])
    path = learn.save("one")
    before = path.read_bytes()
    def fills_up(obj, f, **kwargs):
        (open(f, "wb") if isinstance(f, (str, type(path))) else f).write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(OSError): learn.save("one")
    assert (path.read_bytes() == before) == (way == "ftlib") and (way == "fastai"
        or list(path.parent.iterdir()) == [path])
