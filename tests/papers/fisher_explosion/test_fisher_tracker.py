"""FisherTraceTracker: what it measures, when, and what it leaves alone."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build
from mlcollage.papers.fisher_explosion import FisherTraceTracker
from mlcollage.papers.fisher_explosion.tracker import Alarm, ExplosionWarning


def loop(tracker, *, steps=40, lr=0.5, middle=nn.ReLU, pass_loss=True, seed=0):
    model = build(lambda: nn.Sequential(nn.Linear(4, 16), middle(), nn.Linear(16, 3)), seed)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=g)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        tracker.update(model, step, loss=loss if pass_loss else None)
    return model, x, y, losses


def data():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=g)
    return x, x[:, :3].argmax(1)


def exact_trace(model, x):
    total = 0.0
    for row in x:
        logits = model(row[None])
        p = logits.detach().softmax(-1)[0]
        for k in range(3):
            g = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([k])), list(model.parameters()),
                                    retain_graph=True)  # fmt: skip
            total += float(p[k] * sum(t.square().sum() for t in g))
    return total / len(x)


def test_exact_values_layers_loss_and_accuracy():
    tracker = FisherTraceTracker(data(), every=20, method="exact")
    model, x, y, _ = loop(tracker)
    last = tracker.history.iloc[-1]
    assert tracker.history["step"].tolist() == [1, 20, 40]
    assert last["trace"] == pytest.approx(exact_trace(model, x), rel=1e-4)
    assert last["loss"] == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-5)
    assert 0 <= last["accuracy"] <= 1
    assert tracker.layers.sum(axis=1).tolist() == pytest.approx(tracker.history["trace"].tolist(), rel=1e-5)
    assert list(tracker.layers.columns) == ["0", "2"]


def test_drawn_values_are_near_the_exact_ones_and_repeatable():
    drawn, again, exact = (FisherTraceTracker(data()[0], every=20, method=m) for m in ("mc", "mc", "exact"))
    for tracker in (drawn, again, exact):
        loop(tracker)
    assert drawn.history.equals(again.history)
    error = (drawn.history["trace"] - exact.history["trace"]).abs()
    assert (error < 4 * drawn.history["stderr"]).all()


def test_the_threshold_is_measured_where_the_running_loss_crosses_it():
    tracker = FisherTraceTracker(data()[0], every=1000, loss_threshold=0.7, smoothing=0.0)
    _, _, _, losses = loop(tracker)
    crossed = next(i for i, v in enumerate(losses, 1) if v <= 0.7)
    assert tracker.step_at_threshold == crossed
    assert tracker.history["step"].tolist() == [1, crossed]
    assert tracker.trace_at_threshold == tracker.history["trace"].iloc[-1]
    smooth = FisherTraceTracker(data()[0], every=1000, loss_threshold=0.7, smoothing=0.9)
    loop(smooth)
    assert smooth.step_at_threshold > crossed


def test_without_given_losses_those_on_the_data_decide():
    tracker = FisherTraceTracker(data(), every=5, loss_threshold=0.7)
    loop(tracker, pass_loss=False)
    first = tracker.history[tracker.history["loss"] <= 0.7].iloc[0]
    assert (tracker.step_at_threshold, tracker.trace_at_threshold) == (int(first["step"]), first["trace"])
    never = FisherTraceTracker(data(), every=5, loss_threshold=1e-9)
    loop(never, pass_loss=False)
    assert never.trace_at_threshold is None
    assert never.step_at_threshold is None


def test_the_peak_is_that_of_the_early_window():
    whole, early = FisherTraceTracker(data()[0], every=5), FisherTraceTracker(data()[0], every=5, early=10)
    loop(whole)
    loop(early)
    rows = whole.history
    assert whole.peak["trace"] == rows["trace"].max()
    assert early.peak["trace"] == rows[rows["step"] <= 10]["trace"].max()
    with pytest.raises(InvalidInput, match="nothing was measured"):
        _ = FisherTraceTracker(data()[0]).peak


def test_an_explosion_sounds_one_alarm_that_names_layers():
    heard = []
    tracker = FisherTraceTracker(data()[0], every=1, method="exact", alarm_factor=1.5, on_alarm=heard.append)
    model = build(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), 0)
    for step in range(4):
        tracker.update(model, step)
        with torch.no_grad():
            model[0].weight *= 1.5  # the last layer's gradients grow with its inputs
    assert len(heard) == 1
    alarm = heard[0]
    assert isinstance(alarm, Alarm)
    assert alarm.trace > 1.5 * alarm.baseline
    assert alarm.layers.sum() == pytest.approx(1.0)
    assert alarm.layers.index[0] == "2"
    assert "times its first value" in str(alarm)
    resumed = FisherTraceTracker(data()[0], every=1)
    resumed.load_state_dict(tracker.state_dict())
    assert (resumed.alarm.step, resumed.alarm.trace) == (alarm.step, alarm.trace)
    assert resumed.alarm.step < tracker.history["step"].iloc[-1]
    quiet = FisherTraceTracker(data()[0], every=1, alarm_factor=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            quiet.update(model, step)


def test_by_default_the_alarm_is_a_warning():
    tracker = FisherTraceTracker(data()[0], every=1, method="exact", alarm_factor=1.1, per_layer=False)
    model = build(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), 0)
    tracker.update(model, 0)
    with torch.no_grad():
        model[0].weight *= 3
    with pytest.warns(ExplosionWarning, match="larger learning rate"):
        tracker.update(model, 1)


def test_the_network_and_all_randomness_are_left_alone():
    model = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)), 0)
    model.train()
    model[1].eval()
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    FisherTraceTracker((x, y)).update(model, 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_wrapped_and_compiled_models_are_looked_into():
    model = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 0)
    values = [
        FisherTraceTracker(data()[0]).update(m, 1).value
        for m in (model, nn.DataParallel(model), torch.compile(model, backend="eager"))
    ]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("per_layer", [True, False])
def test_a_history_is_not_continued_on_other_data_or_another_network(per_layer):
    x, y = data()
    first = FisherTraceTracker((x, y), every=10, per_layer=per_layer)
    model, *_ = loop(first, steps=10)
    state = first.state_dict()
    moved = x.clone()
    moved[5, 2] += 1e-3
    for other in ((moved, y), (x.flip(0), y.flip(0)), (x, y.flip(0)), (x[:50], y[:50]), x):
        tracker = FisherTraceTracker(other, every=10)
        with pytest.raises(InvalidInput, match="measured on other data \\(64 samples"):
            tracker.load_state_dict(state)
        assert tracker.history.empty
    wide = build(lambda: nn.Sequential(nn.Linear(4, 17), nn.ReLU(), nn.Linear(17, 3)), 0)
    named = build(lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.ReLU()), nn.Linear(16, 3)), 0)
    for network, says in ((wide, r"0.weight \(16, 4\)"), (named, "0.weight")):
        tracker = FisherTraceTracker((x.clone(), y.clone()), every=10, per_layer=per_layer)
        tracker.load_state_dict(state)
        with pytest.raises(InvalidInput, match=f"a network with other parameters \\({says}"):
            tracker.update(network, 20)
        assert tracker.history.equals(first.history)
        tracker.update(model, 20)
        assert len(tracker.history) == len(first.history) + 1


def test_a_state_of_before_is_loaded_with_a_warning():
    first, second = (FisherTraceTracker(data(), every=10) for _ in range(2))
    model, *_ = loop(first, steps=10)
    old = {name: value for name, value in first.state_dict().items() if name not in ("data", "network")}
    with pytest.warns(UserWarning, match="does not say on which data and network"):
        second.load_state_dict(old)
    second.update(model, 20)
    assert second.history["step"].tolist() == [1, 10, 20]


def test_state_resumes():
    whole, first, second = (FisherTraceTracker(data(), every=10, loss_threshold=0.7) for _ in range(3))
    model, _, _, losses = loop(whole)
    for step, loss in enumerate(losses, 1):
        (first if step <= 20 else second).update(model, step, loss=loss)
        if step == 20:
            second.load_state_dict(first.state_dict())
    assert second.history["step"].tolist() == whole.history["step"].tolist()
    assert second.step_at_threshold == whole.step_at_threshold


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": [1, 2]}, "must be inputs, a pair"),
        ({"data": (torch.zeros(3, 2), torch.zeros(3), torch.zeros(3))}, "3 parts, of which only inputs and targets"),
        ({"data": (torch.zeros(3, 2), torch.zeros(2))}, "same length"),
        ({"data": torch.zeros(0, 2)}, "tensor of inputs"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"alarm_factor": 0.5}, "alarm_factor"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        FisherTraceTracker(**{"data": data()[0], **settings})


def test_a_step_is_measured_once_and_force_measures_any():
    tracker = FisherTraceTracker(data()[0], every=10)
    model = build(lambda: nn.Linear(4, 3), 0)
    assert tracker.update(model, 3) is not None
    assert tracker.update(model, 4) is None
    assert tracker.update(model, 4, force=True) is not None
    assert tracker.update(model, 4, force=True) is None
    assert math.isfinite(tracker.history["trace"].iloc[-1])


def test_padding_has_no_part_in_what_is_tracked():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            return self.head(self.embed(input_ids))

    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(9, (6, 5), generator=g), torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [5]])
    labels = torch.where(mask, ids % 3, -100)
    model = Tagger()
    rows = []
    for padded in (ids, torch.where(mask, ids, 8)):
        tracker = FisherTraceTracker({"input_ids": padded, "attention_mask": mask, "labels": labels}, method="exact")
        tracker.update(model, 1)
        rows.append(tracker.history.iloc[0])
    assert rows[0]["trace"] == pytest.approx(rows[1]["trace"], rel=1e-6)
    with torch.no_grad():
        logits = model(ids, mask)
    assert rows[0]["loss"] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-6)
