"""Writes the bundles of the version that is about to be released: `python tests/released.py`.

They stay in `tests/released`, and every later version must load them and give the probabilities that are stored beside
them (`test_released.py`).
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import ftlib
from ftlib import accuracy, cnn, image_data, load_bundle, vision_learner

FOLDER = Path(__file__).parent / "released"


def images():
    "Images that later versions can make again: coloured gradients with a grid, wide and tall"
    for i in range(6):
        h, w = 40 + 13 * i, 90 - 11 * i
        y, x = np.mgrid[:h, :w]
        pixels = np.stack([255 * x / w, 255 * y / h, 40 * i + 0 * x], 2)
        yield Image.fromarray((pixels + 30 * ((x // 8 + y // 8) % 2)[..., None]).clip(0, 255).astype("uint8"))


def training_images():
    "Two classes of coloured noise, a quarter of them with the wrong label, so that probabilities are not 0 and 1"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (40, 48, 48, 3)).astype("uint8")
    images[::2, ..., 0] += 120
    labels = ["red", "grey"] * 15 + ["grey", "red"] * 5
    return image_data({"image": images, "label": labels}, size=32, bs=8, valid=.25, num_workers=0, seed=0)


def main():
    FOLDER.mkdir(exist_ok=True)
    dls = training_images()
    for name, arch in (("cnn", cnn(dls, (8, 16), linear=(16,))), ("timm", "test_efficientnet")):
        learn = vision_learner(dls, arch, weights=None, metrics=accuracy, seed=0, path=tempfile.mkdtemp())
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
        learn.calibrate()
        path = learn.bundle(FOLDER / f"{ftlib.__version__}-{name}.ftl")
        model = load_bundle(path)
        probabilities = [model.predict(image)[1].tolist() for image in images()]
        path.with_suffix(".json").write_text(json.dumps(probabilities))
        print(path.name, path.stat().st_size, probabilities[0])


if __name__ == "__main__": main()
