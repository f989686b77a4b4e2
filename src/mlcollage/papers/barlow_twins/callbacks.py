"""The gauge in the training loops of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

import warnings
from typing import Any

from mlcollage.train import LARS, HuggingFaceCallback, LightningCallback

from .gauge import LossGauge

_CLIPPED = (
    "gradients are clipped under LARS: steps of weights do not change by that, those of biases and norms shrink; "
    "turn clipping off, or unscale and clip these only."
)


class LightningLossGauge(LightningCallback):
    """Reads and logs where the loss stands: ``Trainer(callbacks=[LightningLossGauge()])``.

    The Lightning module must hold one :class:`~mlcollage.papers.barlow_twins.loss.BarlowTwinsLoss`, whose numbers are
    logged as ``barlow/loss``, ``barlow/floor``, ``barlow/efficiency`` and so on.

    Parameters
    ----------
    every, warn
        As for :class:`~mlcollage.papers.barlow_twins.gauge.LossGauge`.

    Attributes
    ----------
    gauge : LossGauge
        The gauge, with its history.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    """

    def __init__(self, *, every: int = 50, warn: bool = True) -> None:
        self.gauge = LossGauge(every=every, warn=warn)
        self._logged = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the gauge to the module's loss."""
        self.gauge.attach(pl_module)
        if trainer.gradient_clip_val and any(isinstance(o, LARS) for o in trainer.optimizers):
            warnings.warn(_CLIPPED, stacklevel=2)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log what was read."""
        if len(self.gauge.history) > self._logged and self.gauge.last is not None:
            self._logged = len(self.gauge.history)
            pl_module.log_dict({f"barlow/{name}": value for name, value in self.gauge.last.numbers().items()})

    def on_fit_end(self, trainer: Any, pl_module: Any, exception: BaseException | None = None) -> None:
        """Stop reading."""
        self.gauge.remove()

    on_exception = on_fit_end


class HuggingFaceLossGauge(HuggingFaceCallback):
    """Reads where the loss stands and adds it to the Trainer's logs: ``Trainer(callbacks=[HuggingFaceLossGauge()])``.

    Parameters
    ----------
    every, warn
        As for :class:`~mlcollage.papers.barlow_twins.gauge.LossGauge`.

    Attributes
    ----------
    gauge : LossGauge
        The gauge, with its history.

    Raises
    ------
    MissingDependency
        If transformers is not installed.
    """

    def __init__(self, *, every: int = 50, warn: bool = True) -> None:
        self.gauge = LossGauge(every=every, warn=warn)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the gauge to the model's loss."""
        self.gauge.attach(kwargs["model"])
        inner = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        if args.max_grad_norm and isinstance(inner, LARS):
            warnings.warn(_CLIPPED, stacklevel=2)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the latest reading."""
        if logs is None or self.gauge.last is None:
            return
        numbers = {f"barlow/{name}": value for name, value in self.gauge.last.numbers().items()}
        logs.update(numbers)
        if state.log_history:  # the Trainer has copied its logs there before
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop reading."""
        self.gauge.remove()
