"""The loss: the official code's numbers, the definition, and what batches of real loops look like."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.barlow_twins import BarlowTwinsLoss, barlow_twins_loss, standardize

IMPLS = ("direct", "gram", "tiled", "auto")
CASES = (
    *("N16_D6_corr_lam0.0051", "N16_D6_indep_lam0.0051", "N12_D5_same_lam0.0051", "N8_D5_anti_lam0.02"),
    *("N10_D4_dead_lam0.0051", "N8_D6_tiny_lam0.0051", "N6_D20_corr_lam0.0051", "N2_D3_corr_lam0.0051"),
    *("N9_D1_corr_lam0.0051", "N7_D7_corr_lam0", "N7_D7_corr_lam1", "N32_D12_corr_lam0.002", "N16_D8_offset_lam0.0051"),
)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def definition(z_a, z_b, lambd=0.0051, target=0.0, eps=1e-5, correction=0):
    """The loss entry by entry, with no thought of speed."""
    a, b = ((z - z.mean(0)) / (z.var(0, correction=correction) + eps).sqrt() for z in (z_a, z_b))
    c = a.T @ b / len(a)
    off = c[~torch.eye(len(c), dtype=torch.bool)]
    return (1 - c.diagonal()).square().sum() + lambd * (off - target).square().sum()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_loss_and_gradients_are_those_of_the_official_code(official, case, impl):
    numbers = official("loss")
    assert sorted(numbers["cases"]) == sorted(CASES)
    views = [torch.from_numpy(numbers[f"{case}/z_{v}"]).double().requires_grad_() for v in "ab"]
    loss = barlow_twins_loss(*views, lambd=float(numbers[f"{case}/lambd"]), impl=impl)
    loss.backward()
    np.testing.assert_allclose(float(loss.detach()), numbers[f"{case}/loss"], rtol=1e-13, atol=1e-14)
    for v, view in zip("ab", views, strict=True):
        gradient = numbers[f"{case}/grad_{v}"]
        tolerance = 1e-15 if "N2_" in case else 1e-13 * np.abs(gradient).max()
        np.testing.assert_allclose(view.grad, gradient, rtol=0, atol=tolerance)


@given(n=st.integers(3, 20), d=st.integers(2, 20), seed=st.integers(0, 1000), lambd=st.floats(0, 0.9))
@settings(max_examples=25, deadline=None)
def test_the_forms_are_one_loss(n, d, seed, lambd):
    a, b = randn(seed, n, d), randn(seed + 1, n, d)
    expected = float(definition(a, b, lambd))
    for impl in IMPLS:
        assert float(barlow_twins_loss(a, b, lambd=lambd, impl=impl)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", ["identity", "hsic"])
@pytest.mark.parametrize("impl", IMPLS)
def test_first_and_second_derivatives(impl, target, monkeypatch):
    monkeypatch.setattr("mlcollage.papers.barlow_twins._terms.TILE", 3)  # several tiles, the last one narrower
    a, b = randn(0, 5, 7).requires_grad_(), randn(1, 5, 7).requires_grad_()

    def loss(a, b):
        return barlow_twins_loss(a, b, lambd=0.1, impl=impl, target=target)

    assert torch.autograd.gradcheck(loss, (a, b))
    assert torch.autograd.gradgradcheck(loss, (a, b))


def test_terms_add_up_and_conventions_are_chosen(pair):
    terms = barlow_twins_loss(*pair, return_terms=True)
    assert [float(t) for t in terms] == pytest.approx([0.004787759, 0.004161521, 0.000626238], abs=5e-10)
    paper = barlow_twins_loss(*pair, eps=0.0, correction=1)  # the listing of the paper
    assert float(paper) == pytest.approx(0.147411922, abs=5e-10)
    assert float(definition(*pair, eps=0.0, correction=1)) == pytest.approx(float(paper), rel=1e-12)
    hsic = barlow_twins_loss(*pair, target="hsic")
    assert float(hsic) == pytest.approx(float(definition(*pair, target=-1.0)), rel=1e-12)
    with pytest.warns(UserWarning, match="equal"):
        assert float(barlow_twins_loss(pair[0], pair[0].clone())) == pytest.approx(0.001515314, abs=5e-10)


def test_other_normalizations_are_as_described(pair):
    a, b = pair
    rows = [(z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for z in pair]
    for (x, y), how in (((a, b), "none"), (rows, "feature")):
        c = x.T @ y / 6
        expected = (1 - c.diagonal()).square().sum() + 0.0051 * (c - torch.diag(c.diagonal())).square().sum()
        for impl in IMPLS:
            assert float(barlow_twins_loss(a, b, normalize=how, impl=impl)) == pytest.approx(float(expected), rel=1e-12)


def test_an_affine_change_of_one_view_does_not_matter(pair):
    a, b = pair
    exact = float(barlow_twins_loss(a, b, eps=0.0))
    assert float(barlow_twins_loss(a, 2 * b + 4, eps=0.0)) == pytest.approx(exact, rel=1e-12)
    assert float(barlow_twins_loss(a, 2 * b + 4)) == pytest.approx(0.004786189, abs=5e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_offsets_cost_no_digits(impl):
    z = randn(0, 256, 32, dtype=torch.float32)
    w = z + 0.5 * randn(1, 256, 32, dtype=torch.float32)
    for offset in (1e4, 1e6, 1e7):
        a, b = z + offset, w + offset  # rounded to float32 there: what is left of the data is what counts
        exact = float(definition(a.double(), b.double()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert float(barlow_twins_loss(a, b, impl=impl)) == pytest.approx(exact, rel=1e-5)
    with pytest.warns(UserWarning, match="center the inputs"):
        barlow_twins_loss(z + 1e6, w + 1e6)


def test_the_gram_form_is_right_where_it_should_not_be_chosen():
    q = torch.linalg.qr(randn(0, 4096, 16) - randn(0, 4096, 16).mean(0))[0] * 64
    a, b = q.float(), (q + 0.001 * randn(1, 4096, 16)).float()
    exact = float(definition(a.double(), b.double(), lambd=1.0) - definition(a.double(), b.double(), lambd=0.0))
    for impl in IMPLS:
        redundancy = float(barlow_twins_loss(a, b, lambd=0.5, impl=impl, return_terms=True).redundancy)
        assert redundancy == pytest.approx(0.5 * exact, rel=2e-3)


def test_auto_takes_the_form_that_costs_least(monkeypatch):
    taken = []
    for name in ("direct", "gram", "tiled"):
        form = getattr(__import__("mlcollage.papers.barlow_twins._terms", fromlist=["x"]), name)
        monkeypatch.setattr(
            f"mlcollage.papers.barlow_twins._terms.{name}",
            lambda a, b, form=form, name=name: (taken.append(name), form(a, b))[1],
        )
    for n, d in ((8, 64), (64, 8), (2000, 2100)):
        barlow_twins_loss(randn(0, n, d), randn(1, n, d))
    assert taken == ["gram", "direct", "tiled"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    a = (300 * randn(0, 64, 96, dtype=torch.float32)).to(dtype).requires_grad_()
    b = (300 * randn(1, 64, 96, dtype=torch.float32)).to(dtype).requires_grad_()
    exact = float(definition(a.detach().double(), b.detach().double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = barlow_twins_loss(a, b)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad.dtype == dtype
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-4)


def test_autocast_changes_nothing(pair):
    a, b = (z.float() for z in pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(barlow_twins_loss(a, b)) == pytest.approx(0.004787759, abs=1e-7)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "flatten the positions"),
        (torch.ones(6), torch.ones(6), r"expected two \(N, D\) tensors, got \(6,\)"),
        (torch.ones(6, 4), torch.ones(5, 4), "row n of both"),
        (torch.ones(6, 0), torch.ones(6, 0), "no columns"),
        (torch.ones(6, 4).long(), torch.ones(6, 4).long(), "floating type"),
        (torch.ones(6, 4), torch.ones(6, 4).double(), "one floating type"),
        ([[1.0]], torch.ones(6, 4), "not a list"),
        (torch.ones(1, 4), torch.ones(1, 4), "one row"),
        (torch.ones(6, 4), torch.ones(6, 4, device="meta"), "different devices"),
    ],
)
def test_what_is_no_pair_of_embeddings_is_refused(a, b, words):
    with pytest.raises(InvalidInput, match=words):
        barlow_twins_loss(a, b)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ({"lambd": -1.0}, InvalidInput),
        ({"eps": -1e-5}, InvalidInput),
        ({"correction": 2}, InvalidInput),
        ({"impl": "dual"}, UnknownName),
        ({"normalize": "batchs"}, UnknownName),
        ({"target": "zero"}, UnknownName),
        ({"grad_scale": "mean"}, UnknownName),
    ],
)
def test_settings_out_of_range_are_refused(pair, setting, kind):
    with pytest.raises(kind, match=next(iter(setting))):
        barlow_twins_loss(*pair, **setting)
    with pytest.raises(kind):
        BarlowTwinsLoss(**setting)


def test_values_that_are_not_finite_are_named(pair):
    a, b = pair
    b[3, 2] = torch.nan
    with pytest.raises(InvalidInput, match=r"1 embeddings of view b .* row 3, column 2: take no step"):
        barlow_twins_loss(a, b)
    with pytest.raises(InvalidInput, match="overflow"):
        barlow_twins_loss(a.float() * 1e30, a.float() * 1e30)
    assert torch.isnan(barlow_twins_loss(a, b, check=False))


def test_constant_and_tiny_columns_are_warned_of(pair):
    a, b = (z.clone() for z in pair)
    a[:, 1] = 5.0
    with pytest.warns(UserWarning, match=r"constant.*1 of view a \(1\)"):
        loss = barlow_twins_loss(a, b)
    assert float(loss.detach()) == pytest.approx(1.003410, abs=5e-7)
    with pytest.warns(UserWarning, match="eps=1e-05 holds the diagonal of C at"):
        assert float(barlow_twins_loss(pair[0] * 1e-3, pair[1] * 1e-3)) == pytest.approx(3.617699, abs=5e-7)
    constant = torch.full((100, 1), 0.1)
    other = randn(0, 100, 1, dtype=torch.float32)
    with pytest.warns(UserWarning, match="constant"):  # rounding of its mean is not taken for a signal
        assert float(barlow_twins_loss(constant, other, eps=0.0)) == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a, b: (a[:2], b[:2], {}), "two rows cannot teach"),
        (lambda a, b: (a, b, {"lambd": 1.0}), "use lambd < 1"),
        (lambda a, b: (a, a, {}), "100% of the rows are equal"),
        (lambda a, b: (a[:, :1], b[:, :1], {}), "one column"),
    ],
)
def test_batches_that_teach_little_are_warned_of(pair, make, words):
    a, b, setting = make(*pair)
    with pytest.warns(UserWarning, match=words):
        barlow_twins_loss(a, b, **setting)


def test_two_rows_have_a_loss_without_a_gradient():
    z = randn(0, 2, 4).requires_grad_()
    with pytest.warns(UserWarning, match="two rows"), pytest.warns(UserWarning, match="equal"):
        loss = barlow_twins_loss(z, z.detach().clone(), eps=0.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0051 * 4 * 3, rel=1e-12)
    assert float(z.grad.abs().max()) < 1e-13


def test_the_module_is_the_function_and_warns_once(pair):
    loss = BarlowTwinsLoss(0.02, impl="gram", return_terms=True)
    expected = barlow_twins_loss(*pair, lambd=0.02, impl="gram", return_terms=True)
    assert all(torch.equal(x, y) for x, y in zip(loss(*pair), expected, strict=True))
    assert "lambd=0.02" in repr(loss)
    assert torch.equal(loss.eval()(*pair).loss, expected.loss)  # always the statistics of the batch
    a = pair[0].clone()
    a[:, 1] = 5.0
    with pytest.warns(UserWarning, match="constant"):
        loss(a, pair[1])
    a[:, 2] = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(a, pair[1])


def test_the_batch_is_divided_by_the_rows_that_are_there(pair):
    """Official code divides by the configured size: .297242 for six rows of eight."""
    a, b = (standardize(z) for z in pair)
    c = a.T @ b / 8
    official = (1 - c.diagonal()).square().sum() + 0.0051 * (c - torch.diag(c.diagonal())).square().sum()
    assert float(official) == pytest.approx(0.297242, abs=5e-7)
    assert float(barlow_twins_loss(*pair)) == pytest.approx(0.004787759, abs=5e-10)


def test_many_replicas_at_once(pair):
    stacked = [torch.stack([z, z.flip(1) * 2]) for z in pair]
    losses = torch.func.vmap(lambda a, b: barlow_twins_loss(a, b, impl="direct", check=False))(*stacked)
    alone = [float(barlow_twins_loss(a, b)) for a, b in zip(*stacked, strict=True)]
    assert losses.tolist() == pytest.approx(alone, rel=1e-12)


def test_nothing_given_is_changed(pair):
    before = [z.clone() for z in pair]
    state = torch.get_rng_state()
    terms = barlow_twins_loss(*pair, return_terms=True)
    kept = [t.clone() for t in terms]
    barlow_twins_loss(pair[1], pair[0])
    assert all(torch.equal(x, y) for x, y in zip([*before, *kept], [*pair, *terms], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_standardize_is_what_the_loss_sees_of_half_precision():
    z = 300 * randn(0, 64, 4)
    for dtype in (torch.float16, torch.bfloat16):
        low = z.to(dtype)
        seen = standardize(low)  # variances of 90,000 are beyond float16
        exact = low.double()
        torch.testing.assert_close(seen, ((exact - exact.mean(0)) / exact.var(0, correction=0).sqrt()).float())


@pytest.mark.parametrize(
    ("z", "normalize", "words"),
    [
        (torch.ones(4, 2), "rows", "normalize must be one of"),  # not taken for "feature"
        (torch.ones(4), "batch", "floating tensor"),
        (torch.ones(1, 4), "batch", "N >= 2"),
        (torch.ones(4, 2, dtype=torch.int64), "batch", "floating tensor"),
        (np.ones((4, 2)), "batch", "is a ndarray"),
    ],
)
def test_what_cannot_be_standardized_is_refused(z, normalize, words):
    with pytest.raises(InvalidInput, match=words):
        standardize(z, normalize, correction=1)
