"""MNIST-1D: the authors' numbers, and a stream that is the same distribution."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from mlcollage.data.mnist1d import MNIST1D, STD, reference
from mlcollage.data.world import DataWorld
from mlcollage.errors import InvalidInput, UnknownName

REFERENCE = reference()
WORLD = MNIST1D(seed=5)
WHOLE = WORLD.sample(0, 3000)


def test_the_reference_set_is_that_of_the_authors_package():
    """Recorded from ``mnist1d`` 0.0.2.post1, ``make_dataset()`` at its defaults: equal there to the last bit."""
    assert [REFERENCE[key].shape for key in ("x", "y", "x_test", "y_test")] == [
        (4000, 40),
        (4000,),
        (1000, 40),
        (1000,),
    ]
    np.testing.assert_allclose(
        REFERENCE["x"][0, :4], [-0.33200567, -0.47191037, -0.77869708, -1.00974083], rtol=0, atol=5e-9
    )
    np.testing.assert_allclose(
        REFERENCE["x_test"][-1, -4:], [0.44723289, 0.65987565, 0.87773435, 1.19315184], rtol=0, atol=5e-9
    )
    assert REFERENCE["y"][:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    labels = hashlib.sha256(np.concatenate([REFERENCE["y"], REFERENCE["y_test"]]).astype("<i8").tobytes()).hexdigest()
    assert labels == "6feec4a017698c7fe237c8854cbd2e338c6dd5c16240f6fa79daefaaa129e169"
    signals = np.concatenate([REFERENCE["x"], REFERENCE["x_test"]])  # rounded: the last bits are the platform's
    assert (
        hashlib.sha256((np.round(signals, 6) + 0.0).astype("<f8").tobytes()).hexdigest()
        == "a3e49301cd6d81207e6115120e4b369093607da485593686028ea556b9d8928a"
    )


def test_other_settings_of_the_reference_follow_the_package_too():
    """Recorded from the package at seed 7 with 400 signals, padding 10-30, 33 points, shuffled positions."""
    data = reference(400, seed=7, padding=(10, 30), final_seq_length=33, shuffle_seq=True)
    np.testing.assert_allclose(data["x"][3, :3], [0.380483394, 1.164316686, 0.233751881], rtol=0, atol=5e-9)


def test_the_constants_of_the_stream_are_those_of_the_reference_set():
    assert abs(np.concatenate([REFERENCE["x"], REFERENCE["x_test"]]).mean()) < 1e-12
    np.testing.assert_allclose(REFERENCE["t"][-1] * STD, 5 / 6, rtol=1e-12)  # t is given over the same deviation
    x = MNIST1D(seed=1).sample(0, 50_000)[0]
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02


def test_the_stream_has_the_moments_of_the_reference_set():
    """Per class and position, means and spreads agree within what 500 signals can tell."""
    x, y = MNIST1D(seed=2).sample(0, 40_000)
    reference_x = np.concatenate([REFERENCE["x"], REFERENCE["x_test"]])
    reference_y = np.concatenate([REFERENCE["y"], REFERENCE["y_test"]])
    scores = []
    for k in range(10):
        ours, theirs = x[y == k].double().numpy(), reference_x[reference_y == k]
        error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
        scores.append((ours.mean(0) - theirs.mean(0)) / error)
        assert np.abs(np.log(ours.std(0) / theirs.std(0))).max() < 0.15
    assert np.abs(scores).max() < 5
    assert 0.5 < np.std(scores) < 1.5


def test_neighboring_points_correlate_as_in_the_reference_set():
    x = MNIST1D(seed=3).sample(0, 20_000)[0].double().numpy()
    ours, theirs = np.corrcoef(x.T), np.corrcoef(np.concatenate([REFERENCE["x"], REFERENCE["x_test"]]).T)
    assert np.abs(ours - theirs).max() < 0.08


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2999), st.integers(1, 1500))
def test_a_signal_is_the_same_in_any_batch(start, count):
    count = min(count, 3000 - start)
    x, y = WORLD.sample(start, count)
    assert torch.equal(x, WHOLE[0][start : start + count])
    assert torch.equal(y, WHOLE[1][start : start + count])


def test_batches_resume_sets_nest_and_splits_share_nothing():
    assert torch.equal(MNIST1D(seed=5).batch(7, 100)[0], WHOLE[0][700:800])
    assert torch.equal(copy.deepcopy(WORLD).batch(7, 100)[0], WHOLE[0][700:800])
    assert torch.equal(WORLD.fixed(50).tensors[0], WORLD.fixed(1100).tensors[0][:50])
    draws = [WORLD.sample(0, 300, split)[0] for split in ("train", "validation", "test", "stream")]
    draws += [WORLD.sample(0, 300, "train", seed=1)[0], MNIST1D(seed=6).sample(0, 300)[0]]
    flat = torch.cat(draws)
    assert float(torch.cdist(flat, flat).fill_diagonal_(torch.inf).min()) > 0.1


def test_the_stream_is_a_data_world_with_uniform_labels():
    assert isinstance(WORLD, DataWorld)
    x, y = WORLD.sample(0, 10_000, "test")
    assert x.shape == (10_000, *WORLD.shape)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert stats.chisquare(torch.bincount(y, minlength=10).numpy()).pvalue > 1e-3


def test_a_logistic_regression_does_as_poorly_as_published():
    fit = LogisticRegression(max_iter=200).fit(REFERENCE["x"], REFERENCE["y"])
    assert 0.25 < fit.score(REFERENCE["x_test"], REFERENCE["y_test"]) < 0.4  # the paper: 32 %
    x, y = WORLD.fixed(4000).tensors
    xt, yt = WORLD.fixed(4000, split="test").tensors
    assert 0.25 < LogisticRegression(max_iter=200).fit(x, y).score(xt, yt) < 0.4


def test_bad_input_gets_one_sentence():
    with pytest.raises(InvalidInput, match="num_samples must be a whole number of at least 20"):
        reference(5)
    with pytest.raises(InvalidInput, match="0 <= low <= high"):
        reference(padding=(60, 36))
    with pytest.raises(InvalidInput, match="seed must be a whole number"):
        MNIST1D(seed=0.5)
    with pytest.raises(UnknownName, match=r"split must be .* not 'eval'"):
        WORLD.batch(0, 1, split="eval")
    with pytest.raises(InvalidInput, match="count must be a whole number"):
        WORLD.batch(0, 2.0)
