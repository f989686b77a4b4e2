"""The official code's update rules, transcribed from its functions and differentiated by autograd, on every branch.

One step at a time from the weights that our network has, so that no rounding adds up however large the steps are.
"""

import numpy as np
import pytest
import torch
from scipy.special import expit

from mlcollage.papers.gated_linear_networks import GatedNetwork, GaussianNetwork

SIZES, D, M = (5, 3, 1), 4, 2


def bounded(x, low, high):
    """``jnp.minimum(jnp.maximum(low, x), high)``: at a bound itself, both libraries pass on half of the gradient."""
    return torch.minimum(torch.maximum(x, x.new_tensor(low)), x.new_tensor(high))


def selected(net, side):
    """Numbers of the neurons and of their contexts in each layer, by the definition of a context."""
    normals = net.contexts.normals.reshape(net.neurons, M, D)
    bits = (normals @ side > net.contexts.offsets.reshape(net.neurons, M)).astype(int)
    return [(np.arange(len(c)), c) for c in np.split(bits @ 2 ** np.arange(M), np.cumsum(net.sizes)[:-1])]


def bernoulli(net, base, side, target, rate):
    """Outputs and new weights of every layer; the names of the branches that were taken."""
    eps, p, outputs, weights, branches = 0.01, torch.sigmoid(torch.tensor(base[1:])), [], [], set()
    for layer, where in enumerate(selected(net, side)):
        table = torch.tensor(net.layer_weights(layer)[0])
        used = table[where].clone().requires_grad_()
        inputs = torch.logit(bounded(torch.cat([torch.sigmoid(torch.ones(1, dtype=torch.float64)), p]), eps, 1 - eps))
        q = torch.sigmoid(used @ inputs)
        clipped = bounded(q, eps, 1 - eps)
        loss = -(target * clipped.log() + (1 - target) * (1 - clipped).log()).sum()
        moved = used - rate * torch.autograd.grad(loss, used)[0]
        branches |= {"output below"} if (q < eps).any() else set()
        branches |= {"output above"} if (q > 1 - eps).any() else set()
        branches |= {"weight clipped"} if (moved.abs() > 200).any() else set()
        branches |= {"saturated"} if ((q == 0) | (q == 1)).any() else set()
        table[where] = bounded(moved.detach(), -200.0, 200.0)
        outputs.append(q.detach().numpy())
        weights.append(table.numpy())
        p = clipped.detach()
    return outputs, weights, branches


def gaussian(net, base, side, target, rate, least=0.5, most=1e5, box=1e3):
    """The same for the Gaussian network: clip, two projections, product of Gaussians, all of it differentiated."""
    biases = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    mu, variance = torch.tensor(base[3:]), torch.ones(D, dtype=torch.float64)
    outputs, weights, branches = [], [], set()
    for layer, where in enumerate(selected(net, side)):
        table = torch.tensor(net.layer_weights(layer)[0])
        stored = table[where].clone().requires_grad_()
        mean, precision = torch.cat([biases, mu]), 1 / torch.cat([torch.ones_like(biases), variance])
        w = bounded(stored, -box, box)
        given = 1 / (w @ precision)[:, None]  # the variance before any projection, negative if the precision is
        unit = precision / (precision**2).sum()
        w = torch.where(given < least, w - unit * (1 / given - 1 / least), w)
        w = torch.where(given > most, w - unit * (1 / given - 1 / most), w)
        variance = 1 / (w @ precision)
        mu = variance * (w @ (precision * mean))
        loss = -torch.distributions.Normal(mu, variance.sqrt()).log_prob(torch.tensor(target)).sum()
        table[where] = (stored - rate * torch.autograd.grad(loss, stored)[0]).detach()
        taken = {
            "free": (given >= least) & (given <= most),
            "variance too small": (given > 0) & (given < least),
            "variance too large": given > most,
            "precision negative": given < 0,
            "weight outside": stored.abs() > box,
            "weight on the edge": stored.abs() == box,
        }
        branches |= {name for name, rows in taken.items() if bool(rows.any())}
        mu, variance = mu.detach(), variance.detach()
        outputs.append(torch.stack([mu, 1 / variance]).numpy())
        weights.append(table.numpy())
    return outputs, weights, branches


def follow(net, step, learn, base, side, targets, rates):
    """Compare every step; all branches that were taken, and how many contexts of the neurons."""
    branches, contexts = set(), set()
    for i, (b, z, x) in enumerate(zip(base, side, targets, strict=True)):
        rate = rates[i % len(rates)]
        outputs, weights, taken = step(net, b, z, x, rate)
        learn(b[None], z[None], np.array([x]), rate, outputs)
        branches |= taken
        contexts |= {(layer, k, c) for layer, where in enumerate(selected(net, z)) for k, c in zip(*where, strict=True)}
        for layer, expected in enumerate(weights):
            mine = net.layer_weights(layer)[0]
            np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=1e-9 * max(1, abs(expected).max()))
    return branches, len(contexts)


@pytest.mark.parametrize("weight_init", ["zeros", "mean"])
def test_bernoulli_steps_are_the_official_ones_on_every_branch(weight_init):
    rng = np.random.default_rng(0)
    net = GatedNetwork(
        SIZES, D, D, context_dim=M, gradient="official", weight_init=weight_init, layer_bias=1 / (1 + np.exp(-1.0)),
        dtype="float64",
    )  # fmt: skip
    net.add_heads(1)
    side = rng.normal(size=(400, D))
    base = np.concatenate([np.ones((400, 1)), np.clip(3 * side, -net.limit, net.limit)], axis=1)
    targets = (side[:, 0] + 0.5 * rng.normal(size=400) > 0).astype(float)

    def learn(b, z, x, rate, outputs):
        np.testing.assert_allclose(expit(net.neuron_logits(b, z)[0, 0]), np.concatenate(outputs), atol=1e-9)
        net.learn(b, z, x[:, None], rate=rate)

    taken, contexts = follow(net, bernoulli, learn, base, side, targets, (0.003, 0.3, 3.0, 300.0))
    assert taken == {"output below", "output above", "weight clipped", "saturated"}
    assert contexts == sum(SIZES) * 2**M


def test_gaussian_steps_are_the_official_ones_on_every_branch():
    rng = np.random.default_rng(0)
    net = GaussianNetwork(
        SIZES, D, D, context_dim=M, gradient="official", min_variance=0.5, step_limit=None, dtype="float64"
    )
    net.add_heads(1)
    # Branches that chance seldom takes: a weight on the edge of its box, and a neuron of hardly any precision.
    net.heads[0].weights[:3] = 1000.0, -1000.0, 999.0
    net.heads[0].weights[7 * 2**M : 2 * 7 * 2**M] = 1e-8
    side = rng.normal(size=(400, D))
    base = np.concatenate([np.tile([-1.0, 0.0, 1.0], (400, 1)), side], axis=1)
    targets = 2 * side[:, 0] - side[:, 1] + rng.normal(size=400)

    def learn(b, z, x, rate, outputs):
        mine = net.run(b, z, x, rate=rate)[0]
        expected = np.concatenate(outputs, axis=1)
        np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=1e-9 * max(1, abs(expected).max()))

    taken, contexts = follow(net, gaussian, learn, base, side, targets, (0.01, 0.1, 1.0, 30.0))
    assert taken == {
        *("free", "variance too small", "variance too large", "precision negative"),
        *("weight outside", "weight on the edge"),
    }
    assert contexts == sum(SIZES) * 2**M


def test_ties_between_classes_go_to_the_first_one():
    """As ``argmax`` does in the official example: untrained networks that start at 0 all say one half."""
    from mlcollage.papers.gated_linear_networks import GLNClassifier

    model = GLNClassifier((3,), weight_init="zeros", random_state=0)
    model.partial_fit(np.eye(3), [2, 1, 0], classes=[0, 1, 2, 3], sample_weight=[1e-300] * 3)
    assert model.predict(np.eye(3)).tolist() == [0, 0, 0]
    assert model.predict_proba(np.eye(3)).argmax(axis=1).tolist() == [0, 0, 0]
