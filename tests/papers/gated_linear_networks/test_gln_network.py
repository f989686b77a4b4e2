"""The Bernoulli network against independent truths: closed forms, autograd, a plain numpy network, exact linearity."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from mlcollage.errors import InvalidInput
from mlcollage.papers.gated_linear_networks import _gates, network
from mlcollage.papers.gated_linear_networks._settings import step_sizes
from mlcollage.papers.gated_linear_networks.network import GatedNetwork

BIAS = logit(0.731)


def stream(n=120, d=5, heads=3, seed=0, dtype=np.float64, bias=BIAS, spread=1.5):
    rng = np.random.default_rng(seed)
    side = rng.normal(size=(n, d)).astype(dtype)
    base = np.concatenate([np.full((n, 1), bias), np.clip(spread * side, -4.5, 4.5)], axis=1).astype(dtype)
    return base, side, (rng.random((n, heads)) < expit(2 * side[:, :heads])).astype(dtype)


def build(sizes=(4, 3, 1), d=5, heads=3, dtype="float64", **settings):
    net = GatedNetwork(sizes, d, d, dtype=dtype, **settings)
    net.add_heads(heads)
    return net


class PlainGLN:
    """A gated linear network written as the paper's pseudo-code, in probabilities, one neuron after the other."""

    def __init__(self, net, head):
        self.net, self.sizes, self.m = net, [int(k) for k in net.sizes], net.context_dim
        per = net.neurons * self.m
        self.v = net.contexts.normals[head * per : (head + 1) * per].reshape(net.neurons, self.m, -1)
        self.b = net.contexts.offsets[head * per : (head + 1) * per].reshape(net.neurons, self.m)
        fans = [net.n_inputs + 1, *(k + 1 for k in self.sizes[:-1])]
        self.w = [np.full((k, 2**self.m, f), 1.0 / f) for k, f in zip(self.sizes, fans, strict=True)]
        self.eps, self.beta, self.box = 1 / (1 + np.exp(net.limit)), 1 / (1 + np.exp(-net.bias)), net.constants.box

    def step(self, p0, z, x, eta):
        p, first = np.clip(p0, self.eps, 1 - self.eps), 0
        for layer, k in enumerate(self.sizes):
            inputs = logit(np.concatenate([[self.beta], p]))
            q = np.empty(k)
            for j in range(k):
                c = sum(int(self.v[first + j, i] @ z > self.b[first + j, i]) << i for i in range(self.m))
                w = self.w[layer][j, c]
                q[j] = 1 / (1 + np.exp(-w @ inputs))
                gradient = (q[j] - x) * inputs
                if self.net.official and not self.eps <= q[j] <= 1 - self.eps:
                    gradient = 0 * inputs
                self.w[layer][j, c] = np.clip(w - eta * gradient, -self.box, self.box)
            p, first = np.clip(q, self.eps, 1 - self.eps), first + k
        return q[0]


@pytest.mark.parametrize("gradient", ["paper", "official"])
def test_equals_a_plain_network_step_by_step(gradient):
    base, side, targets = stream(spread=4.0)
    net = build(gradient=gradient, context_dim=2, eps=0.05, weight_clip=0.8)
    base[:, 1:] = np.clip(base[:, 1:], -net.limit, net.limit)
    plain = [PlainGLN(net, head) for head in range(3)]
    learned = net.learn(base, side, targets, rate=0.3)
    for head in range(3):
        expected = [
            plain[head].step(expit(b[1:]), z, x[head], 0.3) for b, z, x in zip(base, side, targets, strict=True)
        ]
        np.testing.assert_allclose(expit(learned[:, head]), expected, rtol=0, atol=1e-10)
        for layer in range(3):
            np.testing.assert_allclose(net.layer_weights(layer)[head], plain[head].w[layer], rtol=0, atol=1e-10)


def test_one_neuron_without_gates_is_online_logistic_regression():
    base, side, targets = stream(heads=1)
    net = build(sizes=(1,), heads=1, context_dim=0, weight_init="zeros")
    net.learn(base, side, targets, rate=0.1)
    w = np.zeros(6)
    for b, x in zip(base, targets[:, 0], strict=True):
        w -= 0.1 * (1 / (1 + np.exp(-w @ b)) - x) * b
    np.testing.assert_allclose(net.layer_weights(0)[0, 0, 0], w, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gradient", ["paper", "official"])
def test_step_is_the_autograd_gradient_of_each_neurons_own_loss(gradient):
    base, side, targets = stream(n=60, heads=1, spread=4.0)
    net = build(heads=1, context_dim=1, gradient=gradient, eps=0.1)
    net.learn(base[:-1], side[:-1], targets[:-1], rate=0.5)
    before = [torch.tensor(net.layer_weights(layer)[0]) for layer in range(3)]
    contexts = np.split(net.context_indices(side[-1:])[0, 0].astype(int), [4, 7])
    net.learn(base[-1:], side[-1:], targets[-1:], rate=0.5)
    inputs = torch.tensor(base[-1])
    for layer, index in enumerate(contexts):
        rows = before[layer][torch.arange(len(index)), torch.tensor(index)].clone().requires_grad_()
        raw = rows @ inputs
        q = torch.sigmoid(raw)
        seen = torch.logit(q.clamp(0.1, 0.9)) if gradient == "official" else raw
        goal = torch.full_like(q, targets[-1, 0])
        torch.nn.functional.binary_cross_entropy_with_logits(seen, goal, reduction="sum").backward()
        expected = before[layer].clone()
        expected[torch.arange(len(index)), torch.tensor(index)] = (rows - 0.5 * rows.grad).detach()
        np.testing.assert_allclose(net.layer_weights(layer)[0], expected.numpy(), rtol=0, atol=1e-12)
        inputs = torch.cat([torch.tensor([net.bias], dtype=torch.float64), torch.logit(q.detach().clamp(0.1, 0.9))])


def test_gradients_differ_exactly_where_the_raw_output_leaves_the_clip():
    rng = np.random.default_rng(0)
    for scale in (0.5, 20.0):
        start = rng.normal(size=6) * scale / 6
        moved = {}
        base, side, _ = stream(n=1, heads=1)
        for gradient in ("paper", "official"):
            net = build(sizes=(1,), heads=1, context_dim=0, gradient=gradient)
            net.heads[0].weights[:] = start
            raw = net.learn(base, side, np.ones((1, 1)), rate=0.1)[0, 0]
            moved[gradient] = net.heads[0].weights.copy()
        if abs(raw) > net.limit:
            assert np.array_equal(moved["official"], start)
            assert not np.array_equal(moved["paper"], start)
        else:
            assert np.array_equal(moved["official"], moved["paper"])


@given(seed=st.integers(0, 1000), m=st.integers(0, 6), readout=st.sampled_from(["last", "mean"]))
@settings(max_examples=20, deadline=None)
def test_lazy_tables_equal_dense_tables_exactly(seed, m, readout):
    base, side, targets = stream(seed=seed, dtype=np.float32)
    nets = [build(dtype="float32", context_dim=m, tables=t, seed=seed, readout=readout) for t in ("dense", "lazy")]
    before = [net.learn(base, side, targets, rate=0.1) for net in nets]
    assert np.array_equal(*before)
    other = stream(seed=seed + 1, dtype=np.float32)
    assert np.array_equal(*(net.predict(*other[:2]) for net in nets))
    assert np.array_equal(*(net.visit_counts(other[1]) for net in nets))
    assert np.array_equal(*(net.saliency(*other[:2]) for net in nets))
    for layer in range(3):
        assert np.array_equal(*(net.layer_weights(layer) for net in nets))


def test_lazy_tables_take_sixteen_hyperplanes_where_dense_ones_would_not_fit(monkeypatch):
    base, side, targets = stream(n=200)
    net = build(heads=3, context_dim=16, sizes=(16, 16, 1))
    net.learn(base, side, targets, rate=0.1)
    assert net.heads[0].lazy
    assert int(net.heads[0].used[0]) <= 3 + 200 * 33
    assert net.heads[0].weights.nbytes < net.dense_bytes(1) / 10
    monkeypatch.setattr(network, "_available_memory", lambda: 10**6)
    with pytest.raises(InvalidInput, match=r"GB.*tables='lazy'"):
        build(heads=1, context_dim=16, tables="dense")


def test_results_do_not_depend_on_threads_or_on_the_cut_of_the_stream():
    base, side, targets = stream(n=1500, d=40, dtype=np.float32)
    whole = build(d=40, dtype="float32")
    out = whole.learn(base, side, targets)
    threads = build(d=40, dtype="float32")
    assert np.array_equal(out, threads.learn(base, side, targets, n_jobs=3))
    cut = build(d=40, dtype="float32")
    edges = [0, 1, 2, 9, 700, 701, 1500]
    parts = [cut.learn(base[a:b], side[a:b], targets[a:b]) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(out, np.concatenate(parts))
    assert np.array_equal(whole.heads[2].weights, cut.heads[2].weights)
    assert np.array_equal(whole.predict(base, side)[5:6], whole.predict(base[5:6], side[5:6]))


def test_gates_near_a_hyperplane_are_the_float64_bits_whatever_the_chunk():
    rng = np.random.default_rng(0)
    contexts = _gates.Contexts(8, 4, np.float32)
    normals, offsets = _gates.draw_hyperplanes(rng, 32, 300)
    contexts.append(normals, offsets)
    side = rng.normal(size=(64, 300)).astype(np.float32)
    exact = contexts.normals.astype(float) @ side.T.astype(float)
    side[:32] += ((contexts.offsets - exact.diagonal())[:, None] * contexts.normals)[
        :32
    ]  # onto the hyperplanes, nearly
    first = np.zeros(8, np.int32)
    together = contexts.gates(side, [0])(0, first)
    bits = side.astype(float) @ contexts.normals.T.astype(float) > contexts.offsets
    assert np.array_equal(together, bits.reshape(64, 8, 4) @ (1 << np.arange(4)))
    alone = np.concatenate([contexts.gates(side[i : i + 1], [0])(0, first) for i in range(64)])
    assert np.array_equal(together, alone)


def test_context_indices_use_the_smallest_type():
    for m, kind in ((0, np.uint8), (8, np.uint8), (9, np.uint16), (17, np.uint32)):
        indices = build(context_dim=m, heads=1, tables="lazy").context_indices(stream(n=4)[1])
        assert indices.dtype == kind
        assert indices.max() < 2**m


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_saliency_is_the_product_of_the_selected_matrices_and_reproduces_the_output(readout):
    base, side, targets = stream(n=400)
    net = build(readout=readout, sizes=(6, 4, 1) if readout == "last" else (6, 4))
    net.learn(base, side, targets, rate=0.02)
    saliency, out, raw = net.saliency(base, side), net.predict(base, side), net.neuron_logits(base, side)
    clipped = (np.abs(raw[:, :, : -int(net.sizes[-1])]) > net.limit).any(axis=2)
    residual = np.abs(np.einsum("nhd,nd->nh", saliency, base) - out)
    assert (~clipped).mean() > 0.5
    assert residual[~clipped].max() < 1e-10
    assert np.abs(np.einsum("nhd,nd->nh", net.saliency(base, side, clipped="constant"), base) - out).max() < 1e-10
    # An explicit product of matrices for one sample and head, the constant inputs carried as a column of their own.
    index = np.split(net.context_indices(side[:1])[0, 1].astype(int), np.cumsum(net.sizes)[:-1])
    product = np.eye(6)
    for layer, chosen in enumerate(index):
        product = net.layer_weights(layer)[1][np.arange(len(chosen)), chosen] @ product
        product = np.vstack([np.eye(6)[0], product])
    np.testing.assert_allclose(saliency[0, 1], product[1:].mean(axis=0), rtol=0, atol=1e-12)


def test_saliency_is_the_finite_difference_inside_a_cell():
    base, side, targets = stream(n=200)
    net = build()
    net.learn(base, side, targets, rate=0.02)
    for feature in range(1, 6):
        moved = base.copy()
        moved[:, feature] += 1e-5
        slope = (net.predict(moved, side) - net.predict(base, side)) / 1e-5
        expected = net.saliency(base, side, clipped="constant")[:, :, feature]
        assert np.median(np.abs(slope - expected)) < 1e-8


def test_visit_counts_count_the_samples_of_a_context():
    base, side, targets = stream(n=150, heads=1)
    net = build(heads=1, context_dim=3)
    net.learn(base, side, targets)
    indices = net.context_indices(side)[:, 0]
    expected = [[(indices[:, k] == c).sum() for k, c in enumerate(row)] for row in indices]
    assert np.array_equal(net.visit_counts(side)[:, 0], expected)


def test_heads_added_later_equal_heads_made_at_the_start():
    early, late = build(heads=3), build(heads=2)
    late.add_heads(1)
    data = stream()
    assert np.array_equal(early.learn(*data), late.learn(*data))


@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_widening_changes_nothing_where_new_inputs_are_zero_and_have_no_weight(tables):
    base, side, targets = stream()
    narrow = build(tables=tables, weight_init="zeros")
    wide = build(tables=tables, weight_init="zeros")
    for net in (narrow, wide):
        net.learn(base, side, targets, rate=0.1)
    wide.widen(2)
    pad = ((0, 0), (0, 2))
    expected = narrow.learn(base, side, targets, rate=0.1)
    np.testing.assert_allclose(
        wide.learn(np.pad(base, pad), np.pad(side, pad), targets, rate=0.1), expected, atol=1e-12
    )
    assert wide.layer_weights(0).shape[-1] == narrow.layer_weights(0).shape[-1] + 2


def test_step_sizes_are_the_named_schedules():
    t = np.arange(1, 40_001)
    assert np.array_equal(step_sizes("paper", 1, 40_000, initial=0.01), np.minimum(0.01, 100 / t))
    assert np.array_equal(step_sizes("official", 1, 40_000, initial=0.003), np.minimum(0.003, 1 / (1 + 0.1 * t)))
    assert np.allclose(step_sizes("sqrt", 1, 9, initial=0.3), 0.3 / np.sqrt(t[:9]))
    assert step_sizes(lambda step: 1 / step, 3, 2).tolist() == [1 / 3, 1 / 4]
    with pytest.raises(InvalidInput, match="step size"):
        step_sizes(lambda step: -1.0, 1, 1)


def test_mean_log_loss_falls_with_depth_on_a_learnable_stream():
    base, side, targets = stream(n=4000)
    net = build(sizes=(8, 8, 1), heads=3)
    net.learn(base, side, targets, rate=0.02)
    raw = net.neuron_logits(base, side)
    loss = np.logaddexp(0, np.where(targets[:, :, None] == 1, -raw, raw)).mean(axis=(0, 1))
    assert loss[16] <= loss[:8].mean()
    assert loss[16] < np.log(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_dim": -1}, "context_dim"),
        ({"context_dim": 31}, "context_dim"),
        ({"eps": 0.5}, "eps"),
        ({"eps": 0.0}, "eps"),
        ({"weight_clip": 0}, "weight_clip"),
        ({"layer_bias": 0.5}, "layer_bias"),
        ({"weight_init": "ones"}, "weight_init"),
        ({"gradient": "exact"}, "gradient"),
        ({"readout": "max"}, "aggregator"),
        ({"tables": "hashed"}, "tables"),
        ({"dtype": "float16"}, "dtype"),
        ({"sizes": (4, 2)}, "one neuron"),
        ({"sizes": (0, 1)}, "ayer sizes"),
        ({"sizes": (2.5, 1)}, "ayer sizes"),
        ({"context_dim": 2.0}, "context_dim"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message):
    with pytest.raises(InvalidInput, match=message):
        build(**settings)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("where", ["base", "side", "targets"])
def test_numbers_that_are_not_finite_never_reach_the_weights(bad, where):
    arrays = dict(zip(("base", "side", "targets"), stream(n=20), strict=True))
    net = build(dtype="float32")
    net.learn(**arrays)
    before = net.layer_weights(0)
    arrays[where] = arrays[where].copy()
    arrays[where][7, 1] = bad
    with pytest.raises(InvalidInput, match=r"finite float32|from 0 to 1"):
        net.learn(**arrays)
    np.testing.assert_array_equal(net.layer_weights(0), before)
    if where == "side":  # no region is right for it: a prediction would look like any other
        with pytest.raises(InvalidInput, match="finite"):
            net.predict(arrays["base"], arrays["side"])


def test_arrays_of_the_wrong_shape_never_reach_the_loops():
    base, side, targets = stream(n=4)
    net = build()
    for call in (
        lambda: net.learn(base[:, 1:], side, targets),
        lambda: net.learn(base, side[:, 1:], targets),
        lambda: net.learn(base, side, targets[:, :1]),
        lambda: net.predict(base[:3], side),
        lambda: net.neuron_logits(base, side[0]),
        lambda: net.visit_counts(side[:, :2]),
    ):
        with pytest.raises(InvalidInput, match="shape"):
            call()
