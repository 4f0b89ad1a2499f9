"""A bundle to the hub and back, over HTTP, with a small server in place of the hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("huggingface_hub")

SCRIPT = """
import numpy as np
from fastai.metrics import accuracy
from ftlib.data.images import image_data
from ftlib.deploy import hub
from ftlib.deploy.bundle import load_bundle
from ftlib.deploy.predict import as_predictor
from ftlib.errors import DeployError
from ftlib.models.cnn import cnn
from ftlib.train.vision import vision_learner
images = list(np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8))
dls = image_data({"image": images, "label": ["red", "blue"] * 10}, size=16, bs=4, valid=.4, num_workers=0, seed=0)
learn = vision_learner(dls, cnn(dls, (4, 8), linear=(8,)), metrics=accuracy, seed=0)
learn.push_to_hub("me/flowers", token="hf_x", author="me")
again = load_bundle("hub:me/flowers")
assert again.about["author"] == "me"
expected = as_predictor(learn).predict_images(images, top=2, progress=False)
assert again.predict_images(images, top=2, progress=False).equals(expected)
for name in "me/absent", "me/pickle":
    try: load_bundle(f"hub:{name}")
    except DeployError as e: print(name, e)
"""


class Hub(BaseHTTPRequestHandler):
    "What of the hub's API a bundle needs: repositories, commits, files"
    files, asked = {("me/pickle", "model.ftl"): b"\x80\x04" + bytes(100)}, []

    def log_message(self, *args): pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.path, self.headers.get("Authorization")))
        there, parts = f"http://{self.headers['Host']}", self.path.split("/")
        if self.path == "/api/repos/create": found = {"url": f"{there}/me/flowers", "name": "me/flowers"}
        elif "preupload" in parts:
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                               for f in json.loads(body)["files"]]}
        elif "commit" in parts:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files["/".join(parts[3:5]), line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{there}/me/flowers/commit/1", "commitOid": "1" * 40, "success": True}
        else: found = {}
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = self.path.split("?")[0].split("/")
        if "resolve" not in parts:
            return self.answer(200, json.dumps({"id": "me/flowers", "sha": "1" * 40, "siblings": []}).encode(),
                               Content_Type="application/json")
        content = self.files.get(("/".join(parts[1:3]), parts[-1]))
        if content is None: return self.answer(404, X_Error_Code="RepoNotFound")
        self.answer(200, content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit="1" * 40)

    do_HEAD = do_GET


def test_there_and_back(root, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
               "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
               "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], env=env, capture_output=True, text=True,
                              cwd=tmp_path, timeout=300)
    finally: server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("me/flowers", "model.ftl") in Hub.files and b"library_name: ftlib" in Hub.files["me/flowers", "README.md"]
    assert ("/api/repos/create", "Bearer hf_x") in Hub.asked
    assert "me/absent" in done.stdout and "cannot be fetched" in done.stdout and "is not a bundle" in done.stdout
