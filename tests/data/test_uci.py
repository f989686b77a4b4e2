"""UCI tables in the formats they come in: right target, disjoint splits, scales from the training rows only."""

import numpy as np
import pandas as pd
import pytest

from mlcollage.data import uci
from mlcollage.errors import InvalidInput, MissingFile, UnknownName

RNG = np.random.default_rng(0)


def table(name, rows=None):
    info = uci.UCI[name]
    return RNG.normal(size=(rows or info.rows, info.features + 1 + len(info.drop))).round(4)


def restored(split):
    """All targets in their own units, sorted."""
    return np.sort(split.y_mean + split.y_scale * np.concatenate([split.y_train, split.y_test]))


def blanks(values, path):
    path.write_text("".join(" " + "   ".join(f"{v:8.4f}" for v in row) + "\n" for row in values) + "\n")


def semicolons(values, path):
    header = ";".join(f'"column {i}"' for i in range(values.shape[1]))
    path.write_text(header + "\n" + "".join(";".join(map(str, row)) + "\n" for row in values))


def commas(values, path):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in values))


def excel_export(values, path):
    """With a byte-order mark, names, and the empty columns and rows that spreadsheets leave behind."""
    frame = pd.DataFrame(values, columns=[f"X{i}" for i in range(values.shape[1])])
    text = frame.to_csv(index=False).replace("\n", ",,\n") + "," * (values.shape[1] + 1) + "\n"
    path.write_text(text, encoding="utf-8-sig")


@pytest.mark.parametrize(
    ("name", "write", "target"),
    [
        ("boston", blanks, -1),
        ("yacht", blanks, -1),
        ("naval", blanks, -2),
        ("wine", semicolons, -1),
        ("energy", excel_export, -2),
        ("protein", commas, 0),
    ],
)
def test_tables_are_read_as_they_come(tmp_path, name, write, target):
    values, path = table(name), tmp_path / "table.txt"
    write(values, path)
    split = uci.load(path, name)
    info = uci.UCI[name]
    assert split.X_train.shape[1] == split.X_test.shape[1] == info.features
    assert len(split.y_train) == int(0.9 * info.rows) or len(split.y_train) == info.rows - round(0.1 * info.rows)
    np.testing.assert_allclose(restored(split), np.sort(values[:, target]), atol=1e-10)


def test_scales_come_from_the_training_rows(tmp_path):
    values = table("yacht") * [1, 10, 0.1, 5, 1, 1, 30] + 4
    values[:, 4] = 2.5  # constant
    commas(values, tmp_path / "t.csv")
    split = uci.load(tmp_path / "t.csv", "yacht", seed=3)
    varying = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(split.X_train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(split.X_train.std(0)[varying], 1)
    assert not split.X_train[:, 4].any()
    assert abs(split.X_test.mean(0)[varying]).max() > 1e-3
    assert (split.y_train.mean(), split.y_train.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


def test_splits_depend_on_the_seed_alone_and_share_no_row(tmp_path):
    values = np.column_stack([RNG.normal(size=(200, 2)), np.arange(200)])
    commas(values, tmp_path / "t.csv")
    a, b, c = (uci.load(tmp_path / "t.csv", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.X_test, b.X_test)
    assert len(a.y_test) == 20
    rows = [np.round(s.y_mean + s.y_scale * s.y_test).astype(int).tolist() for s in (a, c)]
    assert sorted(rows[0]) != sorted(rows[1])
    np.testing.assert_allclose(restored(a), np.arange(200), atol=1e-9)
    assert len(uci.load(tmp_path / "t.csv", test_fraction=0.25).y_test) == 50


@pytest.mark.parametrize(("target", "column"), [("b", 1), (0, 0), (-2, 1), (None, 2)])
def test_any_column_of_another_table_can_be_the_target(tmp_path, target, column):
    values = RNG.normal(size=(30, 3))
    pd.DataFrame(values, columns=["a", "b", "c"]).to_csv(tmp_path / "t.csv", index=False)
    split = uci.load(tmp_path / "t.csv", target=target)
    np.testing.assert_allclose(restored(split), np.sort(values[:, column]))
    assert split.X_train.shape == (27, 2)


@pytest.mark.parametrize("name", ["boston", "protein", "energy"])
def test_archives_of_x_and_y_are_read(tmp_path, name):
    info = uci.UCI[name]
    x, y = RNG.normal(size=(info.rows, info.features)), RNG.normal(size=(info.rows, 1))
    np.savez(tmp_path / "t.npz", x=x, y=y)
    split = uci.load(tmp_path / "t.npz", name)
    np.testing.assert_allclose(restored(split), np.sort(y[:, 0]), atol=1e-12)
    assert split.X_train.shape[1] == info.features


def test_what_cannot_be_read_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    cases = [
        ("1,2\n", "has 1 lines"),
        ("a,b\n1,x\n2,y\n3,z\n", "column 'b' of .* holds words"),
        ("1,2\n3,\n4,5\n6,7\n", "has 1 missing or infinite values"),
        ("1\n2\n3\n4\n", "has one column"),
        ("1,5\n2,5\n3,5\n4,5\n", "all training targets .* are 5"),
        ("1,5\n2,5\n", "has 2 rows; a split takes at least three"),
        ("1,2\n1,2,3,4\n1,2,3\n", "cannot be read as a table"),
    ]
    for text, says in cases:
        path.write_text(text)
        with pytest.raises(InvalidInput, match=says) as caught:
            uci.load(path)
        assert "\n" not in str(caught.value)
    commas(table("yacht", rows=100), path)
    for bad, says in (
        ({"name": "yacht"}, r"has 100 rows and 7 columns; yacht has 308 and 7"),
        ({"target": "z"}, "no column 'z'"),
        ({"target": 7}, "target=7 is no column"),
        ({"test_fraction": 1.0}, "test_fraction must be a finite number above 0 and below 1"),
        ({"test_fraction": 2}, "test_fraction must be"),
    ):
        with pytest.raises(InvalidInput, match=says):
            uci.load(path, **bad)
    with pytest.raises(UnknownName, match=r"name must be .* not 'bostn'"):
        uci.load(path, "bostn")
    with pytest.raises(MissingFile, match="there is no file"):
        uci.load(tmp_path / "none.csv")
    (tmp_path / "t.xls").write_bytes(b"\xd0\xcf")
    with pytest.raises(InvalidInput, match="an Excel sheet; save it as CSV"):
        uci.load(tmp_path / "t.xls")
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidInput, match="is no text"):
        uci.load(path)
    objects = np.empty(3, dtype=object)
    np.savez(tmp_path / "t.npz", x=np.ones((3, 2)), y=objects)
    with pytest.raises(InvalidInput, match="arrays of Python objects"):
        uci.load(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", x=np.ones((3, 2)))
    with pytest.raises(InvalidInput, match=r"it holds x \(3, 2\)"):
        uci.load(tmp_path / "t.npz")
    (tmp_path / "t.npz").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"t\.npz is not an \.npz archive"):
        uci.load(tmp_path / "t.npz")
