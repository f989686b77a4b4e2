"""The claims, written before the runs."""

from __future__ import annotations

from functools import partial

from mlcollage.lab import Claim, Difference, Level

_share = partial(Claim, factor=100.0, unit="pts", digits=1)

CLAIMS = (
    Claim(
        id="C1",
        title="Macro-intents cost no likelihood on Boids",
        sentence="On Boids the bound of the log-likelihood of tracks and intents is at most 0.02 nats a number below "
        "that "
        "of the same network without intents, on the same frames.",
        source="Table 1",
        estimand=Difference("loglik", "macro", "indep"),
        direction="at_least",
        null=-0.02,
        unit="nats",
        digits=3,
    ),
    Claim(
        id="C1b",
        title="Macro-intents cost no likelihood on plays",
        sentence="On half-court plays the bound of the log-likelihood of tracks and intents is at most 0.02 nats a "
        "number "
        "below that of the same network without intents, on the same frames.",
        source="Table 1",
        estimand=Difference("loglik", "stationary", "no_intents"),
        direction="at_least",
        null=-0.02,
        unit="nats",
        digits=3,
    ),
    Claim(
        id="C2",
        title="With macro-intents players run as far as real ones",
        headline=True,
        sentence="The distances that generated players run are nearer to those of test plays (1-Wasserstein) with "
        "macro-intents than without.",
        source="Table 2",
        estimand=Difference("distance_w1", "stationary", "no_intents"),
        direction="less",
        margin=0.5,
        unit="ft",
        says={
            "supported": "Distances run are off by {0}, without intents by {1}",
            "contradicted": "Distances run are off by {0}, without intents by {1}",
            "inconclusive": "Distances run are off by {0}, without intents by {1}: open",
        },
    ),
    _share(
        id="C2b",
        title="With macro-intents players stay on the court",
        sentence="In fewer frames of rollouts any player is out of bounds with macro-intents than without.",
        source="Table 2",
        estimand=Difference("outside", "stationary", "no_intents"),
        direction="less",
        margin=0.02,
    ),
    _share(
        id="C3",
        title="With macro-intents flocks are of two kinds",
        headline=True,
        sentence="Fewer generated flocks lie between the two kinds (mean distance to the nearest other from 0.4 to "
        "0.8) "
        "with macro-intents than without; of real ones hardly any do.",
        source="Fig. 6",
        estimand=Difference("between", "macro", "indep"),
        direction="less",
        margin=0.05,
        says={
            "supported": "{0} of flocks are of neither kind, without intents {1}",
            "contradicted": "{0} of flocks are of neither kind, without intents {1}",
            "inconclusive": "{0} of flocks are of neither kind, without intents {1}: open",
        },
    ),
    Claim(
        id="C3b",
        title="Flocks are spaced more like real ones",
        sentence="Mean distances to the nearest other are nearer to those of test flocks (1-Wasserstein) with "
        "macro-intents "
        "than without.",
        source="Fig. 6",
        estimand=Difference("nearest_w1", "macro", "indep"),
        direction="less",
        margin=0.02,
    ),
    Claim(
        id="C4",
        title="A classifier is fooled more (stands in for judges)",
        sentence="A held-out classifier that tells rollouts from test plays by a few coarse features does so less "
        "well (area "
        "under its curve) with macro-intents than without. A stand-in for the paper's human judges, who saw plays.",
        source="Fig. 4",
        estimand=Difference("auc", "stationary", "no_intents"),
        direction="less",
        margin=0.02,
    ),
    _share(
        id="C5",
        title="Players go where their intents send them",
        headline=True,
        sentence="More players end within one cell of the cell they were sent to than of a cell that another play's "
        "player "
        "was sent to.",
        source="Fig. 5",
        estimand=Difference(
            "obeyed", "stationary", "stationary", treatment_where={"of": "own"}, control_where={"of": "other"}
        ),
        direction="greater",
        margin=0.2,
        says={
            "supported": "{0} of players end where they are sent; by chance {1} would",
            "contradicted": "Players do not go where they are sent: {0}, by chance {1}",
            "inconclusive": "Whether players go where they are sent is open: {0}, by chance {1}",
        },
    ),
    _share(
        id="C5b",
        title="Flocks become what they are told to be",
        sentence="More flocks have the commanded label, friendly or not, than would if the commands were exchanged.",
        source="Fig. 6",
        estimand=Difference("obeyed", "macro", "macro", treatment_where={"of": "own"}, control_where={"of": "other"}),
        direction="greater",
        margin=0.2,
    ),
    Claim(
        id="C5c",
        title="One beginning has many continuations",
        sentence="Rollouts after the same burn-in end at least one cell, 5 feet, apart from each other on average.",
        source="Fig. 5",
        estimand=Level("spread", "stationary"),
        direction="at_least",
        null=5.0,
        unit="ft",
        digits=1,
    ),
    Claim(
        id="C6",
        title="Which labeling function is taken matters",
        headline=True,
        sentence="Distances run are nearer to the real ones with labels of where players next stop than with labels "
        "of where "
        "they are at the end.",
        source="Table 2",
        estimand=Difference("distance_w1", "stationary", "window"),
        direction="less",
        margin=0.5,
        unit="ft",
        says={
            "supported": "Where players stop is the better label: {0} off the real distances, against {1}",
            "contradicted": "Where players stop is no better label: {0} off the real distances, against {1}",
            "inconclusive": "Which label is better is open: {0} off the real distances, against {1}",
        },
    ),
    Claim(
        id="C7",
        title="A shared macro model coordinates players",
        headline=True,
        sentence="Generated intents of two players carry more information about each other if one network reads the "
        "intents "
        "of all than if each player's follow from his own.",
        source="Section 3",
        estimand=Difference("information", "stationary", "separate_intents"),
        direction="greater",
        margin=0.03,
        unit="nats",
        says={
            "supported": "Intents share {0} with one macro model for all, {1} with one each",
            "contradicted": "One macro model for all does not coordinate: {0} against {1} with one each",
            "inconclusive": "Whether one macro model coordinates is open: {0} against {1} with one each",
        },
    ),
)
