"""The ledger against torch's own SGD, step for step, and budgets that sum to the change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.closed_form import SGDSettings
from mlcollage.papers.neural_mechanics.ledger import (
    LedgerState,
    budget,
    effective_lr,
    equilibrium,
    sgd_budget,
    sgd_ledger,
    sgd_step,
)

SIGNS = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0], dtype=torch.float64)


def train(momentum, dampening, rates, decays, seed=0):
    """Torch's SGD on random gradients: what the ledger needs of each step, and the true quantities."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=momentum, dampening=dampening)
    seen = {name: [] for name in ("V", "residual", "linear residual")}
    Q, L = [float(SIGNS @ theta.detach() ** 2)], [float(SIGNS @ theta.detach())]
    for rate, decay in zip(rates, decays, strict=True):
        optimizer.param_groups[0].update(lr=rate, weight_decay=decay)
        theta.grad = torch.randn(5, generator=g, dtype=torch.float64)
        before = theta.detach().clone()
        seen["residual"].append(float((SIGNS * before) @ theta.grad))
        seen["linear residual"].append(float(SIGNS @ theta.grad))
        optimizer.step()
        moved = (theta.detach() - before) / -rate
        seen["V"].append(float(SIGNS @ moved**2))
        Q.append(float(SIGNS @ theta.detach() ** 2))
        L.append(float(SIGNS @ theta.detach()))
    return {k: np.array(v) for k, v in seen.items()}, np.array(Q), np.array(L)


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    dampening=st.sampled_from([0.0, 0.4]),
    rates=st.lists(st.floats(1e-3, 0.5), min_size=1, max_size=12),
    decay=st.floats(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_it_is_torchs_sgd_exactly_for_any_schedule(momentum, dampening, rates, decay):
    decays = [decay / (k + 1) for k in range(len(rates))]
    seen, Q, L = train(momentum, dampening, rates, decays)
    size = np.abs(Q).max() + np.abs(seen["V"]).max() + 1
    found = sgd_ledger(Q[0], seen["V"], rates, decays, momentum, dampening, residual=seen["residual"])
    np.testing.assert_allclose(found, Q, atol=1e-12 * size)
    flat = sgd_ledger(
        L[0], seen["V"], rates, decays, momentum, dampening, residual=seen["linear residual"], linear=True
    )
    np.testing.assert_allclose(flat, L, atol=1e-12 * size)


@given(
    momentum=st.floats(0, 0.99),
    dampening=st.floats(0, 0.9),
    quadratic=st.booleans(),
    first=st.booleans(),
    values=st.tuples(*[st.floats(-10, 10)] * 4),
)
@settings(max_examples=60, deadline=None)
def test_the_budget_sums_to_the_change(momentum, dampening, quadratic, first, values):
    Q, P, V, r = values
    settings = SGDSettings(0.1, 0.3, momentum, dampening)
    arguments = {"settings": settings, "quadratic": float(quadratic), "residual": r, "first": first}
    state = LedgerState(Q, P)
    parts = sgd_budget(state, V, **arguments)
    assert sum(parts.values()) == pytest.approx(sgd_step(state, V, **arguments).Q - Q, abs=1e-12)


def test_without_momentum_it_is_the_product_form():
    """Q' = (1 - ηλ)² Q + η²‖g‖², with V = ‖g + λθ‖² and ⟨θ, g⟩ = 0."""
    lr, decay, Q, g2 = 0.2, 0.1, 3.0, 1.7
    after = sgd_step(LedgerState(Q, 0.0), g2 + decay**2 * Q, SGDSettings(lr, decay))
    assert pytest.approx((1 - lr * decay) ** 2 * Q + lr**2 * g2) == after.Q


def test_tensors_and_arrays_give_the_same():
    settings = SGDSettings(lr=0.1, weight_decay=0.1, momentum=0.9)
    numbers = sgd_step(LedgerState(2.0, 0.5), 0.3, settings)
    Q, P, V = (torch.full((3,), value).double() for value in (2.0, 0.5, 0.3))
    tensors = sgd_step(LedgerState(Q, P), V, settings)
    assert tensors.Q.tolist() == pytest.approx([numbers.Q] * 3)


@given(st.tuples(*[st.floats(-5, 5)] * 6))
@settings(max_examples=30, deadline=None)
def test_the_general_budget_sums_to_the_change(values):
    moved, second, residual, decay, momentum, raw = values
    for more in ({}, {"momentum": momentum}, {"raw": raw}, {"momentum": momentum, "raw": raw}):
        parts = budget(moved=moved, second=second, residual=residual, decay=decay, **more)
        assert sum(parts.values()) == pytest.approx(moved + second, abs=1e-12)
        assert ("clipping" in parts) == ("raw" in more)


def test_a_scale_invariant_weight_settles_at_its_equilibrium():
    """Gradient descent on a function of the direction only, with gradients of constant size at unit norm."""
    g = torch.Generator().manual_seed(0)
    theta, lr, decay = torch.randn(50, generator=g, dtype=torch.float64), 0.05, 0.05
    settled = []
    for k in range(4000):
        noise = torch.randn(50, generator=g, dtype=torch.float64)
        noise -= (noise @ theta) / (theta @ theta) * theta
        gradient = noise / noise.norm() / theta.norm()  # ‖g‖ = 1/‖θ‖
        theta = theta - lr * (gradient + decay * theta)
        if k > 2000:
            settled.append(float(theta @ theta))
    assert np.mean(settled) == pytest.approx(equilibrium(lr, decay, 1.0), rel=0.01)
    assert effective_lr(lr, 0.5) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sgd_ledger(1.0, np.ones((3, 2)), 0.1), "V has shape"),
        (lambda: sgd_ledger(1.0, np.ones(0), 0.1), "V has shape"),
        (lambda: sgd_ledger(1.0, np.ones(3), [0.1, 0.1]), "one per step"),
        (lambda: sgd_ledger(1.0, np.ones(3), 0.0), "above 0"),
        (lambda: sgd_ledger(1.0, np.ones(3), 0.1, -1.0), "at least 0"),
        (lambda: sgd_ledger(1.0, np.ones(3), 0.1, momentum=1.0), "below 1"),
        (lambda: equilibrium(0.1, 0.0, 1.0), "no equilibrium"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
