r"""The exact discrete ledger: how much of each step's change of a conserved quantity is due to what. No approximation.

A step moves θ by Δ. For a law that is quadratic in θ (scale, rescale, matrix), with the signed product ⟨·,·⟩ of its
index set, and for one that is linear (translation),

.. math:: ΔQ = 2⟨θ, Δ⟩ + ⟨Δ, Δ⟩ \qquad\text{and}\qquad ΔQ = ⟨1_A, Δ⟩ .

PyTorch's SGD takes :math:`v' = βv + (1-d)(g + λθ)` and :math:`Δ = -ηv'` (its very first step takes v' = g + λθ). Write
p(x) for ⟨θ, x⟩ or ⟨1_A, x⟩, f for 2 or 1, V for ⟨v', v'⟩ or 0, and let r = p(g) be the residual of the symmetry, zero
if it is exact. Then with P = p(v) the quantity obeys a recursion in two numbers per law, exact for any schedule:

.. math:: s = βP + (1-d)(r + λQ), \qquad Q' = Q - fηs + η^2V, \qquad P' = s - ηV .

The *breaking budget* of the step is its four parts: symmetry -fη(1-d)r, weight decay -fη(1-d)λQ, momentum -fηβP and
discretization η²V. Optimizers that do more to the gradient add a part for their preconditioner, and one for clipping.

The functions take numbers, NumPy arrays and tensors alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mlcollage.errors import InvalidInput

from .closed_form import SGDSettings, check_settings, per_step

TERMS = ("symmetry", "weight_decay", "momentum", "preconditioner", "clipping", "discretization")
"""The parts of the breaking budget, in the order in which they are drawn."""

X = TypeVar("X")


class LedgerState(NamedTuple):
    """What the ledger keeps of a law: the quantity Q, and its product P = ⟨θ, v⟩ (or ⟨1_A, v⟩) with the momentum."""

    Q: Any
    P: Any


def sgd_step(
    state: LedgerState, V: Any, settings: SGDSettings, *, quadratic: Any = 1.0, residual: Any = 0.0, first: bool = False
) -> LedgerState:
    """One step of the recursion.

    Parameters
    ----------
    state
        Q and P before the step; P is 0 before the first.
    V
        Signed squared norm ⟨v', v'⟩ of the update direction (the momentum buffer after the step); 0 for translations.
    settings
        η, λ, β, d of this step.
    quadratic
        1 where the law is quadratic in θ, 0 where it is linear; may be an array.
    residual
        r = ⟨θ, g⟩ or ⟨1_A, g⟩; 0 predicts with the symmetry taken as exact.
    first
        Whether the momentum buffer is made in this step (torch does not damp it then).

    Examples
    --------
    >>> sgd_step(LedgerState(1.0, 0.0), 4.0, SGDSettings(lr=0.5, weight_decay=0.5))
    LedgerState(Q=1.5, P=-1.5)
    """
    lr, decay, momentum, _ = settings
    s = momentum * state.P + settings.entering(first) * (residual + decay * state.Q)
    V = quadratic * V
    return LedgerState(state.Q - (1 + quadratic) * lr * s + lr**2 * V, s - lr * V)


def sgd_budget(
    state: LedgerState, V: Any, settings: SGDSettings, *, quadratic: Any = 1.0, residual: Any = 0.0, first: bool = False
) -> dict[str, Any]:
    """The breaking budget of one step of SGD: parts that sum to Q' - Q. Arguments as in :func:`sgd_step`.

    Examples
    --------
    >>> parts = sgd_budget(LedgerState(1.0, 0.0), 4.0, SGDSettings(lr=0.1, weight_decay=0.5), residual=0.01)
    >>> {name: round(part, 3) for name, part in parts.items()}
    {'symmetry': -0.002, 'weight_decay': -0.1, 'momentum': -0.0, 'discretization': 0.04}
    """
    lr, decay, momentum, _ = settings
    scale, entering = -(1 + quadratic) * lr, settings.entering(first)
    return {
        "symmetry": scale * entering * residual,
        "weight_decay": scale * entering * decay * state.Q,
        "momentum": scale * momentum * state.P,
        "discretization": lr**2 * quadratic * V,
    }


def budget(
    *, moved: X, second: X, residual: X, decay: X, momentum: X | None = None, raw: X | None = None
) -> dict[str, X]:
    """The breaking budget of one step of any optimizer, from products along the step.

    All first-order parts are f p(x), with p(x) and f as at the head of this module.

    Parameters
    ----------
    moved, second
        f p(Δ) and ⟨Δ, Δ⟩ (0 for translations): their sum is the change of Q, exactly.
    residual, decay
        -η f p(g) with the final gradient, and -ηλ f p(θ): what plain SGD would have done.
    momentum
        -η f p(m - g - λθ) for an optimizer with a running mean m of gradients (bias corrected); None: it has none.
    raw
        -η f p(g) with the gradient before it was clipped; None: it was not clipped.

    Returns
    -------
    dict
        The parts by name. ``preconditioner`` is what remains of the first order: what the optimizer did to the
        direction beyond momentum and decay.

    Examples
    --------
    >>> parts = budget(moved=-0.3, second=0.02, residual=0.0, decay=-0.1, momentum=-0.05)
    >>> round(parts["preconditioner"], 3), round(sum(parts.values()), 3)
    (-0.15, -0.28)
    """
    parts: dict[str, Any] = {"symmetry": residual if raw is None else raw, "weight_decay": decay}
    rest: Any = moved - residual - decay  # type: ignore[operator]
    if raw is not None:
        parts["clipping"] = residual - raw  # type: ignore[operator]
    if momentum is not None:
        parts["momentum"] = momentum
        rest = rest - momentum
    return {**parts, "preconditioner": rest, "discretization": second}


def sgd_ledger(
    Q0: npt.ArrayLike,
    V: npt.ArrayLike,
    lr: npt.ArrayLike,
    weight_decay: npt.ArrayLike = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    *,
    residual: npt.ArrayLike = 0.0,
    linear: bool = False,
) -> npt.NDArray[np.float64]:
    """Q before the first and after each step of SGD that started from fresh state.

    Parameters
    ----------
    Q0
        Shape (...).
    V
        Signed squared norms of the update directions by step, (steps, ...).
    lr, weight_decay
        One number, or one per step.
    momentum, dampening
        As in ``torch.optim.SGD``.
    residual
        ⟨θ, g⟩ by step, of the shape of V; 0 takes the symmetry as exact.
    linear
        Whether the law is a translation; V then only says how many steps.

    Returns
    -------
    ndarray
        (steps + 1, ...), float64.

    Raises
    ------
    InvalidInput
        For settings out of range or arrays that do not fit.

    Examples
    --------
    >>> sgd_ledger(1.0, [4.0, 4.0], lr=0.1, weight_decay=0.5).round(4).tolist()
    [1.0, 0.94, 0.886]
    """
    start, norms = np.asarray(Q0, dtype=np.float64), np.asarray(V, dtype=np.float64)
    if norms.ndim != start.ndim + 1 or norms.shape[1:] != start.shape or not len(norms):
        raise InvalidInput(f"V has shape {norms.shape}; expected (steps, {', '.join(map(str, start.shape))}).")
    steps = len(norms)
    rates, decays = per_step(lr, steps, "lr"), per_step(weight_decay, steps, "weight_decay")
    check_settings(rates, decays, momentum, dampening)
    broken = np.broadcast_to(np.asarray(residual, dtype=np.float64), norms.shape)
    state, out = LedgerState(start, np.zeros_like(start)), [start]
    quadratic = 0.0 if linear else 1.0
    for k in range(steps):
        settings = SGDSettings(rates[k], decays[k], momentum, dampening)
        state = sgd_step(state, norms[k], settings, quadratic=quadratic, residual=broken[k], first=k == 0)
        out.append(state.Q)
    return np.stack(out)


def effective_lr(lr: Any, Q: Any) -> Any:
    """Learning rate of the direction of a scale-invariant weight: η/‖θ‖².

    Examples
    --------
    >>> effective_lr(0.1, 4.0)
    0.025
    """
    return lr / Q


def equilibrium(lr: float, weight_decay: float, unit_gradient: Any, momentum: float = 0.0) -> Any:
    r"""‖θ‖² at which weight decay and discretization balance for a scale-invariant weight.

    The gradient is :math:`\hat g/‖θ‖`, with :math:`\hat g` that at unit norm, so that :math:`\dot Q = 0` gives
    :math:`‖θ‖^4 = η‖\hat g‖^2 / 2λ(1-β)` (with momentum: if gradients of different steps are uncorrelated).

    Parameters
    ----------
    lr, weight_decay, momentum
        η, λ > 0, β.
    unit_gradient
        :math:`‖\hat g‖^2 = ‖g‖^2‖θ‖^2`.

    Examples
    --------
    >>> float(equilibrium(0.1, 5e-4, 1.0))
    10.0
    """
    check_settings(lr, weight_decay, momentum, 0.0)
    if weight_decay == 0:
        raise InvalidInput("weight_decay=0 has no equilibrium: the norm grows without end.")
    return (lr * unit_gradient / (2 * weight_decay * (1 - momentum))) ** 0.5
