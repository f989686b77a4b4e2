"""The convolutional stem of hybrid vision transformers: a ResNet with weight standardization and group norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.nn._parts import Block, Record, keep, through, wide


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one side, so that the output has ceil(size / stride) numbers, as 'SAME' in TensorFlow."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2  # an odd one goes to the end: asymmetric, which no padding= of torch gives


def _pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    top, bottom = same_padding(x.shape[-2], kernel, stride)
    left, right = same_padding(x.shape[-1], kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value) if top or bottom or left or right else x


class StdConv(nn.Module):
    """Convolution whose kernels have mean 0 and deviation 1 over (in, height, width), without bias, padded 'SAME'."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        w = wide(self.weight)
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        w = (w - mean) / (var.sqrt() + 1e-5)  # the deviation is the biased one, and 1e-5 stands outside the root
        return F.conv2d(_pad_same(x, self.kernel, self.stride), w.to(self.weight.dtype), stride=self.stride)


class _MaxPool(nn.Module):
    """The largest of 3 x 3, every second one, padded 'SAME'."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(_pad_same(x, 3, 2, value=-torch.inf), 3, 2)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class _Shortcut(Block):
    """What is added to a unit's branch where channels or resolution change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = StdConv(inputs, outputs, 1, stride)
        self.norm = _group_norm(outputs)


class _Unit(Block):
    """Bottleneck, post-activation: relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x)))))))))."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        if stride != 1 or inputs != outputs:
            self.shortcut: nn.Module = _Shortcut(inputs, outputs, stride)
        else:
            self.shortcut = nn.Identity()
        self.conv1, self.norm1, self.relu1 = StdConv(inputs, width, 1), _group_norm(width), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = StdConv(width, width, 3, stride), _group_norm(width), nn.ReLU()
        self.conv3, self.norm3, self.relu3 = StdConv(width, outputs, 1), _group_norm(outputs), nn.ReLU()

    def forward(self, x: Tensor, record: Record = None, name: str = "") -> Tensor:
        skip = through(self, ["shortcut"], x, record, name) if isinstance(self.shortcut, Block) else x
        branch = ["conv1", "norm1", "relu1", "conv2", "norm2", "relu2", "conv3", "norm3"]
        x = keep(record, f"{name}.add", skip + through(self, branch, x, record, name))
        return through(self, ["relu3"], x, record, name)


class _Stage(Block):
    """Units of one width; the first changes resolution and channels."""

    def __init__(self, inputs: int, width: int, units: int, stride: int) -> None:
        super().__init__()
        for u in range(units):
            self.add_module(f"unit{u + 1}", _Unit(inputs if u == 0 else 4 * width, width, stride if u == 0 else 1))


class ResNetStem(Block):
    """A 7 x 7 convolution and a 3 x 3 maximum, both with stride 2, then stages of bottleneck units.

    The first stage keeps the resolution and each further one halves it, so that an image of side s becomes a grid of
    side ceil(s / 4), ceil(s / 8), ...: a quarter with no stage or one, and not the half that the paper's text speaks
    of.
    """

    def __init__(self, channels: int, blocks: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.conv = StdConv(channels, width, 7, 2)
        self.norm, self.relu, self.pool = _group_norm(width), nn.ReLU(), _MaxPool()
        inputs = width
        for i, units in enumerate(blocks):
            self.add_module(f"stage{i + 1}", _Stage(inputs, width * 2**i, units, 1 if i == 0 else 2))
            inputs = 4 * width * 2**i
        self.channels, self.halvings = inputs, 2 + max(0, len(blocks) - 1)

    def out_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the output for an image of this size."""
        for _ in range(self.halvings):
            height, width = -(-height // 2), -(-width // 2)
        return self.channels, height, width

    def zero_last_norms(self) -> None:
        """Start every unit as its shortcut: the scale of its last norm at zero."""
        for unit in (m for m in self.modules() if isinstance(m, _Unit)):
            nn.init.zeros_(unit.norm3.weight)
