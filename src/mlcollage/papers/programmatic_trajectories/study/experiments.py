"""The study's experiments: flocks with a shared intent, and plays with an intent for each player."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlcollage._random import generator
from mlcollage._users import users_code
from mlcollage.data import Trajectories
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task, each_seed

from ..boids import BoidsWorld, friendly_label
from ..half_court import HalfCourtWorld
from ..labeling import ABSTAIN, GridIntent, LabelingFunction, Stationary, Window
from ..macro_vrnn import MacroVRNN
from ..metrics import (
    distance,
    intent_calibration,
    intent_information,
    nearest_distance,
    out_of_bounds,
    speed,
    two_sample_auc,
    wasserstein,
)
from .models import Sequences, Sizes, log_density, macro_like, make, to_numpy, train, train_macro

FLOCKS, PLAYS = ("macro", "indep"), ("stationary", "window", "no_intents")
Label = Callable[[NDArray, NDArray], NDArray[np.int64]]  # of tracks and who was seen
BETWEEN = (0.4, 0.8)  # mean distances to the nearest other that hardly any real flock has


def _flocks(n: int, seed: int, s: Sizes, labels: bool) -> Sequences:
    world = BoidsWorld.draw(n, seed=seed)
    x = torch.from_numpy(np.ascontiguousarray(world.x[:, :: s.every]))
    g = torch.from_numpy(world.labels()[:, :: s.every].copy()) if labels else None
    return Sequences(x, torch.ones(x.shape[:3], dtype=torch.bool), g)


@each_seed
def boids(task: Task[Sizes]) -> Measurements:
    """Flocks with and without a shared intent: likelihood, distances to the nearest other, and obedience."""
    m, s, seed, labeled = Measurements(), task.settings, task.seed, task.arm == "macro"
    data, test = _flocks(s.train, 10 * seed, s, labeled), _flocks(s.test, 10 * seed + 1, s, labeled)
    model = make("macro" if labeled else "indep", data, 2, True, s, seed)
    train(model, data, s, seed)
    m.add("loglik", log_density(model, test, s.particles, seed))
    burn, ahead, draw = test.x[:, : s.burn_in + 1], test.x.shape[1] - s.burn_in - 1, generator(seed, 5)
    made = to_numpy(model.sample(burn, ahead, generator=draw)[0])
    last = max(1, 20 // s.every)
    near = {name: _nearest(x, last) for name, x in (("real", test.x.double().numpy()), ("made", made))}
    m.add("nearest_w1", wasserstein(near["real"], near["made"]))
    for name, values in near.items():
        share = float(((values > BETWEEN[0]) & (values < BETWEEN[1])).mean())
        m.add("between" if name == "made" else "between_real", share)
        if seed == 0:
            m.array(f"nearest_{name}", values)
    if labeled:
        commands = np.arange(len(burn)) % 2
        want = np.repeat(commands[:, None], made.shape[1], 1)
        sent = to_numpy(model.sample(burn, ahead, want[:, :ahead], generator=draw)[0])
        own, other = intent_calibration(sent, want, friendly_label(last))
        m.add("obeyed", own, of="own")
        m.add("obeyed", other, of="other")
    return m


def _nearest(x: NDArray, last: int) -> NDArray[np.float64]:
    near: NDArray[np.float64] = nearest_distance(x[:, -last:]).mean((1, 2))
    return near


@dataclass(frozen=True)
class _Game:
    """Plays to train on and to test on, how they are labeled, and the field."""

    train: Sequences
    test: Sequences
    label: Label | None  # None without intents, and where the user gave them without a function
    classes: int
    grid: GridIntent | None  # None where macro-intents are no cells
    court: tuple[float, float]

    @property
    def shared(self) -> bool:
        """Whether one intent holds for all agents."""
        return self.test.intents is not None and self.test.intents.ndim == 2


def _game(task: Task[Sizes]) -> _Game:
    s, seed = task.settings, task.seed
    if task.workload is not None:
        return _users_game(task.workload, task.arm, s, seed)
    worlds = [HalfCourtWorld.draw(n, seed=10 * seed + i) for i, n in enumerate((s.train, s.test))]
    fps = worlds[0].fps / s.every
    grid = GridIntent()
    label = {"stationary": Stationary(grid, fps=fps), "window": Window(50 // s.every, grid)}.get(task.arm)
    parts = [np.ascontiguousarray(w.x[:, :: s.every]) for w in worlds]
    made = [_sequences(x, np.ones(x.shape[:3], dtype=bool), None if label is None else label(x)) for x in parts]
    return _Game(made[0], made[1], label, grid.classes, grid, (94.0, 50.0))


def _users_game(given: Trajectories, arm: str, s: Sizes, seed: int) -> _Game:
    """A user's tracks: a fifth is for testing; a cell is a tenth of the longer side of the field (or what was seen)."""
    x, seen = np.asarray(given.tracks, dtype=np.float64)[..., :2], given.seen()
    order = np.random.default_rng([22, seed]).permutation(len(x))
    points = x[seen]
    low = np.zeros(2) if given.court is not None else points.min(0)
    size = np.asarray(given.court) if given.court is not None else np.maximum(points.max(0) - low, 1e-9)
    x = np.where(seen[..., None], x - low, 0.0)
    cell = float(size.max()) / 10
    grid = GridIntent(cell, (float(size[0]), float(size[1])), margin=cell * 1e-6)
    label: Label | None = None
    labels: NDArray | None = None
    own, classes = has_own(given), grid.classes
    if own and arm != "no_intents":
        label = None if given.labeling is None else _own_label(given, low)
        labels = np.asarray(given.intents) if label is None else label(x, seen)
        replace(given, intents=labels, labeling=None).check(given.name)
        labels = np.where(seen if labels.ndim == 3 else seen.any(2), labels, ABSTAIN)
        known = given.n_intents or getattr(given.labeling, "classes", None)
        classes = max(2, int(labels.max()) + 1 if known is None else int(known))
    elif not own:
        both = seen[:, 1:] & seen[:, :-1]
        pace = np.linalg.norm(np.diff(x, axis=1), axis=-1)[both]
        still = Stationary(grid, max(0.5 * float(pace.mean()), 1e-9), per_frame=True)
        label = {"stationary": still, "window": Window(x.shape[1], grid)}.get(arm)
        labels = None if label is None else label(x, seen)
    cut = max(4, len(x) // 5)
    rows = order[cut:][: s.train], order[:cut][: s.test]
    made = [_sequences(x[r].astype(np.float32), seen[r], None if labels is None else labels[r]) for r in rows]
    return _Game(made[0], made[1], label, classes, None if own else grid, (float(size[0]), float(size[1])))


def has_own(given: Trajectories) -> bool:
    """Whether macro-intents come with the tracks."""
    return given.intents is not None or given.labeling is not None


def _own_label(given: Trajectories, low: NDArray) -> Label:
    """The user's labeling function on tracks whose origin was moved to ``low``; what was not seen is NaN."""
    function = given.labeling
    assert function is not None

    def label(x: NDArray, seen: NDArray) -> NDArray[np.int64]:
        there = np.where(seen[..., None], x + low, np.nan)
        if isinstance(function, LabelingFunction):
            found = function(there, seen, given.fps)
            return found if function.per_agent else found.max(-1)
        with users_code(f"the labeling function of {given.name}"):
            found = np.asarray(function(there, seen))
        if found.shape not in (seen.shape, seen.shape[:2]) or found.dtype.kind not in "iu":
            raise InvalidInput(
                f"the labeling function of {given.name} must return whole numbers {seen.shape} or {seen.shape[:2]}; "
                f"got {found.dtype} {found.shape}."
            )
        return found.astype(np.int64)

    return label


def _sequences(x: NDArray, seen: NDArray, labels: NDArray | None) -> Sequences:
    g = None if labels is None else torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
    return Sequences(torch.from_numpy(x), torch.from_numpy(seen), g)


@each_seed
def plays(task: Task[Sizes]) -> Measurements:
    """Plays by one labeling function or without intents: likelihood, statistics, obedience, coordination."""
    m, s, seed, game = Measurements(), task.settings, task.seed, _game(task)
    test = game.test
    model = make("indep" if test.intents is None else "macro", game.train, game.classes, game.shared, s, seed)
    train(model, game.train, s, seed)
    m.add("loglik", log_density(model, test, s.particles, seed))
    burn = torch.where(test.seen[..., None], test.x, torch.nan)[:, : s.burn_in + 1]
    ahead = test.x.shape[1] - s.burn_in - 1
    # Labels of the burn-in are made from it alone: those of the whole track know the future.
    history = None if game.label is None else game.label(burn.double().numpy(), burn.isfinite().all(-1).numpy())
    known: dict[str, Any] = {} if history is None else {"history": torch.from_numpy(history)}
    x, g = model.sample(burn, ahead, generator=generator(seed, 5), **known)
    made = to_numpy(x)[:, s.burn_in + 1 :]
    real = torch.where(test.seen[..., None], test.x, torch.nan).double().numpy()[:, s.burn_in + 1 :]
    run = {name: distance(v) for name, v in (("real", real), ("made", made))}
    m.add("distance_w1", wasserstein(run["real"], run["made"]))
    m.add("outside", float(np.mean(out_of_bounds(made, game.court, any_player=True))))
    m.add("auc", _auc(real, made))
    for name, v in (("", made), ("_real", real)):
        m.add(f"distance{name}", float(np.mean(distance(v))))
        m.add(f"speed{name}", float(np.nanmean(speed(v))))
    if task.arm != "stationary" or not isinstance(model, MacroVRNN):
        return m
    _commands(m, model, game, burn, ahead, known, s, seed)
    _coordination(m, model, game, burn, ahead, known, g, s, seed)
    return m


def _auc(real: NDArray, made: NDArray) -> float:
    there = np.isfinite(real) & np.isfinite(made)  # who is missing must not give the answer
    return two_sample_auc(np.where(there, real, np.nan), np.where(there, made, np.nan))


def _commands(
    m: Measurements, model: MacroVRNN, game: _Game, burn: torch.Tensor, ahead: int, known: dict[str, Any], s: Sizes,
    seed: int,
) -> None:  # fmt: skip
    """Where players end who are sent to cells, by chance too; how far rollouts of one burn-in part; and a picture."""
    assert game.test.intents is not None
    rng, label = np.random.default_rng([23, seed]), game.label
    pool = game.test.intents[:, -1].numpy()
    pool = np.where(pool < 0, np.bincount(pool[pool >= 0]).argmax(), pool)
    sent = pool[rng.permutation(len(pool))]
    draw = generator(seed, 6)
    x = to_numpy(model.sample(burn, ahead, np.repeat(sent[:, None], ahead, 1), generator=draw, **known)[0])
    reached: Callable[[NDArray], float] | None = None
    if game.grid is not None:
        centers, cell = game.grid.centers(), game.grid.cell

        def reached(cells: NDArray) -> float:
            near = np.abs(x[:, -1] - centers[cells]).max(-1) <= 1.5 * cell
            return float(near[np.isfinite(x[:, -1]).all(-1)].mean())
    elif label is not None:
        last = label(x, np.asarray(np.isfinite(x).all(-1)))[:, -1]

        def reached(cells: NDArray) -> float:
            return float((last == cells)[last != ABSTAIN].mean()) if (last != ABSTAIN).any() else 0.0

    if reached is not None:  # given intents without a function say nothing of rollouts
        m.add("obeyed", reached(sent), of="own")
        m.add(
            "obeyed", float(np.mean([reached(np.roll(sent, k, 0)) for k in range(1, min(20, len(sent)))])), of="other"
        )
    few = {name: v[:16] for name, v in known.items()}
    many = model.sample(burn[:16], ahead, n=8, generator=draw, **few)[0][:, :, -1]
    apart = (many[None] - many[:, None]).norm(dim=-1)
    m.add("spread", float(apart.nansum((0, 1)).sum() / (apart.isfinite().sum((0, 1)).sum() * 7 / 8)))
    if seed == 0:
        _picture(m, model, game, burn, ahead, known)


def _picture(
    m: Measurements, model: MacroVRNN, game: _Game, burn: torch.Tensor, ahead: int, known: dict[str, Any]
) -> None:
    """One play, its intents, and the same with one player sent elsewhere; the same random numbers for both."""
    full = [i for i in range(len(burn)) if bool(burn[i].isfinite().all())] or [0]
    one = {name: v[full[0] : full[0] + 1] for name, v in known.items()}
    first = burn[full[0] : full[0] + 1]
    x, g = model.sample(first, ahead, generator=generator(24), **one)
    assert g is not None
    plan = g[0, :, -ahead:].clone()  # (1, ahead, K), or (1, ahead) where shared
    player = int(np.argmax(np.ptp(np.nan_to_num(x[0, 0].numpy()), axis=0).sum(-1)))
    mine = plan[0] if game.shared else plan[0, :, player]
    assert game.test.intents is not None
    found, often = np.unique(game.test.intents.numpy(), return_counts=True)
    others = (found >= 0) & (found != int(mine[-1]))
    if game.grid is not None:  # the farthest cell that occurs; of other intents the most frequent
        centers, cells = game.grid.centers(), found[found >= 0]
        to = int(cells[np.linalg.norm(centers[cells] - centers[int(mine[-1])], axis=1).argmax()])
    else:
        to = int(found[others][often[others].argmax()]) if others.any() else int(mine[-1])
    mine[:] = to
    y, _ = model.sample(first, ahead, plan, generator=generator(24), **one)
    for name, tracks in (("play_free", x), ("play_moved", y)):
        m.array(name, tracks[0, 0].numpy())
    m.array("intents_free", g[0, 0].numpy())
    m.array("intents_moved", torch.cat([g[0, :, :-ahead], plan], 1)[0].numpy())
    size = (np.nan, *game.court) if game.grid is None else (game.grid.cell, *game.grid.extent)
    m.array("grid", np.array(size))
    m.array("player", np.array(player))


def _coordination(
    m: Measurements, model: MacroVRNN, game: _Game, burn: torch.Tensor, ahead: int, known: dict[str, Any],
    drawn: torch.Tensor | None, s: Sizes, seed: int,
) -> None:  # fmt: skip
    """What two players' intents say of each other: real, drawn together, and drawn each by itself."""
    assert drawn is not None
    assert game.test.intents is not None
    if model.n_agents < 2 or game.shared:
        return
    late = slice(s.burn_in + ahead // 2, s.burn_in + ahead)
    classes = game.classes
    m.add("information", intent_information(game.test.intents[:, late].numpy(), classes), arm="real")
    m.add("information", intent_information(drawn[0][:, late].numpy(), classes))
    other, joint = macro_like(model, s, seed), model.macro
    train_macro(other, model, game.train, s, seed)
    model.macro = other
    alone = model.sample(burn, ahead, generator=generator(seed, 5), **known)[1]
    model.macro = joint
    assert alone is not None
    m.add("information", intent_information(alone[0][:, late].numpy(), classes), arm="separate_intents")


def on_tracks(s: Sizes, workload: Trajectories, scale: Scale) -> Sizes | None:
    """Settings for tracks without intents of their own."""
    return None if has_own(workload) else _fitting(s, workload)


def on_own_intents(s: Sizes, workload: Trajectories, scale: Scale) -> Sizes | None:
    """Settings for tracks with intents or a labeling function of their own."""
    return _fitting(s, workload) if has_own(workload) else None


def _fitting(s: Sizes, workload: Trajectories) -> Sizes:
    """A user's own frames, and smaller windows and burn-ins where sequences are short."""
    n, t = np.shape(workload.tracks)[:2]
    if n < 16 or t < 8:
        raise InvalidInput(
            f"{workload.name} has {n} sequences of {t} frames; the study needs 16 of 8 at least: take a smaller window."
        )
    if np.shape(workload.tracks)[-1] < 2:
        raise InvalidInput(
            f"{workload.name} has positions with one coordinate; macro-intents here are cells of a plane."
        )
    return replace(s, every=1, burn_in=min(s.burn_in, t // 3), window=min(s.window, t))
