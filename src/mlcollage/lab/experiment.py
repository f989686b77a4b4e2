"""What a study consists of: an :class:`Experiment` says what is measured, with which arms, settings and seeds."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pandas as pd

from mlcollage._checks import integer
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.resources import Resources
from mlcollage.lab.run import Run, Scale

if TYPE_CHECKING:
    from mlcollage.data.workload import Workload

__all__ = ["Experiment", "Task", "each_seed", "settings_lines"]

S = TypeVar("S")


@dataclass(frozen=True)
class Task(Generic[S]):
    """What one call of an experiment's function is to measure.

    Parameters
    ----------
    arm
        The treatment.
    seeds
        The seeds to measure; one, unless the experiment measures blocks.
    settings
        The experiment's settings, typed.
    scale
        The scale of the study.
    workload
        The user's workload, or None for the study's own data.
    device
        ``"cuda"`` at the scales full and paper on a machine that has a GPU, else ``"cpu"``.
    """

    arm: str
    seeds: tuple[int, ...]
    settings: S
    scale: Scale = Scale.QUICK
    workload: Any = None
    device: str = "cpu"

    @property
    def seed(self) -> int:
        """The only seed; refused where there are several."""
        if len(self.seeds) != 1:
            raise InvalidInput(f"this task holds the seeds {self.seeds}; use task.seeds, or wrap it in each_seed.")
        return self.seeds[0]


Measure = Callable[[Task[S]], Measurements]


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """One experiment of a study; the lab makes its runs: arms times seeds, at each scale.

    Parameters
    ----------
    name
        Unique within the study.
    measure
        Does the work: from a :class:`Task` to :class:`~mlcollage.lab.measurements.Measurements`.
    arms
        The treatments, in the order in which their runs start. Give the arms of one seed the same data and
        initialization, so that claims compare pairs.
    settings
        For each scale a frozen dataclass; everything that changes a result is in it. Every field is a plain value or a
        (nested) tuple of such, and has a comment on its own line. A scale that is not listed leaves the experiment out.
    version
        Raise it when ``measure`` changes meaning: finished runs of older versions are not used any more. Those of the
        study's other experiments are kept.
    block
        How many seeds one run measures together; None: all.
    seeds
        How many seeds are registered at each scale, where that differs from the study's number.
    once
        For a picture: one run with seed 0. Seeds are never added to it.
    own_data
        Whether it is run on the study's own data; False for what exists on a user's workload only.
    workloads
        Kinds of workload that it can be run on, e.g. ``(Labeled,)``; empty for experiments on data of their own.
    adapt
        ``adapt(settings, workload, scale)`` gives the settings on a user's workload, or None where the experiment has
        no part in it; raises :class:`~mlcollage.errors.InvalidInput` for a workload that it cannot use. By default the
        settings stay as they are.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Coin:
    ...     flips: int = 10  # how often
    >>> def flip(task):
    ...     m = Measurements()
    ...     m.add("heads", task.seed % task.settings.flips)
    ...     return m
    >>> coin = Experiment("coin", flip, arms=("fair",), settings={Scale.QUICK: Coin()})
    >>> [str(run) for run in coin.runs("demo", Scale.QUICK, range(2))]
    ['demo/coin/fair seed 0', 'demo/coin/fair seed 1']
    """

    name: str
    measure: Measure[S]
    _: dataclasses.KW_ONLY
    arms: tuple[str, ...]
    settings: Mapping[Scale, S]
    version: int = 1
    block: int | None = 1
    seeds: Mapping[Scale, int] | None = None
    once: bool = False
    own_data: bool = True
    workloads: tuple[type, ...] = ()
    adapt: Callable[[S, Any, Scale], S | None] | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        where = f"experiment {self.name!r}"
        integer(f"version of {where}", self.version, least=1)
        if self.block is not None:
            integer(f"block of {where}", self.block, least=1)
        if not self.arms or not self.settings:
            raise InvalidInput(f"{where} needs at least one arm and the settings of at least one scale.")
        kinds = {type(s) for s in self.settings.values()}
        kind = next(iter(kinds))
        if len(kinds) > 1 or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            names = ", ".join(sorted(k.__name__ for k in kinds))
            raise InvalidInput(f"the settings of {where} must be objects of one frozen dataclass; they are {names}.")

    def runs(
        self, study: str, scale: Scale, seeds: range, *, workload: Workload | None = None, name: str = "default"
    ) -> Iterator[Run]:
        """The runs of these seeds; ``name`` is that of the workload."""
        settings = self._settings_on(scale, workload)
        if settings is None:
            return
        values = plain(settings)
        # block=None: one run measures all seeds that are asked for at once.
        step = len(seeds) if self.block is None else self.block
        for arm in self.arms:
            for first in seeds[:: max(step, 1)]:
                count = min(step, seeds.stop - first)  # the last block may be smaller
                yield Run(study, self.name, arm, first, values, scale, name, self.version, count)

    def _settings_on(self, scale: Scale, workload: Workload | None) -> S | None:
        settings = self.settings.get(scale)
        if settings is None or workload is None:
            return settings if self.own_data else None  # no settings: not part of this scale
        # The other experiments of the study may take this kind of workload; this one is then left out.
        if not isinstance(workload, self.workloads):
            return None
        if self.adapt is None:
            return settings
        with users_code(f"adapt of experiment {self.name}"):
            adapted = self.adapt(settings, workload, scale)
        if adapted is not None and type(adapted) is not type(settings):
            kinds = type(adapted).__name__, type(settings).__name__
            raise InvalidInput(f"adapt of experiment {self.name} returned {kinds[0]}; expected {kinds[1]} or None.")
        return adapted

    def registered(self, scale: Scale, otherwise: int) -> range:
        """The registered seeds at a scale; ``otherwise`` is the study's number of them."""
        return range(1 if self.once else otherwise if self.seeds is None else self.seeds.get(scale, otherwise))

    def task(self, run: Run, *, workload: Workload | None = None, device: str = "cpu") -> Task[S]:
        """What a run asks for, with its settings as the dataclass that they came from."""
        # A run holds plain values, so that it can be stored and hashed; lists of a JSON file have become tuples again.
        kind = type(next(iter(self.settings.values())))
        return Task(run.arm, tuple(run.seeds), kind(**run.settings), run.scale, workload, device)


def plain(settings: Any) -> dict[str, Any]:
    """The fields of a settings dataclass by name."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}


def each_seed(measure: Measure[S]) -> Measure[S]:
    """Make a function that measures one seed measure the seeds of a block, one after the other.

    Rows are written under their seed, arrays are named by it: ``name.seed``.
    """

    @wraps(measure)
    def measure_block(task: Task[S]) -> Measurements:
        m = Measurements()
        for seed in task.seeds:
            found = measure(dataclasses.replace(task, seeds=(seed,)))
            for row in found.table.to_dict("records"):
                # Metrics of one table have different free columns; where a row has none of a kind, pandas has put NaN.
                keys = {str(k): v for k, v in row.items() if k not in ("metric", "step", "value") and pd.notna(v)}
                m.add(row["metric"], row["value"], step=row["step"], seed=seed, **keys)
            for name, values in found.arrays.items():
                m.array(f"{name}.{seed}", values)
        return m

    return measure_block


def settings_lines(settings: Any) -> list[tuple[str, str, str]]:
    """Name, value and comment of each field of a settings dataclass; the comment is "" where the source has none.

    Examples
    --------
    >>> from mlcollage.papers.gated_linear_networks.study.experiments import Stream
    >>> settings_lines(Stream())[1]
    ('train', '1257', 'samples learned from, each once')
    """
    comments: dict[str, str] = {}
    # Fields that a subclass declares anew have its comment, so bases come first.
    for kind in reversed(type(settings).__mro__):
        if dataclasses.is_dataclass(kind):
            comments |= _field_comments(kind)
    return [(name, repr(value), comments.get(name, "")) for name, value in plain(settings).items()]


def _field_comments(kind: type) -> dict[str, str]:
    """The comment on, or just above, the line of each field in the source of a class."""
    try:
        # Comments are not part of a class at run time: they are read from its source.
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    by_line = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            # A field over several lines may have its comment on any of them.
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(by_line[n] for n in lines if n in by_line)
    return found
