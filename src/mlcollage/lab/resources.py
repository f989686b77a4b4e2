"""What one run of an experiment needs of a machine, declared once and used by every engine."""

from __future__ import annotations

from dataclasses import dataclass

from mlcollage._checks import integer, positive


@dataclass(frozen=True)
class Resources:
    """What one run needs; it is no part of the run's id, since it must not change what is measured.

    Parameters
    ----------
    cpus
        Cores, and threads of its numerical libraries.
    gpus
        GPUs. On a cluster, a run that asks for none sees none.
    memory_gb
        Resident memory in 10⁹ bytes, after which the run is ended and counts as failed; None: what the machine or the
        job has.
    minutes
        Time after which the run is ended and counts as failed; None: no limit of its own.

    Examples
    --------
    >>> Resources(gpus=1, memory_gb=16)
    Resources(cpus=1, gpus=1, memory_gb=16, minutes=None)
    """

    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        integer("cpus", self.cpus, least=1)
        integer("gpus", self.gpus, least=0)
        for name in ("memory_gb", "minutes"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
