"""Images from every kind of source, what can be wrong with them, and that batches depend on nothing but the seed."""

import copy
import json
import os
import pickle
import random
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.transforms import Normalize
from fastai.vision.augment import aug_transforms
from fastai.metrics import accuracy
from fastai.vision.core import PILImage, TensorImage
from PIL import Image

from ftlib.data.audit import audit
from ftlib.data.images import UniformErasing, ImageData, image_data
from ftlib.data.loader import Sample, seeded
from ftlib.errors import DataError
from ftlib.models.cnn import cnn
from ftlib.train.vision import vision_learner

CLASSES = ["cat", "dog", "emu"]


def image(seed, side=40):
    "An image of its own for each seed"
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side + 8, side), Image.Resampling.BICUBIC)


def fill(folder, classes=CLASSES, n=8, start=0):
    "A folder of `n` JPEGs a class"
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n): image(start + 100 * k + i).save(folder / name / f"{i}.jpg", quality=95)
    return folder


def build(source, **kw):
    "Small batches, in this process"
    return image_data(source, **{"size": 16, "bs": 4, "num_workers": 0, "device": torch.device("cpu"), **kw})


@pytest.fixture
def folder(tmp_path): return fill(tmp_path / "pets")


@pytest.fixture
def table(folder):
    files = sorted(folder.rglob("*.jpg"))
    return pd.DataFrame({"path": [str(f.relative_to(folder)) for f in files], "label": [f.parent.name for f in files]})


def break_inside(path):
    "Header and end stay whole: only decoding shows that the image is broken"
    data = bytearray(path.read_bytes())
    at = data.find(b"\xff\xc4") + 5
    data[at:at + 16] = b"\xff" * 16
    path.write_bytes(data)


# ---- sources

def test_every_source_gives_the_same_split(folder, table, tmp_path):
    table.to_csv(folder / "labels.csv", index=False)
    files = [folder / p for p in table["path"]]
    arrays = {"image": [np.asarray(Image.open(f)) for f in files], "label": list(table["label"])}
    sources = {"folder": folder, "csv": folder / "labels.csv", "lists": (files, list(table["label"])),
               "mapping": arrays}
    split = {k: build(s)._table["split"].tolist() for k, s in sources.items()}
    split["frame"] = build(table, root=folder)._table["split"].tolist()
    assert len({tuple(s) for s in split.values()}) == 1, split
    first = {k: build(s).valid.one_batch()[0] for k, s in sources.items()}
    assert torch.equal(first["folder"], first["mapping"]), "the same images, decoded from files or given as arrays"


def test_torchvision_datasets(folder):
    from torchvision.datasets import FakeData, ImageFolder
    dls = build(ImageFolder(folder))
    assert list(dls.vocab) == CLASSES and isinstance(dls._table["item"][0],
                                                     Path), "files are read by us, and so checked"
    subset = torch.utils.data.Subset(ImageFolder(folder), [0, 1, 2, 8, 9, 10])
    assert list(build(subset).vocab) == ["cat", "dog"]
    assert build(FakeData(20, (3, 16, 16), 2)).one_batch()[0].shape == (4, 3, 16, 16)


def test_given_splits_are_kept(tmp_path):
    for k, name in enumerate(("training", "val", "testing")): fill(tmp_path / name, n=3 + k, start=1000 * k)
    dls = build(tmp_path)
    assert dls.summary().loc["total"].tolist() == [9, 12, 15, 36]
    assert len(dls.held_out().dataset) == 15 and len(dls.loaders) == 2
    seen = {str(i.source) for dl in dls.loaders for i in dl.dataset.tls[0].items}
    assert not any("testing" in s for s in seen)


def test_asking_for_another_valid_leaves_the_held_out_images(folder):
    one, two = build(folder, test=.25, valid=.2), build(folder, test=.25, valid=.4)
    held = [{str(i.source) for i in d.held_out().dataset.tls[0].items} for d in (one, two)]
    assert held[0] == held[1] and len(held[0]) == 6


def test_all_kinds_of_images(tmp_path):
    fill(tmp_path, ["a"], n=6)
    (tmp_path / "b").mkdir()
    rgb = image(7)
    for i, kind in enumerate(("L", "RGBA", "P", "1", "LA", "CMYK")):
        rgb.convert(kind).save(tmp_path / "b" / f"{i}.{'jpg' if kind == 'CMYK' else 'png'}")
    Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) * 257)).save(tmp_path / "b" / "6.png")
    dls = build(tmp_path, valid=.3, bs=8)
    assert not len(dls.bad_files)
    for dl in dls.loaders:
        for x, _ in dl: assert x.shape[1:] == (3, 16, 16) and 0 <= x.min() and x.max() <= 1


# ---- the same batches

@pytest.mark.parametrize("balance", [None, "sampler"])
def test_workers_do_not_change_batches(folder, balance):
    epochs = {}
    for n in (0, 2):
        random.seed(n), torch.manual_seed(n)
        dls = build(folder, num_workers=n, balance=balance)
        epochs[n] = [b for _ in range(2) for b in dls.train]
    assert len(epochs[0]) == 8
    for (x, y), (x2, y2) in zip(epochs[0], epochs[2], strict=True): assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(epochs[0][0][0], epochs[0][4][0])


def test_two_loaders_do_not_disturb_each_other(folder):
    alone = [y.tolist() for _, y in build(folder).train]
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one, two = build(folder), build(folder)
    list(two.train), list(two.valid), two.one_batch()
    assert [y.tolist() for _, y in one.train] == alone
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


def test_rng_is_the_whole_state(folder):
    dls = build(folder)
    next(iter(dls.train))
    state = dls.train.rng.getstate()
    one = [x for x, _ in dls.train]
    dls.train.rng.setstate(state)
    assert all(torch.equal(a, b) for a, b in zip(one, [x for x, _ in dls.train], strict=True))


# ---- what fastai does with the batches

@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_fastai_looks_at_predictions(folder, kind):
    from fastai.vision.all import ClassificationInterpretation, Learner, nn, plt
    arrays = [np.asarray(image(i)) for i in range(24)]
    source = folder if kind == "files" else {"image": arrays, "label": CLASSES * 8}
    dls = build(source, test=.2)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)))
    with learn.no_bar(), learn.no_logging():
        for where in (dict(ds_idx=0), dict(ds_idx=1), dict(dl=dls.held_out())):
            found = ClassificationInterpretation.from_learner(learn, **where)
            found.plot_top_losses(4)
            titles = [ax.get_title().split(" / ") for ax in plt.gcf().axes[:4]]
            top, at = found.top_losses(4)
            assert [t[1] for t in titles] == [f"{v:.2f}" for v in top.tolist()]
            assert [t[0].split("/")[1] for t in titles] == [found.dl.items[i].label for i in at.tolist()]
            found.plot_confusion_matrix()
            found.show_results([0, 1])
        learn.show_results()
        for x in (folder / "cat/0.jpg", str(folder / "cat/0.jpg"), arrays[0], Image.fromarray(arrays[0])):
            assert learn.predict(x)[0] in CLASSES
        assert len(learn.get_preds(dl=dls.test_dl([folder / "cat/0.jpg"] * 5))[0]) == 5
        held = learn.get_preds(dl=dls.held_out())[1]
    assert [dls.vocab[i] for i in held] == [i.label for i in dls.held_out().items]
    dls.show_batch(), dls.test_dl(arrays[:3]).show_batch()
    plt.close("all")


def test_one_prediction_without_an_epoch_is_fastais(folder):
    from fastai.callback.core import Callback
    from fastai.learner import Learner as FastaiLearner
    from torch import nn

    from ftlib.train.learner import Learner
    dls = build(folder)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 16 * 16), nn.Dropout(),
                                       nn.Linear(3 * 16 * 16, 3)))
    learn.fit(1, 1e-2)
    events = []
    for x in (folder / "cat/0.jpg", np.asarray(image(1).resize((40, 24)))):
        for with_input in (False, True):
            learn.model.train()
            mine, theirs = learn.predict(x, with_input=with_input), FastaiLearner.predict(learn, x,
                with_input=with_input)
            assert list(map(type, mine)) == list(map(type, theirs))
            assert str(mine[-3]) == str(theirs[-3]) and mine[-2] == theirs[-2]
            assert torch.allclose(mine[-1], theirs[-1]) and (not with_input or torch.equal(mine[0], theirs[0]))
    learn.add_cb(Callback(after_pred=lambda cb: events.append(1)))
    learn.predict(folder / "cat/0.jpg")
    assert events, "a callback that may change predictions is asked"


@pytest.mark.parametrize("augment", ["light", "default", "strong"])
def test_augmented_images_stay_between_black_and_white(folder, augment):
    "fastai's erasing puts numbers from -4 to 4 into them"
    dls = build(folder, augment=augment)
    seen = torch.cat([x for _ in range(10) for x, _ in dls.train])
    assert 0 <= seen.min() and seen.max() <= 1


def test_erased_patches():
    grey = TensorImage(torch.full((4, 3, 16, 16), .5))
    with seeded(0): erased = UniformErasing(p=1.)(grey.clone(), split_idx=0)
    patch = (erased != grey).float().mean()
    assert 0 < patch < .4 and 0 <= erased.min() and erased.max() <= 1


def test_one_image_in_many_views(folder):
    dls = build(folder, augment=[])
    before = [y.tolist() for _, y in build(folder, augment=[]).train]
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastai.data.core.show_batch", lambda x, y, its, **kw: shown.append(x))
        dls.show_batch(unique=True)
    assert len(shown[0]) == 4 and not any(torch.equal(shown[0][0], x)
                                          for x in shown[0][1:]), "each in a crop of its own"
    dls.train.rng = random.Random(42)
    assert [y.tolist() for _, y in dls.train] == before, "Training continues with all images"


# ---- bad files

def test_bad_files_are_left_out_and_listed(folder):
    (folder / "cat/0.jpg").write_bytes(b"")
    (folder / "cat/1.jpg").write_text("no image")
    (folder / "dog/2.jpg").write_bytes((folder / "dog/2.jpg").read_bytes()[:-200])
    with pytest.warns(UserWarning, match="3 of 24 files are left out"): dls = build(folder)
    assert dict(zip((Path(p).name for p in dls.bad_files["path"]), dls.bad_files["problem"])) == {
        "0.jpg": "empty", "1.jpg": "not an image", "2.jpg": "truncated"}
    assert dls.summary().loc["total", "all"] == 21


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_inside_another_of_its_class_stands_in(folder, workers):
    for i in range(3): break_inside(folder / f"dog/{i}.jpg")
    dls = build(folder, valid=.4, num_workers=workers)
    assert not len(dls.bad_files), "nothing is seen without decoding"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = torch.cat([y for dl in dls.loaders for _, y in dl])
        order = torch.cat([y for _, y in dls.valid])
    assert set(Path(p).parent.name for p in dls.bad_files["path"]) == {"dog"} and len(dls.bad_files) >= 2
    assert labels.numel() >= 20
    assert order.tolist() == [int(y) for y in dls.valid_ds.tls[1]], "the others keep their places"


def test_an_image_to_predict_has_no_stand_in(folder):
    dls = build(folder)
    break_inside(folder / "dog/0.jpg")
    with pytest.raises(DataError, match="dog/0.jpg cannot be decoded"): list(dls.test_dl([folder / "dog/0.jpg"]))


def test_decompression_bomb(folder):
    header = (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    import zlib
    bomb = header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IEND\xaeB`\x82"
    (folder / "cat/big.png").write_bytes(bomb)
    assert audit(folder, deep=False, few=0)["problem"].tolist() == ["enormous"]


# ---- bad input: what came, what was wanted

def one_class(folder, table):
    return (list(table["path"][:8]), ["cat"] * 8), dict(root=folder), "there is only one class, 'cat'"
def no_label(folder, table):
    return table.assign(label=[None, *table["label"][1:]]), dict(root=folder), "1 of 24 images have no label"
def blank_label(folder, table):
    return table.assign(label=[" ", *table["label"][1:]]), dict(root=folder), "have no label"
def no_files(folder, table): return table, dict(root=folder / "cat"), r"none of the 24 images can be used.*root="
def no_column(folder, table): return table, dict(label="labels"), "no column 'labels'.*Did you mean 'label'"
def no_names(folder, table):
    return folder, dict(names={"cat": "Katze", "dog": "Hund"}), "names lacks 1 class \\('emu'\\)"
def no_folder(folder, table): return folder.parent / "pet", {}, "Did you mean 'pets'"
def no_split(folder, table): return table.assign(split="trian"), dict(root=folder), "Did you mean 'train'"
def only_valid(folder, table): return table.assign(split="valid"), dict(root=folder), "no training images"
def odd_length(folder, table): return (list(table["path"]), ["cat"]), {}, "24 images but 1 labels"
def strange(folder, table): return 7, {}, "cannot read images from a int"
def size_0(folder, table): return folder, dict(size=0), "size=0"
def valid_low(folder, table): return folder, dict(valid=-.2), "valid=-0.2"
def valid_high(folder, table): return folder, dict(valid=1), "valid=1"
def both_high(folder, table): return folder, dict(valid=.5, test=.5), "leave no training images"
def augment(folder, table): return folder, dict(augment="lite"), "augment='lite'"
def balance(folder, table): return folder, dict(balance="los"), "Did you mean 'loss'"


def unknown_label(folder, table):
    split = ["train"] * 23 + ["valid"]
    return table.assign(split=split, label=[*table["label"][:23],
                                            "emus"]), dict(root=folder), "but not in train. Did you mean 'emu'"


@pytest.mark.parametrize("case", [
    one_class, no_label, blank_label, no_files, no_column, no_names, no_folder, no_split, only_valid, odd_length,
    strange, size_0,
    valid_low, valid_high, both_high, augment, balance, unknown_label], ids=lambda f: f.__name__)
def test_bad_input(case, folder, table):
    source, kw, said = case(folder, table)
    with pytest.raises(DataError, match=said): build(source, **kw)


def test_empty_folder_and_no_class_folders(tmp_path):
    with pytest.raises(DataError, match="no images in it"): build(tmp_path)
    image(0).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="1 images, but none inside the folder of a class"): build(tmp_path)


def test_missing_files_are_reported(folder, table):
    table.loc[3, "path"] = "cat/gone.jpg"
    with pytest.warns(UserWarning, match="gone.jpg: missing"): dls = build(table, root=folder)
    assert dls.bad_files["problem"].tolist() == ["missing"]


def test_class_with_one_image_and_split_without_a_class(folder, table):
    fill(folder.parent / "one", ["fox"], n=1)
    (folder.parent / "one/fox").rename(folder / "fox")
    with pytest.warns(UserWarning, match="'fox'.*single image"): dls = build(folder)
    assert dls.summary().loc["fox", ["train", "valid"]].tolist() == [1, 0]
    split = ["valid" if i in (0, 8) else "train" for i in range(24)]
    with pytest.warns(UserWarning, match="'emu'.*without an image in valid"):
        build(table.assign(split=split), root=folder)


def test_names_from_json(folder, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"cat": "Katze", "dog": "Hund", "emu": "Emu"}))
    assert list(build(folder, names=tmp_path / "names.json").vocab) == ["Katze", "Hund", "Emu"]
    for text in ("[" * 99_999, '{"a":' * 50_000, "{", ""):
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(DataError, match="cannot read names="): build(folder, names=tmp_path / "names.json")


# ---- real images

@pytest.fixture(scope="module")
def shared(root):
    found = root.parent / "shared/data"
    if not found.is_dir(): pytest.skip(f"real images are looked for in {found}, which is absent")
    return found


def test_flowers_are_ready_soon(shared):
    start = time.perf_counter()
    dls = image_data(shared / "flowers5", device=torch.device("cpu"))
    seconds = time.perf_counter() - start
    print(f"flowers5: {seconds:.2f} s")
    assert dls.summary().loc["total", "all"] == 3670 and not len(dls.bad_files)
    assert seconds < 10, "about 1 s on two cores; other work may slow it"
    assert isinstance(dls, ImageData) and dls.one_batch()[0].shape == (64, 3, 224, 224)


def test_audits_of_real_sets(shared):
    cars = audit(shared / "cars20")
    exact = cars[cars["detail"].str.startswith("same pixels")]
    assert (exact["problem"] == "different "
            "labels").all() and len(exact) == 3, "cars that are in two classes, one in train and one in valid"
    assert not len(audit(shared / "ants_bees"))


@pytest.mark.parametrize("where", [lambda n: [n], lambda n: [*aug_transforms(size=16), n],
                                   lambda n: [n, *aug_transforms(size=16)]])
def test_normalize_among_the_augmentations_is_for_all_splits(folder, where):
    normalize = Normalize.from_stats([.5] * 3, [.25] * 3)
    dls = image_data(folder, size=16, num_workers=0, augment=where(normalize), valid=.3, test=.2)
    plain = image_data(folder, size=16, num_workers=0, augment=[], valid=.3, test=.2)
    items = [o.source for o in dls.valid.items]
    for a, b in ((dls.valid, plain.valid), (dls.test_dl(items), plain.test_dl(items)),
                 (dls.held_out(), plain.held_out())):
        assert torch.allclose(a.one_batch()[0], (b.one_batch()[0] - .5) / .25, atol=1e-5)
    assert dls.train.one_batch()[0].min() < -.5


def test_no_shared_memory_without_workers(folder, monkeypatch):
    def full(self): raise RuntimeError("unable to allocate shared memory")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    for x, _ in image_data(folder, size=16, num_workers=0).valid: assert len(x)


# ---- items as paths, as in fastai's notebooks

@pytest.mark.parametrize("source", [Path, str])
def test_items_are_used_as_paths(stripes, tmp_path, source):
    "Those of fastai's loaders are paths: the cleaner's thumbnails, `unlink`, `shutil.move`, the folder as the class"
    files = [tmp_path / label / f"{i}.png" for label in ("lying", "standing") for i in range(6)]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        shutil.copy(stripes / file.parent.name / f"0{file.stem}.png", file)
    dls = image_data(([source(f) for f in files], [f.parent.name for f in files]), size=16, bs=4, num_workers=0)
    items = [*dls.train_ds.items, *dls.valid_ds.items]
    assert sorted(Path(i) for i in items) == files and sorted(map(str, items)) == sorted(map(str, files))
    item, other = items[:2]
    assert (item.name, item.parent.name, item.exists()) == (Path(item.source).name, item.label, True)
    assert Image.open(item).size == (32, 32) and PILImage.create(item.read_bytes()) and os.path.getsize(item) > 0
    for again in (copy.deepcopy(item), pickle.loads(pickle.dumps(item)), copy.copy(item)): assert again == item
    shutil.move(str(other), tmp_path / "moved.png")
    item.unlink()
    assert not Path(item.source).exists() and not Path(other.source).exists()
    with pytest.raises(AttributeError): item.no_such_thing
    with pytest.raises(AttributeError): Sample(np.zeros((8, 8), np.uint8)).name


def test_the_cleaner_of_fastai_lists_deletes_and_moves(stripes, tmp_path, monkeypatch):
    pytest.importorskip("ipywidgets")
    import builtins
    monkeypatch.setattr(builtins, "display", lambda *args, **kwargs: None, raising=False)
    from fastai.vision.widgets import ImageClassifierCleaner
    dls = image_data(shutil.copytree(stripes, tmp_path / "data"), size=16, bs=8, num_workers=0)
    cleaner = ImageClassifierCleaner(vision_learner(dls, cnn(dls, (4,)), metrics=accuracy, seed=0))
    cleaner.widget.children[0].children[1].value = "<Delete>"
    (i,) = cleaner.delete()
    cleaner.fns[i].unlink()
    assert not Path(cleaner.fns[i]).exists() and cleaner.change() == []
