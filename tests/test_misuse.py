"""What is asked wrongly is said before anything trains; threads, tables and interruptions leave a learner as it was."""

import csv
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.optimizer import ranger
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits

from ftlib.data.images import image_data
from ftlib.errors import DataError
from ftlib.errors import EvaluateError
from ftlib.experiment.compare import compare
from ftlib.errors import CompareError
from ftlib.models.cnn import cnn
from ftlib.errors import TrainError
from ftlib.callbacks.stopping import EarlyStopping
from ftlib.callbacks.trackers import ReduceLROnPlateau, SaveModelCallback
from ftlib.train.vision import vision_learner

IMAGES, LABELS = (load_digits().images * 255 / 16).astype("uint8"), load_digits().target
NAMES = ["=1+1", "+cmd|' /C calc'!A0", "$x^^2$"]


def data(**kwargs):
    at = np.flatnonzero(LABELS < 3)[:90]
    return image_data({"image": IMAGES[at], "label": [NAMES[d] for d in LABELS[at]]},
                      **dict(size=16, bs=16, num_workers=0, augment=None) | kwargs)


@pytest.fixture(scope="module")
def dls(): return data()


def tiny(dls, **kwargs):
    set_seed(0)
    return vision_learner(dls, cnn(dls, channels=(4,)), **dict(metrics=accuracy, precision="fp32") | kwargs)


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()


@pytest.mark.parametrize("ask", [lambda l, dl: l.get_preds(dl=dl)[0], lambda l, dl: torch.tensor(l.evaluate(dl).probs),
                                 lambda l, dl: torch.tensor(l.validate(dl=dl)[:1])])
def test_threads_get_the_answers_of_one_thread(dls, ask):
    learn = tiny(dls)
    items, n = list(dls.train.items), len(learn.cbs)
    parts = [dls.test_dl(items[i::3], with_labels=True) for i in range(3)]
    alone = [quiet(learn, lambda p=p: ask(learn, p)) for p in parts]
    learn.remove_cb(learn.progress)
    with ThreadPoolExecutor(3) as pool: together = list(pool.map(lambda p: ask(learn, p), parts * 2))
    assert all(map(torch.equal, alone * 2, together)) and len(learn.cbs) == n - 1


def test_another_thread_is_refused_while_it_trains_and_answered_afterwards(dls):
    def weights(ask):
        learn, said = tiny(dls, seed=0), []
        class Asks(Callback):
            def after_batch(self):
                if not self.learn.training or not ask: return
                thread = threading.Thread(target=lambda: said.append(answer(learn)))
                thread.start()
                thread.join()
        quiet(learn, lambda: learn.fit(2, 1e-2, cbs=Asks()))
        return [p.clone() for p in learn.model.parameters()], said, learn
    def answer(learn):
        try: return learn.predict(dls.valid.items[0])
        except TrainError as e: return str(e)
    plain, _, _ = weights(False)
    asked, said, learn = weights(True)
    assert all(map(torch.equal, plain, asked)) and said and all("another thread" in o for o in said)
    assert answer(learn)[0] in NAMES
    class Fails(Callback):
        def after_batch(self): raise RuntimeError("here")
    with pytest.raises(RuntimeError, match="here"): quiet(learn, lambda: learn.fit(1, 1e-3, cbs=Fails()))
    with ThreadPoolExecutor(1) as pool: assert pool.submit(answer, learn).result(10)[0] in NAMES


def test_no_table_has_a_formula_and_names_are_drawn_as_they_are(dls, tmp_path):
    report = tiny(dls).evaluate()
    report.save(tmp_path)
    cells = [c for f in tmp_path.glob("*.csv") for row in csv.reader(f.open()) for c in row]
    assert not [c for c in cells if c[:1] in "=+@" and c] and any(c.startswith("'=1+1") for c in cells)
    for draw in (report.plot_per_class, report.plot_confusion, report.plot_errors):
        draw()
        plt.gcf().canvas.draw()
        plt.close("all")


def test_what_follows_validation_needs_some():
    none = data(valid=0)
    for cb in (EarlyStopping("accuracy"), ReduceLROnPlateau(), SaveModelCallback()):
        learn = tiny(none)
        with pytest.raises(ValueError, match="no validation images"):
            quiet(learn, lambda cb=cb, learn=learn: learn.fit(1, 1e-3, cbs=cb))
        assert not len(learn.history)
    with pytest.raises(TrainError, match="no validation images"): tiny(none).get_preds()


def test_a_training_without_validation_is_kept(tmp_path):
    learn = tiny(data(valid=0))
    quiet(learn, lambda: learn.fit(2, 1e-3, checkpoint=tmp_path))
    assert len(learn.history) == 2


WRONG = {"n_cycles": lambda l: l.fit_sgdr(0, 1), "div=0": lambda l: l.fit_one_cycle(1, 1e-3, div=0),
         "moms=": lambda l: l.fit_one_cycle(1, 1e-3, moms=.9), "num_it": lambda l: l.lr_find(num_it=10.5),
         "patience": lambda l: EarlyStopping(patience="a"), "names no folder": lambda l: l.fit(1, 1e-3, checkpoint=""),
         "learning rate": lambda l: l.fit(1, True)}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_arguments_are_named(dls, said):
    with pytest.raises(ValueError, match=said): WRONG[said](tiny(dls))


def test_wrong_comparisons_and_reports(dls):
    learn = tiny(dls)
    for seeds in (0, [], "two", True):
        with pytest.raises(CompareError, match="seeds"): compare({"x": lambda s: learn}, seeds)
    with pytest.raises(CompareError): compare([lambda s: learn])
    for confidence in (0, 1, 2, -.5, True):
        with pytest.raises(EvaluateError, match="confidence"): learn.evaluate(confidence=confidence)
    for nothing in ([], ()):
        with pytest.raises(DataError, match="nothing to predict"): learn.classify(nothing)


def test_a_fit_within_no_grad_trains(dls):
    learn = tiny(dls)
    before = [p.clone() for p in learn.model.cpu().parameters()]
    with torch.no_grad(): quiet(learn, lambda: learn.fit(1, 1e-2))
    assert not all(map(torch.equal, before, learn.model.cpu().parameters()))


def test_the_error_of_a_callback_is_the_sweeps(dls):
    class Mine(Callback):
        def before_fit(self): raise RuntimeError("a message of its own")
    with pytest.raises(RuntimeError, match="of its own"): tiny(dls, cbs=Mine()).lr_find(show_plot=False)


def test_a_lookahead_optimizer_is_put_back(dls):
    learn = tiny(dls, opt_func=ranger)
    quiet(learn, lambda: learn.fit(1, 1e-2))
    count, slow = learn.opt.count, [p.clone() for g in learn.opt.slow_weights for p in g]
    quiet(learn, lambda: learn.lr_find(num_it=10))
    assert learn.opt.count == count and all(map(torch.equal, slow,
                                                [p for g in learn.opt.slow_weights
                                                 for p in g])) and not plt.get_fignums()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_an_output_without_unicode_ends_no_fit(dls, monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    learn = tiny(dls)
    learn.fit(3, 1e-3, cbs=ReduceLROnPlateau(min_delta=9.))
    assert len(learn.history) == 3


def test_a_folder_of_images_can_be_predicted(dls, tmp_path):
    from PIL import Image
    for i in range(3): Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    learn = tiny(dls)
    assert len(learn.get_preds(dl=dls.test_dl(tmp_path))[0]) == 3
    assert len(learn.get_preds(dl=dls.test_dl(str(tmp_path / "0.png")))[0]) == 1
