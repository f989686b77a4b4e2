"""The study of Auto-Sklearn 2.0: the contract of a study, held-out tasks, and the user's table."""

import dataclasses

import numpy as np
import pytest

from mlcollage.data import load_workload
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.papers.autosklearn2 import PortfolioBuilder, default_portfolio, shipped_tensor, simulate
from mlcollage.papers.autosklearn2.policy import POLICIES
from mlcollage.papers.autosklearn2.space import pipeline_space
from mlcollage.papers.autosklearn2.study import STUDY
from mlcollage.papers.autosklearn2.study.experiments import ends_only, fits, held_out
from mlcollage.testing import study_checks

SLUG = "autosklearn2"


@pytest.mark.parametrize("check", study_checks(SLUG, workload="wine"), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_every_claim_is_computed(smoke_store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    assert all(v.estimate is not None for v in verdicts.values()), {k: v.reason for k, v in verdicts.items()}


def test_seeds_hold_out_every_task_once_and_more_seeds_hold_out_other_groups():
    groups = [held_out(31, 12, seed).tolist() for seed in range(24)]
    assert sorted([t for g in groups[:12] for t in g]) == sorted([t for g in groups[12:] for t in g]) == list(range(31))
    assert groups[:12] != groups[12:]


def test_without_curves_a_stopped_fit_leaves_nothing():
    tensor = shipped_tensor()
    bare = ends_only(tensor)
    order = list(range(20))
    np.testing.assert_allclose(simulate(bare, order).loss, simulate(tensor, order).loss)
    tight = {"time_limit": 0.2, "cutoff": 0.02}
    assert simulate(bare, order, **tight).loss.mean() > simulate(tensor, order, **tight).loss.mean()


def test_the_shipped_tensor_and_its_portfolio_are_whole():
    tensor, space = shipped_tensor(), pipeline_space()
    assert tensor.shape[1] == 120
    assert tensor.measured == 1
    assert all(space.check(c) == c for c in tensor.configs)
    for policy in (POLICIES[0], POLICIES[4]):  # what is in the file is what is learned
        learned = PortfolioBuilder(32, policy).fit(tensor).configs_
        assert list(default_portfolio(policy)) == learned
        assert len(learned) <= 32


def test_a_users_table_goes_through_real_fits():
    settings = STUDY.experiment("fits").settings[Scale.SMOKE]
    found = fits(Task("both", (0,), settings, workload=load_workload("wine"))).table
    assert set(found["model"]) == {"ensemble", "single"}
    assert (found["value"] < 0.5).all()
