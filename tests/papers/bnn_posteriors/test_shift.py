"""The dead-input alarm finds what never varies and which test inputs reach there; the remedy keeps them harmless."""

import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.cnn_lstm import CNNLSTM
from mlcollage.papers.bnn_posteriors.empcov import EmpCovPrior
from mlcollage.papers.bnn_posteriors.first_layer import layer_inputs
from mlcollage.papers.bnn_posteriors.hmc import HMC
from mlcollage.papers.bnn_posteriors.network import BayesianNetwork
from mlcollage.papers.bnn_posteriors.priors import GaussianPrior, LaplacePrior
from mlcollage.papers.bnn_posteriors.shift import dead_inputs


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mlp(inputs, classes=2, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes)).double()


def test_constant_inputs_and_linear_dependences_are_found_at_any_place_and_scale():
    live = normal(60, 3) * torch.tensor([1.0, 100.0, 0.01])
    x = torch.stack([live[:, 0], torch.full((60,), 7.0), live[:, 1], live[:, 2], live[:, 0] - live[:, 1] / 100], dim=1)
    dead = dead_inputs(mlp(5), x, tol=1e-12)
    assert dead.parameter == "1.weight"
    assert dead.count == 2
    assert dead.constants.tolist() == [1]
    found = dead.directions @ dead.directions.T
    torch.testing.assert_close(found, torch.eye(2, dtype=torch.float64))
    assert float((x @ dead.directions.T).std(dim=0).max()) < 1e-9
    assert "2 of 5 directions of the inputs of 1.weight never vary in training, 1 of the inputs" in str(dead)


def test_nothing_is_dead_where_everything_varies():
    dead = dead_inputs(mlp(4), normal(100, 4))
    assert dead.count == 0
    report = dead.report(10 * normal(5, 4, seed=1))
    assert not report.alarmed.any()
    assert np.abs(report.level).max() < 1e-9
    assert "Every direction" in str(dead)


def test_levels_and_shares_are_lengths_of_the_part_that_never_varied():
    x = torch.cat([normal(500, 3), torch.full((500, 2), 2.0)], dim=1)
    dead = dead_inputs(mlp(5), x, batch_size=64)
    test = torch.tensor([[0.0, 0, 0, 2, 2], [1, 1, 1, 2, 2], [0, 0, 0, 5, 6], [9, 0, 0, 2, 3]], dtype=torch.float64)
    report = dead.report(test, warn=False)
    mean = x.mean(0)
    spread = float((x - mean).square().sum(1).mean().sqrt())
    assert dead.spread == pytest.approx(spread)
    np.testing.assert_allclose(report.level * spread, [0, 0, 5, 1], atol=1e-9)
    offset = test - mean
    whole = offset.square().sum(1)
    np.testing.assert_allclose(report.share, torch.tensor([0.0, 0, 25, 1]) / whole, atol=1e-9)
    assert report.alarmed.tolist() == [False, False, True, True]
    assert list(report.to_frame().columns) == ["level", "share", "alarmed"]


def test_the_alarm_warns_once_and_says_what_to_do():
    x = torch.cat([normal(50, 2), torch.zeros(50, 1)], dim=1)
    dead = dead_inputs(mlp(3), x)
    with pytest.warns(
        UserWarning, match=r"3 of 4 inputs reach into the 1 directions .* sample again with an EmpCovPrior"
    ):
        dead.report(torch.tensor([[0.0, 0, 1], [0, 0, 2], [0, 0, -1], [1, 1, 0]], dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "No input reaches" in str(dead.report(x))


def test_patches_of_a_convolution_are_what_its_weights_meet():
    conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)).double()
    net = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(2).double())
    x = normal(4, 2, 9, 8)
    net(x)
    name, patches = layer_inputs(net, x)
    assert name == "0"
    by_hand = patches @ conv.weight.reshape(3, -1).T + conv.bias
    torch.testing.assert_close(by_hand.reshape(4, -1, 3).mT, conv(x).flatten(2))
    line = nn.Conv1d(3, 4, 3, padding=1).double()
    sequence = normal(2, 3, 7)
    seen = layer_inputs(line, sequence)[1]
    torch.testing.assert_close((seen @ line.weight.reshape(4, -1).T + line.bias).reshape(2, 7, 4).mT, line(sequence))


def test_a_dead_channel_of_images_is_found_in_patches():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()
    x = torch.cat([normal(40, 1, 6, 6), torch.zeros(40, 1, 6, 6)], dim=1)
    dead = dead_inputs(net, x)
    assert dead.count == 9
    assert dead.constants.tolist() == list(range(9, 18))
    noisy = torch.cat([normal(10, 1, 6, 6, seed=1), normal(10, 1, 6, 6, seed=2)], dim=1)
    report = dead.report(noisy, warn=False)
    assert report.alarmed.all()
    np.testing.assert_allclose(report.share.mean(), 0.45, atol=0.1)
    assert not dead.report(x[:5] * 2).alarmed.any()


def test_networks_and_inputs_are_left_as_they_were():
    net = mlp(3).train()
    before = [p.clone() for p in net.parameters()]
    dead_inputs(net, normal(20, 3).numpy().astype(np.float32))
    assert net.training
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in net.modules())
    words = CNNLSTM(20, 2, length=16, embedding=4, filters=3, kernel_size=3, pool=2, hidden=3)
    assert dead_inputs(words, torch.randint(0, 20, (30, 16))).parameter == "conv.weight"


def test_the_remedy_has_the_strength_of_the_prior_it_replaces():
    x = torch.cat([normal(300, 4) * torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.zeros(300, 2)], dim=1)
    net = mlp(6)
    prior = EmpCovPrior.from_module(net, x, rest=GaussianPrior({"": 0.3, "1": 0.05}))
    c = x.T @ x / 299
    before = 0.05 * c.trace()
    after = (prior.alpha * c @ c).trace()
    assert float(after) == pytest.approx(float(before))
    torch.testing.assert_close(prior.covariance, prior.alpha * c + 1e-4 * torch.eye(6, dtype=torch.float64))
    fixed = EmpCovPrior.from_module(net, x, alpha=2.0, eps=0.1, rest=LaplacePrior(0.1))
    torch.testing.assert_close(fixed.covariance, 2.0 * c + 0.1 * torch.eye(6, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="rest is LaplacePrior; give alpha"):
        EmpCovPrior.from_module(net, x, rest=LaplacePrior(0.1))


DEAD, METHOD = 20, HMC(chains=12, draws=20, burn_in=5, warmup=25, jitter=0.2)


@pytest.fixture(scope="module")
def shifted():
    """Three live inputs and twenty that are zero in training; HMC under both priors; clean and noisy test inputs."""
    x = torch.cat([normal(80, 3), torch.zeros(80, DEAD)], dim=1)
    y = (x[:, 0] * x[:, 1] + 0.3 * x[:, 2] > 0).long()
    test = torch.cat([normal(200, 3, seed=1), torch.zeros(200, DEAD)], dim=1)
    y_test = (test[:, 0] * test[:, 1] + 0.3 * test[:, 2] > 0).long()
    noisy = test.clone()
    noisy[:, 3:] = 2 * normal(200, DEAD, seed=2)
    net = nn.Sequential(nn.Linear(3 + DEAD, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    bnn = BayesianNetwork(net, prior=GaussianPrior(0.5))
    mended = BayesianNetwork(net, prior=EmpCovPrior.from_module(bnn, x, eps=1e-3))
    usual, safe = (of.fit(x, y, METHOD, generator=1) for of in (bnn, mended))
    return usual, safe, x, (test, noisy, y_test)


def test_weights_of_dead_inputs_follow_the_prior_and_no_others(shifted):
    usual, _, x, _ = shifted
    weights = usual.layout.unflatten(usual.params)["0.weight"]  # (chain, draw, unit, input)
    dead = weights[:, ::5, :, 3:].flatten()
    assert stats.kstest(dead.numpy() / 0.5**0.5, "norm").pvalue > 0.01
    assert stats.kstest(weights[..., :2].flatten().numpy() / 0.5**0.5, "norm").pvalue < 1e-6
    alarm = dead_inputs(usual.network, x)
    assert alarm.constants.tolist() == list(range(3, 3 + DEAD))


def test_noise_in_dead_inputs_hurts_the_average_but_not_with_the_remedy(shifted):
    usual, safe, x, (test, noisy, y_test) = shifted

    def accuracy(of, inputs):
        return float((of.predict(inputs) == y_test).double().mean())

    assert accuracy(usual, test) > 0.8
    assert accuracy(usual, noisy) < accuracy(usual, test) - 0.1
    assert accuracy(safe, noisy) > accuracy(safe, test) - 0.03
    assert accuracy(safe, test) > accuracy(usual, test) - 0.04
    alarm = dead_inputs(usual.network, x)
    assert alarm.report(noisy, warn=False).alarmed.all()
    assert not alarm.report(test).alarmed.any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dead_inputs(mlp(3), torch.ones(20, 3)), "are all the same"),
        (lambda: dead_inputs(mlp(3), torch.ones(1, 3)), "saw 1 inputs"),
        (lambda: dead_inputs(mlp(3), torch.ones(0, 3)), r"X is empty \(shape \(0, 3\)\)"),
        (lambda: dead_inputs(mlp(3), torch.full((5, 3), np.nan)), "is not finite"),
        (lambda: dead_inputs(mlp(3), normal(5, 3), tol=1.0), "tol must be .* not 1.0"),
        (lambda: dead_inputs("net", normal(5, 3)), "module is str; a torch.nn.Module or a BayesianNetwork"),
        (lambda: dead_inputs(nn.ReLU(), normal(5, 3)), "no linear map or convolution"),
        (lambda: dead_inputs(nn.Conv2d(2, 2, 3, groups=2), torch.ones(2, 2, 5, 5)), "groups"),
        (lambda: dead_inputs(mlp(3), normal(9, 3)).report(normal(2, 3), threshold=0), "threshold must be .* not 0"),
    ],
)
def test_bad_input_gets_one_sentence(call, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
