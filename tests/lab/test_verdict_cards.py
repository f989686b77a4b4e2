"""What a card prints lets a reader derive its verdict."""

import math

import numpy as np
import pandas as pd
import pytest

from mlcollage.lab import Claim, Evidence, Level, Scale
from mlcollage.lab.claim import Status
from mlcollage.lab.judge import judge
from mlcollage.lab.publish import _card

NOISE = np.array([-0.9, 0.4, 1.1, -0.6, 0.3, -0.3])  # of six seeds; its mean is 0


def card(direction, mean, *, test="t", noise=NOISE, **fields):
    claim = Claim("C1", "One", "It is.", "here", Level("m", "a"), direction, margin=1.0, test=test, **fields)
    rows = [{"arm": "a", "seed": i, "metric": "m", "step": 0, "value": mean + v} for i, v in enumerate(noise)]
    verdict = judge([claim], Evidence("demo", Scale.QUICK, "digits", pd.DataFrame(rows)))["C1"]
    return verdict, _card(verdict)


def seen(plot, direction):
    """The rule that the key of the cards gives: beyond the reference, and reaching what is claimed."""
    start, stop = plot.claimed
    if direction in ("greater", "less"):
        if plot.hi < start or plot.lo > stop:
            return "contradicted"
        return "inconclusive" if plot.lo <= plot.reference <= plot.hi else "supported"
    if start <= plot.lo and plot.hi <= stop:
        return "supported"
    return "inconclusive" if plot.lo <= stop and plot.hi >= start else "contradicted"


@pytest.mark.parametrize("direction", ["greater", "less", "within", "at_most", "at_least"])
def test_the_verdict_follows_from_the_picture_or_the_card_says_why_not(direction):
    words = set()
    for mean in np.linspace(-3, 3, 61):
        verdict, made = card(direction, mean)
        words.add(verdict.status)
        if seen(made.plot, direction) != verdict.status.value:
            assert made.needs.startswith(("one-sided p = ", "p = ", "but not ruled out")), (mean, made)
    assert words >= {Status.SUPPORTED, Status.INCONCLUSIVE, Status.CONTRADICTED}


def test_limits_and_ranges_are_printed_and_signs_are_not_explained():
    assert card("at_most", -2.0, null=0.5)[1].needs == "needs ≤ 0.50"
    assert card("at_least", 2.0, null=0.5)[1].needs == "needs ≥ 0.50"
    assert card("within", 0.1, null=0.2)[1].needs == "needs −0.80 to 1.20"
    assert card("greater", 2.0)[1].needs == ""


def test_a_correlation_is_named_in_words():
    made = card("within", 0.1, null=0.2, unit="rho")[1]
    assert made.ours == "0.10 [−0.67, 0.87] rank\u00a0correlation"
    assert made.needs == "needs −0.80 to 1.00"  # a correlation ends there
    assert "correlation" not in card("within", 0.1, unit="pts")[1].ours


def test_what_is_claimed_is_in_the_units_that_are_printed():
    assert card("greater", 2.0, factor=100)[1].plot.claimed == (100.0, math.inf)
    assert card("less", -2.0, log_ratio=True)[1].plot.claimed == (-math.inf, pytest.approx(math.exp(-1)))
    assert card("within", 0.0, test="exact")[1].plot.claimed == (-1.0, 1.0)


def test_the_papers_value_is_in_the_unit_of_the_effect():
    assert card("greater", 2.0, unit="pts", paper_value="98%")[1].paper == ""
    assert card("greater", 2.0, unit="%", paper_value="98%")[1].paper == "98%"
    assert card("greater", 2.0, unit="pts", paper_value="1–2 pts")[1].paper == "1–2 pts"


def test_equal_seeds_that_settle_nothing_say_so():
    verdict, made = card("greater", 2.0, test="sign_flip", noise=np.zeros(4))
    assert verdict.status is Status.INCONCLUSIVE  # four seeds cannot give p < 0.05
    assert made.needs == "p = 0.062 over all claims"
    assert made.note == "only 4 seeds"
