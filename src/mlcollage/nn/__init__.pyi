from . import vit_models as vit_models
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
from .vit_checkpoints import LoadedCheckpoint as LoadedCheckpoint
from .vit_checkpoints import load_augreg_npz as load_augreg_npz
from .vit_checkpoints import resize_posemb as resize_posemb
from .vit_checkpoints import save_augreg_npz as save_augreg_npz
from .vit_models import ViTConfig as ViTConfig
from .vit_models import check_pixels as check_pixels
from .vit_models import model_table as model_table
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
    "LoadedCheckpoint",
    "ResNet",
    "ViT",
    "ViTConfig",
    "build",
    "check_pixels",
    "image_norm",
    "inputs_of",
    "load_augreg_npz",
    "logits_of",
    "model_table",
    "resize_posemb",
    "save_augreg_npz",
    "seeded",
    "unwrap",
    "vit_models",
]
