"""Workloads that a function of the user's returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from mlcollage._users import users_code
from mlcollage.data._reading import check_options, file_hash
from mlcollage.data.kinds import as_workload
from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput, MissingFile, UnknownName


def load(spec: str, options: Mapping[str, str]) -> Workload:
    """Call ``module:function`` or ``file.py:function`` and check what it returns."""
    check_options(options, (), f"the workload {spec}")
    given, module = call(spec, "a workload")
    where, _, _ = spec.rpartition(":")
    with users_code(f"what {spec} returned"):
        workload = as_workload(given, spec)
    workload.check(spec)
    with users_code(f"hashing the source of {where}"):
        sources = _sources(module)
        hashed = file_hash(*sources) if sources else ""
    name = spec if workload.name == "workload" else workload.name
    return replace(workload, name=name, fingerprint=workload.fingerprint or hashed)


def call(spec: str, what: str) -> tuple[Any, ModuleType]:
    """What ``module:function`` or ``file.py:function`` returns, and its module; ``what`` is what it should return."""
    where, _, name = spec.rpartition(":")
    module = _file_module(where) if where.endswith(".py") else _module(where)
    function = _function(module, where, name, what)
    with users_code(f"the function {spec}"):
        return function(), module


def _sources(module: ModuleType) -> list[Path]:
    """The module's file and the user's own files that it imports, directly or by way of others."""
    file = getattr(module, "__file__", None)
    if file is None:
        return []
    own = Path(file).resolve()
    # The top of the user's package: what lies below it is theirs, everything else is installed.
    root = own.parent
    while (root / "__init__.py").exists():
        root = root.parent
    # Where other packages are installed beside the user's, those are not followed.
    installed = str(root) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    top = own.relative_to(root).parts[0].removesuffix(".py")
    others = [p.name.partition(".")[0] for p in root.iterdir()] if installed else []
    finder = ModuleFinder(path=[str(root)], excludes=[name for name in others if name != top])  # runs nothing
    if own.suffix != ".py":  # an extension module imports nothing that could be read
        return [own]
    if root == own.parent:
        finder.run_script(str(own))
    else:  # relative imports need the module's full name
        finder.import_hook(".".join(own.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    files = (getattr(m, "__file__", None) for m in finder.modules.values())
    found = {Path(file).resolve() for file in files if file}
    return [own, *sorted(found - {own})]


def _module(name: str) -> ModuleType:
    if not all(name.split(".")):
        raise UnknownName(f"{name!r} is not the name of a module; expected module:function.")
    try:
        with _importing(name):
            return importlib.import_module(name)
    except InvalidInput as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and missing and f"{name}.".startswith(f"{missing}."):
            raise UnknownName(
                f"there is no module {missing!r}; run from the folder it is in, or install it, or name the file: "
                "path/to/file.py:function."
            ) from error
        raise


def _file_module(where: str) -> ModuleType:
    path = Path(where).expanduser()
    if not path.is_file():
        raise MissingFile(f"there is no file {where}; give the path of the file with the function.")
    name = f"mlcollage_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file always has one, with a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look it up
    with _importing(where):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importing(where: str) -> Iterator[None]:
    """Import a module of the user's; a package that it lacks is named."""
    try:
        with users_code(f"importing {where}"):
            yield
    except InvalidInput as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name:
            missing = error.__cause__.name
            raise InvalidInput(f"the module {where} needs {missing!r}, which is not installed.") from error.__cause__
        raise


def _function(module: ModuleType, where: str, name: str, what: str) -> Callable[[], Any]:
    function: Any = module
    for part in name.split("."):
        with users_code(f"looking up {name} in {where}"):
            if not hasattr(function, part):
                offered = [key for key, value in vars(module).items() if callable(value) and key[:1] != "_"]
                ours = [key for key in offered if getattr(vars(module)[key], "__module__", "") == module.__name__]
                raise UnknownName(f"{where} has no function {name!r}; it has {', '.join(ours) or 'none'}.")
            function = getattr(function, part)
    if not callable(function):
        raise InvalidInput(f"{where}:{name} is {type(function).__name__}, not a function that returns {what}.")
    try:
        with suppress(ValueError):  # some builtins do not tell
            inspect.signature(function).bind()
    except TypeError as error:
        raise InvalidInput(f"{where}:{name} must be callable without arguments ({error}).") from None
    return function
