"""Residual networks of the CIFAR type (He et al. 2016, arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.nn._parts import Block, Network, Record, as_image_shape, as_sizes, keep, make_activation, through
from mlcollage.nn.norm import TLU, image_norm


class _Style:
    """What every layer of one network has in common: normalization, nonlinearity, biases."""

    def __init__(self, norm: str, activation: str, conv_bias: bool) -> None:
        self.norm, self.conv_bias = checks.choice("norm", norm, ("batch", "group", "frn")), conv_bias
        # FRN brings its own nonlinearity, the TLU, in place of the ReLU; any other nonlinearity comes after the TLU.
        self.tlu_is_last = norm == "frn" and activation == "relu"
        self.name = "tlu" if self.tlu_is_last else activation
        self.activation = activation

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
        # This padding keeps height and width at stride 1, for kernels of 1 and of 3.
        layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=self.conv_bias)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        return layer

    def normalize(self, channels: int) -> nn.Module:
        layer = image_norm(self.norm, channels)
        return nn.Sequential(layer, TLU(channels)) if self.norm == "frn" and not self.tlu_is_last else layer

    def activate(self, channels: int) -> nn.Module:
        return TLU(channels) if self.tlu_is_last else make_activation(self.activation)


class _Stem(Block):
    """3x3 convolution, normalization, nonlinearity."""

    def __init__(self, inputs: int, outputs: int, stride: int, style: _Style) -> None:
        super().__init__()
        self.conv = style.conv(inputs, outputs, 3, stride)
        self.norm = style.normalize(outputs)
        self.act = style.activate(outputs)

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        return keep(record, name, self.act(through(self, ["conv", "norm"], x, record, name)))


class _BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int, style: _Style) -> None:
        super().__init__()
        self.nonlinearity = style.name
        self.conv1 = style.conv(inputs, outputs, 3, stride)
        self.norm1 = style.normalize(outputs)
        self.add_module(f"{style.name}1", style.activate(outputs))
        self.conv2 = style.conv(outputs, outputs, 3, 1)
        self.norm2 = style.normalize(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(style.conv(inputs, outputs, 1, stride), style.normalize(outputs))
        self.add_module(f"{style.name}2", style.activate(outputs))  # registered in the order of execution

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        act = self.nonlinearity
        h = through(self, ["conv1", "norm1", f"{act}1", "conv2", "norm2"], x, record, name)
        if self.shortcut is not None:
            x = through(self, ["shortcut"], x, record, name)
        h = keep(record, f"{name}.add", x + h)  # before the nonlinearity, as in the paper's figure 2
        return through(self, [f"{act}2"], h, record, name)


class ResNet(Network):
    """CIFAR-type residual network: a 3x3 stem, stages of basic blocks, global average pooling, a linear map.

    The width doubles and the resolution halves from stage to stage. ``blocks=(3, 3, 3)`` is ResNet-20 (272,474
    parameters for 3 channels and 10 classes), ``(1, 1, 1)`` is ResNet-8, ``(2, 2, 2, 2)`` with ``width=64`` has the
    layout of ResNet-18. Convolutions start from He's normal distribution (fan out), everything else from torch's
    defaults.

    Parameters
    ----------
    in_shape
        (channels, height, width) of one image.
    num_classes
        Number of logits.
    blocks
        Basic blocks in each stage.
    width
        Channels of the first stage.
    norm
        ``"batch"``, ``"group"`` or ``"frn"`` (filter response normalization, whose TLU takes the ReLU's place).
    stem_stride
        Stride of the stem; 2 quarters the cost.
    activation
        Nonlinearity; with ``norm="frn"`` any other than ``"relu"`` follows the TLU.
    conv_bias
        Biases in the convolutions. ``ResNet((3, 32, 32), 10, blocks=(3, 3, 3), norm="frn", activation="silu",
        conv_bias=True)`` is the ResNet-20-FRN of Izmailov et al. (2021, arXiv:2104.14421), 274,042 parameters.

    Raises
    ------
    InvalidInput
        For a shape that is not (channels, height, width), sizes that are not positive whole numbers, no
        normalization, and inputs of another shape.
    UnknownName
        For an unknown norm or activation.

    Notes
    -----
    Activations, in order of execution: ``stem.conv``, ``stem.norm``, ``stem`` (after the nonlinearity); for each
    block, counted from 1 through all stages, ``block1.conv1``, ``block1.norm1``, ``block1.relu1``, ``block1.conv2``,
    ``block1.norm2``, ``block1.shortcut`` (where the shape changes), ``block1.add``, ``block1.relu2`` (the block's
    output; ``tlu`` with FRN); ``pool``, ``logits``. All but ``add`` and ``logits`` are also the paths of the modules
    that made them.

    Examples
    --------
    >>> import torch
    >>> model = ResNet((3, 32, 32), 10, blocks=(1, 1, 1), width=8, norm="group")
    >>> logits, acts = model(torch.zeros(2, 3, 32, 32), activations=True)
    >>> {n: tuple(acts[n].shape) for n in ("stem", "block1.relu2", "block3.relu2", "pool", "logits")}
    {'stem': (2, 8, 32, 32), 'block1.relu2': (2, 8, 32, 32), 'block3.relu2': (2, 32, 8, 8),
     'pool': (2, 32), 'logits': (2, 10)}
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        *,
        blocks: Sequence[int] = (1, 1, 1),
        width: int = 16,
        norm: str = "batch",
        stem_stride: int = 1,
        activation: str = "relu",
        conv_bias: bool = False,
    ) -> None:
        super().__init__(as_image_shape(in_shape), num_classes)
        channels = width = checks.integer("width", width, least=1)
        stem_stride = checks.integer("stem_stride", stem_stride, least=1)
        style = _Style(norm, activation, conv_bias)
        self.stem = _Stem(self.in_shape[0], channels, stem_stride, style)
        number = 0
        for stage, count in enumerate(as_sizes("blocks", blocks)):
            for i in range(count):
                outputs, number = width * 2**stage, number + 1
                stride = 2 if stage > 0 and i == 0 else 1  # the first block of a stage halves the resolution
                self.add_module(f"block{number}", _BasicBlock(channels, outputs, stride, style))
                channels = outputs
        # (batch, channels, height, width) to (batch, channels), whatever the size of the image.
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, self.num_classes)
