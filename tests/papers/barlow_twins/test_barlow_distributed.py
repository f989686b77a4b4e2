"""Several gloo processes with different rows give loss and gradient of one process with all rows."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.papers.barlow_twins import barlow_twins_loss

SCRIPT = Path(__file__).parent / "barlow_processes.py"


@pytest.fixture(scope="module")
def two(in_processes):
    return in_processes(SCRIPT, "of_the_official_code", 2)


@pytest.fixture(scope="module")
def three(in_processes):
    return in_processes(SCRIPT, "of_unequal_parts", 3)


@pytest.mark.parametrize("case", ["w2", "w2_wide"])
@pytest.mark.parametrize(("scale", "there", "share"), [("exact", "single", 1), ("official", "official_ddp", 1 / 2)])
def test_two_processes_are_as_in_the_official_numbers(two, official, case, scale, there, share):
    numbers = official("distributed")
    for found in two:
        np.testing.assert_allclose(found[f"{case}/{scale}/loss"], numbers[f"{case}/single/loss"], rtol=1e-12)
        for name in ("w0", "w1", "g1", "b1", "w2"):
            expected = numbers[f"{case}/{there}/grad/{name}"]
            whole = numbers[f"{case}/single/grad/{name}"]
            size = np.abs(whole).max()
            np.testing.assert_allclose(found[f"{case}/{scale}/{name}"], expected, rtol=0, atol=1e-12 * size)
            np.testing.assert_allclose(expected, share * whole, rtol=0, atol=1e-12 * size)
    assert abs(numbers[f"{case}/wrong_local_stats/loss"][0] / numbers[f"{case}/single/loss"] - 1) > 0.01


@pytest.mark.parametrize("impl", ["direct", "gram", "tiled", "blocks"])
def test_three_processes_with_unequal_parts_of_fewer_rows_than_columns(three, impl):
    model, x_a, x_b = runpy.run_path(str(SCRIPT))["unequal"]()
    loss = barlow_twins_loss(model(x_a), model(x_b))
    loss.backward()
    for found in three:
        np.testing.assert_allclose(found[f"{impl}/loss"], float(loss.detach()), rtol=1e-12)
        np.testing.assert_allclose(found[f"{impl}/grad"], model.weight.grad, rtol=1e-11, atol=1e-13)
        alone = float(barlow_twins_loss(x_a.half(), x_b.half()))
        np.testing.assert_allclose(found["half"], alone, rtol=1e-6)


@pytest.mark.parametrize("variant", ["plain", "listing", "feature", "none", "hsic"])
def test_own_rows_of_the_gram_matrices_give_loss_and_gradient_of_the_whole(two, three, variant):
    script = runpy.run_path(str(SCRIPT))
    model, x_a, x_b = script["unequal"](40)
    loss = barlow_twins_loss(model(x_a), model(x_b), impl="direct", **script["WIDE"][variant])
    loss.backward()
    grad = model.weight.grad.numpy()
    for found in (*two, *three):
        np.testing.assert_allclose(found[f"wide/{variant}/loss"], float(loss.detach()), rtol=1e-12)
        np.testing.assert_allclose(found[f"wide/{variant}/grad"], grad, rtol=0, atol=1e-12 * np.abs(grad).max())
        if variant == "plain":
            np.testing.assert_allclose(found["wide/no_grad"], float(loss.detach()), rtol=1e-12)


def test_each_process_does_its_own_rows_share_of_the_work(two, three):
    whole = 4 * 2 * 7 * 7 * 40  # four products of 7 x 7 x 40 in the forward pass, two operations for each
    assert [int(f["wide/flops"]) for f in two] == [whole * rows // 7 for rows in (3, 4)]
    assert [int(f["wide/flops"]) for f in three] == [whole * rows // 7 for rows in (2, 1, 4)]
    assert "no second derivatives" in str(three[0]["wide/second"])


def test_no_process_waits_for_one_that_has_refused(three):
    assert [str(f["refused/shape"])[:10] for f in three] == ["process 2 ", "process 2 ", "expected t"]
    assert all("widths 4, 5, 4" in str(f["refused/width"]) for f in three)
    assert all("view a are NaN or infinite, the first in row 0, column 0" in str(f["refused/nan"]) for f in three)


def test_a_group_needs_processes_that_have_met(pair):
    with pytest.raises(InvalidInput, match="init_process_group"):
        barlow_twins_loss(*pair, group=object())


def test_several_processes_without_a_group_are_told(pair, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    with pytest.warns(UserWarning, match="this process's rows only"):
        assert float(barlow_twins_loss(*pair)) == pytest.approx(0.004787759, abs=5e-10)
