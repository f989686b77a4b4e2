"""Stacked training: every replica is what it would have been alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet
from mlcollage.nn.vit import ViT
from mlcollage.train.mixup import mixup_batch, soft_cross_entropy
from mlcollage.train.replicas import Replicas, stackable
from mlcollage.train.sam import SAM
from mlcollage.train.schedules import cosine

SHAPE, SEEDS, STEPS = (2, 8, 8), (3, 1, 4), 5
NETWORKS = {
    "mlp": lambda: MLP(SHAPE, 4, (16,)),
    "mlp batch": lambda: MLP(SHAPE, 4, (16,), norm="batch"),
    "convnet group": lambda: ConvNet(SHAPE, 4, (4, 8), norm="group"),
    "convnet batch": lambda: ConvNet(SHAPE, 4, (4, 8)),
    "resnet frn": lambda: ResNet(SHAPE, 4, width=4, norm="frn"),
    "vit": lambda: ViT(SHAPE, 4, dim=16, depth=2),
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, 0.1, {"momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (torch.optim.SGD, 0.1, {"momentum": 0.9, "nesterov": True}),
    # Adam with a coupled weight decay would blow up the rounding of a gradient that is zero (a ViT's key biases).
    "adam": (torch.optim.Adam, 0.01, {}),
    "adamw": (torch.optim.AdamW, 0.01, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, 0.003, {"momentum": 0.5}),
}


def batches(dtype=torch.float64, replicas=None):
    g = torch.Generator().manual_seed(0)
    lead = (STEPS, 16) if replicas is None else (STEPS, replicas, 16)
    x, y = torch.randn(*lead, *SHAPE, generator=g), torch.randint(0, 4, lead, generator=g)
    return list(zip(x.to(dtype), y, strict=True))


def alone(model_fn, seed, optimizer, lr, data, *, clip_norm=None, **kwargs):
    """A plain loop in plain torch."""
    model = build(model_fn, seed).train()
    optimizer = optimizer(model.parameters(), lr=lr, **kwargs)
    losses = []
    for t, (x, y) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(STEPS)(t)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        losses.append(loss.detach())
    return model.eval(), torch.stack(losses)


def assert_equal_alone(replicas, losses, model_fn, optimizer, rates, data, tolerance, **kwargs):
    for r, (seed, lr) in enumerate(zip(SEEDS, rates, strict=True)):
        own = [(x if x.ndim == 4 else x[r], y if y.ndim == 1 else y[r]) for x, y in data]
        model, expected = alone(model_fn, seed, optimizer, lr, own, **kwargs)
        torch.testing.assert_close(losses[:, r], expected, **tolerance)
        ours = replicas.module(r).state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(ours[name], value, **tolerance)


CASES = [
    *(("mlp", optimizer, own) for optimizer in OPTIMIZERS for own in (False, True)),
    *((name, optimizer, True) for name in NETWORKS if name != "mlp" for optimizer in ("sgd", "adam")),
]


@pytest.mark.parametrize(("name", "optimizer", "each_its_own_rate"), CASES)
def test_a_replica_equals_a_network_trained_alone(name, optimizer, each_its_own_rate):
    make, lr, kwargs = OPTIMIZERS[optimizer]
    rates = [lr, lr / 7, 0.0] if each_its_own_rate else [lr] * 3

    def model_fn():
        return NETWORKS[name]().double()

    replicas = Replicas(model_fn, SEEDS, optimizer=make, lr=rates if each_its_own_rate else lr, **kwargs)
    data = batches()
    losses = torch.stack([replicas.step(x, y, lr_factor=cosine(STEPS)(t)) for t, (x, y) in enumerate(data)])
    assert_equal_alone(replicas, losses, model_fn, make, rates, data, {"rtol": 1e-8, "atol": 1e-10}, **kwargs)


@pytest.mark.parametrize("name", ["mlp", "convnet group", "vit"])
def test_in_single_precision_they_agree_to_rounding(name):
    kwargs = {"momentum": 0.9, "weight_decay": 1e-2}
    rates = [0.1, 0.03, 0.01]
    replicas = Replicas(NETWORKS[name], SEEDS, lr=rates, **kwargs)
    data = batches(torch.float32)
    losses = torch.stack([replicas.step(x, y, lr_factor=cosine(STEPS)(t)) for t, (x, y) in enumerate(data)])
    tolerance = {"rtol": 1e-4, "atol": 2e-6}
    assert_equal_alone(replicas, losses, NETWORKS[name], torch.optim.SGD, rates, data, tolerance, **kwargs)


def test_each_replica_can_have_its_own_batches():
    def model_fn():
        return NETWORKS["mlp"]().double()

    replicas, data = Replicas(model_fn, SEEDS, lr=0.1), batches(replicas=3)
    losses = torch.stack([replicas.step(x, y, lr_factor=cosine(STEPS)(t)) for t, (x, y) in enumerate(data)])
    tolerance = {"rtol": 1e-10, "atol": 1e-12}
    assert_equal_alone(replicas, losses, model_fn, torch.optim.SGD, [0.1] * 3, data, tolerance)


def test_shared_inputs_may_come_with_labels_for_each_replica():
    def model_fn():
        return NETWORKS["mlp"]().double()

    replicas = Replicas(model_fn, SEEDS, lr=0.1)
    data = [(x[0], y) for x, y in batches(replicas=3)]
    losses = torch.stack([replicas.step(x, y, lr_factor=cosine(STEPS)(t)) for t, (x, y) in enumerate(data)])
    tolerance = {"rtol": 1e-10, "atol": 1e-12}
    assert_equal_alone(replicas, losses, model_fn, torch.optim.SGD, [0.1] * 3, data, tolerance)


def test_gradients_are_clipped_for_each_replica_by_itself():
    def model_fn():
        return NETWORKS["mlp"]().double()

    replicas, data = Replicas(model_fn, SEEDS, lr=0.5), batches(replicas=3)
    losses = torch.stack(
        [replicas.step(x, y, clip_norm=0.3, lr_factor=cosine(STEPS)(t)) for t, (x, y) in enumerate(data)]
    )
    tolerance = {"rtol": 1e-8, "atol": 1e-10}
    assert_equal_alone(replicas, losses, model_fn, torch.optim.SGD, [0.5] * 3, data, tolerance, clip_norm=0.3)


def test_a_replica_that_diverges_does_not_touch_the_others():
    def model_fn():
        return NETWORKS["mlp"]().double()

    data = batches()
    pair = Replicas(model_fn, SEEDS[:2], lr=[1e200, 0.1])
    single = Replicas(model_fn, SEEDS[1:2], lr=0.1)
    for x, y in data:
        both, one = pair.step(x, y), single.step(x, y)
        torch.testing.assert_close(both[1:], one)
    assert not both[0].isfinite()


def test_prediction_is_that_of_the_modules_and_comes_with_activations():
    replicas = Replicas(NETWORKS["convnet batch"], SEEDS, lr=0.1)
    for x, y in batches(torch.float32):
        replicas.step(x, y)
    x = torch.randn(10, *SHAPE, generator=torch.Generator().manual_seed(5))
    logits, acts = replicas.predict(x, batch_size=4, activations=True)
    assert logits.shape == (3, 10, 4)
    torch.testing.assert_close(logits, replicas.predict(x))
    own = replicas.predict(x.expand(3, *x.shape), in_dim=0, batch_size=3)
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-5)
    for r in range(3):
        expected, theirs = replicas.module(r)(x, activations=True)
        torch.testing.assert_close(logits[r], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(acts["relu2"][r], theirs["relu2"], rtol=1e-4, atol=1e-5)


def test_a_module_is_a_copy():
    replicas = Replicas(NETWORKS["mlp"], SEEDS, lr=0.1)
    module = replicas.module(1)
    with torch.no_grad():
        module.head.weight.zero_()
    assert replicas.module(1).head.weight.abs().sum() > 0
    fresh = build(NETWORKS["mlp"], SEEDS[1])
    assert torch.equal(replicas.module(1).head.weight, fresh.head.weight)


def dropout_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.Dropout(0.5), nn.Linear(16, 4))


def test_dropout_differs_between_replicas_and_is_reproducible():
    def losses(seeds, noise):
        replicas = Replicas(dropout_net, seeds, lr=0.1)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        out = torch.stack([replicas.step(x, y) for x, y in batches(torch.float32)])
        assert torch.equal(torch.get_rng_state(), state)
        return out

    a = losses([0, 0], 1)
    assert torch.equal(a, losses([0, 0], 2))
    assert not torch.equal(a[0, 0], a[0, 1])  # the same weights, other noise


def test_losses_of_ones_own_and_real_targets():
    replicas = Replicas(lambda: MLP((5,), 1, (8,)), [0, 1], optimizer=torch.optim.Adam, lr=0.03)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=g)
    y = x.sum(1, keepdim=True)
    out = [replicas.step(x, y, loss=F.mse_loss, in_dims=(None, None)) for _ in range(50)]
    assert bool((out[-1] < 0.2 * out[0]).all())
    with pytest.raises(InvalidInput, match="cannot be told; pass in_dims"):
        replicas.step(x, y, loss=F.mse_loss)


def test_autocast_keeps_parameters_in_their_type():
    replicas = Replicas(NETWORKS["vit"], SEEDS, lr=0.1)
    x, y = batches(torch.float32)[0]
    half, full = replicas.step(x, y, autocast=torch.bfloat16, lr_factor=0.0), replicas.step(x, y)
    assert all(p.dtype == torch.float32 for p in replicas.parameters.values())
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02)
    assert not torch.equal(half.float(), full)


def test_an_optimizer_may_come_from_a_function():
    replicas = Replicas(NETWORKS["mlp"], SEEDS, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.5))
    assert replicas.optimizer.param_groups[0]["lr"] == 0.2
    replicas = Replicas(NETWORKS["mlp"], SEEDS, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.2), lr=[0.1, 0.2, 0.4])
    assert replicas.optimizer.param_groups[0]["lr"] == 0.4


class Reader(nn.Module):
    """Recurrent: torch.vmap cannot run it."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])


def losses_of(logits, y):
    return torch.stack([F.cross_entropy(z, y if y.ndim == 1 else y[r]) for r, z in enumerate(logits)])


def test_an_objective_of_ones_own_is_that_of_each_network_alone():
    """Here the loss and a multiple of each replica's own for its squared logits."""
    strength = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    data, kwargs = batches(replicas=3), {"momentum": 0.9}
    replicas = Replicas(lambda: NETWORKS["mlp"]().double(), SEEDS, lr=[0.1, 0.05, 0.2], **kwargs)
    found = []
    for x, y in data:

        def objective(x=x, y=y):
            logits = replicas(x, in_dim=0)
            return losses_of(logits, y) + strength * logits.square().mean((1, 2))

        found.append(replicas.update(objective))
    for r, (seed, lr) in enumerate(zip(SEEDS, (0.1, 0.05, 0.2), strict=True)):
        model = build(lambda: NETWORKS["mlp"]().double(), seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, **kwargs)
        for t, (x, y) in enumerate(data):
            optimizer.zero_grad()
            logits = model(x[r])
            loss = F.cross_entropy(logits, y[r]) + strength[r] * logits.square().mean()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(found[t][r], loss.detach(), rtol=1e-10, atol=1e-12)
        for name, value in replicas.module(r).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "convnet batch"])
@pytest.mark.parametrize("stacked", [True, False])
def test_sam_moves_each_replica_by_a_length_of_its_own(name, stacked):
    rho, rates, data = (0.05, 0.3, 0.0), [0.1, 0.03, 0.2], batches(replicas=3)
    replicas = Replicas(
        lambda: NETWORKS[name]().double(), SEEDS, optimizer=SAM, base_optimizer=torch.optim.SGD, rho=rho, lr=rates,
        momentum=0.9, stacked=stacked,
    )  # fmt: skip
    losses = torch.stack([replicas.step(x, y) for x, y in data])
    for r, seed in enumerate(SEEDS):
        model = build(lambda: NETWORKS[name]().double(), seed)
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho[r], lr=rates[r], momentum=0.9)
        for t, (x, y) in enumerate(data):

            def closure(model=model, x=x[r], y=y[r]):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            torch.testing.assert_close(losses[t, r], optimizer.step(closure).detach(), rtol=1e-8, atol=1e-10)
        for key, value in replicas.module(r).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-8, atol=1e-10)


def test_mixed_batches_are_trained_as_by_each_network_alone():
    replicas, losses = Replicas(lambda: NETWORKS["mlp"]().double(), SEEDS, lr=0.1), []
    mixed = [
        [
            mixup_batch(x[r], y[r], 1.0 + r, 4, generator=torch.Generator().manual_seed(10 * t + r))
            for r in range(3)
        ]
        for t, (x, y) in enumerate(batches(replicas=3))
    ]  # fmt: skip
    for row in mixed:
        x, y = torch.stack([m.x for m in row]), torch.stack([m.y for m in row])
        losses.append(replicas.step(x, y, loss=soft_cross_entropy, in_dims=(0, 0)))
    for r, seed in enumerate(SEEDS):
        model = build(lambda: NETWORKS["mlp"]().double(), seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for t, row in enumerate(mixed):
            optimizer.zero_grad()
            loss = soft_cross_entropy(model(row[r].x), row[r].y)
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[t][r], loss.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_branch_goes_on_as_the_whole_and_leaves_it_alone(stacked):
    make = NETWORKS["convnet batch"]
    data = batches(torch.float32, replicas=3)
    whole = Replicas(make, SEEDS, optimizer=torch.optim.Adam, lr=[0.01, 0.02, 0.03], stacked=stacked)
    for x, y in data[:2]:
        whole.step(x, y)
    branch, other = whole.copy(), whole.copy()
    other.step(*data[4])  # touches neither of the two
    for x, y in data[2:]:
        assert torch.equal(whole.step(x, y), branch.step(x, y))
    assert whole.steps_done == branch.steps_done == 5
    for (name, a), b in zip(whole.parameters.items(), branch.parameters.values(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, other.parameters[name])
    for name, a in whole.buffers.items():
        assert torch.equal(a, branch.buffers[name])


def test_a_branch_with_sam_goes_on_with_sam():
    replicas = Replicas(NETWORKS["mlp"], SEEDS, optimizer=SAM, base_optimizer=torch.optim.Adam, rho=0.5, lr=0.01)
    data = batches(torch.float32)
    replicas.step(*data[0])
    branch = replicas.copy()
    assert torch.equal(replicas.step(*data[1]), branch.step(*data[1]))
    assert torch.equal(replicas.step(*data[2]), branch.step(*data[2]))


def test_parameters_can_be_put_in_place_of_the_stacked_ones():
    replicas = Replicas(NETWORKS["mlp"], SEEDS, lr=0.1)
    (x, _), *_ = batches(torch.float32)
    doubled = {k: 2 * p for k, p in replicas.parameters.items() if k.startswith("head")}
    torch.testing.assert_close(replicas(x, parameters=doubled), 2 * replicas(x))


@pytest.mark.parametrize("name", ["mlp", "convnet batch"])
def test_called_one_after_the_other_they_train_the_same(name):
    found = []
    for stacked in (True, False):
        replicas = Replicas(lambda: NETWORKS[name]().double(), SEEDS, lr=[0.1, 0.2, 0.3], stacked=stacked)
        losses = torch.stack([replicas.step(x, y) for x, y in batches(replicas=3)])
        logits, acts = replicas.predict(batches()[0][0], activations=True, batch_size=5)
        found.append((replicas, losses, logits, acts))
    (a, *first), (b, *second) = found
    assert (a.stacked, b.stacked) == (True, False)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(a.buffers, b.buffers, rtol=1e-9, atol=1e-11)


def test_networks_that_vmap_cannot_run_are_found_out_if_one_asks_for_it():
    data = batches(torch.float32)
    for make, known in ((Reader, True), (Branching, False)):
        replicas = Replicas(make, SEEDS, lr=[0.1, 0.1, 0.05], stacked=None)
        assert replicas.stacked is not known  # a branch in plain Python shows when it runs
        losses = torch.stack([replicas.step(x, y) for x, y in data])
        assert not replicas.stacked
        for r, (seed, lr) in enumerate(zip(SEEDS, (0.1, 0.1, 0.05), strict=True)):
            model = build(make, seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            for t, (x, y) in enumerate(data):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                torch.testing.assert_close(losses[t, r], loss.detach(), rtol=1e-4, atol=1e-5)
    assert Replicas(NETWORKS["mlp"], SEEDS, lr=0.1, stacked=None).stacked
    with pytest.raises(InvalidInput, match="no trainable parameter"):
        Replicas(nn.ReLU, SEEDS, lr=0.1, stacked=None)


class NormalisedGradient(torch.optim.SGD):
    """Not element by element: it divides by the length of the whole gradient."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad /= p.grad.norm()
        return super().step(closure)


class Clamped(torch.optim.SGD):
    """Element by element, but not proportional to the learning rate."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.clamp_(-0.5, 0.5)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(128, 4)

    def forward(self, x):
        out = self.linear(x.flatten(1))
        return out if out.sum() > 0 else -out


@pytest.mark.parametrize("optimizer", [NormalisedGradient, torch.optim.LBFGS, torch.optim.Adafactor])
def test_optimizers_that_do_not_work_on_stacks_are_refused(optimizer):
    with pytest.raises(InvalidInput, match="element by element"):
        Replicas(NETWORKS["mlp"], SEEDS, optimizer=optimizer, lr=[0.1, 0.2, 0.3])


def test_one_rate_is_enough_for_an_optimizer_that_is_not_proportional_to_it():
    assert Replicas(NETWORKS["mlp"], SEEDS, optimizer=Clamped, lr=0.1).size == 3
    with pytest.raises(InvalidInput, match="not proportional to the learning rate"):
        Replicas(NETWORKS["mlp"], SEEDS, optimizer=Clamped, lr=[0.1, 0.2, 0.3])


def test_models_that_cannot_be_stacked_are_named():
    assert all(stackable(make()) is None for make in NETWORKS.values())
    assert "momentum=None" in stackable(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None)))
    assert "its layer '0' uses GRU" in stackable(nn.Sequential(nn.GRU(2, 2)))
    assert "sparse=False" in stackable(nn.Embedding(3, 2, sparse=True))
    assert "is lazy" in stackable(nn.LazyLinear(3))
    assert "no trainable parameter" in stackable(nn.ReLU())
    with pytest.raises(InvalidInput, match="LSTM cannot be trained as one stacked model"):
        Replicas(lambda: nn.LSTM(2, 2), [0, 1], lr=0.1)
    with pytest.raises(InvalidInput, match=r"torch.vmap cannot run this Branching.*stacked=None"):
        Replicas(Branching, [0, 1], lr=0.1).step(*batches(torch.float32)[0])


def test_bad_input_is_explained():
    make = NETWORKS["mlp"]
    with pytest.raises(InvalidInput, match="at least one seed"):
        Replicas(make, [], lr=0.1)
    with pytest.raises(InvalidInput, match="lr is missing"):
        Replicas(make, SEEDS)
    with pytest.raises(InvalidInput, match="there are 2 learning rates for 3 replicas"):
        Replicas(make, SEEDS, lr=[0.1, 0.2])
    with pytest.raises(InvalidInput, match="learning rates must be a finite number of at least 0"):
        Replicas(make, SEEDS, lr=[0.1, -0.2, 0.1])
    widths = iter([8, 8, 16])
    with pytest.raises(InvalidInput, match="the same architecture for every seed"):
        Replicas(lambda: MLP(SHAPE, 4, (next(widths),)), SEEDS, lr=0.1)
    replicas = Replicas(make, SEEDS, lr=0.1)
    (x, y), *_ = batches(torch.float32)
    with pytest.raises(InvalidInput, match=r"x of shape \(16, 2, 8, 8\) does not fit targets of shape \(15,\)"):
        replicas.step(x, y[:15])
    with pytest.raises(InvalidInput, match=r"must begin with the 3 replicas"):
        replicas.step(x, y.expand(2, 16))
    with pytest.raises(InvalidInput, match="the loss of one replica must be one number"):
        replicas.step(x, y, loss=lambda a, b: F.cross_entropy(a, b, reduction="none"))
    with pytest.raises(InvalidInput, match=r"must be one number, \(3,\) for all, but has shape \(3, 16, 4\)"):
        replicas.update(lambda: replicas(x))
    with pytest.raises(InvalidInput, match="2 lengths rho for 3 replicas"):
        Replicas(make, SEEDS, optimizer=SAM, base_optimizer=torch.optim.SGD, rho=[0.1, 0.2], lr=0.1)
    with pytest.raises(InvalidInput, match="clip_norm must be a finite number above 0"):
        replicas.step(x, y, clip_norm=0.0)
    with pytest.raises(InvalidInput, match="lr_factor must be a finite number"):
        replicas.step(x, y, lr_factor=float("nan"))
    with pytest.raises(InvalidInput, match="replica 3 does not exist"):
        replicas.module(3)
    with pytest.raises(InvalidInput, match="at least one sample"):
        replicas.predict(x[:0])


def test_one_network_for_all_seeds_is_refused():
    net = nn.Linear(5, 2)
    with pytest.raises(InvalidInput, match="model_fn hands out the same Linear at every call"):
        Replicas(lambda: net, [0, 1], lr=0.1)
    Replicas(lambda: net, [0], lr=0.1)  # it is copied into the stack


def test_what_people_pass_works_or_gets_a_sentence():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 2)

        def forward(self, x):
            return self.net(x), x

    x, y = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    one, other = (Replicas(lambda: nn.Linear(5, 2), np.arange(2), lr=np.float64(0.1)) for _ in range(2))
    assert torch.equal(one.step(x, y), other.step(x.double(), y))
    assert torch.equal(one.predict(x), other.predict(x.double()))
    with pytest.raises(InvalidInput, match="x must be a tensor, not a ndarray"):
        one.step(x.numpy(), y.numpy())
    with pytest.raises(InvalidInput, match="Pair returns a tuple"):
        Replicas(Pair, [0, 1], lr=0.1).step(x, y)
    with pytest.raises(InvalidInput, match="optimizer is a SGD of other parameters"):
        Replicas(Pair, [0, 1], optimizer=torch.optim.SGD(Pair().parameters(), lr=0.1))


class Checkpointed(nn.Module):
    """A network whose hidden layers run again in the backward pass."""

    def __init__(self, again):
        super().__init__()
        self.again = again
        self.inner = nn.ModuleDict({"one": nn.Linear(5, 8), "norm": nn.BatchNorm1d(8), "cell": nn.GRU(8, 6)})
        self.gain, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def hidden(self, x):
        h = torch.tanh(self.inner["norm"](self.inner["one"](x)))
        return self.gain * self.inner["cell"](h)[0]

    def forward(self, x):
        return self.out(checkpoint(self.hidden, x, use_reentrant=False) if self.again else self.hidden(x))


@pytest.mark.parametrize("stacked", [None, False])
def test_checkpointed_networks_have_the_gradients_of_plain_ones(stacked):
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    trained = {}
    for again in (False, True):
        replicas = Replicas(lambda again=again: Checkpointed(again), seeds=[0, 1, 2], lr=0.3, stacked=stacked)

        def objective(replicas=replicas):  # two passes, the second a step further
            nearby = {k: 1.1 * p for k, p in replicas.parameters.items()}
            both = torch.stack([replicas(x), replicas(x, parameters=nearby)])
            return torch.stack([sum(F.cross_entropy(z[r], y) for z in both) for r in range(3)])

        replicas.update(objective)
        replicas.step(x, y)
        trained[again] = replicas.parameters
    for name, value in trained[False].items():
        assert torch.allclose(trained[True][name], value, atol=1e-6), name


def test_checkpointing_in_a_stack_is_refused_and_falls_back():
    class Small(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    with pytest.raises(InvalidInput, match="cannot run gradient checkpointing"):
        Replicas(lambda: Small(5, 3), SEEDS, lr=0.1).step(x, y)
    replicas = Replicas(lambda: Small(5, 3), SEEDS, lr=0.1, stacked=None)
    plain = Replicas(lambda: nn.Linear(5, 3), SEEDS, lr=0.1)
    replicas.step(x, y)
    plain.step(x, y)
    assert not replicas.stacked
    assert torch.allclose(replicas.parameters["weight"], plain.parameters["weight"], atol=1e-6)
