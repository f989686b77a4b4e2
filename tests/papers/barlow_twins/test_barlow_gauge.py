"""Floor, start level and the gauge's reading and advice."""

import re
import warnings

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.measure import effective_rank
from mlcollage.nn import build
from mlcollage.papers.barlow_twins import (
    BarlowTwins,
    BarlowTwinsLoss,
    LossGauge,
    barlow_twins_loss,
    lambda_like,
    loss_floor,
    start_level,
)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "floor"), [(64, 3251), (128, 2004), (256, 1122), (512, 583), (1024, 283), (2048, 123.5)])
def test_floors_of_the_papers_setting(n, floor):
    assert loss_floor(n, 8192) == pytest.approx(floor, abs=0.6)


@pytest.mark.parametrize("lambd", [0.05, 0.5])
def test_the_floor_is_attained_and_never_passed(lambd):
    n, d = 6, 12
    z = torch.cat([randn(0, n, d), randn(1, n, d)]).requires_grad_()
    optimizer = torch.optim.LBFGS([z], lr=1.0, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = barlow_twins_loss(z[:n], z[n:], lambd=lambd, eps=1e-9)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = float(closure().detach())
    assert best == pytest.approx(loss_floor(n, d, lambd), rel=1e-5)
    assert best > loss_floor(n, d, lambd) * (1 - 1e-7)


def test_the_floor_beyond_lambda_1_and_without_a_limit():
    q = torch.linalg.qr(randn(0, 6, 5) - randn(0, 6, 5).mean(0))[0] * 6**0.5
    z = torch.cat([q - q.mean(0), torch.zeros(6, 7, dtype=torch.float64)], 1)  # seven dead columns
    attained = float(barlow_twins_loss(z, z, lambd=3.0, eps=0.0, check=False))
    assert attained == pytest.approx(loss_floor(6, 12, 3.0), rel=1e-9)
    assert attained == pytest.approx(12 - 5, rel=1e-9)
    assert loss_floor(256, 255) == loss_floor(256, 3, 5.0) == 0.0
    with pytest.raises(InvalidInput, match="n must be"):
        loss_floor(1, 8)


@pytest.mark.parametrize(("n", "d", "lambd", "level"), [(64, 128, 0.0051, 131), (256, 8192, 0.0051, 9566)])
def test_start_levels(n, d, lambd, level):
    assert start_level(n, d, lambd) == pytest.approx(level, abs=0.6)


def test_independent_views_start_at_the_start_level():
    losses = [float(barlow_twins_loss(randn(2 * i, 32, 40), randn(2 * i + 1, 32, 40), lambd=0.05)) for i in range(40)]
    assert torch.tensor(losses).mean() == pytest.approx(start_level(32, 40, 0.05), rel=0.01)


def test_the_rule_for_lambda_keeps_the_floor_s_share():
    lambd = lambda_like(256, 4096)
    assert loss_floor(256, 4096, lambd) / 4096 == pytest.approx(loss_floor(2048, 8192) / 8192, rel=1e-12)
    with pytest.raises(InvalidInput, match="N <= D"):
        lambda_like(256, 128)


def test_effective_rank():
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])), center=False) == pytest.approx(2.828, abs=5e-4)
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])).T, center=False) == pytest.approx(2.828, abs=5e-4)
    x = randn(0, 50, 7)
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum()
    assert effective_rank(x) == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-12)
    assert effective_rank(torch.ones(4, 3)) == 0.0


def test_a_reading_is_what_the_definitions_say():
    a = randn(0, 40, 6)
    b = a + randn(1, 40, 6)
    reading = LossGauge(lambd=0.1, warn=False).update(a, b)
    sa, sb = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b))
    c = sa.T @ sb / 40
    off = c[~torch.eye(6, dtype=torch.bool)]
    assert reading.diagonal == pytest.approx(float(c.diagonal().mean()), rel=1e-9)
    assert reading.off_diagonal == pytest.approx(float(off.square().mean().sqrt()), rel=1e-9)
    assert reading.loss == pytest.approx(float(barlow_twins_loss(a, b, lambd=0.1)), rel=1e-12)
    assert reading.effective_rank == pytest.approx(effective_rank(sa), rel=1e-9)
    others = torch.stack([(sa * sb.roll(-k, 0)).sum() / 40 / 6 for k in range(1, 21)])
    assert reading.pairing == pytest.approx(float((c.diagonal().mean() - others.mean()) / others.std()), rel=1e-6)
    assert reading.efficiency == pytest.approx(100 * (1 - reading.loss / reading.start), rel=1e-9)
    assert reading.advice == ()
    assert "effective rank" in str(reading)
    assert reading.numbers()["n"] == 40


@pytest.mark.parametrize("mistake", ["rolled", "interleaved"])
def test_views_that_do_not_belong_together_are_found(mistake, pair):
    a, b = pair
    both = torch.stack([a, b], 1).flatten(0, 1)  # a0, b0, a1, b1, ...
    loss = {"rolled": (a, b.roll(1, 0), 8.140848), "interleaved": (both[:6], both[6:], 7.929856)}[mistake]
    assert float(barlow_twins_loss(*loss[:2])) == pytest.approx(loss[2], abs=5e-7)
    gauge = LossGauge()

    def read(step):
        x = randn(10 + step, 128, 16)
        y = x + 0.5 * randn(20 + step, 128, 16)
        both = torch.stack([x, y], 1).flatten(0, 1)
        gauge.update(*((x, y.roll(1, 0)) if mistake == "rolled" else (both[:128], both[128:])))

    read(0), read(1)
    with pytest.warns(UserWarning, match="do not belong together"):
        read(2)
    assert abs(gauge.last.pairing) < 3


def test_weak_pairs_are_still_pairs():
    """A correlation of .1 between views of 256 rows and 64 columns is not taken for a mistake."""
    gauge = LossGauge(warn=False)
    for step in range(3):
        x = randn(step, 256, 64)
        gauge.update(x, 0.1 * x + randn(50 + step, 256, 64))
    assert gauge.last.advice == ()
    assert gauge.last.pairing > 3


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (lambda: [(randn(0, 64, 8),) * 2], "100% of the rows are equal"),
        (lambda: [(randn(0, 64, 8), randn(0, 64, 8) + 1e-3 * randn(1, 64, 8))], "the augmentation changes little"),
        (lambda: [(randn(i, n, 8), randn(i, n, 8) + randn(9, n, 8)) for i, n in enumerate((64, 13))], "drop_last=True"),
        (lambda: [(randn(0, 64, 8) * torch.eye(8, dtype=torch.float64)[0], randn(1, 64, 8))], "7 columns are constant"),
        (lambda: [(1e-3 * randn(0, 64, 8), randn(1, 64, 8))], "8 columns have variances below 100 eps"),
        (
            lambda: [(randn(i, 64, 1).expand(-1, 32), randn(i, 64, 1) + randn(9, 64, 32)) for i in range(5)],
            "dimensions: raise lambd",
        ),
    ],
)
def test_advice(batches, words):
    gauge = LossGauge(warn=False)
    for a, b in batches():
        gauge.update(a, b)
    said = [text for reading in gauge.history for text in reading.advice]
    assert any(re.search(words, text) for text in said), said
    gauge = LossGauge()
    with pytest.warns(UserWarning, match=words):
        [gauge.update(a, b) for a, b in batches()]


def test_a_loss_at_the_floor_is_the_batch_s_fault():
    q = torch.linalg.qr(randn(0, 16, 64).T)[0].T * 8  # rows spread evenly over the columns
    z = q - q.mean(0)
    gauge = LossGauge(lambd=0.05)
    with pytest.warns(UserWarning, match="at the floor that N=16 rows allow"):
        gauge.update(z, z + 1e-9 * randn(1, 16, 64))
    assert gauge.last.loss >= gauge.last.floor


def test_a_loss_that_is_not_that_of_the_embeddings_is_noticed(pair):
    gauge = LossGauge(warn=False)
    assert "another batch size as divisor" in " ".join(gauge.update(*pair, loss=0.297242).advice)
    low = LossGauge(warn=False).update(randn(0, 8, 32), randn(1, 8, 32), loss=0.1)
    assert any("below the floor" in text for text in low.advice)


def test_it_reads_a_model_and_lets_it_go():
    model = build(lambda: BarlowTwins(nn.Linear(4, 6), loss=BarlowTwinsLoss(0.03, check=False)), 0).double()
    with LossGauge(model, every=4, warn=False) as gauge:
        for step in range(9):
            loss = model(randn(step, 16, 4), randn(100 + step, 16, 4))
    assert [r.step for r in gauge.history] == [1, 2, 3, 4, 8]
    assert gauge.lambd == 0.03
    model(randn(0, 16, 4), randn(1, 16, 4))
    assert len(gauge.history) == 5
    gauge = LossGauge(model, warn=False)
    model.eval()(randn(0, 16, 4), randn(1, 16, 4))
    assert gauge.last is None
    model.train()
    expected = model(randn(0, 16, 4), randn(1, 16, 4))
    assert gauge.last.loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.isfinite(loss)


def test_it_refuses_what_it_cannot_read():
    with pytest.raises(InvalidInput, match="0 BarlowTwinsLoss"):
        LossGauge(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match="normalize='batch'"):
        LossGauge(BarlowTwins(nn.Linear(2, 2), loss=BarlowTwinsLoss(normalize="none")))


def test_each_kind_of_advice_is_warned_of_once():
    gauge = LossGauge()
    with pytest.warns(UserWarning, match="equal"):
        gauge.update(randn(0, 64, 8), randn(0, 64, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauge.update(randn(0, 64, 8), randn(0, 64, 8))


def test_a_reading_of_embeddings_of_one_live_column_is_real():
    for seed in range(20):  # the Gram form leaves the redundancy, 0 in truth, at a rounding of either sign
        z = torch.zeros(2, 16, 64)
        z[:, :, 0] = randn(seed, 2, 16).float()
        z[1, :, 0] += 10 * z[0, :, 0]
        reading = LossGauge(warn=False).update(z[0], z[1])
        assert 0 <= reading.off_diagonal < 1e-4
        assert all(isinstance(value, float) for value in reading.numbers().values())


def test_the_reading_is_of_the_loss_that_is_trained():
    model = BarlowTwins(nn.Identity(), loss=BarlowTwinsLoss(correction=1))
    a = randn(0, 6, 4)
    b = a + randn(1, 6, 4)
    gauge = LossGauge(model)
    loss = float(model(a, b))
    assert gauge.last.loss == pytest.approx(loss, rel=1e-12)
    assert abs(loss - float(barlow_twins_loss(a, b))) > 1e-2
    with pytest.raises(InvalidInput, match="target='identity'"):
        LossGauge(BarlowTwins(nn.Identity(), loss=BarlowTwinsLoss(target="hsic")))
    with pytest.raises(InvalidInput, match="must be a tensor"):
        LossGauge().update(a.numpy(), b.numpy())


@pytest.mark.parametrize("settings", [{"n": 1}, {"like": (1, 5)}, {"lambd": -1.0}])
def test_the_rule_for_the_weight_needs_two_rows(settings):
    with pytest.raises(InvalidInput, match="must be a"):
        lambda_like(**{"n": 10, "d": 20, **settings})


def test_a_short_batch_moves_the_level_of_random_views_too():
    gauge = LossGauge(warn=False)
    gauge.update(randn(0, 64, 8), randn(1, 64, 8))
    (said,) = [text for text in gauge.update(randn(2, 13, 8), randn(3, 13, 8)).advice if "drop_last" in text]
    assert f"from {start_level(64, 8):.4g} to {start_level(13, 8):.4g}" in said
