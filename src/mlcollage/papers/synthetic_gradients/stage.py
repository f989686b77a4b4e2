"""One stage of a pipeline in a process of its own, which updates without waiting for the stages above."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .chain import local_update
from .context import Context, Divisor, Given, LossFn, divisor_of
from .learning import learn, say
from .timeline import BLOCKED, COMPUTE, StageLog
from .transport import Message, Receiver, Sender, why_lost, wire

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

    def state_dict(self) -> dict[str, Any]:
        """States of all that is there, by name of the field."""
        return {f.name: part.state_dict() for f in fields(self) if (part := getattr(self, f.name)) is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the states of equal parts.

        Raises
        ------
        InvalidInput
            For parts that are not there, or of other sizes.
        """
        own = set(self.state_dict())
        if own != set(state):
            raise InvalidInput(f"the saved stage has {sorted(state)}, this one {sorted(own)}.")
        for name in sorted(own):
            part = getattr(self, name)
            given = dict(state[name])
            if isinstance(part, torch.optim.Optimizer):  # files have words for keys
                given["state"] = {int(k): v for k, v in given["state"].items()}
            try:
                part.load_state_dict(given)
            except (RuntimeError, ValueError) as error:
                raise InvalidInput(
                    f"the saved {name} does not fit this stage's: {' '.join(str(error).split())}"
                ) from error


class Stage:
    """What the stages of all schedules share: neighbors, the loop over batches, the log.

    Parameters
    ----------
    rank, stages, parts, loss_fn
        As for :class:`AsyncStage`.
    room
        Messages under way in each direction.
    """

    schedule = ""

    def __init__(self, rank: int, stages: int, parts: StageParts, loss_fn: LossFn, room: int = 1) -> None:
        self.rank, self.stages = checks.integer("rank", rank, least=0), checks.integer("stages", stages, least=2)
        if dist.is_initialized() and dist.get_world_size() != stages:
            raise InvalidInput(f"{stages} stages need as many processes, but the group has {dist.get_world_size()}.")
        self.last = rank == stages - 1
        self.parts, self.loss_fn, self.room = parts, loss_fn, room
        self.device = next((p.device for p in parts.block.parameters()), torch.device("cpu"))
        self.log, self.step = StageLog(rank), 0
        self._spans: list[tuple[int, float, float, int]] = []
        self._losses: list[float] = []
        self._stale: list[int] = []
        self._up: Sender | None = None
        self._down: Sender | None = None
        self._above: Receiver | None = None
        self._below: Receiver | None = None
        self._upper_lost = ""

    def run(
        self, batches: Iterable[tuple[Tensor, Tensor]] | None = None, *, after: Callable[[Self], object] | None = None
    ) -> StageLog:
        """Train until the batches end, or a neighbor is gone and the bound is reached.

        Parameters
        ----------
        batches
            Pairs of inputs and targets; read by the first stage only. After :meth:`load_state_dict`, those that were
            not seen yet.
        after
            Called with the stage after each step, when ``stage.step`` batches are done; the place to save its state.
        """
        if self.rank == 0 and batches is None:
            raise InvalidInput("the first stage needs the batches.")
        self._open()
        source = iter(batches) if batches is not None and self.rank == 0 else None
        while True:
            with self._span(BLOCKED, self.step):
                message = self._next(source)
            if message.over:
                self.log.stopped = f"stage {self.rank - 1} is gone: {message.lost}" if message.lost else ""
                break
            if not self._turn(message.step, *(t.to(self.device) for t in message.tensors)):
                self.log.stopped = f"stage {self.rank + 1} is gone: {self._upper_lost}"
                break
            self.step = message.step + 1
            if after is not None:
                after(self)
        self._close()
        self.log.spans = np.array(self._spans, dtype=np.float64).reshape(-1, 4)
        self.log.losses, self.log.staleness = np.array(self._losses), np.array(self._stale, dtype=np.int64)
        return self.log

    def _turn(self, step: int, x: Tensor, y: Tensor) -> bool:
        """One batch; False when nothing more can be done."""
        raise NotImplementedError

    def _open(self) -> None:
        up = down = None
        if wire(None).type == "cuda":  # NCCL runs the messages of one group one after the other: one for each direction
            up, down = dist.new_group(), dist.new_group()
        if not self.last:
            self._up = Sender(self.rank + 1, UP, self.room, up)
            self._above = Receiver(self.rank + 1, DOWN, self.room, down)
        if self.rank:
            self._down = Sender(self.rank - 1, DOWN, self.room, down)
            self._below = Receiver(self.rank - 1, UP, self.room, up)

    def _next(self, source: Any) -> Message:
        if self._below is not None:
            message = self._below.get()
            assert message is not None
            return message
        batch = next(source, None)
        if batch is None:
            return Message(-1, ())
        if not isinstance(batch, tuple | list) or [isinstance(t, Tensor) for t in batch] != [True, True]:
            what = [type(t).__name__ for t in batch] if isinstance(batch, tuple | list) else type(batch).__name__
            raise InvalidInput(f"batches must be pairs of tensors, inputs and targets, not {what}.")
        return Message(self.step, tuple(batch))

    @contextmanager
    def _span(self, kind: int, step: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((kind, start, time.perf_counter(), step))

    def _pass_on(self, sender: Sender | None, step: int, *tensors: Tensor) -> Sender | None:
        """Send, and note if the neighbor is gone."""
        if sender is None:
            return None
        with self._span(BLOCKED, step):
            try:
                sender.send(step, tensors)
            except RuntimeError as error:
                if sender is self._up:
                    self._upper_lost = why_lost(error)
                return None
        return sender

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of the block with a graph between them, and all gradients at zero."""
        for optimizer in (self.parts.optimizer, self.parts.synthesizer_optimizer):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_(x.is_floating_point())
        return leaf, self.parts.block(leaf.clone() if leaf.requires_grad else leaf)

    def _last_step(self, step: int, x: Tensor, y: Tensor) -> Tensor | None:
        """Loss and update of the last stage; the gradient for the stage below."""
        leaf, out = self._forward(x)
        loss = self.loss_fn(out, y)
        if not bool(loss.isfinite()):
            raise InvalidInput(f"the loss of stage {self.rank} is {float(loss)} at step {step}.")
        loss.backward()
        self._losses.append(float(loss.detach()))
        _update(self.parts.optimizer)
        self.log.steps += 1
        return leaf.grad

    def _close(self) -> None:
        """Tell the neighbors that nothing more will come, and let all that is under way arrive."""
        for sender in (self._up, self._down):
            if sender is not None:
                with suppress(RuntimeError):  # a neighbor that is done has gone already
                    sender.send(-1)
        self._finish()
        for sender in (self._up, self._down):
            if sender is not None:
                with suppress(RuntimeError):
                    sender.drain()

    def _finish(self) -> None:
        """What is left to do when the batches have ended."""

    def state_dict(self) -> dict[str, Any]:
        """Parts and step, as nested dictionaries of tensors and numbers."""
        return {"rank": self.rank, "stages": self.stages, "step": self.step, "parts": self.parts.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises
        ------
        InvalidInput
            For the state of another stage, of a chain of another length, or of other parts.
        """
        for name in ("rank", "stages"):
            if state[name] != getattr(self, name):
                raise InvalidInput(f"the saved state has {name}={state[name]}, but this is {getattr(self, name)}.")
        self.parts.load_state_dict(state["parts"])
        self.step = int(state["step"])


class AsyncStage(Stage):
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
        How many steps the stage may be ahead of the gradients that come down to it. With 0 it waits for each, and the
        numbers of a run are the same every time.
    wait
        At the bound, wait. False: go on, and drop the oldest pairs, which are counted.

    Notes
    -----
    ``state_dict()`` holds parameters, optimizers, the context's units, the step, and the pairs whose gradient has not
    come; :meth:`settle` waits for these first. Messages travel on the GPU in a group of NCCL, else on the CPU. The
    path over NCCL was not run on a machine with GPUs.

    Examples
    --------
    In a script that ``torchrun`` starts three times::

        dist.init_process_group("gloo")
        stage = AsyncStage(dist.get_rank(), 3, parts, nn.CrossEntropyLoss(), context=Context("labels", 10))
        log = stage.run(loader)  # the first stage reads the loader
    """

    schedule = "dni"

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
        self.max_staleness = checks.integer("max_staleness", max_staleness, least=0)
        super().__init__(rank, stages, parts, loss_fn, max(1, self.max_staleness))
        if self.last == (parts.synthesizer is not None):
            raise InvalidInput(
                f"stage {rank} of {stages} needs {'no synthesizer: it has the loss' if self.last else 'a synthesizer'}."
            )
        self.divisor, self.context, self.wait = divisor, context or Context("none"), wait
        # Steps whose gradient has not come yet: step, activation, context, divisor.
        self._waiting: deque[tuple[int, Tensor, Given, float]] = deque()

    def _turn(self, step: int, x: Tensor, y: Tensor) -> bool:
        with self._span(COMPUTE, step):
            below, out = (self._last_step(step, x, y), None) if self.last else self._own_step(step, x, y)
        if below is not None:
            self._down = self._pass_on(self._down, step, below)
        if out is not None and not self._upper_lost:
            self._up = self._pass_on(self._up, step, out, y)
        return self._collect(step, self.max_staleness, wait=self.wait)

    def _own_step(self, step: int, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """Update along the synthetic gradient: the gradient for the stage below, and the activation for above."""
        parts = self.parts
        assert parts.synthesizer is not None
        if parts.optimizer is not None:
            parts.optimizer.zero_grad(set_to_none=True)
        given = self.context(y)
        divisor = divisor_of(self.loss_fn, y, self.divisor)
        done = local_update(parts.block, parts.synthesizer, x, given.context, given.rows, divisor=divisor)
        _update(parts.optimizer)
        self._waiting.append((step, done.output, given, divisor))
        self.log.steps += 1
        return done.below if self.rank else None, done.output

    def _collect(self, step: int, bound: int, *, wait: bool) -> bool:
        """Learn from all gradients that have come; wait for those that are ``bound`` steps old. False if none can."""
        above = self._above
        while self._waiting and above is not None:
            late = step - self._waiting[0][0] >= bound
            if late and self._upper_lost and wait:
                return False
            with self._span(BLOCKED, step):
                message = None if self._upper_lost else above.get(wait=late and wait)
            if message is None and late and not wait:
                self._waiting.popleft()
                self.log.dropped += 1
            elif message is None:
                return True
            elif message.over:
                self._upper_lost = message.lost or "it stopped"
            else:
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
        synthesizer, optimizer = self.parts.synthesizer, self.parts.synthesizer_optimizer
        assert synthesizer is not None
        with self._span(COMPUTE, step):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            # Predicted again: the synthesizer has moved since, and old graphs hold weights that are overwritten.
            learn(say(synthesizer, h, given.context), message.tensors[0].to(h.device), given.rows, factor=divisor)
            _update(optimizer)
        self._stale.append(step - message.step)

    def settle(self) -> bool:
        """Wait for all gradients that are under way, and learn from them; False if the stage above is gone."""
        return self._collect(self.step - 1, 0, wait=True)

    def _finish(self) -> None:
        while self._above is not None and not self._upper_lost:  # gradients of the last steps are still to come
            message = self._above.get()
            if message is None or message.over:
                break
            self._learn(message, self.step)

    def state_dict(self) -> dict[str, Any]:
        """Parts, step, units of the context, and pairs whose gradient has not come."""
        waiting = [
            {"step": step, "h": h, "context": given.context, "rows": given.rows, "divisor": divisor}
            for step, h, given, divisor in self._waiting
        ]
        return super().state_dict() | {"context": self.context.state_dict(), "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises
        ------
        InvalidInput
            For the state of another stage, of a chain of another length, or of other parts.
        """
        super().load_state_dict(state)
        self.context.load_state_dict(state["context"])
        self._waiting = deque(
            (p["step"], p["h"].to(self.device), Given(p["context"], p["rows"]), p["divisor"]) for p in state["waiting"]
        )


class LockedStage(Stage):
    """A stage that waits for the true gradient of each batch: forward from stage to stage, backward again."""

    schedule = "sequential"

    def _turn(self, step: int, x: Tensor, y: Tensor) -> bool:
        if self.last:
            with self._span(COMPUTE, step):
                below = self._last_step(step, x, y)
        else:
            assert self._above is not None
            with self._span(COMPUTE, step):
                leaf, out = self._forward(x)
            self._up = self._pass_on(self._up, step, out.detach(), y)
            with self._span(BLOCKED, step):
                answer = self._above.get()
            if answer is None or answer.over:
                self._upper_lost = self._upper_lost or (answer.lost if answer is not None else "") or "it stopped"
                return False
            with self._span(COMPUTE, step):
                out.backward(answer.tensors[0].to(out.device))
                _update(self.parts.optimizer)
            self.log.steps += 1
            below = leaf.grad
        if below is not None:
            self._down = self._pass_on(self._down, step, below)
        return True


def _update(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        optimizer.step()
