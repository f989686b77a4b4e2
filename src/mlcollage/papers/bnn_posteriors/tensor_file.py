"""Files of a network's tensors with a header in JSON: written whole or not at all, and never pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mlcollage.errors import InvalidInput

from .layout import Layout


def save(file: Path, kind: str, layout: Layout, tensors: Mapping[str, Tensor | None], **header: Any) -> None:
    """Write those tensors that are not None; what was there before stays until the new file is complete.

    Parameters
    ----------
    file
        Where to.
    kind
        What it holds: :func:`load` refuses files of another kind.
    layout
        Of the network's parameters.
    tensors, header
        By name; the header is of what JSON knows.
    """
    from safetensors.torch import save_file

    header |= {"format": kind, "names": layout.names, "shapes": layout.shapes}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # contiguous copies, since the format refuses memory that tensors share
    present = {n: value.detach().cpu().contiguous().clone() for n, value in tensors.items() if value is not None}
    save_file(present, temporary, metadata={"mlcollage": json.dumps(header)})
    os.replace(temporary, file)


def load(file: Path, kind: str, layout: Layout | None = None) -> tuple[Layout, dict[str, Tensor], dict[str, Any]]:
    """Layout, tensors and header of a file of this kind.

    Raises
    ------
    InvalidInput
        If it is damaged, of another kind, or of another architecture than ``layout``.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {}).get("mlcollage", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{file} is damaged, or no safetensors file: {error}.") from None
    if header.get("format") != kind:
        raise InvalidInput(f"{file} holds something else than a {kind}; give another one.")
    found = Layout(tuple(header["names"]), tuple(tuple(shape) for shape in header["shapes"]))
    if layout is not None and (difference := layout.difference(found)) is not None:
        raise InvalidInput(f"{file} is of another architecture: {difference} (this network, and the file).")
    return found, tensors, header


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
