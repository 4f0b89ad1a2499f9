"""Another package adds one of each: a schedule, a callback, a loss, a body, a metric, a figure, a recipe, a command."""

import os
import subprocess
import sys

import pandas as pd
import pytest

OTHER = '''
import sys
import torch
from torch import nn
from ftlib import *
from ftlib.callbacks.trackers import MonitorCallback
from ftlib.cli.options import command_of
from ftlib.evaluate.report import FIGURES
from ftlib.lr.schedule import schedules


def falling(epoch, n_epoch): return 1 - epoch / (n_epoch + 1)
schedules["falling"] = lambda: falling


class CountSteps(Callback):
    uses_images = False
    steps = 0
    def after_batch(self): self.steps += self.training


class Best(MonitorCallback):
    def __init__(self): super().__init__("accuracy")
    def on_score(self, better): print("score", better)


def squared(student, teacher, labels, T): return ((student - teacher) ** 2).mean(1)


def body():
    block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    return nn.Sequential(block(3, 8), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def off_by(pred, y): return (pred.argmax(1) - y).abs().float().mean()
FIGURES["mean confidence"] = lambda report: report.probs.max(1).mean()


def head_twice(learn, epochs):
    for _ in range(2):
        learn.freeze()
        learn.fit_one_cycle(epochs, 1e-2)
RECIPES["head twice"] = head_twice


def train_with_mine(args):
    dls = image_data(args.folder, size=16, bs=4, seed=0, num_workers=0)
    torch.manual_seed(0)
    learn = vision_learner(dls, body, weights=None, metrics=[accuracy, off_by], seed=0)
    count = CountSteps()
    with learn.no_bar(): learn.fit(2, 1e-2, schedule="falling", cbs=[count, Best()])
    assert count.steps == 2 * len(dls.train), count.steps
    lrs = learn.history.lr
    assert lrs.iloc[1] < lrs.iloc[0] <= 1e-2, lrs
    student = vision_learner(dls, cnn(dls, channels=(4,)), metrics=accuracy, seed=0)
    with learn.no_bar(), student.no_bar():
        student.fit(1, 1e-2, cbs=Distill(learn, loss=squared))
        RECIPES["head twice"](learn, 1)
    found = learn.evaluate()
    print(found.table.loc["mean confidence"])
    found.table.to_csv(args.out)
    return 7


def add(commands):
    command = command_of(commands, "train-with-mine", train_with_mine, "Train with all that this package adds",
                         "ftlib train-with-mine flowers")
    command.add_argument("folder")
    command.add_argument("--out")
'''


@pytest.fixture
def run(root, tmp_path):
    "`ftlib` where another package is installed, whose entry points are given"
    (tmp_path / "other.py").write_text(OTHER)
    about = tmp_path / "other-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root), os.environ.get("PYTHONPATH", "")])}
    def run(points, *args):
        (about / "entry_points.txt").write_text("[ftlib.commands]\n" + "".join(f"{k} = {v}\n"
                                                                               for k, v in points.items()))
        return subprocess.run([sys.executable, "-W", "ignore", "-m", "ftlib", *args], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
    return run


def test_another_package_adds_one_of_each(run, stripes, tmp_path):
    found = run({"train-with-mine": "other:add"}, "train-with-mine", str(stripes), "--out", "figures.csv")
    assert found.returncode == 7, found.stderr
    assert "score True" in found.stdout
    table = pd.read_csv(tmp_path / "figures.csv", index_col=0)
    assert .5 <= table.value["mean confidence"] <= 1
    assert "train-with-mine" in run({"train-with-mine": "other:add"}, "--help").stdout


@pytest.mark.parametrize("value", ["other:gone", "missing_module:add", "other:falling"])
def test_a_broken_package_leaves_the_other_commands(run, value):
    found = run({"mine": value}, "models", "resnet18")
    assert found.returncode == 0 and "resnet18" in found.stdout
    assert "the command 'mine'" in found.stderr and "cannot be added" in found.stderr
