"""A frozen part runs once per input, gives what the whole network gives, and what cannot be told apart runs whole."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import HMC, MAP, SGLD, BayesianNetwork, GaussianPrior

G = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, 8, dtype=torch.float64, generator=G)
Y = torch.arange(20) % 2
SHORT = HMC(chains=2, draws=3, burn_in=2, warmup=10, trajectory_length=0.2)


class Counted(nn.Module):
    """A linear map that counts the data it was run on."""

    def __init__(self, width=4):
        super().__init__()
        self.map, self.data = nn.Linear(8, width), 0

    def forward(self, x):
        self.data += len(x)
        return self.map(x).tanh()


class Backbone(nn.Module):
    """A frozen part, something between, a sampled part: how they are joined is what the cases differ in."""

    def __init__(self, join, recurrent=False):
        super().__init__()
        self.frozen = (nn.LSTM(8, 4, batch_first=True) if recurrent else Counted()).requires_grad_(False)
        self.second = nn.Linear(4, 4).requires_grad_(False)
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.join = join

    def forward(self, x):
        return self.join(self, x)


def last_layer(m, x):
    return m.head(m.middle(m.second(m.frozen(x)).mean(1)).tanh())


def through_functions(m, x):
    return m.head(m.middle(m.second(m.frozen(x).relu() + 1)).mean(1))


def weight_of_the_frozen(m, x):
    return m.head((m.middle(m.frozen(x)) + m.frozen.map.weight.sum()).mean(1))


def mask_of_shape(m, x):
    mask = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device).cumsum(1)
    return m.head(m.middle(m.frozen(x) * mask[..., None]).mean(1))


def last_of_sequence(m, x):
    return m.head(m.middle(m.frozen(x)[0][:, -1]))


def two_branches(m, x):
    return m.head(m.middle(m.frozen(x)).mean(1) + m.second(x[..., :4]).mean(1))


def inputs_again(m, x):
    return m.head(m.middle(m.frozen(x)).mean(1) * x.mean(dim=(1, 2), keepdim=True)[..., 0])


def mask_of_values(m, x):
    return m.head((m.middle(m.frozen(x)) * (x[..., :1] > 1.5)).mean(1))


def detached(m, x):
    return m.head(m.middle(m.second(m.frozen(x) * m.middle.weight.detach().sum())).mean(1))


def in_place(m, x):
    return m.head(m.middle(m.frozen(x).add_(1.0)).mean(1))


def make(join, recurrent=False):
    return build(lambda: Backbone(join, recurrent).double(), 0)


def sequential():
    frozen = nn.Sequential(Counted(), nn.Flatten(), nn.Linear(12, 4)).requires_grad_(False)
    return build(lambda: nn.Sequential(frozen, nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(), 0)


CASES = {
    "sequential": (sequential, "mlp"),
    "last_layer": (lambda: make(last_layer), "vmap"),
    "through_functions": (lambda: make(through_functions), "vmap"),
    "mask_of_shape": (lambda: make(mask_of_shape), "vmap"),
    "last_of_sequence": (lambda: make(last_of_sequence, True), "vmap"),
}
WHOLE = {
    "weight_of_the_frozen": lambda: make(weight_of_the_frozen),
    "two_branches": lambda: make(two_branches),
    "inputs_again": lambda: make(inputs_again),
    "mask_of_values": lambda: make(mask_of_values),
    "detached": lambda: make(detached),
    "in_place": lambda: make(in_place),
}


def reference(model, q, x, y):
    """Log-posterior and gradient by autograd through the whole network."""
    values, gradients = [], []
    for row in q:
        w = row.clone().requires_grad_(True)
        out = functional_call(model.module, model.layout.unflatten(w), (x,))
        value = model.likelihood.log_prob(out, y).sum() + model.placed_prior.log_prob(w[None])[0]
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, w)[0])
    return torch.stack(values), torch.stack(gradients)


@pytest.mark.parametrize("case", [*CASES, *WHOLE])
def test_gradients_are_those_of_the_whole_network(case):
    module = (CASES[case][0] if case in CASES else WHOLE[case])()
    model = BayesianNetwork(module, prior=GaussianPrior(0.5), backend="untimed")
    density = model.log_density(X, Y, chunk_size=7)
    q = model.initial(3)
    assert (density._features is not X) == (case in CASES)
    if case in CASES:
        assert density.backend.name == CASES[case][1]
    for found, truth in zip(density(q), reference(model, q, X, Y), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    out = torch.stack([functional_call(module, model.layout.unflatten(row), (X,)) for row in q])
    torch.testing.assert_close(model.outputs(q, X, 6), out)
    torch.testing.assert_close(density.outputs(q, X[:5]), out[:, :5])
    index = torch.tensor([[0, 1], [4, 2], [3, 3]])
    value, gradient = density.estimate(q, index, value=True)
    for c in range(3):
        one, by_one = model.log_density(X[index[c]], Y[index[c]])(q[c : c + 1])
        prior = model.placed_prior.log_prob(q[c : c + 1])
        torch.testing.assert_close(value[c : c + 1], 10 * (one - prior) + prior)
        of_prior = model.placed_prior.gradient(q[c : c + 1])
        torch.testing.assert_close(gradient[c : c + 1], 10 * (by_one - of_prior) + of_prior)


def runs(model):
    return next(m for m in model.module.modules() if isinstance(m, Counted)).data


@pytest.mark.parametrize("case", ["sequential", "last_layer", "mask_of_shape"])
def test_a_frozen_part_is_run_once_however_many_gradients_and_draws(case):
    model = BayesianNetwork(CASES[case][0]())
    posterior = model.fit(X, Y, HMC(chains=2, draws=5, burn_in=3, warmup=10, at=X[:6], trajectory_length=0.2))
    fitted = runs(model)
    assert fitted <= 20 + 6 + 60  # each datum once, and a few to find out where the frozen part ends
    posterior.predict_proba(X)
    posterior.predict_draws(X)
    assert runs(model) <= fitted + 40
    model.fit(X, Y, MAP(steps=50))
    assert runs(model) <= fitted + 100


def test_draws_are_those_of_the_head_on_features():
    model = BayesianNetwork(sequential(), backend="untimed")
    with torch.no_grad():
        features = model.module[0](X)
    alone = BayesianNetwork(nn.Sequential(*copy.deepcopy(model.module)[1:]), backend="untimed")
    a, b = (m.fit(x, Y, SHORT, init=model.initial(2)) for m, x in ((model, X), (alone, features)))
    torch.testing.assert_close(a.params, b.params)


def test_changed_inputs_go_through_the_frozen_part_again():
    model = BayesianNetwork(sequential())
    density, q = model.log_density(X, Y), model.initial(2)
    index = torch.arange(20).expand(2, -1)
    turned = model.log_density(-X, Y)(q)[1]
    torch.testing.assert_close(density.estimate(q, index, transform=torch.neg)[1], turned)
    with pytest.warns(UserWarning, match="no longer a product"):
        model.fit(X, Y, SGLD(chains=2, draws=2, thin=2, burn_in=2, batch_size=5, transform=torch.neg))


def test_inputs_that_are_written_to_have_new_features():
    model, x = BayesianNetwork(sequential()), X.clone()
    q = model.initial(1)
    before = model.outputs(q, x)
    x.neg_()
    torch.testing.assert_close(model.outputs(q, x), model.outputs(q, -X))
    assert not torch.allclose(model.outputs(q, x), before)


def test_a_mask_that_only_later_data_need_is_found_with_them():
    x = X.clamp(max=1.0)  # nothing is masked in training, so the values of the inputs do not matter
    model = BayesianNetwork(make(lambda m, x: m.head((m.middle(m.frozen(x)) * ~(x[..., :1] > 1.5)).mean(1))))
    posterior = model.fit(x, Y, SHORT)
    truth = [functional_call(model.module, posterior.state_dict(c, 1), (X,)).softmax(-1) for c in range(2)]
    torch.testing.assert_close(posterior.predict_draws(X)[:, 1], torch.stack(truth))


def test_a_network_with_a_frozen_part_can_be_pickled():
    posterior = BayesianNetwork(sequential()).fit(X, Y, SHORT)
    again = pickle.loads(pickle.dumps(posterior))  # noqa: S301 (written here)
    torch.testing.assert_close(again.predict_proba(X), posterior.predict_proba(X))
