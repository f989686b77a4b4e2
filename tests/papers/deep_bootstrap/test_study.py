"""The study of the Deep Bootstrap framework: every run runs, every claim can be computed, its parts hold."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from mlcollage.lab.publish import draw_slide
from mlcollage.lab.run import Run, Scale
from mlcollage.lab.study import Study, run_study
from mlcollage.papers.deep_bootstrap import study
from mlcollage.papers.deep_bootstrap.experiments import ARCHITECTURES, AUGMENTATIONS, linear_regression

SLUG = "deep_bootstrap"


@pytest.fixture(scope="module")
def evidence(smoke_store):
    return Study(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))


def as_if(evidence, scale):
    return dataclasses.replace(evidence, scale=scale)


# --- the study ------------------------------------------------------------------------------------------------------


def test_every_run_finishes_and_only_times_may_be_absent(evidence):
    assert evidence.failures == []
    assert evidence.missing == 0
    lacking = evidence.table[~np.isfinite(evidence.table["value"])]
    assert set(lacking["metric"]) <= {"stop_train_error", "stop_train_loss"}, "a network that is not fitted has no T"


def test_every_claim_due_at_quick_is_computed(evidence):
    verdicts = Study(SLUG, Scale.QUICK).judge(as_if(evidence, Scale.QUICK))
    assert list(verdicts) == [c.id for c in study.CLAIMS]
    for verdict in verdicts.values():
        if verdict.claim.from_scale.rank <= Scale.QUICK.rank:
            assert verdict.estimate is not None, f"{verdict.claim.id}: {verdict.reason}"
        else:
            assert verdict.status == "untested"


def test_claims_are_well_formed():
    assert len({c.id for c in study.CLAIMS}) == len(study.CLAIMS)
    for claim in study.CLAIMS:
        assert re.fullmatch(r"C\d+[a-z]?", claim.id)
        assert 0 < len(claim.title) <= 28
        assert claim.sentence[0].isupper()
        assert claim.sentence.endswith(".")
        assert claim.source
        assert claim.estimand.describe().strip()


@pytest.mark.parametrize("scale", list(Scale))
def test_runs_have_what_the_claims_of_their_scale_need(scale):
    runs = Study(SLUG, scale).runs()
    assert len({r.id for r in runs}) == len(runs)
    arms = {r.arm for r in runs}
    sizes = {r.arm: [int(n) for n in str(r.settings["n"]).split("-")] for r in runs if "n" in r.settings}
    ordinary = set(ARCHITECTURES) & set(sizes)
    assert len({max(sizes[arm]) for arm in ordinary}) == 1, "networks are compared at the largest n: it must be one"
    for claim in study.CLAIMS:
        if scale in (Scale.QUICK, Scale.FULL) and scale.rank >= claim.from_scale.rank:
            assert set(claim.estimand.arms) - {"user"} <= arms, claim.id
    for run in runs:
        if "n" in run.settings:
            assert run.settings["steps"] * run.settings["batch_size"] >= max(sizes[run.arm]), "an epoch at least"


def test_claims_on_arms_that_a_scale_leaves_out_are_untested_and_the_others_judged(evidence):
    """CIFAR-5m has no label noise to add and no second alphabet, so scale paper leaves three arms out."""
    rows = evidence.table
    without = dataclasses.replace(as_if(evidence, Scale.PAPER), table=rows[rows["arm"] != "mlp128_noise"])
    verdicts = Study(SLUG, Scale.PAPER).judge(without)
    outside = {k for k, v in verdicts.items() if v.reason == "not part of the study at this scale"}
    assert outside == {"C7", "C8", "C9"}
    assert all(v.estimate is not None for k, v in verdicts.items() if k not in outside)


def test_while_runs_are_missing_or_failed_the_judge_says_what_it_lacks(evidence):
    rows = evidence.table
    partly = dataclasses.replace(as_if(evidence, Scale.QUICK), table=rows[rows["arm"] == "vit"], missing=20)
    verdicts = Study(SLUG, Scale.QUICK).judge(partly)
    assert verdicts["C2"].status == "inconclusive"
    assert "five are needed" in verdicts["C2"].reason
    assert any("20 runs of the study not finished" in w for w in verdicts["C2"].warnings)


def test_a_run_gives_the_same_numbers_again(evidence):
    for arm in ("mlp32", "cnn_shift", "least_squares"):
        (run,) = evidence.find_runs(arm=arm, seed=1)
        again = study.measure(run, None).table["value"]
        kept = evidence.table.loc[evidence.table["run"] == run.id, "value"]
        np.testing.assert_allclose(again, kept, rtol=1e-4, atol=1e-5)


def test_the_slide_draws(evidence, tmp_path):
    study_ = Study(SLUG, Scale.SMOKE)
    slide, files = draw_slide(study_, evidence, study_.judge(evidence), tmp_path)
    assert 3 <= len(slide.collage.panels) <= 6
    assert {c.id for c in slide.chips} == {c.id for c in study.CLAIMS}
    assert all(panel.alt.strip() for panel in (slide.collage.idea, *slide.collage.panels))
    assert all(file.stat().st_size > 10_000 for file in files.values())


@pytest.mark.parametrize(("kind", "arms"), [("function", {"user"}), ("npz", {"mlp128", "cnn"}), ("csv", {"mlp128"})])
def test_a_users_workload_from_end_to_end(user_workloads, tmp_path, kind, arms):
    spec = user_workloads[kind]
    evidence = run_study(SLUG, "smoke", workload=spec, store=tmp_path / "results")
    assert not evidence.failures
    assert {r.arm for r in evidence.runs} == arms
    verdicts = Study(SLUG, Scale.QUICK, spec).judge(as_if(evidence, Scale.QUICK))
    outside = {k for k, v in verdicts.items() if v.reason == "not part of this workload"}
    lacking = {"C2", "C4", "C6", "C6b", "C8", "C8b"} | (set() if kind == "npz" else {"C5"})
    assert outside == lacking
    assert all(verdicts[k].estimate is not None for k in ("C1", "C1b", "C3", "C3b"))
    own = Study(SLUG, Scale.SMOKE, spec)
    slide, _ = draw_slide(own, evidence, own.judge(evidence), tmp_path, ["svg"])
    assert own.workload_name in slide.foot_left


def test_the_users_model_is_the_one_that_is_trained(user_workloads, monkeypatch):
    own = Study(SLUG, Scale.SMOKE, user_workloads["function"])
    import users_own_workloads

    made = []
    init = users_own_workloads.Own.__init__
    monkeypatch.setattr(users_own_workloads.Own, "__init__", lambda self: (init(self), made.append(self))[0])
    own.measure(own.runs()[0])
    assert made


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
    run = Run(SLUG, "least_squares", 3, {"dimension": d, "n_samples": n, "steps": steps, "lr": lr})
    table = linear_regression(run, None).table
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
