"""What is shipped gives the same answers as what was trained, and what is damaged or hostile is refused."""

import json
import pickle
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import shipping
import torch
from fastai.metrics import accuracy
from PIL import Image
from safetensors.torch import load_file, save_file

from ftlib.data.images import image_data
from ftlib.deploy.bundle import load_bundle
from ftlib.deploy.onnx import write_onnx
from ftlib.deploy.predict import predict_images, as_predictor, sort_into_folders
from ftlib.deploy.update import add_classes
from ftlib.errors import DeployError, RunError
from ftlib.experiment.pipeline import weights_about
from ftlib.models.cnn import cnn
from ftlib.train.vision import vision_learner


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return shipping.photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def learn(photographs):
    dls = image_data(photographs, size=16, bs=4, valid=.4, num_workers=0, seed=0)
    learn = vision_learner(dls, cnn(dls, (4, 8), linear=(8,)), metrics=accuracy, seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    return learn


@pytest.fixture(scope="module")
def shipped(learn, tmp_path_factory): return learn.bundle(tmp_path_factory.mktemp("shipped") / "red.ftl")


def test_the_learner_the_predictor_and_the_file_say_the_same(learn, shipped, photographs):
    ours, again = predict_images(learn, photographs, top=2,
                                 progress=False), load_bundle(shipped).predict_images(photographs, top=2, bs=3,
                                                                                      threads=1, progress=False)
    assert ours.drop(columns="error").equals(again.drop(columns="error")) or np.allclose(ours.probability,
        again.probability, atol=1e-6)
    probs = learn.get_preds(dl=learn.dls.test_dl(ours.path.tolist()))[0]
    assert np.allclose(ours.probability, probs.max(1).values,
                       atol=1e-5) and ours["class"].tolist() == [learn.dls.vocab[i] for i in probs.argmax(1)]


def test_asking_leaves_the_learner_as_it_was(learn, photographs):
    learn.model.train()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    predict_images(learn, photographs, progress=False)
    assert all(m.training for m in learn.model.head.modules()) and all(torch.equal(v, before[k]) for k,
        v in learn.model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff\xe0 cut off", b"%!PS-Adobe-3.0 EPSF-3.0",
                                     bytes(1000)])
def test_a_file_that_cannot_be_decoded_is_a_row(learn, photographs, tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    (tmp_path / "good.png").write_bytes((photographs / "red" / "0.png").read_bytes())
    table = predict_images(learn, tmp_path, progress=False)
    assert table.error.notna().tolist() == [True, False] and table["class"].isna().tolist() == [True,
        False] and not table.unsure[0]


def test_only_broken_files(learn, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    table = predict_images(learn, tmp_path, embeddings=True, progress=False)
    assert len(table) == 1 and table.error.notna().all() and table.embedding.isna().all()


def test_more_classes(learn, shipped, photographs):
    table = [dict(path=str(p), label=p.parent.name if i % 3 else "other") for i,
             p in enumerate(sorted(photographs.glob("*/*")))]
    import pandas as pd
    dls = image_data(pd.DataFrame(table), size=16, bs=4, valid=.4, num_workers=0, seed=0)
    more = load_bundle(shipped).learner(dls)
    old, new = learn.model.cpu().head[-1], more.model.cpu().head[-1]
    for name in ("red", "blue"):
        i, k = list(learn.dls.vocab).index(name), list(more.dls.vocab).index(name)
        assert torch.equal(old.weight[i], new.weight[k]) and torch.equal(old.bias[i], new.bias[k])
    assert all(torch.equal(a, b) for a, b in zip(learn.model.body.parameters(), more.model.body.parameters()))
    assert more.model.frozen == len(more.model.stages)


# ---- files that are not to be trusted

def refused(path):
    "Is it refused with an error of ours? Else what it says"
    try: return load_bundle(path)
    except DeployError: return None


def _flip(data, rng):
    for _ in range(rng.randint(1, 4)): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _flip_header(data, rng):
    n = int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 4)): data[rng.randrange(8 + n)] ^= 1 << rng.randrange(8)
    return data


def _cut(data, rng): return data[:rng.randrange(len(data))]
def _longer(data, rng): return data + rng.randbytes(rng.randint(1, 99))
def _moved(data, rng): return data[(k := rng.randrange(1, len(data))):] + data[:k]
def _noise(data, rng): return rng.randbytes(rng.randint(0, 500))
def _pickled(data, rng): return pickle.dumps({"about": os_system, "n": rng.random()})
def os_system(): raise AssertionError("executed")


MUTATIONS = _flip, _flip_header, _cut, _longer, _moved, _noise, _pickled


def mutated(shipped, folder, count, seed):
    "Loads so many changed copies; each is refused, or is what was written"
    data, rng, wanted, loaded = shipped.read_bytes(), random.Random(seed), load_bundle(shipped), 0
    for n in range(count):
        changed = bytes(MUTATIONS[n % len(MUTATIONS)](bytearray(data), rng))
        (folder / "changed.ftl").write_bytes(changed)
        found = refused(folder / "changed.ftl")
        if found is None: continue
        loaded += 1
        assert found.about == wanted.about and all(torch.equal(v, found.net.state_dict()[k]) for k,
                                                   v in wanted.net.state_dict().items()), (n,
                                                       MUTATIONS[n % len(MUTATIONS)])
    return loaded


def test_changed_files(shipped, tmp_path): mutated(shipped, tmp_path, 210, 0)


@pytest.mark.slow
def test_ten_thousand_changed_files(shipped, tmp_path):
    print(mutated(shipped, tmp_path, 10_000, 1), "of 10,000 changed nothing that is read")


def _of(about, **changes): return about | changes


HOSTILE = {
    "an unknown builder": lambda a: _of(a, network=a["network"] | {"builder": "eval"}),
    "an architecture that is code": lambda a: _of(a, network={"builder": "create_network",
        "arch": "__import__('os').system('true')", "n_out": 2, "n_in": 3}),
    "an architecture that is a path": lambda a: _of(a, network={"builder": "create_network", "arch": "../../etc/passwd",
                                                                "n_out": 2, "n_in": 3}),
    "a hub": lambda a: _of(a, network={"builder": "create_network", "arch": "hf_hub:somebody/something", "n_out": 2,
                                       "n_in": 3}),
    "an argument that is a file": lambda a: _of(a, network=a["network"] | {"weights": "/etc/passwd"}),
    "a huge network": lambda a: _of(a, network=a["network"] | {"channels": [1_000_000, 1_000_000],
                                                               "linear": [10_000_000]}),
    "another network": lambda a: _of(a, network={"builder": "create_network", "arch": "vgg19", "n_out": 2, "n_in": 3}),
    "texts for numbers": lambda a: _of(a, network=a["network"] | {"channels": ["16", "32"]}),
    "no classes": lambda a: _of(a, classes=[]),
    "a million classes": lambda a: _of(a, classes=[str(i) for i in range(1_000_000)]),
    "classes that are lists": lambda a: _of(a, classes=[["a"], ["b"]]),
    "a temperature of 0": lambda a: _of(a, temperature=0.),
    "a temperature that is a text": lambda a: _of(a, temperature="1"),
    "images of a billion pixels": lambda a: _of(a, image=a["image"] | {"size": 1 << 20}),
    "images of another kind": lambda a: _of(a, image={"side": 3}),
    "a negative margin": lambda a: _of(a, image=a["image"] | {"margin": -5.}),
    "a format of the future": lambda a: _of(a, format=99),
    "no fields": lambda a: {"format": 1},
    "a list": lambda a: [1, 2],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(shipped, tmp_path, name):
    from ftlib.deploy.bundle_file import bundle_about, bundle_digest
    about, weights = HOSTILE[name](bundle_about(shipped)), load_file(shipped)
    text = json.dumps(about)
    save_file(weights, tmp_path / "hostile.ftl", metadata={"ftlib": text, "sha256": bundle_digest(text, weights)})
    with pytest.raises(DeployError): load_bundle(tmp_path / "hostile.ftl")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "NaN", '{"format": 1e999}', "{", ""])
def test_hostile_json(shipped, tmp_path, text):
    save_file(load_file(shipped), tmp_path / "hostile.ftl", metadata={"ftlib": text, "sha256": "0"})
    with pytest.raises(DeployError): load_bundle(tmp_path / "hostile.ftl")
    with pytest.raises((DeployError, RunError)): weights_about(tmp_path / "hostile.ftl")


def test_a_link_and_a_pipe(shipped, tmp_path):
    import os
    (tmp_path / "link.ftl").symlink_to(shipped)
    assert load_bundle(tmp_path / "link.ftl").classes == ["blue", "red"]
    os.mkfifo(tmp_path / "pipe.ftl")
    with pytest.raises(DeployError, match="regular"): load_bundle(tmp_path / "pipe.ftl")


FEW = ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "timm:mobilenetv3_small_050", "timm:vit_tiny_patch16_224",
       "timm:convnext_atto"]
MORE = [arch for arch in shipping.architectures() if arch not in FEW]
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in MORE]


@pytest.mark.parametrize("arch", [*FEW, *SLOW])
def test_architectures_by_name(photographs, tmp_path, arch):
    "Built again from the file, an architecture gives the same answers to the bit"
    learn = shipping.untrained(photographs, arch)
    found = load_bundle(learn.bundle(tmp_path / "net.ftl"))
    ours, again = (p.predict_images(photographs, top=2, progress=False) for p in (as_predictor(learn), found))
    assert ours.equals(again) and ours.probability.notna().all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*FEW, *MORE])
def test_architectures_as_onnx(photographs, tmp_path, arch):
    pytest.importorskip("onnxscript")
    images = sorted(photographs.glob("*/*"))[::3]
    table = write_onnx(as_predictor(shipping.untrained(photographs, arch)), tmp_path / "net.onnx", images)
    assert len(table) == len(images) and table.difference.max() < 1e-4, table


# ---- names, labels and settings

def test_each_class_has_a_folder_of_its_own(tmp_path):
    "Names that the file system cannot have, and the name of the folder of unsure images"
    classes = ["unsure", "a/b", "a_b", "a\\b", "..", ".", "", " ", "_", "a\nb", "é" * 200, "é" * 201, "~", "-rf", "a"]
    (tmp_path / "x.png").write_bytes(b"x")
    table = pd.DataFrame(dict(path=[str(tmp_path / "x.png")] * 16, unsure=[False] * 15 + [True], error=[None] * 16))
    table["class"] = pd.Series([*classes, "a"], dtype=object)
    counts = sort_into_folders(table, tmp_path / "sorted")
    assert len(counts) == 16 and set(counts) == {1} and counts["unsure"] == counts["a"] == counts["a_b"] == 1
    assert sorted(p.name for p in (tmp_path / "sorted").iterdir()) == sorted(counts.index)
    again = sort_into_folders(table[3:4], tmp_path / "sorted")  # one batch after another
    assert again.index[0] in counts.index and sorted(p.name for p in tmp_path.iterdir()) == ["sorted", "x.png"]


@pytest.mark.parametrize("given", [dict(threshold=float("nan")), dict(threshold="high"), dict(threshold=True),
                                   dict(threads=-1), dict(threads=0), dict(threads=1.5)], ids=str)
def test_settings_of_a_prediction(learn, photographs, given):
    with pytest.raises(DeployError, match=next(iter(given))):
        predict_images(learn, photographs, progress=False, **given)


@pytest.mark.parametrize("given", [dict(tolerance=float("nan")), dict(tolerance=-1), dict(tolerance="small"),
                                   dict(max_drop=float("nan")), dict(calibrate=0), dict(calibrate=2.5)], ids=str)
def test_settings_of_an_export(learn, tmp_path, given):
    "A comparison with NaN is never true: nothing would be checked"
    pytest.importorskip("onnxscript")
    with pytest.raises(DeployError, match=next(iter(given))):
        write_onnx(learn, tmp_path / "net.onnx", int8=True, **given)
    assert not list(tmp_path.iterdir())


def test_labels_are_those_of_the_images_that_are_compared(photographs, tmp_path):
    "Images in memory of which one is broken, other images, and paths written in another way"
    pytest.importorskip("onnxscript")
    files = sorted(photographs.glob("*/*"))
    data = [f.read_bytes() for f in files]
    data[1] = data[1][:200]
    source = pd.DataFrame(dict(path=data, label=[f.parent.name for f in files],
                               split=[("train", "valid")[i % 2] for i in range(len(files))]))
    dls = image_data(source, size=16, bs=4, num_workers=0, seed=0)
    learn = vision_learner(dls, cnn(dls, (4, 8), linear=(8,)), metrics=accuracy, seed=0)
    table = write_onnx(learn, tmp_path / "a.onnx", int8=True, max_drop=1, calibrate=4)
    held = [f.parent.name for i, f in enumerate(files) if i % 2]
    assert 0 < len(table) <= len(held) and table["label"].to_dict() == {i: held[i] for i in table.index}
    with pytest.raises(DeployError, match="whose classes are known"):
        write_onnx(learn, tmp_path / "b.onnx", data[2:6], int8=True, max_drop=1)
    with pytest.raises(DeployError, match="can be decoded"): write_onnx(learn, tmp_path / "c.onnx", [b"no image"] * 2)
    dls = image_data(photographs, size=16, bs=4, valid=.4, num_workers=0, seed=0)
    learn = vision_learner(dls, cnn(dls, (4, 8), linear=(8,)), metrics=accuracy, seed=0)
    some = [f"{photographs}/red/../{i.source.parent.name}/{i.source.name}" for i in dls.valid_ds.items[:3]]
    table = write_onnx(learn, tmp_path / "d.onnx", [*some, data[0]], int8=True, max_drop=1)
    assert table["label"].dropna().tolist() == [str(i.label) for i in dls.valid_ds.items[:3]]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".onnx" and p.name in ("b.onnx", "c.onnx")] == []


def test_more_classes_are_judged_on_images_that_did_not_train(photographs, tmp_path):
    "Another split of the old images: those that were trained on before count nowhere"
    for i in range(10): (tmp_path / "data" / "green").mkdir(parents=True, exist_ok=True)
    for label in ("red", "blue"): (tmp_path / "data" / label).symlink_to(photographs / label)
    for i in range(10): Image.new("RGB", (30, 30), (0, 20 * i, 0)).save(tmp_path / "data" / "green" / f"{i}.png")
    old = image_data(photographs, size=16, bs=4, valid=.4, num_workers=0, seed=0)
    learn = vision_learner(old, cnn(old, (4,), linear=(8,)), metrics=accuracy, seed=0)
    new = image_data(tmp_path / "data", size=16, bs=4, valid=.4, num_workers=0, seed=3)
    trained = {i.source.resolve() for i in old.train_ds.items}
    fresh = [i for i in new.valid_ds.items if i.source.resolve() not in trained]
    assert len(fresh) < len(new.valid_ds)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match="were training images"):
        table = add_classes(learn, new, 1, 1e-3).added_classes.set_index("classes")
    assert table["images"].get("old classes, after", 0) == sum(i.label != "green" for i in fresh)
    assert table["images"]["new classes, after"] == 4
    same = pd.DataFrame(dict(path=[str(i.source) for d in (old, new) for i in [*d.train_ds.items, *d.valid_ds.items]
                                   if d is old or i.label == "green"],
                             label=[i.label for d in (old, new) for i in [*d.train_ds.items, *d.valid_ds.items]
                                    if d is old or i.label == "green"],
                             split=[s for d in (old, new) for s, part in (("train", d.train_ds), ("valid", d.valid_ds))
                                    for i in part.items if d is old or i.label == "green"]))
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter("error", UserWarning)
        table = add_classes(learn, image_data(same, size=16, bs=4, num_workers=0), 1, 1e-3).added_classes
    assert table["images"].tolist() == [8, 8, 4]
