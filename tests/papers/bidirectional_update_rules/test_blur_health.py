"""Health of learning, in numbers and in words, counted by hand; and what users give that no rule can work with."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import nn

from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.papers.bidirectional_update_rules import (
    ArrayTasks,
    BlurClassifier,
    BlurNetwork,
    Diverged,
    Genome,
    MetaTrainer,
    Weights,
    compare_optimizers,
    distill_rule,
)
from mlcollage.papers.bidirectional_update_rules._activations import ACTIVATIONS
from mlcollage.papers.bidirectional_update_rules._layers import from_sizes
from mlcollage.papers.bidirectional_update_rules.health import look


def learned(rows, genome="digits-2s", steps=1, scale=1.0, **options):
    network = BlurNetwork((6, 5, 3), genome, **options)
    for _ in range(steps):
        last = network.learn(scale * rows[0], rows[1])
    return network, last


def test_saturated_and_dead_units_are_counted():
    states = torch.tensor([[[[0.9995, -1.0, 0.3, 0.0], [0.5, -1.0, 0.2, 0.0]]]])  # (1, 1, 2 rows, 4 units)
    path = from_sizes((2, 4, 3), ACTIVATIONS["tanh"], ACTIVATIONS["identity"])
    assert look(path, [states, torch.zeros(1, 1, 2, 3)]) == (3 / 8, 2 / 4)
    unbounded = from_sizes((2, 4, 3), ACTIVATIONS["relu"], ACTIVATIONS["identity"])
    assert look(unbounded, [states, torch.zeros(1, 1, 2, 3)]) == (0.0, 2 / 4)


def test_pixels_saturate_and_unit_inputs_do_not():
    """784 pixels of 0 to 255 on initial synapses of deviation 0.1: nearly every tanh is at its bound."""
    genome = Genome.random(seed=0, norm="none", initial_scale="plain")
    genome.numbers["initial_std"] = torch.tensor(0.1)
    g = torch.Generator().manual_seed(0)
    pixels, y = torch.randint(0, 256, (64, 784), generator=g), torch.arange(64) % 10
    with pytest.warns(UserWarning, match="saturated .* standardize"):
        raw = BlurNetwork((784, 64, 10), genome).learn(pixels.to(torch.uint8), y)
    assert raw.saturated > 0.97
    with pytest.warns(UserWarning, match="saturated"):  # far below 50, the largest input says nothing
        BlurNetwork((784, 64, 10), genome).learn(pixels / 6.5, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit = BlurNetwork((784, 64, 10), genome).learn(pixels / 255, y)
    assert unit.saturated < 0.1


def test_the_course_of_accuracy_is_reported_and_a_fall_is_told(rows):
    x, y = rows
    network = BlurNetwork((6, 5, 3), "digits-2s")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [network.learn(x, y).accuracy for _ in range(256)]
    h = network.health()
    assert (h.steps, h.first_accuracy, h.last_accuracy) == (256, found[0], found[-1])
    assert (h.peak_accuracy, h.peak_step) == (max(found), int(np.argmax(found)))
    assert h.majority == pytest.approx(float(y.bincount().max()) / len(y))
    start = BlurNetwork((6, 5, 3), "digits-2s")
    ratio = [sum(float(w.square().sum()) for w in n.weights.forward) ** 0.5 for n in (network, start)]
    assert h.growth == pytest.approx(ratio[0] / ratio[1], rel=1e-4)
    assert h.growth > 1e4
    words = [str(w.message) for w in told]
    assert sum("trained for 20 steps" in s for s in words) == sum("have grown" in s for s in words) == 1
    assert h.statistics == "last batch"
    network.calibrate(x)
    assert network.health().statistics == "training rows"


def test_constant_inputs_are_dead_units_and_shuffled_labels_teach_nothing(rows):
    x, y = rows
    with pytest.warns(UserWarning, match="100% of the hidden units are dead"):
        assert learned((torch.ones_like(x), y))[1].dead == 1.0
    g = torch.Generator().manual_seed(0)
    network = BlurNetwork((6, 5, 3), Genome.backprop(learning_rate=0.01))
    for _ in range(15):
        network.learn(torch.randn(64, 6, generator=g), torch.randint(3, (64,), generator=g).clamp(max=1))
    with pytest.warns(UserWarning, match="Nothing was learned"):
        network.learn(torch.randn(64, 6, generator=g), torch.ones(64, dtype=torch.long))


def test_a_healthy_run_says_nothing(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network, _ = learned(rows, steps=8)
    assert network.health().advice == ()


def test_the_classifier_reports_its_health(tmp_path):
    X, y = load_iris(return_X_y=True)
    model = BlurClassifier(random_state=0).fit(X, y)
    assert model.health_.steps == len(model.history_) == 20
    assert model.health_.first_accuracy == model.history_[0]
    assert model.health_.statistics == "training rows"
    again = BlurClassifier.load(model.save(tmp_path / "m.safetensors"))
    assert again.health_ == model.health_
    with pytest.warns(UserWarning, match="Accuracy on batches fell"):
        BlurClassifier(random_state=0, max_steps=150, batch_size=150, keep_best=False).fit(X, y)
    with warnings.catch_warnings(record=True) as told:  # the best step came back: the fall does no harm
        warnings.simplefilter("always")
        BlurClassifier(random_state=0, max_steps=150, batch_size=150).fit(X, y)
    assert not any("fell" in str(w.message) for w in told)
    with pytest.warns(UserWarning, match="dead"):
        BlurClassifier(random_state=0).fit(np.ones_like(X), y)


def test_statistics_of_a_stream_are_of_more_than_its_last_rows():
    X, y = load_iris(return_X_y=True)
    model = BlurClassifier(random_state=0).fit(X, y)
    model.partial_fit(X[:2], y[:2])
    network = model.network_
    kept = [v.clone() for v in network.statistics[0]]
    network.calibrate(model._tensors(np.concatenate([X, X[:2]])))
    for a, b in zip(kept, network.statistics[0], strict=True):
        torch.testing.assert_close(a, b)


def test_one_number_is_one_hidden_layer():
    X, y = load_iris(return_X_y=True)
    one, layer = (BlurClassifier(hidden_layer_sizes=h, max_steps=3, random_state=0).fit(X, y) for h in (7, (7,)))
    assert np.array_equal(one.decision_function(X), layer.decision_function(X))


# ---------------------------------------------------------------------- what cannot be worked with


class Own(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].register_forward_hook(lambda module, given, out: 2 * out)
    return model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Own(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), "own forward"),
        (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Own(nn.Linear(5, 5)), nn.Linear(5, 3)), "'2' is a Own.*forward"),
        (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Doubled(5, 3)), "'2' is a Doubled.*forward"),
        (nn.Sequential(Doubled(6, 3)), "'0' is a Doubled.*forward"),
        (hooked(), "'1' has a forward hook"),
        (nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 3))), "hook"),
    ],
)
def test_what_computes_in_its_own_way_is_refused(model, told):
    with pytest.raises(InvalidInput, match=told):
        BlurNetwork(model, Genome.backprop())


def test_the_models_type_is_kept(rows):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    network = BlurNetwork(model, Genome.backprop())
    network.learn(*rows)
    assert network.weights.forward[0].dtype == network(rows[0]).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_synapses_in_half_precision_are_refused(dtype):
    with pytest.raises(InvalidInput, match="rounding"):
        BlurNetwork((6, 3), Genome.backprop(), dtype=dtype)


def test_logits_that_are_not_finite_are_no_class():
    network = BlurNetwork((6, 5, 3), Genome.backprop())
    network.weights = Weights(tuple(torch.full_like(w, torch.nan) for w in network.weights.forward))
    with pytest.raises(Diverged, match="logits"):
        network(torch.zeros(2, 6))
    broken = Genome.random(seed=0).map(lambda v: v * torch.nan)
    with pytest.raises(InvalidInput, match="not finite"):
        BlurNetwork((6, 3), broken)


def test_rows_that_are_not_there_may_hold_anything(rows):
    x, y = rows
    a, b = (BlurNetwork((6, 5, 3), "digits-2s", dtype=torch.float64) for _ in range(2))
    a.learn(x, y)
    b.learn(torch.cat([x, torch.full((2, 6), torch.nan)]), torch.cat([y, torch.tensor([-100, -100])]))
    for u, v in zip(a.weights.forward, b.weights.forward, strict=True):
        torch.testing.assert_close(u, v, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "changed",
    [{"backward_activation": "tanh"}, {"norm": "both"}, {"symmetric": False}, {"multistate": True}, {"oja": "weights"}],
    ids=str,
)
def test_a_backprop_genome_that_is_none_is_refused(changed):
    (name,) = changed
    with pytest.raises(InvalidInput, match=f"{name}=.* not backprop"):
        Genome.backprop(**changed)
    assert Genome.backprop(exact=False, **changed).settings.k == 2


def test_a_file_needs_no_suffix(tmp_path):
    genome = Genome.random(seed=0)
    assert torch.equal(Genome.load(genome.save(tmp_path / "mine")).to_vector(), genome.to_vector())
    with pytest.raises(MissingFile):
        Genome.load(str(tmp_path / "yours"))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda n, x, y: n.learn(x, ["a"] * 64), "labels must be"),
        (lambda n, x, y: n.learn([["a"] * 6] * 64, y), "inputs must be"),
        (lambda n, x, y: n.learn(x, y, feedback=lambda out, target: target.float()), "logits' shape"),
        (lambda n, x, y: ArrayTasks(x, ["a"] * 64), "numbers"),
        (lambda n, x, y: ArrayTasks(x, y + 0.5), "whole"),
        (lambda n, x, y: compare_optimizers(x, y, x[:, :3], y), "3 features"),
        (lambda n, x, y: compare_optimizers(x, y, x, y, horizons=()), "empty"),
        (lambda n, x, y: MetaTrainer("mnist", Genome.random(seed=0)), "tasks must be"),
    ],
)
def test_more_that_is_refused_in_a_sentence(rows, call, told):
    with pytest.raises(InvalidInput, match=told):
        call(BlurNetwork((6, 5, 3), "digits-2s"), *rows)


class Given:
    """A user's distribution, with a mistake."""

    input_shape, classes = (6,), 3

    def __init__(self, features=6, label=0):
        self.features, self.label = features, label

    def sample(self, n_tasks, n_steps, batch, generator):
        shape = n_tasks, n_steps, batch
        return torch.zeros(*shape, self.features), torch.full(shape, self.label)


@pytest.mark.parametrize(
    ("tasks", "told"), [(Given(features=5), "must give inputs"), (Given(label=3), "labels outside")]
)
def test_a_distribution_that_gives_something_else(tasks, told):
    with pytest.raises(InvalidInput, match=told):
        MetaTrainer(tasks, Genome.random(seed=0), unroll=2, batch_size=8)


def test_training_does_not_go_on_with_other_data_or_horizons(rows, tmp_path):
    def trainer(tasks, **options):
        return MetaTrainer(tasks, Genome.random(seed=0), **{"hidden": (4,), "unroll": 3, "batch_size": 8, **options})

    tasks = ArrayTasks(*rows)
    path = trainer(tasks).fit(1).save(tmp_path / "t.safetensors")
    assert trainer(tasks).resume(path).updates == 1
    with pytest.raises(InvalidInput, match="unroll"):
        trainer(tasks, unroll=4).resume(path)
    with pytest.raises(InvalidInput, match="unroll"):
        trainer(tasks, horizons=(1, 3)).resume(path)
    with pytest.raises(InvalidInput, match="data"):
        trainer(ArrayTasks(rows[0] + 1, rows[1])).resume(path)


def test_lost_populations_and_too_much_memory(rows):
    tasks = ArrayTasks(*rows)
    lost = MetaTrainer(tasks, Genome.random(seed=0, population=2), hidden=(4,), unroll=2, batch_size=8)
    lost._vector[:] = torch.nan
    with pytest.raises(Diverged, match="ever right"):
        lost.fit(1).best()
    large = MetaTrainer(tasks, Genome.random(seed=0, population=64), hidden=(4096,), unroll=900, batch_size=512)
    with pytest.warns(UserWarning, match="GB"):
        large.fit(0)
    search = MetaTrainer(tasks, Genome.random(seed=0), hidden=(4,), method="cmaes", unroll=2, particles=4, batch_size=8)
    with pytest.raises(InvalidInput, match="0 finite costs"):
        search.tell(search.ask(), torch.full((4,), torch.nan))
    with pytest.raises(InvalidInput, match="3 candidates"):
        search.tell(search.ask()[:3], torch.zeros(3))


# ---------------------------------------------------------------------- a rule in a few terms


def test_a_known_rule_is_distilled_to_its_terms():
    """One channel: the coefficients are η̃ ν̃ᵉ¹ μ̃¹ᵈ, and f̃ - 1 for the synapse itself."""
    genome = Genome.random(k=3, seed=0, multistate=False, step_scale="fan_in").to(torch.float64)
    genome.numbers["hebb_pre"][1:, 0] = 0.0
    genome.numbers["hebb_post"][0, 2] = 0.0
    genome.numbers["synapse_keep"] = torch.tensor(1.25, dtype=torch.float64)
    network = BlurNetwork((6, 5, 3), genome, dtype=torch.float64)
    before = [w.clone() for w in network.weights.forward]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 32, 6, generator=g, dtype=torch.float64), torch.randint(3, (4, 32), generator=g)
    table = distill_rule(network, x, y, tolerance=1e-9)
    n = genome.numbers
    expected = {
        f"a_i^1 a_j^{d + 1}": float(n["synapse_update"] * n["hebb_pre"][0, 0] * n["hebb_post"][0, d]) for d in (0, 1)
    }
    assert dict(zip(table["term"], table["coefficient"], strict=True)) == pytest.approx({**expected, "w": 0.25})
    assert table["explained"].is_monotonic_increasing
    assert table["explained"].iloc[-1] == pytest.approx(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, network.weights.forward, strict=True))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    images = BlurNetwork(model, Genome.backprop(), input_shape=(1, 4, 4))
    with pytest.raises(InvalidInput, match="dense"):
        distill_rule(images, x, y)
