"""The official code's numbers, and one thread: networks this small only wait for a second."""

from pathlib import Path

import numpy as np
import pytest
import torch

OFFICIAL = Path(__file__).parent / "official"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def official():
    """``official("labelling")``: the arrays of a file by name."""

    def read(name):
        with np.load(OFFICIAL / f"{name}.npz") as file:
            return dict(file)

    return read
