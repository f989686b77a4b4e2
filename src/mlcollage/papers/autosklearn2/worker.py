"""Where pipelines are fitted: a process of their own, which is ended when it passes its limits (section 2.1).

It is started as ``python -m mlcollage.papers.autosklearn2.worker``: it never runs the user's script again, and works
from threads, from workers that may have no children of multiprocessing, from notebooks and from standard input.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .evaluation import Split, evaluate_steps
from .rows import TableRows
from .space import FULL_ITERATIONS, Config, Kind

_FORKS = sys.platform == "linux"
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass
class FitProblem:
    """What a worker is told once: rows, targets, folds."""

    kind: Kind
    rows: TableRows
    y: NDArray
    n_classes: int
    splits: list[Split]
    weight: NDArray[np.float64] | None
    seed: int


@dataclass
class StepMessage:
    """What a worker says after each step, and at the end."""

    what: str  # ready, step, end, memory, crash
    iterations: int = 0
    prediction: Any = None
    models: Any = None
    text: str = ""


def run_steps(problem: FitProblem, config: Config, budget: float, seconds: float) -> Iterator[StepMessage]:
    """Fit a pipeline step by step and give a message for each; it ends when the time is over between two steps.

    A step takes about as long as all before it together. One that would not be finished in time is not begun.
    """
    start, last = time.monotonic(), [time.monotonic(), 0.0]

    def go_on() -> bool:
        return time.monotonic() - start < seconds

    try:
        iterations = max(2, round(FULL_ITERATIONS[str(config["learner"])] * budget / 100))
        with np.errstate(all="ignore"):
            for step in evaluate_steps(
                config, problem.kind, problem.rows, problem.y, problem.splits, n_classes=problem.n_classes,
                sample_weight=problem.weight, iterations=iterations, seed=problem.seed, go_on=go_on,
            ):  # fmt: skip
                yield StepMessage("step", step.iterations, step.valid, [m.frozen() for m in step.models])
                if step.done:
                    yield StepMessage("end")
                    return
                now = time.monotonic()
                last = [now, now - last[0]]
                if now - start + 1.5 * last[1] > seconds:
                    break
        yield StepMessage("time")
    except MemoryError:
        yield StepMessage("memory", text="it needs more memory than it may have")
    except Exception as error:  # whatever a learner raises is a fate of this pipeline only
        yield StepMessage("crash", text=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300])


class Worker:
    """Fits pipelines in a process with hard limits on time and memory.

    A process of its own imports the libraries, takes the data once, and then forks for the fits (Linux); so one that
    was ended is followed by another within milliseconds. Elsewhere it fits itself, and is started anew.

    Parameters
    ----------
    memory_limit_mb
        Megabytes above what the libraries and the data take.
    """

    def __init__(self, memory_limit_mb: float) -> None:
        line, their_line = socket.socketpair()
        self.passing, their_passing = socket.socketpair()
        environment = {**os.environ, **dict.fromkeys(_THREADS, "1"), "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        given = [their_line.fileno(), their_passing.fileno()]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"{__package__}.worker",
                *map(str, given),
                str(memory_limit_mb),
                str(os.getpid()),
            ],
            pass_fds=given,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # it can be ended with whatever it started, and Ctrl-C reaches the parent only
        )
        their_line.close()
        their_passing.close()
        self.line = Connection(line.detach())  # to the process that forks: the data, and how a fit's process ended
        self._open()

    def _open(self) -> None:
        """Ask for a process that fits. Its connection is new: that of one that was ended may hold half a message."""
        here, there = socket.socketpair()
        with there, contextlib.suppress(OSError):
            socket.send_fds(self.passing, [b"."], [there.fileno()])
        self.connection = Connection(here.detach())
        self.pid = 0
        self.ready = False

    def give(self, problem: FitProblem) -> None:
        """Send the data, in the background: a large table would fill the pipe before the process has come up."""
        threading.Thread(target=self._send, args=(problem,), daemon=True).start()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.line.send(message)

    def wait_ready(self, timeout: float) -> bool:
        """Whether it has its libraries and the data, after at most so many seconds."""
        if not self.ready and self.connection.poll(max(timeout, 0)):
            with contextlib.suppress(EOFError, OSError):
                message = self.connection.recv()
                self.ready, self.pid = message.what == "ready", message.iterations
        return self.ready

    def run(self, config: Config, budget: float, seconds: float) -> Iterator[StepMessage]:
        """Give the messages of one pipeline; when the time is over the process is ended, and the last one says so."""
        end = time.monotonic() + seconds
        try:
            self.connection.send((config, budget, seconds))
            while True:
                # Between steps it stops by itself; the grace is for the way of the message.
                left = end - time.monotonic() + 0.1
                if left <= 0 or not self.connection.poll(left):
                    self.end_fit()
                    yield StepMessage("time", text=f"it was ended after {seconds:.3g} s")
                    return
                message = self.connection.recv()
                yield message
                if message.what != "step":
                    return
        except (EOFError, OSError):
            code = self.end_fit()
            yield StepMessage("crash", text=f"its process died ({_died(code)})")

    @property
    def alive(self) -> bool:
        """Whether it can be used again."""
        return self.process.poll() is None and not self.line.closed

    def end_fit(self) -> int | None:
        """End the process that fits, and all that it started; another one comes up. Returns how it ended."""
        if not _FORKS or not self.pid:
            return self.kill()
        _end_group(self.pid)
        code = None
        with contextlib.suppress(EOFError, OSError):
            code = self.line.recv() if self.line.poll(5.0) else None
        if code is None:  # the process that forks is gone, too
            return self.kill()
        self.connection.close()
        self._open()
        return int(code)

    def kill(self) -> int | None:
        """End all its processes and what they started."""
        if self.pid:
            _end_group(self.pid)
        if self.process.poll() is None:
            _end_group(self.process.pid)
        code, self.pid = self.process.wait(), 0
        for end in (self.connection, self.line, self.passing):
            end.close()
        return code


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _died(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def main() -> None:
    """What the process does: take the data, then fork for each connection that it is given, or serve it."""
    line, passing = Connection(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    megabytes, parent, own = float(sys.argv[3]), int(sys.argv[4]), os.getpid()
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        problem: FitProblem = line.recv()
        while True:
            _, found, _, _ = socket.recv_fds(passing, 1, 1)
            if not found:
                return
            child = os.fork() if _FORKS else 0
            if child:
                os.close(found[0])
                line.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
                continue
            if _FORKS:
                _die_with(own)
                os.setsid()
                line.close()
                passing.close()
            _serve(Connection(found[0]), problem, megabytes)
            return
    except (EOFError, OSError):
        return  # the parent is gone


def _serve(connection: Connection, problem: FitProblem, megabytes: float) -> None:
    """Fit what is asked for, until the other end is closed."""
    _limit_memory(megabytes)
    connection.send(StepMessage("ready", iterations=os.getpid()))
    while True:
        config, budget, seconds = connection.recv()
        for message in run_steps(problem, config, budget, seconds):
            connection.send(message)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with its parent (Linux); elsewhere it ends at its next message."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _limit_memory(megabytes: float) -> None:
    """The address space that is in use, and so much more."""
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm", encoding="ascii") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        limit = used + int(megabytes * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    from mlcollage.papers.autosklearn2 import worker  # so that messages are of the classes that the parent knows

    worker.main()
