"""Kinds of input that were wrong once: networks without a classifier or with it first, odd outputs, tables, names and
files."""

import os
import pickle
import types
from multiprocessing.reduction import ForkingPickler

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ShowGraphCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, get_image_files, parent_label
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage, PILImageBW
from fastai.vision.data import ImageBlock
from fastai.vision.learner import _resnet_split
from fasttransform import Transform
from matplotlib.text import Text
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import models

from ftlib import Learner, backbone, cnn, compare, create_network, image_data, load_learner, vision_learner
from ftlib.errors import ArchError, DamagedError, DataError, TrainError, WeightsError
from ftlib.models.arch import executed_last
from ftlib.system.files import cache_folder


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
    with pytest.raises(TrainError, match="batch of one image"): learn.lr_find(num_it=60, show_plot=False)


# ---- what a network is built for

class Channels(Transform):
    "Other channels, as of a satellite: the first ones again, up to `n`"
    order = 60
    def __init__(self, n): self.n = n
    def encodes(self, x: TensorImage): return TensorImage(x[:, [i % x.shape[1] for i in range(self.n)]])


def bands(folder, n, first=PILImage):
    "fastai's loaders of images of `n` channels"
    files(folder, n=8)
    block = DataBlock((ImageBlock(first), CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=IndexSplitter(list(range(4))), item_tfms=Resize(32), batch_tfms=Channels(n))
    return block.dataloaders(folder, bs=4, num_workers=0, device=torch.device("cpu"))


@pytest.mark.parametrize("pretrained", [True, False], ids=["pretrained", "new"])
@pytest.mark.parametrize("n", [2, 4, 7])
def test_images_of_other_channels_name_n_in_and_leave_the_loaders(tmp_path, n, pretrained):
    dls = bands(tmp_path, n)
    kw = dict(weights=create_network("resnet18", 2, weights=None) if pretrained else None, precision="fp32")
    transforms, state = list(dls.train.after_batch.fs), dls.train.rng.getstate()
    with pytest.raises(ArchError, match=f"{n} channels, and the network takes 3: pass n_in={n}"):
        vision_learner(dls, "resnet18", **kw)
    assert list(dls.train.after_batch.fs) == transforms and dls.train.rng.getstate() == state
    learn = vision_learner(dls, "resnet18", n_in=n, **kw)  # the same loaders
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.history.valid_loss.notna().all()


def test_grey_images_are_repeated_and_one_channel_after_that_is_refused(tmp_path):
    dls = bands(tmp_path, 1, PILImageBW)
    vision_learner(dls, "resnet18", weights=create_network("resnet18", 2, weights=None)).validate()
    with pytest.raises(ArchError, match="3 channels.*takes 1.*make the loaders anew"):
        vision_learner(dls, "resnet18", n_in=1, weights=None)
    with pytest.raises(ArchError, match="pass n_in=1"):  # nothing is normalised, so nothing repeats the channel
        vision_learner(bands(tmp_path, 1, PILImageBW), "resnet18", weights=None, normalize=False)


def test_a_transform_that_fails_fails_in_the_fit(tmp_path):
    class Fails(Channels):
        def encodes(self, x: TensorImage): raise ZeroDivisionError("mine")
    dls = data(tmp_path, augment=[Fails(3)])
    learn = vision_learner(dls, "resnet18", weights=None)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ZeroDivisionError, match="mine"): learn.fit(1, 1e-3)


def small_vit(image_size=64): return models.VisionTransformer(image_size, 8, 1, 2, 16, 16)


def test_a_network_for_another_size_names_the_arguments_of_its_builder():
    with pytest.raises(ArchError, match="It was built for 64×64 images.*pass image_size=32"):
        create_network(small_vit, 2, weights=None, input_size=32)
    net = create_network(small_vit, 2, weights=None, input_size=32, image_size=32)
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("arch, size", [
    ("timm/test_vit3", 96), ("timm/deit_tiny_distilled_patch16_224", 64), ("timm/swin_tiny_patch4_window7_224", 64),
    ("timm/eva02_tiny_patch14_224", 112), ("vit_b_32", 64)])
def test_a_network_with_positions_is_built_for_the_size_of_the_images(tmp_path, capsys, arch, size):
    "Without weights, with a state dict, a file whose names have a prefix, and another network"
    x = torch.rand(2, 3, size, size)
    bare = create_network(arch, 2, weights=None, input_size=size)
    assert bare.input_size == size and bare.eval()(x).shape == (2, 2) and not capsys.readouterr().out
    own = create_network(arch, 2, weights=None)
    state = {k: v for stage in own.stages for k, v in stage.state_dict().items()}
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "weights.pth")
    found = [create_network(arch, 2, weights=w, input_size=size).body.eval()
             for w in (state, tmp_path / "weights.pth", own)]
    assert "interpolated" in capsys.readouterr().out
    with torch.no_grad(): outs = [body(x) for body in found]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    same = {k: v for k, v in found[0].state_dict().items() if k.split(".", 1)[-1] in state}
    assert sum(torch.equal(v, state[k.split(".", 1)[-1]]) for k, v in same.items() if v.shape
               == state[k.split(".", 1)[-1]].shape) > 20  # all but the positions are as they were


def test_weights_of_another_architecture_are_refused_at_any_size():
    state = timm.create_model("test_vit").state_dict()
    for lacking in ("blocks", "pos_embed"):
        with pytest.raises(WeightsError, match="missing"):
            create_network("timm/test_vit", 2, weights={k: v for k, v in state.items() if lacking not in k},
                           input_size=64)
    net = create_network("timm/test_vit", 2, weights=state, input_size=64, dynamic_img_size=True)
    assert net.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 2)


def third_of_children(m): return [list(c.parameters()) for c in list(m[0].children())[:2]] + [list(m[1].parameters())]


SPLITTERS = {"a part that is not there": lambda m: [list(m[0][0][:3].parameters()), list(m[1].parameters())],
             "an index too high": lambda m: [list(m[0][9].parameters()), list(m[1].parameters())],
             "a name of another network": lambda m: [list(m[0].layer1.parameters()), list(m[1].parameters())],
             "fastai's of resnets": _resnet_split, "children by number": third_of_children}


@pytest.mark.parametrize("name", SPLITTERS)
def test_a_splitter_for_another_body_is_refused_with_the_parts_of_this_one(tmp_path, name):
    with pytest.raises(TrainError, match="normalize, stem, stage1"):
        vision_learner(data(tmp_path), "resnet18", weights=create_network("resnet18", 2, weights=None),
                       splitter=SPLITTERS[name])


def test_a_splitter_of_the_users_own_network_raises_its_own_error(tmp_path):
    learn = Learner(data(tmp_path), nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), splitter=lambda m: m[9])
    with pytest.raises(IndexError): learn.create_opt()
    ours = vision_learner(data(tmp_path), "resnet18", weights=create_network("resnet18", 2, weights=None),
                          splitter=lambda m: [list(m[0][:3].parameters()), list(m[0][3:].parameters()),
                                              list(m[1].parameters())])
    assert len(ours.opt.param_lists) == 3 and sum(map(len, ours.opt.param_lists)) == len(list(ours.model.parameters()))


def test_a_small_network_of_torchs_loaders_needs_its_size():
    loader = torch.utils.data.DataLoader([(torch.rand(3, 8, 8), 0)] * 4, 2)
    with pytest.raises(ArchError, match="size=..., n_in=..."): cnn(DataLoaders(loader, loader))


# ---- names that are drawn

DRAWN = ["US$ to CA$", "$x_1$", "$10 ^$", "_left out", "a % b", "{c}", r"\frac"]


def texts(): return [t.get_text() for fig in map(plt.figure, plt.get_fignums()) for t in fig.findobj(Text)]


def drawn_plainly():
    "Every figure can be drawn, and none of our names is a formula"
    for fig in map(plt.figure, plt.get_fignums()):
        fig.canvas.draw()
        assert not [t for t in fig.findobj(Text) if any(n in t.get_text() for n in DRAWN) and t.get_parse_math()]


@pytest.mark.parametrize("draw", ["show_batch", "show_results", "given axes"])
def test_names_of_classes_are_drawn_as_they_are(draw):
    plt.close("all")
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 255, (28, 16, 16, 3)).astype("uint8"))
    dls = image_data({"image": images, "label": DRAWN * 4}, size=16, bs=14, num_workers=0, augment=None)
    learn = vision_learner(dls, cnn(dls, channels=(4,)), precision="fp32")
    others, _ = plt.subplots()
    others.axes[0].set_title("$x^2$")  # a formula of the user's own
    if draw == "show_batch": dls.show_batch(max_n=14)
    elif draw == "show_results": learn.show_results(max_n=14)
    else: dls.show_batch(max_n=4, ctxs=list(plt.subplots(2, 2)[1].flat))
    found = texts()
    assert sum(any(n in t for n in DRAWN) for t in found) >= 4
    drawn_plainly()
    assert others.axes[0].title.get_parse_math() and (draw == "given axes" or plt.gcf() is not others)
    plt.close("all")


def test_names_of_runs_and_metrics_are_all_in_the_legend(tmp_path):
    plt.close("all")
    dls = data(tmp_path, bs=4)
    def share(out, y): return (out.argmax(1) == y).float().mean()
    metrics = [types.FunctionType(share.__code__, {}, n) for n in DRAWN]
    def way(seed):
        learn = vision_learner(dls, cnn(dls, channels=(4,)), precision="fp32", metrics=metrics)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn
    found = compare({n: way for n in DRAWN[:4]}, 1, say=lambda line: None)
    for plot in (found.plot, found.plot_curves, lambda: found.plot_curves(DRAWN[0])):
        legend = plot().get_legend()
        assert sorted(t.get_text() for t in legend.get_texts()) == sorted(DRAWN[:4])
    history = way(0).plot_history()
    assert [t.get_text() for t in history.axes[1].get_legend().get_texts()] == DRAWN
    drawn_plainly()
    plt.close("all")


def test_the_cache_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("~/kept", "~"):
        monkeypatch.setenv("FTLIB_CACHE", given)
        assert cache_folder() == tmp_path / given[2:]
    monkeypatch.setenv("FTLIB_CACHE", "a~b")
    assert str(cache_folder()) == "a~b"


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "decoded"])
def test_loaders_can_be_sent_to_spawned_workers(tmp_path, cache):
    "What is pickled for a worker that is spawned gives the same images there, before a fit and after it"
    dls = data(tmp_path, cache=cache, augment="light")
    learn = vision_learner(dls, cnn(dls, channels=(4,)), precision="fp32")
    for _ in range(2):
        for dl in dls.loaders:
            sent = pickle.loads(ForkingPickler.dumps(dl.fake_l)).d
            assert torch.equal(sent.do_item(1)[0], dl.do_item(1)[0]) and len(sent) == len(dl)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)


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
    for p, q in zip(learn.model.body.parameters(), other.model.body.parameters()): assert torch.equal(p.cpu(), q.cpu())


def test_an_exported_learner_as_weights_is_explained(tmp_path):
    (tmp_path / "whole.pkl").write_bytes(pickle.dumps(DataLoaders))
    with pytest.raises(WeightsError, match="load_learner"): backbone("resnet18", tmp_path / "whole.pkl")


# ---- loaders of torch, weights of a loader, and plots while it trains

def test_all_that_a_learner_does_with_loaders_of_torch():
    "What needs the images by name says so"
    x, y = torch.rand(24, 3, 16, 16), torch.arange(24) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)
    learn = Learner(DataLoaders(loader, loader), cnn(2, (4,), size=16, n_in=3), loss_func=nn.CrossEntropyLoss(),
                    metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        learn.lr_find(num_it=10, show_plot=False)
        outputs, targets = learn.get_preds()
        loss, share = learn.validate()
    with torch.no_grad(): wanted = learn.model.eval()(x)
    assert torch.allclose(outputs, wanted, atol=1e-4) and torch.equal(targets, y)
    right = int((wanted.argmax(1) == y).sum())
    assert round(share * 24) == right == round(learn.evaluate().table.value["top1"] * 24)
    for call in (learn.summary, learn.export):
        with pytest.raises(TrainError, match="needs loaders of fastai"): call()


@pytest.mark.parametrize("frozen", [True, False], ids=["features", "images"])
def test_images_are_drawn_by_the_weights_of_a_loader(tmp_path, frozen):
    "fastai's weighted_dataloaders, where the head trains on features too"
    for label, n in (("rare", 4), ("usual", 28)):
        (tmp_path / label).mkdir()
        for i in range(n): Image.new("RGB", (32, 32), (9 * i, 0, 40)).save(tmp_path / label / f"{i}.png")
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=IndexSplitter([0, 31]), item_tfms=Resize(32))
    weights = [12. if f.parent.name == "rare" else 1. for f in get_image_files(tmp_path)]
    dls = block.weighted_dataloaders(tmp_path, weights, bs=10, num_workers=0, device=torch.device("cpu"))
    seen = []

    class Count(Callback):
        uses_images = False
        def before_batch(self):
            if self.training: seen.extend(self.learn.yb[0].tolist())
    learn = vision_learner(dls, "test_resnet", weights=None, seed=0)
    if frozen: learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(16, 1e-4, cbs=Count())
    labels = [str(dls.vocab[c]) for c in dls.train_ds.tls[1]]
    wanted = 12 * labels.count("rare") / (12 * labels.count("rare") + labels.count("usual"))
    assert abs(seen.count(0) / len(seen) - wanted) < 4 * (wanted * (1 - wanted) / len(seen)) ** .5


def test_fastais_graph_of_the_losses_without_bars(tmp_path):
    dls = data(tmp_path)
    learn = Learner(dls, cnn(dls, (4,)), cbs=ShowGraphCallback())
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.fit(1, 1e-3)
    assert len(learn.history) == 2
    plain = Learner(dls, cnn(dls, (4,)))
    plain.remove_cb(plain.progress)
    plain.fit(1, 1e-3)
    assert len(plain.history) == 1
