"""Every conservation law of small networks, counted by linear algebra on gradients alone, against those found.

A generator δθ = aθ + b with one number a and b for each parameter is a symmetry if g·(aθ + b) = 0 for the gradient g of
every batch at every θ: the null space of a table with a row for each of many random θ. What it conserves has the
gradient aθ + b, so that the rank of these vectors at one θ counts independent laws.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.nn.vit import ViT
from mlcollage.papers.neural_mechanics import Symmetry, SymmetrySet, Term, find_symmetries
from mlcollage.papers.neural_mechanics._analysis.confirm import confirm
from mlcollage.papers.neural_mechanics._analysis.probe import EPS_NAMES, Probe

SMALL = 1e-6


def all_laws(model: nn.Module, draw, loss, params: dict[str, Tensor]) -> Tensor:
    """An orthonormal basis, (parameters, laws), of the gradients of all that is conserved, at `params`."""
    named = dict(model.named_parameters())
    count, rows = sum(p.numel() for p in named.values()), []
    generator = torch.Generator().manual_seed(5)
    for k in range(2 * count + 20):
        with torch.no_grad():
            for p in named.values():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
        model.zero_grad()
        x, y = draw(k)
        loss(model(*x), y).backward()
        g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in named.values()])
        theta = torch.cat([p.detach().flatten() for p in named.values()])
        row = torch.cat([g * theta, g])
        rows.append(row / row.norm().clamp(min=1e-30))
    _, singular, right = torch.linalg.svd(torch.stack(rows))
    null = right[int((singular > 1e-11 * singular[0]).sum()) :]  # (null, 2 * parameters)
    theta = torch.cat([p.flatten() for p in params.values()])
    return basis((null[:, :count] * theta + null[:, count:]).T)


def basis(vectors: Tensor) -> Tensor:
    if not vectors.numel():
        return vectors
    left, singular, _ = torch.linalg.svd(vectors, full_matrices=False)
    return left[:, singular > 1e-5 * singular[0]]


def found_laws(laws: SymmetrySet, params: dict[str, Tensor]) -> Tensor:
    """The gradients of the quantities, (parameters, laws); of matrix laws, the diagonal ones."""
    columns = []
    for law in laws:
        flat = law.kind == "translation"
        at = {name: torch.zeros_like(value) if flat else value for name, value in params.items()}
        for k in range(law.blocks * (law.size or 1)):
            if law.size is None:
                alpha = torch.full((law.n_laws,), 0.0 if flat else 1.0, dtype=torch.float64)
                alpha[k] += 1.0 if flat else SMALL
            else:
                alpha = torch.eye(law.size, dtype=torch.float64).repeat(law.blocks, 1, 1)
                alpha[k // law.size, k % law.size, k % law.size] += SMALL
            moved = {**at, **law.apply(at, alpha)}
            columns.append(torch.cat([(moved[n] - at[n]).flatten() for n in params]) / (1.0 if flat else SMALL))
    return torch.stack(columns, 1) if columns else torch.zeros(0)


class Residual(nn.Module):
    """Two norms whose results are added."""

    def __init__(self):
        super().__init__()
        self.c, self.s = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.out = nn.Linear(3, 3)

    def forward(self, x):
        return self.out(torch.relu(self.a(self.c(x)) + self.b(self.s(x))).mean((2, 3)))


class Last(nn.Module):
    """A recurrent layer, and a linear layer on its last output."""

    def __init__(self, cell, **kwargs):
        super().__init__()
        self.cell = cell(2, 3, batch_first=True, **kwargs)
        self.out = nn.Linear(3 * (2 if kwargs.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.out(self.cell(x)[0].mean(1))


class Head(nn.Module):
    """Two embeddings of one input, compared."""

    def __init__(self, compare):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.b, self.compare = nn.Linear(3, 3), compare

    def forward(self, x):
        return self.compare(self.a(x), self.b(x))


class Tokens(nn.Module):
    """Sum of embeddings, a norm, a linear layer; tied or not."""

    def __init__(self, padding=None, tied=False, norm=True, scale=1.0):
        super().__init__()
        self.token, self.place = nn.Embedding(6, 4, padding_idx=padding), nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.hidden, self.scale = nn.Linear(4, 4), scale
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids):
        x = self.scale * self.token(ids) + self.place(torch.arange(ids.shape[1]))
        return self.head(F.gelu(self.hidden(self.norm(x)))).flatten(0, 1)


class Block(nn.Module):
    """Attention by matrix products, after a norm, in a residual stream with a position table."""

    def __init__(self, fused=False):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 4, 4))
        self.up, self.norm, self.qkv, self.o = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.last, self.out, self.fused = nn.LayerNorm(4), nn.Linear(4, 3), fused

    def forward(self, x):
        x = self.up(x) + self.place
        q, k, v = (z.unflatten(-1, (2, 2)).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            z = torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1) @ v
        x = x + self.o(z.transpose(1, 2).flatten(2))
        return self.out(self.last(x).mean(1))


class Gained(nn.Module):
    """A norm that is written out, with a gain of 1 + weight, as some language models have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = self.a(x)
        h = h - h.mean(-1, keepdim=True)
        h = h / h.pow(2).mean(-1, keepdim=True).sqrt()
        return self.b(h * self.gain)


def gpt2():
    import transformers

    config = transformers.GPT2Config(
        n_embd=4, n_head=2, n_layer=1, vocab_size=6, n_positions=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    return Logits(model)


def bert():
    import transformers

    config = transformers.BertConfig(
        hidden_size=4, num_attention_heads=2, num_hidden_layers=1, vocab_size=6, intermediate_size=4,
        max_position_embeddings=4, type_vocab_size=1, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        num_labels=3, pad_token_id=None,
    )  # fmt: skip
    return Logits(transformers.BertForSequenceClassification(config))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits.flatten(0, -2)


def mlp(*sizes, act=nn.ReLU, last=nn.Identity):
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1], last())


def features(*shape):
    return lambda seed, n=8: torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(vocabulary, length):
    return lambda seed, n=8: torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


NETS = {
    "mlp": (lambda: mlp(3, 4, 4, 3), features(3)),
    "mlp tanh": (lambda: mlp(3, 4, 3, act=nn.Tanh), features(3)),
    "mlp linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), features(3)),
    "bn mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), features(3)),
    "bias through": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)),
        features(3),
    ),
    "residual": (Residual, features(2, 4, 4)),
    "group norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ),
        features(2, 4, 4),
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        features(2, 4, 4),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 2, groups=2),
            nn.Conv2d(2, 3, 1),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, 3),
        ),
        features(2, 4, 4),
    ),
    "rnn": (lambda: Last(nn.RNN), features(4, 2)),
    "rnn relu": (lambda: Last(nn.RNN, nonlinearity="relu", num_layers=2), features(4, 2)),
    "lstm": (lambda: Last(nn.LSTM), features(4, 2)),
    "gru": (lambda: Last(nn.GRU, bidirectional=True), features(4, 2)),
    "cosine": (lambda: Head(F.cosine_similarity), features(3)),
    "normalize": (lambda: Head(lambda a, b: F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T), features(3)),
    "distance": (lambda: Head(lambda a, b: (a - b).pow(2).sum(-1)), features(3)),
    "logsumexp": (lambda: Head(lambda a, b: torch.logsumexp(a, -1) - b.sum(-1)), features(3)),
    "maximum": (lambda: Head(lambda a, b: a - a.amax(-1, keepdim=True) + b), features(3)),
    "tokens": (Tokens, tokens(6, 5)),
    "tokens bare": (lambda: Tokens(norm=False), tokens(6, 5)),
    "tokens tied": (lambda: Tokens(tied=True), tokens(6, 5)),
    "tokens scaled": (lambda: Tokens(scale=2**0.5), tokens(6, 5)),
    "block": (Block, features(4, 2)),
    "block fused": (lambda: Block(True), features(4, 2)),
    "written out": (Gained, features(3)),
    "after softmax": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)),
        features(3),
    ),
    "bare norm": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)
        ),
        features(3),
    ),
    "gpt2": (gpt2, tokens(6, 4)),
    "bert": (bert, tokens(6, 4)),
    "vit": (
        lambda: ViT((1, 4, 4), 3, patch_size=2, dim=4, depth=2, heads=2, mlp_ratio=0.5),
        features(1, 4, 4),
    ),
}


def compared(make, sample):
    torch.manual_seed(0)
    model = make().double().train()
    for module in model.modules():
        for name in EPS_NAMES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-30)
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = model(sample(0))
    classes = out.shape[-1] if out.dim() > 1 else 0

    def draw(k):
        generator = torch.Generator().manual_seed(k + 1000)
        y = torch.randint(classes, out.shape[:1], generator=generator) if classes else torch.randn(out.shape).double()
        return (sample(k),), y

    loss = F.cross_entropy if classes else F.mse_loss
    (x,), y = draw(0)
    found = find_symmetries(model, x, loss, targets=y)
    mine, truth = found_laws(found, params), all_laws(model, draw, loss, params)
    return found, mine, truth


@pytest.mark.parametrize("name", NETS)
def test_all_laws_of_small_networks_are_found(name):
    found, mine, truth = compared(*NETS[name])
    outside = (mine - truth @ (truth.T @ mine)).norm(dim=0) / mine.norm(dim=0) if mine.numel() else torch.zeros(1)
    assert outside.max() < 1e-4, found.to_frame()
    assert mine.shape[1] == basis(mine).shape[1] == truth.shape[1], (found.to_frame(), found.unhandled)


def test_a_padding_row_takes_part_in_no_law():
    """Its gradient is none: where it is not zero, no sum that it enters is conserved."""
    torch.manual_seed(0)
    ids = torch.randint(6, (8, 5))
    for zero in (True, False):
        model = Tokens(padding=2)
        if not zero:
            nn.init.normal_(model.token.weight)
        found = find_symmetries(model, ids, F.cross_entropy, targets=torch.randint(6, (40,)))
        assert max(law.residual for law in found if law.kind != "scale") < 1e-9
        rows = found["translation:token"].terms[0].laws
        assert rows == (0, 1, -1, 2, 3, 4)
        joint = [
            law
            for law in found
            if law.kind == "translation" and set(law.parameters) >= {"token.weight", "place.weight"}
        ]
        assert not joint
        assert any(law.kind == "scale" for law in found) is zero


def test_an_epsilon_is_blamed_on_the_same_batches_only():
    """A law that fails on some batches fails with a small epsilon, too."""
    torch.manual_seed(0)
    model = Tokens(padding=2)
    nn.init.normal_(model.token.weight)
    ids = torch.tensor([[0, 1, 3, 4, 5]] * 3 + [[0, 1, 2, 4, 5]])
    probe = Probe(model, (ids,), {}, F.cross_entropy, torch.randint(6, (20,)))
    probe.batch = lambda k: ((torch.where(ids == 2, 0, ids) if k == 0 else ids,), {}, probe.targets)
    law = Symmetry("scale", "embeddings", (Term("token.weight"), Term("place.weight")), 1)
    kept, refused = confirm([law], probe)
    assert not kept
    assert "rejected" in refused[0]


def test_what_is_not_covered_is_said():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.norm, self.out = nn.Parameter(torch.zeros(4)), nn.LayerNorm(4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(F.layer_norm(x, (4,)) * (1 + self.gain))

    x = torch.randn(8, 4)
    assert any("about a point other than 0" in note for note in find_symmetries(Offset(), x, F.cross_entropy).unhandled)
    distances = find_symmetries(Head(torch.cdist), torch.randn(8, 3))
    assert any("_cdist_forward" in note for note in distances.unhandled)


class Exponential(nn.Module):
    """The bias before an exp takes a shift that the next layer's weights undo: a law that is neither kind alone."""

    def __init__(self, log=False):
        super().__init__()
        self.first, self.last, self.log = nn.Linear(3, 2, bias=not log), nn.Linear(2, 2), log

    def forward(self, x):
        h = self.first(x)
        h = h.abs().log() if self.log else (0.1 * h).exp()
        return self.last(h - h.mean(0) if self.log else h)


@pytest.mark.parametrize("log", [False, True])
def test_laws_around_an_exp_or_log_are_named_as_left_out(log):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Exponential(log).double(), torch.randn(8, 3).double(), torch.randint(0, 2, (8,))
    found = find_symmetries(model, x, F.cross_entropy)
    params = {name: p.detach() for name, p in model.named_parameters()}
    truth = all_laws(Exponential(log).double(), lambda k: ((x,), y), F.cross_entropy, params)
    assert truth.shape[1] == found_laws(found, params).shape[1] + 2
    assert [note for note in found.unhandled if note.endswith("were left out")]
    model.first.requires_grad_(False)
    assert find_symmetries(model, x, F.cross_entropy).unhandled == ()
