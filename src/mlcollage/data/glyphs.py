"""GlyphWorld: endless labeled images; every cause of their variation is known and can be set.

A class is a *stroke skeleton*. Everything else (pose, warp, stroke width, colors, texture, clutter, noise) is drawn
independently of the class, so neither color nor position nor brightness gives the label away unless ``spurious``
asks for it. Image ``i`` of a split is a function of the world's settings, its seed, the split and ``i`` alone.

Examples
--------
>>> world = GlyphWorld.preset("easy16", seed=1)
>>> x, y = world.batch(0, 64)
>>> x.shape, x.dtype, y.dtype
(torch.Size([64, 1, 16, 16]), torch.float32, torch.int64)
>>> x2, y2 = world.sample(10, 5)  # whatever the batch size, image 10 is image 10
>>> torch.equal(x2, x[10:15]), torch.equal(y2, y[10:15])
(True, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mlcollage import _checks as checks
from mlcollage.data._blocks import BLOCK, BlockCache, check_range, check_split
from mlcollage.data._glyph_latents import NOISE_GROUP, draw_block, pixel_noise
from mlcollage.data._glyph_render import part_mask, render
from mlcollage.data._glyph_settings import GlyphSettings
from mlcollage.errors import InvalidInput

PRESETS: dict[str, dict[str, Any]] = {
    "easy16": {
        "size": 16, "channels": 1, "rotation": 15.0, "shift": 0.1, "scale": (0.7, 1.0), "shear": 0.0, "jitter": 0.08,
        "width": (0.09, 0.16), "clutter": 2, "contrast": (0.5, 1.0), "texture": 0.15, "background": 0.2, "noise": 0.04,
    },
    "standard32": {
        "size": 32, "channels": 3, "rotation": 20.0, "shift": 0.15, "scale": (0.65, 1.0), "shear": 0.2, "jitter": 0.09,
        "width": (0.06, 0.13), "clutter": 3, "contrast": (0.45, 1.0), "texture": 0.2, "background": 0.25, "noise": 0.05,
    },
    "difficult32": {
        "size": 32, "channels": 3, "rotation": 25.0, "shift": 0.25, "scale": (0.55, 0.95), "shear": 0.25, "jitter": 0.1,
        "width": (0.06, 0.13), "clutter": 4, "contrast": (0.35, 1.0), "texture": 0.25, "background": 0.35,
        "noise": 0.06,
    },
}  # fmt: skip
"""Settings by name: ``easy16`` for seconds on a CPU, ``standard32`` the laboratory's default, two harder ones."""
PRESETS["hard"] = PRESETS["difficult32"] | {"rotation": 45.0, "occluders": 1, "num_classes": 20}

_CACHED_BLOCKS = 64  # about 50 MB at most; 64 blocks cover a shuffled training set of 65,536 images
_PIXELS_AT_ONCE = 65_536  # on a CPU: the working set of a chunk stays in the second-level cache


@dataclass(eq=False)
class GlyphWorld(GlyphSettings):
    r"""Endless glyph images (GlyphWorld); implements :class:`~mlcollage.data.world.DataWorld`.

    Coordinates: the frame is :math:`[-1, 1]^2`, and a glyph of scale 1 reaches :math:`\pm 0.8`.

    Parameters
    ----------
    size
        Height and width in pixels, 16 to 64.
    channels
        1 (gray) or 3 (RGB).
    num_classes
        2 to 64. The classes of a small world are the first ones of a larger one.
    alphabet_seed
        Which skeletons are the classes: different seeds are different tasks, e.g. for transfer.
    seed
        Which images are drawn.
    device
        Where images are rendered. All randomness is drawn on the CPU, so every device gives the same images.
    rotation
        Largest rotation, degrees.
    shift
        Largest shift of the center in each direction.
    scale
        Smallest and largest scale.
    aspect
        Standard deviation of the logarithm of width : height.
    shear
        Largest shear.
    jitter
        Standard deviation of the five coefficients of the smooth warp; each vertex also trembles by 0.3 of it.
    width
        Smallest and largest half-width of a stroke at scale 1.
    clutter
        Largest number of stray strokes below the glyph (uniform from 0).
    contrast
        Smallest and largest distance of the stroke's color from the background's (Euclidean, before clipping).
    texture
        Largest amplitude of the wave on the stroke.
    background
        Standard deviation of the low-frequency field of the background.
    noise
        Standard deviation of the pixel noise.
    occluders
        Rectangles that cover part of the image, 0 to 4.
    spurious
        0 for none; otherwise every image carries a cue that agrees with the label with this probability, and else
        with another class. ``1 / num_classes`` is a cue that says nothing: the fair test set of a biased world.
    spurious_cue
        ``"color"`` (of the stroke; needs ``channels=3``) or ``"position"`` (of the center).
    label_noise
        Probability that a label is replaced by another class, uniformly, in every split.
    imbalance
        How many times more frequent the first class is than the last; frequencies fall geometrically.

    Attributes
    ----------
    shape
        ``(channels, size, size)``.
    likeness
        Largest correlation between two skeletons, blurred.

    Notes
    -----
    Split names are ``train``, ``validation``, ``test`` and ``stream``; each has its own random numbers, so that no
    image of one is an image of another. Images come in blocks of 1024 with one generator per block, seeded by
    SHA-256 of (seed, split, set, block). Rendering uses only operations that IEEE 754 defines to the last bit, so an
    image is the same bits in any batch, worker or thread count.
    Settings are not to be changed afterwards; ``dataclasses.replace(world, noise=0.0)`` makes another world.

    Examples
    --------
    >>> world = GlyphWorld(channels=1, size=20, num_classes=4, spurious=0.9, spurious_cue="position")
    >>> x, y, factors = world.sample(0, 1000, return_factors=True)
    >>> bool((factors["cue"] == y).float().mean() > 0.85)
    True
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.device = torch.device(self.device)
        self._blocks: BlockCache[dict[str, Tensor]] = BlockCache(_CACHED_BLOCKS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GlyphWorld:
        """Return the world called ``name`` in :data:`PRESETS`, with some settings replaced.

        Examples
        --------
        >>> GlyphWorld.preset("easy16", num_classes=4).shape
        (1, 16, 16)
        """
        return cls(**(PRESETS[checks.choice("the GlyphWorld preset", name, PRESETS)] | overrides))

    def batch(self, step: int, batch_size: int, *, split: str = "stream") -> tuple[Tensor, Tensor]:
        """Images ``step * batch_size ... (step + 1) * batch_size - 1`` of a split.

        Returns
        -------
        x, y
            ``(batch_size, channels, size, size)`` float32 in [0, 1] and ``(batch_size,)`` int64, on :attr:`device`.
        """
        check_range(step, batch_size)
        return self.sample(step * batch_size, batch_size, split=split)

    def fixed(self, n: int, *, seed: int = 0, split: str = "train") -> TensorDataset:
        """Return the first ``n`` images of a finite set, in memory on :attr:`device`.

        Sets of one ``seed`` are nested: ``fixed(100)`` is the start of ``fixed(1000)``. Other seeds share nothing.
        """
        return TensorDataset(*self.sample(0, n, split=split, seed=seed))

    def dataset(self, split: str = "train", n: int = 5000, *, seed: int = 0) -> GlyphDataset:
        """Return the same images as :meth:`fixed`, drawn when asked for: for a ``DataLoader`` with workers."""
        return GlyphDataset(self, split, n, seed=seed)

    @overload
    def sample(
        self, start: int, count: int, split: str = ..., *, seed: int = ..., return_factors: Literal[False] = ...
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def sample(
        self, start: int, count: int, split: str = ..., *, seed: int = ..., return_factors: Literal[True]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...

    def sample(
        self, start: int, count: int, split: str = "stream", *, seed: int = 0, return_factors: bool = False
    ) -> tuple[Tensor, ...] | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Images ``start ... start + count - 1`` of a split.

        Parameters
        ----------
        start, count
            Which images.
        split
            ``"train"``, ``"validation"``, ``"test"`` or ``"stream"``.
        seed
            Which finite set of the split.
        return_factors
            Also return what the images were made of: one row per image of ``true_label`` (before label noise),
            ``rotation`` (radians), ``scale``, ``aspect``, ``shear``, ``center``, ``width``, ``half_width``,
            ``contrast``, ``foreground``, ``background``, ``field``, ``texture``, ``wave`` (cycles per half-frame in x
            and y, phase), ``clutter_count``, ``clutter_color``, ``cue`` (-1 without ``spurious``), ``occluder`` (left,
            top, right, bottom), ``occluder_color``, and ``part_mask`` ``(n, size, size)``: 0 where no stroke is
            seen, else 1 + the stroke's number in the skeleton.

        Returns
        -------
        x, y[, factors]
            See :meth:`batch`.
        """
        check_range(start, count)
        return self.at(torch.arange(start, start + count), split, seed=seed, return_factors=return_factors)

    def at(
        self, indices: Tensor | Sequence[int], split: str = "train", *, seed: int = 0, return_factors: bool = False
    ) -> Any:
        """Images at any ``indices`` of a split, in that order; otherwise as :meth:`sample`."""
        check_split(split)
        # Chunks keep a CPU's cache warm; they do not change a bit of any image.
        where = torch.as_tensor(indices, dtype=torch.int64, device="cpu").reshape(-1)
        if not len(where) or int(where.min()) < 0:
            raise InvalidInput("indices must be one or more integers from 0.")
        images, labels, factors = [], [], []
        chunk = max(8, _PIXELS_AT_ONCE // self.size**2) if torch.device(self.device).type == "cpu" else BLOCK
        for part in where.split(chunk):
            latents = {key: value.to(self.device) for key, value in self._latents(part, split, seed).items()}
            images.append(render(latents, self._noise(part, split, seed).to(self.device)))
            labels.append(latents["label"])
            if return_factors:
                factors.append(self._factors(latents))
        x, y = torch.cat(images), torch.cat(labels)
        if not return_factors:
            return x, y
        return x, y, {key: torch.cat([some[key] for some in factors]) for key in factors[0]}

    def _latents(self, where: Tensor, split: str, seed: int) -> dict[str, Tensor]:
        """Rows of the blocks that ``where`` falls into."""
        numbers = where // BLOCK
        parts, order = [], []
        for number in numbers.unique().tolist():
            block = self._blocks.get((split, seed, number), lambda n=number: draw_block(self, split, seed, n))  # type: ignore[misc]
            rows = (numbers == number).nonzero()[:, 0]
            places = where[rows] % BLOCK  # of these images within their block
            parts.append({key: value.index_select(0, places) for key, value in block.items()})
            order.append(rows)
        if len(parts) == 1:
            return parts[0]
        back = torch.cat(order).argsort()  # from the order of the blocks to the order that was asked for
        return {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}

    def _noise(self, where: Tensor, split: str, seed: int) -> Tensor:
        """Pixel noise of the images ``where``: every group that they fall into is drawn once."""
        out = torch.empty(len(where), *self.shape)
        if self.noise == 0:
            return out.zero_()
        groups = where // NOISE_GROUP
        for number in groups.unique().tolist():
            rows = (groups == number).nonzero()[:, 0]
            out[rows] = pixel_noise(self, split, seed, number)[where[rows] % NOISE_GROUP]
        return out

    def _factors(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = ("label", "strokes", "clutter", "shift")
        factors = {key: value for key, value in latents.items() if key not in hidden}
        factors["half_width"] = factors["half_width"][:, 0]
        # Unused places repeat the skeleton's last stroke, so a number beyond it means that one.
        longest = self.alphabet_lengths.to(factors["true_label"].device)[factors["true_label"]]
        factors["part_mask"] = part_mask(latents, self.size).minimum(longest[:, None, None])
        return factors


class GlyphDataset(Dataset[tuple[Tensor, Tensor]]):
    """``n`` images of a split as a map-style dataset, rendered on demand.

    The images are those of :meth:`GlyphWorld.fixed`, with any number of ``DataLoader`` workers and in any order.

    Parameters
    ----------
    world
        Where they come from.
    split
        ``"train"``, ``"validation"``, ``"test"`` or ``"stream"``.
    n
        How many.
    seed
        Which finite set of the split.

    Examples
    --------
    >>> data = GlyphDataset(GlyphWorld.preset("easy16"), "test", 100)
    >>> len(data), data[99][0].shape
    (100, torch.Size([1, 16, 16]))
    """

    def __init__(self, world: GlyphWorld, split: str = "train", n: int = 5000, *, seed: int = 0) -> None:
        check_range(0, n)
        self.world, self.split, self.n, self.seed = world, check_split(split), n, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several images at once, which is what a ``DataLoader`` asks for."""
        where = [index + self.n if index < 0 else index for index in indices]
        if any(not 0 <= index < self.n for index in where):
            raise IndexError(f"an index of {list(indices)} is out of range for {self.n} images.")
        x, y = self.world.at(where, self.split, seed=self.seed)
        return list(zip(x.unbind(), y.unbind(), strict=True))
