"""The constraint checks against autograd by hand, and that they tell a law from a decoy."""

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.checks import check_gradient, check_hessian, rearranged
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, SymmetrySet
from mlcollage.papers.neural_mechanics.term import Term

F64 = torch.float64
TRANSLATION = Symmetry("translation", "softmax", (Term("4.weight", keep=1),), 16)
RESCALE = Symmetry(
    "rescale",
    "hidden",
    (Term("0.weight", 1, keep=0), Term("0.bias", 1, keep=0), Term("4.weight", -1, view=(3, 4, 4), keep=1)),
    4,
)
SCALE = Symmetry("scale", "norm", (Term("0.weight", keep=0), Term("0.bias", keep=0)), 4)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def network(dtype=F64, norm=False, activation=nn.ReLU):
    second = nn.BatchNorm2d(4) if norm else activation()
    third = nn.ReLU() if norm else nn.MaxPool2d(1)
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), second, third, nn.Flatten(), nn.Linear(16, 3)).to(dtype))


def loss_on(dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 1, 4, 4, generator=g, dtype=F64).to(dtype), torch.randint(3, (32,), generator=g)
    return lambda m: nn.functional.cross_entropy(m(x), y)


@pytest.mark.parametrize(("dtype", "limit"), [(F64, 1e-13), (torch.float32, 5e-6)])
def test_exact_laws_have_residuals_of_rounding_and_random_sets_do_not(dtype, limit):
    symmetries = SymmetrySet((TRANSLATION, RESCALE))
    for check in (check_gradient, check_hessian):
        report = check(network(dtype), symmetries, loss_on(dtype))
        assert (report["residual"] < limit).all()
        assert (report["control"] > 1e-2).all()
        assert report["n_laws"].tolist() == [16, 4]


@pytest.mark.parametrize("check", [check_gradient, check_hessian])
def test_a_decoy_is_seen(check):
    """Tanh is not homogeneous, so the rescale law does not hold."""
    report = check(network(activation=nn.Tanh), SymmetrySet((RESCALE,)), loss_on())
    assert report["residual"][0] > 1e-3


@pytest.mark.parametrize("check", [check_gradient, check_hessian])
def test_the_epsilon_of_batch_norm_shows_in_proportion(check):
    found = []
    for eps in (1e-3, 1e-5):
        model = network(norm=True)
        model[1].eps = eps
        found.append(check(model, SymmetrySet((SCALE,)), loss_on())["residual"][0])
    assert found[0] / found[1] == pytest.approx(100, rel=0.1)


def test_the_gradient_residual_is_the_cosine():
    model, loss = network(), loss_on()
    loss(model).backward()
    w = dict(model.named_parameters())
    weight, bias = w["0.weight"], w["0.bias"]
    decoy = Symmetry("scale", "not a law", (Term("0.weight", keep=0), Term("0.bias", keep=0)), 4)
    up = (weight * weight.grad).flatten(1).sum(1) + bias * bias.grad
    size = ((weight**2).flatten(1).sum(1) + bias**2).sqrt()
    slope = ((weight.grad**2).flatten(1).sum(1) + bias.grad**2).sqrt()
    report = check_gradient(model, SymmetrySet((decoy,)), loss, controls=0)
    assert report["residual"][0] == pytest.approx(float((up.abs() / (size * slope)).detach().max()))
    assert np.isnan(report["control"][0])


def test_the_hessian_residual_is_what_the_full_hessian_says():
    """Hessian by brute force for the rescale laws of a small network: H(θ1 - θ2) + g1 - g2 = 0."""
    model = network()
    named = dict(model.named_parameters())
    loss = loss_on()
    sizes = [p.numel() for p in named.values()]

    def of_vector(vector):
        parts = {n: v.reshape(p.shape) for (n, p), v in zip(named.items(), vector.split(sizes), strict=True)}
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 1, 4, 4, generator=g, dtype=F64), torch.randint(3, (32,), generator=g)
        return nn.functional.cross_entropy(torch.func.functional_call(model, parts, (x,)), y)

    theta = torch.cat([p.detach().reshape(-1) for p in named.values()])
    H = torch.autograd.functional.hessian(of_vector, theta)
    g = torch.autograd.functional.jacobian(of_vector, theta)
    for k in range(4):
        sign = {n: torch.zeros_like(p) for n, p in named.items()}
        sign["0.weight"][k] = 1
        sign["0.bias"][k] = 1
        sign["4.weight"].view(3, 4, 4)[:, k] = -1
        s = torch.cat([v.reshape(-1) for v in sign.values()])
        assert (H @ (s * theta) + s * g).norm() < 1e-13
    assert check_hessian(model, SymmetrySet((RESCALE,)), loss)["residual"][0] < 1e-13


def test_matrix_laws_have_all_their_generators_checked():
    model = seeded(lambda: nn.ModuleDict({"q": nn.Linear(5, 3), "k": nn.Linear(5, 3)}).double())
    terms = [Term(f"{n}.{p}", s, gram=0) for n, s in (("q", 1), ("k", -1)) for p in ("weight", "bias")]
    law = Symmetry("matrix", "qk", tuple(terms), 6, size=3)
    half = Symmetry("matrix", "half", (terms[0], terms[2]), 6, size=3)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=F64)

    def loss(m):
        return ((m["q"](x) @ m["k"](x).T).softmax(-1).diagonal()).log().mean().neg()

    for check in (check_gradient, lambda *a: check_hessian(*a, most=9)):
        report = check(model, SymmetrySet((law, half)), loss)
        assert report["residual"][0] < 1e-13
        assert report["residual"][1] > 1e-3, "without the biases it is no law"
    assert report["checked"].tolist() == [9, 9]


def test_attention_kernels_without_second_derivative_are_avoided():
    model = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True).double())
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    law = Symmetry("translation", "keys", (Term("in_proj_bias", rows=(8, 16), keep=0),), 8)
    report = check_hessian(model, SymmetrySet((law,)), lambda m: m(x, x, x, need_weights=False)[0].square().mean())
    assert report["residual"][0] < 1e-9


def test_model_gradients_and_statistics_are_left_alone():
    model = network(norm=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for check in (check_gradient, check_hessian):
            check(model, SymmetrySet((SCALE,)), loss_on())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_control():
    reports = [check_gradient(network(), SymmetrySet((RESCALE,)), loss_on(), generator=s) for s in (3, 3, 4)]
    assert reports[0]["control"][0] == reports[1]["control"][0] != reports[2]["control"][0]


def test_rearranging_keeps_pairs_together():
    a = {"x": torch.arange(4.0), "y": torch.arange(4.0, 10.0).reshape(2, 3)}
    b = {n: v * 10 for n, v in a.items()}
    moved = rearranged((a, b), torch.Generator().manual_seed(0))
    assert all(torch.equal(moved[0][n] * 10, moved[1][n]) for n in a)
    assert sorted(torch.cat([v.reshape(-1) for v in moved[0].values()]).tolist()) == list(range(10))


def test_frozen_parameters_count_as_gradient_zero():
    model = network()
    model[0].weight.requires_grad_(False)
    report = check_gradient(model, SymmetrySet((TRANSLATION,)), loss_on())
    assert report["residual"][0] < 1e-13


@pytest.mark.parametrize("check", [check_gradient, check_hessian])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c(network(), SymmetrySet(), loss_on()), "no law to check"),
        (lambda c: c(network(norm=True).eval(), SymmetrySet((SCALE,)), loss_on()), "evaluation mode"),
        (lambda c: c(network(), SymmetrySet((RESCALE,)), lambda m: m(torch.ones(2, 1, 4, 4).double())), "one finite"),
        (lambda c: c(network(), SymmetrySet((RESCALE,)), lambda m: loss_on()(m) * float("nan")), "one finite number"),
        (lambda c: c(network(), SymmetrySet((RESCALE,)), lambda m: loss_on()(m).detach()), "through autograd"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(check, call, words):
    with pytest.raises(InvalidInput, match=words):
        call(check)


def test_numbers_below_one_are_refused():
    with pytest.raises(InvalidInput, match="most must be a whole number of at least 1"):
        check_hessian(network(), SymmetrySet((RESCALE,)), loss_on(), most=0)
