"""The tracker in trainers that own the loop: Lightning and Hugging Face."""

from __future__ import annotations

from typing import Any

from torch import nn

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.papers.neural_mechanics.symmetry import SymmetrySet
from mlcollage.papers.neural_mechanics.tracker import ConservationTracker

__all__ = ["lightning_callback", "transformers_callback"]


class _Holder:
    """What both callbacks share: a tracker that is made when training starts."""

    def __init__(self, syms: SymmetrySet, model: nn.Module | None, options: dict[str, Any]) -> None:
        self.syms, self.model, self.options = syms, model, options
        self.tracker: ConservationTracker | None = None
        self.pending: dict[str, Any] | None = None

    def begin(self, model: nn.Module, optimizer: Any) -> None:
        self.end()
        self.tracker = ConservationTracker(self.model or model, optimizer, self.syms, **self.options)
        if self.pending is not None:
            self.tracker.load_state_dict(self.pending)
            self.pending = None
        self.tracker.start()

    def end(self) -> None:
        if self.tracker is not None:
            self.tracker.stop()

    def result(self, level: Any = "family") -> Any:
        if self.tracker is None:
            raise InvalidInput("nothing was measured yet; give the callback to the trainer and train.")
        return self.tracker.result(level)


def lightning_callback(syms: SymmetrySet, model: nn.Module | None = None, **options: Any) -> Any:
    """The tracker as a Lightning ``Callback``: ``Trainer(callbacks=[lightning_callback(syms)])``.

    Its ``result()`` and ``tracker`` are those of :class:`ConservationTracker`; checkpoints hold its state. Gradient
    clipping and accumulation of the trainer are seen as they are.

    Parameters
    ----------
    syms
        The laws, found on ``model``.
    model
        The network inside the Lightning module on which the laws were found; None: the Lightning module itself.
    options
        ``every``, ``mode`` and so on, as for :class:`ConservationTracker`.

    Raises
    ------
    MissingDependency
        If ``lightning`` is not installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise MissingDependency("lightning_callback needs Lightning; install it with: pip install lightning.") from None
    holder = _Holder(syms, model, options)

    class LightningConservation(Callback):
        """Conserved quantities of a Lightning module."""

        result = staticmethod(holder.result)

        @property
        def tracker(self) -> ConservationTracker | None:
            """The tracker, once training has started."""
            return holder.tracker

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) != 1:
                raise InvalidInput(
                    f"the module has {len(trainer.optimizers)} optimizers; a tracker watches one: use "
                    "ConservationTracker inside the module for each."
                )
            holder.begin(pl_module, trainer.optimizers[0])

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            holder.end()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            holder.end()

        def state_dict(self) -> dict[str, Any]:
            return {} if holder.tracker is None else holder.tracker.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            holder.pending = state_dict or None

    return LightningConservation()


def transformers_callback(syms: SymmetrySet, model: nn.Module | None = None, **options: Any) -> Any:
    """The tracker as a Hugging Face ``TrainerCallback``: ``Trainer(callbacks=[transformers_callback(syms)])``.

    Parameters as for :func:`lightning_callback`; by default the laws are those of the trainer's model. The trainer's
    optimizer is AdamW unless told otherwise: the ledger then is the exact split of each step.

    Raises
    ------
    MissingDependency
        If ``transformers`` is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise MissingDependency(
            "transformers_callback needs Transformers; install it with pip install transformers accelerate."
        ) from None
    holder = _Holder(syms, model, options)

    class TransformersConservation(TrainerCallback):
        """Conserved quantities of the model of a Hugging Face ``Trainer``."""

        result = staticmethod(holder.result)

        @property
        def tracker(self) -> ConservationTracker | None:
            """The tracker, once training has started."""
            return holder.tracker

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            holder.begin(kwargs["model"], kwargs["optimizer"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            holder.end()

    return TransformersConservation()
