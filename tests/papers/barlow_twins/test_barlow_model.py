"""Views, projector, model, mixed samples and accumulation."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn import build
from mlcollage.papers.barlow_twins import (
    BarlowProjector,
    BarlowTwins,
    BarlowTwinsLoss,
    accumulate_gradients,
    barlow_twins_loss,
    mixed_barlow_term,
    standardize,
    two_views,
)


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(dropout=0.0, **settings):
    def make():
        backbone = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout))
        return BarlowTwins(backbone, BarlowProjector(8, (12, 10)), BarlowTwinsLoss(0.02, check=False), **settings)

    return build(make, 0).double()


@pytest.fixture
def views():
    x = randn(0, 24, 5, dtype=torch.float64)
    return x + 0.2 * randn(1, 24, 5, dtype=torch.float64), x + 0.2 * randn(2, 24, 5, dtype=torch.float64)


def test_the_model_is_backbone_projector_and_loss(views):
    model = small()
    h = [model.backbone(v) for v in views]
    expected = barlow_twins_loss(*(model.projector(x) for x in h), lambd=0.02)
    assert torch.equal(model(*views), expected)
    assert torch.equal(model.encode(views[0]), h[0])
    model.eval()
    assert torch.equal(model.representations(views[0], batch_size=7), model.encode(views[0]).detach())


def test_views_go_through_the_network_one_after_the_other():
    """Two passes leave a running mean of 1.29, a joint one .65."""
    norm = nn.BatchNorm1d(1)
    model = BarlowTwins(norm, loss=BarlowTwinsLoss(check=False))
    model(torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]]))
    assert float(norm.running_mean) == pytest.approx(1.29)


def test_representations_leave_the_mode_and_statistics(views):
    model = small(dropout=0.5).train()
    model.backbone[1].eval()  # frozen on purpose
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = model.representations(views[0]), model.representations(views[0])
    assert torch.equal(first, second)
    assert model.training
    assert not model.backbone[1].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_paper_s_projector():
    with torch.device("meta"):
        projector = BarlowProjector(2048)
    weights = 2048 * 8192 + 2 * 8192**2
    assert sum(p.numel() for p in projector.parameters()) == weights + 2 * 2 * 8192
    assert list(projector.state_dict())[:2] == ["0.weight", "1.weight"]
    assert [i for i, m in enumerate(projector) if isinstance(m, nn.Linear)] == [0, 3, 6]
    bare = BarlowProjector(8, (4, 3), norm=False)
    assert [type(m).__name__ for m in bare] == ["Linear", "ReLU", "Linear"]
    assert bare[0].bias is not None
    assert bare[2].bias is None
    for bad in ((), (0,), (2.5,)):
        with pytest.raises(InvalidInput, match="dims"):
            BarlowProjector(8, bad)


@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, b],
        lambda a, b: ((a, b), torch.arange(24)),
        lambda a, b: ([a, b], torch.arange(24), [f"{i}.png" for i in range(24)]),
        lambda a, b: (a, b, torch.arange(24)),
        lambda a, b: (a, b, ["name"] * 24),
        lambda a, b: {"view_a": a, "view_b": b, "label": torch.arange(24)},
    ],
)
def test_batches_as_loaders_give_them(views, batch):
    found = two_views(batch(*views))
    assert found[0] is views[0]
    assert found[1] is views[1]
    assert torch.equal(small()(batch(*views)), small()(*views))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda a, b: torch.cat([a, b]), "joined or interleaved"),
        (lambda a, b: (a, b, a), "3 views"),
        (lambda a, b: ((a, b, a), torch.arange(24)), "average it over pairs"),
        (lambda a, b: (a, torch.arange(24)), "no two views"),
        (lambda a, b: (a, torch.arange(24), b), "no two views"),
        (lambda a, b: (a, b[:-1]), "one sample"),
        (lambda a, b: (a, a.new_zeros(24)), "no two views"),
    ],
)
def test_what_is_no_pair_of_views_is_refused(views, batch, words):
    with pytest.raises(InvalidInput, match=words):
        small()(batch(*views))


def test_more_than_two_views_are_averaged_by_the_user(views):
    model = small()
    three = [*views, randn(5, 24, 5, dtype=torch.float64)]
    total = sum(model(a, b) for a, b in itertools.combinations(three, 2))
    assert torch.isfinite(total)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "settings", "shape"),
    [
        (lambda x: x[:, :, None, None], {}, (4, 6)),
        (lambda x: x[:, :, None, None].expand(-1, -1, 3, 3), {"pool": "mean"}, (4, 6)),
        (lambda x: x[:, :, None, None].expand(-1, -1, 3, 3), {"pool": "max"}, (4, 6)),
        (lambda x: x[:, None, None].expand(-1, 7, 7, -1), {"pool": "channels_last_mean"}, (4, 6)),
        (lambda x: x[:, None].expand(-1, 3, -1), {"pool": "tokens_mean"}, (4, 6)),
        (lambda x: x[:, None].expand(-1, 3, -1), {"pool": "cls"}, (4, 6)),
        (lambda x: x[:, None].expand(-1, 3, -1), {"pool": lambda t: t.flatten(1)}, (4, 18)),
        (lambda x: (x, x + 1), {"output": 1}, (4, 6)),
        (lambda x: {"h": x, "z": x}, {"output": "h"}, (4, 6)),
    ],
)
def test_what_backbones_return(make, settings, shape):
    x = randn(0, 4, 6)
    h = BarlowTwins(Returns(make), **settings).encode(x)
    assert h.shape == shape
    if shape == (4, 6) and "output" not in settings:
        assert torch.allclose(h, x)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (lambda x: x[:, None, None].expand(-1, 7, 7, -1), {}, r"\(4, 7, 7, 6\).*channels_last_mean"),
        (lambda x: x[:, None].expand(-1, 3, -1), {}, r"\(4, 3, 6\).*pool='cls'"),
        (lambda x: (x, x), {}, "tuple with 0, 1; say which"),
        (lambda x: {"h": x}, {}, "dict with 'h'"),
        (lambda x: {"h": x}, {"output": "g"}, "no output 'g'"),
        (lambda x: x, {"pool": "mean"}, "for outputs of 4 axes"),
        (lambda x: x[:, 0], {}, "give pool a function"),
    ],
)
def test_what_is_no_representation_is_refused(make, settings, words):
    with pytest.raises(InvalidInput, match=words):
        BarlowTwins(Returns(make), **settings).encode(randn(0, 4, 6))


def test_unknown_pooling_is_refused():
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        BarlowTwins(nn.Identity(), pool="meen")


def test_a_transformers_model_is_a_backbone():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.image_size, config.patch_size = 8, 4
    model = BarlowTwins(ViTModel(config, add_pooling_layer=False), output="last_hidden_state", pool="cls")
    assert model.encode(torch.rand(3, 3, 8, 8)).shape == (3, 16)
    with pytest.raises(InvalidInput, match="last_hidden_state"):
        BarlowTwins(model.backbone).encode(torch.rand(3, 3, 8, 8))


@pytest.mark.parametrize("micro", [5, 6, 23, 24, 100])
def test_accumulated_gradients_are_those_of_the_whole_batch(views, micro):
    def make():
        return BarlowTwins(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 12)), loss=BarlowTwinsLoss(0.02))

    whole, parts = build(make, 0).double(), build(make, 0).double()
    loss = whole(*views)
    loss.backward()
    assert torch.allclose(accumulate_gradients(parts, *views, micro), loss.detach(), rtol=1e-12)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    accumulate_gradients(parts, *views, micro, scale=2.0)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(3 * p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_accumulation_draws_one_noise_for_both_passes_and_updates_statistics_once(views):
    """The reference computes the same parts with a graph from the start."""
    model, reference = small(dropout=0.5), small(dropout=0.5)
    state = torch.get_rng_state()
    loss = accumulate_gradients(model, *views, 8)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    seen = []

    def embed(x, key):
        from mlcollage._random import derive

        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, *key))
            return reference.embed(x)

    seed = int(torch.randint(2**31, ()))
    for v, x in enumerate(views):
        seen.append(torch.cat([embed(x[i : i + 8], (v, i)) for i in (0, 8, 16)]))
    expected = reference.loss(*seen)
    expected.backward()
    assert torch.allclose(loss, expected.detach(), rtol=1e-12)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for p, q in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(p, q)  # running statistics, and six updates
    assert int(model.backbone[1].num_batches_tracked) == 6
    assert torch.equal(after, torch.get_rng_state())


def test_a_mean_over_parts_is_another_loss(pair):
    a, b = pair
    halves = [float(barlow_twins_loss(a[i : i + 3], b[i : i + 3])) for i in (0, 3)]
    assert sum(halves) / 2 == pytest.approx(0.028415, abs=5e-7)


def test_accumulation_refuses_what_it_cannot_do(views):
    with pytest.raises(InvalidInput, match="mix=0"):
        accumulate_gradients(small(mix=1.0), *views, 8)
    with pytest.raises(InvalidInput, match="micro_batch"):
        accumulate_gradients(small(), *views, 1)


@pytest.mark.parametrize("d", [3, 40])
def test_the_mixed_term_is_its_definition(d):
    m, a, b = (randn(i, 10, d, dtype=torch.float64).requires_grad_() for i in range(3))
    index, alpha = torch.randperm(10, generator=torch.Generator().manual_seed(0)), 0.3
    sm, sa, sb = (standardize(z) for z in (m, a, b))
    c_a, c_b = sm.T @ sa / 10, sm.T @ sb / 10
    goal_a = alpha * sa.T @ sa / 10 + (1 - alpha) * sb[index].T @ sa / 10
    goal_b = alpha * sa.T @ sb / 10 + (1 - alpha) * sb[index].T @ sb / 10
    expected = 0.02 * ((c_a - goal_a).square().sum() + (c_b - goal_b).square().sum())
    found = mixed_barlow_term(m, a, b, index, alpha, lambd=0.02)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    grads = [torch.autograd.grad(t, (m, a, b)) for t in (expected, found)]
    assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(*grads, strict=True))


def test_mixed_samples_are_a_third_pass_with_a_seed(views):
    model = small(mix=4.0)
    first = float(model(*views).detach())
    assert int(model.backbone[1].num_batches_tracked) == 3
    assert float(small(mix=4.0)(*views).detach()) == first
    assert float(model(*views).detach()) != first  # another mixture in the next step
    assert first > float(small()(*views).detach())
    linear = BarlowTwins(nn.Linear(5, 4), loss=BarlowTwinsLoss(eps=0.0), mix=1.0).double()
    with pytest.raises(InvalidInput, match="one shape"):
        mixed_barlow_term(views[0], views[1], views[0][:3], torch.arange(24), 0.5)
    with pytest.raises(InvalidInput, match="process group"):
        BarlowTwins(nn.Linear(5, 4), loss=BarlowTwinsLoss(normalize="none"), mix=1.0)
    assert torch.isfinite(linear(*views))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        return checkpoint(self.norm, x, use_reentrant=False)


def test_recomputation_that_updates_statistics_twice_is_seen():
    """Views [0, 2] and [10, 14]: running mean 2.2249 instead of 1.29, four updates instead of two."""
    model = BarlowTwins(Checkpointed(), nn.Linear(1, 3), loss=BarlowTwinsLoss(check=False))
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])
    model(a, b).backward()
    assert float(model.backbone.norm.running_mean) == pytest.approx(2.2249, abs=1e-4)
    with pytest.warns(UserWarning, match=r"updated 2 times between two calls.*checkpointing"):
        model(a, b)
    plain = BarlowTwins(nn.BatchNorm1d(1), nn.Linear(1, 3), loss=BarlowTwinsLoss(check=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            plain(a, b).backward()


def test_training_makes_views_agree_and_columns_differ():
    x = randn(3, 512, 5)
    model = build(lambda: BarlowTwins(nn.Linear(5, 16), nn.Linear(16, 5, bias=False), BarlowTwinsLoss(0.02)), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        loss = model(x + 0.1 * randn(2 * step, 512, 5), x + 0.1 * randn(2 * step + 1, 512, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_accumulation_is_not_taken_for_recomputation():
    model = build(lambda: BarlowTwins(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))), 0)
    x_a, x_b = randn(0, 32, 4), randn(1, 32, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x_a, x_b)
        accumulate_gradients(model, x_a, x_b, 8)
        model(x_a, x_b)
    assert int(model.backbone[1].num_batches_tracked) == 2 + 8 + 2


def test_what_is_no_network_and_no_pair_is_refused():
    x = randn(0, 8, 4)
    with pytest.raises(InvalidInput, match="Module is needed"):
        BarlowTwins(lambda x: x)
    with pytest.raises(InvalidInput, match="pool returns a NoneType"):
        BarlowTwins(nn.Linear(4, 6), pool=lambda out: None).encode(x)
    with pytest.raises(InvalidInput, match="requires_grad=False"):
        accumulate_gradients(BarlowTwins(nn.Linear(4, 6)).requires_grad_(False), x, x + 1, 4)
    with pytest.raises(InvalidInput, match="views are mappings"):  # not two entries of the first view
        two_views(({"x": x, "mask": x}, {"x": x, "mask": x}))
    with pytest.raises(InvalidInput, match="a batch is a NoneType"):
        two_views(None)


def test_the_order_of_mixed_samples_has_all_rows():
    z = randn(0, 8, 4)
    with pytest.raises(InvalidInput, match="order of the 8 rows"):
        mixed_barlow_term(z, z, z, torch.arange(4), 0.5)
