"""The network that learns by a genome: on users' modules, with users' rows, saved and wrapped."""

import warnings

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.bidirectional_update_rules import (
    ArrayTasks,
    BlurNetwork,
    Diverged,
    Genome,
    MetaTrainer,
    check_backprop_identity,
    functional_step,
)

ACTIVATIONS = ["sigmoid", "tanh", "relu", "gelu", "silu", "softplus", "elu", "relu_tanh", "identity"]


@pytest.mark.parametrize("seed", range(8))
def test_the_backprop_genome_is_sgd(seed):
    """Depths, widths, activations and losses at random; square layers with unsymmetric weights among them."""
    g = torch.Generator().manual_seed(seed)
    depth = int(torch.randint(1, 5, (1,), generator=g))
    sizes = [3] * (depth + 1) if seed % 2 else torch.randint(2, 9, (depth + 1,), generator=g).tolist()
    name = ACTIVATIONS[seed % len(ACTIVATIONS)]
    for loss in ("cross_entropy", "squared"):
        found = check_backprop_identity(sizes, activation=name, loss=loss, steps=20, seed=seed)
        assert found.difference < 1e-12
        assert found.moved > 1e-3


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), nn.Tanh()),
        nn.AvgPool2d(2, stride=1), nn.Conv2d(4, 3, 2, stride=2), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(3, 5, bias=False), nn.GELU(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def frozen():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def shared():
    twice = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(6, 3)).double()


def pooled():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.SiLU(), nn.MaxPool2d(3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape"), [(convolutions, (2, 8, 8)), (frozen, None), (shared, None), (pooled, (2, 8, 8))]
)
def test_the_backprop_genome_is_sgd_on_users_modules(make, shape):
    torch.manual_seed(0)
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    assert check_backprop_identity(model, input_shape=shape, steps=8).difference < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the user's model is theirs"


def test_frozen_parameters_stay_bit_for_bit(rows):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    network = BlurNetwork(model, Genome.random(seed=0))
    network.learn(*rows)
    learned = network.weights.forward[0]
    assert torch.equal(learned[0, 0, :6].T, model[0].weight)
    assert not torch.equal(learned[0, 0, 6], model[0].bias)


class Hidden(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Softmax(1)), "Softmax"),
        (nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 3)), "'1' is a Dropout"),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "own normalization"),
        (nn.Sequential(nn.Linear(6, 4), Hidden(), nn.Linear(4, 3)), "'1' is a Hidden"),
        (nn.Sequential(nn.LSTM(6, 4)), "nothing to learn"),
        (nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3)), "'1' is a LSTM"),
        (nn.Linear(6, 3), "nn.Sequential"),
        (nn.Sequential(nn.LazyLinear(3)), "lazy|input_shape"),
        (nn.Sequential(nn.Linear(6, 3, device="meta")), "meta"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), "parametrized"),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 3)), "expects 5 inputs"),
        (nn.Sequential(nn.Tanh(), nn.Linear(6, 3)), "directly follow"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), "input_shape"),
    ],
)
def test_a_model_that_cannot_be_followed_is_refused_by_name(model, told):
    with pytest.raises(InvalidInput, match=told):
        BlurNetwork(model, Genome.backprop())


def test_grouped_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(InvalidInput, match="groups=1"):
        BlurNetwork(model, Genome.backprop(), input_shape=(2, 8, 8))


def test_learning_needs_no_autograd_and_leaves_normal_tensors(rows):
    network = BlurNetwork((6, 8, 3), "digits-2s")
    assert not any(p.requires_grad for p in network.parameters())
    with torch.inference_mode():
        network.learn(*rows)
    learned = network.learn(*rows)
    assert learned.rows == 64
    assert not any(w.is_inference() for w in network.weights.forward)
    vector = network.genome.to_vector()[0].clone().requires_grad_()
    x, y = rows[0].float()[None], rows[1][None]
    step = functional_step(network.path, network.weights, network.genome.from_vector(vector[None]), x, y)
    torch.autograd.grad(step.weights.forward[0].sum(), vector)


def test_predictions_do_not_depend_on_the_company(rows):
    x, y = rows
    network = BlurNetwork((6, 8, 3), "digits-2s")
    for _ in range(5):
        network.learn(x, y)
    network.calibrate(x)
    together = network(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x[order]), together[order], rtol=1e-5, atol=1e-6)
    alone = torch.cat([network(row[None]) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("genome", [Genome.random(seed=0), Genome.backprop(), Genome.random(seed=1, norm="none")])
def test_rows_that_are_not_there_change_nothing(rows, genome):
    x, y = rows
    padded = torch.cat([x, torch.zeros(3, 6)]), torch.cat([y, torch.full((3,), -100)])
    a, b = (BlurNetwork((6, 5, 3), genome, dtype=torch.float64) for _ in range(2))
    assert a.learn(x, y).rows == b.learn(*padded).rows == 64
    for u, v in zip(a.weights.forward, b.weights.forward, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-15, atol=1e-15)
    before = [w.clone() for w in a.weights.forward]
    assert a.learn(x[:0], y[:0]).rows == 0
    assert all(torch.equal(u, v) for u, v in zip(before, a.weights.forward, strict=True))


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.long), "flatten"),
        (torch.zeros(6), torch.zeros(1, dtype=torch.long), "batch"),
        (torch.zeros(4, 5), torch.zeros(4, dtype=torch.long), "6"),
        (torch.zeros(4, 6), torch.zeros(4), "integers"),
        (torch.zeros(4, 6), torch.zeros(4, 3, dtype=torch.long), "one-hot"),
        (torch.zeros(4, 6), torch.zeros(4, 1, dtype=torch.long), "shape"),
        (torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]), "from 0 to 2"),
        (torch.full((4, 6), torch.nan), torch.zeros(4, dtype=torch.long), "not finite"),
        (torch.zeros(1, 6), torch.zeros(1, dtype=torch.long), "one row"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(x, y, told):
    with pytest.raises(InvalidInput, match=told):
        BlurNetwork((6, 5, 3), "digits-2s").learn(x, y)


def test_more_refusals():
    with pytest.raises(InvalidInput, match="two outputs"):
        BlurNetwork((6, 1), Genome.backprop()).learn(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))
    with pytest.raises(InvalidInput, match="learned nothing"):
        BlurNetwork((6, 5, 3), "digits-2s")(torch.zeros(2, 6))
    with pytest.raises(InvalidInput, match="population of 4"):
        BlurNetwork((6, 3), Genome.random(seed=0, population=4))
    with pytest.raises(InvalidInput, match="mixes states"):
        BlurNetwork((6, 5, 3), "digits-2s").to_module()
    with pytest.raises(InvalidInput, match="3 layers"):
        BlurNetwork((6, 5, 3), Genome.random(seed=0, layers=3))


def test_divergence_is_told_and_undone(rows):
    genome = Genome.random(seed=0, norm="none")
    genome.numbers["synapse_update"] = torch.tensor(1e25)
    network = BlurNetwork((6, 5, 3), genome)
    network.learn(*rows)
    before = [w.clone() for w in network.weights.forward]
    with pytest.raises(Diverged, match="step 2 would make synapses of layer"):
        network.learn(*rows)
    assert all(torch.equal(u, v) for u, v in zip(before, network.weights.forward, strict=True))
    assert int(network.steps) == 1


def test_inputs_in_pixels_warn_and_standardized_ones_do_not(rows):
    x, y = rows
    with pytest.warns(UserWarning, match="saturated"):
        BlurNetwork((6, 5, 3), Genome.backprop(learning_rate=1e-6)).learn((255 * x.abs()).to(torch.uint8), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlurNetwork((6, 5, 3), Genome.backprop()).learn(x, y)


def test_a_sum_over_another_batch_size_warns(rows):
    genome = Genome.random(seed=0, reduction="sum")
    genome.card = {"batch_size": 32}
    with pytest.warns(UserWarning, match="batches of 32"):
        BlurNetwork((6, 5, 3), genome).learn(*rows)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dicts_from_inside_wrappers(rows, prefix):
    a, b = BlurNetwork((6, 5, 3), "digits-2s", seed=1), BlurNetwork((6, 5, 3), "digits-2s", seed=2)
    a.learn(*rows)
    b.load_state_dict({prefix + name: value for name, value in a.state_dict().items()})
    assert torch.equal(a(rows[0]), b(rows[0]))
    assert int(b.steps) == 1


def test_a_wrapped_user_model_is_unwrapped(rows):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    a, b = BlurNetwork(model, Genome.backprop()), BlurNetwork(nn.DataParallel(model), Genome.backprop())
    a.learn(*rows), b.learn(*rows)
    assert torch.equal(a(rows[0]), b(rows[0]))


def test_the_plain_module_computes_the_same(rows):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    network = BlurNetwork(model, Genome.backprop())
    network.learn(*rows)
    torch.testing.assert_close(network.to_module()(rows[0].float()), network(rows[0]), rtol=1e-6, atol=1e-6)


def test_half_precision_inputs_learn_in_the_networks_own_type(rows):
    x, y = rows
    network = BlurNetwork((6, 5, 3), "digits-2s")
    network.learn(x.half(), y)
    assert network.weights.forward[0].dtype == torch.float32
    assert network.learn(x.bfloat16(), y).rows == 64


def test_autocast_changes_nothing(rows):
    a, b = BlurNetwork((6, 5, 3), "digits-2s"), BlurNetwork((6, 5, 3), "digits-2s")
    a.learn(*rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        b.learn(*rows)
        assert torch.equal(a(rows[0]), b(rows[0]))


def test_a_convolution_learns_by_a_genome_and_layouts_of_memory_do_not_matter():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 1, 8, 8, generator=g)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    a, b = (BlurNetwork(model, Genome.random(seed=0), input_shape=(1, 8, 8)) for _ in range(2))
    for _ in range(3):
        a.learn(x, y), b.learn(x.to(memory_format=torch.channels_last), y)
    torch.testing.assert_close(a(x), b(x))
    learned = BlurNetwork(model, Genome.backprop(learning_rate=0.5), input_shape=(1, 8, 8))
    for _ in range(40):
        learned.learn(x, y)
    assert float((learned(x).argmax(1) == y).float().mean()) > 0.8


def test_a_convolutional_model_can_be_meta_trained():
    g = torch.Generator().manual_seed(0)
    tasks = ArrayTasks(torch.randn(60, 1, 6, 6, generator=g), torch.arange(60) % 2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2))
    trainer = MetaTrainer(tasks, Genome.random(seed=0, population=2), model=model, unroll=2, batch_size=16).fit(2)
    assert trainer.lost.tolist() == [0, 0]
    assert torch.isfinite(trainer.population.to_vector()).all()
