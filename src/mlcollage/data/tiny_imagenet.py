"""Tiny ImageNet (200 classes of ImageNet at 64 x 64) from the folder that its archive unpacks to.

The set is Stanford CS231n's; its archive is ``tiny-imagenet-200.zip``. In it::

    wnids.txt                              200 lines such as n01443537
    words.txt                              n01443537<tab>goldfish, Carassius auratus
    train/n01443537/images/*.JPEG          500 per class
    val/images/val_0.JPEG                  10,000
    val/val_annotations.txt                val_0.JPEG<tab>n03444034<tab>0<tab>32<tab>44<tab>62
    test/images/*.JPEG                     without labels; not read

The validation images are the test set here, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlcollage.data._images import ImageFolder, files_hash
from mlcollage.data._reading import check_options, first_holding, roots, whole_number, with_options
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput, MissingFile

MEAN = (0.480, 0.448, 0.397)
STD = (0.276, 0.269, 0.282)
"""Per channel, as Kunin et al. (2021) normalize the images."""

_FOLDER = "tiny-imagenet-200"
_IMAGES = {".jpeg", ".jpg", ".png"}


def find() -> Path | None:
    """Return the first folder that holds the set, or None: ``$MLCOLLAGE_DATA``, ``./data`` and ``~/data``."""
    places = [place for root in roots() for place in (root, root / _FOLDER)]
    return first_holding(places, ["val/val_annotations.txt"])


def load(folder: str | Path | None = None, *, per_class: int | None = None) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation images, decoded when asked for: float32 ``(3, 64, 64)`` in [0, 1] and labels 0 to 199.

    Parameters
    ----------
    folder
        ``tiny-imagenet-200``, or the folder it is in; by default wherever :func:`find` finds it.
    per_class
        Only the first so many images of each class, of both parts.

    Returns
    -------
    train, validation
        Map-style datasets; ``classes`` are the first words of ``words.txt`` where it is there, WordNet ids otherwise.

    Raises
    ------
    MissingFile
        If the set, or a part of it, is not there.
    InvalidInput
        If the annotations do not fit the images.
    """
    root = _root(folder)
    ids = _ids(root)
    names = _names(root, ids)
    seen: list[tuple[Path, int]] = []  # image and label
    for label, wnid in enumerate(ids):
        place = root / "train" / wnid
        # The images may also lie in the class folder itself.
        place = place / "images" if (place / "images").is_dir() else place
        found = sorted((p for p in place.iterdir() if p.suffix.lower() in _IMAGES), key=_number)[:per_class]
        if not found:
            raise MissingFile(f"the class folder {place} holds no images; unpack tiny-imagenet-200.zip again.")
        seen += [(path, label) for path in found]
    held = _validation(root, {wnid: i for i, wnid in enumerate(ids)}, per_class)
    train, test = (ImageFolder([p for p, _ in part], [y for _, y in part], names, None, 3) for part in (seen, held))
    return train, test


def workload(folder: str, options: Mapping[str, str]) -> Labeled:
    """Tiny ImageNet as ``--workload tiny_imagenet:folder``; ``?per_class=50`` takes the first so many of each class."""
    check_options(options, ("per_class",), "the workload tiny_imagenet")
    train, test = load(folder or None, per_class=whole_number(options, "per_class"))
    called = with_options("tiny_imagenet", options)
    return Labeled(
        train,
        test,
        len(train.classes),
        name=called,
        fingerprint=files_hash(_root(folder or None), [*train.paths, *test.paths], called),
    )


def _root(folder: str | Path | None) -> Path:
    if folder is None:
        found = find()
        if found is None:
            raise MissingFile(
                f"Tiny ImageNet was not found; unpack tiny-imagenet-200.zip and name the folder, as in "
                f"tiny_imagenet:path/to/{_FOLDER}, or set MLCOLLAGE_DATA to the folder it is in."
            )
        return found
    place = Path(folder).expanduser()
    for root in (place, place / _FOLDER):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return root
    raise MissingFile(f"{place} holds no Tiny ImageNet: expected the folders train and val in it, or in {_FOLDER}.")


def _ids(root: Path) -> list[str]:
    """Labels are positions in sorted order, so that they do not depend on whether wnids.txt is there."""
    listed = root / "wnids.txt"
    there = sorted(p.name for p in (root / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
    # Sorted: the number of a class must not depend on the order of a listing.
    ids = sorted(set(listed.read_text("utf-8").split())) if listed.is_file() else there
    if missing := [wnid for wnid in ids if wnid not in there]:
        raise MissingFile(f"{root / 'train'} lacks the class {missing[0]}, which wnids.txt lists.")
    if len(ids) < 2:
        raise InvalidInput(f"{root / 'train'} holds {len(ids)} class folders; expected two or more.")
    return ids


def _names(root: Path, ids: list[str]) -> list[str]:
    words = root / "words.txt"
    if not words.is_file():
        return ids
    known = dict(line.split("\t", 1) for line in words.read_text("utf-8").splitlines() if "\t" in line)
    return [known[wnid].split(",")[0].strip() if wnid in known else wnid for wnid in ids]


def _number(path: Path) -> tuple[int, str]:
    """In the order of their numbers: val_2 before val_10."""
    digits = path.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() else 0, path.name)  # n01443537_2 before n01443537_10


def _validation(root: Path, label: Mapping[str, int], per_class: int | None) -> list[tuple[Path, int]]:
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise MissingFile(f"there is no file {annotations}, which says the class of each validation image.")
    found: list[tuple[Path, int]] = []
    counts: dict[int, int] = {}
    for number, line in enumerate(annotations.read_text("utf-8").splitlines(), start=1):
        fields = line.split("\t")  # file, class, and a box that nobody needs here
        if len(fields) < 2:
            raise InvalidInput(f"line {number} of {annotations} is {line[:40]!r}; expected file, tab, class.")
        if fields[1] not in label:
            raise InvalidInput(f"line {number} of {annotations} names the class {fields[1]!r}, which train has not.")
        y = label[fields[1]]
        counts[y] = counts.get(y, 0) + 1
        if per_class is None or counts[y] <= per_class:
            found.append((root / "val" / "images" / fields[0], y))
    if not found:
        raise InvalidInput(f"{annotations} names no image.")
    # One listing of the folder instead of 10,000 questions whether a file is there.
    there = {p.name for p in (root / "val" / "images").iterdir()} if (root / "val" / "images").is_dir() else set()
    if lost := [path for path, _ in found if path.name not in there]:
        raise MissingFile(f"{len(lost)} validation images named in {annotations} are missing; the first is {lost[0]}.")
    return found
