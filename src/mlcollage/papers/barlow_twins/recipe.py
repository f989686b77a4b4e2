"""The paper's training recipe: optimizer, groups and schedule, and what a resumed run must share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.train import LARS, Schedule, split_bias_and_norm, warmup_cosine

from .loss import BarlowTwinsLoss

__all__ = ["Pretraining", "pretraining"]


@dataclass(frozen=True)
class Pretraining:
    """Optimizer and schedule of a pre-training, and the facts that a resumed one must share.

    Parameters
    ----------
    optimizer
        LARS with two groups: weights, and biases and norms with a rate of their own.
    schedule
        Factor on the groups' base rates (``initial_lr``) at a 0-based optimizer step.
    total_steps
        Optimizer steps of the whole run.
    facts
        Plain values to keep in a checkpoint.
    """

    optimizer: LARS
    schedule: Schedule
    total_steps: int
    facts: Mapping[str, Any]

    def set_rates(self, step: int) -> float:
        """Set the rates for a 0-based optimizer step (not a micro-batch); gives that of the weights."""
        factor = self.schedule(checks.integer("step", step, least=0))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])

    def check_resume(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on with a checkpoint of another embedding or optimizer, and say what else differs.

        Raises
        ------
        InvalidInput
            If the width of the embedding or the parameters' number differ.

        Warns
        -----
        UserWarning
            If batch, length, warm-up, processes or weight of the loss differ, which changes rates in mid-run.
        """
        for name, mine in self.facts.items():
            theirs = facts.get(name)
            if theirs == mine:
                continue
            text = f"the checkpoint was trained with {name}={theirs}, this run has {name}={mine}"
            if name in ("parameters", "embedding"):
                raise InvalidInput(f"{text}: it cannot be resumed; make the model as it was.")
            warnings.warn(f"{text}: rates and loss change from here on.", stacklevel=2)


def pretraining(
    model: nn.Module,
    *,
    batch_size: int,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: int = 10,
    lr_weights: float = 0.2,
    lr_biases: float = 0.0048,
    weight_decay: float = 1e-6,
    also: tuple[str, ...] = (),
    official_gradients: int = 1,
) -> Pretraining:
    r"""LARS, parameter groups and schedule of the paper.

    Rates are those given times ``batch_size / 256``; they rise over the warm-up from 0 and fall along half a cosine to
    1/1000. Biases and norms have neither decay nor layer-wise adaptation.

    Parameters
    ----------
    model
        Such as a :class:`~mlcollage.papers.barlow_twins.model.BarlowTwins`.
    batch_size
        Rows of one optimizer step, over all processes and accumulated parts.
    steps_per_epoch, epochs, warmup_epochs
        Optimizer steps (not micro-batches) of an epoch, and lengths. The official code always warms up for 10 epochs.
    lr_weights, lr_biases
        Per 256 rows. The authors report as best weights' rates 0.7 for batches of 128 and 0.4, 0.3, 0.25, 0.2 for 256,
        512, 1,024, 2,048.
    weight_decay
        Of the weights; 1e-6 as in the official code (1.5e-6 in the paper).
    also
        Further parameters without adaptation and decay, by name or pattern, such as ``"*cls_token"``.
    official_gradients
        The number W of processes for which ``lr_biases`` was chosen with the official code, whose gradients are W times
        too small: the rate is divided by it. LARS hides that for weights. By default 1, the rate as it is.

    Raises
    ------
    InvalidInput
        If the warm-up is as long as the run.

    Warns
    -----
    UserWarning
        For weights whose norm is 0: LARS takes a plain, unscaled gradient step for these.

    Examples
    --------
    >>> from mlcollage.nn import build
    >>> model = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), 0)
    >>> plan = pretraining(model, batch_size=512, steps_per_epoch=10, epochs=100)
    >>> plan.total_steps, plan.set_rates(0), plan.set_rates(100)
    (1000, 0.0, 0.4)
    """
    batch_size = checks.integer("batch_size", batch_size, least=2)
    epochs = checks.integer("epochs", epochs, least=1)
    warmup_epochs = checks.integer("warmup_epochs", warmup_epochs, least=0)
    steps_per_epoch = checks.integer("steps_per_epoch", steps_per_epoch, least=1)
    official = checks.integer("official_gradients", official_gradients, least=1)
    if warmup_epochs >= epochs:
        raise InvalidInput(
            f"a warm-up of {warmup_epochs} epochs does not fit into {epochs}: rates would still rise at the end; give "
            "a shorter one, such as warmup_epochs=1."
        )
    scale = batch_size / 256
    bias_rate = checks.positive("lr_biases", lr_biases) * scale / official
    rate = checks.positive("lr_weights", lr_weights) * scale
    groups = split_bias_and_norm(model, also=also, lr=bias_rate, exclude="all")
    adapted = {id(p) for p in groups[0]["params"]}
    zero = [n for n, p in model.named_parameters() if id(p) in adapted and p.ndim > 1 and not bool((p != 0).any())]
    if zero:
        warnings.warn(
            f"{len(zero)} weights are zero ({', '.join(zero[:4])}): LARS gives them the plain gradient, times "
            f"lr={rate:g}, where others have steps of a thousandth of their norm; name them in also=, or draw them.",
            stacklevel=2,
        )
    optimizer = LARS(groups, lr=rate, momentum=0.9, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    total = epochs * steps_per_epoch
    losses = [m for m in model.modules() if isinstance(m, BarlowTwinsLoss)]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding": linear[-1].out_features if linear else None,
        "batch_size": batch_size,
        "total_steps": total,
        "warmup_steps": warmup_epochs * steps_per_epoch,
        "processes": torch.distributed.get_world_size() if distributed else 1,
        "lambd": losses[0].lambd if losses else None,
    }
    return Pretraining(optimizer, warmup_cosine(total, warmup_epochs * steps_per_epoch), total, facts)
