"""What a folder of images may hold besides images: links, other splits, other formats, pipes. Nothing is dropped,
doubled or run in silence."""

import os
import subprocess
import warnings

import numpy as np
import pytest
from PIL import Image

from ftlib.data.images import image_data
from ftlib.errors import DataError, ImageError
from ftlib.data.decode import check_file, open_image
from ftlib.data.sources import read_source


def classes(folder, *names, n=5):
    "A folder with `n` images for each class"
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def counts(folder): return read_source(folder).table["label"].value_counts().to_dict()


# ---- links

@pytest.mark.parametrize("link,target", [("a/loop", "a"), ("a/up", "."), ("b/up", "."), ("a/deep/loop", "a")])
def test_links_that_lead_round(tmp_path, link, target):
    classes(tmp_path, "a", "b")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / target)
    table = read_source(tmp_path).table
    real = [os.path.realpath(p) for p in table["item"]]
    assert len(real) == len(set(real)) == 10


def test_two_links_that_lead_round_end(tmp_path):
    classes(tmp_path, "a", "b")
    for name in "ab": (tmp_path / name / "up").symlink_to("..")
    assert sum(counts(tmp_path).values()) == 10


def test_a_link_to_an_image_in_the_same_set_counts_once(tmp_path):
    classes(tmp_path, "a", "b")
    (tmp_path / "b" / "again.png").symlink_to(tmp_path / "a" / "0.png")
    assert counts(tmp_path) == {"a": 5, "b": 5}


def test_a_class_of_links_to_another_class_is_an_error(tmp_path):
    classes(tmp_path, "a", "b")
    (tmp_path / "c").mkdir()
    for i in range(5): (tmp_path / "c" / f"{i}.png").symlink_to(tmp_path / "a" / f"{i}.png")
    with pytest.raises(DataError, match="class 'c' has no image of its own"): read_source(tmp_path)


def test_links_to_elsewhere_are_followed(tmp_path):
    classes(tmp_path / "store", "x")
    classes(tmp_path / "set", "b")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "store" / "x")
    assert counts(tmp_path / "set") == {"a": 5, "b": 5}


# ---- splits

@pytest.mark.parametrize("name,meant", [("eval", "valid"), ("validate", "valid"), ("val_set", "valid"),
                                        ("test_set", "test"), ("testset", "test"), ("holdout", "test"),
                                        ("train2", "train")])
def test_a_folder_like_a_split_is_not_ignored(tmp_path, name, meant):
    for split in ("train", name): classes(tmp_path / split, "a", "b")
    with pytest.raises(DataError, match=f"{name}.*Did you mean '{meant}'"): read_source(tmp_path)


def test_classes_that_sound_like_splits(tmp_path):
    "Without a train folder there are no splits, and a valley is a class"
    classes(tmp_path, "valley", "testament")
    assert counts(tmp_path) == {"valley": 5, "testament": 5}


def test_folders_with_other_names_beside_train(tmp_path):
    classes(tmp_path / "train", "a", "b")
    (tmp_path / "annotations").mkdir()
    assert counts(tmp_path) == {"a": 5, "b": 5}


# ---- files that are not read

def test_other_endings_are_told(tmp_path):
    classes(tmp_path, "a", "b")
    for i in range(7): (tmp_path / "a" / f"{i}.heic").write_bytes(b"\0" * 99)
    for i in range(3): Image.new("RGB", (9, 9)).save(tmp_path / "b" / f"image{i}", "PNG")
    with pytest.warns(UserWarning, match=r"10 files are left out.*7 with \.heic, 3 with no ending"):
        found = counts(tmp_path)
    assert found == {"a": 5, "b": 5}


@pytest.mark.parametrize("ending", [".heic", ".jxl", ".svg", ""])
def test_a_class_that_would_vanish_is_an_error(tmp_path, ending):
    classes(tmp_path, "a", "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"image{ending}").write_bytes(b"\0" * 99)
    with pytest.raises(DataError, match="class 'c' has no image left"): read_source(tmp_path)


def test_a_folder_of_notes_is_no_class(tmp_path):
    classes(tmp_path, "a", "b")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.txt").write_text("text")
    with pytest.warns(UserWarning, match="1 with .txt"): assert counts(tmp_path) == {"a": 5, "b": 5}


def test_images_alone_say_nothing(tmp_path):
    classes(tmp_path, "a", "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_source(tmp_path)


# ---- no programs, no pipes

@pytest.mark.parametrize("name", ["cat.jpg", "cat.eps", "cat.png"])
def test_a_drawing_runs_no_program(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n{ } "
                                  b"loop\n%%EOF\n")
    def run(*args, **kwargs): raise AssertionError("a program was run")
    monkeypatch.setattr(subprocess, "Popen", run)
    assert check_file(tmp_path / name)[0] == "not an image"
    with pytest.raises(ImageError): open_image(tmp_path / name)


def test_a_pipe_does_not_hang(tmp_path):
    classes(tmp_path, "a", "b")
    os.mkfifo(tmp_path / "a" / "x.jpg")
    assert check_file(tmp_path / "a" / "x.jpg")[0] == "not an image"
    with pytest.raises(ImageError, match="not a regular file"): open_image(tmp_path / "a" / "x.jpg")
    with pytest.warns(UserWarning, match="x.jpg"): dls = image_data(tmp_path, size=8, num_workers=0)
    assert dls.summary().loc["total", "all"] == 10
