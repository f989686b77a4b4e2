"""What is run: a :class:`Run` is one unit of work, a :class:`Scale` how large the study is."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput

Setting = str | int | float | bool | None | tuple["Setting", ...]


class Scale(enum.StrEnum):
    """How large a study is run.

    ``smoke`` (seconds, tests only, no verdicts), ``quick`` (two CPU cores, about a minute),
    ``full`` (one GPU for twenty minutes, or CPU hours), ``paper`` (the original data and sizes).
    """

    SMOKE = "smoke"
    QUICK = "quick"
    FULL = "full"
    PAPER = "paper"

    @property
    def rank(self) -> int:
        """Position from the smallest (0) to the largest (3)."""
        return list(Scale).index(self)


@dataclass(frozen=True)
class Run:
    """One unit of work of a study: pure data, hashable, the same on every machine.

    Parameters
    ----------
    study
        Slug of the paper.
    experiment
        Which of the study's experiments.
    arm
        The treatment, e.g. ``"gln"`` or ``"mlp"``.
    seed
        Seeds everything that is random in the run; the first one of a run that measures several.
    settings
        The experiment's settings as a mapping of plain values; everything that changes what is measured.
    scale
        The scale the run belongs to.
    workload
        Name of the workload (with its fingerprint if it is the user's own).
    version
        The experiment's version.
    count
        How many seeds the run measures: ``seed``, ``seed + 1``, and so on. It writes each row under its own seed.

    Examples
    --------
    >>> a = Run("demo", "stream", "gln", 0, {"lr": 0.1, "widths": [16, 1]})
    >>> b = Run("demo", "stream", "gln", 0, {"widths": (16, 1), "lr": 0.1})
    >>> a.id == b.id, len(a.id), a.settings["widths"]
    (True, 12, (16, 1))
    """

    study: str
    experiment: str
    arm: str
    seed: int
    settings: Mapping[str, Setting] = field(default_factory=dict)
    scale: Scale = Scale.QUICK
    workload: str = "default"
    version: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        # numpy's integers are taken too, and made plain, since ids are made from JSON.
        for name, least in (("seed", None), ("count", 1), ("version", 1)):
            object.__setattr__(
                self,
                name,
                integer(f"{name} of run {self.study}/{self.experiment}/{self.arm}", getattr(self, name), least=least),
            )
        # Sorted, so that runs with the same settings are the same whatever the order in which they were given.
        frozen = {key: self._plain(key, value) for key, value in sorted(self.settings.items())}
        object.__setattr__(self, "settings", MappingProxyType(frozen))
        object.__setattr__(self, "scale", Scale(self.scale))

    def _plain(self, key: str, value: object) -> Setting:
        if isinstance(value, tuple | list):
            return tuple(self._plain(key, part) for part in value)
        if not isinstance(value, str | int | float | bool | None):
            raise InvalidInput(
                f"setting {key}={value!r} of run {self} is no plain value; use str, int, float, bool, None or tuples "
                "of these."
            )
        return value

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary, ready for JSON."""
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, spec: Mapping[str, object]) -> Run:
        """Inverse of :meth:`to_dict`."""
        return cls(**spec)  # type: ignore[arg-type]

    @property
    def seeds(self) -> range:
        """The seeds that the run measures."""
        return range(self.seed, self.seed + self.count)

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits: a hash of everything above."""
        # Everything that may change the result is in it; whatever else is recorded about a run is not.
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]  # 48 bits: a million runs collide once in 500 stores

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[object, ...]:
        return (Run.from_dict, (self.to_dict(),))  # a MappingProxyType cannot be pickled

    def __str__(self) -> str:
        what = self.experiment if self.arm == self.experiment else f"{self.experiment}/{self.arm}"
        last = f" to {self.seed + self.count - 1}" if self.count > 1 else ""
        return f"{self.study}/{what} seed {self.seed}{last}"
