"""Searches that are killed, shared by several processes, or spread over machines: no trial is lost or run twice."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fastai.metrics import accuracy
from hypothesis import given, settings
from hypothesis import strategies as st
from joblib import parallel_config
from sklearn.datasets import load_digits

from ftlib import Choice, Int, LogUniform, Uniform, compare, cross_validate, image_data, joint_space, tune
from ftlib.errors import CompareError, MetricError
from ftlib.models.cnn import cnn
from ftlib.search.space import read_space
from ftlib.search.study import SAMPLERS, SharedStudy
from ftlib.search.tuning import TuningPlots
from ftlib.train.learner import Learner


def digits(n=300):
    "A table of small images"
    found = load_digits()
    return {"image": (found.images[:n] * 255 / 16).astype("uint8"), "label": found.target[:n].astype(str)}


def network(dls, seed, lr, epochs=2, cbs=None):
    "A trained learner"
    learn = Learner(dls, cnn(dls), metrics=accuracy, seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=cbs)
    return learn


# ---- spaces

@settings(max_examples=60, deadline=None)
@given(low=st.floats(-1e6, 1e6), high=st.floats(-1e6, 1e6), choices=st.lists(st.integers() | st.text(), min_size=1),
       n=st.integers(0, 50))
def test_a_proposal_is_always_in_the_space(low, high, choices, n):
    if low == high: high += 1
    with pytest.warns(UserWarning, match="reversed") if low > high else nullcontext(): x = Uniform(low, high)
    space = read_space({"x": x, "c": choices, "n": Int(n, n + 3)})
    study = SharedStudy(space, sampler="random", trials=3, seed=n)
    while (trial := study.ask()) is not None:
        found = study.arguments(trial)
        assert min(low, high) <= found["x"] <= max(low, high) and found["c"] in choices and n <= found["n"] <= n + 3
        study.tell(trial, dict(state="failed", error="not trained"))
    assert len(study.counted()) == 3


def test_values_of_any_kind_can_be_chosen():
    layers = [8, 16], [32]
    found = tune(partial(lambda width, f: network(image_data(digits(), size=8), f(len(width)), 1e-2)), trials=2,
                 space={"width": {"two": layers[0], "one": layers[1]}, "f": [abs, int]}, say=lambda line: None)
    assert found.best["width"] in layers and found.best["f"] in (abs, int)


# ---- the order of trials

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interrupted_search_is_the_same_search(sampler, tmp_path):
    def told(study, n=99):
        for _ in range(n):
            if (trial := study.ask()) is None: break
            x = study.arguments(trial)["x"]
            study.tell(trial, dict(state="complete", value=-(x - .3) ** 2, metric="score", lower=False))
        return [t.params for t in study.counted()]
    make = partial(SharedStudy, read_space({"x": Uniform(0, 1), "kind": list("abc")}), sampler=sampler, trials=15)
    whole = told(make())
    for n in (1, 4, 0, 99): found = told(make(tmp_path / "search.db"), n)
    assert found == whole and len(whole) == 15


def test_a_search_avoids_what_fails():
    def train(width):
        if width > 2: raise MemoryError("too large")
        return network(image_data(digits(200), size=8), 0, 1e-2, 1)
    said = []
    found = tune(train, {"width": [1, 2, 3, 4, 5, 6]}, trials=24, say=said.append)
    failed = (found.trials.state == "failed").to_numpy()
    assert failed[:10].mean() > failed[10:].mean() and len(said) == 24
    assert found.trials.error.notna().sum() == failed.sum()


SEARCH = """
import os, sys, time
from ftlib.search.space import LogUniform
import ftlib.search.tune as t
from types import SimpleNamespace

class Learner:
    "What a search needs of a learner, without a training"
    metrics, history = [SimpleNamespace(name="score")], [0]
    def __init__(self, value): self.value = value
    def no_bar(self): import contextlib; return contextlib.nullcontext()
    no_logging = no_bar
    def validate(self): return [1., self.value]

t.check_validated = lambda *args: None
t.lower_is_better = lambda *args: False

def train(lr):
    with open(sys.argv[2], "a") as f: f.write(f"{os.getpid()} {lr}\\n")
    time.sleep(.05)
    return Learner(-abs(lr - 1e-2))

t.tune(train, {"lr": LogUniform(1e-4, 1e-1)}, trials=int(sys.argv[3]), storage=sys.argv[1], sampler="random")
"""


def search(folder, storage, trials):
    "A process that searches"
    script = folder / "search.py"
    script.write_text(SEARCH)
    return subprocess.Popen([sys.executable, "-W", "ignore", script, folder / storage, folder / "ran.txt", str(trials)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ran_in(folder):
    "Process and learning rate of each training that began"
    return [line.split() for line in (folder / "ran.txt").read_text().splitlines()]


def stored(folder, storage, trials):
    "The trials of a search in a file"
    study = SharedStudy(read_space({"lr": LogUniform(1e-4, 1e-1)}), folder / storage, sampler="random", trials=trials)
    return study.counted()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["search.db", "search.log"])
def test_a_search_that_is_killed_ten_times_ends_with_all_its_trials(tmp_path, storage):
    rng, n, kills = random.Random(0), 60, 0
    while kills < 10:
        process = search(tmp_path, storage, n)
        started = time.monotonic()
        while not (tmp_path / "ran.txt").exists() and time.monotonic() - started < 60: time.sleep(.05)
        before = len(ran_in(tmp_path))
        while len(ran_in(tmp_path)) < before + 2 and process.poll() is None: time.sleep(.01)
        time.sleep(rng.random() * .2)
        if process.poll() is not None: break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert search(tmp_path, storage, n).wait(120) == 0
    trials = stored(tmp_path, storage, n)
    assert kills == 10 and len(trials) == n and all(t.state.name == "COMPLETE" for t in trials)
    assert len({t.params["lr"] for t in trials}) == n


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["search.db", "search.log"])
def test_two_processes_share_a_search(tmp_path, storage):
    both = [search(tmp_path, storage, 40) for _ in range(2)]
    assert [p.wait(180) for p in both] == [0, 0], [p.stderr.read() for p in both]
    trials, ran = stored(tmp_path, storage, 40), ran_in(tmp_path)
    assert len(trials) == len(ran) == len({lr for _, lr in ran}) == 40 and len({pid for pid, _ in ran}) == 2
    assert {t.params["lr"] for t in trials} == {float(lr) for _, lr in ran}


@pytest.mark.slow
def test_memory_stays_level_over_100_trials():
    dls = image_data(digits(), size=8)
    used = []
    def train(lr):
        used.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return network(dls, 0, lr, 1)
    tune(train, {"lr": LogUniform(1e-4, 1e-1)}, trials=100, sampler="random", say=lambda line: None)
    slope = np.polyfit(range(80), used[20:], 1)[0]
    assert slope < .3, f"{slope:.2f} MB a trial, {used[20]:.0f} to {used[-1]:.0f} MB"
    print(f"{used[20]:.0f} MB at trial 20, {used[-1]:.0f} MB at trial 99")


# ---- several processes

def test_other_processes_give_the_same_results(tmp_path):
    data, dls = digits(), image_data(digits(), size=8)
    ways = {"low": lambda seed: network(dls, seed, 1e-4), "high": lambda seed: network(dls, seed, 1e-2)}
    def fold(dls, seed): return network(dls, seed, 1e-2)
    here = compare(ways, seeds=2, say=lambda line: None), cross_validate(fold, data, k=3, size=8, say=lambda line: None)
    with parallel_config(backend="loky", n_jobs=2):
        there = (compare(ways, seeds=2, folder=tmp_path, say=lambda line: None),
                 cross_validate(fold, data, k=3, size=8, say=lambda line: None))
    assert here[0].table.accuracy.equals(there[0].table.accuracy) and len(there[0].runs["low"]) == 2
    assert here[1].folds.drop(columns="seconds").equals(there[1].folds.drop(columns="seconds"))
    with pytest.raises(CompareError, match="another process"): there[1].test()
    assert compare(ways, seeds=2, folder=tmp_path, say=pytest.fail).table.equals(there[0].table)


@pytest.mark.slow
def test_a_machine_of_a_cluster_goes_away(tmp_path):
    "Two raylets on this machine; one is killed while a search, a comparison and five folds run"
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from ftlib import ray_cluster
    data = digits()
    def train(lr, seed):
        time.sleep(.5)
        return network(image_data(data, size=8), seed, lr, 1)
    def fold(dls, seed):
        time.sleep(.5)
        return network(dls, seed, 1e-2, 1)
    runs = {"tune": lambda: tune(train, {"lr": LogUniform(1e-4, 1e-1)}, trials=20, sampler="random", pruner=None),
            "compare": lambda: compare({str(lr): partial(lambda seed, lr: train(lr, seed), lr=lr)
                                        for lr in (1e-3, 1e-2)}, seeds=3),
            "folds": lambda: cross_validate(fold, data, k=5, size=8)}
    found = {}
    for name, run in runs.items():
        cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        try:
            with ray_cluster(cluster.address):
                killer = threading.Timer(6, cluster.remove_node, (second,), dict(allow_graceful=False))
                killer.start()
                found[name] = run()
                assert not killer.is_alive(), "it was over before the machine went away"
        finally:
            ray.shutdown()
            cluster.shutdown()
    assert (found["tune"].trials.state == "complete").sum() == len(found["tune"].trials) == 20
    assert found["tune"].trials.lr.nunique() == 20
    assert [len(r) for r in found["compare"].runs.values()] == [3, 3] and len(found["folds"].runs) == 5
    assert len(found["folds"].out_of_fold) == len(data["label"])


# ---- the shell

def test_the_command_searches_and_writes(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from ftlib.cli import main
    monkeypatch.chdir(tmp_path)
    data = digits(120)
    for i, (image, label) in enumerate(zip(data["image"], data["label"], strict=True)):
        if label in "0123":
            folder = tmp_path / "digits" / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((32, 32)).save(folder / f"{i}.png")
    command = ["tune", "digits", "--arch", "mobilenet_v3_small=none", "--sizes", "32", "--epochs", "1", "--trials", "2",
               "--storage", "search.db", "--test", ".2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "2 trials" in out and "test set" in out
    assert {p.name for p in (tmp_path / "runs" / "tune").iterdir()} == {"trials.csv", "model.ftl", "history.png",
                                                                       "parallel.png"}
    assert main(command) == 0 and "1 of 2" not in capsys.readouterr().out
    assert main([*command[:-4], "--sampler", "best"]) == 2


def test_the_joint_space_is_a_space():
    space = joint_space(["resnet18", "mobilenet_v2"], [64])
    assert set(read_space(space)) == {"arch", "size", "bs", "augment", "lr", "depth", "body_lr", "wd"}
    assert isinstance(read_space(space)["arch"], Choice)


# ---- names, values and settings of a search

COLUMNS = ["trial", "value", "state", "epochs", "seconds", "same_as", "error", "score"]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_setting_may_be_called_as_a_column_of_the_table(name):
    shared = SharedStudy(read_space({name: [3, 5], "x": Uniform(0, 1)}), sampler="random", trials=4)
    given = []
    for outcome in (dict(state="complete", value=.5), dict(state="pruned"), dict(state="failed", error="no memory"),
                    dict(state="complete", value=.7)):
        trial = shared.ask()
        given.append(shared.arguments(trial))
        shared.tell(trial, outcome | dict(metric="score", lower=False, epochs=2, seconds=1.5))
    found = TuningPlots(shared, train=None)
    assert found.trials[[name, "x"]].to_dict("records") == given and found.best == given[3] and found.best_value == .7
    own = {o: found.trials[found.column(o)] for o in ("state", "epochs", "seconds", "error")}
    assert own["state"].tolist() == ["complete", "pruned", "failed", "complete"]
    assert own["error"].dropna().to_dict() == {2: "no memory"}
    assert set(own["epochs"]) == {2} and set(own["seconds"]) == {1.5}
    assert "trial 3" in repr(found) and found.best_so_far().tolist() == [.5, .5, .5, .7]
    assert found.trials.columns.is_unique and found.trials.reset_index().columns.is_unique
    assert found.plot() and found.plot_parallel()


LONG = np.arange(2000)  # whose text leaves out the middle


@pytest.mark.parametrize("values", [[1, True], [0, .5, False], [2, 2.], [LONG, np.where(LONG == 999, 0, LONG)],
                                    [lambda: 1, lambda: 2], [np.float32(.5), .5]],
                         ids=["bool", "zero", "float", "arrays", "functions", "float32"])
def test_values_that_would_be_one_are_refused(values):
    with pytest.raises(CompareError, match="told apart"): read_space({"x": values})
    named = read_space({"x": {str(i): v for i, v in enumerate(values)}})["x"]
    assert [v is w for v, w in zip(named.values.values(), values)] == [True] * len(values)


def test_results_of_a_function_that_cannot_be_identified_are_not_taken_over(tmp_path):
    "Two functions of which nobody can tell whether they are the same: what one gave is not the result of the other"
    dls, said = image_data(digits(60), size=8, bs=16, num_workers=0), []

    def trained(accuracy_of):
        held = (i for i in range(3))
        def train(x):
            _ = held
            learn = Learner(dls, cnn(dls), metrics=accuracy)
            learn.validate = lambda: [0., accuracy_of]
            return learn
        return train
    for value in (.25, .75):
        found = tune(trained(value), {"x": [1]}, trials=2 if value < .5 else 4, storage=tmp_path / "s.db",
                     say=said.append)
    assert found.trials["accuracy"].tolist() == [.25, .25, .75, .75]
    assert sum("cannot be told" in line for line in said) == 1


@pytest.mark.parametrize("given", [dict(seed=None), dict(seed=1.5), dict(seed=-1), dict(seed="a"), dict(seed=True),
                                   dict(minutes="5"), dict(minutes=True), dict(minutes=float("nan")), dict(first=5),
                                   dict(first="x"), dict(first=[5]), dict(first={1: 2}), dict(storage=""),
                                   dict(storage="."), dict(storage="nosql://x"), dict(metric=""), dict(metric=5),
                                   dict(name=""), dict(name=None)], ids=str)
def test_wrong_arguments_of_a_search(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def train(x): raise AssertionError("a trial was started")
    with pytest.raises(CompareError): tune(train, {"x": [1, 2]}, trials=1, **given)
    assert not list(tmp_path.iterdir())


def test_an_unknown_metric_is_named_and_a_storage_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    def train(x): return Learner(dls, cnn(dls), metrics=accuracy)
    dls = image_data(digits(60), size=8, bs=16, num_workers=0)
    with pytest.raises(MetricError, match="'acuracy'.*Did you mean 'accuracy'"):
        tune(train, {"x": [1]}, trials=1, metric="acuracy", storage="~/s.db", say=lambda line: None)
    assert (tmp_path / "s.db").exists()
