"""Bundles that released versions of ftlib have written load, and give the probabilities that they gave then."""

import json

import numpy as np
import pytest
import released

from ftlib import __version__, load_bundle

BUNDLES = sorted(released.FOLDER.glob("*.ftl"))


@pytest.mark.parametrize("path", BUNDLES, ids=[p.stem for p in BUNDLES])
def test_a_bundle_of_a_release_gives_its_answers(path):
    wanted, model = json.loads(path.with_suffix(".json").read_text()), load_bundle(path)
    found = [model.predict(image)[1].tolist() for image in released.images()]
    assert model.about["ftlib"] == path.stem.rsplit("-", 1)[0] and len(found) == len(wanted)
    assert np.allclose(found, wanted, atol=1e-5) and np.ptp(wanted, 0).max() > .01, "the images must differ"


def test_this_version_has_its_bundles():
    "A new version number comes with `python tests/released.py`"
    assert any(p.name.startswith(f"{__version__}-") for p in BUNDLES)
