"""A panel's title says what was found only where it was found."""

import pytest

from mlcollage.collage.content import Panel
from mlcollage.lab.claim import Claim, Status, Verdict
from mlcollage.lab.estimand import Level
from mlcollage.lab.headlines import with_headlines
from mlcollage.lab.run import Scale

CLAIM = Claim("C1", "It works", "It works.", "Fig. 1", Level("value", "a"), "greater", margin=1)
PANELS = [Panel("How it works", lambda ax: None, "alt"), Panel("Something else", lambda ax: None, "alt")]


@pytest.mark.parametrize("status", Status)
def test_the_message_stands_only_over_a_supported_claim(status):
    verdicts = {"C1": Verdict(CLAIM, status, Scale.QUICK, "default")}
    titles = [p.title for p in with_headlines(PANELS, verdicts, {"How it works": ("C1", "It works")})]
    expected = "It works" if status is Status.SUPPORTED else "How it works"
    assert titles == [expected, "Something else"]


def test_a_claim_without_a_verdict_promises_nothing():
    assert with_headlines(PANELS, {}, {"How it works": ("C1", "It works")}) == PANELS
