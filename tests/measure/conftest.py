"""Numbers of official code."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def official_capsules():
    """``official_capsules("chamfer")``: the arrays of a file of Canonical Capsules' official code by name."""

    def read(name):
        with np.load(Path(__file__).parent / "oracles" / "canonical_capsules" / f"{name}.npz") as file:
            return dict(file)

    return read
