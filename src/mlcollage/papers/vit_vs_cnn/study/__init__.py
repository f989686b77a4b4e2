"""What is run and what is claimed of vision transformers and residual networks (Raghu et al., NeurIPS 2021).

Claims, margins and settings were written before the runs with the study's seeds; the paper's page says which choices
followed pilots with other seeds. On a user's images the workload's ``model`` and ``other_model`` take the places of the
vision transformer and of the residual network; without them the study's own are trained. Claims on other networks
(averaged tokens, one block without skips, few images, MLP-Mixer) are about the study's own.
"""

from __future__ import annotations

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import networks, on_workload
from .models import Networks

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 5, Scale.PAPER: 10},
    experiments=(
        Experiment(
            "networks",
            networks,
            arms=("networks",),
            settings={
                Scale.SMOKE: Networks(
                    train=160,
                    test=120,
                    dim=16,
                    depth=3,
                    heads=2,
                    width=4,
                    epochs=1.0,
                    field=8,
                    probe=100,
                    compared=64,
                    compared_at_once=32,
                ),
                Scale.QUICK: Networks(),
                Scale.FULL: Networks(
                    train=60_000,
                    test=10_000,
                    dim=192,
                    depth=12,
                    width=32,
                    batch=256,
                    epochs=20.0,
                    lr=1e-3,
                    field=256,
                    probe=5000,
                    compared=5120,
                    compared_at_once=512,
                ),
                Scale.PAPER: Networks(
                    train=60_000,
                    test=10_000,
                    dim=384,
                    depth=12,
                    heads=6,
                    width=64,
                    batch=512,
                    epochs=100.0,
                    lr=1e-3,
                    field=1024,
                    probe=10_000,
                    compared=10_240,
                    compared_at_once=1024,
                ),
            },
            workloads=(Labeled,),
            adapt=on_workload,
        ),
    ),
)
