"""GlyphWorld: image i is image i, nothing but the shape tells the class, and every dial does what it says."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader

from mlcollage.data._blocks import BLOCK
from mlcollage.data._glyph_alphabet import make_alphabet, raster
from mlcollage.data._glyph_latents import _segment_terms
from mlcollage.data._glyph_render import _pixels, _squared_distance
from mlcollage.data.glyphs import PRESETS, GlyphDataset, GlyphWorld
from mlcollage.data.world import DataWorld
from mlcollage.errors import InvalidInput, UnknownName

EASY = GlyphWorld.preset("easy16", seed=11)
WHOLE = EASY.sample(0, 2 * BLOCK + 300)
ODD = GlyphWorld(17, 3, 5, seed=2, occluders=2)  # 867 numbers an image: every loop has a scalar tail
ODD_WHOLE = ODD.sample(1000, 150)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2 * BLOCK + 299), st.integers(1, 300))
def test_an_image_has_the_same_bits_in_any_batch(start, count):
    count = min(count, len(WHOLE[1]) - start)
    x, y = EASY.sample(start, count)
    assert torch.equal(x, WHOLE[0][start : start + count])
    assert torch.equal(y, WHOLE[1][start : start + count])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 149), min_size=1, max_size=40))
def test_images_can_be_asked_for_in_any_order_with_repeats(rows):
    x, y = ODD.at([1000 + row for row in rows], "stream")
    assert torch.equal(x, ODD_WHOLE[0][rows])
    assert torch.equal(y, ODD_WHOLE[1][rows])


def test_batches_tile_the_stream_and_a_new_world_resumes_it():
    for size in (1, 7, 64, 100):
        x = torch.cat([EASY.batch(step, size)[0] for step in range(3)])
        assert torch.equal(x, WHOLE[0][: 3 * size])
    again = GlyphWorld.preset("easy16", seed=11)
    assert torch.equal(again.batch(20, 100)[0], WHOLE[0][2000:2100])
    assert torch.equal(copy.deepcopy(EASY).batch(20, 100)[0], WHOLE[0][2000:2100])  # as workers get it


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_a_bit(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(GlyphWorld(17, 3, 5, seed=2, occluders=2).sample(1000, 150)[0], ODD_WHOLE[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_fixed_set_with_any_number_of_workers(workers):
    x, y = EASY.fixed(200, seed=3).tensors
    batches = list(DataLoader(EASY.dataset("train", 200, seed=3), batch_size=48, num_workers=workers))
    assert torch.equal(torch.cat([b[0] for b in batches]), x)
    assert torch.equal(torch.cat([b[1] for b in batches]), y)
    data = EASY.dataset("train", 200, seed=3)
    assert torch.equal(data[-1][0], x[199])
    with pytest.raises(IndexError, match="out of range"):
        data[200]


def test_fixed_sets_are_nested_and_seeds_unrelated():
    small, large = EASY.fixed(100).tensors, EASY.fixed(1500).tensors
    assert torch.equal(small[0], large[0][:100])
    assert torch.equal(small[1], large[1][:100])
    assert not torch.equal(EASY.fixed(100, seed=1).tensors[0], small[0])


def test_splits_sets_and_seeds_never_share_an_image():
    draws = [EASY.sample(0, 500, split)[0] for split in ("train", "validation", "test", "stream")]
    draws += [EASY.sample(0, 500, "train", seed=1)[0], GlyphWorld.preset("easy16", seed=12).sample(0, 500)[0]]
    flat = torch.cat(draws).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    # neither the pixels nor the scene below them repeat: no two images are even close
    distance = torch.cdist(flat, flat).fill_diagonal_(torch.inf)
    assert float(distance.min()) > 0.5


def test_images_are_floats_in_the_unit_interval_of_the_promised_shape():
    for name in PRESETS:
        world = GlyphWorld.preset(name)
        x, y = world.batch(0, 40)
        assert isinstance(world, DataWorld)
        assert x.shape == (40, *world.shape)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert 0 <= float(x.min()) < float(x.max()) <= 1
        assert 0 <= int(y.min()) <= int(y.max()) < world.num_classes


def test_labels_are_uniform():
    counts = torch.bincount(EASY.sample(0, 5000, "test")[1], minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_the_squared_distance_is_that_of_a_densely_sampled_stroke():
    ends = torch.rand(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    line = _pixels(20, torch.device("cpu"))
    ours = _squared_distance(_segment_terms(ends), line).sqrt()
    along = torch.linspace(0, 1, 2001)[:, None]
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).reshape(-1, 2)
    for picture in range(6):
        for stroke in range(4):
            a, b = ends[picture, stroke]
            brute = torch.cdist(pixels, a + along * (b - a)).min(1).values.reshape(20, 20)
            torch.testing.assert_close(ours[picture, stroke], brute, atol=2e-3, rtol=0)


def _color(x):
    """Mean and extreme values of each channel: color and brightness without shape."""
    return torch.cat([x.mean((2, 3)), x.amin((2, 3)), x.amax((2, 3))], dim=1)


def _place(x):
    """Center of mass of what differs from the corner: position without shape."""
    ink = (x - x[:, :, :1, :1]).abs().sum(1)
    ink = ink / ink.sum((1, 2), keepdim=True).clamp(min=1e-9)
    line = torch.linspace(-1, 1, x.shape[-1])
    return torch.stack([(ink.sum(1) * line).sum(1), (ink.sum(2) * line).sum(1)], dim=1)


BARE = {"clutter": 0, "texture": 0.0, "background": 0.0, "noise": 0.0}


def _probe(world, features, n=3000):
    """Test accuracy of a logistic regression on hand-made features."""
    x, y = world.fixed(n).tensors
    xt, yt = world.fixed(n, split="test").tensors
    train, test = features(x), features(xt)
    mean, std = train.mean(0), train.std(0) + 1e-9
    model = LogisticRegression(max_iter=100).fit((train - mean) / std, y)
    return model.score((test - mean) / std, yt)


SPREAD = np.sqrt(0.1 * 0.9 / 3000)


@pytest.mark.parametrize("preset", ["easy16", "standard32"])
def test_color_and_brightness_do_not_tell_the_class(preset):
    assert abs(_probe(GlyphWorld.preset(preset, seed=5), _color) - 0.1) < 4 * SPREAD


@pytest.mark.parametrize("alphabet", [0, 1])
def test_position_does_not_tell_the_class_even_where_nothing_hides_it(alphabet):
    bare = GlyphWorld(24, 1, 10, alphabet_seed=alphabet, shift=0.1, **BARE)
    assert _probe(bare, _place) < 0.13 + 4 * SPREAD  # three points above chance: strokes leave the frame
    assert abs(_probe(GlyphWorld.preset("easy16", alphabet_seed=alphabet), _place) - 0.1) < 4 * SPREAD


def test_factors_are_independent_of_the_class():
    _, y, factors = GlyphWorld(16, 3, 4, seed=3).sample(0, 4000, return_factors=True)
    for name in ("rotation", "scale", "aspect", "shear", "width", "contrast", "texture", "clutter_count"):
        groups = [factors[name][y == k].double().numpy() for k in range(4)]
        assert stats.kruskal(*groups).pvalue > 1e-4, name
    for name in ("center", "foreground", "background"):
        for column in factors[name].T:
            assert stats.kruskal(*[column[y == k].numpy() for k in range(4)]).pvalue > 1e-4, name


def test_factors_describe_the_image():
    world = GlyphWorld(48, 3, 10, seed=1, clutter=0, texture=0, noise=0, background=0, width=(0.1, 0.1))
    x, _, factors = world.sample(0, 50, return_factors=True)
    parts = factors["part_mask"]
    background = factors["background"][..., None, None].expand_as(x)
    foreground = factors["foreground"][..., None, None].expand_as(x)
    between = (x - background).abs() <= (foreground - background).abs() + 1e-5
    assert bool(between.all())
    nearer = ((x - foreground).norm(dim=1) < (x - background).norm(dim=1)) == (parts > 0)
    assert bool(nearer.all())
    strokes = torch.tensor([len(part.unique()) - 1 for part in parts])
    assert torch.equal(strokes, world.alphabet_lengths[factors["true_label"]])
    assert float(factors["rotation"].abs().max()) <= np.deg2rad(20)
    torch.testing.assert_close(factors["half_width"], factors["width"] * factors["scale"])
    assert torch.equal(world.sample(0, 50)[0], x)


def test_turning_off_one_nuisance_keeps_the_rest_of_the_scene():
    plain = GlyphWorld(seed=4, clutter=0).sample(0, 30, return_factors=True)
    busy = GlyphWorld(seed=4, clutter=6, noise=0.2, rotation=20).sample(0, 30, return_factors=True)
    assert torch.equal(plain[1], busy[1])
    for name in ("rotation", "center", "foreground", "field"):
        assert torch.equal(plain[2][name], busy[2][name])


def test_occluders_hide_strokes_and_their_place_in_the_part_mask():
    world = GlyphWorld(32, 3, seed=4, occluders=1, noise=0)
    x, _, factors = world.sample(0, 20, return_factors=True)
    line = _pixels(32, torch.device("cpu"))
    left, top, right, bottom = factors["occluder"][0, 0]
    inside = ((line >= top) & (line <= bottom))[:, None] & ((line >= left) & (line <= right))
    assert int(factors["part_mask"][0][inside].sum()) == 0
    torch.testing.assert_close(x[0][:, inside], factors["occluder_color"][0, 0][:, None].expand(3, int(inside.sum())))


@pytest.mark.parametrize(
    ("cue", "channels", "features", "accuracy"), [("color", 3, _color, 0.4), ("position", 1, _place, 0.75)]
)
def test_the_spurious_cue_agrees_with_the_label_as_often_as_asked(cue, channels, features, accuracy):
    world = GlyphWorld(16, channels, 5, seed=6, spurious=0.8, spurious_cue=cue, **BARE)
    _, y, factors = world.sample(0, 4000, return_factors=True)
    agrees = int((factors["cue"] == y).sum())
    assert stats.binomtest(agrees, 4000, 0.8).pvalue > 1e-3
    others = torch.bincount((factors["cue"] - y)[factors["cue"] != y] % 5, minlength=5)[1:]
    assert stats.chisquare(others.numpy()).pvalue > 1e-3
    assert accuracy < _probe(world, features) < 0.84  # it is there in the pixels


def test_a_cue_that_agrees_by_chance_says_nothing():
    assert abs(_probe(GlyphWorld(16, 3, 5, seed=6, spurious=0.2), _color) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 3000)


def test_label_noise_has_the_stated_rate_and_is_symmetric():
    _, y, factors = GlyphWorld(16, 1, 4, label_noise=0.3).sample(0, 5000, "test", return_factors=True)
    wrong = y != factors["true_label"]
    assert stats.binomtest(int(wrong.sum()), 5000, 0.3).pvalue > 1e-3
    moves = torch.bincount((y - factors["true_label"])[wrong] % 4, minlength=4)[1:]
    assert stats.chisquare(moves.numpy()).pvalue > 1e-3


def test_imbalance_is_the_ratio_of_first_to_last_class_with_geometric_frequencies():
    counts = torch.bincount(GlyphWorld(16, 1, 3, imbalance=16.0).sample(0, 6300)[1], minlength=3).numpy()
    assert stats.chisquare(counts, np.array([16, 4, 1]) * 300).pvalue > 1e-3


def test_classes_of_an_alphabet_differ_and_alphabets_share_none():
    for seed in range(5):
        assert make_alphabet(10, seed=seed).likeness <= 0.45
    pictures = []
    for seed in range(8):
        alphabet = make_alphabet(10, seed=seed)
        pictures += [raster(alphabet.vertices[k], alphabet.segments[k, : alphabet.lengths[k]]) for k in range(10)]
    likeness = np.array(pictures) @ np.array(pictures).T
    np.fill_diagonal(likeness, -1)
    assert likeness.max() < 0.98


def test_more_classes_extend_an_alphabet_and_wide_rotations_are_taken_into_account():
    few, many = make_alphabet(5, seed=3), make_alphabet(12, seed=3)
    np.testing.assert_array_equal(few.vertices, many.vertices[:5])
    turned = make_alphabet(4, seed=0, rotation=180.0)
    pictures = [raster(turned.vertices[k], turned.segments[k, : turned.lengths[k]]) for k in range(4)]
    for k in range(4):
        for angle in np.deg2rad(np.arange(-180, 181, 15)):
            picture = raster(turned.vertices[k], turned.segments[k, : turned.lengths[k]], turn=angle)
            assert max(float(picture @ pictures[other]) for other in range(4) if other != k) < 0.55


def test_strokes_are_centered_on_their_ink_and_fill_the_unit_box():
    alphabet = make_alphabet(10, seed=0)
    for k in range(10):
        ends = 0.8 * alphabet.vertices[k][alphabet.segments[k, : alphabet.lengths[k]]]  # inside the frame
        drawn = _squared_distance(
            _segment_terms(torch.from_numpy(ends)[None]).float(), _pixels(64, torch.device("cpu"))
        )
        rows, columns = torch.nonzero(drawn.amin(1)[0] < 0.1**2, as_tuple=True)
        assert abs(float(rows.double().mean()) - 31.5) < 1.5  # a twentieth of the half-frame, in 64 pixels
        assert abs(float(columns.double().mean()) - 31.5) < 1.5
        assert np.abs(alphabet.vertices[k]).max() == pytest.approx(1)


def _train(model, world, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = world.batch(step, 64)
        loss = nn.functional.cross_entropy(model(2 * x - 1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, y = world.fixed(2000, split="test").tensors
    with torch.no_grad():
        return float((model.eval()(2 * x - 1).argmax(1) != y).float().mean())


def test_the_task_needs_shape_and_can_be_learned():
    world = GlyphWorld.preset("easy16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
        mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    assert _train(linear, world, 200) > 0.6  # strokes are as often dark as bright
    assert 0.02 < _train(mlp, world, 600) < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "size must be a whole number of at least 16 and at most 64, not 8"),
        ({"size": 20.0}, "size must be a whole number"),
        ({"channels": 2}, "channels must be 1 .gray. or 3"),
        ({"num_classes": 1}, "num_classes must be a whole number of at least 2 and at most 64"),
        ({"rotation": -5}, "rotation must be a finite number of at least 0"),
        ({"noise": float("nan")}, "noise must be a finite number"),
        ({"scale": 0.8}, "scale must be a pair"),
        ({"scale": (1.0, 0.5)}, "smallest, largest"),
        ({"label_noise": 1.5}, "label_noise must be a finite number of at least 0 and at most 1"),
        ({"imbalance": 0.5}, "imbalance must be a finite number of at least 1"),
        ({"spurious_cue": "size"}, "one of 'color', 'position'"),
        ({"spurious": 0.5, "channels": 1}, "needs channels=3"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_settings_that_make_no_sense_get_one_sentence(settings, message):
    with pytest.raises(InvalidInput, match=message):
        GlyphWorld(**settings)


def test_bad_requests_get_one_sentence():
    with pytest.raises(UnknownName, match="'easy16', 'standard32'"):
        GlyphWorld.preset("easy")
    with pytest.raises(UnknownName, match="'train', 'validation', 'test', 'stream'"):
        EASY.batch(0, 4, split="eval")
    with pytest.raises(InvalidInput, match="count must be a whole number of at least 1, not 0"):
        EASY.batch(0, 0)
    with pytest.raises(InvalidInput, match="start must be a whole number of at least 0"):
        EASY.sample(-1, 3)
    with pytest.raises(InvalidInput, match="integers from 0"):
        EASY.at([], "train")
    with pytest.raises(UnknownName, match=r"split must be one of .* not 'dev'"):
        GlyphDataset(EASY, "dev", 5)


def test_the_cache_is_bounded_and_the_global_generator_untouched():
    world = GlyphWorld(16, 1, 2, noise=0)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for block in range(70):
        world.sample(block * BLOCK, 1)
    assert torch.equal(torch.rand(1), expected)
    assert len(world._blocks) == 64
