"""The claims, written before the runs with the study's seeds."""

from __future__ import annotations

import math
from functools import partial

from mlcollage.lab import Claim, Difference, Level, Scale, Trend

LOSSES = ("equivariance", "invariance", "canonical", "equilibrium", "localization")

_angle = partial(Claim, unit="°", digits=1)
_share = partial(Claim, unit="pts", factor=100.0, digits=1)

CLAIMS = (
    Claim(
        id="C1",
        title="Shapes in any pose are reconstructed better with a pose",
        headline=True,
        sentence="Of shapes in random poses, an autoencoder without the canonicalizer has a Chamfer distance at least "
        "1.15 times as large, with the same encoders, decoder and steps.",
        source="section 4, reconstruction of unaligned shapes",
        estimand=Difference("chamfer", "no_canonicalizer", "capsules", log=True),
        direction="greater",
        margin=math.log(1.15),
        says={
            "supported": "Without a canonical pose the error is {effect} as large",
            "contradicted": "A canonical pose makes no difference here ({effect})",
            "inconclusive": "What a canonical pose does for reconstruction is open ({effect})",
        },
    ),
    _angle(
        id="C2",
        title="Two poses of a shape come to one, in the plane",
        headline=True,
        sentence="In two dimensions the median angle between the canonical poses of two views of an unseen shape is at "
        "most 5 degrees.",
        source="section 4, canonicalization",
        estimand=Level("angle", "pose"),
        bounds=(0.0, 180.0),
        direction="at_most",
        null=5.0,
        says={
            "supported": "Two views of an unseen shape end {0} apart, without labels",
            "contradicted": "Two views of an unseen shape end {0} apart: more than 5°",
            "inconclusive": "Two views of an unseen shape end {0} apart; whether above 5° is open",
        },
    ),
    _angle(
        id="C2b",
        title="Two poses of a shape come to one, in space",
        headline=True,
        sentence="In three dimensions the median angle between the canonical poses of two views of an unseen shape is "
        "at most 10 degrees.",
        source="section 4, canonicalization",
        estimand=Level("angle", "spatial"),
        bounds=(0.0, 180.0),
        direction="at_most",
        null=10.0,
        says={
            "supported": "In space two views end {0} apart",
            "contradicted": "In space two views end {0} apart: more than 10°",
            "inconclusive": "In space two views end {0} apart; whether above 10° is open",
        },
    ),
    _angle(
        id="C3",
        title="Shapes of a category share one canonical pose",
        headline=True,
        sentence="In two dimensions the median angle of unseen shapes from the mean canonical frame of their category "
        "is at most 25 degrees.",
        source="section 4, canonicalization",
        estimand=Level("spread", "pose"),
        bounds=(0.0, 180.0),
        direction="at_most",
        null=25.0,
        says={
            "supported": "Unseen shapes of the category lie within {0} of one canonical pose",
            "contradicted": "Unseen shapes lie {0} from the category's mean pose: no common one",
            "inconclusive": "Whether the category shares one canonical pose is open ({0})",
        },
    ),
    _angle(
        id="C3b",
        title="In space a category shares one canonical pose",
        sentence="In three dimensions the median angle of unseen shapes from the mean canonical frame is at most 25 "
        "degrees.",
        source="section 4, canonicalization",
        estimand=Level("spread", "spatial"),
        bounds=(0.0, 180.0),
        direction="at_most",
        null=25.0,
    ),
    _angle(
        id="C3c",
        title="The learned pose is more common than principal axes",
        sentence="In two dimensions the median angle from the category's mean frame is at least 1 degree smaller than "
        "that of frames from principal axes.",
        source="our control",
        estimand=Difference("spread", "pose", "principal"),
        direction="less",
        margin=1.0,
    ),
    Claim(
        id="C4",
        title="Capsules register shapes where closest points cannot",
        headline=True,
        sentence="From random starts in two dimensions the median registration error of iterative closest points is at "
        "least 1.5 times that of capsules.",
        source="section 4, registration",
        estimand=Difference("rmse", "icp", "pose", log=True),
        direction="greater",
        margin=math.log(1.5),
        says={
            "supported": "Closest points alone register {effect} as badly as capsules",
            "contradicted": "Closest points alone register about as well as capsules ({effect})",
            "inconclusive": "Whether capsules register better than closest points is open ({effect})",
        },
    ),
    Claim(
        id="C4b",
        title="In space capsules register where closest points cannot",
        sentence="From random starts in three dimensions the median registration error of iterative closest points is "
        "at least 1.5 times that of capsules.",
        source="section 4, registration",
        estimand=Difference("rmse", "icp_spatial", "spatial", log=True),
        direction="greater",
        margin=math.log(1.5),
    ),
    _share(
        id="C4c",
        title="One refinement makes most registrations good",
        sentence="Refined by iterative closest points, fewer registrations in two dimensions fail (error above 0.2) "
        "than with closest points alone, by 20 points at least.",
        source="our control",
        estimand=Difference("failures", "refined", "icp"),
        direction="less",
        margin=0.2,
    ),
    _share(
        id="C5",
        title="Frozen features tell categories without labels",
        sentence="A linear classifier on descriptors and canonical poses is at least 5 points more accurate than on "
        "those of an encoder that was not trained.",
        source="section 4, classification",
        estimand=Difference("accuracy", "features", "features_untrained"),
        direction="greater",
        margin=0.05,
        from_scale=Scale.FULL,
    ),
    _share(
        id="C5b",
        title="The canonical pose is worth having for categories",
        sentence="The same classifier is at least 2 points more accurate than on an autoencoder without the "
        "canonicalizer.",
        source="section 4, classification",
        estimand=Difference("accuracy", "features", "features_plain"),
        direction="greater",
        margin=0.02,
        from_scale=Scale.FULL,
    ),
    *(
        Claim(
            id=f"C6{letter}",
            title=f"The {name} loss matters for stable poses",
            sentence=f"Without the {name} loss the angle between two views of a shape is at least 2 degrees larger.",
            source="section 4, ablations",
            estimand=Difference("angle", f"no_{name}", "pose"),
            direction="greater",
            margin=2.0,
            unit="°",
            digits=1,
            from_scale=Scale.FULL,
        )
        for letter, name in zip(
            "abcde", ("equivariance", "invariance", "canonical", "equilibrium", "localization"), strict=True
        )
    ),
    Claim(
        id="C7",
        unit="%",
        factor=100.0,
        digits=0,
        title="A point keeps its capsule when the shape turns",
        headline=True,
        sentence="In two views of an unseen shape at least 90 % of the points belong to the same capsule.",
        source="section 4, capsule decomposition",
        estimand=Level("agreement", "pose"),
        direction="at_least",
        null=0.9,
        says={
            "supported": "{0} of the points keep their capsule when the shape turns",
            "contradicted": "Only {0} of the points keep their capsule when the shape turns",
            "inconclusive": "About 90 % of the points ({0}) keep their capsule when the shape turns",
        },
    ),
    Claim(
        id="C7b",
        title="Capsules follow the parts of a shape",
        sentence="Capsules share at least 0.1 more information with the true parts than capsules that are shuffled.",
        source="section 4, capsule decomposition",
        estimand=Difference("purity", "pose", "shuffled"),
        direction="greater",
        margin=0.1,
    ),
    Claim(
        id="C8",
        title="Equivariance is learned",
        sentence="The error of equivariance on unseen shapes, in radii of the keypoints, falls as training goes on.",
        source="section 3, equivariance loss",
        estimand=Trend("equivariance_error", over="step", arm="pose"),
        direction="less",
        margin=0.5,
        test="trend",
        unit="rho",
    ),
    Claim(
        id="C8b",
        title="Invariance of the descriptors is learned",
        sentence="The cosine of the descriptors of two views of an unseen shape is above 0.95 at the end.",
        source="section 3, invariance loss",
        estimand=Level("descriptor_cosine", "pose"),
        direction="at_least",
        null=0.95,
    ),
)
