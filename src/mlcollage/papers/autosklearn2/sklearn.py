"""The whole system as scikit-learn estimators: fit a table within a budget of time and memory."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, validate_data

from mlcollage import _checks as checks
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MissingDependency, StoreError

from .columns import TableCoder
from .ensemble import EnsembleSelection
from .evaluation import evaluate_steps, make_splits, validation_rows
from .machine import available_cores, memory_limit_of_container
from .metrics import metric_of
from .pipeline import FloatArray, IterativePipeline
from .policy import FIXED_ORDER, Policy
from .rows import TableRows
from .search import Proposal, SearchPlan
from .shipped import default_portfolio, official_portfolio, official_selector, official_selector_data
from .smac import SmacImprovement, has_smac
from .space import Config, Kind, pipeline_space
from .suspects import suspicious_columns
from .trials import PipelineTrial, RunFolder, key_of
from .worker import FitProblem, StepMessage, Worker, run_steps

__all__ = ["AutoClassifier", "AutoRegressor", "TrialEvent"]

_LEAST_FOR_SELECTOR = 30.0  # seconds; below, a cross-validation would hardly end


@dataclass(frozen=True)
class TrialEvent:
    """What a callback is told after each trial.

    Parameters
    ----------
    trial
        The one that ended.
    best
        The best one so far, None if none has a loss.
    seconds
        Since the start of the fit.
    estimator
        Being fitted; its ``predict`` works already.
    """

    trial: PipelineTrial
    best: PipelineTrial | None
    seconds: float
    estimator: Any


class _Auto(BaseEstimator):
    """What classifier and regressor share."""

    _kind: Kind
    _default_metric: str

    def __init__(
        self,
        time_budget: float = 60.0,
        *,
        per_run_limit: float | None = None,
        memory_limit_mb: float = 3072.0,
        metric: Any = None,
        policy: Policy | Literal["auto"] = "auto",
        portfolio: Any = "default",
        search: Literal["forest", "smac"] = "forest",
        ensemble_size: int = 50,
        ensemble_nbest: int = 50,
        max_models: int = 50,
        max_trials: int | None = None,
        include: Sequence[str] | None = None,
        categorical: Sequence[Any] | None = None,
        n_jobs: int = 1,
        isolation: Literal["process", "none"] = "process",
        folder: str | Path | None = None,
        callbacks: Sequence[Callable[[TrialEvent], Any]] = (),
        progress: bool = False,
        random_state: Any = None,
    ) -> None:
        self.time_budget = time_budget
        self.per_run_limit = per_run_limit
        self.memory_limit_mb = memory_limit_mb
        self.metric = metric
        self.policy = policy
        self.portfolio = portfolio
        self.search = search
        self.ensemble_size = ensemble_size
        self.ensemble_nbest = ensemble_nbest
        self.max_models = max_models
        self.max_trials = max_trials
        self.include = include
        self.categorical = categorical
        self.n_jobs = n_jobs
        self.isolation = isolation
        self.folder = folder
        self.callbacks = callbacks
        self.progress = progress
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.non_deterministic = self.max_trials is None
        return tags

    # Fitting ---------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, *, groups: Any = None, sample_weight: Any = None) -> Self:
        """Search for ``time_budget`` seconds and build the ensemble.

        Parameters
        ----------
        X
            ``(rows, columns)``: a pandas or Arrow table with numbers, text, categories, dates and gaps, a numeric
            array, or a sparse matrix.
        y
            ``(rows,)``.
        groups
            ``(rows,)``: rows of one group are never on both sides of a split.
        sample_weight
            ``(rows,)``: enters fits, scores and the ensemble.

        Raises
        ------
        InvalidInput
            If a setting or the data cannot be used; the sentence says which and why.
        """
        self._start = time.monotonic()
        self._check_settings()
        try:
            seed = int(check_random_state(self.random_state).randint(2**31))
        except ValueError as error:
            raise InvalidInput(f"random_state must be a whole number or a RandomState: {error}.") from error
        rows, target, weight, groups = self._read(X, y, groups, sample_weight)
        # Processes come up while the policy is chosen.
        crew = _Crew(self._workers(), float(self.memory_limit_mb), self.isolation)
        try:
            self._fit(crew, rows, target, weight, groups, seed)
        finally:
            crew.close()
        return self

    def _fit(self, crew: _Crew, rows: TableRows, target: NDArray, weight: Any, groups: Any, seed: int) -> None:
        self._metric = metric_of(self._default_metric if self.metric is None else self.metric, self._kind)
        self._choose_policy(len(rows))
        copies = None if groups is not None else _copies(rows)
        if copies is not None and len(np.unique(copies)) < 20:
            copies = None  # a few points that repeat are no copies
        splits = self._split(target, groups, copies, seed)
        self._space = pipeline_space(self._kind, sparse=sp.issparse(rows.numbers))
        if self.include is not None:
            self._space = self._space.only(list(self.include))
        self._problem = FitProblem(self._kind, rows, target, self._n_classes, splits, weight, seed)
        scored = validation_rows(splits)
        self._y_valid, self._w_valid = target[scored], None if weight is None else weight[scored]
        if self._w_valid is not None and self._w_valid.sum() == 0:
            raise InvalidInput(
                "all rows that were held out have the weight 0, so nothing can be scored; leave out rows of weight 0."
            )
        self._dummy = _dummy(self._kind, target, weight, self._n_classes)
        baseline = np.tile(self._dummy, (len(scored), 1))
        self.baseline_loss_ = self._metric.loss(self._y_valid, baseline, self._w_valid)
        self._trials: list[PipelineTrial] = []
        self.trajectory_: list[tuple[float, float]] = []
        self.interrupted_ = False
        store = self._open_folder(rows, target, weight, groups, seed)
        try:
            crew.give(self._problem)
            surrogate = SmacImprovement(self._space) if self.search == "smac" else None
            self._search(crew, SearchPlan(self._space, self.policy_, self._first(), seed, surrogate), store)
        except KeyboardInterrupt:
            self.interrupted_ = True
            warnings.warn("the fit was interrupted; the model is what was found so far.", stacklevel=2)
        self._build_ensemble()
        self._rebuild_missing()
        self.fit_seconds_ = time.monotonic() - self._start
        enough = self.max_trials is not None and len(self._trials) >= self.max_trials
        self.repeatable_ = enough and all(t.fate in ("ok", "crash") for t in self._trials)
        spent = sum(t.seconds for t in self._trials)
        self.useful_share_ = spent / max(self.fit_seconds_, 1e-9) / self._workers()
        del self._problem

    def _check_settings(self) -> None:
        budget = checks.positive("time_budget", self.time_budget)
        if self.per_run_limit is not None and checks.positive("per_run_limit", self.per_run_limit) > budget:
            raise InvalidInput(
                f"per_run_limit={self.per_run_limit:g} is more than time_budget={budget:g}; make it smaller."
            )
        checks.positive("memory_limit_mb", self.memory_limit_mb)
        for name in ("ensemble_size", "ensemble_nbest", "max_models"):
            checks.integer(name, getattr(self, name), least=1)
        if self.max_trials is not None:
            checks.integer("max_trials", self.max_trials, least=1)
        checks.choice("isolation", self.isolation, ("process", "none"))
        if checks.choice("search", self.search, ("forest", "smac")) == "smac" and not has_smac():
            raise MissingDependency("search='smac' needs SMAC: pip install 'mlcollage[automl]'.")
        if self.n_jobs != -1:
            checks.integer("n_jobs", self.n_jobs, least=1)
        if not (self.policy == "auto" or isinstance(self.policy, Policy)):
            raise InvalidInput(f"policy must be 'auto' or a Policy, such as Policy('cv', 5), not {self.policy!r}.")
        for name in ("include", "categorical", "callbacks", "portfolio"):
            value = getattr(self, name)
            text = isinstance(value, str) and name != "portfolio"
            if text or callable(value) or isinstance(value, dict):
                raise InvalidInput(f"{name} must be a list, such as {name}=[...], not {value!r}.")
        for callback in self.callbacks:
            if not callable(callback):
                raise InvalidInput(f"callbacks must be functions of a TrialEvent, not {callback!r}.")

    def _read(self, X: Any, y: Any, groups: Any, weight: Any) -> tuple[TableRows, NDArray, Any, Any]:
        if y is None:
            raise InvalidInput("This estimator requires y to be passed, but the target y is None.")
        self.notes_: list[str] = []
        X = self._validated(X, reset=True)
        y = _one_column("y", y)
        check_consistent_length(X, y)
        if len(y) < 4:
            raise InvalidInput(
                f"there are {len(y)} rows (n_samples={len(y)}); a fit needs 4 at least. A single sample is too few."
            )
        self._coder = TableCoder(self.categorical).fit(X)
        self.notes_ += self._coder.notes_
        rows = self._coder.transform(X)
        target = self._encode(y)
        self.notes_ += suspicious_columns(rows, y, self._coder)
        megabytes = rows.nbytes / 2**20
        if 3 * megabytes > self.memory_limit_mb:
            raise InvalidInput(
                f"X takes {megabytes:,.0f} MB and memory_limit_mb is {self.memory_limit_mb:,.0f}; a fit needs three "
                "times X at least. Raise the limit, or give fewer rows."
            )
        allowed, workers = memory_limit_of_container(), 1 if self.isolation == "none" else self._workers()
        if allowed is not None and workers * self.memory_limit_mb > allowed:
            self.notes_.append(
                f"the container has {allowed:,.0f} MB for all, and {workers} processes may take "
                f"{self.memory_limit_mb:,.0f} MB each; give a lower memory_limit_mb."
            )
        if weight is not None:
            weight = _weights(weight, len(y))
            if self._kind == "classification":
                share = np.bincount(target, weights=weight, minlength=self._n_classes)
                if (idle := self.classes_[share == 0]).size:
                    self.notes_.append(f"classes whose rows all have the weight 0: {', '.join(map(str, idle[:10]))}.")
        if groups is not None:
            found = _one_column("groups", groups)
            if len(found) != len(y):
                raise InvalidInput(f"groups has {len(found)} entries and X {len(y)} rows; give one for each row.")
            if gone := int(pd.isna(found).sum()):
                raise InvalidInput(f"groups has no value in {gone} rows; give each row a group of its own at least.")
            groups = np.unique(found.astype(str), return_inverse=True)[1]
        return rows, target, weight, groups

    def _validated(self, X: Any, *, reset: bool) -> Any:
        """scikit-learn's checks of shape and names; values are read by the coder."""
        if sp.issparse(X):
            return validate_data(self, X, reset=reset, accept_sparse="csr", dtype=np.float64)
        if hasattr(X, "columns") or hasattr(X, "column_names"):
            if reset:
                names = [str(n) for n in getattr(X, "columns", getattr(X, "column_names", ()))]
                self.n_features_in_ = len(names)
                self.__dict__.pop("feature_names_in_", None)
                if all(isinstance(n, str) for n in getattr(X, "columns", names)):
                    self.feature_names_in_ = np.asarray(names, object)
            return X
        kinds: dict[str, Any] = {"ensure_all_finite": "allow-nan", "reset": reset, "ensure_min_features": 1}
        if np.asarray(X).dtype.kind in "OUS":
            return validate_data(self, X, dtype=object, **{**kinds, "ensure_all_finite": False})
        return validate_data(self, X, dtype=np.float64, **kinds)

    def _choose_policy(self, n: int) -> None:
        self.policy_is_fallback_ = False
        if isinstance(self.policy, Policy):
            self.policy_ = self.policy
            return
        if self._kind == "regression" or self.time_budget < _LEAST_FOR_SELECTOR or self.max_trials is not None:
            self.policy_ = FIXED_ORDER[1]
            return
        size = [[self.n_features_in_, n]]
        selector, data = official_selector(), official_selector_data()
        self.policy_is_fallback_ = bool(selector.is_fallback(size)[0])
        self.policy_ = data.policies[int(selector.predict(size)[0])]

    def _split(self, target: NDArray, groups: Any, copies: Any, seed: int) -> Any:
        if copies is not None and len(np.unique(copies)) < len(copies):
            self.notes_.append(
                f"{len(copies) - len(np.unique(copies))} rows are copies of others; copies stay on one side."
            )
        chosen = self.policy_
        found = len(np.unique(groups)) if groups is not None else len(target if copies is None else np.unique(copies))
        if self.policy == "auto" and chosen.evaluation == "cv" and found < chosen.folds:
            chosen = self.policy_ = FIXED_ORDER[1]
            self.notes_.append(f"there are too few rows or groups for the chosen folds; the policy is {chosen}.")
        return make_splits(chosen, target, self._kind, groups=groups, copies=copies, seed=seed)

    def _first(self) -> list[Config]:
        """The portfolio, in order."""
        given = self.portfolio
        if given is None:
            return [self._space.default()]
        if isinstance(given, str):
            checks.choice("portfolio", given, ("default", "official"))
            if self._kind == "regression":
                configs = _for_regression(default_portfolio(self.policy_))
            else:
                configs = list(
                    default_portfolio(self.policy_) if given == "default" else official_portfolio(self.policy_).configs
                )
            allowed = self._space["learner"].choices
            fitting = [c for c in configs if c["learner"] in allowed]
            kept = [{k: v for k, v in c.items() if self._space_has(k, v)} for c in fitting]
            return [self._space._complete(c) for c in kept] or [self._space.default()]
        configs = [self._space.check(c, f"pipeline {i} of the portfolio") for i, c in enumerate(given)]
        for i, config in enumerate(configs):
            if config in configs[:i]:
                raise InvalidInput(
                    f"pipelines {configs.index(config)} and {i} of the portfolio are the same; drop one."
                )
        return configs

    def _space_has(self, key: str, value: Any) -> bool:
        return any(p.name == key and p.holds(value) for p in self._space.parameters)

    def _open_folder(self, rows: TableRows, target: NDArray, weight: Any, groups: Any, seed: int) -> RunFolder | None:
        if self.folder is None:
            return None
        import sklearn

        numbers = rows.numbers.toarray() if sp.issparse(rows.numbers) else rows.numbers
        settings = {
            "metric": self._metric.name,
            "metric_code": self._metric.code,
            "policy": str(self.policy_),
            "space": [p.name for p in self._space.parameters],
        }
        if self.search != "forest":
            settings["search"] = self.search
        versions = {"scikit-learn": sklearn.__version__, "numpy": np.__version__}
        nothing = np.empty(0)
        key = key_of(
            numbers=numbers, codes=rows.codes, y=target, weight=nothing if weight is None else weight,
            groups=nothing if groups is None else groups, seed=seed, portfolio=self._first(), **settings, **versions,
        )  # fmt: skip
        store = RunFolder(self.folder, key, {**settings, **versions, "rows": len(target)})
        self._trials = store.load()
        self.notes_ += store.notes
        return store

    # The search ------------------------------------------------------------------------------------------------------

    def _workers(self) -> int:
        return available_cores() if self.n_jobs == -1 else int(self.n_jobs)

    def _left(self) -> float:
        """Seconds that fits may still take; a fiftieth of the budget is kept for the ensemble."""
        return self._start + 0.98 * float(self.time_budget) - time.monotonic()

    def _search(self, crew: _Crew, plan: SearchPlan, store: RunFolder | None) -> None:
        limit = float(self.per_run_limit) if self.per_run_limit is not None else float(self.time_budget) / 10
        most = np.inf if self.max_trials is None else self.max_trials
        show = _Progress(float(self.time_budget)) if self.progress else None
        try:
            while len(self._trials) < most and self._left() > 0:
                count = int(min(crew.size, most - len(self._trials)))
                proposals = plan.next(self._trials, count)
                crew.wait_ready(self._left())
                if self._left() <= 0:
                    break
                numbered = [(len(self._trials) + i, p) for i, p in enumerate(proposals)]
                for trial in crew.run(numbered, min(limit, self._left()), self._scored):
                    trial.ended = time.monotonic() - self._start
                    self._trials.append(trial)
                    store = self._written(store, trial)
                    self._keep_best_models()
                    best = self.best_trial_
                    self.trajectory_.append(
                        (trial.ended, self.baseline_loss_ if best is None else float(best.loss or 0))
                    )
                    if show is not None:
                        show.update(trial.ended, len(self._trials), best)
                    if self._told(TrialEvent(trial, best, trial.ended, self)):
                        return
        finally:
            if show is not None:
                show.close()

    def _written(self, store: RunFolder | None, trial: PipelineTrial) -> RunFolder | None:
        """Write a trial down; where that fails (the disk is full, say), go on without a history, with a warning."""
        if store is not None:
            try:
                store.add(trial)
            except StoreError as error:
                note = f"{error} The fit goes on; it cannot be resumed after this pipeline."
                self.notes_.append(note)
                warnings.warn(note, stacklevel=5)
                return None
        return store

    def _told(self, event: TrialEvent) -> bool:
        stop = False
        for callback in self.callbacks:
            with users_code("a callback of the estimator"):
                stop = callback(event) is True or stop
        return stop

    def _scored(self, trial: PipelineTrial, message: StepMessage) -> None:
        """Take a finished step into a trial."""
        with np.errstate(all="ignore"):
            loss = self._metric.loss(self._y_valid, message.prediction, self._w_valid)
        if not np.isfinite(loss):
            trial.fate, trial.message = "crash", "its loss is not a finite number"
            return
        trial.loss, trial.iterations = float(loss), message.iterations
        trial.prediction, trial.models = message.prediction, message.models

    @property
    def best_trial_(self) -> PipelineTrial | None:
        """The trial with the lowest loss, the earliest one at a tie; None if there is none."""
        scored = [t for t in self._trials if t.loss is not None]
        return min(scored, key=lambda t: float(t.loss or 0)) if scored else None

    def _keep_best_models(self) -> None:
        kept = sorted((t for t in self._trials if t.models is not None), key=lambda t: float(t.loss or 0))
        for trial in kept[self.max_models :]:
            trial.models = None

    # The ensemble ----------------------------------------------------------------------------------------------------

    def _build_ensemble(self) -> None:
        pool: dict[str, PipelineTrial] = {}
        for t in self._trials:  # of one pipeline the trial with the most iterations
            if t.loss is not None and t.loss < self.baseline_loss_ and t.prediction is not None:
                pool[t.name] = t
        best = sorted(pool.values(), key=lambda t: float(t.loss or 0))[: min(self.ensemble_nbest, self.max_models)]
        self.ensemble_: list[tuple[float, PipelineTrial]] = []
        if not best:
            failed = "; ".join(f"{t.config['learner']}: {t.fate} {t.message}".strip() for t in self._trials[:5])
            if not self._trials and not self.interrupted_:
                failed = (
                    "The processes that fit were not up in time, or all was done before: give a larger time_budget."
                )
            warnings.warn(
                f"no pipeline beat a constant prediction within {float(self.time_budget):g} s, so the model is the "
                f"constant. {len(self._trials)} were tried. {failed}",
                stacklevel=3,
            )
            return
        predictions = np.stack([np.asarray(t.prediction) for t in best])
        selection = EnsembleSelection(self.ensemble_size, self._metric, random_state=0)
        selection.fit(predictions, self._y_valid, self._w_valid)
        self.ensemble_ = [(float(w), t) for w, t in zip(selection.weights_, best, strict=True) if w > 0]
        self.ensemble_loss_ = float(selection.trajectory_[-1])

    def _rebuild_missing(self) -> None:
        """Fit members of the ensemble and the best pipeline again as they were, where models are not in memory."""
        p, best = self._problem, self.best_trial_
        kept = [t for _, t in self.ensemble_] + ([best] if best is not None and self.ensemble_ else [])
        for trial in kept:
            if trial.models is None:
                for step in evaluate_steps(
                    trial.config, p.kind, p.rows, p.y, p.splits, n_classes=p.n_classes, sample_weight=p.weight,
                    iterations=trial.iterations, seed=p.seed,
                ):  # fmt: skip
                    trial.models = [m.frozen() for m in step.models]
        members = {id(t) for t in kept}
        for trial in self._trials:
            if id(trial) not in members:
                trial.models = None

    def refit(self, X: Any, y: Any, *, sample_weight: Any = None) -> Self:
        """Fit the members of the ensemble on all rows, with the iterations that they had; weights stay.

        Validation scores are those of the models before.
        """
        check_is_fitted(self, "ensemble_")
        rows = self._coder.transform(self._validated(X, reset=False))
        target = self._encode_again(_one_column("y", y))
        check_consistent_length(rows.codes, target)
        weight = None if sample_weight is None else _weights(sample_weight, len(target))
        for _, trial in self.ensemble_:
            model = IterativePipeline(trial.config, self._kind, self._n_classes, 0).start(rows, target, weight)
            for k in _steps_to(trial.iterations):
                model.advance(k)
            trial.models = [model.frozen()]
        self.refitted_ = True
        return self

    def _predicted(self, X: Any) -> FloatArray:
        if not hasattr(self, "_dummy"):
            check_is_fitted(self, "ensemble_")
        rows = self._coder.transform(self._validated(X, reset=False))
        if not len(rows):
            raise InvalidInput("X has no rows (0 sample(s)); give at least one to predict.")
        members = getattr(self, "ensemble_", None)
        if members is None or not members:
            best = self.best_trial_ if members is None else None  # during a fit: the best so far
            if best is None or best.models is None:
                return np.tile(self._dummy, (len(rows), 1))
            members = [(1.0, best)]
        total = sum(w * np.mean([m.predict(rows) for m in t.models], axis=0) for w, t in members)
        return np.asarray(total, np.float64)

    # Reports ---------------------------------------------------------------------------------------------------------

    def leaderboard(self) -> pd.DataFrame:
        """One row for each pipeline that has a loss, the best first; ``weight`` is that in the ensemble."""
        check_is_fitted(self, "ensemble_")
        weights = {id(t): w for w, t in self.ensemble_}
        table = pd.DataFrame(
            [
                {
                    "number": t.number,
                    "learner": t.config["learner"],
                    "loss": t.loss,
                    "weight": weights.get(id(t), 0.0),
                    "origin": t.origin,
                    "budget": t.budget,
                    "iterations": t.iterations,
                    "seconds": t.seconds,
                    "fate": t.fate,
                }
                for t in self._trials
                if t.loss is not None
            ],
            columns=["number", "learner", "loss", "weight", "origin", "budget", "iterations", "seconds", "fate"],
        )
        return table.sort_values("loss", kind="stable", ignore_index=True)

    @property
    def cv_results_(self) -> dict[str, Any]:
        """All trials as scikit-learn's searches give them: arrays by name."""
        check_is_fitted(self, "ensemble_")
        losses = np.array([np.nan if t.loss is None else t.loss for t in self._trials])
        return {
            "params": [dict(t.config) for t in self._trials],
            "mean_test_score": self._metric.optimum - losses,
            "mean_fit_time": np.array([t.seconds for t in self._trials]),
            "rank_test_score": pd.Series(losses).rank(method="min", na_option="bottom").to_numpy().astype(int),
            "status": [t.fate for t in self._trials],
            "budget": np.array([t.budget for t in self._trials]),
        }

    def report(self) -> str:
        """What was done, in plain words."""
        check_is_fitted(self, "ensemble_")
        best, fates = self.best_trial_, pd.Series([t.fate for t in self._trials]).value_counts()
        lines = [
            f"{len(self._trials)} pipelines in {self.fit_seconds_:.1f} s, {100 * self.useful_share_:.0f}% in fits: "
            + ", ".join(f"{n} {fate}" for fate, n in fates.items()),
            f"policy: {self.policy_}{' (larger than every known task)' if self.policy_is_fallback_ else ''}",
            f"metric: {self._metric.name}; loss of a constant prediction {self.baseline_loss_:.4f}",
        ]
        if best is not None and best.loss is not None:
            error = (
                f" ± {np.sqrt(max(best.loss * (1 - best.loss), 0) / len(self._y_valid)):.4f}"
                if self._kind == "classification"
                else ""
            )
            lines.append(
                f"best pipeline: {best.config['learner']}, loss {best.loss:.4f}{error} on {len(self._y_valid)} rows"
            )
        if self.ensemble_:
            lines.append(
                f"ensemble of {len(self.ensemble_)} pipelines, loss {self.ensemble_loss_:.4f} on the rows that chose it"
            )
        first = next((t for t in self._trials if t.fate == "crash"), None)
        if cut := sum(t.fate == "time" for t in self._trials):
            lines.append(
                f"{cut} fits were ended by a limit of time; what they reached depends on how fast the machine is, so a "
                "repetition may differ"
            )
        if first is not None:
            lines.append(f"first crash: {first.config['learner']}: {first.message}")
        if sys.platform != "linux":
            lines.append("memory is limited on Linux only")
        return "\n".join([*lines, *self.notes_])

    # Of the two kinds ------------------------------------------------------------------------------------------------

    _n_classes = 0

    def _encode(self, y: NDArray) -> NDArray:
        raise NotImplementedError

    def _encode_again(self, y: NDArray) -> NDArray:
        raise NotImplementedError


class AutoClassifier(ClassifierMixin, _Auto):
    r"""Finds a classifier for a table within a budget of time and memory.

    Pipelines of a learned portfolio are tried first, then a search goes on, every second proposal at random. Each fit
    runs in a process of its own, which is ended when it passes its limits, and is scored after 2, 4, 8, ... iterations,
    so that a fit that was ended still counts. The model is an ensemble of what was found.

    Parameters
    ----------
    time_budget
        Seconds for the whole fit.
    per_run_limit
        Seconds for one pipeline; a tenth of the budget by default.
    memory_limit_mb
        Megabytes for one pipeline, beyond what the libraries take (on Linux).
    metric
        ``"balanced_accuracy"`` by default, ``"accuracy"``, ``"log_loss"``, ``"roc_auc"``, a :class:`ScoreMetric`, or a
        function ``loss(y, probabilities, weight)`` of class numbers.
    policy
        ``"auto"``: picked from the numbers of rows and columns by the official selector; hold-out for budgets below 30
        seconds. Or a :class:`Policy`.
    portfolio
        ``"default"``: learned from the tensor that comes with the package; ``"official"``: the authors'; a list of
        configurations, such as ``PortfolioBuilder(...).fit(tensor).configs_``; None: only the default pipeline.
    search
        Who proposes after the portfolio: ``"forest"``, the light search of this package; ``"smac"``, SMAC's forest and
        maximizer (``pip install 'mlcollage[automl]'``). A proposal of SMAC takes about ten times as long, a second and
        more, so it is for budgets of many minutes.
    ensemble_size, ensemble_nbest
        Steps of the ensemble selection, and how many of the best pipelines it chooses from.
    max_models
        How many fitted pipelines are kept in memory.
    max_trials
        Number of pipelines, at most. With it and a seed a fit can be repeated exactly, unless a limit of time or memory
        ends one of the fits: ``repeatable_`` and :meth:`report` say whether one did. Give a generous ``per_run_limit``.
    include
        Names of learners; all by default.
    categorical
        Columns that hold categories although they hold numbers, by name or place.
    n_jobs
        Pipelines that are fitted at a time; -1: as many as there are processors for this process.
    isolation
        ``"process"``: hard limits. ``"none"``: everything in this process; time is looked at between steps only, and
        memory is not limited.
    folder
        Where the history is kept. A fit that was killed goes on from it; a folder of other data or settings is refused.
    callbacks
        Called with a :class:`TrialEvent` after each pipeline; one that returns True ends the search.
    progress
        Show a bar with the best loss so far.
    random_state
        Seeds splits, learners and the search.

    Attributes
    ----------
    classes_ : ndarray
        Labels as they were given.
    policy_ : Policy
        How pipelines were compared.
    ensemble_ : list of (weight, PipelineTrial)
        Members.
    trajectory_ : list of (seconds, loss)
        Best validation loss over time.
    cv_results_, best_trial_
        All trials, and the best one.
    notes_ : list of str
        What a user should know of the data.
    baseline_loss_, ensemble_loss_, useful_share_, fit_seconds_
        Loss of a constant prediction, of the ensemble on the rows that chose it; share of the time that went into fits.
    repeatable_ : bool
        Whether the same seed and data give the same model: ``max_trials`` was reached, and no limit ended a fit.
    n_features_in_, feature_names_in_
        As every estimator has them.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> model = AutoClassifier(30, max_trials=3, isolation="none", random_state=0).fit(X[::2], y[::2])
    >>> bool(model.score(X[1::2], y[1::2]) > 0.9), len(model.leaderboard())
    (True, 3)
    """

    _kind: Kind = "classification"
    _default_metric = "balanced_accuracy"

    def _encode(self, y: NDArray) -> NDArray:
        if (gone := int(pd.isna(y).sum())) > 0:
            raise InvalidInput(f"Input y contains NaN: {gone} labels are missing; drop their rows.")
        try:
            if y.dtype.kind in "fc" and not np.isfinite(y).all():
                raise InvalidInput(f"Input y contains infinity in {int((~np.isfinite(y)).sum())} rows; drop them.")
            check_classification_targets(y)
            np.unique(y)
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            kinds = sorted({type(v).__name__ for v in y}) if y.dtype == object else []
            told = (
                f"labels are of the types {', '.join(kinds)}; give them one type, such as text."
                if kinds
                else str(error)
            )
            raise InvalidInput(told if "Unknown label type" in told else f"Unknown label type: {told}") from error
        self.classes_, code, counts = np.unique(y, return_inverse=True, return_counts=True)
        self._n_classes = len(self.classes_)
        if self._n_classes < 2:
            raise InvalidInput(f"y has only one class, {self.classes_[0]!s}; a classifier needs two at least.")
        if counts.max() == 1:
            raise InvalidInput(
                f"each of the {len(y)} rows has a class of its own; some class needs two rows. For numbers use "
                "AutoRegressor."
            )
        folds = 3 if self.policy == "auto" else self.policy.folds
        rare = [str(c) for c, n in zip(self.classes_, counts, strict=True) if n < folds]
        if rare:
            self.notes_.append(f"classes with fewer rows than folds: {', '.join(rare[:10])}.")
        return np.asarray(code, np.int64)

    def _encode_again(self, y: NDArray) -> NDArray:
        try:
            place = np.searchsorted(self.classes_, y)
        except TypeError as error:
            raise InvalidInput("y has labels of another type than at fit.") from error
        if (place >= self._n_classes).any() or (self.classes_[np.minimum(place, self._n_classes - 1)] != y).any():
            raise InvalidInput("y has classes that were not there at fit; fit again.")
        return np.asarray(place, np.int64)

    def predict_proba(self, X: Any) -> FloatArray:
        """Probabilities ``(rows, classes)``, in the order of ``classes_``."""
        return self._predicted(X)

    def predict(self, X: Any) -> NDArray:
        """Labels ``(rows,)``, of the type that they were given in."""
        place = self._predicted(X).argmax(1)
        return self.classes_[place]


class AutoRegressor(RegressorMixin, _Auto):
    r"""Finds a regressor for a table within a budget of time and memory.

    As :class:`AutoClassifier`, with the regressors of the same learners. The paper is about classification; the default
    portfolio is that of the classifier, with what has a meaning here.

    Parameters
    ----------
    time_budget, per_run_limit, memory_limit_mb, max_trials, policy, portfolio, search, ensemble_size, ensemble_nbest
        As in :class:`AutoClassifier`; ``policy="auto"`` is hold-out.
    max_models, include, categorical, n_jobs, isolation, folder, callbacks, progress, random_state
        As in :class:`AutoClassifier`.
    metric
        ``"r2"`` by default, ``"mse"``, ``"mae"``, a :class:`ScoreMetric`, or a function ``loss(y, prediction, weight)``
        with predictions ``(rows, 1)``.

    Attributes
    ----------
    policy_, ensemble_, trajectory_, cv_results_, best_trial_, notes_, baseline_loss_, ensemble_loss_, useful_share_
    repeatable_
        As in :class:`AutoClassifier`.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = AutoRegressor(30, max_trials=3, isolation="none", random_state=0).fit(X[::2], y[::2])
    >>> bool(model.score(X[1::2], y[1::2]) > 0.3)
    True
    """

    _kind: Kind = "regression"
    _default_metric = "r2"

    def _encode(self, y: NDArray) -> NDArray:
        try:
            found = np.asarray(y, np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidInput("y must be numbers; for labels use AutoClassifier.") from error
        if not np.isfinite(found).all():
            gone = int((~np.isfinite(found)).sum())
            raise InvalidInput(f"Input y contains NaN or infinity in {gone} rows; drop them.")
        return found

    _encode_again = _encode

    def predict(self, X: Any) -> FloatArray:
        """Values ``(rows,)``."""
        return self._predicted(X)[:, 0]


class _Crew:
    """The processes, or this one, that fit pipelines."""

    def __init__(self, size: int, memory: float, isolation: str) -> None:
        self.memory = memory
        own = isolation == "none" or not hasattr(os, "killpg")
        if own and isolation != "none":
            warnings.warn("this system has no hard limits; fits run in this process.", stacklevel=4)
        self.size = 1 if own else size
        self.workers: list[Worker] = [] if own else [Worker(memory) for _ in range(self.size)]

    def give(self, problem: FitProblem) -> None:
        self.problem = problem
        for worker in self.workers:
            worker.give(problem)

    def wait_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for i, worker in enumerate(self.workers):
            if not worker.alive:
                self.workers[i] = worker = Worker(self.memory)
                worker.give(self.problem)
            worker.wait_ready(end - time.monotonic())

    def run(
        self,
        proposals: list[tuple[int, Proposal]],
        seconds: float,
        scored: Callable[[PipelineTrial, StepMessage], None],
    ) -> list[PipelineTrial]:
        def one(place: int) -> PipelineTrial:
            number, p = proposals[place]
            trial, start = PipelineTrial(number, p.config, p.origin, p.budget), time.monotonic()
            source = (
                self.workers[place].run(p.config, p.budget, seconds)
                if self.workers
                else run_steps(self.problem, p.config, p.budget, seconds)
            )
            for message in source:
                if message.what == "step":
                    scored(trial, message)
                elif message.what != "end":
                    trial.fate, trial.message = message.what, message.text  # type: ignore[assignment]
            trial.seconds = time.monotonic() - start
            return trial

        if len(proposals) == 1:
            return [one(0)]
        with ThreadPoolExecutor(len(proposals)) as pool:
            return list(pool.map(one, range(len(proposals))))

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.kill()


class _Progress:
    """A bar with the best loss so far."""

    def __init__(self, seconds: float) -> None:
        from rich.progress import Progress

        self.bar = Progress(transient=True)
        self.task = self.bar.add_task("starting", total=seconds)
        self.bar.start()

    def update(self, seconds: float, count: int, best: PipelineTrial | None) -> None:
        found = "nothing yet" if best is None else f"best loss {best.loss:.4f} ({best.config['learner']})"
        self.bar.update(self.task, completed=seconds, description=f"{count} pipelines, {found}")

    def close(self) -> None:
        self.bar.stop()


def _one_column(name: str, values: Any) -> NDArray:
    """A user's column as an array of the type that it has: nullable and Arrow columns without gaps keep theirs."""
    if sp.issparse(values):
        raise InvalidInput(f"Sparse {name} is not supported; give one value for each row: {name}.toarray().ravel().")
    if hasattr(values, "to_pandas"):
        values = values.to_pandas()
    kind = getattr(values, "dtype", None)
    if isinstance(values, pd.Series) and isinstance(kind, pd.api.extensions.ExtensionDtype) and not values.isna().any():
        if pd.api.types.is_bool_dtype(kind):
            values = values.to_numpy(bool)
        elif pd.api.types.is_integer_dtype(kind) or pd.api.types.is_float_dtype(kind):
            plain = getattr(kind, "numpy_dtype", None)
            values = values.to_numpy(plain) if plain is not None else values.to_numpy()
    try:
        return np.asarray(column_or_1d(values, warn=name == "y"))
    except (TypeError, ValueError) as error:
        shape = np.shape(values)
        more = "; for one-hot labels give y.argmax(1)" if name == "y" and len(shape) == 2 else ""
        raise InvalidInput(f"{name} must be one value for each row, not of shape {shape}{more}. ({error})") from error


def _weights(given: Any, n: int) -> NDArray[np.float64]:
    """Weights of rows, checked."""
    try:
        weight = np.asarray(_one_column("sample_weight", given), np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput("sample_weight must be finite numbers of at least 0.") from error
    if len(weight) != n:
        raise InvalidInput(f"sample_weight has {len(weight)} entries and X {n} rows; give one for each row.")
    with np.errstate(over="ignore"):
        if not np.isfinite(weight).all() or (weight < 0).any() or not 0 < weight.sum() < np.inf:
            raise InvalidInput(
                "sample_weight must be finite numbers of at least 0; they must not all be zero, and their sum must be "
                "finite."
            )
    return weight


def _steps_to(iterations: int) -> list[int]:
    steps = [2]
    while steps[-1] < iterations:
        steps.append(min(2 * steps[-1], iterations))
    return steps


def _dummy(kind: Kind, y: NDArray, weight: Any, n_classes: int) -> FloatArray:
    """A constant prediction (outputs,): shares of the classes, or the mean."""
    if kind == "regression":
        return np.array([np.average(y, weights=weight)])
    return np.bincount(y, weights=weight, minlength=n_classes) / (len(y) if weight is None else weight.sum())


def _copies(rows: TableRows) -> NDArray[np.int64] | None:
    """A number for each row, the same for exact copies."""
    if sp.issparse(rows.numbers):
        return None
    table = pd.DataFrame(np.column_stack([rows.numbers, rows.codes]))
    return np.unique(pd.util.hash_pandas_object(table, index=False).to_numpy(), return_inverse=True)[1]


def _for_regression(configs: Sequence[Config]) -> list[Config]:
    """Pipelines of a classifier, with what has a meaning for a regressor."""
    space = pipeline_space("regression")
    found: list[Config] = []
    for config in configs:
        if config["learner"] in space["learner"].choices:
            kept = {k: v for k, v in config.items() if any(p.name == k and p.holds(v) for p in space.parameters)}
            complete = space._complete(kept)
            if complete not in found:
                found.append(complete)
    return found
