"""Example datasets: downloaded once from a double of the server, verified, unpacked into class folders."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from ftlib import DataError, image_data
from ftlib.data import examples


def jpeg(seed):
    "The bytes of a small image"
    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (12, 12, 3), dtype=np.uint8)).save(out, "jpeg")
    return out.getvalue()


def cifar(n):
    "Records as CIFAR-10 has them"
    return b"".join(bytes([i % 2]) + np.random.RandomState(i).bytes(3072) for i in range(n))


FILES = {
    "ants_bees": {f"hymenoptera_data/{s}/{c}/{i}.jpg": jpeg(i) for s in ("train", "val") for c in ("ants", "bees")
                  for i in range(3)},
    "flowers": {f"flower_photos/{c}/{i}.jpg": jpeg(i) for c in ("daisy", "roses")
                for i in range(10)} | {"flower_photos/LICENSE.txt": b"CC BY"},
    "pets": {f"images/{b}_{i}.jpg": jpeg(i) for b in (*examples.BREEDS, "Birman") for i in range(1, 9)},
    "cifar10": {"cifar-10-batches-bin/batches.meta.txt": b"airplane\nship\n",
                "cifar-10-batches-bin/data_batch_1.bin": cifar(8), "cifar-10-batches-bin/test_batch.bin": cifar(4)},
}
CLASSES = {"ants_bees": ["ants", "bees"], "flowers": ["daisy", "roses"], "pets": sorted(examples.BREEDS),
           "cifar10": ["airplane", "ship"]}


class Server(SimpleHTTPRequestHandler):
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args): pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    "Archives on a local server, in place of the real addresses"
    (tmp_path / "site").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=tmp_path / "site"))
    Thread(target=server.serve_forever, daemon=True).start()
    changed = {}
    for name, files in FILES.items():
        path = tmp_path / "site" / name
        if name == "ants_bees":
            with zipfile.ZipFile(path, "w") as f:
                for inside, content in files.items(): f.writestr(inside, content)
        else:
            with tarfile.open(path, "w:gz") as f:
                for inside, content in files.items():
                    info = tarfile.TarInfo(inside)
                    info.size = len(content)
                    f.addfile(info, io.BytesIO(content))
        changed[name] = replace(examples.EXAMPLES[name], url=f"http://127.0.0.1:{server.server_port}/{name}",
                                sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(examples, "EXAMPLES", changed)
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FTLIB_DATA", raising=False)
    Server.asked.clear()
    yield changed
    server.shutdown()


@pytest.mark.parametrize("name", FILES)
def test_downloaded_once_and_trained_on(published, name, tmp_path):
    folder = examples.example_data(name)
    assert examples.example_data(name) == folder and Server.asked == [f"/{name}"]
    dls = image_data(folder, size=8, bs=2, num_workers=0)
    assert list(dls.vocab) == CLASSES[name] and len(dls.valid)
    assert sorted(p.name for p in folder.parent.iterdir()) == [name], "nothing else is left behind"


@pytest.mark.parametrize("name,n_train,n_valid", [("pets", 18, 6), ("flowers", 16, 4), ("cifar10", 8, 4),
                                                  ("ants_bees", 6, 6)])
def test_each_has_a_split(published, name, n_train, n_valid):
    dls = image_data(examples.example_data(name), size=8, bs=2, num_workers=0)
    assert (dls.train.n, dls.valid.n) == (n_train, n_valid)


def test_pixels_of_cifar_are_in_place(published):
    image = np.asarray(Image.open(examples.example_data("cifar10") / "train" / "ship" / "00001.png"))
    assert (image == np.frombuffer(cifar(2)[3074:], np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_another_file_is_refused(published, monkeypatch):
    monkeypatch.setitem(published, "flowers", replace(published["flowers"], sha256="0" * 64))
    with pytest.raises(DataError, match="FTLIB_DATA"): examples.example_data("flowers")
    assert not list((examples.cache_folder() / "examples").iterdir())


def test_no_server(published, monkeypatch):
    monkeypatch.setitem(published, "flowers", replace(published["flowers"], url="http://127.0.0.1:9/flowers"))
    with pytest.raises(DataError, match="cannot be downloaded"): examples.example_data("flowers")


@pytest.mark.parametrize("inside", ["../outside.jpg", "/tmp/outside.jpg"])
def test_an_archive_cannot_write_elsewhere(tmp_path, inside):
    with tarfile.open(tmp_path / "a", "w") as f: f.addfile(tarfile.TarInfo(inside), io.BytesIO())
    (tmp_path / "in").mkdir()
    try: examples._extract(tmp_path / "a", tmp_path / "in")
    except tarfile.TarError: pass
    assert not (tmp_path / "outside.jpg").exists()


@pytest.mark.parametrize("place", ["", "data/"])
def test_local_copies_come_first(published, tmp_path, monkeypatch, place):
    (tmp_path / place / "flowers5").mkdir(parents=True)
    (tmp_path / "weights").mkdir(exist_ok=True)
    (tmp_path / "weights" / "w.pth").touch()
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path))
    assert examples.example_data("flowers") == tmp_path / place / "flowers5" and not Server.asked
    monkeypatch.setenv("FTLIB_DATA", str(tmp_path / "data") if place else str(tmp_path))
    assert examples.local_copy("w.pth") == tmp_path / "weights" / "w.pth"
