"""What the tests share: where the repository is, and slow tests only when asked for."""

from pathlib import Path

import pytest

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
