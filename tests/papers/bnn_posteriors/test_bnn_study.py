"""The study of Bayesian neural-network posteriors: its contract, and what is special to it."""

import dataclasses

import pytest
import torch
from torch import nn

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.papers.bnn_posteriors.study import STUDY
from mlcollage.papers.bnn_posteriors.study.data import split
from mlcollage.papers.bnn_posteriors.study.sampling import shifted
from mlcollage.testing import study_checks

SLUG = "bnn_posteriors"


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study_keeps_its_contract(check, smoke_store):
    check(smoke_store(SLUG))


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


def test_every_claim_due_at_quick_is_computed(evidence):
    for verdict in BoundStudy(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK)).values():
        if verdict.claim.from_scale is Scale.QUICK:
            assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        else:
            assert verdict.status == "untested"


def test_values_of_the_paper_are_not_printed_from_memory():
    assert {claim.paper_value for claim in STUDY.claims} == {""}


def test_the_larger_scales_have_the_shift_only_on_workloads_without_a_model():
    names = {scale: {run.experiment for run in BoundStudy(SLUG, scale).runs()} for scale in Scale}
    assert names[Scale.SMOKE] == names[Scale.QUICK] == {"methods", "settings", "shift", "augmentation"}
    assert names[Scale.FULL] == names[Scale.PAPER] == {"methods", "settings", "augmentation"}
    large = BoundStudy(SLUG, Scale.FULL, "iris").runs()
    assert {run.experiment for run in large} == {"methods", "settings", "shift_of_workloads", "augmentation"}
    assert {run.settings["network"] for run in large} == {"mlp"}


def test_no_sample_is_in_two_parts_of_a_split_and_experiments_of_a_seed_share_it():
    def drawn(name):
        e = STUDY.experiment(name)
        (run,) = e.runs(SLUG, Scale.SMOKE, range(1))
        return split(e.task(run))[0]

    first, second = drawn("methods"), drawn("settings")
    assert torch.equal(first.train.x, second.train.x)
    rows = torch.cat([first.train.x, first.validation.x, first.test.x])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert abs(float(first.train.x.mean())) < 1e-5
    assert float(first.train.x.std()) == pytest.approx(1, abs=0.01)


def test_rejections_repeat_and_dead_weights_follow_the_prior(evidence):
    """What the shift experiment records of weights on constant inputs is close to the prior even at smoke scale."""
    ratio = evidence.select("dead_variance_ratio", arm="shift_hmc")["value"]
    assert ratio.between(0.8, 1.2).all()
    accuracy = evidence.select("accuracy", arm="shift_map").groupby("seed")["value"]
    assert (accuracy.max() - accuracy.min() < 0.15).all(), "an optimum has next to no weight there"


def test_shifts_move_images_by_at_most_a_pixel_and_keep_rows_that_are_images_rows():
    x = torch.arange(16.0).reshape(1, 16).repeat(300, 1)
    moved = shifted(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    padded = nn.functional.pad(x[:1].reshape(1, 1, 4, 4), (1, 1, 1, 1))[0, 0]
    windows = {tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(row.tolist()) for row in moved} == windows


def test_the_slide_has_a_panel_for_each_part(evidence, tmp_path):
    own = BoundStudy(SLUG, Scale.SMOKE)
    slide, files = draw_slide(own, evidence, own.judge(evidence), tmp_path)
    assert [p.claim for p in (slide.collage.main, *slide.collage.panels)] == ["C5", "C1", "C4"]
    assert {c.id for c in slide.cards} == {c.id for c in STUDY.claims}
    assert all(file.stat().st_size > 10_000 for file in files.values())


def test_a_network_of_the_users_own_has_no_place_for_more_inputs(user_workloads, tmp_path):
    spec = user_workloads["function"]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    verdicts = BoundStudy(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    left_out = {k for k, v in verdicts.items() if v.estimate is None}
    assert left_out == {"C5c", "C7", "C7b", "C7c"}


def test_a_network_without_a_posterior_is_refused_before_anything_runs():
    data = torch.utils.data.TensorDataset(torch.rand(60, 4), torch.arange(60) % 2)
    net = Labeled(data, data, 2, lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(InvalidInput, match="FilterResponseNorm"):
        list(STUDY.experiment("methods").runs(SLUG, Scale.SMOKE, range(1), workload=net))
