"""What a study is run on: built in, or the user's own model and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """Train and test data, the number of classes, and (where the study trains networks) a model.

    Parameters
    ----------
    train, test
        Map-style datasets of ``(input, label)``; inputs float tensors (images ``(channels, height, width)``
        scaled to [0, 1], tables ``(features,)``), labels integers from 0.
    num_classes
        Number of classes.
    model
        Makes a fresh ``nn.Module`` that maps a batch of inputs to logits, or None for the study's own.
    name
        How it is called on slides and in the store.
    fingerprint
        Changes when the user's file changes, so that old results are not taken for new ones.
    """

    train: Dataset[tuple[Tensor, Tensor]]
    test: Dataset[tuple[Tensor, Tensor]]
    num_classes: int
    model: Callable[[], nn.Module] | None = None
    name: str = "workload"
    fingerprint: str = ""
