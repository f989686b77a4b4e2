import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from mlcollage.data.world import DataWorld
from mlcollage.errors import InvalidInput, MissingFile, MLCollageError
from mlcollage.papers.deep_bootstrap import FiniteAsIdeal, NpzParts, cifar5m
from mlcollage.papers.deep_bootstrap.npz_parts import memory_map_npz


def numbered(size, classes=3):
    """Sample i is the number i."""
    return torch.arange(float(size)).reshape(size, 1), torch.arange(size) % classes


def ids(x):
    return x.flatten().long().tolist()


class Slow(Dataset):
    """A dataset that gives one pair at a time."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return torch.tensor([float(i)]), i % 3


def test_it_is_a_data_world():
    world = FiniteAsIdeal(numbered(20), test=5)
    assert isinstance(world, DataWorld)
    assert (world.num_classes, world.shape) == (3, (1,))


def test_one_pass_hands_out_every_sample_once_and_no_test_or_train_sample():
    world = FiniteAsIdeal(numbered(100), test=20, train_pool=30, seed=4)
    stream = [i for t in range(10) for i in ids(world.batch(t, 5)[0])]
    test, train = (ids(world.fixed(k, split=s).tensors[0]) for k, s in ((20, "test"), (30, "train")))
    assert sorted(stream + test + train) == list(range(100))
    assert world.passes == 1
    assert world.reuse().to_dict("records") == [{"seed": 0, "drawn": 50, "passes": 1.0, "reused": 0}]


@settings(deadline=None)
@given(st.integers(1, 17), st.integers(1, 17), st.integers(0, 5))
def test_a_sample_does_not_depend_on_how_the_stream_is_cut(a, b, seed):
    world = FiniteAsIdeal(numbered(150), test=50, seed=seed)
    cuts = [[i for t in range(60 // k) for i in ids(world.batch(t, k)[0])] for k in (a, b)]
    shortest = min(map(len, cuts))
    assert cuts[0][:shortest] == cuts[1][:shortest]


def test_seeds_see_the_same_samples_in_their_own_order_and_one_test_block():
    world = FiniteAsIdeal(numbered(60), test=10)
    one, two = world.for_seed(1), world.for_seed(2)
    a, b = ids(one.batch(0, 50)[0]), ids(two.batch(0, 50)[0])
    assert a != b
    assert sorted(a) == sorted(b)
    assert torch.equal(one.fixed(10, split="test").tensors[0], two.fixed(10, split="test").tensors[0])
    assert ids(FiniteAsIdeal(numbered(60), test=10).for_seed(1).batch(0, 50)[0]) == a
    assert world.reuse()["seed"].tolist() == [1, 2]


def test_train_sets_of_one_seed_are_nested():
    world = FiniteAsIdeal(numbered(60), test=10, train_pool=20)
    assert ids(world.fixed(20, seed=3).tensors[0])[:7] == ids(world.fixed(7, seed=3).tensors[0])


def test_past_one_pass_is_refused_or_counted():
    world = FiniteAsIdeal(numbered(30), test=10)
    with pytest.raises(InvalidInput, match="exhausted: sample 24 of 20"):
        world.batch(2, 8)
    world = FiniteAsIdeal(numbered(30), test=10, past_one_pass="warn")
    with pytest.warns(UserWarning, match="no longer ideal"):
        x, _ = world.batch(2, 8)
    assert len(x) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        world.batch(4, 8)
    assert world.passes == 2
    assert world.reuse()["reused"].tolist() == [20]


def test_each_further_pass_is_complete_and_in_another_order():
    world = FiniteAsIdeal(numbered(12), test=2, past_one_pass="warn")
    with pytest.warns(UserWarning, match="exhausted"):
        together = ids(world.batch(0, 30)[0])  # a batch longer than the stream
    passes = [ids(world.batch(t, 10)[0]) for t in range(3)]
    assert all(sorted(p) == sorted(passes[0]) for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert together == [i for p in passes for i in p]


def test_any_map_style_dataset_will_do():
    world = FiniteAsIdeal(Slow(), num_classes=3, test=5)
    x, y = world.batch(0, 25)
    assert [i % 3 for i in ids(x)] == y.tolist()
    again = FiniteAsIdeal(TensorDataset(*numbered(30)), test=5)
    assert ids(again.batch(0, 25)[0]) == ids(x)


def test_uint8_inputs_are_scaled_unless_told_otherwise():
    data = (np.full((4, 2), 255, np.uint8), np.arange(4) % 2)
    assert FiniteAsIdeal(data, test=1).batch(0, 1)[0].tolist() == [[1.0, 1.0]]
    world = FiniteAsIdeal(data, test=1, transform=lambda x: x.float() - 255)
    assert world.batch(0, 1)[0].tolist() == [[0.0, 0.0]]


def test_a_test_set_of_its_own():
    x, y = numbered(10)
    world = FiniteAsIdeal((x, y), test=(x + 100, y))
    assert world.stream_size == 10
    assert ids(world.fixed(10, split="test").tensors[0]) == list(range(100, 110))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FiniteAsIdeal(numbered(10), test=10), "cannot give"),
        (lambda: FiniteAsIdeal(numbered(10), test=4, train_pool=6), "cannot give"),
        (lambda: FiniteAsIdeal(Slow(), test=5), "pass num_classes"),
        (lambda: FiniteAsIdeal((torch.zeros(3, 1), torch.zeros(2)), test=1), "as many"),
        (lambda: FiniteAsIdeal(iter([]), test=1), "must be a map-style dataset"),
        (
            lambda: FiniteAsIdeal(numbered(10), test=1, past_one_pass="ignore"),
            "past_one_pass must be one of .*, not 'ignore'",
        ),
        (lambda: FiniteAsIdeal(numbered(10), test=1).fixed(1), "train part holds 0"),
        (lambda: FiniteAsIdeal(numbered(10), test=2).fixed(3, split="test"), "test part holds 2"),
        (
            lambda: FiniteAsIdeal(numbered(10), test=2).batch(0, 1, split="valid"),
            "split must be one of .*, not 'valid'",
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()


# ---- CIFAR-5m: tiny files in the real format -----------------------------------------------------------------------


def write_parts(folder, parts=3, size=40, save=np.savez):
    rng = np.random.default_rng(0)
    images, labels = [], []
    for p in range(parts):
        x = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        y = rng.integers(0, 10, size)
        save(folder / f"cifar5m_part{p}.npz", X=x, Y=y)
        images.append(x)
        labels.append(y)
    return np.concatenate(images), np.concatenate(labels)


def test_memory_map_equals_numpy(tmp_path):
    write_parts(tmp_path, parts=1)
    file = tmp_path / "cifar5m_part0.npz"
    mapped = memory_map_npz(file, "X")
    assert isinstance(mapped, np.memmap)
    with np.load(file, allow_pickle=False) as archive:
        assert np.array_equal(mapped, archive["X"])
        assert np.array_equal(memory_map_npz(file, "Y"), archive["Y"])


def test_fortran_order_is_read_right(tmp_path):
    a = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.savez(tmp_path / "a.npz", a=a)
    assert np.array_equal(memory_map_npz(tmp_path / "a.npz", "a"), a)


def test_parts_are_one_dataset(tmp_path):
    x, y = write_parts(tmp_path)
    data = NpzParts([tmp_path / f"cifar5m_part{p}.npz" for p in range(3)])
    index = torch.tensor([119, 0, 40, 39, 80, 0])
    images, labels = data.gather(index)
    assert len(data) == 120
    assert np.array_equal(images.numpy(), x[index].transpose(0, 3, 1, 2))
    assert np.array_equal(labels.numpy(), y[index])
    assert torch.equal(data[-1][0], images[0])
    with pytest.raises(IndexError):
        data[120]


def test_cifar5m_streams_all_parts_but_the_last_and_tests_on_the_last(tmp_path):
    x, y = write_parts(tmp_path)
    world = cifar5m(tmp_path, test_size=30)
    images, labels = world.batch(0, 80)
    assert (world.stream_size, world.num_classes, world.shape) == (80, 10, (3, 32, 32))
    scaled = x[:80].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    order = np.argsort(images.numpy().reshape(80, -1)[:, :8].sum(1))
    expected = np.argsort(scaled.reshape(80, -1)[:, :8].sum(1))
    assert np.array_equal(images.numpy()[order], scaled[expected])
    assert np.array_equal(labels.numpy()[order], y[:80][expected])
    test = world.fixed(30, split="test").tensors
    assert np.array_equal(test[0].numpy(), x[80:110].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    assert np.array_equal(test[1].numpy(), y[80:110])


def test_files_that_cannot_be_used_are_explained(tmp_path):
    with pytest.raises(MissingFile, match="holds 0 of the files"):
        cifar5m(tmp_path)
    write_parts(tmp_path, parts=2, save=np.savez_compressed)
    with pytest.raises(InvalidInput, match="compressed and cannot be memory-mapped"):
        cifar5m(tmp_path)
    write_parts(tmp_path, parts=2)
    with pytest.raises(InvalidInput, match="limit=41"):
        cifar5m(tmp_path, test_size=41)
    file = tmp_path / "cifar5m_part0.npz"
    with pytest.raises(InvalidInput, match="no array 'Z'; it has X, Y"):
        memory_map_npz(file, "Z")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InvalidInput, match="only half of it was downloaded"):
        cifar5m(tmp_path, test_size=10)
    with pytest.raises(MissingFile, match="there is no file"):
        memory_map_npz(tmp_path / "nothing.npz", "X")


def test_pickled_and_misshapen_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "o.npz", X=np.array([{}], dtype=object))
    with pytest.raises(InvalidInput, match="pickled"):
        memory_map_npz(tmp_path / "o.npz", "X")
    np.savez(tmp_path / "f.npz", X=np.zeros((3, 4, 4, 3)), Y=np.zeros(3, int))
    with pytest.raises(InvalidInput, match="must be uint8"):
        NpzParts([tmp_path / "f.npz"])
    np.savez(tmp_path / "l.npz", X=np.zeros((3, 4, 4, 3), np.uint8), Y=np.zeros(2, int))
    with pytest.raises(InvalidInput, match="3 images but 2 int64 labels"):
        NpzParts([tmp_path / "l.npz"])
    with pytest.raises(InvalidInput, match="no npz file"):
        NpzParts([])


@pytest.mark.parametrize("lazy", [False, True])
def test_samples_of_three_parts_are_refused(lazy):
    """Of a data set of (ids, mask, labels) the mask was taken for the labels."""
    data = TensorDataset(torch.arange(30.0).reshape(10, 3), torch.ones(10, dtype=torch.long), torch.arange(10) % 2)
    given = torch.utils.data.Subset(data, range(10)) if lazy else data
    with pytest.raises(InvalidInput, match="3 parts, of which only inputs and targets would be used"):
        FiniteAsIdeal(given, num_classes=2, test=2).batch(0, 4)


class Rows(Dataset):
    """Decodes its samples; one in the middle may be wrong."""

    def __init__(self, bad=None, kind=tuple):
        self.bad, self.kind = bad, kind

    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = np.full(3, i, np.float32), i % 2
        if i == 17 and self.bad is not None:
            x, y = self.bad(x, y)
        return {"x": x, "label": y} if self.kind is dict else (x, y)


def raising(x, y):
    raise KeyError("lost")


WRONG = [
    (lambda x, y: (x, 2), r"\[17\]: the label is 2; expected an integer from 0 to 1"),
    (lambda x, y: (x, -1), r"\[17\]: the label is -1"),
    (lambda x, y: (x * np.nan, y), r"\[17\]: the input holds NaN or infinity"),
]


@pytest.mark.parametrize("kind", [tuple, dict])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        *WRONG,
        (lambda x, y: (x[:2], y), r"\[17\] has shape \(2,\)|another one \(2,\)"),
        (lambda x, y: (object(), y), r"\[17\] does not become tensors"),
        (raising, r"\[17\] failed with KeyError"),
    ],
)
def test_a_wrong_sample_inside_of_a_lazy_dataset_is_named(bad, says, kind):
    right = FiniteAsIdeal(Rows(kind=kind), num_classes=2, test=4).batch(0, 36)
    assert right[0].shape == (36, 3)
    assert (right[1] == right[0][:, 0].long() % 2).all()
    world = FiniteAsIdeal(Rows(bad, kind), num_classes=2, test=4)
    place = 17 in world._test_index
    with pytest.raises(MLCollageError, match=says):
        world.fixed(4, split="test") if place else world.batch(0, 36)
    with pytest.raises(MLCollageError, match=says.replace(r"\[", r"the test set\[", 1)):
        FiniteAsIdeal(Rows(), num_classes=2, test=Rows(bad, kind)).fixed(40, split="test")


@pytest.mark.parametrize(("bad", "says"), WRONG)
def test_a_wrong_sample_in_memory_is_named_at_once(bad, says):
    x, y = (np.stack(part) for part in zip(*(Rows(bad)[i] for i in range(40)), strict=True))
    with pytest.raises(InvalidInput, match=says):
        FiniteAsIdeal((x, y), num_classes=2, test=4)
    with pytest.raises(InvalidInput, match=says):
        FiniteAsIdeal(Rows(), num_classes=2, test=(x, y))


def test_a_transform_may_fill_what_is_missing():
    x = torch.ones(40, 3)
    x[5] = torch.nan
    world = FiniteAsIdeal((x, torch.arange(40) % 2), test=4, transform=lambda x: x.nan_to_num())
    assert bool(world.batch(0, 36)[0].isfinite().all())


def test_targets_of_a_regression_must_be_finite():
    with pytest.raises(InvalidInput, match=r"\[3\]: the target holds NaN"):
        FiniteAsIdeal((torch.ones(9, 2), torch.tensor([0.0, 1, 2, torch.nan, 4, 5, 6, 7, 8])), test=2)
