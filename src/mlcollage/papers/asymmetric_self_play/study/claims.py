"""The claims, written before the runs."""

from __future__ import annotations

from functools import partial

import pandas as pd

from mlcollage.lab import Claim, Difference, Level, PerSeed, Scale

_area = partial(Claim, factor=100.0, unit="pts", digits=1)
_share = partial(Claim, factor=100.0, unit="%", digits=1)


def air_late_and_early(rows: pd.DataFrame) -> dict[str, float]:
    """Share of Alice's valid goals that are in the air, at the last mark before the end and at the first turn."""
    found = rows[(rows["metric"] == "air") & (rows["arm"] == "asp")].sort_values("part")["value"]
    return {"late": float(found.iloc[-1]), "early": float(found.iloc[0])}


CLAIMS = (
    _share(
        id="C1",
        title="Bob reaches goals that nobody trained him on",
        headline=True,
        sentence="After training by self-play alone Bob picks up half of the blocks of unseen hold-out goals at least.",
        source="Fig. 4",
        estimand=Level("final", "asp", where={"holdout": "pick"}),
        direction="at_least",
        null=0.5,
        margin=0.05,
    ),
    _share(
        id="C1b",
        title="Bob pushes blocks to goals that nobody trained him on",
        sentence="After training by self-play alone Bob reaches half of the unseen goals on the table at least.",
        source="Fig. 4",
        estimand=Level("final", "asp", where={"holdout": "push"}),
        direction="at_least",
        null=0.5,
        margin=0.05,
    ),
    _area(
        id="C1c",
        title="An Alice who learns teaches more than a random one",
        sentence="With an Alice who learns, success on hold-out goals, averaged over training, is higher than with one "
        "who acts at random.",
        source="our control",
        estimand=Difference("area", "asp", "random_alice"),
        direction="greater",
        margin=0.05,
    ),
    _area(
        id="C2",
        title="Self-play beats training on the goals themselves",
        headline=True,
        sentence="At equally many environment steps success on hold-out goals, averaged over training, is higher with "
        "self-play than with reinforcement learning on the mixture of these goals.",
        source="Fig. 4",
        estimand=Difference("area", "asp", "direct"),
        direction="greater",
        margin=0.05,
        says={
            "supported": "Self-play is {effect} ahead of training on the hold-out goals themselves",
            "contradicted": "Self-play gains nothing over training on the goals themselves ({effect})",
            "inconclusive": "Whether self-play beats direct training is open ({effect})",
        },
    ),
    _area(
        id="C2c",
        title="In a flat world direct training does no worse",
        sentence="In the easy world of discs direct training is at most 5 points of success below self-play.",
        source="our control",
        estimand=Difference("area", "discs_direct", "discs_asp"),
        direction="at_least",
        null=-0.05,
        margin=0.05,
    ),
    _area(
        id="C3",
        title="Cloning Alice where Bob fails is what makes it work",
        headline=True,
        sentence="At equally many environment steps success on hold-out goals, averaged over training, is higher with "
        "the cloning term than without it.",
        source="Fig. 9",
        estimand=Difference("area", "asp", "no_abc"),
        direction="greater",
        margin=0.05,
        says={
            "supported": "Without cloning Alice, success is {effect} lower over training",
            "contradicted": "Cloning Alice makes no difference that matters here ({effect})",
            "inconclusive": "What cloning Alice adds is open ({effect})",
        },
    ),
    _area(
        id="C3c",
        title="In a flat world cloning gains below 10 points",
        sentence="In the easy world of discs success with and without the cloning term is the same, within 10 points.",
        source="our control",
        estimand=Difference("area", "discs_asp", "discs_no_abc"),
        direction="within",
        margin=0.1,
    ),
    _area(
        id="C4",
        title="Without the clip success is lower",
        sentence="With the ratio of the cloning term clipped, success averaged over training is higher than without.",
        source="Fig. 9",
        estimand=Difference("area", "asp", "no_clip"),
        direction="greater",
        margin=0.05,
    ),
    _area(
        id="C4b",
        title="Without the clip training is less stable",
        sentence="Without the clip the curve of success falls further below what it had reached.",
        source="Fig. 9",
        estimand=Difference("drawdown", "no_clip", "asp"),
        direction="greater",
        margin=0.05,
    ),
    _area(
        id="C5",
        title="Cloning what Bob can do already makes training unstable",
        sentence="Cloning all of Alice's valid turns, the curve of success falls further below what it had reached.",
        source="Fig. 9",
        estimand=Difference("drawdown", "no_filter", "asp"),
        direction="greater",
        margin=0.05,
    ),
    _area(
        id="C6",
        title="Five goals in a game teach more than one",
        sentence="With five goals a game success on hold-out goals, averaged over training, is higher than with one.",
        source="Fig. 9",
        estimand=Difference("area", "asp", "single_goal"),
        direction="greater",
        margin=0.05,
    ),
    Claim(
        id="C7",
        title="A Bob trained for longer solves more of an Alice's goals",
        headline=True,
        sentence="For a fixed Alice, the share of her goals that Bob reaches rises with Bob's training.",
        source="Fig. 6",
        estimand=Level("bob_trend", "asp"),
        direction="greater",
        margin=0.3,
        unit="rho",
    ),
    Claim(
        id="C7b",
        title="An Alice trained for longer sets harder goals",
        sentence="For a fixed Bob, the share of goals that he reaches falls with Alice's training.",
        source="Fig. 6",
        estimand=Level("alice_trend", "asp"),
        direction="less",
        margin=0.3,
        unit="rho",
    ),
    _area(
        id="C8",
        title="Bob learns to stack",
        sentence="With two blocks, success on hold-out goals, stacking among them, is higher with cloning than "
        "without.",
        source="Fig. 4",
        estimand=Difference("area", "two_asp", "two_no_abc"),
        direction="greater",
        margin=0.05,
        from_scale=Scale.FULL,
    ),
    _area(
        id="C8b",
        title="Bob learns to flip a block",
        sentence="With rotations, success on hold-out goals, a block on its side among them, is higher with cloning "
        "than without.",
        source="Fig. 4",
        estimand=Difference("area", "turn_asp", "turn_no_abc"),
        direction="greater",
        margin=0.05,
        from_scale=Scale.FULL,
    ),
    _area(
        id="C8c",
        title="Cloning matters in a world with physics too",
        sentence="In MuJoCo, with one box, contacts and rotations, success on hold-out goals is higher with cloning "
        "than without.",
        source="Fig. 9",
        estimand=Difference("area", "mujoco_asp", "mujoco_no_abc"),
        direction="greater",
        margin=0.05,
        from_scale=Scale.FULL,
    ),
    _area(
        id="C9",
        title="A reward for time is as good as one for success",
        sentence="With rewards by time, success averaged over training is the same as with those for success, within 5 "
        "points.",
        source="Fig. 13",
        estimand=Difference("area", "time", "asp"),
        direction="within",
        margin=0.05,
    ),
    _area(
        id="C10",
        title="Alice's goals rise from the table into the air",
        headline=True,
        sentence="The share of Alice's valid goals that are held in the air is larger late in training than at its "
        "start.",
        source="our measure",
        estimand=PerSeed(air_late_and_early, "share of Alice's goals in the air: late minus early", ("asp",)),
        direction="greater",
        margin=0.2,
        says={
            "supported": "Alice begins on the table ({1} of her goals in the air) and ends above it ({0})",
            "contradicted": "Alice's goals stay on the table ({0} in the air at the end)",
            "inconclusive": "Whether Alice's goals rise is open: {1} in the air early, {0} late",
        },
    ),
    Claim(
        id="C11",
        kind="check",
        title="A replay ends where the first course ended",
        sentence="Actions that are taken again from the same state lead to the same places, to the last bit.",
        source="our check",
        estimand=Level("deviation", "replay"),
        direction="at_most",
        null=0.0,
        test="exact",
    ),
)
