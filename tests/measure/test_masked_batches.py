"""What does not count has no part in traces and curvature: against the same data without it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlcollage.errors import InvalidInput
from mlcollage.measure import fisher_sqnorm, fisher_trace, hessian_trace, hessian_vector_product
from mlcollage.nn.init import seeded

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


class Tagger(nn.Module):
    """A logit vector for each word by itself, (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.embed(input_ids)))


@pytest.fixture
def words():
    with seeded(0):
        return Tagger().double(), torch.randint(9, (3, 4))


def one_by_one(model, ids, **options):
    """Traces of sentences without their padding."""
    return [fisher_trace(model, ids[i : i + 1, : int(MASK[i].sum())], **options).value for i in range(3)]


def test_padding_has_no_label_in_the_fisher_trace(words):
    model, ids = words
    expected = one_by_one(model, ids)
    for data, parts in [
        ({"input_ids": ids, "attention_mask": MASK}, None),
        ((ids, MASK, MASK), ("x", "mask", "_")),
        ([(ids[:2], MASK[:2]), (ids[2:], MASK[2:])], ("input_ids", "attention_mask")),
    ]:
        found = fisher_trace(model, data, parts=parts, per_example=True)
        np.testing.assert_allclose(found.per_example, expected, rtol=1e-9)
    labels = torch.where(MASK == 1, 0, 255)
    found = fisher_trace(model, (ids, labels), ignore_index=255, per_example=True)
    np.testing.assert_allclose(found.per_example, expected, rtol=1e-9)
    named = {"input_ids": ids, "attention_mask": MASK}
    for method in ("mc", "minibatch"):
        drawn = fisher_trace(model, named, method=method, draws=4000, generator=0)
        assert drawn.value == pytest.approx(np.mean(expected), rel=0.1)
    assert fisher_trace(model, ids).value > 1.2 * np.mean(expected)


def test_examples_that_do_not_count_are_none(words):
    model, ids = words
    expected = fisher_trace(model, ids[1:]).value
    found = fisher_trace(model, (ids, torch.tensor([0, 1, 1])), parts=("x", "mask"))
    assert found.value == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InvalidInput, match=r"the model's output has positions \(4,\), to which the mask's \(3,\)"):
        fisher_trace(model, (ids, torch.ones(3, 3)), parts=("x", "mask"))
    with pytest.raises(InvalidInput, match="3 parts, of which only inputs and targets"):
        fisher_trace(model, (ids, MASK, MASK))
    with pytest.raises(InvalidInput, match="does not take the batch's part 'idx'"):
        fisher_trace(model, {"input_ids": ids, "idx": torch.arange(3)})


def test_given_labels_of_minus_100_are_left_out_of_the_penalty(words):
    model, ids = words
    labels = torch.where(MASK == 1, ids % 3, -100)
    norms = fisher_sqnorm(model, ids, labels=labels)
    for i in range(3):
        loss = F.cross_entropy(model(ids[i : i + 1])[0], labels[i], reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert float(norms[i].detach()) == pytest.approx(float(sum(g.square().sum() for g in grads)), rel=1e-9)
    whole = fisher_sqnorm(model, ids, labels=ids % 3, mask=MASK)
    torch.testing.assert_close(whole, norms)


def loss_fn(output, y):
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def test_batches_with_ignored_targets_weigh_by_those_that_count(words):
    model, ids = words
    labels = torch.where(MASK == 1, ids % 3, -100)
    v = torch.linspace(-1, 1, sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    whole = hessian_vector_product(model, loss_fn, (ids, labels), v)
    parted = [{"input_ids": ids[:1], "labels": labels[:1]}, {"input_ids": ids[1:], "labels": labels[1:]}]
    torch.testing.assert_close(hessian_vector_product(model, loss_fn, parted, v), whole)
    with pytest.raises(InvalidInput, match="3 parts, of which only inputs and targets"):
        hessian_trace(model, loss_fn, [(ids, MASK, labels)], generator=0)
    named = hessian_vector_product(model, loss_fn, [(ids, MASK, labels)], v, parts=("input_ids", "attention_mask", "y"))
    torch.testing.assert_close(named, whole)
