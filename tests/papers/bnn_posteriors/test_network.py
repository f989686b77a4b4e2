"""Any module: parameters found and kept, refusals with their reason, predictions averaged over all draws."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.init import build
from mlcollage.nn.norm import FilterResponseNorm
from mlcollage.papers.bnn_posteriors import HMC, MAP, BayesianNetwork, GaussianPrior, Layout, Posterior, StudentTPrior
from mlcollage.papers.bnn_posteriors.layout import Layout as TheLayout

X, Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2


SHORT = HMC(chains=2, draws=3, burn_in=2, warmup=10)


def mlp(seed=0):
    return build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.decode(self.encode(x).tanh()))


def test_the_users_module_is_never_changed():
    net = mlp()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bnn = BayesianNetwork(net)
    bnn.fit(X, Y, SHORT)
    bnn.fit(X, Y, MAP(steps=5))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    with torch.no_grad():
        net[0].weight.fill_(9.0)  # nor does what happens to it later matter
    assert float(bnn.parameters_flat.max()) < 9


def test_flatten_and_unflatten_are_inverse():
    model = BayesianNetwork(mlp())
    q = model.initial(3)
    layout = model.layout
    assert layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layout.sizes == (12, 4, 8, 2)
    assert torch.equal(layout.flatten(layout.unflatten(q)), q)
    assert torch.equal(model.parameters_flat, torch.cat([p.detach().flatten() for p in model.module.parameters()]))
    with pytest.raises(InvalidInput, match=r"\(..., 26\) is needed"):
        layout.unflatten(torch.zeros(25))
    with pytest.raises(UnknownName, match=r"2.bias is missing"):
        layout.flatten({k: v for k, v in layout.unflatten(q).items() if k != "2.bias"})


def test_frozen_parameters_stay_and_tied_ones_are_one():
    net = build(Tied, 0)
    model = BayesianNetwork(net)
    assert model.layout.names == ("encode.weight", "head.weight", "head.bias")
    w = model.initial(1, "prior")[0]
    parts = model.layout.unflatten(w)
    by_hand = (X @ parts["encode.weight"].T).tanh() @ parts["encode.weight"].T @ parts["head.weight"].T + parts[
        "head.bias"
    ]
    torch.testing.assert_close(model.log_density(X, Y).outputs(w[None], X)[0], by_hand)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    posterior = BayesianNetwork(frozen).fit(X, Y, SHORT)
    assert posterior.layout.names == ("2.weight", "2.bias")
    draw = posterior.state_dict(1, 2)
    torch.testing.assert_close(posterior.predict_draws(X)[1, 2], functional_call(frozen, draw, (X,)).softmax(-1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            r"1 \(BatchNorm1d\) uses the statistics of the batch",
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval(),
            "FilterResponseNorm",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), "deterministic and decompose over data; call eval"),
        (lambda: nn.LSTM(3, 2, num_layers=2, dropout=0.2), "drops at random"),
        (lambda: nn.Linear(3, 2).half(), "float16; float32 or float64"),
        (lambda: nn.Linear(3, 2).bfloat16(), "bfloat16"),
        (lambda: nn.ReLU(), "nothing to sample"),
        (lambda: nn.Linear(3, 2).requires_grad_(False), "nothing to sample"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2).double()), "of 2 types or devices"),
        (lambda: nn.LazyLinear(2), "no shape yet"),
        (lambda: nn.Linear, "made and not its class"),
        (lambda: "net", "torch.nn.Module is needed"),
    ],
)
def test_modules_without_a_posterior_are_refused_with_the_reason(make, says):
    with pytest.raises(InvalidInput, match=says):
        BayesianNetwork(make())


def test_weights_that_are_not_finite_are_named():
    net = mlp()
    with torch.no_grad():
        net[2].bias[1] = torch.nan
    with pytest.raises(InvalidInput, match=r"parameter 2.bias is not finite"):
        BayesianNetwork(net)


class Coupled(nn.Module):
    def __init__(self, random):
        super().__init__()
        self.linear, self.random = nn.Linear(3, 2), random

    def forward(self, x):
        h = self.linear(x)
        return nn.functional.dropout(h, 0.5, True) if self.random else h - h.mean(0)


def test_hidden_noise_and_hidden_coupling_are_found_when_data_come():
    with pytest.raises(InvalidInput, match="something else each time"):
        BayesianNetwork(Coupled(True)).log_density(X, Y)
    with pytest.raises(InvalidInput, match="depend on the other data of a batch"):
        BayesianNetwork(Coupled(False)).log_density(X, Y)


def test_norms_that_decompose_and_eval_modes_are_welcome():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    conv = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), FilterResponseNorm(2), nn.Flatten())
    for module in (net, conv):
        value, gradient = BayesianNetwork(module).log_density(X, Y)(BayesianNetwork(module).initial(2))
        assert bool(value.isfinite().all() and gradient.isfinite().all())


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (X, Y[:5], "X has 20 data and y 5"),
        (X[:0], Y[:0], "X is empty"),
        (X, torch.empty(0), "y is empty"),
        (X.long(), Y, "X is torch.int64; real numbers"),
        (X.masked_fill(torch.arange(20)[:, None] == 7, torch.nan), Y, "not finite at datum 7"),
        (X[:, :2], Y, r"cannot take inputs of shape \(4, 2\)"),
        (X, Y.float(), "labels are torch.float32"),
        (X, Y + 1, "run from 1 to 2"),
        (None, Y, "X is NoneType"),
        ("data", Y, "X is str"),
    ],
)
def test_data_that_do_not_fit_are_refused(x, y, says):
    with pytest.raises(InvalidInput, match=says):
        BayesianNetwork(mlp()).log_density(x, y)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, random=False, n=20):
        self.random, self.n = random, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return X[i] + (torch.randn(3) if self.random else 0), int(Y[i])


def test_datasets_are_read_whole_and_augmentation_in_them_is_named():
    model = BayesianNetwork(mlp())
    q = model.initial(1)
    torch.testing.assert_close(model.log_density(Pairs())(q)[0], model.log_density(X, Y)(q)[0])
    assert model.fit(Pairs(), None, MAP(steps=2)).method == "map"
    with torch.random.fork_rng(devices=[]), pytest.warns(UserWarning, match="no longer a product over the data"):
        model.log_density(Pairs(random=True))
    with pytest.raises(InvalidInput, match="comes with y=None"):
        model.log_density(Pairs(), Y)
    with pytest.raises(InvalidInput, match="empty or has no length"):
        model.log_density(Pairs(n=0))


def test_settings_of_the_density_are_checked():
    model = BayesianNetwork(mlp())
    for keywords, says in (
        ({"temperature": 0.0}, "temperature .* not 0.0"),
        ({"chunk_size": 0}, "chunk_size .* not 0"),
    ):
        with pytest.raises(InvalidInput, match=says):
            model.log_density(X, Y, **keywords)
    density = model.log_density(X, Y)
    with pytest.raises(InvalidInput, match=r"\(chains, 26\) is needed"):
        density(torch.zeros(26))
    with pytest.raises(InvalidInput, match=r"positions are torch\.float64"):
        density(torch.zeros(1, 26, dtype=torch.float64))
    with pytest.raises(UnknownName, match=r"backend must be one of .* not 'fast'"):
        model.log_density(X, Y, backend="fast")
    with pytest.raises(UnknownName, match=r"backend must be one of .* not 'fast'"):
        BayesianNetwork(mlp(), backend="fast")
    with pytest.raises(InvalidInput, match="prior is float"):
        BayesianNetwork(mlp(), prior=0.2)


def test_arrays_of_any_float_and_networks_that_look_words_up():
    model = BayesianNetwork(mlp())
    q = model.initial(1)
    a, b = model.log_density(X, Y)(q), model.log_density(X.double().numpy(), Y.numpy())(q)
    torch.testing.assert_close(a[0], b[0])
    words = build(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)), 0)
    index = torch.arange(60).reshape(20, 3) % 7
    value, gradient = BayesianNetwork(words).log_density(index, Y)(BayesianNetwork(words).initial(2))
    assert bool(value.isfinite().all())
    assert gradient.shape == (2, 28 + 26)


def test_starts():
    model = BayesianNetwork(mlp(), prior=GaussianPrior(100.0))
    a, b = model.initial(3, generator=1), model.initial(3, generator=1)
    assert torch.equal(a, b)
    assert not torch.equal(a[0], a[1])
    assert float(a.abs().max()) < 1.5  # the layers' own initialization, not the prior's
    assert float(model.initial(3, "prior").abs().max()) > 5
    assert torch.equal(model.initial(2, "module")[1], model.parameters_flat)
    made = model.initial(2, lambda: mlp(torch.randint(99, ()).item()))
    assert made.shape == (2, 26)
    assert torch.equal(model.initial(2, a[:2]), a[:2])
    state = torch.get_rng_state()
    model.initial(2)
    assert torch.equal(state, torch.get_rng_state())
    one = mlp()
    for init, says in (
        (a, "init has shape"),
        (lambda: nn.Linear(3, 2), "init makes another network"),
        (lambda: one, "init hands out the same Sequential at every call"),
    ):
        with pytest.raises(InvalidInput, match=says):
            model.initial(2, init)
    with pytest.raises(UnknownName, match="not 'zeros'"):
        model.initial(2, "zeros")
    with pytest.raises(InvalidInput, match=r"chains must be .* not 0"):
        model.initial(0)


def test_predictions_average_every_draw_of_every_chain():
    model = BayesianNetwork(mlp())
    params = model.initial(6, "prior").reshape(2, 3, -1)
    posterior = Posterior(model.layout, "by hand", params, network=model)
    logits = torch.stack(
        [functional_call(model.module, model.layout.unflatten(w), (X,)) for w in params.reshape(6, -1)]
    )
    proba = logits.double().softmax(-1)
    torch.testing.assert_close(posterior.predict_proba(X), proba.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(posterior.predict_proba(X, batch_size=7), proba.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(posterior.predict_draws(X).double().flatten(0, 1), proba, rtol=1e-5, atol=1e-6)
    assert torch.equal(posterior.predict(X), proba.mean(0).argmax(-1))
    assert posterior.predict_proba(X.numpy()).dtype == torch.float64


def test_the_gaussian_predictive_is_the_mixture():
    model = BayesianNetwork(build(lambda: nn.Linear(3, 2), 0), "gaussian")
    params = model.initial(4, "prior").reshape(2, 2, -1)
    posterior = Posterior(model.layout, "by hand", params, network=model)
    out = torch.stack(
        [functional_call(model.module, model.layout.unflatten(w), (X,)) for w in params.reshape(4, -1)]
    ).double()
    mu, sigma = out[..., :1], nn.functional.softplus(out[..., 1:])
    mean, variance = posterior.predict_moments(X)
    torch.testing.assert_close(mean, mu.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, (sigma**2).mean(0) + mu.var(0, correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.predict(X), mean)
    with pytest.raises(InvalidInput, match="no class probabilities"):
        posterior.predict_proba(X)
    with pytest.raises(InvalidInput, match="no mean and variance"):
        BayesianNetwork(mlp()).fit(X, Y, MAP(steps=1)).predict_moments(X)


def test_function_space_diagnostics_have_one_value_a_prediction():
    model = BayesianNetwork(mlp(), prior=GaussianPrior(1.0))
    posterior = model.fit(X, Y, HMC(chains=4, draws=60, burn_in=5, warmup=30), generator=1)
    assert posterior.function_rhat(X).shape == posterior.function_ess(X).shape == (20, 2)
    assert float(np.median(posterior.function_rhat(X))) < 1.1
    with pytest.warns(UserWarning, match="one chain compares only its halves"):
        model.fit(X, Y, HMC(chains=1, draws=10, burn_in=0, warmup=0, step_size=0.05)).function_rhat(X)


def test_an_infinite_variance_has_no_prior_period():
    with pytest.raises(InvalidInput, match="give trajectory_length"):
        BayesianNetwork(mlp(), prior=StudentTPrior(1.0, 1.0)).fit(X, Y, HMC())


def test_wrapped_networks_and_outputs_with_logits_are_taken():
    class Wordy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"loss": None, "logits": self.net(x)}

    plain, wrapped = BayesianNetwork(mlp()), BayesianNetwork(nn.DataParallel(mlp()))
    assert wrapped.layout == plain.layout
    a, b = (BayesianNetwork(net).fit(X, Y, SHORT).predict_proba(X) for net in (mlp(), Wordy()))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_public_names_come_from_their_modules():
    import mlcollage.papers.bnn_posteriors as paper

    assert Layout is TheLayout
    assert all(getattr(paper, name).__name__ == name for name in paper.__all__)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = paper.Nothing
