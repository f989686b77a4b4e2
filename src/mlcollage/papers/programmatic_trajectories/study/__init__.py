"""What is run and what is claimed of trajectories from programmatic weak supervision (Zhan et al., ICLR 2019).

Claims, margins and settings were written before the runs with the study's seeds; the paper's page says which choices
followed pilots with other seeds. On a user's tracks macro-intents are those that come with them, or else cells of the
field; the claims on flocks are left out, and with own intents also the one on two labeling functions.
"""

from __future__ import annotations

from mlcollage.data import Trajectories
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import FLOCKS, PLAYS, boids, on_own_intents, on_tracks, plays
from .models import Sizes

_SMOKE = Sizes(train=32, test=24, hidden=8, rnn=8, z=2, steps=3, batch=8, particles=2)
_FULL = Sizes(
    train=32_768,
    test=2048,
    every=1,
    burn_in=10,
    hidden=128,
    rnn=128,
    z=16,
    steps=20_000,
    batch=64,
    window=50,
    lr=2e-3,
    particles=64,
)
_SETTINGS = {Scale.SMOKE: _SMOKE, Scale.QUICK: Sizes(), Scale.FULL: _FULL, Scale.PAPER: _FULL}
_FLOCKS = {**_SETTINGS, Scale.QUICK: Sizes(steps=500)}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 5, Scale.FULL: 5, Scale.PAPER: 5},
    experiments=(
        # Version 2: gradients are summed over frames in one product, centers are taken off first: last digits differ.
        Experiment("boids", boids, version=2, arms=FLOCKS, settings=_FLOCKS, block=5),
        Experiment(
            "plays",
            plays,
            version=2,
            arms=PLAYS,
            settings=_SETTINGS,
            block=5,
            workloads=(Trajectories,),
            adapt=on_tracks,
        ),
        # Instead of plays where intents come with the tracks; no second labeling function is compared then.
        Experiment(
            "own_intents",
            plays,
            arms=("stationary", "no_intents"),
            settings=_SETTINGS,
            block=5,
            own_data=False,
            workloads=(Trajectories,),
            adapt=on_own_intents,
        ),
    ),
)
