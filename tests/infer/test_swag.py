"""SWAG: moments as numpy's, draws with the documented covariance, state dicts that load."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.infer.swag import SWAG


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def network(dtype=torch.float64):
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(dtype)


def follow(model, swag, models, seed=1, offset=0.0):
    """A walk of the parameters; the list of all of them."""
    walk, generator = [], rng(seed)
    for i in range(models):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(offset + (i + 1) ** 0.5 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
        swag.update(model)
        walk.append(flat(model).numpy().copy())
    return np.array(walk)


@pytest.mark.parametrize(("models", "rank"), [(1, 5), (4, 5), (12, 5), (12, 0)])
def test_moments_and_deviations_are_numpy_s(models, rank):
    model = network()
    swag = SWAG(model, rank=rank)
    walk = follow(model, swag, models)
    assert swag.count == models
    assert np.allclose(swag.mean, walk.mean(0))
    assert np.allclose(swag.variance, (walk**2).mean(0) - walk.mean(0) ** 2)
    running = np.cumsum(walk, axis=0) / np.arange(1, models + 1)[:, None]
    expected = (walk - running)[max(models - rank, 0) :] if rank else np.empty((0, walk.shape[1]))
    assert swag.deviations.shape == expected.shape
    assert np.allclose(swag.deviations, expected)


def test_float32_moments_survive_a_large_mean():
    """Where the difference of squares has no digit left."""
    model = nn.Linear(4, 4).float()
    swag = SWAG(model)
    walk = follow(model, swag, 20, offset=3000.0).astype(np.float64)
    assert np.allclose(swag.variance, walk.var(0), rtol=1e-3)
    naive = (walk.astype(np.float32) ** 2).mean(0) - walk.astype(np.float32).mean(0) ** 2
    assert not np.allclose(naive, walk.var(0), rtol=1e-2)


@pytest.mark.parametrize(("rank", "scale"), [(4, 1.0), (4, 0.5), (30, 1.0), (0, 1.0)])
def test_draws_have_the_covariance_of_the_equation(rank, scale):
    model = nn.Linear(2, 2).double()
    swag = SWAG(model, rank=rank)
    follow(model, swag, 8)
    generator, n = rng(3), 6000
    draws = []
    for _ in range(n):
        state = swag.sample(generator, scale=scale)
        draws.append(torch.cat([state["weight"].reshape(-1), state["bias"]]).numpy())
    d = swag.deviations.numpy()
    covariance = np.diag(swag.variance.numpy())
    if rank:
        covariance = covariance / 2 + d.T @ d / (2 * (len(d) - 1))
    covariance *= scale
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((np.mean(draws, axis=0) - swag.mean.numpy()) / sd).max() < 4 / math.sqrt(n)
    assert np.abs((np.cov(np.array(draws).T) - covariance) / np.outer(sd, sd)).max() < 4 * math.sqrt(2 / n)


def test_state_dicts_load_and_carry_the_buffers_of_the_last_model():
    model, fresh = network(), network()
    swag = SWAG(model, rank=3)
    follow(model, swag, 5)
    model(torch.randn(16, 2, dtype=torch.float64, generator=rng(2)))  # moves the running statistics
    swag.update(model)
    fresh.load_state_dict(swag.average())
    assert torch.equal(flat(fresh), swag.mean)
    assert torch.equal(fresh[1].running_mean, model[1].running_mean)
    assert int(fresh[1].num_batches_tracked) == 1
    before = swag.mean.clone()
    draw = swag.sample(1)
    fresh.load_state_dict(draw)
    for value in draw.values():
        value.zero_()
    assert torch.equal(swag.mean, before)  # a draw is the caller's
    assert torch.equal(flat(network_of(swag.sample(2, scale=0.0))), swag.mean)
    loader = [torch.randn(64, 2, dtype=torch.float64, generator=rng(4))]
    stale = fresh[1].running_mean.clone()
    torch.optim.swa_utils.update_bn(loader, fresh)
    assert torch.allclose(fresh[1].running_mean, fresh[0](loader[0]).mean(0))
    assert not torch.allclose(fresh[1].running_mean, stale)


def network_of(state):
    model = network()
    model.load_state_dict(state)
    return model


def test_tied_parameters_stay_tied_and_frozen_ones_stay_put():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(3, 3)
            self.decode = nn.Linear(3, 3)
            self.decode.weight = self.encode.weight
            self.decode.bias.requires_grad_(False)

    model = Tied()
    swag = SWAG(model, rank=2)
    assert len(swag.mean) == 9 + 3 + 3
    for i in range(3):
        with torch.no_grad():
            model.encode.weight.add_(i + 1)
        swag.update(model)
    state = swag.sample(0)
    assert torch.equal(state["encode.weight"], state["decode.weight"])
    assert not torch.equal(state["encode.weight"], model.encode.weight)
    assert torch.equal(state["decode.bias"], model.decode.bias)
    model.load_state_dict(state)


def test_the_same_seed_gives_the_same_draw_and_the_global_generator_is_left_alone():
    model = nn.Linear(2, 2)
    swag = SWAG(model)
    follow(model, swag, 4)
    before = torch.random.get_rng_state()
    a, b, c = swag.sample(1)["weight"], swag.sample(rng(1))["weight"], swag.sample(2)["weight"]
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("rank", [-1, 1, 2.5, True])
def test_ranks_out_of_range_are_named(rank):
    with pytest.raises(InvalidInput, match=r"rank must be a whole|rank=1"):
        SWAG(nn.Linear(1, 1), rank=rank)


def test_what_cannot_work_is_named():
    with pytest.raises(InvalidInput, match="no parameters"):
        SWAG(nn.ReLU())
    with pytest.raises(InvalidInput, match=r"weight is torch.float16"):
        SWAG(nn.Linear(1, 1).half())
    model = nn.Linear(2, 1)
    swag = SWAG(model)
    with pytest.raises(InvalidInput, match="seen 0 of at least 1"):
        swag.average()
    with pytest.raises(InvalidInput, match="other names or shapes"):
        swag.update(nn.Linear(3, 1))
    swag.update(model)
    with pytest.raises(InvalidInput, match="seen 1 of at least 2"):
        swag.sample(0)
    with torch.no_grad():
        model.bias.fill_(math.nan)
    with pytest.raises(InvalidInput, match="parameter bias is not finite"):
        swag.update(model)
    assert swag.count == 1
    with torch.no_grad():
        model.bias.zero_()
    swag.update(model)
    with pytest.raises(InvalidInput, match=r"scale must be a finite number of at least 0"):
        swag.sample(0, scale=-1)
    with pytest.raises(InvalidInput, match="generator is NoneType"):
        swag.sample(None)


def test_what_was_saved_draws_and_goes_on_like_the_original(tmp_path):
    model = network()
    swag = SWAG(model, rank=3)
    follow(model, swag, 5)
    path = swag.save(tmp_path / "swag.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["swag.safetensors"]
    again = SWAG.load(path, network())
    for ours, theirs in zip(again.sample(1).values(), swag.sample(1).values(), strict=True):
        assert torch.equal(ours, theirs)
    other = network()
    other.load_state_dict(model.state_dict())
    follow(model, swag, 2, seed=7)
    follow(other, again, 2, seed=7)
    assert torch.equal(again.mean, swag.mean)
    assert torch.equal(again.variance, swag.variance)
    assert torch.equal(again.deviations, swag.deviations)
    assert (again.count, again.rank) == (7, 3)
    empty = SWAG.load(SWAG(nn.Linear(2, 1), rank=0).save(tmp_path / "empty"), nn.Linear(2, 1))
    assert (empty.count, empty.rank, empty.deviations.shape) == (0, 0, (0, 3))


def test_tied_parameters_and_precision_survive_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    model[1].weight = model[0].weight
    swag = SWAG(model, rank=2)
    follow(model, swag, 4)
    again = SWAG.load(swag.save(tmp_path / "s"), model)
    assert again.mean.dtype == torch.float64
    draw = again.sample(0)
    assert torch.equal(draw["0.weight"], draw["1.weight"])
    model.load_state_dict(draw)


def test_files_of_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    model = nn.Linear(2, 1)
    with pytest.raises(MissingFile, match="there is no file"):
        SWAG.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InvalidInput, match="is damaged, or no safetensors file"):
        SWAG.load(tmp_path / "text", model)
    save_file({"mean": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(InvalidInput, match="holds something else than a SWAG"):
        SWAG.load(tmp_path / "other", model)
    path = SWAG(model).save(tmp_path / "swag")
    with pytest.raises(InvalidInput, match=r"another architecture: it differs in weight \(1 in all\)"):
        SWAG.load(path, nn.Linear(3, 1))
    with pytest.raises(InvalidInput, match=r"differs in 0.bias"):
        SWAG.load(path, nn.Sequential(nn.Linear(2, 1)))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidInput, match="damaged"):
        SWAG.load(path, model)


def test_another_activation_is_refused(tmp_path):
    def made(act):
        return nn.Sequential(nn.Linear(2, 2), act())

    swag = SWAG(made(nn.Tanh), rank=0)
    swag.update(made(nn.Tanh))
    file = swag.save(tmp_path / "swag")
    assert SWAG.load(file, made(nn.Tanh)).count == 1
    with pytest.raises(InvalidInput, match=r"layer 1 is Tanh\(\) there and ReLU\(\) here"):
        SWAG.load(file, made(nn.ReLU))
    with pytest.raises(InvalidInput, match="the model is another one than SWAG was made for"):
        swag.update(made(nn.ReLU))
