"""Files of tensors and of what JSON knows: written whole or not at all, checked by a digest, and never pickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput, MissingFile

_TENSOR = "$tensor"  # stands in the header where a tensor was


def save(path: str | os.PathLike[str], kind: str, content: Mapping[str, Any]) -> Path:
    """Write one safetensors file; what was there before stays until the new one is complete.

    Parameters
    ----------
    path
        Where to; folders are made.
    kind
        What it holds: :func:`load` refuses files of another kind.
    content
        Nested dictionaries and lists of tensors, numbers, words and None. Lists come back for tuples.

    Returns
    -------
    Path

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load(save(f"{folder}/a.safetensors", "example", {"w": torch.ones(2), "steps": 3}), "example")
    >>> again["steps"], again["w"].tolist()
    (3, [1.0, 1.0])
    """
    from safetensors.torch import save_file

    target, tensors = Path(path), dict[str, Tensor]()
    header = json.dumps({"format": kind, "content": _packed(content, "", tensors)})
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, scratch, metadata={"mlcollage": header, "digest": _digest(header, tensors)})
        scratch.replace(target)  # at once: a reader finds the old file or the new one
    finally:
        scratch.unlink(missing_ok=True)
    return target


def load(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The content of a file that :func:`save` wrote, with its tensors on the CPU.

    Raises
    ------
    MissingFile
        If there is none.
    InvalidInput
        If it is damaged, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise MissingFile(f"there is no file {path}; give one that holds a {kind}.")
    try:
        with safe_open(path, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        header = json.loads(about.get("mlcollage", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{path} is damaged, or no safetensors file: {error}.") from None
    if header.get("format") != kind:
        raise InvalidInput(f"{path} holds something else than a {kind}; give another one.")
    if about.get("digest") != _digest(about["mlcollage"], tensors):
        raise InvalidInput(f"{path} is damaged: its content is not what was written; restore it, or begin anew.")
    unpacked: dict[str, Any] = _unpacked(header["content"], tensors)
    return unpacked


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value with names in place of its tensors, which go to ``tensors``."""
    if isinstance(value, Tensor):
        # contiguous copies, since the format refuses memory that tensors share
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {str(key): _packed(part, f"{name}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if list(value) == [_TENSOR]:
            return tensors[value[_TENSOR]]
        return {key: _unpacked(part, tensors) for key, part in value.items()}
    return [_unpacked(part, tensors) for part in value] if isinstance(value, list) else value


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
