"""What is kept is never that of another image, transform or network, and trouble with the disk costs time only."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.metrics import accuracy
from fastai.vision.core import PILImage, TensorImage
from fasttransform import Transform
from PIL import Image
from torch import nn

from ftlib.data.cache import DecodedImages, image_hash
from ftlib.system.files import evict_lru
from ftlib.data.images import image_data
from ftlib.models.cnn import cnn
from ftlib.cache.features import MixFeatures, cached_features, is_random, cached_forward
from ftlib.cache.session import on_features
from ftlib.cache.store import FeatureStore
from ftlib.cache.uses_images import uses_images
from ftlib.errors import TrainError
from ftlib.train.vision import vision_learner

N = 24


@pytest.fixture
def folder(tmp_path):
    "Two classes of 12 images"
    rng = np.random.default_rng(0)
    for i in range(N):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def data(folder, **kwargs):
    "The last six of the first 24 are for validation"
    paths = sorted(folder.rglob("*.png"), key=lambda p: p.name)
    table = pd.DataFrame(dict(path=map(str, paths), label=[p.parent.name for p in paths],
                              split=["valid" if 18 <= int(p.stem) < 24 else "train" for p in paths]))
    return image_data(table, **dict(size=16, bs=8, num_workers=0) | kwargs)


def network():
    torch.manual_seed(0)
    net = cnn(2, size=16, channels=(4, 8, 8)).freeze_to(2)
    net.eval()
    return net


def computed(store, net, dl, **kwargs):
    "How many images of `dl` went through the frozen part"
    before = {id(b) for f in store.alive for b in f.blocks}
    found = cached_features(net, dl, [image_hash(o) for o in dl.dataset.tls[0].items], store=store, **kwargs)
    assert not found.missing([image_hash(o) for o in dl.dataset.tls[0].items])
    return sum(len(b) for f in store.alive for b in f.blocks if id(b) not in before)


# ---- what makes features new

def touch(folder, net, kwargs): os.utime(folder / "a" / "00.png", ns=(0, 0))
def rewrite(folder, net, kwargs): Image.new("RGB", (20, 20)).save(folder / "a" / "00.png")
def add(folder, net, kwargs): Image.new("RGB", (20, 20)).save(folder / "a" / "99.png")
def smaller(folder, net, kwargs): kwargs.update(size=12)
def augmented(folder, net, kwargs): kwargs.update(augment="strong")
def weight(folder, net, kwargs): net.stages[0][0].weight.data[0, 0, 0, 0] += 1e-4
def statistic(folder, net, kwargs): net.stages[1][1].running_mean[0] += 1e-3
def constants(folder, net, kwargs): net.body.normalize.mean += 1e-3
def frontier(folder, net, kwargs): net.freeze_to(1)


def activation(folder, net, kwargs): net.stages[0][2] = nn.LeakyReLU()
def seeded(folder, net, kwargs): kwargs.update(seed=7)


def other_head(folder, net, kwargs): net.head[-1].weight.data += 1
def later_stage(folder, net, kwargs): net.stages[2][0].weight.data += 1
def labels(folder, net, kwargs): kwargs.update(names={"a": "ant", "b": "bee"})
def batches(folder, net, kwargs): kwargs.update(bs=3)


EVERY = "every image"


@pytest.mark.parametrize("change, again", [
    *((f, EVERY) for f in (smaller, augmented, weight, statistic, constants, frontier, activation, seeded)),
    (touch, 1), (rewrite, 1), (add, 1), *((f, 0) for f in (other_head, later_stage, labels, batches))])
def test_what_makes_features_new(folder, change, again):
    net, kwargs, store = network(), dict(augment="light", seed=42), FeatureStore(folder=folder.parent / "store")
    dl = data(folder, **kwargs).train
    assert is_random(dl) and computed(store, net, dl) == 18 and computed(store, net, dl) == 0
    change(folder, net, kwargs)
    dl = data(folder, **kwargs).train
    assert computed(store, net, dl) == (18 if again == EVERY else again)


def test_precision_and_view_are_part_of_it(folder):
    net, dl, store = network(), data(folder).train, FeatureStore(folder=folder.parent / "store")
    counts = [computed(store, net, dl, **k) for k in ({}, {"view": 1}, {"precision": "bf16"}, {"view": 1})]
    assert counts == [len(dl.dataset)] * 3 + [0]


LEVEL = 1.


def level(x): return x * LEVEL


class Level(Transform):
    factor = 1.
    def encodes(self, x:TensorImage): return level(x) * self.factor


def other_global(monkeypatch): monkeypatch.setitem(globals(), "LEVEL", .5)
def other_helper(monkeypatch): monkeypatch.setitem(globals(), "level", lambda x: x * .5)
def other_attribute(monkeypatch): monkeypatch.setattr(Level, "factor", .5)


@pytest.mark.parametrize("place", ["after_item", "before_batch", "after_batch"])
@pytest.mark.parametrize("change", [other_global, other_helper, other_attribute])
def test_a_transform_that_is_edited_makes_new_features(folder, monkeypatch, place, change):
    net, store = network(), FeatureStore(folder=folder.parent / "store")
    def dl():
        dl = data(folder, augment=None).valid
        getattr(dl, place).add(Level())
        return dl
    assert computed(store, net, dl()) == 6 and computed(store, net, dl()) == 0
    change(monkeypatch)
    assert computed(store, net, dl()) == 6 and computed(store, net, dl()) == 0
    monkeypatch.undo()
    assert computed(store, net, dl()) == 0


def test_what_cannot_be_told_is_not_remembered(folder, capsys):
    with open(os.devnull) as file:
        class Odd(Transform):
            def encodes(self, x:TensorImage): return x if file else x * 2
        dls = data(folder, augment=None)
        dls.train.after_batch.add(Odd())
        learn = vision_learner(dls, network(), metrics=accuracy, precision="fp32")
        learn.freeze_to(-2)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert list(learn.history.cached) == [0] and "changes cannot be detected" in capsys.readouterr().out


def noise(x): return x + torch.randn(x.shape, device=x.device) * 20 if isinstance(x, TensorImage) else x
class Noise(Transform):
    split_idx = 0
    def encodes(self, x:TensorImage): return noise(x)
def noisy_image(x:PILImage):
    return PILImage.create(np.uint8(np.clip(np.asarray(x, int) + np.random.randint(-80, 80), 0, 255)))


@pytest.mark.parametrize("place, transform", [("after_batch", noise), ("after_batch", Noise()),
    ("after_batch", Transform(noise, split_idx=0)), ("after_batch", Transform(noise)),
                                              ("after_item", noisy_image),
                                              ("after_item", Transform(noisy_image, split_idx=0))])
def test_a_random_function_has_views(folder, place, transform):
    dls = data(folder, augment=None)
    getattr(dls.train, place).add(transform if isinstance(transform, Transform)
                                  else Transform(transform, order=50 if place == "after_batch" else -5))
    learn = vision_learner(dls, network(), views=3, precision="fp32")
    learn.freeze_to(-2)
    assert is_random(dls.train)
    with on_features(learn, range(6), views=3, store=FeatureStore(folder=folder.parent / "store")) as session:
        dl = session.loader(learn.dls.train)
        names = dl.names
        first = [v.take(v.places(names)) for v in dl.views]
    assert len(dl.views) == 3 and not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


BASE = 1.


class Teacher(nn.Module):
    "Its answer depends on an attribute, a class attribute, a global, and a thing that may be no longer the same"
    sign = 1.

    def __init__(self, k=1., what=None):
        super().__init__()
        self.k, self.what = k, what

    def forward(self, x): return x.mean((2, 3))[:, :2] * self.k * self.sign * BASE


def asked(net, dl, store):
    names = [image_hash(o) for o in dl.dataset.tls[0].items]
    found = cached_forward(net, dl, names, store=store, dtype=torch.float32, fresh=True)
    return found.take(found.places(names))


@pytest.mark.parametrize("change", [lambda m: Teacher(-2.), lambda m: m.setattr(Teacher, "sign", -2.) or Teacher(),
                                    lambda m: m.setitem(globals(), "BASE", -2.) or Teacher(),
                                    lambda m: m.setattr(Teacher, "forward", lambda self, x: -2 * x.mean((2, 3))[:, :2])
                                    or Teacher()])
@pytest.mark.parametrize("inside", [lambda net: net, lambda net: nn.Sequential(nn.Identity(), net)])
def test_another_teacher_is_asked_anew(folder, monkeypatch, change, inside):
    dl, store = data(folder, augment=None).valid, FeatureStore(folder=folder.parent / "store")
    first = asked(inside(Teacher()), dl, store)
    assert torch.equal(asked(inside(Teacher()), dl, store), first) and len(store.known) == 1
    assert torch.allclose(asked(inside(change(monkeypatch)), dl, store), -2 * first)


def test_a_teacher_that_cannot_be_told_is_asked_each_time(folder):
    dl, store = data(folder, augment=None).valid, FeatureStore(folder=folder.parent / "store")
    net = Teacher(what=weakref.ref(store))
    first, net.k = asked(net, dl, store), -2.
    assert torch.allclose(asked(net, dl, store), -2 * first) and not store.known


# ---- whose image it is

def same_times(path): os.utime(path, (1e9, 1e9))


def in_place(path): path.write_bytes(bytes(reversed(path.read_bytes())))
def replaced(path):
    (new := path.with_name("new")).write_bytes(bytes(reversed(path.read_bytes())))
    same_times(new)
    new.replace(path)
def linked(path):
    (new := path.with_name("new")).write_bytes(bytes(reversed(path.read_bytes())))
    path.unlink()
    path.symlink_to(new)


@pytest.mark.parametrize("change", [in_place, replaced, linked])
def test_another_image_of_the_same_size_and_time(tmp_path, change):
    path = tmp_path / "a.bin"
    path.write_bytes(b"12345")
    same_times(path)
    first = image_hash(path)
    assert image_hash(path) == first
    time.sleep(.02)  # the clock of a file system ticks every few milliseconds
    change(path)
    same_times(path)
    assert image_hash(path) != first


def test_the_same_relative_path_in_two_projects(tmp_path, monkeypatch):
    names = []
    for project in ("one", "two"):
        (tmp_path / project / "set").mkdir(parents=True)
        (tmp_path / project / "set" / "a.png").write_bytes(project.encode())
        same_times(tmp_path / project / "set" / "a.png")
        monkeypatch.chdir(tmp_path / project)
        names.append(image_hash("set/a.png"))
        assert image_hash("./set/../set/a.png") == image_hash(tmp_path / project / "set" / "a.png") == names[-1]
    assert names[0] != names[1]


# ---- fits

def fitted(folder, cache, frozen=-2, epochs=3, **kwargs):
    dls = data(folder, augment=None)
    torch.manual_seed(1)
    learn = vision_learner(dls, network(), metrics=accuracy, cache=cache, precision="fp32", **kwargs)
    learn.freeze_to(frozen)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2)
        return learn, learn.history, learn.get_preds()[0]


@pytest.mark.parametrize("frozen", [-1, -2, 1])
def test_a_fit_on_features_is_the_fit_on_images(folder, frozen):
    (_, plain, preds), (learn, kept, other) = fitted(folder, False, frozen), fitted(folder, True, frozen)
    assert (plain.cached == 0).all() and (kept.cached == learn.model.frozen).all() and learn.features is None
    for name in ("train_loss", "valid_loss"): np.testing.assert_allclose(kept[name], plain[name], rtol=2e-2, atol=2e-3)
    assert torch.allclose(preds, other, atol=2e-2)
    assert kept.fill_bytes[0] > 0 and (kept.fill_bytes[1:] == 0).all()


def test_only_the_features_of_validation_images(folder, capsys):
    "Training images are augmented anew in each epoch, frozen stages see a validation image once"
    seen = dict(training=0, validation=0)
    class Count(Callback):
        uses_images = False
        def before_batch(self):
            images = self.x.shape[1] == 3
            seen["training" if self.training else "validation"] += len(self.x) * images
    (_, plain, preds), (learn, kept, other) = fitted(folder, False), fitted(folder, "valid", cbs=Count())
    assert seen == dict(training=3 * 16, validation=0) and (kept.cached == 0).all() and learn.features is None
    assert (plain.train_loss == kept.train_loss).all()
    np.testing.assert_allclose(kept.valid_loss, plain.valid_loss, rtol=2e-2, atol=2e-3)
    assert torch.allclose(preds, other, atol=2e-2) and not capsys.readouterr().out


def test_memory_is_given_back_after_each_epoch(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("ftlib.train.fits.release_memory", lambda: calls.append(1))
    fitted(folder, True)
    assert len(calls) == 3


def test_an_unknown_cache_is_refused(folder):
    with pytest.raises(TrainError, match="True, False or 'valid'"): fitted(folder, "train")


def test_images_where_a_callback_wants_them(folder, capsys):
    learn = vision_learner(data(folder), network(), metrics=accuracy)
    learn.freeze_to(-2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=MixUp())
    assert list(learn.history.cached) == [0] and "MixUp needs images" in capsys.readouterr().out
    loss = learn.loss_func
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=MixFeatures())
    assert learn.history.cached.iloc[-1] and learn.loss_func is loss and not capsys.readouterr().out


class Looks(Callback):
    def before_batch(self): self.shape = self.x.shape
class Counts(Looks):
    uses_images = False
class LooksAgain(Counts):
    def after_batch(self): self.last = self.xb
class Renamed(Counts): order = 7


@pytest.mark.parametrize("cls, cached, said", [(Looks, 0, 1), (Counts, 2, 0), (LooksAgain, 0, 1), (Renamed, 2, 0)])
def test_a_callback_declares_whether_it_uses_images(folder, capsys, cls, cached, said):
    learn = vision_learner(data(folder), network(), metrics=accuracy, precision="fp32")
    learn.freeze_to(-2)
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cls())
    assert list(learn.history.cached) == [cached] * 2 and capsys.readouterr().out.count("declare `uses_images = "
        "False`") == said


def test_every_callback_of_ftlib_declares_it():
    import ftlib.experiment.pipeline, ftlib.teach.hints, ftlib.teach.rotation  # noqa: F401, E401
    found, todo = set(), [Callback]
    while todo: found |= set(todo := [c for parent in todo for c in parent.__subclasses__()])
    ours = [c for c in found if c.__module__.startswith("ftlib.")]
    assert len(ours) > 15 and not [c for c in ours if uses_images(c.__new__(c)) is None]


def test_fastais_way_has_no_features(folder, capsys):
    learn = vision_learner(data(folder), network(), metrics=accuracy, train_bn=True)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert list(learn.history.cached) == [0] and not capsys.readouterr().out


@pytest.mark.parametrize("call", ["validate", "get_preds"])
def test_a_third_loader_gives_images(folder, call):
    dls = data(folder)
    dls.loaders.append(dls.test_dl(dls.valid_ds.tls[0].items, with_labels=True))
    learn = vision_learner(dls, network(), metrics=accuracy)
    learn.freeze()
    with learn.no_bar(), learn.no_logging(): third, second = getattr(learn, call)(ds_idx=2), getattr(learn, call)()
    assert torch.allclose(torch.as_tensor(third[0]), torch.as_tensor(second[0]), atol=2e-2)


# ---- the disk

def test_a_full_disk_costs_time_only(folder, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)], capture_output=True)
    if made.returncode: pytest.skip("no right to mount a small disk here")
    try:
        learn = vision_learner(data(folder), network(), metrics=accuracy)
        learn.freeze_to(-2)
        with on_features(learn, store=FeatureStore(memory=0, folder=small)) as session: assert session is None
        assert "there is no space" in capsys.readouterr().out
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert not list(small.glob("*.new"))
    finally: subprocess.run(["umount", str(small)], check=True)


WRITER = """
    import sys, time, torch
    from ftlib.cache.store import FeatureStore
    store, names = FeatureStore(memory=0, folder=sys.argv[1]), [f"p{i}" for i in range(200)]
    with store.block(store.features("0" * 32), names, (1000,), torch.float32) as block:
        for i in range(200):
            block[i] = i
            if i == 20: print("half way", flush=True)
            time.sleep(float(sys.argv[2]))
    print("done", flush=True)
"""


def writer(folder, pause):
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(WRITER), str(folder), str(pause)],
                            stdout=subprocess.PIPE, text=True)


def test_killed_while_it_is_written(tmp_path):
    process = writer(tmp_path, .05)
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.suffix for p in tmp_path.iterdir()] == [".new"]
    assert FeatureStore(folder=tmp_path).features("0" * 32).missing(["p0"]) == [0]
    left = next(tmp_path.iterdir())
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    evict_lru(tmp_path, 20 << 30)
    assert not left.exists()


def test_two_processes_fill_the_same(tmp_path):
    both = [writer(tmp_path, .002) for _ in range(2)]
    assert [p.communicate()[0].splitlines()[-1] for p in both] == ["done"] * 2
    found = FeatureStore(folder=tmp_path).features("0" * 32)
    assert found.take(found.places(["p7", "p199"]))[:, 0].tolist() == [7., 199.]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".json"]


# ---- decoded images

@pytest.fixture
def large(tmp_path, monkeypatch):
    "24 images that are larger than needed, and a cache of their own"
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(N):
        path = tmp_path / "large" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50, 40 + i, 3), dtype=np.uint8)).save(path)
    return tmp_path / "large"


def epochs(folder, n=2, **kwargs):
    "All batches of both loaders in `n` epochs"
    dls = data(folder, **kwargs)
    return [x for _ in range(n) for dl in (dls.train, dls.valid) for x, _ in dl]


@pytest.mark.parametrize("augment", ["strong", None])
def test_kept_or_not_batches_are_the_same(large, augment):
    plain = epochs(large, augment=augment, cache=False)
    for workers in (0, 2):
        for _ in range(2):  # the second finds all images
            assert all(map(torch.equal, plain, epochs(large, augment=augment, num_workers=workers)))


def test_each_image_is_decoded_once(large, monkeypatch):
    epochs(large, n=1)
    monkeypatch.setattr("ftlib.data.cache.open_image", None)
    epochs(large)
    with pytest.raises(TypeError): epochs(large, cache=False)


def test_looking_at_a_batch_decodes_no_others(large):
    dls = data(large)
    dls.one_batch(), dls.train.show_batch(show=False)
    assert not DecodedImages(side=24).offsets
    next(iter(dls.valid))
    assert len(DecodedImages(side=24).offsets) == N


def test_an_image_that_changes_is_seen(large):
    dls = data(large, augment=None)
    before = torch.cat([x for x, _ in dls.valid])
    for change in (touch_18, blacken_18):
        change(large)
        assert bool(torch.cat([x for x, _ in dls.valid])[0].sum() == 0) == (change is blacken_18)
    assert torch.equal(torch.cat([x for x, _ in dls.valid])[1:], before[1:])


def touch_18(folder): os.utime(folder / "a" / "18.png", ns=(0, 0))
def blacken_18(folder): Image.new("RGB", (50, 50)).save(folder / "a" / "18.png")


def test_a_full_disk_decodes_each_time(large, tmp_path, capsys, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True)
    if made.returncode: pytest.skip("no right to mount a small disk here")
    try:
        plain = epochs(large, cache=False)
        monkeypatch.setenv("FTLIB_CACHE", str(small))
        assert all(map(torch.equal, plain, epochs(large)))
        assert capsys.readouterr().out.count("decoded again") == 1
        assert not list((small / "images").iterdir())
    finally: subprocess.run(["umount", str(small)], check=True)


DECODER = """
    import sys, time
    from pathlib import Path
    from ftlib.data.cache import DecodedImages
    class Slow(DecodedImages):
        n = 0
        def _pixels(self, source):
            Slow.n += 1
            if Slow.n == 70: print("half way", flush=True)
            time.sleep(float(sys.argv[3]))
            return super()._pixels(source)
    Slow([Path(p) for p in sorted(Path(sys.argv[1]).rglob("*.png"))], 20, folder=sys.argv[2]).ready()
    print("done", flush=True)
"""


def decoder(folder, kept, pause):
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(DECODER), str(folder), str(kept),
                             str(pause)],
                            stdout=subprocess.PIPE, text=True)


def test_killed_while_images_are_written(large, tmp_path):
    for i in range(N, 100): Image.new("RGB", (60, 60), (i, 0, 0)).save(large / "a" / f"{i}.png")
    process = decoder(large, tmp_path / "kept", .05)
    assert process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.suffix for p in (tmp_path / "kept").iterdir()] == [".new"]
    assert not DecodedImages(side=20, folder=tmp_path / "kept").offsets
    assert decoder(large, tmp_path / "kept", 0).communicate()[0].splitlines()[-1] == "done"
    assert DecodedImages(side=20, folder=tmp_path / "kept").get(large / "a" / "99.png")[0, 0].tolist() == [99, 0, 0]


def test_an_interrupted_decoding_is_tried_again(large, tmp_path, monkeypatch):
    paths = sorted(large.rglob("*.png"))
    kept = DecodedImages(paths, 20, folder=tmp_path / "kept")
    def stop(self, source): raise KeyboardInterrupt
    monkeypatch.setattr(DecodedImages, "_pixels", stop)
    with pytest.raises(KeyboardInterrupt): kept.ready()
    monkeypatch.undo()
    assert not list((tmp_path / "kept").iterdir())
    kept.ready()
    assert all(kept.get(p) is not None for p in paths)


def test_two_processes_decode_the_same(large, tmp_path):
    both = [decoder(large, tmp_path / "kept", .01) for _ in range(2)]
    assert [p.communicate()[0].splitlines()[-1] for p in both] == ["done"] * 2
    assert len(DecodedImages(side=20, folder=tmp_path / "kept").offsets) == N
    assert sorted(p.suffix for p in (tmp_path / "kept").iterdir()) == [".bin", ".json"]
