"""What the gauges of a training mean, in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .config import ASPConfig

__all__ = ["sentences"]


def sentences(
    history: Sequence[Mapping[str, Any]], seeds: Sequence[int], config: ASPConfig, bins: Sequence[int]
) -> list[str]:
    """Sentences about the last turns of each seed; none where nothing is wrong.

    Examples
    --------
    >>> sentences([], (0,), ASPConfig(), (3,))
    []
    """
    found = []
    for r, seed in enumerate(seeds):
        own = {
            name: [turn[name][r] for turn in history if name in turn]
            for name in dict.fromkeys(name for turn in history for name in turn)
            if name != "turn"
        }
        found += [f"seed {seed}: {text}" for text in _of_one(own, len(history), config, bins)]
    return found


def _of_one(own: Mapping[str, Sequence[float]], turns: int, config: ASPConfig, bins: Sequence[int]) -> list[str]:
    said = []
    games = turns * config.envs
    if "valid" in own:
        playable = sum(own["valid"]) + sum(own["out_of_zone"])
        if not playable:
            said.append(
                f"0 valid goals in the last {games} games; give Alice more than {config.alice_steps} steps, "
                "or look at the world's units."
            )
            if not config.store_invalid and config.learn_alice:
                said.append("Alice has not learned: her invalid turns are left out; take store_invalid=True.")
        if sum(own["not_finite"]):
            said.append(f"{sum(own['not_finite'])} of {games} goals had NaN or infinity; look at the simulation.")
    rates = [rate for rate in own.get("solve_rate", ()) if not math.isnan(rate)]
    if rates and min(rates) == 1:
        said.append(f"Bob solves all goals: no demonstrations for {turns} turns; Alice's are too easy for him.")
    if rates and max(rates) == 0 and turns >= 5:
        said.append(f"Bob has solved no goal in {turns} turns; give him more than {config.bob_steps} steps.")
    # An update without rows has no policy to speak of: all gauges are 0.
    continuous = list(bins).count(0)
    entropy = [e for e in own.get("entropy", ()) if e > 0 or (continuous and e != 0)]
    # A Gaussian of standard deviation 0.02 on [-1, 1], or a twentieth of what equal choices have.
    least = continuous * (math.log(0.02) + 0.5 * math.log(2 * math.pi * math.e))
    if entropy and entropy[-1] < least + 0.05 * sum(math.log(b) for b in bins if b):
        said.append(f"Bob's policy is nearly deterministic (entropy {entropy[-1]:.2g}); raise entropy_weight.")
    if max(own.get("first_ratio", ()), default=0) > 1e-3:
        said.append(
            f"ratios of an unchanged policy are off by up to {max(own['first_ratio']):.2g}: a network acts differently "
            "in each pass, or rounds coarsely."
        )
    if own.get("clip_share") and own["clip_share"][-1] > 0.5:
        said.append(f"{100 * own['clip_share'][-1]:.0f} % of ratios are clipped at an update's end; take a smaller lr.")
    return said
