import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlcollage.errors import InvalidInput, MissingFile, UnknownName
from mlcollage.papers.deep_bootstrap import BootstrapResult
from mlcollage.papers.deep_bootstrap.result import COLUMNS

STEPS = (0, 10, 20, 40, 80)


def curves(real, train, ideal, n=100, seed=0):
    """Rows of one seed from three lists of errors; loss is twice and soft-error half the error."""
    rows = []
    for world, size, split, values in (
        ("real", n, "test", real),
        ("real", n, "train", train),
        ("ideal", math.inf, "test", ideal),
    ):
        rows += [(world, size, seed, t, split, 2 * v, v, v / 2) for t, v in zip(STEPS, values, strict=True)]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture
def result():
    """Seed 0 converges at step 40, seed 1 never."""
    parts = [
        curves([0.9, 0.5, 0.34, 0.30, 0.28], [0.9, 0.4, 0.1, 0.01, 0.0], [0.9, 0.5, 0.30, 0.22, 0.18]),
        curves([0.9, 0.6, 0.50, 0.40, 0.30], [0.9, 0.5, 0.3, 0.2, 0.1], [0.9, 0.6, 0.52, 0.35, 0.25], seed=1),
    ]
    return BootstrapResult(pd.concat(parts), {"steps": 80, "loss": "cross_entropy"})


def test_three_stopping_rules(result):
    assert result.stopping_time(100, "train_error", seed=0) == 40
    assert result.stopping_time(100, "train_loss", seed=0) == 80  # loss 0.02 at step 40, 0 at step 80
    assert result.stopping_time(100, "train_loss", seed=0, threshold=0.3) == 20
    assert result.stopping_time(100, "budget", seed=0) == 80
    assert result.stopping_time(100, seed=1) is None
    assert result.stopping_time(100) is None  # the mean train error ends at 0.05
    assert result.stopping_time(100, threshold=0.05) == 80


def test_stopping_times_say_what_has_not_converged(result):
    table = result.stopping_times()
    found = {(r.seed, r.rule): (r.status, None if pd.isna(r.T) else r.T) for r in table.itertuples()}
    assert found[0, "train_error"] == ("converged", 40)
    assert found[1, "train_error"] == ("not converged", None)
    assert found[1, "budget"] == ("budget", 80)
    assert len(table) == 6


def test_the_budget_is_not_reached_by_a_run_that_was_cut_short(result):
    result.settings["steps"] = 500
    assert result.stopping_time(100, "budget", seed=0) is None


def test_gap_at_each_kind_of_time(result):
    def rows(at, **kwargs):
        t = result.gap("error", at=at, **kwargs)
        return [(r.step if not pd.isna(r.step) else None, round(r.gap, 6), r.status) for r in t.itertuples()]

    assert rows("T")[0] == (40, 0.08, "converged")
    assert rows("T")[1][0] is None
    assert math.isnan(rows("T")[1][1])
    assert rows("T")[1][2] == "not converged"
    assert rows("end") == [(80, 0.10, "end"), (80, 0.05, "end")]
    assert rows(20) == [(20, 0.04, "step"), (20, -0.02, "step")]
    assert rows("max") == [(40, 0.08, "converged"), (40, 0.05, "not converged")]
    assert rows("T", rule="budget") == [(80, 0.10, "budget"), (80, 0.05, "budget")]


def test_decomposition_holds_at_every_step(result):
    for metric in ("loss", "error", "soft_error"):
        g = result.gaps(metric)
        assert np.allclose(g["ideal"] + g["gap"], g["real"])
        assert len(g) == 2 * len(STEPS)


def test_generalization_gap_is_test_minus_train(result):
    t = result.generalization_gap("error", at="T")
    assert t["gap"].iloc[0] == pytest.approx(0.29)
    assert math.isnan(t["gap"].iloc[1])
    assert result.generalization_gap("error", at="max")["step"].tolist() == [40, 20]


def test_departure_needs_several_evaluations_in_a_row(result):
    assert result.departure_step(100, "error", threshold=0.02, seed=0) == 20
    assert result.departure_step(100, "error", threshold=0.02, seed=1) is None
    assert result.departure_step(100, "error", threshold=0.02, seed=1, consecutive=2) == 40
    assert result.departure_step(100, "error", threshold=0.09, consecutive=1, seed=0) == 80
    assert result.departure_step(100, "error", threshold=0.5) is None


def test_compare_pairs_runs_and_tells_whether_the_worlds_agree(result):
    c = result.curves.copy()
    better = c["world"].eq("ideal") | c["seed"].eq(0)
    c.loc[better, "error"] -= 0.05
    c.loc[~better, "error"] += 0.05
    table = result.compare(BootstrapResult(c, result.settings), "error")
    assert table["ideal_difference"].tolist() == pytest.approx([-0.05, -0.05])
    assert table["real_difference"].tolist() == pytest.approx([-0.05, 0.05])
    assert table["agree"].tolist() == [True, False]
    assert table["real_other"].tolist() == pytest.approx([0.23, 0.35])


def test_a_seed_that_was_stopped_has_no_later_gap(result):
    c = result.curves
    cut = BootstrapResult(c[~((c["world"] == "real") & (c["seed"] == 0) & (c["step"] > 40))], result.settings)
    assert cut.gap("error", at="T")["gap"].iloc[0] == pytest.approx(0.08)
    assert cut.gap("error", at="end")["step"].tolist() == [40, 80]
    assert cut.stopping_time(100, "budget", seed=0) is None


def test_parquet_gives_back_what_was_written(result, tmp_path):
    result.to_parquet(tmp_path / "r.parquet")
    back = BootstrapResult.from_parquet(tmp_path / "r.parquet")
    pd.testing.assert_frame_equal(back.curves, result.curves)
    assert back.settings == result.settings
    assert pd.read_parquet(tmp_path / "r.parquet").shape == result.curves.shape
    with pytest.raises(MissingFile, match="there is no file"):
        BootstrapResult.from_parquet(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(InvalidInput, match="not a Parquet file"):
        BootstrapResult.from_parquet(tmp_path / "bad.parquet")


def test_arviz_holds_the_seeds_as_draws(result):
    posterior = result.to_arviz().posterior
    assert posterior["gap_error"].dims == ("chain", "draw", "n", "step")
    assert posterior["gap_error"].sel(n=100, step=80).values.ravel().tolist() == pytest.approx([0.10, 0.05])
    assert posterior["ideal_loss"].sel(step=10).values.ravel().tolist() == pytest.approx([1.0, 1.2])
    assert posterior["train_error"].sel(draw=0, n=100, step=40).item() == pytest.approx(0.01)


def test_plots_draw_on_the_axes_they_are_given(result):
    for plot in (result.plot_curves, result.plot_gap, result.plot_scatter):
        ax = Figure().add_subplot()
        assert plot(ax) is ax
        assert isinstance(plot(), Axes)
    ax = result.plot_curves(metric="error", rule="train_loss")
    ax.figure.canvas.draw()
    assert {t.get_text() for t in ax.texts} == {"real, n = 100", "ideal"}
    assert len(result.plot_scatter(at="end").collections[0].get_offsets()) == 2
    both = result.plot_scatter(at="end", name="a", others={"b": result})
    assert [t.get_text() for t in both.get_legend().get_texts()] == ["a", "b"]


def test_unknown_names_list_what_there_is(result):
    for call, says in (
        (lambda: result.stopping_time(7), "no real world with n=7 was run; there are: 100"),
        (lambda: result.stopping_time(100, seed=9), "seed 9 was not run; there are: 0, 1"),
        (lambda: result.stopping_time(100, "patience"), "rule must be one of 'train_error', 'train_loss', 'budget'"),
        (lambda: result.gap("accuracy"), "metric must be one of 'loss', 'error', 'soft_error'"),
        (lambda: result.departure_step(7), "n=7"),
    ):
        with pytest.raises(UnknownName, match=says):
            call()
    with pytest.raises(InvalidInput, match="or a step: 0, 10, 20, 40, 80"):
        result.gap("error", at=15)
    with pytest.raises(InvalidInput, match="lack the columns split"):
        BootstrapResult(result.curves.drop(columns="split"))
    with pytest.raises(InvalidInput, match="share no n and seed"):
        result.compare(BootstrapResult(result.curves.assign(seed=result.curves["seed"] + 5), {}))
    with pytest.raises(InvalidInput, match="consecutive must be a whole number of at least 1, not 0"):
        result.departure_step(100, consecutive=0)
    with pytest.raises(InvalidInput, match="at one time"):
        result.compare(result, at="max")


def test_a_regression_has_only_its_loss(result):
    c = result.curves.assign(error=math.nan, soft_error=math.nan)
    r = BootstrapResult(c, {"steps": 80, "loss": "mse"})
    assert set(r.stopping_times()["rule"]) == {"train_loss", "budget"}
    assert isinstance(r.plot_curves(metric="loss"), Axes)
    assert set(r.to_arviz().posterior.data_vars) == {"ideal_loss", "real_loss", "train_loss", "gap_loss"}
    with pytest.raises(InvalidInput, match="use 'train_loss' or 'budget'"):
        r.stopping_time(100, "train_error")
