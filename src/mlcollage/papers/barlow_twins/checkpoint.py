"""Weights of the official code's files, read without running any code that a file holds."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError  # only the type of what torch raises
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput, MissingFile

__all__ = ["OfficialCheckpoint", "load_official_checkpoint"]

_WRAPPERS = ("module.", "_orig_mod.")
_SHOWN = 6
# What torch's readers raise for files that are cut off or changed.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    AttributeError,
    LookupError,
    TypeError,
    struct.error,
    UnpicklingError,
)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """Weights of a file of the official code, by part.

    Parameters
    ----------
    backbone
        Of the ResNet-50 without its classifier, with torchvision's names.
    projector
        Of the projector, with the names of :class:`~mlcollage.papers.barlow_twins.model.BarlowProjector`; empty for
        ``resnet50.pth``.
    norm
        Running statistics of the affine-free batch norm before the loss, which needs none here.
    epoch
        Epochs done, where the file says it.
    left
        What else the file holds and was not read, such as the optimizer, whose groups hold functions.
    """

    backbone: dict[str, Tensor]
    projector: dict[str, Tensor]
    norm: dict[str, Tensor]
    epoch: int | None
    left: tuple[str, ...]

    def load_backbone(self, module: nn.Module) -> nn.Module:
        """Put the weights into a backbone; a classifier ``fc`` of its own may stay as it is.

        Raises
        ------
        InvalidInput
            If weights are missing, unexpected or of other shapes; the sentence lists them.
        """
        return _load(module, self.backbone, "backbone", ("fc.",))

    def load_projector(self, module: nn.Module) -> nn.Module:
        """Put the weights into a projector; refuses as :meth:`load_backbone` does, and if the file has none."""
        if not self.projector:
            raise InvalidInput("the file holds a backbone only; projectors are in the full checkpoint.pth.")
        return _load(module, self.projector, "projector", ())


def load_official_checkpoint(path: str | PathLike[str]) -> OfficialCheckpoint:
    """Read ``resnet50.pth`` or a full ``checkpoint.pth`` of facebookresearch/barlowtwins.

    The file is unpickled by torch's restricted reader, which builds tensors and plain containers only. A full
    checkpoint also holds functions of the script that wrote it (in the optimizer's groups); in their place stand
    objects that do nothing.

    Parameters
    ----------
    path
        The file. Prefixes that wrappers leave (``module.``, ``_orig_mod.``) are taken off.

    Raises
    ------
    MissingFile
        If it is not there.
    InvalidInput
        If it is no such file: a pointer of Git LFS, a web page, cut off, without known weights.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "resnet50.pth"
    >>> torch.save({"conv1.weight": torch.zeros(2, 3), "fc.weight": torch.zeros(4, 2)}, file)
    >>> read = load_official_checkpoint(file)
    >>> list(read.backbone), read.left
    (['conv1.weight'], ('fc.weight',))
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path} is not there; give the path of resnet50.pth or checkpoint.pth.")
    content = _read(path)
    if not isinstance(content, Mapping):
        raise InvalidInput(f"{path} holds a {type(content).__name__}; a dictionary of weights is needed.")
    left: list[str] = []
    weights: Any = content
    epoch = None
    if isinstance(content.get("model"), Mapping):
        weights = content["model"]
        epoch = content.get("epoch")
        left += [str(name) for name in content if name not in ("model", "epoch")]
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "projector": {}, "bn": {}}
    named = {_bare(str(name)): value for name, value in weights.items()}
    whole = any(name.startswith(("backbone.", "projector.")) for name in named)
    for name, value in named.items():
        part, _, rest = name.partition(".") if whole else ("backbone", "", name)
        if part in parts and isinstance(value, Tensor) and not rest.startswith("fc."):
            parts[part][rest] = value
        else:
            left.append(name)
    if not parts["backbone"]:
        raise InvalidInput(
            f"{path} holds no weights of a backbone (it has {_listed(list(named))}); expected torchvision's names, or "
            "names that begin with backbone."
        )
    number = int(epoch) if isinstance(epoch, int) else None
    return OfficialCheckpoint(parts["backbone"], parts["projector"], parts["bn"], number, tuple(left))


class _Inert:
    """Stands for something that a file names and that is not built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise InvalidInput(f"{path} is a pointer of Git LFS and not the file itself; run git lfs pull.")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!", b"<html", b"<?xml")):
        raise InvalidInput(f"{path} is a web page and not a checkpoint; the download went wrong.")
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        if not zipfile.is_zipfile(path):  # of torch before 1.6, or cut off
            return torch.load(path, **options)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stubs: list[Any] = [(type("_Inert", (_Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):  # in this block only; each stub stands for one name
            return torch.load(path, **options)
    except _DAMAGE as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InvalidInput(
            f"{path} cannot be read as a checkpoint: it is cut off, of another format, or holds what the safe reader "
            f"refuses ({first})."
        ) from None


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    # Compiled parts have the wrapper's name in the middle.
    return name.replace("._orig_mod.", ".").replace(".module.", ".")


def _load(module: nn.Module, weights: dict[str, Tensor], what: str, optional: tuple[str, ...]) -> nn.Module:
    own = module.state_dict()
    missing = [n for n in own if n not in weights and not n.startswith(optional or ("\0",))]
    unexpected = [n for n in weights if n not in own]
    other = [
        f"{n} {tuple(w.shape)}, not {tuple(own[n].shape)}"
        for n, w in weights.items()
        if n in own and own[n].shape != w.shape
    ]
    if missing or unexpected or other:
        said = [
            f"{title}: {_listed(names)}"
            for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
            if names
        ]
        raise InvalidInput(f"the file's weights do not fit the {what}; {'; '.join(said)}.")
    module.load_state_dict(weights, strict=False)
    return module


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
