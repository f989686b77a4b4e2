r"""The loss of Barlow Twins: the cross-correlation of two views' embeddings is drawn to the identity matrix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from . import _blocks, _rows, _terms

Impl = Literal["auto", "direct", "gram", "tiled", "blocks"]
Normalize = Literal["batch", "feature", "none"]
GradScale = Literal["exact", "official"]
Target = Literal["identity", "hsic"]

__all__ = ["BarlowTerms", "BarlowTwinsLoss", "barlow_twins_loss", "standardize"]

_WIDE = 2048  # columns from which the whole matrix C is no longer formed
_SHOWN = 8  # columns or rows that a message names


class BarlowTerms(NamedTuple):
    """The loss and the two terms that it is the sum of; ``redundancy`` has its weight in it."""

    loss: Tensor
    invariance: Tensor
    redundancy: Tensor


def barlow_twins_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambd: float = 0.0051,
    impl: Impl = "auto",
    normalize: Normalize = "batch",
    eps: float = 1e-5,
    correction: int = 0,
    target: Target = "identity",
    group: Any = None,
    grad_scale: GradScale = "exact",
    return_terms: bool = False,
    check: bool = True,
) -> Any:
    r"""Loss of two views' embeddings, row n of both being views of the same sample.

    .. math::

        L = \sum_i (1 - C_{ii})^2 + \lambda \sum_i \sum_{j \ne i} C_{ij}^2, \qquad
        C = \tfrac1N (\hat z^A)^\top \hat z^B, \qquad
        \hat z = \frac{z - \operatorname{mean}_b z}{\sqrt{\operatorname{var}_b z + \varepsilon}}

    The first term is the invariance term, the second the redundancy reduction term. Statistics are those of the batch,
    of each view by itself, whatever mode a model is in.

    Parameters
    ----------
    z_a, z_b
        Embeddings (N, D) of the two views, any floating type; half precision is computed in float32, under autocast
        too.
    lambd
        :math:`\lambda`, by default 0.0051, that of the official code.
    impl
        ``"direct"`` forms C; ``"gram"`` uses :math:`\|a^\top b\|_F^2 = \langle a a^\top, b b^\top \rangle` and forms
        two matrices (N, N) instead; ``"tiled"`` forms C a block of columns at a time, twice; ``"blocks"`` is the Gram
        form of which each process of a group computes its own rows only (no second derivatives). ``"auto"`` (default)
        takes ``"gram"`` for N < 3 D / 4, with a group ``"blocks"``, else ``"direct"`` up to 2,048 columns and
        ``"tiled"`` beyond.
    normalize
        ``"batch"`` (default) standardizes each column over the batch, as above; ``"feature"`` each row over its
        features, ``"none"`` nothing: both are ablations of the paper, with C formed in the same way.
    eps
        :math:`\varepsilon`, added to the variance; 1e-5 by default, as in torch's batch norm. A column of standard
        deviation s has a diagonal of at most :math:`s^2 / (s^2 + \varepsilon)`.
    correction
        0 (default) divides by N for the variance, as the official code does; 1 by N - 1, as the paper's listing does.
    target
        ``"identity"`` (default), or ``"hsic"`` (Tsai et al. 2021, arXiv:2104.13712): C off the diagonal is drawn to -1,
        :math:`\sum_{j \ne i} (C_{ij} + 1)^2` in place of the second sum.
    group
        The process group (``torch.distributed.group.WORLD``) whose processes hold parts of one batch. All rows are
        gathered: loss and gradient are those of one process with the whole batch. Numbers of rows may differ.
    grad_scale
        With a group: ``"exact"`` (default) gives gradients that are right after ``DistributedDataParallel`` has
        averaged them over W processes; ``"official"`` the W times smaller ones of the official code.
    return_terms
        Return :class:`BarlowTerms` instead of the loss.
    check
        Look at the values (one transfer from the device): NaN is refused, and constant columns, equal views and the
        like are warned about. False inside ``torch.func.vmap``, CUDA graphs and compiled regions.

    Returns
    -------
    Tensor or BarlowTerms
        One number, a sum over entries and not a mean; float32, or float64 for float64 embeddings.

    Raises
    ------
    InvalidInput
        For embeddings that are not two equal (N, D) floating tensors with N >= 2, NaN or infinity in them, settings out
        of range, and a group without an initialized process group.

    Warns
    -----
    UserWarning
        For N = 2, which teaches nothing; :math:`\lambda \ge 1`; constant columns and variances below 100 eps; views
        that are equal; means beyond 10,000 standard deviations.

    References
    ----------
    Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
    arXiv:2103.03230, section 2.1 and algorithm 1.

    Examples
    --------
    >>> n, k = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(1.0, 5.0, dtype=torch.float64)
    >>> terms = barlow_twins_loss(torch.sin(1 + n * k), torch.sin(1.3 + n * k), return_terms=True)
    >>> [round(float(term), 9) for term in terms]
    [0.004787759, 0.004161521, 0.000626238]
    """
    settings = _Settings(lambd, impl, normalize, eps, correction, target, group, grad_scale, check)
    terms, findings = _evaluate(z_a, z_b, settings)
    for text in findings.values():
        _warn(text)
    return terms if return_terms else terms.loss


class BarlowTwinsLoss(nn.Module):
    """:func:`barlow_twins_loss` as a module; warns once of each kind of trouble.

    Parameters
    ----------
    lambd, impl, normalize, eps, correction, target, group, grad_scale, return_terms, check
        As for :func:`barlow_twins_loss`.

    Examples
    --------
    >>> loss = BarlowTwinsLoss(lambd=0.02)
    >>> draw = torch.Generator().manual_seed(0)
    >>> z = torch.randn(64, 8, generator=draw)
    >>> float(loss(z, z + 0.1 * torch.randn(64, 8, generator=draw))) < 0.5
    True
    """

    def __init__(
        self,
        lambd: float = 0.0051,
        *,
        impl: Impl = "auto",
        normalize: Normalize = "batch",
        eps: float = 1e-5,
        correction: int = 0,
        target: Target = "identity",
        group: Any = None,
        grad_scale: GradScale = "exact",
        return_terms: bool = False,
        check: bool = True,
    ) -> None:
        super().__init__()
        self._settings = _Settings(lambd, impl, normalize, eps, correction, target, group, grad_scale, check)
        self.return_terms = return_terms
        self._said: set[str] = set()

    @property
    def lambd(self) -> float:
        """The weight of the redundancy term."""
        return self._settings.lambd

    @property
    def normalize(self) -> str:
        """What is standardized."""
        return self._settings.normalize

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self._settings.eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Any:
        """The loss of embeddings (N, D) and (N, D)."""
        terms, findings = _evaluate(z_a, z_b, self._settings)
        for kind, text in findings.items():
            if kind not in self._said:
                self._said.add(kind)
                _warn(text)
        return terms if self.return_terms else terms.loss

    def extra_repr(self) -> str:
        """Settings that matter, for printing."""
        s = self._settings
        return f"lambd={s.lambd:g}, impl={s.impl!r}, normalize={s.normalize!r}, target={s.target!r}"


@dataclass(frozen=True)
class _Settings:
    """What the loss is computed with, checked once."""

    lambd: float
    impl: Impl
    normalize: Normalize
    eps: float
    correction: int
    target: Target
    group: Any
    grad_scale: GradScale
    check: bool

    def __post_init__(self) -> None:
        checks.real("lambd", self.lambd, least=0)
        checks.choice("impl", self.impl, ("auto", "direct", "gram", "tiled", "blocks"))
        checks.choice("normalize", self.normalize, ("batch", "feature", "none"))
        checks.real("eps", self.eps, least=0)
        checks.integer("correction", self.correction, least=0, most=1)
        checks.choice("target", self.target, ("identity", "hsic"))
        checks.choice("grad_scale", self.grad_scale, ("exact", "official"))


class _Health(NamedTuple):
    """What is looked at, all in one transfer from the device."""

    loss: float
    variance_a: float  # the smallest of a column
    variance_b: float
    most: float  # the largest variance
    offset: float  # the largest mean of a column in its standard deviations
    equal: float  # share of rows that are the same in both views


def _evaluate(z_a: Tensor, z_b: Tensor, s: _Settings) -> tuple[BarlowTerms, dict[str, str]]:
    """The terms, and what is worth a warning, by kind."""
    processes = _rows.world(s.group)
    problem = _problem(z_a, z_b)
    if problem and processes == 1:
        raise InvalidInput(problem)
    # Outside of autocast and in float32 at least: entries of the Gram matrices reach D, beyond what half types hold.
    with torch.autocast(z_a.device.type if isinstance(z_a, Tensor) else "cpu", enabled=False):
        if not problem and z_a.dtype in (torch.float16, torch.bfloat16):
            z_a, z_b = z_a.float(), z_b.float()
        gathered = None
        if processes > 1:
            gathered = _rows.gather(z_a, z_b, s.group, problem)
            z_a, z_b = gathered.a, gathered.b
        if len(z_a) < 2:
            raise InvalidInput("a batch of one row has no statistics; the loss needs N >= 2 rows, better hundreds.")
        if s.normalize == "none":
            a, b, moments = z_a, z_b, None
        else:
            parts = [_standardized(z, s.normalize, s.eps, s.correction) for z in (z_a, z_b)]
            a, b = parts[0][0], parts[1][0]
            moments = [(mean, variance) for _, mean, variance in parts] if s.normalize == "batch" else None
        if gathered is not None and _impl(s.impl, a) in ("blocks", "gram") and s.impl != "gram":
            invariance, redundancy = _in_blocks(gathered, a, b, s, moments)
        else:
            invariance, redundancy = _form(s.impl, a)(a, b)
        if s.target == "hsic":
            redundancy = redundancy + _toward_minus_one(a, b)
        redundancy = s.lambd * redundancy
        terms = BarlowTerms(invariance + redundancy, invariance, redundancy)
    findings = _findings(z_a, z_b, terms, s, moments) if s.check else {}
    if s.check and s.group is None and _rows.others():
        findings["alone"] = (
            "the loss is that of this process's rows only, although there are several processes: averaged gradients of "
            "such losses are those of another loss. Give group=torch.distributed.group.WORLD."
        )
    if processes > 1 and s.grad_scale == "exact":
        # DistributedDataParallel takes the mean of the processes' gradients, where their sum is the whole gradient.
        terms = BarlowTerms(*(_with_gradient_times(term, processes) for term in terms))
    return terms, findings


def standardize(z: Tensor, normalize: Normalize = "batch", eps: float = 1e-5, correction: int = 0) -> Tensor:
    r"""Embeddings (N, D) as the loss sees them: columns (or rows) of mean 0 and variance 1.

    Parameters
    ----------
    z, normalize, eps, correction
        As for :func:`barlow_twins_loss`; half precision becomes float32.

    Raises
    ------
    InvalidInput
        For what is no (N, D) floating tensor with N >= 2, and settings out of range.

    Examples
    --------
    >>> standardize(torch.tensor([[1e6, 0.0], [1e6 + 1, 0.0]]), eps=0.0)
    tensor([[-1.,  0.],
            [ 1.,  0.]])
    """
    _Settings(0.0, "auto", normalize, eps, correction, "identity", None, "exact", False)  # checks them
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or len(z) < 2:
        found = f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise InvalidInput(f"z is a {found}; a floating tensor (N, D) with N >= 2 is needed.")
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    if normalize == "none":
        return z
    with torch.autocast(z.device.type, enabled=False):
        return _standardized(z, normalize, eps, correction)[0]


def _standardized(z: Tensor, normalize: Normalize, eps: float, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    """Also the means of what was standardized, and its variances with denominator n."""
    axis = 0 if normalize == "batch" else 1
    # The first entry goes off before anything else is computed: what a large offset would cost in digits is not lost.
    first = z.narrow(axis, 0, 1).detach()
    z = z - first
    mean = z.mean(axis, keepdim=True)
    z = z - mean
    plain = z.square().mean(axis, keepdim=True)
    ratio = z.shape[axis] / (z.shape[axis] - correction)
    return z * _scale(plain, ratio, eps), (first + mean).detach(), plain.detach()


def _scale(variance: Tensor, ratio: float, eps: float) -> Tensor:
    """What centered columns are multiplied with; a constant column stays 0 without an eps too."""
    variance = variance * ratio + eps
    return torch.where(variance > 0, variance, 1.0).rsqrt()


def _impl(impl: Impl, a: Tensor) -> Impl:
    n, d = a.shape
    if impl == "auto":
        return "gram" if 4 * n < 3 * d else "direct" if d <= _WIDE else "tiled"
    return impl


def _form(impl: Impl, a: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    forms = {"direct": _terms.direct, "gram": _terms.gram, "tiled": _terms.tiled, "blocks": _terms.gram}
    return forms[_impl(impl, a)]


def _in_blocks(
    gathered: _rows.Gathered, a: Tensor, b: Tensor, s: _Settings, moments: list[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, Tensor]:
    """The Gram form, of which this process computes its own rows."""
    own, statistics = gathered.own, None
    rows = (a[own], b[own])
    if moments is not None:
        rows = (gathered.a[own], gathered.b[own])  # what was standardized
        n = len(a)
        ratio = n / (n - s.correction)
        scale_a, scale_b = (_scale(variance, ratio, s.eps) for _, variance in moments)
        statistics = _blocks.Statistics(scale_a, scale_b, ratio)
    setting = _blocks.Setting(own, s.group, gathered.grads, statistics)
    return _blocks.blocks(*rows, a.detach(), b.detach(), setting)


def _toward_minus_one(a: Tensor, b: Tensor) -> Tensor:
    """Sum of (C_ij + 1)^2 - C_ij^2 off the diagonal: 2 (sum of all C - sum of the diagonal) + D (D - 1)."""
    n, d = a.shape
    diagonal = (a * b).sum() / n
    return 2 * ((a.sum(1) * b.sum(1)).sum() / n - diagonal) + d * (d - 1)


def _with_gradient_times(x: Tensor, factor: float) -> Tensor:
    return x * factor - (x * (factor - 1)).detach()


def _problem(z_a: Any, z_b: Any) -> str | None:
    """Why these cannot be two views' embeddings, in one sentence."""
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        if not isinstance(z, Tensor):
            return f"{name} must be a tensor (N, D), not a {type(z).__name__}; take the embedding out of it."
    shapes = f"{tuple(z_a.shape)} and {tuple(z_b.shape)}"
    if z_a.ndim != 2 or z_b.ndim != 2:
        return (
            f"expected two (N, D) tensors, got {shapes}: of sequences and maps, flatten the positions that count (the "
            "same ones in both views, no padding) into rows, or average over them."
        )
    if z_a.shape != z_b.shape:
        return f"expected two (N, D) tensors of one shape, got {shapes}; row n of both must be views of one sample."
    if z_a.shape[1] < 1:
        return f"expected two (N, D) tensors, got {shapes}, which have no columns."
    if not z_a.is_floating_point() or z_a.dtype != z_b.dtype:
        return f"expected two (N, D) tensors of one floating type, got {z_a.dtype} and {z_b.dtype}."
    if z_a.device != z_b.device:
        return f"the two views are on different devices, {z_a.device} and {z_b.device}; move one of them."
    return None


@torch.no_grad()
def _findings(
    z_a: Tensor, z_b: Tensor, terms: BarlowTerms, s: _Settings, moments: list[tuple[Tensor, Tensor]] | None
) -> dict[str, str]:
    """Warnings by kind; NaN and infinity are refused. ``moments`` are means and variances where they are known."""
    if moments is None:
        moments = [(z.mean(0), (z - z[:1]).var(0, correction=0)) for z in (z_a, z_b)]
    means, variances = ([pair[i].flatten() for pair in moments] for i in (0, 1))  # of columns, (D,) each
    deviations = [v.sqrt().clamp(min=torch.finfo(v.dtype).tiny) for v in variances]
    ratios = [torch.where(v > 0, m.abs() / d, 0.0).max() for m, v, d in zip(means, variances, deviations, strict=True)]
    offset = torch.stack(ratios).max()
    equal = (z_a == z_b).all(1).to(terms.loss.dtype).mean()
    h = _Health(
        *torch.stack(
            [terms.loss, variances[0].min(), variances[1].min(), torch.stack(variances).max(), offset, equal]
        ).tolist()
    )
    if not (math.isfinite(h.loss) and (math.isfinite(h.most) or s.normalize == "none")):
        raise InvalidInput(_not_finite(z_a, z_b))
    found = {}
    n, least = len(z_a), min(h.variance_a, h.variance_b)
    if n == 2:
        found["two"] = "two rows cannot teach anything: every entry of C is then 1 or -1; use batches of hundreds."
    if z_a.shape[1] == 1:
        found["one"] = "embeddings of one column have no redundancy to reduce; widen the last layer."
    if s.lambd >= 1:
        found["lambda"] = f"with lambd={s.lambd:g} a constant column costs no more than a redundant one; use lambd < 1."
    if h.equal >= 0.05:
        found["equal"] = (
            f"{h.equal:.0%} of the rows are equal in both views, so that nothing is to be learned from them: look at "
            "the augmentation and its seeds (each view needs draws of its own)."
        )
    if s.normalize == "batch" and least == 0:
        found["constant"] = _columns(
            [v == 0 for v in variances], "constant: each costs 1 and is not learned from (dead embeddings)"
        )
    elif s.normalize == "batch" and least < 100 * s.eps:
        most = least / (least + s.eps)
        found["tiny"] = _columns(
            [v < 100 * s.eps for v in variances],
            f"so small (variance down to {least:.1e}) that eps={s.eps:g} holds the diagonal of C at {most:.3f} at "
            "most; scale the embeddings up, or take the last layer without normalization and decay",
        )
    if h.offset > 1e4:
        found["offset"] = (
            f"a column's mean is {h.offset:.0e} times its standard deviation, where {z_a.dtype} holds few digits of "
            "the differences between rows; center the inputs or the embeddings."
        )
    return found


def _columns(masks: list[Tensor], what: str) -> str:
    parts = []
    for name, mask in zip("ab", masks, strict=True):
        where = mask.nonzero().flatten().tolist()
        if where:
            shown = ", ".join(map(str, where[:_SHOWN])) + (", ..." if len(where) > _SHOWN else "")
            parts.append(f"{len(where)} of view {name} ({shown})")
    return f"columns of the embeddings are {what}: {' and '.join(parts)}."


def _not_finite(z_a: Tensor, z_b: Tensor) -> str:
    for name, z in (("a", z_a), ("b", z_b)):
        where = (~z.isfinite()).nonzero()
        if len(where):
            row, column = where[0].tolist()
            return (
                f"{len(where)} embeddings of view {name} are NaN or infinite, the first in row {row}, column {column}: "
                "take no step, and look at that sample and at the learning rate."
            )
    most = float(torch.stack([z_a.abs().max(), z_b.abs().max()]).max())
    return f"the loss is not finite, since embeddings of up to {most:.1e} overflow; scale them down."


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=3)
