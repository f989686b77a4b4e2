"""The study of the eight ideas: every run runs, every claim is computed, the simulated truths are what they say."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats as sps

import mlcollage.papers.statistical_ideas as tools
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.study import Study, run_study
from mlcollage.papers.statistical_ideas import experiments, schools, study
from mlcollage.stats.multilevel import PartialPooling

SLUG = "statistical_ideas"
Y, S = (torch.tensor(v, dtype=torch.float64) for v in (schools.EFFECTS, schools.ERRORS))


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return Study(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


# --- the study ------------------------------------------------------------------------------------------------------


def test_every_run_finishes_with_finite_numbers(evidence):
    assert evidence.failures == []
    assert evidence.missing == 0
    assert {r.settings["experiment"] for r in evidence.runs} == set(experiments.EXPERIMENTS)
    assert np.isfinite(evidence.table["value"]).all()
    assert set(evidence.table["seed"]) == {0, 1}, "a run's rows carry the seed of their block"


def test_every_claim_due_is_computed(evidence):
    quick = Study(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    full = Study(SLUG, Scale.FULL).judge(as_if(evidence, Scale.FULL))
    assert list(quick) == [c.id for c in study.CLAIMS]
    assert [k for k, v in quick.items() if v.status == "untested"] == ["C1f"]
    for verdict in full.values():
        assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        assert verdict.seeds == 2


def test_claims_are_well_formed(evidence):
    assert len({c.id for c in study.CLAIMS}) == len(study.CLAIMS)
    for claim in study.CLAIMS:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert claim.sentence[0].isupper()
        assert claim.sentence.endswith(".")
        assert claim.source
        assert claim.estimand.describe().strip()
        known = {r.arm for r in evidence.runs} | set(evidence.table["arm"])
        assert set(claim.estimand.arms) <= known


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_cover_every_block_once(scale):
    runs = Study(SLUG, scale).runs()
    assert len({r.id for r in runs}) == len(runs)
    for experiment in experiments.EXPERIMENTS:
        own = [r for r in runs if r.settings["experiment"] == experiment]
        blocks = [b for r in own for b in range(r.seed, r.seed + r.integer("blocks"))]
        assert blocks == list(range(study.SEEDS[scale]))
    assert scale is Scale.SMOKE or study.SEEDS[scale] >= 10


@pytest.mark.parametrize("experiment", ["causal", "paired", "calibration", "adaptive", "judging"])
def test_a_run_gives_the_same_numbers_again(evidence, experiment):
    (run,) = evidence.find_runs(experiment=experiment)
    kept = evidence.table[evidence.table["run"] == run.id]
    np.testing.assert_array_equal(study.measure(run, None).table["value"], kept["value"])


def test_the_slide_draws(evidence, tmp_path):
    study_ = Study(SLUG, Scale.SMOKE)
    slide, files = draw_slide(study_, evidence, study_.judge(evidence), tmp_path)
    assert len(slide.collage.panels) == 6
    assert {c.id for c in slide.chips} == {c.id for c in study.CLAIMS}
    assert all(panel.alt.strip() for panel in (slide.collage.idea, *slide.collage.panels))
    assert all(file.stat().st_size > 10_000 for file in files.values())


@pytest.mark.parametrize("kind", ["function", "npz", "csv"])
def test_pairs_of_seeds_on_a_users_data_from_end_to_end(user_workloads, tmp_path, kind):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.settings["experiment"] for r in evidence.runs} == {"paired"}
    verdicts = Study(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    assert {k for k, v in verdicts.items() if v.status != "untested"} == {"C1b"}
    own = Study(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert [p.title for p in slide.collage.panels] == ["What a pair of seeds shares"]


# --- the simulated truths -------------------------------------------------------------------------------------------


def test_the_confounded_units_have_an_average_effect_of_one():
    x, a, y = experiments.confounded(200_000, np.random.default_rng(0))
    adjusted = np.column_stack([a, x[:, 0], x[:, 1] ** 2, np.ones(len(a))])  # the outcome's true model
    assert np.linalg.lstsq(adjusted, y, rcond=None)[0][0] == pytest.approx(1, abs=0.03)
    assert y[a].mean() - y[~a].mean() > 2


def test_the_four_sets_share_their_moments_and_their_line():
    sets = experiments.anscombe_like(40, np.random.default_rng(1))
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
    (run,) = (r for r in study.runs(Scale.SMOKE, None) if r.arm == "sampler")
    larger = dataclasses.replace(run, settings={**run.settings, "chains": 16, "draws": 200, "warmup": 150})
    draws = experiments._sampled(larger, schools.non_centered(Y, S), torch.Generator().manual_seed(2))
    assert float(draws[..., 1].exp().mean()) == pytest.approx(float(exact.tau.mean), abs=0.15 * float(exact.tau.sd))


def test_peeking_is_what_scipy_says_and_a_sequence_is_safer():
    x = np.random.default_rng(3).normal(size=(60, 30))
    ever = [any(sps.ttest_1samp(row[:n], 0).pvalue < 0.05 for n in range(5, 31)) for row in x]
    peeking, sequence = experiments._peeks(x)
    assert peeking == pytest.approx(np.mean(ever))
    assert sequence < peeking


def test_a_race_costs_less_than_a_third_and_even_pulls_regret_linearly():
    _, share = experiments._race(np.random.default_rng(4))
    assert share == pytest.approx(108 / 729)
    regret = experiments._regret(None, 100, np.random.default_rng(5))
    assert regret[-1] == pytest.approx(100 * 0.08)


def test_checks_flag_a_curve_and_seldom_a_line():
    rng = np.random.default_rng(6)
    found = [
        {name: experiments._flagged(*xy, 100, rng) for name, xy in experiments.anscombe_like(40, rng).items()}
        for _ in range(15)
    ]
    assert all(f["curve"] and f["outlier"] and f["lever"] for f in found)
    assert sum(f["line"] for f in found) <= 4


# --- the tools ------------------------------------------------------------------------------------------------------


def test_every_tool_can_be_had_by_name():
    assert all(callable(getattr(tools, name)) or name in ("hmc", "nuts") for name in tools.__all__)
    assert dir(tools) == sorted(tools.__all__)
    with pytest.raises(AttributeError, match="magic"):
        tools.magic  # noqa: B018


def test_gathering_the_tools_imports_none_of_them():
    code = "import sys, mlcollage.papers.statistical_ideas; print({'torch', 'scipy', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
