"""Two processes train as one with twice the batch size, and when one of them ends nothing is lost."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from ftlib.callbacks.best import BestWeights
from ftlib.callbacks.budget import Budget
from ftlib.callbacks.stopping import EarlyStopping
from ftlib.callbacks.trackers import CSVLogger, SaveModelCallback
from ftlib.data.images import image_data
from ftlib.data.make_shards import write_shards
from ftlib.data.stream import stream_data
from ftlib.errors import TrainError
from ftlib.models.cnn import cnn
from ftlib.models.network import Body, Network, Normalize
from ftlib.models.precision import as_precision_policy
from ftlib.persist.checkpoint import checkpoints
from ftlib.system.interrupt import TrainingStopped
from ftlib.teach.distill import Distill
from ftlib.train.distributed import distributed
from ftlib.train.learner import Learner
from ftlib.train.vision import vision_learner
from ftlib.train.workers import Workers

X, y = (torch.tensor(o) for o in load_digits(return_X_y=True))
X = X.float().div(16).view(-1, 1, 8, 8)
COLUMNS = ["train_loss", "valid_loss", "accuracy"]
IMAGES = {"image": (load_digits().images[:300] * 255 / 16).astype("uint8"),
          "label": load_digits().target[:300].astype(str)}


def network(norm=True, n_in=1):
    def conv(n_in, n_out):
        norms = nn.BatchNorm2d(n_out) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), norms, nn.ReLU())
    torch.manual_seed(0)
    stages = dict(stem=conv(n_in, 8), stage1=conv(8, 16), pool=nn.Flatten())
    return Network(Body(Normalize([.3] * n_in, [.35] * n_in), stages, 64, shapes=[(8, 4, 4), (16, 2, 2), (64,)]),
                   nn.Linear(64, 10))


def tensors(bs, n=200, n_valid=41, net=None, metrics=accuracy, loss=None, **kwargs):
    "A learner of tensors in memory, in any number"
    pairs = list(zip(X[:n + n_valid], y[:n + n_valid], strict=True))
    dls = DataLoaders.from_dsets(pairs[:n], pairs[n:], bs=bs, device="cpu", num_workers=0, **kwargs)
    return Learner(dls, net or network(), loss_func=loss or CrossEntropyLossFlat(), metrics=metrics, precision="fp32",
                   seed=0)


def pictures(bs, frozen=0, bn="still", **kwargs):
    "A learner of images, as users make it"
    torch.manual_seed(0)
    dls = image_data(IMAGES, size=8, bs=bs, **dict(augment=None) | kwargs)
    learn = vision_learner(dls, cnn(dls, channels=(4, 8, 8)), metrics=accuracy, precision="fp32", seed=0, bn=bn)
    return without_dropout(learn, frozen)


def without_dropout(learn, frozen):
    for m in learn.model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    learn.freeze_to(frozen)
    return learn


@pytest.fixture(scope="module")
def workers():
    "Two processes for all tests"
    found = Workers(2, timeout=60)
    yield found
    found.close()


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("FTLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@contextmanager
def together(learn, workers):
    learn.workers = workers
    with learn.no_bar(), learn.no_logging():
        try: yield learn
        finally: learn.workers = None


def alone(learn, fit):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def assert_equal_training(one, two, tol=1e-4, columns=COLUMNS):
    a, b = (o.history.drop(columns=["seconds", "fill_seconds", "fill_bytes"]) for o in (one, two))
    assert a.shape == b.shape
    pd.testing.assert_frame_equal(a.astype(float), b.astype(float), atol=tol, rtol=0)
    np.testing.assert_allclose(one.epoch_log.steps().loss, two.epoch_log.steps().loss, atol=tol)
    for k, v in state(one).items(): torch.testing.assert_close(v, two.model.state_dict()[k], atol=tol, rtol=0, msg=k)
    assert one.best_weights.table().astype(float).round(4).equals(two.best_weights.table().astype(float).round(4))


# ---- parity

FITS = {"all stages": (dict(), lambda l: l.fit_one_cycle(2, 1e-2)),
        "features": (dict(frozen=-1), lambda l: l.fit_one_cycle(2, 1e-2)),
        "features, augmented": (dict(frozen=-2, augment="default"), lambda l: l.fit_one_cycle(3, 1e-2)),
        "loaders with workers": (dict(augment="light", num_workers=2), lambda l: l.fit(1, 1e-2)),
        "classes drawn equally often": (dict(balance="sampler"), lambda l: l.fit(1, 1e-2))}


@pytest.mark.parametrize("name", FITS)
def test_two_with_half_a_batch_are_one_with_the_whole(name, workers):
    kwargs, fit = FITS[name]
    one, two = alone(pictures(32, **kwargs), fit), pictures(16, **kwargs)
    with together(two, workers): fit(two)
    assert_equal_training(one, two)
    assert (one.history.cached > 0).all() == ("features" in name) == (two.history.cached > 0).all()
    # whatever comes next is the same too
    for learn in (one, two): alone(learn, lambda l: l.fit(1, 1e-2))
    assert two.history.phase.tolist()[-1] == 2 and type(two.best_weights) is BestWeights


def test_several_fits_and_a_sweep(workers):
    one, two = pictures(32), pictures(16)
    found = []
    def several(learn):
        learn.freeze()
        learn.fit_one_cycle(1, 1e-2)
        learn.unfreeze()
        found.append(learn.lr_find(num_it=20, show_plot=False))
        learn.fit_flat_cos(2, 1e-2, cbs=EarlyStopping(patience=1))
        learn.fit_sgdr(1, 1, 1e-2)
    alone(one, several)
    with together(two, workers): several(two)
    assert_equal_training(one, two)
    np.testing.assert_allclose(found[0].curve.loss, found[1].curve.loss, rtol=1e-3)


def test_what_was_before_and_what_comes_next(workers):
    "Earlier best weights go along, and the random states come back"
    one, two = pictures(32), pictures(16)
    for learn in (one, two):
        learn.seed = None
        alone(learn, lambda l: l.fit(2, 1e-3) if l is one else None)
    two.dls.train.bs = 32
    alone(two, lambda l: l.fit(2, 1e-3))
    two.dls.train.bs = 16
    alone(one, lambda l: l.fit(1, 50.))
    with together(two, workers): two.fit(1, 50.)  # worse by far
    assert one.best_weights.states.keys() == two.best_weights.states.keys() and len(two.best_weights.states)
    assert [dl.rng.getstate() for dl in one.dls.loaders] == [dl.rng.getstate() for dl in two.dls.loaders]
    assert len(one.recorder.losses) == len(two.recorder.losses)
    for learn in (one, two): alone(learn, lambda l: l.restore_best())
    for k, v in state(one).items(): torch.testing.assert_close(v, state(two)[k], atol=1e-4, rtol=0)


def test_features_are_computed_in_shares(workers):
    two = pictures(16, frozen=-1)
    with together(two, workers): two.fit(1, 1e-3, cbs=InShares())


class InShares(Callback):
    "Are there two blocks of features, one of them from the other process?"
    uses_images = False
    def before_fit(self):
        blocks = [[len(b) for b in dl.views[0].blocks] for _, dl in self.learn.features.pairs]
        assert blocks[0][:2] == [120, 120] and blocks[1][-2:] == [30, 30], blocks


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_that_cannot_be_divided_evenly(reduction, workers):
    def make(bs):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        return tensors(bs, n=101, net=network(norm=False), drop_last=False, loss=loss,
                       metrics=[accuracy, F1Score(average="macro")])
    def fit(learn): learn.fit(2, 1e-3)
    one, two = alone(make(50), fit), make(25)  # the last batch has one image
    with together(two, workers): fit(two)
    assert_equal_training(one, two, 1e-4 if reduction == "mean" else 1e-3)


OTHERS = {"micro-batches": lambda l: setattr(l, "microbatch_size", 5) or l.fit(1, 1e-2),
          "distillation": lambda l: l.fit(2, 1e-2, cbs=Distill(teacher())),
          "files": lambda l: l.fit(4, .1, cbs=[SaveModelCallback(fname="best"), CSVLogger(fname="rows.csv")])}


def teacher():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


@pytest.mark.parametrize("name", OTHERS)
def test_callbacks_and_micro_batches(name, workers, tmp_path):
    one, two = (pictures(bs, frozen=-1 if name == "distillation" else 0) for bs in (32, 16))
    for learn, folder in ((one, "one"), (two, "two")):
        learn.path = tmp_path / folder
        with together(learn, workers if learn is two else None): OTHERS[name](learn)
    assert_equal_training(one, two)
    if name == "files":
        assert sorted(p.name for p in (tmp_path / "two").rglob("*.*")) == ["best.pth", "rows.csv"]
        assert len(pd.read_csv(tmp_path / "two/rows.csv")) == 4
        two.load("best", with_opt=False)


def test_accumulated_gradients(workers):
    one, two = alone(tensors(20, net=network(norm=False)), lambda l: l.fit(2, 1e-2, cbs=GradientAccumulation(40))), \
        tensors(10, net=network(norm=False))
    with together(two, workers): two.fit(2, 1e-2, cbs=GradientAccumulation(20))
    assert_equal_training(one, two)


class OverflowInOne(Callback):
    "In one process alone: infinite gradients in one step, a loss that is NaN in another"
    order, run_valid = 7, False
    def after_loss(self):
        if self.learn.processes.rank == 1 and self.learn.train_iter == 5:
            self.learn.loss_grad = self.learn.loss_grad * float("nan")
            self.learn.loss = self.learn.loss_grad.detach().clone()
    def before_step(self):
        if self.learn.processes.rank == 1 and self.learn.train_iter == 2:
            next(self.learn.model.parameters()).grad[0] = float("inf")


def in_fp16(bs):
    learn = tensors(bs, net=network(norm=False))
    learn.precision, learn.precision_policy = "fp16", as_precision_policy("fp16")
    return learn


def test_half_precision_skips_a_step_in_all_processes(workers):
    two = in_fp16(25)
    with together(two, workers): two.fit(2, 1e-2, cbs=OverflowInOne())
    assert two.history.skipped.tolist() == [1, 1]
    assert two.loss_scaling.scale == 65536 / 2, "halved by the overflow, and not by the loss"
    assert all(p.isfinite().all() for p in two.model.parameters())


def test_half_precision_in_two_processes_is_that_of_one(workers):
    one, two = alone(in_fp16(50), lambda learn: learn.fit(2, 1e-2)), in_fp16(25)
    with together(two, workers): two.fit(2, 1e-2)
    assert np.allclose(one.history[COLUMNS], two.history[COLUMNS], atol=.02)
    assert one.loss_scaling.kept == two.loss_scaling.kept


def test_statistics_of_batch_norms_are_the_same_in_all_processes(workers):
    "With a learning rate of nothing the mean of the halves' means is the mean of the whole"
    one, two = pictures(32, bn="moving"), pictures(16, bn="moving")
    alone(one, lambda l: l.fit(2, 1e-12))
    with together(two, workers): two.fit(2, 1e-12, cbs=SameEverywhere())
    means = [k for k in state(one) if k.endswith("running_mean")]
    first = means[0]  # deeper ones see what was normalised by each half's own statistics
    torch.testing.assert_close(state(one)[first], state(two)[first], atol=1e-5, rtol=0)
    assert all(not torch.equal(state(two)[k], state(pictures(16))[k]) for k in means)
    # in a real fit the losses are close
    one, two = alone(pictures(32, bn="moving"), lambda l: l.fit(2, 1e-3)), pictures(16, bn="moving")
    with together(two, workers): two.fit(2, 1e-3, cbs=SameEverywhere())
    assert (one.history.valid_loss - two.history.valid_loss).abs().max() < .2


class SameEverywhere(Callback):
    "Are weights, statistics, losses and scores the same in all processes?"
    order = 100
    def after_epoch(self):
        mine = [v.double().sum().item() for v in self.learn.model.state_dict().values()], self.learn.recorder.values[-1]
        assert len(set(map(str, self.learn.processes.of_all(mine)))) == 1


def test_dropout_differs_between_processes_and_weights_do_not(workers):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64, 10))
    two = tensors(20, net=net)
    with together(two, workers): two.fit(2, 1e-2, cbs=[SameEverywhere(), OtherMasks()])


class OtherMasks(Callback):
    def after_pred(self):
        if self.learn.training and not self.learn.iter:
            assert len(set(map(str, self.learn.processes.of_all(torch.rand(1).item())))) == 2


def test_early_stopping_is_agreed(workers):
    def fit(learn, cb): learn.fit(12, 5e-2, cbs=cb)
    one, two, cbs = pictures(32), pictures(16), [EarlyStopping(patience=2) for _ in range(2)]
    alone(one, lambda l: fit(l, cbs[0]))
    with together(two, workers): fit(two, cbs[1])
    assert len(one.history) < 12 and cbs[0].stopped_at == cbs[1].stopped_at is not None
    assert cbs[0].best == pytest.approx(cbs[1].best, abs=1e-4) and cbs[1].follows is two.model
    assert_equal_training(one, two, 1e-3)
    assert two.history.attrs["stopped"] == "patience"


def test_a_budget_ends_all_processes(workers):
    two = pictures(16)
    with together(two, workers): two.fit(1000, 1e-3, cbs=[Budget(.02), OtherTime()])
    assert 0 < len(two.history) < 1000 and two.history.attrs["stopped"] == "budget"


class OtherTime(Callback):
    "Process 1 would go on for much longer"
    def before_fit(self):
        if self.learn.processes.rank: self.learn.budget.minutes *= 100


def test_fine_tune(workers):
    two = pictures(16)
    two.pretrained = True
    with together(two, workers): two.fine_tune(2, freeze_epochs=2)
    assert len(two.fine_tuning) == 2 and len(two.history) == 4 and two.workers is None


# ---- images that cannot be opened

@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [7], [0, 1, 2, 3, 4, 5, 7]], ids=str)
@pytest.mark.parametrize("frozen", [0, -2])
@pytest.mark.filterwarnings("ignore")
def test_broken_images_are_left_out(rows, frozen, workers, tmp_path):
    rng, table = np.random.default_rng(0), []
    for i in range(25):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"{i:02}.tif")
        table.append(dict(path=tmp_path / f"{i:02}.tif", label="ab"[i % 2], split="train" if i < 16 else "valid"))
    def make(bs):
        torch.manual_seed(0)
        dls = image_data(pd.DataFrame(table), size=16, bs=bs, num_workers=0, augment=None)
        learn = vision_learner(dls, cnn(2, size=16, channels=(4, 8, 8)), metrics=accuracy, precision="fp32", seed=0,
                               bn="still")
        return without_dropout(learn, frozen)
    one, two = make(4), make(2)
    for i in rows: (path := table[16 + i]["path"]).write_bytes(path.read_bytes()[:500])
    alone(one, lambda l: l.fit(2, 1e-3))
    with together(two, workers): two.fit(2, 1e-3)
    assert_equal_training(one, two, 1e-3)
    assert sorted(one.dls.bad_files.path) == sorted(two.dls.bad_files.path) and len(two.dls.bad_files) == len(rows)


# ---- what goes wrong

class Ends(Callback):
    "Process 1 ends in the midst of the second epoch"
    is_setting = False
    def __init__(self, how): self.how = how
    def after_batch(self):
        if self.learn.processes is None or not self.learn.processes.rank or self.learn.epoch < 1: return
        if self.how == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit": os._exit(3)
        raise RuntimeError("out of disk, say")


def everything(learn):
    "All that a fit may change, as text"
    return str([state(learn), learn.opt and learn.opt.hypers, learn.history.to_dict(), learn.best_weights.best,
                torch.get_rng_state().sum(), [dl.rng.getstate() for dl in learn.dls.loaders], len(learn.cbs)])


def assert_ends(how, message, workers, folder):
    "The fit ends in seconds with a message, and the learner is as before; gives the fit"
    def fit(learn, folder, cbs=None, **kwargs): learn.fit_one_cycle(3, 1e-2, cbs=cbs, checkpoint=folder, **kwargs)
    learn = pictures(16)
    learn.create_opt()
    before, began = everything(learn), time.perf_counter()
    with together(learn, workers), pytest.raises(TrainError, match=message) as error: fit(learn, folder, Ends(how))
    assert time.perf_counter() - began < 30 and "resume=True" in str(error.value) and not workers.processes
    assert everything(learn) == before
    assert list(checkpoints(folder).epoch) == ["0001"], "process 0 wrote one, process 1 none"
    return fit, learn


def test_a_process_is_killed_and_the_fit_is_resumed(workers, tmp_path):
    whole, kept = alone(pictures(32), lambda l: l.fit_one_cycle(3, 1e-2)), tmp_path / "kept"
    fit, _ = assert_ends("killed", "process 1 of 2 ended: by the signal SIGKILL", workers, kept)
    # in one process with the whole batch, and not with half of it
    with pytest.raises(ValueError, match="batch size 32"): alone(pictures(16), lambda l: fit(l, kept, resume=True))
    assert_equal_training(whole, alone(pictures(32), lambda l: fit(l, kept, resume=True)))


@pytest.mark.slow
@pytest.mark.parametrize("how,message", [("exit", "process 1 of 2 ended: with exit code 3"),
                                         ("error", "process 1 of 2 failed: RuntimeError: out of disk, say")])
def test_a_process_fails_and_the_fit_is_resumed_by_both(how, message, workers, tmp_path):
    whole, kept = alone(pictures(32), lambda l: l.fit_one_cycle(3, 1e-2)), tmp_path / "kept"
    fit, learn = assert_ends(how, message, workers, kept)
    with together(learn, workers): fit(learn, kept, resume=True)
    assert_equal_training(whole, learn)
    assert list(checkpoints(kept).epoch)[0] == "end"


@pytest.mark.slow
def test_an_error_in_all_processes(workers):
    learn = pictures(16)
    learn.create_opt()
    before = everything(learn)
    with together(learn, workers), pytest.raises(TrainError, match="n_epoch must be"): learn.fit(-1)
    assert everything(learn) == before


@pytest.mark.slow
def test_ctrl_c(workers):
    learn = pictures(16)
    learn.create_opt()
    before = everything(learn)
    with together(learn, workers): learn.fit(1, 1e-3)  # they have started
    after = everything(learn)
    assert after != before
    threading.Timer(1.5, signal.raise_signal, [signal.SIGINT]).start()
    with together(learn, workers), pytest.raises(TrainingStopped, match="as before this fit"): learn.fit(10000, 1e-3)
    assert everything(learn) == after and not workers.processes


def test_images_from_shards(workers, tmp_path):
    "Both processes together train on each image of the shards once, in the order of one process"
    write_shards({k: v[:150] for k, v in IMAGES.items()}, str(tmp_path / "train-%05d.tar"), images_per_shard=40)

    def learner(bs):
        dls = stream_data(str(tmp_path / "train-%05d.tar"), {k: v[150:220] for k, v in IMAGES.items()}, size=8, bs=bs,
                          augment=None, num_workers=0)
        return Learner(dls, network(norm=False, n_in=3), metrics=accuracy, precision="fp32", seed=0)
    one, two = learner(32), learner(16)
    with one.no_bar(), one.no_logging(): one.fit(2, 1e-2)
    with together(two, workers): two.fit(2, 1e-2)
    assert np.allclose(one.history[COLUMNS], two.history[COLUMNS], atol=1e-4)
    divided = stream_data(str(tmp_path / "train-%05d.tar"), size=8, bs=16, rank=1, world=2)
    with pytest.raises(TrainError, match="world=1"), distributed(Learner(divided, network(n_in=3)), 2): pass


def test_bad_arguments():
    learn = pictures(16)
    for n, message in ((0, "1 or more"), (-1, "1 or more"), (2.5, "1 or more"), (10**6, "this machine has"),
                       (None, "how many processes")):
        with pytest.raises(TrainError, match=message), distributed(learn, n): pass
    with learn.distributed(2):
        with pytest.raises(TrainError, match="active already"), learn.distributed(2): pass
    assert learn.workers is None and learn.processes is None
    with pytest.raises(TrainError, match="needs GPUs"), learn.distributed(2, sync_bn=True): pass
    with pytest.raises(TrainError, match="need 300"), pictures(150).distributed(2): pass
    loaders = [torch.utils.data.DataLoader(list(zip(X[:64], y[:64], strict=True)), batch_size=8) for _ in range(2)]
    other = Learner(DataLoaders(*loaders), network(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(TrainError, match="cannot be divided among processes"), other.distributed(2): pass


def test_a_learner_that_cannot_be_sent(workers):
    learn = pictures(16)
    learn.create_opt()
    before = everything(learn)
    with together(learn, workers), pytest.raises(TrainError, match="cannot be sent"):
        learn.fit(1, cbs=Holds(threading.Lock()))
    assert everything(learn) == before


class Holds(Callback):
    def __init__(self, what): self.what = what


# ---- scripts

SCRIPT = """
import sys, os, time
sys.path.insert(0, {tests!r})
from test_distributed import *
learn = pictures(16, frozen=-1)
with learn.no_bar(), learn.distributed():
    learn.fit_one_cycle(1, 1e-2)
    learn.unfreeze()
    if len(sys.argv) > 1 and sys.argv[2] != "resume":
        learn.fit_one_cycle(2, 1e-2, checkpoint=sys.argv[1], cbs=Ends(sys.argv[2]))
    learn.fit_one_cycle(2, 1e-2, checkpoint=None if len(sys.argv) == 1 else sys.argv[1], resume=len(sys.argv) > 1)
    preds, targets = learn.get_preds()
    inputs = learn.get_preds(with_input=True)[0]
    print('ONLY ONCE')
assert len(preds) == len(inputs) == 60
if os.environ['RANK'] == '0':
    learn.history.to_csv('history.csv')
    torch.save([learn.model.state_dict(), preds], 'weights.pth')
"""


def script(folder):
    (folder / "script.py").write_text(SCRIPT.format(tests=os.path.dirname(__file__)))
    return folder / "script.py"


def run(command, folder, *args):
    return subprocess.run([sys.executable, "-m", *command, script(folder), *args], cwd=folder, capture_output=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"), text=True, timeout=120)


def assert_script_is_one(printed, folder):
    assert printed.count("ONLY ONCE") == 1, printed
    one = pictures(32, frozen=-1)
    def fit(learn):
        learn.fit_one_cycle(1, 1e-2)
        learn.unfreeze()
        learn.fit_one_cycle(2, 1e-2)
    alone(one, fit)
    weights, preds = torch.load(folder / "weights.pth")
    for k, v in state(one).items(): torch.testing.assert_close(v, weights[k], atol=1e-4, rtol=0)
    history = pd.read_csv(folder / "history.csv")[COLUMNS]
    np.testing.assert_allclose(history, one.history[COLUMNS].astype(float), atol=1e-4)
    torch.testing.assert_close(preds, alone_preds(one), atol=1e-4, rtol=0)


def alone_preds(learn):
    with learn.no_bar(), learn.no_logging(): return learn.get_preds()[0]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def both(folder, *args):
    "The script in two processes with the environment that torchrun sets; gives what they print, errors last"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    started = [subprocess.Popen([sys.executable, script(folder), *args], cwd=folder, text=True, stderr=subprocess.PIPE,
                                stdout=subprocess.PIPE, env=env | dict(RANK=r, LOCAL_RANK=r)) for r in "01"]
    printed = [p.communicate(timeout=120) for p in started]
    return [p.returncode for p in started], printed[0][0] + printed[1][0], printed[0][1]


def test_a_script_in_each_process(tmp_path):
    codes, printed, errors = both(tmp_path)
    assert codes == [0, 0], errors[-3000:]
    assert_script_is_one(printed, tmp_path)


@pytest.mark.slow
def test_a_script_whose_process_is_killed_is_resumed(tmp_path):
    codes, printed, errors = both(tmp_path, tmp_path / "kept", "killed")
    assert codes[0] == 1 and codes[1] == -9 and "ONLY" not in printed
    last = errors.strip().splitlines()[-1]
    assert "TrainError: process 0 of 2 cannot reach the others" in last and "resume=True" in last
    codes, printed, errors = both(tmp_path, tmp_path / "kept", "resume")
    assert codes == [0, 0], errors[-3000:]
    assert_script_is_one(printed, tmp_path)


@pytest.mark.slow
def test_a_script_by_torchrun(tmp_path): assert_script_is_one(run(TORCHRUN, tmp_path).stdout, tmp_path)


@pytest.mark.slow
def test_a_script_by_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    command = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    assert_script_is_one(run(command, tmp_path).stdout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "exit", "error"])
def test_a_script_of_which_one_process_ends(how, tmp_path):
    began = time.perf_counter()
    done = run(TORCHRUN, tmp_path, tmp_path / "kept", how)
    assert done.returncode and time.perf_counter() - began < 60
    assert list(checkpoints(tmp_path / "kept").epoch) == ["0001"]
