"""Files of tensors with a header in JSON: written whole or not at all, and never pickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mlcollage.errors import InvalidInput

__all__ = ["load", "save", "under"]


def save(file: Path, tensors: Mapping[str, Tensor | None], header: Mapping[str, Any]) -> None:
    """Write those tensors that are not None; what was there before stays until the new file is complete."""
    from safetensors.torch import save_file

    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    # contiguous copies, since the format refuses memory that tensors share
    present = {n: value.detach().cpu().contiguous().clone() for n, value in tensors.items() if value is not None}
    save_file(present, temporary, metadata={"mlcollage": json.dumps(header)})
    os.replace(temporary, file)


def load(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors; an empty header for a file that something else wrote.

    Raises
    ------
    InvalidInput
        If it is damaged, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            header = json.loads((opened.metadata() or {}).get("mlcollage", "{}"))
            return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{file} is damaged, or no safetensors file: {error}.") from None


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
