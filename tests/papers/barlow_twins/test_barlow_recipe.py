"""The recipe: the official schedule, groups, and what a resumed run must share."""

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn import build
from mlcollage.papers.barlow_twins import BarlowProjector, BarlowTwins, pretraining

CASES = ("e100_s10_b512", "default_e1000_s625_b2048", "e30_s7_b96", "e11_s3_b256")


def model():
    return build(lambda: BarlowTwins(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), BarlowProjector(8, (6, 5))), 0)


@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_the_official_code(official, case):
    numbers = official("schedule_offdiag")
    epochs, steps, batch, lr_w, lr_b = numbers[f"{case}/cfg"].tolist()
    plan = pretraining(
        model(), batch_size=int(batch), steps_per_epoch=int(steps), epochs=int(epochs), lr_weights=lr_w, lr_biases=lr_b
    )
    found = []
    for step in numbers[f"{case}/steps"].tolist():
        plan.set_rates(int(step))
        found.append([group["lr"] for group in plan.optimizer.param_groups])
    np.testing.assert_allclose(found, numbers[f"{case}/lr"], rtol=1e-13, atol=1e-18)


def test_groups_and_official_gradients():
    net = model()
    net.backbone.register_parameter("cls_token", nn.Parameter(torch.randn(1, 1, 8)))
    plan = pretraining(
        net, batch_size=256, steps_per_epoch=5, epochs=20, also=("*cls_token",), official_gradients=32, warmup_epochs=1
    )
    weights, others = plan.optimizer.param_groups
    assert [p.ndim for p in weights["params"]] == [2, 2, 2]
    assert net.backbone.cls_token is others["params"][0] or any(p is net.backbone.cls_token for p in others["params"])
    assert (weights["weight_decay"], others["weight_decay"]) == (1e-6, 0.0)
    assert others["initial_lr"] == pytest.approx(0.0048 / 32)
    before = net.backbone.cls_token.detach().clone()
    net.backbone.cls_token.grad = torch.ones(1, 1, 8)
    plan.set_rates(5)
    plan.optimizer.step()
    # A plain step: neither adapted nor decayed, although the token has three axes.
    torch.testing.assert_close(net.backbone.cls_token.detach(), before - others["lr"])


def test_weights_of_norm_zero_are_named():
    net = model()
    nn.init.zeros_(net.backbone[0].weight)
    with pytest.warns(UserWarning, match=r"1 weights are zero \(backbone\.0\.weight\)"):
        pretraining(net, batch_size=256, steps_per_epoch=5, epochs=20)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(InvalidInput, match="warmup_epochs=1"):
        pretraining(model(), batch_size=256, steps_per_epoch=5, epochs=5)


def test_a_resumed_run_is_compared():
    plan = pretraining(model(), batch_size=256, steps_per_epoch=10, epochs=100)
    plan.check_resume(dict(plan.facts))
    longer = pretraining(model(), batch_size=256, steps_per_epoch=10, epochs=200)
    assert plan.set_rates(500) == pytest.approx(0.117, abs=5e-4)
    assert longer.set_rates(500) == pytest.approx(0.179, abs=5e-4)
    with pytest.warns(UserWarning, match="total_steps=1000, this run has total_steps=2000"):
        longer.check_resume(plan.facts)
    other = build(lambda: BarlowTwins(nn.Linear(4, 8), BarlowProjector(8, (6, 7))), 0)
    with pytest.raises(InvalidInput, match="cannot be resumed"):
        pretraining(other, batch_size=256, steps_per_epoch=10, epochs=100).check_resume(plan.facts)


def test_rates_of_steps_before_the_first_are_refused():
    plan = pretraining(nn.Linear(3, 2), batch_size=256, steps_per_epoch=10, epochs=20)
    with pytest.raises(InvalidInput, match="step must be"):
        plan.set_rates(-1)
