"""Comparisons and cross-validations that are killed, and corrections that a library computes too."""

import os
import random
import signal
import subprocess
import sys
import time
from urllib.error import URLError

import numpy as np
import pytest
import torch
from fastai.vision.augment import Resize
from fastai.data.transforms import Normalize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from ftlib.data.images import image_data
from ftlib.experiment import choose
from ftlib.experiment.compare import compare
from ftlib.errors import CompareError, WeightsError
from ftlib.experiment.paired import holm, paired_test
from ftlib.experiment.runs import RunStore
from ftlib.persist.transaction import random_states
from ftlib.train.vision import vision_learner

SCRIPT = """
import sys, numpy as np, torch
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn
from ftlib.data.images import image_data
from ftlib.experiment.compare import compare
from ftlib.experiment.crossval import cross_validate
from ftlib.models.network import Body, Network, Normalize
from ftlib.train.learner import Learner
torch.set_num_threads(1)
X, y = load_digits(return_X_y=True)
source = {"image": [(x.reshape(8, 8) * 15.9).astype("uint8") for x in X[:300]], "label": list(y[:300])}
given = dict(size=8, bs=32, augment=None)

def small(dls, seed, lr=1e-2):
    set_seed(seed)
    conv = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    net = Network(Body(Normalize([.3] * 3, [.35] * 3), dict(stem=conv), 256), nn.Linear(256, 10))
    learn = Learner(dls, net, metrics=accuracy, seed=seed, precision="fp32")
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, lr)
    return learn

def at(lr): return lambda seed: small(dls, seed, lr)

if sys.argv[1] == "compare":
    dls = image_data(source, **given)
    found = compare({"low": at(1e-4), "high": at(1e-2), "higher": at(3e-2)}, seeds=3, folder=sys.argv[2])
    found.table[["accuracy", "low", "high", "epochs", "best epoch"]].to_csv(sys.argv[3])
    found.differences.to_csv(sys.argv[3] + ".differences")
else:
    found = cross_validate(small, source, k=4, folder=sys.argv[2], keep=False, **given)
    found.folds.drop(columns="seconds").to_csv(sys.argv[3])
    found.out_of_fold.to_csv(sys.argv[3] + ".differences")
"""


def start(script, *args):
    return subprocess.Popen([sys.executable, "-W", "ignore", script, *map(str, args)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compare", "cross-validate"])
def test_killed_ten_times_the_table_is_the_same(what, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begun = time.perf_counter()
    whole = start(script, what, tmp_path / "whole", tmp_path / "whole.csv")
    assert whole.wait(300) == 0, whole.stderr.read()
    took, chance, kills = time.perf_counter() - begun, random.Random(0), 0
    while kills < 10:
        process = start(script, what, tmp_path / "killed", tmp_path / "killed.csv")
        try: assert process.wait(chance.uniform(.6, 1) * took) == 0, process.stderr.read()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # it came to its end: begin anew, so that every kill meets work
            for p in sorted((tmp_path / "killed").iterdir())[kills % 3:]: p.unlink()
    last = start(script, what, tmp_path / "killed", tmp_path / "killed.csv")
    assert last.wait(300) == 0, last.stderr.read()
    for end in (".csv", ".csv.differences"):
        assert (tmp_path / f"killed{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_the_correction_is_holms(ps):
    np.testing.assert_allclose(holm(ps), multipletests(ps, method="holm")[1], atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(2, 60), st.integers(0, 1000))
def test_intervals_and_p_agree(seeds, images, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, seeds, images)) < [[[.6]], [[.8]]]
    found = paired_test(a, b)
    np.testing.assert_allclose(found["difference"], b.mean() - a.mean(), atol=1e-12)
    assert found["low"] <= found["difference"] <= found["high"]
    if found["high"] > found["low"]: assert (found["low"] > 0 or found["high"] < 0) == (found["p"] < .05)


CALLS = []


def way(seed):
    "Stands for a training: what `execute_run` makes of it is made up below"


def made_up(way, seed, on, weights):
    CALLS.append(seed)
    return dict(probs=np.eye(2, dtype="float32"), targets=np.array([0, 1]), classes=["a", "b"], files=["x", "y"],
                seconds=1., bytes=1, parameters=1, trainable=1, epochs=1,
                best_epoch=1, images_per_second=1., history={"valid_loss": [1.]})


def test_a_damaged_run_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ftlib.experiment.compare.execute_run", made_up)
    CALLS.clear()
    def again(): return compare({"one": way}, seeds=2, folder=tmp_path, say=lambda line: None).table.seeds["one"]
    assert again() == 2 and CALLS == [0, 1]
    path = sorted(tmp_path.iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"): assert again() == 2
    assert sorted(CALLS) == [0, 0, 1] or sorted(CALLS) == [0, 1, 1]
    assert RunStore(tmp_path).get("one", 0) is not None


RATE = 1


def helper(): return RATE


class Setting: rate = 1


def reaching(seed): return helper() * Setting.rate


@pytest.mark.parametrize("change", [lambda m: m.setitem(globals(), "RATE", 2),
                                    lambda m: m.setitem(globals(), "helper", lambda: 3),
                                    lambda m: m.setattr(Setting, "rate", 2)])
def test_a_run_belongs_to_all_that_its_function_reaches(tmp_path, monkeypatch, change):
    monkeypatch.setattr("ftlib.experiment.compare.execute_run", made_up)
    CALLS.clear()
    def again(): return compare({"one": reaching}, seeds=2, folder=tmp_path, say=lambda line: None)
    again(), again()
    assert CALLS == [0, 1]
    with monkeypatch.context() as m:
        change(m)
        with pytest.raises(CompareError, match="other helpers or globals"): again()
    again()
    assert CALLS == [0, 1]


def test_a_function_that_cannot_be_told_is_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ftlib.experiment.compare.execute_run", made_up)
    CALLS.clear()
    with open(__file__) as file:
        def odd(seed): return file
        for _ in range(2): compare({"one": odd}, seeds=2, folder=tmp_path, say=lambda line: None)
    assert CALLS == [0, 1, 0, 1] and capsys.readouterr().out.count("is trained again") == 1


# ---- the choice of a body

def test_without_a_connection_one_download_is_tried(stripes, monkeypatch):
    asked = []
    def no_connection(arch, *args, **kwargs):
        asked.append(arch)
        raise WeightsError("the download failed") from URLError("offline")
    monkeypatch.setattr(choose, "backbone", no_connection)
    monkeypatch.setattr(choose, "is_on_this_machine", lambda *args: False)
    dls = image_data(stripes, size=16, bs=8, num_workers=0)
    with pytest.raises(CompareError, match="the download failed.*where there is a connection"):
        choose.choose_body(dls, 1, ["resnet18", "resnet34"])
    assert asked == ["resnet18"]


def test_a_learner_without_a_name_takes_the_best_body(stripes, monkeypatch, capsys):
    monkeypatch.setattr(choose, "BODIES", {"test_resnet": None, "test_efficientnet": None})
    dls = image_data(stripes, size=32, bs=8, num_workers=0)
    learn = vision_learner(dls, weights=None)
    said = capsys.readouterr().out
    assert f"The body is {learn.arch}, the best of 2" in said and learn.model.body.arch == learn.arch


def test_a_choice_leaves_random_states_and_the_order_of_batches(stripes):
    dls = image_data(stripes, size=32, bs=8, num_workers=0)
    before = repr(random_states(*dls.loaders)) + repr(torch.get_rng_state().tolist())
    choose.choose_body(dls, 1, {"test_resnet": None})
    assert before == repr(random_states(*dls.loaders)) + repr(torch.get_rng_state().tolist())


def test_images_are_normalised_once(stripes):
    "Loaders that normalise give the features of loaders that leave it to the network"
    seen = {}
    for name, more in (("network", []), ("loaders", [Normalize.from_stats(*imagenet_stats, cuda=False)])):
        dls = ImageDataLoaders.from_folder(stripes, valid_pct=.3, seed=0, item_tfms=Resize(32), batch_tfms=more, bs=8,
                                           num_workers=0)
        torch.manual_seed(0)
        body = choose._Body("resnet18", None)
        assert body.build(dls, download=False) and not body.error
        body.see(dls, list(dls.valid_ds.items)[:8], 1, time.perf_counter() + 60)
        seen[name] = body.x[1][0]
    assert np.allclose(seen["network"], seen["loaders"], atol=1e-3)


@pytest.mark.parametrize("given", [dict(minutes="2"), dict(minutes=True), dict(minutes=float("nan")), dict(minutes=-1),
                                   dict(among="resnet18"), dict(among=[])], ids=str)
def test_wrong_arguments_of_a_choice(stripes, given):
    dls = image_data(stripes, size=16, bs=8, num_workers=0)
    with pytest.raises(CompareError): choose.choose_body(dls, **given)
