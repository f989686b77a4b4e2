"""Tasks to act in: what is shown of them, and one sentence for what does not fit."""

import dataclasses

import pytest
import torch

from mlcollage.data import GoalTask, GoalWorld
from mlcollage.data.goal_tasks import check_world
from mlcollage.data.kinds import as_workload
from mlcollage.errors import InvalidInput, UserCodeError


class Cart:
    """A cart on a line."""

    bins = (3,)
    thresholds = (0.5,)

    def initial(self, n, generator):
        return torch.rand(n, 1, generator=generator) * 6 - 3

    def step(self, state, action):
        return state + action.float() - 1

    def observe(self, state):
        return state[:, :0], torch.stack((torch.ones_like(state), state / 10), -1)

    def achieved(self, state):
        return state[:, :, None]

    def distance(self, achieved, goal):
        return (achieved - goal).abs()

    def off_table(self, state):
        return state.abs() > 30

    def out_of_zone(self, state):
        return state.abs() > 20


def right(n, generator):
    state = Cart().initial(n, generator)
    return state, state[:, :, None] + 3


def test_a_function_s_dictionary_is_a_task():
    task = as_workload({"world": Cart, "holdouts": {"right": right}, "alice_steps": 4}, "mine")
    assert isinstance(task, GoalTask)
    assert isinstance(task.make(), GoalWorld)
    facts = task.describe()
    assert facts["objects"] == 1
    assert facts["holdouts"] == ["right"]
    assert facts["steps"] == "4 to set a goal, 40 to reach it"


def short(n, generator):
    return torch.zeros(n, 1), torch.zeros(n, 2)


def fails(n, generator):
    raise ZeroDivisionError


TASK = GoalTask(Cart, {"right": right}, name="mine")


@pytest.mark.parametrize(
    ("changes", "says", "kind"),
    [
        ({"world": Cart()}, "must be a function", InvalidInput),
        ({"holdouts": [right]}, "map names", InvalidInput),
        ({"holdouts": {"short": short}}, "'short' gives", InvalidInput),
        ({"holdouts": {"fails": fails}}, "'fails' failed", UserCodeError),
        ({"alice_steps": 0}, "alice_steps", InvalidInput),
        ({"world": lambda: 1 / 0}, "ZeroDivisionError", UserCodeError),
    ],
)
def test_tasks_that_do_not_fit_are_refused(changes, says, kind):
    with pytest.raises(kind, match=says):
        dataclasses.replace(TASK, **changes).check("mine")


def changed(**members):
    return type("Changed", (Cart,), members)()


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"thresholds": (0.0,)}, "threshold"),
        ({"thresholds": (0.5, 0.2)}, "2 thresholds"),
        ({"bins": (1,)}, "bins"),
        ({"step": lambda self, s, a: s[:, :0]}, "expected"),
        ({"step": lambda self, s, a: s + torch.nan}, "NaN"),
        ({"initial": lambda self, n, g: torch.zeros(n, 1)}, "the same"),
        ({"initial": lambda self, n, g: torch.rand(n, 1)}, "generator"),
        ({"off_table": lambda self, s: s}, "bool"),
        ({"observe": lambda self, s: (s, s)}, "K >= 1"),
        ({"observe": lambda self, s: (s, torch.full((len(s), 1, 2), 0.5))}, "1 .there. or 0"),
        ({"distance": lambda self, a, g: (a - g).abs() + 1}, "must be 0"),
    ],
)
def test_worlds_that_do_not_fit_are_refused(members, says):
    with pytest.raises(InvalidInput, match=says):
        check_world(changed(**members))


def test_an_environment_of_gymnasium_is_told_what_to_do():
    with pytest.raises(InvalidInput, match="GymnasiumWorld"):
        check_world(type("Env", (), {"reset": None})())
