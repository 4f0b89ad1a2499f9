"""PrecisionPolicy that is chosen by measuring, on a machine where nothing was measured yet: whatever a network takes,
gives and is trained by."""

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import CrossEntropyLossFlat
from fastcore.basics import fastuple
from torch import nn

from ftlib.models import precision
from ftlib.train.learner import Learner
from ftlib.models.precision import PrecisionPolicy, fastest, measure


@pytest.fixture(autouse=True)
def unmeasured(tmp_path, monkeypatch):
    "Nothing is known of this machine, and nothing decided for it"
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path))
    monkeypatch.delenv("FTLIB_PRECISION", raising=False)


def image(i): return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))


INPUTS = dict(image=lambda i: image(i), pair=lambda i: fastuple(image(i), image(i + 1)),
              row=lambda i: image(i).flatten()[:6],
              named=lambda i: dict(a=image(i), b=image(i + 1)))
TARGETS = dict(one=(1, lambda i: (i % 3,)), two=(2, lambda i: (i % 3, (i + 1) % 3)),
               named=(1, lambda i: (dict(a=i % 3, b=i % 2),)))


class Rows:
    def __init__(self, inp, targ): self.inp, self.targ = INPUTS[inp], TARGETS[targ][1]
    def __len__(self): return 20
    def __getitem__(self, i):
        if i >= 20: raise IndexError
        return self.inp(i), *self.targ(i)


class Net(nn.Module):
    "Any of the inputs to any kind of output; `view` needs plain memory layout"
    def __init__(self, out="one"):
        super().__init__()
        self.conv, self.out, self.row, self.head = nn.Conv2d(3, 4, 3), out, nn.Linear(6, 3), nn.Linear(4 * 14 * 14, 3)

    def forward(self, x):
        x = list(x.values())[0] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
        o = self.row(x) if x.ndim == 2 else self.head(self.conv(x).view(len(x), -1))
        return dict(one=lambda: o, tuple=lambda: (o, o * 2), named=lambda: dict(logits=o, more=[o]))[self.out]()


def loss(pred, *targets):
    pred = pred["logits"] if isinstance(pred, dict) else pred[0] if isinstance(pred, tuple) else pred
    targets = [t["a"] if isinstance(t, dict) else t for t in targets]
    return sum(F.cross_entropy(pred, t) for t in targets)


def trained(inp="image", targ="one", out="one", loss_func=loss, net=None, **kwargs):
    rows = Rows(inp, targ)
    dls = DataLoaders.from_dsets(rows, rows, bs=8, device="cpu", num_workers=0)
    dls.n_inp = 1
    learn = Learner(dls, Net(out) if net is None else net, loss_func=loss_func)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1, **kwargs)
    assert any((p != b).any() for p, b in zip(learn.model.parameters(), before)), "nothing was trained"
    assert all(p.isfinite().all() for p in learn.model.parameters())
    return learn


@pytest.mark.parametrize("inp", INPUTS)
@pytest.mark.parametrize("targ", TARGETS)
@pytest.mark.parametrize("out", ["one", "tuple", "named"])
def test_any_inputs_targets_and_outputs_train(inp, targ, out): trained(inp, targ, out)


class Mixing(MixUp):
    "One of the user's own that keeps its numbers of the whole batch"
    def before_batch(self):
        super().before_batch()
        assert len(self.lam) == len(self.learn.xb[0])


@pytest.mark.parametrize("mix", [MixUp, CutMix, Mixing])
@pytest.mark.parametrize("bs", [8, 16])
def test_a_loss_that_is_of_the_whole_batch(mix, bs):
    rows = Rows("image", "one")
    dls = DataLoaders.from_dsets(rows, rows, bs=bs, device="cpu", num_workers=0)
    learn = Learner(dls, Net(), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=mix())
    assert type(learn.loss_func).__name__ == "CrossEntropy"


def test_a_layout_that_a_network_can_not_compute_in_is_left_out():
    table = measure(Net(), torch.rand(4, 3, 16, 16))
    assert [w.channels_last for w in table.index] == [False]
    with pytest.raises(RuntimeError): measure(nn.Linear(5, 2), torch.rand(4, 3, 16, 16))  # it computes nothing at all


def test_a_choice_that_was_made_for_another_network_of_the_same_name(monkeypatch):
    "The file says channels last, and this network can't: single precision, as if it had been measured"
    net = Net()
    monkeypatch.setattr(precision, "choose", lambda table: PrecisionPolicy(channels_last=True))
    assert fastest(net, torch.rand(8, 3, 16, 16)).channels_last
    learn = trained(net=net)
    assert learn.precision_policy == PrecisionPolicy()


def test_measuring_leaves_statistics_gradients_and_random_numbers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.rand(4, 3, 16, 16)
    state = torch.get_rng_state()
    measure(net, x)
    assert all((v == before[k]).all() for k, v in net.state_dict().items()) and (torch.get_rng_state() == state).all()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "\0" * 9, pytest.param("[" * 99_999, id="deep"),
                                  *(f'{{"KEY": {v}}}' for v in ("5", "[]", '["fp64", true]', '["fp32"]', '["fp32", 1]',
                                                                "null", '[["fp32"], true]'))])
def test_a_damaged_list_of_choices_is_ignored(tmp_path, monkeypatch, text):
    from ftlib.models.precision import _load_choices
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path))
    (tmp_path / "precision.json").write_text(text)
    assert _load_choices()[1] == {}
    (tmp_path / "precision.json").write_text('{"a": ["bf16", true], "b": 3}')
    assert _load_choices()[1] == {"a": ["bf16", True]}
