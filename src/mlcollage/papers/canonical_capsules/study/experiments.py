"""The study's experiments: planes in two dimensions, planes in three, ablations, and several categories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from mlcollage._random import generator
from mlcollage.data import PointClouds
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task

from ..model import random_motion
from .claims import LOSSES
from .models import (
    Looks,
    Training,
    agreement,
    angles,
    features,
    look,
    make_model,
    principal,
    purity,
    registered,
    source_of,
    spread,
    test_motions,
    train,
)

SHOWN = 5  # clouds of the pictures
PLANAR: Mapping[str, dict[str, object]] = {"capsules": {}, "no_canonicalizer": {"canonicalize": False}}
POSE: Mapping[str, dict[str, object]] = {"pose": {"reconstruction": 0.0}}
CLASSES = ("features", "features_untrained", "features_plain")
SPATIAL: Mapping[str, dict[str, object]] = {"spatial": {"reconstruction": 0.0}}
ABLATIONS: Mapping[str, dict[str, object]] = {f"no_{name}": {name: 0.0, "reconstruction": 0.0} for name in LOSSES}
_FEWEST = 32


def on_workload(s: Training, workload: PointClouds, scale: Scale) -> Training:
    """Sizes that the user's clouds allow; three dimensions take four times the steps."""
    size = min(len(np.asarray(c)) for part in (workload.clouds, workload.test_clouds) for c in part)
    if len(workload.clouds) < _FEWEST or len(workload.test_clouds) < 4 or size < 2 * s.capsules:
        raise InvalidInput(
            f"the study needs {_FEWEST} clouds to train on, 4 to test on and {2 * s.capsules} points in each; "
            f"{workload.name} has {len(workload.clouds)}, {len(workload.test_clouds)} and {size}."
        )
    return dataclasses.replace(
        s,
        dim=workload.dim,
        points=min(s.points, size),
        shapes=min(s.shapes, len(workload.clouds)),
        test=min(s.test, len(workload.test_clouds)),
        steps=s.steps * (4 if workload.dim == 3 and scale is not Scale.SMOKE else 1),
    )


def planar(task: Task[Training]) -> Measurements:
    """All losses, with and without the canonicalizer."""
    return _measured(task, PLANAR[task.arm])


def pose(task: Task[Training]) -> Measurements:
    """The pose path alone: first encoder and canonicalizer, without a decoder."""
    return _measured(task, POSE[task.arm])


def spatial(task: Task[Training]) -> Measurements:
    """The pose path in three dimensions: first encoder and canonicalizer, without a decoder."""
    return _measured(task, SPATIAL[task.arm])


def ablation(task: Task[Training]) -> Measurements:
    """One loss left out."""
    return _measured(task, ABLATIONS[task.arm])


def _measured(task: Task[Training], changes: Mapping[str, object]) -> Measurements:
    m, s, seed = Measurements(), task.settings, task.seed
    source = source_of(s, seed, task.workload)
    model = make_model(s, seed, **changes)  # type: ignore[arg-type]
    motions = test_motions(s, seed, len(source.test))
    last: list[Looks] = []

    def each(step: int) -> None:
        found = look(model, source.test, motions)
        m.add_all(found.numbers, step=step)
        last[:] = [found]

    train(model, s, source, seed, each)
    (end,) = last
    m.add("agreement", agreement(end))
    if source.parts is not None:
        own, chance = purity(end, source.parts, seed)
        m.add("purity", own)
        m.add("purity", chance, arm="shuffled" if task.arm == "pose" else f"shuffled_{task.arm}")
    if task.arm == "capsules":
        _pictures(m, end, motions[0].apply(source.test))
    if task.arm not in ("pose", "spatial"):
        return m
    tag = "" if task.arm == "pose" else "_spatial"
    errors = registered(end, source.test, motions)
    m.add("rmse", float(errors["capsules"].median()))
    m.add("failures", float((errors["capsules"] > 0.2).double().mean()))
    m.add("rmse", float(errors["refined"].median()), arm=f"refined{tag}")
    for name in ("refined", "icp"):
        m.add("failures", float((errors[name] > 0.2).double().mean()), arm=f"{name}{tag}")
    m.add("rmse", float(errors["icp"].median()), arm=f"icp{tag}")
    if source.aligned:
        labels = source.labels[1] if source.labels is not None else np.zeros(len(source.test), dtype=np.int64)
        m.add("spread", spread(end.frames[0], labels))
        axes = principal(source.test, motions[0])
        m.add("spread", spread(axes, labels), arm=f"principal{tag}")
    _pictures(m, end, motions[0].apply(source.test))
    m.array("angles", angles(end.frames).numpy())
    for name, error in errors.items():
        m.array(f"rmse_{name}", error.numpy())
    return m


def _pictures(m: Measurements, end: Looks, moved: torch.Tensor) -> None:
    first = end.outputs[0]
    m.array("moved", moved[:SHOWN].numpy())
    m.array("canonical", first.canonical[:SHOWN].numpy())
    m.array("capsule", first.capsules.attention[:SHOWN].argmax(-1).numpy())
    m.array("theta", first.pose.transform.apply(first.capsules.theta)[:SHOWN].numpy())
    if first.decoded is not None:
        m.array("decoded", first.decoded[:SHOWN].flatten(1, 2).numpy())


def classes(task: Task[Training]) -> Measurements:
    """Frozen features of several categories: a linear classifier, and k-means with the best names for its clusters."""
    m, s, seed = Measurements(), task.settings, task.seed
    source = source_of(s, seed, None)
    assert source.labels is not None
    model = make_model(s, seed, canonicalize=task.arm != "features_plain")
    if task.arm != "features_untrained":
        train(model, s, source, seed, lambda step: None)
    draw = generator(seed, 11)
    x, x_test = (
        features(model, clouds, random_motion(len(clouds), s.dim, generator=draw))
        for clouds in (source.train, source.test)
    )
    y, y_test = source.labels
    machine = make_pipeline(StandardScaler(), LinearSVC(C=0.1, random_state=seed, max_iter=5000)).fit(x, y)
    m.add("accuracy", float(machine.score(x_test, y_test)))
    scale = StandardScaler().fit(x)
    k = len(s.categories)
    clusters = KMeans(k, n_init=10, random_state=seed).fit(scale.transform(x))
    table = np.zeros((k, k))
    np.add.at(table, (clusters.labels_, y), 1)
    names = dict(zip(*linear_sum_assignment(-table), strict=True))
    guessed = np.array([names[c] for c in clusters.predict(scale.transform(x_test))])
    m.add("cluster_accuracy", float((guessed == y_test).mean()))
    return m
