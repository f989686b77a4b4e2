import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.data.label_noise import add_label_noise
from mlcollage.errors import InvalidInput, UnknownName


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    classes=st.integers(2, 12),
    rate=st.floats(0, 1),
    kind=st.sampled_from(["symmetric", "pair"]),
    seed=st.integers(0, 2**32),
)
def test_exactly_the_marked_labels_are_wrong(n, classes, rate, kind, seed):
    y = np.random.default_rng(seed).integers(0, classes, n)
    before = y.copy()
    noisy, mask = add_label_noise(y, rate, kind, num_classes=classes, rng=seed)
    assert mask.sum() == round(rate * n)
    assert np.array_equal(noisy != y, mask)
    assert noisy.min() >= 0
    assert noisy.max() < classes
    assert np.array_equal(y, before)
    again = add_label_noise(y, rate, kind, num_classes=classes, rng=seed)
    assert np.array_equal(noisy, again[0])
    if kind == "pair":
        assert np.array_equal(noisy[mask], (y[mask] + 1) % classes)


def test_symmetric_noise_reaches_every_other_class_as_often():
    y = np.zeros(40_000, dtype=int)
    noisy, _ = add_label_noise(y, 1.0, num_classes=5, rng=0)
    shares = np.bincount(noisy, minlength=5) / len(y)
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], 0.25, atol=0.01)


def test_tensors_and_generators_are_taken():
    noisy, mask = add_label_noise(torch.arange(10) % 3, 0.4, rng=np.random.default_rng(0))
    assert noisy.dtype == np.int64
    assert mask.sum() == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5, 1.0], 0.1), InvalidInput, "class numbers"),
        (([[0, 1]], 0.1), InvalidInput, "class numbers"),
        (([-1, 1], 0.1), InvalidInput, "class numbers"),
        (([0, 1], 1.5), InvalidInput, "of at least 0 and at most 1"),
        (([0, 1], float("nan")), InvalidInput, "of at least 0 and at most 1"),
        (([0, 0], 0.5), InvalidInput, "one class"),
        (([0, 1], 0.5, "flip"), UnknownName, "one of 'symmetric', 'pair'"),
    ],
)
def test_bad_input_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        add_label_noise(*arguments)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(InvalidInput, match="num_classes is 2"):
        add_label_noise([0, 5], 0.5, num_classes=2)
