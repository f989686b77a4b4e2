"""One evaluation of a pipeline and what became of it, and the file that keeps the history of a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlcollage.errors import InvalidInput, StoreError

from .space import Config, config_id

Fate = Literal["ok", "time", "memory", "crash"]


@dataclass
class PipelineTrial:
    """One evaluation.

    Parameters
    ----------
    number
        From 0, in the order in which they were begun.
    config
        The pipeline.
    origin
        Who proposed it: ``"portfolio"``, ``"search"``, ``"random"`` or ``"default"``.
    budget
        Percent of the iterations that it was given.
    fate
        ``"ok"``, or which limit it passed: ``"time"``, ``"memory"``; ``"crash"``: it raised or died. A trial that
        passed its limit after some steps has a loss all the same.
    loss
        Validation loss after the last step that was finished; None if there is none.
    iterations
        Done when it was scored.
    seconds
        How long it took.
    ended
        Seconds since the start of the run.
    message
        The error, if it failed.
    """

    number: int
    config: Config
    origin: str
    budget: float = 100.0
    fate: Fate = "ok"
    loss: float | None = None
    iterations: int = 0
    seconds: float = 0.0
    ended: float = 0.0
    message: str = ""
    prediction: NDArray[np.float64] | None = field(default=None, repr=False)
    models: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """A short name of the pipeline."""
        return config_id(self.config)

    def record(self) -> dict[str, Any]:
        """What is written down."""
        return {k: v for k, v in asdict_flat(self).items() if k not in ("prediction", "models")}


def asdict_flat(trial: PipelineTrial) -> dict[str, Any]:
    """Fields by name, without copies of arrays and models."""
    return {name: getattr(trial, name) for name in trial.__dataclass_fields__}


def key_of(**parts: Any) -> str:
    """A hash of data and settings."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(name.encode())
        if isinstance(part, np.ndarray):
            digest.update(f"{part.shape}{part.dtype}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


class RunFolder:
    """History of a run on disk: a line for each trial that ended, and its predictions; for resuming.

    Parameters
    ----------
    path
        The folder; made if it is not there.
    key
        Hash of data and settings. A folder of another run is refused.
    facts
        What the key stands for, in words, for the refusal.
    """

    def __init__(self, path: str | Path, key: str, facts: Mapping[str, Any]) -> None:
        self.path, self.key = Path(path), key
        self.notes: list[str] = []
        self.file = self.path / "history.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.file.exists():
                self._write({"key": key, **facts}, new=True)
        except OSError as error:
            raise StoreError(f"the folder {path} cannot be written ({error.strerror}); give another one.") from error

    def load(self) -> list[PipelineTrial]:
        """Trials that ended; a last line that was cut off is dropped.

        Raises
        ------
        InvalidInput
            If the folder is that of other data or settings.
        """
        lines = self.file.read_text("utf-8").split("\n")
        head = self._parsed(lines[0]) or {}
        if head.get("key") != self.key:
            raise InvalidInput(
                f"the folder {self.path} holds a run on other data or with other settings; give a new folder, or the "
                "same X, y, groups, weights and settings as before."
            )
        trials: list[PipelineTrial] = []
        for line in lines[1:]:
            if not line:
                continue
            record = self._parsed(line)
            file = self.path / f"{len(trials)}.npy"
            if record is None or (record["loss"] is not None and not file.exists()):
                self.notes.append("the last record of the history was cut off, and dropped.")
                break
            trial = PipelineTrial(**record)
            if trial.loss is not None:
                trial.prediction = np.load(file, allow_pickle=False)
            trials.append(trial)
        # What follows a damaged line is written anew.
        self._write(head, *[t.record() for t in trials], new=True)
        return trials

    def add(self, trial: PipelineTrial) -> None:
        """Write a trial down: first its predictions, then its line."""
        try:
            if trial.prediction is not None:
                temporary = self.path / f".{trial.number}.npy"
                np.save(temporary, trial.prediction)
                temporary.replace(self.path / f"{trial.number}.npy")
            self._write(trial.record())
        except OSError as error:
            raise StoreError(f"the history in {self.path} cannot be written ({error.strerror}).") from error

    def _write(self, *records: Mapping[str, Any], new: bool = False) -> None:
        text = "".join(json.dumps(r, default=_plain) + "\n" for r in records)
        if new:
            temporary = self.path / ".history"
            temporary.write_text(text, "utf-8")
            temporary.replace(self.file)
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    @staticmethod
    def _parsed(line: str) -> dict[str, Any] | None:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            return None
        return found if isinstance(found, dict) else None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
