"""What mlcollage raises: one clear sentence that says what was wrong, what was expected and what to do.

Each type is also the standard one, so ``except ValueError`` and friends work as users expect.
"""


class MLCollageError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""

    exit_code = 2


class InvalidInput(MLCollageError, ValueError):
    """A value, shape, type or setting that the called function cannot use."""


class UnknownName(InvalidInput, LookupError):
    """A paper, arm, metric, scale or data source that does not exist."""


class UserCodeError(InvalidInput):
    """Code that is not ours (a workload's function, dataset or model, a plug-in's study) raised or did not fit.

    The message names what was called, and the file and line; ``__cause__`` is what was raised.
    """


class MissingFile(MLCollageError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class MissingDependency(MLCollageError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


class StoreError(MLCollageError, OSError):
    """The results folder cannot be read or written (a full disk, permissions, a damaged file)."""


class RunFailed(MLCollageError, RuntimeError):
    """One or more runs of a study failed; what finished is kept."""

    exit_code = 1
