r"""Likelihoods of a network's output: labels drawn from the model, scores, and square roots of its Fisher matrix.

For outputs z of one example, :math:`F_z = E_y [s s^\top]` with the score :math:`s = \nabla_z (-\log p(y | z))`. A
factor L with :math:`L L^\top = F_z` gives the exact trace by as many backward passes as it has columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

KINDS = ("categorical", "gaussian", "bernoulli")


def as_generator(generator: torch.Generator | int | None, device: torch.device | None = None) -> torch.Generator:
    """The generator itself, or one from a seed; None is refused.

    With a ``device`` it must be there. Without, it may be anywhere, and one from a seed is on the CPU: what is drawn is
    then moved, and is the same for every device.
    """
    if isinstance(generator, torch.Generator):
        if device is not None and generator.device.type != device.type:
            raise InvalidInput(f"the generator is on {generator.device} but the output on {device}: make it there.")
        return generator
    if not isinstance(generator, int) or isinstance(generator, bool):
        raise InvalidInput(
            "labels are drawn from the model, so pass generator=, a torch.Generator or a whole number as seed, for the "
            "same numbers another time."
        )
    return torch.Generator(device or "cpu").manual_seed(generator)


def check_outputs(z: Tensor, likelihood: str, class_dim: int | None) -> int:
    """Which dimension of the output has the classes, for an output that the likelihood can use.

    Without ``class_dim`` it is the last of (B, C) and of tokens (B, T, C), and the second of images (B, C, H, W).
    """
    checks.choice("likelihood", likelihood, KINDS)
    low, high = (float(v) for v in z.detach().aminmax()) if z.is_floating_point() and z.numel() else (math.nan, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidInput("the model's output has values that are not finite numbers, so it has no Fisher matrix.")
    if likelihood != "categorical":
        return -1
    if z.ndim < 2:
        raise InvalidInput(
            f"a categorical likelihood needs logits (B, classes), not {tuple(z.shape)}: for one logit an example use "
            "likelihood='bernoulli'."
        )
    where = (1 if z.ndim >= 4 else z.ndim - 1) if class_dim is None else class_dim % z.ndim
    if where == 0:
        raise InvalidInput("class_dim must not be the first dimension, which has the examples.")
    if z.shape[where] < 2:
        raise InvalidInput(
            f"logits of shape {tuple(z.shape)} have one class, whose label is always the same: use "
            "likelihood='bernoulli' for one logit, or give class_dim."
        )
    if low >= 0 and high <= 1 and bool((z.detach().sum(where) - 1).abs().max() < 1e-3):
        raise InvalidInput(
            "the model's output are probabilities (no value is negative, and they sum to 1): return logits, without "
            "the softmax."
        )
    return where


def draw(z: Tensor, likelihood: str, class_dim: int, draws: int, generator: torch.Generator) -> Tensor:
    """Labels from the model, (draws, B, ...): class numbers without the class dimension, or values shaped as z."""
    z = _at_least_single(z.detach())
    if likelihood == "categorical":
        return _classes(z.movedim(class_dim, -1), draws, generator)
    shape, where = (draws, *z.shape), generator.device
    if likelihood == "bernoulli":
        return (torch.rand(shape, generator=generator, device=where).to(z.device) < z.sigmoid()).to(z.dtype)
    return z + torch.randn(shape, generator=generator, device=where).to(z)


def _classes(logits: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Class numbers (draws, ...) from logits (..., C), by inverting the distribution function at uniform numbers.

    The numbers come from the generator's own device, so that a generator gives the same labels on every device.
    """
    # Sums of many small probabilities want double precision; Apple's GPUs have none.
    kind = torch.float32 if logits.device.type == "mps" else torch.float64
    *lead, classes = logits.shape
    u = torch.rand((*lead, draws), generator=generator, device=generator.device, dtype=torch.float64)
    up_to = logits.to(kind).softmax(-1).cumsum(-1)  # (..., C): probability of this class or one before it
    found = torch.searchsorted(up_to, u.to(kind).to(logits.device), right=True)  # (..., draws)
    return found.clamp_(max=classes - 1).movedim(-1, 0)


def draw_scores(z: Tensor, likelihood: str, class_dim: int, draws: int, generator: torch.Generator) -> Tensor:
    """Scores (draws, B, ...) at labels drawn from the model, without a graph."""
    z = _at_least_single(z.detach())
    if likelihood != "categorical":
        return score(z, draw(z, likelihood, class_dim, draws, generator), likelihood, class_dim)
    last = z.movedim(class_dim, -1)  # (B, ..., C)
    p = last.softmax(-1)
    y = _classes(last, draws, generator).unsqueeze(-1)  # (draws, B, ..., 1)
    minus_one = torch.full((), -1, dtype=p.dtype, device=p.device).expand(y.shape)
    return p.expand(draws, *p.shape).scatter_add(-1, y, minus_one).movedim(-1, class_dim + 1)


def _at_least_single(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def score(z: Tensor, y: Tensor, likelihood: str, class_dim: int) -> Tensor:
    """Gradients (K, B, ...) of the negative log-likelihood of labels (K, B, ...) with respect to z; with z's graph."""
    if likelihood == "categorical":
        lead = y.ndim - (z.ndim - 1)
        hot = torch.nn.functional.one_hot(y, z.shape[class_dim]).movedim(-1, class_dim + lead)
        return z.softmax(class_dim) - hot.to(z.dtype)
    return (z.sigmoid() if likelihood == "bernoulli" else z) - y.to(z.dtype)


def count_columns(z: Tensor, likelihood: str, class_dim: int) -> int:
    """Columns of the factor: (classes - 1) for each position, or one for each output."""
    numbers = z[0].numel()
    return numbers - numbers // z.shape[class_dim] if likelihood == "categorical" else numbers


def columns(z: Tensor, likelihood: str, class_dim: int, size: int) -> Iterator[Tensor]:
    r"""Columns of a factor of :math:`F_z`, at most ``size`` at a time, each chunk (K, B, ...).

    Categorical: the Cholesky factor of :math:`\mathrm{diag}(p) - p p^\top` in closed form (Tanabe and Sagae 1992), with
    :math:`q_j = \sum_{l > j} p_l`:
    :math:`L_{jj} = \sqrt{p_j q_j / q_{j-1}}`, :math:`L_{ij} = -L_{jj}\, p_i / q_j` for i > j. It has C - 1 columns.
    """
    z = _at_least_single(z.detach())
    numbers = z[0].numel()
    if likelihood != "categorical":
        # Outputs are independent: F_z is diagonal, and so is its root; one column for each output.
        scale = (z.sigmoid() * (-z).sigmoid()).sqrt() if likelihood == "bernoulli" else torch.ones_like(z)
        flat = scale.reshape(len(z), numbers)
        for start in range(0, numbers, size):
            ids = torch.arange(start, min(start + size, numbers), device=z.device)
            out = flat.new_zeros(len(ids), len(z), numbers)  # (K, B, outputs), one non-zero output in each column
            out[torch.arange(len(ids), device=z.device), :, ids] = flat[:, ids].T
            yield out.reshape(len(ids), *z.shape)
        return
    moved = z.movedim(class_dim, -1)
    classes, shape = moved.shape[-1], moved.shape
    p = moved.softmax(-1).reshape(len(z), -1, classes)  # (B, positions, C)
    rest = p.flip(-1).cumsum(-1).flip(-1)  # sums of p from each class on, without cancellation
    before, after = rest[..., :-1], rest[..., 1:]
    # L_jj, (B, positions, C - 1); clamped where no probability is left, as 0 / 0 there means 0.
    diagonal = (p[..., :-1] * after / before.clamp_min(torch.finfo(p.dtype).tiny)).sqrt()
    positions = p.shape[1]
    total = positions * (classes - 1)
    for start in range(0, total, size):
        ids = torch.arange(start, min(start + size, total), device=z.device)
        place, j = ids // (classes - 1), ids % (classes - 1)  # (K,) each: position and class of a column
        below = torch.arange(classes, device=z.device) > j.unsqueeze(1)  # (K, C)
        head = diagonal[:, place, j].T  # (K, B): L_jj
        # (K, B, C): p_i / q_j, kept for the classes i > j
        tail = p[:, place].transpose(0, 1) / after[:, place, j].T.unsqueeze(-1).clamp_min(torch.finfo(p.dtype).tiny)
        column = torch.where(below.unsqueeze(1), -tail, torch.zeros_like(tail)) * head.unsqueeze(-1)
        k = torch.arange(len(ids), device=z.device)
        column[k, :, j] = head
        out = p.new_zeros(len(ids), len(z), positions, classes)  # zero but at the column's own position
        out[k, :, place] = column
        yield out.reshape(len(ids), *shape).movedim(-1, class_dim + 1)
