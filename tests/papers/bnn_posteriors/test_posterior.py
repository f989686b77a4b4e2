"""Posteriors in files, in ArviZ, and runs that are killed and go on to the same numbers."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import HMC, BayesianNetwork, GaussianPrior, Layout, Posterior

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
METHOD = HMC(chains=2, draws=9, burn_in=3, warmup=12, thin=2)


def bnn(width=5):
    net = build(lambda: nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)), 0)
    return BayesianNetwork(net, prior=GaussianPrior(1.0))


def fit(method=METHOD, network=None, x=X, **where):
    return (network or bnn()).fit(x, Y, method, generator=3, **where)


def test_a_posterior_comes_back_from_its_file(tmp_path):
    fitted = fit(replace(METHOD, at=X[:4]))
    assert fitted.save(tmp_path / "deep" / "p.safetensors") == tmp_path / "deep" / "p.safetensors"
    again = Posterior.load(tmp_path / "deep" / "p.safetensors", bnn())
    assert torch.equal(again.params, fitted.params)
    assert again.method == "hmc"
    assert again.info == json.loads(json.dumps(fitted.info))
    assert set(again.sample_stats) == {"accept_prob", "energy", "diverging", "lp", "n_steps", "step_size"}
    torch.testing.assert_close(again.predict_proba(X), fitted.predict_proba(X))
    torch.testing.assert_close(again.stream.proba, fitted.stream.proba)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.safetensors"]
    alone = Posterior.load(tmp_path / "deep" / "p.safetensors")
    assert torch.equal(alone.params, fitted.params)
    with pytest.raises(InvalidInput, match="knows no network to predict with"):
        alone.predict_proba(X)


def test_streamed_predictions_come_back_too(tmp_path):
    fitted = fit(replace(METHOD, store="predictions", at=X[:4]))
    again = Posterior.load(fitted.save(tmp_path / "p.safetensors"), bnn())
    torch.testing.assert_close(again.predict_proba(), fitted.predict_proba())
    assert (again.function_rhat() == fitted.function_rhat()).all()


def test_files_of_another_network_or_kind_are_refused(tmp_path):
    file = fit().save(tmp_path / "p.safetensors")
    with pytest.raises(InvalidInput, match=r"another architecture: 0.weight has shape \(7, 2\) in the one"):
        Posterior.load(file, bnn(7))
    with pytest.raises(MissingFile, match="there is no file"):
        Posterior.load(tmp_path / "q.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidInput, match="no safetensors file"):
        Posterior.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InvalidInput, match="holds something else than a posterior"):
        Posterior.load(tmp_path / "other")


def test_arviz_has_one_variable_per_parameter():
    data = fit().to_arviz()
    assert data.posterior["0.weight"].shape == (2, 9, 5, 2)
    assert data.sample_stats["accept_prob"].shape == (2, 9)


def test_one_draw_loads_into_the_network():
    fitted = fit()
    net = bnn().module
    net.load_state_dict(fitted.state_dict(1, 4))
    torch.testing.assert_close(net(X).softmax(-1), fitted.predict_draws(X)[1, 4])


def test_thinning_and_shapes():
    posterior = fit()
    assert torch.equal(posterior.thinned(4).params, posterior.params[:, [0, 4, 8]])
    assert posterior.thinned(4).sample_stats["lp"].shape == (2, 3)
    with pytest.raises(InvalidInput, match=r"every must be .* not 0"):
        posterior.thinned(0)
    with pytest.raises(InvalidInput, match=r"batch_size must be .* not 0"):
        posterior.predict_proba(X, batch_size=0)
    with pytest.raises(InvalidInput, match=r"\(chain, draw, 27\) is needed"):
        Posterior(posterior.layout, "x", torch.zeros(2, 27))
    assert torch.isnan(torch.tensor(Posterior(posterior.layout, "x").accept_rate))


def test_layouts_say_how_they_differ():
    a = Layout(("a", "b"), ((2,), (3,)))
    assert a.difference(Layout(("a", "b"), ((2,), (3,)))) is None
    assert "b is only in the one" in a.difference(Layout(("a",), ((2,),)))
    assert "their order differs" in a.difference(Layout(("b", "a"), ((3,), (2,))))
