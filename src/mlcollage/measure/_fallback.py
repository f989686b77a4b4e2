"""Squared gradient norms of single examples for parameters used in other ways: the gradients themselves.

First by ``torch.vmap``, at the price of one more pass; where a model does not allow that (recurrent layers, dropout in
training, custom functions), by one backward pass for each example, which always works. K is the number of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.measure._uses import wide

_CHUNK = 2**24  # numbers of per-example gradients held at once


def sqnorms(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    batch_dim: int,
    flatten: Callable[[Any], list[Tensor]],
    cotangents: Sequence[Tensor],
    differentiable: bool,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Squared norms (K, batch) for each of ``params``, from one more forward pass, one example at a time.

    Also the outputs that the examples have alone, (batch, ...) each.

    Parameters
    ----------
    model, params
        The model, and those of its parameters that are asked for, by name.
    inputs
        Positional and named arguments of the model; tensors have the examples along ``batch_dim``.
    batch_dim
        Dimension of the examples in the model's inputs and outputs.
    flatten
        Gives the tensors of the model's output to which ``cotangents`` belong.
    cotangents
        Gradients (K, batch, ...) of the K losses with respect to these tensors.
    differentiable
        Keep the graph.
    """
    args, kwargs = inputs
    count = sum(p.numel() for p in params.values())

    def each(
        values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], cs: list[Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Of one example: its inputs without the dimension of examples, and its cotangents (K, ...)."""

        def outputs(p: dict[str, Tensor]) -> list[Tensor]:
            # The model wants a batch, here of one example.
            xs, named = tuple(map(one, args)), {key: one(v) for key, v in kwargs.items()}
            return [o.squeeze(batch_dim) for o in flatten(torch.func.functional_call(model, p, xs, named))]

        found: Any = torch.func.vjp(outputs, values)
        made, pull = found
        gradients = torch.func.vmap(pull)(cs)[0]  # each (K, *shape of the parameter)
        return {name: wide(g).flatten(1).square().sum(1) for name, g in gradients.items()}, made

    def one(argument: Any) -> Any:
        return argument.unsqueeze(batch_dim) if isinstance(argument, Tensor) else argument

    def axis(argument: Any) -> int | None:
        return batch_dim if isinstance(argument, Tensor) else None

    values = {name: p if differentiable else p.detach() for name, p in params.items()}
    per_example = [c.transpose(0, 1) for c in cotangents]  # (batch, K, ...)
    many, batch = cotangents[0].shape[:2]
    chunk = max(1, min(batch, _CHUNK // (count * many)))
    # Tensors go by examples, other arguments are the same for all.
    by_example = tuple(map(axis, args)), {key: axis(v) for key, v in kwargs.items()}
    mapped = torch.func.vmap(each, in_dims=(None, *by_example, 0), randomness="error", chunk_size=chunk)
    with torch.set_grad_enabled(differentiable):
        norms, outputs = mapped(values, args, kwargs, per_example)
    return {name: v.T for name, v in norms.items()}, outputs  # from (batch, K) to (K, batch)


def one_by_one(
    params: dict[str, nn.Parameter],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    examples: Sequence[int],
    differentiable: bool,
) -> dict[str, Tensor]:
    """The same from a forward pass that is there already, by as many backward passes as there are losses.

    Parameters
    ----------
    params
        As in :func:`sqnorms`.
    outputs
        The tensors of the model's output, (batch, ...).
    cotangents
        Gradients (K, batch, ...) of the losses with respect to them.
    examples
        Those asked for; the norms are (K, their number).
    differentiable
        Keep the graph.
    """
    many = len(cotangents[0])
    leaves = list(params.values())
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for k in range(many):
        for i in examples:
            # The cotangents of example i, and zeros for the others; with the graph of c if there is one.
            own = [torch.cat([0 * c[k, :i], c[k, i : i + 1], 0 * c[k, i + 1 :]]) for c in cotangents]
            found = torch.autograd.grad(
                outputs, leaves, own, retain_graph=True, create_graph=differentiable, materialize_grads=True
            )
            for name, g in zip(params, found, strict=True):
                rows[name].append(wide(g).square().sum())
    return {name: torch.stack(values).reshape(many, len(examples)) for name, values in rows.items()}
