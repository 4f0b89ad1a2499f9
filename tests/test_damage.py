"""Whatever happens to the files of the cache, what is trained on is what was decoded; and of other files none is
touched."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ftlib.data.cache import DecodedImages, resize_short_side
from ftlib.system.files import checksum, clear_cache, own_files, own_folder, evict_lru, atomic_write
from ftlib.cache.store import FeatureStore
from ftlib.errors import StoreError

RECIPE = "0" * 32


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    found = [tmp_path / f"{i:02}.png" for i in range(12)]
    for p in found: Image.fromarray(rng.integers(1, 256, (30, 40, 3), dtype=np.uint8)).save(p)
    return found


def decoded(paths, folder, **kwargs):
    kept = DecodedImages(paths, 20, folder=folder, **kwargs)
    kept.ready()
    return kept


def features(folder, names="abcd", value=1.):
    "A store that has no memory, so that all goes to the disk"
    store = FeatureStore(memory=0, folder=folder)
    with store.block(store.features(RECIPE), list(names), (600,), torch.float32) as block:
        block.copy_(torch.arange(len(names))[:, None] + value)
    return store


def zeroed(path): path.write_bytes(bytes(path.stat().st_size))
def half_zeroed(path): path.write_bytes((b := path.read_bytes())[:len(b) // 2] + bytes(len(b) - len(b) // 2))
def one_bit(path): path.write_bytes((b := path.read_bytes())[:9] + bytes([b[9] ^ 1]) + b[10:])
def swapped(path): path.write_bytes((b := path.read_bytes())[len(b) // 2:] + b[:len(b) // 2])
def cut(path): os.truncate(path, path.stat().st_size // 2)
def emptied(path): path.write_bytes(b"")
def grown(path): path.write_bytes(path.read_bytes() + b"more")
def gone(path): path.unlink()


def listed(change):
    def f(path): path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return f


LISTS = [listed(f) for f in (lambda o: [], lambda o: 7, lambda o: None, lambda o: {}, lambda o: o | {"bytes": "many"},
                             lambda o: o | {"rows": 3, "names": 3}, lambda o: o | {"dtype": "sum", "rows": {}},
                             lambda o: o | {"rows": {k: [10**12, 20, 20, 1] for k in o.get("rows", ())},
                                 "shape": [10**9, 600]}, lambda o: o | {"rows": {k: "abc" for k in o.get("rows", ())},
                                                                        "names": [[]] * 4},
                             lambda o: o | {"rows": {k: [-5, 20, 20, 1] for k in o.get("rows", ())},
                                            "shape": [-4, 600]}, lambda o: o | {"sums": 0,
                                                "rows": {k: None for k in o.get("rows", ())}})]
DAMAGE = [("bin", f) for f in (zeroed, half_zeroed, one_bit, swapped, cut, emptied, grown, gone)] + [("json", f)
    for f in (zeroed, cut, emptied, gone, *LISTS)]


@pytest.mark.parametrize("kind, damage", DAMAGE)
def test_damaged_files(paths, tmp_path, kind, damage):
    folder = tmp_path / "kept"
    decoded(paths, folder)
    damage(next(folder.glob(f"*.{kind}")))
    for kept in (decoded(paths, folder), DecodedImages(side=20, folder=folder)):  # in this process, and in the next
        for p in paths: np.testing.assert_array_equal(kept.get(p), np.asarray(resize_short_side(p, 20)))
    folder = tmp_path / "features"
    features(folder)
    damage(next(folder.glob(f"*.{kind}")))
    found = FeatureStore(folder=folder).features(RECIPE)
    for i in set(range(4)) - set(found.missing("abcd")): assert (found.take(found.places("abcd"[i])) == i + 1).all()
    assert damage not in (one_bit, half_zeroed) or 0 < len(found.missing("abcd")) < 4  # only what is damaged is lost


@pytest.mark.parametrize("damage", [zeroed, one_bit, cut, emptied, gone])
def test_damage_between_two_passes(paths, tmp_path, damage):
    kept = decoded(paths, tmp_path / "kept")
    os.utime(file := next((tmp_path / "kept").glob("*.bin")), (1, 1))
    damage(file)
    kept.ready()
    for p in paths:
        pixels = kept.get(p)
        assert pixels is None or np.array_equal(pixels, np.asarray(resize_short_side(p, 20)))


SHRINKS = """
    import os, sys
    from pathlib import Path
    from ftlib.cache.store import FeatureStore
    store = FeatureStore(folder=sys.argv[1])
    found = store.features("0" * 32)
    os.truncate(next(Path(sys.argv[1]).glob("*.bin")), 100)
    try: found.take(found.places("a"))
    except OSError as e: print(e.strerror)
    print(store.features("0" * 32).missing("abcd"))
"""


def test_mapped_features_that_are_cut_short(tmp_path):
    features(tmp_path / "kept")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(SHRINKS), tmp_path / "kept"],
                         capture_output=True, text=True)
    assert run.returncode != -signal.SIGBUS, "killed"
    assert "cut short by another program; fit again" in run.stdout and run.stdout.endswith("[0, 1, 2, 3]\n")


@given(st.binary(min_size=1, max_size=9000), st.data())
@settings(max_examples=60, deadline=None)
def test_a_checksum_sees_each_bit(data, more):
    at = more.draw(st.integers(0, len(data) - 1))
    other = data[:at] + bytes([data[at] ^ (1 << more.draw(st.integers(0, 7)))]) + data[at + 1:]
    assert checksum(data) == checksum(np.frombuffer(data, np.uint8)) != checksum(other)


# ---- whose files they are

MINE = ["pytorch_model.bin", "pytorch_model.json", "draft.new", "a.bin", "model-0123456789abcdef0123456789abcdef.bin",
        "24v2.bin", "24v2-123.bin", "notes-24v2-" + RECIPE + ".json",
        "weights.bin.12.34.new", RECIPE + ".bin"]


@pytest.mark.parametrize("kind", ["images", "features"])
def test_other_files_are_never_deleted(paths, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    folder = own_folder(tmp_path / "cache" / kind)
    for name in MINE:
        (folder / name).write_bytes(b"mine" * 99)
        os.utime(folder / name, (1, 1))
    for n in (5, 12): decoded(paths[:n], None, disk=9000)
    features(tmp_path / "cache" / "features", value=2.).disk = 10
    evict_lru(folder, 0), clear_cache()
    assert sorted(p.name for p in folder.iterdir()) == sorted(MINE)


def stranger(path): os.chown(path, 65534, 65534)
def for_all(path): path.chmod(0o666)


@pytest.mark.parametrize("which, change", [("folder", stranger), ("*.bin", stranger), ("*.json", stranger),
                                           ("*.bin", for_all), ("*.json", for_all)])
def test_what_others_can_write_is_not_believed(paths, tmp_path, capsys, which, change):
    if which == "folder" and os.getuid(): pytest.skip("only root can give a folder away")
    if change is stranger and os.getuid(): pytest.skip("only root can give a file away")
    for folder, make, names in ((tmp_path / "kept", lambda f: decoded(paths, f), None),
                                (tmp_path / "features", features, "abcd")):
        make(folder)
        for p in [folder] if which == "folder" else folder.glob(which): change(p)
        if names: assert len(FeatureStore(folder=folder).features(RECIPE).missing(names)) == 4
        else: assert not DecodedImages(side=20, folder=folder).offsets
    if which == "folder":
        decoded(paths, tmp_path / "kept")
        assert capsys.readouterr().out.count("belongs to another user") == 1
        with pytest.raises(StoreError): features(tmp_path / "features")


def test_what_is_written_is_for_this_user_alone(paths, tmp_path):
    old = os.umask(0)
    try: decoded(paths, tmp_path / "kept"), features(tmp_path / "features")
    finally: os.umask(old)
    for folder in ("kept", "features"):
        assert [p.stat().st_mode & 0o077 for p in (tmp_path / folder, *(tmp_path / folder).iterdir())] == [0] * 3


def no_folder(path): path.write_text("")
def dangling(path): path.symlink_to(path.parent / "no" / "such")


@pytest.mark.parametrize("place", [no_folder, dangling, lambda path: None])
def test_a_folder_that_cannot_be_used(paths, tmp_path, capsys, place):
    place(tmp_path / "x")
    folder = tmp_path / "x" / ("y" * 300) if place not in (no_folder, dangling) else tmp_path / "x" / "kept"
    kept = decoded(paths, folder)
    kept.ready()
    assert kept.get(paths[0]) is None and capsys.readouterr().out.count("decoded again in each epoch") == 1
    with pytest.raises(StoreError): features(folder)


# ---- others at the same time

def test_clearing_while_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path))
    store = FeatureStore(memory=0)
    found = store.features(RECIPE)
    with store.block(found, list("ab"), (9,), torch.float32) as block:
        clear_cache()
        block[:] = 5
        (left,) = own_files(store.folder, unfinished=True)
    assert (found.take(found.places("ab")) == 5).all() and not left.exists()
    clear_cache()
    assert (found.take(found.places("ab")) == 5).all()


def test_a_folder_that_is_deleted_while_a_file_is_written(tmp_path):
    store = FeatureStore(memory=0, folder=tmp_path / "kept")
    found = store.features(RECIPE)
    with store.block(found, list("ab"), (9,), torch.float32) as block:
        block[:] = 5
        for p in (tmp_path / "kept").iterdir(): p.unlink()
        (tmp_path / "kept").rmdir()
    assert (found.take(found.places("ab")) == 5).all()


def test_what_was_left_unfinished_goes(tmp_path):
    folder = own_folder(tmp_path / "kept")
    left = folder / f"24v2-{RECIPE}.bin.1.2.new"
    left.write_bytes(b"half")
    left.chmod(0o600)
    with atomic_write(folder / f"24v2-{RECIPE}.bin") as f:
        evict_lru(folder, 20 << 30)
        assert not left.exists() and os.path.exists(f.name)
