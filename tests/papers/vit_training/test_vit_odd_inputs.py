"""What real tables, arrays and functions look like: each is read rightly, or refused in one sentence."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.vit_training import (
    PresetRecommender,
    Sweep,
    ViTClassifier,
    find_leaks,
    judge_recommender,
    measure_throughput,
    pareto,
    published_sweep,
    random_search_curve,
    rank_agreement,
    select_best,
)


def runs(**columns):
    base = {
        "name": "S/16",
        "adapt_ds": "pets",
        "aug": ["none", "light1", "medium1"],
        "final_val": [0.46, 0.47, 0.45],
        "adapt_final_val": [0.90, 0.91, 0.93],
        "adapt_final_test": [0.89, 0.92, 0.93],
    }
    return pd.DataFrame({**base, **columns})


def chosen(table, rule="upstream"):
    return select_best(table, rule)["aug"].item()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_dropped_and_counted(bad):
    best = select_best(runs(final_val=[0.46, bad, 0.45]))
    assert best["aug"].item() == "none"
    assert best.attrs["dropped"] == 1
    nullable = pd.array([0.46, None, 0.45], dtype="Float64")
    assert chosen(runs(final_val=nullable)) == "none"


def test_runs_with_an_error_are_dropped():
    assert chosen(runs(error=["", "out of memory", None])) == "none"
    with pytest.raises(InvalidInput, match="no row has finite"):
        select_best(runs(error="killed"))


def test_a_leak_in_a_row_without_a_score_does_not_count_and_words_are_no_leaks():
    leaked = runs(val_in_pretraining=True, final_val=np.nan)
    assert chosen(pd.concat([leaked, runs(val_in_pretraining=False)])) == "light1"
    with pytest.raises(InvalidInput, match="must be True or False"):
        select_best(runs(val_in_pretraining="no"))
    with pytest.raises(InvalidInput, match="rows that pre-training saw"):
        select_best(runs(val_in_pretraining=[None, True, False]))


def test_the_best_of_several_seeds_is_called_the_luckiest():
    table = pd.concat([runs(seed=0), runs(seed=1, final_val=[0.6, 0.3, 0.3])])
    with pytest.warns(UserWarning, match="luckiest"):
        select_best(table)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_best(runs(), by=[]), "by must name at least one column"),
        (lambda: pareto(runs(), "aug", "final_val"), "'aug' must be numbers"),
        (lambda: random_search_curve(runs(cost="cheap"), 5, cost="cost"), "'cost' must be numbers"),
        (lambda: random_search_curve(runs(), 5, band=(0.9, 0.1)), "must be .low, high."),
        (lambda: rank_agreement([1, 2, 3], [1, 2]), "are not pairs"),
    ],
)
def test_bad_tables_are_explained(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


def test_pareto_is_that_of_a_comparison_of_all_pairs_also_of_whole_numbers_and_equal_rows():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = pd.DataFrame({"cost": rng.integers(1, 9, 30), "score": rng.integers(1, 9, 30)})
        c, s = table["cost"].to_numpy(), table["score"].to_numpy()
        beaten = ((c <= c[:, None]) & (s >= s[:, None]) & ((c < c[:, None]) | (s > s[:, None]))).any(1)
        assert sorted(pareto(table, "cost", "score").index) == table.index[~beaten].tolist()


def train(config, budget, seed):
    return config["result"]


def test_a_run_that_gives_words_costs_only_itself_and_tensors_become_numbers():
    table = Sweep({"result": [{"final_val": torch.tensor(0.5)}, {"final_val": "good"}, 0.7, None]}, budget=1).run(train)
    assert table["final_val"].dtype == float
    assert table["final_val"].notna().tolist() == [True, False, False, False]
    assert "not a number" in table["error"][1]
    assert "not a mapping" in table["error"][2]


def test_a_function_that_changes_its_configuration_does_not_change_the_table():
    def grow(config, budget, seed):
        config["layers"].append(9)
        return {"final_val": float(len(config["layers"]))}

    table = Sweep([{"layers": [1]}], budget=1, seeds=(0, 1)).run(grow)
    assert table["layers"].tolist() == [[1], [1]]
    assert table["final_val"].tolist() == [2.0, 2.0]


def test_scores_cannot_overwrite_settings():
    with pytest.raises(InvalidInput, match="a score called 'lr'"):
        Sweep({"lr": [0.1]}, budget=1).run(lambda c, b, s: {"final_val": 1.0, "lr": 3.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sweep({"aug": "none"}, budget=1), "needs a list of values, not 'none'"),
        (lambda: Sweep([1, 2], budget=1), "a mapping from names to values"),
        (lambda: Sweep({"lr": [1]}, budget=1, seeds=3), "seeds must be a list"),
        (lambda: Sweep({"lr": [1]}, budget=1, seeds="01"), "seeds must be a list"),
        (lambda: Sweep({"lr": [1]}, budget=1, backend="stacked", apart="width"), "apart names 'width'"),
    ],
)
def test_sweeps_that_cannot_be_meant_are_explained(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_rows_of_few_numbers_are_alike_by_chance_and_that_is_said():
    g = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="by chance"):
        report = find_leaks(torch.randn(500, 3, generator=g), torch.randn(200, 3, generator=g))
    assert report.share > 0.9
    # The share that the warning speaks of, against a count of pairs.
    from mlcollage.papers.vit_training.leaks import _by_chance

    pairs = np.corrcoef(np.random.default_rng(0).standard_normal((1500, 6)))[np.triu_indices(1500, 1)]
    assert _by_chance(6, 0.8) == pytest.approx((pairs >= 0.8).mean(), rel=0.05)


@pytest.mark.parametrize("bad", [np.array([["a"]]), torch.tensor([[float("nan"), 1.0]])])
def test_rows_that_are_no_numbers_are_not_compared(bad):
    with pytest.raises(InvalidInput, match=r"rows of numbers|NaN or infinite"):
        find_leaks(bad, bad)


def test_tables_are_rows_too():
    rows = pd.DataFrame(np.random.default_rng(0).standard_normal((6, 30)))
    assert find_leaks(rows, rows.iloc[:2]).exact.tolist() == [True, True]


@pytest.mark.parametrize(("model", "shape"), [(lambda x: x, (3,)), (nn.Linear(3, 2), 3), (nn.Linear(3, 2), (0,))])
def test_throughput_of_no_network_or_shape_is_refused(model, shape):
    with pytest.raises(InvalidInput, match=r"an nn\.Module|the shape of one input"):
        measure_throughput(model, shape)


def images(n=40, shape=(8, 8)):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    x = rng.integers(0, 100, (n, *shape))
    x[y == 1] += 150
    return x.astype(np.uint8), y


def test_images_of_another_shape_or_scale_are_told_apart():
    X, y = images()
    model = ViTClassifier(steps=20, random_state=0).fit(X, y)
    assert model.score(list(X), y) == model.score(torch.from_numpy(X), y) == model.score(X.astype(float), y)
    with pytest.raises(InvalidInput, match=r"\(1, 4, 16\) were given"):
        model.predict(X.reshape(-1, 4, 16))
    with pytest.warns(UserWarning, match="give raw pixels"):
        model.predict(X / 255.0)


def test_axes_that_may_be_either_are_asked_for():
    X, y = images(shape=(3, 8, 3))
    with pytest.raises(InvalidInput, match="first or last; say image_shape"):
        ViTClassifier(steps=2).fit(X, y)
    model = ViTClassifier(steps=2, image_shape=(3, 8, 3)).fit(X, y)
    assert model.predict(X).shape == (40,)


def test_far_from_all_runs_the_advice_is_the_default_and_not_worse_than_it():
    table = published_sweep().query("model in ['Ti/16', 'S/16', 'B/16']")
    lost = judge_recommender(table, leave_out="setting")
    assert lost["recommender"].mean() <= lost["always_medium1_plain"].mean()
    recommender = PresetRecommender(table)
    for far in ({"images": 1e3}, {"epochs": 3e5}, {"params": 22}):
        asked = {"images": 1.28e6, "epochs": 300, "params": 22e6, **far}
        with pytest.warns(UserWarning, match=f"no runs with such {next(iter(far))}"):
            best = recommender.recommend(**asked).iloc[0]
        assert (best["augmentation"], best["dropout"]) == ("medium1", 0.0)
    with pytest.raises(InvalidInput, match="must be positive in every row"):
        PresetRecommender(table.assign(params=0))


def test_the_example_compares_presets_in_a_few_steps(monkeypatch):
    file = Path(__file__).parents[3] / "examples" / "presets_of_a_small_vit.py"
    spec = importlib.util.spec_from_file_location("presets_of_a_small_vit", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.compare(["none", "light2"], dropout=[0.0], steps=20, seeds=[0])
    assert table["final_val"].between(0, 1).all()
    assert len(table) == 2
