"""Contextual bandits whose exploration is read off the gates (Sezener et al., NeurIPS 2020)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._estimator import OnlineEstimator
from ._inputs import Inputs
from ._settings import LearningRate, hidden_sizes
from .network import GatedNetwork

Array = NDArray[Any]


@dataclass(eq=False, repr=False)
class GLNBandit(OnlineEstimator):
    r"""Gated linear contextual bandit (GLCB): a network per action, and a bonus for contexts rarely visited.

    .. math::
        a_t = \arg\max_a \; \hat r_a(z_t) + C \sqrt{\frac{\log t}{\hat N_a(z_t)}}, \qquad
        \hat N_a(z) = \Big( \frac{1}{U} \sum_{u=1}^{U} \big(n_0 + N_{a,u}(z)\big)^{\rho} \Big)^{1/\rho},

    where :math:`N_{a,u}(z)` counts how often the context of neuron :math:`u` that :math:`z` selects was learned from
    when action :math:`a` was played. Rewards that are not binary are predicted by a complete binary tree of depth
    :math:`D` over :math:`2^D` equal bins: each inner node is a network for "the upper half", and the expected reward is
    the mean of the bins' centers under the tree's leaf probabilities.

    Parameters
    ----------
    n_actions : int
        Number of actions.
    n_features : int
        Width of a context vector.
    hidden_layer_sizes : sequence of int, default (16, 16)
        Neurons in each layer below the output neuron, for every network.
    context_dim : int, default 4
        Hyperplanes of a neuron.
    exploration : float, default 0.05
        ``C``, in units of the reward range.
    aggregation : float, default -0.5
        Exponent :math:`\rho` of the power mean over neurons; 1 is the mean, large negative values tend to the minimum.
    prior_count : float, default 1
        :math:`n_0 > 0`, the count of a context never visited.
    reward_range : tuple of float, default (0, 1)
        Smallest and largest reward.
    tree_depth : int, default 0
        ``D``; 0 is for rewards that are one of the two ends of the range (or, in between, soft labels); 3 is the
        paper's value for continuous rewards.
    learning_rate : "paper", "official", float or callable, default 0.01
        As in :class:`GLNClassifier`; each network counts its own steps.
    learning_rate_init : float, default 0.01
        Largest rate of the named schedules.
    max_deviation, memory
        As in :class:`GLNClassifier`, for the context vectors; visits are counted for good.
    eps, weight_clip, context_bias_scale, layer_bias, weight_init, gradient, tables
        As in :class:`GLNClassifier`.
    dtype : {"float32", "float64"}, default "float32"
        Of weights and arithmetic.
    random_state : int, RandomState or None, default 0
        Draws the hyperplanes, and breaks ties.

    Attributes
    ----------
    network_ : GatedNetwork
        The networks of all actions, one per node of the tree.
    settings_ : SimpleNamespace
        The parameters as they were at construction or at the last :meth:`reset`.
    t_ : int
        Rewards learned from so far.

    References
    ----------
    Sezener et al., "Online Learning in Contextual Bandits using Gated Linear Networks", NeurIPS 2020, arXiv:2002.11611.

    Examples
    --------
    >>> bandit = GLNBandit(2, 3, random_state=0)
    >>> rng = np.random.default_rng(0)
    >>> total = 0
    >>> for _ in range(300):
    ...     z = rng.normal(size=3)
    ...     a = bandit.select(z)
    ...     r = float(a == (z[0] > 0))
    ...     bandit.update(z, a, r)
    ...     total += r
    >>> total > 200
    True
    """

    n_actions: int
    n_features: int
    _: KW_ONLY
    hidden_layer_sizes: Sequence[int] = (16, 16)
    context_dim: int = 4
    exploration: float = 0.05
    aggregation: float = -0.5
    prior_count: float = 1.0
    reward_range: tuple[float, float] = (0.0, 1.0)
    tree_depth: int = 0
    learning_rate: LearningRate = 0.01
    learning_rate_init: float = 0.01
    max_deviation: float | None = 10.0
    eps: float = 0.01
    layer_bias: float = 0.731
    random_state: Any = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> Self:
        """Forget everything; parameters changed by ``set_params`` take effect."""
        self._begin()
        return self

    def _begin(self, X: Array | None = None) -> np.random.RandomState:
        self.n_features_in_ = checks.integer("n_features", self.n_features, least=1)
        rng = super()._begin(X)
        self._nodes = max(1, 2**self.settings_.tree_depth - 1)  # networks per action
        self.network_.add_heads(self.settings_.n_actions * self._nodes)
        self._rng = np.random.default_rng(self._seed_)
        return rng

    def _build(self, settings: SimpleNamespace, seed: int, X: Array | None) -> tuple[GatedNetwork, Inputs]:
        checks.integer("n_actions", settings.n_actions, least=1)
        checks.integer("tree_depth", settings.tree_depth, least=0, most=10)
        checks.real("exploration", settings.exploration, least=0)
        checks.positive("prior_count", settings.prior_count)
        if checks.real("aggregation", settings.aggregation) == 0:
            raise InvalidInput("aggregation must not be 0, for which a power mean is not defined.")
        low, high = (checks.real("Each end of reward_range", end) for end in settings.reward_range)
        if not low < high:
            raise InvalidInput(f"reward_range must be (smallest, largest) with smallest < largest, not {(low, high)}.")
        network = self._network(GatedNetwork, settings, seed, (*hidden_sizes(settings.hidden_layer_sizes), 1))
        return network, Inputs(
            *(self.n_features_in_, "standardize", 0.0, network.bias, network.limit),
            *(network.dtype, settings.max_deviation, settings.memory),
        )

    def _seed(self, settings: SimpleNamespace, rng: np.random.RandomState) -> int:
        given = settings.random_state
        return int(given) if isinstance(given, int | np.integer) else super()._seed(settings, rng)

    # ------------------------------------------------------------------ playing

    def values(self, z: ArrayLike) -> Array:
        """Expected reward of each action at one context vector, ``(n_actions,)``."""
        return self._values(*self._read(self._context(z)))

    def pseudo_counts(self, z: ArrayLike) -> Array:
        r"""How well each action is known at one context vector, :math:`\hat N_a(z)`, ``(n_actions,)``."""
        return self._counts(self._read(self._context(z))[1])

    def select(self, z: ArrayLike) -> int:
        """Action with the largest upper bound at ``z`` of shape ``(n_features,)``; ties are broken at random.

        The running mean and deviation of the context vectors take ``z`` in.
        """
        settings = self.settings_
        base, side = self._read(self._context(z), learn=True)
        width = settings.reward_range[1] - settings.reward_range[0]
        # r_a(z) + C sqrt(log t / N_a(z)), (n_actions,)
        bonus = np.sqrt(np.log(max(self.t_ + 1, 1)) / self._counts(side))
        upper = self._values(base, side) + settings.exploration * width * bonus
        best = np.flatnonzero(upper == upper.max())
        return int(best[0] if len(best) == 1 else self._rng.choice(best))

    def update(self, z: ArrayLike, action: int, reward: float) -> None:
        """Learn the reward that ``action`` brought at ``z``.

        Raises
        ------
        InvalidInput
            An action or a reward outside its range, or a context vector of another width.
        """
        low, high = self.settings_.reward_range
        action = checks.integer("action", action, least=0, most=self.settings_.n_actions - 1)
        reward = checks.real("reward", int(reward) if isinstance(reward, bool) else reward, least=low, most=high)
        nodes, branches = self._path((reward - low) / (high - low))
        base, side = self._read(self._context(z))
        raw = self._steps(base, side, np.array([branches]), heads=[action * self._nodes + node for node in nodes])[0]
        self._note(np.array([np.sum(np.logaddexp(0, raw) - raw * branches)]))  # log-loss of the path that was taken

    def _path(self, share: float) -> tuple[list[int], list[float]]:
        """Nodes from the root to the bin of a reward in [0, 1], and the branch taken at each."""
        depth = self.settings_.tree_depth
        if depth == 0:
            return [0], [share]
        # The bits of the bin's number, the highest first, are the branches; the children of node i are 2i + 1, 2i + 2.
        leaf = min(int(share * 2**depth), 2**depth - 1)
        nodes, branches, node = [], [], 0
        for level in range(depth - 1, -1, -1):
            upper = (leaf >> level) & 1
            nodes.append(node)
            branches.append(float(upper))
            node = 2 * node + 1 + upper
        return nodes, branches

    def _values(self, base: Array, side: Array) -> Array:
        low, high = self.settings_.reward_range
        depth, actions = self.settings_.tree_depth, self.settings_.n_actions
        p = expit(self.network_.predict(base, side)[0].astype(np.float64)).reshape(actions, self._nodes)
        if depth == 0:
            return np.asarray(low + (high - low) * p[:, 0])
        leaves = np.ones((actions, 1))  # probability of each node of a level, (n_actions, 2**level)
        for level in range(depth):
            # Probabilities of "upper half" at the nodes of this level, (n_actions, 2**level)
            node = p[:, 2**level - 1 : 2 ** (level + 1) - 1]
            leaves = np.stack([leaves * (1 - node), leaves * node], axis=2).reshape(actions, -1)
        centers = (np.arange(2**depth) + 0.5) / 2**depth
        return np.asarray(low + (high - low) * (leaves @ centers))

    def _counts(self, side: Array) -> Array:
        settings = self.settings_
        roots = range(0, settings.n_actions * self._nodes, self._nodes)  # every update of an action passes its root
        counts = self.network_.visit_counts(side, heads=roots)[0] + settings.prior_count  # (n_actions, neurons)
        return np.asarray(np.mean(counts**settings.aggregation, axis=1) ** (1 / settings.aggregation))

    def _context(self, z: ArrayLike) -> Array:
        row = np.asarray(z, np.float64)
        if row.shape != (self.n_features_in_,):
            raise InvalidInput(f"A context vector must have shape ({self.n_features_in_},); got {row.shape}.")
        if not np.isfinite(row).all():
            raise InvalidInput("The context vector holds NaN or infinity; it must be finite.")
        return row[None]

    # ------------------------------------------------------------------ disk

    def _state(self) -> dict[str, Array]:
        return super()._state() | {"ties": np.array(json.dumps(self._rng.bit_generator.state))}

    def _restore(self, arrays: Mapping[str, Array]) -> None:
        super()._restore(arrays)
        self._rng.bit_generator.state = json.loads(str(arrays["ties"]))
