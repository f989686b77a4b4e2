"""Portfolios: the official numbers, brute force, the definition written out, the bound."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.papers.autosklearn2 import PerformanceTensor, Policy, PortfolioBuilder, halving_schedule, simulate

CASES = ["a_full_test", "a_full_valid", "a_sh_test", "a_sh_valid", "a_order", "a_init", "a_full_cut", "a_sh_cut"]
CASES += ["b_ties_full", "b_ties_sh", "c_stop"]
SH = Policy(allocation="sh")


def tensor_of(d, prefix):
    valid, test, runtime = (d[f"{prefix}_{n}"] for n in ("valid", "test", "runtime"))
    budgets = np.full(valid.shape[1:], np.nan)
    for c, n in enumerate(d[f"{prefix}_n_points"]):
        budgets[c, :n] = 100 / 2.0 ** np.arange(n - 1, -1, -1)
    tasks = [f"t{i}" for i in range(len(valid))]
    return PerformanceTensor(valid, test, runtime, tasks, [{"k": i} for i in range(valid.shape[1])], budgets)


def random_tensor(seed, tasks=6, candidates=9, points=5, ties=False):
    rng = np.random.default_rng(seed)
    valid = rng.random((tasks, candidates, points))
    test = np.clip(valid + 0.1 * rng.normal(size=valid.shape), 0, 1)
    if ties:
        valid = valid.round(1)
    runtime = np.cumsum(rng.random(valid.shape), axis=2)
    ends = rng.integers(1, points + 1, size=(tasks, candidates))
    gone = np.arange(points) >= ends[:, :, None]
    for a in (valid, test, runtime):
        a[gone] = np.nan
    names = [str(i) for i in range(tasks)]
    budgets = 100 / 2.0 ** np.arange(points - 1, -1, -1)
    return PerformanceTensor(valid, test, runtime, names, [{"k": i} for i in range(candidates)], budgets)


@pytest.mark.parametrize("case", CASES)
def test_portfolios_are_the_official_ones(official, case):
    d = official("portfolio")
    size, sh, on_valid, limit = d[f"{case}_settings"]
    cut = f"{case}_cutoff" in d
    builder = PortfolioBuilder(
        int(size),
        Policy(allocation="sh" if sh else "full"),
        time_limit=limit if np.isfinite(limit) else None,
        cutoff="search" if cut else None,
        cutoff_grid="official",
        pick_on="valid" if on_valid else "test",
        initial_loss=d.get(f"{case}_initial_loss"),
    ).fit(tensor_of(d, case[0]), order=d[f"{case}_order"])
    assert builder.portfolio_ == d[f"{case}_portfolio"].tolist()
    np.testing.assert_allclose(builder.trajectory_, d[f"{case}_trajectory"], atol=1e-14)
    np.testing.assert_allclose(builder.task_loss_, d[f"{case}_task_loss"], atol=1e-14)
    if cut:
        assert builder.cutoff_ == d[f"{case}_cutoff"]
        assert list(builder.cutoff_scores_) == d[f"{case}_cutoff_grid"].tolist()
        np.testing.assert_allclose(list(builder.cutoff_scores_.values()), d[f"{case}_cutoff_score"], atol=1e-14)


def test_rungs_are_the_official_ones(official):
    d = official("portfolio")
    assert halving_schedule() == [(16, 6.25), (4, 25.0), (1, 100.0)]
    tensor = tensor_of(d, "a")
    np.testing.assert_array_equal(tensor.rung_index(d["a_sh_test_sh_budgets"]), d["a_sh_test_sh_rung_index"])
    s = official("schedule")
    for (eta, low, high), sizes, budgets in zip(
        s["settings"], s["portfolio_sizes"], s["portfolio_budgets"], strict=True
    ):
        found = halving_schedule(eta, low, high, exact=False)
        assert [n for n, _ in found] == sizes[np.isfinite(sizes)].tolist()
        np.testing.assert_allclose([b for _, b in found], budgets[np.isfinite(budgets)])


def play_by_the_book(tensor, task, sequence, policy, limit=np.inf, cutoff=np.inf):
    """Algorithm 1 written out plainly, for one task."""
    valid, test, seconds = (a[task] for a in (tensor.valid, tensor.normalize(), tensor.runtime))
    schedule, clock, seen = policy.schedule, 0.0, []
    rungs = tensor.rung_index([b for _, b in schedule])
    for first in range(0, len(sequence), schedule[0][0]):
        runners = list(sequence[first : first + schedule[0][0]])
        for k in range(len(schedule)):
            if k + 1 < len(schedule) and schedule[k + 1][0] >= len(runners):
                continue
            scores = {}
            for c in runners:
                if clock >= limit:
                    return min([(1e9, 1.0), *seen], key=lambda s: s[0])[1]
                curve = np.flatnonzero(np.isfinite(valid[c]))
                curve = curve[curve <= rungs[c, k]]
                left = min(cutoff, limit - clock)
                reached = curve if np.isinf(left) or left > seconds[c, curve[-1]] else curve[seconds[c, curve] < left]
                clock += 0 if np.isinf(limit) else min(left, seconds[c, curve[-1]])
                scores[c] = (valid[c, reached[-1]], test[c, reached[-1]]) if len(reached) else (1.0, 1.0)
                seen.append(scores[c])
            if k + 1 < len(schedule):
                runners = sorted(runners, key=lambda c: scores[c][0])[: schedule[k + 1][0]]
    return min(seen, key=lambda s: s[0])[1]


@pytest.mark.parametrize("policy", [Policy(), SH], ids=str)
@pytest.mark.parametrize("limit", [None, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_replay_is_the_definition(policy, limit, seed):
    tensor = random_tensor(seed, candidates=20, ties=seed % 2 == 1)
    order = np.random.default_rng(seed).permutation(20)
    found = simulate(tensor, order, policy, time_limit=limit, cutoff=None if limit is None else 1.5).loss[0]
    bounds = (np.inf, np.inf) if limit is None else (limit, 1.5)
    expected = [play_by_the_book(tensor, t, order, policy, *bounds) for t in range(6)]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("seed", range(5))
def test_no_portfolio_beats_the_bound_and_greedy_is_near_the_best(seed):
    tensor = random_tensor(seed)
    builder = PortfolioBuilder(3, pick_on="test").fit(tensor)
    sets = np.array(list(combinations(range(9), 3)))
    best = simulate(tensor, sets, pick_on="test").loss.mean(1).min()
    assert builder.bound_ <= best + 1e-12
    assert 1 - builder.trajectory_[-1] >= (1 - np.exp(-1)) * (1 - best)
    # Also when members are picked by their validation loss, and under successive halving, nothing is below the bound.
    for policy in (Policy(), SH):
        bound = PortfolioBuilder(3, policy).fit(tensor).bound_
        assert bound <= simulate(tensor, sets, policy).loss.mean(1).min() + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_lazy_greedy_is_greedy(seed):
    tensor = random_tensor(seed, 8, 40, ties=True)
    plain, lazy = (PortfolioBuilder(12, pick_on="test", lazy=flag).fit(tensor) for flag in (False, True))
    assert plain.portfolio_ == lazy.portfolio_
    np.testing.assert_array_equal(plain.trajectory_, lazy.trajectory_)


def test_the_fast_way_is_the_general_one():
    tensor = random_tensor(3, 7, 25, ties=True)
    fast = PortfolioBuilder(8).fit(tensor)
    slow = PortfolioBuilder(8, time_limit=1e9).fit(tensor)  # time never runs out
    assert fast.portfolio_ == slow.portfolio_
    np.testing.assert_allclose(fast.trajectory_, slow.trajectory_)


def test_a_tensor_survives_a_file_and_gaps_are_named(tmp_path):
    tensor = random_tensor(0)
    tensor.save(tmp_path / "t.parquet")
    again = PerformanceTensor.load(tmp_path / "t.parquet")
    for name in ("valid", "test", "runtime", "budget_table"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tensor, name))
    assert (again.tasks, again.configs) == (tensor.tasks, tensor.configs)
    valid = tensor.valid.copy()
    valid[2, 3] = np.nan
    holes = PerformanceTensor(valid, tensor.test, tensor.runtime, tensor.tasks, tensor.configs, tensor.budgets)
    assert holes.measured == 1 - 1 / 54
    assert holes.complete().tasks == ["0", "1", "3", "4", "5"]
    with pytest.raises(InvalidInput, match="candidate 3 was not measured on task '2'"):
        PortfolioBuilder(2).fit(holes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: PortfolioBuilder(0), "size must be a whole number of at least 1"),
        (lambda t: PortfolioBuilder(2, cutoff="search"), "needs time_limit"),
        (lambda t: PortfolioBuilder(2, lazy=True), "not exact"),
        (lambda t: PortfolioBuilder(2).fit(t, order=[0, 0]), "every number from 0 to 8 once"),
        (lambda t: simulate(t, [0, 99]), "from 0 to 8"),
        (lambda t: simulate(t, [0], initial_loss=[1.0]), "one for a task"),
        (lambda t: halving_schedule(1.0), "eta must be a finite number above 1"),
        (lambda t: simulate(t, [0.5]), "must be numbers of candidates"),
        (lambda t: PortfolioBuilder(2).fit(t, order=np.arange(9) + 0.5), "order must be numbers of candidates"),
        (lambda t: simulate(t, [0], initial_loss=np.full(6, np.nan)), "initial_loss must be finite"),
        (lambda t: simulate(t.valid, [0]), "expected a PerformanceTensor, not ndarray"),
        (lambda t: PortfolioBuilder(2).fit(t.of_tasks([])), "the tensor is empty: 0 tasks"),
        (lambda t: t.of_tasks([6]), "numbers from 0 to 5"),
        (lambda t: replace(t, runtime=-t.runtime), "seconds of at least 0"),
        (lambda t: replace(t, runtime=t.runtime * np.nan), "seconds of at least 0"),
        (lambda t: replace(t, runtime=np.nanmax(t.runtime) - t.runtime), "cannot fall along a curve"),
        (lambda t: PerformanceTensor.load("nothing.parquet"), "there is no file"),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises((InvalidInput, FileNotFoundError), match=message):
        call(random_tensor(0))


def test_joined_tensors_have_the_tasks_of_both_and_one_unit_of_time():
    rng = np.random.default_rng(0)
    loss, seconds = rng.random((3, 4, 2)), np.cumsum(rng.random((3, 4, 2)), axis=2)
    configs = [{"k": i} for i in range(4)]
    a = PerformanceTensor(loss, loss, seconds, list("abc"), configs, [50, 100], np.ones((3, 2)))
    order = [2, 0, 3, 1]
    b = PerformanceTensor(
        loss[:, order], loss[:, order], 4 * seconds[:, order], list("def"), [configs[i] for i in order], [50, 100],
        np.full((3, 2), 2.0),
    )  # fmt: skip
    both = a.joined(b)
    assert list(both.tasks) == list("abcdef")
    np.testing.assert_array_equal(both.valid[3:], loss)
    np.testing.assert_array_equal(both.runtime[3:], 4 * seconds)
    np.testing.assert_array_equal(np.asarray(both.meta_features)[:, 0], [1, 1, 1, 2, 2, 2])
    np.testing.assert_allclose(a.joined(b, rescale=True).runtime[3:], seconds)
    with pytest.raises(InvalidInput, match="the task 'a' is in both"):
        a.joined(a)
    with pytest.raises(InvalidInput, match="2 are in one of them only"):
        a.joined(replace(b, configs=[{"k": 9}, *b.configs[1:]]))
    with pytest.raises(InvalidInput, match="at other budgets"):
        a.joined(replace(b, budgets=[25, 100]))
    still = replace(b, runtime=np.zeros_like(seconds))
    with pytest.raises(InvalidInput, match="seconds cannot be compared"):
        a.joined(still, rescale=True)
