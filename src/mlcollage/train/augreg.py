r"""AugReg: the 28 settings of augmentation and regularization of Steiner et al. (2022, arXiv:2106.10270, sec. 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.train.mixup import Mixed, mixup_batch
from mlcollage.train.rand_augment import randaugment
from mlcollage.train.recipes import kernel_groups

#: RandAugment's layers l and magnitude m, and mixup's alpha, of each preset, weakest first.
PRESETS = MappingProxyType(
    {
        "none": (0, 0.0, 0.0),
        "light1": (2, 0.0, 0.0),
        "light2": (2, 10.0, 0.2),
        "medium1": (2, 15.0, 0.2),
        "medium2": (2, 15.0, 0.5),
        "strong1": (2, 20.0, 0.5),
        "strong2": (2, 20.0, 0.8),
    }
)
# Other spellings. The released index.csv counts the light ones from 0; figures call the strong ones heavy.
_INDEX_CSV = MappingProxyType({"light0": "light1", "light1": "light2"})
_FIGURES = MappingProxyType({"heavy1": "strong1", "heavy2": "strong2"})


@dataclass(frozen=True)
class AugReg:
    r"""One setting of augmentation and regularization.

    Attributes
    ----------
    name
        Of the augmentation, as the paper's text has it; ``"custom"`` for one of your own.
    layers, magnitude
        RandAugment's operations for each image, and their strength (:func:`mlcollage.train.randaugment`).
    alpha
        Of mixup's distribution :math:`\mathrm{Beta}(\alpha, \alpha)`; 0 is off.
    dropout, stochastic_depth
        Probabilities for :class:`mlcollage.nn.ViT`; the paper has both at 0, or both at 0.1.
    weight_decay
        Decoupled, on kernels; the paper has 0.03 and 0.1.

    Examples
    --------
    >>> setting = AugReg.from_name("medium1", dropout=0.1, weight_decay=0.03)
    >>> setting.layers, setting.magnitude, setting.alpha, setting.model_kwargs()
    (2, 15.0, 0.2, {'dropout': 0.1, 'stochastic_depth': 0.1})
    >>> AugReg.from_name("light1", dialect="index_csv").name, len(AugReg.grid())
    ('light2', 28)
    """

    name: str = "none"
    layers: int = 0
    magnitude: float = 0.0
    alpha: float = 0.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        checks.integer("layers", self.layers, least=0)
        checks.real("magnitude", self.magnitude, least=0, most=30)
        checks.real("alpha", self.alpha, least=0)
        checks.real("dropout", self.dropout, least=0, below=1)
        checks.real("stochastic_depth", self.stochastic_depth, least=0, below=1)
        checks.real("weight_decay", self.weight_decay, least=0)

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        dropout: float = 0.0,
        stochastic_depth: float | None = None,
        weight_decay: float = 0.1,
        dialect: str = "paper",
    ) -> AugReg:
        """A preset.

        Parameters
        ----------
        name
            ``"none"``, ``"light1"``, ``"light2"``, ``"medium1"``, ``"medium2"``, ``"strong1"``, ``"strong2"``; the
            figures' ``"heavy1"`` and ``"heavy2"`` too.
        dropout
            0 or 0.1 in the paper.
        stochastic_depth
            None: as ``dropout``, as in the paper.
        weight_decay
            0.03 or 0.1 in the paper.
        dialect
            ``"paper"``, or ``"index_csv"``: names of the released table, whose light0 and light1 are the text's light1
            and light2 (inferred from its seven labels).
        """
        checks.choice("dialect", dialect, ("paper", "index_csv"))
        other = dict(_FIGURES)
        if dialect == "index_csv":
            other |= _INDEX_CSV
            known = ["none", "light0", "light1", *list(PRESETS)[3:], *_FIGURES]
        else:
            known = [*PRESETS, *_FIGURES]
        name = other.get(checks.choice("name", name, known), name)
        depth = dropout if stochastic_depth is None else stochastic_depth
        return cls(name, *PRESETS[name], dropout=dropout, stochastic_depth=depth, weight_decay=weight_decay)

    @classmethod
    def grid(cls) -> list[AugReg]:
        """The paper's 28 settings: seven augmentations, with and without regularization, two weight decays."""
        return [
            cls.from_name(name, dropout=rate, weight_decay=decay)
            for name in PRESETS
            for rate in (0.0, 0.1)
            for decay in (0.03, 0.1)
        ]

    def label(self, dialect: str = "paper") -> str:
        """The augmentation's name in a dialect."""
        checks.choice("dialect", dialect, ("paper", "index_csv"))
        if dialect == "index_csv":
            return {text: csv for csv, text in _INDEX_CSV.items()}.get(self.name, self.name)
        return self.name

    def transform(self, x: Tensor, *, generator: torch.Generator, reference_size: int | None = None) -> Tensor:
        """RandAugment on uint8 images (B, C, H, W), before they are scaled to [-1, 1]."""
        return randaugment(x, self.layers, self.magnitude, generator=generator, reference_size=reference_size)

    def mixup(self, x: Tensor, y: Tensor, num_classes: int, *, generator: torch.Generator) -> Mixed:
        """Mixup with one weight for the batch, each sample with the one before it."""
        return mixup_batch(x, y, self.alpha, num_classes, generator=generator, partner="roll")

    def model_kwargs(self) -> dict[str, float]:
        """Arguments for :func:`mlcollage.nn.vit_models.vit` or :class:`mlcollage.nn.ViT`."""
        return {"dropout": self.dropout, "stochastic_depth": self.stochastic_depth}

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters of a model for an optimizer, weight decay on kernels only."""
        return kernel_groups(model, self.weight_decay)
