"""The study of the eight ideas keeps the contract, and its simulated truths are what they say."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats as sps

import mlcollage.papers.statistical_ideas as tools
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.papers.statistical_ideas.study import STUDY, schools, simulated
from mlcollage.papers.statistical_ideas.study.experiments import Sampler, sampled
from mlcollage.stats.multilevel import PartialPooling
from mlcollage.testing import study_checks

SLUG = "statistical_ideas"
Y, S = (torch.tensor(v, dtype=torch.float64) for v in (schools.EFFECTS, schools.ERRORS))


@pytest.fixture(scope="module")
def store(smoke_store):
    return smoke_store(SLUG)


# --- the study ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study_keeps_the_contract(check, store):
    check(store)


def test_every_claim_is_computed_and_one_needs_more_repetitions(store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(store)
    quick = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    full = BoundStudy(SLUG, Scale.FULL).judge(dataclasses.replace(evidence, scale=Scale.FULL))
    assert [k for k, v in quick.items() if v.status == "untested"] == ["C1f"]
    for verdict in full.values():
        assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        assert verdict.seeds == 2


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_cover_every_block_once(scale):
    runs = BoundStudy(SLUG, scale).runs()
    for experiment in STUDY.experiments:
        own = [r for r in runs if r.experiment == experiment.name]
        assert [seed for r in own for seed in r.seeds] == list(range(STUDY.seeds[scale]))
        assert max(r.count for r in own) <= 5


@pytest.mark.parametrize("kind", ["function", "npz", "csv"])
def test_pairs_of_seeds_on_a_users_data_from_end_to_end(user_workloads, tmp_path, kind):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.experiment for r in evidence.runs} == {"paired"}
    verdicts = BoundStudy(SLUG, Scale.QUICK, spec).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    assert {k for k, v in verdicts.items() if v.status != "untested"} == {"C1b"}
    own = BoundStudy(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert slide.collage.main.claim == "C1b"


def test_too_few_samples_are_refused():
    few = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="8 samples; at least 10"):
        list(STUDY.experiment("paired").runs(SLUG, Scale.SMOKE, range(1), workload=Labeled(few, few, 2)))


# --- the simulated truths -------------------------------------------------------------------------------------------


def test_the_confounded_units_have_an_average_effect_of_one():
    x, a, y = simulated.confounded(200_000, np.random.default_rng(0))
    adjusted = np.column_stack([a, x[:, 0], x[:, 1] ** 2, np.ones(len(a))])  # the outcome's true model
    assert np.linalg.lstsq(adjusted, y, rcond=None)[0][0] == pytest.approx(1, abs=0.03)
    assert y[a].mean() - y[~a].mean() > 2


def test_the_four_sets_share_their_moments_and_their_line():
    sets = simulated.anscombe_like(40, np.random.default_rng(1))
    for x, y in sets.values():
        line = sps.linregress(x, y)
        moments = [x.mean(), x.std(), y.mean(), y.std(), line.slope, line.rvalue]
        np.testing.assert_allclose(moments, [0, 1, 0, 1, 0.8, 0.8], atol=1e-12)


@pytest.mark.parametrize("form", [schools.non_centered, schools.centered])
def test_gradients_of_the_schools_are_those_of_autograd(form):
    x = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value, gradient = form(Y, S)(x)
    (expected,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_the_two_forms_are_one_posterior_up_to_the_jacobian():
    x = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = torch.cat([x[:, :2], schools.effects(x)], dim=1)
    difference = schools.non_centered(Y, S)(x)[0] - schools.centered(Y, S)(moved)[0] - 8 * x[:, 1]
    torch.testing.assert_close(difference, difference[:1].expand(6))


def test_the_density_of_the_schools_is_that_of_the_quadrature():
    """Integrated over mu and z on a grid of tau: posterior means of tau agree."""
    exact = PartialPooling(schools.SCALE, schools.SCALE, "half-normal").fit(schools.EFFECTS, schools.ERRORS).exact()
    settings = Sampler(chains=16, draws=200, warmup=150)
    draws, _ = sampled(settings, schools.non_centered(Y, S), torch.Generator().manual_seed(2))
    assert float(draws[..., 1].exp().mean()) == pytest.approx(float(exact.tau.mean), abs=0.15 * float(exact.tau.sd))


def test_peeking_is_what_scipy_says_and_a_sequence_is_safer():
    x = np.random.default_rng(3).normal(size=(60, 30))
    ever = [any(sps.ttest_1samp(row[:n], 0).pvalue < 0.05 for n in range(5, 31)) for row in x]
    peeking, sequence = simulated.peeks(x)
    assert peeking == pytest.approx(np.mean(ever))
    assert sequence < peeking


def test_a_race_costs_less_than_a_third_and_even_pulls_regret_linearly():
    _, share = simulated.race(np.random.default_rng(4))
    assert share == pytest.approx(108 / 729)
    regret = simulated.regret(None, 100, np.random.default_rng(5))
    assert regret[-1] == pytest.approx(100 * 0.08)


def test_checks_flag_a_curve_and_seldom_a_line():
    rng = np.random.default_rng(6)
    found = [
        {name: simulated.flagged(*xy, 100, rng) for name, xy in simulated.anscombe_like(40, rng).items()}
        for _ in range(15)
    ]
    assert all(f["curve"] and f["outlier"] and f["lever"] for f in found)
    assert sum(f["line"] for f in found) <= 4


# --- the tools ------------------------------------------------------------------------------------------------------


def test_every_tool_can_be_had_by_name():
    assert {"bootstrap_ci", "PartialPooling", "hmc", "sbc", "forest"} <= set(tools.__all__) == set(dir(tools))
    assert all(callable(getattr(tools, name)) or name in ("hmc", "nuts", "vi") for name in tools.__all__)
    with pytest.raises(AttributeError, match="magic"):
        tools.magic  # noqa: B018


def test_gathering_the_tools_imports_none_of_them():
    code = "import sys, mlcollage.papers.statistical_ideas; print({'torch', 'scipy', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
