r"""What the continuous theory of SGD predicts of a conserved quantity: closed forms in all damping regimes.

Kunin et al. (2021, section 5) model SGD with learning rate η, weight decay λ, momentum β and dampening d by

.. math:: m\ddot θ + c\dot θ + λθ = -g, \qquad m = \tfrac{η(1-d)(1+β)}{2}, \quad c = 1-β, \quad t = η(1-d)k

after k steps. Along a symmetry the gradient drops out. With w = 1 for a translation (Q linear in θ), w = 2 for scale,
rescale and matrix laws (Q quadratic), and the velocity :math:`\dot θ = -v/(1-d)` of the momentum buffer v,

.. math:: \ddot Q + 2γ\dot Q + ω^2 Q = F, \quad γ = \tfrac{c}{2m}, \quad ω^2 = \tfrac{wλ}{m}, \quad
          F = 0 \text{ or } 2‖\dot θ_A‖^2.

Without momentum the paper uses the first-order flow of the modified loss, :math:`\dot Q + wλQ = η‖g_A‖^2` (eqs. 18-20).

Both are linear with constant coefficients, so a step is one 2 by 2 matrix exponential, computed once per setting. The
recursions run forward with kernels that decay: nothing overflows at any number of steps, and critical damping is no
special case. (Sums of :math:`e^{2λt}‖g‖^2`, as in the official code, overflow.)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import expm, schur

from mlcollage._checks import choice, integer, positive, real
from mlcollage.errors import InvalidInput

from .term import KINDS, Kind

__all__ = ["Oscillator", "Propagator", "SGDSettings", "oscillator", "predict", "propagator"]

Floats = npt.NDArray[np.float64]


class SGDSettings(NamedTuple):
    """What one parameter group is trained with in one step of ``torch.optim.SGD``.

    Attributes
    ----------
    lr, weight_decay, momentum, dampening
        η, λ, β and d.
    """

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0

    def entering(self, first: bool = False) -> float:
        """The factor with which a gradient enters the update: 1 - d, but 1 in the first step and without momentum."""
        return 1.0 if first or self.momentum == 0 else 1 - self.dampening


def check_settings(lr: Any, weight_decay: Any, momentum: Any = 0.0, dampening: Any = 0.0) -> None:
    """Refuse settings for which no prediction exists; learning rate and weight decay may be schedules.

    Raises
    ------
    InvalidInput
        If η <= 0, λ < 0, β not in [0, 1), d not in [0, 1), or one is not finite.
    """
    for rate in np.unique(lr).tolist():
        positive("lr", rate)
    for decay in np.unique(weight_decay).tolist():
        real("weight_decay", decay, least=0)
    real("momentum", momentum, least=0, below=1)
    real("dampening", dampening, least=0, below=1)


@dataclass(frozen=True)
class Oscillator:
    r"""The damped oscillator :math:`\ddot Q + 2γ\dot Q + ω^2Q = 0` of one setting, time in units of :math:`ηk(1-d)`.

    Attributes
    ----------
    gamma, omega2
        Damping γ and squared frequency ω².
    """

    gamma: float
    omega2: float

    @property
    def regime(self) -> Literal["under", "critical", "over"]:
        """``under``-, ``critical``ly or ``over``-damped."""
        gap = self.gamma**2 - self.omega2
        if abs(gap) <= 1e-12 * self.gamma**2:
            return "critical"
        return "over" if gap > 0 else "under"

    def factor(self, t: npt.ArrayLike) -> Floats:
        r"""Q(t)/Q(0) of the free oscillator that starts at rest.

        With :math:`s = \sqrt{|γ^2-ω^2|}`: under-damped :math:`e^{-γt}(\cos st + γt\,\mathrm{sinc}\,st)`, critical
        :math:`e^{-γt}(1+γt)`, over-damped :math:`(α_+e^{α_-t} - α_-e^{α_+t})/(α_+-α_-)` with :math:`α_±=-γ±s`.

        Examples
        --------
        >>> Oscillator(gamma=1.0, omega2=1.0).factor([0.0, 1.0, 1e9]).round(4).tolist()
        [1.0, 0.7358, 0.0]
        """
        t = np.asarray(t, dtype=float)
        gap = self.gamma**2 - self.omega2
        s = math.sqrt(abs(gap))
        decay = np.exp(-self.gamma * t)
        if gap <= 0:
            return decay * (np.cos(s * t) + self.gamma * t * np.sinc(s * t / np.pi))
        # Near t = 0, and near critical damping, the quotient loses digits: there s*t is small and sinh is safe.
        near = np.minimum(s * t, 1.0)
        ratio = np.where(near > 1e-8, np.sinh(near) / np.where(near > 1e-8, near, 1.0), 1.0)
        slow = -self.omega2 / (self.gamma + s)  # -γ + s without cancellation
        fast = -(self.gamma + s)
        far = (-fast * np.exp(slow * t) + slow * np.exp(fast * t)) / (2 * s)
        return np.where(s * t < 1.0, decay * (np.cosh(near) + self.gamma * t * ratio), far)


def oscillator(
    lr: float, weight_decay: float, momentum: float, dampening: float = 0.0, *, kind: Kind = "translation"
) -> Oscillator:
    """γ and ω² of a law under SGD with these settings (the formulas are at the head of this module).

    Examples
    --------
    >>> oscillator(0.1, 1e-3, 0.9).regime
    'over'
    >>> oscillator(0.1, 1e-1, 0.99).regime
    'under'
    """
    check_settings(lr, weight_decay, momentum, dampening)
    mass = lr * (1 - dampening) * (1 + momentum) / 2
    return Oscillator((1 - momentum) / (2 * mass), _weight(kind) * weight_decay / mass)


def _weight(kind: str) -> int:
    return 1 if choice("kind", kind, KINDS) == "translation" else 2


@dataclass(frozen=True)
class Propagator:
    r"""One step of the theory: ``state' = transition @ state + gain * V``, exact for a forcing constant over the step.

    The state is (Q,) for the first-order flow and (Q, dQ/dk) for the second, both per step k; V is the signed squared
    norm of the momentum buffer after the step (without momentum: of the gradient).
    """

    transition: Floats
    gain: Floats


@functools.lru_cache(maxsize=4096)
def propagator(
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    *,
    kind: Kind = "scale",
    order: int | None = None,
) -> Propagator:
    """The matrix exponential of one step at these settings, remembered; see :func:`predict` for the arguments.

    Examples
    --------
    >>> propagator(0.1, 0.0).transition.tolist()
    [[1.0]]
    """
    check_settings(lr, weight_decay, momentum, dampening)
    order = (2 if momentum else 1) if order is None else integer("order", order, least=1, most=2)
    settings = SGDSettings(lr, weight_decay, momentum, dampening)
    h, friction = lr * settings.entering(), 1 - momentum  # the time of a step, and c
    mass = h * (1 + momentum) / 2
    w, forced = _weight(kind), 0.0 if kind == "translation" else 1.0
    if order == 1:
        rate = w * weight_decay * h / friction
        held = -math.expm1(-rate) / rate if rate else 1.0
        return Propagator(np.array([[math.exp(-rate)]]), np.array([forced * held * lr**2 * (1 + momentum) / friction]))
    # In units of steps, so that the matrix holds numbers of order one: damping 2γh = 2(1-β)/(1+β) and (ωh)².
    # The third row and column carry the forcing, which is constant over the step.
    augmented = np.array(
        [[0.0, 1.0, 0.0], [-w * weight_decay * h**2 / mass, -friction * h / mass, forced * 2 * lr**2], [0.0, 0.0, 0.0]]
    )
    step = expm(augmented)
    return Propagator(step[:2, :2], step[:2, 2])


def predict(
    Q0: npt.ArrayLike,
    lr: npt.ArrayLike,
    weight_decay: npt.ArrayLike,
    momentum: float = 0.0,
    dampening: float = 0.0,
    steps: int = 1,
    forcing: npt.ArrayLike | None = None,
    *,
    kind: Kind = "scale",
    order: int | None = None,
) -> Floats:
    r"""What the continuous theory says a conserved quantity will be after each step.

    Parameters
    ----------
    Q0
        Values before the first step, of any shape (n, ...).
    lr, weight_decay
        η > 0 and λ >= 0: one number, or ``steps`` numbers (a schedule; held constant within a step).
    momentum, dampening
        β in [0, 1) and d in [0, 1). As in torch, d has no effect if β = 0.
    steps
        How many, at least 1.
    forcing
        Shape (steps, n, ...): by step, the squared norm ‖g_A‖² of the gradient if β = 0, of the momentum buffer
        ‖v_A‖² after the update otherwise; signed sums for rescale, matrices for matrix laws. The factors η and 2m
        are applied here. None: no forcing. Translations have none.
    kind
        ``translation``, ``scale``, ``rescale`` or ``matrix``.
    order
        1 for the first-order flow, 2 for the oscillator that starts at rest. By default the paper's choice: 1 without
        momentum, 2 with it. ``order=1`` with momentum drops the inertia and is what the oscillator must beat.

    Returns
    -------
    ndarray
        Shape (steps + 1, n, ...), float64; the first is ``Q0``.

    Raises
    ------
    InvalidInput
        For settings out of range, ``steps`` below 1, arrays that do not fit, forcing of a translation.

    Examples
    --------
    >>> predict([2.0], lr=0.1, weight_decay=0.5, steps=3, kind="translation").round(4).ravel().tolist()
    [2.0, 1.9025, 1.8097, 1.7214]
    >>> bool(np.isfinite(predict(1.0, 0.1, 1e3, 0.9, steps=100_000)).all())
    True
    """
    start, steps = np.asarray(Q0, dtype=np.float64), integer("steps", steps, least=1)
    rates, decays = per_step(lr, steps, "lr"), per_step(weight_decay, steps, "weight_decay")
    check_settings(rates, decays, momentum, dampening)
    force = _forcing(forcing, start.shape, steps, kind)
    of_step = functools.partial(propagator, momentum=momentum, dampening=dampening, kind=kind, order=order)
    if len(np.unique(rates)) == len(np.unique(decays)) == 1:
        out = _filter(of_step(float(rates[0]), float(decays[0])), start.ravel(), force)
    else:
        out = _march(list(map(of_step, rates.tolist(), decays.tolist())), rates, start.ravel(), force)
    return out.reshape(steps + 1, *start.shape)


def per_step(value: npt.ArrayLike, steps: int, name: str) -> Floats:
    """A setting as one number per step; refuses what is neither one number nor one per step."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != steps):
        raise InvalidInput(f"{name} has shape {array.shape}; expected one number or one per step, ({steps},).")
    return np.broadcast_to(array, (steps,))


def _forcing(forcing: npt.ArrayLike | None, shape: tuple[int, ...], steps: int, kind: Kind) -> Floats:
    """The forcing as (steps, laws)."""
    if forcing is None:
        return np.zeros((steps, math.prod(shape)))
    if _weight(kind) == 1:
        raise InvalidInput("a translation is linear in θ and has no forcing; leave forcing=None.")
    force = np.asarray(forcing, dtype=np.float64)
    if force.shape != (steps, *shape):
        raise InvalidInput(f"forcing has shape {force.shape}; expected {(steps, *shape)}, one value per step and law.")
    return force.reshape(steps, -1)


def _filter(one: Propagator, start: Floats, force: Floats) -> Floats:
    """Constant settings: a linear filter.

    The transition is brought to (complex) triangular form by a unitary matrix, which has a solution at critical
    damping too, where eigenvectors do not exist; then each component is a first-order filter of scipy's.
    """
    from scipy.signal import lfilter  # takes a second to import, which a tracker's user need not wait for

    order = len(one.gain)
    T, Z = schur(one.transition, output="complex") if order == 2 else (one.transition, np.eye(1))
    gain = Z.conj().T @ one.gain
    state = np.concatenate([start[None], np.zeros((order - 1, len(start)))])  # (order, laws)
    inner = Z.conj().T @ state
    parts: list[npt.NDArray[Any]] = [np.empty(0)] * order  # each (steps + 1, laws)
    for i in reversed(range(order)):  # triangular: component i is driven by the later ones
        drive = gain[i] * force + sum(T[i, j] * parts[j][:-1] for j in range(i + 1, order))
        dtype = np.result_type(drive, T)
        tail, _ = lfilter([1.0], [1.0, -T[i, i]], drive.astype(dtype), axis=0, zi=(T[i, i] * inner[i])[None])
        parts[i] = np.concatenate([inner[i][None], tail])
    mixed = sum(Z[0, i] * parts[i] for i in range(order))
    out = np.ascontiguousarray(np.real(mixed), dtype=np.float64)
    out[0] = start
    return out


def _march(each: list[Propagator], rates: Floats, start: Floats, force: Floats) -> Floats:
    """Settings that change: step by step; dQ/dk scales with the learning rate."""
    state = np.zeros((len(each[0].gain), len(start)))
    state[0] = start
    out = [start]
    for k, one in enumerate(each):
        state[1:] *= rates[k] / rates[max(k - 1, 0)]
        state = one.transition @ state + one.gain[:, None] * force[k]
        out.append(state[0])
    return np.stack(out)
