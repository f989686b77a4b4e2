"""Workloads that need no file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlcollage.data import tables
from mlcollage.data._labeled import LabeledTensors, check_options, whole_number
from mlcollage.data.glyphs import PRESETS, GlyphWorld
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput

__all__ = ["NAMES", "knows", "load", "standardize"]

_TABLES = tuple(name for name, info in tables.TABLES.items() if info.task == "classification" and name != "digits")
NAMES = ("digits", "fashion_mnist", "glyphs", *(f"glyphs:{name}" for name in PRESETS), "mnist1d", *_TABLES)


def knows(name: str) -> bool:
    """Whether a name is one of ours; ``glyphs:anything`` is, so that a misspelt preset is answered as such."""
    return name in NAMES or name.startswith("glyphs:")


def load(name: str, options: Mapping[str, str]) -> Labeled:
    """Return the workload ``name``."""
    if name.split(":")[0] == "glyphs":
        return _glyphs(name, options)
    check_options(options, (), f"the workload {name}")
    if name == "digits":
        from mlcollage.data.digits import load_digits_split

        x, y, xt, yt = load_digits_split()
        return _workload(name, (x, y, xt, yt), (1, 8, 8), [str(k) for k in range(10)])
    if name == "fashion_mnist":
        from mlcollage.data import fashion_mnist

        return _workload(name, fashion_mnist.load(), (1, 28, 28), fashion_mnist.CLASSES)
    if name == "mnist1d":
        from mlcollage.data.mnist1d import reference

        data = reference()
        parts = (data["x"], data["y"], data["x_test"], data["y_test"])
        return _workload(name, parts, (40,), [str(k) for k in range(10)])
    info = tables.TABLES[name]
    raw, labels, raw_test, test_labels = tables.load(name)
    train, test = standardize(raw, raw_test)
    return _workload(name, (train, labels, test, test_labels), (info.features,), info.classes)


def standardize(train: NDArray, test: NDArray) -> tuple[NDArray, NDArray]:
    """Columns of mean 0 and standard deviation 1 over the training rows; constant columns become 0."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 1e-12 * np.maximum(1, np.abs(mean)), std, 1.0)
    return (train - mean) / std, (test - mean) / std


def _workload(
    name: str, parts: tuple[NDArray, NDArray, NDArray, NDArray], shape: tuple[int, ...], classes: Any
) -> Labeled:
    x, y, xt, yt = parts
    train = LabeledTensors(x.reshape(-1, *shape), y, classes)
    return Labeled(train, LabeledTensors(xt.reshape(-1, *shape), yt, classes), len(classes), name=name)


def _glyphs(name: str, options: Mapping[str, str]) -> Labeled:
    """GlyphWorld with ``n`` training and ``test`` test images; other options are its settings."""
    preset = name.partition(":")[2] or "standard32"
    kinds: dict[str, Any] = {
        field.name: type(field.default)
        for field in fields(GlyphWorld)
        if type(field.default) in (int, float, str) and field.name != "device"
    }
    check_options(options, ("n", "test", *kinds), f"the workload {name}")
    settings: dict[str, Any] = {}
    for key, text in options.items():
        if key in kinds:
            try:
                settings[key] = kinds[key](text)
            except ValueError:
                raise InvalidInput(f"option {key} of {name} must be {kinds[key].__name__}; got {text!r}.") from None
    world = GlyphWorld.preset(preset, **settings)
    n, test = whole_number(options, "n", 5000), whole_number(options, "test", 2000)
    asked = "&".join(f"{key}={value}" for key, value in sorted(options.items()))
    return Labeled(
        world.fixed(n or 1),
        world.fixed(test or 1, split="test"),
        world.num_classes,
        name=name + (asked and f"?{asked}"),
    )
