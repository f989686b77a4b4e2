"""A small vision transformer as a scikit-learn classifier, for images and for rows of numbers."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn import ViT, build
from mlcollage.nn.init import seeded
from mlcollage.train import AugReg, kernel_groups, reference_schedule
from mlcollage.train.recipes import TrainingRecipe


class ViTClassifier(ClassifierMixin, BaseEstimator):
    """Vision transformer trained from scratch with one of the paper's presets.

    Rows of numbers are read as series in the order of their columns, images as (n, height, width),
    (n, channels, height, width) or rows with ``image_shape``. Numbers are standardized by the training set; images of
    type uint8 are scaled to [-1, 1] instead, and only they can have RandAugment.

    Parameters
    ----------
    augreg
        Augmentation by name, such as ``"light2"``: RandAugment (uint8 images only) and mixup.
    dropout
        Probability of dropout and, at most, of stochastic depth.
    weight_decay
        Decoupled, of kernels.
    image_shape
        (channels, height, width) of a row of X; None: what X's axes say.
    patch_size, width, depth, heads
        Of the network. Series and images are padded with zeros until patches tile them.
    steps, batch_size, learning_rate
        Of AdamW with a warm-up of a tenth and a cosine to 0.
    random_state
        Seed or generator of weights, batches and augmentation.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    n_features_in_ : int
    model_ : ViT
        The trained network, in evaluation mode.
    train_score_ : float
        Accuracy on the training samples as they are; accuracy under augmentation or mixup would be no accuracy.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = ViTClassifier(image_shape=(1, 8, 8), steps=150, random_state=0).fit(X[:600], y[:600])
    >>> model.score(X[600:], y[600:]) > 0.5
    True
    """

    def __init__(
        self,
        augreg: str = "none",
        *,
        dropout: float = 0.0,
        weight_decay: float = 0.1,
        image_shape: tuple[int, int, int] | None = None,
        patch_size: int = 4,
        width: int = 32,
        depth: int = 2,
        heads: int = 2,
        steps: int = 300,
        batch_size: int = 32,
        learning_rate: float = 3e-3,
        random_state: Any = None,
    ) -> None:
        self.augreg = augreg
        self.dropout = dropout
        self.weight_decay = weight_decay
        self.image_shape = image_shape
        self.patch_size = patch_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> ViTClassifier:
        """Train on samples X (n, ...) and labels y (n,) of any kind."""
        X = _array(X)
        pixels = X.dtype == np.uint8 if isinstance(X, np.ndarray) else False
        shape = _axes(X, self.image_shape)
        rows, labels = validate_data(self, _flat(X), y, dtype=np.float32)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("This classifier needs samples of at least 2 classes, but the data has only one class.")
        setting = AugReg.from_name(self.augreg, dropout=self.dropout, weight_decay=self.weight_decay)
        self.shape_ = shape if shape is not None else (1, 1, rows.shape[1])
        if math.prod(self.shape_) != rows.shape[1]:
            raise InvalidInput(
                f"image_shape={self.shape_} has {math.prod(self.shape_)} numbers; a row has {rows.shape[1]}."
            )
        self._pixels = bool(pixels) and self.shape_[1] > 1
        if setting.layers and not self._pixels:
            raise InvalidInput(
                f"augreg={self.augreg!r} has RandAugment, which needs images of type uint8 from 0 to 255."
            )
        half = np.float32(127.5)  # pixels from 0 to 255 become numbers from -1 to 1
        self._center: Any = half if self._pixels else rows.mean(0)
        self._spread: Any = half if self._pixels else _spread(rows)
        rng = check_random_state(self.random_state)
        seed = int(rng.randint(2**31 - 1))
        self.model_ = cast(ViT, build(lambda: self._network(len(self.classes_), setting), seed))
        self._train(rows, torch.from_numpy(codes), setting, seed)
        self.train_score_ = float((self.predict(X) == np.asarray(labels)).mean())
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Probabilities of the classes, (n, n_classes)."""
        check_is_fitted(self, "model_")
        X = _array(X)
        shape = _axes(X, None) if len(getattr(X, "shape", ())) == 3 or not self.image_shape else None
        if shape is not None and shape != self.shape_:
            raise InvalidInput(f"images of shape {shape} were given; the model was fitted to {self.shape_}.")
        if self._pixels and getattr(X, "dtype", None) != np.uint8 and 0 < np.max(X, initial=0) <= 1:
            warnings.warn(
                "the model was fitted to pixels from 0 to 255; these end at 1: give raw pixels.", stacklevel=2
            )
        rows = validate_data(self, _flat(X), reset=False, dtype=np.float32)
        with torch.no_grad():
            parts = [
                self.model_(self._images(part)).double().softmax(1)
                for part in np.array_split(rows, len(rows) // 1024 + 1)
            ]
        found: NDArray[np.float64] = torch.cat(parts).numpy()
        return found

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class of each sample, (n,)."""
        best = self.predict_proba(X).argmax(1)
        found: NDArray[Any] = self.classes_[best]
        return found

    def _network(self, classes: int, setting: AugReg) -> ViT:
        c, h, w = self.shape_
        patch = checks.integer("patch_size", self.patch_size, least=1)
        tall = 1 if h == 1 else patch
        return ViT(
            (c, -(-h // tall) * tall, -(-w // patch) * patch),
            classes,
            patch_size=(tall, patch),
            dim=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=4.0,
            pool="mean",
            gelu="tanh",
            init="reference",
            dropout=setting.dropout,
            stochastic_depth=setting.stochastic_depth,
        )

    def _images(self, rows: NDArray[np.float32]) -> torch.Tensor:
        """Rows as the network sees them: scaled, and padded with zeros at the end."""
        x = torch.from_numpy(((rows - self._center) / self._spread).astype(np.float32)).view(-1, *self.shape_)
        _, h, w = self.model_.in_shape
        return F.pad(x, (0, w - x.shape[3], 0, h - x.shape[2]))

    def _train(self, rows: NDArray[np.float32], y: torch.Tensor, setting: AugReg, seed: int) -> None:
        steps = checks.integer("steps", self.steps, least=2)
        batch = min(checks.integer("batch_size", self.batch_size, least=1), len(rows))
        optimizer = torch.optim.AdamW(
            kernel_groups(self.model_, setting.weight_decay), lr=checks.positive("learning_rate", self.learning_rate)
        )
        recipe = TrainingRecipe(optimizer, reference_schedule(steps, max(1, steps // 10)), 1.0, F.cross_entropy, steps)
        g = torch.Generator().manual_seed(seed)
        self.model_.train()
        order = torch.empty(0, dtype=torch.long)
        with seeded(seed):  # dropout
            for _ in range(steps):
                if len(order) < batch:  # a new pass in a new order
                    order = torch.cat([order, torch.randperm(len(rows), generator=g)])
                chosen, order = order[:batch], order[batch:]
                raw = rows[chosen.numpy()]
                if setting.layers:
                    images = torch.from_numpy(raw.astype(np.uint8)).view(-1, *self.shape_)
                    raw = (
                        setting.transform(images, generator=g, reference_size=224).flatten(1).numpy().astype(np.float32)
                    )
                mixed = setting.mixup(self._images(raw), y[chosen], len(self.classes_), generator=g)
                recipe.step(recipe.loss(self.model_(mixed.x), mixed.y))
        self.model_.eval()


def _axes(X: Any, image_shape: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    """(channels, height, width) of each sample; None for rows of numbers."""
    if image_shape is not None:
        if len(image_shape) != 3:
            raise InvalidInput(f"image_shape must be (channels, height, width), not {image_shape!r}.")
        return (int(image_shape[0]), int(image_shape[1]), int(image_shape[2]))
    shape: tuple[int, ...] = tuple(getattr(X, "shape", ()))
    if len(shape) == 3:
        return (1, shape[1], shape[2])
    if len(shape) == 4:
        if shape[3] in (1, 3, 4) and shape[1] in (1, 3, 4):
            raise InvalidInput(
                f"X of shape {tuple(shape)} may have its channels first or last; say image_shape=(channels, height, "
                "width) of images with channels first."
            )
        if shape[3] in (1, 3, 4):
            raise InvalidInput(f"X of shape {tuple(shape)} has its channels last; use X.transpose(0, 3, 1, 2).")
        return (shape[1], shape[2], shape[3])
    return None


def _array(X: Any) -> Any:
    """Lists of images and tensors as one array; tables and rows as they are, for scikit-learn's own checks."""
    if isinstance(X, torch.Tensor) or (isinstance(X, list | tuple) and X and np.ndim(X[0]) > 1):
        return np.asarray(X)
    return X


def _flat(X: Any) -> Any:
    return np.asarray(X).reshape(len(X), -1) if len(getattr(X, "shape", ())) > 2 else X


def _spread(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    sd = rows.std(0)
    return np.where(sd > 0, sd, 1.0).astype(np.float32)
