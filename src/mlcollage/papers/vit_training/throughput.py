"""How many images a model handles in a second, on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn import unwrap
from mlcollage.train import evaluating


@dataclass(frozen=True)
class Throughput:
    """Images per second, and where and how they were counted.

    Attributes
    ----------
    images_per_second
        Median over the repeats.
    low, high
        The slowest and the fastest repeat.
    batch, device, dtype, threads
        What it holds for.
    """

    images_per_second: float
    low: float
    high: float
    batch: int
    device: str
    dtype: str
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.images_per_second:.0f} images/s ({self.low:.0f} to {self.high:.0f}) at batch {self.batch}, "
            f"{self.dtype}, {self.device}, {self.threads} threads"
        )


def measure_throughput(
    model: nn.Module,
    in_shape: tuple[int, ...],
    *,
    batch: int = 32,
    repeats: int = 7,
    warmup: int = 2,
    autocast: torch.dtype | None = None,
) -> Throughput:
    """Time forward passes in evaluation mode, without gradients; the model's mode is put back.

    Only the model is timed: inputs are on its device before, the first passes (compilation, allocation) are not
    counted, and a GPU is waited for.

    Parameters
    ----------
    model
        Any network that takes floating-point inputs.
    in_shape
        Shape of one input.
    batch
        Inputs of each pass.
    repeats, warmup
        Passes that are counted, and passes before them.
    autocast
        ``torch.bfloat16``, say; None for the model's own type.

    Examples
    --------
    >>> found = measure_throughput(nn.Linear(4, 2), (4,), batch=8)
    >>> found.low <= found.images_per_second <= found.high, found.batch
    (True, 8)
    """
    batch = checks.integer("batch", batch, least=1)
    repeats, warmup = checks.integer("repeats", repeats, least=1), checks.integer("warmup", warmup, least=0)
    unwrap(model)  # refuses what is no module, or has no numbers
    if not isinstance(in_shape, Sequence) or not all(isinstance(n, int) and n > 0 for n in in_shape):
        raise InvalidInput(f"in_shape must be the shape of one input, such as (3, 224, 224), not {in_shape!r}.")
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    dtype = torch.float32 if first is None else first.dtype
    x = torch.zeros(batch, *in_shape, device=device, dtype=dtype)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    rates = []
    with evaluating(model), torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for k in range(warmup + repeats):
            wait()
            start = time.perf_counter()
            model(x)
            wait()
            if k >= warmup:
                rates.append(batch / max(time.perf_counter() - start, 1e-9))
    shown = str(autocast or dtype).removeprefix("torch.")
    return Throughput(
        float(np.median(rates)), min(rates), max(rates), batch, str(device), shown, torch.get_num_threads()
    )
