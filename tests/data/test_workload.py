"""Workloads: every kind of data a user has, on small real files, and one sentence for every mistake."""

import textwrap
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_iris
from torch import nn
from torch.utils.data import TensorDataset

from mlcollage.data._reading import standardize
from mlcollage.data.catalog import catalog
from mlcollage.data.loading import load_workload
from mlcollage.data.problem import problem
from mlcollage.data.workload import Labeled, Workload, arrays
from mlcollage.errors import InvalidInput, MissingFile, UnknownName

RNG = np.random.default_rng(0)


def test_built_in_workloads_hold_what_they_promise():
    for spec, shape, classes, sizes in [
        ("digits", (1, 8, 8), 10, (1257, 540)),
        ("mnist1d", (40,), 10, (4000, 1000)),
        ("iris", (4,), 3, (112, 38)),
        ("breast_cancer", (30,), 2, (426, 143)),
        ("glyphs:easy16?n=60&test=40", (1, 16, 16), 10, (60, 40)),
        ("glyphs?n=30&test=20&num_classes=4", (3, 32, 32), 4, (30, 20)),
    ]:
        workload = load_workload(spec)
        X, y = arrays(workload.train)
        assert X.shape == (sizes[0], *shape)
        assert (X.dtype, y.dtype) == (np.float32, np.int64)
        assert len(workload.test) == sizes[1]
        assert workload.num_classes == classes
        assert workload.name == spec.replace("n=30&test=20&num_classes=4", "n=30&num_classes=4&test=20")
        assert 0 <= y.min() <= y.max() < classes
        assert workload.model is None


def test_built_in_tables_are_standardized_by_the_training_rows():
    X, _ = arrays(load_workload("wine").train)
    np.testing.assert_allclose(X.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(X.std(0), 1, atol=1e-5)


@pytest.mark.parametrize("unit", [1e-19, 1.0, 1e12])
def test_columns_are_standardized_in_any_unit(unit):
    """Charges in coulomb were taken for constants; real constants become 0, however rounded."""
    x = np.random.default_rng(0).normal(3, 2, (50, 2))
    x[:, 1] = 0.1 + 0.2
    train, test = standardize(unit * x[:40], unit * x[40:])
    mean, std = x[:40, 0].mean(), x[:40, 0].std()
    np.testing.assert_allclose(train[:, 0], (x[:40, 0] - mean) / std, atol=1e-9)
    np.testing.assert_allclose(test[:, 0], (x[40:, 0] - mean) / std, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([train, test])[:, 1], 0, atol=1e-12)


def test_the_catalog_lists_what_can_be_loaded():
    rows = catalog()
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"name", "what", "train", "test", "shape", "available", "where"}
        if row["shape"] is not None and row["available"] and row["name"] != "fashion_mnist":
            facts = load_workload(row["name"]).describe()
            assert (facts["train"], facts["test"], facts["shape"]) == (row["train"], row["test"], row["shape"])


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("mnist", UnknownName, "there is no workload 'mnist'; expected digits"),
        ("", InvalidInput, "named by a string"),
        (None, InvalidInput, "named by a string"),
        ("digits?size=3", InvalidInput, "'size'; it takes none"),
        ("digits?size", InvalidInput, "key=value"),
        ("glyphs:medium", UnknownName, "preset must be .* not 'medium'"),
        ("glyphs:easy16?n=0", InvalidInput, "n must be a whole number from 1; got '0'"),
        ("glyphs:easy16?noise=much", InvalidInput, "noise of glyphs:easy16 must be float"),
        ("glyphs:easy16?noise=-1", InvalidInput, "noise must be a finite number of at least 0"),
        ("glyphs:easy16?color=1", InvalidInput, "no option 'color'"),
        ("no/such/file.npz", MissingFile, "no file no/such/file.npz"),
        ("no/such/table.csv", MissingFile, "no file"),
        ("no_such_module_x:f", UnknownName, "no module 'no_such_module_x'"),
        ("no_such_file.py:f", MissingFile, "no file no_such_file.py"),
        (":f", UnknownName, "expected module:function"),
        ("math:sqrt_of", UnknownName, "math has no function 'sqrt_of'"),
    ],
)
def test_names_that_mean_nothing_get_one_sentence(spec, kind, message):
    with pytest.raises(kind, match=message) as caught:
        load_workload(spec)
    assert "\n" not in str(caught.value)


# The user's own function


CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from mlcollage.data.workload import Labeled

CONSTANT = 3


def data(n):
    g = torch.Generator().manual_seed(n)
    return TensorDataset(torch.rand(n, 2, generator=g), torch.arange(n) % 3)


def good():
    return Labeled(data(30), data(15), 3, lambda: nn.Linear(2, 3))


def wrong_type(): return data(3), data(3)
def dictionary(): return {"train": data(30), "test": data(15), "num_classes": 3, "model": lambda: nn.Linear(2, 3)}
def strange(): return {**dictionary(), "modle": None}
class Own: train, test, num_classes = data(30), data(15), 3
def needs(path): return None
def iterable(): return Labeled(iter([]), data(3), 3)
def empty(): return Labeled(data(30), TensorDataset(torch.zeros(0, 2), torch.zeros(0)), 3)
def labels(): return Labeled(data(30), data(15), 2)
def shapes(): return Labeled(data(30), TensorDataset(torch.zeros(3, 4), torch.zeros(3).long()), 3)
def integers(): return Labeled(TensorDataset(torch.zeros(3, 2).long(), torch.zeros(3).long()), data(3), 3)
def nan(): return Labeled(TensorDataset(torch.full((3, 2), float("nan")), torch.zeros(3).long()), data(3), 3)
def triple(): return Labeled(TensorDataset(*[torch.zeros(3, 2)] * 3), data(3), 3)
def soft(): return Labeled(TensorDataset(torch.zeros(3, 2), torch.zeros(3)), data(3), 3)
def one(): return Labeled(data(30), data(15), 1)
def instance(): return Labeled(data(30), data(15), 3, nn.Linear(2, 3))
def narrow(): return Labeled(data(30), data(15), 3, lambda: nn.Linear(2, 2))
def unfit(): return Labeled(data(30), data(15), 3, lambda: nn.Linear(5, 3))
def failing(): return Labeled(data(30), data(15), 3, lambda: nn.Linear(2))
def none(): return Labeled(data(30), data(15), 3, lambda: None)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    path = tmp_path / "my_workloads.py"
    path.write_text(CODE)
    (tmp_path / "needy_workloads.py").write_text("import no_such_package_x\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    import sys

    for name in ("my_workloads", "needy_workloads", "mlcollage_user_my_workloads"):
        sys.modules.pop(name, None)


def test_a_function_of_the_users_is_found_by_module_or_file(code):
    by_name, by_file = load_workload("my_workloads:good"), load_workload(f"{code}:good")
    assert by_name.name == "my_workloads:good"
    assert by_name.fingerprint == by_file.fingerprint != ""
    np.testing.assert_array_equal(arrays(by_name.train)[0], arrays(by_file.train)[0])
    code.write_text(CODE + "\n# changed\n")
    assert load_workload(f"{code}:good").fingerprint != by_name.fingerprint
    facts = by_name.describe()
    assert facts["model"] == "Linear, 9 parameters"
    assert (facts["train"], facts["test"], facts["num_classes"]) == (30, 15, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "has no function 'absent'; it has data, good"),
        ("CONSTANT", "is int, not a function"),
        (
            "wrong_type",
            "return a mlcollage.data.Labeled, or a dictionary .* the tuple it returned lacks train, test, num_classes",
        ),
        ("strange", "the dict it returned has modle too"),
        ("needs", "callable without arguments .missing a required argument: .path"),
        ("iterable", "train must be a map-style dataset"),
        ("empty", "test is empty"),
        ("labels", "train.2.: the label is 2; expected an integer from 0 to 1"),
        ("shapes", "inputs are .2,. in train and .4,. in test"),
        ("integers", "input is a tensor of torch.int64; expected a float tensor"),
        ("nan", "NaN or infinity"),
        ("triple", "expected a pair"),
        ("soft", "expected an integer"),
        ("one", "num_classes must be an int of at least 2"),
        ("instance", "must make a fresh module"),
    ],
)
def test_mistakes_in_the_users_function_get_one_sentence(code, name, message):
    with pytest.raises((InvalidInput, UnknownName), match=message):
        load_workload(f"my_workloads:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("narrow", r"maps \(2, 2\) to \(2, 2\); expected \(2, 3\), one logit per class"),
        ("unfit", r"model on inputs \(2, 2\) failed with RuntimeError: mat1 and mat2"),
        ("failing", r"model\(\) failed with TypeError: .* \(.*my_workloads.py, line 36, in <lambda>\)"),
        ("none", "must return a torch.nn.Module; got NoneType"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_found_by_the_check(code, name, message):
    with pytest.raises(InvalidInput, match=message):
        load_workload(f"my_workloads:{name}").describe()


def test_a_dictionary_or_any_object_with_the_names_will_do(code):
    workload = load_workload("my_workloads:dictionary")
    assert workload.describe()["model"] == "Linear, 9 parameters"
    assert len(load_workload("my_workloads:Own").train) == 30


def test_the_fingerprint_covers_the_users_own_files_that_are_imported(tmp_path, monkeypatch):
    package = tmp_path / "lab_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text("from . import parts\n")
    (package / "parts.py").write_text("WIDTH = 3\n")
    (package / "unrelated.py").write_text("x = 1\n")
    (package / "loads.py").write_text("from .nets import parts\nimport lab_of_mine.nets as n\n" + CODE)
    monkeypatch.syspath_prepend(tmp_path)
    before = load_workload("lab_of_mine.loads:good").fingerprint
    (package / "unrelated.py").write_text("x = 2\n")
    assert load_workload("lab_of_mine.loads:good").fingerprint == before
    (package / "parts.py").write_text("WIDTH = 4\n")
    assert load_workload("lab_of_mine.loads:good").fingerprint != before
    import sys

    for name in [name for name in sys.modules if name.startswith("lab_of_mine")]:
        del sys.modules[name]


def test_a_module_that_needs_another_package_says_which(code):
    with pytest.raises(InvalidInput, match="needs 'no_such_package_x', which is not installed"):
        load_workload("needy_workloads:f")


# npz


def save(path, **held):
    np.savez(path, **held)
    return str(path)


def test_arrays_with_a_test_set(tmp_path):
    X, y = RNG.random((40, 5)), np.arange(40) % 4
    workload = load_workload(save(tmp_path / "a.npz", X=X, y=y, X_test=X[:8], y_test=y[:8]))
    np.testing.assert_array_equal(arrays(workload.train)[0], X.astype(np.float32))
    np.testing.assert_array_equal(arrays(workload.test)[1], y[:8])
    assert (workload.name, workload.num_classes) == ("a.npz", 4)
    other = load_workload(save(tmp_path / "b.npz", train_images=X, train_labels=y[:, None]))
    assert other.name == "b.npz (80/20 split)"
    assert other.fingerprint != workload.fingerprint


def test_a_split_of_our_own_is_stratified_the_same_every_time_and_complete(tmp_path):
    X, y = np.arange(100.0)[:, None], np.repeat([0, 1], [80, 20])
    path = save(tmp_path / "a.npz", X=X, y=y)
    first, again = load_workload(path), load_workload(path)
    (x, labels), (xt, labels_t) = arrays(first.train), arrays(first.test)
    np.testing.assert_array_equal(x, arrays(again.train)[0])
    assert sorted(np.concatenate([x, xt])[:, 0]) == list(range(100))
    assert np.bincount(labels).tolist() == [64, 16]
    assert np.bincount(labels_t).tolist() == [16, 4]


@pytest.mark.parametrize("labels", [["cat", "dog"], [3, 7], [-1, 1], [b"cat", b"dog"], [1.0, 2.0], [False, True]])
def test_labels_of_any_kind_become_integers_and_keep_their_names(tmp_path, labels):
    y = np.array(labels)[np.arange(40) % 2]
    X = RNG.random((40, 2))
    workload = load_workload(save(tmp_path / "a.npz", X=X, y=y, X_test=X, y_test=y[::-1]))
    np.testing.assert_array_equal(arrays(workload.train)[1], np.arange(40) % 2)
    np.testing.assert_array_equal(arrays(workload.test)[1], (np.arange(40) % 2)[::-1])
    expected = [v.decode() if isinstance(v, bytes) else str(int(v) if isinstance(v, float) else v) for v in labels]
    assert list(workload.train.classes) == expected


@pytest.mark.parametrize("shape", [(40, 6, 7), (40, 6, 7, 3), (40, 3, 6, 7), (40, 6, 7, 1)])
def test_images_become_channels_first_in_the_unit_interval(tmp_path, shape):
    X = RNG.integers(0, 256, shape, dtype=np.uint8)
    x, _ = arrays(
        load_workload(save(tmp_path / "a.npz", X=X, y=np.arange(40) % 2, X_test=X, y_test=np.arange(40) % 2)).train
    )
    channels = 3 if 3 in shape else 1
    assert x.shape == (40, channels, 6, 7)
    assert x.max() == pytest.approx(X.max() / 255)
    first = X[0] if shape == (40, 3, 6, 7) else X[0].reshape(6, 7, channels).transpose(2, 0, 1)
    np.testing.assert_allclose(x[0], first / 255, rtol=1e-6)


def whole(**changes):
    return {"X": RNG.random((40, 5)), "y": np.arange(40) % 2} | changes


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"a": np.zeros(3)}, "must hold the arrays X and y .*it holds a"),
        (whole(X_test=np.zeros((3, 5))), "both X_test and y_test"),
        (whole(X=np.full((40, 5), np.nan)), "NaN or infinity in 40 samples, the first is 0"),
        (whole(X=np.zeros((39, 5))), "39 inputs and 40 labels"),
        (whole(X=np.zeros(40)), "has shape"),
        (whole(X=np.zeros((40, 0))), "has shape"),
        (whole(X=np.zeros((40, 8, 8, 5))), "1, 3 or 4 channels"),
        (whole(X=np.full((40, 8, 8), 300)), "expected 0 to 255"),
        (whole(X=np.array([["a"] * 5] * 40)), "expected numbers"),
        (whole(y=RNG.random(40)), "real numbers such as"),
        (whole(y=np.arange(40)), "40 different labels for 40 samples"),
        (whole(y=np.zeros(40, int)), "one class only"),
        (whole(y=np.zeros((40, 3))), "one per sample"),
        (whole(y=np.full(40, np.nan)), "NaN or infinite"),
        (whole(y=np.r_[np.arange(39) % 2, 2]), "class '2' of .* has one sample"),
        (whole(X_test=np.zeros((3, 4)), y_test=np.arange(3) % 2), "in X and .4,. in X_test"),
        (whole(X_test=np.zeros((3, 5)), y_test=np.arange(3)), "hold '2', which the training labels never do"),
        (whole(y=np.array([{}, []] * 20, dtype=object)), "never loaded"),
    ],
)
def test_mistakes_in_an_archive_get_one_sentence(tmp_path, held, message):
    with pytest.raises(InvalidInput, match=message):
        load_workload(save(tmp_path / "a.npz", **held))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    for content in (b"", b"hello", b"PK\3\4 cut short"):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(InvalidInput, match=r"not an .npz archive|never unpickled"):
            load_workload(str(tmp_path / "a.npz"))
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InvalidInput, match=r"neither .npz, .csv nor .parquet"):
        load_workload(str(tmp_path / "a.txt"))


# Tables


@pytest.fixture
def iris():
    frame = load_iris(as_frame=True).frame
    frame["species"] = load_iris().target_names[frame.pop("target")]
    return frame


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_last_column_of_a_table_is_the_label_unless_named(tmp_path, iris, suffix):
    path = tmp_path / f"iris.{suffix}"
    write = iris.to_csv if suffix == "csv" else iris.to_parquet
    write(path, index=False)
    workload = load_workload(str(path))
    assert workload.name == f"iris.{suffix} (80/20 split)"
    assert workload.train.classes == ("setosa", "versicolor", "virginica")
    X, y = arrays(workload.train)
    assert X.shape == (120, 4)
    np.testing.assert_allclose(X.mean(0), 0, atol=1e-5)
    assert np.bincount(y).tolist() == [40, 40, 40]
    moved = iris[["species", *iris.columns[:-1]]]
    (moved.to_csv if suffix == "csv" else moved.to_parquet)(path, index=False)
    renamed = load_workload(f"{path}?target=species&scale=none")
    assert renamed.fingerprint != workload.fingerprint
    np.testing.assert_allclose(np.sort(arrays(renamed.test)[0], axis=None).max(), iris.iloc[:, 2].max(), atol=2)
    assert arrays(renamed.train)[0].min() > 0


def test_words_are_one_hot_and_an_index_column_is_dropped(tmp_path):
    frame = pd.DataFrame(
        {"size": np.arange(60.0), "color": ["red", "blue", "green"] * 20, "wet": [True, False] * 30, "y": [0, 1] * 30}
    )
    frame.to_csv(tmp_path / "a.csv")  # writes row numbers
    x = arrays(load_workload(f"{tmp_path / 'a.csv'}?scale=none").train)[0]
    assert x.shape == (48, 5)
    assert set(np.unique(x[:, 1:])) == {0, 1}
    np.testing.assert_array_equal(x[:, 2:].sum(1), 1)


def test_a_split_column_or_a_second_file_gives_the_test_set(tmp_path, iris):
    marked = iris.assign(split=["test" if i % 3 == 0 else "train" for i in range(150)])
    marked.to_csv(tmp_path / "marked.csv", index=False)
    workload = load_workload(str(tmp_path / "marked.csv"))
    assert workload.name == "marked.csv"
    assert (len(workload.train), len(workload.test)) == (100, 50)
    iris[::2].to_csv(tmp_path / "train.csv", index=False)
    iris[1::2].to_csv(tmp_path / "test.csv", index=False)
    workload = load_workload(f"{tmp_path / 'train.csv'}?test=test.csv")
    assert (len(workload.train), len(workload.test)) == (75, 75)
    assert arrays(workload.train)[0].shape[1] == arrays(workload.test)[0].shape[1] == 4


@pytest.mark.parametrize(
    ("text", "query", "message"),
    [
        ("", "", "cannot be read as a table"),
        ("a,b\n1,2,3\n4\n5,6,7,8", "", "cannot be read as a table"),
        ("a\n1\n2", "", "has the column 'a' only"),
        ("a,b\n1,x\n2,y", "?target=c", "no column 'c'; its columns are a, b"),
        ("a,b\n1,x\n2,y", "?scale=log", "scale must be standard or none"),
        ("a,b\n1,x\n2,y", "?goal=b", "no option 'goal'; it takes target, test, split, scale"),
        ("a,b\n1,x\n2,y", "?test=none.csv", "no file none.csv"),
        ("a,b\n" + "1,x\n,y\n" * 20, "", "missing values in a .20."),
        ("a,b\n" + "1,x\n2,\n" * 20, "", "20 labels in the column 'b'"),
        ("a,b\n" + "inf,x\n2,y\n" * 20, "", "infinite values"),
        ("a,b\n" + "".join(f"w{i},{i % 2}\n" for i in range(99)), "", "99 different words"),
        ("a,b\n" + "".join(f"1,{i}.5\n" for i in range(99)), "", "real numbers such as 0.5"),
        ("a,b\n" + "1,x\n2,y\n", "", "takes at least|one sample"),
        ("a,b\n" + "1,x\n2,y\n" * 2, "", "takes at least 10"),
    ],
)
def test_mistakes_in_a_table_get_one_sentence(tmp_path, text, query, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises((InvalidInput, MissingFile), match=message) as caught:
        load_workload(f"{tmp_path / 'a.csv'}{query}")
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_and_bytes_that_are_no_text_are_refused(tmp_path):
    for name in ("a.parquet", "a.csv"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x81" * 30)
        with pytest.raises(InvalidInput):
            load_workload(str(tmp_path / name))


# Image folders


def picture(path, value=100, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(
        mode, size, value if mode in ("L", "I;16", "P") else (value, 0, 255)[: len(Image.new(mode, (1, 1)).getbands())]
    ).save(path)
    return path


@pytest.fixture
def pets(tmp_path):
    root = tmp_path / "pets"
    for part, n in (("train", 6), ("test", 3)):
        for value, name in ((50, "cat"), (200, "dog")):
            for i in range(n):
                picture(root / part / name / f"{i}.png", value + i)
    return root


def test_a_folder_in_the_form_of_torchvision_is_read_as_it_is(pets):
    workload = load_workload(str(pets))
    assert (len(workload.train), len(workload.test), workload.num_classes) == (12, 6, 2)
    assert workload.train.classes == ("cat", "dog")
    assert workload.name == "pets"
    x, y = workload.train[7]
    assert x.shape == (3, 10, 12)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0, 0], torch.tensor([201 / 255, 0, 1]))
    assert int(y) == 1
    X, labels = arrays(workload.test)
    assert X.shape == (6, 3, 10, 12)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_folder_of_classes_is_split_and_gray_stays_gray(tmp_path):
    for name in ("a", "b"):
        for i in range(10):
            picture(tmp_path / "set" / name / f"{i}.png", i, mode="L")
    workload = load_workload(f"{tmp_path / 'set'}")
    assert workload.name == "set (80/20 split)"
    assert (len(workload.train), len(workload.test)) == (16, 4)
    assert workload.train[0][0].shape == (1, 10, 12)
    assert load_workload(f"{tmp_path / 'set'}?channels=3").train[0][0].shape == (3, 10, 12)


def test_sizes_modes_and_orientation(tmp_path, pets):
    picture(pets / "train/cat/wide.png", 70, size=(40, 20))
    with pytest.raises(
        InvalidInput, match=r"differ in size: .*wide.png has 40 x 20 pixels, others 12 x 10; add .size=32"
    ):
        load_workload(str(pets))
    workload = load_workload(f"{pets}?size=8")
    assert arrays(workload.train)[0].shape == (13, 3, 8, 8)
    for mode, value in (("RGBA", 90), ("P", 0), ("L", 90), ("1", 1)):
        if mode == "1":
            Image.new("1", (12, 10), 1).save(pets / "train/cat/mode.png")
        else:
            picture(pets / "train/cat/mode.png", value, mode=mode)
        assert arrays(load_workload(f"{pets}?size=8").train)[0].shape == (14, 3, 8, 8)
    deep = Image.fromarray(np.full((10, 12), 65535, dtype=np.uint16))
    for i in range(10):
        for name in ("a", "b"):
            (tmp_path / "deep" / name).mkdir(parents=True, exist_ok=True)
            deep.save(tmp_path / "deep" / name / f"{i}.png")
    assert load_workload(str(tmp_path / "deep")).train[0][0].unique().tolist() == [1.0]
    turned = Image.new("RGB", (12, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # taken upright, stored lying
    turned.save(pets / "train/cat/mode.png")
    turned.save(pets / "train/cat/turned.jpg", exif=exif)
    assert arrays(load_workload(f"{pets}?size=8").train)[0].shape == (15, 3, 8, 8)


def test_the_fingerprint_follows_the_pictures_and_options(pets):
    before = load_workload(str(pets)).fingerprint
    assert load_workload(str(pets)).fingerprint == before
    assert load_workload(f"{pets}?size=8").fingerprint != before
    picture(pets / "train/cat/0.png", 51)
    assert load_workload(str(pets)).fingerprint != before


def test_mistakes_in_a_folder_get_one_sentence(tmp_path, pets):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"has no class folders; expected empty/cat/1.png"):
        load_workload(str(tmp_path / "empty"))
    picture(tmp_path / "single/cat/1.png")
    with pytest.raises(InvalidInput, match="the class 'cat' only"):
        load_workload(str(tmp_path / "single"))
    (pets / "train/cow").mkdir()
    with pytest.raises(InvalidInput, match="cow has no images"):
        load_workload(str(pets))
    picture(pets / "train/cow/1.png")
    picture(pets / "test/emu/1.png")
    with pytest.raises(InvalidInput, match=r"test has the class 'emu', which .*train has not"):
        load_workload(str(pets))
    with pytest.raises(InvalidInput, match="size must be a whole number from 1; got 'big'"):
        load_workload(f"{pets}?size=big")
    with pytest.raises(InvalidInput, match="no option 'target'"):
        load_workload(f"{pets}?target=x")


def test_a_damaged_picture_is_named(pets):
    good = (pets / "train/cat/1.png").read_bytes()
    (pets / "train/cat/1.png").write_bytes(b"not a picture")
    with pytest.raises(InvalidInput, match=r"cat/1.png is damaged .*delete or replace"):
        load_workload(str(pets))
    (pets / "train/cat/1.png").write_bytes(good[: len(good) - 30])  # the header is fine
    workload = load_workload(str(pets))
    with pytest.raises(InvalidInput, match=r"cat/1.png is damaged"):
        arrays(workload.train)


# arrays()


def test_arrays_checks_what_it_is_given():
    class Uneven(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.zeros(2 + index), index

    with pytest.raises(InvalidInput, match=r"dataset\[1\] has shape \(3,\) and torch.float32, the first one \(2,\)"):
        arrays(Uneven())
    data = torch.utils.data.TensorDataset(torch.full((4, 2), torch.inf), torch.zeros(4).long())
    with pytest.raises(InvalidInput, match=r"dataset\[0\]: the input holds NaN or infinity .*, as 4 of 4 samples do"):
        arrays(data)
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(InvalidInput, match=r"the label is tensor.0..; expected an integer from 0, one per sample"):
        arrays(data)
    with pytest.raises(InvalidInput, match="nothing is left"):
        arrays(load_workload("iris").train, 0)


class Decoded(torch.utils.data.Dataset):
    """Samples that are made one by one, some of them wrong."""

    def __init__(self, n=30, **wrong):
        self.n, self.wrong = n, {int(k[1:]): v for k, v in wrong.items()}

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return self.wrong.get(index, (torch.full((2,), index / self.n), index % 3))


class Shifted(torch.utils.data.TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 1, y


def tensors(n=30, at=None, x=0.5, y=0):
    X, labels = torch.rand(n, 2), torch.arange(n) % 3
    if at is not None:
        X[at, 1], labels[at] = x, y
    return torch.utils.data.TensorDataset(X, labels)


WRONG = [
    ((torch.zeros(2), 9), {"y": 9}, r"train\[14\]: the label is 9; expected an integer from 0 to 2"),
    ((torch.zeros(2), -1), {"y": -1}, r"train\[14\]: the label is -1; expected"),
    ((torch.tensor([0, torch.nan]), 1), {"x": torch.nan}, r"train\[14\]: the input holds NaN .* 1 of 30 samples"),
    ((torch.tensor([0, -torch.inf]), 1), {"x": -torch.inf}, r"train\[14\]: the input holds NaN or infinity"),
    (
        (torch.tensor([0, 1e39], dtype=torch.float64), 1),
        None,
        r"train\[14\] has shape .2,. and torch.float64, the first",
    ),
    ((torch.zeros(3), 1), None, r"train\[14\] has shape .3,. and torch.float32, the first one .2,."),
    ((torch.zeros(2).byte(), 1), None, r"train\[14\] has shape .2,. and torch.uint8, the first"),
    ((torch.zeros(2), 1.5), None, r"train\[14\]: the label is 1.5; expected an integer"),
    ((torch.zeros(2), None), None, r"train\[14\]: the label is None; expected an integer"),
    (torch.zeros(2), None, r"train\[14\] is Tensor; expected a pair"),
    (None, None, r"train\[14\] is NoneType; expected a pair"),
]


@pytest.mark.parametrize(("sample", "inside", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_sample_in_the_middle_is_found(sample, inside, message):
    lazy = Labeled(Decoded(_14=sample), Decoded(), 3)
    lazy.check("mine")  # the first and the last
    with pytest.raises(InvalidInput, match=message):
        lazy.check("mine", every=True)
    with pytest.raises(InvalidInput, match=message.replace("train", "dataset")):
        arrays(lazy.train, num_classes=3)
    with pytest.raises(InvalidInput, match=r"dataset\[14\]"):
        problem(lazy, lambda: lazy, rng=np.random.default_rng(0))
    if inside is not None:
        held = tensors(at=14, **inside)
        for whole in (held, torch.utils.data.Subset(held, range(30))):
            with pytest.raises(InvalidInput, match=message):
                Labeled(whole, tensors(), 3).check("mine")


def test_the_check_says_what_it_looked_at_and_its_values():
    lazy = Labeled(Decoded(), Decoded(40), 3).describe()
    assert "--all" in lazy["checked"]
    assert Labeled(Decoded(), Decoded(40), 3).describe(every=True)["checked"] == "all samples"
    facts = Labeled(tensors(at=3, x=-7), tensors(at=9, x=4), 3).describe()
    assert (facts["checked"], facts["values"]) == ("all samples", "-7 to 4")


def test_a_subclass_of_tensor_dataset_is_asked_for_its_samples():
    held = Shifted(torch.zeros(5, 2), torch.arange(5) % 2)
    np.testing.assert_array_equal(arrays(held)[0], np.ones((5, 2)))
    np.testing.assert_array_equal(arrays(torch.utils.data.Subset(held, [1, 3]))[0], np.ones((2, 2)))


def test_absurd_numbers_of_classes_are_refused_at_once():
    start = time.perf_counter()
    with pytest.raises(InvalidInput, match="num_classes is 1,000,000,000 and train has 30 samples"):
        Labeled(tensors(), tensors(), 10**9).describe()
    assert time.perf_counter() - start < 1


def test_rows_that_are_not_there_are_refused():
    for rows in ([3, 30], [0.5], [-31]):
        with pytest.raises(InvalidInput, match="rows must be whole numbers below 30"):
            arrays(tensors(), rows)


def test_arrays_of_a_lazy_dataset_are_those_of_its_items():
    from mlcollage.data.glyphs import GlyphWorld

    world = GlyphWorld.preset("easy16")
    X, y = arrays(world.dataset("test", 1100), 1050)
    x, labels = world.fixed(1050, split="test").tensors
    np.testing.assert_array_equal(X, x.numpy())
    np.testing.assert_array_equal(y, labels.numpy())
    subset = torch.utils.data.Subset(world.dataset("test", 50), [3, 4])
    np.testing.assert_array_equal(arrays(subset)[0], x[3:5].numpy())


def test_the_docstring_of_workload_shows_the_fields_a_user_fills():
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.arange(4) % 2)
    facts = Labeled(data, data, 2).describe()
    assert facts["classes"] == ["0", "1"]
    assert textwrap.shorten(facts["model"], 40) == "the study's own"


def test_images_larger_than_pillow_decodes_are_refused_before_they_are_made(pets):
    with pytest.raises(InvalidInput, match="option size must be at most 9,459; got 1000000"):
        load_workload(f"{pets}?size=1000000")


def test_where_a_library_found_the_damage_is_not_said(pets):
    (pets / "train/cat/bad.png").write_bytes(b"no image")
    with pytest.raises(
        InvalidInput, match=r"bad.png is damaged \(UnidentifiedImageError: [^(]*\); delete or replace it"
    ):
        load_workload(str(pets))


def test_a_fresh_model_that_gives_nan_is_refused():
    class Broken(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 0

    x, y = torch.rand(20, 2), torch.arange(20) % 2
    data = TensorDataset(x, y)
    with pytest.raises(InvalidInput, match="fresh model gives NaN or infinity"):
        Labeled(data, data, num_classes=2, model=lambda: Broken(2, 2)).describe()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("X", "y", "x_train"), "holds x_train and x, and either may be X"),
        (("X", "y", "y_train"), "holds y_train and y, and either may be y"),
        (("X", "y", "x_test", "test_images", "y_test"), "holds x_test and test_images, and either may be X_test"),
        (("X", "x", "y"), "holds X and x, which differ in case only"),
    ],
)
def test_arrays_that_could_be_either_are_refused(tmp_path, names, said):
    held = {n: np.arange(40) % 2 if "y" in n else np.random.default_rng(0).random((40, 3)) for n in names}
    np.savez(tmp_path / "d.npz", **held)
    with pytest.raises(InvalidInput, match=said):
        load_workload(str(tmp_path / "d.npz"))


def test_another_kind_than_the_one_that_is_needed_is_refused(monkeypatch):
    @dataclass(frozen=True)
    class Other(Workload):
        pass

    assert load_workload("iris", Labeled).num_classes == 3
    with pytest.raises(InvalidInput, match="iris is Labeled, and Other is needed"):
        load_workload("iris", Other)
