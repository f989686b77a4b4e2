"""VGG networks (Simonyan and Zisserman 2015, arXiv:1409.1556), with and without batch normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn._parts import Network, as_image_shape, as_sizes

CONFIGURATIONS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}
"""Channels of each convolution, one tuple per stage: the paper's A, B, D and E."""


class VGG(Network):
    """Stages of 3x3 convolutions with biases, ReLU and max pooling by 2, then a classifier with dropout.

    ``VGG((3, 64, 64), 200)`` is the network of Kunin et al. (2021) for Tiny ImageNet (configuration D, classifier
    2048-1024-1024-200; 18,067,464 parameters). ``VGG((3, 224, 224), 1000, classifier=(4096, 4096))`` has the layout and
    138,357,544 parameters of the original VGG-16. Convolutions start from He's normal distribution (fan out), linear
    layers from a normal distribution of deviation 0.01, biases from 0.

    Parameters
    ----------
    in_shape
        (channels, height, width) of one image. Each stage halves height and width, rounded down.
    num_classes
        Number of logits.
    depth
        11, 13, 16 (default) or 19: the layers that the name counts, with a classifier of three layers.
    norm
        ``"batch"`` normalizes after each convolution; None (default) does not.
    classifier
        Widths of the hidden layers after the convolutions; ``()`` is a linear classifier.
    dropout
        Probability after each of them.
    width
        Factor of all channels of the convolutions, for a slim network.

    Raises
    ------
    InvalidInput
        For images too small for five stages, sizes that are not positive, and inputs of another shape.
    UnknownName
        For an unknown depth or norm.

    Notes
    -----
    Activations, in order of execution: ``conv1``, ``norm1`` (if there is one), ``relu1``, ..., ``pool1`` after the
    first stage, ..., ``flatten``, ``fc1``, ``fc_relu1``, ``fc_drop1``, ..., ``logits``. All but the last are also the
    names of the modules that made them.

    Examples
    --------
    >>> import torch
    >>> model = VGG((1, 32, 32), 10, depth=11, norm="batch", classifier=(16,), width=1 / 16)
    >>> logits, acts = model(torch.zeros(2, 1, 32, 32), activations=True)
    >>> tuple(acts["pool5"].shape), tuple(acts["fc1"].shape), tuple(logits.shape)
    ((2, 32, 1, 1), (2, 16), (2, 10))
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 16,
        norm: Literal["batch"] | None = None,
        classifier: Sequence[int] = (1024, 1024),
        dropout: float = 0.5,
        width: float = 1.0,
    ) -> None:
        super().__init__(as_image_shape(in_shape), num_classes)
        if depth not in CONFIGURATIONS:
            raise UnknownName(f"depth={depth!r} is not a VGG; choose one of {', '.join(map(str, CONFIGURATIONS))}.")
        if norm is not None:
            checks.choice("norm, if not None,", norm, ("batch",))
        dropout = checks.real("dropout", dropout, least=0, below=1)
        width = checks.positive("width", width)
        stages = CONFIGURATIONS[depth]
        channels, height, breadth = self.in_shape
        if min(height, breadth) < 2 ** len(stages):
            raise InvalidInput(
                f"images of {height} x {breadth} are too small: VGG halves them {len(stages)} times and needs at least "
                f"{2 ** len(stages)} pixels; resize them, or use ConvNet or ResNet."
            )
        number = 0  # of the convolution, through all stages
        for stage, widths in enumerate(stages, start=1):
            for outputs in (max(1, round(w * width)) for w in widths):
                number += 1
                # With a bias also before batch normalization, as the published parameter counts have it.
                self.add_module(f"conv{number}", nn.Conv2d(channels, outputs, 3, padding=1))
                if norm is not None:
                    self.add_module(f"norm{number}", nn.BatchNorm2d(outputs))
                self.add_module(f"relu{number}", nn.ReLU())
                channels = outputs
            self.add_module(f"pool{stage}", nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        # Each pooling halves a side, rounded down.
        features = channels * (height >> len(stages)) * (breadth >> len(stages))
        for i, hidden in enumerate(as_sizes("classifier", classifier, empty=True), start=1):
            self.add_module(f"fc{i}", nn.Linear(features, hidden))
            self.add_module(f"fc_relu{i}", nn.ReLU())
            self.add_module(f"fc_drop{i}", nn.Dropout(dropout))
            features = hidden
        self.head = nn.Linear(features, self.num_classes)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)  # as torchvision does; the paper says a variance of 0.01
                nn.init.zeros_(module.bias)
