"""The numbers of public code, and one thread."""

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
    """``official("ppo")``: the arrays of a file by name, as float64 tensors where they are numbers."""

    def read(name):
        with np.load(OFFICIAL / f"{name}.npz") as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}

    return read
