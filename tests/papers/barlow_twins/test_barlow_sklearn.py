"""The estimator: scikit-learn's contract, tables as they are, the user's own views."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from mlcollage.errors import InvalidInput, UserCodeError
from mlcollage.papers.barlow_twins import BarlowTwinsEncoder

SMALL = {"n_components": 4, "hidden": (8,), "projector": (8, 8), "max_iter": 2}


@parametrize_with_checks([BarlowTwinsEncoder(**SMALL)])
@pytest.mark.filterwarnings("ignore")
def test_the_contract_of_estimators(estimator, check):
    check(estimator)


def table(n=200, seed=0):
    """Three latent numbers seen twice each, in columns of very different units."""
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(n, 3))
    return np.hstack([s, s[:, ::-1]]) * [1, 1e4, 1e-3, 10, 5, 1] + [0, 2e4, 0, 1e6, 0, 3], s


def test_units_of_columns_do_not_matter():
    X, _ = table()
    units = np.array([1.0, 1e-6, 1e5, 3.0, 1e3, 7.0])
    fits = [BarlowTwinsEncoder(**SMALL, random_state=0).fit_transform(A) for A in (X, X * units + 5 * units)]
    np.testing.assert_allclose(fits[0], fits[1], atol=2e-3)


def test_same_seed_same_result_and_the_rest_of_a_pass_is_left_out():
    X, _ = table(65)
    fits = [
        BarlowTwinsEncoder(**SMALL, batch_size=32, random_state=s).fit(X) for s in (3, 3, 4)
    ]  # 65 mod 32 = 1: no batch of one row
    found = [fit.transform(X) for fit in fits]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01
    assert {r.n for r in fits[0].gauge_.history} == {32}
    assert len(fits[0].loss_curve_) == fits[0].n_iter_ == 2


def test_it_keeps_what_the_views_share_and_forgets_the_rest():
    """Columns 0 to 2 are the same in both views, 3 to 5 are drawn anew in each."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1500, 6))

    def views(batch, rng):
        pair = [batch.copy(), batch.copy()]
        for view in pair:
            view[:, 3:] = rng.normal(size=(len(batch), 3))
        return tuple(pair)

    encoder = BarlowTwinsEncoder(8, hidden=(32,), projector=(32, 16), views=views, max_iter=25, random_state=0).fit(X)
    H = encoder.transform(X)
    H = np.hstack([H, np.ones((len(H), 1))])
    fitted = H @ np.linalg.lstsq(H, X, rcond=None)[0]
    explained = 1 - ((X - fitted) ** 2).mean(0) / X.var(0)
    assert explained[:3].min() > 0.9
    assert explained[3:].max() < 0.4


def test_frames_pipelines_and_names():
    X, s = table()
    frame = pd.DataFrame(X, columns=list("abcdef"))
    encoder = BarlowTwinsEncoder(**SMALL, random_state=0).set_output(transform="pandas")
    out = encoder.fit_transform(frame)
    assert list(out.columns) == [f"barlowtwinsencoder{i}" for i in range(4)]
    assert list(encoder.feature_names_in_) == list("abcdef")
    with pytest.raises(ValueError, match="feature names"):
        encoder.transform(frame[list("fedcba")])
    pipeline = make_pipeline(BarlowTwinsEncoder(**SMALL, random_state=0), LogisticRegression())
    assert pipeline.fit(X, s[:, 0] > 0).score(X, s[:, 0] > 0) > 0.7


def test_constant_columns_become_zero():
    X, _ = table()
    X[:, 2] = 0.1
    encoder = BarlowTwinsEncoder(**SMALL, random_state=0).fit(X)
    assert encoder.scale_[2] == 1.0
    assert encoder.mean_[2] == 0.1
    assert np.isfinite(encoder.transform(X)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_missing_and_infinite_values_are_refused(bad):
    X, _ = table()
    X[3, 2] = bad
    with pytest.raises(ValueError, match="contains"):
        BarlowTwinsEncoder(**SMALL).fit(X)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_components": 0}, "n_components"),
        ({"batch_size": 1}, "batch_size"),
        ({"max_iter": 0}, "max_iter"),
        ({"swap": 1.5}, "swap"),
        ({"noise": 0.0, "swap": 0.0}, "leave both views equal"),
        ({"views": 3}, "views must be a function"),
        ({"views": lambda X, rng: X}, "must return two arrays"),
        ({"views": lambda X, rng: (X[:, 1:], X)}, r"two arrays of shape \(200, 6\)"),
        ({"views": lambda X, rng: (X * np.nan, X)}, "NaN"),
    ],
)
def test_settings_and_views_that_cannot_be_used(settings, words):
    with pytest.raises(InvalidInput, match=words):
        BarlowTwinsEncoder(**{**SMALL, **settings}).fit(table()[0])


def test_errors_of_the_users_views_are_theirs():
    def views(X, rng):
        raise KeyError("crop")

    with pytest.raises(UserCodeError, match=r"views\(X, rng\) failed with KeyError"):
        BarlowTwinsEncoder(**SMALL, views=views).fit(table()[0])


def test_views_that_are_equal_are_told():
    with pytest.warns(UserWarning, match="rows are equal"):
        BarlowTwinsEncoder(**SMALL, views=lambda X, rng: (X, X)).fit(table()[0])


def test_values_whose_variance_overflows_are_refused():
    X, _ = table(40)
    with pytest.raises(InvalidInput, match="variance overflows"):
        BarlowTwinsEncoder(**SMALL).fit(X * 1e300)


@pytest.mark.parametrize("name", ["hidden", "projector"])
def test_widths_are_sequences(name):
    with pytest.raises(InvalidInput, match=f"{name} is a sequence"):
        BarlowTwinsEncoder(**{**SMALL, name: 8}).fit(table(40)[0])
