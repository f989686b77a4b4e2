"""Laws read off the graph alone: which parameters, which signs, how many."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mlcollage.papers.neural_mechanics._analysis.degrees import Part, System, reshape_ids
from mlcollage.papers.neural_mechanics._analysis.structure import structural_symmetries
from mlcollage.papers.neural_mechanics._analysis.tracing import TracingFailed, trace


def read(model, *x, loss=None, targets=None):
    return structural_symmetries(trace(model, x, {}, loss, targets))


def signs(law):
    return {(term.parameter, term.sign) for term in law.terms}


class Net(nn.Module):
    """Layers by name, and a forward given as a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, *x):
        return self._forward(self, *x)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.ReLU(inplace=True)])
def test_a_positively_homogeneous_unit_can_be_rescaled(activation):
    found = read(nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 2)), X)
    assert [law.name for law in found] == ["rescale:0->2"]
    assert signs(found[0]) == {("0.weight", 1), ("0.bias", 1), ("2.weight", -1)}
    assert found[0].n_laws == 5


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.ReLU6(), nn.ELU()]
)
def test_other_units_cannot(activation):
    found = read(nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 2)), X)
    assert len(found) == 0


def test_a_constant_added_after_the_unit_stops_the_law():
    assert len(read(Net(lambda s, x: s.b(F.relu(s.a(x)) + 1.0), a=nn.Linear(6, 5), b=nn.Linear(5, 2)), X)) == 0
    assert len(read(Net(lambda s, x: s.b(3 * F.relu(s.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 2)), X)) == 1


def test_a_hidden_activation_that_is_also_an_output_is_seen():
    def forward(s, x):
        hidden = F.relu(s.a(x))
        return s.b(hidden), hidden

    assert len(read(Net(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 2)), X)) == 0


def test_flattened_channels_reach_their_runs_of_columns():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    law = read(model, IMAGES)["rescale:0->4"]
    columns = next(term for term in law.terms if term.sign < 0)
    assert columns.view == (7, 5, 9)
    assert columns.keep == 1


def test_channels_last_flattening_interleaves_the_columns():
    net = Net(
        lambda s, x: s.b(F.relu(s.a(x)).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 5, 3), b=nn.Linear(180, 2)
    )
    law = read(net, IMAGES)[0]
    columns = next(term for term in law.terms if term.sign < 0)
    assert columns.view == (2, 36, 5)
    assert columns.keep == 2


def test_grouped_and_depthwise_convolutions_pair_channels_of_their_group():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(12, 4, 3, groups=4)),
    )
    found = read(model, IMAGES)
    assert {law.name: law.n_laws for law in found} == {"rescale:0->4": 8, "rescale:2->4": 8, "rescale:4->6": 12}


def test_a_residual_connection_is_one_law_for_all_that_meet_in_it():
    def forward(s, x):
        hidden = F.relu(s.i(x))
        hidden = hidden + s.b(F.relu(s.a(hidden)))
        return s.o(hidden)

    found = read(Net(forward, i=nn.Linear(6, 5), a=nn.Linear(5, 4), b=nn.Linear(4, 5), o=nn.Linear(5, 2)), X)
    stream = next(law for law in found if ("i.weight", 1) in signs(law))
    assert signs(stream) == {
        ("i.weight", 1), ("i.bias", 1), ("b.weight", 1), ("b.bias", 1), ("a.weight", -1), ("o.weight", -1),
    }  # fmt: skip
    assert sum(law.n_laws for law in found) == 9


def test_a_residual_connection_to_the_input_fixes_its_branch():
    net = Net(lambda s, x: s.o(x + s.b(F.relu(s.a(x)))), a=nn.Linear(6, 4), b=nn.Linear(4, 6), o=nn.Linear(6, 2))
    assert [law.name for law in read(net, X)] == ["rescale:a->b"]


def test_a_gate_without_activation_has_two_laws_and_swiglu_one():
    layers = {"g": nn.Linear(6, 5), "u": nn.Linear(6, 5), "d": nn.Linear(5, 2)}
    bilinear = read(Net(lambda s, x: s.d(s.g(x) * s.u(x)), **layers), X)
    assert {frozenset(signs(law)) for law in bilinear} == {
        frozenset({(f"{p}.weight", 1), (f"{p}.bias", 1), ("d.weight", -1)}) for p in "gu"
    }
    swiglu = read(Net(lambda s, x: s.d(F.silu(s.g(x)) * s.u(x)), **layers), X)
    assert [law.name for law in swiglu] == ["rescale:u->d"]


def test_a_layer_used_twice_keeps_the_laws_its_two_uses_share():
    def forward(s, x):
        hidden = F.relu(s.w(F.relu(s.i(x))))
        return s.o(F.relu(s.w(hidden)))

    found = read(Net(forward, i=nn.Linear(6, 5), w=nn.Linear(5, 5, bias=False), o=nn.Linear(5, 2)), X)
    assert sum(law.n_laws for law in found) == 6  # one per channel, and the size of w against the two others


def test_dense_connections_slice_the_columns():
    def forward(s, x):
        x = torch.cat([x, F.relu(s.a(x))], 1)
        x = torch.cat([x, F.relu(s.b(x))], 1)
        return s.c(x).mean((2, 3))

    found = read(Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(7, 5, 1), c=nn.Conv2d(12, 2, 1)), IMAGES)
    assert {law.name: law.n_laws for law in found} == {"rescale:a->b": 4, "rescale:b->c": 5}
    columns = {t.parameter: t.columns for t in found["rescale:a->b"].terms if t.sign < 0}
    assert columns == {"b.weight": (3, 7), "c.weight": (3, 7)}


def test_norms_scale_what_feeds_them_and_rescale_with_what_follows():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    found = read(model.train(), IMAGES)
    scale = found["scale:0"]
    assert signs(scale) == {("0.weight", 1), ("0.bias", 1)}
    assert scale.broken_by == "eps of 1"
    assert signs(found["rescale:1->3"]) == {("1.weight", 1), ("1.bias", 1), ("3.weight", -1)}
    assert found["translation:0"].n_laws == 4  # the bias before a batch norm has no effect
    frozen = read(model.eval(), IMAGES)
    assert [law.name for law in frozen] == ["rescale:1->3"]
    assert any("evaluation mode" in note for note in frozen.unhandled)


@pytest.mark.parametrize(("norm", "laws"), [(nn.LayerNorm(5), 1), (nn.RMSNorm(5), 1), (nn.GroupNorm(1, 5), 1)])
def test_a_linear_layer_before_a_norm_over_its_outputs_has_one_scale(norm, laws):
    found = read(nn.Sequential(nn.Linear(6, 5), norm, nn.Linear(5, 2)), X)
    assert found["scale:0"].n_laws == laws
    assert found["rescale:1->2"].n_laws == 5
    shifts = [law for law in found if law.kind == "translation"]
    assert [law.n_laws for law in shifts] == ([] if isinstance(norm, nn.RMSNorm) else [7])


def test_weight_normalization_forgets_the_direction_s_length():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2))
    found = read(model, X)
    assert sum(law.n_laws for law in found) == 10
    assert {law.kind for law in found} == {"scale", "rescale"}


@pytest.mark.parametrize(
    ("loss", "laws"),
    [
        (nn.CrossEntropyLoss(), 6),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1), 6),
        (lambda z, y: F.nll_loss(z.log_softmax(1), y), 6),
        (lambda z, y: F.multi_margin_loss(z, y), 6),
        (lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()), 0),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).float()), 0),
    ],
)
def test_translation_belongs_to_losses_that_see_differences_of_logits_only(loss, laws):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    found = read(model, X, loss=loss, targets=torch.tensor([0, 1, 2, 0]))
    assert found.of_kind("translation").n_laws == laws


def test_without_a_loss_no_last_layer_is_promised():
    found = read(nn.Sequential(nn.Linear(6, 3)), X)
    assert len(found) == 0
    assert any("no loss" in note for note in found.unhandled)


def test_frozen_parameters_are_constants():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    assert len(read(model, X)) == 0


def test_an_operator_without_a_rule_is_named_and_held_fixed():
    net = Net(lambda s, x: s.b(torch.special.erfcx(s.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 2))
    found = read(net, X)
    assert len(found) == 0
    assert any("erfcx" in note for note in found.unhandled)


def test_control_flow_on_data_is_refused_with_its_line():
    def forward(s, x):
        return s.a(x) if x.sum() > 0 else s.b(x)

    with pytest.raises(TracingFailed, match="test_nm_graph"):
        read(Net(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 2)), X)


# --- the equations --------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    uniform=st.lists(st.booleans(), min_size=4, max_size=4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_reshaping_unknowns_is_reshaping_what_they_stand_for(shape, uniform, data):
    count = int(np.prod(shape))
    divisor = data.draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
    small = [1 if flat else size for flat, size in zip(uniform, shape, strict=False)]
    ids = np.arange(np.prod(small)).reshape(small) + 1
    got = reshape_ids(ids, shape, (divisor, count // divisor))
    expected = np.broadcast_to(ids, shape).reshape(divisor, count // divisor)
    assert np.array_equal(np.broadcast_to(got, expected.shape), expected)


@given(seed=st.integers(0, 10_000), rows=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_solutions_span_the_null_space(seed, rows):
    rng = np.random.default_rng(seed)
    system = System()
    ids = system.fresh((7,))
    table = np.zeros((rows, 8))
    for r in range(rows):
        width = int(rng.integers(1, 5))
        chosen, coefs = rng.choice(7, width, replace=False), rng.choice([-2, -1, 1, 2, 0.5], width)
        table[r, ids[chosen]] = coefs
        system.equate([Part(float(c), ids[[k]]) for k, c in zip(chosen, coefs, strict=True)])
    solution = system.solve()
    forms = solution.forms.toarray()
    assert np.abs(table @ forms).max(initial=0.0) < 1e-9
    assert len(solution.free) == 7 - (np.linalg.matrix_rank(table[:, 1:]) if rows else 0)


def test_parts_on_different_axes_are_constant_each():
    system = System()
    a, b = system.fresh((3, 1)), system.fresh((1, 4))
    system.equate([Part(1.0, a), Part(1.0, b)])
    forms = system.solve().forms.toarray()
    values = forms @ np.random.default_rng(0).standard_normal(forms.shape[1])
    assert np.ptp(values[a.ravel()]) == 0
    assert np.allclose(values[a.ravel()][0], -values[b.ravel()])
