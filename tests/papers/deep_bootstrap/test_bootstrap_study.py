"""The study of the Deep Bootstrap framework: the contract of a study, every claim can be computed, its parts hold."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.measurements import Measurements
from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Scale
from mlcollage.lab.running import run_study
from mlcollage.papers.deep_bootstrap.result import COLUMNS, BootstrapResult
from mlcollage.papers.deep_bootstrap.study import STUDY
from mlcollage.papers.deep_bootstrap.study.claims import worst_gap
from mlcollage.papers.deep_bootstrap.study.experiments import (
    LeastSquares,
    Worlds,
    _record,
    least_squares,
    on_workload,
    worlds,
)
from mlcollage.papers.deep_bootstrap.study.models import ARCHITECTURES, AUGMENTATIONS
from mlcollage.testing import study_checks

SLUG = "deep_bootstrap"


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


# --- the study ------------------------------------------------------------------------------------------------------


def test_only_times_may_be_absent(evidence):
    lacking = evidence.table[~np.isfinite(evidence.table["value"])]
    assert set(lacking["metric"]) <= {"stop_train_error", "stop_train_loss"}, "a network that is not fitted has no T"


def test_every_claim_due_at_quick_is_computed(evidence):
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    for verdict in verdicts.values():
        if verdict.claim.from_scale.rank <= Scale.QUICK.rank:
            assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        else:
            assert verdict.status == "untested"


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_have_what_the_claims_of_their_scale_need(scale):
    runs = BoundStudy(SLUG, scale).runs()
    arms = {r.arm for r in runs}
    sizes = {r.arm: r.settings["n"] for r in runs if r.experiment != "least_squares"}
    ordinary = set(ARCHITECTURES) & set(sizes)
    assert len({max(sizes[arm]) for arm in ordinary}) == 1, "networks are compared at the largest n: it must be one"
    for claim in STUDY.claims:
        if scale in (Scale.QUICK, Scale.FULL) and scale.rank >= claim.from_scale.rank:
            assert set(claim.estimand.arms) - {"user"} <= arms, claim.id
    for run in runs:
        if run.arm in sizes:
            assert run.settings["steps"] * run.settings["batch_size"] >= max(sizes[run.arm]), "an epoch at least"


def test_claims_on_arms_that_a_scale_leaves_out_are_untested_and_the_others_judged(evidence):
    """CIFAR-5m has no label noise to add and no second alphabet, so scale paper leaves three arms out."""
    rows = evidence.table
    without = dataclasses.replace(as_if(evidence, Scale.PAPER), table=rows[rows["arm"] != "mlp128_noise"])
    verdicts = BoundStudy(SLUG, Scale.PAPER).judge(without)
    outside = {k for k, v in verdicts.items() if v.reason == "not part of the study at this scale"}
    assert outside == {"C7", "C8", "C9"}
    assert all(v.estimate is not None for k, v in verdicts.items() if k not in outside)


def test_while_runs_are_missing_or_failed_the_judge_says_what_it_lacks(evidence):
    rows = evidence.table
    waiting = [run for run in evidence.runs if run.arm != "vit"]
    partly = dataclasses.replace(as_if(evidence, Scale.QUICK), table=rows[rows["arm"] == "vit"], waiting=waiting)
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(partly)
    assert verdicts["C2"].status == "pending"
    assert "missing" in verdicts["C2"].reason


def test_the_slide_has_a_panel_for_all_that_was_measured(evidence, tmp_path):
    bound = BoundStudy(SLUG, Scale.SMOKE)
    slide, files = draw_slide(bound, evidence, bound.judge(evidence), tmp_path)
    assert [p.claim for p in (slide.collage.main, *slide.collage.panels)] == ["C3b", "C2", "C6"]
    assert all(file.stat().st_size > 10_000 for file in files.values())


@pytest.mark.parametrize(("kind", "arms"), [("function", {"user"}), ("npz", {"mlp128", "cnn"}), ("csv", {"mlp128"})])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind, arms):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.arm for r in evidence.runs} == arms
    verdicts = BoundStudy(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    outside = {k for k, v in verdicts.items() if v.reason == "not part of this workload"}
    lacking = {"C2", "C4", "C6", "C6b", "C8", "C8b"} | (set() if kind == "npz" else {"C5"})
    assert outside == lacking
    assert all(verdicts[k].estimate is not None for k in ("C1", "C1b", "C3", "C3b"))
    own = BoundStudy(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


def test_the_users_model_is_the_one_that_is_trained(user_workloads, monkeypatch):
    own = BoundStudy(SLUG, Scale.SMOKE, user_workloads["function"])
    runs = own.runs()
    import users_own_workloads

    made = []
    init = users_own_workloads.Own.__init__
    monkeypatch.setattr(users_own_workloads.Own, "__init__", lambda self: (init(self), made.append(self))[0])
    own.measure(runs[0])
    assert made


def workload(model=None, test=slice(400, 500)):
    x, y = torch.rand(500, 6, generator=torch.Generator().manual_seed(0)), torch.arange(500) % 3
    return Labeled(TensorDataset(x[:400], y[:400]), TensorDataset(x[test], y[test]), 3, model, name="noise")


def test_workloads_that_would_spoil_the_comparison_are_refused():
    settings = STUDY.experiment("mlp128").settings[Scale.SMOKE]
    own = on_workload(settings, workload(), Scale.SMOKE)
    assert isinstance(own, Worlds)
    assert (own.data, own.n, own.steps, own.batch_size) == ("workload", (10, 15, 30, 60), 24, 10)
    seen = workload(test=slice(0, 100))
    with pytest.raises(InvalidInput, match="11 of 100 samples of the test block have come in the stream of seed 0"):
        worlds(Task("mlp128", (0,), own, Scale.SMOKE, seen))
    once = nn.Linear(6, 3)
    users = STUDY.experiment("user").settings[Scale.SMOKE]
    with pytest.raises(InvalidInput, match="the same Linear at every call"):
        on_workload(users, workload(lambda: once), Scale.SMOKE)
    assert on_workload(users, workload(), Scale.SMOKE) is None
    assert on_workload(settings, workload(lambda: nn.Linear(6, 3)), Scale.SMOKE) is None


# --- its parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32)])
def test_augmentations_keep_shape_kind_and_seed(name, shape):
    augment = AUGMENTATIONS[name]
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0))
    before, state = x.clone(), torch.get_rng_state()
    first = augment(x, torch.Generator().manual_seed(1))
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert torch.equal(x, before), "the batch itself is left alone"
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(first, augment(x, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, augment(x, torch.Generator().manual_seed(2)))


def test_shifts_move_by_up_to_two_pixels_and_repeat_the_edge():
    x = torch.arange(36.0).reshape(1, 1, 6, 6).repeat(200, 1, 1, 1)
    moved = AUGMENTATIONS["shift"](x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], (2, 2, 2, 2), mode="replicate")[0, 0]
    windows = {tuple(padded[i : i + 6, j : j + 6].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(image.flatten().tolist()) for image in moved} == windows


def test_occlusion_hides_a_quarter_behind_the_mean():
    x = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden = AUGMENTATIONS["occlude"](x, torch.Generator().manual_seed(1))
    changed = hidden != x
    assert (changed.flatten(1).sum(1) == 3 * 16).all()
    for image, was, where in zip(hidden, x, changed, strict=True):
        torch.testing.assert_close(image[where], was.mean().expand(48))


def test_least_squares_follows_gradient_flow_in_closed_form():
    """Descent from zero on n samples: w_t = V diag((1 - (1 - lr l)^t) / l) V' X'y / n, l the eigenvalues of X'X / n."""
    d, n, steps, lr = 12, 5, 40, 0.05
    table = least_squares(Task("least_squares", (3,), LeastSquares(d, n, steps, lr))).table
    rng = np.random.default_rng([3, 7])
    truth = rng.normal(size=d) / np.sqrt(d)
    X = rng.normal(size=(n, d))
    y = X @ truth + 0.5 * rng.normal(size=n)
    values, V = np.linalg.eigh(X.T @ X / n)
    real = table[(table["metric"] == "regression_error") & (table["world"] == "real")]
    assert len(real) > 5
    for t, value in zip(real["step"], real["value"], strict=True):
        gain = np.where(values > 1e-12, (1 - (1 - lr * values) ** t) / np.maximum(values, 1e-12), lr * t)
        w = V @ (gain * (V.T @ (X.T @ y / n)))
        assert value == pytest.approx(((w - truth) ** 2).sum() + 0.25, rel=1e-9)
    ideal = table[(table["metric"] == "regression_error") & (table["world"] == "ideal")]
    gaps = table[table["metric"] == "regression_gap"]
    np.testing.assert_allclose(gaps["value"], real["value"].to_numpy() - ideal["value"].to_numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_maps_images_to_logits_and_learns(name):
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = architecture.make((1, 16, 16), 10)
    x, y = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimizer = architecture.optimizer(network.parameters())
    loss = torch.nn.functional.cross_entropy(network(x), y)
    loss.backward()
    optimizer.step()
    assert network(x).shape == (8, 10)
    assert any(not torch.equal(v, before[k]) for k, v in network.state_dict().items())


# --- the claim that reused data teach like fresh data -----------------------------------------------------------------


def two_worlds(differences, converged_at=None):
    """Curves of one seed in which the Real World differs from the Ideal World by this much at steps 0, 1, 2, ..."""
    rows = []
    for step, difference in enumerate(differences):
        train = 0.0 if converged_at is not None and step >= converged_at else 0.5
        for world, n, split, e in (
            ("ideal", np.inf, "test", 0.4), ("real", 100, "test", 0.4 + difference), ("real", 100, "train", train)
        ):  # fmt: skip
            rows.append((world, n, 0, step, split, e, e, e))
    return BootstrapResult(pd.DataFrame(rows, columns=COLUMNS), {"steps": len(differences) - 1})


@pytest.mark.parametrize(
    ("differences", "converged_at", "largest"),
    [([0, 0.01, -0.2, 0.03], None, 0.2), ([0, 0.1, -0.2, 0.3], 2, 0.2), ([0, 0.1, -0.02, 0.3], 2, 0.1)],
)
def test_the_largest_gap_counts_in_either_direction_until_the_set_is_fitted(differences, converged_at, largest):
    m = Measurements()
    _record(m, two_worlds(differences, converged_at))
    table = m.table.set_index("metric")["value"]
    assert table["largest_gap"] == pytest.approx(largest)


def test_the_first_claim_is_about_every_network():
    """A network that is better on reused data counts as one that is worse, the ViT among them."""
    arms = ("mlp8", "mlp32", "mlp128", "mlp128_slow", "cnn", "resnet", "vit")
    rows = pd.DataFrame({"arm": arms, "n": 4000, "metric": "largest_gap", "value": [0.01] * 6 + [0.2]})
    assert worst_gap(rows) == 0.2
    claim = next(c for c in STUDY.claims if c.id == "C1")
    assert set(arms) <= set(claim.estimand.arms)
