"""Contextual bandits whose exploration is read off the gates (Sezener et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlcollage.errors import InvalidInput

from .classifier import check_rate
from .inputs import Inputs
from .network import GatedNetwork, LearningRate, hidden_sizes, sigmoid

__all__ = ["GLNBandit"]

Array = NDArray[Any]


class GLNBandit:
    r"""Gated linear contextual bandit (GLCB): a network an action, and a bonus for contexts rarely visited.

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
    dtype : {"float32", "float64"}, default "float32"
        Of weights and arithmetic.
    seed : int, default 0
        Draws the hyperplanes, and breaks ties.
    **settings
        ``eps``, ``weight_clip``, ``context_bias_scale``, ``layer_bias``, ``weight_init``, ``gradient``, ``tables``: as
        in :class:`GatedNetwork`.

    References
    ----------
    Sezener et al., "Online Learning in Contextual Bandits using Gated Linear Networks", NeurIPS 2020, arXiv:2002.11611.

    Examples
    --------
    >>> bandit = GLNBandit(2, 3, seed=0)
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

    def __init__(
        self,
        n_actions: int,
        n_features: int,
        *,
        hidden_layer_sizes: Sequence[int] = (16, 16),
        context_dim: int = 4,
        exploration: float = 0.05,
        aggregation: float = -0.5,
        prior_count: float = 1.0,
        reward_range: tuple[float, float] = (0.0, 1.0),
        tree_depth: int = 0,
        learning_rate: LearningRate = 0.01,
        learning_rate_init: float = 0.01,
        dtype: Any = "float32",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        check_rate(learning_rate, learning_rate_init)
        if n_actions < 1 or n_features < 1:
            raise InvalidInput(f"n_actions and n_features must be >= 1; got {n_actions} and {n_features}.")
        if not exploration >= 0:
            raise InvalidInput(f"exploration must be >= 0; got {exploration!r}.")
        if not prior_count > 0 or aggregation == 0 or not np.isfinite(aggregation):
            raise InvalidInput(
                f"prior_count must be > 0 and aggregation finite and not 0; got {prior_count!r} and {aggregation!r}."
            )
        if not reward_range[0] < reward_range[1]:
            raise InvalidInput(f"reward_range must be (smallest, largest) with smallest < largest; got {reward_range}.")
        if not 0 <= tree_depth <= 10:
            raise InvalidInput(f"tree_depth must be from 0 to 10; got {tree_depth!r}.")
        self.n_actions, self.n_features, self.exploration, self.aggregation = (
            n_actions,
            n_features,
            exploration,
            aggregation,
        )
        self.prior_count, self.reward_range, self.tree_depth = prior_count, reward_range, tree_depth
        self.learning_rate, self.learning_rate_init = learning_rate, learning_rate_init
        self.nodes = max(1, 2**tree_depth - 1)
        self.network = GatedNetwork(
            (*hidden_sizes(hidden_layer_sizes), 1),
            n_features,
            n_features,
            context_dim=context_dim,
            dtype=dtype,
            seed=seed,
            **settings,
        )
        self.network.add_heads(n_actions * self.nodes)
        self._inputs = Inputs(n_features, "standardize", 0.0, self.network.bias, self.network.limit, self.network.dtype)
        self._rng = np.random.default_rng(seed)
        self.t = 0

    def values(self, z: ArrayLike) -> Array:
        """Expected reward of each action at one context vector, ``(n_actions,)``."""
        base, side = self._inputs(self._context(z), learn=False)
        return self._values(base, side)

    def pseudo_counts(self, z: ArrayLike) -> Array:
        r"""How well each action is known at one context vector, :math:`\hat N_a(z)`, ``(n_actions,)``."""
        return self._counts(self._inputs(self._context(z), learn=False)[1])

    def select(self, z: ArrayLike) -> int:
        """Action with the largest upper bound at ``z`` of shape ``(n_features,)``; ties are broken at random.

        The running mean and deviation of the context vectors take ``z`` in.
        """
        base, side = self._inputs(self._context(z), learn=True)
        width = self.reward_range[1] - self.reward_range[0]
        bonus = np.sqrt(np.log(max(self.t + 1, 1)) / self._counts(side))
        upper = self._values(base, side) + self.exploration * width * bonus
        best = np.flatnonzero(upper == upper.max())
        return int(best[0] if len(best) == 1 else self._rng.choice(best))

    def update(self, z: ArrayLike, action: int, reward: float) -> None:
        """Learn the reward that ``action`` brought at ``z``.

        Raises
        ------
        InvalidInput
            An action or a reward outside its range, or a context vector of another width.
        """
        low, high = self.reward_range
        if isinstance(action, bool) or int(action) != action or not 0 <= action < self.n_actions:
            raise InvalidInput(f"action must be an integer from 0 to {self.n_actions - 1}; got {action!r}.")
        if not low <= reward <= high:
            raise InvalidInput(f"reward must lie in reward_range {self.reward_range}; got {reward!r}.")
        base, side = self._inputs(self._context(z), learn=False)
        share = (reward - low) / (high - low)
        heads, targets = self._path(share)
        self.network.learn(
            base,
            side,
            np.array([targets]),
            rate=self.learning_rate,
            initial_rate=self.learning_rate_init,
            heads=[int(action) * self.nodes + node for node in heads],
        )
        self.t += 1

    def _path(self, share: float) -> tuple[list[int], list[float]]:
        """Nodes from the root to the bin of a reward in [0, 1], and the branch taken at each."""
        if self.tree_depth == 0:
            return [0], [share]
        leaf = min(int(share * 2**self.tree_depth), 2**self.tree_depth - 1)
        nodes, branches, node = [], [], 0
        for level in range(self.tree_depth - 1, -1, -1):
            upper = (leaf >> level) & 1
            nodes.append(node)
            branches.append(float(upper))
            node = 2 * node + 1 + upper
        return nodes, branches

    def _values(self, base: Array, side: Array) -> Array:
        p = sigmoid(self.network.predict(base, side)[0].astype(np.float64)).reshape(self.n_actions, self.nodes)
        low, high = self.reward_range
        if self.tree_depth == 0:
            return low + (high - low) * p[:, 0]
        leaves = np.ones((self.n_actions, 1))
        for level in range(self.tree_depth):
            node = p[:, 2**level - 1 : 2 ** (level + 1) - 1]
            leaves = np.stack([leaves * (1 - node), leaves * node], axis=2).reshape(self.n_actions, -1)
        centers = (np.arange(2**self.tree_depth) + 0.5) / 2**self.tree_depth
        return low + (high - low) * (leaves @ centers)

    def _counts(self, side: Array) -> Array:
        roots = range(0, self.n_actions * self.nodes, self.nodes)  # every update of an action passes its root
        counts = self.network.visit_counts(side, heads=roots)[0] + self.prior_count
        return np.mean(counts**self.aggregation, axis=1) ** (1 / self.aggregation)

    def _context(self, z: ArrayLike) -> Array:
        row = np.asarray(z, np.float64)
        if row.shape != (self.n_features,):
            raise InvalidInput(f"A context vector must have shape ({self.n_features},); got {row.shape}.")
        if not np.isfinite(row).all():
            raise InvalidInput("The context vector holds NaN or infinity; it must be finite.")
        return row[None]
