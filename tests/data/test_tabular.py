"""Tables as people have them: each is read as it is meant, compared with the numbers that were written, or refused."""

import datetime
import decimal
import io
import zipfile

import numpy as np
import pandas as pd
import pytest

from mlcollage.data import arrays, load_workload
from mlcollage.errors import InvalidInput

VALUES = np.round(np.random.default_rng(0).normal(size=(40, 2)) * 100, 2)
WORDS = [("cat", "dog")[i % 2] for i in range(40)]


def lines(sep=",", header="a{0}b{0}y", write=str, rows=VALUES):
    return "\n".join(
        [header.format(sep), *(sep.join([*map(write, row), word]) for row, word in zip(rows, WORDS, strict=True))]
    )


def load(tmp_path, text, query="?scale=none", name="t.csv", encoding="utf-8"):
    (tmp_path / name).write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return load_workload(f"{tmp_path / name}{query}")


def inputs(workload):
    return np.concatenate([arrays(workload.train)[0], arrays(workload.test)[0]])


def same_rows(x, expected):
    order = [np.lexsort(table.T) for table in (x, expected.astype(np.float32))]
    np.testing.assert_allclose(x[order[0]], expected[order[1]], rtol=1e-6)


def comma(value):
    return str(value).replace(".", ",")


GERMAN = [f"{v:_.2f}".replace(".", ",").replace("_", ".") for v in (VALUES * 1000).reshape(-1)]


@pytest.mark.parametrize(
    ("text", "query", "note"),
    [
        (lines(), "", ""),
        (lines(";"), "", " (separated by semicolon)"),
        (lines("\t"), "", " (separated by tab)"),
        (lines("|"), "", " (separated by bar)"),
        (lines(" "), "", " (separated by space)"),
        (lines(";"), "&sep=;", ""),
        (lines(":"), "&sep=:", ""),
        (lines("\t"), "&sep=tab", ""),
        (lines("\t"), "&sep=\\t", ""),
        (lines(", "), "", ""),
        (lines(";", write=comma), "&decimal=,", " (separated by semicolon)"),
        (lines(write=lambda v: f'"{comma(v)}"'), "&decimal=,", ""),
        (lines(write=lambda v: f'"{v:,}"'), "&thousands=,", ""),
        ("\ufeff" + lines(), "", ""),
        (lines().replace("\n", "\r\n") + "\r\n\r\n", "", ""),
        (lines(header='"a{0} of\nall"{0}"b ""x"""{0}y'), "", ""),
        (lines(header="0{0}1{0}y"), "", ""),
        (lines(header="1999{0}2000{0}y"), "", ""),
        (lines(header="the a{0}the b{0}the y").replace("cat", "a cat").replace("dog", "a dog"), "", ""),
    ],
)
def test_numbers_are_those_that_were_written(tmp_path, text, query, note):
    workload = load(tmp_path, text, f"?scale=none{query}")
    same_rows(inputs(workload), VALUES)
    assert workload.name == f"t.csv{note} (80/20 split)"
    assert workload.num_classes == 2


def test_german_numbers(tmp_path):
    rows = np.array(GERMAN).reshape(40, 2)
    workload = load(tmp_path, lines(";", rows=rows), "?scale=none&decimal=,&thousands=.")
    same_rows(inputs(workload), VALUES * 1000)


def test_words_with_newlines_and_numbers_that_are_words(tmp_path):
    rows = [f'{i % 3},"a\nb {i % 2}",{WORDS[i]}' for i in range(40)]
    x = inputs(load(tmp_path, "\n".join(["code,text,y", *rows]), "?scale=none&words=code"))
    assert x.shape == (40, 5)  # three codes and two texts
    np.testing.assert_array_equal(x.sum(axis=1), 2)
    assert sorted(x.sum(axis=0)) == [13, 13, 14, 20, 20]


@pytest.mark.parametrize("column", ["split", "part"])
def test_a_column_says_train_or_test(tmp_path, column):
    words = ["Train" if i % 4 else " test" for i in range(40)]
    table = pd.DataFrame(VALUES, columns=["a", "b"]).assign(**{column: words}, y=WORDS)
    workload = load(tmp_path, table.to_csv(index=False), f"?scale=none{'' if column == 'split' else '&split=part'}")
    np.testing.assert_allclose(arrays(workload.test)[0], VALUES[::4].astype(np.float32))
    assert (len(workload.train), workload.name) == (30, "t.csv")


def marked(words):
    return "\n".join(["a,split,y", *(f"{i},{words[i % len(words)]},{i % 2}" for i in range(40))])


def one(column, **more):
    return pd.DataFrame({"a": column, **more, "y": WORDS}).to_csv(index=False)


@pytest.mark.parametrize(
    ("text", "query", "message"),
    [
        (
            lines(header="1.5{0}-2{0}cat"),
            "",
            r"first line of .* looks like data \(1.5, -2, cat, ...\); add",
        ),
        (lines(header="x{0}7{0}cat").replace("\n", "\nx,"), "", "fields than its first line has names|looks like data"),
        ("\n".join(["p,x,e", *["p,x,e", "q,y,f"] * 20]), "", "looks like data"),
        (lines(header="a{0}a{0}y"), "", "has 2 columns called 'a'; rename them"),
        (lines(header="a{0}b"), "", "more fields than its first line has names"),
        ("a,b;y\n" + "1,2;3\n4,5;6\n" * 9, "", "may be separated by comma or semicolon; add .sep=comma"),
        (lines(":"), "", "has the column 'a:b:y' only; .* .sep=semicolon"),
        (lines(), "?sep=;;", "option sep must be one character or one of comma, semicolon"),
        (lines(), "?sep=", "option sep must be one character"),
        (lines(), "?decimal=..", "option decimal must be one character"),
        (lines(), "?split=part", "has no column 'part'; its columns are a, b, y"),
        (lines(), "?words=c", "has no feature 'c'; its features are a, b"),
        (marked(["train", "val", "test"]), "", "column 'split' .* holds test, train, val; expected train and test"),
        (marked(["train"]), "?split=split", "holds train; expected train and test"),
        (marked(["0", "1"]), "?split=split", "holds 0, 1; expected train and test"),
        (marked(["train", "test"]), "?split=split&test=t.csv", "comes from one of them"),
        ("a,b,y\n", "", "has no rows"),
        ("\n\n\n", "", "cannot be read as a table"),
        (one([f"{i},5" for i in range(40)]), "", "numbers written like '0,5'; add .decimal=, or, if it separates"),
        (one([f"{i} %" for i in range(40)]), "", "numbers written like '0 %'; write plain numbers, or add .words=a"),
        (one([f"${i}" for i in range(40)]), "", r"numbers written like '\$0'"),
        (one([i if i % 9 else "?" for i in range(40)]), "", "numbers and words such as '.'; .* add .na=.; if all"),
        (one([i if i % 9 else "?" for i in range(40)]), "?na=?", r"missing values in a \(5\)"),
        (one([i if i % 9 else -999 for i in range(40)]), "?na=-999", r"missing values in a \(5\)"),
        (one([f"2024-01-{i % 9 + 1:02d}" for i in range(40)]), "", "dates or times such as '2024-01-01'"),
        (one([f"{i % 9 + 1}/12/24 10:00" for i in range(40)]), "", "dates or times such as"),
        (one([f"1{i % 9}:30" for i in range(40)]), "", "dates or times such as '10:30'"),
        (lines().replace("cat", "c\0t").encode(), "", "holds zero bytes, so it is no text"),
        (one([f"{i} kg" for i in range(40)]), "", "holds numbers written like '0 kg'; write plain numbers"),
        (one([2**70 + i for i in range(40)]), "", "not read as numbers; .* keep whole numbers within 64 bits"),
        (
            one([i + 0.25 for i in range(40)]),
            "?decimal=,",
            r"such as '0.25' that were not read .* leave out \?decimal=",
        ),
        (lines(), "?target=a&target=b", "option target is given twice"),
        (lines().encode("utf-16"), "", r"is not UTF-8 text \(byte 0\); save it as UTF-8"),
        (one(["é"] * 40).encode("latin-1"), "", r"is not UTF-8 text \(byte 4\); save it as UTF-8"),
        (lines().encode() + b"\n\xe9,1,cat", "", "is not UTF-8 text"),
        (b"PK\3\4\xff\0\1" * 9, "", "is not UTF-8 text|cannot be read"),
        ('a,b,y\n"1,2,3\n' + lines(), "", "cannot be read as a table|more fields|no column"),
        (b"a,b,y\n1,\x00,3\n" * 9, "", "."),
        ('a,y\n"' + "x" * 200_000 + '",1\n', "", "cannot be read as a table"),
    ],
)
def test_what_would_be_misread_is_one_sentence(tmp_path, text, query, message):
    with pytest.raises(InvalidInput, match=message) as error:
        load(tmp_path, text, query)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1, 2]] * 40, "column 'a' .* holds lists or structures"),
        ([{"k": 1}] * 40, "column 'a' .* holds lists or structures"),
        ([b"\x89PNG"] * 40, "column 'a' .* holds bytes"),
        ([datetime.date(2024, 1, 1)] * 40, "column 'a' .* holds dates or times"),
        ([datetime.timedelta(1)] * 40, "column 'a' .* holds dates or times"),
        ([None] * 40, "missing values in a .40."),
    ],
)
def test_columns_of_parquet_that_are_no_features(tmp_path, column, message):
    pd.DataFrame({"a": column, "y": WORDS}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InvalidInput, match=message):
        load_workload(str(tmp_path / "t.parquet"))


def test_decimals_of_parquet_are_numbers(tmp_path):
    exact = [decimal.Decimal(str(v)) for v in VALUES[:, 0]]
    pd.DataFrame({"a": exact, "b": VALUES[:, 1], "y": WORDS}).to_parquet(tmp_path / "t.parquet")
    same_rows(inputs(load_workload(f"{tmp_path / 't.parquet'}?scale=none")), VALUES)


def test_an_archive_that_claims_to_be_huge_is_refused(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("X.npy", array)
        archive.writestr("y.npy", array)
    (tmp_path / "a.npz").write_bytes(content.getvalue())
    with pytest.raises(InvalidInput, match="is damaged"):
        load_workload(str(tmp_path / "a.npz"))


def test_a_member_of_an_archive_that_is_no_array_is_damage(tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("X.npy", b"no array")
        archive.writestr("y.npy", b"")
    with pytest.raises(InvalidInput, match=r"odd.npz is damaged \(ValueError: x is no array\); save it again"):
        load_workload(str(tmp_path / "odd.npz"))
