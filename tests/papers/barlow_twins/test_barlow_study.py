"""The study of Barlow Twins: the contract of a study, its data, objectives and users' workloads."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, UserCodeError
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.papers.barlow_twins import barlow_twins_loss
from mlcollage.papers.barlow_twins.study import STUDY, claims, experiments
from mlcollage.papers.barlow_twins.study.data import LATENT, of_workload, shared_latent
from mlcollage.papers.barlow_twins.study.experiments import NUISANCES, VARIANTS, on_workload, training
from mlcollage.papers.barlow_twins.study.models import Variant, infonce, objective
from mlcollage.testing import study_checks

SLUG = "barlow_twins"
SMOKE = STUDY.experiment("training").settings[Scale.SMOKE]


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_every_claim_is_computed(smoke_store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))
    assert np.isfinite(evidence.table["value"]).all()
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    assert all(v.estimate is not None for v in verdicts.values()), {k: v.reason for k, v in verdicts.items()}
    assert verdicts["E1"].status == verdicts["E2"].status == "supported"


def test_levels_of_the_claims_are_those_that_are_run():
    rows = [(arm, dict(keys)) for v in (*VARIANTS.values(), *NUISANCES.values()) for arm, keys in v.rows]
    for arm, over, levels in (
        ("barlow_width", "width", claims.WIDTHS),
        ("infonce_width", "width", claims.WIDTHS),
        ("barlow_batch", "batch", claims.BATCHES),
        ("infonce_batch", "batch", claims.BATCHES),
        ("weight", "weight", claims.WEIGHTS),
        ("fresh", "fresh", claims.FRESH),
    ):
        assert sorted(keys[over] for name, keys in rows if name == arm) == list(levels)


def test_views_share_the_latent_numbers_and_what_is_not_fresh():
    source = shared_latent([3], 10, 10, fresh=0)
    a, b = source.views(32)
    assert torch.equal(a, b)
    a, b = shared_latent([3], 10, 10).views(32)
    assert not torch.allclose(a, b)
    # Row n of both depends on the same latent numbers: canonical correlations are far beyond chance.
    a, b = (v[0].double() - v[0].double().mean(0) for v in shared_latent([3], 10, 10).views(4096))
    q = [torch.linalg.qr(v)[0] for v in (a, b)]
    found = torch.linalg.svdvals(q[0].T @ q[1])
    assert float(found[LATENT - 1]) > 0.2
    assert float(found[LATENT + 4]) < 0.2


def test_all_batch_sizes_see_the_same_samples():
    large, small = shared_latent([5, 6], 10, 10), shared_latent([5, 6], 10, 10)
    a, _ = large.views(256)
    assert torch.equal(a, torch.cat([small.views(32)[0] for _ in range(8)], 1))
    alone = shared_latent([6], 10, 10)
    assert torch.equal(alone.views(256)[0][0], a[1])
    assert torch.equal(alone.probed.x[0], large.probed.x[1])


def test_infonce_is_its_definition():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    z = [F.normalize(v, dim=1) for v in (a, b)]
    rows = torch.cat(z)
    total = 0.0
    for i in range(10):
        similar = torch.exp(rows @ rows[i] / 0.2)
        total -= float(torch.log(similar[(i + 5) % 10] / (similar.sum() - similar[i])))
    assert float(infonce(a, b, 0.2)) == pytest.approx(total / 10, rel=1e-9)


def test_objectives_are_what_their_names_say():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(12, 8, generator=g).requires_grad_() for _ in range(2))
    s = SMOKE
    (za, pa), (zb, _) = a.chunk(2, 1), b.chunk(2, 1)
    terms = barlow_twins_loss(za, zb, lambd=s.lambd, return_terms=True)
    assert torch.allclose(objective(Variant(()), s)(a, b), terms.loss)
    assert torch.allclose(objective(Variant((), lambd=0.0), s)(a, b), terms.invariance)
    assert torch.allclose(objective(Variant((), objective="redundancy"), s)(a, b), terms.redundancy)
    stopped = objective(Variant((), stop=True, predictor=True), s)(a, b)
    assert torch.allclose(stopped, barlow_twins_loss(pa, zb, lambd=s.lambd))
    grads = torch.autograd.grad(stopped, (a, b), allow_unused=True)
    assert grads[1] is None or not grads[1].any()
    assert not grads[0][:, :4].any()


def table(n=200, model=None, views=None):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n + 60) % 3
    x = torch.randn(n + 60, 6, generator=g) + 2 * torch.eye(6)[y]
    return Labeled(TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:]), 3, model, views=views, name="table")


def images(n=80, channels=1):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(n + 40, channels, 9, 8, generator=g), torch.arange(n + 40) % 2
    return Labeled(TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:]), 2, name="images")


def run(workload, arm="barlow"):
    settings = on_workload(SMOKE, workload, Scale.SMOKE)
    return training(Task(arm, (0, 1), settings, Scale.SMOKE, workload)).table


@pytest.mark.parametrize("workload", [table(), images(), images(channels=3), images(channels=4)])
def test_tables_and_images_of_users(workload):
    found = run(workload)
    scores = found[(found["metric"] == "score") & (found["arm"] == "barlow")]["value"]
    assert scores.between(0, 1).all()
    assert len(scores) == 2
    assert run(workload, "supervised")["value"].between(0, 1).all()


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 64), nn.Tanh()), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_users_model_without_its_last_layer_and_a_users_views():
    seen = []

    def views(x, generator):
        seen.append(len(x))
        noise = torch.randn(2, *x.shape, generator=generator)
        return x + 0.1 * noise[0], x + 0.1 * noise[1]

    workload = table(model=Own, views=views)
    source = of_workload(workload, [0], 40, 40)
    encoder = source.encoder()
    assert isinstance(encoder.head, nn.Identity)
    assert encoder(torch.zeros(2, 6)).shape == (2, 64)
    assert run(workload)["value"].notna().all()
    assert set(seen) == {32}


def test_what_a_user_brings_may_be_unusable():
    with pytest.raises(InvalidInput, match="64 training"):
        on_workload(SMOKE, table(50), Scale.QUICK)
    with pytest.raises(InvalidInput, match="two tensors of shape"):
        run(table(views=lambda x, g: (x, x[:, :2])))
    with pytest.raises(UserCodeError, match="the workload's views"):
        run(table(views=lambda x, g: 1 / 0))
    with pytest.raises(InvalidInput, match=r"no nn\.Linear inside"):
        run(table(model=lambda: nn.Linear(6, 3)))


def test_settings_follow_the_workload():
    assert on_workload(experiments.Training(), table(200), Scale.QUICK).batch == 128
    assert on_workload(experiments.Training(), table(5000), Scale.QUICK).batch == 256
