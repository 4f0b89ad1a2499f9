"""TensorBoard, by fastai's callback, and Weights & Biases see ftlib's fits and figures; MLflow is in the notebook."""

import copy
import pickle

import numpy as np
import pytest
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ftlib import MLflowLogger, WandbLogger, image_data
from ftlib.callbacks.loggers import EpochLogger, _accepted_names
from ftlib.models.cnn import cnn
from ftlib.train.learner import Learner


@pytest.fixture
def learn():
    found = load_digits()
    images = (found.images[:200] * 255 / 16).astype("uint8")
    dls = image_data({"image": images, "label": found.target[:200].astype(str)}, size=8, bs=32, augment=None)
    return Learner(dls, cnn(dls), metrics=accuracy, seed=0)


def fitted(learn, cbs):
    "Two fits with the callback"
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2, cbs=cbs)
        learn.fit_one_cycle(1, 1e-3, cbs=cbs)
    return learn.history


def test_tensorboard(learn, tmp_path):
    pytest.importorskip("tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = fitted(learn, TensorBoardCallback(tmp_path, trace_model=False, log_preds=False))
    found = {}
    for file in sorted(tmp_path.rglob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]: found.setdefault(tag, []).extend(e.value for e in events.Scalars(tag))
    for column in ("valid_loss", "accuracy"):
        assert np.allclose(sorted(found[column]), sorted(history[column]), atol=1e-6), (column, found.keys())
    assert len(found["train_loss"]) == 3 * len(learn.dls.train) + 3 * len(learn.dls.valid)  # fastai logs it in both


def test_weights_and_biases(learn, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(dir=str(tmp_path), project="ftlib")
    try:
        history = fitted(learn, WandbLogger(params={"note": "two fits"}))
        summary, config = dict(run.summary), dict(run.config)
    finally: wandb.finish()
    for column in ("train_loss", "valid_loss", "accuracy"):
        assert summary[column] == pytest.approx(history[column].iloc[-1], abs=1e-6), column
    assert summary["epoch"] == 3 and config["epochs of fit 1"] == 2 and config["note of fit 2"] == "two fits"


@pytest.mark.parametrize("logger", [MLflowLogger, WandbLogger])
def test_a_logger_can_be_copied_and_sent(logger):
    assert pickle.loads(pickle.dumps(logger("runs", {"a": 1}))).params == copy.deepcopy(logger(params={"a": 1})).params


class Notebook(EpochLogger):
    "A service that keeps its runs in a list, with one active run for the whole process, as MLflow and wandb have"
    runs, active = [], None
    def is_active(self): return Notebook.active is not None
    def settings(self, params): pass
    def row(self, values, epoch): Notebook.active["rows"] += 1

    def begin(self):
        Notebook.active = dict(name=self.run_name, rows=0)
        Notebook.runs.append(Notebook.active)

    def end(self, finished):
        Notebook.active["finished"] = finished
        Notebook.active = None


class Raises(Callback):
    "An error at an event of the second epoch"
    order = 90
    def __init__(self, event, error): self.event, self.error = event, error

    def __call__(self, event_name):
        if event_name == self.event and (self.learn.epoch == 1 or event_name == "before_fit"): raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("broken"), MemoryError])
@pytest.mark.parametrize("event", ["before_fit", "before_batch", "after_loss", "after_epoch"])
@pytest.mark.parametrize("where", ["fit", "learner"])
def test_a_fit_that_ends_by_an_error_ends_its_run(learn, error, event, where):
    "The next learner of the process has a run of its own"
    Notebook.runs, Notebook.active = [], None
    first, second = Notebook("first"), Notebook("second")
    if where == "learner": learn.add_cb(first)
    with learn.no_bar(), learn.no_logging(), pytest.raises(type(error) if isinstance(error, Exception) else error):
        learn.fit(3, 1e-2, cbs=[Raises(event, error), *([first] if where == "fit" else [])])
    assert Notebook.active is None and [r["finished"] for r in Notebook.runs] == [False]
    if where == "learner": learn.remove_cb(first)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=second)
    assert [(r["name"], r["finished"], r["rows"]) for r in Notebook.runs[1:]] == [("second", True, 2)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=300), unique=True, min_size=1, max_size=8))
@example(["acc@1", "acc#1", "acc_1", "acc_1_2"])
@example(["..", "/", "a//b", "../x", "x" * 300, "x" * 299, "%"])
def test_mlflow_takes_any_names_and_tells_them_apart(names):
    validation = pytest.importorskip("mlflow.utils.validation")
    found = _accepted_names({name: i for i, name in enumerate(names)})
    assert list(found.values()) == list(range(len(names)))
    for name in found:
        validation._validate_metric_name(name)
        validation._validate_param(name, "1")
