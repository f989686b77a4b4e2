"""Seeds derived from seeds: every random choice of a program has a key of its own."""

from __future__ import annotations

import numpy as np
import torch


def derive(*key: int) -> int:
    """A 63-bit seed for a key of integers; different keys give unrelated seeds.

    Drawing each step's numbers from a stream of its own is what lets a resumed training go on with the same ones.
    """
    words = [int(k) & 0xFFFFFFFFFFFFFFFF for k in key]  # SeedSequence takes no negative numbers
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the key."""
    return torch.Generator(device=device).manual_seed(derive(*key))


def permutation(n: int, *key: int) -> torch.Tensor:
    """A random order of 0 ... n-1 that depends on the key only (drawn on the CPU, the same for every device)."""
    return torch.randperm(n, generator=generator(*key))
