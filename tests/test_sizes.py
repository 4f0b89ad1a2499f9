"""Images of several sizes: loaders of another size, fits that begin with small images, and bodies for any size."""

import json
import shutil

import pandas as pd
import pytest
import timm
import torch
import torchvision
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from fastai.vision.all import ImageDataLoaders, Resize, accuracy
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ftlib import Checkpoint, create_network, image_data, load_bundle, vision_learner
from ftlib.errors import ArchError, CheckpointError, DataError, TrainError, WeightsError
from ftlib.models.arch import find_arch, hub_id
from ftlib.models.backbone import is_on_this_machine
from ftlib.models.image_size import size_arguments
from ftlib.persist.transaction import optimizer_state
from ftlib.system.interrupt import TrainingStopped


def data(stripes, **kwargs): return image_data(stripes, **dict(size=32, bs=8, num_workers=0, seed=0) | kwargs)


def learner(stripes, arch="timm/test_resnet", dls=None, **kwargs):
    return vision_learner(dls or data(stripes), arch, **dict(weights=None, metrics=accuracy, seed=0) | kwargs)


def quiet(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, method)(*args, **kwargs)


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- loaders of another size

def test_resized_loaders_have_the_same_images_and_settings(stripes):
    dls = data(stripes, test=.2, balance="sampler", augment="strong")
    small = dls.resized(16)
    assert small.train.one_batch()[0].shape == (8, 3, 16, 16) and small.valid.one_batch()[0].shape[-1] == 16
    for a, b in zip(small.loaders, dls.loaders, strict=True):
        assert list(a.dataset.tls[0].items) == list(b.dataset.tls[0].items)
        assert (a.bs, a.weights, a.failed is b.failed) == (b.bs, b.weights, True)
    assert small.vocab == dls.vocab and small.size == 16 and dls.size == 32
    assert len(small.held_out().dataset) == len(dls.held_out().dataset)
    assert dls.train.one_batch()[0].shape[-1] == 32


def test_resized_loaders_give_the_images_of_loaders_built_for_that_size(stripes):
    own, made = data(stripes, size=16), data(stripes).resized(16)
    for (x, y), (a, b) in zip([*own.train, *own.valid], [*made.train, *made.valid], strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)


def test_resized_loaders_keep_what_was_added_to_batches_and_refuse_what_was_added_to_images(stripes):
    dls = data(stripes)
    dls.add_tfms([Normalize.from_stats([.5] * 3, [.5] * 3, cuda=False)], "after_batch")
    assert dls.resized(16).train.one_batch()[0].min() < 0
    dls.add_tfms([Resize(20)], "after_item")
    with pytest.raises(DataError, match="item transforms were added"): dls.resized(16)


@pytest.mark.parametrize("size", [0, -8, 16.5, "16", True, None, float("nan"), (8, 16)])
def test_a_size_that_is_none_is_refused(stripes, size):
    learn = learner(stripes)
    with pytest.raises(DataError, match="size="): learn.dls.resized(size)
    with pytest.raises(DataError, match="size="):
        with learn.at_size(size): pass


# ---- fits at a size

def test_at_size_trains_on_other_images_and_validates_on_the_same(stripes):
    learn, seen = learner(stripes), []
    class See(Callback):
        def before_batch(self): seen.append((self.training, self.xb[0].shape[-1]))
    dls = learn.dls
    with learn.at_size(16):
        assert learn.dls.valid is dls.valid and learn.dls.size == 16
        quiet(learn, "fit", 1, 1e-3, cbs=See())
    assert learn.dls is dls and set(seen) == {(True, 16), (False, 32)}
    quiet(learn, "fit", 1, 1e-3)
    assert learn.history["size"].tolist() == [16, 32]
    assert set(learn.best_weights.table().fit) <= {1, 2}  # both epochs are compared


def test_at_size_ends_with_ones_own_loaders_after_an_error(stripes):
    learn = learner(stripes)
    dls, before = learn.dls, state(learn)
    with pytest.raises(ZeroDivisionError):
        with learn.at_size(16): 1 / 0
    assert learn.dls is dls and same(before, state(learn))


def test_one_cycle_over_the_sizes(stripes):
    "The learning rate is that of one fit, whatever the sizes are"
    learn, one = learner(stripes), learner(stripes)
    quiet(learn, "fit_one_cycle", 5, 1e-3, sizes=[8, 16, 32])
    quiet(one, "fit_one_cycle", 5, 1e-3)
    assert learn.history["size"].tolist() == [8, 8, 16, 16, 32] and learn.history.phase.tolist() == [1, 1, 2, 2, 3]
    assert learn.epoch_log.steps().lr.tolist() == pytest.approx(one.epoch_log.steps().lr.tolist())


def test_momenta_go_on_from_size_to_size(stripes):
    learn, seen = learner(stripes), []
    class First(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 0: seen.append(len(optimizer_state(self.opt)["state"]))
    quiet(learn, "fit_one_cycle", 2, 1e-3, sizes=[16, 32], reset_opt=True, cbs=First())
    assert seen[0] == 0 < seen[1]


def test_an_interrupted_fit_ends_with_the_data_of_its_final_size(stripes):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.dls.size == 16 and self.epoch == 1: raise KeyboardInterrupt
    for method, args in (("fit_one_cycle", (4, 1e-3)), ("fine_tune", (4,))):
        learn = learner(stripes)
        dls = learn.dls
        with pytest.raises(TrainingStopped): quiet(learn, method, *args, sizes=[16, 32], cbs=Stop())
        assert learn.dls is dls and set(learn.history["size"]) == {16}
        quiet(learn, "fit", 1, 1e-4)
        assert learn.history["size"].iloc[-1] == 32


def test_fine_tune_begins_with_small_images_and_ends_with_the_head_at_the_final_size(stripes, capsys):
    learn = learner(stripes)
    learn.pretrained = True
    with learn.no_bar(): learn.fine_tune(3, sizes=[16, 32], freeze_epochs=2)
    table = learn.fine_tuning.set_index("phase")
    assert list(table.index)[:2] == ["head", "whole network"] and list(table.sizes["whole network"]) == [16, 32]
    whole = learn.history[learn.history.phase >= table.fit["whole network"]]
    assert whole["size"].tolist()[:3] == [16, 16, 32] and learn.history["size"].iloc[0] == 32
    assert "at 16 → 32 pixels" in capsys.readouterr().out
    assert learn.validate()[1] == pytest.approx(learn.history.accuracy.max())


def test_with_fastais_arguments_the_second_phase_has_the_sizes(stripes):
    learn = learner(stripes)
    quiet(learn, "fine_tune", 2, 1e-3, sizes=[16, 32])
    assert learn.history["size"].tolist() == [32, 16, 32]


@pytest.mark.parametrize("sizes, said", [
    ([32], "two or more"), (32, "two or more"), ("16,32", "two or more"), ([32, 16], "increase"),
    ([32, 32], "increase"),
    ([0, 32], "increase"), ([-16, 32], "increase"), (["16", "32"], "increase"), ([16., 32], "increase"),
    ([True, 32], "increase"), ([], "two or more"), ([None, 32], "increase"), ([float("nan"), 32], "increase"),
    ([16, 24], "the last must be the size of the data, 32"), ([16, 32, 64], "the last must be the size"),
    ([8, 12, 16, 24, 32], "epochs for 5 sizes")])
def test_sizes_that_cannot_be_are_refused_before_anything_is_changed(stripes, sizes, said):
    learn = learner(stripes)
    dls, before = learn.dls, state(learn)
    for method, args in (("fit_one_cycle", (3, 1e-3)), ("fine_tune", (3,)), ("fine_tune", (3, 1e-3))):
        with pytest.raises(TrainError, match=said): quiet(learn, method, *args, sizes=sizes)
    assert learn.dls is dls and same(before, state(learn)) and not len(learn.history)


@pytest.mark.parametrize("kwargs", [dict(minutes=1), dict(n_epoch=3, start_epoch=1), dict(n_epoch=3, minutes=1)])
def test_sizes_want_epochs(stripes, kwargs):
    with pytest.raises(TrainError, match="minutes"):
        quiet(learner(stripes), "fit_one_cycle", lr_max=1e-3, sizes=[16, 32], **kwargs)
    with pytest.raises(TrainError, match="minutes"):
        quiet(learner(stripes), "fine_tune", minutes=1, sizes=[16, 32])


def test_other_loaders_are_refused(stripes):
    dls = ImageDataLoaders.from_folder(stripes, valid_pct=.3, item_tfms=Resize(32), bs=8, num_workers=0)
    learn = learner(stripes, dls=dls)
    with pytest.raises(DataError, match="image_data"):
        with learn.at_size(16): pass
    with pytest.raises((DataError, TrainError), match="size"): quiet(learn, "fit_one_cycle", 2, 1e-3, sizes=[16, 32])


def test_a_network_of_one_size_is_refused_and_one_that_interpolates_its_positions_trains(stripes):
    fixed = learner(stripes, "timm/vit_tiny_patch16_224")
    with pytest.raises(TrainError, match="cannot process images of 16×16 pixels.*dynamic_img_size=True"):
        quiet(fixed, "fit_one_cycle", 2, 1e-3, sizes=[16, 32])
    assert not len(fixed.history) and fixed.dls.size == 32
    learn = learner(stripes, "timm/test_vit", dynamic_img_size=True)
    quiet(learn, "fit_one_cycle", 2, 1e-3, sizes=[16, 32])
    assert learn.history["size"].tolist() == [16, 32]


def test_a_batch_transform_with_a_size_of_its_own_is_refused(stripes):
    from fastai.vision.all import aug_transforms
    learn = learner(stripes, dls=data(stripes, augment=aug_transforms(size=32)))
    with pytest.raises(TrainError, match="give images of 32×32"):
        with learn.at_size(16): pass


def test_a_fit_over_sizes_resumes_after_it_was_killed_at_any_size(stripes, tmp_path):
    def run(folder, kill=None, resume=False):
        class Kill(Callback):
            is_setting = False
            def after_batch(self):
                if self.training and kill == (self.dls.size, self.epoch, self.train_iter): raise SystemExit
        learn = learner(stripes, precision="fp32")
        quiet(learn, "fit_one_cycle", 4, 1e-3, sizes=[16, 32], checkpoint=Checkpoint(tmp_path / folder, every=2),
              resume=resume, cbs=Kill())
        return learn
    whole = run("whole")
    for i, kill in enumerate([(16, 0, 3), (16, 1, 7), (32, 0, 1), (32, 1, 7)]):
        with pytest.raises(SystemExit): run(f"{i}", kill)
        again = run(f"{i}", resume=True)
        assert same(state(whole), state(again)), kill
        changed = ["seconds", "fill_seconds"]
        pd.testing.assert_frame_equal(again.history.drop(columns=changed), whole.history.drop(columns=changed))
        assert again.dls.size == 32


def test_other_sizes_are_refused_on_resuming(stripes, tmp_path):
    quiet(learner(stripes), "fit_one_cycle", 2, 1e-3, sizes=[16, 32], checkpoint=tmp_path / "runs")
    with pytest.raises(CheckpointError, match="settings differ.*transforms"):
        quiet(learner(stripes), "fit_one_cycle", 2, 1e-3, sizes=[24, 32], checkpoint=tmp_path / "runs", resume=True)


# ---- bodies for any size

def message(arch, **kwargs):
    with pytest.raises(ArchError) as e: create_network(arch, 2, weights=None, **kwargs)
    return str(e.value)


def test_a_network_of_timm_that_cannot_be_built_for_a_size_names_those_near_it():
    said = message("timm/efficientformerv2_s0", input_size=200)
    assert "cannot be built for 200×200" in said and "(size=224), or of 192 pixels" in said
    assert create_network("timm/efficientformerv2_s0", 2, weights=None, input_size=192).input_size == 192
    assert size_arguments(find_arch("timm/efficientformerv2_s0"), 200) is None
    assert "or of 192 pixels" in message("timm/mvitv2_tiny", input_size=200)  # an index that is seen with values only
    assert "or of 32 or 64 pixels" in message("vit_b_32", input_size=48)


def test_the_size_is_checked_before_weights_are_fetched(monkeypatch):
    "An impossible size is no failed download, and the network is built once with values"
    built = []
    make = timm.create_model
    def counted(*args, **kwargs):
        net = make(*args, **kwargs)
        built.append(next(net.parameters()).device.type)
        return net
    monkeypatch.setattr(timm, "create_model", counted)
    def unreachable(*args, **kwargs): raise ConnectionError("no route")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(ArchError, match="cannot be built for 200×200"):
        create_network("timm/efficientformerv2_s0", 2, input_size=200)
    with pytest.raises(ArchError, match="no_such_argument"):
        create_network("timm/vit_tiny_patch16_224", 2, no_such_argument=1)
    assert "cpu" not in built
    with pytest.raises(WeightsError, match="download failed"):
        create_network("timm/vit_tiny_patch16_224", 2, input_size=96)
    assert "cpu" not in built  # timm loads the weights before it hands over the network, and there are none


@pytest.mark.parametrize("arch", ["timm/test_resnet", "timm/vit_tiny_patch16_224", "timm/crossvit_tiny_240",
                                  "resnet18"])
@pytest.mark.parametrize("n_in", [1, 4])
def test_weights_of_three_channels_go_into_networks_of_others(arch, n_in):
    name = arch.removeprefix("timm/")
    make = timm.create_model if "timm/" in arch else torchvision.models.get_model
    state, size = make(name).state_dict(), 240 if "240" in name else 224 if "vit" in name else 64
    net = create_network(arch, 2, weights=state, n_in=n_in, input_size=size).eval()
    with torch.inference_mode(): assert net(torch.rand(2, n_in, size, size)).shape == (2, 2)
    theirs = timm.create_model(name, in_chans=n_in, num_classes=0).state_dict() if "timm/" in arch else {}
    own = {k: v for s in net.body.stages for k, v in s.state_dict().items()}
    assert not theirs or {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in own.items() if k in theirs}


class Gives(nn.Module):
    "A classifier whose output is packed"
    def __init__(self, pack):
        super().__init__()
        self.conv, self.fc, self.pack = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), pack
    def forward(self, x): return self.pack(self.fc(F.relu(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize("pack", [lambda y: (y, y), lambda y: dict(logits=y), lambda y: [y], lambda y: None])
def test_a_network_that_gives_no_tensor_says_what_to_give(pack):
    with pytest.raises(ArchError, match="more than one tensor, as a tuple or a dictionary|returns? the one"):
        create_network(Gives(pack), 2, weights=None, input_size=32)


def test_a_function_of_timms_network_takes_weights_of_another_size():
    state = timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict()
    def small(): return timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=96)
    net = create_network(small, 2, weights=state, input_size=96).eval()
    with torch.inference_mode(): assert net(torch.rand(2, 3, 96, 96)).shape == (2, 2)


# ---- names of the Hugging Face Hub

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The Hub's folder of this machine, with one network for 96 pixels and statistics of its own; no connection"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--me--vit" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "models--me--vit" / "refs").mkdir()
    (tmp_path / "models--me--vit" / "refs" / "main").write_text("abc")
    net = timm.create_model("test_vit", num_classes=5, img_size=96)
    about = dict(input_size=[3, 96, 96], mean=[.4] * 3, std=[.3] * 3, num_classes=5, first_conv="patch_embed.proj",
                 classifier="head", fixed_input_size=True, license="mit")
    (folder / "config.json").write_text(json.dumps(dict(architecture="test_vit", num_classes=5, pretrained_cfg=about,
                                                        model_args=dict(img_size=96))))
    save_file(net.state_dict(), folder / "model.safetensors")
    return net


@pytest.mark.parametrize("prefix", ["hf_hub:", "hf-hub:"])
def test_a_name_of_the_hub_is_a_network_with_its_weights(hub, prefix):
    net = create_network(f"{prefix}me/vit", 2)
    assert net.arch == "test_vit" and net.input_size == 96 and net.mean.flatten().tolist() == pytest.approx([.4] * 3)
    assert torch.equal(net.body.stem.patch_embed.proj.weight, hub.patch_embed.proj.weight)
    assert is_on_this_machine(find_arch(f"{prefix}me/vit"), "imagenet")
    again = create_network(**{k: v for k, v in net.built_by.items() if k != "builder"}, weights=None)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_a_network_of_the_hub_is_built_for_the_size_of_the_data_and_shipped(hub, stripes, tmp_path, capsys):
    learn = learner(stripes, "hf_hub:me/vit", weights="imagenet")
    assert "built for 32×32 images" in capsys.readouterr().out and learn.start_weights == "hf_hub:me/vit"
    quiet(learn, "fit", 1, 1e-3)
    shutil.rmtree(next(tmp_path.glob("models--*")))  # the file needs no Hub
    bundle = load_bundle(learn.bundle(tmp_path / "net.ftl"))
    assert bundle.classes == ["lying", "standing"]


def test_weights_of_the_hub_by_name(hub):
    net = create_network("timm/test_vit", 2, weights="hf_hub:me/vit", input_size=96)
    assert torch.equal(net.body.stem.patch_embed.proj.weight, hub.patch_embed.proj.weight)
    with pytest.raises(WeightsError, match="are of test_vit, not of resnet18"):
        create_network("resnet18", 2, weights="hf_hub:me/vit")
    with pytest.raises(WeightsError, match="one set of weights"): create_network("hf_hub:me/vit", 2, weights="a1_in1k")


def test_a_name_that_the_hub_does_not_have_is_named(hub):
    for name in ("hf_hub:me/none", "hf_hub:"):
        with pytest.raises(ArchError, match="hf_hub:"): create_network(name, 2)
    assert hub_id("resnet18") is None and hub_id(None) is None and hub_id("hf-hub:a/b") == "a/b"
