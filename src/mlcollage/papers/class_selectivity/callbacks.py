"""The regularizer in the training loops of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.data.batches import DataBatch, Parts, read_batch
from mlcollage.errors import InvalidInput
from mlcollage.measure.layer_tap import Layers
from mlcollage.train import HuggingFaceCallback, LightningCallback
from mlcollage.train.loop import evaluating

from .regularizer import Alpha, SelectivityRegularizer


class LightningSelectivity(LightningCallback):
    """Adds the selectivity term to the loss of a Lightning module: ``Trainer(callbacks=[LightningSelectivity(-2.0)])``.

    The term is added to the loss that ``training_step`` returns (a tensor, or a dictionary with ``"loss"``), so that
    Lightning weighs it as the loss in accumulated batches; its mean index is logged as ``selectivity``. The module is
    left as it was when training ends.

    Parameters
    ----------
    alpha, layers, options
        As for :class:`~mlcollage.papers.class_selectivity.regularizer.SelectivityRegularizer`: negative
        discourages selectivity.
    parts
        What the parts of a batch are, where there are more than inputs and targets, as for
        :func:`~mlcollage.data.batches.read_batch`.
    model
        Takes the Lightning module and gives the network that ``training_step`` calls, e.g. ``lambda m: m.net``; default
        the module itself, which suits steps that call ``self(x)``.

    Attributes
    ----------
    regularizer
        The :class:`~mlcollage.papers.class_selectivity.regularizer.SelectivityRegularizer`; None before training.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    """

    regularizer: SelectivityRegularizer | None = None

    def __init__(
        self,
        alpha: Alpha,
        layers: Layers = "relu",
        *,
        parts: Parts = None,
        model: Callable[[Any], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self.alpha, self.layers, self.options = alpha, layers, options
        self.parts, self.model = parts, model

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Read the layers, and put the term into the module's training step."""
        network = pl_module if self.model is None else self.model(pl_module)
        regularizer = self.regularizer = SelectivityRegularizer(network, self.alpha, self.layers, **self.options)
        batch_now: list[DataBatch] = []
        if "mask" not in self.options:  # the batch knows it, whatever the network is given of it
            given = regularizer.mask
            regularizer.mask = lambda *a, **k: (
                batch_now[0].check_mask(regularizer.model).mask if batch_now else given(*a, **k)
            )
        step = pl_module.training_step

        # Put on the object, not on its class: other modules of the class train as they did.
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            batch_now[:] = [read_batch(batch, self.parts)]
            result = step(batch, *args, **kwargs)
            if result is None:  # Lightning skips such a batch
                return result
            loss = result["loss"] if isinstance(result, dict) else result
            term = regularizer(batch_now[0].y, loss)
            last = regularizer.last.values()
            pl_module.log("selectivity", sum(last) / len(last))
            return {**result, "loss": loss + term} if isinstance(result, dict) else loss + term

        pl_module.training_step = training_step

    def on_fit_end(self, trainer: Any, pl_module: Any, exception: BaseException | None = None) -> None:
        """Take the hooks and the term away."""
        if self.regularizer is not None:
            self.regularizer.remove()
            pl_module.__dict__.pop("training_step", None)

    on_exception = on_fit_end


class HuggingFaceSelectivity(HuggingFaceCallback):
    """Adds the term to the loss of a Hugging Face model: ``Trainer(callbacks=[HuggingFaceSelectivity(-2.0, ...)])``.

    The term is added to the loss that the model returns when it is given ``labels`` in training. Transformers have
    GELUs: name the layers, such as ``"*intermediate_act_fn"``, and a sign policy, ``negative="relu"``.

    Parameters
    ----------
    alpha, layers, options
        As for :class:`~mlcollage.papers.class_selectivity.regularizer.SelectivityRegularizer`: negative
        discourages selectivity.
    targets
        Takes the model's keyword arguments and gives the labels; default ``kwargs["labels"]``.

    Attributes
    ----------
    regularizer
        The :class:`~mlcollage.papers.class_selectivity.regularizer.SelectivityRegularizer`; None before training.

    Raises
    ------
    MissingDependency
        If transformers is not installed.
    InvalidInput
        When training starts, with label smoothing or ``DataParallel``, where the Trainer ignores the model's loss or
        runs copies of the model. After the first update, if the Trainer made a loss of its own.

    Notes
    -----
    Of accumulated batches each term weighs as the batch's mean loss does, also in a last group of fewer. Where the
    Trainer tells the model the number of items, that is the batch's share of them; or 1 if the model does not divide by
    it (two passes without gradients find out once), since the Trainer then adds up mean losses.
    """

    regularizer: SelectivityRegularizer | None = None
    _handle: Any = None
    _divides: bool | None = None  # whether the model divides its loss by the number of items that it is told
    _added, _arrived = False, True  # whether a term was added in this step, and whether its gradient has come

    def __init__(
        self,
        alpha: Alpha,
        layers: Layers,
        *,
        targets: Callable[[Mapping[str, Any]], Tensor] = itemgetter("labels"),
        **options: Any,
    ) -> None:
        self.alpha, self.layers, self.options, self.targets = alpha, layers, options, targets

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the layers, and put the term into what the model returns."""
        if args.n_gpu > 1:
            raise InvalidInput("with several GPUs in one process the Trainer runs copies of the model; use torchrun.")
        if args.label_smoothing_factor:
            raise InvalidInput(
                "with label_smoothing_factor the Trainer ignores the model's own loss, to which the term is added; "
                "smooth labels in the model, or add the term in compute_loss."
            )
        network = kwargs["model"]
        regularizer = self.regularizer = SelectivityRegularizer(network, self.alpha, self.layers, **self.options)

        def arrive(gradient: Tensor) -> None:
            self._arrived = True

        self._divides = None

        def add(module: Any, inputs: Any, named: dict[str, Any], output: Any) -> Any:
            loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
            if not module.training or loss is None or not torch.is_grad_enabled():
                return output
            term = regularizer(self.targets(named), loss)
            if named.get("num_items_in_batch") is not None:
                term = term * self._weight(module, inputs, named)
            self._added = True
            if term.requires_grad:
                self._arrived = False
                term.register_hook(arrive)
            if isinstance(output, tuple):
                return (loss + term, *output[1:])
            output["loss"] = loss + term
            return output

        self._handle = network.register_forward_hook(add, with_kwargs=True)

    def _weight(self, model: Any, inputs: Any, named: dict[str, Any]) -> Tensor | float:
        """What the batch's mean loss weighs where the Trainer only adds up the losses of accumulated batches."""
        share = _items(model, named) / named["num_items_in_batch"]
        if self._divides is None and abs(float(share) - 1) > 0.01:  # of a batch alone nobody can tell
            # a model may take the number and not use it
            told, untold = (
                _loss_of(model, inputs, {**named, "num_items_in_batch": n}) for n in (named["num_items_in_batch"], None)
            )
            self._divides = abs(told - untold) > 1e-3 * abs(untold)
        return 1.0 if self._divides is False else share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make sure that the term was part of what was minimized."""
        added, self._added = self._added, False
        if not (added and self._arrived):
            raise InvalidInput(
                "the Trainer did not minimize the loss that the model returns, to which the term is added "
                "(compute_loss_func, or a compute_loss of its own, makes another one); add the term there."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away."""
        if self._handle is not None and self.regularizer is not None:
            self._handle.remove()
            self.regularizer.remove()


def _loss_of(model: nn.Module, inputs: Any, named: dict[str, Any]) -> float:
    """The loss that a model returns in evaluation mode, without the callback's own hooks having a part in it."""
    with evaluating(model), torch.no_grad():
        output = model(*inputs, **named)
    return float(output[0] if isinstance(output, tuple) else output.loss)


def _items(model: Any, named: Mapping[str, Any]) -> Tensor:
    """The labels of a batch that the Trainer counts, by its own rule: a causal model predicts no first token."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    labels: Tensor = named["labels"] if named.get("shift_labels") is None else named["shift_labels"]
    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", ""))) is ForCausalLMLoss
    paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if causal and not paired and named.get("shift_labels") is None:
        labels = labels[..., 1:]
    return labels.ne(-100).sum()
