"""Every public operation, interrupted at every event, by a full disk and without memory; and a long run of operations
in random order.

What is asked afterwards: an operation that looks leaves everything as it was; one that trains leaves a learner that
is whole, with the history of the epochs that were completed; no callback, hook, gradient, session, lock, thread,
process, descriptor, figure or unfinished file is left.
"""

import errno
import gc
import multiprocessing
import os
import random
import threading
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, event

from ftlib import (
    Checkpoint, EarlyStopping, RecoverFromNaN, ReduceLROnPlateau, SaveModelCallback, accuracy, cnn, image_data,
    load_checkpoint, load_learner, vision_learner)
from ftlib.persist.transaction import optimizer_state, random_states

rng = np.random.default_rng(0)
EVENTS = [e for e in vars(event) if e.startswith(("before_", "after_")) and "create" not in e]


class Bang(Exception): "An error of a user's code"


@cache
def data():
    "16 small images of two classes, in memory"
    images = rng.integers(0, 120, (16, 16, 16, 3)).astype("uint8")
    images[::2, ..., 0] += 120
    return image_data({"image": images, "label": ["a", "b"] * 8}, size=16, augment=None, num_workers=0, bs=4, valid=.25)


def learner(folder, frozen=0, seed=None):
    "One epoch was trained, so that there is an optimizer state and a history"
    torch.manual_seed(0)
    learn = vision_learner(data(), cnn(data(), channels=(4, 4), linear=(8,)), metrics=accuracy, precision="fp32",
                           path=folder, seed=seed)
    learn.freeze_to(frozen)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    learn.model.eval()
    return learn


IMAGE = np.full((20, 20, 3), 90, dtype="uint8")
TRAIN = dict(fit=lambda learn: learn.fit(2, 1e-3),
             fit_one_cycle=lambda learn: learn.fit_one_cycle(2, 1e-3,
                 cbs=[EarlyStopping(patience=1), ReduceLROnPlateau(), RecoverFromNaN(check_every=1)]),
             fine_tune=lambda learn: learn.fine_tune(1, freeze_epochs=1),
             fastais_fine_tune=lambda learn: learn.fine_tune(1, 1e-3),
             checkpoint=lambda learn: learn.fit(2, 1e-3,
                 checkpoint=Checkpoint(learn.path / f"checkpoints{time.monotonic_ns()}", every=2)),
             save_best=lambda learn: learn.fit(2, 1e-3, cbs=SaveModelCallback()))
LOOK = dict(lr_find=lambda learn: learn.lr_find(num_it=12, show_plot=False), validate=lambda learn: learn.validate(),
            get_preds=lambda learn: learn.get_preds(),
            get_preds_with_loss=lambda learn: learn.get_preds(with_input=True, with_loss=True),
            predict=lambda learn: learn.predict(IMAGE), evaluate=lambda learn: learn.evaluate(),
            summary=lambda learn: learn.summary(), save=lambda learn: learn.save("weights"),
            export=lambda learn: learn.export("whole.pkl"))
NO_TRACE = "lr_find", "summary", "save", "export"  # these keep the random states, too


class Bomb(Callback):
    "Counts events, and raises at the one with the number `at`"
    uses_images, order = False, 1000
    def __init__(self, what=None, at=None, error=None): self.what, self.at, self.error, self.seen = what, at, error, {}
    def __call__(self, name):
        self.seen[name] = self.seen.get(name, 0) + 1
        if name == self.what and self.seen[name] == self.at: raise self.error


def quiet(learn, operation):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return operation(learn)


def state(learn):
    "What an operation that looks must not change"
    return dict(weights=[p.detach().clone() for p in learn.model.state_dict().values()], opt=optimizer_state(learn.opt),
                modes=[m.training for m in learn.model.modules()],
                wants=[p.requires_grad for p in learn.model.parameters()], history=learn.history.to_dict("records"),
                steps=len(learn.epoch_log.step_rows),
                frozen=learn.model.frozen, recorder=[list(map(float, learn.recorder.lrs)), len(learn.recorder.values)],
                attributes=sorted(k for k in vars(learn) if k not in ("_listeners",)))


def process():
    "Threads, descriptors, processes, figures"
    import matplotlib.pyplot as plt
    gc.collect()
    return dict(threads=threading.active_count(), processes=len(multiprocessing.active_children()),
                descriptors=len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
                figures=len(plt.get_fignums()))


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    return a == b or a != a and b != b


def changed(before, learn):
    "The names of what an operation has changed"
    now = state(learn)
    return [f"{k}: {set(before[k]) ^ set(now[k])}" if k == "attributes" else k for k in before
            if not same(before[k], now[k])]


def check_whole(learn, cbs, before):
    "What holds after every operation, however it ended"
    assert list(learn.cbs) == cbs and all(cb.learn is learn for cb in cbs), "a callback is left, or one is gone"
    assert learn.dls is data() and learn.features is None
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                   for m in learn.model.modules()), "a hook is left"
    assert learn._fit_plan == (0, None, None) and not learn.lock.trains
    free = []
    thread = threading.Thread(target=lambda: free.append(learn.lock.lock.acquire(timeout=1)) or free[0]
                              and learn.lock.lock.release())
    thread.start(); thread.join()
    assert free == [True], "the lock is held"
    assert all(torch.isfinite(p).all() for p in learn.model.state_dict().values())
    assert all(type(h["lr"]) is float for h in learn.opt.hypers)
    assert not list(Path(learn.path).rglob("*.new")), "an unfinished file is left"
    rows = learn.history
    assert (rows.groupby("phase").epoch.apply(list).map(lambda e: e == list(range(len(e))))).all()
    assert rows.valid_loss.notna().all()
    assert len(learn.epoch_log.step_rows) == 3 * len(rows), "the history has steps of an unfinished epoch"
    after = process()
    assert after["threads"] <= before["threads"] and after["processes"] <= before["processes"]
    assert after["descriptors"] <= before["descriptors"] + 2 and after["figures"] <= before["figures"]


def interrupt(folder, name, frozen, what, at, error):
    "Interrupt an operation and check what is left; then it is done as a whole"
    operation, learn = (TRAIN | LOOK)[name], learner(folder, frozen, seed=3)
    cbs, bomb, plain = list(learn.cbs), Bomb(what, at, error), state(learn)
    before, states = process(), random_states(*data().loaders)
    learn.add_cb(bomb)
    try:
        try: quiet(learn, operation)
        except (Bang, KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError) as e: del e
    finally: learn.remove_cb(bomb)
    check_whole(learn, cbs, before)
    if name in LOOK:
        assert not changed(plain, learn)
    else: assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters()), "a gradient is left"
    if name in NO_TRACE or name in TRAIN and name not in ("fine_tune", "fastais_fine_tune", "checkpoint"):
        now = random_states(*data().loaders)
        for k in ("python", "numpy", "torch"): assert same(states[k], now[k]), f"the random state of {k} changed"
    quiet(learn, operation)  # the learner is usable
    check_whole(learn, cbs, before)


@cache
def places(folder, name, frozen):
    "The events of an operation with the number of times that they happen"
    learn = learner(folder, frozen, seed=3)
    learn.add_cb(bomb := Bomb())
    quiet(learn, (TRAIN | LOOK)[name])
    return dict(bomb.seen)


CASES = [(name, frozen, what) for name in (*TRAIN, *LOOK) for frozen in (0, 1) for what in EVENTS]
QUICK = [c for i, c in enumerate(CASES) if i % 3 == 0 and c[1] == i % 2]


def at_every_place(folder, name, frozen, what, most):
    "Interrupt at the first, the last and a middle occurrence of an event, by each kind of error"
    n = places(folder, name, frozen).get(what, 0)
    for i, at in enumerate(sorted({1, n, (n + 1) // 2})[:most] if n else ()):
        for error in (Bang("stop"), KeyboardInterrupt(), torch.OutOfMemoryError("out of "
            "memory"))[i % 3 if most < 3 else 0:][:1 if most < 3 else 3]:
            interrupt(folder, name, frozen, what, at, error)


@pytest.mark.parametrize("name, frozen, what", QUICK, ids=str)
def test_an_interrupted_operation_leaves_the_learner_whole(tmp_path, name, frozen, what):
    at_every_place(tmp_path, name, frozen, what, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name, frozen, what", CASES, ids=str)
def test_an_interruption_at_every_event(tmp_path, name, frozen, what): at_every_place(tmp_path, name, frozen, what, 3)


# ---- the disk is full

WRITES = dict(save=LOOK["save"], export=LOOK["export"], checkpoint=TRAIN["checkpoint"], save_best=TRAIN["save_best"],
              bundle=lambda learn: learn.bundle(learn.path / "model.ftl"),
              report=lambda learn: learn.evaluate().save(learn.path / "report"))


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_the_learner_and_the_files_whole(tmp_path, monkeypatch, name, at):
    "The n-th file cannot be written: what was there is there still, and a training goes on"
    learn = learner(tmp_path, 1)
    quiet(learn, WRITES[name])
    there = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "checkpoints" not in str(p)
             and "report" not in str(p)}
    cbs, plain, before, calls = list(learn.cbs), state(learn), process(), []
    def full(*args, _fsync=os.fsync):
        calls.append(args)
        if len(calls) == at: raise OSError(errno.ENOSPC, "No space left on device")
        return _fsync(*args)
    monkeypatch.setattr(os, "fsync", full)
    try: quiet(learn, WRITES[name])
    except OSError as e:
        assert e.errno == errno.ENOSPC and name not in ("checkpoint",
                                                        "save_best"), "a training ended, which could go on"
        del e
        assert all(p.read_bytes() == content for p, content in there.items()), "a file that was there is another now"
    monkeypatch.undo()
    check_whole(learn, cbs, before)
    if name in ("checkpoint", "save_best"): assert len(learn.history) == len(plain["history"]) + 2
    else: assert not changed(plain, learn)


# ---- many operations

def with_checkpoint(learn):
    "Folders that hold a checkpoint: a fit that is stopped in its first epoch leaves an empty one"
    return [p for p in learn.path.glob("checkpoints*") if any(p.glob("*.safetensors"))]



OPERATIONS = {**TRAIN, **LOOK, "freeze": lambda learn: learn.freeze(), "unfreeze": lambda learn: learn.unfreeze(),
              "freeze_to": lambda learn: learn.freeze_to(random.randrange(3)),
              "load": lambda learn: learn.load("weights") if (learn.path / "models/weights.pth").exists() else None,
              "table": lambda learn: learn.groups_table(),
              "plot": lambda learn: learn.plot_history().clear(),
              "load_learner": lambda learn: load_learner(learn.path / "whole.pkl").predict(IMAGE)
              if (learn.path / "whole.pkl").exists() else None,
              "restore": lambda learn: load_checkpoint(learn, max(with_checkpoint(learn)))
              if with_checkpoint(learn) else None}


def memory():
    "Bytes of this process in RAM"
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(folder, n, seed=0):
    """`n` operations in random order, a third of them interrupted; everything is checked after each. Gives how often
    each was done"""
    import matplotlib.pyplot as plt
    draw, learn, done, used = random.Random(seed), learner(folder, 1), {}, []
    quiet(learn, LOOK["evaluate"])
    plt.close("all")
    cbs, before = list(learn.cbs), process()
    for i in range(n):
        name = draw.choice(sorted(OPERATIONS))
        bomb = Bomb(draw.choice(EVENTS), draw.randint(1, 4),
                    draw.choice([Bang, KeyboardInterrupt])()) if draw.random() < .33 else None
        plain = state(learn) if name in LOOK else None
        if bomb is not None: learn.add_cb(bomb)
        try: quiet(learn, OPERATIONS[name])
        except (Bang, KeyboardInterrupt) as e: del e
        finally:
            if bomb is not None: learn.remove_cb(bomb)
        plt.close("all")
        try:
            check_whole(learn, cbs, before)
            assert plain is None or not changed(plain, learn)
        except AssertionError as e:
            raise AssertionError(f"operation {i} of seed {seed}, {name}{f', stopped at {bomb.what}' if bomb else ''}: "
                                 f"{e}") from e
        for old in sorted(folder.glob("checkpoints*"))[:-2]:
            for p in old.iterdir(): p.unlink()
            old.rmdir()
        if len(learn.history) > 60:
            learn.epoch_log.rows, learn.epoch_log.step_rows = learn.epoch_log.rows[-3:], learn.epoch_log.step_rows[-9:]
        done[name] = done.get(name, 0) + 1
        if i >= n // 4: used.append(memory())
    if len(used) >= 100:
        third = len(used) // 3
        first, last = np.median(used[:third]), np.median(used[-third:])
        assert last < first * 1.05 + 20e6, f"memory grew from {first / 1e6:.0f} to {last / 1e6:.0f} MB"
    return done


def test_operations_in_random_order(tmp_path): soak(tmp_path, 25)


@pytest.mark.slow
def test_many_operations_in_random_order(tmp_path):
    n = int(os.environ.get("SOAK", 2000))
    assert sum(soak(tmp_path, n, seed=1).values()) == n
