"""Workloads by name: what ``--workload`` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar, overload
from urllib.parse import parse_qsl

from mlcollage.data import _bundled, _files, _hub, _images, _user_code, cifar, point_clouds, tiny_imagenet, trajectories
from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput, UnknownName

Options = Mapping[str, str]
W = TypeVar("W", bound=Workload)


class _Loader(NamedTuple):
    """One way to name a workload."""

    takes: Callable[[str, Path], bool]  # of the name, and the same as a path
    load: Callable[[str, Options], Workload]


def _after_prefix(name: str) -> str:
    return name.partition(":")[2]


# Tried in this order: built-in names come before files, and a colon means a function only where nothing else fits.
_LOADERS = (
    _Loader(lambda name, _: name.startswith("tracks:"), lambda name, o: trajectories.load(_after_prefix(name), o)),
    _Loader(lambda name, _: name.startswith("hf:"), lambda name, o: _hub.load(_after_prefix(name), o)),
    _Loader(
        lambda name, _: name.startswith("points:"),
        lambda name, o: point_clouds.load_workload_points(_after_prefix(name), o),
    ),
    _Loader(lambda name, _: _bundled.knows(name), _bundled.load),
    _Loader(
        lambda name, _: name.partition(":")[0] in cifar.SETS,
        lambda name, o: cifar.workload(name.partition(":")[0], _after_prefix(name), o),
    ),
    _Loader(
        lambda name, _: name.partition(":")[0] == "tiny_imagenet",
        lambda name, o: tiny_imagenet.workload(_after_prefix(name), o),
    ),
    _Loader(lambda _, path: _hub.saved(path), _hub.load),
    _Loader(lambda _, path: path.is_dir(), _images.load),
    _Loader(lambda _, path: path.suffix.lower() in _files.SUFFIXES, _files.load),
    _Loader(lambda name, _: ":" in name, _user_code.load),
)


@overload
def load_workload(spec: str) -> Workload: ...


@overload
def load_workload(spec: str, kind: type[W]) -> W: ...


def load_workload(spec: str, kind: type[Workload] = Workload) -> Workload:
    """Load what ``--workload`` names.

    Parameters
    ----------
    spec
        One of the following; options follow a ``?``, several are joined by ``&``.

        ``digits``, ``fashion_mnist``, ``mnist1d``, ``breast_cancer``, ``wine``, ``iris``
            Built in.
        ``glyphs``, ``glyphs:easy16``
            :class:`~mlcollage.data.glyphs.GlyphWorld`; ``n`` and ``test`` say how many images, and every setting that
            is a number or a word is an option: ``glyphs:easy16?n=2000&test=500&label_noise=0.2``.
        ``module:function``, ``file.py:function``
            A function of yours without arguments that returns a workload of any kind, or a dictionary (or any object)
            with its fields: ``train``, ``test``, ``num_classes`` and, if you like, ``model`` (and ``other_model``, for
            studies that compare two networks) for a :class:`~mlcollage.data.workload.Labeled`.
        ``file.npz``
            Arrays ``X``, ``y`` and, if there is a test set, ``X_test``, ``y_test`` (also ``x_train``,
            ``train_images``, ...). Images are ``(n, h, w)``, ``(n, h, w, c)`` or ``(n, c, h, w)``; whole-number pixels
            are divided by 255.
        ``table.csv``, ``table.parquet``
            The label is the last column, or ``?target=name``. A column ``split`` (or ``?split=name``) of ``train`` and
            ``test``, or ``?test=other.csv``, gives the split. Numbers are standardized by the training rows
            (``?scale=none`` keeps them), words are one-hot encoded (``?words=a,b`` says which columns are). For CSV
            ``?sep=semicolon``, ``?na=-999``, ``?decimal=,`` and ``?thousands=.`` say how it is written.
        a folder of images
            ``train/cat/1.png`` and ``test/cat/2.png``, or ``cat/1.png``. ``?size=32`` cuts and resizes to squares,
            ``?channels=1`` or ``3`` converts. Images are decoded when they are asked for.
        ``cifar10:folder``, ``cifar100:folder``
            :mod:`~mlcollage.data.cifar` from the folder of its binary version, a folder of images, a saved Hugging Face
            set or an ``.npz``; without a folder from where it usually lies. ``?n=5000&test=1000`` takes the first so
            many, ``?labels=coarse`` the 20 coarse classes of CIFAR-100.
        ``tiny_imagenet:folder``
            :mod:`~mlcollage.data.tiny_imagenet` from the folder ``tiny-imagenet-200``, or from where it usually lies.
            ``?per_class=50`` takes the first so many images of each class.
        ``hf:name``, ``hf:name:configuration``, ``hf:folder``
            A data set of the Hugging Face hub, or one saved to a folder (``save_to_disk``, Parquet files); needs the
            extra ``hub``. ``?label=column``, ``?image=column``, ``?size=32``.
        ``tracks:file.csv?id=..&frame=..&x=..&y=..``
            :class:`~mlcollage.data.trajectories.Trajectories` from a table with a row for each agent and frame (also
            ``.parquet``). ``sequence`` and ``time`` name further columns; ``fps``, ``window`` (frames of a sequence),
            ``stride``, ``agents``, ``units``, and ``length`` and ``width`` of the court are values.
            ``tracks:file.npz?layout=NTKD`` reads an array ``tracks``, ``tracks:file.json?team=home`` SportVU's games.
        ``points:folder``, ``points:file.npz``
            A :class:`~mlcollage.data.point_clouds.PointClouds`: a folder of meshes and scans, the HDF5 sets ShapeNet
            and ModelNet40, or arrays; needs the extra ``points``. ``?n=1024`` points of a cloud, ``?axes=xz``.
    kind
        The kind of workload that is needed, such as ``Labeled``; another one is refused. By default any.

        Data without a test set are split 80 : 20 at random, always the same way, with the classes in proportion; the
        name says so. Labels of any kind become 0, 1, ...; ``train.classes`` keeps what they were called.

    Raises
    ------
    UnknownName, MissingFile, InvalidInput, MissingDependency
        One sentence that says what is wrong with the name, the file or what is in it.

    Examples
    --------
    >>> workload = load_workload("glyphs:easy16?n=100&test=50")
    >>> len(workload.train), workload.test[0][0].shape, workload.num_classes
    (100, torch.Size([1, 16, 16]), 10)
    """
    if not isinstance(spec, str) or not spec.strip():
        raise InvalidInput(f"a workload is named by a string such as 'digits' or 'module:function'; got {spec!r}.")
    name, options = _options(spec.strip())
    path = Path(name).expanduser()
    for loader in _LOADERS:
        if loader.takes(name, path):
            workload = loader.load(name, options)
            if not isinstance(workload, kind):
                raise InvalidInput(f"{spec} is {type(workload).__name__}, and {kind.__name__} is needed.")
            return workload
    if path.exists():
        raise InvalidInput(f"{name} is neither .npz, .csv nor .parquet nor a folder of images.")
    raise UnknownName(
        f"there is no workload {name!r}; expected {', '.join(_bundled.NAMES)}, cifar10:folder, cifar100:folder, "
        "tiny_imagenet:folder, module:function, a folder of images, an .npz, .csv or .parquet file, hf:name, "
        "tracks:file or points:folder."
    )


def _options(spec: str) -> tuple[str, dict[str, str]]:
    name, mark, query = spec.partition("?")
    if not mark:
        return name, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise InvalidInput(f"options are written ?key=value&key=value; got ?{query} in {spec!r}.") from None
    options = dict(pairs)
    if twice := [key for key in options if [k for k, _ in pairs].count(key) > 1]:
        raise InvalidInput(f"option {twice[0]} is given twice in {spec!r}; give it once.")
    return name, options
