from pathlib import Path

import numpy as np
import pytest

OFFICIAL = Path(__file__).parent / "official"


@pytest.fixture(scope="session")
def official():
    """Numbers of the official code by file."""
    return lambda name: np.load(OFFICIAL / f"{name}.npz")
