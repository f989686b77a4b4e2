"""The study of Canonical Capsules: the contract of a study, what it measures, and users' clouds."""

import dataclasses

import numpy as np
import pytest
import torch

from mlcollage.data import PointClouds, procedural_shapes
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.measure import RigidTransform, random_rotation
from mlcollage.papers.canonical_capsules.study import STUDY
from mlcollage.papers.canonical_capsules.study.experiments import classes, on_workload, pose
from mlcollage.papers.canonical_capsules.study.models import (
    LOOKS,
    Training,
    look,
    make_model,
    purity,
    source_of,
    spread,
)
from mlcollage.papers.canonical_capsules.study.models import test_motions as motions_of
from mlcollage.testing import study_checks

SLUG = "canonical_capsules"
SMOKE = STUDY.experiment("pose").settings[Scale.SMOKE]


@pytest.fixture(scope="session")
def folder_of_clouds(tmp_path_factory):
    """Forty meshes as OBJ files would be: here arrays of planes, on which the study runs by name."""
    shapes = procedural_shapes(("plane", "chair"), 50, 40, seed=9)
    path = tmp_path_factory.mktemp("clouds") / "shapes.npz"
    np.savez(path, points=shapes.points, labels=shapes.labels, parts=shapes.parts)
    return path


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store, folder_of_clouds):
    check = dataclasses.replace(check, workload=f"points:{folder_of_clouds}?test=20")
    check(smoke_store(SLUG))


def test_every_claim_is_computed(smoke_store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))
    assert np.isfinite(evidence.table["value"]).all()
    verdicts = BoundStudy(SLUG, Scale.FULL).judge(dataclasses.replace(evidence, scale=Scale.FULL))
    lacking = {k: v.reason for k, v in verdicts.items() if v.estimate is None}
    assert set(lacking) <= {"C2b", "C3b", "C4b"}, lacking  # one seed at this scale


def test_labeled_samples_are_refused():
    with pytest.raises(InvalidInput):
        BoundStudy(SLUG, Scale.SMOKE, "iris").runs()


def test_arms_of_a_seed_have_the_same_shapes_and_start():
    a, b = (source_of(SMOKE, 4, None) for _ in range(2))
    assert torch.equal(a.train, b.train)
    assert not torch.equal(a.train[:8], source_of(SMOKE, 5, None).train[:8])
    one, other = make_model(SMOKE, 4), make_model(SMOKE, 4, canonicalize=False)
    assert torch.equal(one.encoder.proj.lin.weight, other.encoder.proj.lin.weight)
    assert torch.equal(motions_of(SMOKE, 4, 8)[0].R, motions_of(SMOKE, 4, 8)[0].R)


def test_a_model_of_invariant_inputs_has_no_error():
    """The measures themselves: by construction equivariance and invariance hold, and two views come to one pose."""
    from mlcollage.papers.canonical_capsules import CanonicalCapsules, LossWeights

    torch.manual_seed(0)
    model = CanonicalCapsules(3, 5, 8, inputs="distances", weights=LossWeights(reconstruction=0)).double().eval()
    test = torch.from_numpy(procedural_shapes("chair", 6, 48, asymmetric=True).points).double()
    motions = tuple(
        RigidTransform(*(x.double() for x in m)) for m in motions_of(dataclasses.replace(SMOKE, dim=3), 0, 6)
    )
    found = look(model, test, motions).numbers
    assert found["equivariance_error"] < 1e-6
    assert found["descriptor_cosine"] > 1 - 1e-9
    assert found["angle"] < 1e-2
    assert found["within_10"] == 1


def test_the_spread_is_the_angle_from_the_mean_of_the_category():
    frames = random_rotation(2, generator=torch.Generator().manual_seed(0)).repeat_interleave(10, 0)
    labels = np.repeat([0, 1], 10)
    assert spread(frames, labels) == pytest.approx(0, abs=0.1)
    assert spread(frames, np.zeros(20, int)) > 20


def test_purity_is_one_where_capsules_are_the_parts():
    attention = torch.eye(3)[torch.arange(30) % 3][None]
    looks = type("L", (), {"outputs": [type("O", (), {"capsules": type("C", (), {"attention": attention})})]})
    own, chance = purity(looks, (np.arange(30) % 3)[None], 0)
    assert own == pytest.approx(1)
    assert chance < 0.5


def clouds(n=40, points=30, dim=3, parts=False):
    shapes = procedural_shapes("mug", n + 10, points, dim=dim)
    named = {"parts": shapes.parts[:n], "test_parts": shapes.parts[n:]} if parts else {}
    return PointClouds(list(shapes.points[:n]), list(shapes.points[n:]), name="mugs", **named)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("parts", [False, True])
def test_clouds_of_users(dim, parts):
    workload = clouds(dim=dim, parts=parts)
    settings = on_workload(SMOKE, workload, Scale.SMOKE)
    assert settings.dim == dim
    assert settings.points == 30
    found = pose(Task("pose", (0,), settings, Scale.SMOKE, workload)).table
    assert ("purity" in set(found["metric"])) == parts
    assert "spread" not in set(found["metric"])
    assert len(found[found["metric"] == "angle"]) == len(LOOKS)


def test_settings_follow_the_workload():
    assert on_workload(Training(), clouds(), Scale.QUICK).steps == 4 * Training().steps
    assert on_workload(Training(), clouds(dim=2), Scale.QUICK).steps == Training().steps
    with pytest.raises(InvalidInput, match="32 clouds"):
        on_workload(Training(), clouds(20), Scale.QUICK)
    with pytest.raises(InvalidInput, match="16 points"):
        on_workload(Training(capsules=8), clouds(points=15), Scale.QUICK)


def test_classes_are_told_apart_where_features_tell_them_apart(monkeypatch):
    """The measure itself: features that are the label give an accuracy of 1, also to clusters without names."""

    def told(model, points, motion):
        return np.eye(2)[np.arange(len(points)) % 2] + 1e-3 * points[:, 0, :2].double().numpy()

    s = dataclasses.replace(SMOKE, categories=("bottle", "car"), dim=3)
    plain = classes(Task("features_untrained", (0,), s, Scale.SMOKE)).table
    assert plain["value"].between(0, 1).all()
    monkeypatch.setattr("mlcollage.papers.canonical_capsules.study.experiments.features", told)
    table = classes(Task("features_untrained", (0,), s, Scale.SMOKE)).table
    assert (table["value"] == 1).all()
    assert list(table["metric"]) == ["accuracy", "cluster_accuracy"]
