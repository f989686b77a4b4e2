"""Counter-based randomness in blocks: what makes an endless stream addressable by index."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from mlcollage import _checks as checks

BLOCK = 1024
"""Samples per block; part of the definition of every stream, so changing it changes every sample."""

SPLITS = ("train", "validation", "test", "stream")

_Value = TypeVar("_Value")


def block_generator(*key: str | int) -> torch.Generator:
    """CPU generator seeded with a hash of ``key``, which may hold words; part of the definition of every stream.

    Examples
    --------
    >>> a, b = block_generator("glyphs", 0, "train", 7), block_generator("glyphs", 0, "test", 7)
    >>> a.initial_seed() == b.initial_seed()
    False
    """
    # 63 bits, since torch takes signed 64-bit seeds.
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_split(split: str) -> str:
    """Return ``split`` if it is one of :data:`SPLITS`."""
    return checks.choice("split", split, SPLITS)


def check_range(start: int, count: int) -> None:
    """Refuse sample ranges that do not exist."""
    checks.integer("start", start, least=0)
    checks.integer("count", count, least=1)


class BlockCache(Generic[_Value]):
    """The last few blocks that were asked for; empty again in a copy or a worker process.

    Parameters
    ----------
    size
        Blocks that are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: OrderedDict[Hashable, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the block under ``key``, made by ``make()`` if it is not held."""
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        block = make()  # outside the lock: two threads may both make it, and get equal blocks
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > self.size:  # the block that was not asked for longest goes first
                self._blocks.popitem(last=False)
        return block

    def __len__(self) -> int:
        return len(self._blocks)

    # Pickling keeps the size only: workers make their own blocks, which are the same to the last bit.
    def __reduce__(self) -> tuple[object, ...]:
        return (BlockCache, (self.size,))
