"""The models of the paper: parameter counts, costs, the official code's logits and gradients, what is refused."""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn import build, check_pixels, load_augreg_npz, model_table, save_augreg_npz
from mlcollage.nn._vit_stem import StdConv, same_padding
from mlcollage.nn.vit import ViT
from mlcollage.nn.vit_models import AUGREG_MODELS, VIT_MODELS, ViTConfig, vit

ORACLES = Path(__file__).parent / "oracles" / "vit"
COUNTS = {
    "R+Ti/16": 6_337_704,
    "Ti/16": 5_717_416,
    "S/32": 22_878_952,
    "S/16": 22_050_664,
    "R26+S/32": 36_431_912,
    "B/32": 88_224_232,
    "B/16": 86_567_656,
    "B/8": 86_576_872,
    "R50+L/32": 328_994_856,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
    "R50+B/16": 98_659_112,
    "R26+B/32": 101_383_976,
}
# Billions of multiply-accumulates as published, which count layer norms and the like too.
GMACS = {"R+Ti/16": 0.44, "Ti/16": 1.26, "S/32": 1.15, "S/16": 4.61, "R26+S/32": 3.56, "B/32": 4.41, "B/16": 17.58}


def oracle(name):
    with np.load(ORACLES / f"{name}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def images(x, dtype):
    return x.permute(0, 3, 1, 2).to(dtype)  # (N, H, W, C) there


def official(case, in_shape, dtype, weights, *, dim, mlp, heads, layers, patch, classes, stem=None, **kwargs):
    model = ViT(
        in_shape,
        classes,
        patch_size=patch,
        dim=dim,
        depth=layers,
        heads=heads,
        mlp_dim=mlp,
        stem=stem,
        stem_width=32,
        gelu="tanh",
        attention_dropout=0.0,
        init="reference",
        **kwargs,
    ).to(dtype)
    load_augreg_npz(model, ORACLES / f"{weights}.npz")
    return model.eval(), oracle(case)


TOKEN = {"dim": 24, "mlp": 40, "heads": 3, "layers": 2, "patch": 4, "classes": 7}
GAP = {"dim": 20, "mlp": 28, "heads": 5, "layers": 2, "patch": 4, "classes": 4, "pool": "mean", "pre_logits": 11}
BIG = {"dim": 16, "mlp": 24, "heads": 2, "patch": 4, "classes": 5}
STEM = {"dim": 18, "mlp": 30, "heads": 3, "layers": 1, "patch": 2, "classes": 6, "stem": (), "crop": True}
BLOCKS = {"dim": 16, "mlp": 24, "heads": 2, "layers": 1, "patch": 1, "classes": 6, "stem": (2, 1)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def close(found, expected, dtype):
    torch.testing.assert_close(found.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", VIT_MODELS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in vit(name).parameters()) == COUNTS[name]
    assert set(AUGREG_MODELS) <= set(VIT_MODELS)


def test_the_table_counts_tokens_and_operations():
    table = model_table(GMACS).set_index("model")
    assert table.loc["R+Ti/16", "tokens"] == 50  # 7 x 7 and the class token: a stride of 32, whatever the name says
    assert table.loc["B/16", "tokens"] == 197
    for name, published in GMACS.items():
        assert table.loc[name, "gmacs"] == pytest.approx(published, rel=0.03)
    n, w = 197, 384
    blocks = 12 * (12 * n * w**2 + 2 * n**2 * w)
    ends = 196 * 768 * 384 + 384 * 1000
    assert table.loc["S/16", "gmacs"] == pytest.approx((blocks + ends) / 1e9, rel=1e-12)
    with pytest.raises(InvalidInput, match="at least one model"):
        model_table([])


@both
@pytest.mark.parametrize("fused", [False, True])
def test_class_token_model_equals_the_official_one(dtype, fused):
    model, found = official("vit_token_io", (3, 20, 24), dtype, "vit_token_released", **TOKEN, fused=fused)
    logits = model(images(found["x"], dtype))
    close(logits, found["logits"], dtype)
    _, acts = model(images(found["x"], dtype), activations=True)
    close(acts["norm"], found["tokens"], dtype)
    close(acts["pool"], found["pre_logits"], dtype)
    loss = F.cross_entropy(logits, found["soft_labels"].to(dtype))
    close(loss, found["softmax_loss"], dtype)
    loss.backward()
    gradients_agree(model, {k[5:]: v for k, v in found.items() if k.startswith("grad/")}, dtype)


def gradients_agree(model, expected, dtype):
    """Gradients written into a copy's parameters and exported under the official names."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    with tempfile.TemporaryDirectory() as folder, np.load(save_augreg_npz(model, f"{folder}/g.npz")) as file:
        for key, value in expected.items():
            close(torch.from_numpy(file[key]).reshape(value.shape), value, dtype)


class Fixed(torch.nn.Module):
    """Dropout whose masks are given, one for each call."""

    def __init__(self, rate, *masks):
        super().__init__()
        self.rate, self.masks = rate, list(masks)

    def forward(self, x):
        return x * self.masks.pop(0).to(x.dtype) / (1 - self.rate)


def test_dropout_stands_where_the_official_code_has_it():
    model, found = official("vit_token_io", (3, 20, 24), torch.float64, "vit_token_released", **TOKEN)
    rate = float(found["drop_rate"])
    model.train()
    model.drop = Fixed(rate, found["mask/posemb"])
    for i, block in enumerate((model.block1, model.block2)):
        block.drop = Fixed(rate, found[f"mask/block{i}_attn_out"], found[f"mask/block{i}_mlp_out"])
        block.mlp.drop = Fixed(rate, found[f"mask/block{i}_mlp_hidden"])
    logits = model(images(found["x"], torch.float64))
    close(logits, found["logits_train"], torch.float64)
    loss = F.cross_entropy(logits, found["soft_labels"])
    loss.backward()
    gradients_agree(model, {k[11:]: v for k, v in found.items() if k.startswith("grad_train/")}, torch.float64)


@both
def test_mean_pooling_with_a_tanh_layer_equals_the_official_one(dtype):
    model, found = official("vit_gap_io", (3, 12, 20), dtype, "vit_gap_released", **GAP)
    logits, acts = model(images(found["x"], dtype), activations=True)
    close(logits, found["logits"], dtype)
    close(acts["pool"], found["pooled"], dtype)
    close(acts["pre_logits"], found["pre_logits"], dtype)


@both
def test_models_of_big_vision_equal_ours(dtype):
    tok, found = official("bigvision_io", (3, 12, 16), dtype, "bigvision_tok_params", **BIG, layers=2)
    close(tok(images(found["tok_x"], dtype)), found["tok_logits"], dtype)
    gap = {**BIG, "layers": 1, "pool": "mean", "pre_logits": 12}
    model, _ = official("bigvision_io", (3, 12, 16), dtype, "bigvision_gap_params", **gap)
    close(model(images(found["gap_x"], dtype)), found["gap_logits"], dtype)


@both
def test_images_that_patches_do_not_tile_are_cut_only_if_asked(dtype):
    model, found = official("vit_token_io", (3, 23, 26), dtype, "vit_token_released", **TOKEN, crop=True)
    close(model(images(found["x_odd"], dtype)), found["logits_odd"], dtype)
    with pytest.raises(InvalidInput, match=r"height 16 do not tile an image of height 220.*208 or 224"):
        vit("Ti/16", in_shape=(3, 220, 220))


@both
def test_stem_without_stages_equals_the_official_one(dtype):
    model, found = official("hybrid_stem_io", (3, 37, 33), dtype, "hybrid_stem_released", **STEM)
    logits, acts = model(images(found["x"], dtype), activations=True)
    close(acts["stem.conv"][:1, :4].permute(0, 2, 3, 1), found["conv_root"], dtype)
    close(acts["stem.norm"][:1, :4].permute(0, 2, 3, 1), found["gn_root"], dtype)
    close(acts["patches"].reshape(2, 5, 4, 18), found["embedding"], dtype)
    close(logits, found["logits"], dtype)


@both
def test_stem_with_stages_equals_the_official_one(dtype):
    model, found = official("hybrid_blocks_io", (3, 32, 35), dtype, "hybrid_blocks_released", **BLOCKS)
    logits, acts = model(images(found["a_x"], dtype), activations=True)
    close(acts["stem.stage1.unit2.relu3"][:1, ::8].permute(0, 2, 3, 1), found["a_block1"], dtype)
    close(acts["stem.stage2.unit1.relu3"][:1, ::8].permute(0, 2, 3, 1), found["a_block2"], dtype)
    close(logits, found["a_logits"], dtype)
    F.cross_entropy(logits, found["a_labels"].to(dtype)).backward()
    gradients_agree(model, {k[7:]: v for k, v in found.items() if k.startswith("a_grad/")}, dtype)
    wider, _ = official("hybrid_blocks_io", (3, 32, 35), dtype, "hybrid_blocks_released", **BLOCKS)
    wider = ViT(
        (3, 33, 37),
        6,
        patch_size=1,
        dim=16,
        depth=1,
        heads=2,
        mlp_dim=24,
        stem=(2, 1),
        stem_width=32,
        gelu="tanh",
        init="reference",
    ).to(dtype)
    load_augreg_npz(wider, ORACLES / "hybrid_blocks_released.npz", grid=(4, 5))
    with torch.no_grad():
        wider.position.copy_(found["b_pos_embedding"])
    close(wider.eval()(images(found["b_x"], dtype)), found["b_logits"], dtype)


def test_same_padding_is_tensorflows():
    assert [same_padding(n, 7, 2) for n in (224, 37, 33)] == [(2, 3), (3, 3), (3, 3)]
    assert [same_padding(n, 3, 2) for n in (112, 19)] == [(0, 1), (1, 1)]
    assert same_padding(15, 1, 2) == (0, 0)


def test_standardized_kernels_ignore_scale_and_offset():
    conv = build(lambda: StdConv(3, 4, 3), 0).double()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(50).add_(3)
    torch.testing.assert_close(conv(x), before, rtol=1e-4, atol=1e-4)


def test_reference_initialization():
    model = build(lambda: vit("Ti/16", 10, (3, 32, 32), patch_size=8), 0)
    assert not model.head.weight.any()
    assert not model.token.any()
    for part in model.block3.attn.qkv.weight.chunk(3):  # each a kernel of its own: bound sqrt(6 / (192 + 192))
        assert float(part.detach().abs().max()) == pytest.approx((6 / 384) ** 0.5, rel=1e-3)
    assert float(model.block1.mlp.linear1.bias.detach().std()) == pytest.approx(1e-6, rel=0.2)
    assert float(model.position.detach().std()) == pytest.approx(0.02, rel=0.1)
    kernel = model.patches.linear.weight.detach()
    assert float(kernel.std()) == pytest.approx(192**-0.5, rel=0.02)
    loss = F.cross_entropy(
        model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))), torch.arange(4)
    )
    loss.backward()
    assert not model.block1.attn.qkv.weight.grad.any()  # a head of zeros passes nothing on
    assert model.head.weight.grad.any()
    hybrid = build(lambda: vit(ViTConfig(1, 32, 64, 2, 1, (1, 1)), 3, (3, 32, 32)), 0)
    assert not hybrid.stem.stage1.unit1.norm3.weight.any()


def test_small_hybrids_take_other_channels_and_record_their_stem():
    model = build(lambda: vit(ViTConfig(1, 32, 64, 2, 1, (1, 1)), 3, (4, 30, 45)), 0).eval()
    logits, acts = model(torch.zeros(2, 4, 30, 45), activations=True)
    assert logits.shape == (2, 3)
    assert model.grid == (4, 6)  # 30 -> 15 -> 8 -> 4 and 45 -> 23 -> 12 -> 6
    assert acts["stem.stage2.unit1.add"].shape == (2, 512, 4, 6)
    assert list(acts)[:3] == ["stem.conv", "stem.norm", "stem.relu"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vit("S16"), UnknownName, "did you mean 'S/16'"),
        (lambda: vit("Ti/16", head="two"), UnknownName, "head must be one of"),
        (lambda: vit("Ti/16", stochastic_depth=1.0), InvalidInput, "stochastic_depth"),
        (lambda: ViT((3, 8, 8), 2, gelu="sigmoid"), UnknownName, "gelu"),
        (lambda: ViT((3, 8, 8), 2, init="zeros"), UnknownName, "init"),
        (lambda: ViT((3, 32, 32), 2, stem=(1,), stem_width=48), InvalidInput, "multiple of 32"),
        (lambda: ViT((3, 8, 8), 2, attention_dropout=-0.1), InvalidInput, "attention_dropout"),
        (lambda: ViT((3, 2, 8), 2, crop=True), InvalidInput, "do not tile"),
    ],
)
def test_bad_arguments_are_explained(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_pixels_of_another_scale_are_told_apart():
    raw = torch.arange(256.0).repeat(3).view(1, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = raw / 127.5 - 1
        assert check_pixels(x) is x
    with pytest.raises(InvalidInput, match="raw ones"):
        check_pixels(raw)
    with pytest.raises(InvalidInput, match="raw ones"):
        check_pixels(raw.to(torch.uint8))
    with pytest.raises(InvalidInput, match="channels last"):
        check_pixels(raw.permute(0, 2, 3, 1) / 127.5 - 1)
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        check_pixels(x * float("nan"))
    with pytest.raises(InvalidInput, match=r"tensor \(B, C, H, W\)"):
        check_pixels(x.numpy())
    with pytest.warns(UserWarning, match="2 . x - 1"):
        check_pixels(raw / 255)
    mean, sd = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with pytest.warns(UserWarning, match="ImageNet's mean"):
        check_pixels((raw / 255 - mean) / sd)


def test_arrays_and_raw_pixels_are_refused_by_the_network():
    model = vit("Ti/16", 10, (1, 8, 8), patch_size=4)
    with pytest.raises(InvalidInput, match="takes a tensor, not ndarray"):
        model(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(InvalidInput, match=r"must be floating point, not torch\.uint8"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
