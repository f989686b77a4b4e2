"""Vector environments of others: one form of a step, in whichever way they reset what has ended."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MissingDependency

try:
    from gymnasium.vector import AutoresetMode, VectorEnv
except ImportError as error:
    raise MissingDependency("vector environments need Gymnasium: pip install 'mlcollage[rl]'.") from error

__all__ = ["VectorStep", "VectorSteps"]


class VectorStep(NamedTuple):
    """One step of N environments, each row of which says of itself whether it is one."""

    observation: Any  # (N, ...) to act on next: that of a fresh episode where one has ended
    last: Any  # (N, ...) what the action led to: the true last observation where an episode has ended
    reward: NDArray[np.float64]  # (N,)
    terminated: NDArray[np.bool_]  # (N,)
    truncated: NDArray[np.bool_]  # (N,)
    real: NDArray[np.bool_]  # (N,): False where the environment spent the step on a reset, and ignored the action


class VectorSteps:
    """Steps of a Gymnasium vector environment in one form, for all three of its ways to reset.

    By default (next step) Gymnasium 1 resets in the step after the end: a row whose action is ignored and whose reward
    is 0, which must enter no loss, no average and no count of steps. In the same step, the observation is already that
    of the next episode. Switched off, nobody resets; here that is done.

    Parameters
    ----------
    envs
        A ``gymnasium.vector.VectorEnv`` that declares how it resets, in ``metadata["autoreset_mode"]``.

    Raises
    ------
    InvalidInput
        For what is no vector environment, one that does not declare how it resets, and steps before :meth:`reset`.

    Notes
    -----
    For :func:`gae`, ``terminated`` and ``truncated`` are those of the action just taken, ``final_values`` are values of
    ``last``, and the mask of the losses is ``real``. Observations are copied. A warning tells where last observations
    were overwritten before they could be.

    Examples
    --------
    >>> import gymnasium
    >>> steps = VectorSteps(gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync"))
    >>> seen = steps.reset(seed=0)
    >>> taken = steps.step(np.array([0, 1]))
    >>> taken.observation.shape, taken.real.tolist()
    ((2, 4), [True, True])
    """

    def __init__(self, envs: Any) -> None:
        if not isinstance(envs, VectorEnv):
            raise InvalidInput(
                f"envs must be a gymnasium.vector.VectorEnv, not a {type(envs).__name__}; a single environment becomes "
                "one by gymnasium.vector.SyncVectorEnv([make])."
            )
        mode = (envs.metadata or {}).get("autoreset_mode")
        if mode not in set(AutoresetMode):
            raise InvalidInput(
                f"{type(envs.unwrapped).__name__} does not say how it resets: metadata['autoreset_mode'] is {mode!r}. "
                "Set it to one of gymnasium.vector.AutoresetMode; guessing it would mix episodes."
            )
        self.envs, self.mode = envs, AutoresetMode(mode)
        self._over: NDArray[np.bool_] | None = None  # until a reset
        self._warned = False

    def reset(self, seed: int | None = None) -> Any:
        """Start all anew; the observations (N, ...)."""
        with users_code("the environments' reset"):
            seen, _ = self.envs.reset(seed=seed)
        self._over = np.zeros(self.envs.num_envs, dtype=bool)
        return _copied(seen)

    def step(self, actions: Any) -> VectorStep:
        """Act in all of them."""
        if self._over is None:
            raise InvalidInput("no episode is on: call reset before the first step.")
        with users_code("the environments' step"):
            seen, reward, terminated, truncated, info = self.envs.step(actions)
        terminated, truncated = (np.array(flag, dtype=bool) for flag in (terminated, truncated))
        real = ~self._over if self.mode is AutoresetMode.NEXT_STEP else np.ones_like(terminated)
        over = (terminated | truncated) & real
        seen = _copied(seen)
        last = seen
        if bool(over.any()) and self.mode is AutoresetMode.SAME_STEP:
            if "final_obs" not in info:
                raise InvalidInput(
                    "episodes ended in this step, and info has no 'final_obs': the true last observations are lost. "
                    "Environments that reset in the same step must hand them out."
                )
            last = _with_last(seen, info["final_obs"], over)
            if not self._warned and _same_rows(seen, last, over):
                self._warned = True
                warnings.warn(
                    "the last observations of ended episodes are the first ones of the next, to the bit: environments "
                    "that hand out the same buffer again lose them in the reset. Return a copy from step.",
                    stacklevel=2,
                )
        if bool(over.any()) and self.mode is AutoresetMode.DISABLED:
            with users_code("the environments' reset, with options={'reset_mask': ...},"):
                fresh, _ = self.envs.reset(options={"reset_mask": over})
            seen = _copied(fresh)
        self._over = over
        return VectorStep(seen, last, np.array(reward, dtype=np.float64), terminated & real, truncated & real, real)


def _copied(seen: Any) -> Any:
    """Many environments hand out the same buffer again."""
    if isinstance(seen, dict):
        return {name: _copied(part) for name, part in seen.items()}
    return tuple(_copied(part) for part in seen) if isinstance(seen, tuple) else np.array(seen)


def _same_rows(seen: Any, last: Any, over: NDArray[np.bool_]) -> bool:
    if isinstance(seen, dict):
        return all(_same_rows(part, last[name], over) for name, part in seen.items())
    if isinstance(seen, tuple):
        return all(_same_rows(part, last[k], over) for k, part in enumerate(seen))
    return bool(np.array_equal(seen[over], last[over]))


def _with_last(seen: Any, final: Any, over: NDArray[np.bool_]) -> Any:
    """Rows of ``final`` where an episode is over; it is an array of rows, or an array of objects with holes."""
    if isinstance(seen, dict):
        found = {}
        for name, part in seen.items():
            own = final[name] if isinstance(final, dict) else [None if f is None else f[name] for f in final]
            found[name] = _with_last(part, own, over)
        return found
    if isinstance(seen, tuple):
        return tuple(_with_last(part, final[k], over) for k, part in enumerate(seen))
    last = np.array(seen)
    for i in np.flatnonzero(over):
        last[i] = final[i]
    return last
