"""Batches are read whole: every part has a use, or the sentence says how to name it."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlcollage.data.batches import batches_of, count_classes, fit_mask, read_batch
from mlcollage.errors import InvalidInput

IDS, MASK, Y = torch.arange(12).reshape(4, 3), torch.tensor([[1, 1, 0]] * 4), torch.tensor([0, 1, 0, 1])


@dataclass
class Record:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def same(read, *, args=(), kwargs=(), mask=None):
    assert [a is b for a, b in zip(read.args, args, strict=True)] == [True] * len(args)
    assert sorted(read.kwargs) == sorted(kwargs)
    assert read.y is Y
    assert (read.mask is None) if mask is None else torch.equal(read.mask, mask)


def test_what_loaders_give():
    same(read_batch((IDS, Y)), args=(IDS,))
    same(read_batch([(IDS, MASK), Y]), args=(IDS, MASK))
    same(read_batch(({"input_ids": IDS, "attention_mask": MASK}, Y)), kwargs=("input_ids", "attention_mask"), mask=MASK)
    named = {"input_ids": IDS, "attention_mask": MASK, "labels": Y}
    for batch in (named, Record(**named), namedtuple("Three", named)(**named)):
        same(read_batch(batch), kwargs=("input_ids", "attention_mask"), mask=MASK)
    same(read_batch(namedtuple("Pair", "image label")(IDS, Y)), args=(IDS,))
    padding = read_batch({"src": IDS, "src_key_padding_mask": MASK == 0, "target": Y})
    same(padding, kwargs=("src", "src_key_padding_mask"), mask=MASK == 1)
    assert padding.to("cpu").x["src"] is IDS


def test_transformers_own_batches():
    import transformers

    batch = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": MASK, "labels": Y})
    same(read_batch(batch), kwargs=("input_ids", "attention_mask"), mask=MASK)


def test_parts_are_named():
    same(read_batch((IDS, MASK, Y), ("x", "mask", "y")), args=(IDS,), mask=MASK)
    same(
        read_batch((IDS, MASK, Y), ("input_ids", "attention_mask", "labels")),
        kwargs=("input_ids", "attention_mask"),
        mask=MASK,
    )
    same(read_batch((IDS, IDS, MASK, Y), ("x", "_", "x", "y")), args=(IDS, MASK))
    same(read_batch({"image": IDS, "idx": MASK, "y": Y}, {"image": "x", "idx": "_"}), args=(IDS,))
    same(read_batch({"x": IDS, "labels": Y}, {"labels": "labels+y"}), args=(IDS,), kwargs=("labels",))
    same(read_batch({"a": {"b": IDS}, "c": Y}, lambda batch: (batch["a"]["b"], batch["c"])), args=(IDS,))


@pytest.mark.parametrize(
    ("batch", "parts", "message"),
    [
        (
            (IDS, MASK, Y),
            None,
            "3 parts, of which only inputs and targets would be used: name them, such as parts=",
        ),
        ((IDS,), None, "must be a pair .* targets are needed"),
        ((IDS, MASK, Y), ("x", "y"), r"parts must name the 3 parts of the batch, such as .*, not \('x', 'y'\)"),
        ({"ids": IDS}, None, r"none of the batch's parts \(ids\) is called labels, targets or y"),
        ({"x": IDS, "y": Y, "labels": Y}, None, r"2 of the batch's parts .* are its y: leave out others with '_'"),
        (({"x": IDS, "y": Y}, Y), None, "targets twice"),
        ({"x": IDS, "y": Y}, {"z": "_"}, "parts names 'z'; the batch has x, y"),
        ({"x": IDS, "y": Y}, ("x", "y"), r"parts have names \(x, y\)"),
        ("text", None, "must be inputs, a pair .* not str"),
    ],
)
def test_nothing_is_dropped_in_silence(batch, parts, message):
    with pytest.raises(InvalidInput, match=message):
        read_batch(batch, parts)


def test_names_that_the_model_does_not_take_are_refused():
    batch = read_batch({"image": IDS, "y": Y})
    with pytest.raises(InvalidInput, match=r"does not take the batch's part 'image' \(it takes input\): .* parts="):
        batch.check(nn.Linear(3, 2))
    assert read_batch({"input": IDS, "y": Y}).check(nn.Linear(3, 2)).kwargs


def test_whole_data_are_cut_and_loaders_are_not():
    for data in ((IDS, Y), {"x": IDS, "y": Y}, TensorDataset(IDS, Y), DataLoader(TensorDataset(IDS, Y), 3), [(IDS, Y)]):
        read = list(batches_of(data, batch_size=3))
        assert torch.equal(torch.cat([b.x for b in read]), IDS)
        assert torch.equal(torch.cat([b.y for b in read]), Y)
    assert [b.x.shape for b in batches_of((IDS.T, Y), batch_size=3, dim=1)] == [(3, 3), (3, 1)]
    masked = list(batches_of((IDS, MASK, Y), ("x", "mask", "y"), batch_size=2))
    assert [len(b.mask) for b in masked] == [2, 2]
    assert len(list(batches_of([IDS, IDS], targets=False))) == 2
    for data, message in [
        ((IDS, Y[1:]), "there are 4 inputs and 3 targets"),
        (7, "data is int: a tensor, a pair"),
        ((torch.tensor(1.0), Y), "single number"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            list(batches_of(data))


def test_a_lonely_255_is_asked_about():
    assert count_classes([torch.tensor([0, 20, -100])]) == 21
    assert count_classes([torch.tensor([0, 20]), torch.tensor([255])], 255) == 21
    assert count_classes([torch.tensor([254, 255])]) == 256
    with pytest.raises(InvalidInput, match=r"labels run to 20, but for one that is 255, .* ignore_index=255"):
        count_classes([torch.tensor([0, 20]), torch.tensor([255])])


def test_masks_go_to_grids_that_divide_theirs():
    mask = torch.tensor([[1, 1, 0, 0]])
    assert fit_mask(mask, (2,), "a layer").tolist() == [[True, False]]
    assert fit_mask(mask, (8,), "a layer").tolist() == [[True] * 4 + [False] * 4]
    assert fit_mask(torch.tensor([1, 0]), (2, 2), "a layer").sum() == 4
    with pytest.raises(InvalidInput, match=r"layer 'a' has positions \(3,\), to which the mask's \(4,\) do not fit"):
        fit_mask(mask, (3,), "layer 'a'")


def test_double_inputs_are_taken_in_the_models_type():
    """numpy makes float64 of everything; a model in double keeps it, and whole numbers stay whole."""
    x, ids = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.int64)

    class Named(torch.nn.Linear):
        def forward(self, x, ids):
            return super().forward(x)

    for dtype in (torch.float32, torch.float64):
        read = read_batch({"x": x, "ids": ids}, {"x": "x", "ids": "ids"}, targets=False).check(Named(3, 1, dtype=dtype))
        assert read.args[0].dtype == dtype
        assert read.kwargs["ids"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["torch", "hub", "hub with tensors"])
def test_data_sets_are_read_in_batches_without_touching_the_random_state(kind):
    import datasets

    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
    data = TensorDataset(x, y)
    if kind != "torch":
        data = datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})
        data = data.with_format("torch") if kind == "hub with tensors" else data
    before = torch.get_rng_state()
    read = list(batches_of(data, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(batch.y) for batch in read] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.x for batch in read]), x)


def test_single_examples_are_no_batches():
    data = TensorDataset(torch.ones(5, 2), torch.arange(5))
    with pytest.raises(InvalidInput, match="come as single examples and not as batches"):
        list(batches_of(DataLoader(data, batch_size=None)))
