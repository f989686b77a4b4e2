"""Augmentation, presets and recipes, from the house's training."""

from mlcollage.train.augreg import PRESETS, AugReg
from mlcollage.train.rand_augment import randaugment
from mlcollage.train.recipes import FINETUNE_GRID, finetune_recipe, pretrain_recipe

__all__ = ["FINETUNE_GRID", "PRESETS", "AugReg", "finetune_recipe", "pretrain_recipe", "randaugment"]
