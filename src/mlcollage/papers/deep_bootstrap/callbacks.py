"""The ideal twin in the training loops of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from mlcollage.errors import InvalidInput
from mlcollage.train import HuggingFaceCallback, LightningCallback

from .twin import IdealTwin


class LightningBootstrap(IdealTwin, LightningCallback):
    """The ideal twin of a Lightning module: ``Trainer(callbacks=[LightningBootstrap(world, n=..., ...)])``.

    The Lightning module's ``forward`` must give logits (or pass ``forward``), and it must have one optimizer. All
    settings are those of :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`; ``result()`` gives the curves.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    InvalidInput
        When training starts, for a module with several optimizers.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Copy the module and its optimizer."""
        if len(trainer.optimizers) != 1:
            raise InvalidInput(
                f"the module has {len(trainer.optimizers)} optimizers; the Ideal World's twin needs exactly one."
            )
        self._last = trainer.global_step
        # The twin must not drag a copy of trainer and data loaders along.
        attached, pl_module._trainer = pl_module._trainer, None
        try:
            self.start(pl_module, trainer.optimizers[0])
        finally:
            pl_module._trainer = attached

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Let the twin follow."""
        if trainer.global_step > self._last:  # not while gradients are accumulated
            self._last = trainer.global_step
            self.on_step(trainer.global_step, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the optimizer."""
        self.stop()


class HuggingFaceBootstrap(IdealTwin, HuggingFaceCallback):
    """The ideal twin of a Hugging Face model: ``Trainer(callbacks=[HuggingFaceBootstrap(world, n=..., ...)])``.

    Models that take keyword arguments need ``forward=lambda model, x: model(pixel_values=x).logits`` or the like. All
    settings are those of :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`; ``result()`` gives the curves.

    Raises
    ------
    MissingDependency
        If transformers is not installed.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the model and its optimizer."""
        self.start(kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the twin follow."""
        self.on_step(state.global_step, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self.stop()
