"""Pipelines of real processes: nothing waits, gradients are paired, a stage that dies is named."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput, RunFailed
from mlcollage.infer import tensor_file
from mlcollage.papers.synthetic_gradients import (
    AsyncStage,
    Context,
    StageParts,
    SyntheticGradient,
    Timeline,
    run_pipeline,
)
from mlcollage.papers.synthetic_gradients.transport import Message

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
def test_locked_schedules_are_plain_training(parts, schedule, tmp_path):
    batches = parts.batches(4)
    if schedule == "sequential":  # stopped after two batches, and called again
        options = {"schedule": schedule, "checkpoint": tmp_path, "every": 2}
        early = run(parts.two, batches[:2], **options)
        timeline = run(parts.two, batches, **options)
        timeline.stages[1].losses = np.concatenate([early.losses, timeline.losses])
    else:
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


def test_a_killed_run_goes_on_to_the_same_numbers(parts, tmp_path):
    """Adam, dropout and synthesizers; the last stage dies after 7 of 12 batches, with files of steps 3 and 6."""
    batches = parts.batches(12)
    whole = run(parts.dropping, batches, max_staleness=0)
    options = {"max_staleness": 0, "checkpoint": tmp_path, "every": 3}
    killed = run(parts.dropping_and_dying, batches, **options)
    assert killed.dead == {1: "died with exit code 9"}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("stage1")) == [
        "stage1-3.safetensors", "stage1-6.safetensors"
    ]  # fmt: skip
    again = run(parts.dropping, batches, **options)
    assert [s.steps for s in again.stages] == [6, 6]
    np.testing.assert_array_equal(again.losses, whole.losses[6:])
    for rank, state in whole.states.items():
        for name, value in state.items():
            np.testing.assert_array_equal(again.states[rank][name], value, err_msg=name)
    with pytest.raises(RunFailed, match="of schedule='dni', but this run has 'sequential'"):
        run(parts.dropping, batches, schedule="sequential", checkpoint=tmp_path)


def test_pairs_whose_gradient_has_not_come_are_saved(parts, tmp_path):
    """Three steps ahead when the file is written; the gradients come to both, late."""
    stages = [AsyncStage(0, 2, parts.dropping(0), LOSS, context=Context("labels", 3)) for _ in range(2)]
    batches = parts.batches(4)
    first, second = stages
    for step, (x, y) in enumerate(batches[:3]):
        _, h = first._own_step(step, x, y)
        first.step = step + 1
    file = tensor_file.save(tmp_path / "a", "stage", first.state_dict())
    with torch.no_grad():
        for p in second.parts.block.parameters():
            p.zero_()
    second.load_state_dict(tensor_file.load(file, "stage"))
    assert second.step == 3
    gradients = torch.randn(3, *h.shape, generator=torch.Generator().manual_seed(0)) / len(h)
    for stage in stages:
        for step in range(3):
            stage._learn(Message(step, (gradients[step],)), 3)
        torch.manual_seed(5)  # of dropout
        stage._own_step(3, *batches[3])
    for name in ("block", "synthesizer"):
        for a, b in zip(*(getattr(s.parts, name).parameters() for s in stages), strict=True):
            assert torch.equal(a, b)
    assert second._stale == [3, 2, 1]


def test_messages_of_all_kinds(parts):
    """Integer tokens, bfloat16 activations that are not contiguous, a short last batch: as a chain in one process."""
    g = torch.Generator().manual_seed(0)
    batches = [[torch.randint(9, (n, 5), generator=g), torch.randint(3, (n,), generator=g)] for n in (16, 16, 7)]
    timeline = run(parts.tokens, batches, max_staleness=0)
    first, last = (AsyncStage(r, 2, parts.tokens(r), LOSS, context=Context("labels", 3)) for r in range(2))
    losses = []
    for step, (x, y) in enumerate(batches):
        _, h = first._own_step(step, x, y)
        below = last._last_step(step, h, y)
        assert below.dtype == torch.bfloat16
        first._learn(Message(step, (below,)), step)
        losses.append(last._losses[-1])
    np.testing.assert_array_equal(timeline.losses, losses)
    for rank, stage in enumerate((first, last)):
        for name, value in stage.parts.block.state_dict().items():
            np.testing.assert_array_equal(timeline.states[rank][f"block.{name}"], value.float().numpy())


@pytest.mark.parametrize("batch", [(np.zeros(3), np.zeros(3)), torch.zeros(3), {"x": 1}, (torch.zeros(3),)])
def test_batches_are_pairs_of_tensors(parts, batch):
    with pytest.raises(InvalidInput, match="pairs of tensors, inputs and targets"):
        AsyncStage(0, 2, parts.parts(0), LOSS)._next(iter([batch]))


def test_states_of_other_stages_are_refused(parts):
    state = AsyncStage(0, 2, parts.parts(0), LOSS).state_dict()
    with pytest.raises(InvalidInput, match="stages=2, but this is 3"):
        AsyncStage(0, 3, parts.parts(0, 3), LOSS).load_state_dict(state)
    with pytest.raises(InvalidInput, match=r"rank=0, but this is 1"):
        AsyncStage(1, 2, parts.parts(1), LOSS).load_state_dict(state)
    wide = StageParts(nn.Linear(parts.WIDTH, 5), None, SyntheticGradient(5))
    with pytest.raises(InvalidInput, match="the saved stage has"):
        AsyncStage(0, 2, wide, LOSS).load_state_dict(state)
    other = parts.parts(0)
    other.synthesizer = SyntheticGradient(parts.WIDTH)
    with pytest.raises(InvalidInput, match="saved synthesizer does not fit"):
        AsyncStage(0, 2, other, LOSS).load_state_dict(state)
    with pytest.raises(InvalidInput, match="not for torch's 'gpipe'"):
        run(parts.two, parts.batches(2), schedule="gpipe", checkpoint="folder")


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
