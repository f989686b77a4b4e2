from .cnn_lstm import CNNLSTM as CNNLSTM
from .convnet import ConvNet as ConvNet
from .init import build as build
from .init import seeded as seeded
from .mlp import MLP as MLP
from .norm import TLU as TLU
from .norm import FilterResponseNorm as FilterResponseNorm
from .norm import image_norm as image_norm
from .resnet import ResNet as ResNet
from .vgg import VGG as VGG
from .vit import ViT as ViT
from .wrapped import inputs_of as inputs_of
from .wrapped import logits_of as logits_of
from .wrapped import unwrap as unwrap

__all__ = [
    "CNNLSTM",
    "MLP",
    "TLU",
    "VGG",
    "ConvNet",
    "FilterResponseNorm",
    "ResNet",
    "ViT",
    "build",
    "image_norm",
    "inputs_of",
    "logits_of",
    "seeded",
    "unwrap",
]
