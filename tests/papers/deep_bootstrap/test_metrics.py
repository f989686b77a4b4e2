import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput
from mlcollage.papers.deep_bootstrap import bootstrap_error, error, soft_error


def test_soft_error_is_the_error_of_the_classifier_that_samples_its_label():
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(50, 4, generator=g), torch.randint(4, (50,), generator=g)
    draws = torch.multinomial(logits.softmax(1), 20_000, replacement=True, generator=g)
    sampled = (draws != target[:, None]).double().mean()
    assert float(soft_error(logits, target)) == pytest.approx(float(sampled), abs=3e-3)


@settings(deadline=None)
@given(st.floats(-30, 30), st.integers(2, 20))
def test_soft_error_has_its_closed_form_for_one_raised_logit(height, classes):
    logits = torch.zeros(1, classes, dtype=torch.float64)
    logits[0, 0] = height
    closed = (classes - 1) / (classes - 1 + math.exp(height))
    assert float(soft_error(logits, torch.tensor([0]))) == pytest.approx(closed, rel=1e-9)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.floats(0.1, 20))
def test_soft_error_lies_in_the_unit_interval_and_tends_to_the_error(seed, classes, scale):
    g = torch.Generator().manual_seed(seed)
    logits, y = torch.randn(20, classes, generator=g, dtype=torch.float64), torch.randint(classes, (20,), generator=g)
    assert 0 <= float(soft_error(logits * scale, y)) <= 1
    assert float(soft_error(logits * 1e9, y)) == pytest.approx(float(error(logits, y)), abs=1e-6)


def test_tiny_soft_errors_keep_their_digits():
    value = soft_error(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))
    assert float(value) == pytest.approx(math.exp(-30), rel=1e-5)


def test_soft_error_is_differentiable_and_right():
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda v: soft_error(v, y), (logits,))


def test_stacked_networks_are_measured_one_by_one():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(5, 30, 4, generator=g), torch.randint(4, (30,), generator=g)
    for metric in (soft_error, error):
        each = metric(logits, y, reduction="none").mean(-1)
        assert torch.allclose(each, torch.stack([metric(part, y) for part in logits]))


def test_error_counts_wrong_labels():
    assert float(error(torch.eye(4), torch.tensor([0, 1, 2, 0]))) == 0.25


def test_bootstrap_error_is_real_minus_ideal():
    assert bootstrap_error(0.5, 0.2) == pytest.approx(0.3)
    assert np.allclose(bootstrap_error([0.5, 0.1], [0.2, 0.2]), [0.3, -0.1])


@pytest.mark.parametrize("metric", [soft_error, error])
@pytest.mark.parametrize(
    ("target", "says"),
    [
        (torch.zeros(3), "integer class labels"),
        (torch.tensor([0, 1, 4]), "labels run from 0 to 4"),
        (torch.tensor([0, -1, 1]), "labels run from -1 to 1"),
        (torch.tensor([0, 1]), "need labels of shape"),
    ],
)
def test_targets_that_are_no_labels_are_refused(metric, target, says):
    with pytest.raises(InvalidInput, match=says):
        metric(torch.zeros(3, 4), target)


def test_other_bad_input_is_refused():
    with pytest.raises(InvalidInput, match="needs float logits"):
        soft_error(torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidInput, match=r"reduction must be one of .*, not 'sum'"):
        soft_error(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), reduction="sum")
    with pytest.raises(InvalidInput, match="compares the same steps"):
        bootstrap_error([0.1, 0.2], [0.1])
