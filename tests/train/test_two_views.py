"""Two views: each change against PIL and scipy, their shares, and images as users have them."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.train import TwoViews, ViewSettings, two_view_augment
from mlcollage.train.two_views import adjust_color, blur_images, solarize

NOTHING = ViewSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, gray=0, blur=0)


def images(n=6, size=16, channels=3, seed=0):
    u = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return u.to(torch.uint8)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def back(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def only(**changed):
    from dataclasses import replace

    return replace(NOTHING, **changed)


@pytest.mark.parametrize(
    ("kind", "enhance"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
def test_changes_of_color_are_those_of_pil(kind, enhance):
    x = images()
    factors = torch.linspace(0.6, 1.4, len(x))
    found = adjust_color(x.float() / 255, kind, factors)
    for image, factor, result in zip(x, factors, found, strict=True):
        expected = back(enhance(pil(image)).enhance(float(factor)))
        assert float((result - expected).abs().max()) < 2.5 / 255  # PIL rounds twice


def test_hue_is_that_of_colorsys():
    x = images(4, 5).double() / 255
    x[0, :, 0, 0] = 0.5  # a gray pixel has no hue
    turns = torch.tensor([-0.5, -0.1, 0.07, 0.5], dtype=torch.float64)
    found = adjust_color(x, "hue", turns)
    for i in range(4):
        for row in range(5):
            for column in range(5):
                h, s, v = colorsys.rgb_to_hsv(*x[i, :, row, column].tolist())
                expected = colorsys.hsv_to_rgb((h + float(turns[i])) % 1, s, v)
                assert found[i, :, row, column].tolist() == pytest.approx(expected, abs=1e-9)


def test_solarize_is_that_of_pil():
    x = images()
    found = solarize(x.float() / 255)
    for image, result in zip(x, found, strict=True):
        assert torch.allclose(result, back(ImageOps.solarize(pil(image), 128)), atol=1e-6)


def test_blur_is_that_of_scipy_also_on_small_images():
    for size in (24, 8):
        x = images(3, size).double() / 255
        sigma = torch.tensor([0.1, 0.8, 2.0], dtype=torch.float64)
        found = blur_images(x, sigma)
        for image, s, result in zip(x, sigma.tolist(), found, strict=True):
            reach = min(8, size - 1)
            expected = gaussian_filter(image.numpy(), [0, s, s], mode="mirror", radius=[0, reach, reach])
            np.testing.assert_allclose(result.numpy(), expected, atol=1e-9)


def test_nothing_changes_nothing():
    x = images(5, 12)
    a, b = TwoViews(12, NOTHING, NOTHING)(x, gen())
    assert torch.allclose(a, x.float() / 255, atol=1e-5)
    assert torch.equal(a, b)
    flipped, _ = TwoViews(12, only(flip=1.0), NOTHING)(x, gen())
    assert torch.allclose(flipped, x.flip(3).float() / 255, atol=1e-5)
    assert two_view_augment((6, 9))(x, gen())[0].shape == (5, 3, 6, 9)


def test_crops_are_parts_of_the_image():
    """On an image whose values are coordinates a crop is a linear ramp that starts and ends within it."""
    ramp = torch.linspace(0, 1, 40)
    x = torch.stack([ramp.expand(40, 40), ramp[:, None].expand(40, 40), torch.zeros(40, 40)]).expand(300, 3, 40, 40)
    a, _ = TwoViews(10, only(scale=(0.2, 0.5), ratio=(3 / 4, 4 / 3)), NOTHING)(x, gen())
    wide = (a[:, 0, 5, 8] - a[:, 0, 5, 1]) / 7 * 10  # as shares of the image, less what lies outside of centers
    high = (a[:, 1, 8, 5] - a[:, 1, 1, 5]) / 7 * 10
    area, ratio = wide * high, wide / high
    assert 0.18 < float(area.min()) < 0.25
    assert 0.45 < float(area.max()) < 0.56
    assert 0.70 < float(ratio.min()) < 0.80
    assert 1.25 < float(ratio.max()) < 1.43
    assert len(set(a[:, 0, 5, 5].tolist())) > 200  # each image has a crop of its own


def test_where_no_crop_fits_the_middle_is_taken():
    x = torch.zeros(1, 3, 4, 64)
    x[:, :, :, 30:34] = 1.0  # the middle square of a strip
    a, _ = TwoViews(4, only(scale=(0.9, 1.0)), NOTHING)(x, gen())
    assert float(a.min()) > 0.99


def test_shares_of_what_is_done():
    x = images(600, 8)
    plain = x.float() / 255
    augment = TwoViews(8, only(gray=0.2, flip=0.0), only(solarize=0.2))
    a, b = augment(x, gen())
    gray = (a[:, 0] - a[:, 1]).abs().amax((1, 2)) < 1e-5
    solarized = (b - plain).abs().amax((1, 2, 3)) > 1e-3
    for share in (gray, solarized):
        assert 0.15 < float(share.float().mean()) < 0.25
    luma = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert torch.allclose(a[gray][:, 0], luma[gray], atol=1e-3)
    jittered, _ = TwoViews(8, only(jitter=0.8), NOTHING)(x, gen())
    assert 0.75 < float(((jittered - plain).abs().amax((1, 2, 3)) > 1e-3).float().mean()) < 0.85


def test_the_papers_views_are_asymmetric():
    augment = two_view_augment(224)
    first, second = augment.settings
    assert (first.blur, second.blur, first.solarize, second.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert (first.scale, first.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (first.jitter, first.brightness, first.contrast, first.saturation, first.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
    assert (first.flip, first.gray, first.sigma) == (0.5, 0.2, (0.1, 2.0))
    assert two_view_augment(32, preset="cifar", solarize=0.0).settings[1].solarize == 0.0


def test_same_generator_same_views_and_nothing_global():
    x, augment = images(), two_view_augment(12)
    state = torch.get_rng_state()
    first, second, other = augment(x, gen(3)), augment(x, gen(3)), augment(x, gen(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(0 <= float(v.min()) <= float(v.max()) <= 1 and v.dtype == torch.float32 for v in first)


def test_standardization_comes_last():
    x, plain = images(), two_view_augment(12)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    scaled = two_view_augment(12, mean=mean, std=std)(x, gen())[0]
    expected = (plain(x, gen())[0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(scaled, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_numbers_of_channels(channels):
    a, b = two_view_augment(8, channels, "gray")(images(3, 10, channels), gen())
    assert a.shape == b.shape == (3, channels, 8, 8)
    with pytest.raises(InvalidInput, match=f"{channels} channels have no saturation, hue, gray"):
        two_view_augment(8, channels)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.full((2, 3, 8, 8), 255.0), "values from 255 to 255; expected uint8"),
        (torch.randn(2, 3, 8, 8), "standardize after the augmentation"),
        (torch.rand(2, 8, 8, 3), r"permute\(0, 3, 1, 2\)"),
        (torch.rand(3, 8, 8), r"\(n, 3, h, w\)"),
        (torch.randint(0, 60000, (2, 3, 8, 8), dtype=torch.int32), "torch.int32"),
        (torch.full((2, 3, 8, 8), torch.nan), "nan"),
        (np.zeros((2, 3, 8, 8)), "a ndarray"),
    ],
)
def test_images_that_are_something_else_are_refused(x, words):
    with pytest.raises(InvalidInput, match=words):
        two_view_augment(8)(x, gen())


def test_settings_that_make_no_sense_are_refused():
    for changed in ({"flip": 2.0}, {"hue": 0.7}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"sigma": (0.0, 1.0)}):
        with pytest.raises(InvalidInput, match=next(iter(changed))):
            ViewSettings(**changed)
    with pytest.raises(UnknownName, match="did you mean 'byol'"):
        two_view_augment(8, preset="byoll")
    with pytest.raises(InvalidInput, match="3 numbers each"):
        two_view_augment(8, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: two_view_augment(8)(images().to(torch.uint16), gen()), "torch.uint16 with values from"),
        (lambda: two_view_augment(8)(images()[:0], gen()), "there are no images"),
        (lambda: two_view_augment(8)(images()[:, :, :0], gen()), "there are no images"),
        (lambda: two_view_augment(8)(images(), None), "generator is a NoneType"),
        (lambda: two_view_augment(8)(images(), 0), "generator is a int"),
        (lambda: two_view_augment(8, mean=0.5, std=0.5), "3 numbers each"),
        (lambda: two_view_augment(8, mean=[0, 0, 0], std=[1, 1, 0]), "std must be"),
        (lambda: two_view_augment(8, scale=0.5), "scale is a pair"),
    ],
)
def test_further_mistakes_are_refused_in_a_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call()


def test_mean_and_std_may_be_tensors(recwarn):
    views = [
        two_view_augment(8, mean=of((0.5, 0.4, 0.3)), std=of((0.2, 0.2, 0.1)))(images(), gen())[0]
        for of in (tuple, torch.tensor)
    ]
    assert not recwarn.list
    torch.testing.assert_close(views[0], views[1])
