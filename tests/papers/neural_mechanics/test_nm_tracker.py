"""The tracker beside real training: exact where it says exact, and the training is what it would have been."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics.closed_form import predict
from mlcollage.papers.neural_mechanics.ledger import TERMS
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, SymmetrySet
from mlcollage.papers.neural_mechanics.term import Term
from mlcollage.papers.neural_mechanics.tracker import ConservationTracker

F64 = torch.float64
SGD = torch.optim.SGD
HOMOGENEOUS = SymmetrySet(
    (
        Symmetry("translation", "softmax", (Term("2.weight", keep=1),), 6),
        Symmetry("translation", "softmax bias", (Term("2.bias"),), 1),
        Symmetry(
            "rescale",
            "hidden",
            (Term("0.weight", 1, keep=0), Term("0.bias", 1, keep=0), Term("2.weight", -1, keep=1)),
            6,
        ),
    )
)
NORMED = SymmetrySet((Symmetry("scale", "norm", (Term("0.weight", keep=0),), 6),))


def network(dtype=F64, norm=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 6, bias=not norm), *([nn.BatchNorm1d(6)] if norm else []), nn.ReLU(), nn.Linear(6, 3)]
        return nn.Sequential(*layers).to(dtype)


def batches(steps, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=g, dtype=F64).to(dtype)
        yield x, torch.randint(3, (16,), generator=g)


def train(model, optimizer, steps=12, *, after=lambda: None, change=lambda: None, scheduler=None, dtype=F64, skip=0):
    for k, (x, y) in enumerate(batches(steps + skip, dtype)):
        if k < skip:
            continue
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        change()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        after()


def tracked(model, optimizer, symmetries=HOMOGENEOUS, steps=12, more=None, **options):
    with ConservationTracker(model, optimizer, symmetries, **options) as tracker:
        train(model, optimizer, steps, **(more or {}))
    return tracker


def parts_of(frame):
    return frame[[name for name in TERMS if name in frame]]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("schedule", [False, True])
def test_the_ledger_predicts_sgd_to_rounding(momentum, dampening, weight_decay, schedule):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.3, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) if schedule else None
    frame = tracked(model, optimizer, more={"scheduler": scheduler}).result()
    assert frame["step"].max() == 12
    assert (frame["rel"] < 1e-12).all()
    assert (frame["unexplained"].abs() < 1e-13).all()
    steps = frame.groupby("law")["measured"].diff().fillna(0.0)
    np.testing.assert_allclose(parts_of(frame).sum(axis=1), steps, atol=1e-13)
    if momentum or weight_decay:
        assert frame[frame["step"] == 12]["rel_null"].max() > 1e-3


@pytest.mark.parametrize("options", [{"foreach": True}, {"maximize": True}, {"fused": True}])
def test_every_variant_of_torchs_sgd_is_the_same_sgd(options):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, **options)
    assert (tracked(model, optimizer).result()["rel"] < 1e-12).all()


def test_training_is_not_touched():
    models = [network(norm=True), network(norm=True)]
    for i, model in enumerate(models):
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        if i:
            tracked(model, optimizer, NORMED, mode="both", clipping=True)
            assert not optimizer._optimizer_step_pre_hooks
            assert not optimizer._optimizer_step_post_hooks
        else:
            train(model, optimizer)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_epsilon_of_batch_norm_breaks_the_law_and_its_measured_part_closes_the_ledger():
    model = network(norm=True)
    model[1].eps = 1e-3
    frame = tracked(model, SGD(model.parameters(), lr=0.3, weight_decay=0.1), NORMED).result()
    last = frame.iloc[-1]
    assert 1e-7 < last["rel"] < 1e-2
    assert last["rel_accounted"] < 1e-12
    assert abs(frame["symmetry"].sum()) > 1e-7
    model = network(norm=True)
    model[1].eps = 1e-9
    finer = tracked(model, SGD(model.parameters(), lr=0.3, weight_decay=0.1), NORMED).result().iloc[-1]
    assert finer["rel"] < 1e-4 * last["rel"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ],
)
def test_the_budget_of_any_optimizer_sums_to_the_change(make):
    model = network()
    frame = tracked(model, make(model.parameters())).result()
    assert (frame["rel_accounted"] < 1e-12).all()
    assert (frame["unexplained"].abs() < 1e-12).all()
    assert frame["symmetry"].abs().max() < 1e-14
    assert frame["rel_null"].max() > 1e-3


@pytest.mark.parametrize("decoupled", [False, True])
def test_adams_parts_are_what_its_equations_say(decoupled):
    """One step from fresh state: m = g' and v = g'², so that Δ = -η sign(g'), without and with decoupled decay."""
    model = network()
    lr, decay = 0.01, 0.1
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=lr, weight_decay=decay, eps=1e-16)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    tracker = ConservationTracker(model, optimizer, HOMOGENEOUS)
    with tracker:
        train(model, optimizer, 1)
    g = {n: p.grad for n, p in model.named_parameters()}
    law = HOMOGENEOUS["hidden"]
    full = {n: g[n] + (0 if decoupled else decay * theta[n]) for n in g}
    row = tracker.result("law").query("step == 1 and law == 'hidden'")

    def two(x):
        return 2 * law.bilinear(theta, x).numpy()

    step = {n: -lr * full[n].sign() - (lr * decay * theta[n] if decoupled else 0) for n in g}
    np.testing.assert_allclose(row["weight_decay"], -lr * decay * two(theta), atol=1e-14)
    np.testing.assert_allclose(row["momentum"], 0, atol=1e-14)
    expected = two({n: -lr * (full[n].sign() - full[n]) for n in g})
    np.testing.assert_allclose(row["preconditioner"], expected, atol=1e-12)
    np.testing.assert_allclose(row["discretization"], law.bilinear(step, step).numpy(), atol=1e-12)


def test_groups_with_different_settings_inside_a_law_have_a_ledger_but_no_closed_form():
    model = network()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}]
    optimizer = SGD(groups, lr=0.2, momentum=0.9)
    with pytest.raises(InvalidInput, match=r"'hidden' spans parameter groups.*mode='ledger'"):
        ConservationTracker(model, optimizer, HOMOGENEOUS, mode="both")
    frame = tracked(model, optimizer).result()
    assert (frame["rel_accounted"] < 1e-12).all()
    assert (frame["unexplained"].abs() < 1e-13).all()
    uniform = frame[frame["kind"] == "translation"]
    assert (uniform["rel"] < 1e-12).all()


def test_groups_with_equal_settings_keep_their_closed_form():
    model = network()
    groups = [{"params": [p]} for p in model.parameters()]
    frame = tracked(model, SGD(groups, lr=0.05, weight_decay=0.2), mode="both").result()
    whole = network()
    same = tracked(whole, SGD(whole.parameters(), lr=0.05, weight_decay=0.2), mode="both").result()
    for column in ("predicted", "closed_form", "measured"):
        np.testing.assert_allclose(frame[column], same[column], rtol=1e-12)


@pytest.mark.parametrize(("momentum", "lr"), [(0.0, 0.1), (0.9, 0.02)])
def test_the_closed_form_is_predict_on_the_measured_forcing(momentum, lr):
    model, steps, decay = network(), 150, 0.1
    optimizer = SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    law, forcing = HOMOGENEOUS["hidden"], []

    def look():
        if momentum:
            named = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
        else:
            named = {n: p.grad for n, p in model.named_parameters()}
        forcing.append(law.bilinear(named, named).numpy().copy())

    start = law.quantities(model).numpy()
    with ConservationTracker(model, optimizer, HOMOGENEOUS, mode="both") as tracker:
        train(model, optimizer, steps, after=look)
    rows = tracker.result("law").query("law == 'hidden'").pivot(index="step", columns="index", values="closed_form")
    expected = predict(start, lr, decay, momentum, steps=steps, forcing=np.array(forcing), kind="rescale")
    np.testing.assert_allclose(rows.to_numpy(), expected, atol=1e-11)
    last = tracker.result().query("step == 150 and kind != 'x'")
    assert (last["closed_form_rel_change"] < 0.02).all()
    assert (last["rel_null"] > 0.05).all()


def test_clipping_by_norm_keeps_the_law_and_by_value_breaks_it():
    def clipped(how):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1)
        more = {"change": lambda: how(model.parameters())}
        return tracked(model, optimizer, more=more, clipping=True).result()

    norm = clipped(lambda p: nn.utils.clip_grad_norm_(p, 0.1))
    value = clipped(lambda p: nn.utils.clip_grad_value_(p, 0.01))
    assert norm["clipping"].abs().max() < 1e-15
    assert value["clipping"].abs().max() > 1e-5
    for frame in (norm, value):
        assert frame["symmetry"].abs().max() < 1e-15
        assert (frame["unexplained"].abs() < 1e-13).all()
        assert (frame["rel_accounted"] < 1e-12).all()


def test_the_gradients_of_a_grad_scaler_are_seen_unscaled():
    frames = []
    for scaled in (False, True):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        with ConservationTracker(model, optimizer, HOMOGENEOUS, clipping=True, scaler=scaler) as tracker:
            for x, y in batches(6):
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
        frames.append(tracker.result())
    np.testing.assert_allclose(frames[0]["predicted"], frames[1]["predicted"], rtol=1e-12)
    assert frames[1]["clipping"].abs().max() < 1e-14


def test_a_fused_optimizer_under_a_grad_scaler_must_be_unscaled_first():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(batches(1))
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    with (
        ConservationTracker(model, optimizer, HOMOGENEOUS),
        pytest.raises(InvalidInput, match=r"scaler\.unscale_\(optimizer\)"),
    ):
        scaler.step(optimizer)


def test_a_closure_is_looked_at_when_it_has_run():
    frames = []
    for as_closure in (False, True):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        with ConservationTracker(model, optimizer, HOMOGENEOUS) as tracker:
            for x, y in batches(6):

                def closure(x=x, y=y, model=model, optimizer=optimizer):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x), y)
                    loss.backward()
                    return loss

                if as_closure:
                    assert optimizer.step(closure) > 0
                else:
                    closure()
                    optimizer.step()
        frames.append(tracker.result())
    np.testing.assert_array_equal(frames[0]["predicted"], frames[1]["predicted"])
    assert (frames[1]["rel"] < 1e-12).all()


def test_lbfgs_which_calls_its_closure_often_is_accounted_for():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    x, y = next(batches(1))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with ConservationTracker(model, optimizer, HOMOGENEOUS) as tracker:
        for _ in range(3):
            optimizer.step(closure)
    assert (tracker.result()["rel_accounted"] < 1e-12).all()


def test_steps_between_measurements_are_added_up():
    frames = []
    for every in (1, 5):
        model = network()
        frames.append(tracked(model, SGD(model.parameters(), lr=0.2, weight_decay=0.1), every=every).result())
    sparse = frames[1]
    assert sorted(set(sparse["step"])) == [0, 5, 10, 12]
    dense = frames[0][frames[0]["step"].isin([0, 5, 10, 12])]
    np.testing.assert_array_equal(dense["predicted"], sparse["predicted"])
    for name in ("weight_decay", "discretization"):
        sums = [f.groupby("law")[name].sum() for f in frames]
        np.testing.assert_allclose(sums[0], sums[1])


def test_arrays_and_tables_hold_the_same():
    model = network()
    tracker = tracked(model, SGD(model.parameters(), lr=0.2, weight_decay=0.1), mode="both")
    arrays, table = tracker.arrays(), tracker.result("law")
    assert arrays["step"].tolist() == list(range(13))
    assert arrays["kind"].tolist() == ["translation"] * 7 + ["rescale"] * 6
    for name in ("measured", "predicted", "closed_form", "discretization"):
        wide = table.query("law == 'hidden'").pivot(index="step", columns="index", values=name)
        np.testing.assert_array_equal(arrays[name][:, arrays["law"] == "hidden"], wide.to_numpy())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_a_budget_the_prediction_is_the_same(momentum):
    frames = []
    for wanted in (True, False):
        model = network()
        optimizer = SGD(model.parameters(), lr=0.2, weight_decay=0.1, momentum=momentum)
        frames.append(tracked(model, optimizer, budget=wanted, mode="both").result())
    np.testing.assert_allclose(frames[0]["predicted"], frames[1]["predicted"], rtol=1e-10)
    assert parts_of(frames[1]).empty


def test_a_run_may_be_stopped_saved_and_gone_on_with(tmp_path):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    whole = tracked(model, optimizer, steps=12, mode="both").result()
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    first = tracked(model, optimizer, steps=7, mode="both")
    torch.save(first.state_dict(), tmp_path / "tracker.pt")
    second = ConservationTracker(model, optimizer, HOMOGENEOUS, mode="both")
    second.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    with second:
        train(model, optimizer, 5, skip=7)
    found = second.result()
    for column in ("step", "time", "measured", "predicted", "closed_form", "momentum", "unexplained"):
        np.testing.assert_allclose(found[column], whole[column], atol=1e-14)


def test_a_state_of_other_weights_or_another_mode_is_refused():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    state = tracked(model, optimizer, steps=3).state_dict()
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    second = ConservationTracker(model, optimizer, HOMOGENEOUS)
    second.load_state_dict(state)
    with pytest.raises(InvalidInput, match="not those with which the tracker's state was saved"):
        second.start()
    with pytest.raises(InvalidInput, match=r"the state is of mode='ledger'"):
        ConservationTracker(model, optimizer, HOMOGENEOUS, mode="both").load_state_dict(state)


def test_a_tracker_may_start_in_the_middle_of_training():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, 5)
    frame = tracked(model, optimizer, mode="both").result()
    assert (frame["rel"] < 1e-12).all()


def test_parameters_without_gradient_in_a_step_are_accounted_for():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    calls = []

    def drop():
        calls.append(1)
        if len(calls) in (3, 4):
            model[0].bias.grad = None
        if len(calls) == 6:
            optimizer.zero_grad()

    frame = tracked(model, optimizer, more={"change": drop}).result()
    assert (frame["rel_accounted"] < 1e-12).all()
    assert (frame["unexplained"].abs() < 1e-13).all()


def test_a_group_s_momentum_is_not_counted_in_the_laws_of_another():
    """Weight and bias of one translation family in two groups, in a step that is measured and in a late start."""
    joined = Symmetry(
        "translation", "softmax", (Term("2.weight", keep=1, laws=tuple(range(6))), Term("2.bias", laws=(6,))), 7
    )
    model = network()
    optimizer = SGD([{"params": [p], "weight_decay": 0.1} for p in model.parameters()], lr=0.1, momentum=0.9)
    train(model, optimizer, 3)
    calls = []

    def drop():
        calls.append(1)
        if len(calls) == 4:
            model[0].bias.grad = None

    frame = tracked(model, optimizer, SymmetrySet((joined, HOMOGENEOUS["hidden"])), more={"change": drop}).result()
    assert (frame["rel_accounted"] < 1e-12).all()
    assert (frame["rel"] < 1e-12).all()


def test_evaluation_mode_voids_the_scale_law_and_is_noted():
    model = network(norm=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 3)
    model.eval()
    frame = tracked(model, optimizer, NORMED).result()
    assert any("evaluation mode" in note for note in frame.attrs["notes"])
    assert frame["rel"].iloc[-1] > 1e-6


def test_divergence_is_noted():
    model = network()
    frame = tracked(model, SGD(model.parameters(), lr=1e30), steps=12).result()
    assert any("not finite from step" in note for note in frame.attrs["notes"])


def test_matrix_laws_of_attention_are_tracked():
    """Scores x Wqᵀ Wk xᵀ: the symmetric matrix WqWqᵀ - WkWkᵀ is conserved but for decay and discretization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"q": nn.Linear(5, 3, bias=False), "k": nn.Linear(5, 3, bias=False)}).double()
    law = Symmetry("matrix", "qk", (Term("q.weight", 1, gram=0), Term("k.weight", -1, gram=0)), 6, size=3)
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.05)
    with ConservationTracker(model, optimizer, SymmetrySet((law,)), mode="both") as tracker:
        for x, _ in batches(40):
            optimizer.zero_grad()
            scores = (model["q"](x) @ model["k"](x).T).softmax(-1)
            ((scores - torch.eye(16, dtype=F64)) ** 2).mean().backward()
            optimizer.step()
    last = tracker.result().iloc[-1]
    assert last["n_laws"] == 6
    assert last["rel"] < 1e-12
    assert last["rel_null"] > 1e-2
    assert last["closed_form_rel_change"] < 0.1


def test_float32_and_autocast_train_under_the_ledger():
    model = network(torch.float32)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    with ConservationTracker(model, optimizer, HOMOGENEOUS) as tracker:
        for x, y in batches(30, torch.float32):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x).float(), y)
            loss.backward()
            optimizer.step()
    last = tracker.result().query("step == 30")
    assert (last["rel_accounted"] < 1e-4).all()


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_wrapped_models_keep_their_laws(wrap):
    model = network()
    wrapped = wrap(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with ConservationTracker(wrapped, optimizer, HOMOGENEOUS) as tracker:
        train(wrapped, optimizer, 3)
    assert (tracker.result()["rel"] < 1e-12).all()


def test_tied_parameters_are_tracked_under_either_name():
    """Two layers that share a bias: each name leads to the same tensor."""
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    model[2].bias = model[0].bias
    law = Symmetry("translation", "softmax", (Term("4.weight", keep=1),), 5)
    shared = Symmetry("scale", "no law, but a quantity", (Term("2.bias"),), 1)
    frame = tracked(model, SGD(model.parameters(), lr=0.1, momentum=0.9), SymmetrySet((law, shared))).result()
    assert (frame["rel_accounted"] < 1e-12).all()
    assert frame.query("kind == 'scale'")["symmetry"].abs().sum() > 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: ConservationTracker(m, SGD(m[0].parameters(), lr=0.1), HOMOGENEOUS), "does not train '2.weight'"),
        (lambda m: ConservationTracker(m[0], SGD(m.parameters(), lr=0.1), HOMOGENEOUS), "which the model has not"),
        (lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.1), SymmetrySet()), "no law to track"),
        (lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.1), HOMOGENEOUS, every=0), "every must be a whole"),
        (lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.1), HOMOGENEOUS, mode="x"), "mode must be one of"),
        (lambda m: ConservationTracker(m, m, HOMOGENEOUS), "must be a torch.optim.Optimizer"),
        (
            lambda m: ConservationTracker(m, torch.optim.Adam(m.parameters()), HOMOGENEOUS, mode="closed_form"),
            "no closed form for Adam",
        ),
        (
            lambda m: ConservationTracker(
                m, SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True), HOMOGENEOUS, mode="both"
            ),
            "with Nesterov",
        ),
        (
            lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.0), HOMOGENEOUS, mode="both"),
            "lr must be a finite number above 0",
        ),
        (
            lambda m: ConservationTracker(
                nn.Sequential(m[0].to(torch.complex64), m[1], m[2]), SGD(m.parameters(), lr=0.1), HOMOGENEOUS
            ),
            "is complex",
        ),
        (lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.1), HOMOGENEOUS).result(), "nothing was measured"),
        (lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.1), HOMOGENEOUS).state_dict(), "has not started"),
        (lambda m: tracked(m, SGD(m.parameters(), lr=0.1), steps=1).result("layer"), "level must be one of"),
        (
            lambda m: ConservationTracker(m, SGD(m.parameters(), lr=0.1), HOMOGENEOUS[:1]).load_state_dict(
                tracked(m, SGD(m.parameters(), lr=0.1), steps=1).state_dict()
            ),
            "the state is of the laws",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, words):
    with pytest.raises(InvalidInput, match=words):
        call(network())


def test_lazy_and_sparse_parameters_are_refused():
    lazy = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(InvalidInput, match="is lazy"):
        ConservationTracker(lazy, SGD(lazy.parameters(), lr=0.1), HOMOGENEOUS)
    table = nn.Sequential(nn.Embedding(4, 2, sparse=True))
    law = Symmetry("translation", "rows", (Term("0.weight", keep=0),), 4)
    optimizer = SGD(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with ConservationTracker(table, optimizer, SymmetrySet((law,))), pytest.raises(InvalidInput, match="is sparse"):
        optimizer.step()


def test_a_copied_model_is_not_the_tracked_one():
    model = network()
    other = copy.deepcopy(model)
    with pytest.raises(InvalidInput, match="does not train"):
        ConservationTracker(model, SGD(other.parameters(), lr=0.1), HOMOGENEOUS)
