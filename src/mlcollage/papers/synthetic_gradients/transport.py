"""Tensors between neighboring processes: shape, type and step travel with each, in both directions at once."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mlcollage.errors import InvalidInput

_TYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16,
)  # fmt: skip
_AXES, _MOST = 6, 2  # axes of a tensor, tensors of a message
_HEADER = 2 + _MOST * (2 + _AXES)
_END = -1


class Message(NamedTuple):
    """What arrived: the step that it belongs to, and its tensors; ``step`` is -1 at the end."""

    step: int
    tensors: tuple[Tensor, ...]
    lost: str = ""  # why the neighbor is gone, if it is

    @property
    def over(self) -> bool:
        """Whether nothing will come any more."""
        return self.step == _END


class Sender:
    """Sends messages to one rank without waiting, up to a number that may be under way.

    Parameters
    ----------
    rank
        Where to.
    tag
        Of the direction.
    most
        Messages under way; the next waits for the oldest.
    group
        The process group; None for the usual one.
    """

    def __init__(self, rank: int, tag: int, most: int, group: Any = None) -> None:
        self.rank, self.tag, self.most, self.group = rank, tag, most, group
        self.device = wire(group)
        self._works: deque[tuple[list[dist.Work], list[Tensor]]] = deque()  # what is sent must stay until it is

    def send(self, step: int, tensors: Sequence[Tensor] = ()) -> None:
        """Send; raises ``RuntimeError`` if the neighbor is gone."""
        header = torch.zeros(_HEADER, dtype=torch.int64)
        header[0], header[1] = step, len(tensors)
        kept: list[Tensor] = []
        for i, t in enumerate(tensors):
            if t.dtype not in _TYPES or t.ndim > _AXES:
                raise InvalidInput(f"a tensor of {t.dtype} with {t.ndim} axes cannot be sent between stages.")
            at = 2 + i * (2 + _AXES)
            header[at], header[at + 1] = _TYPES.index(t.dtype), t.ndim
            header[at + 2 : at + 2 + t.ndim] = torch.tensor(t.shape)
            kept.append(t.detach().to(self.device).contiguous())
        kept.insert(0, header.to(self.device))
        works = [work for t in kept if (work := dist.isend(t, self.rank, self.group, self.tag)) is not None]
        self._works.append((works, kept))
        self.drain(self.most)

    def drain(self, most: int = 0) -> None:
        """Wait until at most so many messages are under way."""
        while len(self._works) > most:
            works, _ = self._works.popleft()
            for work in works:
                work.wait()


class Receiver:
    """Receives messages of one rank in a thread of its own, into a bounded queue.

    Parameters
    ----------
    rank
        Where from.
    tag
        Of the direction.
    most
        Messages that wait in the queue; the thread then stops receiving, so the neighbor cannot run further ahead.
    group
        The process group; None for the usual one.
    """

    def __init__(self, rank: int, tag: int, most: int, group: Any = None) -> None:
        self.rank, self.tag, self.group = rank, tag, group
        self.device = wire(group)
        self.arrived: queue.Queue[Message] = queue.Queue(max(1, most))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self.device.type == "cuda":  # a thread's own setting
            torch.cuda.set_device(self.device)
        try:
            while True:
                header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
                dist.recv(header, self.rank, self.group, self.tag)
                header = header.cpu()
                step, count = int(header[0]), int(header[1])
                tensors = []
                for i in range(count):
                    at = 2 + i * (2 + _AXES)
                    shape = header[at + 2 : at + 2 + int(header[at + 1])].tolist()
                    # A buffer of its own for each: what a stage still computes with is never written to.
                    tensors.append(torch.empty(shape, dtype=_TYPES[int(header[at])], device=self.device))
                    dist.recv(tensors[-1], self.rank, self.group, self.tag)
                self.arrived.put(Message(step, tuple(tensors)))
                if step == _END:
                    return
        except (RuntimeError, ValueError) as error:  # gloo: the connection was closed, or nothing came in time
            self.arrived.put(Message(_END, (), why_lost(error)))

    def get(self, *, wait: bool = True) -> Message | None:
        """The next message; None if there is none and ``wait`` is False."""
        try:
            return self.arrived.get(block=wait)
        except queue.Empty:
            return None


def wire(group: Any) -> torch.device:
    """Where messages travel: the GPU with NCCL, which moves nothing else, and the CPU with gloo."""
    nccl = dist.is_initialized() and dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def why_lost(error: BaseException) -> str:
    """One phrase for what the transport raised."""
    return "nothing came from it in time" if "imed out" in str(error) else "the connection was closed"
