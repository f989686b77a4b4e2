"""Cut any network behind modules that are named, with the usual synthesizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import derive
from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded

from .context import Context, Kind
from .cuts import find_places
from .decoupled import Decoupled
from .synthesizer import Critic, SyntheticGradient, synthesizer_for


def decouple(
    model: nn.Module,
    cuts: Sequence[str] | Mapping[str, Any],
    *,
    example: Any,
    context: int | Kind | Context | None = None,
    hidden: Sequence[int] = (),
    norm: str | None = None,
    synthesizers: Mapping[str, nn.Module] | None = None,
    inputs: Mapping[str, nn.Module] | None = None,
    channels: int | None = None,
    rank: int = 0,
    **options: Any,
) -> Decoupled:
    """Cut a network behind some of its modules, with the usual synthesizers.

    Parameters
    ----------
    model
        Any module: yours, a ResNet, a transformer.
    cuts
        Paths of modules, such as ``["layer2", "layer3"]``: the cut lies behind each. Or a mapping as
        ``torch.distributed.pipelining`` takes it, ``{"layer3": SplitPoint.BEGINNING}``; ``BEGINNING`` is the end of
        what runs before.
    example
        An input as the network takes it (a tensor, a tuple, a mapping), which says what the activations look like.
    context
        Number of classes, whose one-hot labels the synthesizers see (cDNI); a
        :class:`~mlcollage.papers.synthetic_gradients.Context` for others; None for none (DNI).
    hidden, norm, channels, rank
        Of the synthesizers that are made; see :func:`~mlcollage.papers.synthetic_gradients.synthesizer_for`.
    synthesizers, inputs
        Your own, by name of the cut.
    **options
        Of :class:`Decoupled`: ``credit``, ``lam``, ``unlock``, ``divisor``, ``probability``, ``seed`` and so on.

    Returns
    -------
    Decoupled

    Raises
    ------
    UnknownName
        For a path that no module has.
    InvalidInput
        For a module that runs twice or not at all, or returns no single tensor with gradient; for a rank where no
        synthesizer has one.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x, y = torch.randn(6, 4), torch.arange(6) % 3
    >>> net = decouple(model, ["1", "3"], example=x, context=3)
    >>> loss = net.training_step(x, y, nn.CrossEntropyLoss())
    >>> model[0].weight.grad.abs().max().item(), net.cuts  # synthesizers start at zero
    (0.0, ('1', '3'))
    """
    places = find_places(model, split_points(model, cuts), example)
    given = context if isinstance(context, Context) else read_context(context)
    credit, unlock = options.get("credit", "sg"), options.get("unlock", "update")
    if rank and credit != "sg":
        raise InvalidInput(f"rank is of synthesizers of the gradient, of which credit={credit!r} has none.")
    made: dict[str, nn.Module] = dict(synthesizers or {})
    makers: dict[str, nn.Module] = dict(inputs or {})
    batch_dim = options.get("batch_dim", 0)
    with seeded(derive(options.get("seed", 0), 70)):
        for place in places:
            h = place.example.transpose(0, 1) if batch_dim == 1 and place.example.ndim > 2 else place.example
            if place.name not in made and credit == "sg":
                made[place.name] = synthesizer_for(h, given.dim, hidden, norm, channels=channels, rank=rank).to(
                    h.device
                )
            elif place.name not in made and credit == "critic":
                axis = (1 if h.ndim >= 4 else -1) if channels is None else channels
                made[place.name] = Critic(h.shape[axis], given.dim, hidden or (64,), channels=axis).to(h.device)
            if place.name not in makers and unlock == "full":
                if not isinstance(example, Tensor):
                    raise InvalidInput(
                        "unlock='full' makes activations from the network's input, which must be one tensor."
                    )
                size = h[0].numel()
                makers[place.name] = SyntheticGradient(
                    example[0].numel(), given.dim, hidden, norm, zero_init=False, out_dim=size
                ).to(h.device)
    return Decoupled(model, places, made, given, inputs=makers, **options)


def read_context(context: int | str | None) -> Context:
    """A number of classes, or None, as a context."""
    if context is None or context == "none":
        return Context("none")
    if isinstance(context, str):
        raise InvalidInput(f"context={context!r} does not say how many: give Context({context!r}, dim).")
    return Context("labels", checks.integer("context, a number of classes,", context, least=1))


def split_points(model: nn.Module, cuts: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Paths to cut behind, of paths or of split points of ``torch.distributed.pipelining``."""
    if not isinstance(cuts, Mapping):
        if isinstance(cuts, str):
            raise InvalidInput(f"cuts must be a list of module paths, such as [{cuts!r}].")
        return list(cuts)
    names = [n for n, _ in model.named_modules() if n]
    found = []
    for name, point in cuts.items():
        if name not in names:
            found.append(name)  # refused with the others
        elif getattr(point, "name", str(point)).upper() == "END":
            found.append(name)
        else:
            parent, _, own = name.rpartition(".")
            siblings = [n for n, _ in model.get_submodule(parent).named_children()]
            at = siblings.index(own)
            if at == 0:
                raise InvalidInput(f"nothing runs before {name!r} in its parent; split at another module.")
            found.append(f"{parent}.{siblings[at - 1]}" if parent else siblings[at - 1])
    return found
