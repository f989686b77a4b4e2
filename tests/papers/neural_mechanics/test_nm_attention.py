"""The transformer table: each law with the blocks users write, exact in float64 under SGD's gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.papers.neural_mechanics._analysis.structure import structural_symmetries
from mlcollage.papers.neural_mechanics._analysis.tracing import trace
from mlcollage.papers.neural_mechanics.find import find_symmetries

WIDTH, HEADS, TOKENS = 16, 4, 6
X = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def rotated(z, cos, sin):
    a, b = z.chunk(2, -1)
    return z * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    """Grouped heads, optional rotary embedding, by torch's kernel or by hand."""

    def __init__(self, kv=HEADS, rope=False, by_hand=False, bias=True):
        super().__init__()
        self.d, self.kv, self.rope, self.by_hand = WIDTH // HEADS, kv, rope, by_hand
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k = nn.Linear(WIDTH, kv * self.d, bias=bias)
        self.v = nn.Linear(WIDTH, kv * self.d, bias=bias)
        self.o = nn.Linear(WIDTH, WIDTH, bias=bias)

    def heads(self, z, n):
        return z.view(z.shape[0], z.shape[1], n, self.d).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.heads(self.q(x), HEADS), self.heads(self.k(x), self.kv), self.heads(self.v(x), self.kv)
        if self.rope:
            angle = torch.outer(torch.arange(x.shape[1]), 1 / 100 ** (torch.arange(0, self.d, 2) / self.d)).to(x)
            angle = torch.cat([angle, angle], -1)
            q, k = rotated(q, angle.cos(), angle.sin()), rotated(k, angle.cos(), angle.sin())
        k, v = (z.repeat_interleave(HEADS // self.kv, 1) for z in (k, v))
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / self.d**0.5
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def found(model, x=X):
    laws = find_symmetries(model, x)
    assert all(law.residual <= 1e-12 for law in laws if law.broken_by is None)
    assert all(law.certificate["action"] <= 1e-10 for law in laws if law.broken_by is None)
    return laws


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_head_conserves_two_matrices_and_its_key_bias_is_dead(by_hand):
    torch.manual_seed(0)
    laws = found(Attention(by_hand=by_hand))
    qk, vo = laws["matrix:q->k"], laws["matrix:v->o"]
    assert qk.shape == vo.shape == (HEADS, 4, 4)
    assert qk.n_laws == vo.n_laws == HEADS * 10
    dead = [law for law in laws if law.kind == "translation"]
    assert [law.parameters for law in dead] == [("k.bias",)]
    assert dead[0].n_laws == WIDTH
    assert laws.n_laws == 2 * HEADS * 10 + WIDTH


def test_the_quantity_is_the_table_s():
    torch.manual_seed(1)
    model = Attention(kv=2).double()
    laws = structural_symmetries(trace(model, (X.double(),), {}))

    def hat(layer, n):
        return torch.cat([layer.weight, layer.bias[:, None]], 1).view(n, 4, WIDTH + 1)

    q, k, v = hat(model.q, HEADS), hat(model.k, 2), hat(model.v, 2)
    o = model.o.weight.view(WIDTH, HEADS, 4).permute(1, 2, 0)
    grouped = (q @ q.mT).view(2, 2, 4, 4).sum(1) - k @ k.mT
    torch.testing.assert_close(laws["matrix:q->k"].quantities(model), grouped.detach())
    torch.testing.assert_close(
        laws["matrix:v->o"].quantities(model), (v @ v.mT - (o @ o.mT).view(2, 2, 4, 4).sum(1)).detach()
    )


@pytest.mark.parametrize(("kv", "pairs"), [(HEADS, 8), (2, 4), (1, 2)])
def test_a_rotary_embedding_leaves_one_law_per_pair_of_each_key_head(kv, pairs):
    torch.manual_seed(2)
    laws = found(Attention(kv=kv, rope=True, bias=False))
    assert laws["rescale:q->k"].n_laws == pairs
    assert laws["matrix:v->o"].shape == (kv, 4, 4)
    assert {law.name for law in laws} == {"rescale:q->k", "matrix:v->o"}
    with_bias = found(Attention(kv=kv, rope=True))
    assert not with_bias.of_kind("translation")


def test_the_full_matrix_law_fails_under_rotation():
    torch.manual_seed(3)
    plain = structural_symmetries(trace(Attention(), (X,), {}))["matrix:q->k"]
    model = Attention(rope=True).double()
    grads = torch.autograd.grad(model(X.double()).square().sum(), list(model.parameters()))
    residual = plain.residuals(model, dict(zip(dict(model.named_parameters()), grads, strict=True)))
    assert residual.min() > 1e-2


def test_multihead_attention_of_torch_is_read_from_its_packed_projection():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return self.a(x, x, x, need_weights=False)[0]

    torch.manual_seed(4)
    laws = found(Block())
    assert laws.of_kind("matrix").n_laws == 2 * HEADS * 10
    dead = laws["translation:a.in_proj_bias"]
    assert dead.terms[0].rows == (WIDTH, 2 * WIDTH)


def test_per_head_packed_projections_are_read_too():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], HEADS, 12).transpose(1, 2).split(4, -1)
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    laws = found(Packed())
    assert laws.of_kind("matrix").n_laws == 2 * HEADS * 10
    assert laws["translation:qkv"].n_laws == WIDTH


def test_two_linear_maps_in_a_row_conserve_a_matrix_and_a_relu_its_diagonal_only():
    chain = found(nn.Sequential(nn.Linear(WIDTH, 5), nn.Linear(5, 3)))
    assert [(law.name, law.n_laws) for law in chain] == [("matrix:0->1", 15)]
    units = found(nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, 3)))
    assert [(law.name, law.n_laws) for law in units] == [("rescale:0->2", 5)]
    gained = found(nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(TOKENS), nn.Linear(5, 3)).eval())
    assert "matrix" not in {law.kind for law in gained}


def test_convolutions_in_a_row_conserve_a_matrix():
    laws = found(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), torch.randn(2, 3, 8, 8))
    assert [(law.name, law.n_laws) for law in laws] == [("matrix:0->1", 10)]


# --- a whole language model -----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """As in LLaMA's own code."""

    def __init__(self, width):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, llama):
        super().__init__()
        self.n1, self.n2 = (RMSNorm(WIDTH), RMSNorm(WIDTH)) if llama else (nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
        self.attn = Attention(kv=2, rope=True, bias=False) if llama else Attention()
        gpt = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.mlp = SwiGLU(WIDTH) if llama else gpt

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class LanguageModel(nn.Module):
    def __init__(self, llama=False, tied=False):
        super().__init__()
        self.wte = nn.Embedding(11, WIDTH)
        self.wpe = None if llama else nn.Embedding(TOKENS, WIDTH)
        self.block = Block(llama)
        self.norm = RMSNorm(WIDTH) if llama else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.block(x)))


def language_laws(model):
    tokens = torch.randint(11, (3, TOKENS), generator=torch.Generator().manual_seed(5))
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    laws = find_symmetries(model, tokens, loss, targets=tokens)
    assert laws.unhandled == ()
    assert all(law.residual <= 1e-12 for law in laws if law.broken_by is None)
    return laws


def test_a_gpt():
    torch.manual_seed(6)
    laws = language_laws(LanguageModel())
    assert laws["translation:head"].n_laws == WIDTH
    assert laws["translation:wte"].n_laws == 11  # layer norm does not see a shift of the residual stream
    assert laws["translation:block.attn.k"].n_laws == WIDTH
    stream = laws["scale:wte"]
    assert stream.n_laws == 1
    assert stream.broken_by is not None
    assert {"wte.weight", "wpe.weight", "block.attn.o.weight", "block.mlp.2.weight"} <= set(stream.parameters)
    assert laws["rescale:norm->head"].n_laws == WIDTH
    assert laws["matrix:block.attn.q->block.attn.k"].n_laws == HEADS * 10


def test_tied_embeddings_leave_one_translation_of_the_head():
    torch.manual_seed(7)
    laws = language_laws(LanguageModel(tied=True))
    assert "head.weight" not in laws.parameters
    assert laws["translation:wte"].n_laws == 1
    assert not any(law.name.startswith("rescale:norm") for law in laws)


def test_a_llama():
    torch.manual_seed(8)
    laws = language_laws(LanguageModel(llama=True))
    counts = {law.name: law.n_laws for law in laws}
    assert counts == {
        "translation:head": WIDTH,
        "scale:wte": 1,
        "rescale:block.n1->block.attn.q": WIDTH,
        "rescale:block.n2->block.mlp.gate": WIDTH,
        "rescale:block.attn.q->block.attn.k": 4,
        "matrix:block.attn.v->block.attn.o": 20,
        "rescale:block.mlp.up->block.mlp.down": 2 * WIDTH,
        "rescale:norm->head": WIDTH,
    }
