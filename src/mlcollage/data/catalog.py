"""The data sources by name: what ``mlcollage data`` lists."""

from __future__ import annotations

import importlib.util
from typing import Any

from mlcollage.data import cifar, fashion_mnist, tables, tiny_imagenet
from mlcollage.data.glyphs import PRESETS

__all__ = ["catalog"]


def catalog() -> list[dict[str, Any]]:
    """Return one dictionary a data source.

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
    rows = [
        _row(f"glyphs:{name}", f"endless stroke glyphs, {_preset(settings)}", 5000, 2000, _shape(settings))
        for name, settings in PRESETS.items()
    ]
    rows += [
        _row("mnist1d", "ten templates as noisy signals; the authors' set (endless in Python)", 4000, 1000, [40]),
        _row("digits", "handwritten digits", 1257, 540, [1, 8, 8], "scikit-learn"),
    ]
    folder = fashion_mnist.find()
    where = str(folder) if folder else "run `mlcollage data prepare`"
    rows.append(_row("fashion_mnist", "articles of clothing", 60_000, 10_000, [1, 28, 28], where, folder is not None))
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        folder = cifar.find(name)
        where = str(folder) if folder else f"your folder of the binary version: {name}:folder"
        what = f"color photographs of {classes} kinds of things"
        rows.append(_row(name, what, 50_000, 10_000, [3, 32, 32], where, folder is not None))
    folder = tiny_imagenet.find()
    where = str(folder) if folder else "your folder tiny-imagenet-200: tiny_imagenet:folder"
    what = "photographs of 200 kinds of things"
    rows.append(_row("tiny_imagenet", what, 100_000, 10_000, [3, 64, 64], where, folder is not None))
    for name, info in tables.TABLES.items():
        if info.task == "classification" and name != "digits":
            test = -(-info.rows // 4)
            rows.append(_row(name, info.what, info.rows - test, test, [info.features], "scikit-learn"))
    hub = importlib.util.find_spec("datasets") is not None
    own = [
        ("module:function", "your own data and model, from Python", "your code", True),
        ("file.npz", "arrays X, y, X_test, y_test", "your file", True),
        ("table.csv", "a table; the label is the last column or ?target=name", "your file", True),
        ("table.parquet", "the same as Parquet", "your file", True),
        ("folder/", "images as train/cat/1.png or cat/1.png", "your folder", True),
        ("data.imdb", "film reviews as word numbers, from the folder aclImdb; in Python only", "your folder", True),
        ("data.uci", "UCI regression tables, standardized splits; in Python only", "your file", True),
        ("hf:name", "a data set of the Hugging Face hub", "the hub" if hub else "pip install 'mlcollage[hub]'", hub),
    ]
    rows += [_row(name, what, None, None, None, where, there) for name, what, where, there in own]
    return rows


def _row(
    name: str,
    what: str,
    train: int | None,
    test: int | None,
    shape: list[int] | None,
    where: str = "generated",
    available: bool = True,
) -> dict[str, Any]:
    return {
        "name": name,
        "what": what,
        "train": train,
        "test": test,
        "shape": shape,
        "available": available,
        "where": where,
    }


def _shape(settings: dict[str, Any]) -> list[int]:
    return [settings["channels"], settings["size"], settings["size"]]


def _preset(settings: dict[str, Any]) -> str:
    color = "gray" if settings["channels"] == 1 else "RGB"
    hidden = ", partly hidden" if settings.get("occluders") else ""
    return f"{settings.get('num_classes', 10)} classes, {color}{hidden}"
