"""The data sources by name: what ``mlcollage data`` lists."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mlcollage.data import cifar, fashion_mnist, tables, tiny_imagenet
from mlcollage.data.glyphs import PRESETS

_COLUMNS = ("name", "what", "train", "test", "shape", "available", "where")
_MADE, _SKLEARN = "generated", "scikit-learn"


def catalog() -> list[dict[str, Any]]:
    """Return one dictionary per data source.

    Returns
    -------
    list of dict
        ``name`` (as given to ``--workload``), ``what`` (one line), ``train`` and ``test`` (numbers of samples, None
        for the user's own), ``shape`` (list, or None), ``available`` and ``where``.

    Examples
    --------
    >>> {row["name"]: row["shape"] for row in catalog()}["glyphs:easy16"]
    [1, 16, 16]
    """
    rows: list[tuple[Any, ...]] = [
        (f"glyphs:{name}", f"endless stroke glyphs, {_preset(settings)}", 5000, 2000, _shape(settings), True, _MADE)
        for name, settings in PRESETS.items()
    ]
    signals = "ten templates as noisy signals; the authors' set (endless in Python)"
    rows += [
        ("mnist1d", signals, 4000, 1000, [40], True, _MADE),
        ("digits", "handwritten digits", 1257, 540, [1, 8, 8], True, _SKLEARN),
    ]
    fashion, prepare = fashion_mnist.find(), "run `mlcollage data prepare`"
    rows.append(_found("fashion_mnist", "articles of clothing", 60_000, 10_000, [1, 28, 28], fashion, prepare))
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        what, yours = f"color photographs of {classes} kinds of things", "your folder of the binary version: "
        rows.append(_found(name, what, 50_000, 10_000, [3, 32, 32], cifar.find(name), f"{yours}{name}:folder"))
    what, yours = "photographs of 200 kinds of things", "your folder tiny-imagenet-200: tiny_imagenet:folder"
    rows.append(_found("tiny_imagenet", what, 100_000, 10_000, [3, 64, 64], tiny_imagenet.find(), yours))
    for name, info in tables.TABLES.items():
        if info.task == "classification" and name != "digits":
            test = -(-info.rows // 4)  # rounded up, as scikit-learn splits
            rows.append((name, info.what, info.rows - test, test, [info.features], True, _SKLEARN))
    hub = importlib.util.find_spec("datasets") is not None
    own = [
        ("module:function", "your own data and model, from Python", True, "your code"),
        ("file.npz", "arrays X, y, X_test, y_test", True, "your file"),
        ("table.csv", "a table; the label is the last column or ?target=name", True, "your file"),
        ("table.parquet", "the same as Parquet", True, "your file"),
        ("folder/", "images as train/cat/1.png or cat/1.png", True, "your folder"),
        ("data.imdb", "film reviews as word numbers, from the folder aclImdb; in Python only", True, "your folder"),
        ("data.uci", "UCI regression tables, standardized splits; in Python only", True, "your file"),
        ("hf:name", "a data set of the Hugging Face hub", hub, "the hub" if hub else "pip install 'mlcollage[hub]'"),
    ]
    rows += [(name, what, None, None, None, there, where) for name, what, there, where in own]
    return [dict(zip(_COLUMNS, row, strict=True)) for row in rows]


def _found(
    name: str, what: str, train: int, test: int, shape: list[int], folder: Path | None, otherwise: str
) -> tuple[Any, ...]:
    """The row of a set that lies in a folder, or does not."""
    return name, what, train, test, shape, folder is not None, str(folder or otherwise)


def _shape(settings: dict[str, Any]) -> list[int]:
    return [settings["channels"], settings["size"], settings["size"]]


def _preset(settings: dict[str, Any]) -> str:
    color = "gray" if settings["channels"] == 1 else "RGB"
    hidden = ", partly hidden" if settings.get("occluders") else ""
    return f"{settings.get('num_classes', 10)} classes, {color}{hidden}"
