"""The study of neural mechanics: every run runs, every claim can be computed, and a user's model is reported on."""

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
from mlcollage.lab.evidence import Evidence
from mlcollage.lab.experiment import Task
from mlcollage.lab.judge import judge
from mlcollage.lab.run import Scale
from mlcollage.papers.neural_mechanics import slide
from mlcollage.papers.neural_mechanics.study import STUDY, bench
from mlcollage.papers.neural_mechanics.study.models import row_transformer
from mlcollage.testing import study_checks

SLUG = "neural_mechanics"


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def test_every_run_finishes_with_finite_numbers(evidence):
    assert evidence.failures == []
    assert evidence.missing == 0
    lacking = evidence.table[~np.isfinite(evidence.table["value"])]
    assert set(lacking["metric"]) <= {"null_rel", "predicted_rc"}, "a translation that starts at 0 has no size"


def test_every_claim_is_computed_on_the_studys_own_networks(evidence):
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    assert list(verdicts) == [c.id for c in STUDY.claims]
    assert all(v.estimate is not None for v in verdicts.values()), [v.reason for v in verdicts.values()]


def test_what_is_exact_is_exact_at_any_scale(evidence):
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    for claim in ("C1", "C1c", "C1d", "C2", "C3b", "C8", "C8b", "C8c", "C9", "C9b"):
        assert verdicts[claim].status == "supported", f"{claim}: {verdicts[claim].effect}"


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_the_slide_shows_norms_drift_and_momentum(evidence):
    drawn = slide.collage(evidence, {})
    assert [p.claim for p in (drawn.main, *drawn.panels)] == ["C4s", "C3", "C6"]


# --- a user's own model -----------------------------------------------------------------------------------------------


def blobs(shape=(6,), classes=3, n=120):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, *shape, generator=g)
    return TensorDataset(x, x.flatten(1)[:, :classes].argmax(1))


class Untraceable(nn.Module):
    """A forward that looks at values, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h if float(h.sum()) > -1 else 2 * h)


class Single(nn.Module):
    """Insists on float32."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)) @ torch.eye(8, dtype=torch.float32))


class Wild(nn.Module):
    """Diverges at the study's learning rates."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(30)

    def forward(self, x):
        return self.body(x)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "normed": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "untraceable": Untraceable,
    "single": Single,
    "wild": Wild,
}


def on(model=None, data=None, arms=("training", "laws")):
    data = data or blobs()
    workload = Labeled(data, data, 3, model=model, name="mine")
    frames = []
    for experiment in STUDY.experiments:
        for run in experiment.runs(SLUG, Scale.SMOKE, range(1), workload=workload, name="mine"):
            if run.arm not in arms:
                continue
            table = experiment.measure(experiment.task(run, workload=workload)).table
            for seed in range(2):  # the judge wants two
                frames.append(table.assign(arm=table["arm"].fillna(run.arm), seed=seed, run=run.id))
    return Evidence(SLUG, Scale.QUICK, "mine", pd.concat(frames, ignore_index=True))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_whole_study_runs_on_a_users_model(name):
    found = on(MODELS[name])
    verdicts = judge(STUDY.claims, found)
    assert len(verdicts) == len(STUDY.claims)
    for verdict in verdicts.values():
        assert verdict.estimate is not None or verdict.reason.startswith("not applicable: "), verdict.reason
    drawn = slide.collage(found, verdicts)
    assert "your model" in drawn.idea.subtitle
    if name == "mlp":
        assert "scale" in verdicts["C4s"].reason
        assert verdicts["C4r"].estimate is not None
        assert verdicts["C9"].reason.startswith("not applicable")
    if name == "normed":
        assert verdicts["C8c"].status == "supported"
    if name == "single":
        assert "float64" in verdicts["C8"].reason
    if name == "wild":
        assert found.select("rate")["value"].max() < 1


def test_a_users_transformer_has_its_attention_judged():
    found = on(lambda: row_transformer((3, 2), 3), blobs((3, 2)), arms=("laws",))
    verdicts = judge(STUDY.claims, found)
    for claim in ("C1", "C1d", "C2", "C8", "C9", "C9b"):
        assert verdicts[claim].status == "supported", verdicts[claim].reason
    assert "not applicable: no symmetry of kind scale" in verdicts["C4s"].reason


def test_a_users_data_train_the_studys_networks():
    images = on(data=blobs((1, 8, 8)), arms=("laws",))
    assert set(images.select("laws")["arm"]) == {"plain", "norm", "attention"}
    tables = on(arms=("laws",))
    assert set(tables.select("laws")["arm"]) == {"plain", "norm", "attention"}


def test_a_model_without_any_law_is_said_to_have_none():
    """A sigmoid output under cross entropy has no translation, tanh no rescale."""
    bare = on(lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Sigmoid()))
    verdicts = judge(STUDY.claims, bare)
    assert bare.select("laws")["value"].sum() == 0
    assert all(v.status == "inconclusive" for v in verdicts.values())
    assert all("not applicable: no " in v.reason for v in verdicts.values())
    drawn = slide.collage(bare, verdicts)
    assert "translation 0, scale 0" in drawn.idea.alt
    assert "not part of this workload" in drawn.main.alt


def test_a_model_that_always_diverges_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "_RATES", (1e6,))
    with pytest.raises(InvalidInput, match="diverges at every learning rate"):
        on(MODELS["mlp"], arms=("laws",))


def test_full_and_paper_take_vggs():
    training = STUDY.experiment("training")
    for scale, pixels in ((Scale.FULL, 32), (Scale.PAPER, 64)):
        settings = training.settings[scale]
        assert (settings.network, settings.pixels) == ("vgg", pixels)
    small = dataclasses.replace(training.settings[Scale.FULL], samples=8)
    made = bench.Bench(Task("training", (0,), small, Scale.FULL))
    assert made.x.shape == (8, 1, 32, 32)
    assert {type(net.make()).__name__ for net in made.networks()} == {"VGG"}
