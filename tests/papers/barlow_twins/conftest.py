"""Pairs of views with known losses, and the official code's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

OFFICIAL = Path(__file__).parent / "official"


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second thread, for long on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def official():
    """``official("loss")``: the arrays of a file by name."""

    def read(name):
        with np.load(OFFICIAL / f"{name}.npz") as file:
            return dict(file)

    return read


@pytest.fixture
def pair():
    """Six rows of four columns, whose loss is .004787759 = .004161521 + .000626238."""
    n, k = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(1.0, 5.0, dtype=torch.float64)
    return torch.sin(1 + n * k), torch.sin(1.3 + n * k)
