"""The regularizer in Lightning and in the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.papers.class_selectivity.regularizer import Alpha, SelectivityRegularizer

__all__ = ["lightning_callback", "transformers_callback"]


def _second(batch: Any) -> Tensor:
    return batch[1]


def lightning_callback(
    alpha: Alpha,
    layers: Any = "relu",
    *,
    targets: Callable[[Any], Tensor] = _second,
    model: Callable[[Any], nn.Module] | None = None,
    **options: Any,
) -> Any:
    """The regularizer as a Lightning ``Callback``: ``Trainer(callbacks=[lightning_callback(alpha=-2.0)])``.

    The term is added to the loss that ``training_step`` returns (a tensor, or a dictionary with ``"loss"``), and
    its mean index is logged as ``selectivity``. The module is left as it was when training ends.

    Parameters
    ----------
    alpha, layers, options
        As for :class:`~mlcollage.papers.class_selectivity.regularizer.SelectivityRegularizer`: negative
        discourages selectivity.
        The callback's ``regularizer`` is the object itself, from the start of training.
    targets
        Takes a batch and gives its labels; default the second part.
    model
        Takes the Lightning module and gives the network that ``training_step`` calls, e.g. ``lambda m: m.net``; default
        the module itself, which suits steps that call ``self(x)``.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise MissingDependency(
            "lightning_callback needs Lightning; install it with: pip install 'mlcollage[lightning]'."
        ) from None

    class LightningSelectivity(Callback):
        """Adds the selectivity term to the loss of a Lightning module."""

        regularizer: SelectivityRegularizer | None = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            network = pl_module if model is None else model(pl_module)
            regularizer = self.regularizer = SelectivityRegularizer(network, alpha, layers, **options)
            step = pl_module.training_step

            def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
                result = step(batch, *args, **kwargs)
                if result is None:  # Lightning skips such a batch
                    return result
                loss = result["loss"] if isinstance(result, dict) else result
                term = regularizer(targets(batch), loss)
                last = regularizer.last.values()
                pl_module.log("selectivity", sum(last) / len(last))
                return {**result, "loss": loss + term} if isinstance(result, dict) else loss + term

            pl_module.training_step = training_step

        def _restore(self, pl_module: Any) -> None:
            if self.regularizer is not None:
                self.regularizer.remove()
                pl_module.__dict__.pop("training_step", None)

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self._restore(pl_module)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._restore(pl_module)

    return LightningSelectivity()


def transformers_callback(
    alpha: Alpha, layers: Any, *, targets: Callable[[dict[str, Any]], Tensor] | None = None, **options: Any
) -> Any:
    """The regularizer as a Hugging Face ``TrainerCallback``: ``Trainer(callbacks=[transformers_callback(-2.0, ...)])``.

    The term is added to the loss that the model returns when it is given ``labels`` in training. Transformers have
    GELUs: name the layers, such as ``"*intermediate_act_fn"``, and a sign policy, ``negative="relu"``.

    Parameters
    ----------
    alpha, layers, options
        As for :class:`~mlcollage.papers.class_selectivity.regularizer.SelectivityRegularizer`: negative
        discourages selectivity.
        The callback's ``regularizer`` is the object itself, from the start of training.
    targets
        Takes the model's keyword arguments and gives the labels; default ``kwargs["labels"]``.

    Raises
    ------
    MissingDependency
        If transformers is not installed.
    InvalidInput
        When training starts, with label smoothing or ``DataParallel``, where the Trainer ignores the model's loss or
        runs copies of the model.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise MissingDependency(
            "transformers_callback needs transformers; install it with: pip install 'mlcollage[transformers]'."
        ) from None

    class TransformersSelectivity(TrainerCallback):
        """Adds the selectivity term to the loss of the model of a Hugging Face ``Trainer``."""

        regularizer: SelectivityRegularizer | None = None
        _handle: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.n_gpu > 1:
                raise InvalidInput(
                    "with several GPUs in one process the Trainer runs copies of the model; use torchrun."
                )
            if args.label_smoothing_factor:
                raise InvalidInput(
                    "with label_smoothing_factor the Trainer ignores the model's own loss, to which the term is added; "
                    "smooth labels in the model, or add the term in compute_loss."
                )
            network = kwargs["model"]
            regularizer = self.regularizer = SelectivityRegularizer(network, alpha, layers, **options)

            def add(module: Any, inputs: Any, named: dict[str, Any], output: Any) -> Any:
                loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
                if not module.training or loss is None:
                    return output
                y = named["labels"] if targets is None else targets(named)
                term = regularizer(y, loss)
                if named.get("num_items_in_batch") is not None:  # the Trainer then sums over accumulated batches
                    term = term / args.gradient_accumulation_steps
                if isinstance(output, tuple):
                    return (loss + term, *output[1:])
                output["loss"] = loss + term
                return output

            self._handle = network.register_forward_hook(add, with_kwargs=True)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._handle is not None and self.regularizer is not None:
                self._handle.remove()
                self.regularizer.remove()

    return TransformersSelectivity()
