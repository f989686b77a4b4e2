"""Hugging Face data sets, written to disk by the real ``datasets`` package and read back without a network."""

import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from mlcollage.data.loading import load_workload
from mlcollage.data.workload import arrays
from mlcollage.errors import InvalidInput, MissingDependency, MissingFile, UnknownName


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def images(n, size=(9, 8), mode="L"):
    return Dataset.from_dict(
        {
            "image": [Pillow.new(mode, size, i if mode == "L" else (i, 0, 0)) for i in range(n)],
            "label": [i % 2 for i in range(n)],
        },
        features=Features({"image": Image(), "label": ClassLabel(names=["zebra", "ape"])}),
    )


def test_images_saved_to_disk_keep_their_split_and_the_order_of_classes(tmp_path):
    DatasetDict({"train": images(20), "test": images(6)}).save_to_disk(tmp_path / "animals")
    for spec in (f"hf:{tmp_path / 'animals'}", str(tmp_path / "animals")):
        workload = load_workload(spec)
        assert (len(workload.train), len(workload.test)) == (20, 6)
        assert workload.train.classes == ("zebra", "ape")
        X, y = arrays(workload.train)
        assert X.shape == (20, 1, 8, 9)
        np.testing.assert_allclose(X[:, 0, 0, 0] * 255, np.arange(20), atol=1e-4)
        assert y.tolist() == [0, 1] * 10
        assert workload.name == "hf:animals"
    again = load_workload(f"hf:{tmp_path / 'animals'}")
    assert again.fingerprint == workload.fingerprint
    assert load_workload(f"hf:{tmp_path / 'animals'}?size=4").fingerprint != workload.fingerprint
    assert load_workload(f"hf:{tmp_path / 'animals'}?size=4&channels=3").describe()["shape"] == [3, 4, 4]


def test_a_single_part_is_split_and_says_so(tmp_path):
    images(20, mode="RGB").save_to_disk(tmp_path / "one")
    workload = load_workload(f"hf:{tmp_path / 'one'}")
    assert workload.name == "hf:one (80/20 split)"
    assert (len(workload.train), len(workload.test)) == (16, 4)
    assert workload.train[0][0].shape == (3, 8, 9)


def test_a_folder_of_parquet_files_is_read_as_a_table(tmp_path):
    rng = np.random.default_rng(0)
    table = Dataset.from_dict(
        {"a": rng.random(40).tolist(), "b": ["x", "y"] * 20, "kind": ["wet", "dry"] * 20},
        features=Features({"a": Value("float64"), "b": Value("string"), "kind": Value("string")}),
    )
    (tmp_path / "table").mkdir()
    table.select(range(30)).to_parquet(tmp_path / "table/train.parquet")
    table.select(range(30, 40)).to_parquet(tmp_path / "table/test.parquet")
    workload = load_workload(f"hf:{tmp_path / 'table'}?label=kind&scale=none")
    assert (len(workload.train), len(workload.test)) == (30, 10)
    X, y = arrays(workload.train)
    assert X.shape == (30, 3)
    np.testing.assert_allclose(X[:, 0], table["a"][:30], rtol=1e-6)
    assert workload.train.classes == ("dry", "wet")
    assert y.tolist() == [1, 0] * 15


def test_images_of_several_sizes_ask_for_one(tmp_path):
    rows = Dataset.from_dict(
        {"image": [Pillow.new("L", (8 + i % 2, 8)) for i in range(20)], "label": [i // 10 for i in range(20)]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    rows.save_to_disk(tmp_path / "sizes")
    with pytest.raises(InvalidInput, match=r"differ in size: .*size=32"):
        arrays(load_workload(f"hf:{tmp_path / 'sizes'}").train)
    assert arrays(load_workload(f"hf:{tmp_path / 'sizes'}?size=8").train)[0].shape == (16, 1, 8, 8)


def test_mistakes_get_one_sentence(tmp_path):
    DatasetDict({"train": images(20), "test": images(6)}).save_to_disk(tmp_path / "animals")
    with pytest.raises(UnknownName, match="must be one of 'image', 'label', not 'kind'"):
        load_workload(f"hf:{tmp_path / 'animals'}?label=kind")
    with pytest.raises(UnknownName, match=r"image column of .* must be one of 'image', not 'label'"):
        load_workload(f"hf:{tmp_path / 'animals'}?image=label")
    with pytest.raises(InvalidInput, match="channels must be 1 or 3"):
        load_workload(f"hf:{tmp_path / 'animals'}?channels=2")
    with pytest.raises(InvalidInput, match="no option 'target'"):
        load_workload(f"hf:{tmp_path / 'animals'}?target=label")
    Dataset.from_dict({"a": [1.0] * 20, "b": [0, 1] * 10}).save_to_disk(tmp_path / "unnamed")
    with pytest.raises(InvalidInput, match=r"which column .* is the label\? Add \?label=column; it has a, b"):
        load_workload(f"hf:{tmp_path / 'unnamed'}")
    DatasetDict({"dev": images(6), "more": images(6)}).save_to_disk(tmp_path / "parts")
    with pytest.raises(InvalidInput, match="no part 'train'; it has dev, more"):
        load_workload(f"hf:{tmp_path / 'parts'}")
    (tmp_path / "nothing").mkdir()
    with pytest.raises((InvalidInput, MissingFile), match="the data set"):
        load_workload(f"hf:{tmp_path / 'nothing'}")


def test_a_name_that_cannot_be_had_says_so():
    with pytest.raises((MissingFile, InvalidInput), match="the data set 'nobody/no-such-set'") as caught:
        load_workload("hf:nobody/no-such-set")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'mlcollage\[hub\]'"):
        load_workload("hf:mnist")
