"""Random batches and their gradients on a float64 copy of a model; the model itself is never run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlcollage.errors import InvalidInput

Gradients = dict[str, "Tensor | None"]
EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps")


class Probe:
    """Draws batches like an example, with random targets, and differentiates the loss on a copy of the model.

    Parameters
    ----------
    model
        The user's model, copied in its present mode.
    args, kwargs
        Example inputs: batches have their shapes, the moments of their floats and the values of their integers.
    loss, targets
        As for ``find_symmetries``; without a loss, gradients are of random linear functions of the outputs.
    seed
        Of all batches, and of what the model draws itself (dropout).
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Callable[[Any, Any], Tensor] | None = None,
        targets: Any = None,
        seed: int = 0,
    ) -> None:
        self.args, self.kwargs, self.loss, self.targets, self.seed = args, kwargs, loss, targets, seed
        self.model, self.dtype = copy.deepcopy(model).double(), torch.float64
        try:
            self.value(0)
        except (RuntimeError, TypeError, ValueError):  # code that fixes a type: stay in the model's own
            self.model = copy.deepcopy(model)
            self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            self.value(0)

    @property
    def precision(self) -> float:
        """Relative precision of the copy's type."""
        return torch.finfo(self.dtype).eps

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters of the copy."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def batch(self, k: int) -> tuple[Any, Any, Any]:
        """Inputs, keyword inputs and targets of batch `k`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + k)  # the same batch at every call
        given = (self.args, self.kwargs, self.targets)
        args, kwargs, targets = pytree.tree_map(lambda leaf: self._like(leaf, generator), given)
        return args, kwargs, targets

    def _like(self, leaf: Any, generator: torch.Generator) -> Any:
        if not isinstance(leaf, Tensor) or leaf.numel() == 0 or leaf.dtype == torch.bool or leaf.is_complex():
            return leaf
        if leaf.is_floating_point():  # noise of the example's mean and spread
            value = leaf.detach().to("cpu", torch.float64)
            spread = float(value.std(correction=0)) or 1.0
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            return (value.mean() + spread * noise).to(leaf.device, self.dtype)
        pick = torch.randint(leaf.numel(), leaf.shape, generator=generator)  # the example's own entries, drawn anew
        return leaf.detach().flatten()[pick.to(leaf.device)]

    def value(self, k: int, parameters: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The loss of batch `k`, or all floating outputs without one; with other parameters if given."""
        args, kwargs, targets = self.batch(k)
        cuda = sorted({p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"})
        # copies, so that running statistics stay what they are
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed + k)  # of dropout: one mask per batch
            state = dict(self.model.named_parameters()) if parameters is None else parameters
            out = torch.func.functional_call(self.model, {**state, **buffers}, args, kwargs, tie_weights=True)
            if self.loss is not None:
                out = self.loss(out, targets)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not leaves:
            raise InvalidInput("the model gives no floating-point output; pass a loss_fn that makes one from it.")
        if self.loss is not None and leaves[0].numel() != 1:
            raise InvalidInput(f"loss_fn must give one number; it gave a tensor of shape {tuple(leaves[0].shape)}.")
        return leaves

    def gradients(self, k: int) -> Gradients:
        """Gradient by parameter on batch `k` (None where the parameter is not used)."""
        leaves = [leaf for leaf in self.value(k) if leaf.requires_grad]
        if not leaves:
            raise InvalidInput("no output depends on a trainable parameter: unfreeze parameters or check the model.")
        cotangents = [torch.ones_like(leaf) for leaf in leaves]
        if self.loss is None:  # a random linear function of the outputs
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + k)
            cotangents = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
        named = self.parameters()
        found = torch.autograd.grad(leaves, list(named.values()), cotangents, allow_unused=True)
        if any(grad is not None and not bool(torch.isfinite(grad).all()) for grad in found):
            raise InvalidInput(
                "a gradient is not finite on a random batch like example_inputs; check model and loss_fn."
            )
        return dict(zip(named, found, strict=True))

    @contextmanager
    def small_eps(self, factor: float) -> Iterator[int]:
        """Every module's epsilon times `factor` for a while; gives their number."""
        found = [
            (module, name, value)
            for module in self.model.modules()
            for name in EPS_NAMES
            if isinstance(value := getattr(module, name, None), float) and 0 < value < 0.1
        ]
        try:
            for module, name, value in found:
                setattr(module, name, value * factor)
            yield len(found)
        finally:
            for module, name, value in found:
                setattr(module, name, value)
