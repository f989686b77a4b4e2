"""Likelihoods agree with torch.distributions; gradients by hand with float64 autograd; bad targets are refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.bnn_posteriors import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    CustomLikelihood,
    GaussianLikelihood,
)
from mlcollage.papers.bnn_posteriors.likelihoods import make_likelihood

D = torch.distributions


def case(kind, n, k, generator):
    """A likelihood, its number of outputs, targets, and the log-density by torch.distributions."""
    normal = torch.randn(n, k, dtype=torch.float64, generator=generator)
    if kind == "categorical":
        y = torch.randint(0, k + 1, (n,), generator=generator)
        return CategoricalLikelihood(), k + 1, y, lambda o: D.Categorical(logits=o).log_prob(y)
    if kind == "bernoulli":
        y = torch.randint(0, 2, (n,), generator=generator)
        return BernoulliLikelihood(), 1, y, lambda o: D.Bernoulli(logits=o[:, 0]).log_prob(y.double())
    if kind == "known":
        return GaussianLikelihood(0.3), k, normal, lambda o: D.Normal(o, 0.3).log_prob(normal).sum(1)
    if kind == "custom":
        y = normal[:, 0].abs().round()
        return CustomLikelihood(lambda o, t: t * o[:, 0] - o[:, 0].exp()), 1, y, lambda o: y * o[:, 0] - o[:, 0].exp()
    return (
        GaussianLikelihood(),
        2 * k,
        normal,
        lambda o: D.Normal(o[:, :k], F.softplus(o[:, k:])).log_prob(normal).sum(1),
    )


KINDS = ("categorical", "bernoulli", "known", "spread", "custom")


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    chains=st.integers(1, 3),
    n=st.integers(1, 6),
    k=st.integers(1, 4),
    own=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_are_exact(kind, chains, n, k, own, seed):
    g = torch.Generator().manual_seed(seed)
    likelihood, outs, y, known = case(kind, n, k, g)
    outputs = torch.randn(chains, n, outs, dtype=torch.float64, generator=g, requires_grad=True)
    checked = likelihood.check(outputs[0].detach(), y)
    exact = torch.stack([known(o) for o in outputs])
    mine = torch.stack([likelihood.log_prob(o, checked) for o in outputs.detach()])
    torch.testing.assert_close(mine, exact.detach(), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(exact.sum(), outputs)
    targets = likelihood.targets(checked, outputs[0].detach())
    if own:
        targets = targets.expand(chains, *targets.shape)
    for value in (True, False):
        total, dz = likelihood.score(outputs.detach().mT.clone(), targets, value)
        torch.testing.assert_close(dz.mT, gradient, rtol=1e-10, atol=1e-10)
        assert (total is None) == (not value)
        if total is not None:
            torch.testing.assert_close(total, exact.detach().sum(1), rtol=1e-10, atol=1e-10)


def test_predictions():
    z = torch.tensor([[0.0], [2.0]])
    proba = BernoulliLikelihood().log_proba(z).exp()
    torch.testing.assert_close(proba, torch.cat([1 - z.sigmoid(), z.sigmoid()], dim=1))
    mean, variance = GaussianLikelihood().moments(torch.tensor([[1.0, 0.0]]))
    assert float(mean) == 1
    assert float(variance) == pytest.approx(float(F.softplus(torch.tensor(0.0)) ** 2))
    assert GaussianLikelihood(0.5).moments(torch.zeros(3, 2))[1].tolist() == [[0.25, 0.25]] * 3


def test_extreme_logits_keep_their_digits():
    likelihood = CategoricalLikelihood()
    value = likelihood.log_prob(torch.tensor([[0.0, 200.0]]), torch.tensor([0]))
    assert float(value) == -200
    assert float(BernoulliLikelihood().log_prob(torch.tensor([-300.0]), torch.tensor([1.0]))) == -300


FOUR = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y", "says"),
    [
        ("categorical", FOUR, torch.tensor([0, 1, 2, 3]), "labels run from 0 to 3, but the network has 3 outputs"),
        ("categorical", FOUR, torch.tensor([0, -1, 2, 1]), "run from -1"),
        ("categorical", FOUR, torch.zeros(4), r"labels are torch.float32; whole numbers from 0 to 2"),
        ("categorical", FOUR, torch.zeros(4, 3).long(), "not one-hot"),
        ("categorical", torch.zeros(4, 1), torch.zeros(4).long(), "for one logit use"),
        ("bernoulli", FOUR, torch.zeros(4), "one logit each"),
        ("bernoulli", torch.zeros(4), torch.full((4,), 0.5), "zeros and ones"),
        ("bernoulli", torch.zeros(4), torch.tensor([0, 1, 1, torch.nan]), "not finite at datum 3"),
        ("gaussian", torch.zeros(4, 2), torch.tensor([0, torch.nan, 1, 1]), "not finite at datum 1"),
        ("gaussian", torch.zeros(4, 1), torch.zeros(4), "2 are needed.*noise="),
        ("gaussian", torch.zeros(4, 3), torch.zeros(4), "2 are needed, mean and spread"),
        (GaussianLikelihood(1.0), torch.zeros(4, 2), torch.zeros(4), "1 are needed, the mean"),
        (lambda o, y: F.cross_entropy(o, y), FOUR, torch.zeros(4).long(), "a mean would weigh as one datum"),
        (lambda o, y: 0.0, FOUR, torch.zeros(4).long(), "returned float"),
    ],
)
def test_targets_that_do_not_fit_are_refused(likelihood, outputs, y, says):
    with pytest.raises(InvalidInput, match=says):
        make_likelihood(likelihood).check(outputs, y)


def test_bad_settings():
    with pytest.raises(InvalidInput, match="noise must be a finite number above 0"):
        GaussianLikelihood(0.0)
    with pytest.raises(UnknownName, match=r"likelihood must be one of .* not 'softmax'"):
        make_likelihood("softmax")
    with pytest.raises(InvalidInput, match="CrossEntropyLoss, a loss"):
        make_likelihood(torch.nn.CrossEntropyLoss())
    with pytest.raises(InvalidInput, match="likelihood is int"):
        make_likelihood(3)
    with pytest.raises(InvalidInput, match="no class probabilities"):
        GaussianLikelihood().log_proba(torch.zeros(1, 2))
    with pytest.raises(InvalidInput, match="no mean and variance"):
        CategoricalLikelihood().moments(torch.zeros(1, 2))
