"""Each command as the shell runs it, on a small folder of made images: what it prints, writes and exits with."""

import os
import shutil
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from fastai.metrics import accuracy

from ftlib.cli.parser import main
from ftlib.data.images import image_data
from ftlib.models.cnn import cnn
from ftlib.train.vision import vision_learner

REPORT = {"report.html", *(f"{n}.csv" for n in ("figures", "per_class", "confusion", "errors", "calibration"))}
SMALL = "--arch cnn --size 32 --bs 8".split()


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    "Runs `ftlib ARGS` in an empty folder; gives what the finished process would"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(*args):
        capsys.readouterr()
        with warnings.catch_warnings():
            try: code = main([str(a) for a in args])
            except SystemExit as stop: code = stop.code or 0
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())
    run.folder = tmp_path
    return run


def check(done, code):
    "The exit code, with what was printed when it is another"
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def complaint(done):
    "The one line that a command wrote to the error stream"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ftlib: "), done.stderr
    return lines[0]


def test_train_writes_tables_plots_and_weights(shell, stripes):
    done = check(shell("train", stripes, *SMALL, "--epochs", 3, "--lr", "5e-3", "--out", "out"), 0)
    out = shell.folder / "out"
    assert {p.name for p in out.iterdir()} == {"history.csv", "history.png", "model.ftl", "per_class.png", "split.csv",
                                               "summary.csv", *REPORT}
    classes, history, summary = (pd.read_csv(out / f"{n}.csv") for n in ("per_class", "history", "summary"))
    assert classes["class"].tolist() == ["lying", "standing"]
    assert len(history) == 3 and {"train_loss", "valid_loss", "accuracy"} <= set(history)
    assert summary["phase"].tolist() == ["whole network", "all"] and summary["epochs"].tolist() == [3, 3]
    top1 = classes["right"].sum() / classes["images"].sum()
    assert summary["top1"].iloc[-1] == pytest.approx(top1) and f"top-1 {top1:.4f}" in done.stdout
    assert history["accuracy"].max() == pytest.approx(top1, abs=1e-6), "the table and the metric count the same images"


def test_the_best_classifier_in_some_seconds(shell, stripes):
    args = "best", stripes, "--minutes", ".15", "--arch", "test_resnet=none", "--size", 32, "--bs", 8
    done = check(shell(*args, "--out", "out"), 0)
    out = shell.folder / "out"
    assert {"model.ftl", "report", "steps.csv", "steps.json"} <= {p.name for p in out.iterdir()}
    steps = pd.read_csv(out / "steps.csv")
    assert steps["step"].tolist() == ["audit", "body", "training", "other weights", "calibration", "report", "bundle"]
    for words in ("planned s", "The classifier is right for", "written to out", "audit: 48 images"):
        assert words in done.stdout, words
    assert "earlier call" in check(shell(*args, "--out", "out"), 0).stdout
    assert check(shell("predict", stripes / "lying", "--model", out / "model.ftl"), 0).returncode == 0
    assert "above 0" in complaint(check(shell("best", stripes, "--minutes", 0), 2))
    assert "other size" in complaint(check(shell(*args[:-3], 64, "--bs", 8, "--out", "out"), 2))


def test_new_images_are_classified_and_sorted(shell, stripes, tmp_path):
    check(shell("train", stripes, *SMALL, "--epochs", 3, "--lr", "5e-3", "--out", "runs/train"), 0)
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for i, path in enumerate(sorted(stripes.glob("*/0[0-5].png"))):
        (inbox / f"{path.parent.name}-{i}.png").write_bytes(path.read_bytes())
    (inbox / "=broken.png").write_text("no image")
    done = check(shell("predict", inbox, "--csv", "out/classes.csv", "--copy-to", "sorted"), 0)
    table = pd.read_csv(shell.folder / "out" / "classes.csv")
    assert len(table) == 13 and table["error"].notna().sum() == 1
    assert "12 images" in done.stdout and "(cannot be read)" in done.stdout
    good = table[table["error"].isna()]
    assert (good["path"].map(lambda p: p.rsplit("/", 1)[1].split("-")[0]) == good["class"]).mean() > .8
    assert {p.parent.name: 1 for p in (shell.folder / "sorted").glob("*/*")} == {c: 1 for c in good["class"].unique()}
    assert "2 classes" in check(shell("info", "runs/train/model.ftl"), 0).stdout
    assert "is not a bundle" in complaint(check(shell("predict", inbox, "--model", stripes / "lying" / "00.png"), 2))
    assert "Model" not in complaint(check(shell("predict", inbox / "nothing"), 2))


def test_a_training_is_judged_again(shell, stripes):
    done = check(shell("train", stripes, *SMALL, "--epochs", 2, "--lr", "5e-3", "--out", "out"), 0)
    again = check(shell("evaluate", stripes, "--bs", 8, "--model", "out/model.ftl", "--out", "judged"), 0)
    assert {p.name for p in (shell.folder / "judged").iterdir()} == REPORT
    for name in REPORT - {"report.html"}:
        one, two = (pd.read_csv(shell.folder / place / name) for place in ("out", "judged"))
        pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-5)
    assert "Top1 " in again.stdout and "by class" in done.stdout
    all_of_them = check(shell("evaluate", stripes, "--model", "out/model.ftl", "--on", "all", "--tta", 1), 0)
    assert "/48 (" in all_of_them.stdout


def test_what_was_trained_on_is_not_evaluated(shell, stripes):
    "Another seed or share would make another split: the training's own counts"
    check(shell("train", stripes, *SMALL, "--epochs", 1, "--lr", "5e-3", "--seed", 7, "--valid", ".3", "--out", "out"),
          0)
    check(shell("evaluate", stripes, "--model", "out/model.ftl", "--out", "judged"), 0)
    split = pd.read_csv(shell.folder / "out" / "split.csv")
    assert pd.read_csv(shell.folder / "judged" / "per_class.csv")["images"].sum() == (split["split"] == "valid").sum()
    (shell.folder / "out" / "split.csv").unlink()
    assert "the training images" in complaint(check(shell("evaluate", stripes, "--model", "out/model.ftl"), 2))


def test_a_plot_that_fails_costs_no_weights(shell, stripes, monkeypatch):
    def fails(draw, path): raise ValueError("no such font")
    monkeypatch.setattr("ftlib.experiment.pipeline.save_figure", fails)
    done = check(shell("train", stripes, *SMALL, "--epochs", 1, "--lr", "5e-3", "--out", "out"), 0)
    assert (shell.folder / "out" / "model.ftl").exists() and "no such font" in done.stderr
    assert (shell.folder / "out" / "summary.csv").exists()


def test_weights_of_something_else_are_refused(shell, stripes, tmp_path):
    check(shell("train", stripes, *SMALL, "--epochs", 1, "--lr", "5e-3", "--out", "out"), 0)
    (stripes.parent / "others" / "slanted").mkdir(parents=True)
    for label in ("lying", "standing"): (stripes.parent / "others" / label).symlink_to(stripes / label)
    for p in (stripes / "lying").iterdir(): (stripes.parent / "others" / "slanted" / p.name).write_bytes(p.read_bytes())
    assert "slanted" in complaint(check(shell("evaluate", stripes.parent / "others", "--model", "out/model.ftl"), 2))
    (shell.folder / "odd.safetensors").write_bytes(b"odd")
    assert "cannot read weights" in complaint(check(shell("evaluate", stripes, "--model", "odd.safetensors"), 2))
    assert "there is no test set" in complaint(check(shell("evaluate", stripes, "--model", "out/model.ftl", "--on",
                                                           "test"), 2))


def test_weights_of_an_earlier_version_are_evaluated(shell, stripes):
    "Before bundles, `ftlib train` wrote bare weights; they give the figures that the bundle gives"
    from ftlib.data.images import image_data
    from ftlib.deploy.bundle import load_bundle
    from ftlib.experiment.pipeline import save_weights
    check(shell("train", stripes, *SMALL, "--epochs", 2, "--lr", "5e-3", "--out", "out"), 0)
    dls = image_data(stripes, size=32, bs=8)
    save_weights(load_bundle(shell.folder / "out" / "model.ftl").learner(dls), shell.folder / "out" / "old.safetensors")
    for name, model in (("a", "out/model.ftl"), ("b", "out/old.safetensors")):
        check(shell("evaluate", stripes, "--bs", 8, "--weights", model, "--out", name), 0)
    one, two = (pd.read_csv(shell.folder / name / "figures.csv") for name in "ab")
    pd.testing.assert_frame_equal(one, two, rtol=1e-3)  # a GPU sums in any order


def test_a_bundle_that_cannot_be_written_costs_no_weights(shell, stripes, monkeypatch):
    def fails(*args, **kwargs): raise OSError("no space left")
    monkeypatch.setattr("ftlib.experiment.pipeline.save_bundle", fails)
    done = check(shell("train", stripes, *SMALL, "--epochs", 1, "--lr", "5e-3", "--out", "out"), 0)
    assert "no space left" in done.stderr and "0." in check(shell("evaluate", stripes, "--model",
        "out/weights.safetensors"), 0).stdout


def test_the_same_seed_gives_the_same_run(shell, stripes):
    def run(out):
        return check(shell("train", stripes, *SMALL, "--epochs", 2, "--lr", "5e-3", "--seed", 7, "--out", out), 0)
    run("a"), run("b")
    a, b = (pd.read_csv(shell.folder / o / "history.csv") for o in "ab")
    assert a[["train_loss", "valid_loss"]].equals(b[["train_loss", "valid_loss"]])


def test_a_training_that_is_kept_goes_on(shell, stripes):
    asked = "train", stripes, *SMALL, "--epochs", 2, "--lr", "5e-3", "--checkpoint", "kept"
    check(shell(*asked, "--out", "a"), 0)
    assert "already contains checkpoints" in complaint(check(shell(*asked, "--out", "b"), 2))
    done = check(shell(*asked, "--out", "b", "--resume"), 0)
    assert "is finished already" in done.stdout
    a, b = ((shell.folder / o / "history.csv").read_text() for o in "ab")
    assert a == b
    assert "epochs 2 → 3" in complaint(check(shell(*asked, "--epochs", 3, "--resume"), 2))


def test_lr_find_writes_the_curve(shell, stripes):
    done = check(shell("lr-find", stripes, *SMALL, "--out", "rates"), 0)
    assert "inimum" in done.stdout
    curve = pd.read_csv(shell.folder / "rates" / "lr_find.csv")
    assert {"lr", "loss"} <= set(curve) and curve["lr"].is_monotonic_increasing
    assert (shell.folder / "rates" / "lr_find.png").stat().st_size > 5000


def test_audit_exits_by_what_it_finds(shell, stripes, tmp_path):
    check(shell("audit", stripes), 0)
    bad = tmp_path / "bad"
    for label in ("lying", "standing"):
        (bad / label).mkdir(parents=True)
        for image in (stripes / label).iterdir(): (bad / label / image.name).write_bytes(image.read_bytes())
    (bad / "lying" / "empty.png").touch()
    done = check(shell("audit", bad, "--csv", "problems.csv"), 1)
    assert "empty.png" in done.stdout
    assert pd.read_csv(shell.folder / "problems.csv")["path"].str.contains("empty.png").any()


def test_models_lists_and_exits_1_on_nothing(shell):
    assert "resnet18" in check(shell("models", "resnet1*", "--csv", "models.csv"), 0).stdout
    assert "resnet18" in set(pd.read_csv(shell.folder / "models.csv")["name"])
    check(shell("models", "no-such-*"), 1)


def test_demo_on_digits(shell):
    done = check(shell("demo", "--on", "digits", "--out", "out"), 0)
    assert "scikit-learn" in done.stdout
    assert pd.read_csv(shell.folder / "out" / "summary.csv")["top1"].iloc[-1] > .9


@pytest.mark.parametrize("args,says", [
    ("train nowhere", "nowhere"),
    ("lr-find nowhere", "nowhere"),
    ("audit nowhere", "nowhere"),
    ("train {stripes} --arch resnet81", "resnet18"),
    ("train {stripes} --weights nowhere.pth", "nowhere.pth"),
    ("train {stripes} --arch cnn --epochs 0", "epoch"),
    ("train {stripes} --out {stripes}/lying/00.png", "00.png"),
    ("train {stripes} --size 0", "size"),
    ("train {stripes} --valid 1.5", "valid"),
])
def test_bad_input_is_one_line_and_exit_2(shell, stripes, args, says):
    assert says in complaint(check(shell(*args.format(stripes=stripes).split()), 2))


@pytest.mark.parametrize("args", ["", "paint", "train", "train x --lr -1", "train x --epochs -3", "train x --lr fast"])
def test_usage_errors_exit_2(shell, args):
    assert "usage: ftlib" in check(shell(*args.split()), 2).stderr


def test_debug_shows_where(shell):
    with pytest.raises(ValueError, match="nowhere"): shell("train", "nowhere", "--debug")


def test_as_a_process(root, tmp_path):
    "`python -m ftlib`, from another folder: exit codes reach the shell, one line and no warning the error stream"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    env.pop("PYTHONWARNINGS", None)
    def run(*args):
        return subprocess.run([sys.executable, "-m", "ftlib", *args], cwd=tmp_path, env=env, capture_output=True,
                              text=True)
    assert "nowhere" in complaint(check(run("audit", "nowhere"), 2))
    assert "resnet18" in check(run("models", "resnet1*"), 0).stdout
    assert "Traceback" in check(run("audit", "nowhere", "--debug"), 1).stderr


def test_a_failed_run_exits_1(shell, stripes):
    done = check(shell("train", stripes, *SMALL, "--epochs", 2, "--lr", "1e30"), 1)
    assert "finite" in done.stderr.strip().splitlines()[-1]


def test_help_teaches_at_once(shell):
    for command in ("demo", "train", "lr-find", "audit", "models"):
        shown = check(shell(command, "--help"), 0).stdout
        assert f"examples:\n  ftlib {command}" in shown and "default:" in shown
    assert "ftlib 0." in check(shell("--version"), 0).stdout


# ---- what is evaluated, and where results go

def test_only_the_network_of_a_training_is_judged_on_its_split(shell, stripes):
    "A bundle of another training in the same folder may have been trained on what is for validation here"
    check(shell("train", stripes, *SMALL, "--epochs", 1, "--lr", "5e-3", "--seed", 7, "--out", "out"), 0)
    dls = image_data(stripes, size=16, bs=8, num_workers=0, seed=8)
    learn = vision_learner(dls, cnn(dls, (4,)), metrics=accuracy, seed=0)
    learn.bundle(shell.folder / "out" / "other.ftl")
    fit = lambda learn: learn.fit(1, 1e-3)
    with learn.no_bar(), learn.no_logging(): learn.refit(train=fit).bundle(shell.folder / "out" / "refitted.ftl")
    for name in ("other", "refitted"):
        line = complaint(check(shell("evaluate", stripes, "--model", f"out/{name}.ftl"), 2))
        assert "is not the network of the training" in line
    check(shell("evaluate", stripes, "--model", "out/model.ftl"), 0)
    # links have other names than their targets
    (shell.folder / "links").mkdir()
    for label in ("lying", "standing"):
        (shell.folder / "links" / label).mkdir()
        for i, file in enumerate(sorted((stripes / label).iterdir())):
            (shell.folder / "links" / label / f"link {i}.png").symlink_to(file)
    check(shell("train", "links", *SMALL, "--epochs", 1, "--lr", "5e-3", "--out", "linked"), 0)
    check(shell("evaluate", "links", "--model", "linked/model.ftl"), 0)


def test_a_refitted_network_is_not_judged_on_a_given_validation_set(shell, stripes):
    for split, part in (("train", slice(0, 9)), ("valid", slice(9, 14)), ("test", slice(14, 18))):
        for label in ("lying", "standing"):
            to = shell.folder / "data" / split / label
            to.mkdir(parents=True)
            for file in sorted((stripes / label).iterdir())[part]: shutil.copy(file, to)
    dls = image_data(shell.folder / "data", size=16, bs=4, num_workers=0)
    learn = vision_learner(dls, cnn(dls, (4,)), metrics=accuracy, seed=0)
    learn.bundle("plain.ftl")
    with learn.no_bar(), learn.no_logging(): learn.refit(train=lambda learn: learn.fit(1, 1e-3)).bundle("refitted.ftl")
    assert "trained on the validation images too" in complaint(check(shell("evaluate", "data", "--model",
                                                                           "refitted.ftl"), 2))
    check(shell("evaluate", "data", "--model", "refitted.ftl", "--on", "test"), 0)
    check(shell("evaluate", "data", "--model", "plain.ftl"), 0)


@pytest.mark.parametrize("command", ["train", "evaluate", "lr-find", "compare", "cv", "tune"])
def test_results_do_not_go_among_the_images(shell, stripes, monkeypatch, command):
    "Plots in the folder of the images would be the images of a class in the next training"
    data = shell.folder / "data"
    shutil.copytree(stripes, data)
    (shell.folder / "link").symlink_to(data)
    before = sorted(data.rglob("*"))
    above = shell.folder
    for here, folder, out in ((data, ".", None), (above, "data", "data/lying/runs"), (above, "data", "data"),
                              (above, "link", data / "out"), (above, data, "link/out")):
        monkeypatch.chdir(here)
        done = check(shell(command, folder, *(() if out is None else ("--out", out))), 2)
        assert "is in the folder of the images" in complaint(done)
    assert sorted(data.rglob("*")) == before
