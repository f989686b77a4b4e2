r"""The continuous-time flows that stand behind SGD, solved for a model's own full-batch loss.

With L including the weight decay λ‖θ‖²/2, c = 1 - β and m = η(1-d)(1+β)/2:

| ``kind``       | flow                                          | what it is                                          |
| -------------- | --------------------------------------------- | --------------------------------------------------- |
| ``"gradient"`` | :math:`c\dot θ = -∇L`                         | infinitely small steps; conserves all laws if λ = 0 |
| ``"modified"`` | :math:`c\dot θ = -∇L - \frac{m}{c^2} ∇^2L ∇L` | the first-order modified flow                       |
| ``"second"``   | :math:`m\ddot θ + c\dot θ = -∇L`              | the modified flow with inertia                      |

Without momentum, ``"modified"`` is the flow of :math:`L + \frac{η}{4}‖∇L‖^2`.

Time is t = η(1-d)k after k steps (Kunin et al. 2021, section 5). The last two agree with gradient descent to one order
in η more than the first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlcollage._checks import choice, integer
from mlcollage.errors import InvalidInput

from ._calculus import Loss, derivatives, loss_value
from .closed_form import SGDSettings, check_settings

Flow = Literal["gradient", "modified", "second"]


@dataclass(frozen=True)
class FlowPath:
    """Parameters along a flow.

    Attributes
    ----------
    steps
        The steps k of SGD that the points stand for, (points,).
    time
        t = η(1-d)k, (points,).
    parameters
        Values at each point by parameter name, (points, *shape), in the model's own type.
    """

    steps: npt.NDArray[np.float64]
    time: npt.NDArray[np.float64]
    parameters: dict[str, Tensor]

    def at(self, point: int) -> dict[str, Tensor]:
        """Named parameters at one point, as :class:`SymmetrySet` takes them."""
        return {name: values[point] for name, values in self.parameters.items()}


class ModifiedSGDFlow:
    """A flow that approximates SGD on one fixed loss.

    Parameters
    ----------
    model
        Any module; it is copied and left as it is. Use float64: the flows differ by little.
    loss
        ``loss(model)`` gives the full-batch loss without weight decay, always the same for the same parameters (no
        dropout; batch norm may use batch statistics).
    lr, weight_decay, momentum, dampening
        Settings of the SGD that is approximated, as in torch. Without momentum dampening has no effect.
    kind
        ``"gradient"``, ``"modified"`` or ``"second"`` (default): see the head of this module.
    substeps
        Runge-Kutta steps of fourth order within one step of SGD. They are of fixed size: error control would stall
        where ReLUs switch. 8 by default; raise it until nothing changes.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False).double()
    >>> _ = nn.init.ones_(model.weight)
    >>> flow = ModifiedSGDFlow(model, lambda m: 0.5 * (m.weight**2).sum(), lr=0.1, kind="gradient")
    >>> path = flow.solve([0, 10])  # exp(-0.1 * 10)
    >>> round(float(path.parameters["weight"][1]), 4)
    0.3679
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        kind: Flow = "second",
        substeps: int = 8,
    ) -> None:
        check_settings(lr, weight_decay, momentum, dampening)
        self.kind = choice("kind", kind, ("gradient", "modified", "second"))
        self.substeps = integer("substeps", substeps, least=1)
        self.model, self.loss, self.weight_decay = copy.deepcopy(model), loss, weight_decay
        self._parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise InvalidInput("the model has no parameter that requires a gradient; there is nothing to flow.")
        self.step_time = lr * SGDSettings(lr, weight_decay, momentum, dampening).entering()
        self.friction, self.mass = 1 - momentum, self.step_time * (1 + momentum) / 2

    def solve(self, steps: Sequence[float] | npt.NDArray[Any], *, at_rest: bool | None = None) -> FlowPath:
        """Follow the flow from the model's parameters.

        Parameters
        ----------
        steps
            Steps k of SGD at which the parameters are wanted: increasing, from 0 on.
        at_rest
            For ``"second"``: whether the velocity is zero at the start, as with a fresh momentum buffer. By default
            it is with momentum; without, the flow starts on its slow solution, with velocity -∇L.

        Raises
        ------
        InvalidInput
            If ``steps`` do not increase from 0 or more, the loss is not one finite number, or the path diverges.
        """
        wanted = np.asarray(steps, dtype=float)
        if wanted.ndim != 1 or not len(wanted) or wanted[0] < 0 or (np.diff(wanted) <= 0).any() or wanted[-1] <= 0:
            raise InvalidInput(f"steps={list(steps)} must increase, start at 0 or later and end after 0.")
        start = state = _flat(list(self._parameters.values()))
        if self.kind == "second":  # the state is (θ, θ')
            rest = self.friction < 1 if at_rest is None else at_rest
            velocity = np.zeros_like(start) if rest else -self._gradient(start)[0] / self.friction
            state = np.concatenate([start, velocity])
        points, before = [], 0.0
        for k in wanted:
            state, before = self._follow(state, k - before), k
            if not np.isfinite(state).all():
                raise InvalidInput(f"the flow left the finite numbers before step {k:g}; lower lr or raise substeps.")
            points.append(state[: len(start)])
        return FlowPath(wanted, wanted * self.step_time, self._unpack(torch.from_numpy(np.stack(points))))

    def _follow(self, state: npt.NDArray[Any], steps: float) -> npt.NDArray[Any]:
        """The classical Runge-Kutta method over so many steps of SGD."""
        count = math.ceil(steps * self.substeps)
        h = steps * self.step_time / max(count, 1)
        for _ in range(count):  # every slope has the shape of the state, (n,) or (2n,)
            k1 = self._slope(state)
            k2 = self._slope(state + h / 2 * k1)
            k3 = self._slope(state + h / 2 * k2)
            k4 = self._slope(state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state

    def _slope(self, state: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.kind == "second":  # (θ, θ')' = (θ', θ'')
            theta, velocity = np.split(state, 2)
            gradient, _ = self._gradient(theta)
            return np.concatenate([velocity, -(gradient + self.friction * velocity) / self.mass])
        gradient, curved = self._gradient(state, curvature=self.kind == "modified")
        if curved is not None:
            gradient = gradient + self.mass / self.friction**2 * curved
        return -gradient / self.friction

    def _gradient(self, theta: npt.NDArray[Any], curvature: bool = False) -> tuple[Any, Any]:
        """∇L, and ∇²L ∇L if asked for, both with weight decay."""
        parameters = list(self._parameters.values())
        values = self._unpack(torch.from_numpy(theta)[None])
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name][0])
        with torch.enable_grad():
            value = loss_value(self.loss, self.model)
            slopes = derivatives([value], parameters, create_graph=curvature)
            total = [s + self.weight_decay * p for s, p in zip(slopes, parameters, strict=True)]
            if not curvature:
                return _flat(total), None
            held = [part.detach() for part in total]
            linked = [k for k, s in enumerate(slopes) if s.requires_grad]  # the others do not depend on θ
            bent = derivatives([slopes[k] for k in linked], parameters, [held[k] for k in linked])
            turned = [self.weight_decay * h + b for b, h in zip(bent, held, strict=True)]
        return _flat(total), _flat(turned)

    def _unpack(self, points: Tensor) -> dict[str, Tensor]:
        out, begin = {}, 0
        for name, parameter in self._parameters.items():
            part = points[:, begin : begin + parameter.numel()]
            out[name] = part.reshape(-1, *parameter.shape).to(parameter)
            begin += parameter.numel()
        return out


def _flat(parts: Sequence[Any]) -> npt.NDArray[np.float64]:
    return torch.cat([p.detach().reshape(-1) for p in parts]).cpu().double().numpy()
