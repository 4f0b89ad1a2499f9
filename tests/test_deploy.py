"""What is shipped gives the same answers as what was trained, and what is damaged or hostile is refused."""

import json
import pickle
import random

import numpy as np
import pytest
import shipping
import torch
from fastai.metrics import accuracy
from safetensors.torch import load_file, save_file

from ftlib.data.images import image_data
from ftlib.deploy.bundle import load_bundle
from ftlib.deploy.onnx import write_onnx
from ftlib.deploy.predict import predict_images, as_predictor
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
