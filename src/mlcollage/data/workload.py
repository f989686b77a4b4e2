"""What a study is run on: built in, or the user's own model and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from mlcollage.data._labeled import LabeledTensors
from mlcollage.errors import InvalidInput, MissingFile, UnknownName

__all__ = ["Labeled", "Workload", "arrays", "describe", "load_workload"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Base of all kinds of workload: what a study is run on.

    Parameters
    ----------
    name
        How it is called on slides and in the store.
    fingerprint
        Changes when the user's file changes, so that old results are not taken for new ones.
    """

    name: str = "workload"
    fingerprint: str = ""


@dataclass(frozen=True)
class Labeled(Workload):
    """Labeled samples to train on and to test on, and (where the study trains networks) a model.

    Parameters
    ----------
    train, test
        Map-style datasets of ``(input, label)``; inputs float tensors (images ``(channels, height, width)``
        scaled to [0, 1], tables ``(features,)``), labels integers from 0.
    num_classes
        Number of classes.
    model
        Makes a fresh ``nn.Module`` that maps a batch of inputs to logits, or None for the study's own.
    name, fingerprint
        As every :class:`Workload` has them.

    Examples
    --------
    >>> data = TensorDataset(torch.rand(20, 3), torch.arange(20) % 2)
    >>> Labeled(data, data, num_classes=2, name="noise").name
    'noise'
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    model: Callable[[], nn.Module] | None = None

    @classmethod
    def from_arrays(
        cls,
        X: NDArray,
        y: NDArray,
        X_test: NDArray,
        y_test: NDArray,
        classes: int | Sequence[str],
        *,
        name: str = "workload",
        fingerprint: str = "",
    ) -> Labeled:
        """Make a workload of arrays, inputs ``(n, ...)`` and labels ``(n,)``; ``classes`` are names or their number."""
        names = [str(k) for k in range(classes)] if isinstance(classes, int) else list(classes)
        train, test = LabeledTensors(X, y, names), LabeledTensors(X_test, y_test, names)
        return cls(train, test, len(names), name=name, fingerprint=fingerprint)


def load_workload(spec: str) -> Labeled:
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
            A function of yours without arguments that returns a :class:`Labeled`, or a dictionary (or any object)
            with ``train``, ``test``, ``num_classes`` and, if you like, ``model``.
        ``file.npz``
            Arrays ``X``, ``y`` and, if there is a test set, ``X_test``, ``y_test`` (also ``x_train``,
            ``train_images``, ...). Images are ``(n, h, w)``, ``(n, h, w, c)`` or ``(n, c, h, w)``; whole-number pixels
            are divided by 255.
        ``table.csv``, ``table.parquet``
            The label is the last column, or ``?target=name``. A column ``split`` of ``train`` and ``test``, or
            ``?test=other.csv``, gives the split. Numbers are standardized by the training rows (``?scale=none`` keeps
            them), words are one-hot encoded.
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
    from mlcollage.data import _bundled, _files, _images, _user_code

    if not isinstance(spec, str) or not spec.strip():
        raise InvalidInput(f"a workload is named by a string such as 'digits' or 'module:function'; got {spec!r}.")
    name, options = _options(spec.strip())
    path = Path(name).expanduser()
    if name.startswith("hf:"):
        from mlcollage.data import _hub

        return _hub.load(name.removeprefix("hf:"), options)
    if _bundled.knows(name):
        return _bundled.load(name, options)
    if name.partition(":")[0] in ("cifar10", "cifar100"):
        from mlcollage.data import cifar

        return cifar.workload(name.partition(":")[0], name.partition(":")[2], options)
    if name.partition(":")[0] == "tiny_imagenet":
        from mlcollage.data import tiny_imagenet

        return tiny_imagenet.workload(name.partition(":")[2], options)
    if path.is_dir():
        return _images.load(path, options)
    if path.suffix.lower() in (".npz", ".csv", ".parquet"):
        if not path.is_file():
            raise MissingFile(f"there is no file {name}; it was taken from --workload.")
        return _files.load(path, options)
    if ":" in name:
        return _user_code.load(name, options)
    if path.exists():
        raise InvalidInput(f"{name} is neither .npz, .csv nor .parquet nor a folder of images.")
    raise UnknownName(
        f"there is no workload {name!r}; expected {', '.join(_bundled.NAMES)}, cifar10:folder, cifar100:folder, "
        "tiny_imagenet:folder, module:function, a folder of images, an .npz, .csv or .parquet file, or hf:name."
    )


def _options(spec: str) -> tuple[str, dict[str, str]]:
    name, mark, query = spec.partition("?")
    if not mark:
        return name, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise InvalidInput(f"options are written ?key=value&key=value; got ?{query} in {spec!r}.") from None
    return name, dict(pairs)


def arrays(dataset: Dataset[Any], rows: int | Sequence[int] | NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Return a dataset as arrays: inputs float32 ``(n, ...)`` and labels int64 ``(n,)``.

    Parameters
    ----------
    dataset
        Map-style dataset of ``(input, label)``.
    rows
        Which samples: their indices, or a number for the first so many; by default all.

    Raises
    ------
    InvalidInput
        If there is no sample, inputs differ in shape or hold NaN or infinity, or labels are not integers from 0.

    Examples
    --------
    >>> data = TensorDataset(torch.rand(120, 4), torch.arange(120) % 3)
    >>> X, y = arrays(data, 100)
    >>> X.shape, X.dtype, y.dtype
    ((100, 4), dtype('float32'), dtype('int64'))
    """
    size = len(cast(Sized, dataset))
    wanted = np.arange(size) if rows is None else np.arange(size)[:rows] if isinstance(rows, int) else np.asarray(rows)
    if not len(wanted):
        raise InvalidInput(f"the dataset has {size} samples and rows is {rows}; nothing is left.")
    if isinstance(dataset, TensorDataset):
        index = torch.from_numpy(wanted)
        x, y = (tensor[index] for tensor in dataset.tensors)
    elif hasattr(dataset, "__getitems__"):
        blocks = [wanted[i : i + 1024].tolist() for i in range(0, len(wanted), 1024)]
        parts = [_stack(dataset.__getitems__(block), block) for block in blocks]
        x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    else:
        x, y = _stack([dataset[i] for i in wanted.tolist()], wanted.tolist())
    X, labels = x.detach().cpu().numpy().astype(np.float32), y.detach().cpu().numpy()
    if not np.isfinite(X).all():
        raise InvalidInput(f"{int((~np.isfinite(X)).sum())} input values are NaN or infinite; clean the data first.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InvalidInput(
            f"labels must be integers from 0, one per sample; got {labels.dtype} of shape {labels.shape}."
        )
    return X, labels.astype(np.int64)


def _stack(samples: list[Any], numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Pairs of one shape as one batch; ``numbers`` are the samples' places in the dataset, for messages."""
    shape = None
    for number, sample in zip(numbers, samples, strict=True):
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise InvalidInput(f"sample {number} is {type(sample).__name__}; expected a pair (input, label).")
        here = tuple(np.shape(sample[0]))
        shape = shape or here
        if here != shape:
            raise InvalidInput(f"sample {number} has shape {here}, the first one {shape}; all must be alike.")
    return torch.stack([torch.as_tensor(x) for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


def describe(workload: Labeled) -> dict[str, Any]:
    """What a workload holds, in plain values; builds the model once and tries it on two samples.

    Raises
    ------
    InvalidInput
        If the model does not map a batch to ``num_classes`` logits.

    Examples
    --------
    >>> describe(load_workload("wine"))["train"]
    133
    """
    facts: dict[str, Any] = {
        "name": workload.name,
        "train": len(cast(Sized, workload.train)),
        "test": len(cast(Sized, workload.test)),
        "shape": list(workload.train[0][0].shape),
        "num_classes": workload.num_classes,
        "classes": [str(name) for name in getattr(workload.train, "classes", range(workload.num_classes))],
        "model": "the study's own" if workload.model is None else _try_model(workload),
        "fingerprint": workload.fingerprint or "none (built in)",
    }
    return facts


def _try_model(workload: Labeled) -> str:
    x = torch.stack([workload.train[i][0] for i in (0, len(cast(Sized, workload.train)) - 1)])
    with torch.random.fork_rng(devices=[]):
        try:
            model = cast(Callable[[], nn.Module], workload.model)()
        except Exception as error:
            raise InvalidInput(f"the workload's model() failed with {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"the workload's model() must return a torch.nn.Module; got {type(model).__name__}.")
    try:
        with torch.no_grad():
            logits = model.eval()(x)
    except Exception as error:
        raise InvalidInput(
            f"the workload's model fails on inputs {tuple(x.shape)}: {type(error).__name__}: {error}."
        ) from error
    if getattr(logits, "shape", None) != (2, workload.num_classes):
        raise InvalidInput(
            f"the workload's model maps {tuple(x.shape)} to {tuple(getattr(logits, 'shape', ()))}; expected "
            f"(2, {workload.num_classes}), one logit a class."
        )
    parameters = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {parameters:,} parameters"
