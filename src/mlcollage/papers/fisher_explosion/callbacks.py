"""Tracker and penalty in the training loops of Lightning and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlcollage.errors import InvalidInput, MissingDependency

from ._gradients import logits_of
from .penalty import FisherPenalty
from .tracker import FisherTraceTracker

__all__ = ["lightning_penalty", "lightning_tracker", "transformers_tracker", "transformers_trainer"]

Batch = Callable[[Any], tuple[Any, Any]]
Select = Callable[[Any, dict[str, Any]], tuple[Tensor, Any]]


def _lightning(name: str) -> Any:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise MissingDependency(
            f"{name} needs Lightning; install it with: pip install 'mlcollage[lightning]'."
        ) from None
    return Callback


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            f"{name} needs Transformers; install it with: pip install 'mlcollage[transformers]'."
        ) from None
    return transformers


def lightning_tracker(tracker: FisherTraceTracker) -> Any:
    """The tracker as a Lightning ``Callback``: ``Trainer(callbacks=[lightning_tracker(tracker)])``.

    The module's ``forward`` must give logits. Measurements are logged as ``fisher_trace`` and are part of Lightning's
    checkpoints.

    Raises
    ------
    MissingDependency
        If ``lightning`` is not installed.
    """
    base: Any = _lightning("lightning_tracker")

    class LightningFisherTrace(base):
        """Tr(F) of a Lightning module along its training."""

        _last = -1

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == self._last:
                return  # gradients are accumulated
            self._last = trainer.global_step
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            with torch.inference_mode(False), torch.enable_grad():
                result = tracker.update(pl_module, trainer.global_step, loss=loss)
            if result is not None:
                pl_module.log("fisher_trace", result.value)

        def state_dict(self) -> dict[str, Any]:
            return tracker.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            tracker.load_state_dict(state_dict)

    return LightningFisherTrace()


def lightning_penalty(penalty: FisherPenalty, *, batch: Batch = lambda batch: (batch[0], batch[1])) -> Any:
    """A penalty without double backward as a Lightning ``Callback``; no line of the module changes.

    Its gradient is added after Lightning has accumulated and unscaled the gradients and before it clips them, once for
    each update; of accumulated batches it is taken on the last. Steps counted are part of Lightning's checkpoints.

    Parameters
    ----------
    penalty
        With ``grad="jvp"`` or ``"finite_difference"``, made for the Lightning module or a network in it. For
        ``"double_backprop"`` add it to the loss instead: ``self.penalty = FisherPenalty(self.net, ...)`` in
        ``__init__`` and ``loss + self.penalty(logits)`` in ``training_step``.
    batch
        From a batch of the loader to inputs and labels; default: the first two of it.

    Raises
    ------
    InvalidInput
        For a penalty by double backpropagation.
    MissingDependency
        If ``lightning`` is not installed.
    """
    base: Any = _lightning("lightning_penalty")
    if penalty.grad == "double_backprop":
        raise InvalidInput(
            "a callback cannot change the loss that Lightning differentiates: use grad='jvp' or 'finite_difference', "
            "or add self.penalty(logits) to the loss in training_step."
        )

    class LightningFisherPenalty(base):
        """Adds the penalty's gradient before each update."""

        _batch: Any = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self._batch = batch

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            x, y = batch(self._batch)
            penalty.step_grad(lambda: pl_module(x), y=y if penalty.labels == "true" else None)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._batch = None

        def state_dict(self) -> dict[str, Any]:
            return dict(penalty.get_extra_state())

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            penalty.set_extra_state(state_dict)

    return LightningFisherPenalty()


def transformers_tracker(tracker: FisherTraceTracker) -> Any:
    """The tracker as a Hugging Face ``TrainerCallback``: ``Trainer(callbacks=[transformers_tracker(tracker)])``.

    The trainer tells callbacks no loss: give the tracker data with labels, a dict with ``labels`` among its named
    tensors, if it is to find the threshold. Loops over fused attention are run in their plain form meanwhile.

    Raises
    ------
    MissingDependency
        If ``transformers`` is not installed.
    """
    base: Any = _transformers("transformers_tracker").TrainerCallback

    class TransformersFisherTrace(base):
        """Tr(F) of the model of a Hugging Face ``Trainer``."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tracker.update(kwargs["model"], state.global_step)

    return TransformersFisherTrace()


def _first_logits(outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    return logits_of(outputs), inputs.get("labels")


def transformers_trainer(penalty: FisherPenalty, *, base: Any = None, select: Select = _first_logits) -> Any:
    """A Hugging Face ``Trainer`` class whose loss has the penalty in it.

    ::

        Trainer = transformers_trainer(FisherPenalty(model, 0.1))
        Trainer(model=model, args=arguments, train_dataset=data).train()

    Gradient accumulation, mixed precision and resuming follow the trainer: the penalty's step is its ``global_step``.
    A penalty by double backpropagation needs attention in its plain form
    (``attn_implementation="eager"``); ``grad="jvp"`` works with any.

    Parameters
    ----------
    penalty
        Made for the model that will be trained, with an int as ``generator``.
    base
        Class to extend; default ``transformers.Trainer``.
    select
        From the model's outputs and inputs to logits (B, C) and class numbers (B,). Default: ``outputs.logits`` and
        ``inputs["labels"]``. For tokens, flatten them and leave out what is masked.

    Raises
    ------
    MissingDependency
        If ``transformers`` is not installed.
    """
    parent: Any = base or _transformers("transformers_trainer").Trainer

    class FisherTrainer(parent):
        """Trainer whose loss has a Fisher penalty."""

        _seen_step = -1

        def _micro_batches(self) -> int:
            given = getattr(self, "current_gradient_accumulation_steps", None)
            return int(given or self.args.gradient_accumulation_steps)

        def _follow_the_step(self) -> None:
            penalty.accumulation_steps = int(self.args.gradient_accumulation_steps)
            if self.state.global_step != self._seen_step:
                penalty.steps = self._seen_step = int(self.state.global_step)

        def _loss_is_divided(self, num_items_in_batch: Any) -> bool:
            """Whether the trainer itself will divide the loss by the number of micro-batches."""
            given = getattr(self, "loss_is_scaled_for_ga", None)
            if given is None:
                by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                given = by_model or self.compute_loss_func is not None
            return not given

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
        ) -> Any:
            given = dict(inputs)  # the trainer may take labels out of it
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
            )
            if model.training and penalty.grad == "double_backprop":
                self._follow_the_step()
                logits, y = select(outputs, given)
                value = penalty(logits, y=y if penalty.labels == "true" else None)
                loss = loss + (value if self._loss_is_divided(num_items_in_batch) else value / self._micro_batches())
            return (loss, outputs) if return_outputs else loss

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if penalty.grad != "double_backprop":
                self._follow_the_step()
                given = self._prepare_inputs(inputs)
                y = select(model(**given), given)[1] if penalty.labels == "true" else None
                penalty.step_grad(
                    lambda: select(model(**given), given)[0],
                    y=y,
                    scaler=self.accelerator.scaler,
                    scale=1 / self._micro_batches(),
                )
            return loss

    return FisherTrainer
