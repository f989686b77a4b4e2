"""Gymnasium and PettingZoo: their environments as worlds of the game, and the game as environments of theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MissingDependency

__all__ = ["GymnasiumWorld", "checked_actions"]

Array = NDArray[np.float64]


class GymnasiumWorld:
    """Any Gymnasium environment whose state can be read and set, as a :class:`~mlcollage.data.GoalWorld`.

    A row of the world's state is ``[the environment's state | its last observation | objects | ended]``. Before a step,
    the state is set where it is not the one that the environment is in, after a reset where its episode had ended; all
    rows are copied, since many environments hand out the same buffer again.

    Parameters
    ----------
    make
        Makes the environment, without a time limit (``gymnasium.make(..., max_episode_steps=-1)``); called once for
        each game that is played at the same time.
    objects
        ``objects(observation)`` gives what a goal is about, (K, G): the places of K objects, or whatever is to be
        reached. Never the robot's own place, unless that is the goal. By default ``observation["achieved_goal"]``, as
        one object.
    threshold
        How near its goal an object must be, in the units of ``objects``.
    get_state, set_state
        ``get_state(env)`` gives *everything* that decides what happens next as a flat array of numbers, and
        ``set_state(env, array)`` puts it back; by default the methods ``get_state`` and ``set_state`` of
        ``env.unwrapped``. For MuJoCo see ``mujoco.mj_getState`` with ``mjSTATE_INTEGRATION``.
    bins
        Choices of each dimension of a bounded ``Box`` of actions, evenly from its low end to its high end; odd, so
        that one of them is the middle. 0 leaves them continuous, for Gaussian heads: -1 is the low end and 1 the high
        one, and what is drawn beyond is clipped.
    encode
        ``encode(observation)`` gives what the policies see as a flat array of numbers: your own encoder of images, say.
        By default the observation is flattened by its space; images are refused.
    out_of_zone
        ``out_of_zone(objects)`` gives (K,) bool, for goals that Alice shall pay for; by default none.
    idle
        The choice of each dimension that does nothing, for :func:`certify`. By default the bin of a ``Box`` that is
        exactly 0, where there is one; of discrete actions nothing is guessed.

    Attributes
    ----------
    bins : tuple of int
        ``n`` of ``Discrete``, ``nvec`` of ``MultiDiscrete``, or ``bins`` (0: continuous) for each dimension of a
        ``Box``.
    thresholds : tuple of float
        ``(threshold,)``.
    idle : tuple of float or None
        Choices that do nothing, if there are.

    Raises
    ------
    MissingDependency
        Without Gymnasium.
    InvalidInput
        If the environment has no state to read and set, its state after ``set_state`` is another one, its actions are
        neither discrete nor bounded, it hands out images and there is no ``encode``, a time limit cuts it, or it is a
        vector environment.

    Notes
    -----
    An episode that ends by itself (``terminated``) makes Alice's goal invalid, and stops where it is. So does one whose
    numbers become NaN or infinite.

    Examples
    --------
    >>> import gymnasium
    >>> def objects(observation):  # the angle of a pendulum, as a point
    ...     return observation[None, :2]
    >>> world = GymnasiumWorld(
    ...     lambda: gymnasium.make("Pendulum-v1", max_episode_steps=-1), objects, threshold=0.3, bins=3,
    ...     get_state=lambda env: env.unwrapped.state,
    ...     set_state=lambda env, state: setattr(env.unwrapped, "state", state))
    >>> state = world.initial(2, torch.Generator().manual_seed(0))
    >>> world.step(state, torch.tensor([[0], [2]])).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        make: Callable[[], Any],
        objects: Callable[[Any], Any] | None = None,
        *,
        threshold: float,
        get_state: Callable[[Any], Any] | None = None,
        set_state: Callable[[Any, Array], object] | None = None,
        bins: int = 11,
        out_of_zone: Callable[[Array], Any] | None = None,
        idle: Sequence[float] | None = None,
        encode: Callable[[Any], Any] | None = None,
    ) -> None:
        try:
            import gymnasium
        except ImportError as error:
            raise MissingDependency("GymnasiumWorld needs Gymnasium: pip install 'mlcollage[rl]'.") from error
        self._spaces = gymnasium.spaces
        if not callable(make):
            raise InvalidInput(
                f"make must be a function that makes an environment, not a {type(make).__name__}: each game needs one "
                "of its own. Give lambda: gymnasium.make(...)."
            )
        self._make, self._objects, self._zone, self._encode = make, objects or _achieved_goal, out_of_zone, encode
        self.thresholds = (checks.positive("threshold", threshold),)
        self._envs: list[Any] = []
        self._last: list[Array | None] = []
        env = self._env(0)
        if hasattr(env, "num_envs"):
            raise InvalidInput(
                f"make() gives a vector environment, {type(env).__name__} of {env.num_envs} copies, which resets them "
                "by itself; make single environments, of which each is put into the state that is asked for."
            )
        self._get = get_state or _method(env, "get_state")
        self._set = set_state or _method(env, "set_state")
        if encode is None:
            _refuse_images(env.observation_space, self._spaces)
        self._values, self.bins = self._choices(env.action_space, checks.integer("bins", bins, least=0))
        self.idle = self._standing() if idle is None else _checked_idle(idle, self.bins)
        observation = self._reset(0, 0)
        self._size = len(self._state(0))
        self._width = len(observation)
        self._places = self._of(None)
        self._round_trip()

    # -- what the game asks for -------------------------------------------------------------------------------------

    def initial(self, n: int, generator: torch.Generator) -> Tensor:
        """Reset with n seeds that are drawn from the generator."""
        seeds = torch.randint(2**31 - 1, (n,), generator=generator).tolist()
        rows = []
        for i, seed in enumerate(seeds):
            observation = self._reset(i, seed)
            row = self._row(i, observation, ended=False)
            if not np.isfinite(row).all():
                raise InvalidInput(f"reset(seed={seed}) gives a state, observation or objects with NaN or infinity.")
            rows.append(row)
        if n > 1 and all(np.array_equal(row, rows[0]) for row in rows):
            raise InvalidInput(
                f"{n} resets with different seeds give the same start; reset(seed=...) must draw from env.np_random."
            )
        return torch.from_numpy(np.stack(rows))

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """One step of each environment, from these states."""
        rows = state.detach().cpu().numpy().astype(np.float64)
        choices = action.detach().cpu().numpy()
        after = [self._one(i, row, choice) for i, (row, choice) in enumerate(zip(rows, choices, strict=True))]
        return torch.from_numpy(np.stack(after)).to(state)

    def observe(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Robot (n, P): the whole observation. Objects (n, K, 1 + G): there, and what goals are about."""
        objects = self.achieved(state)
        robot = state[:, self._size : self._size + self._width]
        return robot, torch.cat((torch.ones_like(objects[..., :1]), objects), -1)

    def achieved(self, state: Tensor) -> Tensor:
        """What goals are about, (n, K, G)."""
        return state[:, self._size + self._width : -1].unflatten(1, self._places.shape)

    def distance(self, achieved: Tensor, goal: Tensor) -> Tensor:
        """Euclidean, (..., K, 1)."""
        return (achieved.double() - goal.double()).norm(dim=-1, keepdim=True)

    def off_table(self, state: Tensor) -> Tensor:
        """All objects of an environment whose episode has ended."""
        return (state[:, -1:] > 0.5).expand(-1, len(self._places))

    def out_of_zone(self, state: Tensor) -> Tensor:
        """What the user's function says."""
        places = self.achieved(state)
        if self._zone is None:
            return torch.zeros(places.shape[:2], dtype=torch.bool, device=state.device)
        with users_code("out_of_zone"):
            found = np.stack([np.asarray(self._zone(p), dtype=bool) for p in places.cpu().numpy()])
        return torch.from_numpy(found).to(state.device)

    # -- one environment --------------------------------------------------------------------------------------------

    def _env(self, i: int) -> Any:
        while len(self._envs) <= i:
            with users_code("make()"):
                env = self._make()
            if any(env is other for other in self._envs):
                raise InvalidInput("make() returned the same environment again; it must make a fresh one at each call.")
            self._envs.append(env)
            self._last.append(None)
        return self._envs[i]

    def _reset(self, i: int, seed: int) -> Array:
        env = self._env(i)
        with users_code("the environment's reset, which must give an observation and a dictionary,"):
            observation, _ = env.reset(seed=seed)
        self._seen = observation
        return self._flat(observation)

    def _flat(self, observation: Any) -> Array:
        if self._encode is not None:
            with users_code("encode(observation)"):
                seen = self._encode(observation)
                flat = np.array(seen.detach().cpu().numpy() if isinstance(seen, Tensor) else seen, dtype=np.float64)
            if flat.ndim != 1 or not flat.size:
                raise InvalidInput(
                    f"encode(observation) must give a flat array of numbers; it gave shape {flat.shape}."
                )
            return flat
        # By the space, which orders dictionaries by name; what is to be reached is the game's business.
        space = self._envs[0].observation_space
        if isinstance(space, self._spaces.Dict):
            kept = {k: v for k, v in observation.items() if k != "desired_goal"}
            space = self._spaces.Dict({k: s for k, s in space.spaces.items() if k != "desired_goal"})
            observation = kept
        with users_code("flattening an observation, which must be of the environment's observation_space,"):
            return np.array(self._spaces.flatten(space, observation), dtype=np.float64)

    def _of(self, expected: tuple[int, ...] | None) -> Array:
        with users_code("objects(observation)"):
            places = np.array(self._objects(self._seen), dtype=np.float64)
        if places.ndim != 2 or not places.size or (expected is None and not np.isfinite(places).all()):
            raise InvalidInput(f"objects(observation) must give finite numbers (K, G); it gave shape {places.shape}.")
        if expected is not None and places.shape != expected:
            raise InvalidInput(
                f"objects(observation) gave {places.shape}, and {expected} before; their number must stay the same. "
                "Worlds with padding are written as a GoalWorld of one's own."
            )
        return places

    def _state(self, i: int) -> Array:
        with users_code("get_state"):
            state = np.array(self._get(self._envs[i]), dtype=np.float64)  # copied
        size = getattr(self, "_size", None)
        if state.ndim != 1 or (size is None and not np.isfinite(state).all()):
            raise InvalidInput(f"get_state must give a flat array of finite numbers; it gave shape {state.shape}.")
        if size is not None and len(state) != size:
            raise InvalidInput(f"get_state gave {len(state)} numbers, and {size} before; it must be as many each time.")
        return state

    def _row(self, i: int, observation: Array, *, ended: bool) -> Array:
        places = self._of(self._places.shape)
        row = np.concatenate((self._state(i), observation, places.ravel(), [float(ended)]))
        # An environment that has ended, or broken, is reset before another state is set.
        self._last[i] = None if ended or not np.isfinite(row).all() else row.copy()
        return row

    def _one(self, i: int, row: Array, choice: NDArray[Any]) -> Array:
        if row[-1] > 0.5 or not np.isfinite(row).all():
            return row
        env = self._env(i)
        last = self._last[i]
        if last is None:
            self._reset(i, 0)
        if last is None or not np.array_equal(last, row):
            with users_code("set_state"):
                self._set(env, row[: self._size].copy())
        with users_code("the environment's step, which must give five things,"):
            observation, _, terminated, truncated, _ = env.step(self._action(choice))
        if truncated and not terminated:
            raise InvalidInput(
                "the environment was cut by a time limit, whose counter set_state does not set back; make it without "
                "one: gymnasium.make(..., max_episode_steps=-1)."
            )
        self._seen = observation
        return self._row(i, self._flat(observation), ended=bool(terminated))

    def _round_trip(self) -> None:
        """A state that is set must be the one that is read, also after a step in between."""
        kept = self._state(0)
        far = np.array([b - 1 if b else 1 for b in self.bins])
        with users_code("a first step"):
            self._envs[0].step(self._action(far))
            self._set(self._envs[0], kept.copy())
        gap = float(np.abs(self._state(0) - kept).max(initial=0.0))
        if gap > 1e-6:
            raise InvalidInput(
                f"after set_state, get_state gives something else (by {gap:.2g}): Bob must start "
                "exactly where Alice did."
            )
        self._last[0] = None

    def _choices(self, space: Any, bins: int) -> tuple[Any, tuple[int, ...]]:
        kinds = self._spaces
        if isinstance(space, kinds.Discrete):
            return int(space.start), (int(space.n),)
        if isinstance(space, kinds.MultiDiscrete):
            return np.asarray(space.start, dtype=np.int64).ravel(), tuple(int(k) for k in space.nvec.ravel())
        if not isinstance(space, kinds.Box) or not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise InvalidInput(f"actions must be discrete, or a Box with finite bounds; the space is {space}.")
        if not bins:
            return np.stack((space.low.ravel(), space.high.ravel())), (0,) * int(np.prod(space.shape))
        if bins == 1:
            raise InvalidInput("bins=1 leaves one choice; take 3, 5 or 11, or 0 for continuous actions.")
        if bins % 2 == 0:
            warnings.warn(f"bins={bins} is even: no choice is the middle, so Alice cannot stand still.", stacklevel=3)
        return np.linspace(space.low.ravel(), space.high.ravel(), bins), (bins,) * int(np.prod(space.shape))

    def _standing(self) -> tuple[float, ...] | None:
        """The bins of a box that are 0."""
        if not isinstance(self._envs[0].action_space, self._spaces.Box):
            return None
        if not any(self.bins):
            low, high = self._values
            zero = -(low + high) / (high - low)  # where 0 lies between -1 and 1
            return tuple(float(z) for z in zero) if bool((np.abs(zero) <= 1).all()) else None
        size = np.abs(self._values)
        still = size <= 1e-9 * size.max(0)
        return tuple(int(i) for i in still.argmax(0)) if still.any(0).all() else None

    def _action(self, choice: NDArray[Any]) -> Any:
        space = self._envs[0].action_space
        if isinstance(space, self._spaces.Discrete):
            return int(choice[0]) + self._values
        if isinstance(space, self._spaces.MultiDiscrete):
            return (choice + self._values).reshape(space.shape).astype(space.dtype)
        if not any(self.bins):
            low, high = self._values
            share = (np.clip(choice, -1.0, 1.0) + 1) / 2  # written so that the ends are met exactly
            return (low * (1 - share) + high * share).reshape(space.shape).astype(space.dtype)
        return self._values[choice, np.arange(len(choice))].reshape(space.shape).astype(space.dtype)


def _refuse_images(space: Any, spaces: Any) -> None:
    """Flattened pixels of 0 to 255 would be read as if they were places."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for part in space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces:
            _refuse_images(part, spaces)
    elif isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1:
        raise InvalidInput(
            f"observations hold images {space.shape} of {space.dtype}; give encode=..., a function from an observation "
            "to a flat array of numbers: features of your own network, or pixels that your policy= puts together again."
        )


def _achieved_goal(observation: Any) -> Array:
    if not isinstance(observation, dict) or "achieved_goal" not in observation:
        raise InvalidInput(
            "the observation has no 'achieved_goal'; give objects=..., a function from an observation to what goals "
            "are about, (K, G)."
        )
    return np.asarray(observation["achieved_goal"], dtype=np.float64)[None]


def _method(env: Any, name: str) -> Callable[..., Any]:
    own = getattr(env, "unwrapped", env)
    if not callable(getattr(own, name, None)):
        raise InvalidInput(
            f"{type(own).__name__} has no {name}: the game needs get_state and set_state, since Bob must start from "
            "Alice's initial state. Give get_state=... and set_state=..., functions of the environment."
        )
    return lambda env, *args: getattr(env.unwrapped, name)(*args)


def checked_actions(actions: Any, bins: Sequence[int], n: int) -> Tensor:
    """A user's actions as (n, D): whole numbers below ``bins``, or finite numbers if all are continuous.

    Examples
    --------
    >>> checked_actions([1, 4], (5, 5), 1)
    tensor([[1, 4]])
    """
    given: Array | None = None
    with suppress(TypeError, ValueError, RuntimeError):
        given = np.asarray(actions, dtype=np.float64)
    if not any(bins):
        if given is None or given.size != n * len(bins) or not np.isfinite(given).all():
            raise InvalidInput(f"actions must be {(n, len(bins))} finite numbers; got {_short(actions)}.")
        return torch.from_numpy(given.reshape(n, -1)).to(torch.get_default_dtype())
    fits = given is not None and given.size == n * len(bins) and bool((given == np.floor(given)).all())
    index = given.reshape(n, -1) if given is not None and fits else None
    if index is None or bool((index < 0).any()) or bool((index >= np.array(bins)).any()):
        rows = f" for each of {n} games" if n > 1 else ""
        raise InvalidInput(
            f"actions must be whole numbers from 0 and below {tuple(bins)}{rows}; got {_short(actions)}."
        )
    return torch.from_numpy(index.astype(np.int64))


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:200]


def _checked_idle(idle: Sequence[float], bins: Sequence[int]) -> tuple[float, ...]:
    return tuple(checked_actions(list(idle), bins, 1)[0].tolist())
