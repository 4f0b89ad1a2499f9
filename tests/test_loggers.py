"""TensorBoard, by fastai's callback, and Weights & Biases see ftlib's fits and figures; MLflow is in the notebook."""

import copy
import pickle

import numpy as np
import pytest
from fastai.metrics import accuracy
from sklearn.datasets import load_digits

from ftlib import MLflowLogger, WandbLogger, image_data
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
