r"""Symmetries confirmed or rejected by numbers.

A law with generator A holds if and only if :math:`⟨g, Aθ⟩ = 0` for the gradient of every batch. The residual of every
law is measured on random batches, against random generators (the same entries, random weights), and its finite action
is applied to the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..symmetry import Symmetry, typical_size
from .probe import Gradients, Probe

BROKEN_AT_MOST = 0.1  # residual up to which a law may be called broken by an epsilon


@dataclass(frozen=True)
class _Measured:
    """Residuals of one family, (batches, laws), and of random generators of the same entries, (draws, laws)."""

    residuals: NDArray[np.float64]
    controls: NDArray[np.float64]
    noise: float

    @property
    def worst(self) -> float:
        return float(self.residuals.max())

    @property
    def loud(self) -> NDArray[np.bool_]:
        """Which random generators have a gradient to speak of."""
        return self.controls > self.noise

    @property
    def control(self) -> float:
        """Median residual of the random generators; NaN if no law of the family has a gradient to speak of."""
        return float(np.median(self.controls[self.loud])) if self.loud.any() else math.nan

    @property
    def p_value(self) -> float:
        """Share of random generators that fit as well as the law; NaN if no law has a gradient to speak of."""
        if not self.loud.any():
            return math.nan
        as_good = self.loud & (self.controls <= self.residuals.max(0))
        return float((1 + as_good.sum()) / (1 + self.loud.sum()))


def confirm(
    symmetries: Sequence[Symmetry], probe: Probe, tol: float = 1e-6, batches: int = 3, found_by: str = "graph"
) -> tuple[list[Symmetry], list[str]]:
    """Keep the laws whose gradient constraint and finite action hold; the others as sentences.

    Parameters
    ----------
    symmetries
        Candidates.
    probe
        Batches and gradients.
    tol
        Largest residual of an exact law, and largest relative change of the loss (or outputs) under its action.
    batches
        Number of random batches.
    found_by
        Written into the certificate.

    Returns
    -------
    tuple
        The confirmed families with ``residual`` and ``certificate`` (found_by, batches, dtype, p_value, control: median
        residual of random generators, action: relative change under the finite action, eps_residual), and why others
        were rejected.
    """
    tol = max(tol, 100 * probe.precision)  # a model that insists on float32 cannot do better
    measured = _measure(symmetries, probe, batches)
    # residuals with every epsilon made a thousand times smaller, on the same batches
    small: dict[str, float] = {}
    if any(m.worst > tol for m in measured):
        with probe.small_eps(1e-3) as count:
            if count:
                again = _measure(symmetries, probe, batches, controls=0)
                small = {law.name: m.worst for law, m in zip(symmetries, again, strict=True)}
    exact = [m.worst <= tol and not law.broken_by for law, m in zip(symmetries, measured, strict=True)]
    moved = _actions(symmetries, exact, probe, tol)
    kept, refused = [], []
    for law, m, is_exact, action in zip(symmetries, measured, exact, moved, strict=True):
        shrunk = small.get(law.name, m.worst)
        # What an epsilon breaks, it breaks in proportion: 1000 times less epsilon, at least 30 times less residual.
        # Laws whose epsilon is known from the graph may also be broken by constants that no module holds.
        by_eps = m.worst <= BROKEN_AT_MOST and (shrunk <= max(tol, m.worst / 30) or (law.broken_by and m.worst <= 1e-3))
        if m.worst > tol and not by_eps:
            refused.append(f"{law.name}: rejected, its gradient constraint fails by {m.worst:.1e} on random batches")
            continue
        if action > (tol if is_exact else BROKEN_AT_MOST):
            refused.append(f"{law.name}: rejected, its finite action changes the result by {action:.1e}")
            continue
        certificate = {
            "found_by": found_by,
            "batches": batches,
            "dtype": str(probe.dtype).removeprefix("torch."),
            "p_value": m.p_value,
            "control": m.control,
            "action": action,
            "eps_residual": shrunk if m.worst > tol else math.nan,
        }
        # An epsilon that is known but does not show (its norm comes after other norms) is not worth mentioning.
        broken = law.broken_by if m.worst > probe.precision * 1e3 else None
        if m.worst > tol and broken is None:
            broken = "eps"
        kept.append(replace(law, residual=m.worst, certificate=certificate, broken_by=broken))
    return kept, refused


def _measure(symmetries: Sequence[Symmetry], probe: Probe, batches: int, controls: int = 20) -> list[_Measured]:
    """Residuals by family; the controls' draws are shared out among the batches."""
    params = {name: value.detach() for name, value in probe.parameters().items()}
    residuals: list[list[Any]] = [[] for _ in symmetries]
    random: list[list[Any]] = [[] for _ in symmetries]
    generator = torch.Generator().manual_seed(probe.seed + 77)  # a stream apart from those of the batches
    for k in range(batches):
        grads = probe.gradients(k)
        drawn = [_weighted(grads, generator) for _ in range(math.ceil(controls / batches))]
        typical, sizes = typical_size(grads), [typical_size(g) for g in drawn]
        for law, found, control in zip(symmetries, residuals, random, strict=True):
            # each (laws,), or (blocks,) for matrix laws
            found.append(law.residuals(params, grads, typical).cpu().numpy())
            control += [law.residuals(params, g, t).cpu().numpy() for g, t in zip(drawn, sizes, strict=True)]
    return [
        _Measured(np.stack(a), np.stack(b) if b else np.empty((0, law.blocks)), 1e3 * probe.precision)
        for law, a, b in zip(symmetries, residuals, random, strict=True)
    ]


def _weighted(grads: Gradients, generator: torch.Generator) -> Gradients:
    """Gradients with random weights: θ and g then meet in a random diagonal generator of the same entries."""
    return {
        name: None if grad is None else grad * torch.randn(grad.shape, generator=generator).to(grad)
        for name, grad in grads.items()
    }


def _strength(law: Symmetry, generator: torch.Generator) -> Tensor:
    # Far enough from the identity to show in the result, and near enough to stay well conditioned.
    noise = torch.randn(law.shape, generator=generator, dtype=torch.float64)
    if law.size is not None:
        return torch.eye(law.size, dtype=torch.float64) + 0.2 * noise / law.size**0.5
    return 0.1 * noise if law.kind == "translation" else torch.exp(0.3 * noise)


def _actions(symmetries: Sequence[Symmetry], exact: Sequence[bool], probe: Probe, tol: float) -> list[float]:
    """Relative change of the result under each finite action.

    The exact laws first act all together, and so do those that an epsilon breaks; only where that changes the result
    too much does each act alone.
    """
    generator = torch.Generator().manual_seed(probe.seed + 78)
    strengths = [_strength(law, generator) for law in symmetries]
    out = [0.0] * len(symmetries)
    with torch.no_grad():
        before = probe.value(0)
        for wanted, limit in ((True, tol), (False, BROKEN_AT_MOST)):
            group = [k for k, ok in enumerate(exact) if ok is wanted]
            change = _changed(probe, before, [(symmetries[k], strengths[k]) for k in group])
            for k in group:
                out[k] = change if change <= limit else _changed(probe, before, [(symmetries[k], strengths[k])])
    return out


def _changed(probe: Probe, before: list[Tensor], actions: Sequence[tuple[Symmetry, Tensor]]) -> float:
    state: dict[str, Tensor] = dict(probe.model.named_parameters())  # each action sees what those before it made
    for law, strength in actions:
        state = {**state, **law.apply(state, strength)}
    after = probe.value(0, state)
    sizes = [float((b - a).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(after, before, strict=True)]
    return max(sizes, default=0.0)
