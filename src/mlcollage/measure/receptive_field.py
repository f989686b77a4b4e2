r"""The effective receptive field: which pixels a unit in the middle of a layer answers to (Luo et al. 2016).

.. math::
    E_{uv} = \frac{1}{n} \sum_i \sum_{\text{color}} \left| \frac{\partial \sum_c h^{(i)}_{c, \text{center}}}
    {\partial x^{(i)}_{uv}} \right|

for a layer's output h with units c, divided by its maximum; over n images. Where :math:`\sum_c h_c` is constant, as
after a layer norm of equal gains, this is zero everywhere, and the units are asked one by one:
:math:`\sum_c |\partial h_c / \partial x|`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput
from mlcollage.measure.attention import TokenGrid, token_grid
from mlcollage.measure.layer_tap import LayerTap, hookable
from mlcollage.measure.units import LayerUnits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ReceptiveField", "effective_receptive_field"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """The field of a layer's unit; made by :func:`effective_receptive_field`.

    Parameters
    ----------
    layer
        Its path.
    map
        (height, width), at most 1.
    places
        The places of the layer that were asked: the one in the middle, or the two or four where sides are even.
    """

    layer: str
    map: Floats
    places: tuple[tuple[int, int], ...]

    def area(self, threshold: float = 0.05) -> float:
        """Share of pixels above ``threshold`` of the maximum. It depends on the size of the image."""
        checks.probability("threshold", threshold)
        return float((self.map > threshold).mean())

    def plot(self, ax: Axes | None = None, *, cmap: str = "magma") -> Axes:
        """Draw the field."""
        from matplotlib.figure import Figure  # not pyplot, which would keep the figure

        ax = Figure(layout="constrained").subplots() if ax is None else ax
        image = ax.imshow(self.map, vmin=0.0, vmax=1.0, cmap=cmap)
        ax.set_xticks([]), ax.set_yticks([])
        ax.figure.colorbar(image, ax=ax, label="mean gradient, relative to its maximum")
        return ax


def effective_receptive_field(
    model: nn.Module,
    layer: str,
    images: Tensor,
    *,
    unit: Literal["center"] | tuple[int, int] = "center",
    units: Literal["sum", "each"] = "sum",
    where: TokenGrid | None = None,
    unit_axis: int | None = None,
    batch_size: int = 64,
) -> ReceptiveField:
    """The pixels that a place of a layer answers to, on average over images.

    Parameters
    ----------
    model
        Any module; run in evaluation mode, which is put back. Its parameters get no gradients.
    layer
        Path of a layer with feature maps (n, C, H, W), in any order of its axes, or with tokens. Of a residual block,
        the block itself has the field with the skip, and its last layer that without.
    images
        (n, channels, height, width) of floating point, as the model wants them.
    unit
        ``"center"``, or (row, column) of the layer's grid. Of sides with an even number of places the two in the middle
        are taken, and the mean of their fields.
    units
        ``"sum"``, the gradient of the sum of all units, as the paper; ``"each"``, the sum of the units' gradients
        without their signs, which cannot cancel and costs a backward pass for each unit.
    where
        How tokens lie; by default what the model says of itself (:func:`~mlcollage.measure.token_grid`).
    unit_axis
        The axis of the layer's units, where it cannot be told from the model.
    batch_size
        Images at a time.

    Returns
    -------
    ReceptiveField

    Raises
    ------
    InvalidInput
        If the gradient vanishes, the images are not of floating point, or the layer has no places.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    >>> field = effective_receptive_field(model, "2", torch.rand(16, 1, 9, 9))
    >>> field.map.shape, bool(field.map[2:7, 2:7].all()), field.map[:2].any()
    ((9, 9), True, np.False_)
    """
    checks.choice("units", units, ("sum", "each"))
    checks.integer("batch_size", batch_size, least=1)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InvalidInput(
            "images must be a floating-point tensor (n, channels, height, width), as the model wants them; scale whole "
            "numbers to [0, 1] first."
        )
    network = hookable(model, "effective_receptive_field")
    axes = LayerUnits(network, layer, unit_axis=unit_axis)
    total = torch.zeros(images.shape[-2:], dtype=torch.float64)
    places: tuple[tuple[int, int], ...] = ()
    modes = [(m, m.training) for m in network.modules()]
    try:
        network.eval()
        axes.look(images[: min(len(images), 3)])
        for start in range(0, len(images), batch_size):
            # A copy that is no leaf: a first layer may work in place.
            x = images[start : start + batch_size].detach().clone().requires_grad_()
            with torch.enable_grad(), LayerTap(network, layer, detach=False, copy=True) as tap:
                network(x * 1)
            if layer not in tap:
                raise InvalidInput(f"layer {layer!r} was not called, so it has no receptive field.")
            h = axes(layer, tap[layer])
            assert h is not None
            grid, places = _as_grid(h, network, where, unit, layer)  # (n, C, H, W)
            for i, j in places:
                found = _gradient(grid[:, :, i, j], x, units)
                if start == 0 and units == "sum" and (i, j) == places[0] and _vanishes(found, grid[:, :, i, j], x):
                    raise InvalidInput(
                        f"the sum of the units of layer {layer!r} does not depend on the images, as after a layer norm "
                        "of equal gains or a softmax: use units='each'."
                    )
                total += found / len(places)
    finally:
        for module, mode in modes:
            module.training = mode
    if not float(total.max()) > 0:
        raise InvalidInput(f"no unit of layer {layer!r} depends on the images at this place.")
    return ReceptiveField(layer, (total / total.max()).numpy(), places)


def _as_grid(
    h: Tensor, model: nn.Module, where: TokenGrid | None, unit: str | tuple[int, int], layer: str
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """A layer's output as (n, C, H, W), and the places that are asked."""
    if h.ndim == 3:
        place = token_grid(model) if where is None else where
        place.check(h.shape[2])
        h = h[:, :, place.prefix :].unflatten(2, place.grid)
    if h.ndim != 4:
        raise InvalidInput(f"layer {layer!r} gives {tuple(h.shape)} (examples, units, ...), which has no places.")
    rows, columns = h.shape[2:]
    if isinstance(unit, tuple):
        if not (0 <= unit[0] < rows and 0 <= unit[1] < columns):
            raise InvalidInput(f"unit={unit} is outside the grid of {rows} x {columns} places of layer {layer!r}.")
        return h, (unit,)
    checks.choice("unit", unit, ("center",))
    middle = [sorted({(n - 1) // 2, n // 2}) for n in (rows, columns)]
    return h, tuple((i, j) for i in middle[0] for j in middle[1])


def _gradient(h: Tensor, x: Tensor, units: str) -> Tensor:
    """Sum over images and colors of the gradient of h (n, C) at a place, without its sign, (H, W)."""
    parts = [h.sum()] if units == "sum" else list(h.sum(0))
    total = torch.zeros(x.shape[-2:], dtype=torch.float64)
    for part in parts:
        (g,) = torch.autograd.grad(part, x, retain_graph=True, allow_unused=True)
        if g is not None:
            total += g.detach().double().cpu().abs().sum((0, 1))
    return total


def _vanishes(plain: Tensor, h: Tensor, x: Tensor) -> bool:
    """Whether the gradient of the sum of units is nothing but rounding, beside that of a sum with random signs."""
    signs = torch.randint(0, 2, h.shape[1:], generator=generator(0)).to(h) * 2 - 1
    signed = _gradient((h * signs).sum(1, keepdim=True), x, "sum")
    return float(plain.max()) <= 100 * torch.finfo(x.dtype).eps * float(signed.max())
