"""Settings of the game and of learning, with the paper's values beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .loss import Clip
from .policy import widths

__all__ = ["ASPConfig"]


@dataclass(frozen=True)
class ASPConfig:
    r"""Everything that is set in a game of Alice and Bob and in how they learn from it.

    The defaults are for small worlds such as :class:`Grasp25D`; :meth:`paper` gives those of the paper.

    Parameters
    ----------
    goals
        Goals in a game, unless one is invalid.
    alice_steps, bob_steps
        Steps of Alice for a goal, exactly, and of Bob at most.
    envs
        Games at the same time, for each seed.
    reward
        ``"success"``: the paper's rewards. ``"time"``: those of the base method, by time alone.
    time_scale
        :math:`\gamma` of the time rewards.
    mode
        ``"repeat"``: Bob begins where Alice began, and is to reach what she reached. ``"reverse"``, of the base method:
        he begins where she ended, and is to undo what she did; there is one goal a game and nothing to clone.
    stop
        Alice has one more choice, of the base method: to end her turn. It takes a step in which nothing moves. Bob's
        limit is then what is left of both sides' steps, and her last choice is no part of a demonstration.
    sees_start
        Alice sees where her turn began, as in the base method; without it she cannot tell what she has done.
    past_opponent
        Share of games in which one side plays a past snapshot of the other; half of them each.
    snapshot_every, snapshots
        Turns from one snapshot to the next, and how many are kept; those in between are thinned out evenly.
    store_invalid
        Learn from Alice's invalid turns too, with reward 0. The paper's algorithm leaves them out (False, the default),
        its table of rewards lists them.
    beta, eps, abc_clip
        Weight of :func:`abc_loss` in Bob's loss, its :math:`\varepsilon`, and its ``clip``. 0 trains without it.
    abc_filter
        Clone only what Bob failed at (True); False clones every valid turn.
    learn_alice
        False leaves Alice as she starts, near a uniform policy: the control without a teacher that learns.
    gamma, lam
        For :func:`gae`.
    turn_end, bob_timeout
        ``"end"`` (default): a turn's last step is the end, and rewards of later goals are not part of its value.
        ``"go_on"``: the value of the last observation is added, for Alice while the game goes on, for Bob at his limit.
    clip, entropy_weight, value_weight, lr, epochs, minibatches, max_norm
        PPO; ``epochs`` is the paper's sample reuse, ``max_norm`` bounds the gradient of each network.
    embed, hidden, lstm
        Widths of :class:`SetPolicy` and :class:`SetValue`. Memories are empty when a turn begins, also Bob's on the way
        of a demonstration; a turn's steps stay together in a minibatch.

    Raises
    ------
    InvalidInput
        For numbers out of range, in one sentence that names the setting.

    Examples
    --------
    >>> ASPConfig.paper().bob_steps, ASPConfig(beta=0.0).beta
    (200, 0.0)
    >>> ASPConfig.base(mode="reverse").reward
    'time'
    """

    goals: int = 5
    alice_steps: int = 20
    bob_steps: int = 40
    envs: int = 256
    reward: Literal["success", "time"] = "success"
    time_scale: float = 0.01
    mode: Literal["repeat", "reverse"] = "repeat"
    stop: bool = False
    sees_start: bool = False
    past_opponent: float = 0.2
    snapshot_every: int = 5
    snapshots: int = 16
    store_invalid: bool = False
    beta: float = 0.5
    eps: float = 0.2
    abc_clip: Clip = "upper"
    abc_filter: bool = True
    learn_alice: bool = True
    gamma: float = 0.99
    lam: float = 0.95
    turn_end: Literal["end", "go_on"] = "end"
    bob_timeout: Literal["end", "go_on"] = "end"
    clip: float = 0.2
    entropy_weight: float = 0.01
    value_weight: float = 1.0
    lr: float = 1e-3
    epochs: int = 3
    minibatches: int = 4
    max_norm: float = 0.5
    embed: tuple[int, ...] = (64,)
    hidden: tuple[int, ...] = (64,)
    lstm: int = 0

    def __post_init__(self) -> None:
        whole = ("goals", "alice_steps", "bob_steps", "envs", "snapshot_every", "snapshots", "epochs", "minibatches")
        for name in whole:
            checks.integer(name, getattr(self, name), least=1)
        for name in ("time_scale", "eps", "clip", "lr", "max_norm"):
            checks.positive(name, getattr(self, name))
        for name in ("beta", "entropy_weight", "value_weight"):
            checks.real(name, getattr(self, name), least=0)
        checks.probability("past_opponent", self.past_opponent, inside=False)
        checks.probability("lam", self.lam, inside=False)
        checks.real("gamma", self.gamma, above=0, most=1)
        checks.choice("reward", self.reward, ("success", "time"))
        checks.choice("abc_clip", self.abc_clip, ("upper", "two_sided", "none", "log"))
        checks.choice("mode", self.mode, ("repeat", "reverse"))
        checks.integer("lstm", self.lstm, least=0)
        for name in ("store_invalid", "abc_filter", "learn_alice", "stop", "sees_start"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"{name} must be True or False, not {getattr(self, name)!r}.")
        for name in ("embed", "hidden"):
            object.__setattr__(self, name, widths(name, getattr(self, name)))
        for name in ("turn_end", "bob_timeout"):
            checks.choice(name, getattr(self, name), ("end", "go_on"))
        if self.mode == "reverse" and (self.goals > 1 or self.beta):
            raise InvalidInput(
                "a reversed game has one goal, and Alice's steps lead away from it: set goals=1 and beta=0.0, or take "
                "ASPConfig.base(mode='reverse')."
            )

    @classmethod
    def paper(cls, objects: int = 1) -> ASPConfig:
        """The settings of the paper's table for one or two blocks; widths of layers are not given there."""
        checks.integer("objects", objects, least=1)
        return cls(
            alice_steps=100, bob_steps=200 * objects, gamma=0.998, lr=3e-4, epochs=3, embed=(256,), hidden=(256,)
        )

    @classmethod
    def base(cls, mode: Literal["repeat", "reverse"] = "repeat", **settings: Any) -> ASPConfig:
        """The base method (arXiv:1703.05407): rewards by time, an Alice who ends her turn, one goal, no cloning."""
        own = {"goals": 1, "reward": "time", "stop": True, "sees_start": True, "beta": 0.0, "past_opponent": 0.0}
        return cls(**{"mode": mode, **own, **settings})
