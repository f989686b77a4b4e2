"""The study of AugReg: the contract of a study, its data, its arms, and users' images."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.experiment import Task
from mlcollage.lab.run import Scale
from mlcollage.papers.vit_training.study import STUDY, world
from mlcollage.papers.vit_training.study.experiments import on_workload, sweep
from mlcollage.papers.vit_training.study.models import Arm, network, train
from mlcollage.testing import study_checks

SLUG = "vit_training"
SMOKE = STUDY.experiment("sweep").settings[Scale.SMOKE]


@pytest.mark.parametrize("check", study_checks(SLUG), ids=str)
def test_the_study(check, smoke_store):
    check(smoke_store(SLUG))


def test_every_claim_due_at_quick_is_computed(smoke_store):
    evidence = BoundStudy(SLUG, Scale.SMOKE).evidence(smoke_store(SLUG))
    verdicts = BoundStudy(SLUG, Scale.QUICK).judge(dataclasses.replace(evidence, scale=Scale.QUICK))
    assert all(v.estimate is not None for k, v in verdicts.items() if k != "C7"), verdicts


def test_series_hold_their_template_where_the_draw_put_it():
    x, y = world.draw(0, 0, 400)
    shapes = world.templates(0)
    padded = np.pad(shapes, ((0, 0), (14, 14)))  # centered in 40 numbers
    moved = torch.from_numpy(np.stack([np.roll(padded, k, 1) for k in range(-3, 4)]))  # (7, 10, 40)
    flat = x.view(400, 40).double()
    scores = torch.einsum("nt,kct->nkc", flat - flat.mean(1, keepdim=True), moved).amax(1)
    assert float((scores.argmax(1) == y).float().mean()) > 0.3  # a tenth by chance: what it is can be told at sight
    again = world.draw(0, 0, 400)
    assert torch.equal(again.x, x)
    assert not torch.equal(world.draw(0, 1, 400).x, x)
    assert {task: int(world.draw(0, 0, 300, task).y.max()) + 1 for task in world.TASKS} == {
        "templates": 10,
        "polarity": 2,
        "place": 4,
    }


def test_augmentation_of_strength_0_is_the_identity_and_moves_go_around():
    g = torch.Generator().manual_seed(0)
    for x in (world.draw(0, 0, 5).x, torch.randn(5, 3, 8, 8, generator=g)):
        torch.testing.assert_close(world.augment(x, 0.0, g), x, rtol=1e-5, atol=1e-5)
    x = torch.zeros(2000, 1, 1, 40)
    x[..., 0] = 1
    moved = world.augment(x, 1.0, g)
    # The stretch is about the middle: at the end it moves by up to 1.5 numbers more than the 1.8 of the move itself.
    assert {0, 1, 39} < set(moved.view(2000, 40).argmax(1).tolist()) <= {0, 1, 2, 3, 36, 37, 38, 39}
    assert float(moved.amax()) <= 1.09 + 1e-5


def test_arms_start_alike_and_the_stack_equals_one_arm_alone():
    data = world.draw(0, 0, 60)

    def make():
        return network((1, 1, 40), 10, patch=4, width=16, depth=1, heads=2)

    options = {"steps": 4, "batch": 8, "lr": 1e-3, "decay": 0.1, "classes": 10}
    both = train([Arm("a", data, 3), Arm("b", data, 3)], make, **options)
    alone = train([Arm("a", data, 3)], make, **options)
    for name, value in alone.parameters.items():
        torch.testing.assert_close(both.parameters[name][0], both.parameters[name][1])
        torch.testing.assert_close(both.parameters[name][0], value[0], rtol=1e-4, atol=1e-6)


def test_a_seed_is_trained_alike_whatever_other_seeds_are_in_the_stack():
    """Batches, augmentation and mixup are drawn for each seed; nothing of another seed changes them."""

    def arms(seed):
        small, large = world.draw(seed, 0, 60), world.draw(seed, 1, 90)
        return [Arm("none", small, seed), Arm("light", small, seed, 1.0), Arm("medium", large, seed, 2.0, 0.2)]

    def make():
        return network((1, 1, 40), 10, patch=4, width=16, depth=1, heads=2)

    options = {"steps": 5, "batch": 8, "lr": 1e-3, "decay": 0.1, "classes": 10}
    together = train([*arms(3), *arms(5)], make, **options)
    for at, seed in ((0, 3), (3, 5)):
        alone = train(arms(seed), make, **options)
        for name, value in alone.parameters.items():
            torch.testing.assert_close(together.parameters[name][at : at + 3], value, rtol=1e-5, atol=1e-7)


def test_a_block_of_seeds_measures_what_its_seeds_measure_alone():
    """All but speeds; regularized models have dropout, and are trained apart for this reason."""
    settings = dataclasses.replace(SMOKE, large=100, small=60, short=3, long=5, tuning=2)
    together = sweep(Task("sweep", (0, 1), settings, Scale.SMOKE)).table
    apart = [sweep(Task("sweep", (seed,), settings, Scale.SMOKE)).table for seed in (0, 1)]
    keys = [c for c in together if c != "value"]

    def sorted_values(table):
        kept = table[table["metric"] != "series_per_second"]
        return kept.sort_values(keys)[[*keys, "value"]].reset_index(drop=True)

    pd.testing.assert_frame_equal(sorted_values(together), sorted_values(pd.concat(apart)), check_dtype=False)


def images(n=300, classes=3, shape=(1, 8, 8)):
    y = torch.arange(n) % classes

    def rows(seed):
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)) + y.view(-1, *(1,) * len(shape))
        return TensorDataset(x, y)

    return Labeled(name="mine", train=rows(0), test=rows(1), num_classes=classes)


def test_users_images_are_trained_on_without_what_is_about_other_tasks():
    workload = images()
    settings = on_workload(SMOKE, workload, Scale.SMOKE)
    assert (settings.small * 10, settings.downstream) == (settings.large // 10 * 10, False)
    table = sweep(Task("sweep", (0,), settings, Scale.SMOKE, workload)).table
    assert set(table["metric"]) == {"accuracy", "val_accuracy", "leaked_accuracy"}
    flat = images(shape=(64,))
    task = Task("sweep", (0,), on_workload(SMOKE, flat, Scale.SMOKE), Scale.SMOKE, flat)
    with pytest.raises(InvalidInput, match="takes images"):
        sweep(task)
    with pytest.raises(InvalidInput, match="needs 2 classes, 100 training"):
        on_workload(SMOKE, images(50), Scale.SMOKE)
