"""IMDB: texts become the numbers that the documentation says, and nothing pickled is read."""

import numpy as np
import pytest

from mlcollage.data import imdb
from mlcollage.errors import InvalidInput, MissingFile


def write(folder, train=6):
    """Reviews whose words say what they are; ``good`` is frequent, ``rare0`` is not."""
    for part, n in (("train", train), ("test", 2)):
        for name in ("neg", "pos"):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                mood = "good good" if name == "pos" else "bad"
                text = f"The film is {mood}.<br /><br />Rare{i} {part}only!"
                (folder / part / name / f"{i}_{7 if name == 'pos' else 2}.txt").write_text(text, encoding="utf-8")
    return folder


def decoded(row, vocabulary):
    names = dict(enumerate(vocabulary, start=imdb.OFFSET)) | {0: "", 1: "<", 2: "?"}
    return " ".join(names[i] for i in row).strip()


def test_reviews_labels_and_splits_are_those_of_the_folder(tmp_path):
    data = imdb.load(write(tmp_path), train=8, length=12)
    assert [len(part) for part in data[:6]] == [8, 8, 4, 4, 4, 4]
    for X, y in ((data.X_train, data.y_train), (data.X_valid, data.y_valid)):
        assert (X.dtype, y.dtype, X.shape[1]) == (np.int64, np.int64, 12)
        for row, label in zip(X, y, strict=True):
            text = decoded(row, data.vocabulary)
            assert text.startswith("< the film is " + ("good good" if label else "bad"))
    assert decoded(data.X_test[0], data.vocabulary).endswith("?")  # "testonly" is not learned from the test part
    assert data.y_test.tolist() == [0, 0, 1, 1]
    again, other = imdb.load(tmp_path, train=8, length=12), imdb.load(tmp_path, train=8, length=12, seed=1)
    np.testing.assert_array_equal(again.X_train, data.X_train)
    assert other.y_train.tolist() != data.y_train.tolist() or not np.array_equal(other.X_train, data.X_train)


def test_words_are_ranked_by_training_reviews_and_others_are_unknown(tmp_path):
    data = imdb.load(write(tmp_path), train=12, length=9, vocabulary=7)
    assert data.vocabulary == ("film", "good", "is", "the")  # twelve each: by the alphabet
    assert data.X_train.max() == 6
    assert decoded(data.X_train[data.y_train == 1][0], data.vocabulary) == "< the film is good good ? ?"
    short = imdb.load(tmp_path, train=12, length=3)
    assert decoded(short.X_train[0], short.vocabulary).count(" ") == 2  # the last three words
    assert len(data.X_valid) == 0


def test_words_of_a_review():
    assert imdb.words("L'été—so_so; it's 'fine'<br/>Naïve...") == ["l'été", "so", "so", "it's", "fine", "naïve"]
    assert imdb.encode([[]], ["a"], 3).tolist() == [[0, 0, 1]]


def test_arrays_of_integers_are_read_with_keras_numbers(tmp_path):
    x = np.array([[0, 0, 1, 5, 30_000], [1, 4, 9, 2, 8]] * 4)
    np.savez(tmp_path / "imdb.npz", x_train=x, y_train=[0, 1] * 4, x_test=x[:2].astype(np.uint16), y_test=[0, 1])
    data = imdb.load(tmp_path / "imdb.npz", train=6, length=4)
    assert data.X_test.tolist() == [[0, 1, 5, 2], [4, 9, 2, 8]]
    assert [len(part) for part in data[:6]] == [6, 6, 2, 2, 2, 2]
    assert data.vocabulary == ()
    wide = imdb.load(tmp_path / "imdb.npz", train=6, length=7)
    assert wide.X_test[1].tolist() == [0, 0, 1, 4, 9, 2, 8]


def test_pickled_lists_are_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    lists = np.empty(2, dtype=object)
    lists[:] = [[1, 2, 3], Bomb()]
    np.savez(tmp_path / "imdb.npz", x_train=lists, y_train=[0, 1], x_test=lists, y_test=[0, 1])
    with pytest.raises(InvalidInput, match=r"pickled and never loaded; name the folder aclImdb") as caught:
        imdb.load(tmp_path / "imdb.npz")
    assert "\n" not in str(caught.value)


GOOD = {"x_train": np.ones((4, 3), int), "y_train": [0, 1, 0, 1], "x_test": np.ones((2, 3), int), "y_test": [0, 1]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x_train": np.ones((4, 3))}, "x_train of .* is float64"),
        ({"x_train": np.ones(4, int)}, r"of shape \(4,\); numbers of words"),
        ({"x_test": -np.ones((2, 3), int)}, "x_test of"),
        ({"y_train": [0, 1, 2, 1]}, "y_train of .* a 0 or 1 for each of the 4 reviews"),
        ({"y_test": [0]}, "y_test of"),
    ],
)
def test_arrays_of_something_else_are_refused(tmp_path, changed, says):
    np.savez(tmp_path / "imdb.npz", **{**GOOD, **changed})
    with pytest.raises(InvalidInput, match=says):
        imdb.load(tmp_path / "imdb.npz", train=2)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFile, match="there is no folder"):
        imdb.load(tmp_path / "aclImdb")
    with pytest.raises(MissingFile, match="there is no file"):
        imdb.load(tmp_path / "imdb.npz")
    write(tmp_path / "aclImdb")
    with pytest.raises(InvalidInput, match="has 12 training reviews; train=20000 asks for more"):
        imdb.load(tmp_path / "aclImdb")
    for file in (tmp_path / "aclImdb/test/pos").iterdir():
        file.unlink()
    with pytest.raises(MissingFile, match="no texts in test/pos"):
        imdb.load(tmp_path / "aclImdb", train=2)
    (tmp_path / "imdb.npz").write_bytes(b"no archive")
    with pytest.raises(InvalidInput, match=r"imdb\.npz is not an \.npz archive"):
        imdb.load(tmp_path / "imdb.npz")
    np.savez(tmp_path / "imdb.npz", x_train=[1])
    with pytest.raises(InvalidInput, match="has no array y_train; it has x_train"):
        imdb.load(tmp_path / "imdb.npz")
    for bad in ({"vocabulary": 3}, {"length": 0}, {"train": 2.5}):
        with pytest.raises(InvalidInput, match="must be a whole number"):
            imdb.load(tmp_path, **bad)
