"""Whether outputs come from a network, or from another copy of it, which may share some of its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from mlcollage.measure.grad_norms import graph_nodes

Shape = tuple[int, ...]


def of_another_copy(
    tensors: Iterable[Tensor], parameters: Iterable[Tensor], running_means: Iterable[Tensor] = ()
) -> bool:
    """Whether the graph of tensors has none of the parameters, or has others in the place of those that it lacks.

    Parameters that are unused are in no graph, and networks before or after this one have parameters in it too: so a
    copy is one that has a stranger of the same shape for each parameter that is missing.

    Parameters
    ----------
    tensors
        Logits or a loss.
    parameters
        Of the network, all that require a gradient.
    running_means
        Of the network's batch norms, see :func:`running_means_of`.

    Examples
    --------
    >>> import copy
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> other = copy.deepcopy(net)
    >>> other[0].weight = net[0].weight
    >>> x = net[0].weight.new_ones(1, 2)
    >>> of_another_copy([net(x)], net.parameters()), of_another_copy([other(x)], net.parameters())
    (False, True)
    """
    own = {id(p): tuple(p.shape) for p in parameters}
    means = {mean.data_ptr(): tuple(mean.shape) for mean in running_means}
    seen, strangers = set[int](), dict[int, Shape]()  # parameters of the network in the graph, and of others
    used, foreign = set[int](), dict[int, Shape]()  # the same of running means of batch norms
    for node in graph_nodes(tensors):
        leaf, mean = getattr(node, "variable", None), getattr(node, "_saved_running_mean", None)
        if leaf is not None and id(leaf) in own:
            seen.add(id(leaf))
        elif isinstance(leaf, nn.Parameter):
            strangers[id(leaf)] = tuple(leaf.shape)
        if isinstance(mean, Tensor) and mean.data_ptr() in means:
            used.add(mean.data_ptr())
        elif isinstance(mean, Tensor):
            foreign[mean.data_ptr()] = tuple(mean.shape)
    return bool(own and not seen) or _replaced(own, seen, strangers) or _replaced(means, used, foreign)


def _replaced(own: dict[int, Shape], seen: set[int], strangers: dict[int, Shape]) -> bool:
    """Whether something is missing, and each missing thing has a stranger of its shape."""
    missing = Counter(shape for key, shape in own.items() if key not in seen)
    return bool(missing) and not missing - Counter(strangers.values())


def running_means_of(model: nn.Module) -> list[Tensor]:
    """The running means of a network's batch norms: by them a graph tells a copy that shares all parameters."""
    kinds = nn.modules.batchnorm._BatchNorm
    found = [m.running_mean for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    return [mean for mean in found if mean.is_floating_point()]
