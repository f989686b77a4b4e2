"""Pipelines of real processes: nothing waits, gradients are paired, a stage that dies is named."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, RunFailed
from mlcollage.papers.synthetic_gradients import (
    AsyncStage,
    Context,
    StageParts,
    SyntheticGradient,
    Timeline,
    run_pipeline,
)

LOSS = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def parts():
    """The module of stages, importable by other processes too."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    import synthetic_pipeline_parts

    yield synthetic_pipeline_parts
    sys.path.remove(folder)


def run(build, batches, stages=2, **options):
    return run_pipeline(
        build, batches, stages=stages, loss_fn=LOSS, context=Context("labels", 3), timeout=60, **options
    )  # fmt: skip


def test_decoupled_stages_overlap_and_learn_from_late_gradients(parts, tmp_path):
    batches = parts.batches(16, last=5)
    timeline = run(parts.sleeping, batches)
    first, last = timeline.stages
    assert first.steps == last.steps == 16
    assert len(first.staleness) == 16  # each gradient found its activation, the short batch's too
    assert first.staleness.max() <= 4
    assert first.dropped == 0
    assert timeline.losses[-5:].mean() < timeline.losses[0]
    # The spans of the two overlap: the sum of the work is more than the time that passed.
    work = sum(s.seconds(0) for s in timeline.stages)
    passed = last.spans[:, 2].max() - first.spans[:, 1].min()
    assert work > 1.3 * passed
    timeline.save(tmp_path / "run.npz")
    again = Timeline.load(tmp_path / "run.npz")
    assert again.summary() == timeline.summary()
    assert {k.split(".")[0] for k in timeline.states[0]} == {"block", "synthesizer"}


@pytest.mark.parametrize("schedule", ["sequential", "1f1b"])
def test_locked_schedules_are_plain_training(parts, schedule):
    batches = parts.batches(4)
    timeline = run(parts.two, batches, schedule=schedule)
    model = [parts.two(r) for r in range(2)]
    losses = []
    for x, y in batches:
        for p in model:
            p.optimizer.zero_grad()
        loss = LOSS(model[1].block(model[0].block(x)), y)
        losses.append(loss.item())
        loss.backward()
        for p in model:
            p.optimizer.step()
    np.testing.assert_allclose(timeline.losses, losses, atol=1e-5)
    for rank, p in enumerate(model):
        for name, value in p.block.state_dict().items():
            np.testing.assert_allclose(timeline.states[rank][f"block.{name}"], value.numpy(), atol=1e-6)


def test_a_stage_that_dies_is_named_and_the_others_go_on_to_the_bound(parts):
    timeline = run(parts.dying_last, parts.batches(24), stages=3, max_staleness=3)
    assert timeline.dead == {2: "died with exit code 9"}
    assert "stage 2 is gone" in timeline.stages[1].stopped
    assert "stage 1 is gone" in timeline.stages[0].stopped
    assert 5 <= timeline.stages[1].steps <= 5 + 3 + 1 + 3
    assert timeline.stages[0].steps >= timeline.stages[1].steps


def test_a_stage_that_raises_is_named(parts):
    with pytest.raises(RunFailed, match=r"stage 1 of 2 failed: ValueError: no data on this machine"):
        run(parts.raising, parts.batches(2))


def test_what_stages_need():
    with pytest.raises(InvalidInput, match="no synthesizer: it has the loss"):
        AsyncStage(1, 2, StageParts(nn.Linear(2, 2), synthesizer=SyntheticGradient(2)), LOSS)
    with pytest.raises(InvalidInput, match="a synthesizer"):
        AsyncStage(0, 2, StageParts(nn.Linear(2, 2)), LOSS)
    with pytest.raises(InvalidInput, match="stages must be a whole number"):
        run_pipeline(lambda r: None, [], stages=1, loss_fn=LOSS)
    assert torch.get_num_threads() >= 1
