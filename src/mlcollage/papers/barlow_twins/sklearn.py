"""Barlow Twins as a transformer of scikit-learn, for tables and other arrays."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput
from mlcollage.nn import build
from mlcollage.train import warmup_cosine

from .gauge import LossGauge
from .loss import BarlowTwinsLoss
from .model import BarlowProjector, BarlowTwins

__all__ = ["BarlowTwinsEncoder"]

Views = Callable[[NDArray, np.random.Generator], tuple[NDArray, NDArray]]


class BarlowTwinsEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A representation of rows that keeps what two views of a row share.

    Fitted without labels: each batch of rows is changed twice at random, and a network learns embeddings that agree
    between the two views and are uncorrelated between columns. What the changes destroy, the representation forgets;
    they are the one thing to choose with knowledge of the data.

    Parameters
    ----------
    n_components
        Width of the representation, 64 by default.
    hidden
        Widths of the encoder's hidden layers.
    projector
        Widths of the projector, the last being D of the loss.
    lambd
        Weight of the redundancy term. 0.02 by default, since embeddings are much narrower here than in the paper.
    views
        ``views(X, rng)`` gives two changed copies of a batch of scaled rows, with draws from a numpy ``Generator``:
        masks, noise, crops of a series. None adds noise and replaces entries.
    noise
        Without ``views``: standard deviation of Gaussian noise, in those of the column.
    swap
        Without ``views``: share of entries that are replaced by those of other rows, each column by itself.
    scale
        Whether columns are standardized first (default), so that noise means the same in each; constant ones become 0.
    batch_size
        Rows of a batch, 256 by default; fewer where there are fewer rows.
    max_iter
        Passes over the rows, 100 by default; the last rows of a pass that fill no batch are left out.
    learning_rate
        Peak rate of AdamW, with a warm-up of 5 % and a cosine.
    random_state
        Seeds weights, order and views.
    device
        Where to train.

    Attributes
    ----------
    model_ : BarlowTwins
        The trained network.
    mean_, scale_ : ndarray of shape (n_features,)
        What columns are shifted and divided by.
    loss_curve_ : list of float
        Mean loss of each pass.
    n_iter_ : int
        Passes done.
    gauge_ : LossGauge
        Where the loss stood; ``print(encoder.gauge_.last)``.
    n_features_in_, feature_names_in_
        As every estimator has them.

    Notes
    -----
    Missing values, text and infinite values are refused; impute and encode them first.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> encoder = BarlowTwinsEncoder(n_components=8, max_iter=5, random_state=0).fit(X)
    >>> encoder.transform(X).shape, encoder.get_feature_names_out()[:2].tolist()
    ((178, 8), ['barlowtwinsencoder0', 'barlowtwinsencoder1'])
    """

    def __init__(
        self,
        n_components: int = 64,
        *,
        hidden: Sequence[int] = (256,),
        projector: Sequence[int] = (128, 128),
        lambd: float = 0.02,
        views: Views | None = None,
        noise: float = 0.3,
        swap: float = 0.2,
        scale: bool = True,
        batch_size: int = 256,
        max_iter: int = 100,
        learning_rate: float = 3e-3,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.hidden = hidden
        self.projector = projector
        self.lambd = lambd
        self.views = views
        self.noise = noise
        self.swap = swap
        self.scale = scale
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None) -> BarlowTwinsEncoder:
        """Train on rows (n, n_features); ``y`` is not used."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self._check()
        seed = int(check_random_state(self.random_state).randint(2**31))
        # The first row goes off before the mean is taken: columns far from 0 keep their digits.
        shifted = X - X[0]
        with np.errstate(over="ignore"):
            spread = shifted.std(0)
        self.mean_ = X[0] + shifted.mean(0) if self.scale else np.zeros(X.shape[1])
        if not np.isfinite(spread).all():
            raise InvalidInput("a column's values are so large that their variance overflows; scale it down.")
        self.scale_ = np.where(spread > 0, spread, 1.0) if self.scale else np.ones(X.shape[1])
        rows = (X - self.mean_) / self.scale_
        self.model_ = cast(BarlowTwins, build(self._network, seed).to(self.device))
        self.gauge_ = LossGauge(self.model_, every=100, warn=False)
        try:
            self.loss_curve_ = self._train(rows, seed)
        finally:
            self.gauge_.remove()
        self.n_iter_, self._n_features_out = len(self.loss_curve_), int(self.n_components)
        last = self.gauge_.last
        if last is not None and self.views is not None and last.advice and last.equal_rows >= 0.05:
            warnings.warn(last.advice[0], stacklevel=2)
        return self

    def transform(self, X: Any) -> NDArray:
        """Representations (n, n_components) of rows, in their floating type."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        rows = torch.from_numpy((X - self.mean_) / self.scale_).float()
        return self.model_.representations(rows).cpu().numpy().astype(X.dtype)

    def _check(self) -> None:
        checks.integer("n_components", self.n_components, least=1)
        checks.integer("batch_size", self.batch_size, least=2)
        checks.integer("max_iter", self.max_iter, least=1)
        checks.positive("learning_rate", self.learning_rate)
        checks.real("noise", self.noise, least=0)
        checks.probability("swap", self.swap, inside=False)
        for name in ("hidden", "projector"):
            if not isinstance(getattr(self, name), Iterable):
                raise InvalidInput(f"{name} is a sequence of widths such as (256,), not {getattr(self, name)!r}.")
        if self.views is not None and not callable(self.views):
            raise InvalidInput(f"views must be a function of a batch and a Generator, not {self.views!r}.")
        if self.views is None and not self.noise and not self.swap:
            raise InvalidInput("noise=0 and swap=0 leave both views equal; give one of them, or views.")

    def _network(self) -> BarlowTwins:
        sizes = [self.n_features_in_, *self.hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        backbone = nn.Sequential(*layers, nn.Linear(sizes[-1], self.n_components))
        # Rows of a table may be alike: what the loss would warn of stands in the gauge.
        loss = BarlowTwinsLoss(self.lambd, check=False)
        return BarlowTwins(backbone, BarlowProjector(self.n_components, self.projector), loss)

    def _train(self, rows: NDArray[np.float64], seed: int) -> list[float]:
        n, size = len(rows), min(self.batch_size, len(rows))
        optimizer = torch.optim.AdamW(self.model_.parameters(), lr=self.learning_rate)
        steps = n // size
        total = steps * self.max_iter
        schedule = warmup_cosine(total, min(total - 1, max(1, total // 20)) if total > 1 else 0)
        rng, curve = np.random.default_rng(seed), []
        self.model_.train()
        for epoch in range(self.max_iter):
            order = torch.randperm(n, generator=generator(seed, epoch)).numpy()
            losses = []
            for i in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * schedule(epoch * steps + i)
                x_a, x_b = self._two(rows[order[i * size : (i + 1) * size]], rng)
                loss = self.model_(x_a, x_b)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise InvalidInput(
                    f"the loss is not finite in pass {epoch + 1}; lower learning_rate, or look at views."
                )
            curve.append(float(np.mean(losses)))
        self.model_.eval()
        return curve

    def _two(self, batch: NDArray[np.float64], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.views is None:
            pair = self._changed(batch, rng), self._changed(batch, rng)
        else:
            with users_code("views(X, rng)"):
                pair = self.views(batch.copy(), rng)
            if not isinstance(pair, tuple | list) or len(pair) != 2 or any(np.shape(v) != batch.shape for v in pair):
                found = [np.shape(v) for v in pair] if isinstance(pair, tuple | list) else type(pair).__name__
                raise InvalidInput(f"views(X, rng) must return two arrays of shape {batch.shape}, not {found}.")
            if not all(np.isfinite(v).all() for v in pair):
                raise InvalidInput("views(X, rng) returned NaN or infinity.")
        a, b = (torch.as_tensor(np.asarray(v), dtype=torch.float32, device=self.device) for v in pair)
        return a, b

    def _changed(self, batch: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        other = rng.permuted(batch, axis=0)  # each column in an order of its own
        kept = rng.random(batch.shape) >= self.swap
        return np.where(kept, batch, other) + self.noise * rng.normal(size=batch.shape)
