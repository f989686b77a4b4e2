"""Posteriors in files, in ArviZ, and runs that are killed and go on to the same numbers."""

import json

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import BayesianModule, GaussianPrior, Layout, Posterior

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
SETTINGS = {"chains": 2, "samples": 9, "burn_in": 3, "warmup": 12, "thin": 2, "seed": 3}


def model(width=5):
    net = build(lambda: nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)), 0)
    return BayesianModule(net, prior=GaussianPrior(1.0))


def test_a_posterior_comes_back_from_its_file(tmp_path):
    fitted = model().fit(X, Y, at=X[:4], **SETTINGS)
    fitted.save(tmp_path / "deep" / "p.safetensors")
    again = model().load(tmp_path / "deep" / "p.safetensors")
    assert torch.equal(again.posterior.params, fitted.posterior.params)
    assert again.posterior.method == "hmc"
    assert again.posterior.info == json.loads(json.dumps(fitted.posterior.info))
    assert set(again.posterior.sample_stats) == {"accept_prob", "energy", "diverging", "lp", "n_steps", "step_size"}
    torch.testing.assert_close(again.predict_proba(X), fitted.predict_proba(X))
    torch.testing.assert_close(again.posterior.stream.proba, fitted.posterior.stream.proba)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.safetensors"]


def test_streamed_predictions_come_back_too(tmp_path):
    fitted = model().fit(X, Y, store="predictions", at=X[:4], **SETTINGS)
    fitted.save(tmp_path / "p.safetensors")
    again = model().load(tmp_path / "p.safetensors")
    torch.testing.assert_close(again.predict_proba(), fitted.predict_proba())
    assert (again.function_rhat() == fitted.function_rhat()).all()


def test_files_of_another_network_or_kind_are_refused(tmp_path):
    file = tmp_path / "p.safetensors"
    model().fit(X, Y, **SETTINGS).save(file)
    with pytest.raises(InvalidInput, match=r"another architecture: 0.weight has shape \(7, 2\) in the one"):
        model(7).load(file)
    with pytest.raises(MissingFile, match="there is no file"):
        model().load(tmp_path / "q.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidInput, match="no safetensors file"):
        model().load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InvalidInput, match="holds no posterior"):
        model().load(tmp_path / "other")
    with pytest.raises(InvalidInput, match="not fitted yet"):
        model().save(file)


class Killed(Exception):
    pass


def killed_at(iteration):
    def progress(done, total):
        if done == iteration:
            raise Killed

    return progress


@pytest.mark.parametrize("store", ["params", "predictions"])
@pytest.mark.parametrize("step_size", [None, 0.05])
def test_a_killed_run_goes_on_to_the_numbers_of_an_uninterrupted_one(tmp_path, store, step_size):
    settings = {**SETTINGS, "store": store, "at": X[:3], "step_size": step_size, "checkpoint_every": 2}
    whole = model().fit(X, Y, checkpoint=tmp_path / "whole", **settings).posterior
    for iteration in (10, 21, 26):  # in warm-up, and twice while drawing
        with pytest.raises(Killed):
            model().fit(X, Y, checkpoint=tmp_path / "cut", progress=killed_at(iteration), **settings)
    resumed = model().fit(X, Y, checkpoint=tmp_path / "cut", **settings).posterior
    if store == "params":
        assert torch.equal(resumed.params, whole.params)
    assert torch.equal(resumed.stream.proba, whole.stream.proba)
    assert torch.equal(resumed.sample_stats["lp"], whole.sample_stats["lp"])
    assert torch.equal(resumed.sample_stats["step_size"], whole.sample_stats["step_size"])
    finished = model().fit(X, Y, checkpoint=tmp_path / "cut", **settings).posterior  # nothing is left to do
    assert torch.equal(finished.stream.proba, whole.stream.proba)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    run = {**SETTINGS, "checkpoint": tmp_path}
    model().fit(X, Y, **run)
    with pytest.raises(InvalidInput, match="another architecture"):
        model(7).fit(X, Y, **run)
    with pytest.raises(InvalidInput, match="other settings"):
        model().fit(X, Y, **{**run, "temperature": 0.5})
    with pytest.raises(InvalidInput, match="other data"):
        model().fit(X + 1, Y, **run)
    other = BayesianModule(model().module, prior=GaussianPrior(2.0))
    with pytest.raises(InvalidInput, match="other prior"):
        other.fit(X, Y, **{**run, "trajectory_length": 1.0})
    with pytest.raises(InvalidInput, match="what a function keeps"):
        model().fit(X, Y, store=lambda q: q, **run)
    (tmp_path / "state.safetensors").write_bytes(b"garbage")
    with pytest.raises(InvalidInput, match="damaged or no checkpoint"):
        model().fit(X, Y, **run)


def test_arviz_has_a_variable_a_parameter():
    data = model().fit(X, Y, **SETTINGS).posterior.to_arviz()
    assert data.posterior["0.weight"].shape == (2, 9, 5, 2)
    assert data.sample_stats["accept_prob"].shape == (2, 9)


def test_one_draw_loads_into_the_network():
    fitted = model().fit(X, Y, **SETTINGS)
    net = model().module
    net.load_state_dict(fitted.posterior.state_dict(1, 4))
    torch.testing.assert_close(net(X).softmax(-1), fitted.predict_samples(X)[1, 4])


def test_thinning_and_shapes():
    posterior = model().fit(X, Y, **SETTINGS).posterior
    assert torch.equal(posterior.thinned(4).params, posterior.params[:, [0, 4, 8]])
    assert posterior.thinned(4).sample_stats["lp"].shape == (2, 3)
    with pytest.raises(InvalidInput, match="every=0"):
        posterior.thinned(0)
    with pytest.raises(InvalidInput, match=r"\(chain, draw, 27\) is needed"):
        Posterior(posterior.layout, "x", torch.zeros(2, 27))
    assert torch.isnan(torch.tensor(Posterior(posterior.layout, "x").accept_rate))


def test_layouts_say_how_they_differ():
    a = Layout(("a", "b"), ((2,), (3,)))
    assert a.difference(Layout(("a", "b"), ((2,), (3,)))) is None
    assert "b is only in the one" in a.difference(Layout(("a",), ((2,),)))
    assert "their order differs" in a.difference(Layout(("b", "a"), ((3,), (2,))))
