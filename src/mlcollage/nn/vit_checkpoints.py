"""Released vision-transformer weights (``.npz``, all dialects of key names) into and out of :class:`ViT`.

Weights of ``google-research/vision_transformer`` and ``google-research/big_vision``; position embeddings are resized
as Dosovitskiy et al. 2021 (arXiv:2010.11929, section 3.2) do.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.nn._parts import wide
from mlcollage.nn.vit import ViT
from mlcollage.nn.wrapped import unwrap

Array = NDArray[Any]
DIALECTS = ("released", "flax", "big_vision")


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """What was done on loading.

    Attributes
    ----------
    loaded
        Number of tensors of the model that were set from the file.
    resized
        (old grid, new grid) if the position embedding was resized, else None.
    left_out
        Keys of the file that were not used.
    kept
        Parameters of the model that keep their values.
    """

    loaded: int
    resized: tuple[tuple[int, int], tuple[int, int]] | None
    left_out: tuple[str, ...]
    kept: tuple[str, ...]


def resize_posemb(
    posemb: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    class_token: bool = True,
    variant: str = "corners",
) -> Tensor:
    r"""Position embedding for another grid of patches, by bilinear interpolation with the corners aligned.

    Row i of n new rows lies at :math:`i (m - 1) / (n - 1)` of m old ones. The released code calls
    ``scipy.ndimage.zoom(order=1)``, which is the same, except that for 112 pairs of sizes up to 64 (16 to 30 and 28 to
    14 among them) rounding puts its last coordinate past the edge, and the last row and column become zeros.

    Parameters
    ----------
    posemb
        Shape (1, tokens, width) or (tokens, width), the patches row by row.
    old_grid, new_grid
        (rows, columns), which the number of tokens alone does not tell: 144 may be 12 x 12 or 9 x 16.
    class_token
        Whether the first token is the class token; it is kept as it is.
    variant
        ``"corners"``: what is meant; ``"scipy"``: what the released code returns, zeros included, for numbers that
        must equal its own.

    Returns
    -------
    Tensor
        Shape (1, new tokens, width) or (new tokens, width), of the same type.

    Raises
    ------
    InvalidInput
        If the old grid does not have as many tokens.

    Examples
    --------
    >>> ramp = torch.arange(4.0).view(1, 4, 1)  # 2 x 2: 0 1 / 2 3
    >>> resize_posemb(ramp, (2, 2), (3, 3), class_token=False).view(3, 3).tolist()
    [[0.0, 0.5, 1.0], [1.0, 1.5, 2.0], [2.0, 2.5, 3.0]]
    """
    checks.choice("variant", variant, ("corners", "scipy"))
    old, new = _grid("old_grid", old_grid), _grid("new_grid", new_grid)
    first = int(class_token)
    if posemb.ndim not in (2, 3) or (posemb.ndim == 3 and len(posemb) != 1) or not posemb.is_floating_point():
        raise InvalidInput(
            f"posemb must be floating point of shape (1, tokens, width) or (tokens, width), not {posemb.dtype} "
            f"{tuple(posemb.shape)}."
        )
    if posemb.shape[-2] != old[0] * old[1] + first:
        raise InvalidInput(
            f"posemb has {posemb.shape[-2]} tokens, but old_grid={old} with class_token={class_token} has "
            f"{old[0] * old[1] + first}."
        )
    if old == new:
        return posemb.clone()
    rows = posemb.reshape(-1, posemb.shape[-1])
    grid = wide(rows[first:]).T.reshape(1, -1, *old)  # (1, width, rows, columns)
    if variant == "scipy":
        zoom = (1, 1, new[0] / old[0], new[1] / old[1])
        moved = torch.from_numpy(ndimage.zoom(grid.detach().cpu().numpy(), zoom, order=1)).to(grid.device)
    else:
        moved = F.interpolate(grid, new, mode="bilinear", align_corners=True)
    found = torch.cat([rows[:first], moved[0].flatten(1).T.to(posemb.dtype)])
    return found.view(*posemb.shape[:-2], len(found), posemb.shape[-1])


def load_augreg_npz(
    model: ViT,
    path: str | os.PathLike[str],
    strict: bool = True,
    *,
    head: str = "load",
    channels: str | None = None,
    grid: tuple[int, int] | None = None,
) -> LoadedCheckpoint:
    """Set the weights of a model from a released ``.npz`` file; nothing is unpickled.

    All key names in circulation are read: of the released files (``MultiHeadDotProductAttention_1``, ``MlpBlock_3``,
    ``LayerNorm_2``), of newer Flax trees (``..._0``, ``LayerNorm_1``), of big_vision (``params/`` before each,
    ``pos_embedding`` at the top, without a slot for the class token) and of older files (``opt/target/`` before each);
    bfloat16, float16 and float64 numbers too. A position embedding of another grid is resized (:func:`resize_posemb`).
    Dropout rates do not travel with weights.

    Parameters
    ----------
    model
        Of the same sizes, as :func:`mlcollage.nn.vit_models.vit` makes it, also compiled or wrapped for several
        devices; its type and device stay.
    path
        The file.
    strict
        Refuse a file that holds more or less than the model needs; False: load what fits, and say so in a warning.
    head
        ``"load"`` the file's head, or ``"zero"``: start with a head of zeros, for fine-tuning on other classes.
    channels
        If the model's images have other channels than the file's: ``"sum"`` for one channel (the response to gray
        images stays what it was to three equal planes), ``"repeat"`` for any number (an initialization only: the
        response is not preserved). None refuses.
    grid
        (rows, columns) of the file's position embedding where it is not square.

    Returns
    -------
    LoadedCheckpoint

    Raises
    ------
    MissingFile
        If there is no such file.
    InvalidInput
        For a damaged file, one that is a web page or holds pickled objects, and weights of other sizes; the model is
        then left as it was.

    Examples
    --------
    >>> import tempfile
    >>> from mlcollage.nn.vit_models import vit
    >>> small = {"num_classes": 3, "in_shape": (3, 8, 8), "patch_size": 4}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_augreg_npz(vit("Ti/16", **small), folder + "/ti.npz")
    ...     found = load_augreg_npz(vit("Ti/16", **{**small, "in_shape": (3, 12, 8)}), path, head="zero")
    >>> found.resized, found.left_out
    (((2, 2), (3, 2)), ('head/bias', 'head/kernel'))
    """
    checks.choice("head", head, ("load", "zero"))
    if channels is not None:
        checks.choice("channels", channels, ("sum", "repeat"))
    model = _vit_inside(model)
    arrays = _canonical(_read(Path(path)))
    loader = _Loader(model, arrays, channels, None if grid is None else _grid("grid", grid))
    wanted = _layout(model)
    new, kept = {}, []
    for name, (key, back) in wanted.items():
        if head == "zero" and name.startswith("head."):
            new[name] = torch.zeros_like(model.get_parameter(name))
        elif key in arrays:
            new[name] = loader.fit(name, key, back)
        else:
            kept.append(name)
    used = {key for name, (key, _) in wanted.items() if not (head == "zero" and name.startswith("head."))}
    left_out = sorted(set(arrays) - used)
    excused = {key for key in left_out if head == "zero" and key.startswith("head/")}
    _account(kept, [key for key in left_out if key not in excused], strict, Path(path))
    if head == "load" and "head.weight" in new and not new["head.weight"].any():
        warnings.warn(
            f"the head in {Path(path).name} is all zeros: it predicts the same for every image; it is meant to be "
            "trained.",
            stacklevel=2,
        )
    with torch.no_grad():
        for name, value in new.items():
            model.get_parameter(name).copy_(value)
    return LoadedCheckpoint(len(new), loader.resized, tuple(left_out), tuple(kept))


def save_augreg_npz(model: ViT, path: str | os.PathLike[str], dialect: str = "released") -> Path:
    """Write a model's weights as the released code names them; :func:`load_augreg_npz` and the JAX code read them.

    Parameters
    ----------
    model
        Any :class:`ViT`.
    path
        The file, replaced in one step if it exists; ``.npz`` is added to a name without it.
    dialect
        Key names: ``"released"``, ``"flax"`` or ``"big_vision"``. The last has no position for the class token, which
        is added to the class token instead (it gives the same logits).

    Returns
    -------
    Path

    Raises
    ------
    UnknownName
        For another dialect.
    MissingFile
        If there is no such folder.

    Examples
    --------
    >>> import tempfile
    >>> model = ViT((1, 4, 4), 2, dim=8, depth=1, heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keys = np.load(save_augreg_npz(model, folder + "/small", "big_vision")).files
    >>> "params/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel" in keys
    True
    """
    checks.choice("dialect", dialect, DIALECTS)
    model = _vit_inside(model)
    out: dict[str, Array] = {}
    for name, (key, back) in _layout(model).items():
        value = wide(model.get_parameter(name).detach()).cpu()
        if dialect == "big_vision" and key == _POSITION and model.token is not None:
            value = value[:, 1:]
        if dialect == "big_vision" and key == "cls":
            value = value + wide(model.position.detach()).cpu()[:, :1]
        array = back.export(value, model).numpy()
        for kernel, one in zip(("query", "key", "value"), array, strict=True) if "/qkv/" in key else [("qkv", array)]:
            out[_spelled(key, dialect).replace("/qkv/", f"/{kernel}/")] = np.ascontiguousarray(one)
    target = Path(path)
    if target.suffix != ".npz":
        target = target.with_name(target.name + ".npz")
    if not target.parent.is_dir():
        raise MissingFile(f"There is no folder {target.parent}; make it first.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, **out)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _vit_inside(model: nn.Module) -> ViT:
    inside = unwrap(model)
    if not isinstance(inside, ViT):
        raise InvalidInput(f"model must be a ViT of mlcollage.nn, not {type(inside).__name__}; vit(name) makes one.")
    return inside


# --- Names -----------------------------------------------------------------------------------------------------------

_POSITION = "position"
_PREFIXES = ("opt/target/", "params/", "model/")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a tensor of the file becomes one of the model, and back."""

    to_ours: Callable[[Tensor], Tensor]
    export: Callable[[Tensor, ViT], Tensor]


def _same() -> _Kind:
    return _Kind(lambda t: t, lambda t, _: t)


def _flat() -> _Kind:
    return _Kind(lambda t: t.reshape(-1), lambda t, _: t)  # group norms of released files have shape (1, 1, 1, C)


def _matrix() -> _Kind:
    return _Kind(lambda t: t.T, lambda t, _: t.T)


def _conv() -> _Kind:
    return _Kind(lambda t: t.permute(3, 2, 0, 1), lambda t, _: t.permute(2, 3, 1, 0))  # (h, w, in, out) there


def _patch() -> _Kind:
    def export(t: Tensor, model: ViT) -> Tensor:
        p, q = model.patch_size
        return t.view(len(t), -1, p, q).permute(2, 3, 1, 0)

    return _Kind(lambda t: t.permute(3, 2, 0, 1).reshape(t.shape[3], -1), export)


def _qkv(bias: bool) -> _Kind:
    def ours(t: Tensor) -> Tensor:  # (3, width, heads, d), or (3, heads, d) for the bias
        return t.reshape(-1) if bias else t.reshape(3, t.shape[1], -1).transpose(1, 2).reshape(-1, t.shape[1])

    def export(t: Tensor, model: ViT) -> Tensor:
        width, heads = model.position.shape[2], _heads(model)
        if bias:
            return t.view(3, heads, width // heads)
        return t.view(3, width, width).transpose(1, 2).reshape(3, width, heads, width // heads)

    return _Kind(ours, export)


def _out() -> _Kind:
    def export(t: Tensor, model: ViT) -> Tensor:
        return t.T.reshape(_heads(model), -1, len(t))

    return _Kind(lambda t: t.reshape(-1, t.shape[-1]).T, export)


def _heads(model: ViT) -> int:
    return int(model.get_submodule("block1.attn").heads)  # type: ignore[arg-type]


def _layout(model: ViT) -> dict[str, tuple[str, _Kind]]:
    """Each parameter of the model with its canonical key and kind."""
    found: dict[str, tuple[str, _Kind]] = {}

    def layer(ours: str, theirs: str, kind: _Kind, bias: bool = True) -> None:
        found[f"{ours}.weight"] = (f"{theirs}/kernel", kind)
        if bias:
            found[f"{ours}.bias"] = (f"{theirs}/bias", _same())

    def norm(ours: str, theirs: str) -> None:
        found[f"{ours}.weight"], found[f"{ours}.bias"] = (f"{theirs}/scale", _flat()), (f"{theirs}/bias", _flat())

    for name, module in model.named_modules():
        if name.startswith("stem."):
            theirs = _stem_key(name)
            if isinstance(module, nn.GroupNorm):
                norm(name, theirs)
            elif hasattr(module, "weight"):
                layer(name, theirs, _conv(), bias=False)
    layer("patches.linear", "embedding", _patch())
    if model.token is not None:
        found["token"] = ("cls", _same())
    found["position"] = (_POSITION, _same())
    for i in range(model.depth):
        ours, theirs = f"block{i + 1}", f"block_{i}"
        norm(f"{ours}.ln1", f"{theirs}/ln1")
        norm(f"{ours}.ln2", f"{theirs}/ln2")
        found[f"{ours}.attn.qkv.weight"] = (f"{theirs}/qkv/kernel", _qkv(bias=False))
        found[f"{ours}.attn.qkv.bias"] = (f"{theirs}/qkv/bias", _qkv(bias=True))
        layer(f"{ours}.attn.proj", f"{theirs}/out", _out())
        layer(f"{ours}.mlp.linear1", f"{theirs}/Dense_0", _matrix())
        layer(f"{ours}.mlp.linear2", f"{theirs}/Dense_1", _matrix())
    norm("norm", "encoder_norm")
    if model.has_pre_logits:
        layer("pre_logits.0", "pre_logits", _matrix())
    layer("head", "head", _matrix())
    return found


def _stem_key(name: str) -> str:
    """``stem.stage1.unit2.conv3`` as ``block1/unit2/conv3``."""
    parts = name.split(".")[1:]
    if len(parts) == 1:
        return {"conv": "conv_root", "norm": "gn_root"}.get(parts[0], parts[0])
    if len(parts) < 3:
        return ""
    stage, unit, *layer = parts
    leaf = {"shortcut.conv": "conv_proj", "shortcut.norm": "gn_proj"}.get(".".join(layer), ".".join(layer))
    return f"{stage.replace('stage', 'block')}/{unit}/{leaf.replace('norm', 'gn')}"


def _canonical(arrays: dict[str, Array]) -> dict[str, Array]:
    """Keys without prefixes and versions; query, key and value stacked as one array."""
    found: dict[str, Array] = {}
    for key, value in arrays.items():
        short = key
        for prefix in _PREFIXES:
            short = short.removeprefix(prefix)
        short = short.removeprefix("Transformer/")
        if short in ("posembed_input/pos_embedding", "pos_embedding"):
            short = _POSITION
        short = re.sub(r"^encoderblock_(\d+)/", r"block_\1/", short)
        short = re.sub(r"/LayerNorm_0/", "/ln1/", short)
        short = re.sub(r"/LayerNorm_[12]/", "/ln2/", short)
        short = re.sub(r"/(MultiHeadDotProductAttention|MlpBlock)_\d+/", "/", short)
        if short in found:
            raise InvalidInput(f"the file holds two arrays for {short!r}, one of them {key!r}; remove one.")
        found[short] = value
    for key in [k for k in found if re.search(r"^block_\d+/query/", k)]:
        three = [key.replace("/query/", f"/{part}/") for part in ("query", "key", "value")]
        if all(k in found for k in three) and len({found[k].shape for k in three}) == 1:
            found[key.replace("/query/", "/qkv/")] = np.stack([found.pop(k) for k in three])
    return found


def _spelled(key: str, dialect: str) -> str:
    """A canonical key as a dialect spells it."""
    attn, mlp, ln2 = ("1", "3", "2") if dialect == "released" else ("0", "0", "1")
    key = re.sub(r"/ln1/", "/LayerNorm_0/", key)
    key = re.sub(r"/ln2/", f"/LayerNorm_{ln2}/", key)
    key = re.sub(r"^(block_\d+)/(qkv|out)/", rf"\1/MultiHeadDotProductAttention_{attn}/\2/", key)
    key = re.sub(r"^(block_\d+)/(Dense_\d)/", rf"\1/MlpBlock_{mlp}/\2/", key)
    key = re.sub(r"^block_(\d+)/", r"Transformer/encoderblock_\1/", key)
    key = re.sub(r"^encoder_norm/", "Transformer/encoder_norm/", key)
    if key == _POSITION:
        key = "pos_embedding" if dialect == "big_vision" else "Transformer/posembed_input/pos_embedding"
    return f"params/{key}" if dialect == "big_vision" else key


# --- Files and shapes ------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.")
    with path.open("rb") as file:
        start = file.read(64)
    size = path.stat().st_size
    advice = "download it again and compare its size with the publisher's"
    if not start.startswith(b"PK"):
        if start.lstrip()[:1] == b"<":
            what = "a web page, not weights"
        elif start.startswith(b"version https://git-lfs"):
            what, advice = "a Git LFS pointer, not the weights", "run `git lfs pull`"
        else:
            what = "empty" if not size else "no .npz file"
        raise InvalidInput(f"{path.name} ({size} bytes, beginning {start[:16]!r}) is {what}; {advice}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
            if foreign := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
                raise InvalidInput(
                    f"{path.name} ({size} bytes) is a zip archive with {foreign[0]!r}, not an .npz file of arrays; a "
                    "file of torch.save is read by torch.load(..., weights_only=True) and load_state_dict."
                )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        if "pickle" in str(error):
            raise InvalidInput(
                f"{path.name} holds pickled objects, which could run code and are not read; save plain arrays."
            ) from error
        raise InvalidInput(f"{path.name} ({size} bytes) is damaged ({error}); {advice}.") from error
    return {key: _numbers(key, value) for key, value in arrays.items()}


def _numbers(key: str, value: Array) -> Array:
    if value.dtype == np.dtype("V2"):  # bfloat16, which numpy does not know: the upper half of a float32
        return (np.ascontiguousarray(value).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if value.dtype.kind != "f":
        raise InvalidInput(f"{key!r} holds {value.dtype}; weights are floating point.")
    return value.astype(np.float32) if value.dtype == np.float16 else value


class _Loader:
    """Arrays of a file, cut to the parameters of a model; refuses those of other sizes."""

    def __init__(
        self, model: ViT, arrays: dict[str, Array], channels: str | None, grid: tuple[int, int] | None
    ) -> None:
        self.model, self.arrays, self.channels, self.grid = model, arrays, channels, grid
        self.resized: tuple[tuple[int, int], tuple[int, int]] | None = None

    def fit(self, name: str, key: str, kind: _Kind) -> Tensor:
        value, ours = torch.from_numpy(np.array(self.arrays[key])), self.model.get_parameter(name)
        if not value.isfinite().all():
            raise InvalidInput(f"{key!r} in the file holds NaN or infinite numbers.")
        if key == _POSITION:
            return self._position(value)
        if "/qkv/" in key:  # (3, width, heads, d) or (3, heads, d)
            heads = _heads(self.model)
            if value.ndim < 3 or value.shape[-2] != heads:
                raise InvalidInput(
                    f"the file's attention has {value.shape[-2]} heads and the model {heads}: flattened they would "
                    "fit, and attend wrongly; build the model with the file's heads."
                )
        if key in ("embedding/kernel", "conv_root/kernel") and value.ndim == 4:
            value = self._channels(key, value)
        try:
            moved = kind.to_ours(value)
        except (RuntimeError, IndexError):
            moved = value
        if moved.shape != ours.shape:
            hint = {
                "head": "; load with head='zero' to train a new one, or build the model with the file's classes",
                "embedding": "; the patch size or the width differs",
            }.get(key.split("/")[0], "; width, MLP or depth differ")
            raise InvalidInput(
                f"{key!r} has shape {tuple(value.shape)} in the file, which does not fit {name!r} of shape "
                f"{tuple(ours.shape)}{hint}."
            )
        return moved

    def _channels(self, key: str, value: Tensor) -> Tensor:
        have, want = value.shape[2], self.model.in_shape[0]
        stem = self.model.has_stem
        if have == want or (stem and key == "embedding/kernel"):
            return value
        if self.channels is None:
            raise InvalidInput(
                f"the file's images have {have} channels and the model's {want}; load with channels='sum' for one "
                "channel, or channels='repeat' to start from repeated kernels."
            )
        if self.channels == "sum":
            if want != 1:
                raise InvalidInput(f"channels='sum' makes one channel, but the model's images have {want}.")
            value = value.sum(2, keepdim=True)
        else:
            value = value[:, :, torch.arange(want) % have] * (have / want)
        if self.channels == "repeat" or stem:
            warnings.warn(
                "the first layer was adapted to other channels as an initialization only: its response is not "
                "preserved.",
                stacklevel=4,
            )
        return value

    def _position(self, value: Tensor) -> Tensor:
        """The position embedding for the model's grid and class token."""
        model = self.model
        if value.ndim != 3 or value.shape[0] != 1 or value.shape[2] != model.position.shape[2]:
            raise InvalidInput(
                f"the file's position embedding has shape {tuple(value.shape)}; the model's is "
                f"{tuple(model.position.shape)}."
            )
        n = value.shape[1]
        slot, grid = self._grid_of(n)
        if model.token is None:
            value = value[:, int(slot) :]
        elif not slot:  # big_vision adds positions before the class token is joined
            value = torch.cat([torch.zeros_like(value[:, :1]), value], 1)
        if grid != model.grid:
            self.resized = (grid, model.grid)
            value = resize_posemb(value, grid, model.grid, class_token=model.token is not None)
        return value

    def _grid_of(self, n: int) -> tuple[bool, tuple[int, int]]:
        """Whether the first of n positions is the class token's, and the grid of the others."""
        has_class = "cls" in self.arrays
        fits: list[tuple[bool, tuple[int, int]]] = []
        for slot in (True, False) if has_class else (False,):
            patches = n - slot
            if self.grid is not None:
                grids = {self.grid} if self.grid[0] * self.grid[1] == patches else set()
            else:
                own = self.model.grid
                grids = {own} if own[0] * own[1] == patches else set()
                root = math.isqrt(patches)
                grids |= {(root, root)} if patches and root * root == patches else set()
            fits += [(slot, grid) for grid in sorted(grids)]
        if len(fits) != 1:
            options = ", or ".join(f"{g[0]} x {g[1]}{' and a class token' if s else ''}" for s, g in fits)
            why = f"may be {options}" if fits else "are neither a square nor the model's grid"
            raise InvalidInput(
                f"the file's {n} positions {why}; say grid=(rows, columns) of the images that it was trained on."
            )
        return fits[0]


def _account(kept: list[str], left_out: list[str], strict: bool, path: Path) -> None:
    """Refuse, or warn about, what only one of file and model has."""
    if not kept and not left_out:
        return
    parts = []
    if kept:
        parts.append(f"lacks {_some(kept)} of the model")
    if left_out:
        parts.append(f"holds {_some(left_out)}, which the model has no place for")
    hint = " (the model is made with head='mlp')" if any(k.startswith("pre_logits") for k in left_out) else ""
    hint += " (the model is made with pool='token')" if "cls" in left_out else ""
    sentence = f"{path.name} {' and '.join(parts)}{hint}"
    if strict:
        raise InvalidInput(f"{sentence}; load with strict=False to take what fits.")
    warnings.warn(f"{sentence}; the rest was loaded.", stacklevel=3)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _grid(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InvalidInput(f"{name} must be (rows, columns), not {value!r}.")
    return checks.integer(f"each of {name}", value[0], least=1), checks.integer(f"each of {name}", value[1], least=1)
