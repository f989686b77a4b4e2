"""Engines by name, and their settings from options and from a file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlcollage._checks import choice
from mlcollage.errors import InvalidInput, MissingFile, UnknownName
from mlcollage.lab.engine import Engine, LocalEngine
from mlcollage.lab.ray import RayEngine, RaySettings
from mlcollage.lab.slurm import SlurmEngine, SlurmSettings

NAMES = ("local", "slurm", "ray")
SETTINGS_FILE = "mlcollage.toml"


def get_engine(name: str, *, workers: int | None = None, **settings: Any) -> Engine:
    """The engine of that name.

    Parameters
    ----------
    name
        ``local``, ``slurm`` or ``ray``.
    workers
        Cores at a time, of this machine (``local``) or of a Ray cluster that is started here.
    settings
        Fields of :class:`~mlcollage.lab.slurm.SlurmSettings` or :class:`~mlcollage.lab.ray.RaySettings`.

    Raises
    ------
    UnknownName
        If there is no such engine or setting.
    """
    if name not in NAMES:
        raise UnknownName(f"there is no engine {name!r}; available: {', '.join(NAMES)}.")
    if name == "slurm":
        if workers is not None:
            raise InvalidInput("engine slurm takes no number of workers; say parallel=..., the tasks at a time.")
        return SlurmEngine(_settings(SlurmSettings, settings))
    if name == "ray":
        return RayEngine(_settings(RaySettings, settings if workers is None else {"cpus": workers, **settings}))
    if settings:
        raise UnknownName(f"engine local has no settings, so not {', '.join(settings)} either; it takes workers.")
    return LocalEngine(workers=workers)


def _settings(kind: Any, given: Mapping[str, Any]) -> Any:
    for key in given:
        choice(f"the setting of engine {kind.engine}", key, [f.name for f in dataclasses.fields(kind)])
    return kind(**given)


def read_settings(name: str, options: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Settings of an engine: those of the file's table of its name, then ``key=value`` options, which win.

    Parameters
    ----------
    name
        The engine.
    options
        ``"partition=gpu"`` and so on.
    file
        A TOML file; by default ``mlcollage.toml`` in the current folder, if there is one.

    Raises
    ------
    MissingFile
        If a file that was named is not there.
    InvalidInput
        If it is no TOML, or an option cannot be read.
    """
    kind = {"slurm": SlurmSettings, "ray": RaySettings}.get(name)
    given: dict[str, Any] = {}
    if file is not None and not file.exists():
        raise MissingFile(f"there is no file {file}; name the TOML file with the engine's settings.")
    if kind is not None and (place := file or Path(SETTINGS_FILE)).exists():
        try:
            given |= tomllib.loads(place.read_text("utf-8")).get(name, {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{place} is no TOML file ({error}); correct it.") from error
    hints = {} if kind is None else get_type_hints(kind)
    for option in options:
        key, sign, value = option.partition("=")
        if not sign:
            raise InvalidInput(f"the engine's option {option!r} must be NAME=VALUE, for instance partition=gpu.")
        if hints:
            choice(f"the setting of engine {name}", key, [f.name for f in dataclasses.fields(kind)])  # type: ignore[arg-type]
        given[key] = _value(key, value, hints.get(key, str))
    return given


def _value(key: str, text: str, kind: Any) -> Any:
    kinds = [k for k in get_args(kind) if k is not type(None)] if type(None) in get_args(kind) else [kind]
    wanted = kinds[0]
    try:
        if wanted in (int, float):
            return wanted(text)
    except ValueError as error:
        raise InvalidInput(f"the engine's setting {key} must be a number, not {text!r}.") from error
    if get_origin(wanted) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if get_origin(wanted) is not None:  # a table
        raise InvalidInput(f"the engine's setting {key} is a table; write it into {SETTINGS_FILE}.")
    return text
