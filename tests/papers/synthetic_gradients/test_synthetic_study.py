"""The study of synthetic gradients: the contract of a study, users' networks, what its data are."""

import pytest
import torch
from torch import nn

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.run import Scale
from mlcollage.papers.synthetic_gradients.study import STUDY
from mlcollage.papers.synthetic_gradients.study.experiments import Rules, on_workload
from mlcollage.papers.synthetic_gradients.study.models import RULES, Recall, cuts_of
from mlcollage.testing import study_checks

SLUG = "synthetic_gradients"


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_all_rules_have_the_same_learning_rates():
    settings = STUDY.experiment("rules").settings[Scale.QUICK]
    assert len(settings.lrs) >= 2
    assert {credit for credit, _ in RULES.values()} == {
        "sg", "bp", "fa", "dfa", "kickback", "critic", "noise", "none"
    }  # fmt: skip


def test_users_networks_are_cut_or_refused():
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    assert cuts_of(conv, torch.zeros(4, 1, 8, 8)) == ["0", "2"]
    assert cuts_of(nn.Sequential(conv), torch.zeros(4, 1, 8, 8)) == ["0.0", "0.2"]
    with pytest.raises(InvalidInput, match="cannot be cut for this study"):
        cuts_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.zeros(4, 4))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True))
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.stem(x)
        return self.head(h + self.body(h))


def test_a_part_that_a_skip_goes_around_is_no_cut():
    model, x = Residual(), torch.randn(8, 5)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert cuts_of(model, x) == ["stem"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_workload_must_be_large_enough():
    x, y = torch.randn(60, 5).numpy(), (torch.arange(60) % 3).numpy()
    fits = on_workload(Rules(), Labeled.from_arrays(x, y, x[:30], y[:30], 3), Scale.QUICK)
    assert fits.train + fits.val <= 60
    with pytest.raises(InvalidInput, match="50 training"):
        on_workload(Rules(), Labeled.from_arrays(x[:20], y[:20], x[:30], y[:30], 3), Scale.QUICK)


def test_recall_asks_at_the_end_only():
    x, y, bit = Recall(13, 8, seed=0).draw()
    assert x.shape == (14, 8, 2)
    assert (y[:-1] == -100).all()
    assert torch.equal(y[-1], bit)
    assert torch.equal(x[0, :, 0], 2.0 * bit - 1)
    assert (x[1:, :, 0] == 0).all()
