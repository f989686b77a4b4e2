r"""Where a loss stands: between the level of random views and the floor that the batch allows; and what to do."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure.dimensionality import effective_rank

from .loss import BarlowTwinsLoss, barlow_twins_loss, standardize

__all__ = ["GaugeReading", "LossGauge", "lambda_like", "loss_floor", "start_level"]

_ROLLS = 20  # other pairings of the rows that a pairing is compared with


def loss_floor(n: int, d: int, lambd: float = 0.0051) -> float:
    r"""The smallest loss that N rows of D columns can have.

    C has rank N - 1 at most, since columns are centered; hence with :math:`A = \lambda (D / (N - 1) - 1)`

    .. math:: L \ge \frac{D A}{1 + A} \quad (N \le D), \qquad L \ge 0 \quad (N > D).

    It is attained. For :math:`\lambda \ge 1` constant columns are cheaper, and the floor is :math:`D - N + 1`.

    Parameters
    ----------
    n, d
        Rows and columns of the embeddings.
    lambd
        The weight of the redundancy term.

    Examples
    --------
    >>> [round(loss_floor(n, 8192)) for n in (64, 128, 256, 512, 1024)]
    [3251, 2004, 1122, 583, 283]
    """
    n, d = checks.integer("n", n, least=2), checks.integer("d", d, least=1)
    lambd = checks.real("lambd", lambd, least=0)
    if d <= n - 1:
        return 0.0
    a = min(lambd, 1.0) * (d / (n - 1) - 1)
    return d * a / (1 + a)


def start_level(n: int, d: int, lambd: float = 0.0051) -> float:
    r"""The loss that is expected of two views which have nothing in common, of independent columns.

    .. math:: D \left(1 + \frac{1}{N - 1}\right) + \lambda \frac{D (D - 1)}{N - 1}

    Parameters
    ----------
    n, d, lambd
        As for :func:`loss_floor`.

    Examples
    --------
    >>> round(start_level(64, 128)), round(start_level(256, 8192))
    (131, 9566)
    """
    n, d = checks.integer("n", n, least=2), checks.integer("d", d, least=1)
    lambd = checks.real("lambd", lambd, least=0)
    return d * (1 + 1 / (n - 1)) + lambd * d * (d - 1) / (n - 1)


def lambda_like(n: int, d: int, like: tuple[int, int] = (2048, 8192), lambd: float = 0.0051) -> float:
    r"""The weight that makes the floor the same share of D as another setting has: A is kept.

    .. math:: \lambda' = \lambda \, \frac{D / (N - 1) - 1}{D' / (N' - 1) - 1}

    Parameters
    ----------
    n, d
        Rows N' and columns D' of the new setting; D' >= N', where there is a floor at all.
    like
        N and D of the other one, by default the paper's.
    lambd
        Its weight.

    Examples
    --------
    >>> round(lambda_like(256, 8192), 6)
    0.000492
    """
    n, d = checks.integer("n", n, least=2), checks.integer("d", d, least=1)
    first, second = (checks.integer("like", v, least=2) for v in like)
    lambd = checks.real("lambd", lambd, least=0)
    if d < n or second < first:
        raise InvalidInput(f"the rule is about batches with N <= D, not N={n}, D={d} and N={first}, D={second}.")
    return lambd * (second / (first - 1) - 1) / (d / (n - 1) - 1)


@dataclass(frozen=True)
class GaugeReading:
    """What a :class:`LossGauge` saw in one batch.

    Parameters
    ----------
    step
        Number of the batch, from 1.
    n, d
        Rows and columns.
    loss, invariance, redundancy
        The loss and its two terms.
    floor, start
        :func:`loss_floor` and :func:`start_level` of this N, D and weight.
    efficiency
        Share of the way from ``start`` to ``floor``, in percent.
    diagonal
        Mean of C_ii; 1 for views that agree.
    off_diagonal
        Root mean square of C_ij; 0 for columns without redundancy.
    effective_rank
        Of view a's standardized embeddings, at most min(N - 1, D).
    pairing
        The mean of C_ii in standard deviations of what other pairings of the rows give.
    equal_rows
        Share of rows that are equal in both views.
    constant, tiny
        Columns without variance, and with a variance below 100 eps, in either view.
    advice
        What to look at, in sentences; empty if nothing.
    """

    step: int
    n: int
    d: int
    loss: float
    invariance: float
    redundancy: float
    floor: float
    start: float
    efficiency: float
    diagonal: float
    off_diagonal: float
    effective_rank: float
    pairing: float
    equal_rows: float
    constant: int
    tiny: int
    advice: tuple[str, ...] = ()

    def numbers(self) -> dict[str, float]:
        """The numbers by name, for a logger."""
        names = ("loss", "invariance", "redundancy", "floor", "start", "efficiency", "diagonal", "off_diagonal")
        return {name: float(getattr(self, name)) for name in (*names, "effective_rank", "pairing", "n")}

    def __str__(self) -> str:
        lines = [
            f"step {self.step}: loss {self.loss:.4g}, {self.efficiency:.0f} % of the way from {self.start:.4g} (random "
            f"views) to {self.floor:.4g} (floor of N={self.n}, D={self.d}); mean C_ii {self.diagonal:.3f}, rms C_ij "
            f"{self.off_diagonal:.3f}, effective rank {self.effective_rank:.1f}"
        ]
        return "\n".join([*lines, *(f"  - {text}" for text in self.advice)])


class LossGauge:
    """Reads the embeddings that a loss is given, and says where it stands and what to look at.

    Attached to a model it reads by itself; without one, call :meth:`update`.

    Parameters
    ----------
    model
        A module that holds a :class:`~mlcollage.papers.barlow_twins.loss.BarlowTwinsLoss`, or None.
    lambd, eps
        Of the loss; taken from the model's where there is one.
    every
        Read one of so many batches; the first three are always read.
    warn
        Whether new advice is given as a warning too.

    Attributes
    ----------
    last : GaugeReading or None
        The latest reading.
    history : list of GaugeReading
        All of them.

    Examples
    --------
    >>> draw = torch.Generator().manual_seed(0)
    >>> z = torch.randn(256, 32, generator=draw)
    >>> gauge = LossGauge(lambd=0.02)
    >>> print(gauge.update(z, z + torch.randn(256, 32, generator=draw)))
    step 1: loss 2.9..., 91 % of the way from 32.2 (random views) to 0 (floor of N=256, D=32); mean C_ii 0.7..., ...
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        lambd: float = 0.0051,
        eps: float = 1e-5,
        every: int = 50,
        warn: bool = True,
    ) -> None:
        self.lambd, self.eps = checks.real("lambd", lambd, least=0), checks.real("eps", eps, least=0)
        self.every, self.warn = checks.integer("every", every, least=1), warn
        self._correction = 0  # of the variance, as the loss has it
        self.history: list[GaugeReading] = []
        self._batches = 0
        self._unpaired = 0  # readings in a row in which the rows did not belong together
        self._largest = 0  # rows of the largest batch
        self._said: set[str] = set()
        self._handle: Any = None
        if model is not None:
            self.attach(model)

    @property
    def last(self) -> GaugeReading | None:
        """The latest reading."""
        return self.history[-1] if self.history else None

    def attach(self, model: nn.Module) -> LossGauge:
        """Read what the model's loss is given, from now on."""
        losses = [m for m in model.modules() if isinstance(m, BarlowTwinsLoss)]
        if len(losses) != 1:
            raise InvalidInput(f"the model holds {len(losses)} BarlowTwinsLoss modules; the gauge reads that of one.")
        settings = losses[0]._settings
        if settings.normalize != "batch" or settings.target != "identity":
            raise InvalidInput(
                "the gauge knows floor and start of losses with normalize='batch' and target='identity' only."
            )
        self.remove()
        self.lambd, self.eps, self._correction = settings.lambd, settings.eps, settings.correction

        def read(module: nn.Module, views: Any, output: Any) -> None:
            if module.training:
                self._read(*views)

        self._handle = losses[0].register_forward_hook(read)
        return self

    def remove(self) -> None:
        """Stop reading."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> LossGauge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _read(self, z_a: Tensor, z_b: Tensor) -> None:
        self._batches += 1
        if self._batches <= 3 or self._batches % self.every == 0 or len(z_a) < self._largest:
            self._measure(z_a, z_b, None)

    def update(self, z_a: Tensor, z_b: Tensor, loss: float | None = None) -> GaugeReading:
        """Read one batch of embeddings (N, D); ``loss`` is what the training minimized, if it is to be compared."""
        self._batches += 1
        return self._measure(z_a, z_b, loss)

    @torch.no_grad()
    def _measure(self, z_a: Tensor, z_b: Tensor, loss: float | None) -> GaugeReading:
        correction = self._correction
        terms = barlow_twins_loss(
            z_a, z_b, lambd=self.lambd, eps=self.eps, correction=correction, return_terms=True, check=False
        )
        z_a, z_b = z_a.detach(), z_b.detach()
        if z_a.dtype in (torch.float16, torch.bfloat16):
            z_a, z_b = z_a.float(), z_b.float()
        a, b = (standardize(z, eps=self.eps, correction=correction) for z in (z_a, z_b))
        n, d = a.shape
        across = a @ b.T / n  # (N, N): sums along its diagonals are traces of C for shifted pairings
        rows = torch.arange(n, device=a.device)
        pairings = torch.stack([across[rows, (rows + k) % n].sum() / d for k in range(min(_ROLLS, n - 1) + 1)])
        spread = pairings[1:].std() if len(pairings) > 2 else pairings.new_tensor(torch.inf)
        variances = torch.stack([(z - z[:1]).var(0, correction=0) for z in (z_a, z_b)]).amin(0)
        floor, start = loss_floor(n, d, self.lambd), start_level(n, d, self.lambd)
        total = float(terms.loss) if loss is None else float(loss)
        off = float(terms.redundancy) / self.lambd if self.lambd else float("nan")
        bare = GaugeReading(
            self._batches,
            n,
            d,
            total,
            float(terms.invariance),
            float(terms.redundancy),
            floor,
            start,
            100 * (start - total) / (start - floor),
            float(pairings[0]),
            off if math.isnan(off) else (max(off, 0.0) / max(d * (d - 1), 1)) ** 0.5,  # -1e-17 by the Gram form
            effective_rank(a) if bool(a.isfinite().all()) and bool((a != 0).any()) else 0.0,
            float((pairings[0] - pairings[1:].mean()) / spread.clamp(min=1e-12)),
            float((z_a == z_b).all(1).double().mean()),
            int((variances == 0).sum()),
            int(((variances > 0) & (variances < 100 * self.eps)).sum()),
        )
        found = self._advice(bare, float(terms.loss))
        reading = GaugeReading(**{**bare.__dict__, "advice": tuple(found.values())})
        self._largest = max(self._largest, n)
        self.history.append(reading)
        for kind, text in found.items():
            if self.warn and kind not in self._said:
                warnings.warn(text, stacklevel=3)
            self._said.add(kind)
        return reading

    def _advice(self, r: GaugeReading, computed: float) -> dict[str, str]:
        """Sentences by kind."""
        found = {}
        self._unpaired = self._unpaired + 1 if r.pairing < 3 and r.n > 3 else 0
        # From the first reading on: later, a collapse looks like this too.
        if 3 <= self._unpaired == len(self.history) + 1:
            found["pairing"] = (
                f"the two views do not belong together: in {self._unpaired} batches the rows agree no more than in "
                "other orders; row n of both must be views of one sample (not interleaved, not shuffled apart)."
            )
        if r.equal_rows >= 0.05:
            found["equal"] = (
                f"{r.equal_rows:.0%} of the rows are equal in both views: look at the augmentation and at its seeds."
            )
        elif r.step == 1 and r.diagonal > 0.98 and not r.constant:
            found["easy"] = (
                f"the views agree from the first batch on (mean C_ii {r.diagonal:.3f}): the augmentation "
                "changes little."
            )
        if r.n < self._largest:
            usual = loss_floor(self._largest, r.d, self.lambd), start_level(self._largest, r.d, self.lambd)
            found["short"] = (
                f"a batch has {r.n} rows, others {self._largest}: the floor moves from {usual[0]:.4g} to {r.floor:.4g}"
                f", the level of random views from {usual[1]:.4g} to {r.start:.4g}; use drop_last=True."
            )
        if r.constant:
            found["constant"] = f"{r.constant} columns are constant: each costs 1 and has no gradient."
        if r.tiny:
            found["tiny"] = f"{r.tiny} columns have variances below 100 eps, so that C_ii cannot come near 1."
        if abs(r.loss - computed) > 1e-3 * max(1.0, abs(computed)):
            found["other"] = (
                f"the loss that is minimized is {r.loss:.4g}, while these embeddings have {computed:.4g}: another "
                "batch size as divisor, another weight or normalization, or values changed in place."
            )
        if r.loss < r.floor * (1 - 1e-3):
            found["floor"] = f"the loss {r.loss:.4g} is below the floor {r.floor:.4g}, which points to a mistake in it."
        elif r.efficiency > 95 and r.floor > 0.05 * r.start:
            found["batch"] = (
                f"the loss is at the floor that N={r.n} rows allow; more rows or fewer columns lower it, or a smaller "
                "weight (lambda_like)."
            )
        if r.step > 3 and r.effective_rank < 0.05 * min(r.n - 1, r.d) and r.d >= 16:
            found["collapse"] = (
                f"embeddings fill {r.effective_rank:.1f} of {min(r.n - 1, r.d)} dimensions: raise lambd, or look for a "
                "layer without normalization."
            )
        return found
