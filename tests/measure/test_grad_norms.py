"""Ghost norms against the gradients themselves, one example at a time, in double precision."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput
from mlcollage.measure.grad_norms import GhostNorms, per_example_grad_sqnorm
from mlcollage.nn.init import seeded
from mlcollage.nn.mlp import MLP
from mlcollage.nn.resnet import ResNet
from mlcollage.nn.vit import ViT

CLASSES = 3


def brute(model, x, y, loss_fn=F.cross_entropy, params=None):
    """One backward pass for each example."""
    params = list(model.parameters()) if params is None else params
    rows = []
    for i in range(len(y)):
        one = tuple(v[i : i + 1] for v in x) if isinstance(x, tuple) else (x[i : i + 1],)
        g = torch.autograd.grad(loss_fn(model(*one), y[i : i + 1]), params, allow_unused=True)
        rows.append(sum(v.square().sum() for v in g if v is not None))
    return torch.stack(rows)


def data(*shape, classes=CLASSES, seed=1):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, classes, (shape[0],), generator=rng)


class Headed(nn.Module):
    """A layer, a nonlinearity that makes examples differ, a function that flattens, and a linear map."""

    def __init__(self, layer, features, pool):
        super().__init__()
        self.layer, self.head, self.pool = layer, nn.Linear(features, CLASSES), pool

    def forward(self, x):
        return self.head(self.pool(torch.tanh(self.layer(x))))


def build(make):
    """A double-precision model in evaluation mode, with every parameter random."""
    with seeded(0):
        model = make().double().eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
    return model


def agrees(model, x, y, **kwargs):
    torch.testing.assert_close(per_example_grad_sqnorm(model, F.cross_entropy, x, y, **kwargs), brute(model, x, y))


def understood(model, x):
    """Is no parameter left to the general method?"""
    ghost = GhostNorms(model)
    ghost.run(x)
    return not ghost._tape.other


def mean_position(h):
    return h.flatten(2).mean(2)


def mean_token(h):
    return h.mean(1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: MLP((1, 4, 4), CLASSES, (8, 6)), (5, 1, 4, 4)),
        (lambda: ResNet((1, 8, 8), CLASSES, width=4, norm="group"), (5, 1, 8, 8)),
        (lambda: ResNet((1, 8, 8), CLASSES, width=4, norm="batch", conv_bias=True), (5, 1, 8, 8)),
        (lambda: ResNet((1, 8, 8), CLASSES, blocks=(1, 1), width=4, norm="frn", activation="silu"), (5, 1, 8, 8)),
        (lambda: ViT((1, 8, 8), CLASSES, patch_size=4, dim=8, depth=2, heads=2), (4, 1, 8, 8)),
        (lambda: ViT((1, 8, 8), CLASSES, patch_size=4, dim=8, depth=1, heads=2, fused=True, pool="mean"), (5, 1, 8, 8)),
    ],
    ids=["mlp", "resnet-group", "resnet-batch-eval", "resnet-frn", "vit", "vit-fused"],
)
def test_networks(make, shape):
    model = build(make)
    x, y = data(*shape)
    agrees(model, x, y)
    assert understood(model, x)


@st.composite
def geometries(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    return {
        "dims": dims,
        "groups": groups,
        "channels": (4, 4 * draw(st.integers(1, 2))),
        "kernel": each(1, 3),
        "stride": each(1, 3),
        "dilation": each(1, 2),
        "padding": draw(st.sampled_from(["numbers", "same", "valid"])),
        "pads": each(0, 2),
        "mode": draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
        "bias": draw(st.booleans()),
        "size": each(5, 7),
    }


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_convolutions_of_any_geometry(g):
    padding = g["pads"] if g["padding"] == "numbers" else g["padding"]
    stride = g["stride"] if padding != "same" else 1
    mode = "zeros" if g["mode"] == "reflect" and g["dims"] == 3 else g["mode"]
    layer = getattr(nn, f"Conv{g['dims']}d")
    model = build(
        lambda: Headed(
            layer(
                *g["channels"], g["kernel"], stride, padding, g["dilation"], g["groups"], g["bias"], padding_mode=mode
            ),
            g["channels"][1],
            mean_position,
        )
    )
    x, y = data(3, g["channels"][0], *g["size"])
    agrees(model, x, y)
    assert understood(model, x)


@settings(max_examples=40, deadline=None)
@given(geometries(), st.integers(0, 1))
def test_transposed_convolutions_of_any_geometry(g, extra):
    extra = tuple(min(extra, max(s, d) - 1) for s, d in zip(g["stride"], g["dilation"], strict=True))
    layer = getattr(nn, f"ConvTranspose{g['dims']}d")
    model = build(
        lambda: Headed(
            layer(*g["channels"], g["kernel"], g["stride"], 0, extra, g["groups"], g["bias"], dilation=g["dilation"]),
            g["channels"][1],
            mean_position,
        )
    )
    x, y = data(3, g["channels"][0], *(max(2, s - 3) for s in g["size"]))
    agrees(model, x, y)
    assert understood(model, x)


@pytest.mark.parametrize("positions", [1, 3, 50])
@pytest.mark.parametrize("widths", [(2, 3), (40, 30)])
def test_both_contractions_of_a_linear_map_on_positions(positions, widths):
    model = build(lambda: Headed(nn.Linear(*widths), widths[1], mean_token))
    agrees(model, *data(4, positions, widths[0]))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.LayerNorm(7), (5, 7)),
        (lambda: nn.LayerNorm((4, 7)), (5, 4, 7)),
        (lambda: nn.LayerNorm(7, bias=False), (5, 4, 7)),
        (lambda: nn.RMSNorm(7), (5, 4, 7)),
        (lambda: nn.GroupNorm(2, 4), (5, 4, 3, 3)),
        (lambda: nn.GroupNorm(2, 4), (5, 4)),
        (lambda: nn.InstanceNorm2d(4, affine=True), (5, 4, 3, 3)),
        (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (5, 4, 7)),
        (lambda: nn.BatchNorm1d(7), (5, 7)),
        (lambda: nn.BatchNorm2d(4), (5, 4, 3, 3)),
        (lambda: nn.PReLU(), (5, 4, 7)),
        (lambda: nn.PReLU(4), (5, 4, 7)),
        (lambda: nn.PReLU(), (5, 4)),
    ],
)
def test_normalization_and_slopes(layer, shape):
    x, y = data(*shape)
    model = build(lambda: Headed(layer(), x[0].numel(), lambda h: h.flatten(1)))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    agrees(model, x, y)
    assert understood(model, x)


@pytest.mark.parametrize("positions", [1, 7, 40])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_embeddings(positions, padding):
    ids = torch.randint(0, 9, (4, positions), generator=torch.Generator().manual_seed(0))
    model = build(lambda: Headed(nn.Embedding(9, 6, padding_idx=padding), 6, mean_token))
    agrees(model, ids, data(4, 1)[1])
    assert understood(model, ids)


class Attention(nn.Module):
    def __init__(self, first, cross, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=first, **kwargs)
        self.first, self.cross, self.head = first, cross, nn.Linear(8, CLASSES)

    def forward(self, x):
        z = x if self.first else x.transpose(0, 1)
        memory = z.sin() if self.cross else z
        out, _ = self.attention(z, memory, memory, need_weights=not self.cross)
        return self.head(out.mean(1 if self.first else 0))


@pytest.mark.parametrize("positions", [4, 6])  # 4 is the number of examples
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_projections_of_attention(first, cross, positions, bias):
    model = build(lambda: Attention(first, cross, bias=bias))
    x, y = data(4, positions, 8)
    agrees(model, x, y)
    assert understood(model, x)
    torch.testing.assert_close(GhostNorms(model).run(x), model(x))


def test_attention_with_other_parameters():
    agrees(build(lambda: Attention(True, False, add_bias_kv=True)), *data(4, 6, 8))
    agrees(build(lambda: Attention(True, False, kdim=8, vdim=8)), *data(4, 6, 8))
    agrees(build(lambda: Attention(True, True, kdim=8, vdim=8)), *data(4, 6, 8))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("positions", [4, 6])
def test_examples_along_another_dimension_are_noticed(positions):
    agrees(build(TimeFirst), *data(4, positions, 8))


class Language(nn.Module):
    """Tied table, positions, products with parameters, tokens of all examples in one matrix as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 6), nn.Parameter(torch.zeros(6, 6))
        self.where = nn.Embedding(9, 6)
        self.place, self.scale, self.start = (nn.Parameter(torch.zeros(*s)) for s in ((7, 6), (6,), (1, 1, 6)))
        self.norm = nn.RMSNorm(6)

    def forward(self, ids):
        h = torch.tanh((self.table(ids) + self.place) * self.scale) + self.where(torch.arange(7))
        h = h * self.where(torch.tensor([[3, 3, 0, 1, 2, 3, 4]]))
        h = torch.cat([self.start.expand(len(ids), -1, -1), h], 1)
        h = h + torch.addmm(self.scale, h.reshape(-1, 6), self.mix).reshape(h.shape)
        return F.linear(self.norm(h), self.table.weight).sin().mean(1)


@pytest.mark.parametrize("examples", [1, 4, 7])  # as many as there are positions
def test_tied_tables_and_bare_parameters(examples):
    model = build(Language)
    ids = torch.randint(0, 9, (examples, 7), generator=torch.Generator().manual_seed(0))
    agrees(model, ids, torch.tensor([0, 8, 3, 3, 1, 2, 0])[:examples])
    assert understood(model, ids)


class Reused(nn.Module):
    """Every layer several times, one matrix both ways round, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.conv = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(1, 1, 3, padding=1)
        self.slope, self.head, self.unused = nn.PReLU(4), nn.Linear(4, CLASSES), nn.Linear(2, 2)
        self.turn = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x):
        for _ in range(2):
            x = self.slope(self.norm(self.linear(x)))
            x = self.conv(x.unsqueeze(1)).squeeze(1)
            x = torch.tanh(x @ self.turn.t()) @ self.turn
        return self.head(F.linear(x, self.linear.weight.T))


def test_reused_weights_with_cross_terms():
    model = build(Reused)
    x, y = data(5, 4)
    agrees(model, x, y)
    assert understood(model, x)
    parts = per_example_grad_sqnorm(model, F.cross_entropy, x, y, per_layer=True)
    assert not parts["unused"].any()


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() * w.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Odd(nn.Module):
    """Uses that no rule covers, beside one that a rule does."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.odd, self.head = kind, nn.Parameter(torch.zeros(4)), nn.Linear(4, CLASSES)

    def forward(self, x):
        if self.kind == "custom":
            return self.head(Double.apply(x, self.odd))
        if self.kind == "both":
            return self.head(x * self.odd + self.odd.exp())
        return self.head(torch.einsum("bi,i->bi", x, self.odd))


@pytest.mark.parametrize("kind", ["custom", "both", "einsum"])
def test_other_uses_go_by_the_general_method(kind):
    model = build(lambda: Odd(kind))
    x, y = data(5, 4)
    assert not understood(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agrees(model, x, y)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Hides(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x):
        return Hidden.apply(self.linear(x))


def test_functions_without_second_derivative_have_norms_but_no_gradient_of_them():
    model = build(Hides)
    agrees(model, *data(5, 4))
    with pytest.raises(InvalidInput, match="without second derivative"):
        per_example_grad_sqnorm(model, F.cross_entropy, *data(5, 4), differentiable=True)


def test_weight_norm_and_recurrence():
    norm = torch.nn.utils.parametrizations.weight_norm
    agrees(build(lambda: Headed(norm(nn.Linear(4, 5)), 5, lambda h: h)), *data(5, 4))
    lstm = nn.LSTM(4, 5, batch_first=True)

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = lstm, nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model = build(Recurrent)
    with pytest.warns(UserWarning, match="5 backward passes"):
        agrees(model, *data(5, 6, 4))


def test_dropout_in_training_uses_one_mask():
    """The norms are those of the pass that was run, also where the general method is needed."""
    model = build(lambda: nn.Sequential(Odd("both"), nn.Dropout(0.5))).train()
    x, y = data(5, 4)
    ghost = GhostNorms(model)
    with seeded(0):
        out = ghost.run(x)
    c = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), out, retain_graph=True)[0]
    with pytest.warns(UserWarning, match="backward passes"):
        s = sum(ghost.sqnorm(c, retain_graph=True).values())
    truth = []
    for i in range(5):
        mask = torch.zeros_like(c)
        mask[i] = 1
        g = torch.autograd.grad(out, list(model.parameters()), c * mask, retain_graph=True)
        truth.append(sum(v.square().sum() for v in g))
    torch.testing.assert_close(s, torch.stack(truth))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, CLASSES)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(18, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), ViTLike(), nn.Linear(4, CLASSES)),
        lambda: nn.Sequential(nn.Linear(8, 4), Odd("both")),
    ],
    ids=["mlp", "conv", "attention", "general"],
)
def test_gradient_of_the_norms(make):
    """Differentiable norms, summed, have the gradient of the sum of the true ones."""
    model = build(make)
    x, y = data(4, 8)
    params = list(model.parameters())
    norms = per_example_grad_sqnorm(model, F.cross_entropy, x, y, differentiable=True)
    found = torch.autograd.grad(norms.sum(), params, allow_unused=True, materialize_grads=True)
    rows = []
    for i in range(len(x)):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.autograd.grad(loss, params, create_graph=True)
        rows.append(sum(v.square().sum() for v in g))
    truth = torch.autograd.grad(torch.stack(rows).sum(), params, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


class ViTLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: ResNet((1, 8, 8), CLASSES, blocks=(1, 1), width=4, norm="group"), (4, 1, 8, 8)),
        (lambda: ViT((1, 8, 8), CLASSES, patch_size=4, dim=8, depth=1, heads=2), (4, 1, 8, 8)),
        (lambda: Headed(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 6, mean_position), (4, 4, 5, 5)),
        (lambda: Attention(True, True), (4, 6, 8)),
        (lambda: nn.Sequential(Reused(), Odd3()), (4, 4)),
    ],
    ids=["resnet", "vit", "transposed", "cross", "reused"],
)
def test_many_losses_at_once(make, shape):
    model = build(make)
    x, _ = data(*shape)
    ghost = GhostNorms(model)
    c = torch.randn(5, 4, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ghost.run(x)
    together = ghost.sqnorm(c, batched=True, retain_graph=True)
    for k in range(5):
        one = ghost.sqnorm(c[k], retain_graph=True)
        assert one.keys() == together.keys()
        for layer in one:
            torch.testing.assert_close(together[layer][k], one[layer])


def test_many_losses_of_tied_tables():
    model = build(Language)
    ids = torch.randint(0, 9, (4, 7), generator=torch.Generator().manual_seed(0))
    c = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ghost = GhostNorms(model)
    ghost.run(ids)
    together = ghost.sqnorm(c, batched=True, retain_graph=True)
    for k in range(3):
        for layer, value in ghost.sqnorm(c[k], retain_graph=True).items():
            torch.testing.assert_close(together[layer][k], value)


class Odd3(nn.Module):
    """A parameter that only the general method knows."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        return x * self.odd.exp()


@pytest.mark.parametrize("positions", [1, 3, 50])
def test_work_in_pieces_is_the_same_work(monkeypatch, positions):
    """What is made at once is bounded; with the bound at its least, one example at a time."""
    makes = [
        (lambda: Headed(nn.Linear(8, 9), 9, mean_token), (5, positions, 8)),
        (lambda: Headed(nn.Conv1d(8, 9, 3, padding=1), 9, mean_position), (5, 8, positions)),
        (lambda: Headed(nn.GroupNorm(2, 8), 8, mean_position), (5, 8, positions)),
        (lambda: Headed(nn.LayerNorm(8), 8, mean_token), (5, positions, 8)),
    ]
    for make, shape in makes:
        model = build(make)
        x, y = data(*shape)
        whole = per_example_grad_sqnorm(model, F.cross_entropy, x, y)
        with monkeypatch.context() as patch:
            patch.setattr("mlcollage.measure._uses._CACHE", 1)
            torch.testing.assert_close(per_example_grad_sqnorm(model, F.cross_entropy, x, y), whole)
            agrees(model, x, y)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(8, 8), (8, 16), (16, 8), (3, 8)]),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
)
def test_single_precision_has_its_own_way_for_convolutions(channels, groups, kernel, stride, padding, dilation):
    """Norms, and the gradient of their sum, against the same in double precision."""
    groups = groups if channels[0] % 2 == 0 else 1
    channels = (channels[0] * groups, channels[1] * groups)
    model = build(
        lambda: Headed(nn.Conv2d(*channels, kernel, stride, padding, dilation, groups), channels[1], mean_position)
    )
    x, y = data(5, channels[0], 7, 6)
    found = []
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        norms = per_example_grad_sqnorm(model, F.cross_entropy, x.to(dtype), y, differentiable=True)
        slopes = torch.autograd.grad(norms.sum(), list(model.parameters()))
        plain = per_example_grad_sqnorm(model, F.cross_entropy, x.to(dtype), y)
        torch.testing.assert_close(plain, norms.detach(), rtol=1e-4, atol=1e-6)
        found.append([norms, *slopes])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_reductions_give_each_examples_own_norm():
    model = build(lambda: MLP((4,), CLASSES, (5,)))
    x, y = data(5, 4)
    truth = brute(model, x, y)
    losses = [
        (F.cross_entropy, "auto"),
        (nn.CrossEntropyLoss(), "auto"),
        (nn.CrossEntropyLoss(reduction="sum"), "auto"),
        (nn.CrossEntropyLoss(reduction="none"), "auto"),
        (functools.partial(F.cross_entropy, reduction="sum"), "auto"),
        (lambda o, t: F.cross_entropy(o, t), "mean"),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum"), "sum"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), "none"),
    ]
    for loss_fn, reduction in losses:
        s = per_example_grad_sqnorm(model, loss_fn, x, y, reduction=reduction)
        torch.testing.assert_close(s, truth)


def test_parts_and_subsets():
    model = build(lambda: MLP((4,), CLASSES, (5,)))
    x, y = data(5, 4)
    parts = per_example_grad_sqnorm(model, F.cross_entropy, x, y, per_layer=True)
    assert len(parts) == 2
    torch.testing.assert_close(sum(parts.values()), brute(model, x, y))
    last = list(model.parameters())[-2:]
    s = per_example_grad_sqnorm(model, F.cross_entropy, x, y, params=last)
    torch.testing.assert_close(s, brute(model, x, y, params=last))
    for p in last:
        p.requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(per_example_grad_sqnorm(model, F.cross_entropy, x, y), brute(model, x, y, params=rest))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, first, second, scale=1.0):
        return {"logits": scale * self.a(first) * self.b(second), "note": "text"}


def test_several_inputs_and_structured_outputs():
    model = build(TwoInputs)
    (x, y), (z, _) = data(5, 4), data(5, 2, seed=2)

    def loss_fn(out, target):
        return F.cross_entropy(out["logits"], target)

    truth = brute(model, (x, z), y, loss_fn)
    torch.testing.assert_close(per_example_grad_sqnorm(model, loss_fn, (x, z), y, reduction="mean"), truth)
    named = {"first": x, "second": z, "scale": 1.0}
    torch.testing.assert_close(per_example_grad_sqnorm(model, loss_fn, named, y, reduction="mean"), truth)


def test_half_precision_sums_in_float32():
    model = build(lambda: MLP((4,), CLASSES, (64,))).float()
    x, y = data(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        s = per_example_grad_sqnorm(model, F.cross_entropy, x.float(), y)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, brute(model, x.float(), y), rtol=0.1, atol=0)
    s = per_example_grad_sqnorm(model.bfloat16(), F.cross_entropy, x.bfloat16(), y)
    assert s.dtype == torch.float32


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.body, self.reentrant = nn.Linear(4, 4), nn.Linear(4, CLASSES), reentrant

    def forward(self, x):
        return checkpoint(self.body, self.stem(x).tanh(), use_reentrant=self.reentrant)


def test_checkpointing():
    agrees(build(lambda: Checkpointed(False)), *data(5, 4))
    with pytest.raises(InvalidInput, match="use_reentrant=False"):
        agrees(build(lambda: Checkpointed(True)), *data(5, 4))


def test_nothing_of_the_model_is_changed():
    model = build(lambda: MLP((4,), CLASSES, (5,)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = data(5, 4)
    per_example_grad_sqnorm(model, F.cross_entropy, x, y, differentiable=True)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        per_example_grad_sqnorm(model, F.cross_entropy, x, y)
    with torch.inference_mode():
        assert per_example_grad_sqnorm(model, F.cross_entropy, x, y).shape == (5,)


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.linear(x - x.mean(0)) if x.requires_grad else self.linear(x) - self.linear(x).mean(0)


def test_bad_input():
    model = build(lambda: MLP((4,), CLASSES, (5,)))
    x, y = data(5, 4)

    def norms(model=model, loss_fn=F.cross_entropy, x=x, y=y, **kwargs):
        return per_example_grad_sqnorm(model, loss_fn, x, y, **kwargs)

    with pytest.raises(InvalidInput, match=r"batch normalization in training mode .* model.eval\(\)"):
        norms(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    with pytest.raises(InvalidInput, match=r"torch\.compile"):
        norms(torch.compile(model))
    with pytest.raises(InvalidInput, match=r"must be an nn\.Module"):
        norms(F.relu)
    with pytest.raises(InvalidInput, match="depends on other examples"):
        norms(build(Coupled), verify=True)
    assert norms(verify=True).shape == (5,)
    with pytest.raises(InvalidInput, match="one loss for each of the 5 examples"):
        norms(loss_fn=lambda o, t: o)
    with pytest.raises(InvalidInput, match="whether it is a mean or a sum"):
        norms(loss_fn=lambda o, t: F.cross_entropy(o, t))
    with pytest.raises(InvalidInput, match="depends on the model's output"):
        norms(loss_fn=lambda o, t: o.detach().sum())
    with pytest.raises(InvalidInput, match="reduction must be"):
        norms(reduction="average")
    with pytest.raises(InvalidInput, match="weighted or ignored targets"):
        norms(loss_fn=nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64)))
    with pytest.raises(InvalidInput, match="weighted or ignored targets"):
        norms(y=torch.tensor([0, -100, 1, 1, 2]))
    with pytest.raises(InvalidInput, match="same number of examples in front"):
        norms(x=torch.tensor(1.0))
    with pytest.raises(InvalidInput, match="parameters of the model"):
        norms(params=[nn.Parameter(torch.zeros(1))])
    with pytest.raises(InvalidInput, match="no parameter that requires a gradient"):
        norms(params=[])
    with pytest.raises(InvalidInput, match="divides an embedding's gradient"):
        norms(build(lambda: Headed(nn.Embedding(4, 3, scale_grad_by_freq=True), 3, mean_token)), x=y.unsqueeze(1))
    overwritten = nn.Linear(4, 4)

    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = overwritten, nn.Linear(4, CLASSES)

        def forward(self, x):
            h = self.body(x)
            out = self.head(h)
            h.mul_(2)
            return out

    with pytest.raises(InvalidInput, match=r"head\.weight.* was overwritten in place"):
        norms(build(Overwrites))
    ghost = GhostNorms(model)
    with pytest.raises(InvalidInput, match="run the model first"):
        ghost.sqnorm(torch.zeros(5, 3))
    ghost.run(x)
    with pytest.raises(InvalidInput, match="shapes of the outputs"):
        ghost.sqnorm(torch.zeros(5, 4))
