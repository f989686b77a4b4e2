"""Identities of the update rule: what must not change anything, and what must be exactly a gradient."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.bidirectional_update_rules import (
    BlurNetwork,
    Genome,
    GenomeSettings,
    Weights,
    functional_forward,
    functional_step,
    init_weights,
    rule,
)
from mlcollage.papers.bidirectional_update_rules._activations import ACTIVATIONS
from mlcollage.papers.bidirectional_update_rules._layers import from_sizes

TANH, IDENTITY = ACTIVATIONS["tanh"], ACTIVATIONS["identity"]
PATH = from_sizes((6, 5, 4, 3), TANH, IDENTITY)
VARIANTS = [
    {"backward": b, "symmetric": s, "multistate": m}
    for b, s, m in itertools.product(
        ("additive", "multiplicative", "multiplicative_second"), (True, False), (True, False)
    )
]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def double(genome):
    return genome.to(torch.float64)


def steps(genome, x, y, count=3, seed=5, path=PATH):
    w = init_weights(path, genome, seed=seed, dtype=torch.float64)
    for _ in range(count):
        step = functional_step(path, w, genome, x, y)
        w = step.weights
    return w, step


def golden(**changes):
    """The pinned net of two inputs, two hidden neurons and two classes."""
    s = GenomeSettings(norm="none", reduction="sum", initial_scale="plain", step_scale="plain", **changes)
    numbers = {
        "nu": [[1, 0.5], [-0.5, 1]], "mu": [[1, -0.25], [0.25, 1]], "hebb_pre": [[1, 0.2], [0.1, 1]],
        "hebb_post": [[0.3, 1], [1, -0.3]], "keep": 0.5, "update": 1.0, "synapse_keep": 1.0, "synapse_update": -0.1,
        "initial_std": 1.0,
    }  # fmt: skip
    genome = Genome(s, {n: torch.tensor(v, dtype=torch.float64) for n, v in numbers.items()})
    i, j, c = torch.meshgrid(torch.arange(3), torch.arange(2), torch.arange(2), indexing="ij")
    w = (0.1 * (i + 1) - 0.2 * (j + 1) + 0.05 * c).double().permute(2, 0, 1)[None]
    x = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.float64)[None]
    return from_sizes((2, 2, 2), TANH, IDENTITY), Weights((w, w)), genome, x, torch.tensor([[0, 1, 1]])


def test_one_pinned_step():
    path, w, genome, x, y = golden()
    step = functional_step(path, w, genome, x, y)
    assert float(step.weights.forward[0].sum()) == pytest.approx(-0.633624, abs=1e-6)
    assert float(step.weights.forward[1].sum()) == pytest.approx(-0.939362, abs=1e-6)
    np.testing.assert_allclose(step.logits[0, 0].numpy(), [0.064865, 0.042131], atol=1e-6)


def test_the_mean_of_a_batch_in_place_of_its_sum():
    path, w, genome, x, y = golden()
    averaged = Genome(dataclasses.replace(genome.settings, reduction="mean"), genome.numbers)
    step = functional_step(path, w, averaged, x, y)
    assert float(step.weights.forward[0].sum()) == pytest.approx(-0.811208, abs=1e-6)
    twice = functional_step(path, w, averaged, x.repeat(1, 2, 1), y.repeat(1, 2))
    close(twice.weights.forward[0], step.weights.forward[0], 1e-15)


def test_changes_of_shards_add_up():
    path, w, genome, x, y = golden()
    whole = functional_step(path, w, genome, x, y).weights.forward
    parts = [functional_step(path, w, genome, x[:, p], y[:, p]).weights.forward for p in (slice(0, 2), slice(2, 3))]
    for full, a, b, old in zip(whole, *parts, w.forward, strict=True):
        close(full - old, (a - old) + (b - old), 1e-15)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("norm", ["both", "none"])
def test_a_population_equals_its_members(rows, settings, norm):
    x, y = rows[0][None], rows[1][None]
    population = double(Genome.random(k=3, seed=1, population=4, norm=norm, spread=0.5, **settings))
    w, step = steps(population, x, y)
    for i in range(4):
        alone, by_itself = steps(population[i], x, y)
        close(step.logits[i], by_itself.logits[0])
        for a, b in zip((*w.forward, *w.backward), (*alone.forward, *alone.backward), strict=True):
            if a.numel():
                close(a[i], b[0])


def test_a_wild_member_leaves_the_others_alone(rows):
    x, y = rows[0][None], rows[1][None]
    population = double(Genome.random(seed=2, population=3))
    calm, _ = steps(population, x, y)
    numbers = {n: v.clone() for n, v in population.numbers.items()}
    numbers["synapse_update"][1] = torch.nan
    wild, _ = steps(Genome(population.settings, numbers), x, y)
    for a, b in zip(calm.forward, wild.forward, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert not torch.isfinite(b[1]).any()


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_hidden_units_and_classes_may_be_reordered(rows, settings):
    x, y = rows[0][None], rows[1][None]
    genome = double(Genome.random(seed=3, spread=0.5, **settings))
    w = init_weights(PATH, genome, seed=1, dtype=torch.float64)
    hidden, classes = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([2, 0, 1])
    bias = torch.cat([hidden, torch.tensor([5])])
    moved = [w.forward[0][..., hidden], w.forward[1][:, :, bias], w.forward[2][..., classes]]
    back = ()
    if w.backward:
        back = (w.backward[0], w.backward[1][..., hidden], w.backward[2][:, :, classes])
    inverse = classes.argsort()
    first = functional_step(PATH, w, genome, x, y)
    second = functional_step(PATH, Weights(tuple(moved), back), genome, x, inverse[y])
    close(second.logits, first.logits[..., classes])
    close(second.weights.forward[0], first.weights.forward[0][..., hidden])
    close(second.weights.forward[1], first.weights.forward[1][:, :, bias])
    close(second.weights.forward[2], first.weights.forward[2][..., classes])


def test_the_order_of_rows_and_equal_twins_change_nothing(rows):
    x, y = rows
    genome = double(Genome.random(seed=4))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    plain, _ = steps(genome, x[None], y[None])
    for xs, ys in ((x[order], y[order]), (x.repeat(2, 1), y.repeat(2))):
        other, _ = steps(genome, xs[None], ys[None])
        for a, b in zip(plain.forward, other.forward, strict=True):
            close(a, b, 1e-10)


def test_the_size_of_a_genome_does_not_depend_on_the_network():
    genome = Genome.random(k=3, seed=0)
    count = genome.to_vector().numel()
    for sizes in ((4, 2), (4, 64, 64, 9)):
        assert BlurNetwork(sizes, genome).genome.to_vector().numel() == count


def test_gradients_reach_every_number_of_the_genome(rows):
    x, y = rows[0][None], rows[1][None]
    settings = {"oja": "weights", "synapse_norm": "in_use", "saturation": "tanh", "forward_update": True}
    genome = double(Genome.random(seed=5, symmetric=False, **settings))
    vector = genome.to_vector().requires_grad_()
    w, step = steps(genome.from_vector(vector), x, y)
    logits, _ = functional_forward(PATH, w, genome.from_vector(vector), x, step.statistics)
    (gradient,) = torch.autograd.grad(logits.square().sum(), vector)
    assert (gradient != 0).all()
    assert torch.isfinite(gradient).all()


def test_meta_gradient_against_differences(rows):
    x, y = rows[0][None], rows[1][None]
    genome = double(Genome.random(seed=6, spread=0.3))

    def value(vector):
        g = genome.from_vector(vector)
        w, step = steps(g, x, y)
        return functional_forward(PATH, w, g, x, step.statistics)[0].square().mean()

    assert torch.autograd.gradcheck(value, (genome.to_vector().requires_grad_(),), atol=1e-5)


def test_constant_units_have_no_infinite_gradient(rows):
    y = rows[1][None]
    x = torch.ones_like(rows[0])[None]  # every message is constant over the rows
    genome = double(Genome.random(seed=7, activation="relu_tanh"))
    vector = genome.to_vector().requires_grad_()
    w, _ = steps(genome.from_vector(vector), x, y)
    (gradient,) = torch.autograd.grad(sum(v.square().sum() for v in w.forward), vector)
    assert torch.isfinite(gradient).all()


def test_statistics_are_each_members_own(rows):
    x = torch.cat([rows[0][None], 100 * rows[0][None]])
    population = double(Genome.random(seed=8, population=2))
    _, statistics = functional_forward(PATH, init_weights(PATH, population, seed=0, dtype=torch.float64), population, x)
    alone = functional_forward(
        PATH, init_weights(PATH, population[0], seed=0, dtype=torch.float64), population[0], x[:1]
    )
    close(statistics[0][1][0], alone[1][0][1][0])


def test_the_transpose_of_synapses_normalized_in_use():
    w = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)[None, None]

    one = torch.ones(1, dtype=torch.float64)
    used = rule.normalized(w, one)
    np.testing.assert_allclose(used[0, 0].numpy(), [[0.6, 0], [0.8, 1]], atol=1e-9)
    official = rule.normalized(w.transpose(2, 3), one)
    np.testing.assert_allclose(official[0, 0].numpy(), [[1, 0.6247], [0, 0.7809]], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"k": 1}, "at least 2 states"),
        ({"second_state": "derivative"}, "not backprop"),
        ({"backward": "sideways"}, "multiplicative"),
        ({"activation": "tan"}, "tanh"),
        ({"tied": True}, "symmetric=False"),
        ({"layers": -1}, "layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, told):
    with pytest.raises(InvalidInput, match=told):
        GenomeSettings(**settings)


def test_synapses_normalized_in_use_are_cut_before_they_overflow(rows):
    """Without the cut, squares overflow in single precision after some 350 steps of this genome."""
    small = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rule.bounded(small), small)
    torch.testing.assert_close(rule.bounded(1e15 * small).norm(dim=2), torch.full((2, 2, 3), 1e12))
    flat = torch.zeros(1, 1, 4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(rule.bounded(flat).sum(), flat)
    assert torch.equal(gradient, torch.ones_like(flat))
    network = BlurNetwork((6, 4, 3), "digits-2s-lasting")
    x, y = rows[0].float(), rows[1]
    found = [network.learn(x, y).accuracy for _ in range(700)]
    assert all(torch.isfinite(w).all() for w in network.weights.forward)
    assert min(found[300:]) > max(found) - 0.15
    assert network.health().advice == ()


class TestWritingFreely:
    """Without autograd a step is written into fewer tensors; with it, and under torch.func, it is what it was."""

    def case(self, settings, layers, population=3):
        genome = Genome.random(seed=4, population=population, **settings).to(torch.float64)
        shape = (2, 6, 6) if isinstance(layers, nn.Sequential) else (layers[0],)
        network = BlurNetwork(layers, genome=genome[0], seed=0, dtype=torch.float64, input_shape=shape)
        g = torch.Generator().manual_seed(1)
        x = torch.randn(population, 7, *shape, generator=g, dtype=torch.float64)
        y = torch.randint(3, (population, 7), generator=g)
        weights = init_weights(network.path, genome, seed=[1, 2, 3], dtype=torch.float64)
        return network.path, weights, genome, x, y

    @pytest.mark.parametrize(
        "settings",
        [
            {}, {"norm": "none"}, {"norm": "forward"}, {"k": 4}, {"multistate": False}, {"reduction": "sum"},
            {"backward": "multiplicative"}, {"symmetric": False}, {"synapse_norm": "in_use"}, {"forward_update": True},
            {"oja": "weights"}, {"saturation": "tanh"},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["dense", "convolution"])
    def test_equals_the_pure_step(self, settings, kind):
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        )
        path, weights, genome, x, y = self.case(settings, (5, 8, 4, 3) if kind == "dense" else model)
        pure = functional_step(path, weights, genome, x, y)
        with torch.no_grad():
            free = functional_step(path, weights, genome, x, y)
        for name in ("weights", "states", "statistics"):
            torch.testing.assert_close(getattr(free, name), getattr(pure, name), rtol=1e-12, atol=1e-12)
        assert all(not torch.equal(a, b) for a, b in zip(free.weights.forward, weights.forward, strict=True))

    def test_members_one_by_one(self):
        path, weights, genome, x, y = self.case({}, (5, 8, 4, 3))
        with torch.inference_mode():
            together = functional_step(path, weights, genome, x, y)
            for i in range(3):
                own = Weights(tuple(w[i : i + 1] for w in weights.forward))
                alone = functional_step(path, own, genome[i], x[i : i + 1], y[i : i + 1])
                for a, b in zip(alone.weights.forward, together.weights.forward, strict=True):
                    torch.testing.assert_close(a[0], b[i], rtol=1e-12, atol=1e-12)

    def test_transforms_see_the_pure_step(self):
        path, weights, genome, x, y = self.case({}, (5, 8, 3))
        with torch.no_grad():
            inputs = torch.stack([x, 2 * x])
            many = torch.func.vmap(lambda t: functional_step(path, weights, genome, t, y).weights.forward)(inputs)
            for i in range(2):
                alone = functional_step(path, weights, genome, inputs[i], y).weights.forward
                for a, b in zip(many, alone, strict=True):
                    torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)
