"""What holds for any cloud: identities of the layers and the model, padding, modes, types, processes and refusals."""

import copy
import math

import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.measure import RigidTransform, chamfer_distance, random_rotation
from mlcollage.papers.canonical_capsules import (
    CanonicalCapsules,
    CapsuleEncoder,
    LossWeights,
    PatchDecoder,
    attentive_context_norm,
    context_norm,
    equilibrium_loss,
    localization_loss,
    pool_capsules,
    random_motion,
)
from mlcollage.papers.canonical_capsules.context_norm import PointBatchNorm


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=draw(seed), dtype=torch.float64)


def small(dim=3, **settings):
    torch.manual_seed(0)
    return CanonicalCapsules(dim, 4, 8, points=24, hidden=16, **settings).double()


def by_definition(x, a, eps=1e-3):
    """The norm with its tensor of B N K C numbers."""
    share = a / a.sum(1, keepdim=True).clamp_min(1e-3)
    mean = torch.einsum("bnk,bnc->bkc", share, x)
    gap = x[:, :, None] - mean[:, None]
    var = torch.einsum("bnk,bnkc->bkc", share, gap.square()) + eps
    return (a[..., None] * gap / var.sqrt()[:, None]).sum(2)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_context_norm_is_its_definition(offset):
    x, a = offset + cloud(2, 11, 5), (3 * cloud(2, 11, 4, seed=1)).softmax(-1)
    assert torch.allclose(attentive_context_norm(x, a), by_definition(x, a), atol=1e-10)
    # In single precision too: far from the origin the variance keeps its digits.
    far = 100 + 0.01 * cloud(1, 256, 3)
    even = torch.full((1, 256, 2), 0.5, dtype=torch.float64)
    single = attentive_context_norm(far.float(), even.float())
    assert torch.allclose(single.double(), by_definition(far.float().double(), even), atol=2e-3)


@pytest.mark.parametrize("low", [0, 10])  # 10: one capsule's mass is below the clamp
@pytest.mark.parametrize("block", [1 << 18, 1])
def test_the_norm_s_gradients_are_those_of_the_definition(low, block, monkeypatch):
    monkeypatch.setattr(context_norm, "_BLOCK", block)
    x, logits = (3 + cloud(3, 9, 5)).requires_grad_(), cloud(3, 9, 4, seed=1)
    logits[1, :, 0] -= low
    a, g = logits.softmax(-1).requires_grad_(), cloud(3, 9, 5, seed=2)
    found, true = (torch.autograd.grad(f(x, a), (x, a), g) for f in (attentive_context_norm, by_definition))
    assert all(torch.allclose(p, q, atol=1e-9) for p, q in zip(found, true, strict=True))
    # Second derivatives, and those that torch.func takes.
    twice = []
    for f in (attentive_context_norm, by_definition):
        first = torch.autograd.grad(f(x, a), (x, a), g, create_graph=True)
        twice.append(torch.autograd.grad(sum(t.square().sum() for t in first), (x, a)))
    assert all(torch.allclose(p, q, rtol=1e-7, atol=1e-7) for p, q in zip(*twice, strict=True))
    batch = torch.stack([x.detach(), 2 * x.detach()])
    of_one = torch.func.grad(lambda x, a: (g * attentive_context_norm(x, a)).sum())
    by_vmap = torch.func.vmap(of_one, in_dims=(0, None))(batch, a.detach())
    assert torch.allclose(by_vmap[0], true[0], atol=1e-9)
    tangent = torch.func.jvp(lambda x: attentive_context_norm(x, a.detach()), (x.detach(),), (g,))[1]
    assert torch.allclose((g * tangent).sum(), (true[0] * 0 + g * jvp_by_definition(x, a, g)).sum(), atol=1e-8)


def jvp_by_definition(x, a, g):
    return torch.func.jvp(lambda x: by_definition(x, a.detach()), (x.detach(),), (g,))[1]


def test_what_the_gradient_keeps_is_small():
    """Not four axes, and no copies either: x, the attention, the center and numbers of the branches."""
    b, n, c, k = 2, 64, 32, 4
    x, a = cloud(b, n, c).requires_grad_(), cloud(b, n, k, seed=1).softmax(-1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        attentive_context_norm(x, a)
    assert sum(kept) <= b * (n * c + n * k + c + k + 2 * k * c)


def test_no_tensor_has_all_four_axes():
    """The largest tensor that autograd saves has B N max(C, K) numbers, or B K C."""
    b, n, c, k = 2, 50, 32, 20
    sizes = []
    x = cloud(b, n, c).requires_grad_()
    a = cloud(b, n, k, seed=1).softmax(-1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        attentive_context_norm(x, a)
    assert max(sizes) <= max(b * n * max(c, k), b * k * c)


def test_points_may_come_in_any_order():
    model, x = small().eval(), cloud(2, 24, 3)
    order = torch.randperm(24, generator=draw())
    a, b = model(x), model(x[:, order])
    for name in ("theta", "beta"):
        assert torch.allclose(getattr(a.capsules, name), getattr(b.capsules, name), atol=1e-10)
    assert torch.allclose(a.capsules.attention[:, order], b.capsules.attention, atol=1e-10)
    assert torch.allclose(a.decoded, b.decoded, atol=1e-10)


def test_a_cloud_s_result_does_not_depend_on_its_batch():
    model, x = small().eval(), cloud(3, 24, 3)
    whole, alone = model(x), model(x[1:2])
    assert torch.allclose(whole.canonical[1:2], alone.canonical, atol=1e-10)
    assert torch.allclose(whole.decoded[1:2], alone.decoded, atol=1e-10)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("inputs", ["coordinates", "distances"])
def test_padding_changes_nothing(mode, inputs):
    model, x = small(inputs=inputs).train(mode == "train"), cloud(2, 24, 3)
    other = copy.deepcopy(model)
    padded = torch.cat([x, torch.full((2, 37, 3), 1e6, dtype=torch.float64)], 1)
    padded[0, -1] = math.nan
    mask = torch.arange(61).expand(2, -1) < 24
    a, b = model(x), other(padded, mask)
    for name in ("theta", "beta"):
        assert torch.allclose(getattr(a.capsules, name), getattr(b.capsules, name), atol=1e-8)
    assert torch.equal(b.capsules.attention[:, 24:], torch.zeros(2, 37, 4, dtype=torch.float64))
    assert torch.allclose(a.decoded, b.decoded, atol=1e-7)
    motions = model.draw_motions(x, draw())
    losses = [m.losses(y, k, motions=motions) for m, y, k in ((model, x, None), (other, padded, mask))]
    for name, value in losses[0].items():
        assert torch.allclose(value, losses[1][name], atol=1e-7), name
    losses[1]["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in other.parameters())
    for (name, v), w in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(v.double(), w.double(), atol=1e-8), name


def test_clouds_of_different_size_in_one_batch_are_as_alone():
    model, x = small().eval(), cloud(2, 30, 3)
    mask = torch.arange(30)[None] < torch.tensor([[17], [30]])
    both = model(x, mask)
    alone = model(x[:1, :17])
    assert torch.allclose(both.canonical[:1, :17], alone.canonical, atol=1e-9)
    assert torch.allclose(both.pose.R[:1], alone.pose.R, atol=1e-9)


def test_the_masked_batch_norm_is_that_of_the_real_points():
    norm, plain = PointBatchNorm(5).double(), torch.nn.BatchNorm1d(5).double()
    x, mask = cloud(3, 7, 5), torch.rand(3, 7, generator=draw()) < 0.6
    out = norm(x, mask)
    assert torch.allclose(out[mask], plain(x[mask]))
    assert not out[~mask].any()
    assert torch.equal(norm.running_var, plain.running_var)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_invariant_encoder_is_exactly_that(dim):
    torch.manual_seed(0)
    encoder, x = CapsuleEncoder(dim, 5, 16, inputs="distances").double().eval(), cloud(3, 30, dim)
    r = random_rotation(3, dim, generator=draw(), dtype=torch.float64)
    motion = RigidTransform(r, cloud(3, dim, seed=2))
    a, b = encoder(x), encoder(motion.apply(x))
    assert torch.allclose(a.attention, b.attention, atol=1e-9)
    assert torch.allclose(a.beta, b.beta, atol=1e-8)
    assert torch.allclose(motion.apply(a.theta), b.theta, atol=1e-9)


def test_poses_move_with_the_cloud_where_attention_stays():
    x, a = cloud(2, 12, 3), cloud(2, 12, 4, seed=1).softmax(-1)
    motion = RigidTransform(random_rotation(2, generator=draw(), dtype=torch.float64), cloud(2, 3, seed=3))
    assert torch.allclose(pool_capsules(a, motion.apply(x)), motion.apply(pool_capsules(a, x)))
    assert torch.allclose(localization_loss(a, motion.apply(x)), localization_loss(a, x))
    share = a / a.sum(1, keepdim=True)
    gap = x[:, :, None] - pool_capsules(a, x)[:, None]
    assert torch.allclose(localization_loss(a, x), (share * gap.square().sum(-1)).sum((1, 2)).mean())


def test_the_equilibrium_does_not_change_with_the_number_of_points():
    a = cloud(2, 12, 4).softmax(-1)
    assert torch.allclose(equilibrium_loss(a), equilibrium_loss(a.repeat(1, 3, 1)))
    assert torch.allclose(9 * equilibrium_loss(a, unit="points"), equilibrium_loss(a.repeat(1, 3, 1), unit="points"))
    paper = 1e-3 * equilibrium_loss(a.repeat_interleave(256, 1)[:, :1024], unit="points")
    ours = LossWeights().equilibrium * equilibrium_loss(a.repeat_interleave(256, 1)[:, :1024])
    assert torch.allclose(paper, ours)


def test_canonical_clouds_are_moved_rigidly():
    model, x = small(dim=2).eval(), cloud(3, 24, 2)
    out = model(x)
    assert torch.allclose(torch.cdist(out.canonical, out.canonical), torch.cdist(x, x), atol=1e-9)
    assert torch.allclose(torch.linalg.det(out.pose.R), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(out.pose.theta_bar.mean(1), torch.zeros(3, 2, dtype=torch.float64), atol=1e-12)
    gap = out.pose.transform.apply(out.capsules.theta) - out.pose.theta_bar
    assert torch.allclose(gap.square().sum(-1).mean(1), out.pose.residual)


def test_the_decoder_is_its_loop_over_capsules():
    torch.manual_seed(0)
    decoder = PatchDecoder(3, 4, 6, points=20, hidden=16, codes=5).double().eval()
    theta, beta = cloud(2, 4, 3), cloud(2, 4, 6, seed=1)
    out = decoder(theta, beta)
    for k in range(4):
        x = torch.cat([decoder.grid[k].expand(2, -1, -1), beta[:, None, k].expand(-1, 5, -1)], -1)
        for i in range(4):
            x = x @ decoder.weight[i][k].T + decoder.bias[i][k]
            if i < 3:
                x = (x / math.sqrt(1 + 1e-5)).relu()  # running statistics are still 0 and 1
        assert torch.allclose(out[:, k], theta[:, k, None] + x.tanh(), atol=1e-12)


def test_the_reconstruction_is_the_chamfer_distance_of_the_first_view():
    model, x = small().train(), cloud(2, 24, 3)
    a, b = model.draw_motions(x, draw())
    twin = copy.deepcopy(model)
    losses = model.losses(x, motions=(a, b))
    both = twin.encoder(torch.cat([a.apply(x), b.apply(x)]))
    pose = twin.canonicalizer(both)
    canonical = pose.transform.apply(torch.cat([a.apply(x)] * 2))[:2]
    f = twin.second_encoder.point_features(canonical)
    decoded = twin.decoder(pool_capsules(both.attention[:2], canonical), pool_capsules(both.attention[:2], f))
    assert torch.allclose(losses["reconstruction"], chamfer_distance(decoded.flatten(1, 2), canonical))


def test_a_loss_of_weight_zero_is_not_computed():
    model = small(weights=LossWeights(reconstruction=0, equilibrium=0))
    assert model.decoder is model.second_encoder is None
    losses = model.losses(cloud(2, 24, 3), generator=draw())
    assert sorted(losses) == ["canonical", "equivariance", "invariance", "localization", "total"]
    assert model.eval()(cloud(2, 24, 3)).decoded is None
    plain = small(canonicalize=False)
    x = cloud(2, 24, 3)
    assert "canonical" not in plain.losses(x, generator=draw())
    out = plain.eval()(x)
    assert torch.allclose(out.canonical, x - out.capsules.theta.mean(1, keepdim=True))
    with pytest.raises(InvalidInput, match="nothing to train"):
        small(weights=LossWeights(0, 0, 0, 0, 0, 0)).losses(x)


def test_motions_of_views_differ_and_follow_the_generator():
    model, x = small(), cloud(4, 24, 3)
    a, b = model.draw_motions(x, draw(1))
    assert not torch.allclose(a.R, b.R)
    again, _ = model.draw_motions(x, draw(1))
    assert torch.equal(a.R, again.R)
    state = torch.get_rng_state()
    model.losses(x, generator=draw(2))
    assert torch.equal(state, torch.get_rng_state())
    g = draw(3)
    seen = torch.cat([random_motion(5, generator=g).R for _ in range(4)])
    assert len(torch.unique(seen.flatten(1), dim=0)) == 20
    assert float(random_motion(100, 2, shift=0.1, generator=g).t.abs().max()) <= 0.1


def test_training_goes_through_forward():
    """So that a wrapper's hooks see it."""
    model, x = small(), cloud(2, 24, 3)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    model.losses(x, generator=draw())
    model(x, losses=True, generator=draw())
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types(dtype):
    model, x = small().to(dtype), cloud(2, 24, 3).to(dtype)
    out = model.eval()(x)
    assert out.canonical.dtype == out.decoded.dtype == out.pose.R.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = small().float().losses(cloud(2, 24, 3).float(), generator=draw())
    assert losses["total"].isfinite()


def test_extra_features():
    model, x = small(extra=2), cloud(2, 24, 3)
    f = cloud(2, 24, 2, seed=5)
    assert not torch.allclose(model.eval()(x, features=f).canonical, model(x, features=2 * f).canonical)
    assert model.losses(x, features=f, generator=draw())["total"].isfinite()
    with pytest.raises(InvalidInput, match="2 extra features"):
        model(x)
    with pytest.raises(InvalidInput, match="0 extra features"):
        small()(x, features=f)


@pytest.mark.parametrize("dim", [2, 3])
def test_normals_turn_with_the_cloud_and_are_not_shifted(dim):
    model, x = small(dim, normals=True, extra=1), cloud(2, 24, dim)
    n, rest = torch.nn.functional.normalize(cloud(2, 24, dim, seed=4), dim=-1), cloud(2, 24, 1, seed=5)
    f = torch.cat([n, rest], -1)
    motions = model.draw_motions(x, draw())
    seen = []
    for encoder in (model.encoder, model.second_encoder):
        encoder.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    losses = model.losses(x, features=f, motions=motions)
    views, of_canonical = seen
    for i, motion in enumerate(motions):
        view = views[2 * i : 2 * i + 2]
        assert torch.allclose(view[..., :dim], motion.apply(x))
        assert torch.allclose(view[..., dim : 2 * dim], torch.einsum("bij,bnj->bni", motion.R, n))
        assert torch.equal(view[..., 2 * dim :], rest)
    # In canonical pose, differences of points and normals have turned alike.
    turned = of_canonical[..., dim : 2 * dim]
    before = (x[:, 1:] - x[:, :1]) @ n.mT
    after = (of_canonical[:, 1:, :dim] - of_canonical[:, :1, :dim]) @ turned.mT
    assert torch.allclose(before, after)
    assert losses["total"].isfinite()
    with pytest.raises(InvalidInput, match=f"{dim + 1} extra features"):
        model(x, features=rest)
    with pytest.raises(InvalidInput, match="inputs='distances'"):
        small(dim, normals=True, inputs="distances")
    with pytest.raises(InvalidInput, match="normals must be"):
        small(dim, normals=n)


def test_collapsed_keypoints_give_the_identity_and_finite_gradients():
    model = small()
    with torch.no_grad():
        model.encoder.readout.weight.zero_()  # even attention: all poses at the center
        model.encoder.readout.bias.zero_()
    x = cloud(2, 24, 3)
    pose = model.eval()(x).pose
    assert not pose.defined.any()
    assert torch.equal(pose.R, torch.eye(3, dtype=torch.float64).expand(2, -1, -1))
    model.train().losses(x, generator=draw())["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_is_refused():
    model, x = small(), cloud(2, 24, 3)
    bad = x.clone()
    bad[1, 4, 0] = math.inf
    for points, mask, words in (
        (x.transpose(1, 2), None, "coordinates first"),
        (x[0], None, r"points\[None\]"),
        (torch.cat([x, x], -1), None, r"points\[..., :3\]"),
        (x.reshape(2, 4, 6, 3), None, "flattened"),
        (x[:, :3], None, "at least 4"),
        (x[:0], None, "at least 4"),
        (bad, None, "cloud 1 has 1 points"),
        (x.long(), None, "floating"),
        (x.numpy(), None, "floating"),
        (x, torch.ones(2, 24), "boolean"),
        (x, torch.zeros(2, 24, dtype=torch.bool), "at least 4"),
    ):
        with pytest.raises(InvalidInput, match=words):
            model(points, mask)
    for settings, words in (
        ({"dim": 4}, "dim must be 2 or 3"),
        ({"capsules": 3}, "4 or more"),
        ({"inputs": "normals"}, "inputs"),
        ({"weights": {"canonical": 1}}, "LossWeights"),
        ({"points": 5}, "at least 10"),
        ({"shift": -1}, "shift"),
    ):
        with pytest.raises(InvalidInput, match=words):
            CanonicalCapsules(**settings)
    with pytest.raises(InvalidInput, match="weight invariance"):
        LossWeights(invariance=-1)


def test_features_and_attention_at_padding_may_hold_anything():
    draws = torch.Generator().manual_seed(0)
    points, features = torch.randn(2, 20, 3, generator=draws), torch.randn(2, 20, 2, generator=draws)
    mask = torch.arange(20).expand(2, -1) < 14
    model = CanonicalCapsules(dim=3, capsules=4, channels=8, points=20, hidden=8, extra=2).eval()
    dirty = torch.where(mask[..., None], features, math.nan)
    assert torch.equal(model(points, mask, features).capsules.theta, model(points, mask, dirty).capsules.theta)
    with pytest.raises(InvalidInput, match="features hold NaN"):
        model(points, None, dirty)
    with pytest.raises(InvalidInput, match="one row for each point"):
        model(points, None, features[:, :5])


def test_types_motions_and_generators_that_do_not_fit():
    model = CanonicalCapsules(dim=3, capsules=4, channels=8, points=20, hidden=8)
    points = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    still = RigidTransform(torch.eye(2), torch.zeros(2))
    with pytest.raises(InvalidInput, match=r"torch\.float64 and the network is torch\.float32"):
        model(points.double())
    with pytest.raises(InvalidInput, match="two RigidTransforms"):
        model(points, losses=True, motions=(still, still))
    with pytest.raises(InvalidInput, match="generator"):
        model(points, losses=True, generator=3)
