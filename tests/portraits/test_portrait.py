"""The portrait: right numbers, a network left as it was, sentences for what does not apply, fails or is late."""

import copy
import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mlcollage
from mlcollage.errors import InvalidInput, MLCollageError, UnknownName
from mlcollage.measure import fisher_trace, participation_ratio
from mlcollage.papers.class_selectivity import measure_selectivity
from mlcollage.portraits import INSTRUMENTS, Instrument, Number, Reading, prepare
from mlcollage.portraits.sitting import sit


def data(n=240, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return x, (x[:, 0] + x[:, 1] > 0).long() + 2 * (x[:, 2] > 0.5).long()


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


@pytest.fixture(scope="module")
def trained():
    before = network()
    model, (x, y) = copy.deepcopy(before), data()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, before


@pytest.fixture(scope="module")
def whole(trained):
    """All instruments on one small network, within the time that they want."""
    model, before = trained
    return mlcollage.portrait(
        model, {"train": data(), "test": data(200, 1)}, before, minutes=20, name="Small (one)", progress=False
    )


FAST = ("quality", "dimensions", "fisher")


def test_every_instrument_is_asked_and_says_something(whole):
    assert [r.instrument for r in whole.readings] == [i.name for i in INSTRUMENTS]
    states = {r.instrument: r.state for r in whole.readings}
    assert {k for k, v in states.items() if v != "measured"} == {"skips", "attention", "online"}
    assert "no skip connections" in whole["skips"].sentence
    assert "does not attend" in whole["attention"].sentence
    assert "1024 training examples" in whole["online"].sentence
    for reading in whole.readings:
        if reading.state == "measured":
            assert reading.health
            instrument = next(i for i in INSTRUMENTS if i.name == reading.instrument)
            assert reading.headline(instrument.quantities[0]) is not None or reading.instrument == "quality"
        for n in reading.numbers:
            assert np.isnan(n.low) or n.low <= n.value <= n.high, (reading.instrument, n)


def test_the_numbers_are_those_of_the_instruments_themselves(trained, whole):
    model, _ = trained
    x, y = data(200, 1)
    with torch.no_grad():
        p = model(x).double().softmax(1)
    assert whole.number("accuracy").value == pytest.approx(float((p.argmax(1) == y).double().mean()))
    assert whole.number("nll").value == pytest.approx(float(-p[torch.arange(200), y].log().mean()), rel=1e-5)
    assert whole.number("tr_fisher").value == pytest.approx(fisher_trace(model, x).value, rel=1e-5)
    assert whole.number("selectivity").value == pytest.approx(measure_selectivity(model, (x, y)).mean, rel=1e-5)
    h = model[:4](x).detach()
    assert whole.number("dimensions of the last layer").value == pytest.approx(participation_ratio(h), rel=1e-5)
    # Tr(H) of a ReLU network by autograd's own Hessian, in float64
    wide, (a, b) = copy.deepcopy(model).double(), (x[:128].double(), y[:128])
    names, values = zip(*wide.named_parameters(), strict=True)

    def loss(*parameters):
        return F.cross_entropy(torch.func.functional_call(wide, dict(zip(names, parameters, strict=True)), (a,)), b)

    blocks = torch.autograd.functional.hessian(loss, values)
    true = sum(
        float(blocks[i][i].reshape(v.numel(), v.numel()).diagonal().sum()) for i, v in enumerate(values)
    )  # fmt: skip
    found = whole.number("tr_hessian")
    assert abs(found.value - true) < 2 * (found.high - found.low)
    # rescaling of each hidden unit, and translations of the softmax' weights by input and of its bias
    assert whole.number("conservation laws").value == 16 + 12 + 12 + 1


def test_laws_that_did_not_move_have_moved_nothing(trained):
    model, _ = trained
    other = copy.deepcopy(model)
    with torch.no_grad():  # along the softmax' translation
        other[4].weight += 1.0
    found = mlcollage.portrait(other, data(), model, only="laws", minutes=9, progress=False)["laws"]
    moved = {n.layer: n.value for n in found.by_layer("moved")}
    assert moved["rescale:0->2"] == 0
    # the sum of four weights, by the norm of (1, 1, 1, 1) and those of the weights; the bias has not moved
    norms = sum(m[4].weight.detach().double().square().sum(0).sqrt() for m in (model, other))  # (12,)
    shares = [*(4 / (2 * norms)).tolist(), 0.0]
    assert moved["translation:4"] == pytest.approx(np.median(shares), rel=1e-5)


def test_intervals_cover_other_samples(trained):
    model, _ = trained
    x, y = data(20_000, 9)
    with torch.no_grad():
        true = float((model(x).argmax(1) == y).double().mean())
    hits = 0
    for seed in range(20):
        found = mlcollage.portrait(
            model, {"test": data(150, 100 + seed), "train": data()}, only="quality", minutes=9, progress=False
        )
        hits += found.number("accuracy").low <= true <= found.number("accuracy").high
    assert hits >= 16


def test_the_network_and_all_random_numbers_are_left_as_they_were(trained):
    model, before = copy.deepcopy(trained[0]), copy.deepcopy(trained[1])
    model[1].eval()
    model[4].weight.requires_grad_(False)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), 32, shuffle=True)
    chosen = ["quality", "dimensions", "selectivity", "probes", "fisher", "posterior", "likeness"]
    with torch.no_grad():
        mlcollage.portrait(model, {"test": loader, "train": data()}, before, minutes=9, only=chosen, progress=False)
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected  # noqa: NPY002
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    for name, p in model.named_parameters():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_same_seed_gives_the_same_table(trained):
    both = [mlcollage.portrait(trained[0], data(), only=FAST, minutes=9, seed=3, progress=False).table for _ in "ab"]
    pd.testing.assert_frame_equal(*(t.drop(columns="seconds") for t in both))


def test_what_does_not_fit_says_what_it_would_need(trained):
    subject = prepare(trained[0], data())
    slow = Instrument("slow", "Slow", "?", "", ("x",), lambda s: 1 / 0, lambda s: 7200.0)
    quick = Instrument(
        "quick", "Quick", "?", "", ("x",), lambda s: Reading("quick", numbers=[Number("x", 1)]), lambda s: 0
    )
    import time

    late, done = sit(subject, (slow, quick), time.monotonic() + 60)
    assert (late.state, done.state) == ("no time", "measured")
    assert "about 2.0 h" in late.sentence
    assert late.seconds == pytest.approx(7200)


def test_a_failing_instrument_is_a_sentence_and_the_others_go_on(trained):
    subject = prepare(trained[0], data())

    def fails(subject):
        raise RuntimeError("the \n roof is on fire")

    broken = Instrument("broken", "Broken", "?", "", ("x",), fails, lambda s: 0)
    first, second = sit(subject, (broken, INSTRUMENTS[0]), float("inf"))
    assert first.state == "failed"
    assert "RuntimeError: the" in first.sentence
    assert second.state == "measured"


def test_cheapest_first(trained):
    subject, order = prepare(trained[0], data()), []

    def made(name, cost):
        return Instrument(name, name, "?", "", (), lambda s: order.append(name) or Reading(name), lambda s: cost)

    sit(subject, (made("b", 2.0), made("a", 1.0), made("c", 3.0)), float("inf"))
    assert order == ["a", "b", "c"]


def test_a_regression_has_errors_and_no_selectivity():
    x = data()[0]
    y = x @ torch.arange(6.0)[:, None]
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    found = mlcollage.portrait(model, (x.numpy(), y.numpy()), minutes=9, only=[*FAST, "selectivity", "hessian"],
                               progress=False)  # fmt: skip
    off = (model(x[120:]) - y[120:]).detach()
    assert found.number("rmse").value == pytest.approx(float(off.square().mean().sqrt()), rel=1e-4)
    assert found.number("r2").value == pytest.approx(1 - float(off.square().sum() / (y[120:] - y[120:].mean()).square().sum()), rel=1e-4)  # fmt: skip # noqa: E501
    assert found["selectivity"].state == "does not apply"
    assert "regression" in found["selectivity"].sentence
    assert found["hessian"].state == found["fisher"].state == "measured"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x):
        h = self.body(x)
        return self.a(h), self.b(h)


def test_of_two_outputs_one_is_said():
    model = Two()
    unsaid = mlcollage.portrait(model, data(), minutes=9, only=FAST, progress=False)
    assert unsaid["quality"].state == "does not apply"
    assert "output=" in " ".join(unsaid.notes)
    assert unsaid["dimensions"].state == "measured"
    said = mlcollage.portrait(model, data(), minutes=9, only=[*FAST, "hessian"], output=0, progress=False)
    assert [r.state for r in said.readings] == ["measured"] * 4
    x, y = data()
    assert said.number("accuracy").value == pytest.approx(
        float((model(x[120:])[0].argmax(1) == y[120:]).float().mean())
    )


def test_float64_and_frozen(trained):
    model = copy.deepcopy(trained[0]).double().requires_grad_(False)
    found = mlcollage.portrait(model, data(), minutes=9, only=FAST, progress=False)
    assert {r.state for r in found.readings} == {"measured"}
    assert "frozen" in " ".join(found.notes)
    assert not any(p.requires_grad for p in model.parameters())


def test_named_inputs_and_an_attending_network():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            h = self.words(input_ids)
            h = h + self.attention(h, h, h, key_padding_mask=attention_mask == 0)[0]
            return {"logits": self.head(h.mean(1))}

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(30, (80, 7), generator=g)
    mask = torch.ones(40, 7).long()
    rows = [
        {"input_ids": ids[:40], "attention_mask": mask, "labels": ids[:40, 0] % 3},
        {"input_ids": ids[40:, :5], "attention_mask": mask[:, :5], "labels": ids[40:, 0] % 3},
    ]
    found = mlcollage.portrait(Reader(), rows, minutes=9, only=["quality", "attention", "skips"], progress=False)
    assert [r.state for r in found.readings] == ["measured"] * 3, [r.sentence for r in found.readings]
    assert 0 < found.number("attention distance").value < 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda m: (m, (torch.zeros(50, 6), torch.full((50,), 9))), "labels run from 9 to 9"),
        (lambda m: (m, (torch.full((50, 6), float("nan")), torch.zeros(50).long())), "NaN"),
        (lambda m: (m, (torch.zeros(50, 5), torch.zeros(50).long())), "failed with RuntimeError"),
        (lambda m: (m, {"test": data()}, m), "same numbers as the trained"),
        (lambda m: (m, {"test": data()}, nn.Linear(6, 4)), "other parameters"),
        (lambda m: ("network", data()), "nn.Module"),
    ],
)
def test_bad_input_is_one_sentence(trained, given, words):
    with pytest.raises(MLCollageError, match=words):
        mlcollage.portrait(*given(trained[0]), progress=False)


def test_unknown_names(trained):
    with pytest.raises(UnknownName, match="selectivity"):
        mlcollage.portrait(trained[0], data(), only=["selectivty"], progress=False)
    with pytest.raises(InvalidInput, match="minutes"):
        mlcollage.portrait(trained[0], data(), minutes=0)


def test_files_hold_the_numbers(whole, tmp_path):
    files = whole.save(tmp_path)
    assert set(files) == {"page", "svg", "png", "portrait", "json", "parquet"}
    table = pd.read_parquet(files["parquet"])
    assert table.shape == whole.table.shape
    assert set(table["instrument"]) == {i.name for i in INSTRUMENTS}
    page = files["page"].read_text("utf-8")
    assert "Portrait of Small (one)" in page
    assert "no skip connections" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert json.loads(files["json"].read_text())["readings"][0]["instrument"] == "quality"
    assert whole.plot().axes
    with pytest.raises(UnknownName, match="quality"):
        whole["qualities"]


def test_the_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from mlcollage.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mylab.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def trained():\n    x = torch.randn(100, 6)\n    return nn.Linear(6, 2), (x, (x[:, 0] > 0).long())\n"
        "def broken():\n    raise OSError('no disk')\n"
        "def other():\n    return {'model': nn.Linear(2, 2), 'datta': 1}\n"
    )
    done = CliRunner().invoke(app, ["portrait", "mylab.py:trained", "-m", "1", "--only", "quality", "-o", "out"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "portrait-trained.html").exists()
    assert "accuracy" in done.output
    page = (tmp_path / "out" / "portrait-trained.html").read_text("utf-8")
    assert "mlcollage portrait mylab.py:trained --minutes 1 --only quality" in page
    for name, words in (("broken", "no disk"), ("other", "datta"), ("absent", "has no function")):
        done = CliRunner().invoke(app, ["portrait", f"mylab.py:{name}"])
        assert isinstance(done.exception, MLCollageError), done.output
        assert words in str(done.exception)


def test_one_large_set_of_data_leaves_enough_for_the_online_gap(trained):
    found = mlcollage.portrait(trained[0], data(4000), trained[1], only=("online",), minutes=9, progress=False)
    assert found["online"].state == "measured"
    assert "1,984 training examples" in found["online"].health[0]
    gap, error = (found.number(name) for name in ("online gap", "online soft error"))
    assert gap.low <= gap.value <= gap.high
    assert 0 < error.value < 0.75  # better than equal odds of four classes after one pass
