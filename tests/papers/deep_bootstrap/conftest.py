"""Tiny worlds: endless, seeded, cheap."""

import pytest
import torch
from torch.utils.data import TensorDataset


class TinyWorld:
    """Classes of a noisy linear rule in ``dim`` dimensions (or, with ``num_classes=0``, a noisy linear regression)."""

    def __init__(self, num_classes=3, dim=5, noise=0.3, dtype=torch.float32):
        self.num_classes, self.shape, self.noise, self.dtype = num_classes, (dim,), noise, dtype
        g = torch.Generator().manual_seed(7)
        self.rule = torch.randn(dim, max(num_classes, 1), generator=g, dtype=torch.float64)

    def _block(self, split, index):
        g = torch.Generator().manual_seed(1_000_003 * index + {"stream": 1, "train": 2, "test": 3}[split])
        x = torch.randn(64, *self.shape, generator=g, dtype=torch.float64)
        out = x @ self.rule + self.noise * torch.randn(64, self.rule.shape[1], generator=g, dtype=torch.float64)
        return x.to(self.dtype), out.argmax(1) if self.num_classes else out[:, 0].to(self.dtype)

    def _range(self, split, start, stop):
        blocks = [self._block(split, i) for i in range(start // 64, -(-stop // 64))]
        x, y = (torch.cat(p)[start % 64 :][: stop - start] for p in zip(*blocks, strict=True))
        return x, y

    def batch(self, step, batch_size, *, split="stream"):
        return self._range(split, step * batch_size, (step + 1) * batch_size)

    def fixed(self, n, *, seed=0, split="train"):
        return TensorDataset(*self._range(split, seed * 2**20, seed * 2**20 + n))


@pytest.fixture
def tiny_world():
    return TinyWorld


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small only wait for a second thread, for long on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
