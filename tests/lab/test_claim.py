"""Claims: how their effects are printed."""

import dataclasses

import pytest

from mlcollage.errors import InvalidInput
from mlcollage.lab.claim import Claim
from mlcollage.lab.estimand import Difference, Level

SHARE = Claim(
    "C1", "a beats b", "A is better.", "Fig. 1", Difference("accuracy", "a", "b"), "greater", margin=0.01, factor=100,
    unit="pts", digits=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "+1.2 pts"), (-0.0123, "−1.2 pts"), (0.0, "+0.0 pts"), (-2.8e-17, "+0.0 pts"), (0.00004, "+4.0e−03 pts")],
)
def test_effects_are_printed_in_the_claims_unit(value, text):
    assert SHARE.format(value) == text


def test_degrees_and_shares_stand_at_their_number():
    angle = Claim(
        "C", "T", "S.", "here", Level("angle", "a"), "at_most", null=25.0, unit="°", digits=1, bounds=(0, 180)
    )
    assert angle.format(13.21, signed=False) == "13.2°"
    assert angle.format(-6.0, signed=False) == "0.0°"  # an angle is not negative, whatever its interval says
    assert angle.format_limit(25.0) == "25.0°"
    assert angle.format_level(44.5) == "44.5°"


def test_small_numbers_are_kept_where_they_are_the_finding():
    error = dataclasses.replace(SHARE, factor=1.0, unit="")
    assert error.format(6e-16, signed=False) == "6.0e−16"
    assert error.format(2.5e6) == "+2.5e+06"


@pytest.mark.parametrize(
    ("value", "text"), [(0.05, "5.0 pts"), (0.0004, "0.04 pts"), (0.0, "0.0 pts"), (-0.04, "−4.0 pts")]
)
def test_a_limit_keeps_the_digits_that_it_has(value, text):
    assert SHARE.format_limit(value) == text


@pytest.mark.parametrize("name", ["id", "title"])
def test_a_claim_without_words_is_refused(name):
    with pytest.raises(InvalidInput, match=f"its {name} is empty"):
        dataclasses.replace(SHARE, **{name: " "})
