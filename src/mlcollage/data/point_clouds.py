"""Point clouds as a workload: arrays, folders of meshes and scans, and the HDF5 sets of ShapeNet and ModelNet40."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.data import _meshes as mesh
from mlcollage.data._ply import read_polygons
from mlcollage.data._reading import SPLIT_NOTE, check_options, file_hash, read_npz, whole_number, with_options
from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput, MissingDependency, MissingFile

__all__ = ["PointClouds", "load_meshes", "load_modelnet40_h5", "load_shapenet_h5", "load_workload_points"]

MESHES = (".obj", ".ply", ".off", ".stl", ".glb", ".dae")
CLOUDS = (".xyz", ".npz", ".npy", ".h5")
_OPTIONS = ("n", "seed", "axes", "normalize", "test", "limit")
_REPEATED = 0.01  # share of rows that are one and the same point, above which a cloud is refused: fake returns
_FEWEST = 16
_LARGEST = 1e150


@dataclass(frozen=True)
class PointClouds(Workload):
    """Point clouds to train on and to test on; labels and parts where they are known.

    Parameters
    ----------
    clouds, test_clouds
        Arrays (S, N, D), or sequences of clouds (N_i, D): finite coordinates, D is 2 or 3, one point a row.
    labels, test_labels
        Category of each cloud, whole numbers from 0; both or neither.
    parts, test_parts
        Part of each point, one array of whole numbers (N_i,) for each cloud; both or neither.
    classes
        Names of the categories, by label.
    name, fingerprint
        As every :class:`Workload` has them.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> mine = PointClouds(rng.normal(size=(20, 50, 3)), rng.normal(size=(5, 50, 3)), name="noise")
    >>> mine.describe()["points"], mine.describe()["dimension"]
    ('50', 3)
    """

    clouds: Sequence[NDArray] | NDArray
    test_clouds: Sequence[NDArray] | NDArray
    labels: NDArray | None = None
    test_labels: NDArray | None = None
    parts: Sequence[NDArray] | NDArray | None = None
    test_parts: Sequence[NDArray] | NDArray | None = None
    classes: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """D, the coordinates of a point."""
        return int(as_array(self.clouds[0], self.name).shape[-1])

    def check(self, where: str, *, every: bool = False) -> None:
        """Look at every cloud, label and part.

        Raises
        ------
        InvalidInput
            If a cloud is no finite (N, D) array of numbers with at least 16 points, all are in one place, many are the
            same point, dimensions differ, or labels and parts do not fit the clouds.
        """
        sizes = {}
        for name, clouds in (("clouds", self.clouds), ("test_clouds", self.test_clouds)):
            try:
                size = len(clouds)
            except TypeError:
                raise InvalidInput(
                    f"{where}: {name} must be a sequence of clouds; got {type(clouds).__name__}."
                ) from None
            if not size:
                raise InvalidInput(f"{where}: {name} is empty; give at least one cloud.")
            for i, cloud in enumerate(clouds):
                sizes[name, i] = check_cloud(cloud, f"{where}: cloud {i} of {name}").shape
        dims = sorted({shape[1] for shape in sizes.values()})
        if len(dims) > 1:
            raise InvalidInput(
                f"{where}: clouds have {dims[0]} and {dims[1]} coordinates; all must have the same number."
            )
        for clouds in (self.clouds, self.test_clouds):
            warn_of_coarse(clouds, where)
        self._check_labels(where)
        self._check_parts(where, {k: v[0] for k, v in sizes.items()})

    def _check_labels(self, where: str) -> None:
        if (self.labels is None) != (self.test_labels is None):
            raise InvalidInput(f"{where}: give both labels and test_labels, or neither.")
        for name, labels, clouds in (
            ("labels", self.labels, self.clouds),
            ("test_labels", self.test_labels, self.test_clouds),
        ):
            if labels is None:
                continue
            y = as_array(labels, f"{where}: {name}")
            if y.shape != (len(clouds),) or y.dtype.kind not in "iu" or y.min() < 0:
                raise InvalidInput(
                    f"{where}: {name} must be {len(clouds)} whole numbers from 0, one for each cloud; got {y.dtype} "
                    f"{y.shape}."
                )
            if self.classes and y.max() >= len(self.classes):
                raise InvalidInput(
                    f"{where}: {name} has {y.max()}, and there are names for {len(self.classes)} classes."
                )

    def _check_parts(self, where: str, points: Mapping[tuple[str, int], int]) -> None:
        if (self.parts is None) != (self.test_parts is None):
            raise InvalidInput(f"{where}: give both parts and test_parts, or neither.")
        for name, parts, clouds in (("parts", self.parts, "clouds"), ("test_parts", self.test_parts, "test_clouds")):
            if parts is None:
                continue
            size = sum(key[0] == clouds for key in points)
            if not hasattr(parts, "__len__") or not np.shape(parts[:1]):
                raise InvalidInput(f"{where}: {name} must be a sequence of arrays, one for each cloud.")
            if len(parts) != size:
                raise InvalidInput(f"{where}: {name} has {len(parts)} items for {size} clouds.")
            for i, part in enumerate(parts):
                p = as_array(part, f"{where}: item {i} of {name}")
                if p.shape != (points[clouds, i],) or p.dtype.kind not in "iu":
                    raise InvalidInput(
                        f"{where}: item {i} of {name} must be {points[clouds, i]} whole numbers, one for each point; "
                        f"got {p.dtype} {p.shape}."
                    )

    def describe(self, *, every: bool = False) -> dict[str, Any]:
        """Numbers of clouds and points, radii, repeated points and classes in plain values."""
        self.check(self.name, every=every)
        facts = super().describe()
        clouds = [as_array(c, self.name).astype(np.float64) for part in (self.clouds, self.test_clouds) for c in part]
        sizes = [len(c) for c in clouds]
        radii = [float(np.linalg.norm(c - c.mean(0), axis=1).max()) for c in clouds]
        repeated = sum(len(c) - len(np.unique(c, axis=0)) for c in clouds)
        kinds = 0 if self.labels is None else max(len(self.classes), int(np.max(self.labels)) + 1)
        names = [str(name) for name in self.classes] or [str(k) for k in range(kinds)]
        return {
            "name": facts.pop("name"),
            "kind": "point clouds",
            "train": len(self.clouds),
            "test": len(self.test_clouds),
            "dimension": self.dim,
            "points": _range(min(sizes), max(sizes), "{:,}"),
            "radius": _range(min(radii), max(radii), "{:.3g}"),
            "repeated points": repeated,
            "classes": names if self.labels is not None else "none",
            "parts": "known" if self.parts is not None else "none",
            **facts,
        }


def _range(low: float, high: float, text: str) -> str:
    a, b = text.format(low), text.format(high)
    return a if a == b else f"{a} to {b}"


def as_array(cloud: Any, where: str) -> NDArray:
    """The cloud as an array: also tensors on other devices; not masked arrays, whose mask would be lost."""
    if isinstance(cloud, np.ma.MaskedArray) and np.ma.is_masked(cloud):
        raise InvalidInput(f"{where} has masked entries, which are no points: take cloud[~cloud.mask.any(1)].data.")
    if hasattr(cloud, "detach"):
        cloud = cloud.detach().cpu()
    try:
        return np.asarray(cloud)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{where} must be numbers (N, 2) or (N, 3), one point a row: {error}") from None


def check_cloud(cloud: Any, where: str) -> NDArray:
    """The cloud as an array; refuses what is no usable one. ``where`` begins the sentence."""
    x = as_array(cloud, where)
    if x.dtype.kind not in "fiu" or x.ndim != 2 or x.shape[1] not in (2, 3):
        hint = ""
        if x.ndim == 2 and x.shape[0] in (2, 3):
            hint = "; it looks like coordinates first: transpose it"
        elif x.ndim == 2 and x.shape[1] > 3:
            hint = "; further columns (intensity, normals) are no coordinates: take cloud[:, :3]"
        elif x.ndim == 3:
            hint = "; an organized grid is to be flattened, and its invalid pixels dropped"
        elif x.dtype.names:
            hint = f"; stack the columns that are coordinates, such as {', '.join(x.dtype.names[:3])}"
        raise InvalidInput(f"{where} must be numbers (N, 2) or (N, 3), one point a row; got {x.dtype} {x.shape}{hint}.")
    if len(x) < _FEWEST:
        raise InvalidInput(f"{where} has {len(x)} points; at least {_FEWEST} are needed.")
    bad = int((~np.isfinite(x)).any(1).sum())
    if bad:
        raise InvalidInput(f"{where} has {bad} points with NaN or infinity (nothing seen?); drop them.")
    if float(np.abs(x).max()) > _LARGEST:
        raise InvalidInput(f"{where} has coordinates beyond {_LARGEST:g}, whose squares overflow; take a larger unit.")
    values, counts = np.unique(x, axis=0, return_counts=True)
    if len(values) == 1:
        raise InvalidInput(f"{where} has all its points in one place.")
    # A small cloud that is drawn in whole rounds has each of its points as often; a fake return stands out.
    if len(x) >= 100 and counts.max() > max(2, _REPEATED * len(x), 2 * np.median(counts)):
        raise InvalidInput(
            f"{where} has the point {tuple(values[counts.argmax()].tolist())} {counts.max()} times; sensors write one "
            "point for nothing seen: drop these rows."
        )
    return x


def warn_of_coarse(clouds: Sequence[Any] | NDArray, where: str) -> None:
    """Warn once of clouds whose coordinates were rounded to a thousandth of their extent and more: maps in float32."""
    steps = []
    for cloud in clouds:
        x = as_array(cloud, where)
        step = float(np.finfo(x.dtype).eps) * float(np.abs(x).max()) if x.dtype.kind == "f" and x.size else 0.0
        steps.append(step if step > 1e-3 * float(np.ptp(x, axis=0).max(initial=0)) else 0.0)
    if any(steps):
        first = next(i for i, step in enumerate(steps) if step)
        warnings.warn(
            f"{where}: {sum(map(bool, steps))} of {len(steps)} clouds (cloud {first} first) are so far from the origin "
            f"that their type has steps of {steps[first]:.2g} there, above a thousandth of their extent; subtract the "
            "mean in float64, before the cast.",
            stacklevel=3,
        )


def largest_norm(x: NDArray) -> float:
    """The largest length of a row; exact scaling by a power of 2 keeps squares from underflow."""
    power = np.frexp(np.abs(x).max())[1]
    return float(np.ldexp(np.linalg.norm(np.ldexp(x, -power), axis=1).max(), power))


def normalize(cloud: NDArray) -> NDArray[np.float32]:
    """About its mean, and within the unit ball: one scale for all axes, so that no rotation is lost.

    Examples
    --------
    >>> float(np.linalg.norm(normalize(np.array([[10.0, 0.0], [14.0, 0.0]])), axis=1).max())
    1.0
    """
    x = np.asarray(cloud, dtype=np.float64)  # maps have coordinates of a million
    x = x - x.mean(0)
    return (x / max(largest_norm(x), 1e-300)).astype(np.float32)


def subset(cloud: NDArray, n: int, rng: np.random.Generator) -> NDArray:
    """Exactly n rows: random ones without repetition; where there are fewer, whole rounds first."""
    rounds = [rng.permutation(len(cloud)) for _ in range(-(-n // len(cloud)))]
    return cloud[np.concatenate(rounds)[:n]]


# --- meshes and scans -------------------------------------------------------------------------------------------------


def load_meshes(paths: Sequence[str | Path], n_points: int = 1024, *, seed: int = 0) -> NDArray[np.float64]:
    r"""Points drawn evenly from the surfaces of meshes, or from scans without faces: (S, n_points, 3).

    Parameters
    ----------
    paths
        OBJ, PLY, OFF, STL or GLB (through trimesh, the extra ``points``), DAE (which needs ``pycollada`` too), XYZ
        text, NPY, or NPZ with ``points``.
    n_points
        How many points of each.
    seed
        Of the draws; file i has a stream of its own.

    Raises
    ------
    MissingFile, MissingDependency, InvalidInput
        If a file is not there, cannot be read, is cut off, has no points, no area, or faces of vertices that it lacks;
        if files have different numbers of coordinates.

    Notes
    -----
    Parts of a scene are joined where its graph puts them; axes and units are left as they are. Triangles without area
    or with NaN are left out. The vertices of a mesh are no sample of it, and are not used.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "triangle.xyz"
    ...     _ = file.write_text("0 0 0\n1 0 0\n0 1 0\n")
    ...     load_meshes([file], 5).shape
    (1, 5, 3)
    """
    if isinstance(paths, str | Path):
        raise InvalidInput(f"paths must be a list of files; for a single one write [{str(paths)!r}].")
    if not len(paths):
        raise InvalidInput("there are no files to load; give at least one path.")
    _check_draw(n_points, seed)
    clouds = [_read(Path(path), n_points, np.random.default_rng([seed, i])) for i, path in enumerate(paths)]
    for path, cloud in zip(paths, clouds, strict=True):
        if cloud.shape[1] != clouds[0].shape[1]:
            raise InvalidInput(
                f"{path} has {cloud.shape[1]} coordinates, and {paths[0]} has {clouds[0].shape[1]}; load them apart."
            )
    return np.stack(clouds)


def _check_draw(n_points: int, seed: int, limit: int | None = None) -> None:
    checks.integer("n_points", n_points, least=1)
    checks.integer("seed", seed, least=0)
    if limit is not None:
        checks.integer("limit", limit, least=1)


def _read(path: Path, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if not path.is_file():
        raise MissingFile(f"there is no file {path}.")
    suffix = path.suffix.lower()
    if suffix in MESHES:
        return _mesh_points(path, n, rng)
    return subset(_scan(path, suffix), n, rng).astype(np.float64)


def _scan(path: Path, suffix: str) -> NDArray:
    if suffix == ".npz":
        found = read_npz(path)
        if "points" not in found:
            raise InvalidInput(f"{path} must hold an array points (N, 3); it holds {', '.join(found) or 'nothing'}.")
        points = found["points"]
    elif suffix == ".npy":
        try:
            points = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InvalidInput(f"{path} is no plain array of numbers ({error}).") from None
    elif suffix in (".xyz", ".txt"):
        points = _text(path)
    else:
        raise InvalidInput(f"{path} is none of {', '.join((*MESHES, *CLOUDS))}.")
    if points.dtype.kind not in "fiu":
        raise InvalidInput(f"{path} has points of type {points.dtype}; expected real numbers (N, 2) or (N, 3).")
    if points.ndim != 2 or points.shape[1] not in (2, 3) or not len(points):
        hint = "; write points[:, :3] if further columns are no coordinates" if points.ndim == 2 else ""
        raise InvalidInput(f"{path} has points {points.shape}; expected (N, 2) or (N, 3){hint}.")
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(1).sum())
        raise InvalidInput(f"{path} has {bad} points with NaN or infinity; drop them.")
    return points


def _text(path: Path) -> NDArray:
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        words = re.split(r"[\s,;]+", line.partition("#")[0].strip())
        if words == [""]:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            raise InvalidInput(f"{path}, line {number}: expected numbers, got {line[:40]!r}.") from None
        if len(rows[-1]) != len(rows[0]):
            raise InvalidInput(f"{path}, line {number}: {len(rows[-1])} columns, and {len(rows[0])} before.")
    if not rows:
        raise InvalidInput(f"{path} has no points.")
    return np.array(rows)


def _mesh_points(path: Path, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    try:
        import trimesh
    except ImportError:
        raise MissingDependency(
            f"reading {path.name} needs trimesh; install it with: pip install 'mlcollage[points]'"
        ) from None
    kind = path.suffix[1:].lower()
    if kind == "dae" and importlib.util.find_spec("collada") is None:
        raise MissingDependency(f"reading {path.name} needs pycollada; install it with: pip install pycollada")
    data = path.read_bytes()
    data = _obj(path, data) if kind == "obj" else data
    promised = _ply(path, data) if kind == "ply" else {}
    try:
        # Materials and textures are not looked for: a file that names them is read without.
        loaded = trimesh.load(io.BytesIO(data), file_type=kind, process=False)
        if isinstance(loaded, trimesh.Scene):  # parts, where the graph puts them
            loaded = loaded.to_geometry()
        corners = np.asarray(getattr(loaded, "vertices", ()), dtype=np.float64)
        faces = np.asarray(getattr(loaded, "faces", ()), dtype=np.int64)
    except Exception as error:
        # Binary files of triangles and larger polygons are not trimesh's.
        polygons = read_polygons(data) if kind == "ply" else None
        if polygons is None:
            raise InvalidInput(f"{path} cannot be read as {kind.upper()}, or is damaged: {error}") from None
        corners, faces = polygons
    if corners.ndim != 2 or not len(corners):
        raise InvalidInput(f"{path} has no vertices; it is empty, or damaged.")
    if corners.shape[1] != 3:
        raise InvalidInput(f"{path} has vertices of {corners.shape[1]} coordinates; expected 3.")
    if len(corners) < promised.get("vertex", 0) or (promised.get("face") and not faces.size):
        raise InvalidInput(f"{path} is cut off: its header promises {promised}, and {len(corners)} vertices are there.")
    if faces.size and not 0 <= faces.min() <= faces.max() < len(corners):
        wrong = faces.min() if faces.min() < 0 else faces.max()
        raise InvalidInput(f"{path} has a face with vertex {wrong}; it has {len(corners)} vertices, counted from 0.")
    if not faces.size:
        if not np.isfinite(corners).all():
            raise InvalidInput(f"{path} has points with NaN or infinity; drop them.")
        return subset(corners, n, rng)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are dropped
        area = mesh.triangle_areas(corners[None], faces)[0]
    kept = np.isfinite(area) & (area > 0)
    if not kept.any():
        raise InvalidInput(f"{path} has {len(faces)} triangles and none with an area; no surface to draw points from.")
    return mesh.sample_surface(np.nan_to_num(corners)[None], faces[kept], n, rng)[0][0]


def _obj(path: Path, data: bytes) -> bytes:
    """The text without remarks, which may end any line; faces count vertices from 1, or from the end."""
    text = re.sub(rb"#[^\r\n]*", b"", data)
    wrong = re.search(rb"^f[ \t](?:[^\r\n]*[ \t])?0(?=[/ \t\r\n]|$)", text, re.MULTILINE)
    if wrong:
        line = text.count(b"\n", 0, wrong.start()) + 1
        raise InvalidInput(f"{path}, line {line}: a face has the vertex 0; OBJ counts from 1.")
    return text


def _ply(path: Path, data: bytes) -> dict[str, int]:
    """Numbers of elements that the header promises; refuses columns and strips that would be read wrongly."""
    header, end, _ = data.partition(b"end_header")
    if not header.startswith(b"ply") or not end:
        raise InvalidInput(f"{path} is no PLY file: a header from 'ply' to 'end_header' is missing.")
    found: dict[str, int] = {}
    columns: list[str] = []
    element = ""
    for line in header.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal():
            element = words[1]
            found[element] = int(words[2])
        elif words[:1] == ["property"] and element == "vertex":
            columns.append(words[-1])
    if not {"x", "y", "z"} <= set(columns):
        raise InvalidInput(f"{path} has vertices without x, y and z; it has {', '.join(columns) or 'none'}.")
    if "tristrips" in found:
        raise InvalidInput(f"{path} holds strips of triangles, which are not read; export single triangles.")
    return found


# --- HDF5 sets --------------------------------------------------------------------------------------------------------


@contextmanager
def _h5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise MissingDependency(
            f"reading {path.name} needs h5py; install it with: pip install 'mlcollage[points]'"
        ) from None
    if not path.is_file():
        raise MissingFile(f"there is no file {path}.")
    try:
        with h5py.File(path, "r") as file:  # opened anew by each process, and closed
            yield file
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read as HDF5: {error}") from None


class HDF5Set(NamedTuple):
    """Clouds (S, N, 3) float32, labels (S,), and the names of the categories."""

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def load_shapenet_h5(
    folder: str | Path,
    split: str = "train",
    *,
    categories: Sequence[str] | None = None,
    n_points: int = 1024,
    limit: int | None = None,
    seed: int = 0,
) -> HDF5Set:
    """ShapeNet as AtlasNet's authors and Canonical Capsules have it: one HDF5 file for each category.

    Parameters
    ----------
    folder
        ``ShapeNetAtlasNetH5``, with ``train`` and ``valid`` lists ``<split>_cat.txt`` of file names (or folders
        ``train`` and ``valid`` of files). A file holds ``pcd/point/0``, ``1``, ...: (30000, 3) each.
    split
        ``"train"`` or ``"valid"``.
    categories
        Names of files without ``.h5``; all by default.
    n_points
        Points of a cloud, a random subset that is the same for the same seed and item. The official code keeps the
        first ones in testing.
    limit
        Read at most so many clouds of each category.

    Raises
    ------
    MissingFile, MissingDependency, InvalidInput
        If the list or a file is missing or a file has no ``pcd/point``, or fewer points than asked for.
    """
    root = Path(folder).expanduser()
    _check_draw(n_points, seed, limit)
    files = _listed_files(root, split)
    if isinstance(categories, str):
        raise InvalidInput(f"categories must be a list of names; for a single one write [{categories!r}].")
    if categories is not None:
        known = {file.stem: file for file in files}
        missing = [name for name in categories if name not in known]
        if missing:
            raise InvalidInput(f"{root} has no category {missing[0]!r} in {split}; it has {', '.join(known)}.")
        files = [known[name] for name in categories]
    points, labels = [], []
    for label, path in enumerate(files):
        with _h5(path) as file:
            if "pcd/point" not in file:
                raise InvalidInput(f"{path} has no group pcd/point; it has {', '.join(file) or 'nothing'}.")
            group = file["pcd/point"]
            keys = sorted(group, key=lambda key: int(key) if key.isdecimal() else -1)  # "10" comes after "9"
            for item, key in enumerate(keys[:limit]):
                cloud = np.asarray(group[key], dtype=np.float32)
                if cloud.ndim != 2 or cloud.shape[1] != 3 or not np.isfinite(cloud).all():
                    raise InvalidInput(
                        f"{path}, pcd/point/{key}: expected finite points (N, 3); got {cloud.shape}"
                        f"{'' if np.isfinite(cloud).all() else ' with NaN or infinity'}."
                    )
                if len(cloud) < n_points:
                    raise InvalidInput(f"{path}, pcd/point/{key}: {len(cloud)} points, and n_points is {n_points}.")
                points.append(subset(cloud, n_points, np.random.default_rng([seed, label, item])))
                labels.append(label)
    if not points:
        raise InvalidInput(f"{root} has no clouds in {split}.")
    return HDF5Set(np.stack(points), np.array(labels, dtype=np.int64), tuple(file.stem for file in files))


def _listed_files(root: Path, split: str) -> list[Path]:
    if not root.is_dir():
        raise MissingFile(f"there is no folder {root}.")
    listing = root / f"{split}_cat.txt"
    if listing.is_file():
        names = [line.strip() for line in listing.read_text("utf-8").splitlines() if line.strip()]
        files = [root / (name if name.endswith(".h5") else f"{name}.h5") for name in names]
        files = [f if f.is_file() else root / split / f.name for f in files]
    else:
        files = sorted((root / split).glob("*.h5"))
    if not files:
        raise MissingFile(f"{root} has neither {split}_cat.txt nor files in {split}/.")
    return files


def load_modelnet40_h5(
    folder: str | Path, split: str = "train", *, n_points: int = 1024, limit: int | None = None, seed: int = 0
) -> HDF5Set:
    """ModelNet40 in HDF5: files ``ply_data_<split>*.h5`` with ``data`` (S, 2048, 3) and ``label`` (S, 1).

    Parameters
    ----------
    folder
        ``modelnet40_ply_hdf5_2048``; ``shape_names.txt`` gives the names if it is there.
    split
        ``"train"`` or ``"test"``.
    n_points, seed
        As for :func:`load_shapenet_h5`.
    limit
        Read at most so many clouds.

    Raises
    ------
    MissingFile, MissingDependency, InvalidInput
        If no file is there, or one lacks ``data`` and ``label`` of the same length, or has fewer points than asked for.
    """
    root = Path(folder).expanduser()
    _check_draw(n_points, seed, limit)
    files = sorted(root.glob(f"ply_data_{split}*.h5"))
    if not files:
        raise MissingFile(f"{root} has no files ply_data_{split}*.h5.")
    points, labels = [], []
    for path in files:
        with _h5(path) as file:
            if not {"data", "label"} <= set(file):
                raise InvalidInput(f"{path} must have data and label; it has {', '.join(file) or 'nothing'}.")
            data, label = np.asarray(file["data"], dtype=np.float32), np.asarray(file["label"]).astype(np.int64).ravel()
        if data.ndim != 3 or data.shape[2] != 3 or len(data) != len(label):
            raise InvalidInput(f"{path} has data {data.shape} and {len(label)} labels; expected (S, N, 3) and S.")
        if not np.isfinite(data).all():
            raise InvalidInput(f"{path} has points with NaN or infinity; leave those clouds out.")
        if data.shape[1] < n_points:
            raise InvalidInput(f"{path} has clouds of {data.shape[1]} points, and n_points is {n_points}.")
        points.append(data)
        labels.append(label)
    clouds, y = np.concatenate(points)[:limit], np.concatenate(labels)[:limit]
    clouds = np.stack([subset(c, n_points, np.random.default_rng([seed, i])) for i, c in enumerate(clouds)])
    listing = root / "shape_names.txt"
    names = listing.read_text("utf-8").split() if listing.is_file() else [str(k) for k in range(int(y.max()) + 1)]
    if y.min() < 0 or y.max() >= len(names):
        raise InvalidInput(f"{root} has labels from {y.min()} to {y.max()}, and {listing.name} has {len(names)} names.")
    return HDF5Set(clouds, y, tuple(names))


# --- by name ----------------------------------------------------------------------------------------------------------


def load_workload_points(name: str, options: Mapping[str, str]) -> PointClouds:
    """``points:place``: a folder of meshes and scans, an HDF5 set, or one ``.npz`` of arrays.

    Parameters
    ----------
    name
        A folder with ``train/plane/1.obj`` and ``test/plane/2.obj``, with ``plane/1.obj``, or with files alone; the
        folder of ShapeNet's or ModelNet40's HDF5 files; or an ``.npz`` with ``points`` (S, N, D) and, if you like,
        ``labels``, ``parts``, ``test_points``, ``test_labels`` and ``test_parts``.
    options
        ``n`` points of a cloud (1,024), ``seed`` of their draw, ``normalize`` (``unit`` by default: about the mean and
        within the unit ball; ``none``), ``axes`` (``xy``, ``xz`` or ``yz``: project to two dimensions), ``test`` (share
        of the clouds to test on where there is no test set, in percent, 20 by default), ``limit`` clouds of a category.
    """
    check_options(options, _OPTIONS, f"the workload points:{name}")
    path = Path(name).expanduser()
    n, seed = whole_number(options, "n", 1024), _seed(options)
    assert n is not None
    if options.get("normalize", "unit") not in ("unit", "none"):
        raise InvalidInput(f"option normalize must be unit or none; got {options['normalize']!r}.")
    if options.get("axes", "xy") not in ("xy", "xz", "yz"):
        raise InvalidInput(f"option axes must be xy, xz or yz; got {options['axes']!r}.")
    limit = whole_number(options, "limit")
    if path.is_file() and path.suffix.lower() == ".npz":
        train, test = _from_npz(path)
        shorter = n if "n" in options else None
        train = _shortened(train, shorter, limit, seed)
        test, files = None if test is None else _shortened(test, shorter, limit, seed + 1), [path]
    elif not path.is_dir():
        raise MissingFile(f"there is no folder or .npz file {name}; it was taken from --workload.")
    elif list(path.glob("ply_data_train*.h5")):
        sets = [load_modelnet40_h5(path, split, n_points=n, limit=limit, seed=seed) for split in ("train", "test")]
        train, test = (_Part(s.points, s.labels, None, s.classes) for s in sets)
        files = sorted(path.glob("ply_data_*.h5"))
    elif (path / "train_cat.txt").is_file():
        sets = [load_shapenet_h5(path, s, n_points=n, limit=limit, seed=seed) for s in ("train", "valid")]
        names = sets[0].classes
        for name_of in sets[1].classes:
            if name_of not in names:
                raise InvalidInput(f"{path} has {name_of!r} in valid_cat.txt that train_cat.txt lacks.")
        # Each list has an order of its own, and may lack some.
        renamed = np.array([names.index(c) for c in sets[1].classes])[sets[1].labels]
        train = _Part(sets[0].points, sets[0].labels, None, names)
        test = _Part(sets[1].points, renamed, None, names)
        files = sorted(path.rglob("*.h5"))
    else:
        train, test, files = _from_folder(path, n, seed, limit)
    note = ""
    if test is None:
        share = whole_number(options, "test", 20)
        assert share is not None
        train, test = _split(train, share / 100, seed, name)
        note = SPLIT_NOTE if share == 20 else f" ({100 - share}/{share} split)"
    made = PointClouds(
        _prepared(train.clouds, options),
        _prepared(test.clouds, options),
        train.labels,
        test.labels,
        train.parts,
        test.parts,
        train.classes,
        name=with_options(f"points:{path.name}", options) + note,
        fingerprint=file_hash(*files, extra=str(sorted(options.items()))),
    )
    made.check(f"points:{name}")
    return made


def _seed(options: Mapping[str, str]) -> int:
    text = options.get("seed", "0") or "0"
    if not text.isdecimal():
        raise InvalidInput(f"option seed must be a whole number from 0; got {text!r}.")
    return int(text)


class _Part(NamedTuple):
    clouds: Sequence[NDArray] | NDArray
    labels: NDArray[np.int64] | None
    parts: Sequence[NDArray] | NDArray | None
    classes: tuple[str, ...]


def _from_npz(path: Path) -> tuple[_Part, _Part | None]:
    found = read_npz(path)
    if "points" not in found:
        raise InvalidInput(f"{path} must hold points (S, N, D); it holds {', '.join(found) or 'nothing'}.")
    for key, ndim in (("points", 3), ("test_points", 3)):
        if key in found and found[key].dtype.kind not in "fiu":
            raise InvalidInput(f"{key} of {path} is of type {found[key].dtype}; expected real numbers (S, N, D).")
        if key in found and found[key].ndim != ndim:
            raise InvalidInput(f"{key} of {path} is {found[key].shape}; expected (S, N, D), clouds of like size.")

    def part(prefix: str) -> _Part:
        labels = found.get(f"{prefix}labels")
        size = len(found[f"{prefix}points"])
        for key in (f"{prefix}labels", f"{prefix}parts"):
            if key in found and (not found[key].ndim or len(found[key]) != size):
                raise InvalidInput(f"{key} of {path} is {found[key].shape}; expected {size} items, one for each cloud.")
        return _Part(
            found[f"{prefix}points"], None if labels is None else labels.ravel(), found.get(f"{prefix}parts"), ()
        )

    return part(""), part("test_") if "test_points" in found else None


def _shortened(part: _Part, n: int | None, limit: int | None, seed: int) -> _Part:
    """At most ``limit`` clouds of a category, of n points each, with their labels and parts."""
    kept = np.arange(len(part.clouds))
    if limit is not None:
        y = np.zeros(len(kept), dtype=np.int64) if part.labels is None else part.labels
        kept = np.sort(np.concatenate([np.flatnonzero(y == label)[:limit] for label in np.unique(y)]))
    clouds = [np.asarray(part.clouds[int(i)]) for i in kept]
    parts = None if part.parts is None else [np.asarray(part.parts[int(i)]) for i in kept]
    if n is not None:
        rows = [subset(np.arange(len(c)), n, np.random.default_rng([seed, i])) for i, c in enumerate(clouds)]
        clouds = [c[row] for c, row in zip(clouds, rows, strict=True)]
        if parts is not None and all(p.ndim == 1 and len(p) > row.max() for p, row in zip(parts, rows, strict=True)):
            parts = [p[row] for p, row in zip(parts, rows, strict=True)]
    return _Part(clouds, None if part.labels is None else part.labels[kept], parts, part.classes)


def _from_folder(path: Path, n: int, seed: int, limit: int | None) -> tuple[_Part, _Part | None, list[Path]]:
    splits = {"train": path / "train", "test": path / "test"}
    if not splits["train"].is_dir():
        part, files = _folder_part(path, None, n, seed, limit)
        return part, None, files
    if not splits["test"].is_dir():
        raise InvalidInput(f"{path} has a folder train and no folder test; add one, or leave both out.")
    train, files = _folder_part(splits["train"], None, n, seed, limit)
    test, others = _folder_part(splits["test"], train.classes if train.labels is not None else None, n, seed + 1, limit)
    return train, test, files + others


def _folder_part(
    folder: Path, classes: tuple[str, ...] | None, n: int, seed: int, limit: int | None
) -> tuple[_Part, list[Path]]:
    def readable(place: Path) -> list[Path]:
        found = sorted(f for f in place.iterdir() if f.is_file() and f.suffix.lower() in (*MESHES, *CLOUDS))
        found = [f for f in found if not f.name.startswith(".")]  # what file systems leave beside files
        return [f for f in found if f.suffix.lower() != ".h5"][:limit]

    below = {d.name: files for d in sorted(folder.iterdir()) if d.is_dir() and (files := readable(d))}
    own = readable(folder)
    if own and below:
        raise InvalidInput(f"{folder} has clouds of its own and in folders; put all into folders, or none.")
    if not own and not below:
        raise InvalidInput(f"{folder} has no files {', '.join((*MESHES, *CLOUDS[:-1]))}, nor folders with such.")
    if own:
        return _Part(load_meshes(own, n, seed=seed), None, None, ()), own
    names = tuple(below) if classes is None else classes
    unknown = [name for name in below if name not in names]
    if unknown:
        raise InvalidInput(f"{folder} has a folder {unknown[0]!r} that train lacks; it has {', '.join(names)}.")
    files = [file for group in below.values() for file in group]
    labels = np.array([names.index(name) for name, group in below.items() for _ in group], dtype=np.int64)
    return _Part(load_meshes(files, n, seed=seed), labels, None, names), files


def _split(part: _Part, share: float, seed: int, name: str) -> tuple[_Part, _Part]:
    """Clouds drawn at random to test on, the same for the same seed."""
    size = len(part.clouds)
    held = round(share * size)
    if not 0 < held < size:
        raise InvalidInput(
            f"points:{name} has {size} clouds; {share:.0%} of them to test on leaves nothing: give ?test=."
        )
    order = np.random.default_rng([seed, 7]).permutation(size)
    halves = np.sort(order[held:]), np.sort(order[:held])
    made = [
        _Part(
            [part.clouds[i] for i in rows],
            None if part.labels is None else np.asarray(part.labels)[rows],
            None if part.parts is None else [part.parts[i] for i in rows],
            part.classes,
        )
        for rows in halves
    ]
    return made[0], made[1]


def _prepared(clouds: Sequence[NDArray] | NDArray, options: Mapping[str, str]) -> list[NDArray[np.float32]]:
    columns = ["xyz".index(c) for c in options["axes"]] if "axes" in options else None
    ready = []
    for cloud in clouds:
        x = np.asarray(cloud)
        if columns is not None:
            if x.ndim != 2 or x.shape[1] != 3:
                raise InvalidInput(f"?axes={options['axes']} projects three dimensions; clouds are {x.shape}.")
            x = x[:, columns]
        if x.ndim == 2 and options.get("normalize", "unit") == "unit":
            x = normalize(x)
        ready.append(np.asarray(x, dtype=np.float32))
    return ready
