r"""Sharpness-aware minimization (SAM) and its adaptive form (ASAM).

SAM: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv:2010.01412, equations 2 and 3. ASAM: Kwon, Kim, Park, Choi,
ICML 2021, arXiv:2102.11600, equation 5, with the elementwise operator :math:`T_w = \mathrm{diag}(|w| + \eta)`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn._parts import wide


class SAM(torch.optim.Optimizer):
    r"""Descend the gradient that is found a step uphill.

    .. math::

        \hat\epsilon = \rho \, \frac{\nabla L(w)}{\|\nabla L(w)\|_2}, \qquad
        w \leftarrow w - \eta \, \nabla L(w + \hat\epsilon) .

    The adaptive form measures the step relative to the weights: with :math:`T_w = |w| + \mathrm{offset}`, elementwise,
    :math:`\hat\epsilon = \rho\, T_w^2 \nabla L / \| T_w \nabla L \|_2`. The second update is made by any optimizer
    of yours, whose parameter groups, learning rates and state this object shares.

    Parameters
    ----------
    params
        Parameters or parameter groups, as for every optimizer. A group may have its own ``rho`` and ``adaptive``.
    base_optimizer
        A ``torch.optim`` class that makes the update.
    rho
        Length of the step uphill; 0.05 (default) is the paper's for small data sets, ASAM uses about ten times more.
        With ``stacked``, also one for each replica.
    adaptive
        Use the adaptive form.
    offset
        :math:`\eta` of ASAM, by default 0.01; keeps weights of zero movable.
    stacked
        Parameters (R, ...) are those of R networks, and each network takes a step of its own length in its own
        direction. :class:`~mlcollage.train.replicas.Replicas` sets this. Default False.
    **kwargs
        Handed to ``base_optimizer``, e.g. ``lr=0.1, momentum=0.9``.

    Raises
    ------
    InvalidInput
        If rho or offset is negative or not finite, or a step is taken without gradients or a closure.

    Notes
    -----
    *Closure.* :meth:`step` takes a closure that computes the loss and calls ``backward()``, as L-BFGS does; gradients
    are zeroed for you. Without one, call ``loss.backward(); first_step(zero_grad=True)``, then
    ``loss.backward(); second_step(zero_grad=True)``.

    *Batch norm* sees the batch twice, and its running statistics are updated twice, the second time at the moved
    weights. Put ``momentum = 0`` on its layers during the second pass, or leave it: the original code does.

    *GradScaler.* The step uphill does not depend on the scale, so it is taken with scaled gradients; the update goes
    through the scaler, which skips it if either gradient overflowed::

        scaler.scale(loss_fn()).backward(); optimizer.first_step(zero_grad=True)
        scaler.scale(loss_fn()).backward(); optimizer.restore()
        scaler.step(optimizer.base_optimizer); scaler.update()

    *Gradient accumulation*: accumulate all micro-batches, call :meth:`first_step`, accumulate the same micro-batches
    again, call :meth:`second_step`. Under *DistributedDataParallel* gradients are averaged before the step uphill, so
    that it is that of the joint batch (the paper's m-sharpness uses each process's own).

    Examples
    --------
    >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1)
    >>> def closure():
    ...     loss = (w**2).sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> round(optimizer.step(closure).item(), 3)
    2.5
    >>> [round(v, 4) for v in w.tolist()]  # 0.9 w - 0.1 * 0.1 w / |w|
    [0.8955, -1.7911]
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer],
        *,
        rho: float | Sequence[float] = 0.05,
        adaptive: bool = False,
        offset: float = 0.01,
        stacked: bool = False,
        **kwargs: Any,
    ) -> None:
        for value in rho if isinstance(rho, Sequence) else (rho,):
            checks.real("rho", value, least=0)
        checks.real("offset", offset, least=0)
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, torch.optim.Optimizer)):
            raise InvalidInput(
                f"base_optimizer must be a class such as torch.optim.SGD, not {base_optimizer!r}; its settings "
                "follow as keywords."
            )
        super().__init__(params, {"rho": rho, "adaptive": adaptive, "offset": offset, **kwargs})
        self.stacked = stacked
        self._sight: list[tuple[weakref.ref[Tensor], int]] = []
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self._share()

    def _share(self) -> None:
        # One list of groups for both, so that schedulers of either change the learning rate of the update.
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        r"""Move uphill by :math:`\hat\epsilon` from the gradients now present.

        Parameters
        ----------
        zero_grad
            Also clear the gradients, ready for the second ``backward()``.
        """
        self._check_fresh("first_step")
        total = self._gradient_norm()  # of all groups together: (), or (R,) of stacked networks
        for group in self.param_groups:
            share = torch.as_tensor(group["rho"], dtype=total.dtype, device=total.device) / (total + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                # A copy, since taking the step back off would leave its rounding behind.
                self.state[p]["sam_origin"] = p.detach().clone()
                own = share.view(-1, *(1,) * (p.ndim - 1)) if share.ndim else share  # (R, 1, ..., 1) beside (R, ...)
                # rho T_w^2 g / |T_w g|, with T_w = 1 unless adaptive
                p.add_(_scaled(_scaled(p.grad, p, group), p, group) * own.to(p))
        self._keep_sight()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to where :meth:`first_step` found them; gradients stay."""
        moved = [p for g in self.param_groups for p in g["params"] if "sam_origin" in self.state[p]]
        if not moved:
            raise InvalidInput("there is nothing to go back from: first_step, which moves the weights, was not called.")
        for p in moved:
            p.copy_(self.state[p].pop("sam_origin"))

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back, and update with the gradients now present.

        Parameters
        ----------
        zero_grad
            Also clear the gradients.
        """
        self.restore()
        self._check_fresh("second_step")
        self.base_optimizer.step()
        self._keep_sight()
        if zero_grad:
            self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as every optimizer does."""
        super().zero_grad(set_to_none)
        self._keep_sight()

    def _keep_sight(self) -> None:
        """Remember the gradients as they are, to see whether others come."""
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        self._sight = [(weakref.ref(grad), grad._version) for grad in grads]

    def _check_fresh(self, method: str) -> None:
        """Refuse a step without a new gradient: the loss was that of another copy of the network."""
        seen = {id(grad): version for ref, version in self._sight if (grad := ref()) is not None}
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if all(seen.get(id(grad)) == grad._version for grad in grads):
            raise InvalidInput(
                f"{method} was called before any gradient was there: call loss.backward() first, with a loss of the "
                "network whose parameters this optimizer has, not of a copy of it."
            )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update by two evaluations.

        Parameters
        ----------
        closure
            Computes the loss, calls ``backward()`` and returns the loss; called twice.

        Returns
        -------
        The loss at the weights before the update.
        """
        if closure is None:
            raise InvalidInput(
                "SAM needs two gradients: pass a closure that computes the loss and calls backward(), or call "
                "first_step() and second_step() with a backward() before each."
            )
        with torch.enable_grad():
            self.zero_grad()
            loss = closure()  # of the weights before the update, as other optimizers report it
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """State of the base optimizer; no step may be half done."""
        if any("sam_origin" in state for state in self.state.values()):
            raise InvalidInput("a step is half done: call second_step() before state_dict().")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    def _gradient_norm(self) -> Tensor:
        norms = [
            _norm(_scaled(p.grad, p, group), self.stacked)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        # The norm of the norms is that of all entries together.
        return torch.stack([n.to(norms[0].device) for n in norms]).norm(dim=0)


def _scaled(tensor: Tensor, p: Tensor, group: dict[str, Any]) -> Tensor:
    """Times T_w in the adaptive form."""
    return tensor * (p.detach().abs() + group["offset"]) if group["adaptive"] else tensor


def _norm(tensor: Tensor, stacked: bool) -> Tensor:
    """Euclidean norm in at least single precision: (), or (R,) of stacked networks."""
    tensor = wide(tensor)
    return tensor.reshape(len(tensor), -1).norm(dim=1) if stacked else tensor.norm()
