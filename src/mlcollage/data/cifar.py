"""CIFAR-10 and CIFAR-100 from the folder of their binary version, or as images, arrays or a saved Hugging Face set.

The sets are Alex Krizhevsky's, https://www.cs.toronto.edu/~kriz/cifar.html. Take the *binary version* there
(``cifar-10-binary.tar.gz``, ``cifar-100-binary.tar.gz``) and unpack it. The "Python version" is pickled, and reading a
pickle runs whatever it says; it is refused. From Python with ``datasets`` installed,
``load_dataset("cifar10").save_to_disk(folder)`` makes a folder that is read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset

from mlcollage import _checks as checks
from mlcollage.data import _files, _hub, _images
from mlcollage.data._reading import check_options, file_hash, first_holding, roots, whole_number, with_options
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MissingFile

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

MEAN = (0.49, 0.48, 0.44)
STD = (0.2, 0.2, 0.2)
"""Per channel, as Izmailov et al. (2021) normalize both sets; see :func:`normalize`."""

_PIXELS = 3 * 32 * 32


class _Set(NamedTuple):
    """Where a set keeps what."""

    folder: str  # that its archive unpacks to
    train: tuple[str, ...]
    test: str
    labels: tuple[str, ...]  # bytes before the pixels
    names: dict[str, str]  # files with the classes' names
    classes: dict[str, int]
    pickled: tuple[str, ...]  # files of the Python version

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


SETS: dict[str, _Set] = {
    "cifar10": _Set(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        ("label",),
        {"label": "batches.meta.txt"},
        {"label": 10},
        ("data_batch_1", "batches.meta"),
    ),
    "cifar100": _Set(
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        ("coarse", "fine"),
        {"coarse": "coarse_label_names.txt", "fine": "fine_label_names.txt"},
        {"coarse": 20, "fine": 100},
        ("train", "meta"),
    ),
}
"""The two sets by name."""


def _set(name: str) -> _Set:
    return SETS[checks.choice("the CIFAR set", name, SETS)]


def find(name: str = "cifar10") -> Path | None:
    """Return the first folder that holds the binary version of a set, or None.

    ``$MLCOLLAGE_DATA``, ``./data``, ``~/data`` and the set's usual folder in each of them are looked into.

    Parameters
    ----------
    name
        ``"cifar10"`` or ``"cifar100"``.
    """
    kind = _set(name)
    return first_holding([place for root in roots() for place in (root, root / kind.folder)], kind.files)


def read_bin(path: Path, name: str = "cifar10") -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read one file of the binary version.

    The format: records of one label byte (CIFAR-100: the coarse, then the fine label) and 3,072 pixels, a plane each
    of red, green and blue, row by row.

    Parameters
    ----------
    path
        Such as ``data_batch_1.bin``.
    name
        ``"cifar10"`` or ``"cifar100"``.

    Returns
    -------
    images, labels
        ``(n, 3, 32, 32)`` and ``(n, 1 or 2)``, bytes.

    Raises
    ------
    MissingFile
        If the file is not there.
    InvalidInput
        If it is cut short, or holds labels that the set has not.
    """
    kind = _set(name)
    if not path.is_file():
        raise MissingFile(f"there is no file {path}; the binary version of {name} has {', '.join(kind.files)}.")
    width = len(kind.labels) + _PIXELS
    content = np.fromfile(path, dtype=np.uint8)
    # The binary version has no header; its size is all there is to tell it from another file.
    if not len(content) or len(content) % width:
        raise InvalidInput(
            f"{path} has {len(content):,} bytes, which is no whole number of {name} records of {width:,} bytes; it is "
            "damaged or another file."
        )
    records = content.reshape(-1, width)  # (n, 1 or 2 labels + 3072 pixels)
    labels = records[:, : len(kind.labels)]
    for column, label in enumerate(kind.labels):
        # CIFAR-100 read as CIFAR-10, or the other way round, fits by size once in a while; its labels do not.
        if (largest := int(labels[:, column].max())) >= kind.classes[label]:
            raise InvalidInput(
                f"{path} holds the {label if label == 'label' else label + ' label'} {largest}, but {name} has "
                f"{kind.classes[label]} classes; it is damaged or another file."
            )
    return records[:, len(kind.labels) :].reshape(-1, 3, 32, 32), labels


def load(
    folder: str | Path | None = None, name: str = "cifar10", *, labels: str | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """Return a set as it is on disk, pixels as bytes, images in the files' order.

    Parameters
    ----------
    folder
        The unpacked folder, or the one it lies in; by default wherever :func:`find` finds it.
    name
        ``"cifar10"`` or ``"cifar100"``.
    labels
        For CIFAR-100 ``"fine"`` (100 classes, the default) or ``"coarse"`` (20).

    Returns
    -------
    X_train, y_train, X_test, y_test
        ``(50000, 3, 32, 32)`` uint8, int64, ``(10000, 3, 32, 32)`` uint8, int64. :func:`normalize` makes inputs of
        the bytes.

    Raises
    ------
    MissingFile
        If the files are not there.
    InvalidInput
        If they are pickled or damaged.
    """
    kind = _set(name)
    label = checks.choice("labels", labels or kind.labels[-1], kind.labels)
    where = _folder(folder, name)
    # Each part is a pair (n, 3, 32, 32), (n, 1 or 2); the column says which of CIFAR-100's two labels is meant.
    parts = [read_bin(where / file, name) for file in kind.train]
    test, test_labels = read_bin(where / kind.test, name)
    column = kind.labels.index(label)
    y = np.concatenate([part[1][:, column] for part in parts]).astype(np.int64)
    return np.concatenate([part[0] for part in parts]), y, test, test_labels[:, column].astype(np.int64)


def _folder(folder: str | Path | None, name: str) -> Path:
    """The folder that holds the files, or a sentence that says what lies there instead."""
    kind = _set(name)
    if folder is None:
        found = find(name)
        if found is None:
            raise MissingFile(
                f"{name} is not on this machine; download its binary version from "
                "https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name its folder here or in MLCOLLAGE_DATA."
            )
        return found
    where = Path(folder).expanduser()
    if held := first_holding((where, where / kind.folder), kind.files):
        return held
    if where.is_file():
        raise InvalidInput(f"{where} is a file; unpack the archive of the binary version and name its folder.")
    if not where.is_dir():
        raise MissingFile(f"there is no folder {where}; expected the unpacked binary version of {name}.")
    places = (where, where / kind.folder.replace("-bin", "-py"), where / "cifar-100-python")
    if pickled := first_holding(places, kind.pickled):
        raise InvalidInput(
            f"{pickled} is the Python version of {name}, which is pickled, and what is pickled is never loaded; "
            "download the binary version from https://www.cs.toronto.edu/~kriz/cifar.html instead."
        )
    missing = next(file for file in kind.files if not (where / file).is_file())
    raise MissingFile(f"{where} has no file {missing}; expected the unpacked binary version of {name}.")


def normalize(images: NDArray) -> NDArray[np.float32]:
    """Pixels as inputs: bytes over 255 (or numbers in [0, 1]), minus :data:`MEAN`, over :data:`STD`.

    Parameters
    ----------
    images
        ``(n, 3, h, w)``.

    Returns
    -------
    ndarray
        ``(n, 3, h, w)`` float32.

    Examples
    --------
    >>> normalize(np.full((1, 3, 1, 1), 255, dtype=np.uint8)).astype(float).round(2).ravel().tolist()
    [2.55, 2.6, 2.8]
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InvalidInput(f"images have shape {images.shape}; (n, 3, h, w) is needed.")
    shape = (1, 3, 1, 1)  # one value per channel
    x = np.divide(images, 255 if images.dtype == np.uint8 else 1, dtype=np.float32)  # (n, 3, h, w), a copy
    x -= np.array(MEAN, dtype=np.float32).reshape(shape)
    x /= np.array(STD, dtype=np.float32).reshape(shape)
    return x


def workload(name: str, place: str, options: Mapping[str, str]) -> Labeled:
    """Make the workload ``cifar10:place`` or ``cifar100:place`` of :func:`~mlcollage.data.workload.load_workload`.

    Parameters
    ----------
    name
        ``"cifar10"`` or ``"cifar100"``.
    place
        A folder of the binary version (or the one it lies in), a folder of images (``train/cat/1.png``), one of
        ``save_to_disk``, or an ``.npz`` file; empty for wherever :func:`find` finds it.
    options
        ``n`` and ``test``, the first so many images of each part (40,960 training images in the paper), and for the
        binary version of CIFAR-100 ``labels=coarse``.

    Raises
    ------
    MissingFile, InvalidInput, UnknownName
        If what lies there is no CIFAR.
    """
    spec = f"{name}:{place}" if place else name
    check_options(options, ("n", "test", *(("labels",) if name == "cifar100" else ())), f"the workload {spec}")
    n, tests = whole_number(options, "n"), whole_number(options, "test")
    # The same pictures come as an .npz, from the hub, or as a folder of images; these are loaded by their own modules.
    other = _other(Path(place).expanduser(), name) if place else None
    if other is not None:
        return _as_cifar(other, name, spec, options)
    label = options.get("labels", SETS[name].labels[-1])
    x, y, xt, yt = load(place or None, name, labels=label)
    x, xt = (np.divide(images, 255, dtype=np.float32) for images in (x[:n], xt[:tests]))
    where = _folder(place or None, name)
    called = with_options(name, options)
    return Labeled.from_arrays(
        x,
        y[:n],
        xt,
        yt[:tests],
        _classes(where, name, label),
        name=called,
        fingerprint=file_hash(*(where / file for file in SETS[name].files), extra=called),
    )


def _classes(folder: Path, name: str, label: str) -> tuple[str, ...]:
    """The classes' names from their text file; without it, CIFAR-10's from memory and CIFAR-100's as numbers."""
    # The files of names are optional, since batches are often copied without them.
    count, path = SETS[name].classes[label], folder / SETS[name].names[label]
    names = tuple(path.read_text("utf-8", errors="replace").split()) if path.is_file() else ()
    if len(names) == count:
        return names
    return CIFAR10_CLASSES if name == "cifar10" else tuple(map(str, range(count)))


def _other(place: Path, name: str) -> Labeled | None:
    """What the loaders of the user's own data make of a place that holds no binary version."""
    if place.suffix.lower() == ".npz":
        return _files.load(place, {})
    if _hub.saved(place):
        return _hub.load(str(place), {"label": "fine_label"} if name == "cifar100" else {})
    if (place / "train").is_dir() and any(child.is_dir() for child in (place / "train").iterdir()):
        return _images.load(place, {})
    return None


def _as_cifar(found: Labeled, name: str, spec: str, options: Mapping[str, str]) -> Labeled:
    """Check that it has the set's classes and sizes, and cut it."""
    expected = max(SETS[name].classes.values())
    shape = tuple(found.train[0][0].shape)
    if found.num_classes != expected or shape != (3, 32, 32):
        raise InvalidInput(
            f"{spec} has {found.num_classes} classes and images {shape}; {name} has {expected} classes and images "
            "(3, 32, 32): leave out the prefix to load it as what it is."
        )
    counts = {key: count for key in ("n", "test") if (count := whole_number(options, key)) is not None}
    cut = "".join(f" ({key}={count})" for key, count in counts.items())
    return replace(
        found,
        train=_first(found.train, counts.get("n")),
        test=_first(found.test, counts.get("test")),
        name=f"{name}: {found.name}{cut}",
        fingerprint=found.fingerprint + cut,
    )


def _first(part: Any, count: int | None) -> Any:
    """The first samples of a data set, which still knows its classes."""
    if count is None or count >= len(part):
        return part
    cut: Any = Subset(part, range(count))  # keeps images on the disk until they are asked for
    cut.classes = part.classes  # which torch's Subset does not pass on
    return cut
