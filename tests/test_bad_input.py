"""What can't be done as asked: what came, what was wanted and what to do; in the shell as one line."""

import subprocess
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from PIL import Image

from ftlib.cli.parser import main
from ftlib.data.audit import audit
from ftlib.data.images import image_data
from ftlib.errors import DataError, ImageError
from ftlib.errors import ArchError
from ftlib.models.backbone import create_network
from ftlib.models.cnn import cnn
from ftlib.errors import WeightsError
from ftlib.errors import RunError
from ftlib.experiment.pipeline import fine_tune_run
from ftlib.errors import TrainError
from ftlib.train.learner import Learner
from ftlib.errors import CurveError
from ftlib.metrics.metric import top_k
from ftlib.errors import RateError
from ftlib.train.vision import vision_learner


def fill(folder, classes="ab", n=8):
    "A folder of small JPEGs"
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / name / f"{i}.jpg")
    return folder


def break_inside(path):
    "Only decoding shows that this image is broken"
    data = bytearray(path.read_bytes())
    at = data.find(b"\xff\xc4") + 5
    data[at:at + 16] = b"\xff" * 16
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path): return fill(tmp_path / "pets")


def build(source, **kw):
    return image_data(source, **{"size": 16, "bs": 4, "num_workers": 0, "device": torch.device("cpu"), **kw})


def learner(dls, **kw): return vision_learner(dls, cnn(dls, channels=(8,), linear=()), **kw)


def quietly(learn, call, *args, **kw):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, call)(*args, **kw)


# ---- images and labels; more in test_data.py

@pytest.mark.parametrize("kw,said", [
    (dict(size=-3), "size=-3: give an integer of at least 1"), (dict(size=2.5), "size=2.5"), (dict(bs=0), "bs=0"),
    (dict(num_workers=-1), "num_workers=-1"), (dict(seed=-1), "seed=-1"), (dict(seed=None), "seed=None"),
    (dict(valid="a fifth"), "valid='a fifth'"), (dict(test=-.1), "test=-0.1"), (dict(names=3), "names is a int"),
    (dict(names="gone.json"), "cannot read names=")], ids=str)
def test_settings(folder, kw, said):
    with pytest.raises(DataError, match=said): build(folder, **kw)


def test_a_root_that_is_not_there(folder):
    with pytest.raises(DataError, match="pet does not exist.*Did you mean 'pets'"):
        build((["a/0.jpg"], ["a"]), root=folder.parent / "pet")


def test_numpys_whole_numbers_are_whole(folder): assert build(folder, size=np.int64(16), bs=np.int32(4)).train.bs == 4


def test_an_empty_class_is_reported(folder):
    (folder / "c").mkdir()
    with pytest.warns(UserWarning, match="no images in .*/c: it is not used as a class") as said:
        assert list(build(folder).vocab) == ["a", "b"]
    assert [Path(w.filename).name for w in said] == ["test_bad_input.py"], "the user's own line is shown"
    found = audit(folder, few=1, deep=False)
    assert found[["problem", "label"]].values.tolist() == [["few images", "c"]]


def test_given_splits_without_a_class(tmp_path):
    fill(tmp_path / "train", "ab"), fill(tmp_path / "valid", "a")
    with pytest.warns(UserWarning, match="'b'.*without an image in valid: its accuracy there is unknown"):
        build(tmp_path)
    fill(tmp_path / "test", "c", n=1)
    with pytest.raises(DataError, match=r"1 class \('c'\) in test but not in train"): build(tmp_path)


@pytest.mark.parametrize("text,said", [
    ("", "as a CSV table"), ("path,label\n", "no rows"),
    ("path,label\na/0.jpg,\na/1.jpg,a\n", "1 of 2 images have no label, first .*0.jpg"),
    ("path,label\n,a\n", "1 rows have no 'path', the first is row 0"),
    ("picture,kind\na/0.jpg,a\n", "cannot find the column of the label"),
    ("path,label,split\na/0.jpg,a,train\na/1.jpg,a,train\nb/0.jpg,b,train\nb/1.jpg,bb,valid\n",
     "but not in train. Did you mean 'b'"),
    ("path,label,split\na/0.jpg,a,train\nb/0.jpg,b,tarin\n", "'tarin' is not a split.*Did you mean 'train'")])
def test_tables(folder, text, said):
    (folder / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=said): build(folder / "labels.csv")


@pytest.mark.parametrize("labels,said", [
    (np.eye(2)[[0, 1] * 4], "a label is a ndarray"), (torch.eye(2)[[0, 1] * 4], "a label is a Tensor"),
    ([["a"], ["a", "b"]] * 4, "a label is a list")], ids=["one-hot", "tensors", "lists"])
def test_more_than_one_class_an_image(labels, said):
    images = [np.zeros((20, 20, 3), np.uint8)] * 8
    columns = {"image": images, "label": labels}
    for source in ((images, labels), columns, pd.DataFrame({**columns, "label": list(labels)})):
        with pytest.raises(DataError, match=f"{said}.*give each image one class"): build(source)


def test_a_list_of_names_has_one_a_class(folder):
    with pytest.raises(DataError, match="names has 3 entries for 2 classes"): build(folder, names=["x", "y", "z"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_that_can_not_be_decoded(folder, workers):
    for file in (folder / "b").iterdir(): break_inside(file)
    with pytest.raises(ImageError) as e, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(build(folder, num_workers=workers).train)
    assert str(e.value).startswith("none of the images of 'b' in this split can be opened; the first: ")
    assert "\n" not in str(e.value), "nothing of the worker's traceback"


def test_images_in_memory_that_are_nan():
    images = [np.full((20, 20, 3), np.nan)] * 8
    with pytest.raises(ImageError, match="from nan to nan as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build((images, ["a", "b"] * 4)).one_batch()


# ---- networks and weights

@pytest.mark.parametrize("arch,said", [("resnt18", "Did you mean 'resnet18'"),
                                       ("timm/resnt18", "Did you mean 'resnet18'"),
                                       ("efficientnet-b0", "Did you mean.*efficientnet_b0"),
                                       ("mein netz", "no model 'mein netz'"), (7, "no model '7'")])
def test_names_of_networks(arch, said):
    with pytest.raises(ArchError, match=said): create_network(arch, 2, weights=None)


def test_weights_of_another_architecture(tmp_path):
    file = tmp_path / "small.pth"
    torch.save(create_network("squeezenet1_1", 2, weights=None).state_dict(), file)
    with pytest.raises(WeightsError, match="small.pth do not match resnet18: 0 of .*the same architecture"):
        create_network("resnet18", 2, weights=file)
    file.write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="small.pth contains no weights that can be read safely"):
        create_network("resnet18", 2, weights=file)
    with pytest.raises(WeightsError, match="no weights file at .*smal.pth; in that folder: small.pth"):
        create_network("resnet18", 2, weights=tmp_path / "smal.pth")
    with pytest.raises(WeightsError, match="no weights 'imagnet' for resnet18: it has IMAGENET1K_V1"):
        create_network("resnet18", 2, weights="imagnet")


@pytest.mark.parametrize("make,said", [
    (lambda: create_network("resnet18", 0, weights=None), "n_out=0"),
    (lambda: create_network("resnet18", 2, weights=None, n_in=0), "n_in=0"),
    (lambda: cnn(2, size=-1), "size=-1"), (lambda: cnn(0), "n_out=0"),
    (lambda: cnn(2, channels=()), "give the channels"),
    (lambda: cnn(2, linear=(0,)), r"linear\[0\]=0")], ids="n_out n_in size classes channels linear".split())
def test_sizes_of_networks(make, said):
    with pytest.raises(ArchError, match=said): make()


@pytest.mark.parametrize("arch", ["vit_b_32", "timm/densenet121"])
def test_images_that_a_network_cannot_take(folder, arch):
    with pytest.raises(ArchError, match=r"cannot (process|be built for) 16×16 images.*Use images of its own size"):
        vision_learner(build(folder), arch, weights=None)


# ---- training

@pytest.mark.parametrize("call,args,kw", [
    ("fit", (1, -1e-3), {}), ("fit", (1, 0), {}), ("fit_one_cycle", (1, slice(-1e-5, 1e-3)), {}),
    ("fit_flat_cos", (1, [1e-3, -1e-3]), {}),
    ("fine_tune", (1, -1e-3), {}), ("fit", (1, "fast"), {}), ("fit", (1, 1e-3), dict(factors=[-1, 1])),
    ("lr_find", (), dict(start_lr=-1)),
    ("gradual_unfreeze", (1, -1.), {}), ("lr_find", (), dict(start_lr=1, end_lr=.1)),
    ("lr_find", (), dict(num_it=0))], ids=str)
def test_rates(folder, call, args, kw):
    learn = learner(build(folder))
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(RateError, match="rate|start_lr|num_it"): quietly(learn, call, *args, **kw)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and not len(learn.history)


def test_a_rate_for_the_learner(folder):
    with pytest.raises(RateError, match="above zero, got -1"): learner(build(folder), lr=-1).fit(1)
    with pytest.raises(ValueError, match="integer number of classes, 1 or more"): top_k(0)


def with_nan_weights(folder):
    learn = learner(build(folder))
    with torch.no_grad(): learn.model.stages[0][0].weight.fill_(np.nan)
    return learn


def with_nan_images(folder):
    pairs = [(torch.full((3, 16, 16), np.nan), torch.tensor(i % 2)) for i in range(16)]
    dls = DataLoaders.from_dsets(pairs, pairs, bs=4, device="cpu", num_workers=0)
    return Learner(dls, cnn(2, channels=(8,), linear=(), size=16), loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize("make", [with_nan_weights, with_nan_images])
@pytest.mark.parametrize("call", ["fit", "fit_one_cycle", "fine_tune", "lr_find"])
def test_a_loss_of_nan_from_the_first_batch(folder, make, call, recwarn):
    learn = make(folder)
    head = learn.model.head[-1].weight.clone()
    with pytest.raises(CurveError if call in ("lr_find", "fine_tune") else TrainError) as e:
        quietly(learn, call, *(() if call == "lr_find" else (1,)))
    assert str(e.value).startswith("the loss of the first batch is nan") and "the weights for NaN" in str(e.value)
    assert torch.equal(learn.model.head[-1].weight, head) and not len(learn.history)
    assert not [w for w in recwarn if "scalar" in str(w.message)], "it is said without a warning of torch's"


def test_a_run_without_validation_images(folder):
    with pytest.raises(RunError, match="no validation set.*valid=.2"):
        fine_tune_run(learner(build(folder, valid=0)), 1, 0, 1e-3)


# ---- the same in the shell; more in test_cli.py

@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    "Runs `ftlib ARGS`: the exit code, and the lines on the error stream"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(args):
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            try: code = main(args.split())
            except SystemExit as stop: code = stop.code
        lines = capsys.readouterr().err.strip().splitlines()
        warned = [s for s in lines if s.startswith("ftlib: warning: ")]
        return subprocess.CompletedProcess(args, code, stdout=warned, stderr=[s for s in lines if s not in warned])
    return run


NAN = "pets --arch squeezenet1_1 --size 32 --bs 4 --weights nan.pth"
TRAIN = "--arch cnn --size 16 --bs 4 --epochs 1 --lr 1e-3"


def nan_weights(folder):
    whole = create_network("squeezenet1_1", 2, weights=None).body.state_dict()
    state = {k: v * np.nan if v.is_floating_point() else v for k, v in whole.items()}
    torch.save(state, folder / "nan.pth")


def only_one(folder): fill(folder / "one", "a")
def nothing(folder): (folder / "empty").mkdir()
def nothing_whole(folder): [p.write_bytes(b"x") for p in fill(folder / "bad").rglob("*.jpg")]
def nothing_decodes(folder): [break_inside(p) for p in (fill(folder / "bad") / "b").iterdir()]
def no_train(folder): fill(folder / "split/train", "a"), fill(folder / "split/valid", "ab")
def unlabelled(folder): (folder / "t.csv").write_text("path,label\npets/a/0.jpg,a\npets/b/0.jpg,\n")
def unknown(folder):
    rows = "pets/a/0.jpg,a,train\npets/b/0.jpg,b,train\npets/b/1.jpg,c,valid\n"
    (folder / "t.csv").write_text("path,label,split\n" + rows)
def missing(folder): (folder / "t.csv").write_text("path,label\na/0.jpg,a\nb/0.jpg,b\n")
def of_another(folder):
    torch.save(create_network("squeezenet1_1", 2, weights=None).state_dict(), folder / "other.pth")


@pytest.mark.parametrize("args,prepare,error,said", [
    (f"train empty {TRAIN}", nothing, "DataError", "no images in it"),
    (f"train one {TRAIN}", only_one, "DataError", "a classifier needs at least two"),
    (f"train bad {TRAIN}", nothing_whole, "DataError", "none of the 16 images can be used"),
    (f"train bad {TRAIN}", nothing_decodes, "ImageError", "none of the images of 'b'"),
    (f"train split {TRAIN}", no_train, "DataError", "in valid but not in train"),
    (f"train t.csv {TRAIN}", unlabelled, "DataError", "1 of 2 images have no label"),
    (f"train t.csv {TRAIN}", unknown, "DataError", "but not in train"),
    (f"train t.csv {TRAIN}", missing, "DataError", "missing, no such file"),
    (f"train pets {TRAIN} --valid 0", None, "RunError", "no validation set"),
    (f"train pets {TRAIN} --bs 0", None, "DataError", "bs=0"),
    ("train pets --arch resnt18", None, "ArchError", "Did you mean 'resnet18'"),
    ("train pets --arch resnet18 --weights other.pth", of_another, "WeightsError", "do not match resnet18"),
    ("train pets --arch resnet18 --weights imagnet", None, "WeightsError", "no weights 'imagnet'"),
    (f"train {NAN} --lr 1e-3", nan_weights, "TrainError", "the loss of the first batch is nan"),
    (f"train {NAN}", nan_weights, "CurveError", "the loss of the first batch is nan"),
    (f"lr-find {NAN}", nan_weights, "CurveError", "the loss of the first batch is nan"),
    ("audit empty", nothing, "DataError", "no images in it"),
    ("audit pets --csv pets", None, "IsADirectoryError", "give the name of a file in it"),
], ids=lambda v: v.__name__ if callable(v) else None)
def test_in_the_shell_one_line_and_exit_2(shell, folder, args, prepare, error, said):
    if prepare: prepare(folder.parent)
    done = shell(args)
    assert done.returncode == 2 and len(done.stderr) == 1, done
    assert done.stderr[0].startswith(f"ftlib: {error}: ") and said in done.stderr[0]
    assert "Exception occured" not in done.stderr[0], "nothing of the callback that noticed it"


def test_usage_in_the_shell(shell):
    for args, said in (("train x --lr -1", "neither 'auto' nor a number above zero"),
                       ("train x --size -3", "'-3' is not an integer"),
                       ("train x --seed -1", "'-1' is not an integer"),
                       ("demo --on moon", "invalid choice: 'moon'")):
        done = shell(args)
        assert done.returncode == 2 and said in done.stderr[-1], done


def test_reports_in_the_shell(shell, folder):
    "What is wrong but can be done: a line each, and the run goes on"
    fill(folder, "c", n=1)
    (folder / "d").mkdir()
    (folder / "a/0.jpg").write_bytes(b"")
    done = shell(f"train pets {TRAIN}")
    assert done.returncode == 0 and not done.stderr, done
    assert [s.split(": ", 2)[2].split(" (")[0] for s in done.stdout] == [
        "no images in pets/d: it is not used as a class.", "1 of 17 files are left out", "1 class"]
    assert "single image" in done.stdout[2]


def test_places_are_made(shell, folder):
    assert shell("models resnet18 --csv lists/new/models.csv").returncode == 0
    assert "resnet18" in set(pd.read_csv(folder.parent / "lists/new/models.csv")["name"])


def test_exit_codes_are_documented(capsys):
    with pytest.raises(SystemExit): main(["--help"])
    told = capsys.readouterr().out.split("exit codes:")[1]
    assert [line.split()[0] for line in told.strip().splitlines()] == ["0", "1", "2", "130"]
