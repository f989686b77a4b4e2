"""Filter response normalization against its formula, and the choice of norms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.norm import TLU, FilterResponseNorm, group_count, image_norm


def brute_force_frn(x, gamma, beta, tau, eps):
    """Singh and Krishnan, equations 1 to 3, one number at a time."""
    out = np.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            nu2 = sum(float(v) ** 2 for v in x[n, c].ravel()) / x[n, c].size
            for position in np.ndindex(*x.shape[2:]):
                y = gamma[c] * x[(n, c, *position)] / np.sqrt(nu2 + eps) + beta[c]
                out[(n, c, *position)] = max(y, tau[c])
    return out


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7), (2, 3), (1, 2, 2, 3, 2)])
@pytest.mark.parametrize("learnable", [False, True])
def test_frn_and_tlu_are_the_papers_equations(shape, learnable):
    g = torch.Generator().manual_seed(0)
    frn, tlu = FilterResponseNorm(shape[1], learnable_eps=learnable).double(), TLU(shape[1]).double()
    with torch.no_grad():
        for p in (frn.weight, frn.bias, tlu.tau):
            p.copy_(torch.randn(p.shape, generator=g))
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    eps = 1e-6 + (frn.learned_eps.item() if learnable else 0)
    expected = brute_force_frn(x.numpy(), *(p.detach().numpy() for p in (frn.weight, frn.bias, tlu.tau)), eps)
    np.testing.assert_allclose(tlu(frn(x)).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_frn_gradients_are_right_also_for_the_learned_epsilon():
    g = torch.Generator().manual_seed(1)
    frn = FilterResponseNorm(2, learnable_eps=True).double()
    x = torch.randn(2, 2, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in frn.parameters()]
    names = [n for n, _ in frn.named_parameters()]

    def f(x, *values):
        return torch.func.functional_call(frn, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters))
    assert torch.autograd.gradgradcheck(f, (x, *parameters))


def test_frn_ignores_the_scale_of_its_input_and_the_rest_of_the_batch():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    frn = FilterResponseNorm(3).double()
    torch.testing.assert_close(frn(1000 * x), frn(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frn(x)[1:2], frn(x[1:2]))


def test_frn_keeps_half_precision_types_and_does_not_overflow_in_them():
    x = torch.full((1, 1, 4, 4), 3e4, dtype=torch.float16)  # its square is beyond float16
    y = FilterResponseNorm(1)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(y))


def test_a_fresh_tlu_is_a_relu():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(TLU(4)(x), x.relu())


@given(st.integers(1, 600))
@settings(max_examples=60, deadline=None)
def test_group_count_always_makes_a_valid_group_norm(channels):
    groups = group_count(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 2


def test_bad_norms_are_explained():
    with pytest.raises(UnknownName, match="'batch', 'group', 'frn'"):
        image_norm("instanse", 8)
    with pytest.raises(InvalidInput, match=r"takes inputs of shape \(batch, 3, ...\), not \(2, 4\)"):
        FilterResponseNorm(3)(torch.zeros(2, 4))
    with pytest.raises(InvalidInput, match="eps must be a finite number above 0"):
        FilterResponseNorm(3, eps=0.0)
    with pytest.raises(InvalidInput, match="num_channels"):
        TLU(0)
