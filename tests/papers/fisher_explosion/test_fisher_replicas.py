"""FisherPenalty on Replicas: a stack of R networks is penalized as R networks that are trained alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.papers.fisher_explosion import FisherPenalty
from mlcollage.train.replicas import Replicas

SEEDS, RATES, ALPHAS, STEPS, BATCH, CLASSES = (3, 1, 3), (0.1, 0.2, 0.3), (0.3, 0.0, 0.1), 7, 6, 3
VARIANTS = {
    "FP": {},
    "GP": {"labels": "true"},
    "GPr": {"labels": "uniform"},
    "GPx": {"labels": "true", "wrt": "input"},
    "GPx of the batch": {"labels": "true", "wrt": "input", "normalize": "batch"},
    "expected GPx": {"wrt": "input", "estimator": "exact"},
    "Tr F": {"estimator": "per_example"},
    "expected Tr F": {"estimator": "exact", "score_term": True},
    "FP of the batch": {"normalize": "batch", "rescale_by_interval": True},
    "FP of one layer": {"params": ["head.weight"]},
    "Tr F of one layer": {"estimator": "per_example", "labels": "true", "params": ["head.weight"]},
}
NETWORKS = {
    "mlp": lambda: MLP((2, 4, 4), CLASSES, (8,)).double(),
    "convnet": lambda: ConvNet((2, 4, 4), CLASSES, (4, 6), norm="group").double(),
}


def batches():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, 3, BATCH, 2, 4, 4, generator=g, dtype=torch.float64)
    return list(zip(x, torch.randint(0, CLASSES, (STEPS, 3, BATCH), generator=g), strict=True))


def losses_of(logits, y):
    return torch.stack([F.cross_entropy(z, t) for z, t in zip(logits, y, strict=True)])


def alone(make, r, settings, data):
    """Replica r as an ordinary network in an ordinary loop."""
    model = build(make, SEEDS[r])
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[r], momentum=0.9)
    penalty = FisherPenalty(model, ALPHAS[r], interval=2, start=1, generator=10 + r, **settings)
    values = []
    for x, y in data:
        inputs = x[r].clone().requires_grad_(penalty.wrt == "input")
        logits = model(inputs)
        value = penalty(logits, inputs, y[r] if penalty.labels == "true" else None)
        values.append(value.detach())
        optimizer.zero_grad()
        (F.cross_entropy(logits, y[r]) + value).backward()
        optimizer.step()
    return model, torch.stack(values)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("network", "variant"),
    [*(("mlp", v) for v in VARIANTS), ("convnet", "FP"), ("convnet", "GPx"), ("convnet", "Tr F")],
)
def test_replicas_are_penalized_as_networks_alone(network, variant, stacked):
    make, settings, data = NETWORKS[network], VARIANTS[variant], batches()
    replicas = Replicas(make, SEEDS, lr=RATES, momentum=0.9, stacked=stacked)
    penalty = FisherPenalty(replicas, ALPHAS, interval=2, start=1, generator=[10, 11, 12], **settings)
    found = []
    for x, y in data:
        inputs = x.clone().requires_grad_(penalty.wrt == "input")

        def objective(inputs=inputs, y=y):
            logits = replicas(inputs, in_dim=0)
            value = penalty(logits, inputs, y if penalty.labels == "true" else None)
            found.append(value.detach())
            return losses_of(logits, y) + value

        replicas.update(objective)
    assert penalty.steps == STEPS
    assert penalty.last.shape == (3,)
    tolerance = {"rtol": 1e-9, "atol": 1e-11}
    for r in range(3):
        model, values = alone(make, r, settings, data)
        torch.testing.assert_close(torch.stack(found)[:, r], values, **tolerance)
        assert float(values.sum()) > 0 or ALPHAS[r] == 0
        for name, value in replicas.module(r).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], **tolerance)


def test_with_one_seed_replicas_draw_as_networks_alone_would():
    replicas = Replicas(NETWORKS["mlp"], (5, 5), lr=0.1)
    x = batches()[0][0][0]
    logits = replicas(x)
    penalty = FisherPenalty(replicas, 0.2, interval=1)
    values = penalty(logits)
    assert penalty.alpha == 0.2
    assert float(values[0].detach()) == pytest.approx(float(values[1].detach()), rel=1e-12)
    model = replicas.module(0)
    single = FisherPenalty(model, 0.2, interval=1)
    assert float(single(model(x)).detach()) == pytest.approx(float(values[0].detach()), rel=1e-12)
    shared = FisherPenalty(replicas, 0.2, labels="true", interval=1)
    y = torch.arange(BATCH) % CLASSES
    torch.testing.assert_close(shared(logits, y=y), shared(logits, y=y.expand(2, BATCH)))


def test_single_samples_of_networks_with_batch_norm_are_taken_at_running_statistics():
    replicas = Replicas(lambda: MLP((2, 4, 4), CLASSES, (8,), norm="batch").double(), SEEDS, lr=0.1)
    (x, y), *_ = batches()
    replicas.step(x, y)
    value = FisherPenalty(replicas, 1.0, estimator="exact", interval=1)(replicas(x, in_dim=0), x)
    for r in range(3):
        model = replicas.module(r)
        expected = FisherPenalty(model, 1.0, estimator="exact", interval=1)(model(x[r]), x[r])
        torch.testing.assert_close(value[r], expected)


def test_a_branch_goes_on_where_the_steps_of_its_penalty_are_set():
    """Half of a training with, half without the penalty, and the same as a branch of the whole."""
    data, found = batches(), []
    for branches in (False, True):
        replicas = Replicas(NETWORKS["mlp"], SEEDS, lr=0.1)
        penalty = FisherPenalty(replicas, 0.3, interval=3, generator=SEEDS)
        for t, (x, y) in enumerate(data):
            if branches and t == 4:
                replicas = replicas.copy()
                penalty = FisherPenalty(replicas, 0.3, interval=3, generator=SEEDS)
                penalty.steps = replicas.steps_done

            def objective(x=x, y=y, replicas=replicas, penalty=penalty):
                logits = replicas(x, in_dim=0)
                return losses_of(logits, y) + penalty(logits)

            replicas.update(objective)
        found.append(replicas.parameters)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"mode": "jvp"}, None, "single networks"),
        ({"alpha": [0.1, 0.2]}, None, "alpha holds 2 values for 3 networks"),
        ({"generator": [1, 2]}, None, "generator holds 2 values for 3 networks"),
        ({"params": ["no.weight"]}, None, "no parameter"),
        ({}, lambda p, z, x, y: p(z[0]), r"shape \(3, B, C\)"),
        ({}, lambda p, z, x, y: p(Replicas(NETWORKS["mlp"], SEEDS, lr=0.1)(x, in_dim=0)), "do not depend"),
        ({"labels": "true"}, lambda p, z, x, y: p(z, y=y[:, :2]), "labels for 6 rows"),
        ({"estimator": "exact"}, lambda p, z, x, y: p(z, x[0]), "a batch for each replica"),
        ({"wrt": "input", "labels": "true"}, lambda p, z, x, y: p(z, x, y), "requires_grad_"),
    ],
)
def test_bad_use_with_replicas_is_refused(settings, call, message):
    replicas = Replicas(NETWORKS["mlp"], SEEDS, lr=0.1)
    (x, y), *_ = batches()
    logits = replicas(x, in_dim=0)

    def use():
        penalty = FisherPenalty(replicas, **{"alpha": 0.1, "interval": 1, **settings})
        call(penalty, logits, x, y)

    with pytest.raises(InvalidInput, match=message):
        use()


def test_only_networks_and_replicas_are_penalized():
    with pytest.raises(InvalidInput, match="Module or Replicas, not list"):
        FisherPenalty([nn.Linear(2, 2)], 0.1)
