"""The tracker in trainers that own the loop: Lightning and Hugging Face."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.train import HuggingFaceCallback, LightningCallback

from .symmetry import SymmetrySet
from .tracker import ConservationTracker


class _Tracking:
    """What both callbacks share: a tracker that is made when training starts."""

    def __init__(self, symmetries: SymmetrySet, model: nn.Module | None = None, **options: Any) -> None:
        self.symmetries, self.model, self.options = symmetries, model, options
        self.tracker: ConservationTracker | None = None
        self._pending: dict[str, Any] = {}

    def result(self, level: Literal["family", "law"] = "family") -> pd.DataFrame:
        """What has been measured so far, as :meth:`ConservationTracker.result`."""
        if self.tracker is None:
            raise InvalidInput("nothing was measured yet; give the callback to the trainer and train.")
        return self.tracker.result(level)

    def _begin(self, model: nn.Module, optimizer: Any, scaler: Any, world_size: int) -> None:
        self._end()
        options = {"scaler": scaler, **self.options}
        if options.get("clipping") and world_size > 1:
            raise InvalidInput(
                f"clipping=True keeps gradients as backward gave them, which of {world_size} processes are not yet "
                "averaged; leave it out."
            )
        self.tracker = ConservationTracker(self.model or model, optimizer, self.symmetries, **options)
        if self._pending:
            self.tracker.load_state_dict(self._pending)
            self._pending = {}
        self.tracker.start()

    def _end(self) -> None:
        if self.tracker is not None:
            self.tracker.stop()


class LightningConservation(_Tracking, LightningCallback):
    """The tracker as a Lightning ``Callback``: ``Trainer(callbacks=[LightningConservation(symmetries)])``.

    Checkpoints hold the tracker's state. Gradient clipping and accumulation of the trainer are seen as they are; its
    ``GradScaler`` is the tracker's.

    Parameters
    ----------
    symmetries
        The laws, found on ``model``.
    model
        The network inside the Lightning module on which the laws were found; None: the Lightning module itself.
    options
        ``every``, ``mode`` and so on, as for :class:`ConservationTracker`.

    Attributes
    ----------
    tracker
        The :class:`ConservationTracker`; None before training.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the tracker."""
        if len(trainer.optimizers) != 1:
            raise InvalidInput(
                f"the module has {len(trainer.optimizers)} optimizers; a tracker watches one: use "
                "ConservationTracker inside the module for each."
            )
        self._begin(pl_module, trainer.optimizers[0], trainer.scaler, trainer.world_size)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the tracker."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop the tracker."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """The tracker's state."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a tracker's state for when training starts."""
        self._pending = state_dict


class HuggingFaceConservation(_Tracking, HuggingFaceCallback):
    """The tracker as a Hugging Face ``TrainerCallback``: ``Trainer(callbacks=[HuggingFaceConservation(symmetries)])``.

    The trainer's optimizer is AdamW unless told otherwise: the ledger then is the exact split of each step.

    Parameters
    ----------
    symmetries, model, options
        As for :class:`LightningConservation`; by default the laws are those of the trainer's model.

    Attributes
    ----------
    tracker
        The :class:`ConservationTracker`; None before training.

    Raises
    ------
    MissingDependency
        If Transformers is not installed.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the tracker."""
        optimizer = kwargs["optimizer"]  # accelerate's, which holds the scaler
        self._begin(kwargs["model"], optimizer, getattr(optimizer, "scaler", None), args.world_size)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the tracker."""
        self._end()
