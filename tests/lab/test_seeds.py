"""Seeds that were lost count against the claim, seeds that repeat others count once, units that differ are said."""

import numpy as np
import pandas as pd
import pytest

from mlcollage.errors import InvalidInput
from mlcollage.lab.claim import Claim, Status
from mlcollage.lab.estimand import Difference, Level, PerSeed, Trend
from mlcollage.lab.evidence import Evidence, Failure
from mlcollage.lab.judge import judge
from mlcollage.lab.pool import pool_claim
from mlcollage.lab.run import Run, Scale
from mlcollage.stats.causal import page_trend, sign_flip_test, t_test

CONTROL = np.array([0.71, 0.74, 0.69, 0.73, 0.72, 0.70, 0.75, 0.68, 0.72, 0.71])
GAIN = np.array([0.031, 0.052, 0.043, 0.038, 0.049, 0.035, 0.047, 0.041, 0.036, 0.044])


def evidence(runs=(), failures=(), metrics=("accuracy",), experiment=None, **arms) -> Evidence:
    """One row per number; values of an arm may be a mapping of seed to value, or a list of them per metric."""
    rows = []
    for arm, values in arms.items():
        by_seed = values if isinstance(values, dict) else dict(enumerate(values))
        for seed, numbers in by_seed.items():
            for metric, value in zip(metrics, np.atleast_1d(numbers), strict=True):
                rows.append({"arm": arm, "seed": seed, "metric": metric, "step": 0, "value": float(value)})
    table = pd.DataFrame(rows)
    if experiment:
        table["experiment"] = experiment
    return Evidence("demo", Scale.QUICK, "w", table, runs=runs, failures=failures)


def claim(direction="greater", margin=0.01, estimand=None, **kw) -> Claim:
    return Claim("C", "C", "", "", estimand or Difference("accuracy", "new", "old"), direction, margin, **kw)


def one(claim_, evidence_):
    return judge([claim_], evidence_)["C"]


def lose(values, seeds):
    values = np.array(values, dtype=float)
    values[list(seeds)] = np.nan
    return values


# --- lost seeds --------------------------------------------------------------------------------------------------


def test_two_survivors_of_ten_do_not_support():
    """Eight crashed treatments: the two that finished said p = .02."""
    new = lose(CONTROL + np.array([0.050, 0.0525, *[0.0] * 8]), range(2, 10))
    assert one(claim(), evidence(new=new[:2], old=CONTROL[:2])).status is Status.SUPPORTED
    verdict = one(claim(), evidence(new=new, old=CONTROL))
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.reason.startswith("not supported once the 8 seeds without a value are counted against that")
    d = np.array([0.050, 0.0525])
    assert verdict.p_value == pytest.approx(t_test([*d, *[-0.0525] * 8]))
    assert verdict.estimate == pytest.approx(d.mean())


@pytest.mark.parametrize(("direction", "sign"), [("greater", 1), ("less", -1), ("at_least", 1), ("at_most", -1)])
@pytest.mark.parametrize("null", [0.0, 0.01])
def test_lost_seeds_lie_on_the_other_side_of_the_reference(direction, sign, null):
    d = sign * GAIN
    verdict = one(claim(direction, null=null), evidence(new=lose(CONTROL + d, [3]), old=CONTROL))
    kept = np.delete(d, 3)
    by_hand = np.insert(kept, 3, null - sign * np.abs(kept - null).max())
    alternative = "greater" if sign > 0 else "less"
    assert verdict.p_value == pytest.approx(t_test(by_hand, null=null, alternative=alternative))
    assert verdict.p_value > t_test(kept, null=null, alternative=alternative)


def test_within_loses_seeds_beyond_the_worse_margin():
    d = GAIN - 0.03
    verdict = one(claim("within", margin=0.03), evidence(new=lose(CONTROL + d, [0, 5]), old=CONTROL))
    kept = np.delete(d, [0, 5])
    low = t_test([*kept, *[-0.03 - np.abs(kept + 0.03).max()] * 2], null=-0.03)
    high = t_test([*kept, *[0.03 + np.abs(kept - 0.03).max()] * 2], null=0.03, alternative="less")
    assert verdict.p_value == pytest.approx(max(low, high))
    assert verdict.status is Status.INCONCLUSIVE


def test_a_contradiction_must_survive_too():
    """No effect in the survivors; the lost seeds might have had one."""
    d = GAIN - GAIN.mean()
    half = lose(CONTROL + d, range(5))
    assert one(claim(margin=0.02), evidence(new=half[5:], old=CONTROL[5:])).status is Status.CONTRADICTED
    verdict = one(claim(margin=0.02), evidence(new=half, old=CONTROL))
    assert verdict.status is Status.INCONCLUSIVE
    assert verdict.reason.startswith("not contradicted once the 5 seeds")


def test_unpaired_arms_get_the_least_favorable_value_seen():
    new, old = CONTROL + GAIN, CONTROL[::-1].copy()
    verdict = one(claim(paired=False), evidence(new=lose(new, [2, 4]), old=lose(old, [9])))
    low, high = min(new.min(), old[:9].min()), max(np.delete(new, [2, 4]).max(), old[:9].max())
    x, y = new.copy(), old.copy()
    x[[2, 4]], y[9] = low, high
    assert verdict.p_value == pytest.approx(t_test(x, y))


@pytest.mark.parametrize("test", ["sign_flip", "bootstrap_t"])
def test_other_tests_count_them_alike(test):
    verdict = one(claim(test=test), evidence(new=lose(CONTROL + GAIN, range(5)), old=CONTROL))
    assert verdict.status is Status.INCONCLUSIVE
    if test == "sign_flip":
        assert verdict.p_value == pytest.approx(sign_flip_test([*[-GAIN[5:].max()] * 5, *GAIN[5:]]))


def test_a_trend_gets_the_reversed_order():
    levels = {name: lose(CONTROL + i * GAIN, [0, 1, 2] if i == 2 else []) for i, name in enumerate(["k1", "k2", "k3"])}
    c = claim(estimand=Trend("accuracy", over=("k1", "k2", "k3")), test="trend", margin=0.5)
    verdict = one(c, evidence(**levels))
    values = np.array([[3, 2, 1]] * 3 + [[1, 2, 3]] * 7)
    assert verdict.p_value == pytest.approx(page_trend(values).p_value)
    assert one(c, evidence(**{k: v[3:] for k, v in levels.items()})).p_value < verdict.p_value


def test_seeds_of_a_failed_block_are_lost():
    """The run of seeds 5 to 9 failed whole: no row tells of it."""
    failed = Failure(Run("demo", "train", "new", 5, count=5), "killed")
    arms = {"new": CONTROL[:5] + GAIN[:5], "old": CONTROL[:5]}
    verdict = one(claim(), evidence(failures=[failed], **arms))
    assert verdict.p_value == pytest.approx(t_test([*GAIN[:5], *[-GAIN[:5].max()] * 5]))
    elsewhere = Failure(Run("demo", "picture", "new", 5, count=5), "killed")
    assert one(claim(), evidence(failures=[elsewhere], experiment="train", **arms)).status is Status.SUPPORTED
    exact = claim("at_least", 0.0, Level("accuracy", "new"), null=0.5, test="exact")
    assert one(exact, evidence(**arms)).status is Status.SUPPORTED
    verdict = one(exact, evidence(failures=[failed], **arms))
    assert (verdict.status, verdict.reason) == (
        Status.INCONCLUSIVE,
        "all 5 values satisfy it, but 5 are missing",
    )


def test_seeds_an_arm_was_never_given_are_not_lost():
    half = dict(enumerate(CONTROL[:6] + GAIN[:6]))
    runs = [Run("demo", "train", "old", s) for s in range(10)] + [Run("demo", "train", "new", s) for s in range(6)]
    fewer = evidence(new=half, old=CONTROL, runs=runs, experiment="train")
    assert one(claim(), fewer).p_value == pytest.approx(t_test(GAIN[:6]))
    silent = evidence(new=half, old=CONTROL, runs=[*runs, Run("demo", "train", "new", 6)], experiment="train")
    assert one(claim(), silent).p_value == pytest.approx(t_test([*GAIN[:6], -GAIN[:6].max()]))


def test_what_a_function_cannot_compute_is_lost_if_it_was_run():
    drop = PerSeed(
        lambda rows: {a: rows[rows["arm"] == a]["value"].iloc[0] for a in ("new", "old")}, "arms", ("new", "old")
    )
    half = dict(enumerate(CONTROL[:6] + GAIN[:6]))
    lost = one(claim(estimand=drop), evidence(new=half, old=CONTROL))
    assert lost.p_value == pytest.approx(t_test([*GAIN[:6], *[-GAIN[:6].max()] * 4]))


def test_pooling_says_which_seeds_it_leaves_out():
    failed = Failure(Run("demo", "train", "new", 10), "killed")
    full = evidence(new=CONTROL + GAIN, old=CONTROL)
    holed = evidence(new=lose(CONTROL + GAIN, [1, 2]), old=CONTROL, failures=[failed])
    pooled = pool_claim(claim(), {"digits": full, "wine": holed})
    assert list(pooled.notes) == ["wine"]
    assert "seed 1 (new), seed 2 (new)" in pooled.notes["wine"]
    assert "1 run failed" in pooled.notes["wine"]
    assert any("seed 1 (new)" in line for line in pooled.sentences())
    assert pooled.to_dict()["notes"] == dict(pooled.notes)


# --- copies ------------------------------------------------------------------------------------------------------


def two_metrics(seeds, rng):
    """Accuracy and loss of two arms, (seeds, metric) each."""
    old = np.stack([CONTROL[:seeds] + 0.01 * rng.normal(size=seeds), rng.normal(size=seeds)], axis=1)
    return {"new": old + [[0.03, -0.1]] + 0.02 * rng.normal(size=(seeds, 2)), "old": old}


def test_copied_seeds_count_once():
    arms = two_metrics(4, np.random.default_rng(3))
    metrics = ("accuracy", "loss")
    alone = one(claim(), evidence(metrics=metrics, **arms))
    copied = {k: np.concatenate([v, v, v]) for k, v in arms.items()}
    verdict = one(claim(), evidence(metrics=metrics, **copied))
    assert (verdict.seeds, verdict.p_value) == (4, pytest.approx(alone.p_value))
    d = arms["new"][:, 0] - arms["old"][:, 0]
    assert t_test(np.tile(d, 3)) < alone.p_value / 5  # what it would have been
    assert "seed 4 repeats seed 0 exactly, in all 4 numbers: counted once" in verdict.warnings
    assert sum("repeats" in w for w in verdict.warnings) == 8


def test_a_seed_that_differs_anywhere_is_no_copy():
    arms = two_metrics(4, np.random.default_rng(3))
    copied = {k: np.concatenate([v, v]) for k, v in arms.items()}
    copied["new"][4:, 1] += 1e-6  # the loss, which the claim is not about
    assert one(claim(), evidence(metrics=("accuracy", "loss"), **copied)).seeds == 8


def test_copies_of_one_unpaired_arm_are_found():
    arms = two_metrics(5, np.random.default_rng(4))
    arms["old"] = np.concatenate([arms["old"], arms["old"][:3]])
    verdict = one(claim(paired=False), evidence(metrics=("accuracy", "loss"), **arms))
    assert "seed 7 of old repeats seed 2 exactly, in all 2 numbers: counted once" in verdict.warnings
    assert not any("without a value" in w for w in verdict.warnings)


def test_accuracies_that_agree_by_chance_are_no_copies():
    """Both arms on a test set of 30: seeds agree in all numbers now and then."""
    rng = np.random.default_rng(5)
    metrics = tuple(f"accuracy{i}" for i in range(8))
    for _ in range(20):
        easy = rng.integers(28, 31, size=(10, 1)) / 30  # one number, printed eight times
        arms = {"new": np.repeat(easy, 8, 1), "old": np.repeat(rng.integers(27, 30, size=(10, 1)) / 30, 8, 1)}
        estimand = Difference("accuracy0", "new", "old")
        assert one(claim(estimand=estimand), evidence(metrics=metrics, **arms)).seeds == 10


def test_what_is_deterministic_is_no_copy():
    """Every seed gives the same numbers: no variation, which sign flips take care of."""
    verdict = one(claim(), evidence(metrics=("accuracy", "loss"), new=[[0.5123, 0.41]] * 8, old=[[0.4871, 0.52]] * 8))
    assert (verdict.seeds, verdict.p_value) == (8, 2.0**-8)


def test_many_accuracies_that_agree_are_copies():
    rng = np.random.default_rng(6)
    metrics = tuple(f"accuracy{i}" for i in range(8))
    arms = {a: rng.integers(700, 1000, size=(9, 8)) / 1000 for a in ("new", "old")}
    copied = {a: np.concatenate([v, v[:1]]) for a, v in arms.items()}
    assert one(claim(estimand=Difference("accuracy0", "new", "old")), evidence(metrics=metrics, **copied)).seeds == 9


# --- units, rounding and settings that are no numbers ------------------------------------------------------------


def test_percent_against_fraction_is_said():
    verdict = one(claim(), evidence(new=100 * (CONTROL + GAIN), old=CONTROL))
    assert any("is one a fraction and the other in percent?" in w for w in verdict.warnings)
    printed = claim(estimand=Level("accuracy", "new"), factor=100, unit="%")
    assert any("factor must be 1" in w for w in one(printed, evidence(new=100 * CONTROL)).warnings)
    assert one(claim(), evidence(new=CONTROL + GAIN, old=CONTROL)).warnings == ()
    losses = one(claim(), evidence(new=3 * CONTROL, old=CONTROL))  # 2.1 against 0.7
    assert not any("percent" in w for w in losses.warnings)


def test_arms_that_differ_by_rounding_do_not_differ():
    new, old = np.full(10, 0.1 + 0.2), np.full(10, 0.3)
    old[::2] += 0.1
    new[::2] = old[::2]
    assert (new - old).max() > 0
    for kw in ({}, {"test": "sign_flip"}):
        assert one(claim(**kw), evidence(new=new, old=old)).p_value == 1.0
    trend = claim(estimand=Trend("accuracy", over=("a", "b", "c")), test="trend", margin=0.5)
    verdict = one(trend, evidence(a=np.full(10, 0.3), b=new.clip(max=0.31), c=np.full(10, 0.1 + 0.2)))
    assert verdict.p_value > 0.5


@pytest.mark.parametrize("name", ["margin", "null", "factor", "alpha"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_claim_needs_finite_numbers(name, value):
    with pytest.raises(InvalidInput, match=name):
        claim(**{name: value})
