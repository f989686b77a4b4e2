"""What a pipeline of processes did and when: computing, waiting, how old its gradients were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput

COMPUTE, BLOCKED = 0, 1


@dataclass
class StageLog:
    """One process.

    Parameters
    ----------
    rank
        Its stage.
    spans
        (n, 4): kind (0 computing, 1 blocked), start and stop in seconds of the machine's clock, step.
    losses
        Of each step, by the last stage.
    staleness
        Of each gradient that a synthesizer learned from: steps that the stage had done since.
    dropped
        Gradients that were too old to be used.
    steps
        Batches done.
    stopped
        Why it stopped early; "" if it did not.
    """

    rank: int
    spans: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    losses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    staleness: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    dropped: int = 0
    steps: int = 0
    stopped: str = ""

    def seconds(self, kind: int) -> float:
        """Time spent computing (0) or blocked (1)."""
        of_kind = self.spans[self.spans[:, 0] == kind]
        return float((of_kind[:, 2] - of_kind[:, 1]).sum())


@dataclass
class Timeline:
    """A run of :func:`~mlcollage.papers.synthetic_gradients.run_pipeline`.

    Parameters
    ----------
    schedule
        Its name.
    stages
        What each process did.
    dead
        Ranks whose process died, and how.
    states
        State of each stage's block and synthesizer at the end, by rank, as arrays.
    warmup
        First steps that the speed leaves out.
    """

    schedule: str
    stages: list[StageLog]
    dead: Mapping[int, str] = field(default_factory=dict)
    states: Mapping[int, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    warmup: int = 2

    @property
    def steps_per_second(self) -> float:
        """Batches per second, from the end of the warm-up to the end of the slowest stage."""
        ends = [np.unique(s.spans[s.spans[:, 0] == COMPUTE][:, 3]) for s in self.stages]
        last = self.stages[-1].spans
        done = last[last[:, 0] == COMPUTE]
        if len(done) < self.warmup + 2 or any(len(e) == 0 for e in ends):
            return float("nan")
        by_step = {step: done[done[:, 3] == step][:, 2].max() for step in np.unique(done[:, 3])}
        times = np.array([by_step[s] for s in sorted(by_step)])
        return float((len(times) - 1 - self.warmup) / (times[-1] - times[self.warmup]))

    @property
    def losses(self) -> NDArray[np.float64]:
        """Loss of each step, of the last stage."""
        return self.stages[-1].losses

    def summary(self) -> list[dict[str, float | int | str]]:
        """A row for each stage: seconds computing and blocked, mean and largest staleness, why it stopped."""
        return [
            {
                "rank": s.rank,
                "steps": s.steps,
                "compute": s.seconds(COMPUTE),
                "blocked": s.seconds(BLOCKED),
                "staleness": float(s.staleness.mean()) if len(s.staleness) else 0.0,
                "most_stale": int(s.staleness.max()) if len(s.staleness) else 0,
                "dropped": s.dropped,
                "stopped": self.dead.get(s.rank, s.stopped),
            }
            for s in self.stages
        ]

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` without objects; the states are left out."""
        arrays: dict[str, Any] = {"schedule": np.array(self.schedule), "warmup": np.array(self.warmup)}
        for s in self.stages:
            arrays |= {f"spans{s.rank}": s.spans, f"losses{s.rank}": s.losses, f"staleness{s.rank}": s.staleness}
            arrays |= {f"counts{s.rank}": np.array([s.dropped, s.steps]), f"stopped{s.rank}": np.array(s.stopped)}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Timeline:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            if "schedule" not in file:
                raise InvalidInput(f"{path} holds no timeline.")
            stages: list[StageLog] = []
            while f"spans{len(stages)}" in file:
                i = len(stages)
                dropped, steps = file[f"counts{i}"].tolist()
                stopped = str(file[f"stopped{i}"])
                stages.append(
                    StageLog(i, file[f"spans{i}"], file[f"losses{i}"], file[f"staleness{i}"], dropped, steps, stopped)
                )
            return cls(str(file["schedule"]), stages, warmup=int(file["warmup"]))
