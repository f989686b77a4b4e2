r"""What tokens know of their place, and of the class.

The localization of a layer is the CKA of each of its tokens (or places of a feature map) with the pixels of each patch
of the images (Raghu et al. 2021, section 6): a token that keeps its own patch is high there and low elsewhere.
A probe of tokens is a linear classifier on one of them, on their mean, or on the class token (section 6 and appendix).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure.attention import TokenGrid, token_grid
from mlcollage.measure.cka import CKAResult, MinibatchCKA
from mlcollage.measure.layer_tap import LayerTap, hookable
from mlcollage.measure.probes import layer_probes
from mlcollage.measure.units import LayerUnits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TokenLocalization", "token_localization", "token_probes"]

Floats = npt.NDArray[np.float64]
Reading = Literal["pooled", "class", "each"]


@dataclass(frozen=True, eq=False)
class TokenLocalization:
    """CKA of the tokens of a layer with the patches of the images; made by :func:`token_localization`.

    Parameters
    ----------
    layer
        Its path.
    cka
        All pairs, with intervals: rows are tokens, prefix tokens first, columns patches.
    where
        How the tokens lie.
    """

    layer: str
    cka: CKAResult
    where: TokenGrid

    @property
    def maps(self) -> Floats:
        """(tokens, rows, columns): a map of patches for each token, prefix tokens first."""
        return self.cka.matrix.reshape(-1, *self.where.grid)

    @property
    def score(self) -> float:
        """Mean over patch tokens of CKA with the own patch minus the mean of that with the others."""
        return self._score(self.cka.matrix)

    @property
    def ci(self) -> tuple[float, float]:
        """Jackknife limits of :attr:`score` over batches; NaN with a single batch."""
        b = len(self.cka.sizes)
        if b < 2:
            return float("nan"), float("nan")
        deleted = np.array([self._score(m) for m in self.cka.without_each_batch])
        error = float(np.sqrt((b - 1) / b * ((deleted - deleted.mean()) ** 2).sum()))
        half = float(scipy.stats.t.ppf(0.5 + self.cka.level / 2, b - 1)) * error
        return self.score - half, self.score + half

    @property
    def rank_one(self) -> float:
        """Share of patch tokens whose most similar patch is their own; by chance one over the number of patches."""
        own = self.cka.matrix[self.where.prefix :]
        known = ~np.isnan(own).all(1)
        if not known.any():
            return float("nan")
        best = np.nanargmax(own[known], axis=1)
        return float((best == np.flatnonzero(known)).mean())

    def plot(self, ax: Axes | None = None, *, token: int | None = None, cmap: str = "magma") -> Axes:
        """Draw the map of one token, by default that of the patch in the middle."""
        from matplotlib.figure import Figure  # not pyplot, which would keep the figure

        ax = Figure(layout="constrained").subplots() if ax is None else ax
        rows, columns = self.where.grid
        chosen = self.where.prefix + rows // 2 * columns + columns // 2 if token is None else token
        image = ax.imshow(self.maps[checks.integer("token", chosen, least=0, most=len(self.maps) - 1)], cmap=cmap)
        ax.set_xticks([]), ax.set_yticks([])
        ax.figure.colorbar(image, ax=ax, label="CKA with the patch")
        return ax

    def _score(self, matrix: Floats) -> float:
        own = matrix[self.where.prefix :]  # (patches, patches)
        n = len(own)
        if n < 2:
            raise InvalidInput("with a single patch there are no others to compare it with.")
        here = np.diagonal(own)
        with np.errstate(invalid="ignore"):
            others = (np.nansum(own, axis=1) - np.nan_to_num(here)) / np.maximum((~np.isnan(own)).sum(1) - 1, 1)
        return float(np.nanmean(here - others))


def token_localization(
    model: nn.Module,
    layer: str,
    images: Tensor,
    *,
    where: TokenGrid | None = None,
    unit_axis: int | None = None,
    batch_size: int = 256,
) -> TokenLocalization:
    """How similar each token of a layer is to each patch of the images.

    Parameters
    ----------
    model
        Any module; run in evaluation mode, which is put back.
    layer
        Path of a layer with tokens, or with feature maps, which are averaged to the grid of ``where``.
    images
        (n, channels, height, width), as the model wants them. Patches that do not vary over images, such as empty
        corners, have no CKA (NaN) and are left out of the score.
    where
        How tokens lie; by default what the model says of itself. Feature maps need it: its grid is that of the patches.
    unit_axis
        The axis of the layer's units, where it cannot be told from the model.
    batch_size
        Images at a time; the last ones are left out if they are fewer than four.

    Returns
    -------
    TokenLocalization

    Raises
    ------
    InvalidInput
        If the grid is not known, does not fit the tokens or does not tile the images.

    Examples
    --------
    >>> from mlcollage.nn import ViT
    >>> model = ViT((1, 8, 8), 3, patch_size=2, dim=16, depth=1)
    >>> found = token_localization(model, "block1", torch.rand(64, 1, 8, 8))
    >>> found.maps.shape, found.rank_one
    ((17, 4, 4), 1.0)
    """
    checks.integer("batch_size", batch_size, least=4)
    if len(images) < 4:
        raise InvalidInput(f"{len(images)} images were given; unbiased CKA needs four at least, better hundreds.")
    network = hookable(model, "token_localization")
    place = token_grid(network) if where is None else where
    rows, columns = place.grid
    height, width = images.shape[-2:]
    if height % rows or width % columns:
        raise InvalidInput(
            f"{rows} x {columns} patches do not tile images of {height} x {width} pixels: crop or resize the images, "
            "or give another grid."
        )
    maps = MinibatchCKA()
    axes = LayerUnits(network, layer, unit_axis=unit_axis)
    modes = [(m, m.training) for m in network.modules()]
    prefix = 0
    try:
        network.eval()
        axes.look(images[: min(len(images), 3)])
        for start in range(0, len(images), batch_size):
            x = images[start : start + batch_size]
            if len(x) < 4:
                break
            with torch.no_grad(), LayerTap(network, layer, copy=True) as tap:
                network(x)
            tokens, prefix = _tokens(axes(layer, tap[layer]), place, layer)  # (n, T, D)
            cut = x.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (n, c, rows, p, columns, q)
            patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (n, patches, c * p * q)
            for i in range(tokens.shape[1]):
                maps.consume(f"token {i}", tokens[:, i])
            for j in range(patches.shape[1]):
                maps.consume_other(f"patch {j // columns},{j % columns}", patches[:, j])
            maps.end_batch()
    finally:
        for module, mode in modes:
            module.training = mode
    with warnings.catch_warnings():
        # Empty corners and dead pixels are usual, and are left out; so is a class token at the embedding.
        warnings.simplefilter("ignore", UserWarning)
        result = maps.compute()
    return TokenLocalization(layer, result, TokenGrid(place.grid, place.pitch, prefix))


def token_probes(
    train: Mapping[str, Tensor],
    y_train: Any,
    test: Mapping[str, Tensor],
    y_test: Any,
    *,
    read: Reading = "pooled",
    prefix: int = 1,
    ridge: float = 1e-2,
) -> dict[str, float]:
    """Test accuracy of linear probes on the tokens of each layer.

    Parameters
    ----------
    train, test
        Tokens (n, T, D) by layer.
    y_train, y_test
        Class indices.
    read
        ``"pooled"``, the mean of all patch tokens; ``"class"``, the first token; ``"each"``, a probe for each patch
        token by itself, and the mean of their accuracies.
    prefix
        Tokens before the patches, at least 1 for ``"class"``.
    ridge
        As for :func:`~mlcollage.measure.layer_probes`, which makes the probes.

    Returns
    -------
    dict of str to float

    Raises
    ------
    InvalidInput
        For layers without tokens, or without a class token.

    Examples
    --------
    >>> y = torch.arange(40) % 2
    >>> tokens = torch.randn(40, 5, 3, generator=torch.Generator().manual_seed(0))
    >>> tokens[:, 0, 0] += 9 * y  # only the class token knows
    >>> layers = {"last": tokens}
    >>> token_probes(layers, y, layers, y, read="class")["last"], token_probes(layers, y, layers, y)["last"] < 0.8
    (1.0, True)
    """
    checks.choice("read", read, ("pooled", "class", "each"))
    checks.integer("prefix", prefix, least=1 if read == "class" else 0)
    found = {}
    for name, h in train.items():
        if name not in test:
            raise UnknownName(f"layer {name!r} is in the training tokens only.")
        if h.ndim != 3 or h.shape[1] <= prefix:
            raise InvalidInput(f"layer {name!r} gives {tuple(h.shape)}; expected tokens (n, T, D), T above {prefix}.")
        if read == "class":
            parts = {"0": (h[:, 0], test[name][:, 0])}
        elif read == "pooled":
            parts = {"0": (h[:, prefix:].mean(1), test[name][:, prefix:].mean(1))}
        else:
            parts = {str(t): (h[:, t], test[name][:, t]) for t in range(prefix, h.shape[1])}
        accuracies = layer_probes(
            {k: a for k, (a, _) in parts.items()}, y_train, {k: b for k, (_, b) in parts.items()}, y_test, ridge=ridge
        )
        found[name] = float(np.mean(list(accuracies.values())))
    return found


def _tokens(h: Tensor | None, place: TokenGrid, layer: str) -> tuple[Tensor, int]:
    """A layer's output (n, U, *places) as tokens (n, T, U), and how many of them are no patches."""
    if h is None or h.ndim not in (3, 4):
        raise InvalidInput(f"layer {layer!r} gives neither tokens nor feature maps.")
    if h.ndim == 4:
        return F.adaptive_avg_pool2d(h, place.grid).flatten(2).transpose(1, 2), 0
    place.check(h.shape[2])
    return h.transpose(1, 2), place.prefix
