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
from mlcollage.papers.neural_mechanics.ledger import TERMS
from mlcollage.papers.neural_mechanics.symmetry import SymmetrySet

__all__ = ["Records", "tidy"]

Floats = npt.NDArray[np.float64]
_COLUMNS = ("time", "measured", "predicted", "closed_form", "accounted")


class Records:
    """One vector over all laws a quantity and measured step; kept on the device they came from."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.columns: dict[str, list[Tensor]] = {}
        self.parts: list[dict[str, Tensor]] = []

    @property
    def last_step(self) -> int:
        """The last measured step, -1 before the first."""
        return self.steps[-1] if self.steps else -1

    def add(
        self,
        step: int,
        time: Tensor,
        measured: Tensor,
        predicted: Tensor,
        closed_form: Tensor | None,
        accounted: Tensor | None,
        parts: Mapping[str, Tensor],
    ) -> None:
        """One measured step."""
        self.steps.append(step)
        for name, value in zip(_COLUMNS, (time, measured, predicted, closed_form, accounted), strict=True):
            if value is not None:
                self.columns.setdefault(name, []).append(value)
        self.parts.append(dict(parts))

    def numpy(self, name: str) -> Floats | None:
        """A column as (measured steps, laws), None if it was not kept."""
        if name not in self.columns:
            return None
        return torch.stack(self.columns[name]).double().cpu().numpy()

    def budget(self) -> dict[str, Floats]:
        """Parts of the budget as (measured steps, laws); those of the first row are zero."""
        assert self.steps
        size = len(self.columns["measured"][0])
        names = [t for t in TERMS if any(t in p for p in self.parts)]
        zero = torch.zeros(size)
        return {n: np.stack([p.get(n, zero).double().cpu().expand(size).numpy() for p in self.parts]) for n in names}

    def arrays(self, syms: SymmetrySet) -> dict[str, npt.NDArray[Any]]:
        """All columns and parts as arrays; see ``ConservationTracker.arrays``."""
        if not self.steps:
            raise InvalidInput("nothing was measured yet; train inside `with tracker:`, or call tracker.start() first.")
        out: dict[str, npt.NDArray[Any]] = {"step": np.array(self.steps)}
        for key in ("name", "kind"):
            out["law" if key == "name" else key] = np.repeat(
                [getattr(law, key) for law in syms], [law.n_laws for law in syms]
            )
        columns = {n: self.numpy(n) for n in _COLUMNS}
        return out | {n: v for n, v in columns.items() if v is not None} | self.budget()

    def notes(self) -> list[str]:
        """What is odd about the numbers."""
        measured = self.numpy("measured")
        if measured is None or np.isfinite(measured).all():
            return []
        bad = self.steps[int(np.flatnonzero(~np.isfinite(measured).all(axis=1))[0])]
        return [f"conserved quantities are not finite from step {bad} on: the training diverged"]

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


def tidy(records: Records, syms: SymmetrySet, level: str) -> pd.DataFrame:
    """One row a measured step and family (or law); the columns are described at ``ConservationTracker.result``."""
    if level not in ("family", "law"):
        raise InvalidInput(f"level={level!r} must be 'family' or 'law'.")
    if not records.steps:
        raise InvalidInput("nothing was measured yet; train inside `with tracker:`, or call tracker.start() first.")
    columns = {n: records.numpy(n) for n in _COLUMNS}
    budget = records.budget()
    frames, begin = [], 0
    for law in syms:
        cut = slice(begin, begin + law.n_laws)
        begin += law.n_laws
        own = {n: v[:, cut] for n, v in columns.items() if v is not None}
        parts = {n: v[:, cut] for n, v in budget.items()}
        if level == "family":
            frame = _family(own, parts)
            frame.insert(0, "n_laws", law.n_laws)
            frame.insert(0, "step", records.steps)
        else:
            frame = pd.concat(
                [
                    _family(*({n: v[:, [k]] for n, v in source.items()} for source in (own, parts))).assign(
                        step=records.steps, index=k
                    )
                    for k in range(law.n_laws)
                ]
            )
        frames.append(frame.assign(law=law.name, kind=law.kind))
    table = pd.concat(frames, ignore_index=True)
    first = ["step", "time", "law", "kind", "n_laws" if level == "family" else "index"]
    order = first + [c for c in table if c not in first]
    return table[order].sort_values(["step"], kind="stable", ignore_index=True)


def _family(own: Mapping[str, Floats], parts: Mapping[str, Floats]) -> pd.DataFrame:
    measured = own["measured"]
    frame = pd.DataFrame({"time": own["time"].mean(axis=1), "measured": measured.mean(axis=1)})
    size, moved = _norm(measured), _norm(measured - measured[0])
    frame["predicted"] = own["predicted"].mean(axis=1)
    frame["change"] = (measured - measured[0]).mean(axis=1)
    error = _norm(own["predicted"] - measured)
    frame["rel"], frame["rel_change"] = _ratio(error, size), _ratio(error, moved)
    frame["rel_null"] = _ratio(moved, size)
    if "closed_form" in own:
        error = _norm(own["closed_form"] - measured)
        frame["closed_form"] = own["closed_form"].mean(axis=1)
        frame["closed_form_rel"], frame["closed_form_rel_change"] = _ratio(error, size), _ratio(error, moved)
    for name, part in parts.items():
        frame[name] = part.mean(axis=1)
    if parts:
        frame["unexplained"] = np.diff(frame["measured"], prepend=frame["measured"].iloc[0]) - sum(
            frame[name] for name in parts
        )
    if "accounted" in own:
        frame["rel_accounted"] = _ratio(_norm(own["accounted"] - measured), size)
    return frame


def _norm(rows: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # a run that diverged; the notes say so
        return np.linalg.norm(rows, axis=1)


def _ratio(a: Floats, b: Floats) -> Floats:
    """a/b; NaN where b is 0, as before the first step of the error relative to the change."""
    with np.errstate(invalid="ignore"):  # a run that diverged; the notes say so
        return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)
