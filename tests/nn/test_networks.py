"""All networks: shapes, counts, activations by name, precision, compilation, and what they refuse."""

import warnings

import pytest
import torch

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.convnet import ConvNet
from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet
from mlcollage.nn.vit import ViT

SHAPE = (3, 8, 12)
NETWORKS = {
    "mlp": lambda: MLP(SHAPE, 5, (16, 8)),
    "mlp batch": lambda: MLP(SHAPE, 5, (16,), norm="batch", activation="gelu"),
    "mlp layer": lambda: MLP(SHAPE, 5, (16,), norm="layer", activation="tanh"),
    "linear": lambda: MLP(SHAPE, 5, ()),
    "convnet": lambda: ConvNet(SHAPE, 5, (4, 8)),
    "convnet group": lambda: ConvNet(SHAPE, 5, (4, 8), norm="group", strides=(2, 1)),
    "convnet frn": lambda: ConvNet(SHAPE, 5, (4, 8), norm="frn"),
    "convnet plain": lambda: ConvNet(SHAPE, 5, (4, 8), norm=None),
    "resnet": lambda: ResNet(SHAPE, 5, blocks=(1, 2), width=4),
    "resnet group": lambda: ResNet(SHAPE, 5, width=4, norm="group", stem_stride=2),
    "resnet frn": lambda: ResNet(SHAPE, 5, width=4, norm="frn"),
    "resnet frn silu": lambda: ResNet(SHAPE, 5, width=4, norm="frn", activation="silu", conv_bias=True),
    "vit": lambda: ViT(SHAPE, 5, dim=16, depth=2),
    "vit mean": lambda: ViT(SHAPE, 5, patch_size=(2, 3), dim=16, depth=2, pool="mean", dropout=0.1),
    "vit fused": lambda: ViT(SHAPE, 5, dim=16, depth=2, fused=True, stochastic_depth=0.5),
}
ALL = pytest.mark.parametrize("name", NETWORKS)


def batch(n=6, dtype=torch.float32, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@ALL
def test_asking_for_activations_does_not_change_the_logits(name):
    model, x = build(NETWORKS[name], 0).eval(), batch()
    logits, acts = model(x, activations=True)
    assert logits.shape == (6, 5)
    assert acts["logits"] is logits
    torch.testing.assert_close(logits, model(x), rtol=1e-5, atol=1e-6)


@ALL
def test_activations_are_what_hooks_on_the_modules_of_that_name_see_and_in_their_order(name):
    model, x, seen = build(NETWORKS[name], 0).eval(), batch(), {}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, path=path: seen.setdefault(path, out))
    _, acts = model(x, activations=True)
    shared = [n for n in acts if n in seen]
    assert all(torch.equal(acts[n], seen[n]) for n in shared)
    assert [n for n in seen if n in acts] == shared
    # What no module makes: sums, attention weights, tokens with their position, and the choice of what is pooled.
    loose = {n for n in acts if n not in seen}
    assert all(
        n in {"embed", "pool", "logits"} or n.split(".")[-1] in {"add", "add1", "add2", "weights"} for n in loose
    )


@ALL
def test_gradients_flow_through_every_activation_and_reach_every_parameter(name):
    model = build(NETWORKS[name], 0).eval()
    logits, acts = model(batch(), activations=True)
    grads = torch.autograd.grad(logits.square().sum(), [*acts.values(), *model.parameters()])
    assert all(g.isfinite().all() for g in grads)


@ALL
def test_the_same_seed_gives_the_same_network_and_leaves_the_global_state(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (build(NETWORKS[name], s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


@ALL
def test_double_precision_and_bfloat16_autocast(name):
    model = build(NETWORKS[name], 0).eval()
    expected = model.double()(batch(dtype=torch.float64))
    assert expected.dtype == torch.float64
    model.float()
    torch.testing.assert_close(model(batch()).double(), expected, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(batch())
    scale = float(expected.detach().abs().max())
    assert float((half.double() - expected).detach().abs().max()) < 0.05 * scale


@pytest.mark.parametrize("name", ["mlp layer", "convnet frn", "resnet", "vit"])
def test_networks_trace_as_one_graph_for_torch_compile(name):
    model, x = build(NETWORKS[name], 0).eval(), batch()
    torch._dynamo.reset()  # all networks share one forward, and torch compiles one function eight times at most
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        logits, acts = compiled(x, activations=True)
    assert list(acts) == list(model(x, activations=True)[1])
    torch.testing.assert_close(logits, model(x), rtol=1e-5, atol=1e-6)


@ALL
def test_other_input_shapes_are_refused(name):
    with pytest.raises(InvalidInput, match=r"samples of shape \(3, 8, 12\).*in_shape=\(3, 12, 8\)"):
        build(NETWORKS[name], 0)(torch.zeros(2, 3, 12, 8))


def count(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def test_parameter_counts_are_the_published_ones():
    # ResNet-20 with projection shortcuts; He et al. (2016) give 0.27M.
    assert count(lambda: ResNet((3, 32, 32), 10, blocks=(3, 3, 3))) == 272_474
    assert count(lambda: ResNet((3, 32, 32), 10)) == 78_042
    # ResNet-20-FRN of Izmailov et al. (2021) for CIFAR-10 and CIFAR-100.
    frn = {"blocks": (3, 3, 3), "norm": "frn", "activation": "silu", "conv_bias": True}
    assert count(lambda: ResNet((3, 32, 32), 10, **frn)) == 274_042
    assert count(lambda: ResNet((3, 32, 32), 100, **frn)) == 279_892
    # ViT-Ti/16 at 224 with 1000 classes.
    vit = {"patch_size": 16, "dim": 192, "depth": 12, "heads": 3, "mlp_ratio": 4}
    assert count(lambda: ViT((3, 224, 224), 1000, **vit)) == 5_717_416
    assert count(lambda: MLP((784,), 10)) == 784 * 128 + 128 + 128 * 128 + 128 + 1290


def test_resolution_halves_and_width_doubles_from_stage_to_stage():
    _, acts = ResNet((3, 32, 32), 10, blocks=(2, 1, 1), width=8)(torch.zeros(2, 3, 32, 32), activations=True)
    shapes = {n: tuple(a.shape[1:]) for n, a in acts.items() if n.endswith("relu2")}
    assert shapes == {
        "block1.relu2": (8, 32, 32),
        "block2.relu2": (8, 32, 32),
        "block3.relu2": (16, 16, 16),
        "block4.relu2": (32, 8, 8),
    }
    assert [n for n in acts if "shortcut" in n] == ["block3.shortcut", "block4.shortcut"]
    assert list(acts)[:4] == ["stem.conv", "stem.norm", "stem", "block1.conv1"]


def test_vit_patches_equal_a_strided_convolution():
    vit, x = build(lambda: ViT((3, 8, 12), 5, patch_size=(2, 3), dim=16, depth=1), 0), batch()
    kernel = vit.patches.linear.weight.view(16, 3, 2, 3)
    expected = torch.nn.functional.conv2d(x, kernel, vit.patches.linear.bias, stride=(2, 3)).flatten(2).mT
    torch.testing.assert_close(vit.patches(x), expected)


def test_vit_block_equals_torchs_pre_norm_encoder_layer():
    vit = build(lambda: ViT((3, 8, 8), 5, dim=16, depth=1, heads=2), 0).double().eval()
    block, layer = (
        vit.block1,
        torch.nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double(),
    )
    attention = layer.self_attn
    pairs = [
        (attention.in_proj_weight, block.attn.qkv.weight),
        (attention.in_proj_bias, block.attn.qkv.bias),
    ]
    for theirs, ours in (
        (attention.out_proj, block.attn.proj),
        (layer.linear1, block.mlp.linear1),
        (layer.linear2, block.mlp.linear2),
        (layer.norm1, block.ln1),
        (layer.norm2, block.ln2),
    ):
        pairs += [(theirs.weight, ours.weight), (theirs.bias, ours.bias)]
    with torch.no_grad():
        for i, (theirs, ours) in enumerate(pairs):
            ours.normal_(generator=torch.Generator().manual_seed(i))
            theirs.copy_(ours)
    tokens = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    torch.testing.assert_close(block(tokens), layer.train()(tokens), rtol=1e-10, atol=1e-10)


def test_vit_attention_weights_are_distributions_over_tokens():
    _, acts = build(NETWORKS["vit"], 0)(batch(), activations=True)
    weights = acts["block2.attn.weights"]
    assert weights.shape == (6, 4, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, 4, 7))


def test_vit_has_second_derivatives():
    model, x = build(NETWORKS["vit"], 0).double(), batch(2, torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.abs().sum() > 0


def test_stochastic_depth_keeps_the_mean_and_is_off_in_evaluation():
    vit = build(lambda: ViT((1, 4, 4), 3, dim=8, depth=2, heads=1, stochastic_depth=0.5), 0)
    block, x, branch = vit.block2, torch.zeros(4000, 2, 8), torch.ones(4000, 2, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = block._residual(x, branch)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert abs(float(out.mean()) - 1) < 0.05
    assert torch.equal(block.eval()._residual(x, branch), branch)
    assert torch.equal(vit.block1._residual(x, branch), branch)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLP((), 10), InvalidInput, "in_shape must name at least one size"),
        (lambda: MLP(64, 10), InvalidInput, "in_shape must be a tuple"),
        (lambda: MLP((64,), 0), InvalidInput, "num_classes must be a whole number of at least 1, not 0"),
        (lambda: MLP((64,), 2.5), InvalidInput, "num_classes must be a whole number"),
        (lambda: MLP((64,), 10, (0,)), InvalidInput, "each of widths"),
        (lambda: MLP((64,), 10, norm="group"), UnknownName, "norm, if not None, must be one of .batch., .layer."),
        (lambda: MLP((64,), 10, activation="rleu"), UnknownName, "did you mean .relu."),
        (lambda: ConvNet((28, 28), 10), InvalidInput, r"in_shape must be \(channels, height, width\)"),
        (lambda: ConvNet((1, 28, 28), 10, ()), InvalidInput, "widths must name at least one"),
        (lambda: ConvNet((1, 28, 28), 10, strides=(1,)), InvalidInput, "one number for each of the 3 widths"),
        (
            lambda: ResNet((3, 32, 32), 10, norm=None),
            InvalidInput,
            "norm must be one of .*, not None",
        ),
        (lambda: ResNet((3, 32, 32), 10, norm="bach"), UnknownName, "did you mean .batch."),
        (lambda: ResNet((3, 32, 32), 10, blocks=(1, 0)), InvalidInput, "each of blocks"),
        (lambda: ResNet((3, 0, 32), 10), InvalidInput, "each of in_shape"),
        (lambda: ViT((1, 28, 28), 10, patch_size=5), InvalidInput, "do not tile.*1, 2, 4, 7, 14, 28"),
        (lambda: ViT((1, 28, 28), 10, patch_size=(4, 4, 4)), InvalidInput, "one side or"),
        (lambda: ViT((1, 28, 28), 10, dim=30), InvalidInput, "dim=30 is not a multiple of heads=4"),
        (lambda: ViT((1, 28, 28), 10, pool="max"), UnknownName, "pool must be one of .token., .mean."),
        (
            lambda: ViT((1, 28, 28), 10, dropout=1.0),
            InvalidInput,
            "dropout must be a finite number",
        ),
        (lambda: build(torch.nn.Linear(2, 2), 0), InvalidInput, "pass `lambda: ...`"),
        (lambda: build(lambda: 3, 0), InvalidInput, "returned a int"),
    ],
)
def test_bad_arguments_are_explained(make, error, message):
    with pytest.raises(error, match=message):
        make()
