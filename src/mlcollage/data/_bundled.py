"""Workloads that need no file of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import psutil

from mlcollage.data import fashion_mnist, tables
from mlcollage.data._reading import check_options, standardize, whole_number, with_options
from mlcollage.data.digits import load_digits_split
from mlcollage.data.glyphs import PRESETS, GlyphWorld
from mlcollage.data.mnist1d import reference
from mlcollage.data.workload import Labeled
from mlcollage.errors import InvalidInput

_TABLES = tuple(name for name, info in tables.TABLES.items() if info.task == "classification" and name != "digits")
NAMES = ("digits", "fashion_mnist", "glyphs", *(f"glyphs:{name}" for name in PRESETS), "mnist1d", *_TABLES)


def knows(name: str) -> bool:
    """Whether a name is one of ours; ``glyphs:anything`` is, so that a misspelled preset is answered as such."""
    return name in NAMES or name.startswith("glyphs:")


def load(name: str, options: Mapping[str, str]) -> Labeled:
    """Return the workload ``name``."""
    if name.startswith("glyphs"):
        return _glyphs(name, options)
    check_options(options, (), f"the workload {name}")
    classes: Any = 10
    if name == "digits":
        x, y, xt, yt = load_digits_split()
        x, xt = x.reshape(-1, 1, 8, 8), xt.reshape(-1, 1, 8, 8)
    elif name == "fashion_mnist":
        x, y, xt, yt = fashion_mnist.load()
        x, xt, classes = x.reshape(-1, 1, 28, 28), xt.reshape(-1, 1, 28, 28), fashion_mnist.CLASSES
    elif name == "mnist1d":
        data = reference()
        x, y, xt, yt = (data[key] for key in ("x", "y", "x_test", "y_test"))
    else:
        raw, y, raw_test, yt = tables.load(name)
        (x, xt), classes = standardize(raw, raw_test), tables.TABLES[name].classes
    return Labeled.from_arrays(x, y, xt, yt, classes, name=name)


def _glyphs(name: str, options: Mapping[str, str]) -> Labeled:
    """GlyphWorld with ``n`` training and ``test`` test images; other options are its settings."""
    preset = name.partition(":")[2] or "standard32"
    # Settings that are a number or a word, with the type that turns an option's text into one.
    kinds: dict[str, Any] = {
        field.name: type(field.default)
        for field in fields(GlyphWorld)
        if type(field.default) in (int, float, str) and field.name != "device"
    }
    check_options(options, ("n", "test", *kinds), f"the workload {name}")
    settings: dict[str, Any] = {}
    for key in kinds.keys() & options.keys():
        try:
            settings[key] = kinds[key](options[key])
        except ValueError:
            kind = kinds[key].__name__
            raise InvalidInput(f"option {key} of {name} must be {kind}; got {options[key]!r}.") from None
    world = GlyphWorld.preset(preset, **settings)
    n, tests = whole_number(options, "n") or 5000, whole_number(options, "test") or 2000
    needed, free = 4 * math.prod(world.shape) * (n + tests), psutil.virtual_memory().available
    if needed > free:
        raise InvalidInput(
            f"{n + tests:,} images of {name} take {needed / 1e9:,.0f} GB of memory, {free / 1e9:,.0f} GB are free; "
            "make n or test smaller."
        )
    return Labeled(
        world.fixed(n),
        world.fixed(tests, split="test"),
        world.num_classes,
        name=with_options(name, options),
    )
