"""What SGLD and SGHMC share: checked settings, the gradient of the potential, noise from an explicit generator."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlcollage._checks import positive, real
from mlcollage.errors import InvalidInput
from mlcollage.infer.density import Generator, normal, torch_generator


class Langevin(Optimizer):
    """An optimizer whose steps sample a tempered posterior from gradients of the mean loss of a minibatch."""

    def __init__(self, params: Iterable[Any], generator: Generator, **defaults: Any):
        super().__init__(params, defaults)
        # where the parameters are, since noise is drawn there
        self.generator = torch_generator(generator, self.param_groups[0]["params"][0].device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; ``num_data`` and ``temperature`` should agree between groups."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except InvalidInput:  # the optimizer stays as it was
            del self.param_groups[-1]
            raise

    def _check(self, group: dict[str, Any]) -> None:
        if group["rmsprop"] is not None:
            real("rmsprop", group["rmsprop"], least=0, most=1)
        for name in ("lr", "num_data", "eps"):
            positive(name, group[name])
        for name in ("weight_decay", "temperature"):
            real(name, group[name], least=0)
        device = self.param_groups[0]["params"][0].device
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise InvalidInput(
                    f"a parameter is {p.dtype}; float32 or float64 is needed, since small steps vanish in less."
                )
            if p.device != device:
                raise InvalidInput(f"parameters are on {device} and {p.device}; one device is needed for the noise.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all parameters that have a gradient.

        Parameters
        ----------
        closure
            Optional; clears gradients, computes the mean loss, calls ``backward`` and returns the loss.

        Returns
        -------
        float or None
            What the closure returned, evaluated before the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise InvalidInput("a gradient is sparse; noise moves every weight, so use a dense embedding.")
                # the potential's gradient: the sum over all data, and the prior once
                force = torch.add(group["num_data"] * p.grad, p, alpha=group["weight_decay"])
                self._move(p, force, self._mass(p, force, group), group)
        return loss

    def _mass(self, p: Tensor, force: Tensor, group: dict[str, Any]) -> Tensor | None:
        """RMSprop's diagonal M, after a look at this step's gradient; None for the identity."""
        decay = group["rmsprop"]
        if decay is None:
            return None
        state = self.state[p]  # of torch's optimizers: saved and loaded with them
        if "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(p)
        squares: Tensor = state["square_avg"]
        squares.mul_(decay).addcmul_(force, force, value=1 - decay)  # elementwise, in the parameter's shape
        return squares.sqrt().add_(group["eps"])

    @abstractmethod
    def _move(self, p: Tensor, force: Tensor, mass: Tensor | None, group: dict[str, Any]) -> None:
        """Move one parameter, given the gradient of the potential and the preconditioner."""

    def _add_noise(self, to: Tensor, variance: float, scale: Tensor | None = None) -> None:
        if variance > 0:  # at temperature zero no number is drawn
            noise = normal(to.shape, to, self.generator)
            to.add_(noise if scale is None else noise.mul_(scale), alpha=math.sqrt(variance))

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, and the generator's state, so that a resumed chain repeats the uninterrupted one."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Settings, buffers and the generator's state from :meth:`state_dict`."""
        if "generator" not in state_dict:
            raise InvalidInput(
                f"the state dict has no generator, so it is not of {type(self).__name__}; load what its state_dict "
                "returned."
            )
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"].cpu())  # a checkpoint may have been mapped to a device

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}
