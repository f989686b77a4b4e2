"""What is run: a :class:`Run` is one unit of work, a :class:`Scale` how large the study is."""

from __future__ import annotations

import enum
import hashlib
import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mlcollage.errors import InvalidInput, UnknownName

__all__ = ["Run", "Scalar", "Scale"]

Scalar = str | int | float | bool | None


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
    arm
        The treatment, e.g. ``"gln"`` or ``"mlp"``.
    seed
        Seeds everything that is random in the run. A run that trains several replicas at once
        writes each row of its measurements under the replica's own seed.
    settings
        Flat mapping of scalars; everything that changes what is measured.
    scale
        The scale the run belongs to.
    workload
        Name of the workload (with its fingerprint if it is the user's own).
    version
        The study's version; raise it when ``measure`` changes meaning.

    Examples
    --------
    >>> a = Run("demo", "gln", 0, {"lr": 0.1, "m": 4})
    >>> b = Run("demo", "gln", 0, {"m": 4, "lr": 0.1})
    >>> a.id == b.id, len(a.id)
    (True, 12)
    """

    study: str
    arm: str
    seed: int
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    scale: Scale = Scale.QUICK
    workload: str = "default"
    version: int = 1

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "seed", operator.index(self.seed))
        except TypeError:
            raise InvalidInput(f"seed {self.seed!r} of run {self.study}/{self.arm} must be a whole number.") from None
        for key, value in self.settings.items():
            if not isinstance(key, str) or not isinstance(value, str | int | float | bool | None):
                raise InvalidInput(
                    f"setting {key!r}={value!r} of run {self.study}/{self.arm} is not a scalar; "
                    "use str, int, float, bool or None."
                )
        object.__setattr__(self, "settings", MappingProxyType(dict(sorted(self.settings.items()))))
        object.__setattr__(self, "scale", Scale(self.scale))

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary, ready for JSON."""
        return {
            "study": self.study,
            "arm": self.arm,
            "seed": self.seed,
            "settings": dict(self.settings),
            "scale": str(self.scale),
            "workload": self.workload,
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, spec: Mapping[str, object]) -> Run:
        """Inverse of :meth:`to_dict`."""
        return cls(**spec)  # type: ignore[arg-type]

    def integer(self, name: str) -> int:
        """A setting as an int."""
        return int(self._setting(name))

    def real(self, name: str) -> float:
        """A setting as a float."""
        return float(self._setting(name))

    def text(self, name: str) -> str:
        """A setting as text."""
        return str(self._setting(name))

    def _setting(self, name: str) -> str | int | float:
        value = self.settings.get(name)
        if value is None:
            raise UnknownName(f"run {self} has no setting {name!r}; it has: {', '.join(self.settings) or 'none'}.")
        return value

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits: a hash of everything above."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[object, ...]:
        return (Run.from_dict, (self.to_dict(),))

    def __str__(self) -> str:
        return f"{self.study}/{self.arm} seed {self.seed}"
