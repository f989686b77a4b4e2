"""What is run and what is claimed of Auto-Sklearn 2.0 (Feurer et al., JMLR 2022).

A seed is a group of tasks that is held out; portfolios and selectors are learned from the others. Replays use the
tensor that comes with the package; policies and their selector are judged on the measurements of the authors. On a
user's workload only the real fits are run, on their table. Claims and settings were written before the runs.
"""

from __future__ import annotations

from mlcollage.data import Labeled
from mlcollage.lab import Experiment, Scale, Study

from .claims import CLAIMS
from .experiments import Fits, Policies, Replays, fits, policies, replays, timed

_REPLAYS = {
    Scale.SMOKE: Replays(groups=3, orders=5, searches=1, time_orders=5),
    Scale.QUICK: Replays(),
    Scale.FULL: Replays(orders=1000, searches=10),
    Scale.PAPER: Replays(orders=1000, searches=10),
}

STUDY = Study(
    claims=CLAIMS,
    seeds={Scale.SMOKE: 2, Scale.QUICK: 12, Scale.FULL: 12, Scale.PAPER: 12},
    experiments=(
        Experiment(
            "fits",
            fits,
            arms=("both", "scratch", "portfolio_only"),
            settings={
                Scale.SMOKE: Fits(trials=3, most_rows=200),
                Scale.QUICK: Fits(),
                Scale.FULL: Fits(trials=42, most_rows=1000),
                Scale.PAPER: Fits(trials=168, most_rows=1000),
            },
            block=6,
            seeds={Scale.QUICK: 24, Scale.FULL: 24, Scale.PAPER: 24},
            workloads=(Labeled,),
            version=3,  # the tensor that comes with the package has more tasks
        ),
        Experiment(
            "policies",
            policies,
            arms=("selected",),
            settings={
                Scale.SMOKE: Policies(folds=4, trees=3),
                Scale.QUICK: Policies(),
                Scale.FULL: Policies(trees=500),
                Scale.PAPER: Policies(trees=500),
            },
            block=5,
            seeds={Scale.QUICK: 20, Scale.FULL: 20, Scale.PAPER: 20},
        ),
        Experiment(
            "replays",
            replays,
            arms=("portfolio", "other_families", "random", "nearest", "search"),
            settings=_REPLAYS,
            block=None,
            version=3,  # the tensor that comes with the package has more tasks
        ),
        Experiment(
            "timed",
            timed,
            arms=("bare", "intermittent", "portfolio_timed"),
            settings=_REPLAYS,
            block=None,
            version=3,  # the tensor that comes with the package has more tasks
        ),
    ),
)
