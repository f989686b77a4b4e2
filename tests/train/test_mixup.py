import pytest
import torch
import torch.nn.functional as F

from mlcollage.errors import InvalidInput
from mlcollage.train.mixup import mixup_batch, soft_cross_entropy


def batch(n=64, classes=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 4, generator=g), torch.randint(0, classes, (n,), generator=g)


@pytest.mark.parametrize("per_sample", [False, True])
def test_inputs_and_targets_are_mixed_by_the_same_weights(per_sample):
    x, y = batch()
    mixed = mixup_batch(x, y, 0.7, 5, generator=torch.Generator().manual_seed(1), per_sample=per_sample)
    one_hot = F.one_hot(y, 5).float()
    for i in range(len(x)):
        w, j = mixed.weight[i], mixed.partner[i]
        torch.testing.assert_close(mixed.x[i], w * x[i] + (1 - w) * x[j])
        torch.testing.assert_close(mixed.y[i], w * one_hot[i] + (1 - w) * one_hot[j])
    assert (mixed.weight >= 0.5).all()
    assert len(mixed.weight.unique()) == (64 if per_sample else 1)
    assert sorted(mixed.partner.tolist()) == list(range(64))


def test_weights_are_those_of_the_beta_distribution():
    """max(l, 1 - l) of Beta(1, 1) is uniform on [1/2, 1]; of Beta(2, 2) it has mean 11/16."""
    x, y = torch.zeros(20_000, 1), torch.zeros(20_000, dtype=torch.long)
    for alpha, mean in ((1.0, 0.75), (2.0, 11 / 16)):
        weight = mixup_batch(x, y, alpha, 2, generator=torch.Generator().manual_seed(0), per_sample=True).weight
        assert float(weight.mean()) == pytest.approx(mean, abs=0.005)


def test_zero_alpha_and_seeds():
    x, y = batch()
    mixed = mixup_batch(x, y, 0, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixed.x, x)
    assert torch.equal(mixed.y.argmax(1), y)
    a, b = (mixup_batch(x, y, 1.0, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.x, b.x)
    state = torch.get_rng_state()
    again = mixup_batch(x, mixed.y, 1.0, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.y, a.y)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loss_is_the_mix_of_two_cross_entropies():
    x, y = batch()
    mixed = mixup_batch(x, y, 1.0, 5, generator=torch.Generator().manual_seed(2))
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    w = mixed.weight.double()
    first, second = (F.cross_entropy(logits, t, reduction="none") for t in (y, y[mixed.partner]))
    expected = (w * first + (1 - w) * second).mean()
    torch.testing.assert_close(soft_cross_entropy(logits, mixed.y.double()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1.0}, "alpha must be .*, not -1.0"),
        ({"alpha": float("inf")}, "finite"),
        ({"x": torch.zeros(64, 3, dtype=torch.long)}, "floating point"),
        ({"y": torch.zeros(3, dtype=torch.long)}, "as many"),
        ({"y": torch.full((64,), 7)}, "0 to 4"),
        ({"y": torch.zeros(64)}, "must be classes"),
    ],
)
def test_bad_input_is_explained(change, message):
    x, y = batch()
    arguments = {"x": x, "y": y, "alpha": 1.0, "num_classes": 5, **change}
    with pytest.raises(InvalidInput, match=message):
        mixup_batch(**arguments, generator=torch.Generator())


def test_shapes_must_agree():
    with pytest.raises(InvalidInput, match=r"must both be \(B, C\)"):
        soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
