r"""Mixup: train on convex combinations of pairs of samples.

Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412, section 2.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.class_means import check_labels


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes
    ----------
    x
        Mixed inputs (B, ...).
    y
        Mixed targets (B, C): each row the weights of its two labels.
    weight
        Weight of the first of each pair, (B,), at least one half.
    partner
        Index of the second of each pair, (B,).
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    partner: Tensor


def mixup_batch(
    x: Tensor,
    y: Tensor,
    alpha: float,
    num_classes: int,
    *,
    generator: torch.Generator,
    per_sample: bool = False,
    partner: str = "permutation",
) -> Mixed:
    r"""Mix each sample with another of the batch.

    .. math::

        \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \quad
        \tilde y_i = \lambda y_i + (1 - \lambda) y_{\pi(i)}, \quad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with a random permutation :math:`\pi`. A weight below one half is replaced by its complement, which changes
    nothing in distribution and keeps sample i the main part of row i.

    Parameters
    ----------
    x
        Inputs (B, ...), floating point.
    y
        Class numbers (B,), or rows of class weights (B, C).
    alpha
        :math:`\alpha \ge 0` of the beta distribution; 0 leaves the batch as it is. The paper uses 0.1 to 0.4 for
        ImageNet, 1 for CIFAR, and up to 32 against noisy labels.
    num_classes
        C.
    generator
        Draws weights and pairs, on any device.
    per_sample
        A weight for each sample instead of one for the batch.
    partner
        ``"permutation"``: :math:`\pi` is random. ``"roll"``: each sample is mixed with the one before it, as the code
        of big_vision does; for batches in random order. A batch of one mixes with itself.

    Returns
    -------
    Mixed
        Train on ``soft_cross_entropy(model(mixed.x), mixed.y)``.

    Raises
    ------
    InvalidInput
        For inputs that are not floating point, labels outside the classes, or a negative alpha.
    UnknownName
        For another ``partner``.

    Notes
    -----
    Accuracy against the labels of unmixed samples is no accuracy: measure it on training samples that were not mixed.

    Examples
    --------
    >>> x, y = torch.eye(4), torch.arange(4)
    >>> mixed = mixup_batch(x, y, 1.0, 4, generator=torch.Generator().manual_seed(0))
    >>> bool(torch.equal(mixed.x, mixed.y)), bool((mixed.y.sum(1) - 1).abs().max() < 1e-6)
    (True, True)
    """
    alpha = checks.real("alpha", alpha, least=0)
    num_classes = checks.integer("num_classes", num_classes, least=1)
    checks.generator(generator)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise InvalidInput(f"x and y must be tensors, not {type(x).__name__} and {type(y).__name__}.")
    if not x.is_floating_point():
        raise InvalidInput(f"mixup adds inputs: they must be floating point, not {x.dtype}; mix embeddings of tokens.")
    if len(x) != len(y) or len(x) == 0:
        raise InvalidInput(f"x holds {len(x)} samples and y {len(y)}; they must be as many, and at least one.")
    targets = _one_hot(y, num_classes).to(x.dtype)  # (B, C)
    b = len(x)
    checks.choice("partner", partner, ("permutation", "roll"))
    if partner == "roll":
        pairs = torch.arange(b, device=x.device).roll(1)
        if alpha > 0:
            _warn_if_sorted(targets, pairs)
    else:
        pairs = torch.randperm(b, generator=generator, device=generator.device).to(x.device)
    if b == 1 and alpha > 0:
        warnings.warn("a batch of one is mixed with itself, which changes nothing; use larger batches.", stacklevel=2)
    weight = _beta(alpha, b if per_sample else 1, generator).to(x).expand(b)

    return Mixed(_mix(x, weight, pairs), _mix(targets, weight, pairs), weight, pairs)


def _mix(t: Tensor, weight: Tensor, pairs: Tensor) -> Tensor:
    w = weight.view(len(t), *(1,) * (t.ndim - 1))  # (B, 1, ..., 1)
    return w * t + (1 - w) * t[pairs]


def _warn_if_sorted(targets: Tensor, pairs: Tensor) -> None:
    classes = targets.argmax(1)
    same = float((classes == classes[pairs]).float().mean())
    share = torch.bincount(classes, minlength=1).float() / len(classes)
    expected = float(share.square().sum())  # of pairs in random order
    if len(classes) >= 16 and same > 0.75 and same > expected + 0.3:
        warnings.warn(
            f"{same:.0%} of the samples are mixed with one of their own class, and {expected:.0%} would be in random "
            "order: the batch is sorted by class; shuffle it.",
            stacklevel=3,
        )


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean over samples of :math:`-\sum_k y_k \log p_k`.

    Parameters
    ----------
    logits
        Shape (B, C).
    targets
        Rows of class weights (B, C), of any sum.

    Returns
    -------
    Tensor
        Shape ().

    Examples
    --------
    >>> round(float(soft_cross_entropy(torch.zeros(2, 4), torch.eye(4)[:2])), 4)  # log 4
    1.3863
    """
    if logits.shape != targets.shape:
        raise InvalidInput(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be (B, C).")
    return F.cross_entropy(logits, targets)  # takes rows of weights where targets have the shape of the logits


def _one_hot(y: Tensor, num_classes: int) -> Tensor:
    if y.is_floating_point() and y.ndim == 2 and y.shape[1] == num_classes:
        return y
    if y.is_floating_point() or y.ndim != 1:
        raise InvalidInput(f"y must be classes (B,) or weights (B, {num_classes}), not {y.dtype} {tuple(y.shape)}.")
    check_labels(y, num_classes)
    return F.one_hot(y.long(), num_classes)


def _beta(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """Weights from Beta(alpha, alpha), each at least one half, from a torch generator (torch's own takes none)."""
    if alpha == 0:  # the limit: all mass at 0 and 1
        return torch.ones(n)
    # One draw of torch's seeds numpy's generator, so that the numbers do not depend on the device.
    seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator, device=generator.device))
    drawn = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, size=n))
    return torch.maximum(drawn, 1 - drawn)  # the density is symmetric
