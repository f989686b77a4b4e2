"""The Deep Bootstrap framework: one training procedure, run in the Real and in the Ideal World."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.data import DataWorld
from mlcollage.data.fresh_networks import fresh
from mlcollage.data.problem import refuse_overlap
from mlcollage.data.row_hashes import row_hashes
from mlcollage.errors import InvalidInput
from mlcollage.nn import build
from mlcollage.train import Replicas, Schedule, stackable
from mlcollage.train.loop import Augment, Loss, evaluating, predict, steps

from . import settings
from .result import COLUMNS, BootstrapResult, Rule
from .training import Coupling, Lane, SeedData, as_type, measure
from .worlds import FiniteAsIdeal

OptimizerFn = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Progress = Callable[[int, int], None]
Outputs = Callable[[Tensor, int | None], Tensor]
"""Outputs (R, N, K) of R networks for inputs (N, ...) that they share, or (R, N, ...) with the second argument 0."""
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
        Train the worlds and seeds as one stacked model: None (default) decides by model and device, and says why where
        model, loss or optimizer cannot be stacked; True insists, False trains one after the other. The results agree to
        rounding.
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
            raise InvalidInput("model_fn must make a fresh network, such as lambda: MLP(world.shape, 10).")
        settings.check_world(self.world)
        for name in ("steps", "batch_size", "test_size", "train_size"):
            setattr(self, name, checks.integer(name, getattr(self, name), least=1))  # numpy's numbers too
        if not callable(self.optimizer_fn):
            raise InvalidInput(
                f"optimizer_fn is a {type(self.optimizer_fn).__name__} of one network; each world needs its own: give "
                "a function, such as lambda parameters: torch.optim.SGD(parameters, lr=0.1)."
            )
        checks.choice("coupling", self.coupling, ("stream", "independent"))
        self._n = settings.as_sizes(self.n, self.world, self.steps, self.batch_size)
        self._seeds = settings.as_seeds(self.seeds)
        self._schedule = settings.as_schedule(self.schedule, self.steps)
        self._loss = settings.loss_function(self.loss, self.world.num_classes)
        self._grid = settings.as_grid(self.eval_at, self.steps)
        self._stop = settings.as_stop(self.stop, self.world.num_classes)

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
        device = settings.as_device(self.device)
        x, y = self.world.fixed(self.test_size, split="test").tensors  # (test_size, *shape), (test_size,)
        settings.check_labels(y, self.world.num_classes)
        x, y = x.to(device), y.to(device)
        self._tested = row_hashes(x)
        stacked = self._check_model(x, y, device)
        worlds = (None, *self._n)  # None is the Ideal World
        if not stacked:
            groups = [[Lane(k, s)] for s in self._seeds for k in worlds]  # seed by seed, for the sake of their samples
        elif self._stop is None:
            groups = [[Lane(k, s) for s in self._seeds for k in worlds]]
        else:  # groups that stop at about the same time, so that a group can end early
            groups = [[Lane(k, s) for s in self._seeds] for k in worlds]
        self._data: dict[int, SeedData] = {}
        progress = _Counter(on_progress, self.steps * len(self._seeds) * len(worlds))
        rows: list[dict[str, Any]] = []
        for group in groups:
            if not stacked:  # one seed's samples at a time
                self._data = {seed: data for seed, data in self._data.items() if seed == group[0].seed}
            rows += self._train(group, stacked, device, progress)
        self._data.clear()
        order = ["world", "n", "seed", "split", "step"]
        curves = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(order, ignore_index=True)
        return BootstrapResult(curves, self._described(stacked, device))

    def _train(
        self, lanes: list[Lane], stacked: bool, device: torch.device, progress: _Counter
    ) -> list[dict[str, Any]]:
        """Rows of lanes that are trained together, evaluated at the steps of the grid."""
        data = [self._seed_data(lane.seed, device) for lane in lanes]
        training = self._stacked(lanes, data, device) if stacked else self._alone(lanes[0], data[0], device)
        rows: list[dict[str, Any]] = []
        active, done = set(lanes), 0
        for step, outputs in training:
            new = [row for row in self._evaluate(lanes, step, data, outputs) if row["lane"] in active]
            rows += new
            if step:  # nothing has converged before the first update
                active -= {row["lane"] for row in new if self._converged(row)}
            progress.add((step - done) * len(lanes))
            done = step
            if not active:
                break
        progress.add((self.steps - done) * len(lanes))  # steps that an early stop has saved count as done
        for part in {id(d): d for d in data}.values():
            part.fresh.refuse_tested(self._tested)
        return rows

    def _alone(self, lane: Lane, data: SeedData, device: torch.device) -> Iterator[tuple[int, Outputs]]:
        """Train one network; yields at the steps of the grid."""
        model = build(self.model_fn, lane.seed).to(device)

        def outputs(x: Tensor, in_dim: int | None) -> Tensor:
            return predict(model, x if in_dim is None else x[0])[None]  # (1, N, K)

        yield 0, outputs
        loop = steps(
            model,
            (data.batch(lane, t) for t in range(self.steps)),
            self.optimizer_fn(model.parameters()),
            loss=self._loss,
            schedule=self._schedule,
            max_steps=self.steps,
            seed=lane.seed,
            check_every=1 if device.type == "cpu" else 50,  # looking at a loss makes a GPU wait
        )
        grid = set(self._grid)
        try:
            yield from ((step.number, outputs) for step in loop if step.number in grid)
        except InvalidInput as reason:
            raise InvalidInput(f"in {lane}: {reason}") from reason

    def _stacked(self, lanes: list[Lane], data: list[SeedData], device: torch.device) -> Iterator[tuple[int, Outputs]]:
        """Train the networks of all lanes as one stacked model; yields at the steps of the grid."""
        # In a function, so that a class (torch.optim.Adam) keeps its default rate as it does for a single network.
        replicas = Replicas(
            self.model_fn, [lane.seed for lane in lanes], optimizer=lambda p: self.optimizer_fn(p), device=device
        )

        def outputs(x: Tensor, in_dim: int | None) -> Tensor:
            return replicas.predict(x, in_dim=in_dim)

        yield 0, outputs
        grid = set(self._grid)
        finite = torch.ones(len(lanes), dtype=torch.bool, device=device)
        for t in range(self.steps):
            xs, ys = zip(*(d.batch(lane, t) for d, lane in zip(data, lanes, strict=True)), strict=True)
            factor = 1.0 if self._schedule is None else float(self._schedule(t))
            # Inputs (R, b, ...) and targets (R, b): a batch for each network.
            losses = replicas.step(torch.stack(xs), torch.stack(ys), loss=self._loss, lr_factor=factor, in_dims=(0, 0))
            finite &= losses.isfinite()  # (R,); looked at when the grid is, so that a GPU can run ahead
            if t + 1 in grid:
                if not bool(finite.all()):
                    bad = lanes[int((~finite).nonzero()[0])]
                    raise InvalidInput(f"in {bad}: the loss was not finite by step {t + 1}; lower the learning rate.")
                yield t + 1, outputs

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self, lanes: list[Lane], step: int, data: list[SeedData], outputs: Outputs) -> list[dict[str, Any]]:
        """A row per lane for the test block, and one for the train set of each Real World."""
        test = outputs(self._test[0], None)  # (R, test_size, K)
        rows = [self._row(lane, step, "test", test[r], self._test[1]) for r, lane in enumerate(lanes)]
        if real := [lane.n for lane in lanes if lane.n is not None]:
            k = min(max(real), self.train_size)  # nested sets: the first samples are in every set of the seed
            train = outputs(torch.stack([d.first(k)[0] for d in data]), 0)  # (R, k, K)
            for r, lane in enumerate(lanes):
                if lane.n is not None:  # a set that is smaller than k has n rows of its own
                    rows.append(self._row(lane, step, "train", train[r, : lane.n], data[r].y[: min(k, lane.n)]))
        return rows

    def _row(self, lane: Lane, step: int, split: str, outputs: Tensor, y: Tensor) -> dict[str, Any]:
        values = measure(outputs, y, self.loss, self.world.num_classes)
        n = math.inf if lane.n is None else float(lane.n)
        return {"world": lane.world, "n": n, "lane": lane, "seed": lane.seed, "step": step, "split": split, **values}

    def _converged(self, row: dict[str, Any]) -> bool:
        if self._stop is None or row["split"] != "train":
            return False
        rule, threshold = self._stop
        return bool(row["loss"] < threshold if rule == "train_loss" else row["error"] <= threshold)

    # ---- preparation ----------------------------------------------------------------------------------------------

    def _seed_data(self, seed: int, device: torch.device) -> SeedData:
        if seed not in self._data:
            data = SeedData(
                self.world,
                seed,
                n_max=self._n[-1],
                batch_size=self.batch_size,
                steps=self.steps,
                coupling=self.coupling,
                augment=self.augment,
                transform=self.transform,
                dtype=self._dtype,
                device=device,
            )
            if self.coupling == "independent":
                refuse_overlap(
                    row_hashes(data.x),
                    self._tested,
                    "{shared} of {tests} samples of the test block are also in the train set of seed "
                    f"{seed}; the world's splits 'test', 'train' and 'stream' must not overlap.",
                )
            else:
                data.fresh.refuse_tested(self._tested)
            self._data[seed] = data
        return self._data[seed]

    def _check_model(self, x: Tensor, y: Tensor, device: torch.device) -> bool:
        """Refuse a model that does not fit the world; lay out the test block; decide whether to stack."""
        model = build(self.model_fn, 0).to(device)  # to look at; the lanes build their own
        fresh(self.model_fn, "model_fn")
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        x = x if self.transform is None else self.transform(x)
        self._test = as_type(x, self._dtype), as_type(y, self._dtype)
        settings.check_batch_norm(model, self.batch_size)
        few = self._test[0][:2]
        with evaluating(model), torch.no_grad():
            settings.check_outputs(model(few), len(few), self.world.num_classes, model)
        self._parameters = sum(p.numel() for p in model.parameters())
        self._why_not: str | None = None
        reason = stackable(model)
        if reason is None and any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            reason = "it has dropout, whose draws a stacked model cannot share between the worlds."
        convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
        # On a CPU grouped convolutions gain nothing.
        if self.stack is False or (self.stack is None and device.type == "cpu" and convolves):
            return False
        self._why_not = reason or self._try_stacked(device)
        if self._why_not is None:
            return True
        if self.stack:
            raise InvalidInput(f"stack=True, but {type(model).__name__} cannot be stacked: {self._why_not}")
        warnings.warn(
            f"{type(model).__name__} is trained in one world after the other, not stacked: {self._why_not}",
            stacklevel=3,
        )
        return False

    def _try_stacked(self, device: torch.device) -> str | None:
        """Why a step of two stacked networks cannot be made, if so: their code, the loss or the optimizer."""
        # A batch for each, as in training: of a shared one values could be read.
        x, y = (torch.stack([part[: self.batch_size]] * 2) for part in self._test)
        try:
            replicas = Replicas(self.model_fn, (0, 1), optimizer=lambda p: self.optimizer_fn(p), device=device)
            replicas.step(x, y, loss=self._loss, in_dims=(0, 0))
        except (InvalidInput, RuntimeError, TypeError, NotImplementedError) as reason:
            return str(reason)
        return None

    def _described(self, stacked: bool, device: torch.device) -> dict[str, Any]:
        names = ("steps", "batch_size", "coupling", "test_size", "train_size")
        described: dict[str, Any] = {
            **{name: getattr(self, name) for name in names},
            "n": list(self._n),
            "seeds": list(self._seeds),
            "loss": settings.loss_name(self.loss),
            "stop": None if self._stop is None else list(self._stop),
            "world": type(self.world).__name__,
            "parameters": self._parameters,
            "stacked": stacked,
            "not_stacked": self._why_not,
            "device": str(device),
        }
        if isinstance(self.world, FiniteAsIdeal):
            described["ideal_passes"] = self.world.passes
        return described


class _Counter:
    """Adds up updates for ``on_progress(done, total)``."""

    def __init__(self, call: Progress | None, total: int) -> None:
        self.call, self.total, self.done = call, total, 0

    def add(self, count: int) -> None:
        if count > 0:
            self.done += count
            if self.call is not None:
                self.call(self.done, self.total)
