"""Speed of the Deep Bootstrap framework: generators, stacked worlds, and one ideal run for every n.

``mlcollage bench deep_bootstrap`` prints the table. Each value is the best of several repetitions, on one
thread; ratios are to the row called baseline of the same comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mlcollage.data.glyphs import GlyphWorld
from mlcollage.data.mnist1d import MNIST1D, reference
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.mlp import MLP
from mlcollage.papers.deep_bootstrap import DeepBootstrap

Row = dict[str, Any]


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    repeats = 3 if quick else 5
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a run of a study has it
    try:
        return [*_generators(quick, repeats), *_stacked(quick, repeats), *_one_ideal_run(quick, repeats)]
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[int], Any], repeats: int) -> float:
    """Seconds of the fastest repetition; ``run`` is told its number, so that nothing it makes is cached."""
    run(0)
    times = []
    for i in range(1, repeats + 1):
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
    return min(times)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _generators(quick: bool, repeats: int) -> list[Row]:
    rows = []
    images = 2048 if quick else 16_384  # whole blocks
    for preset in ("easy16", "standard32", "difficult32", "hard"):
        world = GlyphWorld.preset(preset)
        seconds = _best(lambda i, w=world: w.sample(i * images, images), repeats)
        rows.append(_row(f"GlyphWorld {preset}", "generate fresh images", images / seconds, "images/s"))
    signals = 5000
    naive = signals / _best(lambda i: reference(), repeats)
    many = 16_384 if quick else 131_072
    world = MNIST1D()
    stream = many / _best(lambda i: world.sample(i * many, many), repeats)
    what = "generate fresh MNIST-1D signals"
    rows.append(_row("reference, sample by sample (baseline)", what, naive, "signals/s", 1.0))
    rows.append(_row("MNIST1D stream", what, stream, "signals/s", stream / naive))
    return rows


def _framework(kind: str, n: tuple[int, ...], steps: int, seeds: int, stack: bool | None = None) -> DeepBootstrap:
    world = GlyphWorld.preset("easy16")

    def model() -> MLP | ConvNet:
        if kind == "MLP-64":
            return MLP(world.shape, 10, (64,))
        return ConvNet(world.shape, 10, (8, 16), norm="group")

    return DeepBootstrap(
        model,
        world,
        n=n,
        steps=steps,
        batch_size=64,
        seeds=seeds,
        test_size=500,
        train_size=500,
        eval_at=[],
        transform=lambda x: (x - 0.5) / 0.25,
        stack=stack,
    )


def _stacked(quick: bool, repeats: int) -> list[Row]:
    return [
        *_compare_stacked("MLP-64", 150 if quick else 600, 2 if quick else 4, repeats),
        *_compare_stacked("ConvNet-8-16", 40 if quick else 160, 2 if quick else 4, repeats),
    ]


def _compare_stacked(kind: str, steps: int, seeds: int, repeats: int) -> list[Row]:
    sizes = (640, 2000)
    worlds = (1 + len(sizes)) * seeds
    apart, together = (
        worlds * steps / _best(lambda i, s=stack: _framework(kind, sizes, steps, seeds, s).run(), repeats)
        for stack in (False, True)
    )
    what = f"{worlds} worlds of {kind}, easy16, batch 64, data included"
    return [
        _row("one after the other (baseline)", what, apart, "updates/s", 1.0),
        _row("stacked", what, together, "updates/s", together / apart),
    ]


def _one_ideal_run(quick: bool, repeats: int) -> list[Row]:
    sizes, steps = (640, 1280, 2560, 5120), 100 if quick else 400
    what = f"both worlds at {len(sizes)} sizes, MLP-64, {steps} steps, one after the other"

    def separately(i: int) -> None:
        for n in sizes:
            _framework("MLP-64", (n,), steps, 1, stack=False).run()

    apart = _best(separately, repeats)
    together = _best(lambda i: _framework("MLP-64", sizes, steps, 1, stack=False).run(), repeats)
    return [
        _row("an ideal run for each n (baseline)", what, apart, "s", 1.0),
        _row("one ideal run for all n", what, together, "s", apart / together),
    ]


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench()))
