"""The boundary to code that is not ours: whatever is raised there becomes one sentence that says where."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlcollage.errors import MLCollageError, UserCodeError

_HOUSE = str(Path(__file__).parent)
_PAPERS = os.path.join(_HOUSE, "papers", "")  # a paper's study is on the other side of the boundary
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_TORCH = f"{os.sep}torch{os.sep}"
_LONGEST = 300  # characters of a message that are repeated


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turn whatever is raised inside into a :class:`UserCodeError` that names ``what``, the file and the line.

    Also ``SystemExit`` and others that are no ``Exception``; only Ctrl-C passes, and our own errors, which are
    sentences already. A folder that was changed into is left again.

    Examples
    --------
    >>> with users_code("the function f of mine.py"):
    ...     raise EOFError
    Traceback (most recent call last):
    ...
    mlcollage.errors.UserCodeError: the function f of mine.py failed with EOFError ...
    """
    try:
        folder = os.getcwd()
    except OSError:  # it was deleted
        folder = None
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, MLCollageError):
        raise
    except BaseException as error:
        raise UserCodeError(f"{what} failed with {described(error)}.") from error
    finally:
        # Paths on the command line, such as that of the results, are relative to where the command was started.
        with suppress(OSError):
            if folder is not None and os.getcwd() != folder:
                os.chdir(folder)


def described(error: BaseException, where: bool = True) -> str:
    r"""Type and message of an error in one line, and the place in the user's code, if there is one to look for.

    Examples
    --------
    >>> described(ValueError("two\nlines"))
    'ValueError: two'
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({_short(error.filename)}, line {error.lineno})"
    place = _place(error) if where else ""
    what = "out of memory" if isinstance(error, MemoryError) else type(error).__name__ + _message(error)
    return what + (f" ({place})" if place else "")


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException as second:
        if isinstance(second, KeyboardInterrupt):
            raise
        return f" (its message cannot be printed: {type(second).__name__})"
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    # Lone surrogates cannot be written to a terminal or a file.
    shown = "".join(c if c.isprintable() else "?" for c in first).rstrip(". ")
    return f": {shown[:_LONGEST]}{'…' if len(shown) > _LONGEST else ''}" if shown else ""


def _place(error: BaseException) -> str:
    """File, line and function: the user's own innermost, else where an installed package was entered."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith("<frozen") and (f.filename.startswith(_PAPERS) or not _within(f.filename, _HOUSE))
    ]
    own = [f for f in frames if not any(_within(f.filename, place) for place in _INSTALLED)]
    entered = [f for f in frames[:1] if _TORCH not in f.filename]  # torch's insides tell nothing
    found = own[-1:] or entered
    return f"{_short(found[0].filename)}, line {found[0].lineno}, in {found[0].name}" if found else ""


def _within(file: str, folder: str) -> bool:
    return file.startswith(folder.rstrip(os.sep) + os.sep)


def _short(file: str) -> str:
    """Relative to the current folder if it is below it."""
    with suppress(OSError, ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file
