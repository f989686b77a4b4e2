r"""Likelihoods of a network's output: labels drawn from the model, scores, and square roots of its Fisher matrix.

For outputs z of one example, :math:`F_z = E_y [s s^\top]` with the score :math:`s = \nabla_z (-\log p(y | z))`. A
factor L with :math:`L L^\top = F_z` gives the exact trace by as many backward passes as it has columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput, UnknownName

__all__ = ["KINDS", "as_generator", "check_outputs", "columns", "count_columns", "draw", "draw_scores", "score"]

KINDS = ("categorical", "gaussian", "bernoulli")


def as_generator(generator: torch.Generator | int | None, device: torch.device) -> torch.Generator:
    """The generator itself, or one from a seed, on ``device``; None is refused."""
    if isinstance(generator, torch.Generator):
        if generator.device.type != device.type:
            raise InvalidInput(
                f"the generator is on {generator.device} but the model's output on {device}: make it there."
            )
        return generator
    if not isinstance(generator, int) or isinstance(generator, bool):
        raise InvalidInput(
            "labels are drawn from the model, so pass generator=, a torch.Generator or a whole number as seed, for the "
            "same numbers another time."
        )
    return torch.Generator(device).manual_seed(generator)


def check_outputs(z: Tensor, likelihood: str, class_dim: int | None) -> int:
    """Which dimension of the output has the classes, for an output that the likelihood can use.

    Without ``class_dim`` it is the last of (B, C) and of tokens (B, T, C), and the second of images (B, C, H, W).
    """
    if likelihood not in KINDS:
        raise UnknownName(f"likelihood {likelihood!r} is not known; choose one of {', '.join(KINDS)}.")
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


def draw(z: Tensor, likelihood: str, class_dim: int, count: int, generator: torch.Generator) -> Tensor:
    """Labels from the model, (count, B, ...): class indices without the class dimension, or values shaped as z."""
    z = z.detach()
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if likelihood == "categorical":
        return _classes(z.movedim(class_dim, -1).softmax(-1), count, generator).movedim(-1, 0)
    if likelihood == "bernoulli":
        return torch.bernoulli(z.sigmoid().expand(count, *z.shape), generator=generator)
    return z + torch.randn((count, *z.shape), generator=generator, device=z.device, dtype=z.dtype)


def _classes(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws (..., count) from the last dimension, by inverting the distribution function."""
    classes = p.shape[-1]
    if classes > 256 and p.device.type != "mps":
        p = p.double()  # sums of many small numbers
    u = torch.rand((*p.shape[:-1], count), generator=generator, dtype=p.dtype, device=p.device)
    return torch.searchsorted(p.cumsum(-1), u, right=True).clamp_(max=classes - 1)


def draw_scores(z: Tensor, likelihood: str, class_dim: int, count: int, generator: torch.Generator) -> Tensor:
    """Scores (count, B, ...) at labels drawn from the model, without a graph."""
    z = z.detach()
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if likelihood != "categorical":
        return score(z, draw(z, likelihood, class_dim, count, generator), likelihood, class_dim)
    p = z.movedim(class_dim, -1).softmax(-1)
    y = _classes(p, count, generator).movedim(-1, 0).unsqueeze(-1)
    minus_one = torch.full((), -1, dtype=p.dtype, device=p.device).expand(y.shape)
    return p.expand(count, *p.shape).scatter_add(-1, y, minus_one).movedim(-1, class_dim + 1)


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
    z = z.detach()
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    numbers = z[0].numel()
    if likelihood != "categorical":
        scale = (z.sigmoid() * (-z).sigmoid()).sqrt() if likelihood == "bernoulli" else torch.ones_like(z)
        flat = scale.reshape(len(z), numbers)
        for start in range(0, numbers, size):
            ids = torch.arange(start, min(start + size, numbers), device=z.device)
            out = flat.new_zeros(len(ids), len(z), numbers)
            out[torch.arange(len(ids), device=z.device), :, ids] = flat[:, ids].T
            yield out.reshape(len(ids), *z.shape)
        return
    moved = z.movedim(class_dim, -1)
    classes, shape = moved.shape[-1], moved.shape
    p = moved.softmax(-1).reshape(len(z), -1, classes)
    rest = p.flip(-1).cumsum(-1).flip(-1)  # sums of p from each class on, without cancellation
    before, after = rest[..., :-1], rest[..., 1:]
    diagonal = (p[..., :-1] * after / before.clamp_min(torch.finfo(p.dtype).tiny)).sqrt()
    positions = p.shape[1]
    total = positions * (classes - 1)
    for start in range(0, total, size):
        ids = torch.arange(start, min(start + size, total), device=z.device)
        place, j = ids // (classes - 1), ids % (classes - 1)
        below = torch.arange(classes, device=z.device) > j.unsqueeze(1)  # (K, C)
        head = diagonal[:, place, j].T  # (K, B)
        tail = p[:, place].transpose(0, 1) / after[:, place, j].T.unsqueeze(-1).clamp_min(torch.finfo(p.dtype).tiny)
        column = torch.where(below.unsqueeze(1), -tail, torch.zeros_like(tail)) * head.unsqueeze(-1)
        k = torch.arange(len(ids), device=z.device)
        column[k, :, j] = head
        out = p.new_zeros(len(ids), len(z), positions, classes)
        out[k, :, place] = column
        yield out.reshape(len(ids), *shape).movedim(-1, class_dim + 1)
