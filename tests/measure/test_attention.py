"""Attention maps of models that know nothing of it, and distances against public code and closed forms."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure import AttentionTap, TokenGrid, attention_distance, map_distance, token_grid
from mlcollage.nn import ViT, build

ORACLE = Path(__file__).parent / "oracles" / "attention" / "attention_distance.npz"
CASES = ("cls", "no_prefix", "heavy_cls", "local_uniform_far_identity", "one_patch")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture(scope="module")
def official():
    with np.load(ORACLE) as file:
        return dict(file)


def place(official, case):
    rows, columns = (int(n) for n in np.broadcast_to(official[f"{case}_grid"], 2))
    step = float(np.ravel(official[f"{case}_patch_size"])[0])
    return TokenGrid((rows, columns), (step, step), int(official[f"{case}_n_prefix"]))


def uniform(tokens, images=1):
    return np.full((images, 1, tokens, tokens), 1 / tokens)


def distances(pitch, rows, columns):
    r = np.array([(i * pitch, j * pitch) for i in range(rows) for j in range(columns)], float)
    return np.sqrt(((r[:, None] - r[None]) ** 2).sum(-1))


# Distances ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_distance_equals_public_code(official, case):
    where, a = place(official, case), official[f"{case}_attention"]
    np.testing.assert_allclose(map_distance(a, where), official[f"{case}_distance"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        map_distance(torch.from_numpy(a), where, renormalize=True),
        official[f"{case}_distance_renormalised"],
        rtol=0,
        atol=1e-12,
    )
    np.testing.assert_allclose(where.distances, official[f"{case}_distance_matrix"], atol=1e-12)


def test_prefix_tokens_hold_mass_at_distance_zero():
    for tokens, raw in ((17, 13.229275), (21, 10.709413)):
        where = TokenGrid((4, 4), (7.0, 7.0), tokens - 16)
        assert map_distance(uniform(tokens), where).item() == pytest.approx(raw, abs=1e-6)
        assert map_distance(uniform(tokens), where, renormalize=True).item() == pytest.approx(14.056105, abs=1e-6)


def test_pitch_is_the_stride_and_grids_need_not_be_square():
    assert map_distance(uniform(15), TokenGrid((3, 5), (10.0, 10.0))).item() == pytest.approx(20.397908, abs=1e-6)
    a = np.zeros((1, 1, 16, 16))
    a[0, 0, np.arange(16), np.minimum(np.arange(16) + 1, 15)] = 1  # each looks at the next, the last at itself
    for grid, truth in (((2, 8), 21.071068), ((8, 2), 17.899495), ((4, 4), 21.486833)):
        assert map_distance(a, TokenGrid(grid, (16.0, 16.0))).item() == pytest.approx(truth, abs=1e-6)
    tall = map_distance(uniform(6), TokenGrid((3, 2), (2.0, 5.0))).item()
    r = np.array([(2.0 * i, 5.0 * j) for i in range(3) for j in range(2)])
    assert tall == pytest.approx(np.sqrt(((r[:, None] - r[None]) ** 2).sum(-1)).mean(), abs=1e-12)


def test_padded_queries_are_in_no_mean():
    a = np.zeros((1, 1, 16, 16))
    a[..., :8] = 1 / 8  # attention to the upper two rows
    where, valid = TokenGrid((4, 4), (16.0, 16.0)), np.arange(16)[None] < 8
    assert map_distance(a, where).item() == pytest.approx(32.128240, abs=1e-6)
    assert map_distance(a, where, valid=valid).item() == pytest.approx(23.877054, abs=1e-6)


class OneLayer(nn.Module):
    """Attention with a mask, on tokens that are the image's pixels."""

    def __init__(self, mask=None, heads=2):
        super().__init__()
        self.mask, self.heads = mask, heads

    def forward(self, x):
        b = len(x)
        h = x.flatten(2).transpose(1, 2).reshape(b, -1, self.heads, 3).transpose(1, 2)  # (b, heads, T, 3)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=self.mask)


def shifted_windows(wrap=False):
    """4 x 4 tokens, windows of 2 after a cyclic shift of 1: which pairs share a window, perhaps by wrapping round."""
    row, column = (k + 1 for k in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    if wrap:
        row, column = row % 4, column % 4
    region = (row // 2 * 3 + column // 2).flatten()
    return region[:, None] == region[None, :]


def test_masks_are_part_of_the_map():
    allowed = shifted_windows()
    model = OneLayer(allowed)
    x = torch.zeros(1, 6, 4, 4)  # equal logits: uniform within what is allowed
    where = TokenGrid((4, 4), (4.0, 4.0))
    found = attention_distance(model, x, where=where)
    assert found.matrix[0, 0] == pytest.approx(1.853553, abs=1e-6)
    wrapped = shifted_windows(wrap=True)
    additive = torch.zeros(16, 16).masked_fill(~allowed, -math.inf)
    assert attention_distance(OneLayer(additive), x, where=where).matrix[0, 0] == pytest.approx(1.853553, abs=1e-6)
    assert attention_distance(OneLayer(wrapped), x, where=where).matrix[0, 0] == pytest.approx(6.995352, abs=1e-6)


def test_distance_without_the_maps_equals_that_of_the_maps():
    torch.manual_seed(0)
    model = build(lambda: ViT((1, 12, 20), 3, patch_size=4, dim=16, depth=2, fused=True), 0).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # heads that are not uniform
    x = torch.rand(
        5, 1, 12, 20, dtype=torch.float64
    )  # rounding of sharp heads is no matter of how distances are summed
    where = token_grid(model)
    assert where == TokenGrid((3, 5), (4.0, 4.0), 1)
    with torch.no_grad(), AttentionTap(model.eval()) as tap:
        model(x)
    whole = attention_distance(model, x)
    parts = attention_distance(model, x, chunk=3, batch_size=2)
    squared = attention_distance(model, x, moment=2, batch_size=2)
    d = distances(4, 3, 5)
    for name, a in tap.items():
        a = a.double().numpy()
        truth = (a[:, :, 1:, 1:] * d).sum(-1).mean(-1)
        np.testing.assert_allclose(whole.per_image[name], truth, rtol=1e-6)
        np.testing.assert_allclose(parts.per_image[name], truth, rtol=1e-6)
        np.testing.assert_allclose(squared.per_image[name], (a[:, :, 1:, 1:] * d**2).sum(-1).mean(-1), rtol=1e-5)
        np.testing.assert_allclose(whole.prefix_mass[name], a[:, :, 1:, 0].mean((0, 2)), rtol=1e-5)
        np.testing.assert_allclose(whole.sd[list(tap).index(name)], truth.std(0, ddof=1), rtol=1e-5)
    again = attention_distance(model, x, renormalize=True, moment=2)
    a = next(iter(tap.values())).double().numpy()[:, :, 1:, 1:]
    a /= a.sum(-1, keepdims=True)
    np.testing.assert_allclose(again.per_image["block1.attn"], (a * d**2).sum(-1).mean(-1), rtol=1e-5)


def test_a_mode_of_training_is_put_back_and_the_frame_is_tidy():
    model = build(lambda: ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=2, heads=2), 0).train()
    found = attention_distance(model, torch.rand(4, 1, 8, 8))
    assert model.training
    assert all(m.training for m in model.modules())
    table = found.to_dataframe()
    assert list(table.columns) == ["layer", "block", "head", "distance", "sd", "prefix_mass"]
    assert len(table) == 4
    assert table["distance"].iloc[3] == found.matrix[1, 1]
    axes = found.plot()
    assert len(axes.lines) == 3
    assert axes.get_ylabel().endswith("(pixels)")
    assert found.uniform == pytest.approx(distances(4, 2, 2).mean() * 4 / 5)


# Maps --------------------------------------------------------------------------------------------------------------


def check_maps(tap, names, shape):
    assert list(tap) == names
    for a in tap.values():
        assert tuple(a.shape) == shape
        torch.testing.assert_close(a.sum(-1), torch.ones(shape[:-1], dtype=a.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention(batch_first, need_weights):
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool) if batch_first else torch.zeros(5, 3, dtype=torch.bool)
    mask[0, -1] = True

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = layer

        def forward(self, x):
            return self.attn(x, x, x, need_weights=need_weights, key_padding_mask=mask)[0]

    net, batch = Net(), 3 if batch_first else 5
    with torch.no_grad():
        plain = net(x)
        with AttentionTap(net) as tap:
            tapped = net(x)
        truth = layer(x, x, x, key_padding_mask=mask, average_attn_weights=False)[1]
    tokens = 5 if batch_first else 3
    check_maps(tap, ["attn"], (batch, 2, tokens, tokens))
    torch.testing.assert_close(tap["attn"], truth)
    assert tap["attn"][0, :, :, -1].abs().max() == 0
    torch.testing.assert_close(tapped, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_in_evaluation_with_padding(norm_first):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()
    x, mask = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 4:] = True
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=mask)
        with AttentionTap(encoder) as tap:
            tapped = encoder(x, src_key_padding_mask=mask)
    check_maps(tap, [f"layers.{i}.self_attn" for i in range(3)], (4, 2, 6, 6))
    assert tap["layers.0.self_attn"][1, :, :, 4:].abs().max() == 0
    torch.testing.assert_close(tapped[~mask], plain[~mask], rtol=1e-5, atol=1e-5)


def hugging_face(kind, implementation):
    torch.manual_seed(3)
    if kind == "vit":
        config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_channels=1)
        return transformers.ViTModel._from_config(config, attn_implementation=implementation), {
            "pixel_values": torch.rand(3, 1, 16, 16)
        }
    ids = {
        "input_ids": torch.arange(15).reshape(3, 5),
        "attention_mask": torch.tensor([[1] * 5, [1] * 5, [1, 1, 1, 0, 0]]),
    }
    if kind == "bert":
        config = transformers.BertConfig(**SMALL, vocab_size=30)
        return transformers.BertModel._from_config(config, attn_implementation=implementation), ids
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=30, n_positions=8)
    return transformers.GPT2Model._from_config(config, attn_implementation=implementation), ids


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_hugging_face(kind, implementation):
    model, batch = hugging_face(kind, implementation)
    reference, _ = hugging_face(kind, "eager")
    model.eval(), reference.eval()
    with torch.no_grad():
        plain = model(**batch).last_hidden_state
        truth = reference(**batch, output_attentions=True).attentions
        with AttentionTap(model) as tap:
            tapped = model(**batch).last_hidden_state
    assert len(tap) == len(truth) == 2
    assert not tap.missing
    assert torch.equal(tapped, plain)
    for a, b in zip(tap.values(), truth, strict=True):
        real = a.sum(-1) > 0
        torch.testing.assert_close(a.sum(-1)[real], torch.ones_like(a.sum(-1)[real]), rtol=0, atol=1e-5)
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
    if kind == "vit":
        assert token_grid(model) == TokenGrid((4, 4), (4.0, 4.0), 1)
        found = attention_distance(model, batch["pixel_values"])
        where = token_grid(model)
        np.testing.assert_allclose(found.matrix[0], map_distance(truth[0], where).mean(0), rtol=1e-5)


def test_own_vit_in_both_forms():
    for fused in (False, True):
        model = build(lambda fused=fused: ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=3, heads=2, fused=fused), 0)
        x = torch.rand(2, 1, 8, 8)
        with torch.no_grad(), AttentionTap(model.eval()) as tap:
            out = model(x)
        check_maps(tap, [f"block{i}.attn" for i in (1, 2, 3)], (2, 2, 5, 5))
        _, acts = model(x, activations=True)
        torch.testing.assert_close(tap["block2.attn"], acts["block2.attn.weights"].detach())
        assert torch.equal(out, model(x))


def test_causal_scaled_and_grouped_heads():
    q, k, v = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3)

    class Net(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    with AttentionTap(Net()) as tap:
        out = tap.model(q)
    (a,) = tap.values()
    assert a.shape == (2, 4, 5, 5)
    assert a.triu(1).abs().max() == 0
    torch.testing.assert_close(a @ v.repeat_interleave(2, 1), out)


def test_rows_that_are_masked_altogether_are_zero_and_counted():
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[3] = False
    model = OneLayer(mask)
    with AttentionTap(model) as tap:
        model(torch.zeros(2, 6, 4, 4))
    (a,) = tap.values()
    assert a[:, :, 3].abs().max() == 0
    assert not a.isnan().any()
    assert tap.empty_rows == {"": 4}  # two images, two heads
    found = attention_distance(model, torch.zeros(2, 6, 4, 4), where=TokenGrid((4, 4)))
    d = distances(1, 4, 4)
    assert found.matrix[0, 0] == pytest.approx(np.delete(d, 3, 0).mean())
    assert found.empty_rows == {"": 4}


class Handmade(nn.Module):
    """Softmax attention written out, with and without what people do to its weights on the way."""

    def __init__(self, way):
        super().__init__()
        self.way, self.drop = way, nn.Dropout(0.1)

    def forward(self, x):
        s = x @ x.transpose(-2, -1)
        if self.way == "einsum":
            return torch.einsum("bij,bjd->bid", F.softmax(s, dim=-1), x)
        if self.way == "bmm":
            return torch.bmm(self.drop(torch.softmax(s, -1)), x)
        if self.way == "columns":  # over queries: no attention
            return s.softmax(1) @ x
        return self.drop(s.softmax(dim=2).to(x.dtype)).contiguous() @ x


@pytest.mark.parametrize("way", ["einsum", "bmm", "matmul"])
def test_softmax_by_hand(way):
    x = torch.randn(2, 5, 4)
    with AttentionTap(Handmade(way).eval()) as tap:
        tap.model(x)
    (a,) = tap.values()
    torch.testing.assert_close(a, (x @ x.transpose(1, 2)).softmax(-1))


def test_a_model_without_attention_is_refused():
    with (
        pytest.raises(InvalidInput, match="no attention module of Linear gave a map"),
        AttentionTap(nn.Linear(2, 2)) as t,
    ):
        t.model(torch.ones(1, 2))
    with pytest.raises(InvalidInput, match="gave a map"), AttentionTap(Handmade("columns")) as t:
        t.model(torch.ones(1, 3, 2))


class LinearAttention(nn.Module):
    def forward(self, x):
        return F.elu(x) @ (F.elu(x).transpose(1, 2) @ x)


def test_modules_without_maps_are_named():
    class MyAttention(Handmade):
        pass

    net = nn.Sequential(MyAttention("bmm"), LinearAttention())
    with (
        pytest.warns(UserWarning, match=r"1 of 2 attention modules gave no map \(1\)"),
        AttentionTap(net.eval()) as tap,
    ):
        net(torch.randn(1, 3, 2))
    assert tap.missing == ("1",)
    with (
        pytest.raises(InvalidInput, match="0 of 1 attention modules"),
        AttentionTap(nn.Sequential(LinearAttention())) as t,
    ):
        t.model(torch.randn(1, 3, 2))


def test_module_called_twice_second_pass_and_consume():
    attn = Handmade("bmm").eval()
    net = nn.Sequential(attn, attn)
    seen = []
    with AttentionTap(net, consume=lambda name, a: seen.append((name, tuple(a.shape)))) as tap:
        net(torch.randn(1, 3, 2))
        net(torch.randn(2, 4, 2))
    assert seen == [("0", (1, 3, 3)), ("0#1", (1, 3, 3)), ("0", (2, 4, 4)), ("0#1", (2, 4, 4))]
    assert not tap
    with pytest.raises(UnknownName, match="run the model while the tap is open"):
        tap["0"]
    assert not attn._forward_hooks
    assert not net._forward_pre_hooks


def test_checkpointing_does_not_repeat_maps():
    attn = Handmade("bmm").eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attn

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.attn, x, use_reentrant=False)

    x = torch.randn(2, 3, 4, requires_grad=True)
    with AttentionTap(Net()) as tap:
        tap.model(x).sum().backward()
    assert list(tap) == ["attn"]


def test_half_precision_maps_are_made_in_float32():
    model = OneLayer().half()
    x = (torch.randn(1, 6, 4, 4) * 4).half()
    with AttentionTap(model) as tap:
        model(x)
    (a,) = tap.values()
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.sum(-1), torch.ones(1, 2, 16), rtol=0, atol=1e-6)


# Grids -------------------------------------------------------------------------------------------------------------


def test_grids_are_read_and_never_inferred_from_a_count():
    assert token_grid(ViT((1, 12, 8), 2, patch_size=4, pool="mean")) == TokenGrid((3, 2), (4.0, 4.0), 0)
    with pytest.raises(InvalidInput, match="does not say how its patches lie"):
        token_grid(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="give pitch"):
        token_grid(nn.Linear(2, 2), grid=(2, 2))
    with pytest.raises(InvalidInput, match="give prefix"):
        token_grid(nn.Linear(2, 2), grid=(2, 2), pitch=4)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, num_register_tokens=4
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    assert token_grid(model).prefix == 5
    with pytest.raises(InvalidInput, match="prefix=1, but Dinov2WithRegistersModel says that it has 5"):
        token_grid(model, prefix=1)
    found = attention_distance(model, torch.rand(2, 3, 16, 16))
    assert found.where == TokenGrid((4, 4), (4.0, 4.0), 5)
    config = transformers.DeiTConfig(**SMALL, image_size=16, patch_size=4, num_channels=1)
    assert token_grid(transformers.DeiTModel(config)).prefix == 2


def test_wrong_grids_windows_and_rows_are_refused():
    where = TokenGrid((14, 14), (16.0, 16.0), 1)
    with pytest.raises(InvalidInput, match=r"T - prefix = 197 is not 14 x 14 = 196"):
        map_distance(uniform(198), where)
    with pytest.raises(InvalidInput, match=r"expected \(images, heads, tokens, tokens\)"):
        map_distance(np.ones((2, 3, 4)), where)
    with pytest.raises(InvalidInput, match="not to 1"):
        map_distance(np.ones((1, 1, 4, 4)), TokenGrid((2, 2)))
    with pytest.raises(InvalidInput, match="valid has 3 places"):
        map_distance(uniform(4), TokenGrid((2, 2)), valid=np.ones((1, 3)))

    class Windows(nn.Module):
        def forward(self, x):
            h = x.reshape(-1, 1, 4, 2)  # windows of four tokens
            return F.scaled_dot_product_attention(h, h, h)

    with pytest.raises(InvalidInput, match="4 windows of 4 tokens for each image"):
        attention_distance(Windows(), torch.rand(2, 2, 4, 4), where=TokenGrid((4, 4)))
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_channels=1
    )
    with pytest.raises(InvalidInput, match="16 windows of 4 tokens for each image"):
        attention_distance(transformers.SwinModel(config), torch.rand(2, 1, 16, 16), where=TokenGrid((8, 8)))


def test_no_warning_for_a_whole_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_distance(ViT((1, 8, 8), 3, patch_size=4, dim=8, depth=1, heads=2), torch.rand(2, 1, 8, 8))
