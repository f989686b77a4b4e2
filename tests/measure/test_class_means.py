"""Class means: exact over batches, states and processes, for labels, soft labels and labels of pixels."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlcollage.errors import InvalidInput
from mlcollage.measure.class_means import ClassMeans
from mlcollage.measure.representation import as_samples

G = torch.Generator().manual_seed(0)


def brute_force(rows, labels, classes):
    return torch.stack([rows[labels == c].double().mean(0) for c in range(classes)])


def state(acts, targets, classes=3, **options):
    means = ClassMeans(classes)
    means.update(acts, targets, **options)
    return means


def test_dense_layers():
    acts, y = torch.randn(50, 7, generator=G), torch.arange(50) % 3
    means = state(acts, y)
    torch.testing.assert_close(means.compute(), brute_force(acts, y, 3))
    assert means.counts.tolist() == [17, 17, 16]
    assert means.sums.dtype == torch.float64


def test_feature_maps_and_tokens_are_averaged_first():
    maps, y = torch.randn(9, 4, 3, 5, generator=G), torch.arange(9) % 3
    torch.testing.assert_close(state(maps, y).compute(), brute_force(maps.mean((2, 3)), y, 3))
    tokens = torch.randn(9, 6, 4, generator=G)
    torch.testing.assert_close(state(tokens, y, unit_axis=-1).compute(), brute_force(tokens.mean(1), y, 3))
    torch.testing.assert_close(state(tokens, y, unit_axis=1).compute(), brute_force(tokens.mean(2), y, 3))


def test_labels_of_pixels_and_tokens_count_each_position():
    maps, y = torch.randn(5, 4, 6, 7, generator=G), torch.randint(3, (5, 6, 7), generator=G)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(state(maps, y).compute(), brute_force(rows, y.flatten(), 3))
    y[0, 0] = -100
    kept = y.flatten() != -100
    torch.testing.assert_close(state(maps, y).compute(), brute_force(rows[kept], y.flatten()[kept], 3))
    tokens, y = torch.randn(5, 6, 4, generator=G), torch.randint(3, (5, 6), generator=G)
    rows = tokens.reshape(-1, 4)
    torch.testing.assert_close(state(tokens, y, unit_axis=2).compute(), brute_force(rows, y.flatten(), 3))
    with pytest.raises(InvalidInput, match=r"may be tokens \(N, T, U\) or maps \(N, U, L\): give unit_axis=-1 or"):
        state(tokens, y)


def test_soft_targets_weigh():
    acts, w = torch.randn(20, 4, generator=G), torch.rand(20, 3, generator=G)
    expected = (w.double().T @ acts.double()) / w.double().sum(0)[:, None]
    torch.testing.assert_close(state(acts, w).compute(), expected)
    hard = torch.arange(20) % 3
    one_hot = torch.nn.functional.one_hot(hard, 3).float()
    torch.testing.assert_close(state(acts, one_hot).compute(), state(acts, hard).compute())
    maps, w = torch.randn(4, 5, 2, 3, generator=G), torch.rand(4, 3, 2, 3, generator=G)
    rows, weights = (t.double().permute(0, 2, 3, 1).reshape(24, -1) for t in (maps, w))
    torch.testing.assert_close(state(maps, w).compute(), weights.T @ rows / weights.sum(0)[:, None])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 40), max_size=3))
def test_the_way_data_are_cut_into_batches_and_states_does_not_matter(seed, cuts):
    g = torch.Generator().manual_seed(seed)
    acts, y = torch.randn(40, 3, generator=g), torch.randint(4, (40,), generator=g)
    whole = state(acts, y, 4)
    merged = ClassMeans(4)
    bounds = [0, *sorted(cuts), 40]
    for a, b in itertools.pairwise(bounds):
        part = ClassMeans(4)
        if a < b:
            part.update(acts[a:b], y[a:b])
        merged.merge(part)
    assert torch.equal(merged.counts, whole.counts)
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_half_precision_is_summed_in_double():
    acts = torch.full((5000, 1), 1.0, dtype=torch.bfloat16)
    assert state(acts, torch.zeros(5000, dtype=torch.long), 1).compute().item() == 1.0
    assert state(acts, torch.zeros(5000, dtype=torch.long), 1).sums.item() == 5000.0


def test_a_class_that_was_not_seen_has_no_mean():
    means = state(torch.ones(2, 2), torch.tensor([0, 2]))
    assert torch.isnan(means.compute()[1]).all()
    assert means.compute()[[0, 2]].eq(1).all()


def one_part(rank, size):
    g = torch.Generator().manual_seed(rank)
    local = ClassMeans(3)
    local.update(torch.randn(10 + rank, 4, generator=g), torch.arange(10 + rank) % 3)
    first, second = local.sync(), local.sync()
    return {"first": first.compute(), "second": second.compute()}


def test_processes_are_added(in_processes):
    merged = ClassMeans(3)
    for rank in range(2):
        g = torch.Generator().manual_seed(rank)
        merged.update(torch.randn(10 + rank, 4, generator=g), torch.arange(10 + rank) % 3)
    for found in in_processes(__file__, "one_part", 2):
        np.testing.assert_allclose(found["first"], merged.compute().numpy(), rtol=1e-12)
        np.testing.assert_array_equal(found["first"], found["second"])
    alone = state(torch.ones(2, 2), torch.tensor([0, 1]))
    assert torch.equal(alone.sync().counts, alone.counts)


def test_bad_input_gets_one_sentence():
    acts = torch.ones(4, 2)
    for targets, message in [
        (torch.tensor([0, 1, 2, 3]), r"targets run from 0 to 3, but num_classes=3 allows 0 to 2"),
        (torch.tensor([0, 1, -1, 2]), r"targets run from -1"),
        (torch.tensor([0, 1, 2]), r"targets of shape \(3,\) do not fit activations \(4, 2\); expected \(4,\)"),
        (torch.rand(4, 2), r"expected \(4, 3\) in a float type"),
        (torch.ones(4), r"do not fit"),
        (torch.tensor([True] * 4), "not torch.bool"),
        (-torch.ones(4, 3), "not negative"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            state(acts, targets)
    with pytest.raises(InvalidInput, match=r"\(4,\) or, a target for each position, \(4, 5, 5\)"):
        state(torch.ones(4, 2, 5, 5), torch.zeros(4, 5, dtype=torch.long))
    with pytest.raises(InvalidInput, match="1 activations are NaN"):
        state(torch.tensor([[torch.nan]]), torch.tensor([0]))
    with pytest.raises(InvalidInput, match="floating-point"):
        state(torch.ones(2, 2, dtype=torch.long), torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match="no axis of units"):
        state(torch.ones(4), torch.zeros(4, dtype=torch.long))
    with pytest.raises(InvalidInput, match="unit_axis=2"):
        state(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), unit_axis=2)
    with pytest.raises(InvalidInput, match=r"num_classes must be .*, not 0"):
        ClassMeans(0)
    with pytest.raises(InvalidInput, match="no batch"):
        ClassMeans(2).compute()
    means = state(acts, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(InvalidInput, match="2 units, this one has 3"):
        means.update(torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(InvalidInput, match="2 classes cannot be added"):
        means.merge(ClassMeans(2))
    with pytest.raises(InvalidInput, match="1 units cannot be added"):
        means.merge(state(torch.ones(1, 1), torch.tensor([0])))
    with pytest.raises(InvalidInput, match=r"space must be one of .*, not 'max'"):
        as_samples(acts, "max")
