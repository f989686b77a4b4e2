"""RandAugment against TensorFlow's numbers and pillow's, its draws, and what small images and wrong inputs meet."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.train import apply_operation, erased_probability, randaugment
from mlcollage.train.rand_augment import OPERATIONS

with np.load(Path(__file__).parent / "oracles" / "vit_training" / "randaugment_tf.npz") as _file:
    TF = dict(_file)


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()


def apply(x, name, magnitude, sign=1.0, center=(0, 0), **kwargs):
    b = len(x)
    return apply_operation(x, name, magnitude, torch.full((b,), sign), torch.tensor([center] * b), **kwargs)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_operations_are_the_official_sixteen():
    assert tuple(TF["ops"]) == OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("image", ["A", "B", "C"])
def test_every_operation_equals_tensorflows(name, image):
    x, center = tensor(TF[image]), tuple(TF["cutout_centre"]["ABC".index(image)])
    expected = TF[f"out_{image}_{name}"]
    for m in range(len(expected)):
        pairs = [(1.0, expected[m, 0]), (-1.0, expected[m, 1])] if expected.ndim == 5 else [(1.0, expected[m])]
        for sign, official in pairs:
            found = apply(x, name, float(TF["magnitudes"][m]), sign, center)[0].permute(1, 2, 0).numpy()
            different = int((found != official).any(-1).sum())
            # Rotation by 60 or 90 degrees puts a few pixels exactly between two others, to a rounding of the cosine.
            assert different <= (3 if name == "Rotate" else 0), (name, TF["magnitudes"][m], sign)


def test_two_operations_in_a_row_equal_tensorflows():
    center = tuple(TF["cutout_centre"][0])
    for k, ops in enumerate(TF["seq_ops"]):
        x = tensor(TF["A"])
        for op in ops:
            x = apply(x, OPERATIONS[op], float(TF["seq_magnitude"][k]), float(TF["seq_sign"][k]), center)
        assert np.array_equal(x[0].permute(1, 2, 0).numpy(), TF["seq_out"][k])


@pytest.mark.parametrize("magnitude", [1, 5, 10, 15, 20, 25])
def test_what_pillow_does_too_is_equal_to_it(magnitude):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
    x, image = tensor(array), Image.fromarray(array)
    factor, bits, threshold = 0.18 * magnitude + 0.1, min(8, int(0.4 * magnitude)), int(25.6 * magnitude)

    def gap(name, theirs, **kwargs):
        found = apply(x, name, magnitude, **kwargs)[0].permute(1, 2, 0).numpy().astype(int)
        return int(np.abs(found - np.asarray(theirs, dtype=int)).max())

    assert gap("Invert", ImageOps.invert(image)) == 0
    assert gap("Equalize", ImageOps.equalize(image)) == 0
    assert gap("Brightness", ImageEnhance.Brightness(image).enhance(factor)) <= 1
    assert gap("Color", ImageEnhance.Color(image).enhance(factor)) <= np.ceil(abs(1 - factor)) + 1
    # Where TensorFlow's arithmetic overflows, the corrected variant is pillow's.
    if bits:
        assert gap("Posterize", ImageOps.posterize(image, bits), variant="corrected") == 0
    assert gap("Solarize", ImageOps.solarize(image, threshold), variant="corrected") == 0
    contrast = gap("Contrast", ImageEnhance.Contrast(image).enhance(factor), variant="corrected")
    assert contrast <= np.ceil(abs(1 - factor)) + 1


def test_overflow_is_named_and_can_be_left_out():
    x = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    for m in (10, 20):
        assert torch.equal(apply(x, "Solarize", m), 255 - x)
        assert torch.equal(apply(x, "Solarize", m, variant="corrected"), x)
    assert apply(x, "Posterize", 0).flatten().tolist() == [0, 0, 128, 128]
    assert not apply(x, "Posterize", 0, variant="corrected").any()
    assert torch.equal(apply(x, "Posterize", 20), x)
    assert torch.equal(apply(x, "Posterize", 23, variant="corrected"), x)
    assert apply(x, "SolarizeAdd", 15).flatten().tolist() == [165, 255, 200, 255]  # and not 100 + 165 - 256
    plain = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    assert int(apply(plain, "Contrast", 15).max()) == 0  # away from 196
    assert set(apply(plain, "Contrast", 15, variant="corrected").unique().tolist()) <= {99, 100, 101}


def test_each_image_has_its_own_draw_and_the_seed_decides():
    x = torch.randint(0, 256, (400, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    x = x[:1].expand(400, -1, -1, -1).contiguous()
    a = randaugment(x, 1, 9, generator=generator(1), reference_size=224)
    assert torch.equal(a, randaugment(x, 1, 9, generator=generator(1), reference_size=224))
    assert not torch.equal(a, randaugment(x, 1, 9, generator=generator(2), reference_size=224))
    inverted = (a == 255 - x).flatten(1).all(1).float().mean()
    assert 0.01 < float(inverted) < 0.14  # a sixteenth, and 5 standard errors
    assert len({tuple(row.flatten().tolist()) for row in a}) > 20
    assert torch.equal(randaugment(x, 0, 9, generator=generator()), x)


def test_layers_are_applied_always_and_one_after_the_other():
    x = torch.randint(0, 256, (300, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    once = randaugment(x, 1, 12, generator=generator(), reference_size=224)
    unchanged = (once == x).flatten(1).all(1).float().mean()
    # Equalize does nothing to fewer than 256 pixels, color nothing to gray, a shift of 4 pixels shows.
    assert float(unchanged) < 0.35


def test_small_images_are_warned_about_with_the_share_that_is_lost():
    assert erased_probability(32, 32, 2, 10) == pytest.approx(1 - (13 / 16) ** 2)
    assert erased_probability(64, 64, 2, 15) == pytest.approx(0.319, abs=5e-4)
    assert erased_probability(224, 224, 2, 20) == 0
    x = torch.randint(0, 256, (4000, 1, 28, 28), generator=generator(), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="34% become plain gray; pass reference_size=224"):
        found = randaugment(x, 2, 10, generator=generator())
    gone = (found.flatten(1) == found.flatten(1)[:, :1]).all(1).float().mean()
    assert float(gone) == pytest.approx(0.34, abs=0.04)
    scaled = randaugment(x, 2, 10, generator=generator(), reference_size=224)
    assert float((scaled.flatten(1) == scaled.flatten(1)[:, :1]).all(1).float().mean()) < 0.02


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: randaugment((x.float() + torch.eye(8)), 2, 10, generator=generator()),
            InvalidInput,
            "uint8.*float32 from 0 to 1",
        ),
        (lambda x: randaugment(x.numpy(), 2, 10, generator=generator()), InvalidInput, "not ndarray"),
        (lambda x: randaugment(x[0], 2, 10, generator=generator()), InvalidInput, r"images \(B, 1 or 3"),
        (lambda x: randaugment(x, 2, 31, generator=generator()), InvalidInput, "magnitude"),
        (lambda x: randaugment(x, 2, -1, generator=generator()), InvalidInput, "magnitude"),
        (lambda x: randaugment(x, -1, 1, generator=generator()), InvalidInput, "layers"),
        (lambda x: randaugment(x, 1, 1, generator=generator(), variant="timm"), UnknownName, "variant"),
        (lambda x: apply(x, "rotate", 1), UnknownName, "did you mean 'Rotate'"),
    ],
)
def test_bad_inputs_are_explained(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
