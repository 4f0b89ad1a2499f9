"""Shards: each image once an epoch over workers and ranks, positions to resume from, and what can be wrong."""

import functools
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from ftlib import Learner, accuracy, vision_learner
from ftlib.data.images import image_data
from ftlib.data.make_shards import index_shards, write_shards
from ftlib.data.shards import open_shards, read_index
from ftlib.data.stream import epoch_order, held_until_wanted, stream_data
from ftlib.errors import DataError

CPU = torch.device("cpu")


def numbered(n):
    "Images that tell their number: as many grey levels as there are, and the class odd or even"
    return [np.full((8, 8), i, np.uint8) for i in range(n)], [("even", "odd")[i % 2] for i in range(n)]


def numbers(x): return (x[:, 0, 0, 0] * 255).round().int().tolist()


def build(pattern, valid=None, **kw):
    return stream_data(pattern, valid, **{"size": 8, "bs": 4, "num_workers": 0, "augment": None, "shuffle": 10,
                                          "device": CPU, **kw})


@pytest.fixture
def shards(tmp_path):
    "50 images in 6 shards"
    write_shards(numbered(50), tmp_path / "train-%05d.tar", images_per_shard=9)
    return tmp_path / "train-%05d.tar"


def tar_of(path, *members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(value=0):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


# ---- the order

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5),
       st.integers(1, 20), st.integers(0, 9))
def test_any_shards_workers_and_ranks_give_each_image_once(counts, workers, world, bs, buffer, seed):
    starts = np.cumsum([0, *counts]).tolist()
    spans, n = list(zip(starts, starts[1:])), sum(counts)
    random.Random(seed).shuffle(spans)
    cuts, every = [r * n // world for r in range(world + 1)], []
    for low, high in zip(cuts, cuts[1:]):
        order = epoch_order(spans, bs, workers, low, high, seed, buffer)
        every += order
        # what each worker reads is one run of the reading order, and it holds no more than its buffer
        reading = {i: at for at, i in enumerate(i for a, b in spans for i in range(a, b))}
        for w in range(workers):
            mine = [i for at, i in enumerate(order) if at // bs % workers == w]
            places = sorted(reading[i] for i in mine)
            assert places == list(range(places[0], places[0] + len(places))) if places else True
            assert all(reading[i] - places[0] < at + max(1, buffer) for at, i in enumerate(mine))
    assert sorted(every) == list(range(n))


def test_images_are_held_until_all_that_want_them_have_them():
    assert list(held_until_wanted([2, 0, 2, 1], [(0, "a"), (1, "b"), (2, "c")])) == [(2, "c"), (0, "a"), (2, "c"),
                                                                                     (1, "b")]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_an_epoch_in_another_order(shards, workers):
    dl = build(shards, num_workers=workers).train.new(drop_last=False)
    passes = [[(n, y) for x, ys in dl for n, y in zip(numbers(x), ys.tolist())] for _ in range(2)]
    assert passes[0] != passes[1]
    for one in passes: assert sorted(one) == [(i, i % 2) for i in range(50)]


def test_ranks_have_disjoint_parts_of_the_same_length(shards):
    loaders = [build(shards, rank=r, world=3).train for r in range(3)]
    assert {len(dl) for dl in loaders} == {50 // 3 // 4}
    for _ in range(2):
        loaders[0].one_batch()  # a look on one rank leaves the ranks in step
        seen = [n for dl in loaders for x, _ in dl for n in numbers(x)]
        assert len(seen) == len(set(seen)) == 48
    exact = [n for dl in loaders for x, _ in dl.new(drop_last=False) for n in numbers(x)]
    assert sorted(exact) == list(range(50))


def test_an_epoch_may_be_shorter(shards):
    dl = build(shards, epoch_images=20).train
    first, second = ({n for x, _ in dl for n in numbers(x)} for _ in range(2))
    assert len(first) == len(second) == 20 and first != second


def test_the_batches_are_those_of_image_data(tmp_path):
    "The same images in the same order through the same transforms, with the same random numbers"
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (20, 24, 3), dtype=np.uint8) for _ in range(8)]
    write_shards((images, list("ab" * 4)), tmp_path / "a-%05d.tar", seed=None)
    write_shards((images[::-1], list("ba" * 4)), tmp_path / "b-%05d.tar", seed=None)
    streamed = build(tmp_path / "a-%05d.tar", tmp_path / "b-%05d.tar", size=16, augment="default")
    mapped = image_data((images, list("ab" * 4)), size=16, bs=4, valid=0, num_workers=0, device=CPU)
    ours, theirs = (dl.new(shuffle=False, drop_last=False) for dl in (streamed.train, mapped.train))
    for dl in (ours, theirs): dl.rng = random.Random(3)
    for (x, y), (x2, y2) in zip(ours, theirs): assert torch.equal(x, x2) and torch.equal(y, y2)
    assert streamed.valid.one_batch()[1].tolist() == [streamed.vocab.o2i[c] for c in "baba"]


# ---- positions

@pytest.mark.parametrize("workers,given", [(0, 5), (2, 5), (2, 6)])
def test_a_loader_resumes_in_mid_epoch(shards, workers, given):
    dl = build(shards, num_workers=workers, augment="default").train
    for _ in dl: pass
    batches = iter(dl)
    for _ in range(given): next(batches)
    state = json.loads(json.dumps(dl.state_dict()))
    assert (state["epoch"], state["batches"]) == (1, given)
    rest = [b for b in batches] + [b for b in dl]
    other = build(shards, num_workers=workers, augment="default").train
    other.load_state_dict(state)
    assert other.state_dict()["batches"] == given
    other.one_batch()  # a look changes nothing
    again = [b for b in other] + [b for b in other]
    assert len(again) == len(rest) and all(torch.equal(a[0], b[0]) for a, b in zip(rest, again))


def test_a_resumed_loader_opens_only_the_shards_it_needs(shards, tmp_path):
    dl = build(shards).train.new(shuffle=False)
    batches = iter(dl)
    for _ in range(5): next(batches)
    other = build(shards).train.new(shuffle=False)
    other.load_state_dict(dl.state_dict())
    (tmp_path / "train-00000.tar").unlink()  # its 9 images and those of the next shard were given: 20
    assert [n for x, _ in other for n in numbers(x)] == [n for x, _ in batches for n in numbers(x)]


def test_other_settings_do_not_resume(shards):
    state = build(shards).train.state_dict()
    with pytest.raises(DataError, match="bs 4 → 5"): build(shards, bs=5).train.load_state_dict(state)


READER = """
import json, os, sys, time, torch
from ftlib.data.stream import stream_data
dls = stream_data(sys.argv[1], size=8, bs=4, num_workers=int(sys.argv[2]), augment=None, shuffle=10, device="cpu",
                  rank=int(sys.argv[4]), world=2)
dl = dls.train.new(drop_last=False)
place = sys.argv[3]
if os.path.exists(place):
    state = json.load(open(place))
    dl.load_state_dict(state["position"])
    seen = state["seen"]
else: seen = []
for x, _ in dl:
    seen += (x[:, 0, 0, 0] * 255).round().int().tolist()
    with open(place + ".new", "w") as f: json.dump(dict(position=dl.state_dict(), seen=seen), f)
    os.replace(place + ".new", place)
    print(len(seen), flush=True)
    time.sleep(.02)
"""


def kill_and_resume(pattern, place, n, workers, rank, kill_after):
    "Runs a reader that is killed after so many lines, and once more to the end; gives the numbers it saw"
    command = [sys.executable, "-W", "ignore", "-c", READER, str(pattern), str(workers), str(place), str(rank)]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(kill_after): reader.stdout.readline()
    os.killpg(reader.pid, signal.SIGKILL)
    reader.wait()
    seen = json.loads(place.read_text())["seen"]
    assert 0 < len(seen) < n
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(place.read_text())["seen"]


def test_a_killed_reader_repeats_and_skips_nothing(shards, tmp_path):
    assert len(set(kill_and_resume(shards, tmp_path / "p", 25, 0, 0, 3))) == 25


@pytest.mark.slow
def test_ten_thousand_images_two_workers_two_ranks_killed(tmp_path):
    "The number of an image is its pixel's three bytes"
    images = [np.full((8, 8, 3), [i // 256, i % 256, 0], np.uint8) for i in range(10_000)]
    write_shards((images, [f"{i % 7}" for i in range(10_000)]), tmp_path / "t-%05d.tar", images_per_shard=300)
    two_bytes = "((x[:, :2, 0, 0] * 255).round().int() @ torch.tensor([256, 1], dtype=torch.int32)).tolist()"
    reader = READER.replace("(x[:, 0, 0, 0] * 255).round().int().tolist()", two_bytes)
    reader = reader.replace("bs=4", "bs=64").replace("shuffle=10", "shuffle=500")
    def run(place, rank, kill_after=None):
        args = str(tmp_path / "t-%05d.tar"), "2", str(place), str(rank)
        command = [sys.executable, "-W", "ignore", "-c", reader, *args]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        if kill_after:
            for _ in range(kill_after): done.stdout.readline()
            os.killpg(done.pid, signal.SIGKILL)
        else: done.communicate()
        done.wait()
        return json.loads(place.read_text())["seen"]
    every = []
    for rank in range(2):
        place = tmp_path / f"p{rank}"
        assert 0 < len(run(place, rank, 20 + rank)) < 5000
        every += run(place, rank)
    assert len(every) == 10_000 and sorted(every) == list(range(10_000))


# ---- training

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    "600 digits as shards, and 200 more for validation"
    folder, data = tmp_path_factory.mktemp("digits"), load_digits()
    images = np.kron((data.images * 255 / 16).astype("uint8"), np.ones((2, 2), np.uint8))
    write_shards((list(images[:600]), data.target[:600]), folder / "train-%05d.tar", images_per_shard=100)
    write_shards((list(images[600:800]), data.target[600:800]), folder / "valid-%05d.tar", images_per_shard=100)
    return folder


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, 2, 1),
                               torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 10))


def digit_learner(digits, **kw):
    dls = build(digits / "train-%05d.tar", digits / "valid-index.json", size=16, bs=20, shuffle=200, **kw)
    return Learner(dls, small_net(), metrics=accuracy, seed=1)


def test_digits_are_learnt_from_shards(digits):
    learn = digit_learner(digits)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(6, 3e-3)
        probs, targets = learn.get_preds()
        report = learn.evaluate()
    assert learn.history.accuracy.iloc[-1] > .85
    assert targets.tolist() == open_shards(digits / "valid-%05d.tar").labels.tolist()
    assert len(report.probs) == len(probs) == 200
    assert learn.predict(np.zeros((16, 16), np.uint8))[0] in learn.dls.vocab
    assert learn.dls.summary().loc["total", "all"] == 800


def test_frozen_stages_are_run_anew_and_the_reason_is_printed(digits, capsys):
    dls = build(digits / "train-%05d.tar", size=32, bs=20, epoch_images=40)
    learn = vision_learner(dls, "resnet18", pretrained=False)
    learn.freeze_to(-1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert "streamed from shards" in capsys.readouterr().out and learn.history.cached.tolist() == [0]


@pytest.mark.slow
def test_all_that_a_learner_does_with_a_folder(digits, tmp_path):
    dls = build(digits / "train-%05d.tar", digits / "valid-%05d.tar", size=32, bs=20)
    learn = vision_learner(dls, "resnet18", pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False)
        learn.fine_tune(1, freeze_epochs=1)
        assert len(learn.evaluate("train").probs) == 600
        learn.tta(n=1)
        learn.show_results(max_n=2)
    dls.show_batch(max_n=2)
    learn.export(tmp_path / "a.pkl")


def test_a_fit_resumes_in_mid_epoch(digits, tmp_path):
    from fastai.callback.core import Callback
    from ftlib import Checkpoint
    class Stop(Callback):
        is_setting = uses_images = False
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 17: raise RuntimeError("killed")
    def train(**kw):
        learn = digit_learner(digits)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3, **kw)
        return learn
    whole = train()
    with pytest.raises(RuntimeError, match="killed"):
        train(checkpoint=Checkpoint(tmp_path / "runs", every=5), cbs=Stop())
    resumed = train(checkpoint=Checkpoint(tmp_path / "runs", every=5), resume=True)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)


def test_a_folder_validates(shards, stripes, tmp_path):
    write_shards(stripes, tmp_path / "s-%05d.tar")
    dls = build(tmp_path / "s-%05d.tar", stripes)
    assert len(dls.valid.dataset) == 48 and dls.valid.one_batch()[1].tolist() == [0] * 4
    with pytest.raises(DataError, match="class 'lying'"): build(shards, stripes)


# ---- what can be wrong

def test_a_truncated_or_missing_shard_is_named_at_once(shards, tmp_path):
    path = tmp_path / "train-00002.tar"
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match="train-00002.tar is truncated: it has"): build(shards)
    path.unlink()
    with pytest.raises(DataError, match="train-00002.tar does not exist"): build(shards)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_in_mid_epoch_loses_nothing(shards, tmp_path, workers):
    dl = build(shards, num_workers=workers).train.new(shuffle=False, drop_last=False)
    path = tmp_path / "train-00004.tar"
    data, seen = path.read_bytes(), []
    path.unlink()
    with pytest.raises(DataError, match=r"train-00004.tar does not exist.*Copy it there\.$"):
        for x, _ in dl: seen += numbers(x)
    state = dl.state_dict()
    path.write_bytes(data)
    dl.load_state_dict(state)
    seen += [n for x, _ in dl for n in numbers(x)]
    assert len(seen) == 50 and sorted(seen) == list(range(50))


def test_no_shards_no_index_no_match(tmp_path, shards):
    none = "there are no shards"
    for source, said in (("", none), ([], none), (tmp_path / "*.tgz", none), ("nowhere-%05d.tar", "index_shards"),
                         (tmp_path / "train-00077.tar", "does not list"),
                         ("s3://bucket/a-%05d.tar", "cannot open s3://bucket"),
                         ("pipe:touch pwned.tar", "commands=True")):
        with pytest.raises(DataError, match=said): build(source)
    assert not os.path.exists("pwned.tar")


@pytest.mark.parametrize("name", ["../a.tar", "/etc/a.tar", "pipe:touch x.tar", "http://h/a.tar"])
def test_an_index_names_files_beside_it_only(shards, tmp_path, name):
    path = tmp_path / "train-index.json"
    about = json.loads(path.read_text())
    about["shards"][0]["name"] = name
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="is no index of shards"): build(shards)


def test_samples_without_label_or_with_an_unknown_one(tmp_path):
    for members, said in (([("0.png", png())], "'0' in .* has no label"), ([("0.cls", b"1")], "'0' in .* has no image"),
                          ([("0.png", png()), ("0.cls", b"rose")], "label 'rose'"),
                          ([("0.png", png()), ("0.cls", b"2")], "label '2'")):
        tar_of(tmp_path / "b-0.tar", *members)
        with pytest.raises(DataError, match=said): index_shards(tmp_path / "b-0.tar", classes=["daisy", "tulip"])


def test_a_shard_without_its_end_is_not_indexed(shards, tmp_path):
    path = tmp_path / "train-00001.tar"
    for cut in (len(path.read_bytes()) // 2 // 512 * 512, 512 * 3, 0):
        (tmp_path / "c-0.tar").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DataError, match="truncated|cannot be read"): index_shards(tmp_path / "c-0.tar")
    (tmp_path / "c-0.tar").write_bytes(b"no tar file" * 999)
    with pytest.raises(DataError, match="c-0.tar cannot be read"): index_shards(tmp_path / "c-0.tar")


def test_another_shard_of_the_same_size_is_noticed(tmp_path):
    for name, labels in (("d", "ab"), ("e", "ba")):
        write_shards((numbered(2)[0], list(labels)), tmp_path / f"{name}-%d.tar", seed=None)
    (tmp_path / "d-0.tar").write_bytes((tmp_path / "e-0.tar").read_bytes())
    with pytest.raises(DataError, match="not the shard of its index"): list(build(tmp_path / "d-%d.tar", bs=2).train)


def test_names_that_lead_elsewhere_are_only_text(tmp_path):
    tar_of(tmp_path / "f-0.tar", ("../../up.png", png(3)), ("../../up.cls", b"0"), ("/abs.png", png(4)),
           ("/abs.cls", b"0"))
    index_shards(tmp_path / "f-0.tar")
    dl = build(tmp_path / "f-0.tar", bs=2).train
    assert sorted(n for x, _ in dl for n in numbers(x)) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f-0.tar", "f-index.json"]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_listed(tmp_path, workers):
    members = [(f"{i}.{k}", v) for i in range(8) for k, v in (("png", png(i) if i != 5 else b"no image"),
                                                              ("cls", str(i % 2).encode()))]
    tar_of(tmp_path / "g-0.tar", *members)
    tar_of(tmp_path / "v-0.tar", *((f"v{name}", data) for name, data in members))
    for name in "gv": index_shards(tmp_path / f"{name}-0.tar")
    dls = build(tmp_path / "g-0.tar", tmp_path / "v-0.tar", num_workers=workers)
    # the warning of a worker process is printed there
    with nullcontext() if workers else pytest.warns(UserWarning, match="image 5 of .*g-0.tar"):
        seen = [(n, y) for x, ys in dls.train for n, y in zip(numbers(x), ys.tolist())]
    assert sorted(seen) == sorted([(i, i % 2) for i in range(8) if i != 5] + [(7, 1)])
    assert dls.bad_files.path.tolist() == [f"image 5 of {tmp_path}/g-0.tar"]
    masks = [(y.tolist(), None if dls.valid.broken is None else dls.valid.broken.tolist()) for _, y in dls.valid]
    assert masks[1] == ([0, 1, 0, 1], [False, True, False, False])


# ---- writing

def test_bytes_are_copied_as_they_are(stripes, tmp_path):
    table = write_shards(stripes, tmp_path / "h-%05d.tar", images_per_shard=20)
    assert table.images.tolist() == [20, 20, 8]
    files = sorted(stripes.rglob("*.png"))
    with tarfile.open(tmp_path / "h-00000.tar") as tar:
        for m in tar.getmembers():
            if m.name.endswith(".png"): assert tar.extractfile(m).read() == files[int(m.name[:-4])].read_bytes()
    assert read_index(str(tmp_path / "h-index.json"))["classes"] == ["lying", "standing"]
    assert not list(tmp_path.glob("*.new"))


def test_loaders_are_written_by_split(stripes, tmp_path):
    dls = image_data(stripes, size=8, bs=4, num_workers=0)
    with pytest.raises(DataError, match="split=None: the source has 'train', 'valid'"):
        write_shards(dls, tmp_path / "i-%d.tar")
    assert write_shards(dls, tmp_path / "i-%d.tar", split="valid").images.sum() == len(dls.valid_ds)


# ---- over HTTP

@pytest.fixture
def address(shards, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_over_http(address, tmp_path):
    dl = build(f"{address}/train-%05d.tar").train.new(drop_last=False)
    assert sorted(n for x, _ in dl for n in numbers(x)) == list(range(50))
    dl = build(f"{address}/train-{{00000..00005}}.tar?key=secret", index=f"{address}/train-index.json").train
    path = tmp_path / "train-00003.tar"
    data = path.read_bytes()
    path.write_bytes(data[:3 * 512])
    with pytest.raises(DataError, match="train-00003.tar is truncated") as cut: list(dl)
    path.unlink()
    with pytest.raises(DataError, match="train-00003.tar cannot be read .*code 22") as gone: list(dl)
    (tmp_path / "train-index.json").unlink()
    with pytest.raises(DataError, match="train-index.json is no index of shards .*code 22"):
        build(f"{address}/train-%05d.tar")
    assert "secret" not in f"{cut.value} {gone.value}"


def test_a_command_runs_only_where_it_is_asked_for(shards, tmp_path):
    url = f"pipe:cat {tmp_path}/train-00001.tar"
    with pytest.raises(DataError, match="commands=True"): build([url], index=tmp_path / "train-index.json")
    dl = build([url], index=tmp_path / "train-index.json", commands=True).train.new(drop_last=False)
    assert len([n for x, _ in dl for n in numbers(x)]) == 9


def test_without_webdataset_the_message_names_the_extra(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    with pytest.raises(DataError, match=r"pip install 'ftlib\[stream\]'"): list(build(shards).train)


# ---- what is validated on

def test_no_shard_is_trained_and_validated_on(shards, tmp_path):
    for valid in (shards, tmp_path / "train-00003.tar", [str(tmp_path / "train-00000.tar")]):
        with pytest.raises(DataError, match="trained on"): build(shards, valid)
    about = json.loads((tmp_path / "train-index.json").read_text())
    (tmp_path / "other-00000.tar").write_bytes((tmp_path / "train-00004.tar").read_bytes())  # a copy of another name
    row = next(r for r in about["shards"] if r["name"] == "train-00004.tar")
    (tmp_path / "other-index.json").write_text(json.dumps(about | dict(shards=[row | dict(name="other-00000.tar")])))
    with pytest.raises(DataError, match="other-00000.tar is validated on.*train-00004.tar"):
        build(shards, tmp_path / "other-00000.tar")
    (tmp_path / "train-index.json").write_text(json.dumps(about | dict(shards=[*about["shards"],
                                                                              row | dict(name="other-00000.tar")])))
    with pytest.raises(DataError, match="the same images"): build(shards)


@pytest.mark.parametrize("splits, held", [(None, 8), (["valid"] * 8, 8), (["train", "valid"] * 4, 4),
                                          (["train", "test"] * 4, None), (["train"] * 8, None), (["test"] * 8, None),
                                          (["valid", "test"] * 4, 4)], ids=str)
def test_only_validation_images_of_a_source_are_validated_on(shards, splits, held):
    images, labels = numbered(8)
    source = {"image": images, "label": labels} | ({} if splits is None else {"split": splits})
    if held is None:
        with pytest.raises(DataError, match="none for 'valid'"): build(shards, source)
    else: assert len(build(shards, source).valid_ds) == held


@pytest.mark.parametrize("labels, classes, ok", [
    (["1", "2"], ["1", "2", "3"], False), (["1", "0"], ["1", "0"], False), (["dog", "1"], None, False),
    (["007", "7"], None, False), (["0", "1"], ["x", "x"], False), (["0", "2"], ["5", "6", "7"], True),
    (["0", "1", "2"], ["1", "2", "10"], True), (["3", "1"], None, True), (["b", "a"], ["a", "b"], True)], ids=str)
def test_a_label_has_one_meaning(tmp_path, labels, classes, ok):
    tar_of(tmp_path / "a-0.tar", *(m for i, label in enumerate(labels)
                                   for m in ((f"{i}.png", png(i)), (f"{i}.cls", label.encode()))))
    if not ok:
        with pytest.raises(DataError): index_shards(tmp_path / "a-0.tar", classes=classes)
        assert not (tmp_path / "a-index.json").exists()
        return
    index_shards(tmp_path / "a-0.tar", classes=classes)
    found = open_shards(tmp_path / "a-0.tar")
    names = [found.names[n] for n in found.labels]
    assert names == [label if classes is None or label in classes and "0" not in labels else classes[int(label)]
                     for label in labels]


def test_a_pipe_is_no_shard_and_no_index(shards, tmp_path):
    os.mkfifo(tmp_path / "pipe-0.tar")
    os.mkfifo(tmp_path / "pipe-index.json")
    for call in (lambda: index_shards(tmp_path / "pipe-0.tar"), lambda: read_index(str(tmp_path / "pipe-index.json")),
                 lambda: build(tmp_path / "pipe-0.tar"), lambda: build(shards, tmp_path / "pipe-%d.tar")):
        with pytest.raises(DataError, match="regular file"): call()
