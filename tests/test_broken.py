"""Images that turn out to be broken when they are decoded are left out of all figures, counted, and never remembered
under their name."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.metrics import accuracy
from PIL import Image

from ftlib.data.images import image_data
from ftlib.experiment.crossval import cross_validate
from ftlib.models.cnn import cnn
from ftlib.train.vision import vision_learner

BROKEN = {"two apart": [1, 6], "a whole batch": [0, 1, 2, 3], "the last": [7], "all but one": [0, 1, 2, 3, 4, 5, 7]}


def cut(path): path.write_bytes((b := path.read_bytes())[:len(b) // 2])
def gone(path): path.unlink()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    warnings.simplefilter("ignore")


@pytest.fixture
def table(tmp_path):
    "16 images to train on, 8 to validate; TIFF files look whole until they are decoded"
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        path = tmp_path / f"{i:02}.tif"
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        rows.append(dict(path=path, label="ab"[i % 2], split="train" if i < 16 else "valid"))
    return pd.DataFrame(rows)


def learner(table, frozen=-2, **kwargs):
    dls = image_data(table, **dict(size=16, bs=4, num_workers=0, augment=None) | kwargs)
    torch.manual_seed(0)
    learn = vision_learner(dls, cnn(2, size=16, channels=(4, 8, 8)), metrics=accuracy, precision="fp32", seed=0)
    learn.freeze_to(frozen)
    return learn


def figures(learn):
    with learn.no_bar(), learn.no_logging(): return [float(v) for v in learn.validate()]


@pytest.mark.parametrize("rows", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("damage", [cut, gone])
@pytest.mark.parametrize("how", [dict(frozen=0), dict(frozen=0, cache=False), dict(frozen=0, num_workers=2),
                                 dict(frozen=-2), dict(frozen=-2, cache=False)], ids=str)
def test_figures_are_those_without_them(table, rows, damage, how):
    valid = table[table.split == "valid"].reset_index(drop=True)
    whole = pd.concat([table[table.split == "train"], valid.drop(index=rows)])
    expected = figures(learner(whole, **how))
    learn = learner(table, **how)
    for i in rows: damage(valid.path[i])
    np.testing.assert_allclose(figures(learn), expected, rtol=1e-2)
    with learn.no_bar(), learn.no_logging():
        preds, targets = learn.get_preds()
        report = learn.evaluate()
    # row by row, and no stand-in's
    assert len(preds) == len(targets) == 8 and sorted(set(torch.where(preds.isnan())[0].tolist())) == rows
    assert report.left_out == len(rows) and len(report.probs) == 8 - len(rows) and "cannot be opened" in str(report)
    assert not np.isnan(report.probs).any() and len(learn.dls.bad_files) == len(rows)
    np.testing.assert_allclose(report.table["value"]["top1"], expected[1])
    assert [o.source for o in report.items] == list(valid.path.drop(index=rows))


@pytest.mark.parametrize("frozen", [0, -2])
def test_nothing_is_remembered_under_the_name_of_a_broken_image(table, frozen):
    cut(table.path[2])
    for _ in range(2):
        learn = learner(table, frozen)
        with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match="replaces it"): learn.fit(1, 1e-3)
        assert list(learn.dls.bad_files.path) == [str(table.path[2])]
    Image.new("RGB", (20, 20)).save(table.path[2])
    learn = learner(table, frozen)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert not len(learn.dls.bad_files)


def test_reports_show_a_placeholder_for_what_is_gone(table, tmp_path):
    learn = learner(table, 0)
    with learn.no_bar(), learn.no_logging(): report = learn.evaluate()
    for p in table.path: p.unlink()
    report.plot_errors()
    assert "<img" in report.to_html(tmp_path / "report.html").read_text() and report.save(tmp_path / "saved")


def test_folds_leave_them_out(table):
    for i in (3, 10): cut(table.path[i])
    def train(dls, seed):
        torch.manual_seed(seed)
        learn = vision_learner(dls, cnn(2, size=16, channels=(4,)), metrics=accuracy, precision="fp32", seed=seed)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn
    found = cross_validate(train, table.drop(columns="split"), k=2, say=lambda line: None, size=16, bs=4, num_workers=0,
                           augment=None)
    assert len(found.out_of_fold) == 22 and not {3,
                                                 10} & set(found.out_of_fold.index) and found.folds.images.sum() == 22
    assert not np.isnan(found.report.probs).any()
