"""A training that is cut short goes on to the same weights, and a checkpoint is whole or refused."""

import errno
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner as FastaiLearner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from ftlib.data.images import image_data
from ftlib.models.network import Body, Network, Normalize
from ftlib.persist.checkpoint import Checkpoint, checkpoints, load_checkpoint
from ftlib.errors import CheckpointError
from ftlib.train.learner import Learner
from ftlib.errors import MetricError
from ftlib.errors import DamagedError
from ftlib.persist.packed import read_packed, write_packed
from ftlib.callbacks.stopping import EarlyStopping


class Killed(BaseException):
    "Nothing catches it"


class Dies(Callback):
    "At one step of one epoch, or does not"
    order = 99
    def __init__(self, at=None): self.moment = at
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def after_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == self.moment: raise Killed


class Overflows(Callback):
    "Infinite gradients in some steps"
    order, run_valid = 8, False
    def before_step(self):
        if (self.learn.epoch + self.learn.iter) % 3 == 1: self.learn.model[1][1].weight.grad[0] = float("inf")


def images(root):
    "A folder of four classes of 14 images that tell themselves apart by their colour, more or less"
    rng = np.random.default_rng(0)
    for c in range(4):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(14):
            pixels = rng.normal(100 + 20 * c, 40, (20, 24, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"c{c}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return images(tmp_path_factory.mktemp("set"))


def network():
    def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())
    stages = dict(stem=conv(3, 8), stage1=conv(8, 16), pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    return Network(Body(Normalize([.4] * 3, [.25] * 3), stages, 16), nn.Sequential(nn.Dropout(.2), nn.Linear(16, 4)))


def learner(folder, workers=0, **kwargs):
    set_seed(3)
    dls = image_data(folder, size=16, bs=8, valid=.3, num_workers=workers)
    return Learner(dls, network(), **dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, precision="fp32")
                   | kwargs)


def state(learn):
    "Weights, statistics, momenta and history, without the times"
    weights = [v.clone() for v in learn.model.state_dict().values()]
    momenta = [v for s in learn.opt.opt.state.values() for v in s.values() if torch.is_tensor(v)]
    scale = torch.tensor(learn.loss_scaling.scale)
    return [*weights, *momenta, scale], learn.history.drop(columns=["seconds", "fill_seconds"])


def assert_same(a, b):
    for x, y in zip(a[0], b[0], strict=True): assert torch.equal(x, y)
    assert a[1].equals(b[1]), f"{a[1]}\n{b[1]}"


def train(learn, place, dies=None, resume=False, phase=None, **kwargs):
    "Two fits, the first of the head alone; is killed in one of them"
    def fit(i, *args):
        cbs = [Dies(dies if phase == i else None), *(f() for f in kwargs.get("cbs", ()))]
        learn.fit_one_cycle(*args, cbs=cbs, checkpoint=kwargs.get("how", Checkpoint)(place), resume=resume)
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        fit(0, 3, 1e-2)
        learn.unfreeze()
        fit(1, 3, slice(1e-3, 1e-2))
    return state(learn)


def each_two_steps(place): return Checkpoint(place, every=2)


SETTINGS = {"as it comes": {}, "images": dict(cache=False), "workers": dict(workers=2),
            "each two steps": dict(how=each_two_steps),
            "mixup": dict(cbs=[MixUp]), "accumulated, each two steps": dict(cbs=[lambda: GradientAccumulation(20)],
                how=each_two_steps), "images, each two steps": dict(cache=False, how=each_two_steps),
            "stopping": dict(cbs=[lambda: EarlyStopping("accuracy", patience=2)]),
            "torch's SGD": dict(opt_func=torch.optim.SGD),
            "fp16 with overflows, each two steps": dict(precision="fp16", cbs=[lambda: Overflows()],
                how=each_two_steps)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_anywhere_it_ends_on_the_same_weights(setting, folder, tmp_path):
    given = SETTINGS[setting]
    made = {k: given[k] for k in ("cache", "workers", "opt_func", "precision") if k in given}
    ways = {k: given[k] for k in ("how", "cbs") if k in given}
    whole = train(learner(folder, **made), tmp_path / "whole", **ways)
    for i, (phase, at) in enumerate([(0, (0, 1)), (0, (2, 3)), (1, (0, 0)), (1, (1, 2)), (1, (2, 4))]):
        place = tmp_path / str(i)
        with pytest.raises(Killed): train(learner(folder, **made), place, at, phase=phase, **ways)
        random.seed(i)
        torch.manual_seed(i)
        assert_same(train(learner(folder, **made), place, resume=True, **ways), whole)


def test_killed_again_and_again(folder, tmp_path):
    whole = train(learner(folder), tmp_path / "whole")
    for phase, epoch in [(0, 1), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        with pytest.raises(Killed): train(learner(folder), tmp_path / "cut", (epoch, 2), resume=True, phase=phase)
    assert_same(train(learner(folder), tmp_path / "cut", resume=True), whole)
    again = learner(folder)
    assert_same(train(again, tmp_path / "cut", resume=True), whole)
    assert again.fits_kept == {str((tmp_path / "cut").resolve()): 2}


def test_in_the_same_process_after_the_stop_button(folder, tmp_path):
    whole = train(learner(folder), tmp_path / "whole")
    learn = learner(folder)
    with pytest.raises(Killed): train(learn, tmp_path / "cut", (1, 2), phase=0)
    assert_same(train(learn, tmp_path / "cut", resume=True), whole)


def test_a_sweep_in_between_changes_nothing(folder, tmp_path):
    def run(dies=None, resume=False):
        learn = learner(folder)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(2, 1e-2, checkpoint=tmp_path / f"{bool(dies or resume)}", resume=resume)
            rate = learn.lr_find(show_plot=False).suggested
            learn.fit(2, rate, cbs=Dies(dies), checkpoint=tmp_path / f"{bool(dies or resume)}", resume=resume)
        return state(learn), rate
    whole, rate = run()
    with pytest.raises(Killed): run((1, 1))
    other, same = run(resume=True)
    assert rate == same
    assert_same(other, whole)


def test_weights_lie_as_they_lay(folder, tmp_path):
    learn, other = learner(folder), learner(folder)
    learn.model.to(memory_format=torch.channels_last)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, checkpoint=tmp_path)
    with other.no_bar(), other.no_logging(): other.fit(1, 1e-2, checkpoint=tmp_path, resume=True)
    strides = [[p.stride() for p in o.model.parameters()] for o in (learn, other, learner(folder))]
    assert strides[0] == strides[1] != strides[2]


def test_fine_tune(folder, tmp_path):
    def run(place, dies=None, resume=False):
        learn = learner(folder)
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(2, 1e-2, cbs=Dies(dies), checkpoint=tmp_path / place, resume=resume)
        return state(learn)
    whole = run("whole")
    with pytest.raises(Killed): run("cut", (1, 1))
    assert_same(run("cut", resume=True), whole)


def test_fine_tune_that_finds_its_learning_rates(folder, tmp_path):
    "Killed in the head's epochs or in those of the whole network, it ends on the same weights, and keeps the same ones"
    def run(place, dies=None, phase=0, resume=False):
        learn = learner(folder, seed=5)
        learn.pretrained = True
        cb = Dies()
        with learn.no_bar(), learn.no_logging():
            if dies: cb.before_train = lambda: setattr(cb, "moment", dies if learn.epoch_log.phase == phase else None)
            learn.fine_tune(2, cbs=cb, freeze_epochs=6, checkpoint=tmp_path / place, resume=resume)
        return [v.clone() for v in learn.model.state_dict().values()], learn.history.drop(columns=["seconds",
            "fill_seconds"]), learn.fine_tuning.drop(columns="seconds")
    whole = run("whole")
    for place, dies, phase in (("head", (3, 1), 1), ("all", (1, 1), 2)):
        with pytest.raises(Killed): run(place, dies, phase)
        weights, history, table = run(place, resume=True)
        assert all(map(torch.equal, weights, whole[0])) and history.equals(whole[1]) and table.equals(whole[2])


def test_another_course_is_refused_and_named(folder, tmp_path):
    def fit(learn, *args, **kwargs):
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(*args, **dict(checkpoint=tmp_path, resume=True) | kwargs)
    with pytest.raises(Killed): fit(learner(folder), 3, 1e-2, cbs=Dies((1, 1)))
    def refused(said, learn, *args, **kwargs):
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(CheckpointError, match=said): fit(learn, *args, **dict(cbs=Dies()) | kwargs)
        assert all(map(torch.equal, before, learn.model.parameters()))
    refused("epochs 3 → 4", learner(folder), 4, 1e-2)
    refused(r"rates \[0.01, .*\] → \[0.02", learner(folder), 3, 2e-2)
    refused("other schedule", learner(folder), 3, 1e-2, pct_start=.9)
    refused("weight decay None → 0.1", learner(folder), 3, 1e-2, wd=.1)
    refused("optimizer", learner(folder, opt_func=torch.optim.SGD), 3, 1e-2)
    refused(r"callbacks \['Dies\(\)'\] → \['MixUp\(\)'\]", learner(folder), 3, 1e-2, cbs=MixUp())
    frozen = learner(folder)
    frozen.freeze()
    refused("frozen groups 0 → 2", frozen, 3, 1e-2)
    other = learner(folder)
    other.dls = image_data(folder, size=16, bs=8, valid=.3, seed=7, num_workers=0)
    refused("other images, labels and transforms", other, 3, 1e-2)
    other.dls = image_data(folder, size=16, bs=4, valid=.3, num_workers=0)
    refused("batch size 8 → 4", other, 3, 1e-2)
    other = learner(folder)
    other.model.head[1] = nn.Linear(16, 5)
    other.opt = None
    refused("another network", other, 3, 1e-2)
    with pytest.raises(CheckpointError, match="already contains checkpoints"):
        fit(learner(folder), 3, 1e-2, resume=False)


def test_a_folder_that_has_moved_is_the_same_data(folder, tmp_path):
    import shutil
    with pytest.raises(Killed): train(learner(folder), tmp_path / "run", (1, 1), phase=0)
    shutil.copytree(folder, tmp_path / "elsewhere")
    train(learner(tmp_path / "elsewhere"), tmp_path / "run", resume=True)


def test_what_is_kept(folder, tmp_path):
    learn = learner(folder)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(Killed): learn.fit(6, 1e-1, cbs=Dies((5, 0)), checkpoint=Checkpoint(tmp_path, keep=2))
    best = int(learn.history.valid_loss.idxmin()) + 1
    assert sorted(map(int, checkpoints(tmp_path).epoch)) == sorted({best, 4, 5})
    with learn.no_bar(), learn.no_logging():
        learn.fit(6, 1e-1, cbs=Dies(), checkpoint=Checkpoint(tmp_path, keep=2), resume=True)
    best = int(learn.history.valid_loss.idxmin()) + 1
    assert checkpoints(tmp_path).epoch.tolist() == ["end", *([f"{best:04}"] if best < 6 else [])]
    other = learner(folder)
    load_checkpoint(other, tmp_path, "best")
    with other.no_bar(): assert np.isclose(other.validate()[0], learn.history.valid_loss.min())
    load_checkpoint(other, tmp_path)
    assert all(map(torch.equal, other.model.parameters(), learn.model.parameters()))
    with pytest.raises(CheckpointError, match="another network"):
        load_checkpoint(Learner(learn.dls, nn.Linear(2, 2), loss_func=nn.MSELoss()), tmp_path)


def test_a_state_of_another_version_is_refused(folder, tmp_path):
    write_packed(tmp_path, "01-0001", dict(version=0))
    with pytest.raises(CheckpointError, match="another version"):
        learner(folder).fit(1, 1e-2, checkpoint=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="another version"): load_checkpoint(learner(folder), tmp_path)


def test_a_monitor_that_is_not_there(folder, tmp_path):
    learn = learner(folder)
    with pytest.raises(MetricError, match="Did you mean 'accuracy'"):
        learn.fit(1, 1e-2, checkpoint=Checkpoint(tmp_path, monitor="acuracy"))
    bare = Learner(learn.dls, network(), loss_func=CrossEntropyLossFlat(), default_cbs=False)
    with pytest.raises(CheckpointError, match="default_cbs=False"): bare.fit(1, 1e-2, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_state_that_can_not_be_kept_costs_no_training(folder, tmp_path):
    class Odd(Callback):
        def state_dict(self): return dict(f=print)
        def load_state_dict(self, state): pass
    learn = learner(folder, cbs=Odd())
    with (learn.no_bar(), learn.no_logging(),
          pytest.warns(UserWarning, match="is a builtin_function.*Training continues")):
        learn.fit(2, 1e-2, checkpoint=tmp_path)
    assert len(learn.history) == 2


def test_a_damaged_file_is_passed_over(folder, tmp_path):
    whole = train(learner(folder), tmp_path / "whole")
    with pytest.raises(Killed): train(learner(folder), tmp_path / "cut", (2, 2), phase=1)
    newest = tmp_path / "cut" / checkpoints(tmp_path / "cut").file[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged.*The checkpoint before it is used"):
        assert_same(train(learner(folder), tmp_path / "cut", resume=True), whole)


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_system_that_fails(name, number, folder, tmp_path, monkeypatch):
    "At each call in turn: Training continues, and what was kept before can be read"
    from ftlib.system import files
    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == at: raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)
    class File:
        def __init__(self, f): self.f = f
        def __getattr__(self, k): return failing_write(self.f) if k == "write" else getattr(self.f, k)
        def __enter__(self): return self
        def __exit__(self, *args): self.f.close()
    def failing_write(f):
        nonlocal real
        real = f.write
        return failing
    def opened(*args):
        if Path(args[0]).parent != place or args[1] != "w+b": return open(*args)  # no checkpoint is written
        return failing(*args) if name == "open" else File(open(*args)) if name == "write" else open(*args)
    for at in (1, 2, 3, 4):
        calls, place, real = [], tmp_path / f"{at}", {"open": open, "fsync": os.fsync, "replace": os.replace,
                                                      "write": None}[name]
        learn = learner(folder, cache=False)
        with (monkeypatch.context() as m, learn.no_bar(), learn.no_logging(),
              warnings.catch_warnings(record=True) as said):
            warnings.simplefilter("always")
            m.setattr(files, "open", opened, raising=False)
            if name in ("fsync", "replace"): m.setattr(os, name, failing)
            learn.fit(4, 1e-2, checkpoint=place)
        assert len(calls) >= 4 and any("could not write checkpoint" in str(w.message) for w in said)
        assert not list(place.glob("*.new")), "nothing unfinished is left"
        for file in place.glob("*"): read_packed(file)
        assert list(place.glob("*"))
        assert len(learn.history) == 4


def test_ten_thousand_mutations(tmp_path):
    "A bit, a cut, a swap: identical or refused"
    rng = np.random.default_rng(0)
    path = write_packed(tmp_path, "try", dict(w=torch.randn(40, 5), random=random.getstate(), rows=[dict(loss=.5)] * 5))
    whole, refused = path.read_bytes(), 0
    for i in range(10_000):
        data = bytearray(whole)
        a, b = sorted(rng.integers(0, len(data), 2))
        if i % 3 == 0: data[a] ^= 1 << int(rng.integers(8))
        elif i % 3 == 1: del data[a:]
        else:
            n = int(rng.integers(1, 64))
            data[a:a + n], data[b:b + n] = data[b:b + n], data[a:a + n]
        path.write_bytes(data)
        if bytes(data) == whole: read_packed(path)
        else:
            with pytest.raises(DamagedError): read_packed(path)
            refused += 1
    assert refused > 9_900


def test_what_can_not_be_kept_is_said(tmp_path):
    with pytest.raises(TypeError, match="state.f is a function"): write_packed(tmp_path, "try", dict(f=lambda: 0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cls", [FastaiLearner, Learner])
def test_a_tracker_and_a_later_start(cls, folder):
    made = learner(folder)
    learn = cls(made.dls, made.model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        if cls is Learner: learn.fit(4, 1e-2, start_epoch=2, cbs=TrackerCallback())
        else:
            with pytest.raises(IndexError): learn.fit(4, 1e-2, start_epoch=2, cbs=TrackerCallback())
    if cls is Learner: assert learn.history.epoch.tolist() == [2, 3]
