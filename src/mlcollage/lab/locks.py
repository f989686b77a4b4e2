"""Locks of a store. They save work that two commands would do twice; that results stay whole does not rest on them.

``flock`` where the file system has it. Where it has none (Lustre without ``flock``, some network shares), a lease: a
file that its holder touches every 20 seconds, and that others take over when they have seen no touch for a minute of
their own clock. A lock's file is removed while it is held, so that 100,000 runs leave no 100,000 files.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from mlcollage.errors import StoreError
from mlcollage.lab.machine import host

LEASE_SECONDS = 60.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
_UNSURE = (*_NO_FLOCK, errno.EIO, errno.ESTALE)


class Held:
    """A lock that this process holds until :meth:`release`."""

    def __init__(self, lock: BaseFileLock, file: Path) -> None:
        self._lock, self._file = lock, file

    def release(self) -> None:
        """Let go of the lock and remove its file."""
        with suppress(OSError):
            if not isinstance(self._lock, SoftFileLease):  # a lease removes its own file
                # While it is held: who waits at the file that is gone looks again (see `_flock`).
                self._file.unlink(missing_ok=True)
        with suppress(OSError):  # a server that is away: the lock ends with this process at the latest
            self._lock.release()


class Locks:
    """The locks of a store, one for each run.

    Parameters
    ----------
    folder
        Where their files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._has_flock = True  # until its file system says otherwise
        self._watched: dict[Path, SoftFileLease] = {}  # leases of others, and since when nothing moved there

    def hold(self, name: str) -> Held | None:
        """The lock of that name, or None if another process holds it.

        Raises
        ------
        StoreError
            If the file system refuses both kinds of lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if self._has_flock:
                try:
                    return _flock(self.folder / f"{name}.lock")
                except OSError as error:
                    if isinstance(error, Timeout) or error.errno not in _NO_FLOCK:
                        raise
                    self._has_flock = False
            return self._lease(self.folder / f"{name}.lease")
        except Timeout:
            return None
        except OSError as error:
            if error.errno in _UNSURE:
                raise StoreError(
                    f"the file system of {self.folder.parent} gave no lock ({os.strerror(error.errno or 0)}); the "
                    "results in it are unharmed. Look at the share's mount options (flock) and its server, then run "
                    "again."
                ) from error
            raise

    def _lease(self, file: Path) -> Held:
        # One object for all tries: it remembers how long it has seen no touch.
        lock = self._watched.setdefault(file, SoftFileLease(file, lease_duration=LEASE_SECONDS))
        lock.acquire(timeout=0)
        del self._watched[file]
        return Held(lock, file)

    def holder(self, name: str) -> str:
        """Who holds a lock, as its holder wrote it: ``process 7 on node3, since ...``; "" if nothing is written."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = dict(json.loads((self.folder / f"{name}.lock").read_text("utf-8")))
            job = f", job {found['job']}" if found.get("job") else ""
            return f"process {found['pid']} on {found['host']}{job}, since {found['since']} by its clock"
        with suppress(OSError, ValueError):
            owner = SoftFileLease(self.folder / f"{name}.lease", lease_duration=LEASE_SECONDS).owner
            if owner is not None:
                return f"process {owner.pid} on {owner.hostname}, by a lease of {LEASE_SECONDS:.0f} s"
        return ""


def _flock(file: Path) -> Held | None:
    # Without the library's own fall-back: its marker of a process that died on another host would stay for ever.
    opened: list[int] = []

    def acquired(descriptor: int) -> None:
        opened.append(descriptor)
        _sign(descriptor)

    lock = FileLock(file, fallback_to_soft=False, on_acquired=acquired)
    lock.acquire(timeout=0)
    # The file may have been removed, and made anew by another, between our opening it and our locking it.
    if opened and not _is_at(opened[0], file):
        lock.release()
        return None  # asked again in a moment
    return Held(lock, file)


def _is_at(descriptor: int, file: Path) -> bool:
    if os.name == "nt":  # an open file cannot be removed there
        return True
    try:
        mine, there = os.fstat(descriptor), os.stat(file)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _sign(descriptor: int) -> None:
    """Write into a lock's file who holds it."""
    job = os.environ.get("SLURM_JOB_ID", "")
    text = json.dumps({"host": host(), "pid": os.getpid(), "job": job, "since": _now()}).encode()
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0) if hasattr(os, "pwrite") else os.write(descriptor, text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
