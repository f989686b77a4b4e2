"""What a user meets beside the usual way: each case works, or is refused in one sentence."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, MissingFile, UnknownName
from mlcollage.measure import AttentionTap, TokenGrid, attention_distance, map_distance, token_localization
from mlcollage.nn import ViT, build
from mlcollage.papers.vit_vs_cnn import compare, load_weights


def network():
    return build(lambda: ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=2, heads=2), 0)


def images(n):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_one_batch_has_a_value_without_an_interval_and_without_a_warning_of_numpy():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(network(), network(), images(32), batch_size=32).uniformity("a")
    assert np.isfinite(found.value)
    assert np.isnan([found.low, found.high]).all()


def test_data_of_copies_alone_is_told_as_such():
    with pytest.raises(InvalidInput, match="had 1 and 15 copies of them"):
        compare(network(), network(), images(1).expand(16, -1, -1, -1), batch_size=16)


def test_a_layer_that_is_written_wrongly_gets_the_closest_ones():
    with pytest.raises(UnknownName, match="did you mean 'block"):
        compare(network(), network(), images(16), layers_a="blok1")


def test_no_folder_to_save_in(tmp_path):
    found = compare(network(), network(), images(16), batch_size=8)
    with pytest.raises(MissingFile, match="no folder"):
        found.save(tmp_path / "none" / "maps.npz")


def test_too_few_images_for_a_localization():
    with pytest.raises(InvalidInput, match="3 images were given"):
        token_localization(network(), "block1", images(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, r"pass state\['state_dict'\]"),
        (lambda s: {**s, "head.bias": torch.full((3,), torch.nan)}, "'head.bias' holds NaN"),
        (lambda s: list(s), "a mapping from names to tensors"),
    ],
)
def test_checkpoints_that_would_spoil_a_network_are_refused(change, message):
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=message):
        load_weights(model, change(network().state_dict()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("missing", ["head.", ("head.",), ("head.*",)])
def test_what_may_be_missing_is_a_prefix_or_a_pattern(missing):
    state = {k: v for k, v in network().state_dict().items() if not k.startswith("head.")}
    assert load_weights(network(), state, missing=missing) == len(state)


class Windows(nn.Module):
    """Attention in windows of 2 x 2 tokens of a 4 x 4 grid, shifted by one, masked as Swin transformers do."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(2, 1, batch_first=True)
        nn.init.zeros_(self.attn.in_proj_weight)  # uniform within what the mask allows

    def forward(self, x):  # (n, 4, 4, 2)
        n = len(x)
        shifted = x.roll((-1, -1), (1, 2))
        tokens = shifted.view(n, 2, 2, 2, 2, 2).transpose(2, 3).reshape(n * 4, 4, 2)
        region = torch.tensor([0, 0, 0, 1])  # of a row or column after the shift
        region = (2 * region[:, None] + region).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
        mask = (region[:, :, None] != region[:, None, :]).float() * -100  # (windows, 4, 4)
        return self.attn(tokens, tokens, tokens, attn_mask=mask.repeat(n, 1, 1))[0]


def test_windows_are_refused_and_what_the_sentence_advises_is_exact():
    model, x = build(Windows, 0).eval(), torch.ones(3, 4, 4, 2)
    with pytest.raises(InvalidInput, match=r"4 windows of 4 tokens for each image.*TokenGrid\(\(2, 2\), pitch\)"):
        attention_distance(model, x)
    with pytest.raises(InvalidInput, match="4 windows of 4 tokens"):
        attention_distance(model, x, where=TokenGrid((4, 4), (4.0, 4.0)))
    with torch.no_grad(), AttentionTap(model) as tap:
        model(x)
    found = map_distance(tap["attn"], TokenGrid((2, 2), (4.0, 4.0))).reshape(3, 4).mean(1)
    # By brute force over the 16 places of the image: each token attends to its window's tokens of its own region.
    row, column = np.divmod(np.arange(16), 4)
    shifted = [(v - 1) % 4 for v in (row, column)]
    window = [v // 2 for v in shifted]
    region = [(v == 3).astype(int) for v in shifted]
    same = np.ones((16, 16), bool)
    for v in (*window, *region):
        same &= v[:, None] == v
    distance = 4 * np.hypot(row[:, None] - row, column[:, None] - column)
    expected = ((same * distance).sum(1) / same.sum(1)).mean()
    assert expected == pytest.approx(1.853553, abs=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-6)
