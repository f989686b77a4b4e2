r"""Layer-wise adaptive rate scaling (LARS): the step of each weight is proportional to its norm.

You, Gitman, Ginsburg 2017, arXiv:1708.03888, algorithm 1; with the changes that self-supervised learning made to it
(BYOL, Barlow Twins).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

__all__ = ["LARS"]

_HALVES = (torch.float16, torch.bfloat16)


class LARS(torch.optim.Optimizer):
    r"""SGD with momentum whose gradients are rescaled to a fixed share of the norm of the weights.

    For a weight :math:`w` with gradient :math:`\nabla`, decay :math:`\beta`, trust coefficient :math:`\eta` and
    momentum :math:`\mu`, the variant ``"official"`` is that of the code of Barlow Twins and BYOL,

    .. math::

        g = \nabla + \beta w, \qquad m \leftarrow \mu m + \eta \frac{\|w\|}{\|g\|}\, g, \qquad
        w \leftarrow w - \gamma m,

    and ``"you2017"`` that of the original paper, which takes the two norms of the denominator apart and has the
    learning rate :math:`\gamma` inside of the momentum,

    .. math::

        m \leftarrow \mu m + \gamma\, \eta \frac{\|w\|}{\|\nabla\| + \beta \|w\|}\, (\nabla + \beta w), \qquad
        w \leftarrow w - m .

    The factor is 1 where either norm is 0. Excluded parameters have factor 1 and no decay.

    Parameters
    ----------
    params
        Parameters or groups, as for every optimizer; each group may have settings of its own. Biases and norms usually
        have a lower learning rate: :func:`~mlcollage.train.split_bias_and_norm` makes the groups.
    lr
        :math:`\gamma`.
    momentum
        :math:`\mu`, by default 0.9; starts from zero.
    weight_decay
        :math:`\beta`, by default 0.
    trust_coefficient
        :math:`\eta`, by default 0.001.
    variant
        ``"official"`` (default) or ``"you2017"``.
    exclude
        Which parameters are neither adapted nor decayed: ``"below_2d"`` (default) biases, norms and scalars such as a
        temperature; ``"1d"`` as in the official code, which adapts scalars; ``"none"`` adapts all, ``"all"`` none: for
        a group of tokens, position embeddings and norms with several axes.
    clip
        The step is the gradient times the smaller of the ratio and :math:`\gamma`, not times their product, as in
        Apex's LARC: never longer than that of plain SGD. Default False.
    eps
        Added to the denominator of the factor, by default 0.

    Raises
    ------
    InvalidInput
        For a setting outside of its range, and sparse gradients.

    Notes
    -----
    Norms of weights in half precision are taken in float32. Works with closures, ``GradScaler`` and schedulers; under
    ``DistributedDataParallel`` every process takes the same step.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([[3.0], [4.0]]))
    >>> optimizer = LARS([w], lr=1.0, momentum=0.0, trust_coefficient=0.1)
    >>> (10 * w[0]).sum().backward()
    >>> optimizer.step()  # a step of 0.1 * ||w|| = 0.5, whatever the size of the gradient
    >>> w.data.flatten()
    tensor([2.5000, 4.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        variant: Literal["official", "you2017"] = "official",
        exclude: Literal["below_2d", "1d", "none", "all"] = "below_2d",
        clip: bool = False,
        eps: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "variant": variant,
            "exclude": exclude,
            "clip": clip,
            "eps": eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with settings of its own, which are checked."""
        settings = self.defaults | param_group
        checks.real("lr", settings["lr"], least=0)
        checks.real("momentum", settings["momentum"], least=0, below=1)
        checks.real("weight_decay", settings["weight_decay"], least=0)
        checks.real("trust_coefficient", settings["trust_coefficient"], above=0)
        checks.real("eps", settings["eps"], least=0)
        checks.choice("variant", settings["variant"], ("official", "you2017"))
        checks.choice("exclude", settings["exclude"], ("below_2d", "1d", "none", "all"))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient, and their momentum, stay as they are.

        Parameters
        ----------
        closure
            Computes the loss and its gradients again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise InvalidInput("LARS has no sparse gradients: use Embedding(sparse=False), or another optimizer.")
            alone = [p for p in params if _excluded(p, group["exclude"])]
            kept = {id(p) for p in alone}
            adapted = [p for p in params if id(p) not in kept]
            if adapted:
                self._move(adapted, _adapted_gradients(adapted, group), group)
            if alone:
                self._move(alone, [p.grad.clone() for p in alone], group)
        return loss

    def _move(self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
        """Momentum and the step; ``updates`` are ours to overwrite."""
        lr, momentum = group["lr"], group["momentum"]
        inside = group["variant"] == "you2017"
        if inside:
            torch._foreach_mul_(updates, lr)
        if momentum:
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, updates)
            updates = buffers
        torch._foreach_add_(params, updates, alpha=-1.0 if inside else -float(lr))


def _excluded(p: Tensor, exclude: str) -> bool:
    if exclude in ("none", "all"):
        return exclude == "all"
    return p.ndim == 1 or (p.ndim == 0 and exclude == "below_2d")


def _adapted_gradients(params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Decayed gradients times the trust ratio, as new tensors."""
    decay, lr = group["weight_decay"], group["lr"]
    gradients = [p.grad for p in params if p.grad is not None]
    updates = list(torch._foreach_add(gradients, params, alpha=decay)) if decay else [g.clone() for g in gradients]
    sizes = _norms(params)  # of each weight, one number
    if group["variant"] == "official":
        steps = _norms(updates)
        lengths = [u + group["eps"] for u in steps]
    else:
        steps = _norms(gradients)
        lengths = [g + decay * w + group["eps"] for g, w in zip(steps, sizes, strict=True)]
    factors = []
    for w, g, length in zip(sizes, steps, lengths, strict=True):
        ratio = group["trust_coefficient"] * w / length
        # The learning rate is applied later, so that a step of at most lr * gradient means a ratio of at most 1.
        ratio = (ratio / lr).clamp(max=1.0) if group["clip"] and lr else ratio
        factors.append(torch.where((w > 0) & (g > 0), ratio, 1.0))
    for u, factor in zip(updates, factors, strict=True):
        u.mul_(factor.to(u.dtype))
    return updates


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    half = any(t.dtype in _HALVES for t in tensors)
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32 if half else None))
