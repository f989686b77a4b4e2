"""Numbers alone: what random batches confirm, reject and find."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.papers.neural_mechanics._analysis.confirm import confirm
from mlcollage.papers.neural_mechanics._analysis.detect import dead_biases, detect
from mlcollage.papers.neural_mechanics._analysis.probe import Probe
from mlcollage.papers.neural_mechanics.symmetry import Symmetry
from mlcollage.papers.neural_mechanics.term import Term

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def net(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3))


def hidden_law():
    return Symmetry(
        "rescale", "hidden", (Term("0.weight", 1, keep=0), Term("0.bias", 1, keep=0), Term("2.weight", -1, keep=1)), 5
    )


def test_a_true_law_is_confirmed_with_its_certificate():
    (law,), refused = confirm([hidden_law()], Probe(net(nn.ReLU()), (X,), {}, F.cross_entropy, Y))
    assert refused == []
    assert law.residual < 1e-13
    assert law.certificate["control"] > 1e-3
    assert law.certificate["p_value"] < 0.05
    assert law.certificate["action"] < 1e-12
    assert law.certificate["dtype"] == "float64"


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Tanh(), nn.Softplus()])
def test_decoys_are_rejected_by_their_gradient(activation):
    kept, refused = confirm([hidden_law()], Probe(net(activation), (X,), {}, F.cross_entropy, Y))
    assert kept == []
    assert "gradient constraint fails" in refused[0]


def test_wrong_sets_are_rejected():
    shifted = Term("2.weight", -1, keep=1, laws=(1, 2, 3, 4, 0))  # the right columns in the wrong order
    decoy = Symmetry("rescale", "decoy", (Term("0.weight", 1, keep=0), Term("0.bias", 1, keep=0), shifted), 5)
    no_bias = Symmetry("rescale", "no bias", (Term("0.weight", 1, keep=0), Term("2.weight", -1, keep=1)), 5)
    kept, refused = confirm([decoy, hidden_law(), no_bias], Probe(net(nn.ReLU()), (X,), {}, F.cross_entropy, Y))
    assert [law.name for law in kept] == ["hidden"]
    assert len(refused) == 2


@pytest.mark.parametrize(("loss", "holds"), [(F.cross_entropy, True), (F.multi_margin_loss, True), (None, False)])
def test_translation_is_the_loss_s(loss, holds):
    law = Symmetry(
        "translation", "last", (Term("2.weight", keep=1, laws=(0, 1, 2, 3, 4)), Term("2.bias", laws=(5,))), 6
    )
    kept, _ = confirm([law], Probe(net(nn.ReLU()), (X,), {}, loss, None if loss is None else Y))
    assert bool(kept) is holds


def test_an_epsilon_is_recognized_because_the_residual_follows_it():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, eps=1e-3), nn.ReLU(), nn.Linear(5, 3))
    law = Symmetry("scale", "scale", (Term("0.weight", keep=0), Term("0.bias", keep=0)), 5)
    (kept,), _ = confirm([law], Probe(model, (X,), {}, F.cross_entropy, Y))
    assert kept.broken_by == "eps"
    assert 1e-6 < kept.residual < 0.1
    assert kept.certificate["eps_residual"] < kept.residual / 100
    assert model[1].eps == 1e-3
    assert model[1].num_batches_tracked == 0


def test_detection_finds_the_laws_of_a_small_network_without_its_graph():
    torch.manual_seed(2)
    images = torch.randn(6, 3, 8, 8)
    model = nn.Sequential(
        *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 9), nn.ReLU()),
        nn.Linear(9, 3),
    )
    probe = Probe(model, (images,), {}, F.cross_entropy, Y)
    found, notes = detect(probe)
    kept, _ = confirm([*found, *dead_biases(probe, set())], probe, found_by="numbers")
    counts = {law.name: law.n_laws for law in kept}
    expected = {"rescale:1->4": 5, "rescale:4->8": 6, "rescale:8->10": 9, "scale:0": 5, "translation:0.bias": 5}
    assert expected.items() <= counts.items()
    assert set(counts) - set(expected) == {"translation:10", "translation:10#2"}
    assert any("matrix laws" in note for note in notes)


def test_detection_ties_the_branches_of_a_residual_connection():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.a, self.b, self.o = nn.Linear(4, 5), nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = F.relu(self.i(x))
            return self.o(h + self.b(F.relu(self.a(h))))

    torch.manual_seed(3)
    probe = Probe(Residual(), (X,), {})
    kept, _ = confirm(detect(probe)[0], probe)
    by_size = {law.n_laws: {(t.parameter, t.sign) for t in law.terms} for law in kept}
    assert by_size[7] == {("a.weight", 1), ("a.bias", 1), ("b.weight", -1)}
    assert by_size[5] == {
        *(("i.weight", 1), ("i.bias", 1), ("b.weight", 1), ("b.bias", 1)),
        *(("a.weight", -1), ("o.weight", -1)),
    }


def test_dead_units_are_not_taken_for_dead_biases():
    model = net(nn.ReLU())
    with torch.no_grad():
        model[0].bias[2] = -1e3
    assert dead_biases(Probe(model, (X,), {}), set()) == []


def test_batches_have_the_examples_kinds_and_are_repeatable():
    tokens = torch.tensor([[3, 5, 7], [7, 3, 3]])
    probe = Probe(nn.Embedding(9, 2), (tokens,), {})
    drawn = probe.batch(1)[0][0]
    assert drawn.dtype == tokens.dtype
    assert set(drawn.flatten().tolist()) <= {3, 5, 7}
    assert torch.equal(drawn, probe.batch(1)[0][0])
    noise = Probe(net(nn.ReLU()), (X + 5,), {}).batch(0)[0][0]
    assert abs(float(noise.mean()) - 5) < 1
    assert noise.dtype == torch.float64


def test_dropout_is_the_same_mask_before_and_after_an_action():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).train()
    law = Symmetry(
        "rescale", "hidden", (Term("0.weight", 1, keep=0), Term("0.bias", 1, keep=0), Term("3.weight", -1, keep=1)), 5
    )
    state = torch.random.get_rng_state()
    kept, _ = confirm([law], Probe(model, (X,), {}, F.cross_entropy, Y))
    assert len(kept) == 1
    assert torch.equal(state, torch.random.get_rng_state())
