r"""Fine-tuning of a whole pre-trained encoder on few labels (section 3.2 and Table 2 of the paper)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.knn import labels_of
from mlcollage.nn import seeded, unwrap
from mlcollage.train import Schedule, cosine, epochs, predict, step_decay, steps

from .model import BarlowTwins, Pool, _rows_of

__all__ = ["FineTuned", "finetune"]

_RATES = {"paper": 0.002, "official": 0.005}  # of the encoder


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A classifier made of a pre-trained encoder; made by :func:`finetune`.

    Attributes
    ----------
    model
        From inputs to logits (n, classes): ``model.representation`` gives (n, features), and ``model.head`` is a linear
        map of these. In evaluation mode.
    classes
        What the logits stand for, (classes,).
    losses
        Mean training loss of each epoch.
    """

    model: nn.Module
    classes: NDArray[Any]
    losses: tuple[float, ...]

    def predict(self, x: Tensor, batch_size: int = 1024) -> NDArray[Any]:
        """The most probable class of each input, (n,)."""
        found: NDArray[Any] = self.classes[predict(self.model, x, batch_size).argmax(1).cpu().numpy()]
        return found

    def score(self, x: Tensor, y: Any, batch_size: int = 1024) -> float:
        """Accuracy on inputs with labels (n,) of any kind; a class that was not trained on is never right."""
        given = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
        if given.shape != (len(x),):
            raise InvalidInput(f"y has shape {given.shape}; one label for each of {len(x)} inputs is needed.")
        return float(np.mean(self.predict(x, batch_size) == given))


def finetune(
    encoder: nn.Module,
    x: Tensor,
    y: Any,
    *,
    variant: Literal["paper", "official"] = "paper",
    n_epochs: int = 20,
    batch_size: int = 256,
    lr_head: float = 0.5,
    lr_encoder: float | None = None,
    weight_decay: float = 0.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    output: str | int | None = None,
    pool: Pool = None,
    seed: int = 0,
) -> FineTuned:
    r"""Train a copy of an encoder and a new linear head on labeled inputs, with a rate for each of the two.

    SGD with momentum 0.9 and cross-entropy. The head starts from normal draws of deviation 0.01 and no bias, and has a
    rate some hundred times that of the encoder.

    Parameters
    ----------
    encoder
        A :class:`~mlcollage.papers.barlow_twins.model.BarlowTwins`, of which the backbone is taken, or any module. It
        stays as it is; parameters with ``requires_grad=False`` are frozen in the copy too.
    x
        Labeled inputs (n, ...), such as the rows of :func:`mlcollage.measure.semi_supervised_split`; batches are moved
        to the encoder's device.
    y
        Their labels (n,), of any kind.
    variant
        ``"paper"``: the encoder's rate is 0.002, and both rates are multiplied by 0.2 at three and at four fifths of
        the epochs (12 and 16 of 20). ``"official"``, as the released code's command has it: 0.005, and half a cosine to
        0 that changes once an epoch.
    n_epochs, batch_size, lr_head, weight_decay
        20, 256, 0.5 and 0 in the paper. With fewer inputs than a batch has, all of them are one.
    lr_encoder
        None: by ``variant``.
    augment
        ``augment(x, generator)`` changes each training batch: the paper crops and mirrors.
    output, pool
        What of the encoder's output is the representation, as for ``BarlowTwins`` (whose own are taken).
    seed
        Of the head, the order of the inputs, the augmentation and dropout.

    Returns
    -------
    FineTuned

    Raises
    ------
    InvalidInput
        For inputs and labels that do not belong together, one class, an encoder of which nothing is trained, and
        representations that are no (n, features).

    Notes
    -----
    Batch norms are in training mode, as in the official code, so that a batch needs two inputs. The head's rate is for
    representations of ImageNet networks; where those of yours are much larger, the first losses explode: lower it. The
    official code reports the best epoch on the test set, which is optimistic; here the last one is kept.

    References
    ----------
    Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
    arXiv:2103.03230, section 3.2.

    Examples
    --------
    >>> from mlcollage.nn import build
    >>> draw = torch.Generator().manual_seed(0)
    >>> x = torch.randn(64, 8, generator=draw)
    >>> y = ["left" if v < 0 else "right" for v in x[:, 0].tolist()]
    >>> encoder = build(lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()), 0)
    >>> tuned = finetune(encoder, x, y, batch_size=32, lr_encoder=0.02)
    >>> tuned.score(x, y) > 0.9, tuned.classes.tolist()
    (True, ['left', 'right'])
    """
    checks.choice("variant", variant, tuple(_RATES))
    n_epochs = checks.integer("n_epochs", n_epochs, least=1)
    batch_size = checks.integer("batch_size", batch_size, least=1)
    rates = checks.positive("lr_head", lr_head), _RATES[variant] if lr_encoder is None else lr_encoder
    checks.positive("lr_encoder", rates[1])
    decay = checks.real("weight_decay", weight_decay, least=0)
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise InvalidInput(f"x must be a tensor (n, ...), not {getattr(x, 'shape', type(x).__name__)}.")
    index, classes = labels_of(y, len(x), "y")
    if len(classes) < 2:
        raise InvalidInput(f"all labels are {classes.tolist()[0]!r}; at least two classes are needed.")
    model = _classifier(encoder, x, len(classes), output, pool, seed)
    trained = [p for p in model.representation.parameters() if p.requires_grad]
    if not trained:
        raise InvalidInput(
            "no parameter of the encoder is trained (requires_grad=False): unfreeze some, or fit a linear probe with "
            "mlcollage.measure.ridge_probe."
        )
    optimizer = torch.optim.SGD(
        [{"params": list(model.head.parameters()), "lr": rates[0]}, {"params": trained, "lr": rates[1]}],
        lr=rates[1],
        momentum=0.9,
        weight_decay=decay,
    )
    batch_size = min(batch_size, len(x))
    per_epoch = len(x) // batch_size
    batches = epochs(x, index.to(x.device), batch_size, generator=seed, augment=augment)
    total = n_epochs * per_epoch
    losses = [
        step.loss
        for step in steps(
            model, batches, optimizer, schedule=_schedule(variant, n_epochs, per_epoch), max_steps=total, seed=seed
        )
    ]
    each = torch.stack(losses).view(n_epochs, per_epoch).float().mean(1)
    return FineTuned(model.eval(), classes, tuple(each.tolist()))


def _schedule(variant: str, n_epochs: int, per_epoch: int) -> Schedule:
    if variant == "paper":
        return step_decay([math.ceil(share * n_epochs / 5) * per_epoch for share in (3, 4)], 0.2)
    return cosine(n_epochs * per_epoch, every=per_epoch)


class _Representation(nn.Module):
    """An encoder whose output is made (n, features)."""

    def __init__(self, encoder: nn.Module, output: str | int | None, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.output, self.pool = encoder, output, pool

    def forward(self, x: Tensor) -> Tensor:
        return _rows_of(self.encoder(x), self.output, self.pool)


class _Classifier(nn.Module):
    """Representation and linear head."""

    def __init__(self, representation: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.representation, self.head = representation, nn.Linear(features, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.representation(x))
        return logits


def _classifier(
    encoder: nn.Module, x: Tensor, classes: int, output: str | int | None, pool: Pool, seed: int
) -> _Classifier:
    inside = unwrap(encoder)
    if isinstance(inside, BarlowTwins):
        representation = _Representation(copy.deepcopy(inside.backbone), inside.output, inside.pool)
    else:
        representation = _Representation(copy.deepcopy(inside), output, pool)
    found = predict(representation, x[:2])
    with seeded(seed):
        model = _Classifier(representation, found.shape[1], classes)
    model.head.to(found.device, found.dtype)
    return model
