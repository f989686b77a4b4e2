"""Which loops run: compiled ones where numba is installed, numpy ones elsewhere."""

from __future__ import annotations

from types import ModuleType

from . import kernels_numpy

__all__ = ["active"]


def _load() -> ModuleType:
    try:
        from . import kernels_numba
    except ImportError:
        return kernels_numpy
    return kernels_numba


_ACTIVE = _load()


def active() -> ModuleType:
    """The module whose loops are used: :mod:`.kernels_numba`, or :mod:`.kernels_numpy` when numba is missing."""
    return _ACTIVE
