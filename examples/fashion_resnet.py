"""A small ResNet in plain PyTorch on Fashion-MNIST, ready for every study that trains your model.

The page docs/your-own-model.md goes through it.
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data import fashion_mnist


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class FashionResNet(nn.Module):
    """A stem, three stages of one block, and a linear head."""

    def __init__(self, widths=(8, 16, 32), classes=10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(
            Block(widths[0], widths[0], 1), Block(widths[0], widths[1], 2), Block(widths[1], widths[2], 2)
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


def workload():
    """What `--workload examples/fashion_resnet.py:workload` calls."""
    x_train, y_train, x_test, y_test = fashion_mnist.load()  # pixels in [0, 1]

    def images(x, y):
        return TensorDataset(torch.from_numpy(x).reshape(-1, 1, 28, 28), torch.from_numpy(y))

    return {
        "train": images(x_train[:10_000], y_train[:10_000]),
        "test": images(x_test[:2_000], y_test[:2_000]),
        "num_classes": 10,
        "model": FashionResNet,
    }
