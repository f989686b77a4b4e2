"""Runs that are killed or extended give the draws of one that was not; under anything else they are refused."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import (
    HMC,
    MAP,
    NUTS,
    SGHMC,
    SGLD,
    BayesianNetwork,
    CustomLikelihood,
    CyclicalSGHMC,
    EmpCovPrior,
    GaussianLikelihood,
    GaussianMixturePrior,
    GaussianPrior,
    LaplacePrior,
    Posterior,
    StudentTPrior,
)
from mlcollage.papers.bnn_posteriors.fingerprint import fingerprint

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def bnn(width=5, prior=None, **settings):
    net = build(lambda: nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)), 0)
    return BayesianNetwork(net, prior=prior or GaussianPrior(1.0), **settings)


def fit(method, network=None, x=X, y=Y, seed=3, **where):
    return (network or bnn()).fit(x, y, method, generator=seed, **where)


class Killed(Exception):
    pass


def killed_at(iteration):
    def progress(done, total):
        if done == iteration:
            raise Killed

    return progress


METHODS = {
    "hmc": HMC(chains=2, draws=9, burn_in=5, warmup=26, thin=2, jitter=0.1),
    "hmc with a mass": HMC(chains=2, draws=9, burn_in=3, warmup=25, thin=2, mass="diagonal", trajectory_length=0.8),
    "hmc without adaptation": HMC(chains=2, draws=9, burn_in=3, warmup=25, thin=2, step_size=0.05),
    "nuts": NUTS(chains=2, draws=9, warmup=26, thin=2, max_depth=3),
    "sgld": SGLD(chains=2, draws=9, thin=2, burn_in=25, lr=1e-3, batch_size=7),
    "sghmc": SGHMC(chains=2, draws=9, thin=2, burn_in=25, batch_size=30, rmsprop=0.9),
    "cyclical": CyclicalSGHMC(
        chains=2, draws=9, thin=1, cycle_length=4, burn_in=8, lr=1e-3, batch_size=8, rmsprop=0.99
    ),
}
KILLED = (4, 17, 30, 37)  # in burn-in, in warm-up, and twice while drawing


def same(a, b):
    assert (a.params is None) == (b.params is None)
    assert a.params is None or torch.equal(a.params, b.params)
    assert set(a.sample_stats) == set(b.sample_stats)
    for name, value in a.sample_stats.items():
        assert torch.equal(value, b.sample_stats[name]), name
    assert (a.stream is None) == (b.stream is None)
    if a.stream is not None:
        assert torch.equal(a.stream.proba, b.stream.proba)
        assert torch.equal(a.stream.diagnostics.ess(), b.stream.diagnostics.ess())
    assert a.info == b.info


@pytest.mark.parametrize("store", ["params", "predictions"])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_to_the_draws_of_an_uninterrupted_one(tmp_path, name, store):
    method = replace(METHODS[name], store=store, at=X[:3] if store == "predictions" else None)
    whole = fit(method)
    cut = replace(method, checkpoint=tmp_path, checkpoint_every=2)
    for iteration in KILLED:
        with pytest.raises(Killed):
            fit(cut, progress=killed_at(iteration))
    same(fit(cut), whole)
    same(fit(cut), whole)  # nothing is left to do
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("name", METHODS)
def test_an_extended_run_is_one_longer_run(tmp_path, name):
    short = replace(METHODS[name], at=X[:3])
    longer = fit(replace(short, draws=14))
    first = fit(short)
    kept = first.params.clone(), first.stream.proba
    same(first.extend(5), longer)
    same(first.extend(2).extend(3), longer)
    assert torch.equal(first.params, kept[0])  # the first one stays as it is
    assert torch.equal(first.stream.proba, kept[1])
    in_folder = replace(short, checkpoint=tmp_path)
    fit(in_folder)
    same(fit(replace(in_folder, draws=14, checkpoint_every=3)), longer)
    same(fit(replace(in_folder, draws=14)).extend(2), fit(replace(short, draws=16)))
    with pytest.raises(InvalidInput, match="has 16 draws already; ask for as many, not 9"):
        fit(in_folder)


def test_what_has_no_run_is_not_extended(tmp_path):
    for posterior in (
        fit(MAP(steps=2)),
        fit(METHODS["hmc"]).thinned(2),
        Posterior.load(fit(METHODS["hmc"]).save(tmp_path / "p")),
    ):
        with pytest.raises(InvalidInput, match="no run to go on with; fit with more draws"):
            posterior.extend(3)
    with pytest.raises(InvalidInput, match=r"draws must be .* not 0"):
        fit(METHODS["hmc"]).extend(0)


class Scaled(nn.Module):
    """Settings that no parameter shows: a number, a buffer, a frozen layer, an activation."""

    def __init__(self, scale=1.0, shift=0.0, frozen=0, slope=0.1):
        super().__init__()
        self.scale, self.a = scale, nn.Linear(2, 5)
        self.frozen, self.b, self.act = nn.Linear(5, 5).requires_grad_(False), nn.Linear(5, 2), nn.LeakyReLU(slope)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        self.frozen.load_state_dict(build(lambda: nn.Linear(5, 5), frozen).state_dict())

    def forward(self, x):
        return self.b(self.act(self.frozen(self.a(x))) * self.scale + self.shift)


def scaled(prior=None, **settings):
    return BayesianNetwork(build(lambda: Scaled(**settings), 0), prior=prior or GaussianPrior(1.0))


def own(power):
    return CustomLikelihood(lambda out, y: -((out[:, 0] - y) ** power))


def noisy(likelihood):
    return BayesianNetwork(build(lambda: nn.Linear(2, 1), 0), likelihood, GaussianPrior(1.0))


RUN = HMC(chains=2, draws=4, burn_in=1, warmup=10, trajectory_length=0.3)
ROWS = EmpCovPrior.from_inputs(X, "a.weight")
REGRESSION = {"y": X[:, 0]}
OTHERS = {  # what a run has, what another one has, and how the refusal calls it
    "architecture": ({}, {"network": bnn(7)}, "network"),
    "number in the module": ({"network": scaled()}, {"network": scaled(scale=1.5)}, "network"),
    "buffer": ({"network": scaled()}, {"network": scaled(shift=0.1)}, "network"),
    "frozen values": ({"network": scaled()}, {"network": scaled(frozen=1)}, "network"),
    "activation": ({"network": scaled()}, {"network": scaled(slope=0.2)}, "network"),
    "prior": ({}, {"network": bnn(prior=GaussianPrior(2.0))}, "prior"),
    "family of the prior": ({}, {"network": bnn(prior=StudentTPrior(5.0, 1.0))}, "prior"),
    "weights of a mixture": (
        {"network": bnn(prior=GaussianMixturePrior((0.5, 1.0), (0.5, 0.5)))},
        {"network": bnn(prior=GaussianMixturePrior((0.5, 1.0), (0.4, 0.6)))},
        "prior",
    ),
    "inputs of the prior": (
        {"network": scaled(ROWS)},
        {"network": scaled(EmpCovPrior.from_inputs(X * 1.1, "a.weight"))},
        "prior",
    ),
    "noise": (
        {"network": noisy(GaussianLikelihood(0.5)), **REGRESSION},
        {"network": noisy(GaussianLikelihood(0.6)), **REGRESSION},
        "likelihood",
    ),
    "closure of the likelihood": (
        {"network": noisy(own(2)), **REGRESSION},
        {"network": noisy(own(4)), **REGRESSION},
        "likelihood",
    ),
    "code of the likelihood": (
        {"network": noisy(CustomLikelihood(lambda out, y: -(out[:, 0] - y).abs())), **REGRESSION},
        {"network": noisy(CustomLikelihood(lambda out, y: -(out[:, 0] - y).square())), **REGRESSION},
        "likelihood",
    ),
    "inputs": ({}, {"x": X + 1e-3}, "data"),
    "targets": ({}, {"y": 1 - Y}, "data"),
    "seed": ({}, {"seed": 4}, "seed"),
    "first positions": ({"init": "prior"}, {"init": "module"}, "init"),
    "chunks": ({}, {"chunk_size": 7}, "chunk_size"),
    "path": ({}, {"network": bnn(backend="loop")}, "backend"),
    "precision": ({}, {"network": BayesianNetwork(bnn().module.double(), prior=GaussianPrior(1.0))}, "data, network"),
    "temperature": ({}, {"method": replace(RUN, temperature=0.5)}, "temperature"),
    "mass": (
        {"method": replace(RUN, mass=torch.ones(27))},
        {"method": replace(RUN, mass=2 * torch.ones(27))},
        "mass",
    ),
    "several": ({}, {"method": replace(RUN, jitter=0.1, thin=2)}, "thin, jitter"),
    "method": ({}, {"method": NUTS(chains=2, draws=4, warmup=10)}, "method"),
    "predicted inputs": ({"method": replace(RUN, at=X[:3])}, {"method": replace(RUN, at=X[:4])}, "at"),
    "batches": (
        {"method": SGLD(chains=2, draws=4, burn_in=5, batch_size=5)},
        {"method": SGLD(chains=2, draws=4, burn_in=5, batch_size=6)},
        "batch_size",
    ),
    "augmentation": (
        {"method": SGLD(chains=2, draws=4, burn_in=5, transform=partial(torch.mul, other=2))},
        {"method": SGLD(chains=2, draws=4, burn_in=5, transform=partial(torch.mul, other=3))},
        "transform",
    ),
}


@pytest.mark.filterwarnings("ignore:with augmentation")
@pytest.mark.parametrize("what", OTHERS)
def test_a_run_goes_on_only_under_what_it_began_with(tmp_path, what):
    mine, other, said = OTHERS[what]
    mine, other = ({"method": RUN, **mine, **more} for more in ({}, other))
    for run in (mine, other):
        run["method"] = replace(run["method"], checkpoint=tmp_path)
    began = fit(**mine)
    same(fit(**mine), began)
    with pytest.raises(InvalidInput, match=rf"holds a run with another (.*, )?{said}.*; give another folder"):
        fit(**other)


def test_another_density_that_no_setting_shows_is_found_by_trying(tmp_path, monkeypatch):
    def log_prob(out, y):
        return -(((out[:, 0] - y) / float(os.environ["NOISE"])) ** 2)

    monkeypatch.setenv("NOISE", "1")
    run = {"method": replace(RUN, checkpoint=tmp_path), **REGRESSION}
    same(fit(network=noisy(log_prob), **run), fit(network=noisy(log_prob), **run))
    monkeypatch.setenv("NOISE", "3")
    with pytest.raises(InvalidInput, match=r"another density: at the chains' positions its logarithm was -.* and is -"):
        fit(network=noisy(log_prob), **run)


def test_a_resumed_run_takes_the_path_that_it_began_with(tmp_path, monkeypatch):
    from mlcollage.papers.bnn_posteriors import function

    def network():
        return BayesianNetwork(build(lambda: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2)), 0))

    run = replace(RUN, checkpoint=tmp_path, checkpoint_every=2)
    for fast, slow in (("loop", "vmap"), ("vmap", "loop")):
        monkeypatch.setattr(function, "_seconds", lambda backend, q, batch, s=slow: 1.0 + (backend.name == s))
        if fast == "loop":
            with pytest.raises(Killed):
                fit(run, network(), progress=killed_at(14))
    resumed = fit(run, network())
    assert resumed.info["backend"] == "loop"
    same(resumed, fit(RUN, BayesianNetwork(network().module, backend="loop")))


def test_damaged_and_foreign_folders_are_refused_in_a_sentence(tmp_path):
    run = replace(RUN, checkpoint=tmp_path / "a", checkpoint_every=2)
    fit(run)
    state, block = tmp_path / "a" / "state.safetensors", tmp_path / "a" / "draws-000002-000004.safetensors"
    fit(replace(run, checkpoint=tmp_path / "b"), seed=4)
    for file, change, said in (
        (state, lambda data: b"garbage", "is damaged, or no safetensors file"),
        (state, lambda data: data[:-3], "is damaged"),
        (state, lambda data: data[:-3] + bytes([data[-3] ^ 16]) + data[-2:], "its content is not what was written"),
        (block, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its content is not what was written"),
        (block, lambda data: (tmp_path / "b" / block.name).read_bytes(), "is of another run"),
        (block, lambda data: state.read_bytes(), "holds something else than a block of draws"),
        (state, lambda data: fit(RUN).save(tmp_path / "p").read_bytes(), "something else than a state of a run"),
    ):
        data = file.read_bytes()
        file.write_bytes(change(data))
        with pytest.raises(InvalidInput, match=said) as caught:
            fit(run)
        assert "\n" not in str(caught.value)
        file.write_bytes(data)
    same(fit(run), fit(RUN))
    block.unlink()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        fit(run)
    with pytest.raises(InvalidInput, match="what a function keeps"):
        fit(replace(run, store=lambda q: q))


_RUN_IN_A_PROCESS = """
import os, sys, test_resuming as t
from dataclasses import replace
def progress(done, total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
t.fit(replace(t.METHODS[sys.argv[2]], checkpoint=sys.argv[1], checkpoint_every=1), progress=progress)
"""


@pytest.mark.parametrize("name", ["nuts"])
def test_a_process_that_is_killed_leaves_a_run_that_another_one_finishes(tmp_path, name):
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", _RUN_IN_A_PROCESS, str(tmp_path), name, "29"], env=where, check=False, cwd=tmp_path
    )
    assert done.returncode == -9
    same(fit(replace(METHODS[name], checkpoint=tmp_path)), fit(METHODS[name]))


SCALE = 2.0


def by_scale(x):
    return SCALE * x


def test_fingerprints_see_values_code_and_names_and_nothing_else():
    class Own:
        def __init__(self, a):
            self.a, self.b = a, {"x": [1, 2]}

    pairs = [
        (1, 1.0), (1, True), ("1", 1), ([1, 2], [2, 1]), ({"a": 1}, {"a": 2}), (None, 0), (0.1, 0.1 + 2e-17),
        (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), torch.zeros(2).double()), (np.zeros(2), np.ones(2)),
        (lambda x: x + 1, lambda x: x - 1), (lambda x: x + 1, lambda x: x + 2), (Own(1), Own(2)),
        (lambda x, a=1: x, lambda x, a=2: x), (partial(pow, 2), partial(pow, 3)), (nn.ReLU(), nn.Tanh()),
        (torch.sin, torch.cos), (GaussianPrior(0.5), LaplacePrior(0.5)), (nn.GELU(), nn.GELU("tanh")),
        (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1)), (nn.Dropout(0.1), nn.Dropout(0.1).eval()),
        (nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)),
    ]  # fmt: skip
    for a, b in pairs:
        assert fingerprint(a) != fingerprint(b), (a, b)
    for make in (
        lambda: Own(1), lambda: nn.LSTM(2, 3), lambda: lambda x: x + 1, lambda: {3, 1}, lambda: {"b": 1, "a": 2},
    ):  # fmt: skip
        assert fingerprint(make()) == fingerprint(make())
    before = fingerprint(by_scale)
    globals()["SCALE"] = 3.0
    assert fingerprint(by_scale) != before
    looped = Own(1)
    looped.a = looped
    assert fingerprint(looped)
