"""Where the recorded networks of the matrix lie: a small table that comes with the package."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pandas as pd

from mlcollage.portraits.instrument import Number

FILE = Path(__file__).parent / "recorded.parquet"


@functools.cache
def recorded() -> pd.DataFrame:
    """Rows of ``network, seed, quantity, value``; none where nothing was recorded."""
    if not FILE.exists():
        return pd.DataFrame({"network": [], "seed": [], "quantity": [], "value": []})
    return pd.read_parquet(FILE)


@functools.cache
def by_network(quantity: str) -> dict[str, float]:
    """Mean over seeds of a quantity for each recorded network that it could be asked of."""
    table = recorded()
    return {
        str(k): float(v) for k, v in table[table["quantity"] == quantity].groupby("network")["value"].mean().items()
    }


def places(quantity: str) -> tuple[float, float]:
    """Smallest and largest of the recorded networks; NaN where there is none."""
    values = list(by_network(quantity).values())
    return (min(values), max(values)) if values else (math.nan, math.nan)


def beside(number: Number) -> str:
    """Where a number lies among the recorded networks, in words; empty where there is none."""
    values = by_network(number.quantity)
    if len(values) < 2:
        return ""
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    below = sum(v < number.value for v in values.values())
    ends = f"{values[low]:.3g} ({low}) to {values[high]:.3g} ({high})"
    return f"above {below} of {len(values)} recorded: {ends}"
