"""What the study trains and measures: capsules on clouds, two unseen motions of each test cloud, and the rivals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from mlcollage._random import derive, generator
from mlcollage.data import PointClouds, procedural_shapes
from mlcollage.measure import (
    RigidTransform,
    chamfer_distance,
    icp,
    mean_rotation,
    principal_frame,
    registration_rmse,
    rotation_angle,
)
from mlcollage.nn import build

from ..losses import LossWeights
from ..model import CanonicalCapsules, CanonicalOutput, random_motion
from ..training import train_capsules

LOOKS = (0.1, 0.2, 0.4, 0.7, 1.0)  # shares of the steps after which the test clouds are looked at


@dataclass(frozen=True)
class Training:
    """Clouds, network and steps; the same for all arms."""

    dim: int = 2  # coordinates of a point
    categories: tuple[str, ...] = ("plane",)  # of the procedural shapes
    shapes: int = 400  # clouds to train on
    test: int = 80  # clouds to test on, each in two poses
    points: int = 64  # of a cloud
    capsules: int = 8  # K
    channels: int = 32  # C
    hidden: int = 128  # width of the decoder
    steps: int = 400  # of Adam
    batch: int = 16  # clouds of a step
    equilibrium: float = 16.0  # weight of the variance of shares; the paper's is 1,049, or 0.001 of points at 1,024
    learning_rate: float = 4e-3  # a tenth of it in the last quarter of the steps


class Source(NamedTuple):
    """Clouds to train on and to test on, (S, N, D), with what is known of the latter."""

    train: Tensor
    test: Tensor
    parts: NDArray[np.int64] | None
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    aligned: bool  # whether the clouds come in one pose, so that a common canonical frame can be seen


def source_of(s: Training, seed: int, workload: PointClouds | None) -> Source:
    """Fresh shapes for each seed, or the user's clouds with points that are drawn for each seed."""
    if workload is None:
        made = [
            procedural_shapes(s.categories, n, s.points, dim=s.dim, seed=derive(seed, k))
            for k, n in enumerate((s.shapes, s.test))
        ]
        train, test = (torch.from_numpy(m.points) for m in made)
        return Source(train, test, made[1].parts, (made[0].labels, made[1].labels), aligned=True)
    rng = np.random.default_rng(derive(seed, 2))

    def drawn(clouds: Any, most: int, parts: Any = None) -> tuple[Tensor, NDArray[np.int64] | None]:
        chosen = np.sort(rng.permutation(len(clouds))[:most])
        rows = [rng.permutation(len(clouds[i]))[: s.points] for i in chosen]
        points = np.stack([np.asarray(clouds[i], dtype=np.float32)[r] for i, r in zip(chosen, rows, strict=True)])
        named = None if parts is None else np.stack([parts[i][r] for i, r in zip(chosen, rows, strict=True)])
        return torch.from_numpy(points), named

    train, _ = drawn(workload.clouds, s.shapes)
    test, parts = drawn(workload.test_clouds, s.test, workload.test_parts)
    return Source(train, test, parts, None, aligned=False)


def make_model(s: Training, seed: int, *, canonicalize: bool = True, **weights: float) -> CanonicalCapsules:
    """A fresh model; ``weights`` are those that differ from the paper's."""
    chosen = LossWeights(**{"equilibrium": s.equilibrium, **weights})

    def fresh() -> CanonicalCapsules:
        return CanonicalCapsules(
            s.dim,
            s.capsules,
            s.channels,
            points=s.points,
            hidden=s.hidden,
            weights=chosen,
            canonicalize=canonicalize,
        )

    return cast(CanonicalCapsules, build(fresh, derive(seed, 5)))


class Looks(NamedTuple):
    """One look at the test clouds: outputs of both poses, and what follows from them."""

    outputs: tuple[CanonicalOutput, CanonicalOutput]
    frames: tuple[Tensor, Tensor]
    numbers: dict[str, float]


def test_motions(s: Training, seed: int, size: int) -> tuple[RigidTransform, RigidTransform]:
    """Two motions of each test cloud, the same for all arms of a seed."""
    draw = generator(seed, 6)
    return random_motion(size, s.dim, generator=draw), random_motion(size, s.dim, generator=draw)


def look(model: CanonicalCapsules, test: Tensor, motions: tuple[RigidTransform, RigidTransform]) -> Looks:
    """Equivariance, invariance, stability and, with a decoder, reconstruction of unseen clouds."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        a, b = (model(motion.apply(test)) for motion in motions)
    model.train(mode)
    frames = a.pose.R @ motions[0].R, b.pose.R @ motions[1].R
    theta_a, theta_b = a.capsules.theta, b.capsules.theta
    gap = theta_b - motions[1].after(motions[0].inverse()).apply(theta_a)
    radius = (theta_a - theta_a.mean(1, keepdim=True)).square().sum(-1).mean().sqrt()
    numbers = {
        "equivariance_error": float(gap.square().sum(-1).mean().sqrt() / radius),
        "descriptor_cosine": float(
            torch.nn.functional.cosine_similarity(a.capsules.beta.flatten(1), b.capsules.beta.flatten(1)).mean()
        ),
        "keypoint_spread": float(radius),
        **stability(frames),
    }
    if a.decoded is not None:
        both = [chamfer_distance(x.decoded.flatten(1, 2), x.canonical) for x in (a, b)]
        numbers["chamfer"] = float(torch.stack(both).mean())
    return Looks((a, b), frames, numbers)


def angles(frames: tuple[Tensor, Tensor]) -> Tensor:
    """Angle in degrees between the canonical poses of two views of each cloud."""
    return torch.rad2deg(rotation_angle(*frames))


def stability(frames: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Median angle between two views of a cloud, and the share below 10 degrees."""
    d = angles(frames)
    return {"angle": float(d.median()), "within_10": float((d < 10).double().mean())}


def spread(frames: Tensor, labels: NDArray[np.int64]) -> float:
    """Median angle in degrees of clouds from their category's mean canonical frame; the mean over categories."""
    found = []
    for label in np.unique(labels):
        own = frames[torch.from_numpy(labels == label)]
        found.append(float(torch.rad2deg(rotation_angle(mean_rotation(own).expand_as(own), own)).median()))
    return float(np.mean(found))


def registered(looks: Looks, test: Tensor, motions: tuple[RigidTransform, RigidTransform]) -> dict[str, Tensor]:
    """Errors (S,) of registering the first view onto the second: by capsules, then refined, and by closest points."""
    true = motions[1].after(motions[0].inverse())
    first, second = motions[0].apply(test), motions[1].apply(test)
    a, b = (o.pose.transform for o in looks.outputs)
    chained = b.inverse().after(a)
    means = RigidTransform(torch.eye(test.shape[2]).expand(len(test), -1, -1), second.mean(1) - first.mean(1))
    found = {
        "capsules": chained,
        "refined": icp(first, second, chained).transform,
        "icp": icp(first, second, means).transform,
    }
    return {name: registration_rmse(motion, true, first) for name, motion in found.items()}


def agreement(looks: Looks) -> float:
    """Share of points that belong to the same capsule in both views."""
    a, b = (o.capsules.attention.argmax(-1) for o in looks.outputs)
    return float((a == b).double().mean())


def purity(looks: Looks, parts: NDArray[np.int64], seed: int) -> tuple[float, float]:
    """Normalized mutual information of capsules and true parts, and the same with capsules shuffled within clouds."""
    found = looks.outputs[0].capsules.attention.argmax(-1).numpy()
    rng = np.random.default_rng(derive(seed, 9))
    scores = [normalized_mutual_info_score(p, f) for p, f in zip(parts, found, strict=True)]
    chance = [normalized_mutual_info_score(p, rng.permutation(f)) for p, f in zip(parts, found, strict=True)]
    return float(np.mean(scores)), float(np.mean(chance))


def principal(test: Tensor, motion: RigidTransform) -> Tensor:
    """Frames of principal axes in place of the canonicalizer's. Of equal points they agree in all poses exactly."""
    return principal_frame(motion.apply(test)).R @ motion.R


def train(model: CanonicalCapsules, s: Training, source: Source, seed: int, each: Any) -> None:
    """Train; ``each(step)`` is called after the steps at which the test clouds are looked at."""
    stops = {max(1, round(part * s.steps)) for part in LOOKS}

    def on_step(step: int) -> None:
        if step in stops:
            each(step)

    train_capsules(
        model,
        source.train,
        steps=s.steps,
        batch_size=s.batch,
        learning_rate=s.learning_rate,
        drops=(0.75,),
        seed=derive(seed, 8),
        on_step=on_step,
    )


def features(model: CanonicalCapsules, clouds: Tensor, motion: RigidTransform) -> NDArray[np.float64]:
    """Descriptors and canonical poses relative to their box, for a classifier: (S, K C + K D)."""
    model.eval()
    with torch.no_grad():
        out = model(motion.apply(clouds))
    beta = out.capsules.beta if out.descriptors is None else out.descriptors
    theta = out.pose.transform.apply(out.capsules.theta)
    low, high = theta.amin(1, keepdim=True), theta.amax(1, keepdim=True)
    box = (theta - (low + high) / 2) / (high - low).amax(2, keepdim=True).clamp_min(1e-6)
    return torch.cat([beta.flatten(1), box.flatten(1)], 1).double().numpy()
