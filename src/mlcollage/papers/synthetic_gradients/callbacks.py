"""Synthetic gradients in the training loops of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from mlcollage.data.batches import Parts, read_batch
from mlcollage.errors import InvalidInput
from mlcollage.nn.wrapped import unwrap
from mlcollage.train import HuggingFaceCallback, LightningCallback

from .context import Context, Kind
from .decouple import decouple
from .decoupled import Decoupled


class _Synthesizing:
    """What both share: a network that is decoupled at its first batch, and the synthesizers' own optimizer."""

    net: Decoupled | None = None
    _optimizer: torch.optim.Optimizer | None = None
    _saved: Mapping[str, Any] | None = None

    def _set_up(
        self, cuts: Sequence[str] | Mapping[str, Any], context: int | Kind | Context | None, lr: float, options: Any
    ) -> None:
        self.cuts, self.context, self.lr, self.options = cuts, context, lr, dict(options)
        if "divisor" not in self.options:
            raise InvalidInput(
                "the trainer's loss is not seen by the callback: say how it averages, divisor='samples' for a mean "
                "over the batch, 'sum', a number or a function of the targets."
            )

    def _make(self, network: nn.Module, example: Any) -> Decoupled:
        mode = network.training
        net = decouple(network, self.cuts, example=example, context=self.context, **self.options)
        network.train(mode)
        if self._saved is not None:
            net.load_state_dict(self._saved["synthesizers"], strict=False)
        own = net.synthesizer_parameters()
        self._optimizer = torch.optim.Adam(own, lr=self.lr) if own else None
        if self._saved is not None and self._optimizer is not None and self._saved["optimizer"] is not None:
            self._optimizer.load_state_dict(self._saved["optimizer"])
        self.net = net
        return net

    def _learn(self) -> float | None:
        """The synthesizers' own update, after the trainer's backward pass."""
        if self.net is None or self.net._step is None:
            return None
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        loss = float(self.net.fill_synthesizers())
        if self._optimizer is not None:
            self._optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Synthesizers and their optimizer; the network is the trainer's."""
        if self.net is None:
            return {}
        own = {k: v for k, v in self.net.state_dict().items() if not k.startswith("model.")}
        return {"synthesizers": own, "optimizer": None if self._optimizer is None else self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until the network is decoupled."""
        self._saved = state_dict or None


class LightningSyntheticGradients(_Synthesizing, LightningCallback):
    """Decouples a Lightning module: ``Trainer(callbacks=[LightningSyntheticGradients(["layer1"], 10, ...)])``.

    ``training_step``, optimizers, clipping and logging stay as they are; the trainer's own backward pass is cut. The
    synthesizers have an optimizer of their own (Adam), which the trainer's clipping does not touch. Their loss is
    logged as ``synthesizer_loss``. The module is left as it was when training ends, and checkpoints hold
    the synthesizers.

    Parameters
    ----------
    cuts
        Paths of modules in the network.
    context
        Number of classes, a :class:`Context`, or None.
    lr
        Of the synthesizers.
    parts
        What the parts of a batch are, as for :func:`~mlcollage.data.batches.read_batch`.
    model
        Takes the Lightning module and gives the network that the cuts are in and that takes the batch's inputs, e.g.
        ``lambda m: m.net``; default the module itself.
    **options
        Of :func:`decouple`; ``divisor`` is needed: how the module's loss averages.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    InvalidInput
        Without a divisor; when training starts, with float16 (whose loss scaling would reach true gradients only) or
        several devices.
    """

    def __init__(
        self,
        cuts: Sequence[str],
        context: int | Kind | Context | None = None,
        *,
        lr: float = 1e-3,
        parts: Parts = None,
        model: Callable[[Any], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self._set_up(cuts, context, lr, options)
        self.parts, self.model = parts, model

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the cuts around the module's training step."""
        if "16" in str(trainer.precision) and "bf16" not in str(trainer.precision):
            raise InvalidInput(
                "float16 scales the loss, and so true but not synthetic gradients; use precision='bf16-mixed'."
            )
        if trainer.world_size > 1:
            raise InvalidInput("each of several devices would have synthesizers of its own; train on one.")
        step = pl_module.training_step

        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            read = read_batch(batch, self.parts)
            if self.net is None:
                self._make(pl_module if self.model is None else self.model(pl_module), read.x)
            assert self.net is not None
            with self.net.cut(read.y, mask=read.mask):
                return step(batch, *args, **kwargs)

        pl_module.training_step = training_step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Train the synthesizers on what arrived."""
        loss = self._learn()
        if loss is not None:
            pl_module.log("synthesizer_loss", loss)

    def on_fit_end(self, trainer: Any, pl_module: Any, exception: BaseException | None = None) -> None:
        """Take the cuts away."""
        pl_module.__dict__.pop("training_step", None)

    on_exception = on_fit_end


class HuggingFaceSyntheticGradients(_Synthesizing, HuggingFaceCallback):
    """Decouples a Hugging Face model: ``Trainer(callbacks=[HuggingFaceSyntheticGradients(["encoder.1"], ...)])``.

    Parameters
    ----------
    cuts, context, lr, options
        As for :class:`LightningSyntheticGradients`.
    targets
        Takes the model's keyword arguments and gives the labels; default ``kwargs["labels"]``.

    Raises
    ------
    MissingDependency
        If transformers is not installed.
    InvalidInput
        Without a divisor; when training starts, with fp16 or several GPUs in one process.
    """

    def __init__(
        self,
        cuts: Sequence[str],
        context: int | Kind | Context | None = None,
        *,
        lr: float = 1e-3,
        targets: Callable[[Mapping[str, Any]], Any] = itemgetter("labels"),
        **options: Any,
    ) -> None:
        self._set_up(cuts, context, lr, options)
        self.targets = targets
        self._handles: list[Any] = []
        self._open: ExitStack | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the cuts around the model's forward pass."""
        if args.fp16:
            raise InvalidInput("fp16 scales the loss, and so true but not synthetic gradients; use bf16.")
        if args.n_gpu > 1 or args.world_size > 1:
            raise InvalidInput("each of several devices would have synthesizers of its own; train on one.")
        network = unwrap(kwargs["model"])

        def before(module: Any, given: Any, named: dict[str, Any]) -> None:
            if not module.training or not torch.is_grad_enabled() or self._open is not None:
                return
            self._learn()  # of a batch before, when several are accumulated
            if self.net is None:
                with ExitStack() as busy:  # the model is called for its shapes
                    self._open = busy
                    self._make(module, dict(named) if named else given)
                self._open = None
            assert self.net is not None
            self._open = ExitStack()
            self._open.enter_context(self.net.cut(self.targets(named), mask=named.get("attention_mask")))

        def after(module: Any, given: Any, output: Any) -> None:
            if self._open is not None and module.training:
                self._open.close()
                self._open = None

        self._handles = [
            network.register_forward_pre_hook(before, with_kwargs=True), network.register_forward_hook(after)
        ]  # fmt: skip

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Train the synthesizers on what arrived."""
        self._learn()

    on_substep_end = on_pre_optimizer_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the cuts away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
