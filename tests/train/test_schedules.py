"""Schedules against torch's own and their closed forms."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput
from mlcollage.train.schedules import constant, cosine, linear, step_decay


def torch_rates(scheduler, steps, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = scheduler(optimizer, **kwargs)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
    return rates


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torchs_cosine_annealing(final):
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 21, T_max=20, eta_min=final)
    assert [cosine(20, final)(t) for t in range(21)] == pytest.approx(expected, abs=1e-12)


def test_linear_and_step_decay_are_torchs():
    expected = torch_rates(torch.optim.lr_scheduler.LinearLR, 25, start_factor=1.0, end_factor=0.2, total_iters=20)
    assert [linear(20, 0.2)(t) for t in range(25)] == pytest.approx(expected, abs=1e-12)
    expected = torch_rates(torch.optim.lr_scheduler.MultiStepLR, 10, milestones=[3, 7], gamma=0.5)
    assert [step_decay([7, 3], 0.5)(t) for t in range(10)] == expected


@given(
    total=st.integers(1, 300),
    share=st.floats(0, 0.99),
    final=st.floats(0, 1),
    make=st.sampled_from([cosine, linear]),
)
@settings(max_examples=80, deadline=None)
def test_ramps_rise_to_one_then_fall_to_their_final_factor(total, share, final, make):
    warmup = int(share * total)
    f = [make(total, final, warmup)(t) for t in range(total + 3)]
    assert f[:warmup] == [(t + 1) / warmup for t in range(warmup)]
    assert f[warmup] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in zip(f[warmup:], f[warmup + 1 :], strict=False))
    assert f[total:] == [final] * 3
    assert all(math.isfinite(v) and 0 < v <= 1 + 1e-12 for v in f[:total])


def test_every_holds_the_factor_for_an_epoch():
    f, held = cosine(100), cosine(100, every=10)
    assert [held(t) for t in range(100)] == [f(t // 10 * 10) for t in range(100)]


def test_constant_warms_up():
    assert [constant()(t) for t in (0, 10)] == [1.0, 1.0]
    assert [constant(4)(t) for t in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(0), "total must be a whole number of at least 1"),
        (lambda: cosine(10, warmup=10), "warmup=10 must be shorter"),
        (lambda: cosine(10, final=-0.1), "final must be a finite number of at least 0"),
        (lambda: linear(10.5), "total must be a whole number"),
        (lambda: step_decay(30), r"a list of steps such as \[30\]"),
        (lambda: step_decay([30], float("nan")), "factor must be a finite number"),
        (lambda: constant(-1), "warmup must be a whole number"),
    ],
)
def test_bad_schedules_are_explained(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()
