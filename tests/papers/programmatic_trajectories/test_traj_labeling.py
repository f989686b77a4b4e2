"""Labeling functions against the official code's labels and a plain transcription; refusals; applier and analysis."""

import numpy as np
import pytest

from mlcollage.errors import InvalidInput, UserCodeError
from mlcollage.papers.programmatic_trajectories import (
    ABSTAIN,
    GridIntent,
    LFAnalysis,
    LFApplier,
    Stationary,
    Threshold,
    Window,
    labeling_function,
)


@pytest.mark.parametrize("t", [1, 2, 3, 50])
def test_labels_are_the_official_ones(official, t):
    d = official("labelling")
    x = d[f"T{t}_x"]
    assert (Stationary(threshold=0.5, per_frame=True)(x[:, :, None])[..., 0] == d[f"T{t}_stationary"]).all()
    for w in (1, 2, 7, 25, 50):
        assert (Window(w)(x[:, :, None])[..., 0] == d[f"T{t}_window{w}"]).all()


def test_cells_are_the_official_ones(official):
    d = official("labelling")
    assert (GridIntent()(d["points"]) == d["points_class"]).all()


def plain_stationary(x, threshold):
    def cell(p):
        a, b = min(max(p[0], 0), 45 - 1e-4), min(max(p[1], 0), 50 - 1e-4)
        return int(a // 5) * 10 + int(b // 5)

    still = [np.linalg.norm(x[t + 1] - x[t]) < threshold for t in range(len(x) - 1)] + [True]
    out = [cell(x[-1])]
    for t in range(len(x) - 2, -1, -1):
        out.append(cell(x[t]) if still[t] and not still[t + 1] else out[-1])
    return out[::-1]


def test_stationary_is_the_plain_loop_on_random_walks():
    rng = np.random.default_rng(0)
    x = rng.normal(25, 15, (6, 1, 3, 2)) + rng.normal(0, 0.4, (6, 40, 3, 2)).cumsum(1)
    found = Stationary(threshold=0.5, per_frame=True)(x)
    for n in range(6):
        for k in range(3):
            assert found[n, :, k].tolist() == plain_stationary(x[n, :, k], 0.5)


def run_a(fps):
    t = np.arange(round(5 * fps)) / fps
    x = 2.5 + 10 * np.clip(t - 1, 0, 3)
    return np.stack([x, np.full(len(t), 25.0)], 1)


def counts(labels):
    values, number = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), number.tolist(), strict=True))


def test_thresholds_are_per_second():
    step = Stationary(threshold=0.5, per_frame=True)
    assert set(counts(step(run_a(25)))) == {65}  # everything counts as still at this rate
    # Still frames at the start: the run begins within the frame that holds second 1.
    for fps in (6.25, 25):
        found = counts(Stationary(threshold=3.125)(run_a(fps), fps=fps))
        assert set(found) == {5, 65}
        assert found[5] == pytest.approx(fps, abs=1)
    with pytest.raises(InvalidInput, match="per_frame=True"):
        Stationary()(run_a(25))


def test_gaps_make_no_rest():
    x, lf = run_a(6.25), Stationary(fps=6.25)
    right, mask = lf(x), np.ones(len(x), dtype=bool)
    mask[10:13] = False
    x[10:13] = 0
    found = lf(x, mask)
    assert (found[10:13] == ABSTAIN).all()
    assert (found[mask] == right[mask]).all()
    assert 0 in lf(x)  # as if (0, 0) were a place
    x[10:13] = np.nan
    assert (lf(x) == found).all()


def test_not_seen_and_nan_abstain():
    x = np.full((1, 3, 2, 2), 10.0)
    x[0, 1, 0] = np.nan
    for lf in (GridIntent(), Stationary(fps=1), Window(2), Threshold(lambda v: np.nanmean(v, (1, 2, 3)), 11.0)):
        assert (lf(x)[0, :, 0] == ABSTAIN).tolist() == [False, True, False]
    assert (Stationary(fps=1)(x, np.zeros((1, 3, 2), bool)) == ABSTAIN).all()


def test_the_grid_refuses_other_units():
    grid = GridIntent()
    feet = np.random.default_rng(0).uniform(0, 45, (2, 30, 3, 2))
    grid.check_units(feet)
    with pytest.raises(InvalidInput, match="one unit"):
        grid.check_units(run_a(6.25)[None, :, None] * 0.3048 / 3)
    with pytest.raises(InvalidInput, match="outside of the grid"):
        grid.check_units(feet + 40)
    assert (GridIntent()(grid.centers()) == np.arange(90)).all()


def test_ties_are_counted():
    lf = Stationary(threshold=0.5, per_frame=True)
    lf(np.array([[10, 10], [10.3, 10.4], [10.3, 10.4], [11, 11]], dtype=np.float32))
    assert lf.ties == 1


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2), (0, 2), (1, 0, 2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InvalidInput):
        GridIntent()(np.zeros(shape))


def test_a_mask_has_the_tracks_shape():
    with pytest.raises(InvalidInput, match="must have shape"):
        GridIntent()(np.zeros((1, 3, 2, 2)), np.ones((1, 3), bool))


@pytest.mark.parametrize(
    ("returned", "right"),
    [(1, [1, 1, 1]), (True, [1, 1, 1]), (np.array([1.0, 0.0, -1.0]), [1, 0, -1]), ([2], [2, 2, 2])],
)
def test_what_a_function_may_return(returned, right):
    lf = labeling_function(classes=3)(lambda track: returned)
    assert lf(np.zeros((3, 2))).tolist() == right


@pytest.mark.parametrize("returned", [None, 0.5, "left", [0, 1], 3, -2, np.nan, [[0, 1, 2]]])
def test_what_a_function_may_not_return(returned):
    lf = labeling_function(classes=3, name="mine")(lambda track: returned)
    with pytest.raises(InvalidInput, match="mine on track 0, agent 0"):
        lf(np.zeros((3, 2)))


def test_a_functions_own_error_names_it():
    lf = labeling_function(classes=2, name="mine")(lambda track: 1 / 0)
    with pytest.raises(UserCodeError, match="mine on track 0"):
        lf(np.zeros((3, 2)))


def test_shared_functions_see_all_agents():
    lf = labeling_function(classes=2, per_agent=False)(lambda x: (x[:, :, 0].mean(1) > 1).astype(int))
    x = np.zeros((2, 3, 4, 2))
    x[1] = 2
    assert lf(x)[:, 0].tolist() == [[0] * 4, [1] * 4]


def test_applier_and_analysis():
    class Foreign:
        name = "foreign"

        def __call__(self, track):
            return np.zeros(len(track))

    x = np.random.default_rng(1).uniform(0, 45, (2, 8, 3, 2))
    with pytest.raises(InvalidInput, match="same classes"):
        LFApplier([Window(2), Threshold(lambda v: v.mean((1, 2, 3)), 1)])
    with pytest.raises(InvalidInput, match="different names"):
        LFApplier([Window(2), Window(2)])
    L = LFApplier([Window(2), Foreign()], classes=90).apply(x)
    assert (L[..., 0] == Window(2)(x)).all()
    table = LFAnalysis(L, ["window", "foreign"]).summary(Window(2)(x))
    assert table.loc["foreign", "classes"] == 1
    assert table.loc["window", "accuracy"] == 1
    assert table.loc["window", "conflicts"] == pytest.approx((L[..., 0] != 0).mean())


def test_accuracy_says_what_it_was_counted_over():
    # 5 right of the 6 that were labeled, of 10.
    L = np.array([0, 0, 0, 0, 0, 1, -1, -1, -1, -1])[None, :, None, None]
    row = LFAnalysis(L).summary(np.zeros((1, 10, 1), int)).iloc[0]
    assert (round(row["accuracy"], 3), row["correct"], row["counted"], row["coverage"]) == (0.833, 0.5, 6, 0.6)


def test_the_rate_is_checked_at_the_door():
    x = np.zeros((1, 3, 1, 2))
    for rate in (0, -6.25, float("nan"), "25"):
        with pytest.raises(InvalidInput, match="fps must be a finite number above 0"):
            Stationary()(x, fps=rate)
    with pytest.raises(InvalidInput, match=r"made for 6\.25 frames a second; these tracks have 25"):
        Stationary(fps=6.25)(x, fps=25)
    assert Stationary(fps=30)(x, fps=29.97).tolist() == [[[0]] * 3]


def test_cells_abstain_where_a_coordinate_is_nan():
    assert GridIntent().cells(np.array([[np.nan, 1.0], [1.0, np.nan], [7.0, 7.0]])).tolist() == [-1, -1, 11]
    for function in (lambda: Stationary(3), lambda: Window(2, "5 ft")):
        with pytest.raises(InvalidInput, match="grid must be a GridIntent"):
            function()
