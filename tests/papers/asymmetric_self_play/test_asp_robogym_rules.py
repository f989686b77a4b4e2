"""Rules of robogym's environments, step by step as its code has them."""

import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import GoalCounter, off_table, zone_excess

CASES = ("five_successes", "fail_on_fourth", "first_goal_timeout", "success_on_last_allowed_step")


def test_positions_off_the_table_are_the_official_ones(official):
    d = official("table_rules")
    table, half = d["table_pos"], d["table_half_size"]
    assert torch.equal(off_table(d["random_pos"], table, half), d["random_off_table"])
    assert torch.equal(off_table(d["random_pos"], table, half, 0.05), d["random_off_table_margin_0.05"])
    assert torch.equal(off_table(d["off_unittest_pos"], table, half), d["off_unittest_official_ur_table"])
    small = off_table(d["off_unittest_pos"], d["small_table_pos"], d["small_table_half_size"])
    assert torch.equal(small, d["off_unittest_official_small_table"])


def test_positions_outside_of_the_zone_are_the_official_ones(official):
    d = official("table_rules")
    low, high = d["boundary_one_object_full_table"].split(3)
    excess = zone_excess(d["random_pos"], low, high)
    for margin in (0.02, 0.1):
        assert torch.equal(excess < margin, d[f"random_in_zone_margin_{margin:g}"])
    for uniform, expected in zip(d["soft_uniform"], d["soft_in_zone_margin_0.1"], strict=True):
        assert torch.equal(uniform > (excess / 0.1).clamp(0, 1), expected)


@pytest.mark.parametrize("case", [*CASES, "hold_one_second", "min_timesteps"])
def test_goals_are_counted_as_officially(official, case):
    d = {k.partition(".")[2]: v for k, v in official("multi_goal").items() if k.startswith(f"{case}.")}
    most, least, needed, reward, hold, seconds = d["settings"].tolist()
    counter = GoalCounter(
        int(most),
        min_steps=int(least),
        successes_needed=int(needed),
        success_reward=reward,
        hold_steps=max(1, round(hold / seconds)),
    )
    for t, at_goal in enumerate(d["is_successful"].tolist()):
        found = counter.step(at_goal)
        assert found.reward == d["reward"][t, 2]
        assert found.done == bool(d["done"][t])
        assert found.goal_reset == bool(d["goal_reset"][t])
        assert found.success == bool(d["sub_goal_is_successful"][t])
        assert found.trial_success == bool(d["trial_success"][t])
        assert counter.goals == int(d["goals_so_far"][t])
        assert counter.successes == int(d["successes_so_far"][t])
        assert counter.since_goal == int(d["steps_since_last_goal"][t])
        assert counter.steps_per_success == pytest.approx(float(d["steps_per_success"][t]))


def test_a_counter_that_is_done_and_positions_of_two_numbers_are_refused():
    counter = GoalCounter(1, successes_needed=1)
    assert counter.step(True).trial_success
    with pytest.raises(InvalidInput, match="over"):
        counter.step(True)
    with pytest.raises(InvalidInput, match="position"):
        off_table(torch.zeros(2), torch.zeros(3), torch.ones(3))
