"""Files of posteriors are read by the network they are of, and by no other."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.infer import tensor_file
from mlcollage.nn.init import build
from mlcollage.papers.bnn_posteriors import (
    MAP,
    BayesianNetwork,
    GaussianLikelihood,
    GaussianPrior,
    LaplacePrior,
    Posterior,
)

X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, :1].tanh()
LABELS = (X[:, 0] > 0).long()


class Functional(nn.Module):
    """One whose activation no layer shows."""

    def __init__(self, act=torch.tanh):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(2, 5), nn.Linear(5, 1), act

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def stack(act=nn.Tanh, seed=0, frozen=False):
    net = build(lambda: nn.Sequential(nn.Linear(2, 5), act(), nn.Linear(5, 1)), seed)
    net[0].requires_grad_(not frozen)
    return net


def regression(module, noise=0.3, prior=None):
    return BayesianNetwork(module, GaussianLikelihood(noise), prior or GaussianPrior(1.0))


def saved(bnn, folder, x=X, y=Y):
    return bnn.fit(x, y, MAP(steps=3), generator=0).save(folder / "p.safetensors")


@pytest.mark.parametrize(
    ("written", "read", "what"),
    [
        (lambda: regression(stack()), lambda: regression(stack(nn.ReLU)), r"outputs .* \(layer 1 is Tanh"),
        (lambda: regression(Functional()), lambda: regression(Functional(F.relu)), "outputs at equal weights"),
        (lambda: regression(stack(frozen=True)), lambda: regression(stack(seed=1, frozen=True)), "0.weight"),
        (lambda: regression(stack()), lambda: regression(stack(), noise=0.4), r"its likelihood is another one"),
        (lambda: regression(stack()), lambda: regression(stack(), prior=GaussianPrior(1.1)), r"prior .*1\.0.*1\.1"),
        (lambda: regression(stack()), lambda: regression(stack(), prior=LaplacePrior(1.0)), r"prior .*LaplacePrior"),
        (
            lambda: regression(stack(), prior=GaussianPrior({"": 1.0})),
            lambda: regression(stack(), prior=GaussianPrior({"": 1.0, "2.bias": 2.0})),
            "its prior is another one",
        ),
    ],
    ids=["activation", "function", "frozen", "noise", "scale", "family", "one scale of many"],
)
def test_another_network_is_refused_and_its_own_is_not(written, read, what, tmp_path):
    file = saved(written(), tmp_path)
    Posterior.load(file, written())
    with pytest.raises(InvalidInput, match=f"of another network than this: .*{what}"):
        Posterior.load(file, read())


def test_likelihoods_of_ones_own_are_told_apart(tmp_path):
    def made(power):
        return BayesianNetwork(stack(), lambda out, y: -((out - y).abs() ** power).sum(1), GaussianPrior(1.0))

    file = saved(made(2.0), tmp_path)
    Posterior.load(file, made(2.0))
    with pytest.raises(InvalidInput, match="its likelihood is another one"):
        Posterior.load(file, made(1.5))


def test_buffers_are_frozen_values_and_counters_are_not(tmp_path):
    def made(mean=0.0, steps=0):
        net = build(lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), 0).eval()
        net[1].running_mean.fill_(mean)
        net[1].num_batches_tracked.fill_(steps)
        return regression(net)

    file = saved(made(), tmp_path)
    Posterior.load(file, made(steps=9))
    with pytest.raises(InvalidInput, match=r"frozen value 1\.running_mean"):
        Posterior.load(file, made(mean=0.5))


def test_other_weights_and_types_of_the_same_network_are_welcome(tmp_path):
    file = saved(regression(stack()), tmp_path)
    assert Posterior.load(file, regression(stack(seed=5))).predict(X).shape == (30, 1)
    assert Posterior.load(file, regression(stack().double())).predict(X).shape == (30, 1)


def test_tokens_and_labels_are_made_up_within_their_range(tmp_path):
    def made(act):
        net = build(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 4), act(), nn.Linear(4, 2)), 0)
        return BayesianNetwork(net)

    tokens = torch.randint(7, (30, 2), generator=torch.Generator().manual_seed(1))
    file = saved(made(nn.Tanh), tmp_path, tokens, LABELS)
    Posterior.load(file, made(nn.Tanh))
    with pytest.raises(InvalidInput, match="layer 3 is Tanh"):
        Posterior.load(file, made(nn.ReLU))


def test_a_file_that_was_read_and_written_again_still_knows_its_network(tmp_path):
    first = saved(regression(stack()), tmp_path)
    second = Posterior.load(first).save(tmp_path / "again")
    with pytest.raises(InvalidInput, match="outputs at equal weights"):
        Posterior.load(second, regression(stack(nn.ReLU)))


def test_a_network_that_takes_no_made_up_inputs_is_saved_all_the_same(tmp_path):
    class Strict(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.body, self.act = stack(act), act

        def forward(self, x):
            if not bool((x.sum(1) - 1).abs().max() < 1e-5):
                raise ValueError("rows must sum to one")
            return self.body(x)

    file = saved(regression(Strict(nn.Tanh)), tmp_path, X.softmax(1))
    Posterior.load(file, regression(Strict(nn.Tanh)))


def test_no_datum_is_in_the_file(tmp_path):
    content = tensor_file.load(saved(regression(stack()), tmp_path), "posterior of a network (mlcollage, 2)")
    made = content["identity"]["inputs"]
    assert not (made[:, None] == X).all(2).any()


def test_a_file_of_an_earlier_version_is_read_with_a_warning(tmp_path):
    kind = "posterior of a network (mlcollage, 2)"
    file = saved(regression(stack()), tmp_path)
    content = tensor_file.load(file, kind)
    del content["identity"]
    tensor_file.save(file, kind, content)
    with pytest.warns(UserWarning, match="only names and shapes"):
        Posterior.load(file, regression(stack(nn.ReLU)))
