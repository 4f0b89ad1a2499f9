"""Norms and biases alone, LoRA adapters, and files with only what was trained."""

import copy
import os
import sys

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torchvision.models import VisionTransformer

from ftlib import (CheckpointError, DeployError, Distill, EarlyStopping, SaveModelCallback, TrainError, WeightsError,
                   cnn, image_data, load_bundle, load_checkpoint, load_learner, vision_learner)
from ftlib.cache.features import NORMS_TRAIN, why_not_cached
from ftlib.models.network import is_norm
from ftlib.train import lora
from ftlib.train.learner import Learner

SMALL_VIT = dict(embed_dim=32, depth=2, num_heads=2)


class Killed(BaseException):
    "Nothing catches it"


class Dies(Callback):
    "At one step of one epoch, or does not"
    order = 99
    def __init__(self, at=None, error=Killed): self.moment, self.error = at, error
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def after_batch(self):
        if self.learn.training and (self.learn.epoch, self.learn.iter) == self.moment: raise self.error


def torchvision_vit():
    net = VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    net.heads = nn.Linear(32, 9)
    return net


@pytest.fixture(scope="module")
def dls(stripes): return image_data(stripes, size=32, bs=8, valid=.25, seed=0, num_workers=0)


@pytest.fixture
def make(dls, tmp_path):
    def made(arch="vit_tiny_patch16_224", **kwargs):
        more = SMALL_VIT if arch == "vit_tiny_patch16_224" else {}
        given = dict(weights=None, metrics=accuracy, seed=0, precision="fp32", path=tmp_path) | more | kwargs
        return vision_learner(dls, arch, **given)
    return made


def fit(learn, n=1, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, **kwargs)
    return learn


def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(v.equal(b[k]) for k, v in a.items())


def state(learn):
    "All that a refused call must leave"
    net = learn.model
    return (weights(learn), [type(m) for m in net.modules()], [p.requires_grad for p in net.parameters()],
            [m.training for m in net.modules()], learn.opt, vars(net).get("adapters"), learn.trained_names)


def assert_same_state(a, b):
    assert same(a[0], b[0]) and a[1:4] == b[1:4] and a[4] is b[4] and a[5:] == b[5:]


def outputs(learn):
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return copy.deepcopy(learn.model).eval()(x)


# ---- norms and biases

@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224", "test_convnext"])
def test_norms_and_biases_and_head_train_and_nothing_else(make, arch):
    learn = make(arch)
    net = learn.model
    learn.freeze("norms")
    norms = {id(p) for m in net.body.modules() if is_norm(m) for p in m.parameters()}
    wanted = {n for n, p in net.named_parameters() if n.startswith("1.") or id(p) in norms or n.endswith("bias")}
    assert {n for n, p in net.named_parameters() if p.requires_grad} == wanted
    assert learn.trains_from == "norms" and why_not_cached(learn) == NORMS_TRAIN
    before = weights(learn)
    fit(learn)
    moved = {n for n, p in net.named_parameters() if not p.equal(before[n])}
    assert moved <= wanted and {n for n in wanted if n.startswith("0.")} & moved
    learn.freeze()
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {n for n in before if n.startswith("1.")
                                                                         and n in dict(net.named_parameters())}
    assert why_not_cached(learn) == "" and learn.trains_from == len(net.groups()) - 1
    learn.unfreeze()
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("bn", ["still", "moving"])
def test_statistics_follow_bn(make, bn):
    learn = make("resnet18", bn=bn)
    learn.freeze("norms")
    before = weights(learn)
    fit(learn)
    moved = {k for k, v in weights(learn).items() if k.startswith("0.") and "running" in k and not v.equal(before[k])}
    assert bool(moved) == (bn == "moving")


def test_an_own_splitter_and_train_bn(make):
    learn = make("resnet18", splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], train_bn=True)
    learn.freeze("norms")
    conv = [p for n, p in learn.model.body.named_parameters() if p.ndim == 4]
    assert not any(p.requires_grad for p in conv)
    learn.unfreeze()
    assert all(p.requires_grad for p in conv)


def test_the_line_tells_the_share(make, capsys):
    learn = make("resnet18")
    learn.freeze("norms")
    n = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    assert f"{n:,} of " in capsys.readouterr().out


def test_fine_tune_with_norms(make):
    learn = make("resnet18")
    with learn.no_bar(): learn.fine_tune(1, freeze_epochs=1, freeze_to="norms")
    assert learn.fine_tuning.freeze_to.iloc[-1] == "norms" and learn.trains_from == 0
    assert any("running" not in n and n.startswith("0.") for n in learn.trained_names)
    assert not any(n.startswith("0.stem.conv1") for n in learn.trained_names)


def test_a_sweep_leaves_it(make):
    learn = make("resnet18")
    learn.freeze("norms")
    before = state(learn)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
    assert_same_state(before, state(learn))


def test_norms_killed_and_resumed(make, tmp_path):
    def run(place, at=None, resume=False):
        set_seed(0)
        learn = make("resnet18")
        learn.freeze("norms")
        return weights(fit(learn, 2, cbs=Dies(at), checkpoint=tmp_path / place, resume=resume))
    whole = run("whole")
    with pytest.raises(Killed): run("cut", (1, 1))
    assert same(run("cut", resume=True), whole)
    learn = make("resnet18")
    learn.unfreeze()
    with pytest.raises(CheckpointError, match="frozen groups norms"):
        fit(learn, 2, cbs=Dies(), checkpoint=tmp_path / "cut", resume=True)
    learn = load_checkpoint(make("resnet18"), tmp_path / "whole")
    assert learn.trains_from == "norms" and same(weights(learn), whole)


@pytest.mark.parametrize("what", ["biases", 3, "stage1", True])
def test_freeze_takes_nothing_else(make, what):
    learn = make("resnet18")
    learn.create_opt()
    before = state(learn)
    with pytest.raises(TrainError, match="give 'norms'"): learn.freeze(what)
    assert_same_state(before, state(learn))


def test_no_norms_no_network(dls, make):
    plain = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), nn.CrossEntropyLoss())
    with pytest.raises(TrainError, match="body and a head"): plain.freeze("norms")
    learn = Learner(dls, cnn(2, channels=(8, 8)), nn.CrossEntropyLoss())
    for name, m in [*learn.model.body.named_modules()]:
        if is_norm(m): lora._replace(learn.model.body, name, nn.Identity())
    with pytest.raises(TrainError, match="no normalization layer"): learn.freeze("norms")
    assert all(p.requires_grad for p in learn.model.parameters())
    learn = make()
    learn.add_lora(r=2)
    with pytest.raises(TrainError, match="merge_lora"): learn.freeze("norms")
    with pytest.raises(TrainError, match="no such parameter group.*'norms'"): learn.freeze_to("norm")


# ---- LoRA

ARCHS = pytest.mark.parametrize("arch,layers", [("vit_tiny_patch16_224", 8), (torchvision_vit, 6)],
                                ids=["timm", "torchvision"])


@ARCHS
def test_adapters_train_and_merge(make, arch, layers, capsys):
    learn = make(arch)
    names, classes, first = [*learn.model.state_dict()], [type(m) for m in learn.model.modules()], outputs(learn)
    assert learn.add_lora(r=2, alpha=4) is learn
    said = capsys.readouterr().out
    n = sum(p.numel() for p in learn.model.parameters() if p.requires_grad)
    assert f"(r=2) in {layers} layers" in said and f"{n:,} of " in said and outputs(learn).equal(first)
    body = {n: p for n, p in learn.model.body.named_parameters() if "lora_" not in n}
    before, ids = {n: p.detach().clone() for n, p in body.items()}, {n: id(p) for n, p in body.items()}
    fit(learn, 2)
    after = dict(learn.model.body.named_parameters())
    assert all(after[n].equal(v) and id(after[n]) == ids[n] for n, v in before.items()), "the body is frozen bit by bit"
    assert all(p.abs().sum() > 0 for n, p in after.items() if "lora_B" in n), "every adapter learns"
    given, trained = learn.get_preds()[0], outputs(learn)
    assert not torch.allclose(trained, first)
    learn.merge_lora()
    assert [*learn.model.state_dict()] == names and [type(m) for m in learn.model.modules()] == classes
    assert torch.allclose(learn.get_preds()[0], given, atol=1e-5) and torch.allclose(outputs(learn), trained, atol=1e-5)
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.model.adapters is None
    fit(learn)


@ARCHS
def test_freezing_with_adapters(make, arch, layers):
    learn = make(arch)
    learn.add_lora(r=2)
    learn.freeze()
    assert why_not_cached(learn) == "" and learn.groups_table().trainable.gt(0).sum() == 1
    fit(learn)
    assert learn.history.cached.iloc[-1] == len(learn.model.stages), "the head trains on cached features"
    learn.unfreeze()
    last = learn.groups_table().query("trainable > 0").index[-2]
    learn.freeze_to(last)
    assert learn.groups_table().query("trainable > 0").index.tolist() == [last, "head"]
    learn.unfreeze()
    trains = {n for n, p in learn.model.body.named_parameters() if p.requires_grad}
    assert trains and all("lora_" in n for n in trains)


def test_the_adapter_of_attention_is_a_change_of_its_weights():
    torch.manual_seed(0)
    plain, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    adapted = lora.AttentionLora(copy.deepcopy(plain), 2, 3.)
    for p in adapted.lora_B.values(): nn.init.normal_(p)
    with torch.no_grad():
        plain.in_proj_weight += 1.5 * adapted.lora_B["in_proj"] @ adapted.lora_A["in_proj"]
        plain.out_proj.weight += 1.5 * adapted.lora_B["out_proj"] @ adapted.lora_A["out_proj"]
    for training in (True, False):
        for m in (plain, adapted): m.train(training)
        assert torch.allclose(plain(x, x, x)[0], adapted(x, x, x)[0], atol=1e-6)
        with torch.no_grad(): assert torch.allclose(plain(x, x, x, need_weights=False)[0],
                                                    adapted(x, x, x, need_weights=False)[0], atol=1e-6)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", torchvision_vit], ids=["timm", "torchvision"])
def test_adapters_killed_and_resumed(make, arch, tmp_path):
    def run(place, at=None, resume=False):
        set_seed(0)
        learn = make(arch)
        learn.add_lora(r=2)
        return fit(learn, 2, cbs=[Dies(at), SaveModelCallback()], checkpoint=tmp_path / place, resume=resume)
    whole = run("whole")
    with pytest.raises(Killed): run("cut", (1, 1))
    again = run("cut", resume=True)
    assert same(weights(again), weights(whole)) and again.trained_names == whole.trained_names
    fresh = make(arch)
    with pytest.raises(CheckpointError, match="another network"): load_checkpoint(fresh, tmp_path / "cut")
    fresh.add_lora(r=2)
    assert same(weights(load_checkpoint(fresh, tmp_path / "cut")), weights(whole))
    learn = make(arch)
    learn.add_lora(r=3)
    with pytest.raises(CheckpointError, match="settings differ"):
        fit(learn, 2, cbs=[Dies(), SaveModelCallback()], checkpoint=tmp_path / "cut", resume=True)


def test_what_else_works_with_adapters(make, tmp_path):
    learn = make()
    learn.add_lora(r=2)
    with learn.no_bar(), learn.no_logging():
        before = state(learn)
        learn.lr_find(num_it=12, show_plot=False)
        assert_same_state(before, state(learn))
        learn.fine_tune(2, freeze_epochs=1)
        assert learn.fine_tuning.adapters.iloc[-1] and learn.sweeps, "the learning rate comes from a sweep"
        learn.restore_best()
        learn.validate()
        learn.evaluate()
        copy.deepcopy(learn)
        learn.save("all")
        saved = weights(learn)
        fit(learn, 2, cbs=[EarlyStopping("accuracy", patience=1, cooldown=0), Distill(make("resnet18"), T=2.)])
        learn.load("all")
        assert same(weights(learn), saved)
        with pytest.raises(RuntimeError): fit(learn, cbs=Dies((0, 1), RuntimeError))
        learn.export()
        again = load_learner(tmp_path / "export.pkl")
        item = learn.dls.valid_ds.items[0]
        assert torch.allclose(again.predict(item)[2], learn.predict(item)[2], atol=1e-6)


def test_a_stop_in_training_keeps_the_adapters(make):
    learn = make()
    learn.add_lora(r=2)
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Dies((1, 1), KeyboardInterrupt))
    assert learn.model.adapters and fit(learn) and learn.merge_lora()


def test_bundle_and_onnx_want_merged_weights(make, tmp_path):
    learn = make("test_vit")
    learn.add_lora(r=2)
    fit(learn, 2)
    for write, name in ((learn.bundle, "a.ftl"), (learn.export_onnx, "a.onnx"), (learn.export_openvino, "a.xml")):
        with pytest.raises(DeployError, match="merge_lora"): write(tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(DeployError, match="merge_lora"): learn.refit()
    with pytest.raises(DeployError, match="merge_lora"): learn.add_classes(learn.dls)
    learn.merge_lora()
    item = learn.dls.valid_ds.items[0]
    loaded = load_bundle(learn.bundle(tmp_path / "a.ftl"))
    assert loaded.predict(item.source)[0] == str(learn.predict(item)[0])
    learn.export_onnx(tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").exists()


def test_refit_does_not_repeat_adapters(make):
    learn = make()
    learn.add_lora(r=2)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1)
    learn.fine_tuning["kept"] = True
    learn.merge_lora()
    with pytest.raises(DeployError, match="adapters"): learn.refit()


def test_the_seed_makes_the_same_adapters(make):
    def adapters():
        learn = make()
        learn.add_lora(r=2)
        return weights(learn)
    before = torch.get_rng_state()
    first = adapters()
    torch.rand(3)
    assert same(first, adapters())
    assert before.ndim  # the global state is the user's


@pytest.mark.parametrize("bad", [dict(r=0), dict(r=-1), dict(r=True), dict(r=2.5), dict(r="8"), dict(r=float("nan")),
                                 dict(alpha=0), dict(alpha=-1.), dict(alpha=True), dict(alpha=float("nan")),
                                 dict(alpha="16"), dict(dropout=1.), dict(dropout=-.1), dict(dropout=True),
                                 dict(dropout=float("nan")), dict(dropout="0"), dict(targets=[]), dict(targets=3),
                                 dict(targets=["qkvs"]), dict(targets=["qkv", 3]), dict(targets="patch_embed.proj")])
def test_bad_settings(make, bad):
    learn = make()
    learn.create_opt()
    before = state(learn)
    with pytest.raises(TrainError, match=next(iter(bad))): learn.add_lora(**bad)
    assert_same_state(before, state(learn))


def test_bad_moments(make, dls, monkeypatch):
    learn = make()
    with pytest.raises(TrainError, match="no LoRA adapters"): learn.merge_lora()
    learn.add_lora(r=2)
    before = state(learn)
    with pytest.raises(TrainError, match="already"): learn.add_lora(r=2)
    assert_same_state(before, state(learn))
    learn.merge_lora()
    with pytest.raises(TrainError, match="no LoRA adapters"): learn.merge_lora()
    learn.add_lora(r=2)  # new adapters on the merged weights
    with pytest.raises(TrainError, match="freeze..norms"): make("resnet18").add_lora()
    plain = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), nn.CrossEntropyLoss())
    with pytest.raises(TrainError, match="body and a head"): plain.add_lora()
    with pytest.raises(TrainError, match="dropout"): make(torchvision_vit).add_lora(dropout=.1)
    make(torchvision_vit).add_lora(dropout=.1, targets=["mlp.0", "mlp.3"])
    monkeypatch.setitem(sys.modules, "peft", None)
    fresh = make()
    before = state(fresh)
    with pytest.raises(TrainError, match=r"pip install 'ftlib\[lora\]'"): fresh.add_lora()
    assert_same_state(before, state(fresh))


class Block(nn.Module):
    "One layer in two places, one that is read without a call, and one that is free"
    def __init__(self):
        super().__init__()
        self.twice, self.read, self.free = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.twice

    def forward(self, x): return self.free(nn.functional.linear(self.again(self.twice(x).relu()), self.read.weight))


class Shared(nn.Module):
    "A classifier with such a block"
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.classifier = nn.Conv2d(3, 8, 16, 16), Block(), nn.Linear(8, 9)

    def forward(self, x): return self.classifier(self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def test_layers_without_effect_get_no_adapter(make, capsys):
    learn = make(Shared)
    learn.add_lora(r=2)
    kinds = {n.split(".")[-4] for n, _ in learn.model.body.named_parameters() if "lora_B" in n}
    assert kinds == {"free"} and "Not adapted" in capsys.readouterr().out
    for name in ("twice", "read"):
        with pytest.raises(TrainError, match="no effect"): make(Shared).add_lora(targets=name)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["create_opt", "unfreeze", "freeze_to"])
def test_an_error_on_the_way_changes_nothing(make, monkeypatch, error, at):
    learn = make()
    fit(learn)
    def fails(*args): raise error("here")
    before = state(learn)
    with monkeypatch.context() as patched:
        patched.setattr(type(learn), at, fails)
        with pytest.raises(error, match="here"): learn.add_lora(r=2)
    assert_same_state(before, state(learn))
    learn.add_lora(r=2)
    fit(learn)
    before = state(learn)
    if at == "unfreeze": return
    with monkeypatch.context() as patched:
        patched.setattr(type(learn), at, fails)
        with pytest.raises(error, match="here"): learn.merge_lora()
    assert_same_state(before, state(learn))
    assert learn.model.body.get_submodule("stage1") is not None and fit(learn)


def test_adapters_that_are_not_finite_are_not_merged(make):
    learn = make()
    learn.add_lora(r=2)
    with torch.no_grad(): next(p for n, p in learn.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    before = state(learn)
    with pytest.raises(TrainError, match="NaN"): learn.merge_lora()
    assert before[1] == state(learn)[1] and learn.model.adapters


# ---- files of what was trained

def ways(learn, way):
    if way == "norms": learn.freeze("norms")
    elif way == "lora": learn.add_lora(r=2)
    elif way == "head": learn.freeze()
    return learn


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("way", ["head", "norms", "lora", "all"])
def test_only_what_was_trained_is_written(make, arch, way):
    if (arch, way) == ("resnet18", "lora"): pytest.skip("LoRA is for transformers")
    learn = fit(ways(make(arch), way))
    small, whole = learn.save_trained("some").stat().st_size, learn.save("all", with_opt=False).stat().st_size
    assert small < whole / 2 if way != "all" else small > whole / 2
    other = make(arch)
    if way == "lora":
        with pytest.raises(WeightsError, match=r"add_lora\(r=2, alpha=2.0"): other.load_trained("some")
        other.add_lora(r=2)
    other.load_trained("some")
    assert same(weights(other), weights(learn)) and other.trained_names == learn.trained_names
    other.save_trained("again")


def test_another_base_is_refused(make, tmp_path):
    learn = fit(ways(make(), "norms"))
    learn.save_trained("some")
    for other in (make(seed=1), make("resnet18"), make(embed_dim=16)):
        before = state(other)
        with pytest.raises(WeightsError, match="other base weights|another network"): other.load_trained("some")
        assert_same_state(before, state(other))
    with pytest.raises(FileNotFoundError): learn.load_trained("none")
    torch.save({}, tmp_path / "models" / "pickle.safetensors")
    with pytest.raises(ValueError, match="damaged"): learn.load_trained("pickle")
    with pytest.raises(WeightsError, match="no fit has trained"): make().save_trained("x")


def test_what_a_fit_before_add_lora_has_trained_stays_known(make):
    learn = make()
    learn.freeze_to(-2)
    fit(learn)
    trained = learn.trained_names
    learn.add_lora(r=2, targets="qkv")
    fit(learn)
    learn.merge_lora()
    qkv = {n for n, _ in learn.model.named_parameters() if n.endswith("qkv.weight")}
    assert learn.trained_names == trained | qkv
    learn.save_trained("some")
    assert same(weights(make().load_trained("some")), weights(learn))


def test_photographs(tmp_path):
    "On real images: LoRA and norms lower the training loss below that of the head alone at the start"
    folder = os.path.join(os.environ.get("SHARED", ""), "data", "ants_bees")
    if not os.path.isdir(folder): pytest.skip("no photographs here: $SHARED/data/ants_bees")
    dls = image_data(folder, size=32, bs=32, seed=0, num_workers=0)
    losses = {}
    for way in ("head", "norms", "lora"):
        learn = vision_learner(dls, "test_vit", weights=None, seed=0, precision="fp32", path=tmp_path)
        losses[way] = float(fit(ways(learn, way), 3, 1e-2).recorder.losses[-1])
        assert np.isfinite(losses[way])
    assert min(losses["norms"], losses["lora"]) < losses["head"], losses
