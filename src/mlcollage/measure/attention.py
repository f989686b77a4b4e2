r"""Attention maps of any model that was not changed for it, and how far its heads look.

A map is :math:`A = \operatorname{softmax}(s\,Q K^\top + M)` of a head, (queries, keys), with rows that sum to one. A
``TorchFunctionMode`` sees the calls that make it: ``scaled_dot_product_attention`` and
``multi_head_attention_forward``, which do not hand it out, and a softmax whose result is multiplied with values. While
it is on, torch leaves its fused encoder layers, which would hide these calls.

The mean attention distance of a head (Raghu et al. 2021, section 4, after Dosovitskiy et al. 2021) is

.. math::
    d = \frac{1}{|P|} \sum_{q \in P} \sum_{k \in P} A_{qk}\, \lVert r_q - r_k \rVert

over patches P with centers r in pixels of the model's input.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure._module_stack import ModuleStack, in_backward
from mlcollage.measure.layer_tap import hookable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AttentionDistance", "AttentionTap", "TokenGrid", "attention_distance", "map_distance", "token_grid"]

Floats = npt.NDArray[np.float64]


class AttentionTap(Mapping[str, Tensor]):
    """A mapping from attention modules to their maps, filled by each forward pass of a model.

    While the tap is open, ``tap[name]`` is the map (batch, heads, queries, keys) that was made in the module at that
    path in the last forward pass; iteration follows the order of execution. The model's outputs stay what they are, bit
    for bit, except that torch's fused encoder layers are not used.

    * A module that makes several maps in one pass gives ``name``, ``name#1``, ...
    * Masks, scale, causality and grouped heads are part of the map. A row in which everything is masked is zero, and
      ``empty_rows`` counts these.
    * Maps are taken before dropout.
    * A softmax counts as attention if it is over the last axis and its result, perhaps after dropout or a reshape, is
      the left factor of a matrix product.

    Parameters
    ----------
    model
        Any module.
    consume
        Called with the name and each map, which is then not kept.

    Attributes
    ----------
    empty_rows : dict of str to int
        By map, the rows that are masked altogether.
    missing : tuple of str
        Attention modules that ran without a map that could be seen.

    Raises
    ------
    InvalidInput
        When the tap is closed after a pass in which no map was seen; for compiled or scripted models.

    Warns
    -----
    UserWarning
        When the tap is closed, if some of the attention modules gave no map: kernels outside of torch (xformers,
        flash-attn) and flex attention cannot be seen.

    Examples
    --------
    >>> layer = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
    >>> with torch.no_grad(), AttentionTap(layer) as tap:
    ...     out = layer(torch.ones(3, 5, 8))
    >>> {name: tuple(a.shape) for name, a in tap.items()}
    {'self_attn': (3, 2, 5, 5)}
    """

    def __init__(self, model: nn.Module, *, consume: Callable[[str, Tensor], None] | None = None) -> None:
        self.model = hookable(model, "AttentionTap")
        self._consume = consume
        self._values: dict[str, Tensor] = {}
        self._watch = _Watch(self.model, self._take)
        self.empty_rows: dict[str, int] = {}

    def _take(self, name: str, source: _Source) -> None:
        a = source.whole()
        if empty := int((a.sum(-1) == 0).sum()):
            self.empty_rows[name] = empty
        if self._consume is not None:
            self._consume(name, a)
        else:
            self._values[name] = a

    def __enter__(self) -> AttentionTap:
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)
        if kind is None:
            self._watch.complain()

    @property
    def missing(self) -> tuple[str, ...]:
        """Attention modules that ran in the last pass without a map that could be seen."""
        return self._watch.missing

    def clear(self) -> None:
        """Forget the maps of the last pass."""
        self._values.clear()
        self.empty_rows.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            known = ", ".join(self._values) or "nothing: run the model while the tap is open"
            raise UnknownName(f"the last forward pass gave no attention map called {name!r}; it gave {known}.")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class TokenGrid:
    """How tokens lie in an image: which come first without a place, and the grid of the others, row by row.

    Parameters
    ----------
    grid
        (rows, columns) of patches.
    pitch
        (vertical, horizontal) distance of neighboring patches in pixels of the model's input: the stride of the
        patches, not their size, where they overlap.
    prefix
        Tokens before the patches: class token, distillation token, registers.
    """

    grid: tuple[int, int]
    pitch: tuple[float, float] = (1.0, 1.0)
    prefix: int = 0

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or len(self.pitch) != 2:
            raise InvalidInput(f"grid and pitch need two numbers each, not {self.grid} and {self.pitch}.")
        for side in self.grid:
            checks.integer("grid", side, least=1)
        for step in self.pitch:
            checks.positive("pitch", step)
        checks.integer("prefix", self.prefix, least=0)

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def centers(self) -> Tensor:
        """(patches, 2): places of the patches in pixels, float64, row by row."""
        axes = [torch.arange(n, dtype=torch.float64) * step for n, step in zip(self.grid, self.pitch, strict=True)]
        return torch.cartesian_prod(*axes).reshape(-1, 2)

    @property
    def distances(self) -> Tensor:
        """(patches, patches): distances of their centers in pixels, float64."""
        r = self.centers
        return (r[:, None] - r[None, :]).square().sum(-1).sqrt()

    def check(self, tokens: int) -> None:
        """Refuse a number of tokens that the grid does not give."""
        if tokens != self.prefix + self.patches:
            raise InvalidInput(
                f"there are {tokens} tokens, and T - prefix = {tokens - self.prefix} is not "
                f"{self.grid[0]} x {self.grid[1]} = {self.patches}: give the true grid, and as prefix all tokens "
                "before the patches (class token, distillation token, registers)."
            )


def token_grid(
    model: nn.Module,
    *,
    grid: tuple[int, int] | None = None,
    pitch: float | tuple[float, float] | None = None,
    prefix: int | None = None,
) -> TokenGrid:
    """The grid of tokens of a vision transformer, from what the model says of itself and from what is given.

    Models say it as ``grid`` and ``patch_size`` (those of this package), ``config.image_size`` and
    ``config.patch_size`` (Hugging Face), ``patch_embed.grid_size`` and ``patch_embed.patch_size`` (timm), and prefix
    tokens as ``num_prefix_tokens`` or ``config.num_register_tokens``, beside a class token. Nothing is inferred from
    the number of tokens: 65 are 8 x 8 with one prefix token and 6 x 10 with five.

    Parameters
    ----------
    model
        Any module.
    grid, pitch, prefix
        As for :class:`TokenGrid`; what is given must not contradict the model.

    Raises
    ------
    InvalidInput
        If something is neither given nor said by the model, or the two disagree.

    Examples
    --------
    >>> from mlcollage.nn import ViT
    >>> token_grid(ViT((1, 28, 28), 10, patch_size=7))
    TokenGrid(grid=(4, 4), pitch=(7.0, 7.0), prefix=1)
    """
    said = _said(model)
    if grid is None and said["grid"] is None:
        raise InvalidInput(
            f"{type(model).__name__} does not say how its patches lie: give grid=(rows, columns), pitch and prefix."
        )
    shape = grid or said["grid"]
    if pitch is None:
        # Another grid than the model's own is that of images of another size, so that patches keep their size.
        pitch = said["pitch"]
    if pitch is None:
        raise InvalidInput("give pitch, the distance of neighboring patches in pixels of the model's input.")
    if prefix is None:
        prefix = said["prefix"]
    elif said["prefix"] is not None and said["prefix"] != prefix:
        raise InvalidInput(
            f"prefix={prefix}, but {type(model).__name__} says that it has {said['prefix']} tokens before its patches "
            "(class token, distillation token, registers)."
        )
    if prefix is None:
        raise InvalidInput(f"{type(model).__name__} does not say how many tokens come before its patches: give prefix.")
    steps = (float(pitch), float(pitch)) if isinstance(pitch, int | float) else (float(pitch[0]), float(pitch[1]))
    return TokenGrid((int(shape[0]), int(shape[1])), steps, prefix)


def map_distance(
    attention: Any,
    where: TokenGrid,
    *,
    renormalize: bool = False,
    moment: int = 1,
    valid: Any = None,
) -> Floats:
    r"""Mean attention distance of given maps, by image and head, in float64.

    Parameters
    ----------
    attention
        (images, heads, T, T) rows of attention, an array or tensor.
    where
        How the T tokens lie.
    renormalize
        Divide each row by what is left of it after the prefix tokens were cut. By default the mass on them counts as
        distance 0, as in the official code, so that values of models with other prefix tokens cannot be compared.
    moment
        1 for the mean distance in pixels, 2 for the mean squared distance in pixels².
    valid
        (images, patches), true for patches that are no padding: others are no queries. Their keys must be masked in
        the model.

    Returns
    -------
    ndarray
        (images, heads).

    Raises
    ------
    InvalidInput
        If the number of tokens does not fit, or rows do not sum to one.

    Examples
    --------
    >>> uniform = np.full((1, 1, 25, 25), 1 / 25)
    >>> map_distance(uniform, TokenGrid((5, 5), (7.0, 7.0))).round(3).item()
    17.833
    """
    a = _as_tensor(attention)
    if a.ndim != 4 or a.shape[-1] != a.shape[-2]:
        raise InvalidInput(
            f"attention maps have the shape {tuple(a.shape)}; expected (images, heads, tokens, tokens): windows and "
            "cross-attention have no distances on one grid."
        )
    where.check(a.shape[-1])
    sums = a.double().sum(-1)
    if not bool((((sums - 1).abs() < 1e-2) | (sums == 0)).all()):  # bfloat16 has two digits
        raise InvalidInput(
            f"rows of attention sum to {float(sums.min()):.3g} to {float(sums.max()):.3g}, not to 1: give weights "
            "after the softmax and before dropout."
        )
    total = _Distances(where, moment, renormalize, _as_valid(valid, a.shape[0], where))
    total.add(a, slice(0, a.shape[-2]))
    return total.result()


@dataclass(frozen=True, eq=False)
class AttentionDistance:
    """Mean attention distances of all heads; made by :func:`attention_distance`.

    Parameters
    ----------
    names
        Attention modules, in the order in which they ran.
    per_image
        By module, (images, heads) distances in pixels of the model's input.
    prefix_mass
        By module, (heads,) mean attention of patches to the tokens before them.
    where
        How the tokens lie.
    uniform
        The distance of a head that attends to all patches alike, with the prefix tokens' share.
    empty_rows
        By module, the rows that are masked altogether, which are left out.
    missing
        Attention modules without a map.
    """

    names: tuple[str, ...]
    per_image: Mapping[str, Floats]
    prefix_mass: Mapping[str, Floats]
    where: TokenGrid
    uniform: float
    empty_rows: Mapping[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def matrix(self) -> Floats:
        """(blocks, heads): means over images; NaN where a block has fewer heads than others."""
        return self._table(np.nanmean)

    @property
    def sd(self) -> Floats:
        """(blocks, heads): standard deviations over images; NaN for a single image."""
        return self._table(lambda d, axis: np.std(d, axis=axis, ddof=1) if len(d) > 1 else np.full(d.shape[1], np.nan))

    def to_dataframe(self) -> pd.DataFrame:
        """One line per head: ``layer``, ``block``, ``head``, ``distance``, ``sd``, ``prefix_mass``."""
        lines = []
        for i, name in enumerate(self.names):
            for h in range(self.per_image[name].shape[1]):
                lines.append((name, i + 1, h + 1, self.matrix[i, h], self.sd[i, h], float(self.prefix_mass[name][h])))
        return pd.DataFrame(lines, columns=["layer", "block", "head", "distance", "sd", "prefix_mass"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the heads of each block, sorted, as the paper does; the dashed line is uniform attention."""
        from matplotlib.figure import Figure  # not pyplot, which would keep the figure

        ax = Figure(layout="constrained").subplots() if ax is None else ax
        for i, name in enumerate(self.names):
            heads = np.sort(self.matrix[i][np.isfinite(self.matrix[i])])
            ax.plot(np.arange(1, len(heads) + 1), heads, "o-", markersize=4, label=name)
        ax.axhline(self.uniform, color="0.4", linestyle="--", linewidth=1)
        ax.set_xlabel("head, sorted")
        ax.set_ylabel("mean attention distance (pixels)")
        ax.legend(fontsize="small")
        return ax

    def _table(self, reduce: Callable[..., Any]) -> Floats:
        heads = max(d.shape[1] for d in self.per_image.values())
        out = np.full((len(self.names), heads), np.nan)
        for i, name in enumerate(self.names):
            d = self.per_image[name]
            out[i, : d.shape[1]] = reduce(d, axis=0)
        return out


def attention_distance(
    model: nn.Module,
    images: Tensor,
    *,
    where: TokenGrid | None = None,
    renormalize: bool = False,
    moment: int = 1,
    valid: Any = None,
    batch_size: int = 64,
    chunk: int = 256,
) -> AttentionDistance:
    r"""Mean attention distance of every head of a vision transformer, without its T × T maps.

    Parameters
    ----------
    model
        Any vision transformer; run in evaluation mode, which is put back.
    images
        (n, channels, height, width), as the model wants them.
    where
        How its tokens lie; by default what the model says of itself (:func:`token_grid`).
    renormalize
        As for :func:`map_distance`.
    moment
        1, computed for ``chunk`` queries at a time; 2, the mean squared distance, which is linear in
        :math:`(x, y, x^2 + y^2)`, so that the fused kernel itself gives it with these in the place of the values.
    valid
        (n, patches), true for patches that are no padding.
    batch_size, chunk
        Images at a time, and queries at a time.

    Returns
    -------
    AttentionDistance

    Raises
    ------
    InvalidInput
        If the tokens do not fit the grid, or no attention map can be seen.

    Examples
    --------
    >>> from mlcollage.nn import ViT
    >>> model = ViT((1, 28, 28), 10, patch_size=7, dim=32, depth=2)
    >>> found = attention_distance(model, torch.rand(8, 1, 28, 28))
    >>> found.names, found.matrix.shape
    (('block1.attn', 'block2.attn'), (2, 4))
    """
    place = _place(model, images) if where is None else where
    n = len(images)
    batch_size, chunk = checks.integer("batch_size", batch_size, least=1), checks.integer("chunk", chunk, least=1)
    checks.choice("moment", str(moment), ("1", "2"))
    keep = _as_valid(valid, n, place)
    distances: dict[str, list[Floats]] = {}
    masses: dict[str, list[Floats]] = {}
    empty: dict[str, int] = {}
    batch = images[:batch_size]
    first = 0

    def take(name: str, source: _Source) -> None:
        size = source.shape
        if len(size) != 4 or size[0] != len(batch) or size[-1] != size[-2]:
            raise InvalidInput(_no_grid(name, size, len(batch)))
        place.check(size[-1])
        part = None if keep is None else keep[first : first + len(batch)]
        total = _Distances(place, moment, renormalize, part)
        if moment == 2 and isinstance(source, _Product):
            total.add_fused(source)
        else:
            for rows, a in source.chunks(chunk):
                total.add(a, rows)
        distances.setdefault(name, []).append(total.result())
        masses.setdefault(name, []).append(total.prefix_mass())
        empty[name] = empty.get(name, 0) + total.empty

    watch = _Watch(hookable(model, "attention_distance"), take)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), watch:
            for first in range(0, n, batch_size):
                batch = images[first : first + batch_size]
                model(batch)
    finally:
        for module, mode in modes:
            module.training = mode
    watch.complain()
    names = tuple(distances)
    uniform = place.distances.pow(moment).mean() * (
        1 if renormalize else place.patches / (place.patches + place.prefix)
    )
    return AttentionDistance(
        names,
        {name: np.concatenate(d) for name, d in distances.items()},
        {name: np.concatenate(d).mean(0) for name, d in masses.items()},
        place,
        float(uniform),
        {name: count for name, count in empty.items() if count},
        watch.missing,
    )


def _place(model: nn.Module, images: Tensor) -> TokenGrid:
    """What the model says of its tokens; one that says too little may attend in windows, which is looked for."""
    try:
        return token_grid(model)
    except InvalidInput as error:
        shapes: dict[str, tuple[int, ...]] = {}
        watch = _Watch(hookable(model, "attention_distance"), lambda name, source: shapes.update({name: source.shape}))
        modes = [(m, m.training) for m in model.modules()]
        try:
            model.eval()
            with torch.no_grad(), watch:
                model(images[:1])
        finally:
            for module, mode in modes:
                module.training = mode
        for name, size in shapes.items():
            if len(size) == 4 and size[0] > 1:
                raise InvalidInput(_no_grid(name, size, 1)) from error
        raise


def _no_grid(name: str, size: tuple[int, ...], images: int) -> str:
    """Why maps of this shape have no distances on one grid, and what to do."""
    windows, left = divmod(size[0], images)
    if len(size) == 4 and windows > 1 and not left and size[-1] == size[-2]:
        side = math.isqrt(size[-1])
        shape = f"{side}, {side}" if side * side == size[-1] else "rows, columns"
        return (
            f"the attention of {name!r} is in {windows} windows of {size[-1]} tokens for each image, whose places in "
            "the image the maps do not tell. Where a window is a block of the grid, row by row, and images are not "
            f"padded, map_distance(tap[{name!r}], TokenGrid(({shape}), pitch)) of an AttentionTap is exact, also for "
            "shifted windows, whose mask is in the map."
        )
    return (
        f"the attention of {name!r} has maps {size} for {images} images; expected (images, heads, T, T): "
        "cross-attention has no distances on one grid."
    )


class _Distances:
    """Sums over queries of attention times distance, by image and head."""

    def __init__(self, where: TokenGrid, moment: int, renormalize: bool, valid: Tensor | None) -> None:
        self.where, self.renormalize, self.valid = where, renormalize, valid
        self.power = where.distances if moment == 1 else where.distances.square()
        self.total: Tensor | float = 0.0
        self.count: Tensor | float = 0.0
        self.mass: Tensor | float = 0.0  # on prefix tokens
        self.empty = 0

    def add(self, a: Tensor, rows: slice) -> None:
        """Take the rows (images, heads, rows, T) of the maps."""
        p = self.where.prefix
        skip = max(0, p - rows.start)  # rows of prefix tokens
        a = a[:, :, skip:].double()
        first = rows.start + skip - p
        if not a.shape[2]:
            return
        patches = a[..., p:]
        d = (patches * self.power[first : first + a.shape[2]].to(a.device)).sum(-1)  # (images, heads, rows)
        self._sum(d, patches.sum(-1), a.sum(-1), slice(first, first + a.shape[2]))

    def add_fused(self, source: _Product) -> None:
        r = self.where.centers  # (patches, 2)
        values = torch.cat([r, r.square().sum(1, keepdim=True), torch.ones(len(r), 1, dtype=r.dtype)], 1)
        values = torch.cat([values.new_zeros(self.where.prefix, 4), values])  # (T, 4)
        e = source.attend(values)[:, :, self.where.prefix :].double()  # (images, heads, patches, 4)
        r = r.to(e.device)
        # |r_q|² E[1] - 2 r_q E[r] + E[|r|²], where prefix tokens have none of them
        d = r.square().sum(1) * e[..., 3] - 2 * (r * e[..., :2]).sum(-1) + e[..., 2]
        whole = torch.ones_like(d)
        self._sum(d.clamp(min=0), e[..., 3], whole, slice(0, self.where.patches))

    def _sum(self, d: Tensor, mass: Tensor, whole: Tensor, rows: slice) -> None:
        seen = whole > 0  # else masked altogether
        self.empty += int((~seen).sum())
        keep = seen if self.valid is None else seen & self.valid[:, None, rows].to(seen.device)
        if self.renormalize:
            keep = keep & (mass > 0)
            d = d / mass.clamp(min=torch.finfo(mass.dtype).tiny)
        self.total = self.total + torch.where(keep, d, 0.0).sum(-1)
        self.mass = self.mass + torch.where(keep, whole - mass, 0.0).sum(-1)
        self.count = self.count + keep.sum(-1)

    def result(self) -> Floats:
        found: Floats = (torch.as_tensor(self.total) / torch.as_tensor(self.count)).cpu().numpy()
        return found

    def prefix_mass(self) -> Floats:
        found: Floats = (torch.as_tensor(self.mass) / torch.as_tensor(self.count)).cpu().numpy()
        return found


class _Source:
    """One module's attention, which may be read whole or some queries at a time."""

    shape: tuple[int, ...]

    def whole(self) -> Tensor:
        raise NotImplementedError

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and (..., rows, keys) of the map."""
        raise NotImplementedError


class _Map(_Source):
    """A map that the model made itself."""

    def __init__(self, a: Tensor) -> None:
        self.a = torch.where(a.isnan().all(-1, keepdim=True), 0.0, a) if bool(a.isnan().any()) else a
        self.shape = tuple(a.shape)

    def whole(self) -> Tensor:
        return self.a

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.shape[-2], size):
            yield slice(start, start + size), self.a[..., start : start + size, :]


class _Product(_Source):
    """A map that a fused kernel keeps to itself: queries, keys, and what is added to their products."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        q, k = query.detach(), key.detach()
        if enable_gqa and k.shape[-3] != q.shape[-3]:  # several heads of queries share one of keys
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
        self.q, self.k, self.mask, self.causal = q, k, None if attn_mask is None else attn_mask.detach(), is_causal
        self.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        self.shape = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])

    def whole(self) -> Tensor:
        return self._rows(0, self.shape[-2])

    def chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.shape[-2], size):
            yield slice(start, start + size), self._rows(start, min(start + size, self.shape[-2]))

    def attend(self, values: Tensor) -> Tensor:
        """(..., queries, columns) of values (keys, columns), in float64."""
        v = values.to(self.q.device).expand(*self.shape[:-2], *values.shape)
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.double()
        return F.scaled_dot_product_attention(
            self.q.double(), self.k.double(), v, attn_mask=mask, is_causal=self.causal, scale=self.scale
        )

    def _rows(self, start: int, stop: int) -> Tensor:
        with torch.autocast(self.q.device.type, enabled=False):
            kind = torch.promote_types(self.q.dtype, torch.float32)
            s = self.q[..., start:stop, :].to(kind) @ self.k.to(kind).transpose(-2, -1) * self.scale
            if self.causal:
                columns = torch.arange(self.shape[-1], device=s.device)
                later = columns[None, :] > torch.arange(start, stop, device=s.device)[:, None]
                s = s.masked_fill(later, -math.inf)
            if self.mask is not None:
                mask = self.mask if self.mask.ndim < 2 or self.mask.shape[-2] == 1 else self.mask[..., start:stop, :]
                s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(kind)
            return torch.where((s == -math.inf).all(-1, keepdim=True), 0.0, s.softmax(-1))


_FUSED = F.scaled_dot_product_attention
_MULTI = F.multi_head_attention_forward
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch._softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
# What a map may go through before it is multiplied with values.
_ALIKE = {
    F.dropout,
    torch.dropout,
    Tensor.to,
    Tensor.type_as,
    Tensor.type,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.contiguous,
    Tensor.unflatten,
    Tensor.flatten,
    Tensor.masked_fill,
    Tensor.nan_to_num,
    torch.nan_to_num,
    Tensor.mul,
    Tensor.__mul__,
    torch.mul,
}


class _Watch(TorchFunctionMode):
    """Sees the functions that make attention, and in which module they are called."""

    def __init__(self, model: nn.Module, take: Callable[[str, _Source], None]) -> None:
        super().__init__()
        self.model, self._take = model, take
        self._stack = ModuleStack(model, self._start)
        self._soft = WeakTensorKeyDictionary()  # results of softmax, and what was made of them, to the results
        self._attending = _attention_modules(model)
        self._calls: dict[str, int] = {}
        self._seen: set[str] = set()

    def _start(self) -> None:
        self._calls.clear()
        self._seen.clear()

    def __enter__(self) -> _Watch:
        self._stack.open()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @property
    def missing(self) -> tuple[str, ...]:
        """Attention modules that ran in the last pass without a map."""
        return tuple(name for name in self._attending if name in self._stack.ran - self._seen)

    def complain(self) -> None:
        """Refuse a pass in which nothing was seen, and warn of modules of which nothing was."""
        if not self._stack.passes:
            return
        why = (
            "kernels outside of torch (xformers, flash-attn), flex attention and compiled parts cannot be seen; load "
            "the model with attn_implementation='eager' or 'sdpa', or switch its fused kernel off"
        )
        if not self._seen:
            known = f"0 of {len(self._attending)} attention modules" if self._attending else "no attention module"
            raise InvalidInput(f"{known} of {type(self.model).__name__} gave a map: {why}.")
        if self.missing:
            listed = ", ".join(self.missing[:4]) + (", ..." if len(self.missing) > 4 else "")
            warnings.warn(
                f"{len(self.missing)} of {len(self._attending)} attention modules gave no map ({listed}): {why}.",
                UserWarning,
                stacklevel=3,
            )

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._stack.inside or in_backward():  # other models may run beside this one
            return out
        if func is _FUSED:
            with torch.no_grad():
                self._found(_Product(*args, **kwargs))
        elif func is _MULTI:
            self._found(_Map(_weights_of(out, args, kwargs)))
        elif func in _SOFTMAX:
            if isinstance(out, Tensor) and out.ndim >= 3 and _over_last(args, kwargs, out.ndim):
                self._soft[out] = out.detach()
        elif func in _PRODUCTS or func in _ALIKE or func is torch.einsum:
            self._follow(func, args, kwargs, out)
        return out

    def _follow(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        soft = None if first is None else self._soft.get(first)
        if soft is None:
            return
        if func in _ALIKE:
            if isinstance(out, Tensor):
                self._soft[out] = soft
        else:
            self._found(_Map(soft))

    def _found(self, source: _Source) -> None:
        name = self._stack.inside[-1]
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        # The innermost attention module around counts as seen, whichever of its parts made the map.
        self._seen.add(next((n for n in reversed(self._stack.inside) if n in self._attending), name))
        self._take(f"{name}#{call}" if call else name, source)


def _weights_of(out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The map of a call of multi_head_attention_forward, by a second call where the first did not give it by head."""
    names = list(inspect.signature(_MULTI).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    a = out[1]
    if a is None or given.get("average_attn_weights", True) or (given.get("dropout_p") and given.get("training")):
        again = {**given, "need_weights": True, "average_attn_weights": False, "training": False}
        if again.get("is_causal") and again.get("attn_mask") is not None:
            again["is_causal"] = False  # the mask says it
        with torch.no_grad():
            a = _MULTI(**again)[1]
    a = a.detach()
    return a if a.ndim == 4 else a.unsqueeze(0)  # a single sequence without a batch


def _over_last(args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: int) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, axes - 1)


def _attention_modules(model: nn.Module) -> tuple[str, ...]:
    """Modules that are called attention and have no part that is."""
    named = [name for name, m in model.named_modules() if "attention" in type(m).__name__.lower()]
    return tuple(n for n in named if not any(o != n and (o.startswith(f"{n}.") or not n) for o in named))


def _as_tensor(attention: Any) -> Tensor:
    return attention.detach() if isinstance(attention, Tensor) else torch.from_numpy(np.asarray(attention))


def _as_valid(valid: Any, n: int, where: TokenGrid) -> Tensor | None:
    if valid is None:
        return None
    keep = torch.as_tensor(np.asarray(valid) if not isinstance(valid, Tensor) else valid).bool().reshape(n, -1)
    if keep.shape[1] != where.patches:
        raise InvalidInput(f"valid has {keep.shape[1]} places for each image, but there are {where.patches} patches.")
    return keep


def _said(model: nn.Module) -> dict[str, Any]:
    """What a model says of its patches."""
    found: dict[str, Any] = {"grid": None, "pitch": None, "prefix": None}
    config = getattr(model, "config", None)
    embed = getattr(model, "patch_embed", None)
    size, patch = (getattr(config, k, None) for k in ("image_size", "patch_size"))
    if isinstance(grid := getattr(model, "grid", None), tuple) and len(grid) == 2:
        found["grid"], patch = grid, getattr(model, "patch_size", None)
        shape: tuple[int, ...] = getattr(model, "in_shape", ())
        if len(shape) == 3:  # a convolutional stem may come before the patches
            patch = (shape[1] // grid[0], shape[2] // grid[1])
    elif (grid := getattr(embed, "grid_size", None)) is not None:
        found["grid"], patch = tuple(grid), getattr(embed, "patch_size", None)
    elif size is not None and patch is not None:
        sides, parts = (v if isinstance(v, tuple | list) else (v, v) for v in (size, patch))
        found["grid"] = (sides[0] // parts[0], sides[1] // parts[1])
    if patch is not None:
        parts = patch if isinstance(patch, tuple | list) else (patch, patch)
        found["pitch"] = (float(parts[0]), float(parts[1]))
    if isinstance(count := getattr(model, "num_prefix_tokens", None), int):
        found["prefix"] = count
    elif isinstance(registers := getattr(config, "num_register_tokens", None), int):
        found["prefix"] = 1 + registers
    else:
        tokens = [
            p.shape[-2]
            for name, p in model.named_parameters()
            if name.split(".")[-1] in ("token", "cls_token", "class_token", "distillation_token", "dist_token")
            and p.ndim == 3
        ]
        if tokens or isinstance(getattr(model, "grid", None), tuple):
            found["prefix"] = sum(tokens)
    return found
