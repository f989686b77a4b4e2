"""Binary PLY files whose faces have different numbers of corners, which trimesh refuses."""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}


class _Column(NamedTuple):
    name: str
    kind: np.dtype
    length: np.dtype | None  # type of the number of items before a list


def read_polygons(data: bytes) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Vertices (V, 3) and triangles (F, 3) of a binary PLY file; None if it is something else, or cut off.

    A face of more than three corners becomes a fan about its first one, which is right for convex faces.
    """
    found = re.search(rb"end_header\r?\n", data)
    order = re.search(rb"^format binary_(little|big)_endian", data, re.MULTILINE)
    if found is None or order is None:
        return None
    try:
        elements = _elements(data[: found.start()], "<" if order[1] == b"little" else ">")
        vertices, faces, at = None, [], found.end()
        for name, count, columns in elements:
            if all(c.length is None for c in columns):
                rows = np.frombuffer(data, np.dtype([(c.name, c.kind) for c in columns]), count, at)
                at += rows.nbytes
                if name == "vertex":
                    vertices = np.stack([rows[axis].astype(np.float64) for axis in "xyz"], 1)
                continue
            for _ in range(count):
                for column in columns:
                    items, at = _items(data, column, at)
                    if name == "face" and column.name in ("vertex_index", "vertex_indices"):
                        faces.append(items)
    except (KeyError, ValueError, struct.error):  # an unknown type or column, or fewer bytes than promised
        return None
    fans = [(face[0], b, c) for face in faces for b, c in pairwise(face[1:])]
    return None if vertices is None else (vertices, np.array(fans, dtype=np.int64).reshape(-1, 3))


def _elements(header: bytes, order: str) -> list[tuple[str, int, list[_Column]]]:
    elements: list[tuple[str, int, list[_Column]]] = []
    for line in header.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["element"]:
            elements.append((words[1], int(words[2]), []))
        elif words[:2] == ["property", "list"]:
            kinds = [np.dtype(order + _TYPES[w]) for w in words[2:4]]
            elements[-1][2].append(_Column(words[4], kinds[1], kinds[0]))
        elif words[:1] == ["property"]:
            elements[-1][2].append(_Column(words[2], np.dtype(order + _TYPES[words[1]]), None))
    return elements


def _items(data: bytes, column: _Column, at: int) -> tuple[list[int], int]:
    """A list's items and where the next column begins."""
    count = 1
    if column.length is not None:
        count = int(np.frombuffer(data, column.length, 1, at)[0])
        at += column.length.itemsize
    end = at + count * column.kind.itemsize
    if count < 0 or end > len(data):
        raise ValueError("the file ends within a list")
    return np.frombuffer(data, column.kind, count, at).tolist(), end
