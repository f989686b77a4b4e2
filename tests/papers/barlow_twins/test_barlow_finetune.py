"""Fine-tuning on few labels: the same weights as a loop that is written out, the paper's settings, odd inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn import build
from mlcollage.papers.barlow_twins import BarlowTwins, finetune
from mlcollage.papers.barlow_twins.finetune import _schedule


def encoder(dtype=torch.float64):
    return build(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), 0).to(dtype)


def rows(n=40, dtype=torch.float64):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, (x[:, 0] + x[:, 1] > 0).long()


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_the_weights_are_those_of_a_loop_that_is_written_out(variant):
    x, y = rows()
    settings = {"variant": variant, "n_epochs": 5, "batch_size": 16, "seed": 3}
    start = finetune(encoder(), x, y, **settings, lr_head=1e-12, lr_encoder=1e-12).model  # the head as it was drawn
    tuned = finetune(encoder(), x, y, **settings)

    body, head = encoder(), nn.Linear(8, 2).double()
    head.weight.data = start.head.weight.detach().clone().round(decimals=10)
    assert 0.003 < float(head.weight.detach().std()) < 0.03
    nn.init.zeros_(head.bias)
    weights = [(p, 0.5) for p in head.parameters()]
    weights += [(p, 0.002 if variant == "paper" else 0.005) for p in body.parameters()]
    momentum = [torch.zeros_like(p) for p, _ in weights]
    draw, losses = torch.Generator().manual_seed(3), []
    for epoch in range(5):
        order = torch.randperm(40, generator=draw)
        factor = 0.2 ** ((epoch >= 3) + (epoch >= 4)) if variant == "paper" else (1 + np.cos(np.pi * epoch / 5)) / 2
        for step in range(2):
            part = order[16 * step : 16 * step + 16]
            loss = F.cross_entropy(head(body(x[part])), y[part])
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, [p for p, _ in weights])
            with torch.no_grad():
                for (p, rate), m, g in zip(weights, momentum, grads, strict=True):
                    m.mul_(0.9).add_(g)
                    p.sub_(rate * factor * m)
    for mine, theirs in zip((*body.parameters(), *head.parameters()), tuned.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)
    np.testing.assert_allclose(tuned.losses, np.reshape(losses, (5, 2)).mean(1), rtol=1e-6)


def test_rates_fall_after_twelve_and_sixteen_of_twenty_epochs():
    factor = _schedule("paper", 20, 7)
    assert [round(factor(7 * e + 6), 3) for e in (0, 11, 12, 15, 16, 19)] == [1, 1, 0.2, 0.2, 0.04, 0.04]


def test_the_encoder_stays_as_it_was_and_the_copy_is_trained_as_a_whole():
    x, y = rows(dtype=torch.float32)
    model = BarlowTwins(encoder(torch.float32).train(), nn.Linear(8, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    names = np.array(["no", "yes"])[y.numpy()]
    tuned = finetune(model, x, names, batch_size=20, lr_encoder=0.05)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not tuned.model.training
    for mine, theirs in zip(model.backbone.parameters(), tuned.model.representation.parameters(), strict=True):
        assert not torch.equal(mine, theirs)
    assert tuned.score(x, names) > 0.9
    assert tuned.score(x, ["maybe"] * 40) == 0
    again = finetune(model, x, names, batch_size=20, lr_encoder=0.05)
    assert torch.equal(again.model.head.weight, tuned.model.head.weight)


def test_frozen_parts_stay_and_augmentation_sees_each_batch():
    x, y = rows(dtype=torch.float32)
    body, seen = encoder(torch.float32), []
    body[0].requires_grad_(False)

    def noise(batch, generator):
        seen.append(len(batch))
        return batch + 0.1 * torch.randn(batch.shape, generator=generator)

    tuned = finetune(body, x, y, n_epochs=3, batch_size=256, augment=noise)
    assert seen == [40, 40, 40]  # fewer inputs than a batch has
    assert torch.equal(tuned.model.representation.encoder[0].weight, body[0].weight)
    assert not torch.equal(tuned.model.representation.encoder[1].weight, body[1].weight)


def test_outputs_of_any_kind_become_rows():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 5, 3)

        def forward(self, x):
            return {"maps": self.conv(x)}

    x, y = torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(0)), [0, 1] * 10
    tuned = finetune(build(Maps, 0), x, y, n_epochs=2, output="maps", pool="mean")
    assert tuned.model(x).shape == (20, 2)
    with pytest.raises(InvalidInput, match="say which output"):
        finetune(build(Maps, 0), x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(39)}, "one label for each of 40 rows"),
        ({"y": [1] * 40}, "all labels are 1"),
        ({"y": torch.tensor([-1, 1] * 20)}, "labels below 0"),
        ({"x": [[1.0]]}, "x must be a tensor"),
        ({"lr_head": 0}, "lr_head must be"),
        ({"n_epochs": 0}, "n_epochs must be"),
        ({"encoder": encoder(torch.float32).requires_grad_(False)}, "no parameter of the encoder is trained"),
        ({"encoder": "resnet50.pth"}, "must be an nn.Module"),
    ],
)
def test_bad_inputs_are_explained(change, message):
    x, y = rows(dtype=torch.float32)
    given = {"encoder": encoder(torch.float32), "x": x, "y": y, **change}
    with pytest.raises(InvalidInput, match=message):
        finetune(given.pop("encoder"), given.pop("x"), given.pop("y"), **given)
