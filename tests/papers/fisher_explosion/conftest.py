"""Small networks and batches in double precision."""

import pytest
import torch
from torch import nn

from mlcollage.nn.init import build


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small():
    """``small(dtype, *layers)``: a network and a batch (x, y) of seven samples, three classes."""

    def make(dtype=torch.float64, middle=lambda: nn.Tanh(), seed=0):
        model = build(lambda: nn.Sequential(nn.Linear(4, 6), middle(), nn.Linear(6, 3)), seed).to(dtype)
        g = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(7, 4, generator=g, dtype=torch.float64).to(dtype)
        return model, x, torch.randint(0, 3, (7,), generator=g)

    return make
