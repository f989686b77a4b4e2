"""The study of Bayesian neural-network posteriors: every run runs, every claim can be computed, users' models work."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.study import Study, run_study
from mlcollage.papers.bnn_posteriors import study
from mlcollage.papers.bnn_posteriors.experiments import _shifted, _split

SLUG = "bnn_posteriors"


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return Study(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


def test_every_run_finishes_with_finite_numbers(evidence):
    assert evidence.failures == []
    assert evidence.missing == 0
    assert np.isfinite(evidence.table["value"]).all()


def test_every_claim_due_at_quick_is_computed(evidence):
    verdicts = Study(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    assert list(verdicts) == [c.id for c in study.CLAIMS]
    for verdict in verdicts.values():
        if verdict.claim.from_scale is Scale.QUICK:
            assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        else:
            assert verdict.status == "untested"


def test_claims_are_well_formed():
    for claim in study.CLAIMS:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert claim.sentence[0].isupper()
        assert claim.sentence.endswith(".")
        assert claim.paper_value == "", "the dossier's figures are from memory and are not printed as the paper's"
        assert claim.estimand.describe().strip()


@pytest.mark.parametrize("scale", list(Scale))
def test_each_scale_registers_its_seeds_and_adds_others_when_asked(scale):
    own = Study(SLUG, scale)
    assert {r.seed for r in own.runs()} == set(range(study.SEEDS[scale]))
    assert {r.arm for r in own.runs()} == set(study.PARTS)
    further = own.more_runs(range(50, 52))
    assert {r.seed for r in further} == {50, 51}
    assert len(further) == 2 * len(study.PARTS)


def test_a_run_gives_the_same_numbers_again(evidence):
    for part in ("shift", "augmentation"):
        (run,) = evidence.find_runs(arm=part, seed=1)
        again = study.measure(run, None).table["value"]
        kept = evidence.table.loc[evidence.table["run"] == run.id, "value"]
        np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-4)


def test_no_sample_is_in_two_parts_of_a_split_and_parts_of_a_seed_share_it(evidence):
    runs = {run.arm: run for run in evidence.runs if run.seed == 0}
    first, second = (_split(runs[part], None) for part in ("methods", "settings"))
    assert torch.equal(first.x, second.x)
    rows = torch.cat([first.x, first.x_validation, first.x_test])
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert abs(float(first.x.mean())) < 1e-5
    assert float(first.x.std()) == pytest.approx(1, abs=0.01)


def test_rejections_repeat_and_dead_weights_follow_the_prior(evidence):
    """What the shift experiment records of weights on constant inputs is close to the prior even at smoke scale."""
    ratio = evidence.select("dead_variance_ratio", arm="shift_hmc")["value"]
    assert ratio.between(0.8, 1.2).all()
    accuracy = evidence.select("accuracy", arm="shift_map").groupby("seed")["value"]
    assert (accuracy.max() - accuracy.min() < 0.15).all(), "an optimum has next to no weight there"


def test_shifts_move_images_by_at_most_a_pixel_and_keep_rows_that_are_images_rows():
    x = torch.arange(16.0).reshape(1, 16).repeat(300, 1)
    moved = _shifted(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    padded = torch.nn.functional.pad(x[:1].reshape(1, 1, 4, 4), (1, 1, 1, 1))[0, 0]
    windows = {tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(row.tolist()) for row in moved} == windows


def test_the_slide_draws(evidence, tmp_path):
    own = Study(SLUG, Scale.SMOKE)
    slide, files = draw_slide(own, evidence, own.judge(evidence), tmp_path)
    assert len(slide.collage.panels) == 6
    assert {c.id for c in slide.chips} == {c.id for c in study.CLAIMS}
    assert all(file.stat().st_size > 10_000 for file in files.values())


@pytest.mark.parametrize("kind", ["function", "csv"])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    own = Study(SLUG, Scale.QUICK, spec)
    verdicts = own.judge(as_if(evidence, Scale.QUICK))
    shift = ("C7", "C7b", "C7c")
    assert all(v.estimate is not None for k, v in verdicts.items() if k not in (*shift, "C5c"))
    assert all((verdicts[k].estimate is None) == (kind == "function") for k in shift)
    small = Study(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(small, evidence, small.judge(evidence), tmp_path, ["svg"])
    assert small.workload_name in slide.foot_left


def test_a_network_without_a_posterior_is_refused_before_anything_runs():
    from mlcollage.data.workload import Labeled

    data = torch.utils.data.TensorDataset(torch.rand(60, 4), torch.arange(60) % 2)
    net = Labeled(data, data, 2, lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(InvalidInput, match="FilterResponseNorm"):
        list(study.runs(Scale.SMOKE, net))
