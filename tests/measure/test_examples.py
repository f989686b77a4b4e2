"""Which rows belong to which example is proved, not guessed from sizes: models in which sizes mislead."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput
from mlcollage.measure import _examples
from mlcollage.measure._examples import Layout, layouts
from mlcollage.measure.fisher import fisher_trace
from mlcollage.measure.grad_norms import GhostNorms, per_example_grad_sqnorm
from mlcollage.nn.init import seeded

CLASSES = 3


def build(make):
    with seeded(0):
        model = make().double().eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
    return model


def data(*shape):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=rng, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (shape[0],), generator=rng)


def brute(model, losses, n):
    """The gradient of each example's own loss, within the batch: ``losses()`` gives all of them, (n,)."""
    rows = []
    for i in range(n):
        found = torch.autograd.grad(losses()[i], list(model.parameters()), allow_unused=True)
        rows.append(sum(g.square().sum() for g in found if g is not None))
    return torch.stack(rows)


def own(output, y):
    return F.cross_entropy(output, y, reduction="none")


class SequenceFirst(nn.Module):
    """Takes (B, T, F) and works with (T, B, F) inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.transpose(0, 1))).mean(0))


class Masked(nn.Module):
    """A layer for the positions that a mask chooses: of the data below as many as there are examples."""

    def __init__(self):
        super().__init__()
        self.embed, self.some, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.embed(x).tanh()
        chosen = x[..., 0] >= data(6, 5, 5)[0][..., 0].flatten().sort().values[-6]
        added = torch.zeros_like(h)
        added[chosen] = self.some(h[chosen])
        return self.head((h + added).mean(1))


class Experts(nn.Module):
    """Each token goes to one of three experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(8, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        h = self.embed(x).tanh().flatten(0, 1)
        gates = self.router(h).softmax(-1)
        out, best = torch.zeros_like(h), gates.argmax(-1)
        for k, expert in enumerate(self.experts):
            rows = (best == k).nonzero().flatten()
            out = out.index_add(0, rows, expert(h[rows]) * gates[rows, k : k + 1])
        return self.head((h + out).view(*x.shape[:2], -1).tanh().mean(1))


class Positions(nn.Module):
    """A table of positions that a linear map projects."""

    def __init__(self):
        super().__init__()
        self.table, self.project = nn.Parameter(torch.zeros(6, 5)), nn.Linear(5, 8)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head((self.embed(x) + self.project(self.table)).tanh().mean(1))


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.conv(x).tanh().mean(-1))


class Windows(nn.Module):
    """Windows of a sequence as a batch, examples last in it: (windows x B, T / windows, F)."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.head = nn.LayerNorm(5), nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        w = torch.cat(x.chunk(2, 1))
        return self.head(torch.stack(self.mix(self.norm(w)).tanh().chunk(2)).mean((0, 2)))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *((SequenceFirst, (b, 8, 5)) for b in (4, 7, 8, 9, 16)),
        (Masked, (6, 5, 5)),
        *((Experts, (b, 4, 5)) for b in (3, 4, 8)),
        *((Positions, (b, 6, 5)) for b in (3, 6, 7)),
        *((Convolved, (b, 2, 20)) for b in (2, 6, 18)),
        *((Windows, (b, 8, 5)) for b in (2, 4, 8)),
    ],
)
def test_norms_are_those_of_the_examples_own_losses_when_sizes_coincide(make, shape, verify):
    model, (x, y) = build(make), data(*shape)
    truth = brute(model, lambda: own(model(x), y), len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # the second time from what was remembered
            torch.testing.assert_close(per_example_grad_sqnorm(model, own, x, y, verify=verify), truth)


def test_the_trace_does_not_depend_on_the_batch_size():
    model, x = build(SequenceFirst), data(16, 8, 5)[0]
    found = [fisher_trace(model, x, batch_size=size).value for size in (1, 7, 8, 16)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-9)


def test_a_sequence_first_model_needs_no_general_method():
    model, (x, y) = build(SequenceFirst), data(8, 8, 5)
    ghost = GhostNorms(model)
    ghost.run(x)
    ghost.sqnorm(ghost.cotangents(own, y), retain_graph=True)
    assert not ghost._tape.other


def test_batch_dim_is_where_the_user_says():
    encoder = build(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)))
    x, _ = data(6, 6, 5)  # (T, B, F)
    y = torch.randint(0, CLASSES, (6, 6), generator=torch.Generator().manual_seed(2))  # (T, B)

    def losses(output, y):
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(0)

    truth = brute(encoder, lambda: losses(encoder(x), y), 6)
    torch.testing.assert_close(per_example_grad_sqnorm(encoder, losses, x, y, batch_dim=1, verify=True), truth)
    with pytest.raises(InvalidInput, match="reads the outputs of others"):
        per_example_grad_sqnorm(encoder, losses, x, y)
    front = fisher_trace(encoder, x.transpose(0, 1))
    behind = fisher_trace(encoder, x, batch_dim=1, batch_size=4)
    assert behind.value == pytest.approx(front.value)
    drawn = [fisher_trace(encoder, x, batch_dim=1, method=m, generator=0).value for m in ("mc", "minibatch")]
    assert all(value > 0 for value in drawn)


class Gathers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(self.linear(x[order]).tanh()[order.argsort()])


def test_a_proof_is_remembered_for_a_shape_unless_the_data_move_rows():
    model, (x, y) = build(SequenceFirst), data(6, 8, 5)
    per_example_grad_sqnorm(model, own, x, y)
    assert len(_examples.remembered(model)) == 1
    per_example_grad_sqnorm(model, own, 2 * x, y)
    assert len(_examples.remembered(model)) == 1
    per_example_grad_sqnorm(model, own, x[:5], y[:5])
    assert len(_examples.remembered(model)) == 2
    size = len(_examples._remembered)
    del model
    gc.collect()
    assert len(_examples._remembered) < size

    moving = build(Gathers)
    for order in (torch.arange(6), torch.arange(5, -1, -1)):  # in order, so that rows are examples; and not
        z = x[:, 0, :4].clone()
        z[:, 0] = order.double()
        truth = brute(moving, lambda z=z: own(moving(z), y), 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(per_example_grad_sqnorm(moving, own, z, y), truth)


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.head(h - h.mean(0))


def test_examples_that_influence_each_other_are_noticed():
    model, (x, y) = build(Centered), data(6, 4)
    for call in (lambda: per_example_grad_sqnorm(model, own, x, y), lambda: fisher_trace(model, x)):
        with pytest.raises(InvalidInput, match=r"depends on other examples .*: take out .*, or give batch_dim"):
            call()
    # Attention over the examples, as of a sequence-first layer that is given them in front.
    attends = build(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0))
    z = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def size(h, y):
        return h.square().sum((1, 2))

    with pytest.raises(InvalidInput, match="batch_dim"):
        per_example_grad_sqnorm(attends, size, z, y[:5])


class Squeezes(Centered):
    def forward(self, x):
        h = self.first(x)
        return self.head(torch.stack([h.squeeze(), h.squeeze().cumsum(-1)]).sum(0).tanh())


def test_a_model_that_cannot_take_one_example_is_no_coupled_one():
    model, (x, y) = build(Squeezes), data(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = per_example_grad_sqnorm(model, own, x, y)
    torch.testing.assert_close(found, brute(model, lambda: own(model(x), y), 6))


@pytest.mark.parametrize(("of_model", "of_inputs"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_inputs_of_the_other_float_type_are_taken(of_model, of_inputs):
    model, (x, y) = build(lambda: nn.Linear(4, CLASSES)).to(of_model), data(6, 4)
    found = per_example_grad_sqnorm(model, own, x.to(of_inputs), y)
    torch.testing.assert_close(found, brute(model, lambda: own(model(x.to(of_inputs).to(of_model)), y), 6))


def test_verify_notices_a_wrong_layout(monkeypatch):
    model, (x, y) = build(SequenceFirst), data(8, 8, 5)
    monkeypatch.setattr(GhostNorms, "_layouts", lambda self, uses, outputs: ((Layout(0),) * len(uses), False))
    with pytest.raises(InvalidInput, match="not those of the examples' own backward passes"):
        per_example_grad_sqnorm(model, own, x, y, verify=True)


def test_losses_of_one_example_that_read_others_are_refused():
    model, (x, y) = build(lambda: nn.Linear(4, CLASSES)), data(6, 4)

    def contrastive(z, y):
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    with pytest.raises(InvalidInput, match="reads the outputs of others"):
        per_example_grad_sqnorm(model, contrastive, x, y)


def test_learned_examples_do_not_spoil_the_proof():
    model, (x, y) = build(SequenceFirst), data(8, 8, 5)
    weight = torch.zeros(8, dtype=torch.float64)
    assert not per_example_grad_sqnorm(model, lambda o, t: own(o, t) * weight, x, y).any()
    truth = brute(model, lambda: own(model(x), y), 8)
    torch.testing.assert_close(per_example_grad_sqnorm(model, own, x, y), truth)


def test_layouts():
    assert layouts((6, 4), 6, 1) == (Layout(0),)
    assert layouts((6, 6, 4), 6, 2) == (Layout(0), Layout(1))
    assert layouts((12, 4), 6, 1) == (Layout(0, 0, (6, 2)), Layout(1, 0, (2, 6)))
    assert layouts((12, 4), 6, None) == () == layouts((5, 4), 6, 1)
    assert layouts((5, 4), 1, 1) == (Layout(0, 0, (1, 5)),)
    x = torch.arange(24).reshape(12, 2)
    assert Layout(1, 0, (2, 6))(x)[3].tolist() == [[6, 7], [18, 19]]
    assert Layout(1, 0, (2, 6))(x.unsqueeze(0), 1).shape == (1, 6, 2, 2)


# Outputs that are made of one another --------------------------------------------------------------------------------


class Nested(nn.Module):
    """Returns a hidden layer, what is made of it, and, with labels, the mean loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x, labels=None):
        h = self.first(x).tanh()
        k = self.second(h).tanh()
        logits = self.head(k)
        out = {"mask": torch.ones(len(x)), "hidden": (h, k), "logits": logits, "last": k}
        return out if labels is None else out | {"loss": F.cross_entropy(logits, labels)}


@pytest.mark.parametrize("verify", [False, True])
def test_a_loss_of_several_outputs_counts_each_way_once(verify):
    model, (x, y) = build(Nested), data(6, 4)

    def losses(o, y):
        return own(o["logits"], y) + o["hidden"][0].square().sum(1) + o["hidden"][1].square().sum(1)

    truth = brute(model, lambda: losses(model(x), y), 6)
    torch.testing.assert_close(per_example_grad_sqnorm(model, losses, x, y, verify=verify), truth)
    norms = per_example_grad_sqnorm(model, losses, x, y, differentiable=True, verify=verify)
    torch.testing.assert_close(norms.detach(), truth)
    found = torch.autograd.grad(norms.sum(), list(model.parameters()))
    again = sum(
        g.square().sum()
        for i in range(6)
        for g in torch.autograd.grad(losses(model(x), y)[i], list(model.parameters()), create_graph=True)
    )
    for a, b in zip(found, torch.autograd.grad(again, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("verify", [False, True])
def test_a_loss_that_the_model_computes_counts_once(verify):
    model, (x, y) = build(Nested), data(6, 4)
    truth = brute(model, lambda: own(model(x)["logits"], y), 6)
    given = {"x": x, "labels": y}
    found = per_example_grad_sqnorm(model, lambda o, _: o["loss"], given, None, reduction="mean", verify=verify)
    torch.testing.assert_close(found, truth)
    y[0] = -100
    with pytest.raises(InvalidInput, match="weighted or ignored"):
        per_example_grad_sqnorm(model, lambda o, _: o["loss"], given, None, reduction="mean")


def test_a_model_that_returns_nothing_of_single_examples_is_refused():
    model, (x, y) = build(Nested), data(6, 4)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, labels):
            return self.inner(x, labels)["loss"]

    with pytest.raises(InvalidInput, match="no output of the model has its 6 examples"):
        per_example_grad_sqnorm(Bare(), lambda o, _: o, {"x": x, "labels": y}, None, reduction="mean")


def hugging_face(kind):
    import transformers

    small = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    if kind == "bert":
        config = transformers.BertConfig(**small, intermediate_size=32, num_labels=CLASSES, output_hidden_states=True)
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, **sizes, decoder_start_token_id=0)
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_hugging_face_models_and_their_losses(kind):
    with seeded(0):
        model = hugging_face(kind).double().eval()
    ids = torch.randint(1, 40, (6, 6), generator=torch.Generator().manual_seed(1))  # as many positions as examples
    labels = ids[:, 0] % CLASSES if kind == "bert" else ids
    truth = []
    for i in range(6):
        loss = model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        truth.append(sum(g.square().sum() for g in found if g is not None))
    given = {"input_ids": ids, "labels": labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = per_example_grad_sqnorm(model, lambda o, _: o.loss, given, None, reduction="mean")
        torch.testing.assert_close(found, torch.stack(truth))
        again = per_example_grad_sqnorm(
            copy.deepcopy(model), lambda o, _: o.loss, given, None, reduction="mean", verify=True
        )
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_reentrant_checkpointing_is_refused(first, differentiable):
    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            if first:  # whose input has no gradient: torch drops the block
                return self.b(checkpoint(self.a, x, use_reentrant=True))
            return checkpoint(self.b, self.a(x), use_reentrant=True)

    model, (x, y) = build(Reentrant), data(6, 4)
    with warnings.catch_warnings(), pytest.raises(InvalidInput, match="use_reentrant=False"):  # noqa: PT012
        warnings.simplefilter("ignore")
        per_example_grad_sqnorm(model, own, x, y, differentiable=differentiable)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        return self.head(x.movedim(1, -1)).tanh() * 2  # (B, *positions, C)


@pytest.mark.parametrize("method", ["exact", "mc", "minibatch"])
@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (lambda: nn.Conv1d(2, CLASSES, 1), (4, 2, 5), 1),
        (Last, (4, 2, 5), -1),
        (Last, (4, 2, 5, 4), -1),
        (lambda: nn.Conv2d(2, CLASSES, 1), (4, 2, 5, 4), 1),
    ],
)
def test_classes_are_where_the_last_layer_puts_them(make, shape, axis, method):
    model, (x, _) = build(make), data(*shape)
    settings = {} if method == "exact" else {"method": method, "generator": 0, "draws": 2}
    expected = fisher_trace(build(make), x, class_dim=axis, **settings)
    assert fisher_trace(model, x, **settings) == expected


def test_an_example_that_is_not_a_number_spoils_its_own_norm_only(recwarn):
    for make, shape in ((SequenceFirst, (8, 8, 5)), (Positions, (6, 6, 5))):
        model, (x, y) = build(make), data(*shape)
        expected = brute(model, lambda model=model, x=x, y=y: own(model(x), y), len(x))
        x[2] = torch.nan
        found = per_example_grad_sqnorm(copy.deepcopy(model), own, x, y)
        assert found.isnan().tolist() == [i == 2 for i in range(len(x))]
        torch.testing.assert_close(found[3:], expected[3:])
    assert not [w for w in recwarn if "vmap" in str(w.message)]
