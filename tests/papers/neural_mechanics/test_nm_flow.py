"""The flows against closed forms of a quadratic loss, and their order of agreement with gradient descent."""

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.flow import ModifiedSGDFlow


class Point(nn.Module):
    """Parameters without a network."""

    def __init__(self, values):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))


H = np.array([[2.0, 0.5], [0.5, 1.0]])


def quadratic(model):
    matrix = torch.from_numpy(H)
    return 0.5 * model.theta @ matrix @ model.theta


def flow_of(kind, lr=0.1, decay=0.3, momentum=0.0, dampening=0.0, **more):
    return ModifiedSGDFlow(
        Point([1.0, -2.0]), quadratic, lr=lr, weight_decay=decay, momentum=momentum, dampening=dampening,
        kind=kind, **more,
    )  # fmt: skip


@pytest.mark.parametrize("momentum", [0.0, 0.3])
@pytest.mark.parametrize("dampening", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["gradient", "modified", "second"])
def test_on_a_quadratic_loss_they_are_matrix_exponentials(kind, momentum, dampening):
    lr, decay, k = 0.1, 0.3, 25
    A, start = H + decay * np.eye(2), np.array([1.0, -2.0])
    h = lr * (1 - (dampening if momentum else 0.0))
    c, m = 1 - momentum, h * (1 + momentum) / 2
    if kind == "gradient":
        expected = expm(-A / c * h * k) @ start
    elif kind == "modified":
        expected = expm(-(A + m / c**2 * A @ A) / c * h * k) @ start
    else:
        system = np.block([[np.zeros((2, 2)), np.eye(2)], [-A / m, -c / m * np.eye(2)]])
        velocity = np.zeros(2) if momentum else -A @ start / c
        expected = (expm(system * h * k) @ np.concatenate([start, velocity]))[:2]
    path = flow_of(kind, lr, decay, momentum, dampening).solve([0, k])
    np.testing.assert_allclose(path.parameters["theta"][1].numpy(), expected, rtol=1e-5)
    assert path.parameters["theta"][0].tolist() == [1.0, -2.0]
    assert path.time.tolist() == [0.0, pytest.approx(h * k)]
    decayed = expected_unused(kind, decay, c, m, h, k, momentum)
    assert path.at(1)["unused"][0].item() == pytest.approx(decayed, rel=1e-6)


def expected_unused(kind, decay, c, m, h, k, momentum):
    """A parameter that the loss does not use is moved by weight decay alone."""
    if kind == "gradient":
        return np.exp(-decay / c * h * k)
    if kind == "modified":
        return np.exp(-(decay + m / c**2 * decay**2) / c * h * k)
    system = np.array([[0, 1], [-decay / m, -c / m]])
    return (expm(system * h * k) @ [1.0, 0.0 if momentum else -decay / c])[0]


def descend(lr, steps):
    theta = np.array([1.0, -2.0])
    for _ in range(steps):
        theta = theta - lr * H @ theta
    return theta


@pytest.mark.parametrize(("kind", "order"), [("gradient", 1), ("modified", 2), ("second", 2)])
def test_they_agree_with_gradient_descent_to_their_order(kind, order):
    """At the same physical time the error falls as η to the power of the order."""
    errors = []
    for lr, steps in ((0.05, 20), (0.025, 40)):
        path = flow_of(kind, lr, decay=0.0, substeps=16).solve([steps])
        errors.append(np.abs(path.parameters["theta"][0].numpy() - descend(lr, steps)).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_gradient_flow_of_a_network_conserves_its_laws():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (32,), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flow = ModifiedSGDFlow(model, lambda m: nn.functional.cross_entropy(m(x), y), lr=0.1, kind="gradient")
    path = flow.solve([0, 20])

    def laws(values):
        rescale = (values["0.weight"] ** 2).sum(1) + values["0.bias"] ** 2 - (values["2.weight"] ** 2).sum(0)
        return torch.cat([rescale, values["2.weight"].sum(0)])

    moved = (path.at(1)["0.weight"] - path.at(0)["0.weight"]).abs().max()
    assert float(moved) > 1e-2
    assert torch.allclose(laws(path.at(0)), laws(path.at(1)), atol=1e-7)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: flow_of("third"), "kind must be one of .* not 'third'"),
        (lambda: flow_of("second", lr=0.0), "lr must be a finite number above 0"),
        (lambda: flow_of("second", substeps=0), "substeps must be a whole number"),
        (lambda: flow_of("gradient", lr=1e6, substeps=1).solve([100]), "finite number"),
        (lambda: flow_of("second").solve([]), "must increase"),
        (lambda: flow_of("second").solve([3, 2]), "must increase"),
        (lambda: flow_of("second").solve([0]), "must increase"),
        (lambda: ModifiedSGDFlow(nn.ReLU(), quadratic, lr=0.1), "no parameter that requires"),
        (
            lambda: ModifiedSGDFlow(Point([1.0]), lambda m: m.theta.log().sum() / 0 * 0, lr=0.1).solve([1]),
            "one finite number",
        ),
        (lambda: ModifiedSGDFlow(Point([1.0, 2.0]), lambda m: m.theta, lr=0.1).solve([1]), "one finite number"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()
