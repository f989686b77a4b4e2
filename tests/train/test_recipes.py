"""Recipes, presets and losses against the official code's optimizers, schedules, losses and mixup."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn import ViT
from mlcollage.nn.vit_models import vit
from mlcollage.train import (
    AugReg,
    clip_by_global_norm,
    finetune_recipe,
    kernel_groups,
    mixup_batch,
    pretrain_recipe,
    reference_schedule,
    sigmoid_cross_entropy,
    soft_cross_entropy,
)
from mlcollage.train.mixup import _mix
from mlcollage.train.recipes import TrainingRecipe

ORACLES = Path(__file__).parent / "oracles" / "vit_training"
with np.load(ORACLES / "losses_mixup_schedules.npz") as _file:
    OFFICIAL = {k: torch.from_numpy(_file[k]) for k in _file.files}
with np.load(ORACLES / "optimisers.npz") as _file:
    STEPS = {k: torch.from_numpy(_file[k]) for k in _file.files}
CASES = sorted(k[3:-6] for k in OFFICIAL if k.startswith("lr_") and k.endswith("_steps"))


@pytest.mark.parametrize("labels", ["onehot", "multi", "soft", "none"])
@pytest.mark.parametrize(("kind", "loss"), [("sigmoid", sigmoid_cross_entropy), ("softmax", soft_cross_entropy)])
def test_losses_and_gradients_are_the_official_ones(labels, kind, loss):
    logits, y = OFFICIAL["logits"].clone().requires_grad_(), OFFICIAL[f"labels_{labels}"]
    value = loss(logits, y)
    value.backward()
    name = f"{kind}_xent_{labels}"
    torch.testing.assert_close(value.detach(), OFFICIAL[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, OFFICIAL[f"{name}_grad"], rtol=1e-10, atol=1e-12)
    each = torch.stack([loss(z[None], t[None]) for z, t in zip(OFFICIAL["logits"], y, strict=True)])
    torch.testing.assert_close(each, OFFICIAL[f"{name}_each"], rtol=1e-12, atol=1e-12)


def test_mixing_with_the_sample_before_is_the_official_one():
    x, y = OFFICIAL["mix_x"], OFFICIAL["labels_onehot"]
    pairs = torch.arange(len(x)).roll(1)
    for k, weight in enumerate(OFFICIAL["mix_lambda"]):
        w = weight.expand(len(x))
        torch.testing.assert_close(_mix(x, w, pairs), OFFICIAL["mix_out_x"][k], rtol=0, atol=1e-15)
        torch.testing.assert_close(_mix(y, w, pairs), OFFICIAL["mix_out_labels"][k], rtol=0, atol=1e-15)
    found = mixup_batch(x, y, 0.5, y.shape[1], generator=torch.Generator().manual_seed(0), partner="roll")
    assert found.partner.tolist() == [4, 0, 1, 2, 3]
    assert found.weight.unique().numel() == 1
    with pytest.warns(UserWarning, match="mixed with itself"):
        alone = mixup_batch(x[:1], y[:1], 0.5, y.shape[1], generator=torch.Generator().manual_seed(0), partner="roll")
    torch.testing.assert_close(alone.x, OFFICIAL["mix1_out_x"])


@pytest.mark.parametrize(("alpha", "mean"), [(0.2, 0.8988), (0.5, 0.8183), (0.8, 0.7718)])
def test_the_larger_weight_has_the_mean_of_its_distribution(alpha, mean):
    g = torch.Generator().manual_seed(0)
    mixed = mixup_batch(
        torch.zeros(20_000, 1), torch.zeros(20_000, dtype=torch.long), alpha, 1, generator=g, per_sample=True
    )
    assert float(mixed.weight.mean()) == pytest.approx(mean, abs=0.005)


def test_batches_sorted_by_class_are_warned_about():
    x, y = torch.zeros(32, 2), torch.arange(4).repeat_interleave(8)
    g = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="88% of the samples are mixed with one of their own class, and 25%"):
        mixup_batch(x, y, 0.2, 4, generator=g, partner="roll")
    shuffled = y[torch.randperm(32, generator=g)]
    assert mixup_batch(x, shuffled, 0.2, 4, generator=g, partner="roll").x.shape == (32, 2)  # warnings are errors
    with pytest.raises(UnknownName, match="partner"):
        mixup_batch(x, y, 0.2, 4, generator=g, partner="next")


@pytest.mark.parametrize("case", CASES)
def test_schedules_are_the_official_ones(case):
    total, base, warmup = (float(v) for v in OFFICIAL[f"lr_{case}_cfg"])
    decay = "linear" if "linear" in case else "rsqrt" if "rsqrt" in case else "cosine"
    f = reference_schedule(
        int(total), int(warmup), decay, final=1e-5 / base if decay == "linear" else 0.0, timescale=1500, cooldown=4000
    )
    found = torch.tensor([base * f(int(t)) for t in OFFICIAL[f"lr_{case}_steps"]], dtype=torch.float64)
    torch.testing.assert_close(found, OFFICIAL[f"lr_{case}"].double(), rtol=1e-6, atol=1e-12)


class Tree(nn.Module):
    """The oracle's parameters, each kernel in a linear layer of its own, so that decay finds it by its module."""

    def __init__(self, values):
        super().__init__()
        self.names = {}
        for i, (key, value) in enumerate(values.items()):
            if key.endswith("kernel"):
                layer = nn.Linear(1, 1, bias=False)
                layer.weight = nn.Parameter(value.clone())
                self.add_module(f"layer{i}", layer)
                self.names[key] = layer.weight
            else:
                self.names[key] = nn.Parameter(value.clone())
                self.register_parameter(f"p{i}", self.names[key])


@pytest.mark.parametrize(("kind", "tolerance"), [("adam", 1e-9), ("sgd", 5e-8)])
def test_twenty_steps_are_those_of_the_official_code(kind, tolerance):
    steps, warmup, lr, product, sgd_lr, _ = (float(v) for v in STEPS["settings"])
    tree = Tree({k[3:]: v for k, v in STEPS.items() if k.startswith("p0/")})
    if kind == "adam":
        recipe = pretrain_recipe(tree, int(steps), lr=lr, weight_decay=product / lr, warmup=int(warmup))
    else:
        recipe = finetune_recipe(tree, steps=int(steps), lr=sgd_lr, warmup=int(warmup))
    recorded = STEPS["record_after"].tolist()
    for t in range(int(steps)):
        for key, p in tree.names.items():
            p.grad = STEPS[f"grad/{key}"][t].clone()
        assert recipe.update() == pytest.approx(float(STEPS["global_norm"][t]), rel=1e-12)
        if t + 1 in recorded:
            for key, p in tree.names.items():
                expected = STEPS[f"{kind}/p/{key}"][recorded.index(t + 1)]
                torch.testing.assert_close(p.detach(), expected, rtol=0, atol=tolerance)


def test_decay_is_for_kernels_only_and_shrinks_them_by_rate_times_decay():
    model = vit("Ti/16", 3, (3, 32, 32), patch_size=16)
    kernels, rest = kernel_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and ".ln" not in names[id(p)] for p in kernels["params"])
    assert {"token", "position", "norm.weight", "head.bias"} <= {names[id(p)] for p in rest["params"]}
    recipe = pretrain_recipe(model, 100, lr=1e-3, weight_decay=0.1, warmup=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    recipe.update()
    for name, p in model.named_parameters():
        factor = 1 - 1e-4 if id(p) in {id(k) for k in kernels["params"]} else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    held = kernel_groups(attention, 0.1)[0]["params"]
    assert any(p is attention.self_attn.in_proj_weight for p in held)
    assert len(held) == 4


def test_the_prior_bias_is_the_odds_of_one_class():
    model = ViT((1, 4, 4), 10, dim=8, depth=1, heads=2, init="reference")
    recipe = pretrain_recipe(model, 10, warmup=0, prior_bias=True)
    assert float(model.head.bias.detach()[0]) == pytest.approx(-2.1972, abs=1e-4)
    value = recipe.loss(model(torch.zeros(3, 1, 4, 4)), F.one_hot(torch.arange(3), 10).float())
    assert float(value.detach()) == pytest.approx(3.251, abs=1e-3)


def test_a_resumed_run_goes_on_and_another_length_is_refused():
    def make(steps=20):
        torch.manual_seed(0)
        return finetune_recipe(nn.Linear(2, 2), steps=steps, lr=0.1, warmup=2)

    with torch.random.fork_rng():
        recipe = make()
        p = recipe.optimizer.param_groups[0]["params"][0]
        for _ in range(5):
            recipe.step(p.square().sum())
        other = make()
        other.load_state_dict(recipe.state_dict())
        assert (other.steps_done, other.rate) == (5, recipe.rate)
        with pytest.raises(InvalidInput, match="scheduled for 20 steps and this recipe for 100"):
            make(100).load_state_dict(recipe.state_dict())
    assert isinstance(recipe, TrainingRecipe)


def test_presets_have_the_papers_numbers_in_both_dialects():
    grid = AugReg.grid()
    assert len(set(grid)) == 28
    assert {(a.dropout, a.stochastic_depth) for a in grid} == {(0.0, 0.0), (0.1, 0.1)}
    strong = AugReg.from_name("strong2")
    assert (strong.layers, strong.magnitude, strong.alpha) == (2, 20, 0.8)
    assert AugReg.from_name("heavy1") == AugReg.from_name("strong1")
    assert AugReg.from_name("light0", dialect="index_csv") == AugReg.from_name("light1")
    assert AugReg.from_name("light1", dialect="index_csv") == AugReg.from_name("light2")
    assert [AugReg.from_name(n).label("index_csv") for n in ("light1", "light2", "none")] == [
        "light0",
        "light1",
        "none",
    ]
    assert AugReg.from_name("medium1", dropout=0.1, stochastic_depth=0.2).stochastic_depth == 0.2


def test_a_preset_does_a_whole_step():
    setting = AugReg.from_name("light2", dropout=0.1)
    model = ViT((3, 16, 16), 4, dim=16, depth=2, heads=2, **setting.model_kwargs())
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=g)
    scaled = setting.transform(x, generator=g, reference_size=224).float() / 127.5 - 1
    mixed = setting.mixup(scaled, torch.randperm(8, generator=g) % 4, 4, generator=g)
    recipe = TrainingRecipe(
        torch.optim.AdamW(setting.param_groups(model), lr=1e-3), reference_schedule(10, 0), 1.0, soft_cross_entropy, 10
    )
    before = model.head.weight.detach().clone()
    assert recipe.step(recipe.loss(model(mixed.x), mixed.y)) > 0
    assert not torch.equal(model.head.weight, before)


def frozen():
    return nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AugReg.from_name("light0"), UnknownName, "did you mean 'light"),
        (lambda: AugReg.from_name("light2", dialect="index_csv"), UnknownName, "name must be one of"),
        (lambda: AugReg.from_name("none", dropout=1.0), InvalidInput, "dropout"),
        (lambda: AugReg(magnitude=40), InvalidInput, "magnitude"),
        (lambda: finetune_recipe(nn.Linear(2, 2)), InvalidInput, "give steps and lr"),
        (lambda: finetune_recipe(nn.Linear(2, 2), "mnist"), UnknownName, "dataset"),
        (lambda: finetune_recipe(frozen(), "pets"), InvalidInput, "no parameter"),
        (lambda: kernel_groups(frozen(), 0.1), InvalidInput, "no parameter"),
        (lambda: pretrain_recipe(nn.Linear(2, 2), 100), InvalidInput, "warmup=10000 must be shorter"),
        (lambda: pretrain_recipe(nn.Linear(2, 2), 100, warmup=1, prior_bias=True), InvalidInput, "prior_bias needs"),
        (lambda: sigmoid_cross_entropy(torch.zeros(2, 3), torch.zeros(2)), InvalidInput, "must both be"),
        (lambda: reference_schedule(10, 10), InvalidInput, "shorter"),
    ],
)
def test_bad_arguments_are_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gradient_that_is_not_finite_is_refused_before_the_update():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        clip_by_global_norm([p], 1.0)


def test_a_batch_of_one_and_lists_are_named_in_mixup():
    g = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="mixed with itself"):
        mixup_batch(torch.ones(1, 2), torch.tensor([0]), 0.2, 2, generator=g)
    with pytest.raises(InvalidInput, match="must be tensors"):
        mixup_batch(torch.ones(2, 2), [0, 1], 0.2, 2, generator=g)
    with pytest.raises(InvalidInput, match="generator is a NoneType"):
        mixup_batch(torch.ones(2, 2), torch.tensor([0, 1]), 0.2, 2, generator=None)


def test_a_kernel_has_two_axes_whatever_its_module_is_called():
    class ConvNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    kernels, rest = kernel_groups(nn.Sequential(nn.Linear(3, 3), ConvNorm()), 0.1)
    assert [len(kernels["params"]), len(rest["params"])] == [1, 2]


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_gradients_are_not_clipped_to_nothing_or_turned_around(norm):
    with pytest.raises(InvalidInput, match="clip_norm must be"):
        finetune_recipe(nn.Linear(2, 2), steps=10, lr=0.1, clip_norm=norm)


def test_steps_without_gradients_or_beyond_the_schedule_are_told():
    model = nn.Linear(2, 2)
    recipe = finetune_recipe(model, steps=2, warmup=0, lr=0.1)
    with pytest.raises(InvalidInput, match="no parameter has a gradient"):
        recipe.update()
    for _ in range(2):
        recipe.step(model(torch.ones(1, 2)).sum())
    with pytest.warns(UserWarning, match="count optimizer steps"):
        recipe.step(model(torch.ones(1, 2)).sum())


@pytest.mark.parametrize("other", [{"lr": 0.2}, {"warmup": 40}])
def test_a_run_is_not_resumed_at_another_rate(other):
    made = {"steps": 100, "warmup": 10, "lr": 0.1}
    state = finetune_recipe(nn.Linear(2, 2), **made).state_dict()
    finetune_recipe(nn.Linear(2, 2), **made).load_state_dict(state)
    with pytest.raises(InvalidInput, match="the rate would jump"):
        finetune_recipe(nn.Linear(2, 2), **{**made, **other}).load_state_dict(state)
    with pytest.raises(InvalidInput, match="no 'optimizer'"):
        finetune_recipe(nn.Linear(2, 2), **made).load_state_dict({})
    before = {k: v for k, v in state.items() if k != "rates"}  # of an earlier release
    finetune_recipe(nn.Linear(2, 2), **made).load_state_dict(before)


def test_the_head_of_a_wrapped_model_gets_its_prior():
    model = vit("Ti/16", 10, (1, 8, 8), patch_size=4)
    pretrain_recipe(nn.DataParallel(model), 100, warmup=10, prior_bias=True)
    assert float(model.head.bias[0].detach()) == pytest.approx(-2.1972, abs=1e-4)
