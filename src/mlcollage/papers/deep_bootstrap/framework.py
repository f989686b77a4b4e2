"""The Deep Bootstrap framework: one training procedure, run in the Real and in the Ideal World."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage.data.world import DataWorld
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.init import build
from mlcollage.papers.deep_bootstrap._training import (
    Augment,
    Coupling,
    Lane,
    Loss,
    SeedData,
    batches,
    check_batch_norm,
    check_labels,
    check_outputs,
    log_steps,
    loss_function,
    measure,
)
from mlcollage.papers.deep_bootstrap.result import COLUMNS, RULES, BootstrapResult, Rule
from mlcollage.papers.deep_bootstrap.worlds import FiniteAsIdeal
from mlcollage.train.loop import predict, steps
from mlcollage.train.replicas import Replicas, stackable
from mlcollage.train.schedules import Schedule, cosine

__all__ = ["DeepBootstrap"]

OptimizerFn = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Progress = Callable[[int, int], None]
_PAPER_SGD = partial(torch.optim.SGD, lr=0.1)


@dataclass
class DeepBootstrap:
    r"""Train the same network in the Real World of n samples and in the Ideal World of fresh samples.

    For a distribution D, an architecture with optimizer and schedule F, a sample size n and t steps of batch b, the
    Real World draws :math:`S \sim D^n` once and reuses it over epochs (:math:`f_t`), the Ideal World draws every batch
    fresh (:math:`f_t^{\mathrm{iid}}`). Then

    .. math::
        \mathrm{TestError}(f_t) = \mathrm{TestError}(f_t^{\mathrm{iid}}) + \varepsilon(n, D, F, t)

    and the paper's claim is that the bootstrap error :math:`\varepsilon` is small for all t up to the time T(n) at
    which the Real World has fitted its set. The Ideal World does not depend on n, so one ideal run serves every n.

    The worlds of a seed share all random numbers they can: initialization, test block, schedule, dropout and
    augmentation draws, and the first epoch of data (see ``coupling``), which makes their difference far less noisy
    than either curve.

    Parameters
    ----------
    model_fn
        Makes a fresh network that maps ``(b, *world.shape)`` to ``(b, world.num_classes)`` logits. BatchNorm is
        evaluated with its running statistics, as in the paper.
    world
        Where the data come from: :class:`~mlcollage.data.glyphs.GlyphWorld`, ``MNIST1D``, a :class:`FiniteAsIdeal`,
        or any :class:`~mlcollage.data.world.DataWorld`. A world with a method ``for_seed(seed)`` gives each seed a
        stream of its own; of other worlds each seed takes a section of the one stream. ``num_classes=0`` makes it a
        regression: targets are floats and the loss is the only metric. Label noise is the world's business.
    n
        Sample sizes of the Real Worlds.
    steps
        Updates t in every world; at least enough for every n to be seen once.
    batch_size
        Samples b of an update, in every world.
    optimizer_fn
        From parameters to a torch optimizer. Default: the paper's SGD with learning rate 0.1, no momentum and no
        weight decay.
    schedule
        Factor on the learning rate at 0-based step, ``"cosine"`` (default, to 0 over ``steps``) or None for a
        constant rate. One schedule: it must not depend on the world or on n, else the comparison means nothing.
    loss
        ``"cross_entropy"`` (default), ``"mse"`` (on one-hot labels; gives no soft-error) or a function of
        ``(outputs, targets)`` that returns a scalar.
    transform
        Applied to every batch of inputs, train and test, after ``augment``: e.g. ``lambda x: 2 * x - 1`` for the
        paper's scaling of images in [0, 1] to [-1, 1]. None (default) leaves them as the world gives them.
    augment
        ``augment(x, generator)`` gives the batch to train on, in both worlds, with the same draws. Train and test
        metrics are measured without it.
    eval_at
        ``"log"`` (default): 24 logarithmically spaced steps and the start; an integer: so many; or the steps.
    stop
        None (default) trains every world for all steps; a rule (``"train_error"``, ``"train_loss"``) or a pair
        ``(rule, threshold)`` ends a Real World at the first evaluation where the rule holds.
    seeds
        Number of repetitions, or the seeds themselves.
    test_size
        Samples of the test block, one for all worlds and seeds.
    train_size
        Train metrics are measured on the first so many samples of the train set (all if there are fewer).
    coupling
        ``"stream"`` (default): the n samples are the first n of the seed's stream, in its order in the first epoch;
        the worlds are then one and the same run until a sample is used again. ``"independent"``: the samples are
        ``world.fixed(n, seed=seed)``, reshuffled from the start.
    stack
        Train the worlds and seeds as one stacked model: None (default) decides by model and device, True insists,
        False trains one after the other. The results agree to rounding.
    device
        ``"auto"`` (a GPU if there is one) or a torch device.

    Raises
    ------
    InvalidInput
        For settings that make the comparison meaningless or impossible, before anything is trained; and for a loss
        that is not finite, naming world, seed and step.

    References
    ----------
    Nakkiran, Neyshabur, Sedghi, "The Deep Bootstrap Framework: Good Online Learners are Good Offline Generalizers",
    ICLR 2021, arXiv:2010.08127, section 2.

    Examples
    --------
    >>> from mlcollage.data.glyphs import GlyphWorld
    >>> from mlcollage.nn.mlp import MLP
    >>> world = GlyphWorld.preset("easy16")
    >>> study = DeepBootstrap(lambda: MLP(world.shape, 10, widths=(32,)), world, n=(128, 512), steps=30,
    ...                       batch_size=32, seeds=2, test_size=200)
    >>> result = study.run()
    >>> result.gap("soft_error", at="end")[["n", "seed", "step"]].values.tolist()
    [[128.0, 0, 30], [128.0, 1, 30], [512.0, 0, 30], [512.0, 1, 30]]
    """

    model_fn: Callable[[], nn.Module]
    world: DataWorld
    _: KW_ONLY
    n: int | Sequence[int] = (1000, 4000)
    steps: int = 600
    batch_size: int = 64
    optimizer_fn: OptimizerFn = _PAPER_SGD
    schedule: Schedule | str | None = "cosine"
    loss: str | Loss = "cross_entropy"
    transform: Callable[[Tensor], Tensor] | None = None
    augment: Augment | None = None
    eval_at: str | int | Sequence[int] = "log"
    stop: Rule | tuple[Rule, float] | None = None
    seeds: int | Sequence[int] = 5
    test_size: int = 2000
    train_size: int = 2000
    coupling: Coupling = "stream"
    stack: bool | None = None
    device: str | torch.device = "auto"

    def __post_init__(self) -> None:
        if not callable(self.model_fn):
            raise InvalidInput(
                "model_fn must be a function that makes a fresh network, such as lambda: MLP(world.shape, 10)."
            )
        if not isinstance(self.world, DataWorld):
            raise InvalidInput(
                f"{type(self.world).__name__} is no data world: it needs batch(), fixed(), num_classes and shape; "
                "wrap a finite dataset in FiniteAsIdeal."
            )
        for name in ("steps", "batch_size", "test_size", "train_size"):
            _positive(name, getattr(self, name))
        self.n = tuple(sorted({_positive("n", v) for v in _as_tuple(self.n)}))
        self.seeds = tuple(range(_positive("seeds", self.seeds))) if isinstance(self.seeds, int) else tuple(self.seeds)
        if not self.n or not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InvalidInput(
                f"n={self.n} and seeds={self.seeds} must each hold at least one value, seeds different and "
                "not negative."
            )
        self._check_sizes()
        self._schedule = _as_schedule(self.schedule, self.steps)
        self._loss = loss_function(self.loss, self.world.num_classes)
        self._grid = _as_grid(self.eval_at, self.steps)
        self._stop = _as_stop(self.stop, self.world.num_classes)
        if self.coupling not in ("stream", "independent"):
            raise InvalidInput(f"coupling={self.coupling!r} is not known; use 'stream' or 'independent'.")

    def _check_sizes(self) -> None:
        n = cast(tuple[int, ...], self.n)
        if n[0] < self.batch_size:
            raise InvalidInput(
                f"n={n[0]} is less than one batch of {self.batch_size}; use a smaller batch_size or a larger n."
            )
        if n[-1] > self.steps * self.batch_size:
            raise InvalidInput(
                f"{self.steps} steps of batch {self.batch_size} see {self.steps * self.batch_size} samples, "
                "less than one epoch "
                f"of n={n[-1]}; use at least {-(-n[-1] // self.batch_size)} steps or a smaller n."
            )
        w = self.world
        if isinstance(w, FiniteAsIdeal) and w.past_one_pass == "raise" and self.steps * self.batch_size > w.stream_size:
            raise InvalidInput(
                f"the finite Ideal World has {w.stream_size} samples for {self.steps} steps of batch "
                f"{self.batch_size}, which need "
                f"{self.steps * self.batch_size}; use at most {w.stream_size // self.batch_size} steps, or "
                "past_one_pass='warn'."
            )

    # ---- running --------------------------------------------------------------------------------------------------

    def run(self, on_progress: Progress | None = None) -> BootstrapResult:
        """Train all worlds of all seeds.

        Parameters
        ----------
        on_progress
            Called as ``on_progress(done, total)`` with counts of updates, at every evaluation.

        Returns
        -------
        BootstrapResult
        """
        device = _as_device(self.device)
        n, seeds = cast(tuple[int, ...], self.n), cast(tuple[int, ...], self.seeds)
        test = self.world.fixed(self.test_size, split="test").tensors
        check_labels(test[1], self.world.num_classes)
        self._raw_test = test[0].to(device)
        self._test = (self._raw_test if self.transform is None else self.transform(self._raw_test), test[1].to(device))
        stacked = self._check_model(device)
        self._data: dict[int, SeedData] = {}
        progress = _Counter(on_progress, self.steps * len(seeds) * (1 + len(n)))
        rows: list[dict[str, Any]] = []
        if stacked:
            # With a stopping rule, groups that stop at about the same time, so that a group can end early.
            groups = [[Lane(k, s) for s in seeds for k in (None, *n)]]
            if self._stop is not None:
                groups = [[Lane(k, s) for s in seeds] for k in (None, *n)]
            for group in groups:
                rows += self._train_stacked(group, device, progress)
        else:
            for seed in seeds:
                for lane in (Lane(k, seed) for k in (None, *n)):
                    rows += self._train_alone(lane, device, progress)
                self._data.pop(seed)  # one seed's samples at a time
        self._data.clear()
        curves = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(
            ["world", "n", "seed", "split", "step"], ignore_index=True
        )
        return BootstrapResult(curves, self._settings(stacked, device))

    def _train_alone(self, lane: Lane, device: torch.device, progress: _Counter) -> list[dict[str, Any]]:
        data = self._seed_data(lane.seed, device)
        model = build(self.model_fn, lane.seed).to(device)
        optimizer = self.optimizer_fn(model.parameters())
        rows = self._evaluate(lane, 0, data, partial(predict, model))
        grid = set(self._grid)
        loop = steps(
            model,
            batches(data, lane, self.steps),
            optimizer,
            loss=self._loss,
            schedule=self._schedule,
            max_steps=self.steps,
            seed=lane.seed,
            check_every=1 if device.type == "cpu" else 50,
        )
        done = 0
        try:
            for step in loop:
                if step.number in grid:
                    new = self._evaluate(lane, step.number, data, partial(predict, model))
                    rows += new
                    progress.add(step.number - done)
                    done = step.number
                    if self._converged(new):
                        break
        except InvalidInput as reason:
            raise InvalidInput(f"in {lane}: {reason}") from reason
        progress.add(self.steps - done)
        return rows

    def _train_stacked(self, lanes: list[Lane], device: torch.device, progress: _Counter) -> list[dict[str, Any]]:
        data = [self._seed_data(lane.seed, device) for lane in lanes]
        # In a function, so that a class (torch.optim.Adam) keeps its default rate as it does for a single network.
        replicas = Replicas(
            self.model_fn, [lane.seed for lane in lanes], optimizer=lambda p: self.optimizer_fn(p), device=device
        )
        rows = self._evaluate_stacked(lanes, 0, data, replicas)
        grid, done, active = set(self._grid), 0, set(lanes)
        finite = torch.ones(len(lanes), dtype=torch.bool, device=device)
        for t in range(self.steps):
            xs, ys = zip(*(d.batch(lane, t) for d, lane in zip(data, lanes, strict=True)), strict=True)
            factor = 1.0 if self._schedule is None else float(self._schedule(t))
            losses = replicas.step(torch.stack(xs), torch.stack(ys), loss=self._loss, lr_factor=factor, in_dims=(0, 0))
            finite &= losses.isfinite()
            if t + 1 not in grid:
                continue
            if not bool(finite.all()):
                bad = lanes[int((~finite).nonzero()[0])]
                raise InvalidInput(f"in {bad}: the loss became not finite by step {t + 1}; lower the learning rate.")
            new = [
                r for r in self._evaluate_stacked(lanes, t + 1, data, replicas) if Lane(r["lane"], r["seed"]) in active
            ]
            rows += new
            active -= {Lane(r["lane"], r["seed"]) for r in new if self._converged([r])}
            progress.add((t + 1 - done) * len(lanes))
            done = t + 1
            if not active:
                break
        progress.add((self.steps - done) * len(lanes))
        return rows

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(
        self, lane: Lane, step: int, data: SeedData, outputs: Callable[[Tensor], Tensor]
    ) -> list[dict[str, Any]]:
        rows = [self._row(lane, step, "test", outputs(self._test[0]), self._test[1])]
        if lane.n is not None:
            k = min(lane.n, self.train_size)
            x, y = data.first(k)
            rows.append(self._row(lane, step, "train", outputs(x), y))
        return rows

    def _evaluate_stacked(
        self, lanes: list[Lane], step: int, data: list[SeedData], replicas: Replicas
    ) -> list[dict[str, Any]]:
        test = replicas.predict(self._test[0])
        rows = [self._row(lane, step, "test", test[r], self._test[1]) for r, lane in enumerate(lanes)]
        real = [lane.n for lane in lanes if lane.n is not None]
        if real:
            k = min(max(real), self.train_size)  # nested sets: the first samples are in every set of the seed
            train = replicas.predict(torch.stack([d.first(k)[0] for d in data]), in_dim=0)
            for r, lane in enumerate(lanes):
                if lane.n is not None:
                    rows.append(self._row(lane, step, "train", train[r, : lane.n], data[r].y[: min(k, lane.n)]))
        return rows

    def _row(self, lane: Lane, step: int, split: str, outputs: Tensor, y: Tensor) -> dict[str, Any]:
        values = measure(outputs, y, self.loss, self.world.num_classes)
        n = math.inf if lane.n is None else float(lane.n)
        return {"world": lane.world, "n": n, "lane": lane.n, "seed": lane.seed, "step": step, "split": split, **values}

    def _converged(self, rows: list[dict[str, Any]]) -> bool:
        if self._stop is None:
            return False
        rule, threshold = self._stop
        train = [r for r in rows if r["split"] == "train"]
        if rule == "train_loss":
            return any(r["loss"] < threshold for r in train)
        return any(r["error"] <= threshold for r in train)

    # ---- preparation ----------------------------------------------------------------------------------------------

    def _seed_data(self, seed: int, device: torch.device) -> SeedData:
        if seed not in self._data:
            data = SeedData(
                self.world,
                seed,
                n_max=max(cast(tuple[int, ...], self.n)),
                batch_size=self.batch_size,
                steps=self.steps,
                coupling=self.coupling,
                augment=self.augment,
                transform=self.transform,
                device=device,
            )
            k = min(len(data.x), len(self._raw_test))
            if torch.equal(data.x[:k], self._raw_test[:k]):
                raise InvalidInput(
                    f"the test block is the beginning of the train set of seed {seed}: the world ignores split; "
                    "its splits 'test', 'train' and 'stream' must not overlap."
                )
            self._data[seed] = data
        return self._data[seed]

    def _check_model(self, device: torch.device) -> bool:
        """Refuse a model that does not fit the world; decide whether to stack."""
        model = build(self.model_fn, 0).to(device)
        check_batch_norm(model, self.batch_size)
        check_outputs(predict(model, self._test[0][:2]), len(self._test[0][:2]), self.world.num_classes, model)
        self._parameters = sum(p.numel() for p in model.parameters())
        reason = stackable(model)
        if reason is None and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            reason = "it has dropout, whose draws a stacked model cannot share between the worlds."
        if self.stack is None:
            convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
            return reason is None and not (
                device.type == "cpu" and convolves
            )  # grouped convolutions gain nothing there
        if self.stack and reason is not None:
            raise InvalidInput(f"stack=True, but {type(model).__name__} cannot be stacked: {reason}")
        return self.stack

    def _settings(self, stacked: bool, device: torch.device) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "n": list(cast(tuple[int, ...], self.n)),
            "seeds": list(cast(tuple[int, ...], self.seeds)),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "loss": self.loss
            if isinstance(self.loss, str)
            else getattr(self.loss, "__name__", type(self.loss).__name__),
            "stop": None if self._stop is None else list(self._stop),
            "coupling": self.coupling,
            "test_size": self.test_size,
            "train_size": self.train_size,
            "world": type(self.world).__name__,
            "parameters": self._parameters,
            "stacked": stacked,
            "device": str(device),
        }
        if isinstance(self.world, FiniteAsIdeal):
            settings["ideal_passes"] = self.world.passes
        return settings


class _Counter:
    """Adds up updates for ``on_progress(done, total)``."""

    def __init__(self, call: Progress | None, total: int) -> None:
        self.call, self.total, self.done = call, total, 0

    def add(self, count: int) -> None:
        if count > 0:
            self.done += count
            if self.call is not None:
                self.call(self.done, self.total)


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(f"{name}={value!r} must be a positive integer.")
    return value


def _as_schedule(schedule: Any, total: int) -> Schedule | None:
    if schedule is None:
        return None
    if schedule == "cosine":
        return cosine(total)
    if isinstance(schedule, str) or not callable(schedule):
        raise InvalidInput(
            f"schedule must be one function of the step, 'cosine' or None, but is a {type(schedule).__name__} "
            f"({schedule!r}): "
            "both worlds need the same schedule, whatever n."
        )
    try:
        float(schedule(0)), float(schedule(total - 1))
    except Exception as reason:
        raise InvalidInput(
            f"schedule could not be evaluated at the steps 0 and {total - 1} ({reason}); both worlds need the "
            "same schedule, "
            "a function from the 0-based step to a factor that covers all steps."
        ) from reason
    return cast(Schedule, schedule)


def _as_grid(eval_at: str | int | Sequence[int], total: int) -> tuple[int, ...]:
    if isinstance(eval_at, str):
        if eval_at != "log":
            raise InvalidInput(
                f"eval_at={eval_at!r} is not known; use 'log', a number of evaluations or the steps themselves."
            )
        return log_steps(total)
    if isinstance(eval_at, int):
        return log_steps(total, _positive("eval_at", eval_at))
    steps_ = sorted({0, total, *(int(s) for s in eval_at)})
    if steps_[0] < 0 or steps_[-1] > total:
        raise InvalidInput(
            f"eval_at holds steps from {steps_[0]} to {steps_[-1]}; they must lie between 0 and steps={total}."
        )
    return tuple(steps_)


def _as_stop(stop: Any, num_classes: int) -> tuple[str, float] | None:
    if stop is None:
        return None
    rule, threshold = (stop, RULES.get(stop, math.nan)) if isinstance(stop, str) else stop
    if rule not in ("train_error", "train_loss"):
        raise UnknownName(
            f"stop={stop!r} is not known; use 'train_error', 'train_loss', a pair (rule, threshold), or None "
            "for the budget."
        )
    if rule == "train_error" and num_classes == 0:
        raise InvalidInput("a regression has no train error to stop at; use stop='train_loss'.")
    return rule, float(threshold)


def _as_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise InvalidInput(f"device={device!r} is not known to torch; use 'auto', 'cpu' or 'cuda'.") from None
