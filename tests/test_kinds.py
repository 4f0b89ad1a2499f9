"""Kinds of input that were wrong once: networks without a classifier or with it first, odd outputs, tables, names and
files."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import models

from ftlib import Learner, backbone, cnn, image_data, load_learner, vision_learner
from ftlib.errors import ArchError, DamagedError, DataError, TrainError, WeightsError
from ftlib.models.arch import executed_last


def files(folder, classes="ab", n=6, side=16, name="{}.png"):
    rng = np.random.default_rng(0)
    for c in classes:
        (folder / c).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (side, side, 3)).astype("uint8")).save(folder / c / name.format(i))
    return folder


def data(folder, **kwargs):
    return image_data(files(folder), **dict(size=16, augment=None, num_workers=0, bs=4, valid=.34) | kwargs)


# ---- which layer is the classifier

class Mixed(nn.Module):
    "Layers are registered in an order of their own; the classifier is the one called `name`"
    def __init__(self, order, end="plain", classifier="linear"):
        super().__init__()
        parts = dict(zz=nn.Conv2d(3, 8, 3, 2, 1), norm=nn.BatchNorm2d(8), aa=nn.Conv2d(8, 8, 3, 2, 1),
                     scores=nn.Linear(8, 20) if classifier == "linear" else nn.Conv2d(8, 20, 1))
        for k in order: self.add_module(k, parts[k])
        self.end, self.classifier = end, classifier

    def forward(self, x):
        x = F.relu(self.aa(F.relu(self.norm(self.zz(x)))))
        x = self.scores(x.mean((2, 3))) if self.classifier == "linear" else self.scores(x).mean((2, 3))
        return dict(plain=x, softmax=x.softmax(1), log_softmax=x.log_softmax(1), sigmoid=x.sigmoid(),
                    relu=x.relu())[self.end]


@pytest.mark.parametrize("order", [["scores", "zz", "norm", "aa"], ["aa", "scores", "norm", "zz"],
                                   ["zz", "norm", "aa", "scores"], ["norm", "aa", "zz", "scores"]])
@pytest.mark.parametrize("end", ["plain", "softmax", "log_softmax", "sigmoid"])
@pytest.mark.parametrize("classifier", ["linear", "convolution"])
def test_the_layer_that_is_executed_last_is_the_classifier(order, end, classifier):
    net = Mixed(order, end, classifier)
    assert executed_last(net, "?") == "scores" and net.training
    body = backbone(net, None)
    assert body.width == 16 and not any(isinstance(m, nn.Linear) or getattr(m, "out_channels", 0) == 20
                                        for m in body.modules())


def test_features_after_an_activation_are_no_scores():
    assert executed_last(Mixed(["zz", "norm", "aa", "scores"], "relu"), "?") is None


def test_a_network_that_cannot_be_run_on_noise_keeps_the_order_of_registration():
    class Picky(nn.Sequential):
        def forward(self, x): raise RuntimeError("wants sound")
    assert executed_last(Picky(nn.Linear(3, 3)), "0") == "0"


@pytest.mark.parametrize("name, take_off", [("mobilenet_v3_small", "classifier"), ("shufflenet_v2_x0_5", "fc"),
                                            ("regnet_y_400mf", "fc"), ("mnasnet0_5", "classifier"),
                                            ("efficientnet_b0", "classifier")])
def test_nothing_is_removed_of_a_network_whose_classifier_was(name, take_off, capsys):
    full = getattr(models, name)(weights=None).eval()
    bare = getattr(models, name)(weights=None)
    bare.load_state_dict(full.state_dict())
    setattr(bare, take_off, nn.Identity())
    body, whole = backbone(bare, None, concat_pool=False).eval(), backbone(full, None, concat_pool=False).eval()
    assert "no classifier" in capsys.readouterr().out
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(body(x), bare.eval()(body.normalize(x)).flatten(1), atol=1e-4, rtol=1e-4)
    if name not in ("mobilenet_v3_small",):  # whose classifier has two layers, of which one belongs to the body
        assert sum(p.numel() for p in body.parameters()) == sum(p.numel() for p in whole.parameters())


class Odd(nn.Module):
    def __init__(self, wrap):
        super().__init__(); self.conv, self.fc, self.wrap = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 2), wrap
    def forward(self, x): return self.wrap(self.fc(self.conv(x).mean((2, 3))))


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x, "loss": None}, lambda x: (x, x), lambda x: [x]],
                         ids=["dictionary", "tuple", "list"])
def test_outputs_that_are_not_one_tensor_are_named(tmp_path, wrap):
    dls = data(tmp_path)
    with pytest.raises(ArchError, match="more than one tensor"): vision_learner(dls, Odd(wrap), weights=None)
    learn = Learner(dls, Odd(wrap))
    with learn.no_bar(), learn.no_logging(), pytest.raises(TrainError, match="needs one tensor of scores"):
        learn.fit(1, 1e-3)


def test_a_batch_of_one_image_is_named(tmp_path):
    learn = vision_learner(data(tmp_path, bs=1), cnn(2, size=16, channels=(4, 4)))
    learn.model.head.insert(0, nn.BatchNorm1d(learn.model.width)) if isinstance(learn.model.head,
        nn.Sequential) else None
    with learn.no_bar(), learn.no_logging(), pytest.raises(TrainError, match="batch of one image"): learn.fit(1, 1e-3)


# ---- names, tables, files

@pytest.mark.parametrize("raw", [b"caf\xe9", b"\xff\xfe", b"a\xe9\n"])
def test_file_names_that_are_not_utf8(tmp_path, raw):
    files(tmp_path / "set")
    for f in list((tmp_path / "set").rglob("*.png")):
        os.rename(os.fsencode(f), os.fsencode(f.parent) + b"/" + raw + os.fsencode(f.name))
    dls = image_data(tmp_path / "set", size=16, augment=None, num_workers=0, bs=4, valid=.34)
    learn = vision_learner(dls, cnn(dls, channels=(4,)), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, checkpoint=tmp_path / "checkpoints")
    report = learn.evaluate("train")
    report.to_html(tmp_path / "x.html")
    report.save(tmp_path / "report")
    assert (tmp_path / "x.html").stat().st_size > 1000


@pytest.mark.parametrize("frame", [lambda f: pd.DataFrame(dict(path=f,
label=pd.array([1, 2] * 5 + [None] * 2, dtype="Int64"))),
                                   lambda f: pd.DataFrame(dict(path=f,
                                   label=pd.array(["x", "y"] * 5 + [None] * 2, dtype="string"))),
                                   lambda f: pd.DataFrame(dict(path=f,
                                   label=pd.array([True, False] * 5 + [None] * 2, dtype="boolean")))],
                                   ids=["Int64", "string", "boolean"])
def test_missing_labels_of_any_type(tmp_path, frame):
    with pytest.raises(DataError, match="2 of 12 images have no label"):
        image_data(frame([str(p) for p in files(tmp_path).rglob("*.png")]), size=16)


@pytest.mark.parametrize("twice", ["path", "label", "note"])
def test_a_column_twice_is_named(tmp_path, twice):
    frame = pd.DataFrame(dict(path=[str(p) for p in files(tmp_path).rglob("*.png")], label="x", note=0))
    with pytest.raises(DataError, match=f"column '{twice}' twice"):
        image_data(pd.concat([frame, frame[[twice]]], axis=1), size=16)


def test_a_folder_with_the_name_of_a_table(tmp_path):
    assert len(image_data(files(tmp_path / "pets.CSV"), size=16, valid=.34).train_ds) == 8


@pytest.mark.parametrize("given, meant", [("valid_pct", "valid"), ("batch_size", "bs"), ("image_size", "size"),
                                          ("item_tfms", "augment"), ("num_worker", "num_workers"), ("sise", "size"),
                                          ("directory", "source")])
def test_arguments_by_other_names(given, meant):
    with pytest.raises(TypeError, match=f"{given}=: it is called {meant}= here"):
        image_data("/nonexistent", **{given: 1})


def test_a_size_of_two_numbers():
    with pytest.raises(DataError, match=r"square here; give one number, as size=320"):
        image_data("/nonexistent", size=(240, 320))


@pytest.mark.parametrize("share", [0., .01, .5, .99])
def test_cut_files_are_named(tmp_path, share):
    learn = vision_learner(data(tmp_path / "set"), cnn(2, size=16, channels=(4,)), path=tmp_path)
    learn.export("whole.pkl")
    saved = learn.save("saved")
    weights = [p.clone() for p in learn.model.parameters()]
    for path in (tmp_path / "whole.pkl", saved):
        whole = path.read_bytes()
        path.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(DamagedError, match="whole.pkl"): load_learner(tmp_path / "whole.pkl")
    with pytest.raises(DamagedError, match="saved.pth"): learn.load("saved")
    with pytest.raises(WeightsError, match="saved.pth"): vision_learner(learn.dls, "resnet18", weights=saved)
    assert all(torch.equal(p, q) for p, q in zip(weights, learn.model.parameters()))


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {0: torch.ones(3)}, {"model": [torch.ones(2)]}, {}, "text"],
                         ids=lambda o: type(o).__name__)
def test_files_without_a_state_dict_are_named(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="odd.pth"): backbone("resnet18", tmp_path / "odd.pth")


@pytest.mark.parametrize("fit", ["fit", "fit_one_cycle", "lr_find"])
def test_weights_that_save_wrote_are_weights_of_another_learner(tmp_path, fit):
    "With the optimizer, whose rates are plain numbers, after any fit"
    dls = data(tmp_path / "set")
    learn = vision_learner(dls, "resnet18", weights=None, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        if fit == "lr_find": learn.lr_find(num_it=3, show_plot=False)
        else: getattr(learn, fit)(1, slice(1e-5, 1e-3))
    other = vision_learner(dls, "resnet18", weights=learn.save("saved"))
    for p, q in zip(learn.model.body.parameters(), other.model.body.parameters()): assert torch.equal(p, q)


def test_an_exported_learner_as_weights_is_explained(tmp_path):
    (tmp_path / "whole.pkl").write_bytes(pickle.dumps(DataLoaders))
    with pytest.raises(WeightsError, match="load_learner"): backbone("resnet18", tmp_path / "whole.pkl")
