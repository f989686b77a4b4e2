"""What a tracker has measured, and how it becomes a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from mlcollage.errors import InvalidInput

from .ledger import TERMS
from .symmetry import SymmetrySet

Floats = npt.NDArray[np.float64]


class Records:
    """One vector over all laws per quantity and measured step; kept on the device they came from."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.columns: dict[str, list[Tensor]] = {}
        self.parts: list[dict[str, Tensor]] = []

    @property
    def last_step(self) -> int:
        """The last measured step, -1 before the first."""
        return self.steps[-1] if self.steps else -1

    def add(self, step: int, columns: Mapping[str, Tensor | None], parts: Mapping[str, Tensor]) -> None:
        """One measured step."""
        self.steps.append(step)
        for name, value in columns.items():
            if value is not None:
                self.columns.setdefault(name, []).append(value)
        self.parts.append(dict(parts))

    def arrays(self, symmetries: SymmetrySet) -> dict[str, npt.NDArray[Any]]:
        """All columns and parts as arrays; see ``ConservationTracker.arrays``."""
        if not self.steps:
            raise InvalidInput("nothing was measured yet; train inside `with tracker:`, or call tracker.start() first.")
        counts = [law.n_laws for law in symmetries]
        zero = torch.zeros(sum(counts))  # for records between which a part was not at work
        parts = {  # those of the first row are zero
            name: [p.get(name, zero).expand(len(zero)) for p in self.parts]
            for name in TERMS
            if any(name in p for p in self.parts)
        }
        return {
            "step": np.array(self.steps),
            "law": np.repeat([law.name for law in symmetries], counts),
            "kind": np.repeat([law.kind for law in symmetries], counts),
            **{name: _numpy(rows) for name, rows in {**self.columns, **parts}.items()},
        }

    def notes(self) -> list[str]:
        """What is odd about the numbers."""
        finite = np.isfinite(_numpy(self.columns["measured"])).all(axis=1)
        if finite.all():
            return []
        step = self.steps[int(np.flatnonzero(~finite)[0])]
        return [f"conserved quantities are not finite from step {step} on: the training diverged"]

    def state(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {
            "steps": list(self.steps),
            "columns": {n: torch.stack(v) for n, v in self.columns.items()},
            "parts": [dict(p) for p in self.parts],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Records:
        """Inverse of :meth:`state`."""
        records = cls()
        records.steps = list(state["steps"])
        records.columns = {n: list(v.unbind()) for n, v in state["columns"].items()}
        records.parts = [dict(p) for p in state["parts"]]
        return records


def _numpy(rows: list[Tensor]) -> Floats:
    """(measured steps, laws)."""
    return np.stack([row.double().cpu().numpy() for row in rows])


def tidy(arrays: Mapping[str, npt.NDArray[Any]], level: str) -> pd.DataFrame:
    """One row per step and family (or law); the columns are described at ``ConservationTracker.result``."""
    label = "n_laws" if level == "family" else "index"
    frames = []
    for name in dict.fromkeys(arrays["law"].tolist()):
        own = np.flatnonzero(arrays["law"] == name)
        start, stop = int(own[0]), int(own[-1]) + 1
        cuts = [(stop - start, slice(start, stop))]
        if level == "law":
            cuts = [(k - start, slice(k, k + 1)) for k in range(start, stop)]
        for number, cut in cuts:
            frame = _rows({key: a[:, cut] for key, a in arrays.items() if a.dtype == np.float64})
            frames.append(frame.assign(step=arrays["step"], law=name, kind=arrays["kind"][start], **{label: number}))
    table = pd.concat(frames, ignore_index=True)
    first = ["step", "time", "law", "kind", label]
    order = first + [c for c in table if c not in first]
    return table[order].sort_values(["step"], kind="stable", ignore_index=True)


def _rows(own: Mapping[str, Floats]) -> pd.DataFrame:
    """Means over the given laws, and errors of their vector; `own` holds arrays (steps, laws)."""
    measured = own["measured"]
    columns = {"time": own["time"].mean(axis=1), "measured": measured.mean(axis=1)}
    with np.errstate(over="ignore", invalid="ignore"):  # a run that diverged; the notes say so
        size, moved = np.linalg.norm(measured, axis=1), np.linalg.norm(measured - measured[0], axis=1)
        columns |= {"change": (measured - measured[0]).mean(axis=1), "rel_null": _ratio(moved, size)}
        for name, prefix in (("predicted", ""), ("closed_form", "closed_form_")):
            if name in own:
                error = np.linalg.norm(own[name] - measured, axis=1)
                columns[name] = own[name].mean(axis=1)
                columns |= {f"{prefix}rel": _ratio(error, size), f"{prefix}rel_change": _ratio(error, moved)}
        parts = {name: own[name].mean(axis=1) for name in TERMS if name in own}
        if parts:
            stepped = np.diff(columns["measured"], prepend=columns["measured"][0])
            columns |= {**parts, "unexplained": stepped - sum(parts.values())}
        if "accounted" in own:
            columns["rel_accounted"] = _ratio(np.linalg.norm(own["accounted"] - measured, axis=1), size)
    return pd.DataFrame(columns)


def _ratio(a: Floats, b: Floats) -> Floats:
    """a/b; NaN where b is 0, as before the first step of the error relative to the change."""
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)
