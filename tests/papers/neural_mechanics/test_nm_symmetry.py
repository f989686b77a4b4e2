"""Families of laws: reductions against plain loops and autograd, finite actions against networks they leave alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, SymmetrySet
from mlcollage.papers.neural_mechanics.term import Term

DOUBLE = torch.float64


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def mlp_laws() -> SymmetrySet:
    rescale = Symmetry(
        "rescale", "hidden", (Term("0.weight", 1, keep=0), Term("0.bias", 1, keep=0), Term("2.weight", -1, keep=1)), 3
    )
    shift = Symmetry("translation", "last", (Term("2.weight", keep=1, laws=(0, 1, 2)), Term("2.bias", laws=(3,))), 4)
    return SymmetrySet((shift, rescale))


def test_quantities_are_the_sums_of_the_definition():
    model = mlp()
    W, b, V, c = (p.detach() for p in model.parameters())
    laws = mlp_laws()
    found = laws.quantities(model)
    torch.testing.assert_close(found["hidden"], (W**2).sum(1) + b**2 - (V**2).sum(0))
    torch.testing.assert_close(found["last"], torch.cat([V.sum(0), c.sum()[None]]))
    assert found["hidden"].dtype == DOUBLE
    for law in laws:
        torch.testing.assert_close(law.quantities(model), found[law.name])


@given(seed=st.integers(0, 10_000), size=st.integers(1, 4), groups=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_view_with_kept_axes_sums_what_a_loop_sums(seed, size, groups):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(groups * 2, size, 3, generator=generator, dtype=DOUBLE)
    b = torch.randn(a.shape, generator=generator, dtype=DOUBLE)
    term = Term("w", 1, view=(groups, 2, size, 3), keep=(0, 2))
    expected = torch.zeros(groups * size, dtype=DOUBLE)
    for o in range(groups * 2):
        for i in range(size):
            expected[(o // 2) * size + i] += (a[o, i] * b[o, i]).sum()
    torch.testing.assert_close(term.bilinear(a, b, groups * size), expected)


def test_rows_columns_and_law_numbers_cut_what_they_say():
    a = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(Term("w", rows=(2, 4), keep=0).linear(a, 2), a[2:4].sum(1).double())
    assert torch.equal(Term("w", -1, columns=(1, 3), keep=1).linear(a, 2), -a[:, 1:3].sum(0).double())
    chosen = Term("w", keep=0, laws=(0, -1, 1, -1, 0, -1)).linear(a, 2)
    assert torch.equal(chosen, torch.stack([a[0].sum() + a[4].sum(), a[2].sum()]).double())


def test_one_step_is_told_exactly_by_the_bilinear_form():
    torch.manual_seed(1)
    theta = {"u": torch.randn(6, 5, dtype=DOUBLE), "v": torch.randn(4, 6, dtype=DOUBLE)}
    step = {name: 0.1 * torch.randn_like(value) for name, value in theta.items()}
    moved = {name: theta[name] + step[name] for name in theta}
    heads = Symmetry(
        "matrix", "heads", (Term("u", 1, (2, 3, 5), 0, gram=1), Term("v", -1, (4, 2, 3), 1, gram=2)), 12, size=3
    )
    assert heads.shape == (2, 3, 3)
    told = heads.quantities(theta) + 2 * heads.bilinear(theta, step) + heads.bilinear(step, step)
    torch.testing.assert_close(heads.quantities(moved), told, rtol=1e-12, atol=1e-12)
    U, V = theta["u"].reshape(2, 3, 5), theta["v"].reshape(4, 2, 3)
    expected = U @ U.mT - torch.einsum("ohd,ohe->hde", V, V)
    torch.testing.assert_close(heads.quantities(theta), expected)


def test_constraints_vanish_on_the_gradient_and_not_on_noise():
    model = mlp()
    x, y = torch.randn(8, 4, dtype=DOUBLE), torch.randint(2, (8,))
    loss = nn.functional.cross_entropy(model(x), y)
    grads = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    noise = {name: torch.randn_like(g) for name, g in grads.items()}
    for law in mlp_laws():
        assert law.residuals(model, grads).max() < 1e-14
        assert law.residuals(model, noise).max() > 1e-2


@pytest.mark.parametrize("name", ["hidden", "last"])
def test_a_finite_action_leaves_the_loss_alone_and_the_model_too(name):
    model, laws = mlp(), mlp_laws()
    before = [p.clone() for p in model.parameters()]
    x, y = torch.randn(8, 4, dtype=DOUBLE), torch.randint(2, (8,))
    strength = torch.rand(laws[name].shape, dtype=DOUBLE) + 0.5
    twin = laws.apply(model, name, strength)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(before, twin.parameters(), strict=True))
    loss = nn.functional.cross_entropy
    torch.testing.assert_close(loss(model(x), y), loss(twin(x), y), rtol=1e-12, atol=1e-12)
    assert laws.apply(model, name, strength, inplace=True) is model
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_a_matrix_acts_on_packed_rows_and_leaves_the_rest():
    torch.manual_seed(2)
    packed = {"qkv": torch.randn(12, 5, dtype=DOUBLE)}
    law = Symmetry(
        "matrix",
        "qk",
        (
            Term("qkv", 1, (6, 2, 5), 0, laws=(0, 1, -1, -1, -1, -1), gram=1),
            Term("qkv", -1, (6, 2, 5), 0, laws=(-1, -1, 0, 1, -1, -1), gram=1),
        ),
        6,
        size=2,
    )
    M = torch.eye(2, dtype=DOUBLE) + 0.3 * torch.randn(2, 2, 2, dtype=DOUBLE)
    moved = law.apply(packed, M)["qkv"]
    q, k = packed["qkv"][:4].reshape(2, 2, 5), packed["qkv"][4:8].reshape(2, 2, 5)
    torch.testing.assert_close(moved[:4].reshape(2, 2, 5), M @ q)
    torch.testing.assert_close(moved[4:8].reshape(2, 2, 5), torch.linalg.inv(M).mT @ k)
    assert torch.equal(moved[8:], packed["qkv"][8:])
    q2, k2 = moved[:4].reshape(2, 2, 5), moved[4:8].reshape(2, 2, 5)
    torch.testing.assert_close(q2.mT @ k2, q.mT @ k)


def test_shared_reductions_equal_single_ones():
    torch.manual_seed(3)
    model, laws = mlp(), mlp_laws()
    theta = dict(model.named_parameters())
    g = {name: torch.randn_like(value) for name, value in theta.items()}
    found = laws.bilinear(theta, g)
    torch.testing.assert_close(found["hidden"], laws["hidden"].bilinear(theta, g))
    torch.testing.assert_close(laws.bilinear(g, g)["hidden"], laws["hidden"].bilinear(g, g))
    torch.testing.assert_close(found["last"], laws["last"].linear(g))
    for missing in theta:  # parameters of another group count as zero, in turn
        part = {name: None if name == missing else value for name, value in g.items()}
        shared = laws.bilinear(theta, part)
        torch.testing.assert_close(shared["hidden"], laws["hidden"].bilinear(theta, part))
        torch.testing.assert_close(shared["last"], laws["last"].linear(part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_are_in_float64_whatever_the_parameters_are(dtype):
    w = torch.full((2, 1000), 0.1).to(dtype)
    law = Symmetry("scale", "w", (Term("w", keep=0),), 2)
    exact = w.double().square().sum(1)
    torch.testing.assert_close(law.quantities({"w": w}), exact, rtol=1e-12 if dtype != torch.float32 else 1e-7, atol=0)


def test_a_missing_gradient_counts_as_zero_and_a_missing_parameter_is_named():
    law = mlp_laws()["hidden"]
    theta = dict(mlp().named_parameters())
    grads = {"0.weight": None, "0.bias": None, "2.weight": None}
    assert torch.equal(law.bilinear(theta, grads), torch.zeros(3, dtype=DOUBLE))
    with pytest.raises(UnknownName, match=r"0\.bias"):
        law.quantities({"0.weight": theta["0.weight"], "2.weight": theta["2.weight"]})


def test_sets_are_sequences_with_names():
    laws = mlp_laws()
    assert [law.name for law in laws] == ["last", "hidden"]
    assert laws["hidden"] is laws[1]
    assert laws[:1].n_laws == 4
    assert laws.n_laws == 7
    assert laws.of_kind("rescale").parameters == ("0.weight", "0.bias", "2.weight")
    frame = laws.to_frame()
    assert list(frame["n_laws"]) == [4, 3]
    with pytest.raises(UnknownName, match="last, hidden"):
        laws["nothing"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Symmetry("twist", "a", (Term("w"),), 1), "kind must be one of"),  # type: ignore[arg-type]
        (lambda: Symmetry("scale", "a", (), 1), "no terms"),
        (lambda: Symmetry("scale", "a", (Term("w"),), 0), "n_laws of 'a' must be a whole number of at least 1"),
        (lambda: Symmetry("matrix", "a", (Term("w"),), 3), "size"),
        (lambda: SymmetrySet((Symmetry("scale", "a", (Term("w"),), 1),) * 2), "unique"),
        (lambda: mlp_laws()["hidden"].apply(mlp(), -1.0), "positive"),
        (lambda: mlp_laws()["hidden"].apply(mlp(), torch.ones(4)), r"shape \(3,\)"),
        (lambda: mlp_laws()["last"].apply(mlp(), float("nan")), "finite"),
    ],
)
def test_bad_input_is_told_in_one_sentence(build, message):
    with pytest.raises(InvalidInput, match=message):
        build()
