"""The regularizer against autograd of the formula in double precision, and everything people do to networks."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.init import seeded
from mlcollage.papers.class_selectivity import SelectivityRegularizer, measure_selectivity
from mlcollage.papers.class_selectivity.sums import SelectivityFunction, class_sums


def by_autograd(layers, y, classes, eps=1e-6):
    """The mean over layers of the mean index, from the definition and nothing else."""
    total = 0.0
    for h in layers:
        h = h.mean(dim=tuple(range(2, h.ndim))) if h.ndim > 2 else h
        means = torch.stack([h[y == c].mean(0) for c in range(classes) if bool((y == c).any())])
        top = means.max(0).values
        rest = (means.sum(0) - top) / (len(means) - 1)
        total = total + ((top - rest) / (top + rest + eps)).mean()
    return total / len(layers)


def relus_of(model, x):
    """Outputs of the ReLUs of a Sequential."""
    found = []
    for layer in model:
        x = layer(x)
        found += [x] if isinstance(layer, nn.ReLU) else []
    return found


def grads(model):
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def term_and_grads(model, penalty, x, y, call=None):
    model.zero_grad()
    (call or model)(x)
    term = penalty(y)
    term.backward()
    return float(term.detach()), grads(model)


@pytest.mark.parametrize("alpha", [-2.0, 3.0])
def test_value_and_gradient_are_those_of_the_formula(mlp, blobs, alpha):
    x, y = blobs[0].double(), blobs[1]
    model = mlp.double()
    with SelectivityRegularizer(model, alpha) as penalty:
        value, ours = term_and_grads(model, penalty, x, y)
    model.zero_grad()
    expected = -alpha * by_autograd(relus_of(model, x), y, 3)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)
    for a, b in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert list(penalty.last) == ["1", "3"]
    assert sum(penalty.last.values()) / 2 == pytest.approx(-value / alpha)


def test_feature_maps_and_shared_in_place_relus(shared_relu, images):
    model, (x, y) = shared_relu.double(), (images[0].double(), images[1])
    with SelectivityRegularizer(model, -1.0) as penalty:
        value, ours = term_and_grads(model, penalty, x, y)
    model.zero_grad()
    first = model.conv1(x).relu()
    expected = by_autograd([first, (model.conv2(first) + first).relu()], y, 3)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-10)
    for a, b in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert list(penalty.last) == ["relu", "relu#1"]


@pytest.mark.parametrize("shift", [False, True])
def test_the_closed_form_and_its_own_derivative_pass_gradcheck(shift):
    g = torch.Generator().manual_seed(0)
    sums = (torch.rand(4, 5, dtype=torch.float64, generator=g) * 3 - (1.5 if shift else 0)).requires_grad_()
    counts = torch.tensor([[2.0], [3.0], [0.0], [5.0]], dtype=torch.float64)

    def index(sums):
        return SelectivityFunction.apply(sums, counts, counts >= 1, 1e-3, shift, 1.0)

    assert torch.autograd.gradcheck(index, (sums,))
    assert torch.autograd.gradgradcheck(index, (sums,))


def test_sign_as_in_the_paper(blobs):
    """Negative alpha lowers selectivity, positive raises it, measured on the data set after training."""
    x, y = blobs
    found = {}
    for alpha in (-3.0, 0.0, 3.0):
        with seeded(0):
            model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with SelectivityRegularizer(model, alpha) as penalty:
            for _ in range(60):
                optimizer.zero_grad()
                (F.cross_entropy(model(x), y) + penalty(y)).backward()
                optimizer.step()
        found[alpha] = measure_selectivity(model, blobs).mean
    assert found[-3.0] < 0.5 * found[0.0] < found[0.0] + 0.1 < found[3.0]


def test_layers_weigh_the_same_whatever_their_width(mlp, blobs):
    x, y = blobs
    values = {}
    for layers in ("1", "3", "relu"):
        with SelectivityRegularizer(mlp, 1.0, layers) as penalty:
            mlp(x)
            values[layers] = -float(penalty(y).detach())
    assert values["relu"] == pytest.approx((values["1"] + values["3"]) / 2, rel=1e-5)


def test_per_layer_alphas_and_schedules(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, lambda t: float(t), per_layer_alpha={"3": -10.0}) as penalty:
        for t in range(3):
            mlp(x)
            term = float(penalty(y).detach())
            assert term == pytest.approx(-(t * penalty.last["1"] - 10 * penalty.last["3"]) / 2, rel=1e-5)
        assert penalty.steps == 3
        with torch.no_grad():
            mlp(x)
            penalty(y)
        assert penalty.steps == 3, "looking does not count as a training step"


def test_soft_targets_weigh_and_hard_ones_are_their_special_case(mlp, blobs):
    x, y = blobs[0].double(), blobs[1]
    model = mlp.double()
    with SelectivityRegularizer(model, 1.0) as penalty:
        hard = term_and_grads(model, penalty, x, y)
        soft = term_and_grads(model, penalty, x, torch.eye(3, dtype=torch.float64)[y])
        assert soft[0] == pytest.approx(hard[0], rel=1e-12)
        w = torch.rand(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        value, ours = term_and_grads(model, penalty, x, w)
    model.zero_grad()
    total = 0.0
    for h in relus_of(model, x):
        means = (w.T @ h) / w.sum(0)[:, None]
        top = means.max(0).values
        rest = (means.sum(0) - top) / 2
        total = total + ((top - rest) / (top + rest + 1e-6)).mean() / 2
    (-total).backward()
    assert value == pytest.approx(-float(total.detach()), rel=1e-10)
    for a, b in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_labels_of_pixels():
    g = torch.Generator().manual_seed(0)
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)
        )
    model = model.double()
    x, y = torch.rand(4, 1, 6, 6, generator=g, dtype=torch.float64), torch.randint(2, (4, 6, 6), generator=g)
    y[0, 0] = -100
    with SelectivityRegularizer(model, 1.0, num_classes=2, dense=True) as penalty:
        value, ours = term_and_grads(model, penalty, x, y)
        soft = torch.stack([(y == c).double() for c in range(2)], 1)
        assert term_and_grads(model, penalty, x, soft)[0] == pytest.approx(value, rel=1e-10)
    model.zero_grad()
    total = 0.0
    for h, labels in zip(relus_of(model, x), (y, y[:, ::2, ::2]), strict=True):
        rows, flat = h.movedim(1, -1).flatten(0, -2), labels.flatten()
        total = total + by_autograd([rows[flat >= 0]], flat[flat >= 0], 2) / 2
    (-total).backward()
    assert value == pytest.approx(-float(total.detach()), rel=1e-10)
    for a, b in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_ignored_samples_are_left_out(mlp, blobs):
    x, y = blobs[0].double(), blobs[1].clone()
    y[:7] = -100
    model = mlp.double()
    with SelectivityRegularizer(model, -1.0) as penalty:
        model(x)
        assert float(penalty(y).detach()) == pytest.approx(
            float(by_autograd(relus_of(model, x[7:]), y[7:], 3).detach())
        )


def test_deterministic_mode_takes_the_one_hot_path_with_the_same_result(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        plain = term_and_grads(mlp, penalty, x, y)
        torch.use_deterministic_algorithms(True)
        try:
            strict = term_and_grads(mlp, penalty, x, y)
        finally:
            torch.use_deterministic_algorithms(False)
    assert strict[0] == pytest.approx(plain[0], rel=1e-6)
    for a, b in zip(strict[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_half_precision_layers_are_summed_in_float32(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        exact = term_and_grads(mlp, penalty, x, y)
        mlp.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mlp(x)
            term = penalty(y)
        assert term.dtype == torch.float32
        term.backward()
    assert float(term.detach()) == pytest.approx(exact[0], rel=0.02)
    rows = torch.full((4096, 1), 0.999, dtype=torch.bfloat16)
    sums, counts = class_sums(rows.float(), torch.zeros(4096, dtype=torch.long), 1)
    assert float(sums / counts) == pytest.approx(float(rows[0]), rel=1e-5)


def test_gradient_checkpointing(blobs):
    class Checkpointed(nn.Module):
        def __init__(self, reentrant, on=True):
            super().__init__()
            self.a, self.relu, self.b = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)
            self.reentrant, self.on = reentrant, on

        def part(self, x):
            return self.relu(self.a(x))

        def forward(self, x):
            h = checkpoint(self.part, x, use_reentrant=self.reentrant) if self.on else self.part(x)
            return self.b(h)

    x, y = blobs
    model = Checkpointed(False)
    plain = copy.deepcopy(model)
    plain.on = False
    results = []
    for m in (model, plain):
        with SelectivityRegularizer(m, -1.0) as penalty:
            (F.cross_entropy(m(x), y) + penalty(y)).backward()
            results.append((dict(penalty.last), grads(m)))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)
    with SelectivityRegularizer(Checkpointed(True), -1.0) as penalty, pytest.raises(InvalidInput, match="reentrant"):
        penalty.model(x.requires_grad_())


def test_compiled_models_are_refused_and_their_originals_taken(mlp, blobs):
    x, y = blobs
    compiled = torch.compile(mlp, backend="eager")
    with pytest.raises(InvalidInput, match="pass the original"):
        SelectivityRegularizer(compiled, -1.0)
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        expected = term_and_grads(mlp, penalty, x, y)
        torch._dynamo.reset()
        ours = term_and_grads(mlp, penalty, x, y, call=torch.compile(mlp, backend="eager"))
    assert ours[0] == pytest.approx(expected[0], rel=1e-6)
    for a, b in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_logits_are_left_out(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, 1.0, "*", negative="relu") as penalty:
        mlp(x)
        penalty(y)
        assert list(penalty.last) == ["0", "1", "2", "3"]
    with SelectivityRegularizer(mlp, 1.0, "*", negative="relu", exclude_output=False) as penalty:
        mlp(x)
        penalty(y)
        assert list(penalty.last) == ["0", "1", "2", "3", "4"]
    with SelectivityRegularizer(mlp, 1.0, "4", negative="relu") as penalty:
        mlp(x)
        with pytest.raises(InvalidInput, match="layers other than its output"):
            penalty(y)


def test_tokens_and_sign_policies(blobs):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gelu, self.b = nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.gelu(self.a(x[:, None].expand(-1, 4, -1) * torch.arange(1.0, 5.0)[:, None]))).mean(1)

    x, y = blobs[0].double(), blobs[1]
    model = Tokens().double()
    h = model.gelu(model.a(x[:, None].expand(-1, 4, -1) * torch.arange(1.0, 5.0)[:, None])).detach()
    expected = {"relu": h.relu().mean(1), "abs": h.abs().mean(1)}
    means = torch.stack([h.mean(1)[y == c].mean(0) for c in range(3)])
    expected["shift"] = h.mean(1) - means.amin(0).clamp(max=0)
    for policy, rows in expected.items():
        with SelectivityRegularizer(model, -1.0, "gelu", negative=policy) as penalty:
            model(x)
            assert float(penalty(y).detach()) == pytest.approx(float(by_autograd([rows], y, 3)), rel=1e-9)
    with SelectivityRegularizer(model, -1.0, "gelu") as penalty:
        model(x)
        with pytest.raises(
            InvalidInput, match=r"layer 'gelu' has min -0\.\d+; .* attach after the ReLU, or set negative="
        ):
            penalty(y)


# --- many classes, controls, processes --------------------------------------------------------------------------


def test_shuffled_targets_keep_size_and_lose_meaning(mlp, blobs):
    x, y = blobs
    values = []
    with SelectivityRegularizer(mlp, -1.0, shuffle_targets=3) as penalty, SelectivityRegularizer(mlp, -1.0) as true:
        for _ in range(2):
            mlp(x)
            values.append(float(penalty(y).detach()))
            plain = float(true(y).detach())
    assert values[0] != values[1], "a fresh permutation each time"
    assert max(values) < 0.5 * plain
    again = SelectivityRegularizer(mlp, -1.0, shuffle_targets=3)
    mlp(x)
    assert float(again(y).detach()) == values[0]
    again.remove()


@pytest.mark.parametrize(("memory", "options"), [("ema", {"memory_decay": 0.999999}), ("queue", {"memory_size": 300})])
def test_memory_gives_the_index_of_all_batches_when_weights_stand_still(mlp, blobs, memory, options):
    x, y = blobs
    whole = measure_selectivity(mlp, blobs).mean
    with SelectivityRegularizer(mlp, -1.0, num_classes=3, memory=memory, **options) as penalty:
        for part in torch.arange(300).split(6):
            mlp(x[part])
            term = penalty(y[part])
    assert float(term.detach()) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("memory", ["ema", "queue"])
def test_gradients_with_memory_are_on_average_those_of_the_whole(mlp, blobs, memory):
    x, y = blobs[0].double(), blobs[1]
    model = mlp.double()
    with SelectivityRegularizer(model, -1.0) as penalty:
        _, whole = term_and_grads(model, penalty, x, y)
    options = {"memory_decay": 1 - 1e-6} if memory == "ema" else {"memory_size": 290}
    mean = [torch.zeros_like(g) for g in whole]
    with SelectivityRegularizer(model, -1.0, num_classes=3, memory=memory, **options) as penalty:
        parts = torch.randperm(300, generator=torch.Generator().manual_seed(0)).split(10)
        for part in [torch.arange(300)] * 100 if memory == "ema" else parts:  # fills the memory
            model(x[part])
            penalty(y[part])
        for part in parts:
            for total, g in zip(mean, term_and_grads(model, penalty, x[part], y[part])[1], strict=True):
                total += g / len(parts)
    for a, b in zip(mean, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-4)


def test_memory_is_saved_and_loaded(mlp, blobs, tmp_path):
    x, y = blobs
    for memory in ("ema", "queue"):
        first = SelectivityRegularizer(mlp, -1.0, num_classes=3, memory=memory)
        mlp(x[:90])
        first(y[:90])
        torch.save(first.state_dict(), tmp_path / "state.pt")
        first.remove()
        second = SelectivityRegularizer(mlp, -1.0, num_classes=3, memory=memory)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert second.steps == 1
        first.attach()
        mlp(x[90:])
        assert float(first(y[90:]).detach()) == float(second(y[90:]).detach())
        first.remove()
        second.remove()


def half_a_batch(rank, size):
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g, dtype=torch.float64), torch.arange(40) % 3
    mine = slice(0, 20) if rank == 0 else slice(20, 40)
    parallel, found = nn.parallel.DistributedDataParallel(model), {}
    for memory in (None, "ema"):
        penalty = SelectivityRegularizer(parallel, -1.0, num_classes=3, memory=memory)
        for _ in range(2):
            parallel.zero_grad()
            loss = F.cross_entropy(parallel(x[mine]), y[mine])
            (loss + penalty(y[mine])).backward()
        found |= {f"{memory}/{i}": p.grad.clone() for i, p in enumerate(model.parameters())}
        found[f"{memory}/last"] = list(penalty.last.values())
        penalty.remove()
    with SelectivityRegularizer(parallel, -1.0) as bare:
        parallel(x[mine])
        with pytest.raises(InvalidInput, match="num_classes must be given"):
            bare(y[mine])
    return found


def test_two_processes_have_the_gradient_of_the_whole_batch(in_processes):
    both = in_processes(__file__, "half_a_batch", 2)
    with seeded(0):
        model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g, dtype=torch.float64), torch.arange(40) % 3
    for memory in (None, "ema"):
        with SelectivityRegularizer(model, -1.0, num_classes=3, memory=memory) as penalty:
            for _ in range(2):
                model.zero_grad()
                (F.cross_entropy(model(x), y) + penalty(y)).backward()
        for found in both:
            assert found[f"{memory}/last"] == pytest.approx(list(penalty.last.values()))
            for i, p in enumerate(model.parameters()):
                np.testing.assert_allclose(found[f"{memory}/{i}"], p.grad.numpy(), rtol=1e-9, atol=1e-12)


# --- life of the hooks ------------------------------------------------------------------------------------------


def test_removing_leaves_no_trace_and_attaching_comes_back(mlp, blobs):
    x, y = blobs
    penalty = SelectivityRegularizer(mlp, -1.0)
    assert not list(penalty.parameters())
    assert not [k for k in penalty.state_dict() if "weight" in k], "the model is no part of its regularizer"
    penalty.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mlp.modules())
    mlp(x)
    with pytest.raises(InvalidInput, match="attach"):
        penalty(y)
    penalty.attach()
    mlp(x)
    assert float(penalty(y).detach()) > 0
    penalty.remove()


def test_a_copy_of_the_model_does_not_speak_for_it(mlp, blobs):
    """An average of weights is a deep copy, hooks included."""
    x, y = blobs
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        mlp(x)
        average = copy.deepcopy(mlp)
        with torch.no_grad():
            average(x * 100)
        term = penalty(y)
        term.backward()
    assert mlp[0].weight.grad is not None
    assert float(term.detach()) == pytest.approx(float(by_autograd(relus_of(mlp, x), y, 3).detach()), rel=1e-5)


def test_bad_calls_get_one_sentence(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        with pytest.raises(InvalidInput, match="run the model"):
            penalty(y)
        mlp(x)
        for targets, message in [
            (y[:-1], r"layer '1' gave activations \(300, 12\), but there are 299 targets"),
            (y.float(), r"labels must be integers, and soft targets"),
            (y > 0, "not torch.bool"),
            (y - 1, "targets run from -1 to 1"),
            (y * 0, "at least 2 classes"),
            (y[:, None, None].expand(-1, 2, 2), "use dense=True"),
        ]:
            with pytest.raises(InvalidInput, match=message):
                penalty(targets)
        penalty(y)
        with pytest.raises(InvalidInput, match="run the model"):
            penalty(y)
        with torch.no_grad():
            mlp(x)
        with pytest.raises(InvalidInput, match="captured without gradients"):
            penalty(y)
        mlp(x * torch.inf)
        with pytest.raises(InvalidInput, match="layer '1' gave NaN or infinite"):
            penalty(y)
        mlp[0](x)  # a part is not the model
    with SelectivityRegularizer(mlp, -1.0, num_classes=2) as penalty:
        mlp(x)
        with pytest.raises(InvalidInput, match="num_classes=2 allows 0 to 1"):
            penalty(y)
        with pytest.raises(InvalidInput, match="3 columns, but num_classes=2"):
            penalty(torch.eye(3)[y])
    with SelectivityRegularizer(mlp, -1.0, min_per_class=101) as penalty:
        mlp(x)
        with pytest.raises(InvalidInput, match="101 samples or more"):
            penalty(y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": float("nan")}, "alpha .* must be a finite number, not nan"),
        ({"alpha": "strong"}, "alpha .* not 'strong'"),
        ({"alpha": lambda t: float("inf")}, "alpha .* not inf"),
        ({"per_layer_alpha": {"1": float("inf")}}, "alpha .* not inf"),
        ({"negative": "clip"}, "negative must be one of .*, not 'clip'"),
        ({"eps": 0.0}, "eps must be a finite number above 0, not 0.0"),
        ({"min_per_class": 0}, "min_per_class must be a whole number of at least 1, not 0"),
        ({"num_classes": 1}, "num_classes must be a whole number of at least 2, not 1"),
        ({"memory": "disk", "num_classes": 3}, "memory must be one of 'ema', 'queue', not 'disk'"),
        ({"memory": "ema"}, "needs num_classes"),
        ({"memory": "ema", "num_classes": 3, "memory_decay": 1.0}, "memory_decay must be .* below 1, not 1.0"),
        ({"memory": "queue", "num_classes": 3, "memory_size": 0}, "memory_size must be .* at least 1, not 0"),
        ({"memory": "ema", "num_classes": 3, "dense": True}, "without a memory"),
    ],
)
def test_bad_settings_get_one_sentence(mlp, settings, message):
    with pytest.raises(InvalidInput, match=message):
        SelectivityRegularizer(mlp, **{"alpha": -1.0, **settings})
    assert not any(m._forward_hooks for m in mlp.modules())


def test_layers_that_are_not_there(mlp):
    with pytest.raises(UnknownName, match="no layer 'block9"):
        SelectivityRegularizer(mlp, -1.0, "block9*")
    with pytest.raises(InvalidInput, match="no module of type ReLU"):
        SelectivityRegularizer(nn.Sequential(nn.Linear(2, 2), nn.GELU()), -1.0)
    with pytest.raises(UnknownName, match="per_layer_alpha names 'x'"):
        SelectivityRegularizer(mlp, -1.0, per_layer_alpha={"x": 0.0})
    with pytest.raises(InvalidInput, match=r"model\.module"):
        SelectivityRegularizer(nn.DataParallel(mlp), -1.0)


def test_small_batches_and_terms_that_drown_the_loss_are_warned_of_once(mlp, blobs):
    x, y = blobs
    with SelectivityRegularizer(mlp, -1e4) as penalty:
        mlp(x[:7])
        with pytest.warns(UserWarning, match=r"median class has 2 samples .* still 0\.\d\d"):
            penalty(y[:7])
        mlp(x[:7])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            penalty(y[:7])
        loss = F.cross_entropy(mlp(x), y)
        with pytest.warns(UserWarning, match="more than ten times the loss"):
            penalty(y, loss)
        loss = F.cross_entropy(mlp(x), y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            penalty(y, loss)


def test_the_global_generator_is_left_alone(mlp, blobs):
    x, y = blobs
    state = torch.get_rng_state()
    with SelectivityRegularizer(mlp, -1.0, shuffle_targets=0) as penalty:
        mlp(x)
        penalty(y)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loss_of_a_copy_that_shares_a_layer_is_refused(mlp, blobs):
    x, y = blobs
    other = copy.deepcopy(mlp)
    first = next(name for name, _ in mlp.named_parameters())
    place, _, last = first.rpartition(".")
    setattr(other.get_submodule(place), last, mlp.get_parameter(first))
    with SelectivityRegularizer(mlp, -1.0) as penalty:
        mlp(x)
        with pytest.raises(InvalidInput, match="not for a copy of it"):
            penalty(y, nn.functional.cross_entropy(other(x), y))
        mlp(x)
        penalty(y, nn.functional.cross_entropy(mlp(x), y))


def test_a_memory_of_other_layers_or_of_another_kind_is_refused(mlp, blobs):
    x, y = blobs
    names = [name for name, part in mlp.named_modules() if isinstance(part, nn.ReLU)]
    settings = {"num_classes": 3, "memory": "ema"}
    with SelectivityRegularizer(mlp, -1.0, layers=names, **settings) as first:
        mlp(x)
        first(y)
        state = first.state_dict()
    with pytest.raises(InvalidInput, match="remembers units of the layers"):
        SelectivityRegularizer(mlp, -1.0, layers=names[:1], **settings).load_state_dict(state)
    with pytest.raises(InvalidInput, match="a memory of sums and counts; this one is of rows and targets"):
        SelectivityRegularizer(mlp, -1.0, layers=names, **{**settings, "memory": "queue"}).load_state_dict(state)
