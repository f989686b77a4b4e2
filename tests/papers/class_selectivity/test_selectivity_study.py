"""The study of class selectivity: every run runs, every claim can be computed, pairs are pairs, users' models work."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.study import Study, run_study
from mlcollage.papers.class_selectivity import study
from mlcollage.papers.class_selectivity.experiments import layers_for, leaky, problem, train

SLUG = "class_selectivity"


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
    # So little training leaves the first layer's dimensions the same for every alpha: no correlation to compute.
    computable = {k for k, v in verdicts.items() if v.claim.from_scale is not Scale.FULL} - {"C12"}
    assert all(verdicts[k].estimate is not None for k in computable), {k: v.reason for k, v in verdicts.items()}
    assert {k for k, v in verdicts.items() if v.claim.from_scale is Scale.FULL} == {"C4", "C13"}


def test_claims_are_well_formed():
    for claim in study.CLAIMS:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert claim.sentence[0].isupper()
        assert claim.sentence.endswith(".")
        assert claim.estimand.describe().strip()


@pytest.mark.parametrize("scale", list(Scale))
def test_each_scale_holds_the_alphas_that_claims_name_and_registers_its_seeds(scale):
    runs = Study(SLUG, scale).runs()
    assert len(runs) == 2 * study.SEEDS[scale]
    assert sorted({r.seed for r in runs}) == list(range(study.SEEDS[scale]))
    for run in runs:
        alphas = [float(a) for a in run.text("alphas").split(",")]
        assert set(study.ALPHAS) <= set(alphas)
        assert {-2.0, 3.0} <= {float(a) for a in run.text("shuffled").split(",")}
        assert ("strong" in run.settings) == (scale.rank >= Scale.FULL.rank)
    more = list(study.runs(scale, None, range(7, 9)))
    assert [r.seed for r in more] == [7, 7, 8, 8]


def test_networks_that_are_compared_start_alike_and_see_the_same_data(monkeypatch):
    run = Study(SLUG, Scale.SMOKE).runs()[0]
    p = problem(run, None)
    seen = {}
    from mlcollage.papers.class_selectivity import experiments

    steps = experiments.steps

    def watch(model, batches, *args, **kwargs):
        start = torch.cat([v.flatten() for v in model.parameters()]).detach().clone()
        listed = [next(batches) for _ in range(kwargs["max_steps"])]
        seen[len(seen)] = (start, torch.cat([y for _, y in listed]))
        return steps(model, iter(listed), *args, **kwargs)

    monkeypatch.setattr(experiments, "steps", watch)
    for options in ({"alpha": 0.0}, {"alpha": -2.0}, {"alpha": -2.0, "shuffle": True}, {"alpha": 3.0, "leak": True}):
        train(p, run, seed=1, **options)
    for start, labels in seen.values():
        assert torch.equal(start, seen[0][0])
        assert torch.equal(labels, seen[0][1])


def test_a_seed_has_data_of_its_own_and_no_sample_in_two_parts():
    a, b = (problem(dataclasses.replace(Study(SLUG, Scale.SMOKE).runs()[0], seed=s), None) for s in (0, 1))
    assert not torch.equal(a.train[1], b.train[1])
    rows = torch.cat([a.train[0], a.val[0]]).flatten(1).numpy()
    assert len(np.unique(rows, axis=0)) >= len(rows) - 1
    assert a.train[0].shape == (256, 1, 14, 14)
    assert abs(float(a.train[0].mean())) < 1e-3


def test_what_only_the_larger_scales_train(evidence):
    """Nearly no selectivity after a warm-up, and the penalty in the first or in the later part of training only."""
    smoke = next(r for r in Study(SLUG, Scale.SMOKE).runs() if r.arm == "sweep")
    settings = {**smoke.settings, "strong": -20.0, "train": 128, "shuffled": "-2"}
    table = study.measure(dataclasses.replace(smoke, settings=settings), None).table
    found = table[table["metric"] == "test_accuracy"].set_index("arm")["alpha"]
    assert found["strong"] == -20.0
    assert found["early"] == found["late"] == -5.0
    both = pd.concat([evidence.table, table.assign(seed=0, run="x"), table.assign(seed=1, run="y")])
    rows = both[both["arm"].isin(("strong", "early", "late")) | (both["run"].isin(evidence.table["run"]))]
    verdicts = Study(SLUG, Scale.FULL).judge(dataclasses.replace(as_if(evidence, Scale.FULL), table=rows))
    assert verdicts["C4"].estimate is not None
    assert verdicts["C13"].estimate is not None


def test_a_run_gives_the_same_numbers_again(evidence):
    for run in evidence.find_runs(seed=1):
        again = study.measure(run, None).table["value"]
        kept = evidence.table.loc[evidence.table["run"] == run.id, "value"]
        np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-5)


def test_the_slide_draws(evidence, tmp_path):
    study_ = Study(SLUG, Scale.SMOKE)
    slide, files = draw_slide(study_, evidence, study_.judge(evidence), tmp_path)
    assert len(slide.collage.panels) == 5
    assert {c.id for c in slide.chips} == {c.id for c in study.CLAIMS}
    assert all(panel.alt.strip() for panel in (slide.collage.idea, *slide.collage.panels))
    assert all(file.stat().st_size > 10_000 for file in files.values())


# --- estimands on rows that are known ---------------------------------------------------------------------------


def rows(**metrics):
    """``si={-5: .1, ...}`` as rows of the arm penalty."""
    return pd.DataFrame(
        [
            {"metric": metric, "arm": "penalty", "alpha": float(alpha), "value": v}
            for metric, values in metrics.items()
            for alpha, v in values.items()
        ]
    )


def test_the_validation_set_chooses_and_the_test_set_judges():
    table = rows(val_accuracy={-5: 0.8, -2: 0.7, 0: 0.9, 1: 0.95}, test_accuracy={-5: 0.5, -2: 0.99, 0: 0.6, 1: 0.7})
    assert study.chosen_on_validation(table) == {"chosen alpha < 0": 0.5, "alpha = 0": 0.6}


def test_costs_are_slopes_through_the_plain_network():
    si = {-5: 0.1, -2: 0.2, 0: 0.3, 1: 0.4, 3: 0.6}
    acc = {a: 0.9 - (0.5 * (s - 0.3) if s > 0.3 else 0.1 * (0.3 - s)) for a, s in si.items()}
    cost = study.cost_by_direction(rows(si=si, test_accuracy=acc))
    assert cost == pytest.approx({"up": 0.5, "down": 0.1})
    assert study.selectivity_factor(rows(si=si)) == pytest.approx(3.0)


def test_missing_values_are_lookup_errors():
    with pytest.raises(LookupError):
        study.value(rows(si={0: 0.1}), "si", 3.0)
    with pytest.raises(LookupError):
        study.by_depth(rows(layer_si={0: 0.1}).assign(layer=1))


# --- users' models ------------------------------------------------------------------------------------------------


class Gelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.GELU(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x.flatten(1))))


def brightness(model):
    g = torch.Generator().manual_seed(5)
    x = torch.rand(300, 1, 8, 8, generator=g)
    y = torch.arange(300) % 3
    x = x + 0.5 * y[:, None, None, None]
    return Workload(TensorDataset(x[:240], y[:240]), TensorDataset(x[240:], y[240:]), 3, model, name="brightness")


@pytest.mark.parametrize(("kind", "lacking"), [("function", {"C10"}), ("npz", set()), ("csv", set())])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind, lacking):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    verdicts = Study(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    outside = {k for k, v in verdicts.items() if v.reason == "not part of this workload"}
    assert outside - {"C12"} == lacking
    assert all(verdicts[k].estimate is not None for k in ("C1", "C2", "C5", "C7", "C8", "C9", "C14"))
    own = Study(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


def test_networks_without_relus_are_measured_and_lack_the_leaky_control():
    workload = brightness(Gelu)
    names, negative = layers_for(Gelu())
    assert (names, negative) == (("net.2", "net.4"), "relu")
    sweep, rest = list(study.runs(Scale.SMOKE, workload))[:2]
    measured = study.measure(rest, workload).table
    assert set(measured["arm"]) == {"long"}
    assert {"si", "si_bound", "cca_ratio"} <= set(study.measure(sweep, workload).table["metric"])


def test_models_and_data_that_cannot_be_studied_are_refused_in_one_sentence():
    with pytest.raises(InvalidInput, match="Functional has no activation module"):
        list(study.runs(Scale.SMOKE, brightness(Functional)))
    few = dataclasses.replace(brightness(Gelu), train=TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9) % 3))
    with pytest.raises(InvalidInput, match="40 training and 20 test samples"):
        list(study.runs(Scale.SMOKE, few))


def test_many_classes_in_small_batches_use_a_memory(monkeypatch):
    from mlcollage.papers.class_selectivity import experiments

    made = []
    original = experiments.SelectivityRegularizer

    def watch(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(experiments, "SelectivityRegularizer", watch)
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 20
    data = TensorDataset(torch.rand(200, 6, generator=g), y)
    workload = Workload(data, data, 20, lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 20)))
    run = next(iter(study.runs(Scale.SMOKE, workload)))
    train(problem(run, workload), run, -2.0, seed=0)
    assert made[0]["memory"] == "ema"


def test_leaky_replaces_every_relu_of_any_model(shared_relu):
    changed = leaky(shared_relu)
    assert isinstance(changed.relu, nn.LeakyReLU)
    assert leaky(Gelu()) is None
