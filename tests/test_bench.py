"""The benches run: each on a few tiny images, to see that it still works; nothing is timed."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

TINY = ("--sets", "stripes", "--size", "32", "--bs", "4", "--epochs", "1", "--seeds", "0", "--images", "16", "--valid",
    "8")
STREAM = "--sets", "stripes", "--size", "32", "--bs", "4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a set of stripes, and a file of weights"
    folder = tmp_path_factory.mktemp("bench")
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("valid", 4)):
        for label in ("lying", "standing"):
            (folder / "data" / "stripes" / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = np.zeros((40, 40, 3), np.uint8)
                pixels[rng.integers(0, 3)::6] = 255
                image = Image.fromarray(pixels if label == "lying" else pixels.transpose(1, 0, 2))
                image.save(folder / "data" / "stripes" / split / label / f"{i}.png")
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    return folder


@pytest.mark.parametrize("name,args,columns", [
    ("fine_tune", TINY, {"set", "way", "accuracy", "head", "peak", "seconds"}),
    ("lr_accuracy", (*TINY, "--states", "unfrozen", "--grid", "1e-4", "1e-3", "1"), {"state", "way", "lr", "accuracy"}),
    ("stream", (*STREAM, "--rounds", "1", "--per-shard", "8", "--workers", "0"), {"set", "way", "workers", "images/s"}),
    ("batch_norm", (*TINY, "--lrs", "1e-4"), {"bn", "lr", "accuracy", "peak"}),
    ("peak", (*STREAM, "--rounds", "1", "--n", "1", "--matrix", "64"), {"way", "precision", "images/s", "share"}),
    ("few_weights", (*TINY, "--lrs", "1e-3"), {"way", "lr", "accuracy", "head", "momenta", "file", "step"}),
    ("image_sizes", (*(a for a in TINY if a not in ("--size", "32")), "--epochs", "2", "--pixels", "16", "32"),
     {"pixels", "way", "accuracy", "head", "cpu"}),
    ("bodies", (*TINY, "--bodies", "resnet18", "tf_efficientnet_lite0"),
     {"body", "chosen", "probe", "accuracy", "seconds of choosing"}),
    ("best", (*STREAM, "--seeds", "0", "--ways", "best:.1", "ftlib:1", "fastai:1", "torch:1", "hf:1", "--figure",
              "best.png"), {"set", "way", "accuracy", "low", "high", "seconds"}),
])
def test_a_bench_runs(root, place, name, args, columns):
    out = place / f"{name}.csv"
    command = [sys.executable, "-W", "ignore", root / "bench" / f"{name}.py", "--data", place / "data", "--weights",
               place / "resnet18.pth", "--out", out, *args]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert columns <= set(pd.read_csv(out))


def test_the_bench_of_predictions_runs(root, place):
    "Another kind of arguments: files, of which some are broken"
    out = place / "predict.csv"
    args = "--sets", "stripes", "--size", "32", "--bs", "4", "--files", "20", "--broken", "2"
    command = [sys.executable, "-W", "ignore", root / "bench" / "predict.py", "--data", place / "data", "--weights",
               place / "resnet18.pth", "--out", out, *args]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(out).set_index(["way", "files"])
    assert table.loc[("predict", 20), "images"] == 18 and table.loc[("predict", 20), "errors"] == 2
    assert ((table["images/s"] > 0) == (table["images"] > 0)).all()


def test_the_bench_of_shipping_runs(root, place):
    "An architecture that can be shipped, and one that does not exist"
    out = place / "shipping.csv"
    command = [sys.executable, "-W", "ignore", root / "bench" / "shipping.py", "--out", out, "--archs",
               "timm:test_resnet", "timm:resnet81"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    good, unknown = pd.read_csv(out).to_dict("records")
    assert good["bundle"] in (True, "True") and good["onnx"] < 1e-4 and good["changed"] == 0, good
    assert "resnet81" in unknown["refused"] and pd.isna(unknown["onnx"])


def test_the_bench_of_timms_sizes_runs(root, place):
    "Two families, one of which is built for a size; what is there already is not run again"
    out = place / "timm_sizes.csv"
    command = [sys.executable, "-W", "ignore", root / "bench" / "timm_sizes.py", "--families", "mobilenetv3", "deit",
               "--sizes", "64", "96", "--out", out]
    for _ in range(2):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(out).set_index(["family", "size"])
    assert len(table) == 4 and (table.outcome == "works").all()
    assert table.loc[("deit", 64), "message"] == "built with img_size=64"


@pytest.mark.slow
def test_every_family_of_timm_works_or_says_why_not(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "bench"))
    import timm_sizes
    found = {(name, size): timm_sizes.built(name, size) for name in timm_sizes.families().values()
             for size in (96, 160, 200, 224)}
    assert len(found) > 300 and not {k: v["message"] for k, v in found.items() if v["outcome"] == "failure"}
    assert all("Use images of its own size" in v["message"] for v in found.values() if v["outcome"] == "ArchError")
    assert sum(v["outcome"] == "works" for v in found.values()) > .9 * len(found)
