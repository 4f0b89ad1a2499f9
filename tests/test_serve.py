"""What a page and an endpoint take from strangers, and what they answer: over real HTTP requests to the application."""

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
from fastai.metrics import accuracy
from PIL import Image

pytest.importorskip("fastapi", reason="the endpoint needs FastAPI")

from ftlib.data.images import image_data
from ftlib.deploy.bundle import load_bundle
from ftlib.deploy.endpoint import web_app
from ftlib.deploy.uploads import Limits
from ftlib.errors import DeployError
from ftlib.models.cnn import cnn
from ftlib.train.vision import vision_learner

SMALL = Limits(image_bytes=200_000, request_bytes=400_000, unpacked_bytes=600_000, pixels=20_000, images=25)


def png(colour=0, side=24):
    "An image of noise with one strong colour, as bytes"
    pixels, out = np.random.default_rng(colour).integers(0, 120, (side, side, 3), dtype=np.uint8), io.BytesIO()
    pixels[..., colour] += 100
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def huge_png(side):
    "A PNG of side × side black pixels, some kB"
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress(b"\0" * ((side // 8 + 2) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT",
        rows) + chunk(b"IEND", b"")


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(name, data)
    return out.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    table = {"image": [np.asarray(Image.open(io.BytesIO(png(c)))) for c in (0, 2) * 10], "label": ["red", "blue"] * 10}
    dls = image_data(table, size=16, bs=4, valid=.4, num_workers=0, seed=0)
    learn = vision_learner(dls, cnn(dls, (4, 8), linear=(8,)), metrics=accuracy, seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    return learn.bundle(folder / "red.ftl")


@pytest.fixture(scope="module")
def client(bundle):
    from fastapi.testclient import TestClient
    return TestClient(web_app(load_bundle(bundle), limits=SMALL, page=False))


def test_one_image_as_it_is(client, bundle):
    answer = client.post("/predict?top=2", content=png(2))
    label, probs = load_bundle(bundle).predict(png(2))
    found = answer.json()["predictions"][0]
    assert answer.status_code == 200 and found["class"] == label
    assert found["probability"] == pytest.approx(probs.max()) and len(found["top"]) == 2


def test_many_files_and_a_zip(client):
    files = [("files", ("a.png", png(0))), ("files", ("letter.txt", b"hello")),
             ("files", ("b.zip", zipped({f"{i}.png": png(2) for i in range(3)})))]
    found = client.post("/predict", files=files).json()["predictions"]
    assert [p["name"] for p in found] == ["a.png", "letter.txt", "0.png", "1.png", "2.png"]
    assert [p["error"] is None for p in found] == [True, False, True, True, True] and found[1]["class"] is None


@pytest.mark.parametrize("name,content,status,says", [
    ("a text", b"hello", 422, "not an image"),
    ("nothing", b"", 422, "not an image"),
    ("100 megapixels", huge_png(10_000), 422, "10000 × 10000 pixels"),
    ("a cut image", png(0)[:-200], 422, "cannot be decoded"),
    ("a file that is too large", bytes(500_000), 413, "bytes"),
    ("a zip bomb", zipped({"zeros.png": bytes(50_000_000)}), 422, "more than"),
    ("a zip of too many", zipped({f"{i}.png": b"" for i in range(30)}), 422, "more than 25"),
    ("a damaged zip", b"PK\x03\x04" + bytes(60), 422, "damaged"),
    ("an empty zip", zipped({}), 422, "no images"),
])
def test_what_is_refused(client, name, content, status, says):
    answer = client.post("/predict", content=content)
    assert answer.status_code == status and says in answer.text and "Traceback" not in answer.text, answer.text


def test_names_are_only_shown(client, tmp_path, monkeypatch):
    "No name that came with a file is a path: nothing is written, and what a name leads to is not read"
    monkeypatch.chdir(tmp_path)
    names = "../../up.png", "/etc/passwd", "a\nb.png", "..\\up.png"
    found = client.post("/predict", content=zipped({n: png(0) for n in names})).json()["predictions"]
    assert len(found) == 4 and all(p["error"] is None for p in found) and "a?b.png" in [p["name"] for p in found]
    assert client.post("/predict", files=[("files", ("/etc/passwd", b"no image"))]).status_code == 422
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob("up.png"))


def test_a_length_that_is_not_said_is_counted(client):
    "A body in pieces, without Content-Length"
    assert client.post("/predict", content=(bytes(50_000) for _ in range(20))).status_code == 413


def test_health_and_description(client):
    assert client.get("/health").json()["status"] == "ok"
    assert "/predict" in client.get("/openapi.json").json()["paths"]


def test_a_token(bundle):
    from fastapi.testclient import TestClient
    guarded = TestClient(web_app(load_bundle(bundle), token="secret", page=False))
    assert guarded.post("/predict", content=png(0)).status_code == 401
    assert guarded.post("/predict", content=png(0), headers={"Authorization": "Bearer other"}).status_code == 401
    assert guarded.post("/predict", content=png(0), headers={"Authorization": "Bearer secret"}).status_code == 200
    assert guarded.get("/docs").status_code == 401 and guarded.get("/health").status_code == 200
    assert guarded.get("/docs?token=secret").status_code == 200
    assert guarded.get("/docs").status_code == 200, "the browser has a cookie now"
    with pytest.raises(DeployError, match="token"): web_app(load_bundle(bundle), token="")


def test_too_many_wait(bundle):
    "One is answered, one waits, a third is refused at once"
    import threading

    from fastapi.testclient import TestClient
    model, go = load_bundle(bundle), threading.Event()
    slow, model.probabilities = model.probabilities, lambda *args: (go.wait(20), slow(*args))[1]
    with TestClient(web_app(model, limits=Limits(at_once=1, waiting=1), page=False)) as client:
        codes = []
        threads = [threading.Thread(target=lambda: codes.append(client.post("/predict", content=png(0)).status_code))
                   for _ in range(2)]
        for t in threads: t.start()
        end = time.monotonic() + 20
        while client.get("/health").json()["waiting"] < 2 and time.monotonic() < end: time.sleep(.05)
        refused = client.post("/predict", content=png(0))
        go.set()
        for t in threads: t.join()
    assert refused.status_code == 503 and refused.headers["retry-after"] == "2" and codes == [200, 200]


def test_asked_to_stop_it_ends(root, bundle):
    "The process of `ftlib serve`: it answers, and SIGTERM ends it with exit code 0"
    import httpx
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    served = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "ftlib", "serve", str(bundle), "--port", str(port),
                               "--no-page"], env=env, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while True:
            try: answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=png(2), timeout=30)
            except httpx.TransportError:
                assert time.monotonic() < end and served.poll() is None, served.stderr.read()
                time.sleep(.3)
                continue
            break
        assert answer.status_code == 200
        served.send_signal(signal.SIGTERM)
        assert served.wait(30) in (0, -signal.SIGTERM)
    finally: served.kill()
