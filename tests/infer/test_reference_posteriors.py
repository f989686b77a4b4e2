"""The reference posteriors of posteriordb: densities as published, and the quick ones sampled from Stan's starts."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats as sps
from scipy.integrate import solve_ivp


def benchmark():
    file = Path(__file__).parents[2] / "benchmarks" / "reference_posteriors.py"
    spec = importlib.util.spec_from_file_location("reference_posteriors", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


posteriors = benchmark()
WRITTEN_OUT = [n for n in posteriors.names() if n.startswith(("arma", "garch", "gp", "hmm", "bb"))]


def test_there_are_thirty_three_and_their_parameters_are_those_of_the_reference():
    assert len(posteriors.names()) == 33
    for name in posteriors.names():
        model = posteriors.load(name)
        named = model.constrain(model.starts(2, 0)[:, None])
        assert set(named) == set(model.moments)
        assert all(value.shape == (2, 1) for value in named.values())


@pytest.mark.parametrize(
    "name", [n for n in posteriors.names() if not n.startswith(("arma", "garch", "gp", "hmm", "bb"))]
)
def test_gradients_by_hand_are_differences_of_values(name):
    model, h = posteriors.load(name), 1e-5
    x = 0.3 * model.starts(3, 1)
    steps = h * torch.eye(model.dim, dtype=torch.float64)
    numeric = torch.stack([(model.log_prob(x + e)[0] - model.log_prob(x - e)[0]) / (2 * h) for e in steps], 1)
    exact = model.log_prob(x)[1]
    assert ((numeric - exact).abs() / (1 + exact.abs().amax(1, keepdim=True))).max() < 1e-5


def scalar(name, x):
    """The model written out with scipy and loops, up to a constant, at one position."""
    d = posteriors.load(name)
    data = {k: np.array(v) for k, v in json.loads((posteriors.DATA / f"{name}.json").read_text())["data"].items()}
    x, p = np.asarray(x), {k: float(v) for k, v in d.constrain(x).items()}
    if name == "arma-arma11":
        y, mean, error, total = data["y"], p["mu"] + p["phi"] * p["mu"], 0.0, 0.0
        for t, value in enumerate(y):
            mean = mean if t == 0 else p["mu"] + p["phi"] * y[t - 1] + p["theta"] * error
            error = value - mean
            total += sps.norm.logpdf(error, 0, p["sigma"])
        total += sps.norm.logpdf(p["mu"], 0, 10) + sps.norm.logpdf([p["phi"], p["theta"]], 0, 2).sum()
        return total + sps.halfcauchy.logpdf(p["sigma"], 0, 2.5) + x[3]
    if name == "garch-garch11":
        y, variance, total = data["y"], float(data["sigma1"]) ** 2, 0.0
        for t, value in enumerate(y):
            if t:
                variance = p["alpha0"] + p["alpha1"] * (y[t - 1] - p["mu"]) ** 2 + p["beta1"] * variance
            total += sps.norm.logpdf(value, p["mu"], variance**0.5)
        share = p["beta1"] / (1 - p["alpha1"])
        return total + x[1] + np.log(p["alpha1"] * (1 - p["alpha1"]) * (1 - p["alpha1"]) * share * (1 - share))
    if name == "gp_pois_regr-gp_pois_regr":
        square = (data["x"][:, None] - data["x"]) ** 2
        root = np.linalg.cholesky(p["alpha"] ** 2 * np.exp(-square / (2 * p["rho"] ** 2)) + 1e-10 * np.eye(11))
        total = sps.poisson.logpmf(data["k"], np.exp(root @ x[2:])).sum() + sps.norm.logpdf(x[2:]).sum()
        return total + sps.gamma.logpdf(p["rho"], 25, scale=0.25) + sps.norm.logpdf(p["alpha"], 0, 2) + x[0] + x[1]
    theta = np.array([[p[f"theta{i}[{j}]"] for j in (1, 2)] for i in (1, 2)])
    jacobian = np.log(theta[:, 0] * theta[:, 1]).sum()
    if name == "hmm_example-hmm_example":
        mu = np.array([p["mu[1]"], p["mu[2]"]])
        emission = sps.norm.logpdf(data["y"][:, None], mu, 1)
        total = sps.norm.logpdf(mu, [3, 10], 1).sum() + x[2] + x[3]
    else:
        phi, rate = (np.array([p[f"{k}[1]"], p[f"{k}[2]"]]) for k in ("phi", "lambda"))
        total = sps.norm.logpdf(phi, [0, 3], 1).sum() + sps.norm.logpdf(rate, [0, 3], 1).sum()
        total += sum(sps.dirichlet.logpdf(row, a) for row, a in zip(theta, data["alpha"], strict=True))
        u, v = data["u"][:, None], data["v"][:, None]
        if name.startswith("bball_drive_event_0"):
            emission = sps.expon.logpdf(u, scale=1 / phi) + sps.expon.logpdf(v, scale=1 / rate)
            total += x[2:].sum()
        else:
            emission = sps.norm.logpdf(u, phi, data["tau"]) + sps.norm.logpdf(v, rate, data["rho"])
            total += x[3] + x[5]
    forward = emission[0]
    for row in emission[1:]:
        forward = np.logaddexp(forward[0] + np.log(theta[0]), forward[1] + np.log(theta[1])) + row
    return total + jacobian + np.logaddexp(*forward)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_densities_are_those_written_out(name):
    model = posteriors.load(name)
    x = 0.4 * model.starts(6, 2)
    ours = model.log_prob(x).numpy()
    theirs = np.array([scalar(name, row) for row in x])
    assert ours - ours[0] == pytest.approx(theirs - theirs[0], rel=1e-8, abs=1e-8)


def test_hares_and_lynxes_follow_scipy():
    start, rate = np.log([[33.0], [5.9]]), np.array([[0.545], [0.0275], [0.8], [0.024]])
    ours, _ = posteriors.lotka_volterra(start, rate, 20)

    def slope(t, w):
        return [rate[0, 0] - rate[1, 0] * np.exp(w[1]), -rate[2, 0] + rate[3, 0] * np.exp(w[0])]

    exact = solve_ivp(slope, (0, 20), start[:, 0], t_eval=range(1, 21), rtol=1e-10, atol=1e-12, method="DOP853")
    assert np.abs(ours[:, :, 0].T - exact.y).max() < 2e-4


@pytest.mark.parametrize("name", ["earnings-earn_height", "kidiq-kidscore_interaction"])
def test_quick_posteriors_pass_from_stans_starts(name):
    """Scales of a hundred thousand, and coefficients with correlations near one; from log-densities of -1e12."""
    z, high, least, _ = posteriors.run(name)
    assert z < 4
    assert high < 1.01
    assert least > 2000
