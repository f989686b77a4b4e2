"""The compiled loops against the same loops in numpy, and what is imported when."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.special import expit

from mlcollage.papers import gated_linear_networks
from mlcollage.papers.gated_linear_networks import GatedNetwork, GLNClassifier, GLNRegressor, _kernels

MASK = 0xFFFFFFFFFFFFFFFF


class Loops:
    """The compiled functions in numpy alone: all neurons of a layer at once."""

    @staticmethod
    def take_in(moments, values, most, memory):
        count, mean, square = moments
        full = count >= memory
        delta = values - mean
        with np.errstate(invalid="ignore"):
            square = np.where(full, square * (memory - 1) / np.maximum(count, 1), square)
            count = np.where(full, memory - 1, count)
            largest = np.sqrt(np.maximum(most**2 / np.maximum(count, 1), 1) * square)
        delta = np.where(square > 0, np.clip(delta, -largest, largest), delta)
        moments[:] = count + 1, mean + delta / (count + 1), square + delta * (delta - delta / (count + 1))

    @staticmethod
    def standardize(x, moments, learn, offset, limit, bias, most, memory, base, side):
        base[:, 0] = bias
        for i, sample in enumerate(x):
            there = ~np.isnan(sample)
            if learn:
                mine = moments[:, there]
                Loops.take_in(mine, sample[there], most, memory)
                moments[:, there] = mine
            scale = np.sqrt(moments[2] / np.maximum(moments[0], 1)) + offset
            known = there & (scale > 0)
            side[i] = np.clip(np.where(known, sample - moments[1], 0) / np.where(known, scale, 1), -most, most)
        np.clip(side, -limit, limit, out=base[:, 1:])

    @staticmethod
    def pack(projected, column, side, tolerances, normals, offsets, first, bits, contexts):
        columns = slice(column, column + contexts.shape[1] * bits)
        threshold = offsets[columns]
        margin = projected[:, columns] - threshold
        inside = margin > 0
        near = np.abs(margin) <= tolerances[:, None]
        for i, h in zip(*np.nonzero(near), strict=True):
            exact = np.cumsum(normals[column + h].astype(np.float64) * side[i].astype(np.float64))
            inside[i, h] = (exact[-1] if exact.size else 0.0) > threshold[h]
        powers = 1 << np.arange(bits, dtype=np.int64)
        contexts[:] = first + inside.reshape(len(contexts), -1, bits) @ powers

    @staticmethod
    def place(key, slots, keys):
        place = (((int(key) * 0x9E3779B97F4A7C15) & MASK) >> 20) & (len(slots) - 1)
        while slots[place] >= 0 and keys[slots[place]] != key:
            place = (place + 1) & (len(slots) - 1)
        return place

    @staticmethod
    def hash_rows(keys, start, stop, slots):
        for row in range(start, stop):
            slots[Loops.place(keys[row], slots, keys)] = row

    @staticmethod
    def find_rows(contexts, done, bits, lazy, table, allocate, rows):
        lazy, table = _kernels.LazyRows(*lazy), _kernels.Rows(*table)
        used, (n, neurons) = lazy.used, contexts.shape
        for i in range(done, n):
            full = (
                used[0] + neurons > len(lazy.keys)
                or 2 * (used[0] + neurons) > len(lazy.slots)
                or used[1] + neurons * lazy.fans.max() > len(table.weights)
            )
            if allocate and full:
                return i
            for k in range(neurons):
                key = (k << bits) | int(contexts[i, k])
                place = Loops.place(key, lazy.slots, lazy.keys)
                row = lazy.slots[place]
                if row < 0:
                    row = layer = lazy.layer[k]
                    if allocate:
                        row, fan = used[0], lazy.fans[layer]
                        lazy.slots[place], lazy.keys[row], table.start[row] = row, key, used[1]
                        table.weights[used[1] : used[1] + fan] = lazy.initial[layer]
                        used += 1, fan
                rows[i, k] = row
        return n

    @staticmethod
    def run_bernoulli(samples, table, sizes, fan, constants, official, learn, logits):
        samples, table, c = _kernels.Samples(*samples), _kernels.Rows(*table), _kernels.Mixing(*constants)
        for i, sample in enumerate(samples.base):
            values = sample[:fan]
            for end, size in zip(np.cumsum(sizes), sizes, strict=True):
                selected = samples.rows[i, end - size : end]
                where = table.start[selected][:, None] + np.arange(len(values))
                w = table.weights[where]  # (size, inputs)
                a = w @ values
                logits[i, end - size : end] = a
                if learn:
                    table.counts[selected] += 1
                    step = samples.rates[i] * (expit(a) - samples.targets[i])
                    if official:
                        step = np.where(np.abs(a) > c.limit, 0, step)
                    table.weights[where] = np.clip(w - step[:, None] * values, -c.box, c.box)
                values = np.concatenate([[c.bias], np.clip(a, -c.limit, c.limit)]).astype(sample.dtype)

    @staticmethod
    def running_moments(y, moments, most, memory, scaled, before):
        for i, value in enumerate(y):
            before[:, i] = moments[1, 0], np.sqrt(moments[2, 0] / max(moments[0, 0], 1.0)) or 1.0
            Loops.take_in(moments, value, most, memory)
            deviation = np.sqrt(moments[2, 0] / moments[0, 0])
            scaled[i] = np.clip((value - moments[1, 0]) / deviation, -most, most) if deviation > 0 else 0.0

    @staticmethod
    def run_gaussian(samples, table, sizes, constants, official, learn, out):
        samples, table, c = _kernels.Samples(*samples), _kernels.Rows(*table), _kernels.Product(*constants)
        for i, sample in enumerate(samples.base):
            mean, precision = sample, np.ones_like(sample)
            for end, size in zip(np.cumsum(sizes), sizes, strict=True):
                mine = slice(end - size, end)
                selected = samples.rows[i, mine]
                where = table.start[selected][:, None] + np.arange(len(mean))
                w = table.weights[where]  # (size, inputs)
                used = np.clip(w, -c.box, c.box)
                tau = used @ precision
                inside = np.where(official & (tau < 0), c.high, np.clip(tau, c.low, c.high))
                shift = (tau - inside) / (precision @ precision)
                projected = used - shift[:, None] * precision
                mu = projected @ (precision * mean) / inside
                out[i, 0, mine], out[i, 1, mine] = mu, inside
                if learn:
                    table.counts[selected] += 1
                    error = (samples.targets[i] - mu)[:, None]
                    squared = precision**2
                    spread = np.sum(squared * (mean - mu[:, None]) ** 2, axis=1)
                    information = (spread + squared.sum() * (1 / inside + error[:, 0] ** 2)) / inside
                    step = np.minimum(samples.rates[i], c.longest / information)[:, None]
                    slope = precision * (0.5 * error**2 - 0.5 / inside[:, None] - error * (mean - mu[:, None]))
                    if official:
                        along = (slope @ precision / (precision @ precision))[:, None] * precision
                        slope -= np.where(shift[:, None] != 0, along, 0)
                    if official:
                        share = (
                            np.sign(c.box - np.abs(w)) + 1
                        ) / 2  # of the gradient that the clip to the box lets through
                        table.weights[where] = w - step * slope * share
                    else:
                        table.weights[where] = np.clip(projected - step * slope, -c.box, c.box)
                mean = np.concatenate([sample[:3], mu])
                precision = np.concatenate([np.ones(3, sample.dtype), inside])


@pytest.fixture
def both_ways(monkeypatch):
    """Run a function with the compiled loops, then with those above."""

    def run(function):
        fast = function()
        for name in (name for name in vars(Loops) if not name.startswith("_") and name not in ("place", "take_in")):
            monkeypatch.setattr(_kernels, name, getattr(Loops, name))
        return zip(fast, function(), strict=True)

    return run


@pytest.mark.parametrize("gradient", ["paper", "official"])
@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_compiled_loops_equal_numpy_loops_on_a_network(both_ways, tables, gradient):
    rng = np.random.default_rng(0)
    side = rng.normal(size=(300, 5))
    base = np.concatenate([np.full((300, 1), 1.0), np.clip(2 * side, -4.5, 4.5)], axis=1)
    targets = (rng.random((300, 3)) < expit(2 * side[:, :3])).astype(float)

    def numbers():
        net = GatedNetwork((4, 3, 1), 5, 5, dtype="float64", tables=tables, context_dim=5, gradient=gradient, eps=0.05)
        net.add_heads(3)
        out = net.learn(base, side, targets, rate=0.1)
        return out, net.predict(base, side), net.visit_counts(side), *(net.layer_weights(i) for i in range(3))

    for fast, slow in both_ways(numbers):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-11)


def test_compiled_loops_equal_numpy_loops_in_the_estimators(both_ways):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 6))
    y = X[:, 0] - X[:, 1] * X[:, 2]
    cases = [
        (GLNClassifier((6, 4), dtype="float64", random_state=0), y > 0),
        (GLNClassifier((6, 4), context_dim=12, tables="lazy", dtype="float64", random_state=0), y > 0),
        (GLNRegressor((6, 4), random_state=0), y),
        (GLNRegressor((6, 4), gradient="official", min_variance=0.5, random_state=0), y),
        (GLNClassifier((6, 4), max_deviation=1.5, memory=40, dtype="float64", random_state=0), y > 0),
        (GLNRegressor((6, 4), max_deviation=1.5, memory=40, random_state=0), y),
    ]

    def numbers():
        return [model.fit(X, target).progressive_predict(X, target) for model, target in cases]

    for fast, slow in both_ways(numbers):
        np.testing.assert_allclose(fast, slow, rtol=1e-7, atol=1e-9)


def test_public_names_are_there_and_others_are_not():
    for name in gated_linear_networks.__all__:
        assert getattr(gated_linear_networks, name).__name__ == name
    assert set(gated_linear_networks.__all__) <= set(dir(gated_linear_networks))
    with pytest.raises(AttributeError, match="GLNTransformer"):
        _ = gated_linear_networks.GLNTransformer


def test_importing_the_package_imports_no_heavy_library():
    code = "import sys, mlcollage.papers.gated_linear_networks; print({'torch', 'numba', 'sklearn'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
