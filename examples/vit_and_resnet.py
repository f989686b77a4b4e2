"""A workload with two networks, for the studies that compare two.

    mlcollage run vit_vs_cnn --workload examples/vit_and_resnet.py:workload --scale smoke

``model`` takes the place of the vision transformer and ``other_model`` that of the residual network.
"""

from __future__ import annotations

from dataclasses import replace

from mlcollage.data import Labeled, load_workload
from mlcollage.nn import ResNet, ViT


def workload() -> Labeled:
    """The digits of scikit-learn, 8 by 8 pixels, a ViT of 16 patches and a ResNet of three blocks."""
    return replace(
        load_workload("digits"),
        name="digits, ViT and ResNet",
        model=lambda: ViT((1, 8, 8), 10, patch_size=2, dim=32, depth=4),
        other_model=lambda: ResNet((1, 8, 8), 10, width=8),
    )
