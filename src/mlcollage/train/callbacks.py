"""Base classes for callbacks of Lightning and of the Hugging Face Trainer, which need neither package to be imported.

A callback must inherit from its framework's own class, and importing that takes seconds, if it is installed at all.
A subclass of :class:`LightningCallback` or :class:`HuggingFaceCallback` is an ordinary, importable class; only when an
object of it is made is the framework imported and its class put among the bases.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any, ClassVar

from mlcollage.errors import MissingDependency


class _Late:
    """Objects are made from the class and a base of the framework, which is looked up when the first one is made."""

    _homes: ClassVar[tuple[str, ...]]  # modules that hold the base, the preferred one first
    _base: ClassVar[str]
    _extra: ClassVar[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(_joined(cls))  # type: ignore[arg-type]  # a class is hashable, whatever mypy says

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle looks classes up by name; the one that was made late has the name of the one that was declared.
        declared = next(c for c in type(self).__mro__ if not c.__dict__.get("_made_late", False))
        return _remake, (declared, self.__dict__)


@functools.cache
def _joined(cls: type[_Late]) -> type:
    base = _framework_class(cls)
    if issubclass(cls, base):  # the user has put the framework's class among the bases
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, base), {**names, "_made_late": True})


def _framework_class(cls: type[_Late]) -> type:
    for home in sorted(cls._homes, key=lambda name: name not in sys.modules):  # the one that the user already imported
        try:
            return getattr(importlib.import_module(home), cls._base)
        except ImportError:
            continue
    raise MissingDependency(f"{cls.__name__} needs {cls._extra}; run pip install 'mlcollage[{cls._extra}]'.")


def _remake(cls: type[_Late], state: dict[str, Any]) -> Any:
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made


class LightningCallback(_Late):
    """Base of callbacks for ``lightning.Trainer(callbacks=[...])``."""

    _homes = ("lightning.pytorch", "pytorch_lightning")
    _base = "Callback"
    _extra = "lightning"


class HuggingFaceCallback(_Late):
    """Base of callbacks for ``transformers.Trainer(callbacks=[...])``."""

    _homes = ("transformers",)
    _base = "TrainerCallback"
    _extra = "transformers"


class HuggingFaceTrainer(_Late):
    """Base of trainers that change how ``transformers.Trainer`` computes its loss."""

    _homes = ("transformers",)
    _base = "Trainer"
    _extra = "transformers"
