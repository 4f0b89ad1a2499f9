"""Right answers: what a loss makes of outputs, metrics over the whole set, different views, the groups of an own
splitter, resuming only what was begun, nothing of a file but numbers."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation
from fastai.losses import (
    BaseLoss, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat)
from fastai.metrics import accuracy, error_rate
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn

from ftlib.data.images import image_data
from ftlib.models.cnn import cnn
from ftlib.models.network import Body, Network
from ftlib.persist.callback_state import load_callback_state, callback_state
from ftlib.errors import CheckpointError
from ftlib.cache.features import MixFeatures
from ftlib.errors import TrainError
from ftlib.train.learner import Learner
from ftlib.errors import MetricError
from ftlib.persist.packed import read_packed, write_packed
from ftlib.callbacks.stopping import EarlyStopping
from ftlib.callbacks.trackers import CSVLogger, SaveModelCallback
from ftlib.train.vision import vision_learner

IMAGES, LABELS = (load_digits().images * 255 / 16).astype("uint8"), load_digits().target


@pytest.fixture(scope="module")
def dls():
    at = np.flatnonzero(LABELS < 3)[:120]
    return image_data({"image": IMAGES[at], "label": [f"class {d}" for d in LABELS[at]]}, size=16, bs=16, num_workers=0,
                      seed=0)


def tiny(dls, **kwargs):
    set_seed(0)
    return vision_learner(dls, cnn(dls, channels=(8,)), **dict(metrics=accuracy, precision="fp32") | kwargs)


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()


# ---- losses

class Focal(nn.Module):
    def __init__(self, gamma=2., weight=None):
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weight", weight)
    def forward(self, scores, y):
        ce = F.cross_entropy(scores, y, self.weight, reduction="none")
        return ((1 - torch.exp(-ce)) ** self.gamma * ce).mean()


class Poly:
    "A cross-entropy with a first-order term (Leng et al. 2022), no module"
    def __call__(self, scores, y):
        return (F.cross_entropy(scores, y, reduction="none") + 1 - scores.softmax(1).gather(1, y[:, None])[:, 0]).mean()


def own_function(pred, targ): return -(F.log_softmax(pred, -1)[torch.arange(len(targ)), targ]).mean()


class Smoothed(nn.CrossEntropyLoss):
    def __init__(self): super().__init__(label_smoothing=.2)


OF_SOFTMAX = {"F.cross_entropy": F.cross_entropy, "partial": partial(F.cross_entropy, label_smoothing=.1),
              "lambda": lambda p, y: 3 * F.cross_entropy(p, y, reduction="sum"),
              "nn": nn.CrossEntropyLoss(), "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1., 5., 2.])),
              "nn subclass": Smoothed(), "own focal": Focal(),
              "own weighted focal": Focal(.5, torch.tensor([1., 5., 2.])), "own object": Poly(),
              "own function": own_function, "flat": CrossEntropyLossFlat(),
              "fastai's focal": FocalLossFlat(gamma=3.), "smoothing": LabelSmoothingCrossEntropy(),
              "smoothing, flat": LabelSmoothingCrossEntropyFlat(),
              "fastai's BaseLoss": BaseLoss(nn.CrossEntropyLoss), "multi-margin": nn.MultiMarginLoss()}


@pytest.mark.parametrize("name", OF_SOFTMAX)
@pytest.mark.parametrize("later", [False, True])
def test_classes_and_probabilities_of_any_cross_entropy(dls, name, later):
    loss = OF_SOFTMAX[name]
    learn = tiny(dls, loss_func=None if later else loss)
    if later: learn.loss_func = loss
    item, scores = dls.valid.items[0], learn.get_preds(act=lambda x: x)[0]
    decoded, probs = learn.get_preds(with_decoded=True)[2], learn.get_preds(act=learn.probabilities_of)[0]
    assert torch.equal(learn.get_preds()[0], scores) != hasattr(loss, "activation"), "as fastai gives them"
    assert torch.allclose(probs, scores.softmax(1), atol=1e-6) and torch.equal(decoded, scores.argmax(1))
    name, number, p = learn.predict(item)
    assert name == dls.vocab[scores[0].argmax()] and number == scores[0].argmax() and torch.allclose(p, probs[0],
        atol=1e-5)
    answer = quiet(learn, lambda: learn.classify([item])).iloc[0]
    assert answer.prediction == name and answer.probability == pytest.approx(float(p.max()), abs=1e-5)
    right = float((scores.argmax(1) == learn.get_preds()[1]).float().mean())
    assert learn.evaluate().table.value["top1"] == pytest.approx(right)


@pytest.mark.parametrize("name", ["F.cross_entropy", "own focal", "own object", "lambda"])
def test_all_that_follows_from_answers(dls, name):
    learn = tiny(dls, loss_func=OF_SOFTMAX[name])
    probs, targets, losses = learn.get_preds(with_loss=True)
    assert losses.shape == (len(targets),)
    assert np.array_equal(ClassificationInterpretation.from_learner(learn).confusion_matrix(),
                          learn.evaluate().confusion.to_numpy())
    loss, activation = learn.loss_func, getattr(F.cross_entropy, "activation", None)
    found = learn.calibrate()
    assert learn.loss_func is loss and getattr(F.cross_entropy, "activation", None) is activation
    scores = learn.get_preds(act=lambda x: x)[0]
    assert torch.allclose(learn.get_preds()[0], (scores / found.temperature).softmax(1), atol=1e-6)
    learn.show_results(max_n=2)


def test_an_activation_of_the_losss_own_is_taken(dls):
    loss = Focal()
    loss.activation, loss.decodes = lambda x: (x / 2).softmax(1), lambda p: p.argmin(1)
    learn = tiny(dls, loss_func=loss)
    scores = learn.get_preds(act=lambda x: x)[0]
    probs, _, decoded = learn.get_preds(with_decoded=True)
    assert torch.allclose(probs, (scores / 2).softmax(1)) and torch.equal(decoded, probs.argmin(1))


@pytest.mark.parametrize("loss", [lambda p, y: -p.gather(1, y[:, None]).mean(),
    lambda p, y: ((p - F.one_hot(y, 3)) ** 2).mean(), lambda d, y: F.cross_entropy(-d, y)],
                         ids=["scores", "squares", "distances"])
def test_a_loss_that_does_not_tell_is_refused(dls, loss):
    learn = tiny(dls, loss_func=loss)
    for ask in (lambda: learn.predict(dls.valid.items[0]), lambda: learn.classify(dls.valid.items[:2]), learn.evaluate,
                learn.calibrate, lambda: learn.get_preds(with_decoded=True)):
        with pytest.raises(TrainError, match="activation"): quiet(learn, ask)
    assert torch.equal(learn.get_preds()[0], learn.get_preds(act=lambda x: x)[0])


def test_outputs_that_are_probabilities_are_taken_as_they_are(dls):
    learn = tiny(dls, loss_func=lambda p, y: -p.gather(1, y[:, None]).log().mean())
    learn.model[1].append(nn.Softmax(1))
    assert learn.predict(dls.valid.items[0])[2].sum() == pytest.approx(1) and len(learn.evaluate().table)


@pytest.mark.parametrize("mix", [MixUp, CutMix, MixFeatures])
def test_a_loss_that_can_not_be_mixed_is_named(dls, mix):
    for loss in (Focal(), F.cross_entropy, own_function):
        learn = tiny(dls, loss_func=loss)
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(TrainError, match="y_int"): quiet(learn, lambda: learn.fit(1, 1e-3, cbs=mix()))
        assert all(map(torch.equal, before, learn.model.parameters()))
    learn = tiny(dls)
    learn.loss_func = nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 1.]))
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=mix()))
    assert len(learn.history) == 1


# ---- test-time augmentation

class Spy(Callback):
    uses_images = True
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.learn.iter == 0: self.seen.append(self.learn.xb[0].flatten()[:2000].sum().item())


@pytest.mark.parametrize("n", [1, 3])
def test_each_view_is_another(dls, n):
    for ask in (lambda learn: learn.tta(n=n), lambda learn: learn.evaluate(tta=n),
                lambda learn: learn.evaluate("train", tta=n),
                lambda learn: learn.tta(dl=dls.test_dl(dls.valid.items), n=n)):
        learn, spy = tiny(dls), Spy()
        learn.add_cb(spy)
        state = random.getstate(), torch.get_rng_state()
        quiet(learn, lambda: ask(learn))
        assert len(set(spy.seen)) == len(spy.seen) == n + 1
        assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
        first, spy.seen = spy.seen, []
        quiet(learn, lambda: ask(learn))
        assert spy.seen == first


# ---- metrics

class Share:
    "As torchmetrics has them"
    higher_is_better = True
    def reset(self): self.pairs = []
    def update(self, preds, targets): self.pairs.append((preds.argmax(1).cpu(), targets.cpu()))
    def compute(self):
        p, y = (torch.cat(o) for o in zip(*self.pairs, strict=True))
        return torch.tensor(sk.f1_score(y, p, average="macro"))
    def __call__(self, preds, targets): return torch.tensor(0.)


PROBABLY = {"log_loss": sk.log_loss, "roc_auc_score": partial(sk.roc_auc_score, multi_class="ovr")}
CLASSES = {"f1": partial(sk.f1_score, average="macro"), "kappa": sk.cohen_kappa_score,
           "balanced": sk.balanced_accuracy_score, "mcc": sk.matthews_corrcoef,
           "recall": partial(sk.recall_score, average="macro")}


def test_metrics_that_are_no_mean_are_of_the_whole_set(dls):
    metrics = {"whole": Share()} | CLASSES | PROBABLY
    learn = tiny(dls, metrics=[*metrics.values()])
    quiet(learn, lambda: learn.fit(1, 1e-2))
    probs, y = learn.get_preds(act=learn.probabilities_of)
    wanted = [CLASSES["f1"](y, probs.argmax(1)), *(f(y, probs.argmax(1)) for f in CLASSES.values()),
              *(f(y, probs) for f in PROBABLY.values())]
    columns = [c for c in learn.history if c not in ("phase", "epoch", "train_loss", "valid_loss", "size", "lr",
                                                     "seconds", "frozen", "cached", "fill_seconds", "fill_bytes")]
    assert columns == ["Share", "f1_score(average='macro')", "cohen_kappa_score", "balanced_accuracy_score",
                       "matthews_corrcoef", "recall_score(average='macro')", "log_loss",
                       "roc_auc_score(multi_class='ovr')"]
    assert learn.history[columns].iloc[0].tolist() == pytest.approx(wanted, abs=1e-5)
    quiet(learn, lambda: learn.fit(1, 1e-3, cbs=[EarlyStopping("Share"), SaveModelCallback("log_loss", fname="f")]))


def test_metrics_of_torchmetrics(dls):
    torchmetrics = pytest.importorskip("torchmetrics")
    learn = tiny(dls, metrics=[torchmetrics.F1Score("multiclass", num_classes=3, average="macro"),
                               torchmetrics.AUROC("multiclass", num_classes=3)])
    quiet(learn, lambda: learn.fit(1, 1e-2))
    probs, y = learn.get_preds(act=learn.probabilities_of)
    assert learn.history.MulticlassF1Score.iloc[0] == pytest.approx(CLASSES["f1"](y, probs.argmax(1)))
    assert learn.history.MulticlassAUROC.iloc[0] == pytest.approx(sk.roc_auc_score(y, probs, multi_class="ovr"))
    with pytest.raises(MetricError, match="one by one"):
        tiny(dls, metrics=torchmetrics.MetricCollection([torchmetrics.Accuracy("multiclass", num_classes=3)]))
    learn = tiny(dls, metrics=torchmetrics.F1Score("multiclass", num_classes=3, average=None))
    with pytest.raises(MetricError, match="3 numbers"): quiet(learn, lambda: learn.fit(1, 1e-2))


def test_metrics_by_name_and_wrong_ones(dls):
    assert list(tiny(dls, metrics=["accuracy", "error_rate", "top2",
                                   partial(accuracy, axis=-1)]).metrics.attrgot("name")) == ["accuracy", "error_rate",
                                       "top2", "accuracy(axis=-1)"]
    assert tiny(dls, metrics="accuracy").metrics[0].func is accuracy and tiny(dls,
        metrics="error_rate").metrics[0].func is error_rate
    with pytest.raises(MetricError, match="Did you mean 'accuracy'"): tiny(dls, metrics="acuracy")
    with pytest.raises(MetricError, match="no metric"): tiny(dls, metrics=[.5])
    for name in ("phase", "epoch", "valid_loss", "lr", "time"):
        def metric(p, y): return torch.tensor(1.)
        metric.__name__ = name
        with pytest.raises(MetricError, match="column of the history"): tiny(dls, metrics=metric)


# ---- an own splitter

def deep(groups=None):
    "A network of five stages, in a learner with the groups of `groups`"
    def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU())
    stages = {f"stage{i}": conv(1 if i == 0 else 4, 4)
              for i in range(4)} | {"pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}
    net = Network(Body(nn.Identity(), stages, 4, shapes=[(4, 8, 8)] * 4 + [(4,)]), nn.Linear(4, 10))
    rows = [(torch.tensor(a / 255.)[None].float(), torch.tensor(y)) for a,
            y in zip(IMAGES[:96], LABELS[:96], strict=True)]
    dls = DataLoaders.from_dsets(rows[:64], rows[64:], bs=16, num_workers=0, device="cpu")
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), splitter=groups, precision="fp32")


SPLITS = {"coarser": lambda m: [[p for s in m.stages[:3] for p in s.parameters()], [*m.stages[3].parameters()],
                                [*m.head.parameters()]],
          "in the middle of a stage": lambda m: [[*m.stages[0].parameters(), *m.stages[1][0].parameters()],
              [*m.stages[1][1].parameters(), *m.stages[2].parameters(), *m.stages[3].parameters()],
                                                 [*m.head.parameters()]],
          "late first": lambda m: [[*m.stages[3].parameters()], [p for s in m.stages[:3] for p in s.parameters()],
                                   [*m.head.parameters()]],
          "body and head": lambda m: [[p for s in m.stages for p in s.parameters()], [*m.head.parameters()]]}


@pytest.mark.parametrize("name", SPLITS)
def test_the_groups_of_an_own_splitter_are_frozen(name):
    learn = deep(SPLITS[name])
    learn.create_opt()
    k = len(learn.opt.param_lists)
    for n in [*range(-k, k + 1)]:
        learn.freeze_to(n)
        first = n % k if n < k else k
        wanted = [g >= first for g in range(k)]
        assert [{p.requires_grad for p in g} for g in learn.opt.param_lists] == [{w} for w in wanted], n
        table = learn.groups_table()
        assert len(table) == k and (table.trainable > 0).tolist() == wanted and learn.frozen == [f"group {i}"
            for i in range(first)]
        before, held = [[p.clone() for p in g] for g in learn.opt.param_lists], {id(p)
            for g in learn.opt.param_lists[:first] for p in g}
        norms = [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) and id(m.weight) in held]
        statistics = [m.running_mean.clone() for m in norms]
        if first == k: continue
        quiet(learn, lambda: learn.fit(1, 1e-2))
        moved = [not all(map(torch.equal, a, b)) for a, b in zip(before, learn.opt.param_lists, strict=True)]
        assert moved == wanted and all(map(torch.equal, statistics, [m.running_mean for m in norms]))
        quiet(learn, lambda: learn.fit(1, 1e-2, reset_opt=True))
        assert [{p.requires_grad for p in g} for g in learn.opt.param_lists] == [{w} for w in wanted]


def test_a_group_by_name_and_what_is_none():
    learn = deep()
    learn.freeze_to("stage2")
    assert learn.frozen == ["stage0", "stage1"]
    learn.freeze_to("head")
    assert learn.frozen == ["stage0", "stage1", "stage2", "stage3"]
    for wrong in ("stage7", "x", 1.5, None, True, [1], 9):
        with pytest.raises(TrainError, match="freeze_to"): learn.freeze_to(wrong)
    assert learn.frozen == ["stage0", "stage1", "stage2", "stage3"]
    own = deep(SPLITS["coarser"])
    own.freeze_to("group 1")
    assert own.frozen == ["group 0"]


# ---- resume

class Stop(Callback):
    order = 99
    def __init__(self, at=None): self.moment = at
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def __call__(self, name):
        if self.moment is not None and name == "after_epoch" and self.learn.epoch == self.moment:
            raise KeyboardInterrupt


class OwnDrop(nn.Module):
    def __init__(self, rate): super().__init__(); self.rate = rate
    def forward(self, x): return F.dropout(x, self.rate, self.training)


def begun(dls, folder, change=None, **kwargs):
    "A learner whose training was stopped, or another one that goes on"
    set_seed(0)
    net = cnn(dls, channels=(4,), ps=.5)
    net[1].insert(0, OwnDrop(.1))
    net[1].insert(0, nn.LeakyReLU(.1))
    if change: change(net)
    learn = vision_learner(dls, net, precision="fp32", **kwargs)
    stop = Stop(None if change or kwargs or folder.exists() else 1)
    quiet(learn, lambda: learn.fit_one_cycle(3, 1e-3, cbs=stop, checkpoint=folder, resume=folder.exists()))
    return learn


def dropout(net): next(m for m in net.modules() if isinstance(m, nn.Dropout)).p = .9
def own_dropout(net): net[1][1].rate = .9
def slope(net): net[1][0].negative_slope = .5
def momentum(net): next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).momentum = .5


OTHERS = {"loss": dict(loss_func=LabelSmoothingCrossEntropy()), "loss ": dict(loss_func=Focal()),
          "loss  ": dict(loss_func=nn.CrossEntropyLoss(label_smoothing=.3)),
          "loss   ": dict(loss_func=nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 3.]))),
          "loss    ": dict(loss_func=F.cross_entropy),
          "Dropout": dict(change=dropout), "rate=0.9": dict(change=own_dropout), "LeakyReLU": dict(change=slope),
          "BatchNorm": dict(change=momentum),
          "seed": dict(seed=5), "batch norm": dict(bn="still"), "decay of norms": dict(wd_bn_bias=True)}


def test_only_what_was_begun_goes_on(dls, tmp_path):
    with pytest.raises(KeyboardInterrupt): begun(dls, tmp_path / "a")
    for name, changed in OTHERS.items():
        with pytest.raises(CheckpointError, match=name.strip()): begun(dls, tmp_path / "a", **changed)
    assert len(begun(dls, tmp_path / "a").history) == 3


@pytest.mark.parametrize("loss", [Focal, partial(Focal, 3.), lambda: partial(F.cross_entropy, label_smoothing=.1),
                                  lambda: own_function, FocalLossFlat])
def test_the_same_loss_goes_on(dls, tmp_path, loss):
    def learner():
        set_seed(0)
        return tiny(dls, loss_func=loss())
    with pytest.raises(KeyboardInterrupt):
        learn = learner()
        quiet(learn, lambda: learn.fit(3, 1e-3, cbs=Stop(1), checkpoint=tmp_path / "a"))
    learn = learner()
    quiet(learn, lambda: learn.fit(3, 1e-3, cbs=Stop(), checkpoint=tmp_path / "a", resume=True))
    assert len(learn.history) == 3


# ---- what a checkpoint may set

class Logs(Callback):
    "Made with a folder, from which it makes a path of its own"
    def __init__(self, folder, every=1):
        self.folder, self.file, self.every, self.steps, self.names = folder, str(Path(folder) / "log"), every, 0, ["a"]
    def after_epoch(self): self.steps += 1


class LogsMore(Logs):
    def __init__(self, folder): super().__init__(folder, every=2)


@pytest.mark.parametrize("cls", [Logs, LogsMore])
def test_numbers_come_back_and_nothing_that_names_a_place(cls, tmp_path):
    cb, other = cls(tmp_path / "mine"), cls(tmp_path / "theirs")
    other.steps = 7
    evil = dict(values=callback_state(other)["values"]
                | dict(folder="/x", file="/x", every=9, names=["/x"], learn=3, more={"path": "/x"}),
                parts=callback_state(other)["parts"])
    before = dict(vars(cb))
    load_callback_state(cb, evil)
    assert cb.steps == 7 and vars(cb) == before | {"steps": 7}


def test_a_foreign_checkpoint_writes_nowhere_else(dls, tmp_path):
    def fit(stop, resume=False):
        learn = tiny(dls, path=tmp_path)
        cbs = [CSVLogger("log.csv"), SaveModelCallback(fname="best", reset_on_fit=True), Logs(tmp_path), Stop(stop)]
        quiet(learn, lambda: learn.fit(3, 1e-3, cbs=cbs, checkpoint=tmp_path / "ck", resume=resume))
        return learn
    with pytest.raises(KeyboardInterrupt): fit(1)
    victim = tmp_path / "home" / "file"
    victim.parent.mkdir()
    victim.write_text("mine")
    path = next((tmp_path / "ck").glob("01-*"))
    state = read_packed(path)
    for _, kept in state["callbacks"]:
        for key in ("values", "own"):
            if key in kept:
                kept[key] |= dict(fname=victim, path=victim, file=str(victim), folder=str(victim.parent),
                                  last_saved_path=victim, model_dir=str(victim.parent))
    state["learner"] |= dict(path=victim.parent, model_dir="owned", lr=9.)
    path.unlink()
    write_packed(tmp_path / "ck", path.name.rpartition("-")[0], state)
    learn = fit(None, resume=True)
    assert victim.read_text() == "mine" and [p.name for p in victim.parent.iterdir()] == ["file"]
    assert (tmp_path / "log.csv").exists() and (tmp_path / "models" / "best.pth").exists()
    assert learn.path == tmp_path and learn.lr != 9
