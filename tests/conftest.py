"""What the tests share: where the repository is, and slow tests only when asked for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root():
    "The repository's root"
    return ROOT


def pytest_collection_modifyitems(config, items):
    "Tests marked `slow` are left out unless `-m` says otherwise"
    if config.getoption("-m"): return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    "A folder of two classes: stripes that lie, stripes that stand"
    folder, rng = tmp_path_factory.mktemp("images") / "stripes", np.random.default_rng(0)
    for label in ("lying", "standing"):
        (folder / label).mkdir(parents=True)
        for i in range(24):
            wave = np.sin(np.arange(32) / rng.uniform(1, 2) + rng.uniform(0, 6))
            grid = np.broadcast_to(wave[:, None] if label == "lying" else wave, (32, 32))
            pixels = 128 + 80 * grid + rng.normal(0, 20, (32, 32))
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / label / f"{i:02}.png")
    return folder
