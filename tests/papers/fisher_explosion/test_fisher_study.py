"""The study of the Fisher explosion: the contract of a study, and that its trainings are those of the methods."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage import _random
from mlcollage.data.problem import Problem, Samples
from mlcollage.errors import UnknownName
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.papers.fisher_explosion import FisherPenalty
from mlcollage.papers.fisher_explosion.study import STUDY
from mlcollage.papers.fisher_explosion.study.data import SeedData, Settings, network, own_data, seed_data
from mlcollage.papers.fisher_explosion.study.experiments import TUNING_SEED, WrongLabels, wrong_labels
from mlcollage.papers.fisher_explosion.study.records import summarize
from mlcollage.papers.fisher_explosion.study.training import METHODS, PENALTIES, Training
from mlcollage.testing import study_checks
from mlcollage.train.mixup import mixup_batch, soft_cross_entropy
from mlcollage.train.sam import SAM

SLUG = "fisher_explosion"
BEYOND_SMOKE = ("C2", "C6d", "C7", "C7b")  # a few steps on digits do not get to the train losses compared at


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", study_checks(SLUG, beyond_smoke=BEYOND_SMOKE), ids=str)
def test_the_study(check):
    check()


def test_claims_are_well_formed():
    for claim in STUDY.claims:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert claim.source
        assert claim.paper_value == "", "no figure of the paper was confirmed"
        assert claim.estimand.describe().strip()
    assert [c.id for c in STUDY.headlines] == ["C1", "C1b", "C3b", "C6", "C6b", "C7b"]


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_have_what_the_claims_need(scale):
    runs = BoundStudy(SLUG, scale).runs()
    arms = {r.arm for r in runs} | {"small", "large", "small_fp", "large_fp", "early_fp", "late_fp"}
    arms |= {"noise_early_fp", "noise_late_fp"}
    for claim in STUDY.claims:
        assert set(claim.estimand.arms) <= arms, claim.id
    tuned = [r for r in runs if r.arm.startswith("noise_") and r.arm != "noise_none"]
    assert {len(r.settings["grid"]) for r in tuned} == {3}, "every method has the same number of trainings to be tuned"
    assert max(STUDY.seeds.values()) < TUNING_SEED
    assert len(runs) == 10, "all seeds of an arm are trained together"


def run_of(arm, **settings):
    """An experiment at smoke, with other settings."""
    experiment = STUDY.experiment(arm)
    changed = dataclasses.replace(experiment.settings[Scale.SMOKE], **settings)
    return lambda *seeds: experiment.measure(Task(arm, seeds, changed, Scale.SMOKE)).table


@pytest.mark.parametrize("arm", ["noise_fp", "noise_mixup"])
def test_a_seeds_numbers_do_not_depend_on_the_others(arm):
    measure = run_of(arm)
    both, alone = measure(0, 1), measure(1)
    for metric in ("final_accuracy", "peak_trace"):
        found = [t[(t["metric"] == metric) & (t["seed"] == 1) & (t["arm"] == arm)]["value"] for t in (both, alone)]
        np.testing.assert_allclose(*found, rtol=1e-3)


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
def test_a_users_model_goes_through_the_study(tmp_path, monkeypatch, function):
    """A convolutional network with batch norm and dropout, stacked; and a recurrent one, which cannot be."""
    (tmp_path / "fisher_users_own.py").write_text(CNN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = BoundStudy(SLUG, Scale.SMOKE, f"fisher_users_own:{function}")
    assert {r.arm for r in own.runs()} == {r.arm for r in BoundStudy(SLUG, Scale.SMOKE).runs()}
    for run in own.runs():
        if run.arm in ("clean", "noise_fp", "noise_trf", "noise_gpx"):
            table = own.measure(run).table
            assert np.isfinite(table["value"]).all()
            assert {"final_accuracy", "peak_trace", "tuning_accuracy"} <= set(table["metric"])


def test_at_quick_a_workload_is_trained_for_fewer_steps():
    (own,) = [r for r in BoundStudy(SLUG, Scale.QUICK, "digits").runs() if r.arm == "grid"]
    (theirs,) = [r for r in BoundStudy(SLUG, Scale.QUICK).runs() if r.arm == "grid"]
    assert own.settings["small_steps"] < theirs.settings["small_steps"]
    assert (own.settings["data"], own.settings["lr"]) == ("workload", None)
    assert own.count == theirs.count == 5


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_a_users_data_alone_are_enough(user_workloads, kind):
    own = BoundStudy(SLUG, Scale.SMOKE, user_workloads[kind])
    for run in own.runs():
        if run.arm in ("grid", "noise_gp"):
            assert np.isfinite(own.measure(run).table["value"]).all()


def test_the_convolutional_network_of_larger_scales_trains():
    table = run_of("noise_fp", network="convnet", data="glyphs:easy16?n=150&test=40", lr=None, steps=4)(0)
    assert np.isfinite(table["value"]).all()
    assert {"final_accuracy", "peak_trace"} <= set(table["metric"])


# --- its data ---------------------------------------------------------------------------------------------------------


def test_data_are_seeded_split_and_noisy_where_they_should_be():
    def draw(seed, wrong=0.3):
        return seed_data(Settings(data="digits", train=60, validation=30, test=40), seed, wrong=wrong)

    a, again, other, clean = draw(3), draw(3), draw(4), draw(3, 0.0)
    (x, y), (x_val, y_val) = a.problem.train, a.problem.validation
    assert torch.equal(x, again.problem.train.x)
    assert torch.equal(y, again.problem.train.y)
    assert not torch.equal(x, other.problem.train.x)
    assert int(a.wrong.sum()) == round(0.3 * len(y))
    assert torch.equal(clean.problem.train.y != y, a.wrong)
    assert torch.equal(clean.problem.train.x, x)
    assert torch.equal(clean.problem.test.y, a.problem.test.y)
    assert float((clean.problem.validation.y != y_val).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert not any(bool((row == x_val).flatten(1).all(1).any()) for row in x), "no training sample validates"


def test_fashion_mnist_is_pooled_and_networks_follow_the_shape():
    data = own_data("fashion_14")
    assert data.train[0][0].shape == (1, 14, 14)
    assert sum(p.numel() for p in network("mlp", (1, 14, 14), 10).parameters()) == 196 * 128 + 128 * 129 + 128 + 1290
    assert network("convnet", (1, 14, 14), 10)(torch.zeros(2, 1, 14, 14)).shape == (2, 10)
    assert isinstance(network("convnet", (7,), 3), MLP)


# --- its trainings are those of the public methods --------------------------------------------------------------------

SEEDS, RATES = (3, 4, 3), (0.1, 0.2, 0.3)
COEFFICIENTS = {"gpx": 0.5, "trf": 0.05, "sam": 0.2, "mixup": 1.0}


def model_fn():
    return MLP((5,), 3, (8,)).double()


def some_data(make=model_fn, replicas=3, n=40):
    g = torch.Generator().manual_seed(0)
    made = []
    for _ in range(replicas):
        train = Samples(torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g))
        made.append(SeedData(Problem(train, train, train, 3, make), torch.zeros(n, dtype=torch.bool)))
    return made


def trained(method, steps, make=model_fn, start=None):
    coefficients = [COEFFICIENTS.get(method, 0.3)] * 3
    if start is None:
        start = Training(method, some_data(make), SEEDS, RATES, coefficients, batch=10, interval=2)
    assert list(start.run(steps))[-1] == steps
    return start


def by_hand(method, r, steps, batch=10):
    """The same training with the public classes, one network at a time."""
    x, y = some_data()[r].problem.train
    seed, coefficient = SEEDS[r], COEFFICIENTS.get(method, 0.3)
    model = build(model_fn, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[r])
    if method == "sam":
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=coefficient, lr=RATES[r])
    penalty = FisherPenalty(
        model, coefficient if method in PENALTIES else 0.0, interval=2, generator=seed, **PENALTIES.get(method, {})
    )
    for t in range(steps):
        epoch, i = divmod(t, len(x) // batch)
        part = _random.permutation(len(x), seed, 2, epoch)[i * batch : (i + 1) * batch]
        a, b = x[part].clone().requires_grad_(method == "gpx"), y[part]

        def closure(a=a, b=b, t=t):
            optimizer.zero_grad()
            if method == "mixup":
                mixed = mixup_batch(a, b, coefficient, 3, generator=_random.generator(seed, 3, t))
                loss = soft_cross_entropy(model(mixed.x), mixed.y)
            else:
                logits = model(a)
                loss = F.cross_entropy(logits, b)
                if method in PENALTIES:
                    loss = loss + penalty(logits, a, b if penalty.labels == "true" else None)
            loss.backward()
            return loss

        optimizer.step(closure)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_replicas_are_trained_as_networks_alone(method):
    training = trained(method, 10)
    assert training.replicas.stacked
    for r in range(3):
        expected = by_hand(method, r, 10).state_dict()
        for name, value in training.replicas.module(r).state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)


class Idle(nn.Module):
    """The network, and parameters that are not used."""

    def __init__(self):
        super().__init__()
        self.net, self.unused, self.alone = model_fn(), nn.Linear(4, 2).double(), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", METHODS)
def test_unused_parameters_of_a_users_model_change_nothing(method):
    idle, plain = trained(method, 4, Idle), trained(method, 4)
    for name, value in plain.replicas.parameters.items():
        torch.testing.assert_close(idle.replicas.parameters[f"net.{name}"], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_branch_is_training_at_once(method):
    whole = trained(method, 11)
    first = trained(method, 6)
    second = trained(method, 11, start=first.branch(method))
    for name, value in whole.replicas.parameters.items():
        assert torch.equal(value, second.replicas.parameters[name])
        assert not torch.equal(value, first.replicas.parameters[name])


def test_a_branch_may_go_on_with_another_method():
    start = trained("none", 4)
    plain, penalized = (trained("", 8, start=start.branch(m, [0.3] * 3)) for m in ("none", "fp"))
    assert plain.penalty is None
    assert penalized.penalty.steps == 8
    assert not torch.equal(plain.replicas.trainable[0], penalized.replicas.trainable[0])
    assert torch.equal(plain.replicas.trainable[0], trained("none", 8).replicas.trainable[0])


def test_a_model_that_vmap_cannot_run_is_called_one_by_one():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > -1e9 else x

    training = trained("fp", 3, Branching)
    assert not training.replicas.stacked
    assert all(p.isfinite().all() for p in training.replicas.trainable)


def test_methods_that_do_not_exist_are_refused():
    with pytest.raises(UnknownName, match="not known"):
        Training("fisher", some_data(), SEEDS, RATES, [0.1] * 3, batch=10, interval=2)
    with pytest.raises(UnknownName, match="not known"):
        wrong_labels(Task("noise_fisher", (0,), dataclasses.replace(
            STUDY.experiment("noise_fp").settings[Scale.SMOKE], method="fisher")))  # fmt: skip
    assert WrongLabels().method in METHODS


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
