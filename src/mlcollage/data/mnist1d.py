"""MNIST-1D: ten hand-drawn templates as noisy 40-point signals; the original set and an endless stream.

Greydanus, *Scaling down deep learning* (2020); Greydanus and Kobak (ICML 2024). Small enough to train on in seconds,
hard enough to tell a logistic regression (32 % correct), an MLP (68 %), a CNN (94 %) and a person (96 %) apart.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.utils.data import TensorDataset

from mlcollage import _checks as checks
from mlcollage.data._blocks import BLOCK, BlockCache, block_generator, check_range, check_split
from mlcollage.errors import InvalidInput

TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
"""The ten digits, twelve points each."""

MEAN, STD = -0.0055075064312771795, 0.15467803420593054
"""Mean and standard deviation of the reference set (5,000 signals of seed 42) before it is standardized. The stream
is standardized with these constants: a stream has no set of its own to take them from."""

_PADDING, _LENGTH, _FINAL = (36, 60), 72, 40
_CACHED_BLOCKS = 128  # 160 kB each

Array = NDArray[np.float64]


def _templates() -> Array:
    """``(10, 12)``: each of mean 0 and standard deviation 1, then from 0 on, then over 6."""
    x = np.array(TEMPLATES, dtype=np.float64)  # (10, 12)
    x -= x.mean(1, keepdims=True)
    x /= x.std(1, keepdims=True)
    x -= x[:, :1]
    return x / 6.0


def _resample(x: Array, n: int) -> Array:
    """Linear interpolation of ``x`` at ``n`` points, ends included."""
    return np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(x)), x)


def reference(
    num_samples: int = 5000,
    *,
    seed: int = 42,
    train_split: float = 0.8,
    padding: tuple[int, int] = _PADDING,
    scale_coeff: float = 0.4,
    max_translation: int = 48,
    corr_noise_scale: float = 0.25,
    iid_noise_scale: float = 0.02,
    shear_scale: float = 0.75,
    shuffle_seq: bool = False,
    final_seq_length: int = _FINAL,
) -> dict[str, NDArray]:
    """Return the MNIST-1D set, number by number what the authors' ``mnist1d`` package generates.

    Parameters
    ----------
    num_samples
        Signals in all; rounded down to a multiple of ten.
    seed
        Seeds a legacy ``numpy.random.RandomState``, as the package seeds the global one.
    train_split
        Fraction of the shuffled signals that is for training.
    padding
        Smallest and largest number of zeros appended to the twelve points, before stretching to
        ``12 + padding[1]`` points.
    scale_coeff
        Amplitudes vary by this much in all, around 1.
    max_translation
        Signals are rolled by 0 to ``max_translation - 1`` points.
    corr_noise_scale
        Standard deviation of the noise that fills the empty part, before smoothing (sigma 2).
    iid_noise_scale
        Standard deviation of the noise on every point.
    shear_scale
        Slopes vary by this much in all, around 0.
    shuffle_seq
        Permute the positions, the same way in all signals: what is left for a CNN without neighborhoods.
    final_seq_length
        Points per signal at the end.

    Returns
    -------
    dict
        ``x`` ``(4000, 40)``, ``y``, ``x_test`` ``(1000, 40)``, ``y_test``, ``t`` (positions) as float64 and int64
        arrays, and the ``templates`` ``(10, 12)``.

    Examples
    --------
    >>> data = reference()
    >>> data["x"].shape, data["y_test"].shape
    ((4000, 40), (1000,))
    """
    num_samples = checks.integer("num_samples", num_samples, least=20)
    train_split = checks.probability("train_split", train_split)
    checks.integer("max_translation", max_translation, least=1)
    checks.integer("final_seq_length", final_seq_length, least=2)
    if not 0 <= padding[0] <= padding[1]:
        raise InvalidInput(f"padding must be (low, high) with 0 <= low <= high; got {padding}.")
    rng = np.random.RandomState(seed)  # the original's numbers need the legacy generator
    templates, length = _templates(), 12 + padding[1]
    signals = []
    for template in templates:
        for _ in range(num_samples // 10):
            # In the order in which the original draws: padding, amplitude, shift, both noises, slope.
            zeros = padding[0] + int(rng.rand() * (padding[1] - padding[0] + 1))
            x = _resample(np.concatenate([template + 1e-8, np.zeros(zeros)]), length)  # 1e-8 marks what is signal
            x *= 1 + scale_coeff * (rng.rand() - 0.5)
            k = rng.choice(max_translation)
            x = np.concatenate([x[-k:], x[:-k]])  # k = 0 gives x followed by nothing, as in the original
            noise = gaussian_filter1d(corr_noise_scale * rng.randn(length), 2)
            x = np.where(x != 0, x, noise) + iid_noise_scale * rng.randn(length)
            x = x - shear_scale * (rng.rand() - 0.5) * np.linspace(-0.5, 0.5, length)
            signals.append(_resample(x, final_seq_length))
    order = rng.permutation(len(signals))
    # (num_samples, final_seq_length) and (num_samples,)
    x, y = np.stack(signals)[order], np.repeat(np.arange(10), num_samples // 10)[order]
    if shuffle_seq:
        x = x[..., rng.permutation(final_seq_length)]
    t = _resample(_resample(np.linspace(-5, 5, 12) / 6.0, length), final_seq_length) / x.std()
    x = (x - x.mean()) / x.std()
    cut = int(len(y) * train_split)
    return {"x": x[:cut], "y": y[:cut], "x_test": x[cut:], "y_test": y[cut:], "t": t, "templates": templates}


@lru_cache(maxsize=1)
def _tables() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every step of the generator that is not random, as tables.

    Returns the stretched templates ``(25, 10, 72)`` by padding and class, where they carry signal ``(25, 72)``, the
    smoothing of the noise ``(72, 72)`` and the last resampling ``(72, 40)``.
    """
    low, high = _PADDING
    stretched = np.stack(
        [
            [_resample(np.concatenate([row + 1e-8, np.zeros(zeros)]), _LENGTH) for row in _templates()]
            for zeros in range(low, high + 1)
        ]
    )
    # Both are linear, so that their action on the unit vectors is their matrix.
    smooth = gaussian_filter1d(np.eye(_LENGTH), 2, axis=1)
    final = np.stack([_resample(row, _FINAL) for row in np.eye(_LENGTH)])
    there = torch.from_numpy((stretched != 0).all(axis=1))
    return torch.from_numpy(stretched).float(), there, torch.from_numpy(smooth).float(), torch.from_numpy(final).float()


def _draw_block(seed: int, split: str, set_seed: int, block: int) -> tuple[Tensor, Tensor]:
    """1024 signals, all steps of :func:`reference` at once. The shape is always the same, so the bits are too."""
    stretched, there, smooth, final = _tables()
    generator = block_generator("mnist1d", seed, split, set_seed, block)
    u = torch.rand(BLOCK, 5, generator=generator)  # class, padding, shift, amplitude, slope
    noise = torch.randn(2, BLOCK, _LENGTH, generator=generator)  # correlated (before smoothing), independent
    y = (u[:, 0] * 10).long()
    zeros = (u[:, 1] * len(there)).long()
    # (1024, 72): the place that each point comes from.
    roll = (torch.arange(_LENGTH) - (u[:, 2:3] * 48).long()) % _LENGTH
    # Noise fills what carries no signal, as in the reference.
    x = stretched[zeros, y].mul_(1 + 0.4 * (u[:, 3:4] - 0.5)).gather(1, roll)
    x = torch.where(there[zeros].gather(1, roll), x, 0.25 * noise[0] @ smooth)
    x = x + 0.02 * noise[1] - 0.75 * (u[:, 4:5] - 0.5) * torch.linspace(-0.5, 0.5, _LENGTH)
    return (x @ final - MEAN) / STD, y


@dataclass(eq=False)
class MNIST1D:
    """Endless MNIST-1D; implements :class:`~mlcollage.data.world.DataWorld`.

    The distribution of :func:`reference` at its defaults, with three differences: labels are drawn instead of
    balanced, numbers are float32, and the standardization uses the constants :data:`MEAN` and :data:`STD`.

    Parameters
    ----------
    seed
        Which signals are drawn.
    device
        Where they are put; they are generated on the CPU.

    Examples
    --------
    >>> world = MNIST1D(seed=3)
    >>> x, y = world.batch(5, 100)
    >>> x.shape, y.dtype
    (torch.Size([100, 40]), torch.int64)
    >>> bool((world.sample(500, 100)[0] == x).all())
    True
    """

    seed: int = 0
    _: KW_ONLY
    device: str | torch.device = "cpu"
    num_classes: int = field(init=False, default=10)
    shape: tuple[int, ...] = field(init=False, default=(_FINAL,))

    def __post_init__(self) -> None:
        self.seed = checks.integer("seed", self.seed)
        self.device = torch.device(self.device)
        self._blocks: BlockCache[tuple[Tensor, Tensor]] = BlockCache(_CACHED_BLOCKS)

    def batch(self, step: int, batch_size: int, *, split: str = "stream") -> tuple[Tensor, Tensor]:
        """Signals ``step * batch_size ... (step + 1) * batch_size - 1``: ``(b, 40)`` float32, labels ``(b,)`` int64."""
        check_range(step, batch_size)
        return self.sample(step * batch_size, batch_size, split)

    def fixed(self, n: int, *, seed: int = 0, split: str = "train") -> TensorDataset:
        """Return the first ``n`` signals of a finite set; sets of one ``seed`` are nested in ``n``."""
        return TensorDataset(*self.sample(0, n, split, seed=seed))

    def sample(self, start: int, count: int, split: str = "stream", *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Signals ``start ... start + count - 1`` of a split, of the finite set ``seed``."""
        check_range(start, count)
        check_split(split)
        xs, ys = [], []
        for number in range(start // BLOCK, (start + count - 1) // BLOCK + 1):
            x, y = self._blocks.get(
                (split, seed, number), lambda n=number: _draw_block(self.seed, split, seed, n)  # type: ignore[misc]
            )  # fmt: skip
            # The part of the block that was asked for; a stop beyond its end is cut by slicing.
            rows = slice(max(start - number * BLOCK, 0), start + count - number * BLOCK)
            xs.append(x[rows])
            ys.append(y[rows])
        return torch.cat(xs).to(self.device), torch.cat(ys).to(self.device)
