"""Many configurations, a budget, and one tidy table: stacked models or processes, all of them or by halving."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import pandas as pd

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.stats.search import AsynchronousHalving, Trial
from mlcollage.train.augreg import AugReg

Config = Mapping[str, Any]
TrainOne = Callable[[dict[str, Any], int, int], Mapping[str, float]]
TrainMany = Callable[[list[dict[str, Any]], int, list[int]], Sequence[Mapping[str, float]]]
_RESERVED = ("seed", "budget", "seconds", "error", "rung")


def augreg_space(dialect: str = "paper") -> list[dict[str, Any]]:
    """The paper's 28 settings with the column names of the released index.csv: aug, do, sd, wd.

    Examples
    --------
    >>> space = augreg_space()
    >>> len(space), space[0]
    (28, {'aug': 'none', 'do': 0.0, 'sd': 0.0, 'wd': 0.03})
    """
    return [
        {"aug": a.label(dialect), "do": a.dropout, "sd": a.stochastic_depth, "wd": a.weight_decay}
        for a in AugReg.grid()
    ]


@dataclasses.dataclass
class Sweep:
    """Train every configuration with every seed, or look for the best by asynchronous halving.

    Attributes
    ----------
    space
        Configurations, or a grid: values by name, of which every combination is one.
    budget
        What ``train_fn`` is given to spend on each, in steps, say.
    backend
        ``"process"``: ``train_fn(config, budget, seed)`` gives the scores of one run, and runs go to processes.
        ``"stacked"``: ``train_fn(configs, budget, seeds)`` gives those of many, trained as one stacked model
        (:class:`mlcollage.train.Replicas`); it is called once for each set of values in ``apart``.
    apart
        Names whose values make another architecture, so that they cannot be stacked.
    seeds
        Of the runs.
    workers
        Processes; 1 runs all here.
    halving
        None: the whole budget for each. A number eta: start with budget / eta^2, and promote the best share 1 / eta to
        eta times as much (L. Li et al., MLSys 2020). Only with ``backend="process"``.
    metric
        The score that decides on promotion; higher is better.

    Examples
    --------
    >>> def train(config, budget, seed):
    ...     return {"final_val": 1 - abs(config["lr"] - 0.1) + 0.01 * seed}
    >>> sweep = Sweep({"lr": [0.01, 0.1, 1.0]}, budget=10, seeds=(0, 1), workers=1)
    >>> table = sweep.run(train)
    >>> table.groupby("lr")["final_val"].mean().round(3).to_dict()
    {0.01: 0.915, 0.1: 1.005, 1.0: 0.105}
    """

    space: Mapping[str, Sequence[Any]] | Iterable[Config]
    budget: int
    _: dataclasses.KW_ONLY
    backend: Literal["process", "stacked"] = "process"
    apart: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    workers: int = 1
    halving: int | None = None
    metric: str = "final_val"

    def __post_init__(self) -> None:
        checks.integer("budget", self.budget, least=1), checks.integer("workers", self.workers, least=1)
        checks.choice("backend", self.backend, ("process", "stacked"))
        if isinstance(self.space, Mapping):
            names = list(self.space)
            for name in names:
                if isinstance(self.space[name], str) or not isinstance(self.space[name], Iterable):
                    raise InvalidInput(f"{name!r} needs a list of values, not {self.space[name]!r}.")
            self.configs = [
                dict(zip(names, each, strict=True)) for each in itertools.product(*(self.space[n] for n in names))
            ]
        else:
            each_of: list[Any] = list(self.space)
            if wrong := [config for config in each_of if not isinstance(config, Mapping)]:
                raise InvalidInput(f"each configuration is a mapping from names to values, not {wrong[0]!r}.")
            self.configs = [dict(config) for config in each_of]
        seeds: Any = self.seeds
        if isinstance(seeds, str) or not isinstance(seeds, Iterable):
            raise InvalidInput(f"seeds must be a list of whole numbers, not {seeds!r}.")
        self.seeds = [checks.integer("each of seeds", seed) for seed in self.seeds]
        self.apart = [self.apart] if isinstance(self.apart, str) else list(self.apart)
        if unknown := [name for name in self.apart if not any(name in config for config in self.configs)]:
            raise InvalidInput(f"apart names {unknown[0]!r}, which no configuration has.")
        if not self.configs or not list(self.seeds):
            raise InvalidInput("a sweep needs at least one configuration and one seed.")
        if len(set(self.seeds)) < len(list(self.seeds)):
            raise InvalidInput(f"seeds={list(self.seeds)} repeats one: its run would count twice.")
        for config in self.configs:
            if clash := [k for k in config if k in (*_RESERVED, self.metric)]:
                raise InvalidInput(f"a configuration must not have the name {clash[0]!r}: it is a column of the table.")
        seen = [repr(sorted(c.items(), key=lambda item: item[0])) for c in self.configs]
        if len(set(seen)) < len(seen):
            twice = next(c for k, c in enumerate(self.configs) if seen[k] in seen[:k])
            raise InvalidInput(f"the configuration {twice} is there twice: its runs would count twice.")
        if self.halving is not None:
            checks.integer("halving", self.halving, least=2)
            if self.backend == "stacked":
                raise InvalidInput("halving stops single runs, which a stacked model cannot; use backend='process'.")
            if self.budget < self.halving:
                raise InvalidInput(f"budget={self.budget} is too small to be cut by halving={self.halving}.")

    def run(self, train_fn: TrainOne | TrainMany) -> pd.DataFrame:
        """A row for each run: its configuration, ``seed``, ``budget``, scores, ``seconds``, ``error``.

        A run that raises an error or gives no finite score is a row with NaN and the error's words; the others go on.

        Raises
        ------
        InvalidInput
            If no run gives ``metric``, or ``train_fn`` cannot be sent to a process (it must be a function of a module).
        """
        if self.backend == "stacked":
            rows = self._stacked(train_fn)
        elif self.halving is None:
            jobs = [(c, self.budget, s) for c in self.configs for s in self.seeds]
            rows = self._processes(train_fn, jobs)  # type: ignore[arg-type]
        else:
            rows = [row for seed in self.seeds for row in self._by_halving(train_fn, seed)]  # type: ignore[arg-type]
        table = pd.DataFrame(rows)
        if self.metric not in table or table[self.metric].isna().all():
            first = next((row["error"] for row in rows if row["error"]), f"train_fn gave no {self.metric!r}")
            raise InvalidInput(f"no run has a finite {self.metric!r}: {first}.")
        return table

    def _stacked(self, train_fn: Any) -> list[dict[str, Any]]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for config in self.configs:
            groups.setdefault(repr([config.get(name) for name in self.apart]), []).append(config)
        rows = []
        for configs in groups.values():
            many, seeds = [c for c in configs for _ in self.seeds], list(self.seeds) * len(configs)
            start = time.perf_counter()
            try:
                found, error = list(train_fn(copy.deepcopy(many), self.budget, seeds)), ""
                if len(found) != len(many):
                    raise InvalidInput(f"train_fn gave {len(found)} results for {len(many)} configurations.")
            except InvalidInput:
                raise
            except Exception as failure:
                found, error = [{}] * len(many), f"{type(failure).__name__}: {failure}"
            each = (time.perf_counter() - start) / len(many)
            for config, seed, scores in zip(many, seeds, found, strict=True):
                rows.append(self._row(config, self.budget, seed, scores, each, error))
        return rows

    def _processes(self, train_fn: TrainOne, jobs: Sequence[tuple[dict[str, Any], int, int]]) -> list[dict[str, Any]]:
        if self.workers == 1:
            return [self._row(*job, *_timed(train_fn, *job)) for job in jobs]
        with self._pool() as pool:
            futures = [pool.submit(_timed, train_fn, *job) for job in jobs]
            return [self._row(*job, *self._result(f)) for job, f in zip(jobs, futures, strict=True)]

    def _by_halving(self, train_fn: TrainOne, seed: int) -> list[dict[str, Any]]:
        """Each configuration at most once at the bottom; promotions as soon as they are due."""
        assert self.halving is not None
        eta = self.halving
        rungs = max(2, min(3, 1 + int(math.log(self.budget, eta))))
        order = iter(np.random.default_rng(seed).permutation(len(self.configs)).tolist())
        search = AsynchronousHalving(lambda _: next(order, None), eta, 1, eta ** (rungs - 1), maximize=True, rng=seed)
        rows: list[dict[str, Any]] = []

        def ask() -> Trial | None:
            trial = search.ask()
            return None if trial.config is None else trial

        def cost(trial: Trial) -> int:
            return max(1, round(self.budget * trial.resource / eta ** (rungs - 1)))

        def tell(trial: Trial, outcome: tuple[Mapping[str, float], float, str]) -> None:
            row = self._row(self.configs[trial.config], cost(trial), seed, *outcome)
            rows.append({**row, "rung": round(math.log(trial.resource, eta))})
            search.tell(trial, float(row.get(self.metric, math.nan)))

        if self.workers == 1:
            while (trial := ask()) is not None:
                tell(trial, _timed(train_fn, self.configs[trial.config], cost(trial), seed))
            return rows
        with self._pool() as pool:
            out: dict[Future[Any], Trial] = {}
            while True:
                while len(out) < self.workers and (trial := ask()) is not None:
                    out[pool.submit(_timed, train_fn, self.configs[trial.config], cost(trial), seed)] = trial
                if not out:
                    return rows
                for future in wait(out, return_when=FIRST_COMPLETED).done:
                    tell(out.pop(future), self._result(future))

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))

    @staticmethod
    def _result(future: Future[Any]) -> Any:
        try:
            return future.result()
        except (AttributeError, TypeError) as error:
            raise InvalidInput(
                f"train_fn cannot be sent to a process ({error}): define it at the top of a module, or use workers=1."
            ) from error

    def _row(
        self, config: Config, budget: int, seed: int, scores: Mapping[str, float], seconds: float, error: str
    ) -> dict[str, Any]:
        if clash := [k for k in scores if k in config or k in _RESERVED]:
            raise InvalidInput(f"train_fn gave a score called {clash[0]!r}, which is a column of its own; rename it.")
        numbers: dict[str, Any] = {}
        for name, given in scores.items():
            try:
                numbers[name] = float(given)
            except (TypeError, ValueError, RuntimeError):
                numbers[name] = given
                if name == self.metric and not error:
                    error = f"{name} is {given!r}, not a number"
        scores = numbers
        value = scores.get(self.metric, math.nan)
        if not error and not math.isfinite(value):
            error = f"{self.metric} is {value}" if self.metric in scores else f"train_fn gave no {self.metric!r}"
        row = {**config, "seed": seed, "budget": budget, **scores, "seconds": seconds, "error": error}
        if error:
            row[self.metric] = math.nan
        return row


def _timed(
    train_fn: TrainOne, config: dict[str, Any], budget: int, seed: int
) -> tuple[Mapping[str, float], float, str]:
    """Scores, seconds and the words of an error of one run."""
    start = time.perf_counter()
    try:
        scores, error = train_fn(copy.deepcopy(config), budget, seed), ""
        if not isinstance(scores, Mapping):
            raise TypeError(
                f"train_fn gave {type(scores).__name__}, not a mapping of scores such as {{'final_val': 0.9}}"
            )
    except Exception as failure:  # one run that fails must not cost the others
        scores, error = {}, f"{type(failure).__name__}: {failure}"
    return scores, time.perf_counter() - start, error
