"""Two gloo processes under DistributedDataParallel give the penalty of their joint batch."""

import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "two_processes.py"
ALONE = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def both(in_processes):
    return in_processes(SCRIPT, "gradients", 2)


@pytest.mark.parametrize("case", [c for c in ALONE["CASES"] if c != "drawn"])
def test_gradients_are_those_of_one_process_on_the_joint_batch(both, case):
    model, x, y = ALONE["problem"]()
    gradient, value = ALONE["gradient"](model, model, x, y, ALONE["CASES"][case])
    tolerance = 1e-5 if case == "finite_difference" else 1e-11
    for found in both:
        np.testing.assert_allclose(found[case], gradient, rtol=0, atol=tolerance)
    values = [float(found[f"{case}_value"]) for found in both]
    if case not in ("input", "per_example"):  # these two are means over processes of their own penalties
        assert values[0] == pytest.approx(value, rel=1e-9)
    assert np.mean(values) == pytest.approx(value, rel=1e-9)


def test_processes_agree_although_they_draw_different_labels(both):
    np.testing.assert_allclose(both[0]["drawn"], both[1]["drawn"], rtol=0, atol=1e-12)
    assert float(both[0]["drawn_value"]) == pytest.approx(float(both[1]["drawn_value"]), rel=1e-12)
