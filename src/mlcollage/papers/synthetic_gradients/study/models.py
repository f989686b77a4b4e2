"""The study's networks, where they are cut, and how one is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.data.problem import Problem
from mlcollage.errors import InvalidInput
from mlcollage.measure.layer_tap import LayerTap
from mlcollage.nn import MLP, build, seeded
from mlcollage.train import accuracy, epochs, evaluate, evaluating

from ..decouple import decouple
from ..decoupled import Credit, Decoupled

# The eight rules, and DNI: synthetic gradients that do not see the label.
RULES: dict[str, tuple[Credit, bool]] = {
    "bp": ("bp", True),
    "cdni": ("sg", True),
    "dni": ("sg", False),
    "fa": ("fa", False),
    "dfa": ("dfa", False),
    "kickback": ("kickback", False),
    "critic": ("critic", True),
    "noise": ("noise", False),
    "none": ("none", False),
}


def network(shape: tuple[int, ...], classes: int, widths: tuple[int, ...]) -> nn.Module:
    """The study's own: an MLP with batch norm."""
    return MLP(shape, classes, widths=widths, norm="batch")


def cuts_of(model: nn.Module, example: Tensor) -> list[str]:
    """Where a network is cut: behind each part at the top that has weights and no path around it, but the last.

    Raises
    ------
    InvalidInput
        If nothing can be cut; the sentence says which part is the obstacle.
    """
    names = [n for n, m in model.named_children() if any(True for _ in m.parameters())]
    if len(names) == 1:  # everything in one part: look inside
        inside = model.get_submodule(names[0])
        names = [f"{names[0]}.{n}" for n, m in inside.named_children() if any(True for _ in m.parameters())]
    candidates = names[:-1]
    found, obstacle = [], "it has no part below its last one"
    twin = copy.deepcopy(model).train()
    for name in candidates:
        try:
            decouple(model, [name], example=example, context=2)
            with seeded(0):  # paths around a cut show in a step
                decouple(twin, [name], example=example, credit="bp").training_step(example, None, _any_loss)
        except InvalidInput as error:
            obstacle = str(error)
        else:
            found.append(name)
    if not found:
        raise InvalidInput(f"{type(model).__name__} cannot be cut for this study: {obstacle}")
    return found


def _any_loss(logits: Tensor, y: None) -> Tensor:
    return logits.square().mean()


@dataclass(frozen=True)
class Trained:
    """A network after training."""

    net: Decoupled
    test: float
    validation: float
    curve: list[float]


def train(
    p: Problem,
    rule: str,
    *,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    sg_lr: float,
    cuts: Sequence[str] | None = None,
    probability: float = 1.0,
    checks: int = 0,
) -> Trained:
    """One network with one rule; initialization and order of the data depend on the seed only.

    The rule's own modules (synthesizers, critics) have their own Adam. ``checks`` test accuracies are taken on the way.
    """
    model = build(p.make_model, seed).to(p.device)
    x, y = p.train
    credit, label = RULES[rule]
    where = list(cuts) if cuts is not None else cuts_of(model, x[:8])
    net = decouple(
        model, where, example=x[:8], context=p.num_classes if label else None, credit=credit, seed=seed,
        probability=probability,
    )  # fmt: skip
    adam = torch.optim.Adam(net.base_parameters(), lr=lr)
    own = net.synthesizer_parameters()
    synthesizing = torch.optim.Adam(own, lr=sg_lr) if own else None
    loss_fn = nn.CrossEntropyLoss()
    curve: list[float] = []
    every = max(1, steps // checks) if checks else steps + 1
    net.train()
    for step, (xb, yb) in enumerate(epochs(x, y, min(batch, len(x)), generator=seed), 1):
        net.zero_grad(set_to_none=True)
        net.training_step(xb, yb, loss_fn)
        adam.step()
        if synthesizing is not None:
            synthesizing.step()
        if step % every == 0:
            curve.append(evaluate(model, *p.test, accuracy))
        if step == steps:
            break
    return Trained(
        net,
        evaluate(model, *p.test, accuracy),
        evaluate(model, *p.validation, accuracy) if len(p.validation.y) else math.nan,
        curve,
    )


def activations(model: nn.Module, layers: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What the layers put out for x, in evaluation mode."""
    with evaluating(model), torch.no_grad(), LayerTap(model, list(layers)) as tap:
        model(x)
        return {name: tap[name].flatten(1) for name in layers}


class Recall:
    """One bit, seen first, that must be told after noisy blanks: (T, B, 2) inputs, labels in the last step only."""

    def __init__(self, blanks: int, rows: int, seed: int) -> None:
        self.length, self.rows = blanks + 1, rows
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets with -100 where nothing is asked, and the bit."""
        g = self.generator
        bit = torch.randint(2, (self.rows,), generator=g)
        x = torch.zeros(self.length, self.rows, 2)
        x[0, :, 0] = 2.0 * bit - 1
        x[1:, :, 1] = torch.randn(self.length - 1, self.rows, generator=g)
        y = torch.full((self.length, self.rows), -100)
        y[-1] = bit
        return x, y, bit


def last_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the positions that have a label; 0 where a chunk has none."""
    return F.cross_entropy(logits, y, reduction="sum") / max(1, int((y != -100).sum()))
