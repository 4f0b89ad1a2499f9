"""PrecisionPolicy that is chosen by measuring, on a machine where nothing was measured yet: whatever a network takes,
gives and is trained by."""

import copy
import pickle
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders
from fastai.callback.core import Callback, CancelStepException, TrainEvalCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, Lookahead
from fastai.torch_core import set_seed
from fastcore.basics import fastuple
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ftlib.callbacks.loss_scaling import LossScaling
from ftlib.callbacks.stopping import RecoverFromNaN
from ftlib.errors import PrecisionError, TrainError
from ftlib.models import precision
from ftlib.models.network import Body, Network, Normalize
from ftlib.models.precision import PrecisionPolicy, fastest, measure, prepare_for_inference
from ftlib.persist.checkpoint import Checkpoint, load_checkpoint
from ftlib.persist.packed import read_packed
from ftlib.persist.transaction import preserve_learner
from ftlib.teach.distill import Distill
from ftlib.teach.hints import Hints
from ftlib.train.learner import Learner


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


# fp16, on the CPU: torch has no fast convolutions for it there, so networks are small

class Overflow(Callback):
    "Gradients that are infinite in some steps of a fit"
    order, run_valid = 7, False
    def __init__(self, *at): self.at = at
    def before_step(self):
        if self.learn.train_iter in self.at: next(self.learn.model.parameters()).grad[0] = float("inf")


class Note(Callback):
    "What a callback sees after `LossScaling`"
    order, run_valid = 10, False
    def before_fit(self): self.norms, self.losses, self.lrs, self.steps = [], [], [], 0
    def before_step(self): self.norms.append(float(clip_grad_norm_(self.learn.model.parameters(), 1e9)))
    def after_batch(self):
        self.losses.append(float(self.learn.loss.detach()))
        self.lrs.append(self.learn.opt.hypers[-1]["lr"])


@pytest.fixture(scope="module")
def photographs():
    "Patches of two photographs, and which of them each is from"
    rng = np.random.default_rng(0)
    whole = [torch.tensor(load_sample_image(f"{name}.jpg")).permute(2, 0, 1) / 255. for name in ("china", "flower")]
    def patch(o):
        top, left = (rng.integers(0, n - 32) for n in o.shape[1:])
        return F.avg_pool2d(o[:, top:top + 32, left:left + 32], 2)
    return [(patch(whole[i % 2]), i % 2) for i in range(240)]


def small():
    def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())
    stages = dict(stem=conv(3, 8), stage1=conv(8, 8), pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    body = Body(Normalize([.4] * 3, [.25] * 3), stages, 8, shapes=[(8, 8, 8), (8, 4, 4), (8,)])
    return Network(body, nn.Linear(8, 2))


def learner(rows, precision="fp16", bs=20, net=None, **kwargs):
    set_seed(1)
    dls = DataLoaders.from_dsets(rows[:200], rows[200:], bs=bs, device="cpu", num_workers=0)
    return Learner(dls, small() if net is None else net, loss_func=CrossEntropyLossFlat(), precision=precision,
                   **dict(cache=False, seed=2) | kwargs)


def fit(learn, epochs=1, lr=1e-2, method="fit", **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(epochs, lr, **kwargs)
    return learn


def weights(learn): return [v.clone() for v in learn.model.state_dict().values()]


def same(a, b): return all(map(torch.equal, a, b))


def scaling(learn): return copy.deepcopy(learn.loss_scaling.state_dict()["scaler"])


def looking_ahead(params, lr): return Lookahead(Adam(params, lr=lr))


@pytest.mark.parametrize("opt_func", [Adam, torch.optim.SGD, looking_ahead])
def test_fp16_loses_what_fp32_loses(photographs, opt_func):
    "Over 50 steps: each loss within .05, their mean within .005"
    single, half = Note(), Note()
    for precision, note in (("fp32", single), ("fp16", half)):
        learn = fit(learner(photographs, precision, opt_func=opt_func), 5, cbs=note)
    a, b = np.array(single.losses), np.array(half.losses)
    assert len(a) == 50 and a[-10:].mean() < .8 * a[:10].mean(), "it learns something"
    assert abs(a - b).max() < .05 and abs(a.mean() - b.mean()) < .005
    assert not (a == b).all(), "another precision"
    assert np.allclose(single.norms[:5], half.norms[:5], rtol=.05), "gradients are divided by the scale"
    assert learn.history.skipped.tolist() == [0] * 5


def test_an_overflow_skips_the_step_and_nothing_else(photographs):
    "As a fit in which that step was left out: the same schedule, the other steps"
    class LeaveOut(Callback):
        order, run_valid = 8, False
        def before_step(self):
            if self.learn.train_iter in (3, 4, 17): raise CancelStepException
    notes = [Note(), Note(), Note()]
    cut = fit(learner(photographs), 2, method="fit_one_cycle", cbs=[Overflow(3, 4, 17), notes[0]])
    plain = fit(learner(photographs), 2, method="fit_one_cycle", cbs=[LeaveOut(), notes[1]])
    fit(learner(photographs), 2, method="fit_one_cycle", cbs=notes[2])
    assert cut.history.skipped.tolist() == [2, 1] and plain.history.skipped.tolist() == [0, 0]
    assert notes[0].lrs == notes[1].lrs == notes[2].lrs and len(notes[0].losses) == 20
    assert cut.loss_scaling.scale == 65536 / 8 and plain.loss_scaling.scale == 65536
    # a power of two changes gradients only where they are rounded to zero
    for a, b in zip(weights(cut), weights(plain), strict=True): assert torch.allclose(a.float(), b.float(), atol=2e-3)
    assert [len(o.epoch_log.steps()) for o in (cut, plain)] == [20, 20]
    assert cut.history.drop(columns=["seconds", "skipped"]).notna().all(axis=None)


def test_overflows_without_an_end_are_an_error(photographs):
    learn = fit(learner(photographs))
    before, scale = weights(learn), scaling(learn)
    with pytest.raises(TrainError, match="24 steps in a row.*precision='fp32'"):
        fit(learn, 4, cbs=Overflow(*range(99)))
    assert scaling(learn) == scale and learn.loss_scaling.scaler is None
    assert all(torch.equal(a, b) for (n, a), b in zip(learn.model.state_dict().items(), before) if "running" not in n
               and "batches" not in n), "no step was taken"
    fit(learn)
    with pytest.raises(TrainError, match="3 steps in a row"):
        fit(learner(photographs, default_cbs=False, seed=None), cbs=[TrainEvalCallback(), LossScaling(3),
                                                                     Overflow(2, 3, 4)])
    for wrong in (0, -1, True, 1.5, "3"):
        with pytest.raises(TrainError, match="max_skips"): LossScaling(wrong)


class LostFrom(Callback):
    "The loss is NaN in some steps"
    order, run_valid = 30, False
    def __init__(self, *at): self.at = at
    def after_loss(self):
        if self.learn.train_iter in self.at:
            self.learn.loss_grad = self.learn.loss_grad * float("nan")
            self.learn.loss = self.learn.loss_grad.detach().clone()


def test_a_loss_that_is_nan_is_no_overflow(photographs):
    learn = learner(photographs)
    fit(learn, 2, cbs=LostFrom(3))
    assert learn.loss_scaling.scale == 65536 and learn.history.skipped.tolist() == [1, 0]
    assert all(p.isfinite().all() for p in learn.model.parameters())
    for cb, happened in ((LostFrom(3), 1), (Overflow(3, 4, 5), 0)):
        recover = RecoverFromNaN(check_every=4)
        learn = fit(learner(photographs), 2, cbs=[cb, recover])
        assert recover.happened == happened and learn.loss_scaling.scale == 65536 / (1 if happened else 8)


def test_a_first_loss_that_is_too_large_for_fp16(photographs):
    net = small()
    with torch.no_grad(): net.head.weight.fill_(1e6)
    with pytest.raises(TrainError, match="fp16"): fit(learner(photographs, net=net))


class Killed(BaseException):
    "Nothing catches it"


class Dies(Callback):
    order, is_setting = 99, False
    def __init__(self, at): self.moment = at
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def after_batch(self):
        if self.learn.training and self.learn.train_iter == self.moment: raise Killed


@pytest.mark.parametrize("at", [3, 9, 13, 26])
def test_killed_and_resumed_bit_for_bit(photographs, tmp_path, at):
    "With overflows before and after; see test_checkpoint.py for more of it"
    def run(place, dies=None, resume=False):
        learn = learner(photographs)
        learn.loss_scaling.kept = torch.amp.GradScaler("cpu", growth_interval=5).state_dict()
        fit(learn, 3, checkpoint=Checkpoint(tmp_path / place, every=2), resume=resume,
            cbs=[Overflow(2, 3, 12, 20, 21), Dies(dies)])
        return learn
    whole = run("whole")
    with pytest.raises(Killed): run("cut", at)
    again = run("cut", resume=True)
    assert same(weights(whole), weights(again)) and scaling(whole) == scaling(again)
    drop = ["seconds", "fill_seconds"]
    assert whole.history.drop(columns=drop).equals(again.history.drop(columns=drop))
    assert whole.history.skipped.tolist() == [2, 1, 2] and whole.loss_scaling.scale != 65536 / 2 ** 5, "it grew"


def test_the_scale_is_in_a_checkpoint(photographs, tmp_path):
    fit(learner(photographs), 2, checkpoint=tmp_path, cbs=Overflow(3))
    path = next(tmp_path.glob("*.safetensors"))
    states = dict(read_packed(path)["callbacks"])
    assert states["LossScaling"]["own"]["scaler"]["scale"] == 65536 / 2
    assert load_checkpoint(learner(photographs), tmp_path).loss_scaling.scale == 65536 / 2


def test_the_scale_outlasts_a_fit_and_nothing_else_moves_it(photographs):
    learn = fit(learner(photographs), cbs=Overflow(3))
    before = scaling(learn)
    assert before["scale"] == 65536 / 2 and before["_growth_tracker"] == 6
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=12, show_plot=False)
        assert scaling(learn) == before
        with preserve_learner(learn): fit(learn, cbs=Overflow(1, 2))
        assert scaling(learn) == before
        learn.validate(), learn.get_preds()
    with pytest.raises(RuntimeError): fit(learn, cbs=[Overflow(1), Fails()])
    assert scaling(learn) == before
    copied = pickle.loads(pickle.dumps(learn.loss_scaling.kept))
    assert copied == before
    assert fit(learn).loss_scaling.scale == 65536 / 2 and scaling(learn)["_growth_tracker"] == 16


class Fails(Callback):
    run_valid = False
    def after_batch(self):
        if self.learn.iter == 5: raise RuntimeError("here")


def test_accumulated_gradients(photographs):
    "Three batches a step; the overflow of one step drops all three"
    notes = {}
    for precision in ("fp32", "fp16"):
        notes[precision] = note = Note()
        fit(learner(photographs, precision), 2, cbs=[GradientAccumulation(60), note])
    assert np.allclose(notes["fp32"].norms, notes["fp16"].norms, rtol=.1) and len(notes["fp16"].norms) < 8
    learn = fit(learner(photographs), 2, cbs=[GradientAccumulation(60), Overflow(2)])
    assert learn.history.skipped.tolist() == [1, 0] and learn.loss_scaling.scale == 65536 / 2


def test_clipping_sees_gradients_that_are_divided(photographs):
    seen = []
    class After(Callback):
        order, run_valid = 50, False
        def before_step(self):
            seen.append(float(sum(p.grad.square().sum() for p in self.learn.model.parameters()) ** .5))
    fit(learner(photographs), cbs=[GradientClip(.1), After(), Overflow(4)])
    assert len(seen) == 9 and max(seen) < .1001 and max(seen) > .099
    a, b = (fit(learner(photographs, p), 2, cbs=GradientClip(.1)) for p in ("fp32", "fp16"))
    assert np.allclose(a.history.train_loss, b.history.train_loss, atol=.02)


class Tight(nn.Module):
    "A network with room for so many images at once"
    def __init__(self, net, room): super().__init__(); self.net, self.room = net, room
    def forward(self, x):
        if self.training and len(x) > self.room: raise torch.OutOfMemoryError("no room")
        return self.net(x)


def test_micro_batches(photographs):
    def net(room):
        set_seed(5)
        return Tight(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.Linear(8, 2)), room)
    notes = [Note(), Note()]
    learns = [fit(learner(photographs, net=net(room)), cbs=[note, Overflow(4)]) for room, note in zip((99, 7), notes)]
    assert learns[1].microbatch_size == 5 and learns[0].microbatch_size is None
    assert np.allclose(notes[0].norms, notes[1].norms, rtol=.02) and learns[1].history.skipped.tolist() == [1]
    for v, w in zip(*map(weights, learns), strict=True): assert torch.allclose(v, w, atol=1e-3)


def test_no_memory_in_the_step_itself(photographs):
    "The scaler was asked for a step already when the batch is tried again in parts"
    class NoRoom(Callback):
        order, run_valid, once = 20, False, False
        def before_step(self):
            if self.learn.iter == 2 and not self.once:
                self.once = True
                raise torch.OutOfMemoryError("no room")
    learn = fit(learner(photographs), cbs=NoRoom())
    assert learn.microbatch_size == 10 and learn.history.skipped.tolist() == [0]


def test_a_learner_without_default_callbacks_gets_a_scale(photographs):
    seen = []
    class Look(Callback):
        order, run_valid = 10, False
        def before_step(self): seen.append(self.learn.loss_scaling.scale)
    learn = learner(photographs, default_cbs=False, seed=None)
    fit(learn, cbs=[TrainEvalCallback(), Look()])
    assert seen and set(seen) == {65536.} and not hasattr(learn, "loss_scaling")


def test_teachers_and_cached_features(photographs):
    teacher = fit(learner(photographs, "fp32"), 2)
    for cb in (lambda: Distill(teacher), lambda: Hints(teacher), lambda: Hints(teacher, "fitnet")):
        learn = learner(photographs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(learn, 2, cbs=[cb(), Overflow(3)])
        assert learn.history.skipped[0] >= 1 and learn.loss_scaling.scale == 65536 / 2 ** learn.history.skipped.sum()
        assert learn.history.train_loss.notna().all()
    losses = []
    for precision in ("fp32", "fp16"):
        learn, cb = learner(photographs, precision), Hints(teacher, "fitnet")
        fit(learn, 2, cbs=cb)
        losses.append(learn.history.train_loss.to_numpy())
    assert np.allclose(*losses, rtol=.03)


def test_the_regressors_of_hints_skip_the_step_too(photographs):
    class OfRegressors(Callback):
        order, run_valid = 7, False
        def before_step(self):
            if self.learn.train_iter == 3: cb.regressors[0].weight.grad[0] = float("inf")
    learn = learner(photographs)
    cb = Hints(fit(learner(photographs, "fp32")), "fitnet")
    fit(learn, cbs=[cb, OfRegressors()])
    assert learn.history.skipped.tolist() == [1] and cb.regressors[0].weight.isfinite().all()


def test_fastais_own_way_is_as_before(photographs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no GPU
        learn = learner(photographs, "auto").to_fp16()
        fit(learn)
        assert learn.loss_scaling.scaler is None and learn.loss_scaling.kept is None
        assert learn.precision_policy == PrecisionPolicy() and "skipped" not in learn.history
        learn.to_fp32()
        learn.precision_policy = PrecisionPolicy("fp16", True)
        learn.precision = "fp16"
        fit(learn)
    assert learn.history.skipped.iloc[-1] == 0


@pytest.mark.parametrize("wrong", ["fp8", "FP16", "", None, 16, True, ["fp16"], float("nan")])
def test_an_unknown_precision_is_named(photographs, wrong):
    with pytest.raises(PrecisionError, match="use 'auto', 'fp32', 'bf16' or 'fp16'"): learner(photographs, wrong)
    with pytest.raises(PrecisionError, match="give 'fp32'"): PrecisionPolicy(wrong)


def test_the_environment_may_ask_for_fp16(photographs, monkeypatch):
    monkeypatch.setenv("FTLIB_PRECISION", "fp16")
    learn = fit(learner(photographs, "auto"))
    assert learn.precision_policy.dtype == "fp16" and learn.history.skipped.tolist() == [0]
    monkeypatch.setenv("FTLIB_PRECISION", "half")
    before = weights(learn)
    with pytest.raises(PrecisionError, match="FTLIB_PRECISION='half'"): fit(learn)
    assert same(before, weights(learn)) and len(learn.history) == 1


def test_which_policies_are_tried(monkeypatch):
    def dtypes(device): return [p.dtype for p in precision._policies(torch.device(device))]
    assert dtypes("cpu") == ["fp32", "fp32", "bf16"], "fp16 is slow there"
    for native, half in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, n=native: n)
        assert dtypes("cuda")[-1] == half


def test_the_whole_batch_is_measured_once_for_its_size(photographs, monkeypatch):
    sizes, measure_ = [], precision.measure
    def noted(net, x, *args):
        sizes.append(len(x))
        return measure_(net, x, *args)
    monkeypatch.setattr(precision, "measure", noted)
    for bs in (20, 20, 32, 40, 50): fit(learner(photographs, "auto", bs=bs))
    assert sizes == [20, 40], "32 and 20 are of one kind, 40 and 50 of another"


def test_a_batch_without_room_is_measured_in_parts(photographs):
    learn = fit(learner(photographs, "auto", bs=40, net=Tight(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1),
                                                                            nn.Flatten(), nn.Linear(4, 2)), 12)))
    assert learn.microbatch_size == 10
    class Never(nn.Module):
        def forward(self, x): raise torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError): fastest(Never(), torch.rand(8, 3, 4, 4))


def test_the_cost_of_measuring_is_bounded():
    "Two passes or one, after one over 8 images"
    class Slow(nn.Module):
        def __init__(self, seconds): super().__init__(); self.seconds, self.seen = seconds, []
        def forward(self, x):
            self.seen.append(len(x))
            time.sleep(self.seconds * len(x))
            return x.mean((1, 2, 3), keepdim=True)
    for seconds, seen in ((0, [8, 32, 32] * 3), (.3 / 32, [8, 32] * 3)):
        net = Slow(seconds)
        measure(net, torch.rand(32, 3, 4, 4))
        assert net.seen == seen


def test_inference_is_measured_without_a_backward_pass(monkeypatch):
    class Forward(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(1))
        def forward(self, x):
            assert not torch.is_grad_enabled()
            return x * self.w
    prepare_for_inference(Forward(), torch.rand(8, 3, 4, 4), "auto")
