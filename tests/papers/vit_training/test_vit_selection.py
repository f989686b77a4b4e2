"""Choosing among runs: rules, regret, random search, Pareto fronts, and tables that real sweeps leave behind."""

import itertools

import numpy as np
import pandas as pd
import pytest

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.vit_training import pareto, random_search_curve, rank_agreement, select_best, selection_regret


def runs(n=12, seed=0):
    """Four pre-trained models with three fine-tuning runs each, on two tasks."""
    rng = np.random.default_rng(seed)
    rows = []
    for model, (task, lr) in itertools.product(
        range(n // 3), itertools.product(("pets", "cifar"), (0.001, 0.003, 0.01))
    ):
        rows.append(
            {"name": "S/16", "aug": f"a{model}", "final_val": 0.4 + model / 100, "adapt_ds": task, "adapt_lr": lr}
        )
    table = pd.DataFrame(rows)
    table["adapt_final_val"], table["adapt_final_test"] = rng.random((2, len(table))) * 0.5 + 0.4
    return table


def test_rules_choose_what_a_search_by_hand_finds():
    table = runs()
    for task, group in table.groupby("adapt_ds"):
        best_upstream = group[group["final_val"] == group["final_val"].max()]
        expected = {
            "upstream": best_upstream.loc[best_upstream["adapt_final_val"].idxmax()],
            "downstream": group.loc[group["adapt_final_val"].idxmax()],
            "oracle": group.loc[group["adapt_final_test"].idxmax()],
        }
        regret = selection_regret(table).set_index("adapt_ds").loc[task]
        for rule, row in expected.items():
            found = select_best(table, rule).set_index("adapt_ds").loc[task]
            assert found["adapt_final_test"] == row["adapt_final_test"]
            if rule != "oracle":
                gap = expected["oracle"]["adapt_final_test"] - row["adapt_final_test"]
                assert regret[rule] == pytest.approx(gap)
        gain = expected["downstream"]["adapt_final_test"] - expected["upstream"]["adapt_final_test"]
        assert regret["difference"] == pytest.approx(gain)


def test_runs_that_failed_are_dropped_and_counted_and_ties_are_listed():
    table = runs()
    table.loc[[0, 1], "adapt_final_val"] = np.nan
    assert select_best(table, "downstream").attrs["dropped"] == 2
    table["final_val"] = 0.5
    assert select_best(table).attrs["ties"] == [("S/16", "cifar"), ("S/16", "pets")]
    table["final_val"] = np.nan
    with pytest.raises(InvalidInput, match="no row has finite final_val"):
        select_best(table)


def test_a_nan_is_never_the_best_wherever_it_stands():
    for order in itertools.permutations([0.31, np.nan, 0.47]):
        table = pd.DataFrame({"name": "m", "adapt_ds": "t", "adapt_final_val": order})
        assert select_best(table, "downstream")["adapt_final_val"].item() == 0.47


def test_validation_rows_that_were_trained_on_are_refused():
    table = runs().assign(val_in_pretraining=True)
    with pytest.raises(InvalidInput, match="favors runs that memorize"):
        select_best(table)
    assert len(select_best(table, allow_leak=True)) == 2
    assert len(select_best(table, "downstream")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="final_val"), "no column 'final_val'"),
        (lambda t: t.assign(final_val=[47.9, *[0.481] * (len(t) - 1)]), "mixes shares and per cent"),
        (lambda t: t.assign(final_val="0.4"), "must be numbers"),
        (lambda t: t.iloc[:0], "is empty"),
        (lambda t: t.to_dict("list"), "DataFrame of runs is needed"),
    ],
)
def test_bad_tables_are_explained(change, message):
    with pytest.raises(InvalidInput, match=message):
        select_best(change(runs()))
    with pytest.raises(UnknownName, match="rule"):
        select_best(runs(), "best")


def test_random_search_has_the_distribution_of_all_orders():
    val, test = [0.3, 0.9, 0.5, 0.7], [0.2, 0.6, 0.8, 0.4]
    table = pd.DataFrame({"adapt_final_val": val, "adapt_final_test": test})
    curve = random_search_curve(table, 20_000, band=(0.0, 1.0))
    for k in range(4):
        exact = [test[max(order[: k + 1], key=val.__getitem__)] for order in itertools.permutations(range(4))]
        row = curve.iloc[k]
        assert (row["low"], row["high"]) == (min(exact), max(exact))
        assert abs(row["median"] - np.median(exact)) < 0.11  # a median between two values may be either or the middle
    assert curve["searches"].tolist() == [20_000] * 4


def test_random_search_counts_costs():
    table = pd.DataFrame({"adapt_final_val": [0.1, 0.9], "adapt_final_test": [0.1, 0.9], "steps": [100, 1000]})
    curve = random_search_curve(table, 4000, cost="steps").set_index("budget")
    assert list(curve.index) == [100.0, 1000.0, 1100.0]
    assert curve["searches"].iloc[0] == pytest.approx(2000, abs=200)
    assert curve["median"].tolist() == [0.1, pytest.approx(0.5, abs=0.41), 0.9]
    with pytest.raises(InvalidInput, match="positive"):
        random_search_curve(table.assign(steps=0), cost="steps")


def test_the_pareto_front_is_what_no_other_beats():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.integers(0, 12, (60, 2)).astype(float), columns=["cost", "score"])
    front = pareto(table, "cost", "score")
    kept = {
        (a.cost, a.score)
        for a in table.itertuples()
        if not any(
            b.cost <= a.cost and b.score >= a.score and (b.cost < a.cost or b.score > a.score)
            for b in table.itertuples()
        )
    }
    assert set(map(tuple, front.to_numpy())) == kept
    assert front["score"].is_monotonic_increasing


def test_rank_agreement_counts_pairs():
    a, b = np.random.default_rng(0).random((2, 9))
    pairs = list(itertools.combinations(range(9), 2))
    expected = np.mean([np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs])
    assert rank_agreement(a, b) == pytest.approx(expected)
    assert np.isnan(rank_agreement([1, 1, 1], [1, 2, 3]))
