r"""Tr(F) along a training run: its early value, its peak, and an alarm when it explodes.

Jastrzębski et al., "Catastrophic Fisher Explosion", ICML 2021, compares trainings by the trace where the training loss
first falls below a fixed value (:math:`\mathrm{TrF}_i`), not at a fixed step, so that learning rates compare fairly.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import derive
from mlcollage.data.batches import DataBatch, Parts, batches_of, read_batch
from mlcollage.data.row_hashes import row_hashes
from mlcollage.errors import InvalidInput
from mlcollage.measure import TraceResult, fisher_trace
from mlcollage.measure.grad_norms import call
from mlcollage.nn import logits_of, unwrap
from mlcollage.train import evaluating


class ExplosionWarning(UserWarning):
    """Tr(F) has grown far beyond where it began."""


@dataclass(frozen=True)
class Alarm:
    """An explosion of Tr(F).

    Parameters
    ----------
    step
        Where it was found.
    trace, baseline
        Tr(F) there and at the tracker's first measurement.
    layers
        Share of the growth by layer, the largest first; the shares sum to 1.
    """

    step: int
    trace: float
    baseline: float
    layers: pd.Series

    def __str__(self) -> str:
        most = ", ".join(f"{name or 'the model'} {share:.0%}" for name, share in self.layers.head(3).items())
        return (
            f"Tr(F) is {self.trace:.3g} at step {self.step}, {self.trace / self.baseline:.1f} times its first value "
            f"{self.baseline:.3g}; the growth is in: {most}. A larger learning rate or FisherPenalty keeps it down."
        )


class FisherTraceTracker:
    r"""Measures Tr(F) every few steps of a training loop of yours.

    Parameters
    ----------
    data
        Inputs (n, ...), a pair (x, y), or a dict of named parts (``labels`` among them, or not): some hundred training
        samples, or held-out ones. With labels, the loss and accuracy on them are measured as well.
    every
        Steps between measurements (default 50); the first call is always measured.
    method
        ``"mc"`` (default: one drawn label per sample, about one backward pass), ``"exact"`` or ``"minibatch"``.
    draws
        Draws of all labels.
    per_layer
        Keep the parts of the layers (default True); the alarm names them.
    early
        Last step of the early window, in which the peak is looked for; None (default) for no end.
    loss_threshold
        :math:`\epsilon`: :math:`\mathrm{TrF}_i` is measured when the training loss first falls to it; half of the loss
        at chance is a good choice. None (default) leaves it out.
    smoothing
        Weight of the past in the running mean of the losses given to :meth:`update`, 0 to 1; default 0.9. Losses
        measured on ``data`` are taken as they are.
    alarm_factor
        Sound the alarm when the trace exceeds so many times its first value (default 10); None never does.
    on_alarm
        Called once with the :class:`Alarm`; default warns with :class:`ExplosionWarning`.
    batch_size
        Samples at a time.
    likelihood
        As in :func:`mlcollage.measure.fisher.fisher_trace`.
    forward
        How the network is called, ``forward(model, x)``; default ``model(x)``, or ``model(**x)`` for named inputs. Only
        for the loss on ``data``.
    parts
        What the parts of ``data`` are, where there are more than inputs and labels, as for
        :func:`~mlcollage.data.batches.read_batch`. Positions that a mask leaves out, such as padding, have no label.
    seed
        Labels at step t are drawn from a stream of (seed, t): a resumed run draws the same.

    Raises
    ------
    InvalidInput
        For settings that cannot be used, and data that are no tensors.

    Notes
    -----
    The network is measured in evaluation mode (batch norm at its running statistics: in training mode a single sample
    has no gradient of its own), and put back. Gradients, weights and random states are left alone.

    Examples
    --------
    >>> from mlcollage.nn.init import build
    >>> from mlcollage.train.loop import epochs, steps
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(128, 4, generator=g)
    >>> y = (x[:, 0] > 0).long()
    >>> model = build(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), seed=0)
    >>> tracker = FisherTraceTracker((x, y), every=10, loss_threshold=0.4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> for step in steps(model, epochs(x, y, 32, generator=0), optimizer, max_steps=40):
    ...     _ = tracker.update(model, step.number, loss=step.loss)
    >>> tracker.step_at_threshold, tracker.history["step"].tolist()
    (14, [1, 10, 14, 20, 30, 40])
    >>> tracker.peak["trace"] >= tracker.trace_at_threshold
    True
    """

    def __init__(
        self,
        data: Tensor | tuple[Tensor, Tensor] | Mapping[str, Tensor],
        *,
        every: int = 50,
        method: Literal["mc", "exact", "minibatch"] = "mc",
        draws: int = 1,
        per_layer: bool = True,
        early: int | None = None,
        loss_threshold: float | None = None,
        smoothing: float = 0.9,
        alarm_factor: float | None = 10.0,
        on_alarm: Callable[[Alarm], Any] | None = None,
        batch_size: int = 256,
        likelihood: str = "categorical",
        forward: Callable[[nn.Module, Any], Any] | None = None,
        parts: Parts = None,
        seed: int = 0,
    ) -> None:
        self.data = _split(data, parts)
        self.every = checks.integer("every", every, least=1)
        self.draws = checks.integer("draws", draws, least=1)
        self.batch_size = checks.integer("batch_size", batch_size, least=1)
        self.smoothing = checks.real("smoothing", smoothing, least=0, below=1)
        self.alarm_factor = None if alarm_factor is None else checks.real("alarm_factor", alarm_factor, above=1)
        self.method = checks.choice("method", method, ("mc", "exact", "minibatch"))
        self.per_layer, self.early, self.loss_threshold, self.on_alarm = per_layer, early, loss_threshold, on_alarm
        self.likelihood, self.seed = likelihood, seed
        self.forward = forward or call
        self._alarm_row: int | None = None  # the measurement at which the alarm sounded
        self._rows: list[dict[str, float]] = []
        self._layers: list[dict[str, Any]] = []
        self._mean_loss, self._weight = 0.0, 0.0
        self._crossed: dict[str, float] | None = None
        # names and shapes of the parameters measured last, and of those that a loaded history is of
        self._network: list[str] | None = None
        self._expected: list[str] | None = None

    def update(
        self, model: nn.Module, step: int, *, loss: Tensor | float | None = None, force: bool = False
    ) -> TraceResult | None:
        """Measure if it is time; call it after every update.

        Parameters
        ----------
        model
            Your network, also wrapped or compiled.
        step
            Updates made so far.
        loss
            The training loss of this step; a running mean of it decides when the threshold is crossed. Without it, and
            with labels in ``data``, the loss on these does, at measured steps.
        force
            Measure in any case.

        Returns
        -------
        TraceResult or None
            What was measured.
        """
        crossing = self._cross(loss) if loss is not None else False
        # The first call is measured too: growth is told from there.
        if not (force or crossing or not self._rows or step % self.every == 0):
            return None
        if self._rows and self._rows[-1]["step"] == step:  # gradients are accumulated: the step was measured already
            return None
        result = self._measure(model, step)
        row = self._rows[-1]
        # Without a training loss the one on the data says when the threshold is crossed.
        if loss is None and self._crossed is None and self.loss_threshold is not None:
            crossing = row.get("loss", math.inf) <= self.loss_threshold
        if crossing and self._crossed is None:
            self._crossed = dict(row)
        self._watch()
        return result

    @property
    def history(self) -> pd.DataFrame:
        """One row per measurement: ``step, trace, stderr`` and, with labels, ``loss, accuracy``."""
        return pd.DataFrame(self._rows, columns=None if self._rows else ["step", "trace", "stderr"])

    @property
    def layers(self) -> pd.DataFrame:
        """Parts of the layers: index step, one column per layer."""
        table = pd.DataFrame(self._layers)
        return table.set_index("step") if len(table) else table

    @property
    def peak(self) -> dict[str, float]:
        """Step and trace of the largest value in the early window."""
        rows = self.history
        rows = rows if self.early is None else rows[rows["step"] <= self.early]
        if rows.empty or not rows["trace"].notna().any():
            raise InvalidInput("nothing was measured in the early window yet; call update(model, step) while training.")
        best = rows.iloc[int(rows["trace"].argmax())]
        return {"step": float(best["step"]), "trace": float(best["trace"])}

    @property
    def trace_at_threshold(self) -> float | None:
        r""":math:`\mathrm{TrF}_i`, the trace where the training loss first fell to the threshold; None before."""
        return None if self._crossed is None else self._crossed["trace"]

    @property
    def step_at_threshold(self) -> int | None:
        """Where that was."""
        return None if self._crossed is None else int(self._crossed["step"])

    @property
    def alarm(self) -> Alarm | None:
        """The explosion, if one was found."""
        if self._alarm_row is None:
            return None
        shares = pd.Series({"": 1.0})
        if self._layers:
            growth = self.layers.iloc[self._alarm_row] - self.layers.iloc[0]  # (layers,)
            shares = (growth / growth.sum()).sort_values(ascending=False)
        row = self._rows[self._alarm_row]
        return Alarm(int(row["step"]), row["trace"], self._rows[0]["trace"], shares)

    def state_dict(self) -> dict[str, Any]:
        """Everything measured so far, as plain values."""
        return {
            "rows": [dict(r) for r in self._rows],
            "layers": [dict(r) for r in self._layers],
            "loss": [self._mean_loss, self._weight],
            "crossed": None if self._crossed is None else dict(self._crossed),
            "alarm": self._alarm_row,
            "data": self._measured_on,
            "network": None if self._network is None else list(self._network),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; an alarm that has sounded does not sound again.

        Raises
        ------
        InvalidInput
            If the state was measured on other data; the next :meth:`update` raises it for a network whose parameters
            have other names or shapes.

        Warns
        -----
        UserWarning
            If the state is of before data and network were kept, so that neither can be compared.
        """
        if "data" not in state:
            warnings.warn(
                "the state does not say on which data and network it was measured: make sure that both are the same.",
                UserWarning,
                stacklevel=2,
            )
        elif state["data"] != self._measured_on:
            raise InvalidInput(
                f"the state was measured on other data ({state['data']}) than this tracker's ({self._measured_on}): "
                "make the tracker with the same samples in the same order, or begin a new history."
            )
        self._network = self._expected = state.get("network")
        self._rows, self._layers = [dict(r) for r in state["rows"]], [dict(r) for r in state["layers"]]
        self._mean_loss, self._weight = (float(v) for v in state["loss"])
        self._crossed, self._alarm_row = state["crossed"], state["alarm"]

    @cached_property
    def _measured_on(self) -> str:
        """Number of samples, and a word that changes with their content, order and names."""
        digest = hashlib.sha256()
        inputs = [*enumerate(self.data.args), *sorted(self.data.kwargs.items())]
        for name, part in [*inputs, ("labels", self.data.y), ("mask", self.data.mask)]:
            if part is not None:
                digest.update(f"{name} {tuple(part.shape)};".encode() + row_hashes(part).cpu().numpy().tobytes())
        return f"{len(inputs[0][1])} samples, {digest.hexdigest()[:16]}"

    def _check_network(self, model: nn.Module) -> None:
        """Refuse another network than that of a loaded history, at the first measurement after loading."""
        here = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters()]
        if self._expected is not None and here != self._expected:
            other = [p for p in self._expected if p not in here] or [p for p in here if p not in self._expected]
            raise InvalidInput(
                f"the loaded history is of a network with other parameters ({', '.join(other[:3]) or 'in this order'} "
                "differ): go on with the one that it was measured on, or begin a new history."
            )
        self._network, self._expected = here, None

    def _cross(self, loss: Tensor | float) -> bool:
        value = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        # A running mean from zero, divided by the sum of its weights: unbiased from the first step on.
        self._mean_loss = self.smoothing * self._mean_loss + (1 - self.smoothing) * value
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        if self.loss_threshold is None or self._crossed is not None:
            return False
        return self._mean_loss / self._weight <= self.loss_threshold

    def _measure(self, model: nn.Module, step: int) -> TraceResult:
        inner = unwrap(model)
        self._check_network(inner)
        device = next(inner.parameters()).device
        with evaluating(inner):  # batch norm at its running statistics: else single samples have no gradients
            result = fisher_trace(
                inner,
                self.data,
                method=self.method,
                draws=self.draws,
                per_layer=self.per_layer,
                likelihood=self.likelihood,
                generator=None if self.method == "exact" else derive(self.seed, step),
                batch_size=self.batch_size,
            )
            row = {"step": step, "trace": result.value, "stderr": result.stderr}
            if self.data.y is not None:
                row |= self._loss_and_accuracy(inner, device)
        self._rows.append(row)
        if result.per_layer is not None:
            self._layers.append({"step": step, **result.per_layer})
        return result

    @torch.no_grad()
    def _loss_and_accuracy(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        batches = [b.to(device).check(model) for b in batches_of(self.data, batch_size=self.batch_size)]
        logits = torch.cat([logits_of(self.forward(model, b.x)) for b in batches]).float()
        y = torch.cat([b.y for b in batches])
        counted = y != -100  # (n,), or (n, T) of tokens, which have logits (n, T, C)
        logits, y = logits[counted], y[counted]
        return {"loss": float(F.cross_entropy(logits, y)), "accuracy": float((logits.argmax(1) == y).double().mean())}

    def _watch(self) -> None:
        first, last = self._rows[0]["trace"], self._rows[-1]["trace"]
        if self.alarm_factor is None or self._alarm_row is not None or not last > self.alarm_factor * first:
            return
        self._alarm_row = len(self._rows) - 1
        assert self.alarm is not None
        if self.on_alarm is None:
            warnings.warn(str(self.alarm), ExplosionWarning, stacklevel=3)
        else:
            self.on_alarm(self.alarm)


def _split(data: Any, parts: Parts) -> DataBatch:
    batch = read_batch(data, parts, targets=False)
    inputs = [*batch.args, *batch.kwargs.values()]
    good = bool(inputs) and all(isinstance(v, Tensor) and v.ndim and len(v) == len(inputs[0]) for v in inputs)
    if not good or not len(inputs[0]) or not (batch.y is None or len(batch.y) == len(inputs[0])):
        raise InvalidInput(
            "data must be a tensor of inputs (n, ...), a pair of inputs and labels of the same length, or a dict of "
            "named tensors; take some hundred samples, as in next(iter(loader))."
        )
    return batch
