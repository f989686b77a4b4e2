"""Speed and memory of learning by genomes, in one run.

``mlcollage bench bidirectional_update_rules`` prints the table. On one core: a step of 64 genomes as one population
beside 64 steps one by one, at three sizes of network and batch; a step beside the same with the layout of the official
code, one synapse tensor of (n + 1 + m)² k entries for each pair of layers, whose products run over its unused blocks
too; a step beside PyTorch's own (forward, backward, SGD) on the same layers. The ratio is to the row called baseline.

The row "arithmetic alone" is a bound: the matrix products of the step at the speed of one product of 1024 x 1024
matrices on the same core. The row "what batching cannot save" is a nearer one: the step's batched products, its two
activations of the hidden states, and one pass over synapses and their change, each by torch's own call for the whole
population, and nothing else. At 64-32-10 the latter alone is a twentieth of 64 steps one by one, and at 196-64-10 a
quarter: a single network already keeps the core busy, and a gain of 20 needs smaller networks.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from mlcollage.papers.bidirectional_update_rules import BlurNetwork, Genome, functional_step, init_weights
from mlcollage.papers.bidirectional_update_rules._activations import ACTIVATIONS
from mlcollage.papers.bidirectional_update_rules._layers import from_sizes

Row = dict[str, Any]
MEMBERS = 64
# (sizes, batch): a small table with few rows, digits, small images
CASES = (((8, 16, 3), 16), ((64, 32, 10), 32), ((196, 64, 10), 64))


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), torch.inference_mode():
            for sizes, batch in CASES:
                rows += _populations(sizes, batch, 5 if quick else 50)
            rows += _layouts(quick)
        with threadpool_limits(1):
            rows += _beside_sgd(200 if quick else 2000)
    finally:
        torch.set_num_threads(threads)
    return rows


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """The least of several times, of processor seconds, so that a busy machine does not change it much."""
    call()
    found = []
    for _ in range(repeats):
        clock = time.process_time()
        call()
        found.append(time.process_time() - clock)
    return min(found)


def _row(who: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": who, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _case(sizes: tuple[int, ...], batch: int, members: int, *, norm: str = "both") -> tuple[Any, ...]:
    genome = Genome.random(seed=0, population=members, norm=norm)
    path = from_sizes(sizes, ACTIVATIONS["tanh"], ACTIVATIONS["identity"])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(members, batch, sizes[0], generator=g)
    y = torch.randint(sizes[-1], (members, batch), generator=g)
    return path, init_weights(path, genome, seed=0), genome, x, y


def _populations(sizes: tuple[int, ...], batch: int, repeats: int) -> list[Row]:
    path, w, genome, x, y = _case(sizes, batch, MEMBERS)
    alone = [
        (init_weights(path, genome[i], seed=0), genome[i].lifted(), x[i : i + 1], y[i : i + 1]) for i in range(MEMBERS)
    ]

    def one_by_one() -> None:
        for wi, gi, xi, yi in alone:
            functional_step(path, wi, gi, xi, yi)

    separate = _seconds(one_by_one, repeats)
    together = _seconds(lambda: functional_step(path, w, genome, x, y), repeats)
    # two products for the first layer (up, Hebbian), three for others (down too), for each of two states
    layers = enumerate(itertools.pairwise(sizes))
    operations = MEMBERS * sum((2 if i == 0 else 3) * 2 * 2 * batch * n * m for i, (n, m) in layers)
    square = torch.randn(1024, 1024)
    bound = operations * _seconds(lambda: square @ square, repeats) / (2 * 1024**3)
    needed = _needed(sizes, batch, repeats)
    what = f"a step of {MEMBERS} genomes, {'-'.join(map(str, sizes))}, batch {batch}"
    return [
        _row("one by one (baseline)", what, 1000 * separate, "ms", 1.0),
        _row("one population", what, 1000 * together, "ms", separate / together),
        _row("what batching cannot save", what, 1000 * needed, "ms", separate / needed),
        _row("arithmetic alone", what, 1000 * bound, "ms", separate / bound),
    ]


def _needed(sizes: tuple[int, ...], batch: int, repeats: int) -> float:
    """Seconds of the operations that a step of a population of two states cannot do without."""
    n, h, m = sizes
    g = torch.Generator().manual_seed(0)
    x, low, high = (torch.randn(2 * MEMBERS, batch, width, generator=g) for width in sizes)
    first, second = (torch.randn(2 * MEMBERS, a, b, generator=g) for a, b in ((n, h), (h, m)))
    old, change = (torch.randn(2 * MEMBERS, n + 1, h, generator=g) for _ in range(2))
    states, new = torch.empty_like(low), torch.empty_like(old)
    parts: list[Callable[[], Any]] = [
        *(partial(torch.bmm, a, b) for a, b in ((x, first), (low, second), (high, second.mT), (x.mT, low))),
        partial(torch.bmm, low.mT, high),
        partial(torch.tanh, low, out=states),
        partial(torch.tanh, low, out=states),
        partial(torch.addcmul, change, old[:, :1, :1], old, out=new),
    ]
    return sum(_seconds(part, 4 * repeats) for part in parts)


class _SquareLayout:
    """The official storage: in + 1 + out neurons on both sides of one tensor, for each pair of layers."""

    def __init__(self, sizes: tuple[int, ...], k: int) -> None:
        self.sizes, self.k = sizes, k
        self.synapses = [torch.randn(n + 1 + m, n + 1 + m, k) for n, m in itertools.pairwise(sizes)]
        self.nu, self.mu, self.pre, self.post = (torch.randn(k, k) for _ in range(4))

    def numbers(self) -> int:
        return sum(w.numel() for w in self.synapses)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Forward, feedback, backward and Hebbian change, with products over all blocks of a tensor."""
        b = len(x)
        layers = [torch.cat([x[..., None], x.new_zeros(b, x.shape[1], self.k - 1)], -1)]
        for w, m in zip(self.synapses, self.sizes[1:], strict=True):
            below = torch.cat([layers[-1], x.new_ones(b, 1, self.k), x.new_zeros(b, m, self.k)], 1)
            layers.append(torch.tanh(torch.einsum("ijc,dc,bid->bjc", w, self.nu, below)[:, -m:]))
        layers[-1][..., 1] = y
        for i in range(len(self.synapses) - 1, 0, -1):
            n = self.sizes[i]
            above = torch.cat([x.new_zeros(b, n + 1, self.k), layers[i + 1]], 1)
            message = torch.einsum("jic,dc,bjd->bic", self.synapses[i].transpose(0, 1), self.mu, above)
            layers[i] = torch.tanh(layers[i] + message[:, :n])
        for i, w in enumerate(self.synapses):
            both = torch.cat([layers[i], x.new_ones(b, 1, self.k), layers[i + 1]], 1)
            self.synapses[i] = w - 1e-6 * torch.einsum("bie,ec,cd,bjd->ijc", both, self.pre, self.post, both)


def _layouts(quick: bool) -> list[Row]:
    sizes, batch = (784, 128, 10), 64
    path, w, genome, x, y = _case(sizes, batch, 1, norm="none")
    square = _SquareLayout(sizes, 2)
    signal = 2.0 * nn.functional.one_hot(y[0], 10).float() - 1
    numbers = sum(v.numel() for v in w.forward)
    what = "784-128-10, 2 states"
    theirs = _seconds(lambda: square.step(x[0], signal), 2 if quick else 10)
    ours = _seconds(lambda: functional_step(path, w, genome, x, y), 5 if quick else 50)
    baseline, own = "one square tensor per pair of layers (baseline)", "two-block storage, symmetric"
    stored, step = f"{what}: memory of synapses", f"{what}: a step, batch 64"
    return [
        _row(baseline, stored, square.numbers() * 4e-6, "MB", 1),
        _row(own, stored, numbers * 4e-6, "MB", square.numbers() / numbers),
        _row(baseline, step, 1000 * theirs, "ms", 1),
        _row(own, step, 1000 * ours, "ms", theirs / ours),
    ]


def _beside_sgd(repeats: int) -> list[Row]:
    sizes, batch = (64, 32, 10), 64
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, sizes[0], generator=g), torch.randint(sizes[-1], (batch,), generator=g)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def sgd() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    network = BlurNetwork(sizes, "digits-2s")
    network._told = None  # thousands of steps on random rows: its advice is known
    base, learn = _seconds(sgd, repeats), _seconds(lambda: network.learn(x, y), repeats)
    path, w, genome, xs, ys = _case(sizes, batch, 1)

    def pure() -> None:
        with torch.inference_mode():
            functional_step(path, w, genome, xs, ys)

    bare = _seconds(pure, repeats)
    what = "a step of 64-32-10, batch 64"
    return [
        _row("PyTorch: forward, backward, SGD (baseline)", what, 1000 * base, "ms", 1.0),
        _row("functional_step", what, 1000 * bare, "ms", base / bare),
        _row("BlurNetwork.learn, with its checks", what, 1000 * learn, "ms", base / learn),
    ]
