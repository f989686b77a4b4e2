"""Tasks to act in: worlds whose objects can be moved, and sets of goals for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage._users import users_code
from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput

__all__ = ["GoalSet", "GoalTask", "GoalWorld"]

GoalSet = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""``goals(n, generator)`` gives n start states (n, S) and a goal for each, (n, K, G)."""

_METHODS = ("initial", "step", "observe", "achieved", "distance", "off_table", "out_of_zone")


@runtime_checkable
class GoalWorld(Protocol):
    """A batch of equal worlds with K objects each, as functions of their states: nothing is remembered in between.

    A state is a row of S numbers that holds *everything* that decides what happens next (velocities, a grasp, counters,
    a solver's warm start). Saving and restoring is therefore keeping the row. Any class with these members will do.

    ``bins`` are the choices of each dimension of the action; odd numbers have a middle choice that does nothing. 0
    choices are a continuous dimension, whose actions lie between -1 and 1.
    ``thresholds`` are one for each of the M measures of :meth:`distance`; an object is at its goal where all are below
    theirs.
    """

    @property
    def bins(self) -> tuple[int, ...]:
        """Choices of each dimension of the action."""

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each measure of distance."""

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n start states (n, S); different rows, the same for the same generator."""

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """States (n, S) after actions (n, D); ``state`` itself is left as it is.

        Actions are whole numbers below ``bins``, or, if a dimension is continuous, floating-point numbers.
        """

    def observe(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Robot (n, P), and objects (n, K, F) whose first number is 1 for an object and 0 for padding."""

    def achieved(self, state: Tensor) -> Tensor:
        """What a goal is about, (n, K, G): places of objects, say, and never the robot's own."""

    def distance(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """M measures (..., K, M) of how far each object (..., K, G) is from its goal: meters, and radians, say."""

    def off_table(self, state: Tensor) -> Tensor:
        """Objects (n, K) that have left the world; bool."""

    def out_of_zone(self, state: Tensor) -> Tensor:
        """Objects (n, K) outside of the area where goals are wanted; bool."""


@dataclass(frozen=True)
class GoalTask(Workload):
    """A world to act in, and the goals by which a policy is judged.

    Parameters
    ----------
    world
        Makes the world; called once a run.
    holdouts
        Sets of goals by name, never used for training: each a function of a number n and a ``torch.Generator`` that
        gives start states (n, S) and goals (n, K, G).
    alice_steps, bob_steps
        How many steps a goal may take to set and to reach.
    name, fingerprint
        As every :class:`~mlcollage.data.workload.Workload` has them.

    Examples
    --------
    A world that lacks something is refused before anything is trained:

    >>> GoalTask(world=dict, holdouts={}).check("mine")
    Traceback (most recent call last):
        ...
    mlcollage.errors.InvalidInput: mine: dict has no initial, step, observe, achieved, distance, off_table, ...
    """

    world: Callable[[], GoalWorld]
    holdouts: Mapping[str, GoalSet]
    alice_steps: int = 20
    bob_steps: int = 40

    def check(self, where: str, *, every: bool = False) -> None:
        """Make the world and try it: shapes, numbers, the same step twice, and a set of two goals of each name.

        Parameters
        ----------
        where
            Begins the sentence of a refusal.
        every
            Makes no difference: worlds have no samples to read.

        Raises
        ------
        InvalidInput
            If a part of the world is missing or does not fit the others, or a step is not a function of the state.
        """
        self._tried(where)

    def make(self, where: str = "the task") -> GoalWorld:
        """The world, made by the user's function and looked at.

        Raises
        ------
        InvalidInput
            As :meth:`check`.
        """
        if not callable(self.world):
            raise InvalidInput(
                f"{where}: world must be a function (or a class) that makes the world, e.g. world=lambda: Blocks(2)."
            )
        with users_code(f"{where}: world()"):
            world = self.world()
        check_world(world, where)
        return world

    def describe(self, *, every: bool = False) -> dict[str, Any]:
        """Sizes in plain values; makes the world once and takes a step."""
        facts = super().describe()
        world, state = self._tried(self.name)
        robot, objects = world.observe(state)
        return {
            "name": facts.pop("name"),
            "world": type(world).__name__,
            "state": state.shape[1],
            "robot": robot.shape[1],
            "objects": objects.shape[1],
            "bins": list(world.bins),
            "thresholds": list(world.thresholds),
            "holdouts": sorted(self.holdouts),
            "steps": f"{self.alice_steps} to set a goal, {self.bob_steps} to reach it",
            **facts,
        }

    def _tried(self, where: str) -> tuple[GoalWorld, Tensor]:
        checks.integer(f"{where}: alice_steps", self.alice_steps, least=1)
        checks.integer(f"{where}: bob_steps", self.bob_steps, least=1)
        world = self.make(where)
        if not isinstance(self.holdouts, Mapping) or not all(callable(f) for f in self.holdouts.values()):
            raise InvalidInput(
                f"{where}: holdouts must map names to functions of (n, generator); got {self.holdouts!r}."
            )
        state = world.initial(2, generator(0))
        for name, goals in self.holdouts.items():
            with users_code(f"{where}: holdout {name!r}"):
                starts, targets = goals(2, generator(0))
            expected = tuple(state.shape), tuple(world.achieved(state).shape)
            if (tuple(starts.shape), tuple(targets.shape)) != expected:
                raise InvalidInput(
                    f"{where}: holdout {name!r} gives states {tuple(starts.shape)} and goals {tuple(targets.shape)} "
                    f"for n = 2; expected {expected[0]} and {expected[1]}."
                )
        return world, state


def check_world(world: GoalWorld, where: str = "the world") -> None:
    """Refuse a world whose parts do not fit, in one sentence; takes two steps of two copies.

    Raises
    ------
    InvalidInput
        For missing members, thresholds that are no positive numbers, shapes that do not fit, numbers that are not
        finite, and a step that gives something else when it is taken again from the same state.
    """
    check_members(world, where)
    for threshold in world.thresholds:
        checks.positive(f"{where}: a threshold", threshold)
    if not len(world.bins):
        raise InvalidInput(f"{where}: bins are empty; expected the choices of each dimension of the action.")
    for bins in world.bins:
        if bins:
            checks.integer(f"{where}: bins", bins, least=2)
    with users_code(f"{where}: a first step"), torch.no_grad():
        state = world.initial(2, generator(0))
        again = world.initial(2, generator(0))
        last = [[b - 1 if b else 1 for b in world.bins]] * 2
        middle = torch.tensor(last, dtype=torch.get_default_dtype() if 0 in world.bins else torch.long)
        kept = state.clone()
        after, after_again = world.step(state, middle), world.step(state, middle)
        robot, objects = world.observe(state)
        goal = world.achieved(state)
        distance = world.distance(goal, goal)
        flags = world.off_table(state), world.out_of_zone(state)
    if state.ndim != 2 or len(state) != 2 or state.shape != after.shape:
        raise InvalidInput(
            f"{where}: initial(2) gives states {tuple(state.shape)} and a step {tuple(after.shape)}; expected (2, S) "
            "of both."
        )
    if robot.ndim != 2 or objects.ndim != 3 or objects.shape[1] == 0:
        raise InvalidInput(
            f"{where}: observe gives robot {tuple(robot.shape)} and objects {tuple(objects.shape)}; expected (2, P) "
            "and (2, K, F) with K >= 1."
        )
    k, m = objects.shape[1], len(world.thresholds)
    if goal.ndim != 3 or goal.shape[:2] != (2, k) or tuple(distance.shape) != (2, k, m):
        raise InvalidInput(
            f"{where}: {k} objects and {m} thresholds, but achieved gives {tuple(goal.shape)} and distance "
            f"{tuple(distance.shape)}; expected (2, {k}, G) and (2, {k}, {m})."
        )
    if any(tuple(flag.shape) != (2, k) or flag.dtype != torch.bool for flag in flags):
        raise InvalidInput(f"{where}: off_table and out_of_zone must give bool (2, {k}), one for each object.")
    for what, values in (("initial", state), ("step", after), ("observe", objects), ("achieved", goal)):
        if not bool(torch.isfinite(values).all()):
            raise InvalidInput(f"{where}: {what} gives NaN or infinity.")
    if not bool((objects[..., 0] * (1 - objects[..., 0]) == 0).all()):
        raise InvalidInput(f"{where}: the first number of each object must be 1 (there) or 0 (padding).")
    if not torch.equal(state, kept):
        raise InvalidInput(f"{where}: step changes the state that it is given; it must return a new tensor.")
    if not torch.equal(state, again):
        raise InvalidInput(
            f"{where}: initial gives other states for the same generator; draw from the generator that is passed."
        )
    if not torch.allclose(after, after_again, rtol=0, atol=1e-6):
        gap = float((after - after_again).abs().max())
        raise InvalidInput(
            f"{where}: the same step from the same state ends {gap:.2g} apart; the state must hold everything that "
            "matters (velocities, a grasp, counters, a solver's warm start), and the world must draw nothing."
        )
    if bool((state[0] == state[1]).all()):
        raise InvalidInput(f"{where}: both start states are the same; draw each row by itself.")
    if not bool((distance.abs() < 1e-5).all()):
        raise InvalidInput(
            f"{where}: an object's distance to where it is must be 0; it is {float(distance.max()):.2g}."
        )


def check_members(world: GoalWorld, where: str = "the world") -> None:
    """Refuse what is no world, or the class of one.

    Raises
    ------
    InvalidInput
        For missing members.
    """
    if isinstance(world, type):
        raise InvalidInput(f"{where}: {world.__name__} is a class; give a world of it: {world.__name__}().")
    missing = [name for name in (*_METHODS, "bins", "thresholds") if not hasattr(world, name)]
    if missing:
        hint = ""
        if hasattr(world, "reset"):
            hint = (
                " An environment with get_state and set_state becomes one by GymnasiumWorld of "
                "mlcollage.papers.asymmetric_self_play."
            )
        raise InvalidInput(f"{where}: {type(world).__name__} has no {', '.join(missing)}; see GoalWorld.{hint}")
