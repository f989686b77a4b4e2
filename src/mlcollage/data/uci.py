"""UCI regression tables from the files one downloads: random splits, standardized by the training rows.

The repository is at https://archive.ics.uci.edu. Text files are read as they come: with commas, semicolons or blanks,
with or without a line of names. What comes as an Excel sheet (``concrete``, ``energy``, ``power``) is saved as CSV
first. An ``.npz`` with arrays ``x`` and ``y``, as several papers' code keeps these sets, is read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.data._reading import is_number, read_npz, standardize
from mlcollage.errors import InvalidInput, MissingFile

Floats = NDArray[np.float64]


class UCIInfo(NamedTuple):
    """What a table holds.

    Attributes
    ----------
    rows, features
        Its size.
    target
        Column of the value to predict; negative ones count from the end.
    drop
        Columns that are left out: second targets.
    what
        One line.
    """

    rows: int
    features: int
    target: int
    drop: tuple[int, ...]
    what: str


UCI: dict[str, UCIInfo] = {
    "boston": UCIInfo(506, 13, -1, (), "median value of homes, from housing.data"),
    "concrete": UCIInfo(1030, 8, -1, (), "compressive strength, from Concrete_Data.xls"),
    "energy": UCIInfo(768, 8, -2, (-1,), "heating load, from ENB2012_data.xlsx"),
    "kin8nm": UCIInfo(8192, 8, -1, (), "distance of a robot arm's end (OpenML)"),
    "naval": UCIInfo(11934, 16, -2, (-1,), "decay of a ship's compressor, from data.txt"),
    "power": UCIInfo(9568, 4, -1, (), "electric output, from Folds5x2_pp.xlsx"),
    "protein": UCIInfo(45730, 9, 0, (), "size of the residue, from CASP.csv"),
    "wine": UCIInfo(1599, 11, -1, (), "quality, from winequality-red.csv"),
    "yacht": UCIInfo(308, 6, -1, (), "resistance, from yacht_hydrodynamics.data"),
}
"""The usual benchmark tables by name."""


class UCISplit(NamedTuple):
    """Training and test rows, inputs and targets of mean 0 and standard deviation 1 over the training rows.

    Attributes
    ----------
    X_train, y_train, X_test, y_test
        ``(rows, features)`` and ``(rows,)``, float64.
    y_mean, y_scale
        Of the training targets in their own units. Predictions go back by ``y_mean + y_scale * y``; to a
        log-likelihood of standardized targets, subtract ``log(y_scale)`` for one in their units.
    """

    X_train: Floats
    y_train: Floats
    X_test: Floats
    y_test: Floats
    y_mean: float
    y_scale: float


def load(
    path: str | Path,
    name: str | None = None,
    *,
    seed: int = 0,
    test_fraction: float = 0.1,
    target: int | str | None = None,
) -> UCISplit:
    r"""Return a table's random split.

    Parameters
    ----------
    path
        The file.
    name
        One of :data:`UCI`: its size is checked, and its target known. None for any other table.
    seed
        Of the split; papers report averages over seeds 0 to 19, or fewer.
    test_fraction
        Part of the rows that is for testing.
    target
        Column to predict, by place or name; by default that of ``name``, else the last one.

    Returns
    -------
    UCISplit

    Raises
    ------
    MissingFile, UnknownName
        If there is no such file or table.
    InvalidInput
        If it holds words, missing values, constant targets, or is not the table it is said to be.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "yacht.data")
    ...     _ = path.write_text("".join(f" {i}  {i % 7} {i * i}\n" for i in range(50)))
    ...     split = load(path, seed=1)
    >>> split.X_train.shape, split.X_test.shape, round(float(split.y_train.std()), 6)
    ((45, 2), (5, 2), 1.0)
    """
    info = UCI[checks.choice("name", name, UCI)] if name is not None else None
    test_fraction = checks.probability("test_fraction", test_fraction)
    file = Path(path).expanduser()
    table = _read(file)
    if info and file.suffix.lower() == ".npz":  # x and y are told apart already, and hold one target
        info = info._replace(target=-1, drop=())
    _check_size(table, name, info, str(path))
    X, y = _parts(table, info, target, str(path))
    n_train = len(y) - max(1, round(test_fraction * len(y)))
    if n_train < 2:
        raise InvalidInput(f"{path} has {len(y)} rows; a split takes at least three.")
    # A split of its own for each seed, as the published tables average over splits.
    order = np.random.default_rng(seed).permutation(len(y))  # training rows come first
    train, test = order[:n_train], order[n_train:]
    X_train, X_test = standardize(X[train], X[test])  # both by the training rows
    mean, scale = float(y[train].mean()), float(y[train].std())
    # Constant but for rounding: to divide by it would give the rounding unit variance.
    if scale <= 1e-12 * abs(mean):
        raise InvalidInput(f"all training targets of {path} are {mean:g}; there is nothing to predict.")
    return UCISplit(X_train, (y[train] - mean) / scale, X_test, (y[test] - mean) / scale, mean, scale)


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise MissingFile(f"there is no file {path}; download the table from https://archive.ics.uci.edu.")
    if path.suffix.lower() in (".xls", ".xlsx"):
        raise InvalidInput(f"{path} is an Excel sheet; save it as CSV and name that file.")
    if path.suffix.lower() == ".npz":
        return _npz(path)
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is no text; unpack it, or save the table as CSV.") from error
    if len(lines) < 2:
        raise InvalidInput(f"{path} has {len(lines)} lines; a table is needed.")
    # The last line decides, since the first may hold names with blanks in them.
    separator = next((mark for mark in (";", ",", "\t") if mark in lines[-1].strip()), None)
    first = lines[0].split(separator) if separator else lines[0].split()
    named = not all(is_number(field.strip()) for field in first if field.strip())
    try:
        table = pd.read_csv(
            path,
            sep=separator or r"\s+",
            header=0 if named else None,
            encoding="utf-8-sig",
            skip_blank_lines=True,
            skipinitialspace=True,
        )
    except ValueError as error:  # pandas' parser errors are ValueErrors
        raise InvalidInput(f"{path} cannot be read as a table ({str(error).splitlines()[0]}).") from error
    return table.dropna(axis=1, how="all").dropna(axis=0, how="all")  # spreadsheets leave empty ones behind


def _npz(path: Path) -> pd.DataFrame:
    held = read_npz(path)
    x, y = held.get("x"), held.get("y")
    if x is None or y is None or x.ndim != 2 or y.size != len(x) or {x.dtype.kind, y.dtype.kind} - set("iuf"):
        raise InvalidInput(
            f"{path} must hold numbers x (rows, features) and y (rows,); it holds "
            f"{', '.join(f'{key} {value.shape}' for key, value in held.items()) or 'nothing'}."
        )
    return pd.DataFrame(np.column_stack([x, y.reshape(-1)]))


def _check_size(table: pd.DataFrame, name: str | None, info: UCIInfo | None, where: str) -> None:
    if info and table.shape != (info.rows, info.features + 1 + len(info.drop)):
        raise InvalidInput(
            f"{where} has {len(table)} rows and {table.shape[1]} columns; {name} has {info.rows} and "
            f"{info.features + 1 + len(info.drop)} (leave out the name to read another table)."
        )


def _parts(table: pd.DataFrame, info: UCIInfo | None, target: int | str | None, where: str) -> tuple[Floats, Floats]:
    words = [str(column) for column in table if not pd.api.types.is_numeric_dtype(table[column])]
    if words:
        raise InvalidInput(f"the column {words[0]!r} of {where} holds words; a table of numbers is needed.")
    values = table.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        raise InvalidInput(f"{where} has {int((~np.isfinite(values)).sum())} missing or infinite values.")
    if values.shape[1] < 2:
        raise InvalidInput(f"{where} has one column; features and a target are needed.")
    if isinstance(target, str):
        if target not in table.columns:
            raise InvalidInput(f"{where} has no column {target!r}; it has {', '.join(map(str, table.columns))}.")
        place = list(table.columns).index(target)
    else:
        place = target if target is not None else info.target if info else -1
    width = values.shape[1]
    if not -width <= place < width:
        raise InvalidInput(f"target={place} is no column of {where}, which has {width}.")
    # Negative numbers count from the end, as in Python: the target is usually the last column.
    left_out = {place % width, *(column % width for column in (info.drop if info else ()))}
    return values[:, [column for column in range(width) if column not in left_out]], values[:, place % width]
