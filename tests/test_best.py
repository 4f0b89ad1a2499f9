"""The mean of the weights of several runs, blends with the weights from before, and the best classifier in some
minutes."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn

from ftlib.data.images import image_data
from ftlib.cache.features import why_not_cached
from ftlib.deploy.bundle import load_bundle
from ftlib.errors import CompareError, DataError, RunError, TrainError
from ftlib.evaluate.report import Report
from ftlib.experiment import best, candidates
from ftlib.experiment.best import best_classifier
from ftlib.experiment.candidates import audit_in, bodies_here
from ftlib.experiment.compare import compare
from ftlib.experiment.crossval import cross_validate
from ftlib.experiment.recipes import trainer
from ftlib.experiment.soup import greedy_soup
from ftlib.train.blend import NOW, average_weights, choose_weights
from ftlib.train.judge import judge
from ftlib.train.vision import vision_learner

X, Y = load_digits(return_X_y=True)
IMAGES = [(x.reshape(8, 8) * 15.9).astype("uint8") for x in X]


def digits(n=150, which=(1, 3, 5), **kwargs):
    at = np.flatnonzero(np.isin(Y, list(which)))[:n]
    return image_data({"image": [IMAGES[i] for i in at], "label": [str(Y[i]) for i in at]},
                      **dict(size=16, augment=None, bs=32, seed=0) | kwargs)


@pytest.fixture(scope="module")
def knows():
    "A network that was trained on the even digits"
    set_seed(0)
    learn = vision_learner(digits(which=(0, 2, 4, 6, 8)), "test_resnet", weights=None, metrics=accuracy, seed=0,
                           precision="fp32")
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    return learn.model


def learner(knows, dls=None, **kwargs):
    dls = digits() if dls is None else dls
    return vision_learner(dls, "test_resnet", weights=knows, **dict(metrics=accuracy, seed=0,
                                                                    precision="fp32") | kwargs)


def fit(learn, epochs=2, lr=5e-4):
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr)
    return learn


def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def way(knows, dls, head_seed, lr=5e-4, epochs=2):
    "A training function whose head is that of a seed"
    def train(seed):
        learn = learner(knows, dls, seed=seed if head_seed is None else head_seed)
        learn.seed = seed
        return fit(learn, epochs, lr)
    return train


# ---- the mean of weights

def test_the_mean_is_that_of_each_weight():
    one, two = ({"w": torch.tensor([v, 2 * v]), "n": torch.tensor(int(v))} for v in (1., 3.))
    found = average_weights([one, two])
    assert found["w"].tolist() == [2., 4.] and found["n"].item() == 3 and found["n"].dtype == torch.int64
    assert average_weights([one, two], [.75, .25])["w"].tolist() == [1.5, 3.]
    half = average_weights([{"w": t["w"].half()} for t in (one, two)])["w"]
    assert half.dtype == torch.float16 and half.tolist() == [2., 4.]
    with pytest.raises(TrainError, match="state 1 is of another network.*'w'"):
        average_weights([one, {"w": torch.ones(3), "n": torch.tensor(1)}])
    with pytest.raises(TrainError, match="missing"): average_weights([one, {"w": torch.ones(2)}])


# ---- blend

def test_a_blend_lies_between_before_and_now(knows):
    learn = learner(knows)
    before = weights(learn)
    fit(learn)
    now = weights(learn)
    table = learn.blend(before, .3)
    for k, v in weights(learn).items():
        if v.is_floating_point(): assert torch.allclose(v, .7 * before[k] + .3 * now[k], atol=1e-6), k
    assert table.index.tolist() == [.3, 1.] and table.chosen.tolist() == [True, False]
    found = judge(learn)
    assert table.accuracy[.3] == found.correct.mean() and np.isclose(table.valid_loss[.3], found.loss.mean())
    assert learn.opt.state_dict()["state"] == [] or not any(learn.opt.state_dict()["state"])
    learn.blend(before, 0)
    assert same({k: v for k, v in before.items() if v.is_floating_point()}, weights(learn))


def test_of_several_shares_the_best_is_taken_only_beyond_noise(knows):
    learn = fit(learner(knows), 3)
    now, spoilt = weights(learn), {k: v + .3 if v.is_floating_point() else v for k, v in weights(learn).items()}
    table = learn.blend(spoilt, [.2, .6])
    assert same(now, weights(learn)) and table.chosen.to_dict() == {.2: False, .6: False, 1.: True}
    learn.model.load_state_dict(spoilt)  # now the weights from before are far better
    table = learn.blend(now, [0, .9])
    assert table.chosen[0] and same({k: v for k, v in now.items() if v.is_floating_point()}, weights(learn))



def test_the_best_of_many_is_not_taken_for_chance(knows):
    learn, chance = fit(learner(knows), 3), torch.Generator().manual_seed(0)
    now = weights(learn)
    def near():
        return {k: v + 1e-3 * v.std() * torch.randn(v.shape, generator=chance) if v.ndim > 1 else v
                for k, v in now.items()}
    states = {i: near() for i in range(8)}
    table, taken = choose_weights(learn, {i: lambda i=i: states[i] for i in states})
    assert table.valid_loss.idxmin() != NOW, "by chance some are better"
    assert taken == NOW and same(now, weights(learn)) and table.chosen[NOW]


def test_the_phases_of_fine_tune_are_blended_by_name(knows):
    learn = learner(knows)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(2)
        assert list(learn.phase_weights) == ["head", "whole network"]
        kept = learn.fine_tuning.kept.tolist()
        other = "head" if kept[1] else "whole network"
        assert same(learn.phase_weights["whole network" if kept[1] else "head"], weights(learn))
        with pytest.raises(TrainError, match="nothing between"): learn.blend("whole network" if kept[1] else "head")
        learn.blend(other, .5)
    assert learn.fine_tuning is None
    assert copy.copy(learn).__getstate__()["phase_weights"] is None, "an exported learner is no larger"


@pytest.mark.parametrize("a", [-.1, 1.1, float("nan"), True, "half", [], [.5, None], None])
def test_shares_that_are_none_change_nothing(knows, a):
    learn = fit(learner(knows), 1)
    now = weights(learn)
    with pytest.raises(TrainError, match="share of the weights of now"): learn.blend(learner(knows), a)
    assert same(now, weights(learn))


def test_weights_of_something_else_are_refused(knows):
    learn = fit(learner(knows), 1)
    now, more = weights(learn), learner(knows, digits(100, (1, 3)))
    with pytest.raises(TrainError, match="before is of another network"): learn.blend(more)
    with pytest.raises(TrainError, match="not trained by fine_tune"): learn.blend()
    with pytest.raises(TrainError, match="is a int"): learn.blend(3)
    assert same(now, weights(learn)) and learn.opt is not None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_restores_the_weights(knows, error):
    class Fail(Callback):
        order, uses_images, passes = 100, False, 0
        def before_validate(self):
            if hasattr(self.learn, "gather_preds"): Fail.passes += 1
            if Fail.passes > 1: raise error("stop")
    learn = fit(learner(knows), 1)
    before, now, tuning = weights(learner(knows)), weights(learn), learn.fine_tuning
    learn.add_cb(Fail())
    with pytest.raises(BaseException): learn.blend(before, [.3, .5])
    assert Fail.passes > 1 and same(now, weights(learn)) and learn.fine_tuning is tuning
    with pytest.raises(BaseException): greedy_soup(learn, {"before": before, "now": now})
    assert same(now, weights(learn))


# ---- soup

def test_runs_that_share_a_start_are_averaged(knows, tmp_path):
    dls = digits()
    ways = {"low": way(knows, dls, 0), "high": way(knows, dls, 0, 2e-3)}
    found = compare(ways, seeds=2, folder=tmp_path, say=len, weights=True)
    soup = found.soup()
    table = soup.table
    assert table.joined.iloc[0] and set(table.index) == {f"{n}, seed {s}" for n in ("low", "high") for s in (0, 1)}
    key = list(zip(-table.accuracy, table.valid_loss))
    assert key == sorted(key), "from the best to the worst"
    got = judge(soup.learn)
    last = table[table.joined].iloc[-1]
    expected = last["accuracy with it"] if soup.kept else table.accuracy.iloc[0]
    assert got.correct.mean() == expected
    assert ("the mean of" in repr(soup)) == (table.joined.sum() > 1)
    # the figures of each run alone are those of the comparison
    for r in (r for runs in found.runs.values() for r in runs):
        assert table.accuracy[f"{r['name']}, seed {r['seed']}"] == (r["probs"].argmax(1) == r["targets"]).mean()
    # another process has the folder, and gives the data
    again = compare(ways, seeds=2, folder=tmp_path, say=len, weights=True)
    with pytest.raises(CompareError, match="give them, as soup"): again.soup()
    pd.testing.assert_frame_equal(again.soup(like=dls).table, table, rtol=1e-3)
    assert len(again.soup("low", dls).table) == 2
    with pytest.raises(CompareError, match="no run of 'medium'"): found.soup(["medium"])


def test_the_greedy_rule_by_hand(knows):
    "Weights that are made worse join only where the mean does not get worse"
    learn = fit(learner(knows), 3)
    good = weights(learn)
    near = {k: v * 1.0001 if v.is_floating_point() else v for k, v in good.items()}
    far = {k: v + .5 if v.is_floating_point() else v for k, v in good.items()}
    table = greedy_soup(learn, {"far": far, "good": good, "near": near})
    assert table.index[-1] == "far" and not table.joined["far"] and table.joined.iloc[0]
    assert table["accuracy with it"]["far"] < table.accuracy.iloc[0] or \
        table["valid_loss with it"]["far"] > table.valid_loss.iloc[0]
    if not table.attrs["verdict"].better: assert same({"good": good, "near": near}[table.index[0]], weights(learn))


def test_a_mean_that_is_better_is_kept(knows):
    "Two networks of opposite errors: their mean is the network without them"
    learn = fit(learner(knows, digits(300)), 5, 3e-3)
    good, torch_seed = weights(learn), torch.Generator().manual_seed(0)
    noise = {k: .5 * v.std() * torch.randn(v.shape, generator=torch_seed) if v.ndim > 1 else 0 for k, v in good.items()}
    table = greedy_soup(learn, {"plus": {k: v + noise[k] for k, v in good.items()},
                                "minus": {k: v - noise[k] for k, v in good.items()}})
    assert table.joined.all() and table.attrs["verdict"].better
    assert all(torch.allclose(v, good[k], atol=1e-5) for k, v in weights(learn).items() if v.is_floating_point())


def test_runs_that_share_no_start_are_refused_with_the_reason(knows):
    dls, few = digits(100, (1, 3)), digits()
    found = compare({"own head": way(knows, dls, None, epochs=1)}, seeds=2, say=len, weights=True)
    with pytest.raises(CompareError, match="other initial weights.*head_seed=0"): found.soup()
    found = compare({"five": way(knows, dls, 0, epochs=1), "three": way(knows, few, 0, epochs=1)}, seeds=1, say=len,
                    weights=True)
    with pytest.raises(CompareError, match="other classes"): found.soup()
    wide = lambda seed: fit(learner(knows, dls, lin_ftrs=[16]), 1)
    found = compare({"usual": way(knows, dls, 0, epochs=1), "narrow": wide}, seeds=1, say=len, weights=True)
    with pytest.raises(CompareError, match="another network"): found.soup()
    with pytest.raises(CompareError, match="two runs or more, there are 1"): found.soup("usual")
    plain = compare({"five": way(knows, dls, 0, epochs=1)}, seeds=2, say=len)
    with pytest.raises(CompareError, match="repeat the call with weights=True"): plain.soup()
    assert "weights" not in plain.runs["five"][0]


def test_recipes_share_a_head_by_a_seed_of_it(knows):
    dls = digits()
    ways = {"fine-tune": partial(trainer("fine-tune", "test_resnet", knows, 1, head_seed=0, precision="fp32"), dls)}
    found = compare(ways, seeds=2, say=len, weights=True)
    a, b = found.runs["fine-tune"]
    assert a["start"] == b["start"] and not same(a["weights"], b["weights"])
    assert len(found.soup().table) == 2


def test_the_folds_are_judged_on_images_that_none_has(knows):
    at = np.flatnonzero(np.isin(Y, (1, 3, 5)))[:150]
    source = {"image": [IMAGES[i] for i in at], "label": [str(Y[i]) for i in at],
              "split": ["test" if i % 5 == 0 else None for i in range(len(at))]}
    found = cross_validate(lambda dls, seed: way(knows, dls, 0, epochs=1)(seed), pd.DataFrame(source), k=3, say=len,
                           weights=True, path="image", label="label", split="split", size=16, augment=None, bs=32)
    soup = found.soup("test")
    assert len(soup.table) == 3
    assert len(judge(soup.learn, soup.learn.dls.held_out()).loss) == 30
    with pytest.raises(CompareError, match="were trained on these images"): found.soup("valid")


# ---- fine_tune in some minutes

@pytest.mark.parametrize("minutes", [1e-3, .2])
def test_the_learner_is_unfrozen_whatever_phase_the_time_ended_in(knows, minutes):
    learn = learner(knows)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(minutes=minutes)
    if minutes < .01: assert learn.fine_tuning.phase.tolist() == ["head"], "no time for more"
    assert learn.frozen == [] and learn.model.frozen_to == 0 and learn.opt.frozen_idx == 0
    assert all(p.requires_grad for p in learn.model.parameters())
    assert isinstance(learn.model, nn.Module) and learn.fine_tuning.kept.sum() == 1


# ---- the best classifier in some minutes

QUICK = dict(minutes=.1, size=32, bs=8, seed=0)
STEPS = ["audit", "body", "training", "other weights", "calibration", "report", "bundle"]


@pytest.fixture(scope="module")
def among(knows): return {"test_resnet": knows}


def copied(stripes, folder, n):
    "So many images of each class of stripes"
    for label in ("lying", "standing"):
        (folder / label).mkdir(parents=True)
        for i in range(n): shutil.copy(stripes / label / f"{i:02}.png", folder / label)
    return folder


def test_all_steps_and_a_stranger_understands(stripes, among, tmp_path):
    said = []
    found = best_classifier(stripes, among=among, folder=tmp_path / "best", say=said.append, **QUICK)
    assert found.steps.index.tolist() == STEPS and len(said) == len(STEPS)
    assert (found.steps.used > 0).all() and (found.steps.planned > 0).all()
    right, total = found.report.table.iloc[0][["right", "total"]]
    assert found.accuracy.value == right / total and found.accuracy.low < found.accuracy.value <= found.accuracy.high
    text = repr(found)
    assert text.count(". ") == 2 and text.endswith("."), "three sentences"
    assert f"right for {int(right)} of {int(total)}" in text and f"{found.accuracy.low:.1%}" in text
    for words in ("test_resnet", "38 of yours", "2 classes", "of 0.1 minutes", "load_bundle"): assert words in text
    image = stripes / "lying" / "03.png"
    model = load_bundle(found.path)
    assert model.predict(image)[0] == found.learn.classify(image).prediction[0]
    assert (tmp_path / "best" / "report" / "report.html").exists()
    assert pd.read_csv(tmp_path / "best" / "steps.csv")["step"].tolist() == STEPS
    assert found.learn.frozen == []


def test_images_are_as_many_and_as_large_as_there_is_time_for(stripes, among, tmp_path):
    "Half a second gives the smallest size, and ten images of each class; the same call goes on with them"
    quick = {k: v for k, v in QUICK.items() if k != "size"} | dict(minutes=.01)
    said = []
    for _ in range(2):
        found = best_classifier(stripes, among=among, folder=tmp_path / "best", say=said.append, **quick)
        assert found.learn.dls.size == candidates.SIZES[0]
    assert "20 images, for which there is time, take part, at 64 pixels" in said[0]
    assert sum("kept from an earlier call" in line for line in said) == len(STEPS)


def test_the_average_beside_leaves_weights_and_cached_features(knows):
    learn, average = learner(knows), best.AverageBeside()
    learn.freeze()
    assert not why_not_cached(learn, [average])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=average)
    plain = learner(knows)
    with plain.no_bar(), plain.no_logging(): plain.fit_one_cycle(2, 1e-2)
    assert same(weights(plain), weights(learn)), "the training is the same as without"
    assert average.average and not any(torch.equal(v, learn.model.state_dict()[k]) for k, v in average.average.items()
                                       if k.endswith("weight"))


@pytest.mark.parametrize("at", ["_fine_tune", "_improve", "_calibrate", "save_bundle"])
def test_killed_it_goes_on_and_repeats_nothing(stripes, among, tmp_path, monkeypatch, at):
    class Killed(BaseException): pass
    def die(*args, **kwargs): raise Killed
    calls, plain = [], best._fine_tune
    monkeypatch.setattr(best, "_fine_tune", lambda *args: calls.append("training") or plain(*args))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(best, at, die)
        best_classifier(stripes, among=among, folder=tmp_path, say=len, **QUICK)
    before, said = len(calls), []
    found = best_classifier(stripes, among=among, folder=tmp_path, say=said.append, **QUICK)
    assert len(calls) == 1 and before == (at != "_fine_tune")
    done = ["audit", "body", "training", "other weights", "calibration", "report"]
    n = dict(_fine_tune=2, _improve=3, _calibrate=4, save_bundle=6)[at]
    assert [line.split(":")[0] for line in said if "earlier call" in line] == done[:n]
    assert found.steps.index.tolist() == STEPS and found.path.exists()
    assert len(found.learn.history) == sum(found.learn.fine_tuning.epochs) if found.learn.fine_tuning is not None else 1
    assert found.learn.evaluate().table.value["top1"] == found.accuracy.value, "the weights of the earlier call"


def test_the_time_that_is_left_is_what_no_step_has_used(stripes, among, tmp_path):
    best_classifier(stripes, among=among, folder=tmp_path, say=len, **QUICK)
    about = json.loads((tmp_path / "steps.json").read_text())
    for row in about["steps"]:
        if row["step"] == "audit": row["used"] = 5.9
    about["steps"] = about["steps"][:2]  # killed in the training, after nearly all of the six seconds
    (tmp_path / "steps.json").write_text(json.dumps(about))
    found = best_classifier(stripes, among=among, folder=tmp_path, say=len, **QUICK)
    assert found.steps.planned["training"] == 1. and found.steps.used["audit"] == 5.9


def test_another_call_has_a_folder_of_its_own(stripes, among, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "steps.json").write_text(json.dumps(dict(settings=dict(size=32, images="others"), steps=[])))
    with pytest.raises(RunError, match="other images"):
        best_classifier(stripes, among=among, folder=tmp_path / "best", say=len, **QUICK)
    (tmp_path / "best" / "steps.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        best_classifier(stripes, among=among, folder=tmp_path / "best", say=len, **QUICK)


def test_few_images_one_alone_broken_ones_and_copies(stripes, among, tmp_path):
    folder = copied(stripes, tmp_path / "few", 5)
    (folder / "alone").mkdir()
    shutil.copy(stripes / "lying" / "09.png", folder / "alone" / "one.png")
    shutil.copy(stripes / "lying" / "01.png", folder / "lying" / "copy.png")
    (folder / "lying" / "broken.png").write_text("no image")
    whole = (stripes / "lying" / "08.png").read_bytes()
    (folder / "lying" / "cut.png").write_bytes(whole[:len(whole) // 2])  # found when it is decoded
    with pytest.warns(UserWarning): found = best_classifier(folder, among=among, say=len, **QUICK)
    assert found.path is None and "learn.bundle" in repr(found)
    assert [str(c) for c in found.learn.dls.vocab] == ["alone", "lying", "standing"]
    used = [Path(item.source).name for item in [*found.learn.dls.train_ds.items, *found.learn.dls.valid_ds.items]]
    assert "copy.png" not in used and "broken.png" not in used and {"01.png", "one.png"} <= set(used)
    assert {"duplicate", "few images"} <= set(found.audit.problem) and found.report.table.total.iloc[0] >= 2
    assert found.learn.calibration is None, "a temperature of two images would say nothing"


def test_a_temperature_needs_images_that_it_serves():
    def report(n, right):
        "Predictions that are sure, of which a share is right"
        targets = (np.arange(n) % 10 >= right * 10).astype(int)
        return Report(np.tile([.999, .001], (n, 1)), targets, ["a", "b"])
    assert best._temperature(report(10, .7)) == 1
    assert best._temperature(report(300, .7)) > 3


def test_nothing_to_validate_is_an_error(stripes, among, tmp_path):
    with pytest.raises(RunError, match="left for validation"), pytest.warns(UserWarning):
        best_classifier(copied(stripes, tmp_path / "one", 1), among=among, say=len, **QUICK)
    with pytest.raises(DataError): best_classifier(tmp_path / "nothing", among=among, **QUICK)


def test_a_test_set_judges_the_result(stripes, among):
    found = best_classifier(stripes, among=among, say=len, test=.25, **QUICK)
    assert found.report.title == "test" and found.tested and "which no step has used" in repr(found)
    assert found.report.table.total.iloc[0] == 12


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), True, "ten", None])
def test_minutes_that_are_none(stripes, minutes):
    with pytest.raises(RunError, match="above 0"): best_classifier(stripes, minutes)


def test_offline_takes_what_is_here(monkeypatch, tmp_path):
    torch.save({}, tmp_path / "resnet18-f37072fd.pth")
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    here, line = bodies_here(["resnet18", "resnet34"], download=False)
    assert here == {"resnet18": "imagenet"}
    assert line.startswith("offline: only weights on this machine") and "1 of 2" in line
    monkeypatch.setattr(candidates, "_is_connected", lambda: False)
    assert bodies_here(["resnet18", "resnet34"]) == (here, line), "without a connection it is the same"
    assert bodies_here({"resnet34": None})[0] == {"resnet34": None}
    with pytest.raises(CompareError, match="nothing is downloaded"): bodies_here(["resnet34"], download=False)
    with pytest.raises(CompareError, match="is empty"): bodies_here([])
    with pytest.raises(ValueError, match="resnet18"): bodies_here(["resnet81"])


def test_two_bodies_are_compared(stripes, among, knows):
    found = best_classifier(stripes, among=among | {"resnet18": None}, say=len, **QUICK | dict(minutes=1))
    assert found.learn.arch in ("test_resnet", "resnet18") and found.steps.planned["body"] == 12
    assert not len(found.bodies) or set(found.bodies.body) <= {"test_resnet", "resnet18"}


def test_copies_in_training_and_validation_are_left_out(stripes, tmp_path):
    table = pd.DataFrame({"item": [str(stripes / "lying" / f"{i:02}.png") for i in (0, 1, 0, 2)],
                          "label": "lying", "split": ["train", "train", "valid", "valid"]})
    copy_ = tmp_path / "copy.png"
    shutil.copy(table["item"][0], copy_)
    table.loc[2, "item"] = str(copy_)
    kept, line = audit_in(table, 10)
    assert kept["rows"] == [0, 1, 3] and "copies left out: 1" in line
    assert audit_in(table.assign(label=["lying", "lying", "standing", "lying"]), 10)[0]["rows"] == [0, 1, 2, 3]
    kept, line = audit_in(pd.concat([table] * 30, ignore_index=True), 1e-9)
    assert "32 of 120 images" in line
