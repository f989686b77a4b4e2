"""FisherPenalty: against explicit per-example constructions and Hessians, and in the loops that people have."""

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.checkpoint import checkpoint

from mlcollage import _random
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure.fisher import sample_labels
from mlcollage.nn.init import build
from mlcollage.papers.fisher_explosion import FisherPenalty


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def grads_of(model):
    return flat(p.grad for p in model.parameters())


def per_example(model, x, y):
    """Gradients of single samples, (B, P), one after the other."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    return torch.stack(rows)


def all_labels(model, x):
    """Gradients of each sample at each class (B, C, P), and the probabilities (B, C)."""
    logits = model(x)
    classes = logits.shape[1]
    g = torch.stack([per_example(model, x, torch.full((len(x),), k)) for k in range(classes)], 1)
    return g, logits.detach().softmax(-1)


def explicit_gradient(model, x, y):
    """2 H g from the explicit Hessian of the mean loss: no double backpropagation in it."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    sizes = [s.numel() for s in shapes]

    def loss(theta):
        parts = {n: t.view(s) for n, t, s in zip(names, theta.split(sizes), shapes, strict=True)}
        return F.cross_entropy(functional_call(model, parts, (x,)), y)

    theta = flat(model.parameters())
    return 2 * hessian(loss)(theta) @ jacrev(loss)(theta)


def drawn(penalty, model, x):
    """The labels that the penalty draws in its next call (int generator)."""
    logits = model(x).detach()
    given = torch.zeros_like(logits) if penalty.labels == "uniform" else logits
    return sample_labels(given, generator=_random.generator(0, 0, penalty._calls))[0]


# --- the quantity and its gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["model", "true", "uniform"])
def test_value_and_gradient_equal_the_explicit_construction(small, labels):
    model, x, y = small()
    penalty = FisherPenalty(model, 0.3, labels=labels, interval=1)
    used = y if labels == "true" else drawn(penalty, model, x)
    value = penalty(model(x), y=y if labels == "true" else None)
    value.backward()
    mean = per_example(model, x, used).mean(0)
    assert float(value.detach()) == pytest.approx(0.3 * float(mean @ mean), rel=1e-12)
    torch.testing.assert_close(grads_of(model), 0.3 * explicit_gradient(model, x, used), rtol=1e-9, atol=1e-12)


def test_expectation_over_labels_is_the_trace_over_b(small):
    """E |mean gradient|^2 = mean Tr F / B, summed over all C^B label vectors with their probabilities: no sampling."""
    model, x, _ = small()
    x = x[:4]
    g, p = all_labels(model, x)
    trace = (p * g.square().sum(-1)).sum(1).mean()
    expected = torch.zeros((), dtype=torch.float64)
    for labels in itertools.product(range(3), repeat=4):
        weight = math.prod(float(p[i, k]) for i, k in enumerate(labels))
        mean = torch.stack([g[i, k] for i, k in enumerate(labels)]).mean(0)
        expected += weight * (mean @ mean)
    torch.testing.assert_close(expected, trace / 4, rtol=1e-12, atol=0)


def test_drawn_penalties_have_that_expectation(small):
    model, x, _ = small()
    g, p = all_labels(model, x)
    trace = float((p * g.square().sum(-1)).sum(1).mean())
    penalty = FisherPenalty(model, 1.0, interval=1, normalize="batch")
    logits = model(x)
    values = torch.stack([penalty(logits).detach() for _ in range(600)])
    error = values.std() / len(values) ** 0.5
    assert abs(float(values.mean()) - trace) < 4 * float(error)


@pytest.mark.parametrize(
    "layer", [nn.Tanh, lambda: nn.Dropout(0.4), lambda: nn.BatchNorm1d(6), lambda: nn.GroupNorm(2, 6)]
)
def test_finite_difference_jvp_and_double_backprop_agree(small, layer):
    model, x, _ = small(middle=layer)
    start = copy.deepcopy(model.state_dict())
    found = {}
    for mode in ("double_backprop", "finite_difference", "jvp"):
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        penalty = FisherPenalty(model, 0.3, mode=mode, interval=1)
        torch.manual_seed(5)
        if mode == "double_backprop":
            value = penalty(model(x))
            value.backward()
        else:
            value = penalty.add_gradient_(lambda: model(x))
        found[mode] = (grads_of(model), float(value.detach()))
    reference, value = found["double_backprop"]
    torch.testing.assert_close(found["jvp"][0], reference, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found["finite_difference"][0], reference, rtol=1e-4, atol=1e-7)
    assert found["jvp"][1] == pytest.approx(value, rel=1e-12)
    assert found["finite_difference"][1] == pytest.approx(value, rel=1e-12)


def test_finite_differences_hold_in_single_precision(small):
    model, x, _ = small(torch.float32)
    exact, approximate = [], []
    for mode, keep in (("jvp", exact), ("finite_difference", approximate)):
        model.zero_grad(set_to_none=True)
        FisherPenalty(model, 1.0, mode=mode, interval=1).add_gradient_(lambda: model(x))
        keep.append(grads_of(model))
    assert (exact[0] - approximate[0]).norm() < 0.02 * exact[0].norm()


@pytest.mark.parametrize("mode", ["finite_difference", "jvp"])
def test_add_gradient__leaves_noise_weights_and_statistics_alone_and_adds_to_gradients(small, mode):
    model, x, y = small(middle=lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)))
    F.cross_entropy(model(x), y).backward()
    before, state, random = grads_of(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    penalty = FisherPenalty(model, 0.5, mode=mode, interval=1)
    penalty.add_gradient_(lambda: model(x))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    once = grads_of(model) - before
    assert float(once.norm()) > 0
    model.zero_grad()
    FisherPenalty(model, 0.5, mode=mode, interval=1).add_gradient_(lambda: model(x), scale=0.25)
    torch.testing.assert_close(grads_of(model), 0.25 * once, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("labels", ["model", "true", "uniform"])
def test_per_example_is_the_mean_of_single_squared_norms(small, labels):
    model, x, y = small()
    penalty = FisherPenalty(model, 0.3, labels=labels, estimator="per_example", interval=1)
    used = y if labels == "true" else drawn(penalty, model, x)
    value = penalty(model(x), x, y if labels == "true" else None)
    assert float(value.detach()) == pytest.approx(0.3 * float(per_example(model, x, used).square().sum(1).mean()))
    value.backward()
    found = grads_of(model)
    expected = sum(explicit_gradient(model, x[i : i + 1], used[i : i + 1]) for i in range(7)) / 7
    torch.testing.assert_close(found, 0.3 * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("params", [None, ["2.weight", "0.bias"]])
def test_exact_is_the_expectation_with_and_without_the_score_term(small, params):
    model, x, _ = small()
    parameters = dict(model.named_parameters())
    chosen = list(parameters.values()) if params is None else [parameters[n] for n in params]

    def by_hand(score_term):
        total = 0
        for i in range(len(x)):
            logits = model(x[i : i + 1])
            for k in range(3):
                loss = F.cross_entropy(logits, torch.tensor([k]))
                g = torch.autograd.grad(loss, chosen, create_graph=True)
                p = logits.softmax(-1)[0, k]
                total = total + (p if score_term else p.detach()) * sum(t.square().sum() for t in g)
        return total / len(x)

    for score_term in (False, True):
        expected = by_hand(score_term)
        model.zero_grad()
        expected.backward()
        reference = grads_of(model)
        model.zero_grad()
        penalty = FisherPenalty(
            model, 1.0, estimator="exact", interval=1, params=params, score_term=score_term, normalize="batch"
        )
        value = penalty(model(x), x)
        value.backward()
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(grads_of(model), reference, rtol=1e-9, atol=1e-12)


def test_the_expected_gradient_of_fp_is_that_of_the_trace_over_b(small):
    """alpha_TrF = alpha_FP / B, for values and gradients: summed over all label vectors of three samples."""
    model, x, _ = small()
    x = x[:3]
    p = model(x).detach().softmax(-1)
    fp = torch.zeros(sum(q.numel() for q in model.parameters()), dtype=torch.float64)
    for labels in itertools.product(range(3), repeat=3):
        weight = math.prod(float(p[i, k]) for i, k in enumerate(labels))
        fp += weight * explicit_gradient(model, x, torch.tensor(labels))
    model.zero_grad()
    FisherPenalty(model, 1.0 / 3, estimator="exact", interval=1)(model(x), x).backward()
    torch.testing.assert_close(grads_of(model), fp, rtol=1e-9, atol=1e-12)


# --- settings -------------------------------------------------------------------------------------------------------


def test_interval_start_and_stop_say_which_steps_count(small):
    model, x, _ = small()
    penalty = FisherPenalty(model, 1.0, interval=3, start=2, stop=9)
    penalized = [i for i in range(14) if float(penalty(model(x)).detach()) > 0]
    assert penalized == [2, 5, 8]
    assert penalty.steps == 14


def test_rescaling_keeps_the_average_weight(small):
    model, x, y = small()

    def total(interval, **settings):
        penalty = FisherPenalty(model, 0.1, labels="true", interval=interval, **settings)
        return sum(float(penalty(model(x), y=y).detach()) for _ in range(12))

    assert total(4, rescale_by_interval=True) == pytest.approx(total(1), rel=1e-12)
    assert total(4) == pytest.approx(total(1) / 4, rel=1e-12)


def test_normalizing_multiplies_by_b_also_in_a_smaller_last_batch(small):
    model, x, y = small()
    for rows in (7, 3, 1):
        raw, scaled = (
            FisherPenalty(model, 1.0, labels="true", interval=1, normalize=n)(model(x[:rows]), y=y[:rows])
            for n in ("none", "batch")
        )
        assert float(scaled.detach()) == pytest.approx(rows * float(raw.detach()), rel=1e-12)


@pytest.mark.parametrize("by_name", [True, False])
def test_only_chosen_parameters_are_penalized(small, by_name):
    model, x, y = small()
    chosen = ["2.weight", "2.bias"] if by_name else model[2].parameters()
    penalty = FisherPenalty(model, 1.0, labels="true", interval=1, params=chosen)
    mean = per_example(model, x, y).mean(0)[-21:]
    assert float(penalty(model(x), y=y).detach()) == pytest.approx(float(mean @ mean), rel=1e-12)


def test_frozen_parameters_are_left_out(small):
    model, x, y = small()
    model[0].requires_grad_(False)
    penalty = FisherPenalty(model, 1.0, labels="true", interval=1)
    expected = per_example(nn.Sequential(model[2]), model[:2](x).detach(), y).mean(0)
    value = penalty(model(x), y=y)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(expected @ expected), rel=1e-12)
    assert model[0].weight.grad is None


def test_the_input_penalty_is_gpx(small):
    model, x, y = small()
    x.requires_grad_()
    each = [torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), x)[0][i] for i in range(7)]
    squares = torch.stack(each).square().sum(1)
    logits = model(x)
    for settings, expected in (
        ({}, squares.sum() / 49),
        ({"normalize": "batch"}, squares.mean()),
        ({"estimator": "per_example"}, squares.mean()),
    ):
        penalty = FisherPenalty(model, 1.0, labels="true", wrt="input", interval=1, **settings)
        value = penalty(logits, x, y)
        assert float(value.detach()) == pytest.approx(float(expected), rel=1e-12)
    value.backward()
    assert float(grads_of(model).norm()) > 0


def test_the_exact_input_penalty_is_the_expectation_over_labels(small):
    model, x, _ = small()
    x.requires_grad_()
    logits = model(x)
    p = logits.detach().softmax(-1)
    expected = 0.0
    for k in range(3):
        (g,) = torch.autograd.grad(F.nll_loss(logits.log_softmax(-1), torch.full((7,), k), reduction="sum"), x,
                                   retain_graph=True)  # fmt: skip
        expected += float((p[:, k] * g.square().sum(1)).mean())
    penalty = FisherPenalty(model, 1.0, wrt="input", estimator="exact", interval=1)
    assert float(penalty(logits, x).detach()) == pytest.approx(expected, rel=1e-12)


def test_evaluation_mode_and_zero_alpha_give_nothing(small):
    model, x, _ = small()
    penalty = FisherPenalty(model, 1.0, interval=1)
    penalty.eval()
    assert float(penalty(model(x))) == 0
    assert penalty.steps == 0
    penalty.train()
    penalty.alpha = 0
    assert float(penalty(model(x))) == 0
    assert penalty.steps == 1


# --- reproducible, resumable ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int", "generator"])
def test_training_resumes_exactly(small, kind):
    def make():
        model, x, y = small()
        generator = 3 if kind == "int" else torch.Generator().manual_seed(3)
        return model, x, y, FisherPenalty(model, 0.2, interval=2, generator=generator)

    def train(model, x, y, penalty, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(steps):
            logits = model(x)
            optimizer.zero_grad()
            (F.cross_entropy(logits, y) + penalty(logits)).backward()
            optimizer.step()

    whole = make()
    train(*whole, 9)
    first = make()
    train(*first, 4)
    second = make()
    second[0].load_state_dict(first[0].state_dict())
    second[3].load_state_dict(first[3].state_dict())
    train(*second, 5)
    assert torch.equal(flat(whole[0].parameters()), flat(second[0].parameters()))


def test_it_is_no_part_of_the_model_and_draws_from_no_global_generator(small):
    model, x, _ = small()
    penalty = FisherPenalty(model, 1.0, interval=1, generator=None)
    assert list(penalty.parameters()) == []
    before = torch.get_rng_state()
    a = penalty(model(x))
    assert torch.equal(torch.get_rng_state(), before)
    b = FisherPenalty(model, 1.0, interval=1)(model(x))
    assert float(a.detach()) == float(b.detach())
    assert "alpha=1" in repr(penalty)


def test_other_seeds_and_steps_draw_other_labels():
    logits = torch.zeros(200, 10)
    keys = ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))  # seed, rank, step
    draws = [sample_labels(logits, generator=_random.generator(*key))[0] for key in keys]
    for a, b in itertools.combinations(draws, 2):
        assert 0 < int((a == b).sum()) < 45


# --- in people's loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["double_backprop", "jvp"])
def test_the_gradient_scale_is_applied_once(small, mode):
    model, x, y = small(torch.float32)
    penalty = FisherPenalty(model, 0.5, mode=mode, interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(scaler):
        optimizer.zero_grad()
        penalty.steps = 0
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if mode == "double_backprop":
            loss = loss + penalty(logits, scaler=scaler)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if mode == "jvp":
            penalty.add_gradient_(lambda: model(x), scaler=scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        return grads_of(model)

    plain = backward(None)
    scaled = backward(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)
    penalty.alpha = 0
    assert float((plain - backward(None)).norm()) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_penalty_stays_close_to_single_precision(small, dtype):
    model, x, _ = small(torch.float32)
    exact = FisherPenalty(model, 1.0, interval=1)(model(x))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=dtype):
        logits = model(x)
        low = FisherPenalty(model, 1.0, interval=1)(logits, scaler=scaler)
    assert logits.dtype == dtype
    assert low.dtype == torch.float32
    low.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert float(low.detach()) == pytest.approx(float(exact.detach()), rel=0.05)


def test_accumulated_micro_batches_are_one_step(small):
    model, x, y = small()
    penalty = FisherPenalty(model, 1.0, labels="true", interval=2, accumulation_steps=3)
    values = [float(penalty(model(x), y=y).detach()) > 0 for _ in range(12)]
    assert values == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert penalty.steps == 4


def test_normalized_micro_batches_have_the_expectation_of_the_whole(small):
    """Sum over all labels: 1/m sum_j E[b |mean g_j|^2] = Tr F for halves of a batch, as for the batch itself."""
    model, x, _ = small()
    x = x[:6]
    g, p = all_labels(model, x)
    first = (p * g.square().sum(-1)).sum(1)
    assert float((first[:3].mean() + first[3:].mean()) / 2) == pytest.approx(float(first.mean()), rel=1e-12)
    penalty = FisherPenalty(model, 1.0, interval=1, normalize="batch", accumulation_steps=2)
    halves = [model(x[:3]), model(x[3:])]
    values = torch.tensor([[float(penalty(h).detach()) for h in halves] for _ in range(400)]).mean(1)
    assert abs(float(values.mean()) - float(first.mean())) < 4 * float(values.std()) / 20


def test_a_compiled_model_is_refused_for_double_backprop_and_works_without(small):
    model, x, _ = small(torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(InvalidInput, match=r"torch\.compile.*finite_difference"):
        FisherPenalty(compiled, 1.0, interval=1)(compiled(x))
    found = []
    for network in (model, compiled):
        for mode in ("finite_difference", "jvp"):
            model.zero_grad(set_to_none=True)
            FisherPenalty(network, 1.0, mode=mode, interval=1).add_gradient_(lambda n=network: n(x))
            found.append(grads_of(model))
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[3], found[1], rtol=1e-5, atol=1e-6)


def test_fused_attention_is_refused_for_double_backprop_and_works_with_jvp():
    model = build(lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Flatten(),
                                        nn.Linear(24, 3)), 0)  # fmt: skip
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInput, match=r"fused attention|flash attention"):
        FisherPenalty(model, 1.0, interval=1)(model(x))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(0)
        FisherPenalty(model, 1.0, interval=1)(model(x)).backward()
    reference = grads_of(model)
    for mode, tolerance in (("jvp", 1e-4), ("finite_difference", 0.05)):
        model.zero_grad()
        torch.manual_seed(0)
        FisherPenalty(model, 1.0, mode=mode, interval=1).add_gradient_(lambda: model(x))
        assert (grads_of(model) - reference).norm() < tolerance * reference.norm()


def test_recurrent_layers_work_with_jvp():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model = build(Reader, 0).double()
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for mode in ("jvp", "finite_difference"):
        model.zero_grad()
        FisherPenalty(model, 1.0, mode=mode, interval=1).add_gradient_(lambda: model(x))
        found.append(grads_of(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).tanh())

    model, x = build(Tied, 0).double(), torch.arange(5)
    reference = FisherPenalty(model, 1.0, interval=1)(model(x))
    reference.backward()
    kept = grads_of(model)
    for mode in ("jvp", "finite_difference"):
        model.zero_grad()
        FisherPenalty(model, 1.0, mode=mode, interval=1).add_gradient_(lambda: model(x))
        torch.testing.assert_close(grads_of(model), kept, rtol=1e-4, atol=1e-7)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "at least 0"),
        ({"alpha": math.nan}, "finite number"),
        ({"interval": 0}, "interval must be a whole number of at least 1"),
        ({"interval": 2.5}, "interval must be a whole number"),
        ({"start": 5, "stop": 5}, "stop must be a whole number of at least 6"),
        ({"labels": "fisher"}, "'model', 'true', 'uniform'"),
        ({"wrt": "weights"}, "'params', 'input'"),
        ({"estimator": "mc"}, "'minibatch'"),
        ({"mode": "hvp"}, "'jvp'"),
        ({"normalize": "sum"}, "'batch'"),
        ({"mode": "jvp", "estimator": "exact"}, "double_backprop"),
        ({"mode": "finite_difference", "wrt": "input"}, "double_backprop"),
        ({"estimator": "exact", "labels": "true"}, "one per sample"),
        ({"score_term": True}, "score_term"),
        ({"fd_step": 0.0}, "fd_step"),
        ({"params": ["3.weight"]}, "no parameter"),
        ({"params": [torch.zeros(3)]}, "not a parameter"),
        ({"alpha": [0.1, 0.2]}, "alpha holds 2 values for 1 network"),
        ({"generator": "seed"}, "generator"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
    ],
)
def test_bad_settings_are_refused(small, settings, message):
    model, _, _ = small()
    settings = {"alpha": 0.1, **settings}
    with pytest.raises((InvalidInput, UnknownName), match=message):
        FisherPenalty(model, **settings)


def test_frozen_models_are_refused(small):
    model, _, _ = small()
    with pytest.raises(InvalidInput, match="requires a gradient"):
        FisherPenalty(model.requires_grad_(False), 0.1)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({}, lambda p, m, x, y: p(m(x), y=y), "empirical Fisher"),
        ({}, lambda p, m, x, y: p(m(x).softmax(-1)), "probabilities"),
        ({}, lambda p, m, x, y: p(m(x).detach()), "no graph"),
        ({}, lambda p, m, x, y: p(copy.deepcopy(m)(x)), "do not depend"),
        ({"mode": "jvp"}, lambda p, m, x, y: p.add_gradient_(lambda: copy.deepcopy(m)(x)), "do not depend"),
        ({}, lambda p, m, x, y: p(m(x) * math.inf), "NaN or infinite"),
        ({}, lambda p, m, x, y: p(m(x)[:, :1]), "one class"),
        ({}, lambda p, m, x, y: p(m(x)[:, 0]), r"shape \(B, C\)"),
        ({}, lambda p, m, x, y: p(m(x)[:0]), "empty"),
        ({}, lambda p, m, x, y: p([1.0]), "logits"),
        ({}, lambda p, m, x, y: p(m(x).long()), "floating point"),
        ({}, lambda p, m, x, y: p.add_gradient_(lambda: m(x)), "add penalty"),
        ({"labels": "true"}, lambda p, m, x, y: p(m(x)), "pass them as y"),
        ({"labels": "true"}, lambda p, m, x, y: p(m(x), y=y.float()), "soft and multi-label"),
        ({"labels": "true"}, lambda p, m, x, y: p(m(x), y=F.one_hot(y, 3)), "soft and multi-label"),
        ({"labels": "true"}, lambda p, m, x, y: p(m(x), y=y[:3]), "3 labels for 7"),
        ({"labels": "true"}, lambda p, m, x, y: p(m(x), y=torch.full((7,), -100)), "ignore_index"),
        ({"labels": "true"}, lambda p, m, x, y: p(m(x), y=y + 5), "classes, counted from 0"),
        ({"mode": "jvp"}, lambda p, m, x, y: p(m(x)), "add_gradient_"),
        ({"mode": "jvp"}, lambda p, m, x, y: p.add_gradient_(m(x)), "lambda"),
        ({"labels": "true", "wrt": "input"}, lambda p, m, x, y: p(m(x), y=y), "pass it as x"),
        ({"labels": "true", "wrt": "input"}, lambda p, m, x, y: p(m(x), x, y), "requires_grad_"),
        ({"estimator": "per_example"}, lambda p, m, x, y: p(m(x)), "pass it as x"),
        ({"estimator": "per_example"}, lambda p, m, x, y: p(m(x), x[1:]), r"x holds \d+ examples for \d+ rows"),
    ],
)
def test_bad_calls_are_refused(small, settings, call, message):
    model, x, y = small()
    with pytest.raises(InvalidInput, match=message):
        call(FisherPenalty(model, 0.1, interval=1, **settings), model, x, y)


def test_batch_norm_in_training_mode_has_no_single_samples(small):
    model, x, _ = small(middle=lambda: nn.BatchNorm1d(6))
    penalty = FisherPenalty(model, 0.1, estimator="per_example", interval=1)
    with pytest.raises(InvalidInput, match=r"batch norm in training mode \(1\).*eval"):
        penalty(model(x), x)


def test_finite_differences_in_half_precision_are_refused(small):
    model, x, _ = small(torch.float32)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    with pytest.raises(InvalidInput, match="rounding noise"):
        FisherPenalty(model, 0.1, mode="finite_difference", interval=1).add_gradient_(closure)


# Checkpointing, weight normalization, and networks that are not the penalized one ------------------------------------


class Checkpointed(nn.Module):
    """Three layers, one of them inside gradient checkpointing, if ``reentrant`` is not None."""

    def __init__(self, block, reentrant, middle=nn.Tanh):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), middle()), nn.Linear(6, 3)])
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            hidden = self.reentrant is not None and i == self.block
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if hidden else layer(x)
            x = x.tanh() if i == 0 else x
        return x


def penalized_gradient(model, x, y, mode, **settings):
    penalty = FisherPenalty(model, alpha=1.0, interval=1, labels="true", mode=mode, **settings)
    if mode == "double_backprop":
        penalty(model(x), y=y).backward()
    else:
        penalty.add_gradient_(lambda: model(x), y=y)
    return grads_of(model)


MODES = ["double_backprop", "finite_difference", "jvp"]


@pytest.mark.parametrize("middle", [nn.Tanh, lambda: nn.GroupNorm(2, 6), lambda: nn.Dropout(0.5)])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_nothing(small, mode, block, middle):
    _, x, y = small()
    plain, hidden = (build(lambda r=r: Checkpointed(block, r, middle), seed=0).double() for r in (None, False))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = penalized_gradient(plain, x, y, mode)
        torch.manual_seed(0)
        found = penalized_gradient(hidden, x, y, mode)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_reentrant_checkpointing_is_refused(small, mode, block):
    _, x, y = small()
    model = build(lambda: Checkpointed(block, True), seed=0).double()
    with warnings.catch_warnings(), pytest.raises(InvalidInput, match="use_reentrant=False"):  # noqa: PT012
        warnings.simplefilter("ignore")  # torch says that no input requires a gradient
        penalized_gradient(model, x, y, mode)


class Normalized(nn.Module):
    """Weight normalization by hand, with the parameters of a layer of torch's."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.parametrizations.weight
        self.bias, self.g, self.v = (
            nn.Parameter(p.detach().clone()) for p in (layer.bias, weight.original0, weight.original1)
        )

    def forward(self, x):
        return F.linear(x, self.v * self.g / self.v.square().sum(1, keepdim=True).sqrt(), self.bias)


def test_weight_normalization_is_right_or_refused(small):
    _, x, y = small()
    normal = nn.utils.parametrizations.weight_norm
    fused = build(lambda: nn.Sequential(normal(nn.Linear(4, 6)), nn.Tanh(), normal(nn.Linear(6, 3))), seed=0).double()
    by_hand = nn.Sequential(Normalized(fused[0]), nn.Tanh(), Normalized(fused[2]))
    expected = penalized_gradient(by_hand, x, y, "double_backprop")
    with pytest.raises(InvalidInput, match="weight_norm, of which torch's fused kernel has a wrong second derivative"):
        penalized_gradient(fused, x, y, "double_backprop")
    for mode in MODES[1:]:
        fused.zero_grad()
        torch.testing.assert_close(penalized_gradient(fused, x, y, mode), expected, rtol=1e-5, atol=1e-7)
    of_samples = {}
    for model in (fused, by_hand):
        model.zero_grad()
        penalty = FisherPenalty(model, 1.0, interval=1, labels="true", estimator="per_example")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            penalty(model(x), x, y).backward()
        of_samples[model] = grads_of(model)
    torch.testing.assert_close(of_samples[fused], of_samples[by_hand])


@pytest.mark.parametrize("settings", [{}, {"estimator": "per_example"}, {"mode": "jvp"}, {"wrt": "input"}])
def test_a_penalty_of_another_copy_of_the_network_is_refused_at_every_step(small, settings):
    model, x, _ = small()
    other = copy.deepcopy(model)
    penalty = FisherPenalty(model, alpha=1.0, interval=1, **settings)
    x.requires_grad_(settings.get("wrt") == "input")

    def step(network):
        return penalty.add_gradient_(lambda: network(x)) if "mode" in settings else penalty(network(x), x)

    for network in (other, model, other):
        if network is model:
            assert step(model) > 0
            continue
        with pytest.raises(InvalidInput, match="not of a copy of it"):
            step(other)


def test_parameters_that_the_logits_lack_are_named_unless_params_does(small):
    model, x, _ = small()
    model.unused = nn.Linear(2, 2).double()

    def run(**settings):
        return FisherPenalty(model, alpha=1.0, interval=1, **settings)(nn.Sequential(*list(model)[:3])(x))

    with pytest.raises(InvalidInput, match=r"do not depend on the parameters unused\.weight, unused\.bias"):
        run()
    assert run(params=list(model.parameters())) > 0


@pytest.mark.parametrize("shared", ["0.weight", "all but the last", "parameters"])
@pytest.mark.parametrize("settings", [{}, {"estimator": "per_example"}, {"mode": "jvp"}])
def test_a_copy_that_shares_a_part_is_refused_and_networks_around_are_not(shared, settings):
    model = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double().eval()
    )
    other, x = copy.deepcopy(model), torch.randn(6, 3, dtype=torch.float64)
    names = {"0.weight": ["0.weight"], "all but the last": [n for n, _ in model.named_parameters() if n[0] != "4"]}
    for name in names.get(shared, [n for n, _ in model.named_parameters()]):
        place, _, last = name.rpartition(".")
        setattr(other.get_submodule(place), last, model.get_parameter(name))

    def run(network, **more):
        penalty = FisherPenalty(model, alpha=1.0, interval=1, **settings, **more)
        return penalty.add_gradient_(lambda: network(x)) if "mode" in settings else penalty(network(x), x)

    with pytest.raises(InvalidInput, match="not of a copy of it"):
        run(other)
    with pytest.raises(InvalidInput, match="not of a copy of it"):
        run(other, params=["0.weight"])
    assert run(model) > 0
    if "estimator" not in settings:  # which calls the network by itself
        encoder = nn.Linear(3, 3).double()
        assert run(nn.Sequential(encoder, model, nn.Linear(2, 2).double())) > 0
