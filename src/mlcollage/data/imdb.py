"""IMDB film reviews as sequences of word numbers: from the authors' folder of texts, or from arrays.

The reviews are those of A. L. Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011. Take
``aclImdb_v1.tar.gz`` from https://ai.stanford.edu/~amaas/data/sentiment/ and unpack it to the folder ``aclImdb``.
The ``imdb.npz`` that Keras downloads holds lists in arrays of Python objects, which are pickled, and is refused; an
``.npz`` of the same names with rectangular arrays of integers is read.

Numbers are those of Keras: 0 pads, 1 starts a review, 2 is any word outside of the vocabulary, 3 the most frequent
word, 4 the next one, and so on. Reviews keep their last words and are padded in front.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.data._reading import read_npz
from mlcollage.errors import InvalidInput, MissingFile

Ints = NDArray[np.int64]
_PAD, _START, _UNKNOWN = 0, 1, 2
OFFSET = 3
"""Number of the most frequent word."""

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_BREAK = re.compile(r"<br\s*/?>")  # the reviews are HTML, but only for line breaks


class IMDB(NamedTuple):
    """Reviews as numbers, ``(n, length)``, with labels ``(n,)``: 0 is bad, 1 is good.

    Attributes
    ----------
    X_train, y_train, X_valid, y_valid, X_test, y_test
        int64; the labeled training reviews are split at random into those trained on and those for validation.
    vocabulary
        Words by number, from :data:`OFFSET` on; empty if the source does not say.
    """

    X_train: Ints
    y_train: Ints
    X_valid: Ints
    y_valid: Ints
    X_test: Ints
    y_test: Ints
    vocabulary: tuple[str, ...]


def words(text: str) -> list[str]:
    """Lower-case words of a review: runs of letters and digits, with apostrophes inside; line breaks of HTML go.

    Examples
    --------
    >>> words("It's GOOD.<br /><br />10/10, don't miss it!")
    ["it's", 'good', '10', '10', "don't", 'miss', 'it']
    """
    return _WORD.findall(_BREAK.sub(" ", text).lower())


def encode(reviews: Iterable[Sequence[str]], vocabulary: Sequence[str], length: int = 100) -> Ints:
    """Reviews as numbers, ``(n, length)``: the last words of each, padded in front.

    Parameters
    ----------
    reviews
        Words of each review.
    vocabulary
        The known words, the most frequent first.
    length
        Numbers per review.

    Examples
    --------
    >>> encode([["a", "fine", "film"], ["a", "b"]], ["a", "film"], length=4).tolist()
    [[1, 3, 2, 4], [0, 1, 3, 2]]
    """
    number = {word: i for i, word in enumerate(vocabulary, start=OFFSET)}
    return _fit([[_START, *(number.get(word, _UNKNOWN) for word in review)] for review in reviews], length)


def _fit(sequences: Sequence[Sequence[int]], length: int) -> Ints:
    fitted = np.full((len(sequences), length), _PAD, dtype=np.int64)
    for row, numbers in zip(fitted, sequences, strict=True):
        # The end of a long review says more than its beginning; short ones are padded in front, as in Keras, so that a
        # recurrent network reads the padding first.
        kept = numbers[-length:]
        if len(kept):
            row[length - len(kept) :] = kept
    return fitted


def load(
    source: str | Path, *, vocabulary: int = 20_000, length: int = 100, train: int = 20_000, seed: int = 0
) -> IMDB:
    """Return the reviews, by default as in Izmailov et al. (2021): 20,000 words, 100 per review, 20,000 for training.

    Parameters
    ----------
    source
        The folder ``aclImdb`` (``train/pos/*.txt``, ``train/neg``, ``test/pos``, ``test/neg``), or an ``.npz`` of
        integers ``x_train``, ``x_test`` of shape ``(n, any length)``, padded by zeros in front, and ``y_train``,
        ``y_test``.
    vocabulary
        Different numbers, three of which are no words. Words of a folder are ranked by how often the training reviews
        that are not for validation use them, ties by the alphabet; numbers of an ``.npz`` beyond are taken as unknown.
    length
        Numbers per review.
    train
        Reviews to train on; the other labeled ones of the training part are for validation.
    seed
        Of the random split.

    Returns
    -------
    IMDB

    Raises
    ------
    MissingFile
        If the folder or its parts are not there.
    InvalidInput
        If the arrays are pickled or no numbers of words, or there are fewer than ``train`` reviews.
    """
    vocabulary = checks.integer("vocabulary", vocabulary, least=4)
    length, train = checks.integer("length", length, least=1), checks.integer("train", train, least=1)
    path = Path(source).expanduser()
    if path.suffix.lower() == ".npz":
        X, y, X_test, y_test = _npz(path, vocabulary, length)
        kept, held_out = _split(len(y), train, seed, path)
        return IMDB(X[kept], y[kept], X[held_out], y[held_out], X_test, y_test, ())
    texts, y = _part(path, "train")
    tests, y_test = _part(path, "test")
    kept, held_out = _split(len(y), train, seed, path)
    # Only reviews that are trained on: the vocabulary must not know validation or test reviews.
    counts = Counter(word for i in kept for word in texts[i])
    # Most frequent first, ties by the alphabet, so that numbers do not depend on the order of the files.
    known = tuple(sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - OFFSET])
    X, X_valid = (encode([texts[i] for i in rows], known, length) for rows in (kept, held_out))
    return IMDB(X, y[kept], X_valid, y[held_out], encode(tests, known, length), y_test, known)


def _split(n: int, train: int, seed: int, path: Path) -> tuple[Ints, Ints]:
    if n < train:
        raise InvalidInput(f"{path} has {n} training reviews; train={train} asks for more.")
    order = np.random.default_rng(seed).permutation(n)
    return order[:train], order[train:]


def _part(folder: Path, part: str) -> tuple[list[list[str]], Ints]:
    """Words and labels of the reviews in ``folder/part``, in the order of the files' names."""
    if not folder.is_dir():
        raise MissingFile(f"there is no folder {folder}; expected the unpacked aclImdb, or an .npz of integers.")
    reviews: list[list[str]] = []
    labels: list[int] = []
    for label, name in enumerate(("neg", "pos")):
        files = sorted((folder / part / name).glob("*.txt"))
        if not files:
            raise MissingFile(f"{folder} has no texts in {part}/{name}; expected the unpacked archive aclImdb.")
        reviews += [words(file.read_text("utf-8", errors="replace")) for file in files]
        labels += [label] * len(files)
    return reviews, np.array(labels, dtype=np.int64)


def _npz(path: Path, vocabulary: int, length: int) -> tuple[Ints, Ints, Ints, Ints]:
    # Keras' own imdb.npz holds lists of different lengths, which are pickled and so refused.
    held = read_npz(path, "name the folder aclImdb, or save rectangular arrays of integers")
    if missing := [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in held]:
        raise InvalidInput(f"{path} has no array {missing[0]}; it has {', '.join(held) or 'none'}.")
    parts: list[Ints] = []
    for part in ("train", "test"):
        x, y = held[f"x_{part}"], held[f"y_{part}"]
        if x.dtype.kind not in "iu" or x.ndim != 2 or 0 in x.shape or x.min() < 0:
            raise InvalidInput(
                f"x_{part} of {path} is {x.dtype} of shape {x.shape}; numbers of words from 0, (reviews, length), are "
                "needed."
            )
        if y.shape != x.shape[:1] or not np.isin(y, (0, 1)).all():
            raise InvalidInput(f"y_{part} of {path} must hold a 0 or 1 for each of the {len(x)} reviews.")
        x = x.astype(np.int64)
        # No word is dropped: numbers beyond the vocabulary become "unknown".
        parts += [_fit(np.where(x < vocabulary, x, _UNKNOWN).tolist(), length), y.astype(np.int64)]
    return parts[0], parts[1], parts[2], parts[3]
