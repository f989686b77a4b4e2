"""Recurrent networks whose truncated gradient is completed by a synthetic one at the edge of each chunk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .context import Divisor, LossFn, divisor_of, unlabelled
from .learning import Said, learn, say, squared_error
from .synthesizer import SyntheticGradient

_CARRIED = ("carried", "context", "fresh", "streams")  # from chunk to chunk


class DNIRecurrent(nn.Module):
    r"""An RNN, GRU or LSTM with a head, trained chunk by chunk with a model of the gradient from the future.

    A chunk of T steps has the gradient

    .. math::
        \sum_t \frac{\partial L_t}{\partial \theta} + s\, M(h_T)^\top \frac{\partial h_T}{\partial \theta},

    and the next one gives M its target, :math:`\partial (\sum_t L_t) / \partial h_0 + s\, M(h_T)^\top \partial h_T /
    \partial h_0`: bootstrapped, so that credit can travel further than any chunk. The state of an LSTM is (h, c), and
    of stacked layers all of them; M reads and gives them side by side.

    Parameters
    ----------
    rnn
        ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, one-directional, also with several layers or projections; ``batch_first``
        is read from it.
    head
        From outputs (..., H) to what the loss takes.
    synthesizer
        From states (B, S) and a context (B, C) to gradients (B, S); default a linear one without context.
    truncate
        T.
    hidden, context_dim
        Of the default synthesizer.
    scale
        s. Jaderberg et al. scale the injected gradient; 1 is the plain rule, which can become unstable.
    clip
        Largest Euclidean norm of one sample's injected gradient.
    aux
        Also train the core to foresee, from the first output of a chunk, the synthetic gradient at its end.
    divisor
        What the loss divides by, where it cannot be read.
    target_scale
        ``"sample"`` or ``"batch"``, as for :class:`~mlcollage.papers.synthetic_gradients.Decoupled`.

    Attributes
    ----------
    counts : dict of str to int
        Injections, and rows that got none by reason.

    Raises
    ------
    InvalidInput
        For bidirectional networks, whose reverse half has no future at the right edge, and T below 1.

    Notes
    -----
    Jaderberg et al., section 2.2; with ``scale=0`` this is truncated backpropagation. ``state_dict()`` holds the
    carried state too, so a training that is saved between two chunks goes on to the same numbers.

    Examples
    --------
    >>> net = DNIRecurrent(nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2), truncate=4)
    >>> optimizer = torch.optim.Adam(net.parameters())
    >>> x, y = torch.randn(5, 12, 3), torch.zeros(5, 12, dtype=torch.long)
    >>> for loss in net.chunks(x, y, nn.CrossEntropyLoss()):  # three chunks, two injections
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> net.counts["injections"]
    2
    """

    def __init__(
        self,
        rnn: nn.RNNBase,
        head: nn.Module,
        synthesizer: nn.Module | None = None,
        *,
        truncate: int,
        hidden: Sequence[int] = (),
        context_dim: int = 0,
        scale: float = 0.1,
        clip: float | None = None,
        aux: bool = False,
        divisor: Divisor = None,
        target_scale: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__()
        if not isinstance(rnn, nn.RNN | nn.GRU | nn.LSTM):
            raise InvalidInput(f"rnn must be an nn.RNN, nn.GRU or nn.LSTM, not {type(rnn).__name__}.")
        if rnn.bidirectional:
            raise InvalidInput(
                "a bidirectional network cannot be cut in time: its reverse half has no future at the right edge. Use "
                "a one-directional one."
            )
        self.rnn, self.head = rnn, head
        self.truncate = checks.integer("truncate", truncate, least=1)
        self.scale = checks.real("scale", scale, least=0)
        self.clip = None if clip is None else checks.positive("clip", clip)
        self.divisor, self.target_scale = divisor, checks.choice("target_scale", target_scale, ("sample", "batch"))
        out = rnn.proj_size or rnn.hidden_size
        # Of each part of the state by its own width: a projection makes h narrower than c.
        self.widths = [rnn.num_layers * w for w in ([out, rnn.hidden_size] if isinstance(rnn, nn.LSTM) else [out])]
        size = sum(self.widths)
        self.synthesizer = synthesizer or SyntheticGradient(size, context_dim, hidden)
        self.aux = nn.Linear(out, size) if aux else None
        self.counts = {"injections": 0, "ended": 0, "reset": 0, "aux": 0}
        self.last_loss: dict[str, float] = {}
        self.reset()

    # State -----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the carried state: at the end of an epoch, and before other streams."""
        self._carried: Tensor | None = None  # (B, S)
        self._context: Tensor | None = None
        self._fresh: Tensor | None = None  # (B,), true where the state was just reset: its past is of no concern
        self._streams: Tensor | None = None

    def get_extra_state(self) -> dict[str, Any]:
        """What is carried from chunk to chunk, and the settings that a saved state must fit."""
        carried = {name: getattr(self, f"_{name}") for name in _CARRIED}
        return {"truncate": self.truncate, "scale": self.scale, "carried": carried, "counts": dict(self.counts)}

    def set_extra_state(self, state: Any) -> None:
        """Take over what is carried, so that a resumed training goes on in the middle of its streams.

        Raises
        ------
        InvalidInput
            For a state of another ``truncate`` or ``scale``.
        """
        for name in ("truncate", "scale"):
            if state[name] != getattr(self, name):
                raise InvalidInput(f"the saved state has {name}={state[name]}, this network {getattr(self, name)}.")
        device = next(self.rnn.parameters()).device
        for name in _CARRIED:
            value = state["carried"][name]
            setattr(self, f"_{name}", None if value is None else value.to(device))
        self.counts = dict(state["counts"])

    def flat(self, state: Any) -> Tensor:
        """The state as (B, S): all layers of h, then of c."""
        parts = state if isinstance(state, tuple) else (state,)
        return torch.cat([s.transpose(0, 1).flatten(1) for s in parts], 1)

    def unflat(self, flat: Tensor) -> Any:
        """The state as the network takes it, (layers, B, H) each, of (B, S)."""
        parts = [
            p.reshape(len(flat), self.rnn.num_layers, -1).transpose(0, 1).contiguous()
            for p in flat.split(self.widths, 1)
        ]
        return tuple(parts) if isinstance(self.rnn, nn.LSTM) else parts[0]

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        """The network on whole sequences, without cuts."""
        return self.head(self.rnn(x, state)[0])

    # Training --------------------------------------------------------------------------------------------------

    def chunks(
        self,
        x: Tensor,
        y: Tensor,
        loss_fn: LossFn,
        *,
        lengths: Tensor | None = None,
        context: Tensor | None = None,
        goes_on: bool = False,
        streams: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Losses of the chunks of whole sequences; the gradients of each are there when it is yielded.

        Parameters
        ----------
        x
            (B, L, d), or (L, B, d) without ``batch_first``.
        y
            Targets (B, L, ...) or (L, B, ...).
        loss_fn
            From outputs (n, C) and targets (n, ...) of all positions that count to one number.
        lengths
            (B,), where sequences are padded.
        context
            (B, C), for the synthesizer.
        goes_on
            Whether the next call continues these sequences, as a stateful loader has it. Otherwise the state is reset
            before and after, and the last chunk gets no synthetic gradient.
        streams
            As for :meth:`chunk`.

        Raises
        ------
        InvalidInput
            For packed sequences, targets or lengths that do not fit, a carried state of other rows or streams, and
            losses or gradients that are not finite.
        """
        time = 1 if self.rnn.batch_first else 0
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise InvalidInput(
                "sequences must be one tensor of three axes; of packed ones give the padded tensor and lengths."
            )
        total, rows = x.shape[time], x.shape[1 - time]
        if y.shape[:2] != x.shape[:2]:
            raise InvalidInput(f"targets {tuple(y.shape)} do not belong to sequences {tuple(x.shape)}, step by step.")
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
            if lengths.shape != (rows,) or bool((lengths < 0).any() | (lengths > total).any()):
                raise InvalidInput(f"lengths must be {rows} numbers from 0 to {total}, not {lengths.tolist()}.")
        if self.truncate >= total and not goes_on:
            warnings.warn(f"truncate={self.truncate} is not below the length {total}: this is plain backpropagation.")
        if not goes_on:
            self.reset()
        for start in range(0, total, self.truncate):
            stop = min(start + self.truncate, total)
            part = [t.narrow(time, start, stop - start) for t in (x, y)]
            left = None if lengths is None else (lengths - start).clamp(min=0)
            last = stop == total and not goes_on
            yield self.chunk(part[0], part[1], loss_fn, left=left, context=context, last=last, streams=streams)
        if not goes_on:
            self.reset()

    def chunk(
        self,
        x: Tensor,
        y: Tensor,
        loss_fn: LossFn,
        *,
        left: Tensor | None = None,
        ends: Tensor | None = None,
        context: Tensor | None = None,
        last: bool = False,
        streams: Tensor | None = None,
    ) -> Tensor:
        """One chunk from the carried state: fills the gradients of network, head and synthesizer; returns the loss.

        Parameters
        ----------
        x, y, loss_fn
            As for :meth:`chunks`.
        left
            (B,), how many steps each row has left, this chunk's included.
        ends
            (B,), true for rows whose document ends with this chunk: no gradient comes from beyond, the target is zero,
            and the state is reset.
        context
            (B, C).
        last
            Whether all rows end here.
        streams
            (B,), numbers of the sequences that the rows are from. Rows that do not continue the chunk before are
            refused; without it, a shuffled loader would pair one stream's state with another's future unnoticed.
        """
        first = self.rnn.batch_first
        batch, steps = (x.shape[0], x.shape[1]) if first else (x.shape[1], x.shape[0])
        if self._carried is not None and len(self._carried) != batch:
            raise InvalidInput(
                f"the carried state is for {len(self._carried)} rows, but the batch has {batch}: drop the last batch, "
                "or call reset() where the streams change."
            )
        if self._streams is not None and streams is not None and not torch.equal(self._streams, streams):
            raise InvalidInput(
                "the rows are of other streams than the carried state: use a loader that keeps each stream in its row, "
                "or call reset() where the streams change."
            )
        self._streams = streams
        h0 = x.new_zeros(batch, sum(self.widths)) if self._carried is None else self._carried
        h0 = h0.detach().requires_grad_(True)
        out, state = self.rnn(x, self.unflat(h0))
        h_end = self.flat(state)  # (B, S)
        valid = torch.ones(batch, steps, dtype=torch.bool, device=x.device)
        alive = torch.full((batch,), not last, device=x.device)
        if left is not None:
            valid = torch.arange(steps, device=x.device) < left.to(x.device)[:, None]
            alive &= left.to(x.device) > steps
        closing = valid[:, -1] & ~alive  # rows whose last step is the chunk's last one
        if ends is not None:
            closing |= ends.bool() & valid[:, -1]
            alive &= ~ends.bool()
        pick = valid if first else valid.T
        result, targets = self.head(out)[pick], y[pick]  # (n, C)
        if not len(targets):
            self._carry(h_end, alive, context)
            return x.new_zeros(())
        empty = unlabelled(loss_fn, targets)  # a mean of nothing is NaN: only the future has something to say
        loss = result.sum() * 0.0 if empty else loss_fn(result, targets)
        stated = float(batch) if empty and self.divisor is None else self.divisor
        divisor = divisor_of(loss_fn, targets, stated) if self.target_scale == "sample" else 1.0
        if not bool(loss.isfinite()):
            raise InvalidInput(f"the loss of a chunk is {float(loss)}, so nothing was updated.")
        # Read again: its weights may have moved since the last chunk ended.
        before = None if self._carried is None else say(self.synthesizer, h0.detach(), self._context)
        said = say(self.synthesizer, h_end.detach(), context)
        ahead = said.value
        self._same(ahead, h_end)
        sent = ahead * self.scale
        if self.clip is not None:
            sent = sent * (self.clip / sent.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        sent = sent.masked_fill(~alive[:, None], 0.0) / divisor
        if not bool(sent.isfinite().all()):
            raise InvalidInput(
                "the synthetic gradient of a chunk is not finite; lower scale, set clip, or slow it down."
            )
        roots, grads = [loss], [torch.ones_like(loss)]
        if self.aux is not None:
            start = out[:, 0] if first else out[0]
            foreseen = squared_error(self.aux(start), ahead, alive) / divisor
            self.last_loss["aux"] = float(foreseen.detach())
            self.counts["aux"] += 1
            roots, grads = [*roots, foreseen], [*grads, torch.ones_like(foreseen)]
        if bool(alive.any()) and self.scale:
            roots, grads = [*roots, h_end], [*grads, sent]
            self.counts["injections"] += 1
        self.counts["ended"] += int((~alive).sum())
        torch.autograd.backward(roots, grads)
        self._learn(before, said, h0, closing, divisor)
        self._carry(h_end, alive, context)
        return loss.detach()

    def _learn(self, before: Said | None, ahead: Said, h0: Tensor, closing: Tensor, divisor: float) -> None:
        """The synthesizer's gradients: at the left edge towards what arrived, at rows that ended towards zero."""
        if before is None or h0.grad is None:
            return
        rows = None if self._fresh is None or not bool(self._fresh.any()) else ~self._fresh
        error = learn(before, h0.grad, rows, factor=divisor)
        if bool(closing.any()):
            share = float(closing.double().mean())
            error = error + share * learn(ahead, torch.zeros_like(ahead.value), closing, scale=share)
        self.last_loss["synthesizer"] = float(error)

    def _carry(self, h_end: Tensor, alive: Tensor, context: Tensor | None) -> None:
        self._carried = h_end.detach().masked_fill(~alive[:, None], 0.0)
        self._fresh, self._context = ~alive, context
        self.counts["reset"] += int((~alive).sum())

    @staticmethod
    def _same(ahead: Tensor, state: Tensor) -> None:
        if ahead.shape != state.shape:
            raise InvalidInput(f"the synthesizer gave {tuple(ahead.shape)} for states of {tuple(state.shape)}.")
