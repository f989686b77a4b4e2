"""The audit: distances are those of the metrics, errors cover what another run would give, doubt is said aloud."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.measure import calibration
from mlcollage.papers.bnn_posteriors.auditing import FLOOR, audit, compare
from mlcollage.papers.bnn_posteriors.ensemble import MAP, Ensemble
from mlcollage.papers.bnn_posteriors.hmc import HMC
from mlcollage.papers.bnn_posteriors.laplace import Laplace
from mlcollage.papers.bnn_posteriors.network import BayesianNetwork
from mlcollage.papers.bnn_posteriors.priors import GaussianPrior

N, K = 60, 3
RNG = np.random.default_rng(0)
CENTER = RNG.dirichlet(np.ones(K), size=N)
Y = np.array([RNG.choice(K, p=p) for p in CENTER])


def draws(chains=4, count=30, seed=0, center=CENTER):
    """Independent draws whose average, over endless ones, is ``center``."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.dirichlet(4 * p + 1e-3, size=(chains, count)) for p in center], axis=2)


def test_rows_are_the_metrics_of_the_averages():
    runs = [draws(seed=1), draws(seed=2)]
    rival, single = draws(chains=6, count=1, seed=3), RNG.dirichlet(np.ones(K), size=N)
    report = compare(runs, {"ensemble": rival, "map": torch.from_numpy(single)}, Y)
    reference = np.concatenate(runs).mean((0, 1))
    for name, p in (("ensemble", rival.mean((0, 1))), ("map", single)):
        row = report.table.loc[name]
        assert row["agreement"] == pytest.approx(calibration.agreement(reference, p))
        assert row["total_variation"] == pytest.approx(calibration.total_variation(reference, p))
        assert row["nll"] == pytest.approx(calibration.nll(p, Y))
        assert row["ece_difference"] == pytest.approx(calibration.ece(p, Y) - calibration.ece(reference, Y))
        assert row["brier_difference"] == pytest.approx(calibration.brier(p, Y) - calibration.brier(reference, Y))
    assert report.table.loc["map", "nll_se"] == 0  # one network has no Monte-Carlo error of its own
    assert report.table.loc["map", "nll_difference_se"] > 0
    assert report.table.loc["ensemble", "nll_se"] > 0
    floor = report.table.loc[FLOOR]
    apart = calibration.total_variation(runs[0].mean((0, 1)), runs[1].mean((0, 1)))
    assert floor["total_variation"] == pytest.approx(apart)
    assert list(report.table.index) == ["hmc", FLOOR, "ensemble", "map"]


def test_errors_cover_what_other_runs_give():
    """Sixty reports with fresh reference draws: values spread as their errors say."""
    rival = RNG.dirichlet(np.ones(K), size=N)
    rows = [compare([draws(seed=i), draws(seed=1000 + i)], {"rival": rival}, Y).table.loc["rival"] for i in range(60)]
    table = pd.DataFrame(rows)
    for name in ("total_variation", "nll_difference", "brier_difference"):
        claimed = np.sqrt(np.mean(table[f"{name}_se"] ** 2))
        assert claimed == pytest.approx(table[name].std(), rel=0.35)


def test_floor_is_above_zero_and_falls_with_draws():
    few, many = (compare([draws(count=n, seed=1), draws(count=n, seed=2)], {}, Y).table.loc[FLOOR] for n in (8, 128))
    assert few["total_variation"] > 2 * many["total_variation"] > 0
    three = compare([draws(seed=i) for i in range(3)], {}, Y)
    assert three.runs == 3
    assert 0 < three.table.loc[FLOOR, "total_variation"] < 0.2


def test_a_reference_whose_chains_disagree_is_doubted():
    rolled = [draws(chains=1, seed=i, center=np.roll(CENTER, i, axis=1)) for i in range(4)]
    stuck = np.concatenate(rolled)
    with pytest.warns(UserWarning, match="the HMC reference has not converged: R-hat is below 1.1 for"):
        report = compare([stuck, stuck], {}, Y)
    assert not report.converged
    assert "WARNING: the HMC reference has not converged" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = compare([draws(count=100, seed=1), draws(count=100, seed=2)], {}, Y)
    assert good.converged
    assert good.doubt == ""
    assert good.rhat.shape == (N, K)
    assert good.share_converged > 0.95


def test_reports_can_be_read_taken_along_and_drawn():
    rivals = {"map": RNG.dirichlet(np.ones(K), size=N), "coin": np.full((N, K), 1 / K)}
    report = compare([draws(seed=1), draws(seed=2)], rivals, Y)
    text = str(report)
    assert "2 runs of 4 chains of 30 draws" in text
    assert "Two runs of the reference agree in" in text
    assert text.count("±") == 4 + 2 + 6 * 2
    frame = report.to_frame()
    frame.iloc[:] = 0
    assert report.table.loc["coin", "total_variation"] > 0
    ax = report.plot(Figure().subplots())
    assert {t.get_text() for t in ax.texts} >= {"map", "coin"}
    assert ax.get_ylim()[1] == 1


def problem(n=120):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=rng)
    y = (x[:, 0] - x[:, 1] + 0.7 * torch.randn(n, generator=rng) > 0).long()
    return x[: n // 2], y[: n // 2], x[n // 2 :], y[n // 2 :]


REFERENCE = HMC(chains=4, draws=60, warmup=40, jitter=0.3)


def test_an_audit_of_a_network_finds_near_what_is_near():
    data = problem()
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    before = [p.detach().clone() for p in net.parameters()]
    told = []
    coin = torch.full((60, 2), 0.5)
    report = audit(
        net,
        data,
        [MAP(steps=300, lr=0.03), Ensemble(members=3, steps=300, lr=0.03), Laplace(steps=300, lr=0.03)],
        predictions={"coin": coin},
        prior=GaussianPrior(0.5),
        reference=REFERENCE,
        progress=told.append,
    )
    assert told == ["hmc, run 1 of 2", "hmc, run 2 of 2", "map", "ensemble", "laplace"]
    assert report.converged
    table = report.table
    assert table.loc["laplace", "total_variation"] < 0.5 * table.loc["coin", "total_variation"]
    assert table.loc[FLOOR, "total_variation"] < table.loc["map", "total_variation"]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    again = audit(net, data, (), prior=GaussianPrior(0.5), reference=REFERENCE)
    pd.testing.assert_series_equal(again.table.loc["hmc"], table.loc["hmc"])


def test_a_workload_and_a_bayesian_network_are_audited_too():
    x, y, x_test, y_test = problem()
    workload = Labeled(TensorDataset(x, y), TensorDataset(x_test, y_test), 2)
    bnn = BayesianNetwork(nn.Linear(4, 2), prior=GaussianPrior(0.5))
    mine = bnn.fit(x, y, MAP()).predict_proba(x_test)
    report = audit(bnn, workload, {"one": MAP(steps=9)}, predictions={"mine": mine}, reference=REFERENCE)
    assert list(report.table.index) == ["hmc", FLOOR, "one", "mine"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: compare([draws()], {}, Y), r"two of \(chains, draws, N, K\) are needed"),
        (lambda: compare([draws(), draws()[:2]], {}, Y), "the reference has runs of shape"),
        (
            lambda: compare([draws(), draws()], {"x": CENTER[:5]}, Y),
            r"x have shape \(5, 3\); .* \(60, 3\)",
        ),
        (lambda: compare([draws(), draws()], {"x": "map"}, Y), "predictions of x have shape"),
        (lambda: compare([draws(), draws()], {}, Y[:5]), "whole-number classes"),
        (lambda: audit(nn.Linear(4, 2), problem(), groups=1), "groups must be a whole number of at least 2, not 1"),
        (lambda: audit(nn.Linear(4, 2), problem()[:2]), r"data is tuple; \(X, y, X_test, y_test\)"),
        (lambda: audit(nn.Linear(4, 2), problem(), [MAP(), MAP(steps=5)]), "two rows would be called 'map'"),
        (lambda: audit(nn.Linear(4, 2), problem(), [HMC()]), "two rows would be called 'hmc'"),
        (lambda: audit(nn.Linear(4, 2), problem(), ["map"]), "method is 'map'; pass an object"),
        (lambda: audit(nn.Linear(4, 2), problem(), likelihood="gaussian"), "one of classes is needed"),
    ],
)
def test_bad_input_gets_one_sentence(call, says):
    with pytest.raises(InvalidInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
