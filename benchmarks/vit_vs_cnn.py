"""CKA of all pairs of layers of two networks, beside the packages that people use for it, and peak memory.

``mlcollage bench vit_vs_cnn`` prints the table. Times are CPU seconds of one thread, taken in turns, with the networks'
forward passes; ratios are times over that of the row called baseline. Peers that are not installed (``pip install
pytorch-cka torch_cka``) are left out. The networks are chains of cheap layers, so that it is CKA that is timed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.measure import LayerTap, MinibatchCKA
from mlcollage.papers.vit_vs_cnn import compare

Row = dict[str, Any]
PEERS = {"pytorch-cka": "cka", "torch_cka": "torch_cka"}


class Step(nn.Module):
    """A layer that costs little beside its kernel: each feature is scaled, and its neighbor added."""

    def __init__(self, features: int, seed: int) -> None:
        super().__init__()
        scale = torch.randn(features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("scale", 1 + 0.5 * scale)

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) to the same."""
        return torch.tanh(x * self.scale + 0.3 * x.roll(1, 1))


def network(layers: int, features: int, seed: int) -> nn.Module:
    """A chain of layers."""
    return nn.Sequential(*(Step(features, 1000 * seed + i) for i in range(layers)))


def ours(layers: int, features: int, data: Tensor, size: int) -> np.ndarray[Any, Any]:
    """The instrument in hooks, as :func:`compare` uses it."""
    a, b = network(layers, features, 1), network(layers, features, 2)
    maps = MinibatchCKA()
    with torch.no_grad(), LayerTap(a, consume=maps.consume), LayerTap(b, consume=maps.consume_other):
        for batch in data.split(size):
            a(batch)
            b(batch)
            maps.end_batch()
    return maps.compute().matrix


def passes(layers: int, features: int, data: Tensor, size: int) -> None:
    """The part that no way can save: the networks' forward passes."""
    with torch.no_grad():
        for model in (network(layers, features, 1), network(layers, features, 2)):
            for batch in data.split(size):
                model(batch)


def passes_and_grams(layers: int, features: int, data: Tensor, size: int) -> None:
    """The same with one Gram matrix of each layer and batch, by the fastest product (half of a symmetric one)."""
    with torch.no_grad():
        for model in (network(layers, features, 1), network(layers, features, 2)):
            with LayerTap(model, consume=lambda _, x: x.numpy() @ x.numpy().T):
                for batch in data.split(size):
                    model(batch)


def ours_whole(layers: int, features: int, data: Tensor, size: int) -> np.ndarray[Any, Any]:
    """The public function, with its search for axes and copies."""
    a, b = network(layers, features, 1), network(layers, features, 2)
    return compare(a, b, data, batch_size=size).cross.matrix


def pytorch_cka(layers: int, features: int, data: Tensor, size: int) -> Any:
    """One contraction of stacked Gram matrices, of stored features."""
    a, b = network(layers, features, 1), network(layers, features, 2)
    loader = DataLoader(TensorDataset(data), batch_size=size)
    return importlib.import_module("cka").compute_cka(a, b, loader, progress=False)[0].numpy()


def torch_cka(layers: int, features: int, data: Tensor, size: int) -> Any:
    """Two HSIC and one Gram matrix anew for each pair of layers."""
    names = [str(i) for i in range(layers)]
    a, b = network(layers, features, 1), network(layers, features, 2)
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        pair = importlib.import_module("torch_cka").CKA(a, b, model1_layers=names, model2_layers=names)
        pair.compare(DataLoader(TensorDataset(data), batch_size=size))
    return pair.export()["CKA"].numpy()


WAYS: dict[str, Callable[[int, int, Tensor, int], Any]] = {
    "MinibatchCKA": ours,
    "compare": ours_whole,
    "pytorch-cka": pytorch_cka,
    "torch_cka": torch_cka,
    "forward passes alone": passes,
    "forward passes and Gram matrices alone": passes_and_grams,
}


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")
            return [*(row for setting in _settings(quick) for row in _rows(*setting)), *_memory()]
    finally:
        torch.set_num_threads(before)


def _settings(quick: bool) -> list[tuple[int, int, int, int]]:
    """Layers of each network, features, examples in a batch, repeats."""
    return [(16, 256, 64, 5), (32, 512, 128, 3)] if quick else [(16, 256, 64, 9), (32, 512, 128, 5), (48, 768, 256, 3)]


def _rows(layers: int, features: int, size: int, repeats: int) -> list[Row]:
    what = f"CKA of {layers} x {layers} layers of {features} features, 2 batches of {size}"
    data = torch.randn(2 * size, features, generator=torch.Generator().manual_seed(0))
    ways = {k: f for k, f in WAYS.items() if k not in PEERS or importlib.util.find_spec(PEERS[k]) is not None}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    exact = ours(layers, features, data.double(), size) if layers <= 16 else None
    rows: list[Row] = []
    for turn in range(repeats + 1):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            start = time.process_time()
            found = ways[name](layers, features, data, size)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
            elif exact is not None and name in ("MinibatchCKA", *PEERS):  # compare has the examples in another order
                error = float(np.nanmax(np.abs(found - exact)))
                rows.append(_row(name, f"{what}: largest error of float32", error, ""))
    first = np.array(seconds["MinibatchCKA"])
    for name, values in seconds.items():
        ratio = float(np.median(np.array(values) / first))
        label = f"{name} (baseline)" if name == "MinibatchCKA" else name
        rows.append(_row(label, what, 1000 * float(first.min()) * ratio, "ms", ratio))
    return rows


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _memory(layers: int = 24, features: int = 8192, size: int = 128) -> list[Row]:
    """What fresh processes need beyond what one small batch of few layers needs."""
    kept = 2 * layers * size * features * 4 / 2**20
    what = f"CKA of {layers} x {layers} layers of {features} features, a batch of {size}: peak memory"
    rows = [_row("all features of the batch (baseline)", what, kept, "MiB", 1.0)]
    for name in ("MinibatchCKA", "pytorch-cka"):
        if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
            continue
        asked = [sys.executable, "-W", "ignore", __file__, name, *map(str, (layers, features, size))]
        used = float(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
        rows.append(_row(name, what, used, "MiB", used / kept))
    return rows


def _measure_peak(name: str, layers: int, features: int, size: int) -> float:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    WAYS[name](4, 8, torch.randn(16, 8), 8)  # imports and first allocations
    data = torch.randn(size, features)
    network(layers, features, 1), network(layers, features, 2)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[name](layers, features, data, size)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024


if __name__ == "__main__":
    print(_measure_peak(sys.argv[1], *map(int, sys.argv[2:5])))
