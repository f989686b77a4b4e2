"""abc_loss and PPO against the official numbers, autograd and hand-made cases."""

import math

import pytest
import torch

from mlcollage.errors import InvalidInput
from mlcollage.papers.asymmetric_self_play import (
    abc_loss,
    clip_share,
    gae,
    ppo_loss,
    standardize_advantages,
)

CASES = ("equal", "spread", "above", "inside")


def test_official_cases_are_all_there(official):
    assert {key.partition(".")[0] for key in official("abc")} >= set(CASES)


@pytest.mark.parametrize("clip", ["upper", "two_sided"])
def test_abc_loss_and_gradient_are_the_official_ones(official, clip):
    data = official("abc")
    for case in sorted({key.partition(".")[0] for key in data}):
        new, old = data[f"{case}.logp_new"].clone().requires_grad_(), data[f"{case}.logp_old"]
        for mask, prefix in ((None, ""), (data[f"{case}.mask"], "masked_")):
            loss = abc_loss(new, old, mask, clip=clip)
            torch.testing.assert_close(loss.detach(), data[f"{case}.{prefix}loss_{clip}"], rtol=0, atol=1e-14)
            (grad,) = torch.autograd.grad(loss, new)
            torch.testing.assert_close(grad, data[f"{case}.{prefix}grad_{clip}"], rtol=0, atol=1e-14)
        for eps in (0.1, 0.3):
            loss = abc_loss(new.detach(), old, eps=eps, clip=clip)
            torch.testing.assert_close(loss, data[f"{case}.eps{eps}.loss_{clip}"], rtol=0, atol=1e-14)
        share = clip_share(new.detach(), old)
        assert float(share) == pytest.approx(float(data[f"{case}.clip_fraction"]), abs=1e-6)


def test_at_the_old_policy_the_loss_is_minus_one_and_its_gradient_that_of_cloning():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    action = torch.arange(20) % 5
    logp = logits.log_softmax(-1).gather(1, action[:, None]).squeeze(1)
    loss = abc_loss(logp, logp.detach())
    assert float(loss.detach()) == pytest.approx(-1.0, abs=1e-15)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    cloning = torch.autograd.grad(-logp.mean(), logits)[0]
    torch.testing.assert_close(ours, cloning, rtol=0, atol=1e-16)


@pytest.mark.parametrize(
    ("clip", "below"), [("upper", True), ("two_sided", False), ("none", True)], ids=["upper", "two_sided", "none"]
)
def test_gradient_below_and_above_the_clip(clip, below):
    new = torch.tensor([0.5, 1.3], dtype=torch.float64).log().requires_grad_()
    abc_loss(new, torch.zeros(2, dtype=torch.float64), clip=clip).backward()
    assert bool(new.grad[0] != 0) == below
    assert bool(new.grad[1] != 0) == (clip == "none")


def test_the_denominator_counts_real_rows_only():
    new = torch.tensor([0.5, 1.0, 1.3, 9.0], dtype=torch.float64).log()
    mask = torch.tensor([True, True, True, False])
    assert float(abc_loss(new, torch.zeros(4, dtype=torch.float64), mask)) == pytest.approx(-0.9)
    assert float(abc_loss(new, torch.zeros(4, dtype=torch.float64), mask, clip="two_sided")) == pytest.approx(-1.0)


def test_nothing_to_clone_is_zero_and_not_nan():
    new = torch.tensor([0.0, math.inf]).requires_grad_()
    for mask in (torch.zeros(2, dtype=torch.bool), torch.tensor([True, False])):
        loss = abc_loss(new, torch.zeros(2), mask)
        (grad,) = torch.autograd.grad(loss, new)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
    assert float(abc_loss(new[:0], torch.zeros(0))) == 0.0


def test_stacked_rows_are_those_of_each_alone():
    new = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    stacked = abc_loss(new, torch.zeros(3, 7), mask, dim=-1)
    for r in range(3):
        torch.testing.assert_close(stacked[r], abc_loss(new[r], torch.zeros(7), mask[r]))


def test_ppo_terms_are_the_official_ones(official):
    d = official("ppo")
    for norm in (0, 1):
        for vclip in (0, 1):
            tag = f"norm{norm}_vclip{vclip}"
            logp, value, entropy = (d[k].clone().requires_grad_() for k in ("logp_new", "value_new", "entropy"))
            advantage = standardize_advantages(d["advantage"]) if norm else d["advantage"]
            terms = ppo_loss(
                logp,
                d["logp_old"],
                advantage,
                values=value,
                returns=d["returns"],
                values_old=d["value_old"] if vclip else None,
                entropy=entropy,
            )
            found = {"policy_loss": terms.policy, "value_loss": terms.value, "entropy_mean": terms.entropy}
            for name, term in {**found, "total": terms.total}.items():
                torch.testing.assert_close(term.detach(), d[f"{tag}.{name}"], rtol=0, atol=1e-13)
            grads = torch.autograd.grad(terms.total, (logp, value, entropy))
            for name, grad in zip(("logp", "value", "entropy"), grads, strict=True):
                torch.testing.assert_close(grad, d[f"{tag}.grad_{name}"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["plain", "ends", "short", "mc", "td"])
def test_advantages_are_the_official_ones(official, name):
    d = {k.partition(".")[2]: v for k, v in official("ppo").items() if k.startswith(f"{name}.")}
    gamma, lam = d["gamma_lambda"].tolist()
    common = {"next_value": d["next_value"], "gamma": gamma, "lam": lam}
    ended = d["terminated"] | d["truncated"]
    as_done = gae(d["reward"], d["value"], ended, **common)
    kept = gae(
        d["reward"], d["value"], d["terminated"], truncated=d["truncated"], final_values=d["final_value"], **common
    )
    for found, tag in ((as_done, "as_done"), (kept, "bootstrapped")):
        torch.testing.assert_close(found[0], d[f"advantage_truncation_{tag}"], rtol=0, atol=1e-13)
        torch.testing.assert_close(found[1], d[f"return_truncation_{tag}"], rtol=0, atol=1e-13)


def turns():
    r = torch.tensor([0.0, 0, 1, 0, 0, 2], dtype=torch.float64)
    v = torch.tensor([0.5, 0.4, 0.3, 0.6, 0.2, 0.1], dtype=torch.float64)
    cut, ended = torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    cut[2], ended[5] = True, True
    return r, v, ended, cut


def test_a_turn_that_a_limit_cut_goes_on_from_its_own_last_observation():
    r, v, ended, cut = turns()
    final = torch.full_like(r, 0.7)
    found, _ = gae(r, v, ended, truncated=cut, final_values=final, gamma=0.9, lam=0.8)
    expected = torch.tensor([0.455872, 0.8276, 1.33, 0.48576, 1.258, 1.9], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    both, _ = gae(r, v, ended | cut, truncated=cut, final_values=final, gamma=0.9, lam=0.8)  # terminated wins
    torch.testing.assert_close(both[:3], expected.new_tensor([0.12928, 0.374, 0.7]), rtol=0, atol=1e-12)
    shifted, _ = gae(r, v, ended.roll(1), truncated=cut.roll(1), final_values=final, gamma=0.9, lam=0.8)
    assert not torch.allclose(shifted, found)


def test_padding_of_nan_stays_in_the_padding():
    r, v, ended, _ = turns()
    ended[2] = True
    v[3:] = torch.nan
    found, _ = gae(r, v, ended, gamma=0.9, lam=0.8)
    torch.testing.assert_close(found[:3], v.new_tensor([0.12928, 0.374, 0.7]), rtol=0, atol=1e-12)


def test_one_real_row_is_not_standardized_and_pads_do_not_count():
    a = torch.tensor([[1.0, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    assert standardize_advantages(a, mask).tolist() == [[-1.0, 0, 1, 0, 0], [4.0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: abc_loss(torch.zeros(3, 6), torch.zeros(3, 6)), "Sum over the heads"),
        (lambda: abc_loss(torch.zeros(3), torch.zeros(3).bfloat16()), "float32"),
        (lambda: abc_loss(torch.zeros(3), None), "logp_old"),
        (lambda: abc_loss(torch.zeros(3), torch.zeros(4)), "agree"),
        (lambda: abc_loss(torch.zeros(3), torch.zeros(3), torch.ones(3)), "bool"),
        (lambda: abc_loss(torch.zeros(3), torch.zeros(3), eps=0.0), "eps"),
        (lambda: gae(torch.zeros(3), torch.zeros(3), torch.zeros(3).bool(), truncated=torch.ones(3).bool()), "final"),
        (lambda: gae(torch.zeros(3), torch.zeros(4), torch.zeros(3).bool()), "values"),
        (lambda: gae(torch.zeros(3), torch.zeros(3), torch.zeros(3).bool(), gamma=1.1), "gamma"),
        (lambda: ppo_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), values=torch.zeros(3)), "returns"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(call, says):
    with pytest.raises(InvalidInput, match=says):
        call()


def test_flags_that_are_off_by_one_give_other_advantages():
    """``terminated`` is of the action just taken; "observation t begins an episode" is another field."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]), torch.tensor([0.5, 0.4, 0.3, 0.6, 0.2])
    ended = torch.tensor([False, False, True, False, True])
    right, _ = gae(rewards, values, ended, gamma=0.9, lam=0.8)
    shifted, _ = gae(rewards, values, ended.roll(1), gamma=0.9, lam=0.8)
    assert float((right - shifted).abs().max()) > 0.1
    torch.testing.assert_close(right[2:3], torch.tensor([0.7]))


def test_the_ratio_of_six_heads_is_their_product():
    """Each at 1.1 they make 1.7716, which is clipped; head by head none would be."""
    heads = torch.full((1, 6), 1.1).log().requires_grad_()
    abc_loss(heads.sum(-1), torch.zeros(1)).backward()
    assert float(heads.grad.abs().max()) == 0
    assert float(heads.detach().sum(-1).exp()) == pytest.approx(1.7716, abs=1e-4)
    with pytest.raises(InvalidInput, match="head by head"):
        abc_loss(heads, torch.zeros(1, 6))
