"""The models and their released weights, from the house's networks."""

from mlcollage.nn.vit_checkpoints import load_augreg_npz, resize_posemb, save_augreg_npz
from mlcollage.nn.vit_models import AUGREG_MODELS, ViTConfig, check_pixels, model_table, vit

__all__ = [
    "AUGREG_MODELS",
    "ViTConfig",
    "check_pixels",
    "load_augreg_npz",
    "model_table",
    "resize_posemb",
    "save_augreg_npz",
    "vit",
]
