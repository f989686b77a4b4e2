"""One stage of a pipeline in a process of its own, which updates without waiting for the stages above."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .chain import LocalUpdate, local_update
from .context import Context, Divisor, LossFn, divisor_of
from .synthesizer import learn
from .timeline import BLOCKED, COMPUTE, StageLog
from .transport import Message, Receiver, Sender, why_lost

UP, DOWN = 1, 2  # tags of activations and of gradients


@dataclass
class StageParts:
    """What one stage computes with.

    Parameters
    ----------
    block
        From what the stage below sends (or the input) to what this one sends (or the output).
    optimizer
        Over the block's parameters; None for a block without any.
    synthesizer, synthesizer_optimizer
        The model of the gradient at the block's output; None for the last stage.
    """

    block: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    synthesizer: nn.Module | None = None
    synthesizer_optimizer: torch.optim.Optimizer | None = None


class AsyncStage:
    """A stage that runs forward, updates along its synthetic gradient and goes on.

    Activations and labels go up, gradients come down, each with its step. A gradient belongs to an old activation: the
    pair is kept until it arrives, at most ``max_staleness`` steps, and the synthesizer then learns from it.

    Parameters
    ----------
    rank, stages
        Place in the chain, and its length; the ranks of a ``torch.distributed`` group that exists already.
    parts
        Block, synthesizer and optimizers.
    loss_fn
        Of the last stage; the others read its divisor.
    context
        What synthesizers are given of the labels.
    divisor
        Where the loss's own cannot be read.
    max_staleness
        How many steps the stage may be ahead of the gradients that come down to it.
    wait
        At the bound, wait. False: go on, and drop the oldest pairs, which are counted.

    Examples
    --------
    In a script that ``torchrun`` starts three times::

        dist.init_process_group("gloo")
        stage = AsyncStage(dist.get_rank(), 3, parts, nn.CrossEntropyLoss(), context=Context("labels", 10))
        log = stage.run(loader)  # the first stage reads the loader
    """

    def __init__(
        self,
        rank: int,
        stages: int,
        parts: StageParts,
        loss_fn: LossFn,
        *,
        context: Context | None = None,
        divisor: Divisor = None,
        max_staleness: int = 4,
        wait: bool = True,
    ) -> None:
        self.rank, self.stages = checks.integer("rank", rank, least=0), checks.integer("stages", stages, least=2)
        if dist.is_initialized() and dist.get_world_size() != stages:
            raise InvalidInput(f"{stages} stages need as many processes, but the group has {dist.get_world_size()}.")
        self.last = rank == stages - 1
        if self.last == (parts.synthesizer is not None):
            raise InvalidInput(
                f"stage {rank} of {stages} needs {'no synthesizer: it has the loss' if self.last else 'a synthesizer'}."
            )
        self.parts, self.loss_fn, self.divisor = parts, loss_fn, divisor
        self.context = context or Context("none")
        self.max_staleness = checks.integer("max_staleness", max_staleness, least=0)
        self.wait = wait
        self.log = StageLog(rank)
        self._spans: list[tuple[int, float, float, int]] = []
        self._losses: list[float] = []
        self._stale: list[int] = []
        self._waiting: deque[tuple[int, Tensor, Any, float]] = deque()  # steps whose gradient has not come yet
        self._upper_lost = ""

    def run(self, batches: Iterable[tuple[Tensor, Tensor]] | None = None) -> StageLog:
        """Train until the batches end, or a neighbor is gone and the bound is reached.

        Parameters
        ----------
        batches
            Pairs of inputs and targets; read by the first stage only.
        """
        if self.rank == 0 and batches is None:
            raise InvalidInput("the first stage needs the batches.")
        room = max(1, self.max_staleness)
        below = Receiver(self.rank - 1, UP, room) if self.rank else None
        above = None if self.last else Receiver(self.rank + 1, DOWN, room)
        up = None if self.last else Sender(self.rank + 1, UP, room)
        down = Sender(self.rank - 1, DOWN, room) if self.rank else None
        source = iter(batches) if batches is not None and self.rank == 0 else None
        step = 0
        while True:
            message = self._next(below, source, step)
            if message.over:
                self.log.stopped = f"stage {self.rank - 1} is gone: {message.lost}" if message.lost else ""
                break
            start = time.perf_counter()
            x, y = message.tensors
            grad, out = self._compute(message.step, x, y)
            self._spans.append((COMPUTE, start, time.perf_counter(), message.step))
            self.log.steps += 1
            down = self._pass_on(down, message.step, None if grad is None else (grad,))
            if up is not None and out is not None and not self._upper_lost:
                up = self._pass_on(up, message.step, (out, y), upward=True)
            if above is not None and not self._collect(above, step):
                self.log.stopped = f"stage {self.rank + 1} is gone: {self._upper_lost}"
                break
            step += 1
        self._finish(up, down, above, step)
        self.log.spans = np.array(self._spans, dtype=np.float64).reshape(-1, 4)
        self.log.losses, self.log.staleness = np.array(self._losses), np.array(self._stale, dtype=np.int64)
        return self.log

    def _next(self, below: Receiver | None, source: Any, step: int) -> Message:
        start = time.perf_counter()
        if below is not None:
            message = below.get()
            assert message is not None
        else:
            batch = next(source, None)
            message = Message(-1, ()) if batch is None else Message(step, (batch[0], batch[1]))
        self._spans.append((BLOCKED, start, time.perf_counter(), step))
        return message

    def _compute(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The stage's own step: the gradient for below, and the activation for above."""
        parts = self.parts
        for optimizer in (parts.optimizer, parts.synthesizer_optimizer):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
        if self.last:
            leaf = x.detach().requires_grad_(x.is_floating_point())
            loss = self.loss_fn(parts.block(leaf.clone() if leaf.requires_grad else leaf), y)
            if not bool(loss.isfinite()):
                raise InvalidInput(f"the loss of stage {self.rank} is {float(loss)} at step {step}.")
            loss.backward()
            self._losses.append(float(loss.detach()))
            self._update(parts.optimizer)
            return leaf.grad, None
        assert parts.synthesizer is not None
        given = self.context(y)
        divisor = divisor_of(self.loss_fn, y, self.divisor)
        done: LocalUpdate = local_update(parts.block, parts.synthesizer, x, given.context, given.rows, divisor=divisor)
        self._update(parts.optimizer)
        self._waiting.append((step, done.output, given, divisor))
        return done.below if self.rank else None, done.output

    @staticmethod
    def _update(optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            optimizer.step()

    def _collect(self, above: Receiver, step: int) -> bool:
        """Learn from all gradients that have come; at the bound wait for one. False when nothing more can be done."""
        while self._waiting:
            late = step - self._waiting[0][0] >= self.max_staleness
            if late and not self.wait:
                message = above.get(wait=False)
                if message is None:
                    self._waiting.popleft()
                    self.log.dropped += 1
                    continue
            else:
                if late and self._upper_lost:
                    return False
                start = time.perf_counter()
                message = None if self._upper_lost else above.get(wait=late)
                if late:
                    self._spans.append((BLOCKED, start, time.perf_counter(), step))
            if message is None:
                return True
            if message.over:
                self._upper_lost = message.lost or "it stopped"
                continue
            self._learn(message, step)
        return True

    def _learn(self, message: Message, step: int) -> None:
        """The synthesizer's update from a late gradient, at the activation that it belongs to."""
        while self._waiting and self._waiting[0][0] < message.step:
            self._waiting.popleft()
            self.log.dropped += 1
        if not self._waiting or self._waiting[0][0] != message.step:
            self.log.dropped += 1
            return
        _, h, given, divisor = self._waiting.popleft()
        start = time.perf_counter()
        synthesizer, optimizer = self.parts.synthesizer, self.parts.synthesizer_optimizer
        assert synthesizer is not None
        # Predicted again: the synthesizer has moved since, and old graphs hold weights that are overwritten.
        predicted = synthesizer(h, given.context)
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        learn(predicted, message.tensors[0], given.rows, factor=divisor)
        self._update(optimizer)
        self._stale.append(step - message.step)
        self._spans.append((COMPUTE, start, time.perf_counter(), step))

    def _pass_on(
        self, sender: Sender | None, step: int, tensors: tuple[Tensor, ...] | None, *, upward: bool = False
    ) -> Sender | None:
        """Send, and note if the neighbor is gone."""
        if sender is None or tensors is None:
            return sender
        start = time.perf_counter()
        try:
            sender.send(step, tensors)
        except RuntimeError as error:
            if upward:
                self._upper_lost = why_lost(error)
            return None
        finally:
            self._spans.append((BLOCKED, start, time.perf_counter(), step))
        return sender

    def _finish(self, up: Sender | None, down: Sender | None, above: Receiver | None, step: int) -> None:
        for sender in (up, down):
            try:
                if sender is not None:
                    sender.send(-1)
            except RuntimeError:
                continue
        # The stages above still send gradients of the last steps.
        while above is not None and not self._upper_lost:
            message = above.get()
            if message is None or message.over:
                break
            self._learn(message, step)
        for sender in (up, down):
            try:
                if sender is not None:
                    sender.drain()
            except RuntimeError:
                continue
