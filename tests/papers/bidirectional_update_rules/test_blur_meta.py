"""Meta-training: three methods, guards, curriculum, selection, resuming; comparisons with optimizers."""

import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.papers.bidirectional_update_rules import (
    ArrayTasks,
    BlurNetwork,
    Genome,
    MetaTrainer,
    TaskDistribution,
    ToyTasks,
    compare_optimizers,
    run_episode,
    update_asymmetry,
)
from mlcollage.papers.bidirectional_update_rules.meta import _score
from mlcollage.papers.bidirectional_update_rules.tasks import TOYS


@pytest.fixture(scope="module")
def tasks():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=g)
    return ArrayTasks(x, x[:, :3].argmax(1))


def trainer(tasks, method="gradient", **options):
    population = 3 if method == "gradient" else None
    settings = {"hidden": (6,), "unroll": 4, "batch_size": 24, "seed": 1, "particles": 6, **options}
    return MetaTrainer(tasks, Genome.random(seed=2, population=population), method=method, **settings)


def test_tasks_fit_the_protocol(tasks):
    for source in (tasks, ToyTasks()):
        assert isinstance(source, TaskDistribution)
        x, y = source.sample(2, 3, 10, torch.Generator().manual_seed(0))
        assert x.shape == (2, 3, 10, *source.input_shape)
        assert int(y.max()) < source.classes
    x, _ = tasks.sample(1, 1, 100, torch.Generator().manual_seed(0))
    assert len(x[0, 0].unique(dim=0)) == 100, "no row twice in a batch"


def test_tasks_of_a_few_classes_and_projections(tasks):
    few = ArrayTasks(tasks.X, tasks.y, ways=2, features=7)
    assert (few.classes, few.input_shape) == (2, (7,))
    x, y = few.sample(5, 3, 40, torch.Generator().manual_seed(0))
    assert x.shape == (5, 3, 40, 7)
    assert y.unique().tolist() == [0, 1]
    assert torch.allclose(x.flatten(1, 2).std(1), torch.ones(5, 7), atol=1e-3)
    with pytest.raises(InvalidInput, match="ways"):
        ArrayTasks(tasks.X, tasks.y, ways=4)


@pytest.mark.parametrize("name", TOYS)
def test_toy_functions_have_all_their_classes(name):
    _, y = ToyTasks((name,)).sample(1, 1, 4000, torch.Generator().manual_seed(0))
    assert y.unique().tolist() == list(range(TOYS[name][0]))


def test_gradients_teach_genomes(tasks):
    t = trainer(tasks, learning_rate=0.05).fit(40)
    early, late = (np.mean([r["median_loss"] for r in part]) for part in (t.history[:8], t.history[-8:]))
    assert late < 0.9 * early
    assert t.evaluate(episodes=3).shape == (3, 1, 3)
    best = t.best(episodes=4)
    accuracies = t.evaluate(episodes=4).mean((0, 1))
    assert torch.equal(best.to_vector(), t.population[int(accuracies.argmax())].to_vector())


@pytest.mark.parametrize(
    ("method", "options"),
    [("cmaes", {"fitness": "loss", "sigma": 0.3}), ("pes", {"fitness": "loss", "truncation": 2, "particles": 16})],
)
def test_evolution_teaches_a_genome(tasks, method, options):
    t = trainer(tasks, method, **options)
    before = t.evaluate(episodes=6, seed=9).mean()
    t.fit(30)
    assert t.evaluate(episodes=6, seed=9).mean() > before
    assert t.population.population == 1


def test_checkpointing_and_whole_windows_give_the_same_gradient(tasks):
    plain, saving = trainer(tasks, unroll=9).fit(2), trainer(tasks, unroll=9, checkpointed=True).fit(2)
    torch.testing.assert_close(plain.population.to_vector(), saving.population.to_vector(), rtol=1e-5, atol=1e-6)
    window = trainer(tasks, unroll=9, truncation=9).fit(2)
    assert torch.equal(plain.population.to_vector(), window.population.to_vector())
    cut = trainer(tasks, unroll=9, truncation=3).fit(2)
    assert not torch.allclose(plain.population.to_vector(), cut.population.to_vector())
    assert saving.memory_estimate() < plain.memory_estimate()


def test_the_truncated_gradient_is_that_of_the_last_window(tasks):
    genome = Genome.random(seed=3, population=1).to(torch.float64)
    path = trainer(tasks).paths[0]
    x, y = tasks.sample(1, 5, 16, torch.Generator().manual_seed(0))
    x = x.double()
    vector = genome.to_vector().requires_grad_()
    parts = (x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])
    loss = run_episode(path, genome.from_vector(vector), *parts, horizons=(4,), truncation=2).losses.sum()
    (cut,) = torch.autograd.grad(loss, vector)
    with torch.no_grad():
        middle = run_episode(path, genome, x[:, :2], y[:, :2], *parts[2:], horizons=(2,)).weights
    rest = (x[:, 2:4], y[:, 2:4], x[:, -1], y[:, -1])
    loss = run_episode(path, genome.from_vector(vector), *rest, horizons=(2,), weights=middle).losses.sum()
    (expected,) = torch.autograd.grad(loss, vector)
    torch.testing.assert_close(cut, expected, rtol=1e-10, atol=1e-12)


def test_one_broken_member_does_not_touch_the_others(tasks):
    whole, broken = trainer(tasks), trainer(tasks)
    broken._vector[1] = torch.nan
    whole.fit(3), broken.fit(3)
    others = [0, 2]
    assert torch.equal(whole.population.to_vector()[others], broken.population.to_vector()[others])
    assert broken.lost.tolist() == [0, 3, 0]
    assert broken.history[-1]["lost"] == 1


def test_what_is_not_finite_is_never_right():
    logits = torch.zeros(2, 4, 3)
    logits[0, 0, 0] = torch.nan
    loss, hits = _score(logits, torch.zeros(1, 4, dtype=torch.long))
    assert hits.mean(1).tolist() == [0.0, 1.0]
    assert loss[0] > loss[1]


@pytest.mark.parametrize(("method", "options"), [("gradient", {"curriculum": ((2, 6),)}), ("cmaes", {}),
                                                 ("pes", {"truncation": 2})])  # fmt: skip
def test_resuming_is_bit_for_bit(tasks, method, options, tmp_path):
    whole = trainer(tasks, method, **options).fit(5)
    first = trainer(tasks, method, **options).fit(3)
    path = first.save(tmp_path / "meta.safetensors")
    again = trainer(tasks, method, **options).resume(path).fit(2)
    assert torch.equal(whole.population.to_vector(), again.population.to_vector())
    assert whole.history == again.history
    with pytest.raises(InvalidInput, match="batch_size"):
        trainer(tasks, method, **{**options, "batch_size": 25}).resume(path)


def test_a_curriculum_copies_the_best_with_its_moments(tasks):
    t = trainer(tasks, curriculum=((3, 8),), horizons=(1, 4)).fit(3)
    t._stage()
    assert t.unroll == 8
    assert t.horizons == (2, 8)
    assert (t._vector == t._vector[0]).all()
    assert (t._moments[0] == t._moments[0][0]).all()


def test_cma_leaves_global_randomness_alone_and_seed_0_is_a_seed(tasks):
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    a, b = (trainer(tasks, "cmaes", seed=0).fit(2).population.to_vector() for _ in range(2))
    assert torch.equal(a, b)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_ask_and_tell_by_hand(tasks):
    t = trainer(tasks, "cmaes")
    candidates = t.ask()
    costs, _ = t.costs(candidates)
    assert candidates.shape == (6, 29)
    costs[2] = torch.nan  # counts as the worst
    t.tell(candidates, costs)
    flat = t.ask()
    t.tell(flat, torch.full((6,), 0.5))  # ties do not end the search
    assert t.ask().shape == (6, 29)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "cmaes", "particles": 3}, "at least 4"),
        ({"method": "pes", "truncation": 3}, "divides"),
        ({"horizons": (1, 2)}, "unroll"),
        ({"batch_size": 1}, "at least 2 rows"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"hidden": ((3,), (4,))}, "1 distributions"),
    ],
)
def test_settings_that_cannot_work(tasks, options, told):
    with pytest.raises(InvalidInput, match=told):
        trainer(tasks, **options)


def test_too_few_batches_and_bad_tasks(tasks):
    path = trainer(tasks).paths[0]
    x, y = tasks.sample(1, 3, 8, torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInput, match="there are 3"):
        run_episode(path, Genome.random(seed=0), x, y, x[:, 0], y[:, 0], horizons=(4,))
    with pytest.raises(InvalidInput, match="classes from 0"):
        ArrayTasks(torch.zeros(3, 2), torch.tensor([0, 1, 5]), classes=3)
    with pytest.raises(InvalidInput, match="finite"):
        ArrayTasks(torch.full((3, 2), torch.inf), torch.tensor([0, 1, 2]))
    with pytest.raises(InvalidInput, match="network 0 was trained"):
        trainer(tasks).best(ToyTasks())


def test_several_distributions_take_turns(tasks):
    t = MetaTrainer([tasks, ToyTasks(("and",))], Genome.random(seed=0, population=2), hidden=((4,), (5, 3)), unroll=2)
    t.fit(2)
    assert [len(p.layers) for p in t.paths] == [2, 3]


class TestComparison:
    @pytest.fixture
    def table(self):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(400, 5, generator=g)
        y = x[:, :3].argmax(1)
        return compare_optimizers(
            x[:300],
            y[:300],
            x[300:],
            y[300:],
            genomes={"rule": "digits-2s"},
            horizons=(5, 40),
            budget=6,
            seeds=(0, 1, 2),
        )

    def test_it_is_tidy_and_every_method_learns(self, table):
        assert list(table.columns) == ["method", "seed", "step", "accuracy", "setting"]
        assert len(table) == 5 * 3 * 2
        late = table[table["step"] == 40].groupby("method")["accuracy"].mean()
        assert (late.drop("rule") > 0.8).all()
        assert late["rule"] > 0.6

    def test_sgd_is_torchs(self):
        """One setting, followed by torch's own SGD on the same batches."""
        from mlcollage.papers.bidirectional_update_rules.comparison import _descend

        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(1, 8, 16, 4, generator=g), torch.randint(3, (1, 8, 16), generator=g)
        test = torch.randn(1, 50, 4, generator=g), torch.randint(3, (1, 50), generator=g)
        found = _descend("sgd", [(0.5, 0.9)], (4, 5, 3), "tanh", x, y, test, (8,), (3,))
        from mlcollage._random import generator

        draw, layers = generator(3, 0xB), []
        for n, m in ((4, 5), (5, 3)):
            w = (2 * torch.rand(n + 1, m, generator=draw) - 1) * n**-0.5
            layers.append(torch.nn.Linear(n, m))
            layers[-1].weight.data, layers[-1].bias.data = w[:-1].T.clone(), w[-1].clone()
        model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
        sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for t in range(8):
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(model(x[0, t]), y[0, t]).backward()
            sgd.step()
        accuracy = float((model(test[0][0]).argmax(1) == test[1][0]).float().mean())
        assert float(found[0, 0, 0]) == pytest.approx(accuracy, abs=1e-6)


class TestAsymmetry:
    def batch(self):
        g = torch.Generator().manual_seed(0)
        return torch.randn(24, 5, generator=g), torch.randint(3, (24,), generator=g)

    @pytest.mark.parametrize("most", [5000, 3])
    def test_backprop_has_none_and_learned_rules_do(self, most):
        assert update_asymmetry(BlurNetwork((5, 4, 3), Genome.backprop()), *self.batch(), most=most).value < 1e-10
        assert update_asymmetry(BlurNetwork((5, 4, 3), "digits-2s"), *self.batch(), most=most).value > 1e-3

    def test_probes_estimate_the_whole(self):
        network = BlurNetwork((5, 4, 3), "digits-2s")
        whole = update_asymmetry(network, *self.batch())
        estimate = update_asymmetry(network, *self.batch(), most=1, probes=64)
        assert estimate.jacobian is None
        assert abs(estimate.value - whole.value) < 6 * estimate.standard_error
