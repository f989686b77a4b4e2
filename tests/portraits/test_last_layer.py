"""The last layer's Gaussian against laplace-torch and against sampling."""

import pytest
import torch
from torch import nn

from mlcollage.portraits.beliefs import fit_last_layer


def problem(n=80, d=3, c=4):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, torch.randint(c, (n,), generator=g), 0.5 * torch.randn(c, d, generator=g, dtype=torch.float64)


def test_the_same_covariance_as_laplace_torch():
    laplace = pytest.importorskip("laplace")
    x, y, weight = problem()
    layer = nn.Linear(3, 4, bias=False).double()
    layer.weight.data = weight
    peer = laplace.Laplace(layer, "classification", subset_of_weights="all", hessian_structure="kron",
                           prior_precision=2.0)  # fmt: skip
    peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x)))
    _, theirs = peer._glm_predictive_distribution(x[:5])
    ours = fit_last_layer(x, y, weight, precision=2.0)
    v = ours.variances(x[:5])
    covariance = torch.einsum("ij,nj,kj->nik", ours.vectors_out, v, ours.vectors_out)
    torch.testing.assert_close(covariance, theirs.detach(), rtol=1e-5, atol=1e-8)


def test_the_precision_maximizes_the_evidence_of_the_peer():
    laplace = pytest.importorskip("laplace")
    x, y, weight = problem()
    layer = nn.Linear(3, 4, bias=False).double()
    layer.weight.data = weight
    peer = laplace.Laplace(layer, "classification", subset_of_weights="all", hessian_structure="kron")
    peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x)))
    best = fit_last_layer(x, y, weight)

    def evidence(t):
        return float(peer.log_marginal_likelihood(prior_precision=torch.tensor([t], dtype=torch.float64)))

    assert not best.at_edge
    assert evidence(best.precision) >= max(evidence(best.precision * k) for k in (0.5, 2.0)) - 1e-6


def test_more_data_less_doubt():
    x, y, weight = problem()
    few, many = (fit_last_layer(x.repeat(k, 1), y.repeat(k), weight, precision=1.0) for k in (1, 100))
    g = torch.Generator().manual_seed(1)
    plain = (x @ weight.T).softmax(1)
    apart = [float((m.predict(x, g) - plain).abs().max()) for m in (few, many)]
    assert apart[1] < 0.3 * apart[0]
