import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.mlp import MLP
from mlcollage.papers.deep_bootstrap import DeepBootstrap, FiniteAsIdeal
from mlcollage.papers.deep_bootstrap.result import COLUMNS
from mlcollage.train.schedules import cosine

METRICS = ["loss", "error", "soft_error"]


@pytest.fixture
def study(tiny_world):
    """A study of seconds; keywords change it."""

    def make(world=None, model=None, **settings):
        world = world or tiny_world()
        usual = {
            "n": (32, 96),
            "steps": 40,
            "batch_size": 16,
            "seeds": 2,
            "test_size": 150,
            "eval_at": 8,
            "device": "cpu",
        }
        usual["optimizer_fn"] = partial(torch.optim.SGD, lr=0.3, momentum=0.5)
        return DeepBootstrap(
            model or (lambda: MLP(world.shape, world.num_classes, (16,))), world, **{**usual, **settings}
        )

    return make


def same(a, b, **tolerance):
    pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True), **tolerance)


# ---- independent truths ----


def test_linear_regression_follows_its_closed_form_in_both_worlds(tiny_world, study):
    """With n = batch the Real World is full-batch gradient descent, whose every iterate is known."""
    world = tiny_world(num_classes=0, dim=6, dtype=torch.float64)
    lr, b, steps = 0.05, 12, 30
    result = study(
        world,
        lambda: nn.Linear(6, 1, bias=False, dtype=torch.float64),
        n=b,
        batch_size=b,
        steps=steps,
        seeds=[0],
        loss="mse",
        schedule=None,
        optimizer_fn=partial(torch.optim.SGD, lr=lr),
        eval_at=range(steps + 1),
    ).run()
    torch.manual_seed(0)
    w0 = nn.Linear(6, 1, bias=False, dtype=torch.float64).weight.detach().numpy().ravel()
    x, y = (v.numpy() for v in world.batch(0, b))
    x_test, y_test = (v.numpy() for v in world.fixed(150, split="test").tensors)

    # w_t = w* + (I - 2 lr/n X'X)^t (w_0 - w*)
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    shrink = np.eye(6) - 2 * lr / b * x.T @ x
    real = [best + np.linalg.matrix_power(shrink, t) @ (w0 - best) for t in range(steps + 1)]
    ideal = [w0]
    for t in range(steps):
        xt, yt = (v.numpy() for v in world.batch(t, b))
        ideal.append(ideal[-1] - 2 * lr / b * xt.T @ (xt @ ideal[-1] - yt))
    for name, weights in (("real", real), ("ideal", ideal)):
        expected = [np.mean((x_test @ w - y_test) ** 2) for w in weights]
        assert np.allclose(result.select(name)["loss"], expected, rtol=1e-10)
    train = [np.mean((x @ w - y) ** 2) for w in real]
    assert np.allclose(result.select("real", "train")["loss"], train, rtol=1e-10)
    assert result.select("real")[["error", "soft_error"]].isna().all(axis=None)


def test_over_parameterized_regression_leaves_the_ideal_path(tiny_world, study):
    """The boundary of the claim: with d > n the Real World fits its noise and the Ideal World does not."""
    world = tiny_world(num_classes=0, dim=40, noise=3.0)
    result = study(world, lambda: nn.Linear(40, 1), n=20, batch_size=20, steps=400, loss="mse", seeds=3, schedule=None,
                   optimizer_fn=partial(torch.optim.SGD, lr=0.02)).run()  # fmt: skip
    gap = result.gap("loss", at="end")
    assert (gap["gap"] > 1).all()
    assert (result.gap("loss", at=1)["gap"] == 0).all()


def test_worlds_are_one_run_until_a_sample_comes_back(study):
    result = study(n=(32, 96), eval_at=range(41), stack=False).run()
    gaps = result.gaps("loss")
    for n, last in ((32, 2), (96, 6)):
        g = gaps[gaps["n"] == n].groupby("step")["gap"].apply(lambda v: v.abs().max())
        assert (g[g.index <= last] == 0).all()
        assert (g[g.index > last] > 0).all()


def test_less_than_an_epoch_of_a_finite_ideal_world_is_the_ideal_world(tiny_world, study):
    """With n = steps * batch no sample comes back, so that the Real World *is* the Ideal World."""
    world = FiniteAsIdeal(tiny_world().fixed(1000), test=200)
    result = study(world, n=(640,), steps=40, batch_size=16).run()
    assert (result.gaps("loss")["gap"] == 0).all()
    assert world.passes == result.settings["ideal_passes"] == 640 / 800


def test_independent_sets_agree_with_the_stream_in_distribution(study):
    common = {"n": (640,), "steps": 40, "seeds": 12, "test_size": 400, "eval_at": [40]}
    result = study(coupling="independent", **common).run()
    gap = result.gap("loss", at="end")["gap"]
    assert gap.abs().min() > 0
    assert abs(gap.mean()) < 3 * gap.std() / math.sqrt(12)


def test_the_ideal_world_does_not_depend_on_n(study):
    a, b = study(n=(32, 96)).run(), study(n=(64,)).run()
    same(a.select("ideal"), b.select("ideal"), rtol=1e-5)


def test_one_size_does_not_depend_on_the_others(study):
    a, b = (study(n=n, stack=False).run() for n in ((32, 96), (32,)))
    same(a.select("real", n=32), b.select("real", n=32))
    same(a.select("real", "train", n=32), b.select("real", "train", n=32))


def test_a_seed_does_not_depend_on_the_others(study):
    a, b = study(seeds=[0, 5], stack=False).run(), study(seeds=[5], stack=False).run()
    same(a.curves[a.curves["seed"] == 5], b.curves)
    assert a.select("ideal", seed=0)["loss"].iloc[-1] != b.select("ideal")["loss"].iloc[-1]


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", lambda logits, y: nn.functional.cross_entropy(logits, y)])
def test_stacked_training_equals_one_after_the_other(study, tiny_world, norm, loss):
    def model():
        return MLP((5,), 3, (16,), norm=norm)

    a, b = (study(tiny_world(), model, loss=loss, stack=stack).run() for stack in (True, False))
    assert (a.settings["stacked"], b.settings["stacked"]) == (True, False)
    same(a.curves, b.curves, rtol=1e-3, atol=1e-4)


def test_stopping_early_ends_the_same_curves_whether_stacked_or_not(study):
    full = study(steps=80, stack=False).run()
    results = [study(steps=80, stop=("train_loss", 0.5), stack=stack).run() for stack in (True, False)]
    same(results[0].curves, results[1].curves, rtol=1e-3, atol=1e-4)
    for seed in (0, 1):
        t = full.stopping_time(32, "train_loss", seed=seed, threshold=0.5)
        rows = results[1].select("real", n=32, seed=seed)
        assert 0 < t < 80
        assert rows["step"].max() == t
        assert full.select("real", n=32, seed=seed)["loss"].iloc[: len(rows)].tolist() == rows["loss"].tolist()
    same(results[1].select("ideal"), full.select("ideal"))


# ---- what the run promises ----


def test_same_seed_same_table_and_the_global_random_state_is_left_alone(study):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = study(model=lambda: nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Linear(16, 3))).run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    b = study(model=lambda: nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.3), nn.Linear(16, 3))).run()
    same(a.curves, b.curves)
    assert not a.settings["stacked"]  # dropout noise must be shared by the worlds
    assert (a.gap("loss", at=1)["gap"] == 0).all()


def test_the_table_has_one_row_an_evaluation(study):
    result = study(eval_at=[10, 20]).run()
    c = result.curves
    assert tuple(c.columns) == COLUMNS
    assert set(c["step"]) == {0, 10, 20, 40}
    assert len(c) == 4 * 2 * (1 + 2 * 2)  # steps, seeds, ideal test + real train and test
    assert c.loc[c["world"] == "ideal", "n"].eq(math.inf).all()
    assert set(c.loc[c["world"] == "ideal", "split"]) == {"test"}
    assert not c[METRICS].isna().any(axis=None)


def test_training_works(study):
    result = study(
        steps=300, n=(64,), seeds=1, schedule="cosine", optimizer_fn=partial(torch.optim.Adam, lr=0.03)
    ).run()
    assert result.stopping_time(64) is not None
    assert result.select("ideal")["error"].iloc[-1] < 0.2
    assert result.gap("error", at="end")["gap"].item() > 0


def test_progress_counts_all_updates(study):
    for stack in (True, False):
        calls = []
        study(stack=stack, stop=("train_loss", 0.8)).run(lambda done, total, calls=calls: calls.append((done, total)))
        assert calls[-1] == (240, 240)
        assert [d for d, _ in calls] == sorted({d for d, _ in calls})


def test_schedule_is_the_same_function_for_every_world(study):
    asked = []

    def schedule(step):
        asked.append(step)
        return 1.0 if step < 10 else 0.0

    result = study(schedule=schedule, eval_at=[10, 20], stack=False).run()
    for _, rows in result.curves.groupby(["world", "n", "seed", "split"]):
        assert rows.set_index("step")["loss"][10] == rows.set_index("step")["loss"][40]
    assert set(asked) == set(range(40))


def test_augmentation_changes_training_in_both_worlds_alike_and_not_the_metrics(study):
    seen = []

    def augment(x, generator):
        seen.append(len(x))
        return x + torch.randn(x.shape, generator=generator)

    plain, noisy = study(stack=False).run(), study(stack=False, augment=augment).run()
    assert set(seen) == {16}
    assert len(seen) == 40 * 6
    assert (noisy.gap("loss", at=1)["gap"] == 0).all()  # the same draws in both worlds
    same(plain.curves[plain.curves["step"] == 0], noisy.curves[noisy.curves["step"] == 0])
    assert not np.allclose(plain.select("ideal")["loss"][1:], noisy.select("ideal")["loss"][1:])


def test_transform_is_applied_to_all_inputs(study, tiny_world):
    class Scaled(tiny_world):
        def _block(self, split, index):
            x, y = super()._block(split, index)
            return x * 2 - 1, y

    for stack in (True, False):
        a = study(transform=lambda x: x * 2 - 1, stack=stack).run()
        same(a.curves, study(Scaled(), stack=stack).run().curves, rtol=1e-6)


@pytest.mark.parametrize("stack", [True, False])
def test_a_loss_of_ones_own_sees_a_number_per_target(tiny_world, study, stack):
    """Outputs (b, 1) against targets (b,) would be broadcast to all pairs."""
    world = tiny_world(num_classes=0)
    curves = [
        study(world, lambda: nn.Linear(world.shape[0], 1), loss=loss, stack=stack).run().curves
        for loss in ("mse", nn.functional.mse_loss)
    ]
    same(*curves, rtol=1e-6)


def test_squared_error_has_an_error_but_no_soft_error(study):
    result = study(loss="mse").run()
    assert result.curves["soft_error"].isna().all()
    assert result.gap("error", at="end")["gap"].notna().all()
    with pytest.raises(InvalidInput, match="has no soft_error: it was trained with loss='mse'"):
        result.gap("soft_error")


def test_train_metrics_use_the_first_samples_of_a_large_set(study):
    a, b = (study(train_size=k, stack=stack).run() for k, stack in ((40, True), (40, False)))
    same(a.curves, b.curves, rtol=1e-3, atol=1e-4)
    c = a.select("real", "train", n=96)["error"] * 40
    assert np.allclose(c, c.round(), atol=1e-4)


# ---- bad input ----


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 8}, "n=8 is less than a batch of 16"),
        ({"n": 1000}, "less than one epoch"),
        ({"n": ()}, "give at least one sample size"),
        ({"n": (32, -1)}, "n must be a whole number of at least 1, not -1"),
        ({"seeds": [1, 1]}, "each only once"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"schedule": {"real": cosine(40), "ideal": cosine(20)}}, "both worlds need the same schedule"),
        ({"schedule": (cosine(40), cosine(20))}, "both worlds need the same schedule"),
        ({"schedule": lambda step: [1.0, 0.5][step]}, "both worlds need the same schedule"),
        ({"schedule": "linear"}, "both worlds need the same schedule"),
        ({"loss": "hinge"}, "loss='hinge' is not known"),
        ({"eval_at": [50]}, "a step of eval_at must be .* at most 40, not 50"),
        ({"eval_at": "all"}, "eval_at must be one of 'log', not 'all'"),
        ({"coupling": "same"}, "coupling must be one of .*, not 'same'"),
        ({"world": object()}, "is no data world"),
    ],
)
def test_settings_without_meaning_are_refused_before_training(study, settings, says):
    with pytest.raises(InvalidInput, match=says):
        study(**settings)


def test_stop_rules_that_do_not_exist_are_refused(study, tiny_world):
    with pytest.raises(
        UnknownName, match="the rule of stop must be one of 'train_error', 'train_loss', not 'patience'"
    ):
        study(stop="patience")
    with pytest.raises(InvalidInput, match="no train error"):
        study(tiny_world(num_classes=0), loss="mse", stop="train_error")
    with pytest.raises(InvalidInput, match="needs classes"):
        study(tiny_world(num_classes=0))


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        (lambda: nn.Linear(5, 4), {}, r"gives \(2, 4\) for 2 samples; the world's 3 classes need \(2, 3\)"),
        (
            lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
            {"batch_size": 1, "steps": 96},
            "BatchNorm",
        ),
        (None, {"augment": lambda x, g: x[:, :3]}, r"augment must keep the shape of its batch, \(16, 5\)"),
        (None, {"augment": lambda x, g: None}, "but gave NoneType"),
        (None, {"device": "toaster"}, "device='toaster'"),
        (lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 3)), {"stack": True}, "dropout"),
    ],
)
def test_models_and_callables_that_do_not_fit_are_refused(study, model, settings, says):
    with pytest.raises(InvalidInput, match=says):
        study(model=model, **settings).run()


@pytest.mark.parametrize("stack", [True, False])
def test_a_loss_that_is_not_finite_names_world_seed_and_step(study, stack):
    with pytest.raises(InvalidInput, match=r"in the Ideal World, seed 0: .*step \d+"):
        study(loss="mse", optimizer_fn=partial(torch.optim.SGD, lr=1e20), stack=stack).run()


def test_an_exhausted_world_is_refused_before_training(study, tiny_world):
    data = tiny_world().fixed(700)
    with pytest.raises(InvalidInput, match=r"600 samples for 40 steps of batch 16, which need 640"):
        study(FiniteAsIdeal(data, test=100))
    world = FiniteAsIdeal(data, test=100, past_one_pass="warn")
    with pytest.warns(UserWarning, match="no longer ideal"):
        result = study(world, test_size=100).run()
    assert result.settings["ideal_passes"] == pytest.approx(640 / 600)


def test_worlds_that_break_their_promise_are_refused(study, tiny_world):
    class Overlap(tiny_world):
        def fixed(self, n, *, seed=0, split="train"):
            return super().fixed(n, seed=0, split="stream")

    class Labels(tiny_world):
        def batch(self, step, batch_size, *, split="stream"):
            x, y = super().batch(step, batch_size, split=split)
            return x, y + 1

    class Short(tiny_world):
        def batch(self, step, batch_size, *, split="stream"):
            return super().batch(step, batch_size - 1, split=split)

    with pytest.raises(InvalidInput, match="must not overlap"):
        study(Overlap()).run()
    with pytest.raises(InvalidInput, match="labels must be integers from 0 to 2"):
        study(Labels()).run()
    with pytest.raises(InvalidInput, match="must return exactly that many"):
        study(Short()).run()


# ---- what would make worlds and seeds one ----


def test_a_function_that_returns_one_network_is_refused(tiny_world, study):
    world = tiny_world()
    net, body = MLP(world.shape, 3, (16,)), nn.Linear(5, 8)
    for stack in (None, True, False):
        with pytest.raises(InvalidInput, match="model_fn hands out the same MLP at every call"):
            study(world, lambda: net, stack=stack).run()
        with pytest.raises(InvalidInput, match=r"model_fn hands out networks that share .0\.weight. at every call"):
            study(world, lambda: nn.Sequential(body, nn.Linear(8, 3)), stack=stack).run()


class Leaking:
    """A world whose stream has test samples at random places: ``every``-th sample is one."""

    def __init__(self, world, every, first=0, levels=None):
        self.world, self.every, self.first, self.levels = world, every, first, levels
        self.num_classes, self.shape = world.num_classes, world.shape

    def _rounded(self, x):
        return x if self.levels is None else (x > 0).float() * self.levels

    def batch(self, step, batch_size, *, split="stream"):
        x, y = self.world.batch(step, batch_size, split=split)
        place = torch.arange(step * batch_size, (step + 1) * batch_size)
        mine = (place % self.every == 0) & (place >= self.first) & (split == "stream")
        tests = self.world.fixed(150, split="test").tensors
        x[mine], y[mine] = (t[(place[mine] // self.every) % 150] for t in tests)
        return self._rounded(x), y

    def fixed(self, n, *, seed=0, split="train"):
        x, y = self.world.fixed(n, seed=seed, split=split).tensors
        return torch.utils.data.TensorDataset(self._rounded(x), y)


@pytest.mark.parametrize("stack", [True, False])
def test_test_samples_in_the_stream_are_found_wherever_they_are(tiny_world, study, stack):
    with pytest.raises(InvalidInput, match=r"\d+ of 150 samples of the test block have come in the stream of seed 0"):
        study(Leaking(tiny_world(), 7), stack=stack).run()
    late = Leaking(tiny_world(), 3, first=200)  # beyond every train set: only the Ideal World reads so far
    with pytest.raises(InvalidInput, match="have come in the stream of seed 0 as well"):
        study(late, stack=stack, seeds=1).run()
    few = Leaking(tiny_world(), 300)
    study(few, stack=stack).run()  # 3 of 150
    repeating = Leaking(tiny_world(), 10**9, levels=1.0)  # 32 different rows
    study(repeating, stack=stack, steps=10).run()


# ---- what cannot be stacked, and what people pass --------------------------------------------------------------------


class Reads(nn.Module):
    """A network whose code looks at a value, which vmap cannot."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x):
        return self.net(x) * (1.0 if x.sum().item() > -1e9 else 0.0)


def reading_loss(outputs, y):
    return nn.functional.cross_entropy(outputs, y) * (1 if outputs.sum().item() > -1e9 else 0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": Reads}, r"vmap cannot run this Reads"),
        ({"loss": reading_loss}, r"vmap cannot run this MLP or its loss"),
        ({"optimizer_fn": partial(torch.optim.Adafactor, lr=0.1)}, r"optimizer does not work element by element"),
        ({"optimizer_fn": partial(torch.optim.LBFGS, lr=0.1)}, r"optimizer cannot be used on stacked parameters"),
    ],
)
def test_what_cannot_be_stacked_is_trained_one_by_one_with_a_reason(study, settings, reason):
    usual = {"n": (32,), "steps": 6, "seeds": 2, **settings}
    with pytest.warns(UserWarning, match=reason):
        fallen = study(**usual).run()
    assert fallen.settings["not_stacked"]
    assert not fallen.settings["stacked"]
    same(fallen.curves, study(**usual, stack=False).run().curves)
    with pytest.raises(InvalidInput, match=rf"stack=True, but .* cannot be stacked: .*{reason}"):
        study(**usual, stack=True).run()


def test_numpy_numbers_and_other_float_types_give_the_same_curves(tiny_world, study, tmp_path):
    plain = study(stack=False).run()
    numbers = {"n": np.int64(32), "steps": np.int64(40), "batch_size": np.int32(16), "seeds": np.int64(2)}
    numpy = study(**numbers, test_size=np.int64(150), eval_at=np.int64(8), stack=False).run()
    same(numpy.select("ideal"), plain.select("ideal"))
    numpy.to_parquet(tmp_path / "curves.parquet")

    class Wide(tiny_world):
        def _range(self, split, start, stop):
            x, y = super()._range(split, start, stop)
            return x.double(), y

    same(study(Wide(), stack=False).run().curves, plain.curves)


def test_what_people_pass_by_mistake_gets_a_sentence(tiny_world, study):
    net = nn.Linear(5, 3)
    with pytest.raises(InvalidInput, match="optimizer_fn is a SGD of one network; each world needs its own"):
        study(optimizer_fn=torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(InvalidInput, match="function that makes a fresh network, but got a Linear"):
        study(model=net).run()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 3)

        def forward(self, x):
            return self.net(x), x

    with pytest.raises(InvalidInput, match="Two gives tuple for 2 samples"):
        study(model=Two).run()
    with pytest.raises(InvalidInput, match=r"are float64 and <U3; number labels that are words with numpy\.unique"):
        FiniteAsIdeal((np.zeros((4, 2)), np.array(["cat", "dog", "cat", "dog"])), test=1)
    assert FiniteAsIdeal((np.zeros((4, 2)), np.arange(4) % 2), test=np.int64(1)).stream_size == 3
