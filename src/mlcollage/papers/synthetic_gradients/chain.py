"""Chains of blocks: a decoupled network that is given as blocks, one block's own step, and blocks of any network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn

from mlcollage._users import described
from mlcollage.errors import InvalidInput

from .context import Context, Kind
from .cuts import find_places
from .decouple import decouple, split_points
from .decoupled import Decoupled
from .learning import Said, learn, outside


class DecoupledSequential(Decoupled):
    """Blocks in a chain and a head, with a cut behind each block.

    Parameters
    ----------
    blocks
        Modules that take what the one before returns.
    synthesizers
        One for each block, or None for the usual ones, which ``example`` must show the shapes of.
    head
        From the last block's output to the network's.
    example
        An input.
    context, options
        As for :func:`decouple`.

    Examples
    --------
    >>> import torch
    >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
    >>> net = DecoupledSequential(blocks, None, nn.Linear(8, 3), example=torch.randn(6, 4), context=3)
    >>> optimizer = torch.optim.Adam(net.parameters())
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     loss = net.training_step(torch.randn(6, 4), torch.arange(6) % 3, nn.CrossEntropyLoss())
    ...     optimizer.step()
    >>> net.eval()(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        synthesizers: Sequence[nn.Module] | None,
        head: nn.Module,
        *,
        example: Any,
        context: int | Kind | Context | None = None,
        **options: Any,
    ) -> None:
        if not blocks:
            raise InvalidInput("a decoupled chain needs at least one block below the head.")
        if synthesizers is not None and len(synthesizers) != len(blocks):
            raise InvalidInput(f"{len(blocks)} blocks need as many synthesizers, not {len(synthesizers)}.")
        refuse_shared([*blocks, head])
        chain = nn.Sequential(*blocks, head)
        names = [str(i) for i in range(len(blocks))]
        own = {} if synthesizers is None else dict(zip(names, synthesizers, strict=True))
        made = decouple(chain, names, example=example, context=context, synthesizers=own, **options)
        settings = {k: v for k, v in options.items() if k not in ("hidden", "norm", "channels", "inputs")}
        super().__init__(
            chain,
            find_places(chain, names, example),
            {k.replace("/", "."): m for k, m in made.synthesizers.items()},
            made.context,
            inputs={k.replace("/", "."): m for k, m in made.inputs.items()},
            **settings,
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks below the head."""
        return list(cast(nn.Sequential, self.model))[:-1]

    @property
    def head(self) -> nn.Module:
        """The part behind the last cut."""
        return list(cast(nn.Sequential, self.model))[-1]

    def local_step(self, i: int, h: Tensor, y: Any, *, divisor: float) -> LocalUpdate:
        """Block i alone, on what the block below sent it; see :func:`local_update`."""
        if not 0 <= i < len(self.blocks):
            raise InvalidInput(f"block {i} is not one of the {len(self.blocks)} blocks below the head.")
        given = self.context.train(self.training)(y)
        return local_update(self.blocks[i], self.synthesizers[str(i)], h, given.context, given.rows, divisor=divisor)


@dataclass(frozen=True)
class LocalUpdate:
    """What one block's own step gives.

    Parameters
    ----------
    output
        Its activation, without graph, for the block above.
    below
        The gradient at its input, for the synthesizer of the block below: there before anything came from above.
    predicted
        The synthesizer's output with its graph, which :meth:`learn` trains when the true target arrives.
    divisor
        Of the loss.
    rows
        Which rows count.
    """

    output: Tensor
    below: Tensor | None
    predicted: Tensor
    divisor: float
    rows: Tensor | None

    def learn(self, arrived: Tensor) -> Tensor:
        """Fill the synthesizer's gradients from what arrived from above; returns its loss."""
        return learn(Said(self.predicted), arrived, self.rows, factor=self.divisor)


def local_update(
    block: nn.Module,
    synthesizer: nn.Module,
    h: Tensor,
    context: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    divisor: float,
) -> LocalUpdate:
    """Forward pass and synthetic backward pass of one block, which fill the gradients of its parameters.

    Parameters
    ----------
    block, synthesizer
        The block, and the model of the gradient at its output.
    h
        Its input.
    context, rows
        Of :class:`~mlcollage.papers.synthetic_gradients.Context`.
    divisor
        What the loss divides by; see :func:`~mlcollage.papers.synthetic_gradients.divisor_of`.

    Examples
    --------
    >>> import torch
    >>> from mlcollage.papers.synthetic_gradients import SyntheticGradient
    >>> block, synthesizer = nn.Linear(4, 8), SyntheticGradient(8, 3)
    >>> done = local_update(block, synthesizer, torch.randn(6, 4), torch.eye(3)[[0, 1, 2, 0, 1, 2]], divisor=6.0)
    >>> done.output.shape, bool((block.weight.grad == 0).all())
    (torch.Size([6, 8]), True)
    """
    leaf = h.detach()
    leaf = leaf.requires_grad_(True) if leaf.is_floating_point() else leaf
    out = block(leaf.clone() if leaf.requires_grad else leaf)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise InvalidInput(f"a block must return one floating-point tensor, not {type(out).__name__}.")
    predicted = synthesizer(out.detach(), context)
    if out.requires_grad:
        sent = predicted.detach() / divisor
        if rows is not None:
            sent = sent.masked_fill(outside(rows, sent), 0.0)
        if not bool(sent.isfinite().all()):
            raise InvalidInput("a synthetic gradient is not finite; lower the synthesizer's learning rate.")
        out.backward(sent)
    return LocalUpdate(out.detach(), leaf.grad if leaf.is_floating_point() else None, predicted, divisor, rows)


def refuse_shared(blocks: Sequence[nn.Module]) -> None:
    """Refuse blocks that share a parameter, which each would update as if it were its own."""
    seen: dict[int, tuple[int, str]] = {}
    for i, block in enumerate(blocks):
        for name, p in block.named_parameters():
            if id(p) in seen and seen[id(p)][0] != i:
                other = seen[id(p)]
                raise InvalidInput(
                    f"block {i} shares its parameter {name!r} with block {other[0]} ({other[1]!r}): in parts of their "
                    "own the copies would drift apart; untie them, or keep both in one block."
                )
            seen.setdefault(id(p), (i, name))


def split_blocks(model: nn.Module, cuts: Sequence[str] | Mapping[str, Any], *, example: Tensor) -> list[nn.Module]:
    """A network as a chain of blocks that compute the same, cut behind some of its modules, for processes of their own.

    Parameters
    ----------
    model
        Any module that ``torch.fx`` can trace (no branches on values), called with one tensor.
    cuts
        As for :func:`decouple`.
    example
        An input, to see that the chain gives what the network gives.

    Returns
    -------
    list of nn.Module
        ``len(cuts) + 1`` blocks, which share the network's parameters; parameters keep their names.

    Raises
    ------
    InvalidInput
        If the network cannot be traced, a tensor goes around a cut, or blocks share a parameter.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> blocks = split_blocks(model, ["1"], example=torch.ones(2, 4))
    >>> x = torch.ones(2, 4)
    >>> bool((blocks[1](blocks[0](x)) == model(x)).all()), [n for n, _ in blocks[1].named_parameters()]
    (True, ['2.weight', '2.bias'])
    """
    places = find_places(model, split_points(model, cuts), example)
    names = [p.name for p in places]
    try:
        graph = _Leaves(names).trace(model)
    except Exception as error:
        raise InvalidInput(
            f"{type(model).__name__} cannot be traced by torch.fx ({described(error)}); give the blocks "
            "yourself, as DecoupledSequential takes them."
        ) from error
    nodes = list(graph.nodes)
    ends = [next(n for n in nodes if n.op == "call_module" and n.target == name) for name in names]
    places_of = {node: i for i, node in enumerate(nodes)}
    bounds = [places_of[n] for n in ends]
    block_of = {n: sum(places_of[n] > b for b in bounds) for n in nodes}
    for node in nodes:
        for user in node.users:
            reach = range(block_of[node], block_of[user])
            if around := [names[i] for i in reach if ends[i] is not node]:
                raise InvalidInput(
                    f"the output of {node.target!s} goes around the cut {around[0]!r} (a skip connection); cut where "
                    "everything goes through one module."
                )
    blocks: list[nn.Module] = []
    for i in range(len(names) + 1):
        part, copies = fx.Graph(), {}
        if i:
            copies[ends[i - 1]] = part.placeholder("h")
        for node in nodes:
            if block_of[node] == i:
                copies[node] = part.node_copy(node, lambda n, copies=copies: copies[n])  # type: ignore[misc]
        if i < len(names):
            part.output(copies[ends[i]])
        blocks.append(fx.GraphModule(model, part))  # holds the modules that it calls, under their names
    refuse_shared(blocks)
    return blocks


class _Leaves(fx.Tracer):
    """Modules that are cut behind are not looked into."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = set(names)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(n.startswith(module_qualified_name + ".") for n in self.names)
        return not inside and (module_qualified_name in self.names or _plain(m))


def _plain(m: nn.Module) -> bool:
    return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
