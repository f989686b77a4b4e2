"""Tracker and penalty in the training loops of Lightning and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlcollage.data.batches import Parts, read_batch
from mlcollage.errors import InvalidInput
from mlcollage.nn import logits_of
from mlcollage.train import HuggingFaceCallback, HuggingFaceTrainer, LightningCallback

from .penalty import FisherPenalty
from .tracker import FisherTraceTracker


class LightningFisherTrace(LightningCallback, FisherTraceTracker):
    """A :class:`FisherTraceTracker` that is a Lightning ``Callback``.

    ::

        trace = LightningFisherTrace((x, y), every=50)
        Trainer(callbacks=[trace]).fit(module, loader)
        trace.history

    The module's ``forward`` must give logits. Measurements are logged as ``fisher_trace`` and are part of Lightning's
    checkpoints.

    Parameters
    ----------
    data, every, ...
        As for :class:`FisherTraceTracker`.

    Raises
    ------
    MissingDependency
        If ``lightning`` is not installed.
    """

    _last_step = -1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure if it is time."""
        if trainer.global_step == self._last_step:
            return  # gradients are accumulated
        self._last_step = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            loss = loss * trainer.accumulate_grad_batches  # Lightning has divided it for accumulation
        with torch.inference_mode(False), torch.enable_grad():  # the loop may have switched both off
            result = self.update(pl_module, trainer.global_step, loss=loss)
        if result is not None:
            pl_module.log("fisher_trace", result.value)


class HuggingFaceFisherTrace(HuggingFaceCallback, FisherTraceTracker):
    """A :class:`FisherTraceTracker` that is a Hugging Face ``TrainerCallback``: ``Trainer(callbacks=[trace])``.

    The trainer tells callbacks no loss: give it data with labels, a dict with ``labels`` among its named tensors, if it
    is to find the threshold. Fused attention is run in its plain form meanwhile.

    Parameters
    ----------
    data, every, ...
        As for :class:`FisherTraceTracker`.

    Raises
    ------
    MissingDependency
        If ``transformers`` is not installed.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is time."""
        self.update(kwargs["model"], state.global_step)


class LightningFisherPenalty(LightningCallback):
    """A penalty without double backward in a Lightning ``Trainer``; no line of the module changes.

    Its gradient is added after Lightning has accumulated and unscaled the gradients and before it clips them, once for
    each update; of accumulated batches it is taken on the last. Steps counted are part of Lightning's checkpoints.

    Parameters
    ----------
    penalty
        With ``mode="jvp"`` or ``"finite_difference"``, made for the Lightning module or a network in it. For
        ``"double_backprop"`` add it to the loss instead: ``self.penalty = FisherPenalty(self.net, ...)`` in
        ``__init__`` and ``loss + self.penalty(logits)`` in ``training_step``.
    parts
        What the parts of a batch are, where there are more than inputs and labels, as for
        :func:`~mlcollage.data.batches.read_batch`; labels are needed with ``labels="true"`` only.

    Raises
    ------
    InvalidInput
        For a penalty by double backpropagation.
    MissingDependency
        If ``lightning`` is not installed.
    """

    _current: Any = None

    def __init__(self, penalty: FisherPenalty, *, parts: Parts = None) -> None:
        if penalty.mode == "double_backprop":
            raise InvalidInput(
                "a callback cannot change the loss that Lightning differentiates: use mode='jvp' or "
                "'finite_difference', or add self.penalty(logits) to the loss in training_step."
            )
        self.penalty, self.parts = penalty, parts

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the batch for the update."""
        self._current = batch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the penalty's gradient."""
        true = self.penalty.labels == "true"
        batch = read_batch(self._current, self.parts, targets=true)
        self.penalty.add_gradient_(lambda: pl_module(*batch.args, **batch.kwargs), y=batch.y if true else None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let the last batch go."""
        self._current = None

    def state_dict(self) -> dict[str, Any]:
        """Steps counted."""
        return dict(self.penalty.get_extra_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.penalty.set_extra_state(state_dict)


def _first_logits(outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    return logits_of(outputs), inputs.get("labels")


class HuggingFaceFisherTrainer(HuggingFaceTrainer):
    """A Hugging Face ``Trainer`` whose loss has the penalty in it.

    ::

        penalty = FisherPenalty(model, 0.1)
        HuggingFaceFisherTrainer(model=model, args=arguments, train_dataset=data, penalty=penalty).train()

    Gradient accumulation, mixed precision and resuming follow the trainer: the penalty's step is its ``global_step``.
    A penalty by double backpropagation needs attention in its plain form
    (``attn_implementation="eager"``); ``mode="jvp"`` works with any. To extend a trainer of your own, derive from both:
    ``class Mine(HuggingFaceFisherTrainer, MyTrainer)``.

    Parameters
    ----------
    *args, **kwargs
        As for ``transformers.Trainer``.
    penalty
        Made for the model that will be trained, with an int as ``generator``.
    select
        From the model's outputs and inputs to logits (B, C) and class numbers (B,). Default: ``outputs.logits`` and
        ``inputs["labels"]``. For tokens, flatten them and leave out what is masked.

    Raises
    ------
    MissingDependency
        If ``transformers`` is not installed.
    """

    # What a trainer has once transformers is imported.
    args: Any
    state: Any
    accelerator: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: bool
    _prepare_inputs: Callable[[Any], Any]

    _seen_step = -1

    def __init__(
        self,
        *args: Any,
        penalty: FisherPenalty,
        select: Callable[[Any, dict[str, Any]], tuple[Tensor, Any]] = _first_logits,
        **kwargs: Any,
    ) -> None:
        self.penalty, self.select = penalty, select
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's loss, and in training the penalty."""
        given = dict(inputs)  # the trainer may take labels out of it
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training and self.penalty.mode == "double_backprop":
            self._follow_the_step()
            logits, y = self.select(outputs, given)
            value = self.penalty(logits, y=y if self.penalty.labels == "true" else None)
            loss = loss + (value if self._loss_is_divided(num_items_in_batch) else value / self._micro_batches())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's step, and the gradient of a penalty without double backpropagation."""
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.penalty.mode != "double_backprop":
            self._follow_the_step()
            given = self._prepare_inputs(inputs)
            # Of true labels the selection may depend on the outputs (masked tokens), so these are made once more.
            y = self.select(model(**given), given)[1] if self.penalty.labels == "true" else None
            self.penalty.add_gradient_(
                lambda: self.select(model(**given), given)[0],
                y=y,
                scaler=self.accelerator.scaler,
                scale=1 / self._micro_batches(),
            )
        return loss

    def _micro_batches(self) -> int:
        given = getattr(self, "current_gradient_accumulation_steps", None)  # fewer in the last step of an epoch
        return int(given or self.args.gradient_accumulation_steps)

    def _follow_the_step(self) -> None:
        self.penalty.accumulation_steps = int(self.args.gradient_accumulation_steps)
        # Set at the first micro-batch of a step: after resuming, the penalty's own count is behind.
        if self.state.global_step != self._seen_step:
            self.penalty.steps = self._seen_step = int(self.state.global_step)

    def _loss_is_divided(self, num_items_in_batch: Any) -> bool:
        """Whether the trainer itself will divide the loss by the number of micro-batches."""
        given = getattr(self, "loss_is_scaled_for_ga", None)  # only some releases of transformers say so
        if given is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            given = by_model or self.compute_loss_func is not None
        return not given
