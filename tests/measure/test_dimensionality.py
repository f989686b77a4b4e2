"""Counts of dimensions against constructed spectra and numpy's covariance."""

import numpy as np
import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.measure.dimensionality import dimensionality, participation_ratio, spectrum


def with_spectrum(values, n=400, seed=0):
    """Samples whose covariance has exactly these eigenvalues."""
    rng = np.random.default_rng(seed)
    p = len(values)
    x = rng.normal(size=(n, p))
    u = np.linalg.svd(x - x.mean(0), full_matrices=False)[0]
    rotation = np.linalg.qr(rng.normal(size=(p, p)))[0]
    return u * np.sqrt(np.array(values) * (n - 1)) @ rotation + rng.normal(size=p)


@pytest.mark.parametrize(
    ("values", "share", "count"),
    [((4, 3, 2, 1), 0.9, 3), ((4, 3, 2, 1), 0.91, 4), ((1, 0, 0), 0.95, 1), ((1, 1, 1, 1), 1.0, 4), ((9, 1), 0.9, 1)],
)
def test_components_for_a_share_of_variance(values, share, count):
    assert dimensionality(with_spectrum(values), share) == count


def test_spectrum_is_that_of_the_covariance_for_tall_and_wide_data():
    rng = np.random.default_rng(0)
    for shape in ((500, 7), (9, 7), (5, 12)):
        x = rng.normal(size=shape)
        expected = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1][: min(shape)]
        np.testing.assert_allclose(spectrum(torch.tensor(x)).numpy(), expected, atol=1e-12)


def test_participation_ratio_of_known_spectra():
    assert participation_ratio(with_spectrum((2, 2, 2))) == pytest.approx(3)
    assert participation_ratio(with_spectrum((5, 0, 0))) == pytest.approx(1)
    assert participation_ratio(with_spectrum((3, 1))) == pytest.approx(16 / 10)


def test_neither_depends_on_rotation_shift_and_scale():
    x = with_spectrum((4, 3, 2, 1))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    moved = 1e-5 * x @ rotation + 40
    assert dimensionality(moved) == dimensionality(x)
    assert participation_ratio(moved) == pytest.approx(participation_ratio(x), rel=1e-6)


def test_the_same_for_all_samples_has_no_dimension():
    assert dimensionality(torch.ones(5, 3)) == 0
    assert participation_ratio(torch.ones(5, 3)) == 0


def test_bad_input():
    with pytest.raises(InvalidInput, match="matrix"):
        dimensionality(torch.zeros(3, 2, 4, 4))
    with pytest.raises(InvalidInput, match=r"variance must be .*, not 1\.5"):
        dimensionality(torch.rand(4, 2), 1.5)
    with pytest.raises(InvalidInput, match="NaN"):
        participation_ratio(torch.full((4, 2), torch.nan))
