"""The study of the Fisher explosion: runs run, claims can be computed, and its trainings are those of the methods."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from mlcollage.papers.fisher_explosion.labels import sample_labels, stream
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.study import Study, run_study
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.papers.fisher_explosion import FisherPenalty, study
from mlcollage.papers.fisher_explosion.experiments import TUNING_SEED, base_data, problem
from mlcollage.papers.fisher_explosion.records import summarize
from mlcollage.papers.fisher_explosion.training import METHODS, Cells, Stack, train
from mlcollage.train.mixup import mixup_batch, soft_cross_entropy
from mlcollage.train.sam import SAM

SLUG = "fisher_explosion"


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return Study(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


# --- the study --------------------------------------------------------------------------------------------------------


def test_every_run_finishes(evidence):
    assert evidence.failures == []
    assert evidence.missing == 0
    assert np.isfinite(evidence.table["value"]).all()


def test_every_claim_is_computed_or_says_what_was_not_reached(evidence):
    verdicts = Study(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    assert list(verdicts) == [c.id for c in study.CLAIMS]
    reached_late = {"C2", "C6d", "C7", "C7b"}  # a few steps on digits do not get to the train losses compared at
    for verdict in verdicts.values():
        assert verdict.estimate is not None or verdict.claim.id in reached_late, f"{verdict.claim.id}: {verdict.reason}"


def test_claims_are_well_formed():
    for claim in study.CLAIMS:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert 0 < len(claim.title) <= 28
        assert claim.sentence.endswith(".")
        assert claim.source
        assert claim.paper_value == "", "no figure of the paper was confirmed"
        assert claim.estimand.describe().strip()


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_have_what_the_claims_need_and_seeds_can_be_added(scale):
    runs = Study(SLUG, scale).runs()
    arms = {r.arm for r in runs} | {"small", "large", "small_fp", "large_fp", "early_fp", "late_fp"}
    arms |= {"noise_early_fp", "noise_late_fp"}
    for claim in study.CLAIMS:
        assert set(claim.estimand.arms) <= arms, claim.id
    budgets = {len(r.text("grid").split("-")) for r in runs if r.arm.startswith("noise_") and r.arm != "noise_none"}
    assert budgets == {3}, "every method has the same number of trainings to tune its coefficient"
    first = study.SEEDS[scale]
    more = list(study.runs(scale, None, range(first, first + 5)))
    assert {r.arm for r in more} == {r.arm for r in runs}
    assert all(r.seed == first and r.settings["seeds"] == 5 for r in more)
    assert max(study.SEEDS.values()) < TUNING_SEED


def test_a_run_gives_the_same_numbers_again_and_a_seed_its_own(evidence):
    for arm in ("noise_fp", "noise_mixup"):
        (run,) = evidence.find_runs(arm=arm)
        again = study.measure(run, None).table
        kept = evidence.table[evidence.table["run"] == run.id]
        np.testing.assert_allclose(again["value"], kept["value"], rtol=1e-5)
        alone = dataclasses.replace(run, seed=1, settings={**run.settings, "seeds": 1})
        single = study.measure(alone, None).table
        for metric in ("final_accuracy", "peak_trace"):
            both = [t[(t["metric"] == metric) & (t["seed"] == 1) & (t["arm"] == arm)]["value"] for t in (again, single)]
            np.testing.assert_allclose(both[0], both[1], rtol=1e-3)


def test_the_slide_draws(evidence, tmp_path):
    study_ = Study(SLUG, Scale.SMOKE)
    slide, files = draw_slide(study_, evidence, study_.judge(evidence), tmp_path)
    assert 3 <= len(slide.collage.panels) <= 5
    assert {c.id for c in slide.chips} == {c.id for c in study.CLAIMS}
    assert all(panel.alt.strip() for panel in (slide.collage.idea, *slide.collage.panels))
    assert all(file.stat().st_size > 10_000 for file in files.values())


CNN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled


def model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten(),
        nn.Linear(64, 3),
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])


def make(model=model):
    g = torch.Generator().manual_seed(5)
    x = torch.rand(300, 1, 8, 8, generator=g)
    y = (3 * x.mean(dim=(1, 2, 3)).sub(0.45).div(0.1).clamp(0, 0.999)).long()
    return Labeled(TensorDataset(x[:240], y[:240]), TensorDataset(x[240:], y[240:]), 3, model, name="brightness")


def recurrent():
    return make(Recurrent)
"""


@pytest.mark.parametrize("function", ["make", "recurrent"])
def test_a_users_model_goes_through_the_whole_study(tmp_path, monkeypatch, function):
    """A convolutional network with batch norm and dropout, stacked; and a recurrent one, which cannot be."""
    (tmp_path / "fisher_users_own.py").write_text(CNN)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = f"fisher_users_own:{function}"
    own = Study(SLUG, Scale.SMOKE, spec)
    if function == "recurrent":
        measured = [own.measure(run) for run in own.runs() if run.arm in ("noise_fp", "noise_trf", "noise_gpx")]
        assert all(np.isfinite(m.table["value"]).all() for m in measured)
        return
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.arm for r in evidence.runs} == {r.arm for r in study.runs(Scale.SMOKE, None)}
    verdicts = Study(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    assert all(
        verdicts[k].estimate is not None for k in ("C1", "C1b", "C3", "C4", "C5", "C6", "C6b", "C8", "C9", "C10")
    )
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_a_users_data_alone_are_enough(user_workloads, kind):
    own = Study(SLUG, Scale.SMOKE, user_workloads[kind])
    for run in own.runs():
        if run.arm in ("grid", "noise_gp"):
            assert np.isfinite(own.measure(run).table["value"]).all()


def test_the_convolutional_network_of_larger_scales_trains():
    run = some_run(network="convnet", data="glyphs:easy16?n=150&test=40", lr=None, noise_steps=4, seeds=1)
    table = study.measure(run, None).table
    assert np.isfinite(table["value"]).all()
    assert {"final_accuracy", "peak_trace"} <= set(table["metric"])


# --- its data ---------------------------------------------------------------------------------------------------------


def some_run(**settings):
    (run,) = [r for r in study.runs(Scale.SMOKE, None) if r.arm == "noise_fp"]
    return dataclasses.replace(run, settings={**run.settings, **settings})


def test_problems_are_seeded_split_and_noisy_where_they_should_be():
    run = some_run()
    base = base_data(run, None)
    a, again, other = (problem(base, run, seed, 0.3) for seed in (3, 3, 4))
    assert torch.equal(a.x, again.x)
    assert torch.equal(a.y, again.y)
    assert not torch.equal(a.x, other.x)
    assert int(a.wrong.sum()) == round(0.3 * len(a.y))
    clean = problem(base, run, 3, 0.0)
    assert torch.equal(clean.y != a.y, a.wrong)
    assert torch.equal(clean.x, a.x)
    assert torch.equal(clean.y_test, a.y_test)
    assert float((clean.y_val != a.y_val).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert not any(bool((row == a.x_val).flatten(1).all(1).any()) for row in a.x), "no training sample validates"


# --- its trainings are those of the public methods --------------------------------------------------------------------


def setting(replicas=3, n=40):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(replicas, n, 5, generator=g)
    return x, torch.randint(0, 3, (replicas, n), generator=g)


def model_fn():
    return MLP((5,), 3, (8,))


SETTINGS = {"gpx": 0.5, "trf": 0.05, "sam": 0.2, "mixup": 1.0}


def by_hand(method, seed, x, y, lr, coefficient, steps, batch_size):
    """The same training with the public classes, one network at a time."""
    model = build(model_fn, seed)
    options = {"gp": {"labels": "true"}, "gpr": {"labels": "uniform"}, "trf": {"estimator": "per_example"},
               "gpx": {"labels": "true", "target": "input", "normalize": "batch"}}.get(method, {})  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if method == "sam":
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=coefficient, lr=lr)
    penalty = FisherPenalty(model, coefficient if method != "none" else 0.0, interval=2, generator=seed, **options)
    per_epoch = len(x) // batch_size
    for t in range(steps):
        order = torch.randperm(len(x), generator=stream(seed, 2, t // per_epoch))
        part = order[(t % per_epoch) * batch_size : (t % per_epoch + 1) * batch_size]
        a, b = x[part].clone(), y[part]
        if method == "gpx":
            a.requires_grad_()

        def objective(a=a, b=b, t=t):
            if method == "mixup":
                mixed = mixup_batch(a, b, coefficient, 3, generator=stream(seed, 3, t))
                return soft_cross_entropy(model(mixed.x), mixed.y)
            logits = model(a)
            loss = F.cross_entropy(logits, b)
            if method in ("none", "sam"):
                return loss
            labels = b if options.get("labels") == "true" else None
            return loss + penalty(logits, a, labels)

        def closure(objective=objective):
            loss = objective()
            loss.backward()
            return loss

        optimizer.zero_grad()
        if method == "sam":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_stacked_training_is_that_of_the_public_method(method):
    x, y = setting()
    seeds, lr = (3, 4, 3), (0.1, 0.2, 0.3)
    coefficient = SETTINGS.get(method, 0.3)
    cells = Cells(method, seeds, lr, (coefficient,) * 3, interval=2)
    stack = Stack.build(model_fn, seeds)
    assert list(train(stack, x, y, cells, steps=10, batch_size=10, classes=3)) == list(range(1, 11))
    for r in range(3):
        expected = by_hand(method, seeds[r], x[r], y[r], lr[r], coefficient, 10, 10).state_dict()
        for name, value in stack.module(r).state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_are_called_one_by_one_train_the_same(method):
    x, y = setting()
    cells = Cells(method, (0, 1, 2), (0.1,) * 3, (SETTINGS.get(method, 0.3),) * 3, interval=2)
    found = []
    for stacked in (True, False):
        stack = Stack.build(model_fn, cells.seeds)
        stack.stacked = stacked
        list(train(stack, x, y, cells, steps=6, batch_size=10, classes=3))
        found.append(stack.parameters)
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


def test_training_in_two_parts_is_training_at_once():
    x, y = setting()
    cells = Cells("fp", (0, 1, 2), (0.1,) * 3, (0.3,) * 3, interval=3)
    whole = Stack.build(model_fn, cells.seeds)
    list(train(whole, x, y, cells, steps=11, batch_size=10, classes=3))
    first = Stack.build(model_fn, cells.seeds)
    list(train(first, x, y, cells, steps=6, batch_size=10, classes=3))
    second = first.copy()
    list(train(second, x, y, cells, steps=11, batch_size=10, classes=3, first=6))
    for name, value in whole.parameters.items():
        torch.testing.assert_close(value, second.parameters[name], rtol=0, atol=0)


def test_a_model_that_vmap_cannot_run_is_found_out_and_called_one_by_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > -1e9 else x

    x, y = setting()
    cells = Cells("fp", (0, 1, 2), (0.1,) * 3, (0.3,) * 3)
    stack = Stack.build(Branching, cells.seeds)
    assert stack.stacked
    list(train(stack, x, y, cells, steps=2, batch_size=10, classes=3))
    assert not stack.stacked
    assert all(p.isfinite().all() for p in stack.parameters.values())


def test_batch_norm_statistics_are_kept_for_each_replica():
    x, y = setting()
    make = lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))  # noqa: E731
    found = []
    for stacked in (True, False):
        stack = Stack.build(make, (0, 1, 2))
        stack.stacked = stacked
        cells = Cells("none", (0, 1, 2), (0.1,) * 3, (0.0,) * 3)
        list(train(stack, x, y, cells, steps=3, batch_size=10, classes=3))
        found.append(stack.buffers)
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-6)
    assert found[0]["1.num_batches_tracked"].tolist() == [3, 3, 3]


def test_bad_cells_are_refused():
    with pytest.raises(InvalidInput, match="not known"):
        Cells("fisher", (0,), (0.1,), (0.1,))
    with pytest.raises(InvalidInput, match="for each replica"):
        Cells("fp", (0, 1), (0.1,), (0.1,))


def test_labels_are_drawn_per_seed_and_step():
    logits = torch.zeros(50, 4)
    a, b = (sample_labels(logits, "model", stream(5, 0, t)) for t in (1, 2))
    assert not torch.equal(a, b)
    assert torch.equal(a, sample_labels(logits, "model", stream(5, 0, 1)))


# --- its numbers ------------------------------------------------------------------------------------------------------


def test_summaries_are_read_off_the_curves():
    step = np.arange(10, 110, 10)
    curves = pd.DataFrame(
        {
            "step": step,
            "train_loss": np.linspace(2.0, 0.2, 10),
            "test_accuracy": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.75, 0.7],
            "val_accuracy": [0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.7, 0.8, 0.75, 0.7],
            "trace": [1, 2, 4, 8, 16, 8, 4, 2, 1, 1.0],
            "fit_right": np.linspace(0.1, 1.0, 10),
            "fit_wrong": np.zeros(10),
        }
    )
    found = summarize(curves, early_loss=1.5, late_loss=0.45, fit=0.75)
    assert found["final_accuracy"] == 0.7
    assert found["best_accuracy"] == 0.8
    assert found["stopped_accuracy"] == 0.6
    assert found["peak_trace"] == 16
    assert found["early_trace"] == pytest.approx(math.exp((math.log(4) + math.log(8)) / 2) * 2**0, rel=0.5)
    assert found["early_trace"] == pytest.approx(4 * 2 ** ((1.6 - 1.5) / 0.2), rel=1e-9)
    assert found["accuracy_at_loss"] == 0.75
    assert found["accuracy_at_fit"] == 0.8
    assert found["area_right"] == pytest.approx(0.55)
    never = summarize(curves, early_loss=0.01, late_loss=0.01, fit=2.0)
    assert not {"early_trace", "accuracy_at_loss", "accuracy_at_fit"} & set(never)


def test_runs_of_other_studies_are_not_taken():
    with pytest.raises(KeyError):
        study.measure(Run(SLUG, "clean", 0, {"experiment": "nothing"}), None)
