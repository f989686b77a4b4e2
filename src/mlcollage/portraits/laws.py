"""Which symmetries has the network, and how far has training moved what they would conserve?"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from mlcollage.papers.neural_mechanics import Symmetry, find_symmetries
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.subject import Subject

_EXAMPLES = 16


def laws(subject: Subject) -> Reading:
    """Counts of conservation laws, and how far the trained network is from what the untrained one had."""
    model = copy.deepcopy(subject.model)
    for module in model.modules():  # batch norm has its scale law in training mode; dropout would hide all laws
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    examples = subject.test.take(_EXAMPLES)
    inputs = examples.batch.kwargs or examples.batch.args
    loss = None if subject.loss is None or examples.y is None else subject.loss_fn
    found = find_symmetries(model, inputs, loss, targets=None if loss is None else examples.y, seed=subject.seed)
    if not len(found):
        why = f" Not decided: {'; '.join(found.unhandled)}." if found.unhandled else ""
        raise DoesNotApply(f"No symmetry of the loss was found.{why}")
    numbers = [Number("conservation laws", float(found.n_laws), digits=9)]
    moved: list[np.ndarray] = []
    twin = subject.untrained
    for law in found:
        share = None if twin is None else _moved(law, subject.model, twin)
        numbers.append(Number("laws", float(law.n_laws), layer=law.name, digits=9))
        if share is not None:
            low, high = np.quantile(share, [0.25, 0.75])
            value = float(np.median(share))
            numbers.append(Number("moved", value, float(low), float(high), layer=law.name, interval=_QUARTILES))
            moved.append(share)
    if moved:
        every = np.concatenate(moved)
        low, high = np.quantile(every, [0.25, 0.75])
        numbers.insert(1, Number("moved", float(np.median(every)), float(low), float(high), interval=_QUARTILES))
    kinds = {kind: found.of_kind(kind).n_laws for kind in ("translation", "scale", "rescale", "matrix")}
    counted = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n)
    health = [f"Laws by kind: {counted}; each confirmed by its gradient on random batches."]
    if found.unhandled:
        health.append("Not decided or refused: " + "; ".join(found.unhandled[:3]) + ".")
    if twin is None:
        health.append("How far training has moved them is told with the untrained network, which was not given.")
    else:
        health.append(
            "0: as before training (gradient flow without weight decay would keep it); 1: all of it has changed."
        )
    return Reading("laws", numbers=numbers, health=health)


_QUARTILES = "quartiles over the laws"


def _moved(law: Symmetry, trained: nn.Module, untrained: nn.Module) -> np.ndarray:
    """Change of each conserved quantity relative to the size of what it sums, (laws,) from 0."""
    now, before = law.quantities(trained), law.quantities(untrained)
    change = (now - before).abs()
    norms = law.norms(trained).square() + law.norms(untrained).square()  # (blocks,)
    if law.kind == "translation":  # linear in the parameters
        ones = {n: torch.ones_like(p) for n, p in trained.named_parameters()}
        sizes = law.norms(ones) * (law.norms(trained) + law.norms(untrained))  # by Cauchy and Schwarz
        change = change / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    else:
        size = norms.reshape(-1, *(1,) * (change.ndim - 1)).clamp_min(torch.finfo(norms.dtype).tiny)
        change = change / size
    return np.asarray(change.flatten().cpu().numpy(), dtype=np.float64)


def laws_cost(subject: Subject) -> float:
    """Seconds: the graph of the model, and some gradients in float64."""
    return 3.0 + 0.02 * len(list(subject.model.modules())) + 60 * subject.backward * _EXAMPLES
