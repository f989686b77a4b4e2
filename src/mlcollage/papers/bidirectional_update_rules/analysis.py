"""Instruments: is a genome backprop, is its update the gradient of anything, and which few terms is it made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput

from .genome import Genome
from .network import BlurNetwork, Weights, functional_step

_MOST = 5000  # synapses whose Jacobian is computed whole: 200 MB in double precision


@dataclass(frozen=True)
class BackpropIdentity:
    """How far the backprop genome and gradient descent by autograd are apart.

    Attributes
    ----------
    difference
        Largest absolute difference of any weight after all steps.
    moved
        Largest absolute change of any weight in these steps, beside which the difference is to be read.
    steps
        How many.
    """

    difference: float
    moved: float
    steps: int


def check_backprop_identity(
    layers: Sequence[int] | nn.Sequential = (5, 7, 6, 3),
    *,
    activation: str = "sigmoid",
    loss: Literal["cross_entropy", "squared"] = "cross_entropy",
    steps: int = 50,
    batch_size: int = 16,
    learning_rate: float = 0.1,
    input_shape: Sequence[int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> BackpropIdentity:
    """Train one network twice, by the backprop genome and by autograd with plain SGD, on random data.

    Parameters
    ----------
    layers
        Numbers of neurons, or a user's ``nn.Sequential``, which is not changed.
    activation
        Of hidden layers, where numbers are given.
    loss
        Cross-entropy, or half of the squared error to one-hot targets; the mean over the batch.
    steps, batch_size, learning_rate
        Of both trainings.
    input_shape
        For models that begin with a convolution.
    seed
        Of data and weights.
    dtype
        Double precision: in single precision rounding alone makes differences of 1e-7.

    Examples
    --------
    >>> check_backprop_identity((4, 6, 3), activation="tanh", steps=20).difference < 1e-12
    True
    """
    if dtype != torch.float64:
        raise InvalidInput(f"the identity is checked in float64, not {dtype}: rounding would hide what is to be seen.")
    checks.integer("steps", steps, least=1)
    genome = Genome.backprop(learning_rate=learning_rate, activation=activation, dtype=dtype)
    network = BlurNetwork(layers, genome, input_shape=input_shape, seed=seed, dtype=dtype)
    network._told = None  # random data teach nothing, and need no advice
    path, g = network.path, generator(seed, 0x1D)
    # The same layers for autograd, sharing no memory.
    twin = network.to_module()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    start = [w.clone() for w in network.weights.forward]
    for _ in range(steps):
        x = torch.randn(batch_size, *path.input_shape, generator=g, dtype=dtype)
        y = torch.randint(path.classes, (batch_size,), generator=g)
        one_hot = F.one_hot(y, path.classes).to(dtype)
        if loss == "squared":
            network.learn(x, one_hot, feedback=lambda out, target: out - target)
        else:
            network.learn(x, y)
        out = twin(x)
        value = (
            F.cross_entropy(out, y) if loss == "cross_entropy" else 0.5 * (out - one_hot).square().sum() / batch_size
        )
        gradients = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for p, d in zip(parameters, gradients, strict=True):
                p.sub_(learning_rate * d)
    ours = list(network.to_module().parameters())
    theirs = list(twin.parameters())
    gap = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(network.weights.forward, start, strict=True))
    return BackpropIdentity(gap, moved, steps)


@dataclass(frozen=True)
class Asymmetry:
    """How far an update is from being a gradient: that of any loss has a symmetric Jacobian.

    Attributes
    ----------
    value
        ‖J - Jᵀ‖ / (2 ‖J‖) in Frobenius norms: 0 for a gradient, 1 for a field that only turns.
    standard_error
        Of an estimate by random probes; 0 where the Jacobian was computed whole.
    synapses
        Its size.
    jacobian
        (n, n), where it was computed whole.
    """

    value: float
    standard_error: float
    synapses: int
    jacobian: Tensor | None


def update_asymmetry(
    network: BlurNetwork, x: Tensor, y: Tensor, *, most: int = _MOST, probes: int = 16, seed: int = 0
) -> Asymmetry:
    r"""The asymmetry of :math:`J_{km} = \partial \Delta w_k / \partial w_m` at a network's weights (paper, Fig. 2).

    Computed in double precision, whatever the network's type is.

    Parameters
    ----------
    network
        At any weights; it is not changed.
    x, y
        One batch.
    most
        Up to so many synapses the Jacobian is computed whole; above, ‖J - Jᵀ‖ and ‖J‖ are estimated from ``probes``
        random vectors v, by (J - Jᵀ)v and Jv, and no matrix is ever stored.
    probes, seed
        Of the estimate.

    Examples
    --------
    >>> network = BlurNetwork((4, 5, 3), Genome.backprop(), seed=1)
    >>> x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    >>> update_asymmetry(network, x, y).value < 1e-10
    True
    """
    checks.integer("probes", probes, least=2)
    x, y = network._inputs(x).double()[None], network._labels(y, len(x))[None]
    genome = network.genome.to(torch.float64)
    weights = Weights(*(tuple(w.detach().double() for w in part) for part in network.weights))
    parts = [w for w in (*weights.forward, *weights.backward) if w.numel()]
    shapes, sizes = [w.shape for w in parts], [w.numel() for w in parts]
    forwards, has_back = len(weights.forward), bool(weights.backward)

    def update(flat: Tensor) -> Tensor:
        pieces = [v.reshape(s) for v, s in zip(flat.split(sizes), shapes, strict=True)]
        back = (weights.backward[0], *pieces[forwards:]) if has_back else ()
        new = functional_step(network.path, Weights(tuple(pieces[:forwards]), back), genome, x, y).weights
        return torch.cat([v.flatten() for v in (*new.forward, *new.backward) if v.numel()]) - flat

    flat, n = torch.cat([w.flatten() for w in parts]), sum(sizes)
    if n <= most:
        j = torch.func.jacrev(update, chunk_size=512)(flat).detach()
        size = float(j.norm())
        return Asymmetry(float((j - j.T).norm()) / (2 * size) if size else 0.0, 0.0, n, j)
    g = generator(seed, 0xA5)
    turned, whole = [], []
    for _ in range(probes):
        v = torch.randn(n, generator=g, dtype=torch.float64)
        jv = torch.func.jvp(update, (flat,), (v,))[1]
        (vj,) = torch.func.vjp(update, flat)[1](v)
        turned.append(float((jv - vj).square().sum()))
        whole.append(float(jv.square().sum()))
    ratios = [math.sqrt(t / w) / 2 if w else 0.0 for t, w in zip(turned, whole, strict=True)]
    value = math.sqrt(sum(turned) / sum(whole)) / 2 if sum(whole) else 0.0
    spread = torch.tensor(ratios, dtype=torch.float64).std() / math.sqrt(probes)
    return Asymmetry(value, float(spread), n, None)


def distill_rule(network: BlurNetwork, x: Tensor, y: Tensor, *, tolerance: float = 0.01) -> pd.DataFrame:
    r"""A genome's change of synapses in as few terms as explain it, by orthogonal matching pursuit.

    .. math:: \Delta w_{ij}^c \approx \beta_0 w_{ij}^c + \sum_{(e, d) \in S} \beta_{ed} \frac{1}{n B} \sum_b a_i^e a_j^d

    with n senders and B rows, which count only where the genome's ``step_scale`` and ``reduction`` divide by them. The
    term that explains most is added until the share of unexplained squares is at most ``tolerance``. All layers and
    steps of an episode are fitted at once, each in units of the deviation of its own changes.

    Parameters
    ----------
    network
        With dense layers; a copy of it learns, it is not changed.
    x, y
        Batches (T, B, features) and labels (T, B) of an episode.
    tolerance
        Share of squares that may stay unexplained, from 0 to 1.

    Returns
    -------
    pandas.DataFrame
        Columns ``channel, term, coefficient, explained``: the terms in the order in which they were added, their
        coefficients in the final fit, and the share of squares that this term and those before it explain. States are
        numbered from 1, as in the paper.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(3, 32, 4, generator=g), torch.randint(3, (3, 32), generator=g)
    >>> distill_rule(BlurNetwork((4, 5, 3), Genome.backprop(), seed=0), x, y)["term"].tolist()
    ['a_i^1 a_j^2']
    """
    checks.probability("tolerance", tolerance)
    if not all(layer.plain for layer in network.path.layers):
        raise InvalidInput("a rule is distilled from dense layers; give a network without convolutions and pooling.")
    s, weights, genome = network.settings, network.weights, network.genome
    k = s.k
    names = [f"a_i^{e + 1} a_j^{d + 1}" for e in range(k) for d in range(k)] + ["w"]
    terms: list[list[Tensor]] = [[] for _ in range(s.channels)]
    changes: list[list[Tensor]] = [[] for _ in range(s.channels)]
    for rows, labels in zip(x, y, strict=True):
        rows, labels = network._inputs(rows), network._labels(labels, len(rows))
        with torch.inference_mode():
            step = functional_step(network.path, weights, genome, rows[None], labels[None])
            below = torch.cat([rows[None, None], rows.new_zeros(1, k - 1, *rows.shape)], dim=1)
            for a, b, old, new in zip(
                (below, *step.states), step.states, weights.forward, step.weights.forward, strict=False
            ):
                n = a.shape[-1]
                scale = (len(rows) if s.reduction == "mean" else 1) * (n if s.step_scale == "fan_in" else 1)
                products = torch.einsum("eri,drj->edij", a[0], b[0]).flatten(0, 1).flatten(1) / scale
                for c in range(s.channels):
                    change = (new - old)[0, c, :n].flatten().double()
                    unit = change.std().clamp(min=1e-30)
                    terms[c].append(torch.cat([products, old[0, c, :n].flatten()[None]]).double() / unit)
                    changes[c].append(change / unit)
        weights = step.weights
    found = []
    for c, (parts, response) in enumerate(zip(terms, changes, strict=True)):
        # normal equations: (terms, terms), whatever the number of synapses
        design, target = torch.cat(parts, dim=1), torch.cat(response)
        gram, moment, total = design @ design.T, design @ target, float(target.square().sum())
        chosen, explained = list[int](), list[float]()
        while len(chosen) < len(names) and (not explained or explained[-1] < 1 - tolerance):
            tried = {j: _explained(gram, moment, [*chosen, j]) / total for j in range(len(names)) if j not in chosen}
            chosen.append(max(tried, key=lambda j: tried[j]))
            explained.append(tried[chosen[-1]])
        fit = torch.linalg.lstsq(gram[chosen][:, chosen], moment[chosen], driver="gelsd").solution.tolist()
        for j, coefficient, share in zip(chosen, fit, explained, strict=True):
            found.append({"channel": c, "term": names[j], "coefficient": coefficient, "explained": share})
    return pd.DataFrame(found)


def _explained(gram: Tensor, moment: Tensor, chosen: list[int]) -> float:
    """Squares that a fit by some terms explains."""
    fit = torch.linalg.lstsq(gram[chosen][:, chosen], moment[chosen], driver="gelsd").solution
    return float(fit @ moment[chosen])
