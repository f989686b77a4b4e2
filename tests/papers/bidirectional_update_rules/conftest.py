"""Data and networks of the tests of bidirectional update rules."""

import pytest
import torch


@pytest.fixture
def rows():
    """64 rows of 6 features in three classes that a linear rule can tell apart."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    return x, y
