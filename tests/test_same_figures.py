"""`ftlib train`, `ftlib evaluate` and Python give the same figures of the same images, and the folder of the images
stays as it is."""

import hashlib
import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ftlib import load_bundle
from ftlib.cli.parser import main

rng = np.random.default_rng(0)


def image(path, tint, side=24):
    pixels = rng.normal(110, 45, (side, side, 3)) + np.eye(3)[tint % 3] * 22
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)


def folder_of_classes(root):
    for c, label in enumerate(("Ångström", "b b")):
        for i in range(30): image(root / label / f"{i}.png", c)
    return root


def folder_of_splits(root):
    for split, n in (("train", 16), ("valid", 9), ("test", 4)):
        for c in range(3):
            for i in range(n): image(root / split / f"class {c}" / f"{split}{i}.jpg", c)
    return root


def table(root):
    rows = []
    for i in range(54):
        image(root / "images" / f"{i:03}.png", i % 3)
        rows.append((f"images/{i:03}.png", ["x", "y", "z"][i % 3], "valid" if i % 5 == 0 else "train"))
    pd.DataFrame(rows, columns=["path", "label", "split"]).to_csv(root / "table.csv", index=False)
    return root / "table.csv"


def fingerprint(root):
    "Names, sizes, times and contents of everything in a folder"
    return {str(p.relative_to(root)): (p.stat().st_mtime_ns, p.stat().st_size,
                                       hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "")
                                       for p in sorted(root.rglob("*"))}


@pytest.mark.parametrize("make, options", [(folder_of_classes, ["--seed", "5", "--valid", ".3"]),
                                           (folder_of_splits, []), (table, ["--seed", "9"])],
                                           ids=["classes", "splits", "table"])
def test_train_evaluate_and_python_agree(tmp_path, monkeypatch, capsys, make, options):
    (tmp_path / "data").mkdir()
    source, out = make(tmp_path / "data"), tmp_path / "out"
    before = fingerprint(tmp_path / "data")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert not main(["train", str(source), "--arch", "cnn", "--size", "16", "--bs", "8", "--epochs", "2", "--lr",
                     "3e-3", "--out", str(out), *options])
    assert not main(["evaluate", str(source), "--model", str(out / "model.ftl"), "--out",
                     str(tmp_path / "judged")])
    capsys.readouterr()
    split = pd.read_csv(out / "split.csv")
    held = split[split["split"] == "valid"]
    for name in ("figures", "per_class", "confusion", "calibration"):
        trained, judged = (pd.read_csv(place / f"{name}.csv") for place in (out, tmp_path / "judged"))
        pd.testing.assert_frame_equal(trained, judged, rtol=1e-3, atol=1e-5)
    # in Python, from the bundle, on the images that were held out, and on no other
    classes = pd.read_csv(out / "per_class.csv")
    assert classes["images"].sum() == len(held) and dict(zip(classes["class"],
        classes["images"])) == held["label"].astype(str).value_counts().to_dict()
    files = [p if os.path.isabs(p) else str((source if source.is_dir() else source.parent) / p) for p in held["path"]]
    found = load_bundle(out / "model.ftl").predict_images(files)
    right = (found["class"].to_numpy() == held["label"].astype(str).to_numpy()).sum()
    assert found["error"].isna().all() and right == classes["right"].sum()
    assert right / len(held) == pytest.approx(pd.read_csv(out / "summary.csv")["top1"].iloc[-1])
    # a training image that counted would have made other figures
    trained_on = set(split.loc[split["split"] == "train", "path"])
    errors = pd.read_csv(tmp_path / "judged" / "errors.csv")
    column = next(c for c in errors if "path" in c or "image" in c or "file" in c)
    assert not {p for p in trained_on for e in errors[column].astype(str) if e.endswith(str(p))}
    assert len(errors) == len(held) - right
    assert fingerprint(tmp_path / "data") == before, "something was written into the folder of the images"
    assert not list((tmp_path / "work").iterdir()), "something was written into the working folder"
