"""Every figure of a report against a library that computes it too, on random predictions."""

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from ftlib.evaluate.report import Report

MANY = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def single(draw):
    "Probabilities and true classes; classes may be absent, images few"
    n, c, seed = draw(st.integers(2, 120)), draw(st.integers(2, 9)), draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, draw(st.integers(1, c)), n)
    logits = rng.normal(size=(n, c)) + draw(st.floats(0, 4)) * np.eye(c)[targets]
    probs = np.exp(draw(st.floats(.3, 4)) * logits)
    return probs / probs.sum(1, keepdims=True), targets, [f"class {i}" for i in range(c)]


@st.composite
def several(draw):
    n, c, seed = draw(st.integers(2, 80)), draw(st.integers(2, 6)), draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, c)) < rng.random(c)).astype(int)
    return 1 / (1 + np.exp(-rng.normal(size=(n, c)) - 2 * targets + 1)), targets, list("abcdef"[:c])


def same(a, b): np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=1e-6)


@MANY
@given(single())
def test_figures_of_one_class_an_image(given):
    probs, targets, classes = given
    report, c, predicted = Report(*given), len(classes), probs.argmax(1)
    value, every = report.table.value, list(range(c))
    same(value["top1"], sk.accuracy_score(targets, predicted))
    if c > 3: same(value["top3"], sk.top_k_accuracy_score(targets, probs, k=3, labels=every))
    assert ("top3" in value) == (c > 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(value["balanced accuracy"], sk.balanced_accuracy_score(targets, predicted))
        same(value["macro F1"], sk.f1_score(targets, predicted, average="macro"))
        precision, recall, f1, images = sk.precision_recall_fscore_support(targets, predicted, labels=every,
            zero_division=np.nan)
    same(value["loss"], sk.log_loss(targets, probs, labels=every))
    same(value["Brier"], sk.brier_score_loss(targets, probs, labels=every, scale_by_half=False))
    same(value["ECE"], tm.multiclass_calibration_error(torch.tensor(probs), torch.tensor(targets), c, n_bins=15))
    assert (report.confusion.to_numpy() == sk.confusion_matrix(targets, predicted, labels=every)).all()
    table = report.per_class
    same(table["precision"], precision)
    same(table["recall"], recall)
    same(table["images"], images)
    there = (images > 0) | (np.bincount(predicted, minlength=c) > 0)
    same(table["F1"][there], f1[there])


@MANY
@given(single(), st.sampled_from([.9, .95, .99]))
def test_intervals_of_shares_and_means(given, level):
    report = Report(*given, confidence=level)
    row = report.table.loc["top1"]
    same([row.low, row.high], proportion_confint(row.right, row.total, 1 - level, "wilson"))
    losses = -np.log(given[0][np.arange(len(given[1])), given[1]])
    low, high = DescrStatsW(losses).tconfint_mean(1 - level)
    same(report.table.loc["loss", ["low", "high"]], [max(low, 0), high])  # a loss is never below 0
    table = report.per_class[report.per_class.images > 0]
    same(table[["recall low", "recall "
                "high"]].to_numpy().T, proportion_confint(table.right, table.images, 1 - level, "wilson"))


@MANY
@given(single())
def test_mistakes_and_confusions(given):
    probs, targets, classes = given
    report = Report(*given, items=[f"{i}.jpg" for i in range(len(targets))])
    errors = report.errors
    assert sorted(errors.index) == np.flatnonzero(probs.argmax(1) != targets).tolist()
    assert errors.loss.is_monotonic_decreasing and (errors.image == [f"{i}.jpg" for i in errors.index]).all()
    same(errors.loss, -np.log(errors["p_label"].astype(float)))
    for row in report.per_class.to_dict("records"):
        others = report.confusion.loc[row["class"]].drop(row["class"])
        assert row["n_confused"] == others.max() and (not row["n_confused"]
                                                      or others[row["confused with"]] == others.max())


@MANY
@given(single())
def test_what_is_left_out(given):
    probs, targets, _ = given
    for row in Report(*given).coverage.to_dict("records"):
        answered = probs.max(1) >= row["threshold"]
        assert answered.sum() == row["answered"] and np.isclose(answered.mean(), row["coverage"])
        same(row["accuracy"], (probs.argmax(1) == targets)[answered].mean())


@MANY
@given(several())
def test_figures_of_any_number_of_classes(given):
    probs, targets, classes = given
    report, predicted = Report(*given), (given[0] >= .5).astype(int)
    value = report.table.value
    same(value["exact_match"], sk.accuracy_score(targets, predicted))
    same(value["hamming_accuracy"], 1 - sk.hamming_loss(targets, predicted))
    there = (targets.sum(0) + predicted.sum(0)) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # class by class: scikit-learn takes a single column for two classes
        each = [sk.f1_score(t, p) for t, p in zip(targets[:, there].T, predicted[:, there].T, strict=True)]
        same(value["macro F1"], np.mean(each) if each else np.nan)
        same(value["micro F1"], sk.f1_score(targets, predicted, average="micro"))
    same(value["loss"], np.mean([sk.log_loss(t, p, labels=[0, 1]) for t, p in zip(targets.T, probs.T, strict=True)]))
    same(value["Brier"], np.mean((probs - targets) ** 2))
    same(value["ECE"], tm.binary_calibration_error(torch.tensor(probs.ravel()), torch.tensor(targets.ravel()),
                                                   n_bins=15))
    same(report.confusion.to_numpy().reshape(-1, 2, 2), sk.multilabel_confusion_matrix(targets, predicted))
    for row, t, p in zip(report.per_class.to_dict("records"), targets.T, probs.T, strict=True):
        assert np.isnan(row["AP"]) if not t.any() else np.isclose(row["AP"], sk.average_precision_score(t, p))


@pytest.mark.parametrize("level", [.8, .95])
def test_means_hold_what_they_promise(level):
    "Intervals of a mean loss: skewed values, 2,000 draws"
    rng = np.random.default_rng(0)
    from ftlib.evaluate.intervals import mean_interval
    held = [low <= 1 <= high for _, low, high in (mean_interval(rng.exponential(size=100), level) for _ in range(2000))]
    assert abs(np.mean(held) - level) < .03


def test_f1_of_several_classes_holds_what_it_promises():
    rng, share = np.random.default_rng(0), np.array([.5, .2, .1])
    def draw(n):
        targets = rng.random((n, 3)) < share
        return 1 / (1 + np.exp(-rng.normal(size=(n, 3)) - 3 * targets + 1.5)), targets
    table = Report(*draw(400_000), list("abc")).table.value
    held = []
    for _ in range(300):
        found = Report(*draw(150), list("abc")).table
        held.append([found.low[k] <= table[k] <= found.high[k] for k in ("macro F1", "micro F1")])
    assert (np.abs(np.mean(held, 0) - .95) < .04).all(), np.mean(held, 0)
