"""The study of class selectivity: the contract of a study, pairs are pairs, users' models work."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.papers.class_selectivity.study import STUDY, claims, models
from mlcollage.papers.class_selectivity.study.experiments import Controls, Sweep, controls, on_workload, sweep, to_learn
from mlcollage.papers.class_selectivity.study.models import layers_for, leaky, train
from mlcollage.testing import study_checks

SLUG = "class_selectivity"
SMOKE = STUDY.experiment("sweep").settings[Scale.SMOKE]


# So little training leaves the first layer's dimensions the same for every alpha: no correlation to compute.
@pytest.mark.parametrize("check", study_checks(SLUG, beyond_smoke=["C12"]), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


def task(settings=SMOKE, seed=0, workload=None, arm="sweep"):
    return Task(arm, (seed,), settings, Scale.SMOKE, workload)


def test_every_claim_due_at_quick_is_computed(evidence):
    assert np.isfinite(evidence.table["value"]).all()
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    late = {k for k, v in verdicts.items() if v.claim.from_scale is Scale.FULL}
    assert late == {"C4", "C13"}
    computable = set(verdicts) - late - {"C12"}
    assert all(verdicts[k].estimate is not None for k in computable), {k: v.reason for k, v in verdicts.items()}


def test_each_scale_holds_the_alphas_that_claims_name():
    for scale, settings in STUDY.experiment("sweep").settings.items():
        assert set(claims.ALPHAS) <= set(settings.alphas)
        assert {-2.0, 3.0} <= set(settings.shuffled)
        assert (settings.strong is not None) == (scale.rank >= Scale.FULL.rank)


def test_networks_that_are_compared_start_alike_and_see_the_same_data(monkeypatch):
    p, seen, steps = to_learn(task()), [], models.steps

    def watch(model, batches, *args, **kwargs):
        start = torch.cat([v.flatten() for v in model.parameters()]).detach().clone()
        listed = [next(batches) for _ in range(kwargs["max_steps"])]
        seen.append((start, torch.cat([y for _, y in listed])))
        return steps(model, iter(listed), *args, **kwargs)

    monkeypatch.setattr(models, "steps", watch)
    for options in ({"alpha": 0.0}, {"alpha": -2.0}, {"alpha": -2.0, "shuffle": True}, {"alpha": 3.0, "leak": True}):
        train(p, SMOKE, seed=1, **options)
    for start, labels in seen:
        assert torch.equal(start, seen[0][0])
        assert torch.equal(labels, seen[0][1])


def test_a_seed_has_data_of_its_own_and_no_sample_in_two_parts():
    a, b = (to_learn(task(seed=s)) for s in (0, 1))
    assert not torch.equal(a.train.y, b.train.y)
    rows = torch.cat([a.train.x, a.validation.x]).flatten(1).numpy()
    assert len(np.unique(rows, axis=0)) >= len(rows) - 1
    assert a.train.x.shape == (256, 1, 14, 14)
    assert abs(float(a.train.x.mean())) < 1e-3


def test_what_only_the_larger_scales_train(evidence):
    """Nearly no selectivity after a warm-up, and the penalty in the first or in the later part of training only."""
    table = sweep(task(dataclasses.replace(SMOKE, strong=-20.0, train=128, shuffled=(-2.0,)))).table
    found = table[table["metric"] == "test_accuracy"].set_index("arm")["alpha"]
    assert found["strong"] == -20.0
    assert found["early"] == found["late"] == -5.0
    both = pd.concat([evidence.table, table.assign(seed=0, run="x"), table.assign(seed=1, run="y")])
    rows = both[both["arm"].isin(("strong", "early", "late")) | (both["run"].isin(evidence.table["run"]))]
    verdicts = BoundStudy(SLUG, Scale.FULL).judge(dataclasses.replace(as_if(evidence, Scale.FULL), table=rows))
    assert verdicts["C4"].estimate is not None
    assert verdicts["C13"].estimate is not None


def test_the_slide_has_a_message_for_each_part_of_the_finding(evidence, tmp_path):
    bound = BoundStudy(SLUG, Scale.SMOKE)
    slide, files = draw_slide(bound, evidence, bound.judge(evidence), tmp_path)
    assert [p.claim for p in (slide.collage.main, *slide.collage.panels)] == ["C5", "C7", "C8"]
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
    assert claims.chosen_on_validation(table) == {"chosen alpha < 0": 0.5, "alpha = 0": 0.6}


def test_costs_are_slopes_through_the_plain_network():
    si = {-5: 0.1, -2: 0.2, 0: 0.3, 1: 0.4, 3: 0.6}
    acc = {a: 0.9 - (0.5 * (s - 0.3) if s > 0.3 else 0.1 * (0.3 - s)) for a, s in si.items()}
    cost = claims.cost_by_direction(rows(si=si, test_accuracy=acc))
    assert cost == pytest.approx({"up": 0.5, "down": 0.1})
    assert claims.selectivity_factor(rows(si=si)) == pytest.approx(3.0)


def test_missing_values_are_lookup_errors():
    with pytest.raises(LookupError):
        claims.value(rows(si={0: 0.1}), "si", 3.0)
    with pytest.raises(LookupError):
        claims.by_depth(rows(layer_si={0: 0.1}).assign(layer=1))


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
    return Labeled(TensorDataset(x[:240], y[:240]), TensorDataset(x[240:], y[240:]), 3, model, name="brightness")


@pytest.mark.parametrize(("kind", "lacking"), [("function", {"C10"}), ("npz", set()), ("csv", set())])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind, lacking):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    verdicts = BoundStudy(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    outside = {k for k, v in verdicts.items() if v.reason == "not part of this workload"}
    assert outside - {"C12"} == lacking
    assert all(verdicts[k].estimate is not None for k in ("C1", "C2", "C5", "C7", "C8", "C9", "C14"))
    own = BoundStudy(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


def test_networks_without_relus_are_measured_and_lack_the_leaky_control():
    workload = brightness(Gelu)
    assert layers_for(Gelu()) == (("net.2", "net.4"), "relu")
    longer = on_workload(STUDY.experiment("controls").settings[Scale.SMOKE], workload, Scale.SMOKE)
    assert isinstance(longer, Controls)
    assert set(controls(task(longer, workload=workload)).table["arm"]) == {"long"}
    swept = on_workload(SMOKE, workload, Scale.SMOKE)
    assert isinstance(swept, Sweep)
    assert {"si", "si_bound", "cca_ratio"} <= set(sweep(task(swept, workload=workload)).table["metric"])


def test_small_sets_get_as_many_updates_as_the_studys_own_data():
    quick = STUDY.experiment("controls").settings[Scale.QUICK]
    own = on_workload(quick, brightness(Gelu), Scale.QUICK)
    assert (own.train, own.val, own.test, own.batch) == (192, 48, 60, 24)
    assert own.epochs * own.train / own.batch == pytest.approx(quick.epochs * quick.train / quick.batch, rel=0.01)
    assert own.long_epochs / own.epochs == pytest.approx(quick.long_epochs / quick.epochs, rel=0.01)


def test_models_and_data_that_cannot_be_studied_are_refused_in_one_sentence():
    with pytest.raises(InvalidInput, match="Functional has no activation module"):
        on_workload(SMOKE, brightness(Functional), Scale.SMOKE)
    few = dataclasses.replace(brightness(Gelu), train=TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9) % 3))
    with pytest.raises(InvalidInput, match="40 training and 20 test samples"):
        on_workload(SMOKE, few, Scale.SMOKE)
    once = Gelu()
    with pytest.raises(InvalidInput, match="the same Gelu at every call"):
        on_workload(SMOKE, brightness(lambda: once), Scale.SMOKE)


def test_many_classes_in_small_batches_use_a_memory(monkeypatch):
    made, original = [], models.SelectivityRegularizer

    def watch(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(models, "SelectivityRegularizer", watch)
    x, y = torch.rand(300, 6, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 20
    workload = Labeled(
        TensorDataset(x[:200], y[:200]),
        TensorDataset(x[200:], y[200:]),
        20,
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 20)),
    )
    settings = on_workload(SMOKE, workload, Scale.SMOKE)
    train(to_learn(task(settings, workload=workload)), settings, -2.0, seed=0)
    assert made[0]["memory"] == "ema"


def test_leaky_replaces_every_relu_of_any_model(shared_relu):
    changed = leaky(shared_relu)
    assert isinstance(changed.relu, nn.LeakyReLU)
    assert leaky(Gelu()) is None
