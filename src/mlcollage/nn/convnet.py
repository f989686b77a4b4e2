"""A small convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn._parts import Network, as_image_shape, as_sizes, make_activation
from mlcollage.nn.norm import TLU, image_norm


class ConvNet(Network):
    """A few 3x3 convolutions, each with normalization and ReLU, then global average pooling and a linear map.

    Parameters
    ----------
    in_shape
        (channels, height, width) of one image.
    num_classes
        Number of logits.
    widths
        Channels of each convolution.
    norm
        ``"batch"``, ``"group"``, ``"frn"`` (whose nonlinearity is the :class:`~mlcollage.nn.norm.TLU`) or None.
    strides
        Stride of each convolution; by default 1 for the first and 2 for every other.

    Raises
    ------
    InvalidInput
        For a shape that is not (channels, height, width), sizes that are not positive whole numbers, and inputs of
        another shape.
    UnknownName
        For an unknown norm.

    Notes
    -----
    Activations, in order of execution: ``conv1``, ``norm1`` (if there is one), ``relu1`` (``tlu1`` with FRN), ...,
    ``pool``, ``logits``. All but the last are also the names of the modules that made them.

    Examples
    --------
    >>> import torch
    >>> model = ConvNet((1, 16, 16), 10, widths=(8, 16), norm="group")
    >>> logits, acts = model(torch.zeros(4, 1, 16, 16), activations=True)
    >>> list(acts)
    ['conv1', 'norm1', 'relu1', 'conv2', 'norm2', 'relu2', 'pool', 'logits']
    >>> tuple(acts["relu2"].shape)
    (4, 16, 8, 8)
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        widths: Sequence[int] = (16, 32, 64),
        *,
        norm: str | None = "batch",
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(as_image_shape(in_shape), num_classes)
        widths = as_sizes("widths", widths)
        # The first convolution sees all pixels; each further one halves height and width.
        strides = (1,) + (2,) * (len(widths) - 1) if strides is None else as_sizes("strides", strides)
        if len(strides) != len(widths):
            raise InvalidInput(f"strides={strides} must hold one number for each of the {len(widths)} widths {widths}.")
        nonlinearity = "tlu" if norm == "frn" else "relu"
        channels = self.in_shape[0]
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True), start=1):
            # Padding 1 keeps height and width at stride 1; a normalization's own shift makes the bias redundant.
            self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=norm is None))
            layer = image_norm(norm, width)
            if norm is not None:
                self.add_module(f"norm{i}", layer)
            self.add_module(f"{nonlinearity}{i}", TLU(width) if norm == "frn" else make_activation("relu"))
            channels = width
        # (batch, channels, height, width) to (batch, channels), whatever the size of the image.
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, self.num_classes)
