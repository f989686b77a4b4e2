"""Localization of tokens against CKA of each pair by itself, and probes against the probe of all layers."""

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.measure import LayerTap, TokenGrid, cka, layer_probes, token_localization, token_probes
from mlcollage.nn import ViT, build


def test_maps_are_the_cka_of_each_pair():
    model = build(lambda: ViT((1, 6, 4), 3, patch_size=2, dim=8, depth=1, heads=2), 0)
    x = torch.rand(40, 1, 6, 4)
    found = token_localization(model, "block1", x)
    with torch.no_grad(), LayerTap(model, "block1") as tap:
        model.eval()(x)
    assert found.maps.shape == (7, 3, 2)
    for token, (row, column) in ((0, (1, 0)), (3, (1, 0)), (6, (0, 1))):
        patch = x[:, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        assert found.maps[token, row, column] == pytest.approx(cka(tap["block1"][:, token], patch), abs=1e-5)
    own = found.cka.matrix[1:]
    here = np.diagonal(own)
    assert found.score == pytest.approx((here - (own.sum(1) - here) / 5).mean())
    assert found.rank_one == (own.argmax(1) == np.arange(6)).mean() == 1.0
    assert np.isnan(found.ci).all()
    assert found.plot(token=0).images[0].get_array().shape == (3, 2)


def test_intervals_hold_the_score_and_feature_maps_are_pooled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    x = torch.rand(128, 1, 8, 8)
    found = token_localization(model, "1", x, where=TokenGrid((2, 2), (4.0, 4.0), 1), batch_size=32)
    low, high = found.ci
    assert low < found.score < high
    assert found.maps.shape == (4, 2, 2)  # feature maps have no prefix tokens
    assert found.rank_one == 1.0
    shuffled = token_localization(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Upsample(8)),
        "2",
        x,
        where=TokenGrid((2, 2)),
    )
    assert abs(shuffled.score) < 1e-5  # all places are the same


def test_empty_corners_are_left_out_and_grids_that_do_not_fit_refused():
    model = build(lambda: ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=1, heads=2), 0)
    x = torch.rand(32, 1, 8, 8)
    x[:, :, :4, :4] = 0
    found = token_localization(model, "block1", x)
    assert np.isnan(found.maps[:, 0, 0]).all()
    assert np.isfinite(found.score)
    with pytest.raises(InvalidInput, match="do not tile images of 8 x 8"):
        token_localization(model, "block1", x, where=TokenGrid((3, 3)))
    with pytest.raises(InvalidInput, match="is not 2 x 4 = 8"):
        token_localization(model, "block1", x, where=TokenGrid((2, 4), prefix=1))
    with pytest.raises(InvalidInput, match="neither tokens nor feature maps"):
        token_localization(model, "head", x)


def test_token_probes_read_what_they_say():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(90) % 3
    h = torch.randn(90, 5, 4, generator=g)
    h[:, 2] += 6 * torch.eye(4)[y]
    train, test = {"a": h[:60]}, {"a": h[60:]}
    each = [h[:, t] for t in (1, 2, 3, 4)]
    for read, parts in (("class", [h[:, 0]]), ("pooled", [h[:, 1:].mean(1)]), ("each", each)):
        truth = np.mean([layer_probes({"": p[:60]}, y[:60], {"": p[60:]}, y[60:])[""] for p in parts])
        assert token_probes(train, y[:60], test, y[60:], read=read)["a"] == pytest.approx(truth)
    assert token_probes(train, y[:60], test, y[60:], read="each", prefix=2)["a"] > 0.5
    with pytest.raises(InvalidInput, match="expected tokens"):
        token_probes({"a": h[:60, 0]}, y[:60], test, y[60:])
    with pytest.raises(InvalidInput, match="at least 1"):
        token_probes(train, y[:60], test, y[60:], read="class", prefix=0)


def test_a_layer_whose_units_cannot_be_told_is_asked_about():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Identity()

        def forward(self, x):
            return self.out(
                x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).permute(0, 2, 3, 1, 4).flatten(1, 2).flatten(2)
            )

    where, x = TokenGrid((2, 2), (4.0, 4.0)), torch.rand(24, 2, 8, 8)
    with pytest.raises(InvalidInput, match="cannot be told from the model"):
        token_localization(Cut(), "out", x, where=where)
    found = token_localization(Cut(), "out", x, where=where, unit_axis=-1)
    assert found.rank_one == 1.0
    np.testing.assert_allclose(np.diagonal(found.cka.matrix), 1, atol=1e-5)  # each token is its patch
