"""Ctrl-C at any moment: nothing is cut in half, the best weights stay, and the next fit works."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from sklearn.datasets import load_digits

from ftlib.system import interrupt
from ftlib.data.images import image_data
from ftlib.system.interrupt import TrainingStopped, check_stop, stop_between_batches
from ftlib.train.judge import Verdict
from ftlib.train.vision import vision_learner


@pytest.fixture(autouse=True)
def handler():
    "Python's own, which is not there where the tests run in the background"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press():
    "Ctrl-C, as the terminal or Jupyter sends it"
    os.kill(os.getpid(), signal.SIGINT)


def default(): return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stop_waits_for_the_next_check():
    done = []
    with pytest.raises(TrainingStopped), stop_between_batches():
        for i in range(10):
            check_stop()
            done.append(i)
            if i == 2: press()
    assert done == [0, 1, 2] and default()


def test_a_stop_that_nobody_checked_is_raised_at_the_end():
    with pytest.raises(TrainingStopped), stop_between_batches(): press()
    assert default()


def test_an_error_that_the_stop_caused_is_the_stop():
    with pytest.raises(TrainingStopped) as raised, stop_between_batches():
        press()
        raise RuntimeError("a worker exited")
    assert isinstance(raised.value.__cause__, RuntimeError) and default()


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="an error"), stop_between_batches(): raise RuntimeError("an error")
    assert default()


def test_a_second_stop_does_not_wait():
    with pytest.raises(TrainingStopped, match="second"), stop_between_batches():
        press()
        press()
        raise AssertionError("not reached")
    assert default()


def test_a_handler_of_the_users_own_is_left_alone():
    heard, before = [], signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with stop_between_batches():
            press()
            check_stop()
        assert heard == [1]
    finally: signal.signal(signal.SIGINT, before)


def test_other_threads_get_no_signals():
    def enter():
        with stop_between_batches(): seen.append(list(interrupt._active))
    seen, thread = [], threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [[]] and default()


def test_nested_ones_leave_it_to_the_outermost():
    with pytest.raises(TrainingStopped), stop_between_batches():
        with stop_between_batches(): press()
        check_stop()
    assert default()


# ---- Ctrl-C at random moments of `fine_tune`

@pytest.fixture(scope="module")
def make():
    "Makes learners that are all the same: a small network that has learned even digits, and odd ones to learn"
    images, labels = (load_digits().images * 255 / 16).astype("uint8"), load_digits().target

    def data(odd, n):
        at = np.flatnonzero(labels % 2 == odd)[:n]
        return image_data({"image": images[at], "label": labels[at].astype(str)}, size=32, augment=None, bs=32)
    start = vision_learner(data(0, 300), "test_resnet", weights=None, metrics=accuracy, seed=0, precision="fp32")
    with start.no_bar(), start.no_logging(): start.fit_one_cycle(2, 1e-2)
    dls = data(1, 200)
    return lambda: vision_learner(dls, "test_resnet", weights=start, metrics=accuracy, seed=0, precision="fp32")


class Keep(Callback):
    "The weights after each epoch, by phase and epoch"
    order, run_valid, uses_images = 60, False, False  # before EarlyStopping, which may go back to other weights
    def __init__(self): self.weights = {}

    def after_epoch(self):
        if hasattr(self.learn, "lr_finder") or not self.learn.epoch_log.rows: return
        row = self.learn.epoch_log.rows[-1]
        self.weights[row["phase"], row["epoch"]] = {k: v.clone() for k, v in self.learn.model.state_dict().items()}


def fine_tune(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, cbs=[*cbs])


def best_epoch(rows):
    "The highest accuracy, then the lowest loss"
    row = rows.sort_values(["accuracy", "valid_loss"], ascending=[False, True]).iloc[0]
    return row.phase, row.epoch


def check(learn, start, kept):
    """The best weights so far are there, to the bit, the history is whole, and the next fit works. The accuracy of the
    history is no measure of that: the head's is of cached features, which are rounded, and may differ by an image"""
    history, now = learn.history, learn.model.state_dict()
    if not len(history): best = [start]
    else:
        assert history.notna().all(axis=None) and not history.duplicated(["phase", "epoch"]).any()
        # the head's weights come back where those of the whole network were not better beyond noise
        best = [kept[best_epoch(rows)] for rows in (history, history[history.phase == 1])]
    assert any(all(torch.equal(v, weights[k]) for k, v in now.items()) for weights in best)
    assert default() and learn.opt is not None and learn.cache is True and learn.features is None
    rows = len(learn.history)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    assert len(learn.history) == rows + 1


def interrupted(make, times, seed):
    "Ctrl-C, at moments spread over a run: how often it came before the run was over"
    began = time.perf_counter()
    fine_tune(make())
    lasts, came, rng = time.perf_counter() - began, 0, random.Random(seed)
    for _ in range(times):
        learn = make()
        start = {k: v.clone() for k, v in learn.model.state_dict().items()}
        timer, keep = threading.Timer(rng.uniform(0, lasts), press), Keep()
        try:
            timer.start()
            fine_tune(learn, keep)
            timer.cancel()
            timer.join()
        except KeyboardInterrupt: came += 1
        check(learn, start, keep.weights)
    return came


def test_some_interruptions(make): assert interrupted(make, 6, 0) > 0


@pytest.mark.slow
def test_two_hundred_interruptions(make): assert interrupted(make, 200, 1) > 100


# ---- what `fine_tune` leaves

@pytest.mark.parametrize("better", [False, True])
def test_the_comparison_decides_which_weights_stay(make, monkeypatch, better):
    """One epoch of the head, so that the whole network has the lower loss: its weights stay only where the comparison
    says that they are better"""
    judged = []
    def judge(learn): judged.append([v.clone() for v in learn.model.state_dict().values()])
    monkeypatch.setattr("ftlib.train.fine_tune.judge", lambda learn: judge(learn) or "judged")
    monkeypatch.setattr("ftlib.train.fine_tune.compare_on_images", lambda before, after: Verdict(better, "", 1., 1.))
    learn = make()
    learn.metrics = []
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=1)
    head, whole = judged
    assert not all(map(torch.equal, head, whole)), "the whole network was the better one by its loss"
    assert all(map(torch.equal, learn.model.state_dict().values(), whole if better else head))
    assert learn.fine_tuning.kept.tolist() == [not better, better]
