"""Small networks and data in which classes show."""

import pytest
import torch
from torch import nn

from mlcollage.nn.init import seeded


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second thread, for long on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class SharedReLU(nn.Module):
    """One in-place ReLU for all layers and a residual connection, as torchvision's networks have."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, classes)

    def forward(self, x):
        h = self.relu(self.conv1(x))
        h = self.relu(self.conv2(h) + h)
        return self.head(h.mean((2, 3)))


@pytest.fixture
def shared_relu():
    with seeded(0):
        return SharedReLU()


@pytest.fixture
def mlp():
    with seeded(0):
        return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def blobs():
    """300 samples of three overlapping classes in five dimensions."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    return torch.randn(300, 5, generator=g) + 1.5 * torch.eye(5)[y], y


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    x = torch.rand(96, 1, 6, 6, generator=g)
    x[torch.arange(96), 0, 2 * y] += 1.0
    return x, y
