"""LARS against fifty steps of the official code and a plain transcription of its equations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.train import LARS, split_bias_and_norm

NAMES = ("w2", "w4", "wzero", "wzerograd", "wzeroboth", "wnone", "b1", "bzero", "bnone", "s0", "w11", "b11")


@pytest.fixture(scope="module")
def official():
    with np.load(Path(__file__).parent / "oracles" / "lars" / "lars.npz") as file:
        return dict(file)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, torch.float64) for c in ("official", "heavy", "nofilter", "nowd")] + [("official", torch.float32)],
)
def test_fifty_steps_are_those_of_the_official_code(official, case, dtype):
    decay, momentum, eta, no_decay, no_adaptation = official[f"{case}/settings"]
    assert no_decay == no_adaptation
    params = {name: nn.Parameter(torch.tensor(official[f"p0/{name}"], dtype=dtype)) for name in NAMES}
    groups = [{"params": [p for p in params.values() if (p.ndim == 1) == flat]} for flat in (False, True)]
    optimizer = LARS(
        groups,
        lr=0.0,
        momentum=momentum,
        weight_decay=decay,
        trust_coefficient=eta,
        exclude="1d" if no_decay else "none",
    )
    recorded, found = list(official["record_after"]), {name: [] for name in NAMES}
    for step, rates in enumerate(official["lr"]):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = float(lr)
        for name, p in params.items():
            there = official[f"has_grad/{name}"][step]
            p.grad = torch.tensor(official[f"grad/{name}"][step], dtype=dtype) if there else None
        optimizer.step()
        if step + 1 in recorded:
            for name, p in params.items():
                found[name].append(p.detach().numpy().copy())
    exact = dtype == torch.float64
    key = case if exact else f"{case}_f32"
    for name in NAMES:
        expected = official[f"{key}/p/{name}"]
        np.testing.assert_allclose(np.stack(found[name]), expected, rtol=0, atol=1e-12 if exact else 2e-6, err_msg=name)
        if exact:
            moment = optimizer.state[params[name]].get("momentum_buffer")
            theirs = official[f"{case}/mu/{name}"]
            assert (moment is None) == (theirs.size == 0)
            if moment is not None:
                np.testing.assert_allclose(moment.numpy(), theirs, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("clip", [False, True])
def test_the_original_variant_follows_its_equations(clip):
    rng = np.random.default_rng(0)
    w, bias, m = rng.normal(size=(4, 3)), rng.normal(size=4), np.zeros((4, 3))
    params = [nn.Parameter(torch.tensor(z)) for z in (w, bias)]
    settings = {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.02, "eps": 1e-8}
    optimizer = LARS(params, lr=0.01, variant="you2017", clip=clip, **settings)
    b_m = np.zeros(4)
    for step in range(50):
        lr = 0.01 * (step + 1) / 50
        optimizer.param_groups[0]["lr"] = lr
        g, b_g = rng.normal(size=(4, 3)) * 10.0 ** rng.integers(-3, 2), rng.normal(size=4)
        for p, grad in zip(params, (g, b_g), strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
        norm = np.linalg.norm(w)
        ratio = 0.02 * norm / (np.linalg.norm(g) + 0.1 * norm + 1e-8)
        ratio = min(ratio / lr, 1.0) if clip else ratio
        m = 0.9 * m + lr * ratio * (g + 0.1 * w)
        w = w - m
        b_m = 0.9 * b_m + lr * b_g
        bias = bias - b_m
    np.testing.assert_allclose(params[0].detach().numpy(), w, atol=1e-12)
    np.testing.assert_allclose(params[1].detach().numpy(), bias, atol=1e-12)


def test_scalars_are_excluded_unless_the_official_way_is_asked_for():
    def moved(exclude):
        scale = nn.Parameter(torch.tensor(2.0))
        scale.grad = torch.tensor(5.0)
        LARS([scale], lr=1.0, momentum=0.0, trust_coefficient=0.1, exclude=exclude).step()
        return 2.0 - scale.item()

    assert moved("below_2d") == pytest.approx(5.0)
    assert moved("1d") == pytest.approx(0.2)
    assert moved("none") == pytest.approx(0.2)


def test_the_size_of_gradients_does_not_matter_to_weights():
    def path(scale):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4, bias=False)
        optimizer = LARS(layer.parameters(), lr=0.5)
        for step in range(5):
            layer.weight.grad = scale * torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return layer.weight.detach()

    torch.testing.assert_close(path(1.0), path(1000.0))


def test_a_resumed_optimizer_goes_on_as_if_it_had_never_stopped():
    def run(optimizer, p, steps):
        for step in steps:
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    whole = nn.Parameter(torch.ones(4, 3))
    optimizer = LARS([whole], lr=0.1, weight_decay=0.01)
    run(optimizer, whole, range(10))
    half = nn.Parameter(torch.ones(4, 3))
    first = LARS([half], lr=0.1, weight_decay=0.01)
    run(first, half, range(5))
    second = LARS([half], lr=9.0)
    second.load_state_dict(first.state_dict())
    run(second, half, range(5, 10))
    assert torch.equal(whole, half)


def test_closures_half_precision_and_schedulers_work():
    p = nn.Parameter(torch.full((300, 300), 8.0, dtype=torch.float16))  # its norm, 2400, squares beyond a half
    optimizer = LARS([p], lr=1.0, momentum=0.0, trust_coefficient=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)

    def closure():
        optimizer.zero_grad()
        loss = p.float().square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 64.0
    scheduler.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 7.92), atol=0.01, rtol=0)


def test_bad_settings_are_refused():
    p = nn.Parameter(torch.ones(2, 2))
    for bad in ({"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"trust_coefficient": 0.0}, {"eps": -1.0}):
        with pytest.raises(InvalidInput, match=next(iter(bad))):
            LARS([p], **bad)
    with pytest.raises(UnknownName, match="variant"):
        LARS([{"params": [p], "variant": "apex"}])
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = LARS(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InvalidInput, match="sparse"):
        optimizer.step()


def test_parameters_are_split_into_weights_and_the_rest():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1, 4))  # two axes, and still a norm's

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "n": RMSNorm(), "ln": nn.LayerNorm((2, 4)), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight  # tied
    model.register_parameter("pos_embed", nn.Parameter(torch.ones(1, 3, 4)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(3, 3), requires_grad=False))
    names = {id(p): name for name, p in model.named_parameters()}

    def split(**how):
        return [sorted(names[id(p)] for p in g["params"]) for g in split_bias_and_norm(model, **how)]

    rest = ["a.bias", "b.bias", "ln.bias", "ln.weight", "n.gain"]
    assert split() == [["a.weight", "pos_embed"], rest]
    assert split(also="*embed") == [["a.weight"], sorted([*rest, "pos_embed"])]
    assert split_bias_and_norm(model, lr=0.1)[1]["weight_decay"] == 0.0
    with pytest.raises(UnknownName, match="cls"):
        split_bias_and_norm(model, also="cls*")
    with pytest.raises(InvalidInput, match="requires_grad=False"):
        split_bias_and_norm(nn.Linear(2, 2).requires_grad_(False))
