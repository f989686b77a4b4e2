"""The study of vision transformers and residual networks: its contract, its pairs, users' images and models."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data import Labeled, load_workload
from mlcollage.errors import InvalidInput
from mlcollage.lab import BoundStudy, Scale
from mlcollage.lab.experiment import Task
from mlcollage.measure import residual_sums
from mlcollage.nn import build
from mlcollage.papers.vit_vs_cnn.study import STUDY
from mlcollage.papers.vit_vs_cnn.study.experiments import networks, on_workload, to_learn
from mlcollage.papers.vit_vs_cnn.study.models import Networks, makers, patch_of, train
from mlcollage.testing import study_checks

SLUG = "vit_vs_cnn"
SMOKE = STUDY.experiment("networks").settings[Scale.SMOKE]


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_every_claim_due_at_quick_is_computed(smoke_store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))
    assert np.isfinite(evidence.table["value"]).all()
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    late = {k for k, v in verdicts.items() if v.claim.from_scale is Scale.FULL}
    assert late == {"C3", "C8"}
    assert all(verdicts[k].estimate is not None for k in set(verdicts) - late), verdicts


def test_networks_of_a_seed_share_images_and_the_cut_one_its_start():
    p = to_learn(Task("networks", (0,), SMOKE, Scale.SMOKE))
    other = to_learn(Task("networks", (1,), SMOKE, Scale.SMOKE))
    assert not torch.equal(p.train.x, other.train.x)
    own = makers(SMOKE, p.shape, p.num_classes)
    still = dataclasses.replace(SMOKE, lr=0.0)
    plain, cut = (train(own["vit"], p, still, 0, cut=block) for block in (None, "block2"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), cut.parameters(), strict=True))
    trained = train(own["vit"], p, SMOKE, 0, cut="block2")
    assert not all(torch.equal(a, b) for a, b in zip(trained.parameters(), cut.parameters(), strict=True))


def test_mixer_and_patches():
    mixer = build(makers(Networks(dim=8, depth=2), (1, 28, 28), 10)["mixer"], 0)
    x = torch.rand(3, 1, 28, 28)
    assert mixer(x).shape == (3, 10)
    assert [s.name for s in residual_sums(mixer, x)] == ["blocks.0", "blocks.0#1", "blocks.1", "blocks.1#1"]
    assert [patch_of(side) for side in (8, 14, 28, 32, 224)] == [2, 2, 7, 8, 56]
    with pytest.raises(InvalidInput, match="resize them"):
        patch_of(29)


class Users(nn.Module):
    """A small residual network of a user's, with its own names."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.act, self.head = nn.ReLU(), nn.Linear(width, 10)

    def forward(self, x):
        h = self.act(self.first(x))
        h = h + self.second(h)
        return self.head(h.mean((2, 3)))


def digits(**models):
    found = load_workload("digits")
    return dataclasses.replace(found, **models)


def test_a_users_two_models_take_the_places_of_both():
    workload = digits(model=lambda: Users(6), other_model=lambda: Users(4))
    settings = on_workload(SMOKE, workload, Scale.SMOKE)
    assert settings.users
    found = networks(Task("networks", (0,), settings, Scale.SMOKE, workload)).table
    arms = set(found["arm"])
    assert arms == {"vit", "cnn", "vit untrained", "cnn untrained"}
    assert {"uniformity", "accuracy", "skip_ratio", "matched_depth"} <= set(found["metric"])
    assert "other_model" in workload.describe()


def test_one_model_alone_tables_and_odd_images_are_refused():
    with pytest.raises(InvalidInput, match="give digits model and other_model"):
        on_workload(SMOKE, digits(model=lambda: Users(4)), Scale.SMOKE)
    with pytest.raises(InvalidInput, match="on images"):
        on_workload(SMOKE, load_workload("iris"), Scale.SMOKE)
    odd = TensorDataset(torch.rand(60, 1, 29, 29), torch.arange(60) % 2)
    with pytest.raises(InvalidInput, match="side of 29 pixels"):
        on_workload(SMOKE, Labeled(odd, odd, num_classes=2), Scale.SMOKE)
    few = TensorDataset(torch.rand(20, 1, 28, 28), torch.arange(20) % 2)
    with pytest.raises(InvalidInput, match="40 training"):
        on_workload(SMOKE, Labeled(few, few, num_classes=2), Scale.SMOKE)
    with pytest.raises(InvalidInput, match="other_model must be a function"):
        digits(other_model=3).check("mine")
