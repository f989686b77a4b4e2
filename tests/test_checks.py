import numpy as np
import pytest
import torch

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, UnknownName


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_every_library_become_int(value):
    assert checks.integer("n", value) == 3
    assert type(checks.integer("n", value)) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, 0, 11])
def test_what_is_no_integer_within_bounds_is_refused(value):
    with pytest.raises(InvalidInput, match="n must be a whole number of at least 1 and at most 10, not"):
        checks.integer("n", value, least=1, most=10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, "1", None, True])
def test_only_finite_numbers_above_zero_are_positive(value):
    with pytest.raises(InvalidInput, match="rate must be a finite number above 0, not"):
        checks.positive("rate", value)


def test_bounds_belong_to_the_range_or_not_as_named():
    assert checks.real("x", 1, least=1, most=1) == 1.0
    assert checks.probability("p", 1.0, inside=False) == 1.0
    with pytest.raises(InvalidInput, match="p must be a finite number above 0 and below 1"):
        checks.probability("p", 1.0)


def test_an_unknown_choice_names_the_known_ones_and_the_closest():
    assert checks.choice("mode", "fp", ("fp", "gp")) == "fp"
    with pytest.raises(UnknownName, match=r"mode must be one of 'mean', 'median', not 'men'; did you mean 'mean'\?"):
        checks.choice("mode", "men", ("mean", "median"))
    with pytest.raises(UnknownName, match="not 3"):
        checks.choice("mode", 3, ("mean",))


def test_case_is_no_obstacle_to_the_closest_name():
    with pytest.raises(UnknownName, match="did you mean 'B/16'"):
        checks.choice("name", "b/16", ("S/16", "B/16"))


def test_only_generators_of_torch_draw():
    g = torch.Generator()
    assert checks.generator(g) is g
    with pytest.raises(InvalidInput, match=r"generator is a int; give torch\.Generator"):
        checks.generator(3)
