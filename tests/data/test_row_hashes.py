"""Hashes of rows against the rows themselves."""

import numpy as np
import pytest
import torch

from mlcollage.data.row_hashes import row_hashes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 3), ()])
def test_rows_are_equal_where_their_hashes_are(dtype, shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (300, *shape), generator=g).to(dtype)
    rows = x.reshape(300, -1).float().numpy()
    same = (rows[:, None] == rows[None]).all(-1)  # (n, n)
    h = row_hashes(x)
    assert h.shape == (300,)
    assert torch.equal(h[:, None] == h[None], torch.from_numpy(same))
    if dtype.is_floating_point:
        assert torch.equal(row_hashes(-x * 0), row_hashes(x * 0)), "one zero"


def test_hardly_different_rows_are_told_apart():
    """Powers of two differ in a few bits of the exponent only, where a plain sum of products would lose them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (100_000, 39), generator=g) * 2.0 ** torch.arange(39)
    assert len(row_hashes(x).unique()) == len(np.unique(x.numpy(), axis=0))
    x = torch.zeros(1000, 784)
    x[torch.arange(784), torch.arange(784)] = 2.0**-140
    assert len(row_hashes(x).unique()) == 785


def test_no_rows_and_other_memory():
    assert row_hashes(torch.zeros(0, 3)).shape == (0,)
    x = torch.arange(24.0).reshape(4, 6)
    assert torch.equal(row_hashes(x.T.contiguous().T), row_hashes(x.numpy()))
