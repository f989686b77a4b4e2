"""The study of bidirectional update rules: the contract of a study, users' data and models, the shared population."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.data import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab import BoundStudy, Scale
from mlcollage.lab.experiment import Task
from mlcollage.papers.bidirectional_update_rules.study.experiments import (
    Meta,
    UsersModel,
    meta_train,
    on_workload,
    users_model,
)
from mlcollage.papers.bidirectional_update_rules.study.models import sets, start
from mlcollage.testing import study_checks

SLUG = "bidirectional_update_rules"
TINY = Meta(members=2, updates=1, unroll=2, batch_size=16, hidden=4, episodes=1, tests=1, long=10)


@pytest.mark.parametrize("check", study_checks(SLUG, beyond_smoke=("C3b",)), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_every_claim_due_at_quick_is_computed(smoke_store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))
    evidence = dataclasses.replace(evidence, scale=Scale.QUICK)
    for id, verdict in BoundStudy(SLUG, Scale.QUICK).judge(evidence).items():
        assert verdict.status == "untested" if id == "C3b" else verdict.estimate is not None, f"{id}: {verdict.reason}"
    for id in ("C1", "C8b"):
        assert BoundStudy(SLUG, Scale.QUICK).judge(evidence)[id].status == "supported", "an identity, at any size"


def test_what_genomes_are_tested_on_was_never_trained_on():
    data = sets(Task("k2", (0,), TINY))
    assert (len(data.train.y), len(data.validation.y), len(data.test.y)) == (900, 357, 540)
    rows = {r.numpy().tobytes() for part in (data.train, data.validation) for r in part.X}
    shared = sum(r.numpy().tobytes() in rows for r in data.test.X)
    assert shared == 0


def test_seeds_of_one_population_start_apart():
    genomes = [start("k2", 2, seed).to_vector() for seed in (1, 2)]
    assert not torch.equal(*genomes)
    table = meta_train(Task("k2", (3, 4), TINY)).table
    trained = table[(table["metric"] == "accuracy") & (table["trained"] == True)]  # noqa: E712 (a column of objects)
    assert sorted(trained["seed"]) == [3, 4]


def workload(model):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = torch.randn(240, 5, generator=g) + 2 * nn.functional.one_hot(y, 5)
    arrays = (part.numpy() for part in (x[:180], y[:180], x[180:], y[180:]))
    return dataclasses.replace(Labeled.from_arrays(*arrays, 3, name="mine"), model=model)


def test_a_users_model_takes_part_or_its_layer_is_named():
    fits = workload(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    small = UsersModel(horizons=(1, 4), batch_size=16, budget=2)
    assert on_workload(small, fits, Scale.QUICK) == small
    for arm in ("blur", "sgd"):
        table = users_model(Task(arm, (0,), small, workload=fits)).table
        assert list(table["step"]) == [1, 4]
        assert np.isfinite(table["value"]).all()
    odd = workload(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    with pytest.raises(InvalidInput, match="'1' is a BatchNorm1d"):
        on_workload(small, odd, Scale.QUICK)
    assert on_workload(small, workload(None), Scale.QUICK) is None


def test_the_example_learns_in_ten_steps(capsys):
    import importlib.util
    from pathlib import Path

    file = Path(__file__).parents[3] / "examples" / "few_steps_on_a_table.py"
    spec = importlib.util.spec_from_file_location("few_steps_on_a_table", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert max(module.main()) > 0.9
    assert "step 10" in capsys.readouterr().out
