"""Fashion-MNIST: found where it usually lies, installed by Debian's package manager, or downloaded with a checksum."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.data._reading import first_holding
from mlcollage.errors import InvalidInput, MissingFile

__all__ = ["CLASSES", "URL", "download", "find", "load", "places", "prepare", "read_idx"]

CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
"""The authors' own copy."""

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the contents: mirrors compress them differently."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
_PACKAGE = "dataset-fashion-mnist"
_LARGEST = 64 * 1024**2  # bytes; the largest file has 47,040,016


def cache() -> Path:
    """Where :func:`download` puts the files: ``$XDG_CACHE_HOME/mlcollage/fashion-mnist``, else below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlcollage" / "fashion-mnist"


def places() -> list[Path]:
    """Folders that are looked into, in order.

    ``$MLCOLLAGE_DATA`` (itself, or a folder of the usual name in it), our cache, the folders of torchvision and Keras,
    and the one of Debian's package ``dataset-fashion-mnist``.
    """
    roots: list[Path] = []
    if named := os.environ.get("MLCOLLAGE_DATA"):
        root = Path(named).expanduser()
        roots += [root, *(root / name for name in ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"))]
    home = Path.home()
    return [
        *roots,
        cache(),
        Path("data/FashionMNIST/raw"),
        home / "data/FashionMNIST/raw",
        home / ".keras/datasets/fashion-mnist",
        DEBIAN,
    ]


def find() -> Path | None:
    """Return the first of :func:`places` that holds all four files, or None."""
    return first_holding(places(), SHA256)  # the first place that has all four files, packed or not


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, compressed (``.gz``) or not.

    The format: two zero bytes, a byte for the type (8: unsigned byte), a byte for the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the values. Everything is checked.

    Raises
    ------
    InvalidInput
        If the file is damaged, cut short or something else.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)  # a small file may unpack to any size
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path} cannot be read ({error}); delete it and run `mlcollage data prepare`.") from error
    # The first three bytes are 0, 0 and the type; the fourth is the number of dimensions.
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise InvalidInput(f"{path} is not an IDX file of bytes (it starts with {content[:4].hex(' ') or 'nothing'}).")
    header = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    expected = header + int(np.prod(shape, dtype=object))  # Python integers: damaged sizes may be huge
    if len(shape) != content[3] or len(content) != expected:
        raise InvalidInput(
            f"{path} is damaged: {' x '.join(map(str, shape))} values need {expected:,} bytes, it has "
            f"{len(content):,}; delete it and run `mlcollage data prepare`."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def load(
    folder: str | Path | None = None, *, limit: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return Fashion-MNIST with pixels in [0, 1].

    Parameters
    ----------
    folder
        Where the four IDX files are; by default wherever :func:`find` finds them.
    limit
        Only the first so many images of each part.

    Returns
    -------
    X_train, y_train, X_test, y_test
        ``(60000, 784)`` float32, int64, ``(10000, 784)`` float32, int64.

    Raises
    ------
    MissingFile
        If the files are not there.
    InvalidInput
        If they are damaged.
    """
    where = Path(folder).expanduser() if folder is not None else find()
    if where is None:
        raise MissingFile(
            "Fashion-MNIST is not on this machine; run `mlcollage data prepare`, or put the four IDX files into a "
            "folder and name it in MLCOLLAGE_DATA."
        )
    if limit is not None:
        checks.integer("limit", limit, least=1)
    parts: list[NDArray] = []
    for part in ("train", "t10k"):
        images = read_idx(_need(where, f"{part}-images-idx3-ubyte"))
        labels = read_idx(_need(where, f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() > 9:
            raise InvalidInput(
                f"{where} does not hold Fashion-MNIST: its {part} images are {images.shape}, its labels "
                f"{labels.shape} up to {labels.max()}; expected (n, 28, 28) and (n,) up to 9."
            )
        # Cut before it is made four times as large: float32 needs 4 bytes per pixel.
        pixels = np.divide(images[:limit].reshape(-1, 784), 255, dtype=np.float32)  # (n, 784) in [0, 1]
        parts += [pixels, labels[:limit].astype(np.int64)]
    return parts[0], parts[1], parts[2], parts[3]


def _need(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise MissingFile(f"{folder} holds neither {name} nor {name}.gz; expected the four files of Fashion-MNIST.")


def download(folder: Path | None = None, *, url: str = URL, timeout: float = 30.0) -> Path:
    """Fetch the four files, check each against its SHA-256, and only then move it into place.

    Parameters
    ----------
    folder
        Where to; by default :func:`cache`.
    url
        Folder of a mirror, with the ending slash.
    timeout
        Seconds without an answer before giving up.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    MissingFile
        If the mirror does not answer or does not have a file.
    InvalidInput
        If a file is not what it should be.
    """
    target = folder or cache()
    target.mkdir(parents=True, exist_ok=True)
    for name, digest in SHA256.items():
        if first_holding([target], [name]):
            continue
        # Fetched beside its place and renamed, so that a broken download leaves nothing that looks like the file.
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            fetched = Path(scratch) / f"{name}.gz"
            try:
                with urllib.request.urlopen(f"{url}{name}.gz", timeout=timeout) as answer, fetched.open("wb") as file:
                    shutil.copyfileobj(answer, file)
            except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
                raise MissingFile(f"{url}{name}.gz cannot be fetched ({error}).") from error
            if _content_hash(fetched) != digest:
                raise InvalidInput(f"{url}{name}.gz is not the original file (its SHA-256 differs); nothing was kept.")
            fetched.replace(target / fetched.name)
    return target


def _content_hash(path: Path) -> str:
    try:
        with gzip.open(path) as stream:
            return hashlib.sha256(stream.read(_LARGEST)).hexdigest()
    except (OSError, EOFError, zlib.error):
        return "not gzip"


def _install() -> str:
    """Install Debian's package; returns why not, or an empty string."""
    if shutil.which("apt-get") is None:
        return "no apt-get here"
    if os.geteuid() != 0:  # a password cannot be asked for here
        return f"`apt-get install {_PACKAGE}` needs root"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install, update = ["install", "-y", "--no-install-recommends", _PACKAGE], ["update"]
    for arguments in (install, update, install):  # package lists may be missing or old
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *arguments], env=environment, capture_output=True, timeout=300, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"apt-get: {type(error).__name__}"
        if arguments is install and done.returncode == 0:
            return ""
    return f"apt-get cannot install {_PACKAGE}"


def prepare() -> str:
    """Find Fashion-MNIST, or install or download it; returns one line that says what came of it. Never raises.

    In this order: :func:`places`; ``apt-get install dataset-fashion-mnist`` where apt and root are; :func:`download`.
    """
    if folder := find():
        return f"Fashion-MNIST: found in {folder}."
    why = _install()
    if not why and (folder := find()):
        return f"Fashion-MNIST: installed in {folder} (Debian's {_PACKAGE})."
    try:
        return f"Fashion-MNIST: downloaded to {download()}."
    except (MissingFile, InvalidInput, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        return (
            f"Fashion-MNIST: not available ({why or 'the package holds no data'}; {reason}); going on with generated "
            "data. Name a folder with the four files in MLCOLLAGE_DATA to add it."
        )
