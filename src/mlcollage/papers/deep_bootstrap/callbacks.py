"""The ideal twin in the training loops of Lightning and of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlcollage.data import DataWorld
from mlcollage.errors import InvalidInput
from mlcollage.nn import logits_of
from mlcollage.train import HuggingFaceCallback, LightningCallback
from mlcollage.train.loop import Loss
from mlcollage.train.trainer_settings import TrainerSettings, lightning_settings, transformers_settings

from .result import BootstrapResult
from .settings import check_world
from .twin import Forward, IdealTwin, call


class _Following:
    """A twin that is made when training starts, of what the trainer knows and what the user says."""

    def __init__(
        self,
        world: DataWorld,
        *,
        n: int | None = None,
        batch_size: int | None = None,
        steps: int | None = None,
        train: tuple[Tensor, Tensor] | None = None,
        loss: str | Loss = "cross_entropy",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        evaluations: int = 24,
        test_size: int = 2000,
        seed: int = 0,
        forward: Forward = call,
    ) -> None:
        check_world(world)
        self.twin: IdealTwin | None = None
        self._world, self._loss = world, loss
        # What the trainer may know too, by name, and the rest.
        self._said = {
            "n": n,
            "batch_size": batch_size,
            "steps": steps,
            "clip_norm": clip_norm,
            "clip_value": clip_value,
        }
        self._options: dict[str, Any] = {
            "train": train, "evaluations": evaluations, "test_size": test_size, "seed": seed, "forward": forward
        }  # fmt: skip

    def result(self) -> BootstrapResult:
        """What has been measured so far."""
        if self.twin is None:
            raise InvalidInput("nothing was measured yet; give the callback to the trainer and train.")
        return self.twin.result()

    def _begin(self, settings: TrainerSettings, model: nn.Module, optimizer: Any) -> None:
        batch = settings.batch_size
        known: dict[str, Any] = {
            "n": settings.samples,
            "batch_size": None if batch is None else batch * settings.accumulation * settings.world_size,
            "steps": settings.max_steps,
            "clip_norm": settings.clip_norm,
            "clip_value": settings.clip_value,
        }
        for name, said in self._said.items():
            clips = name.startswith("clip")
            if said is None and known[name] is None and not clips:
                raise InvalidInput(f"this trainer does not tell {name}; pass {name} to {type(self).__name__}.")
            if said is not None and said != known[name] and (clips or known[name] is not None):
                theirs = "does not clip so" if known[name] is None else f"has {known[name]}"
                raise InvalidInput(
                    f"{name}={said!r} was given to {type(self).__name__}, but the trainer {theirs}; leave {name} out, "
                    "and it is read from the trainer."
                )
            known[name] = said if known[name] is None else known[name]
        loss = self._loss
        if settings.label_smoothing and loss == "cross_entropy":
            loss = partial(F.cross_entropy, label_smoothing=settings.label_smoothing)
        self._end()
        twin = IdealTwin(self._world, loss=loss, autocast=settings.autocast, **known, **self._options)
        twin.start(model, optimizer)
        self.twin = twin

    def _end(self) -> None:
        if self.twin is not None:
            self.twin.stop()


class LightningBootstrap(_Following, LightningCallback):
    """The ideal twin of a Lightning module: ``Trainer(callbacks=[LightningBootstrap(world)])``.

    The size of the training set, batch size, number of updates, accumulation, clipping and precision are read from the
    trainer; what contradicts it is refused. The Lightning module's ``forward`` must give logits (or pass ``forward``),
    and it must have one optimizer. The first update shows whether loss and gradients are those of ``training_step``.

    Parameters
    ----------
    world
        As for :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`.
    n, batch_size, steps : int, optional
        Only where the trainer cannot tell: streams without a length, batch samplers without a size, endless training.
    loss, train, evaluations, test_size, seed, forward : optional
        As for :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`.
    clip_norm, clip_value : float, optional
        Read from the trainer; given here, they must be the same.
    batch
        From a batch of the loader to inputs and labels, for the check of loss and gradients. Default: the first two
        of it. None leaves the check out, for a ``training_step`` that draws random numbers of its own.

    Attributes
    ----------
    twin
        The :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`; None before training.

    Raises
    ------
    MissingDependency
        If Lightning is not installed.
    InvalidInput
        When training starts: for a module with several optimizers, or that optimizes or clips by code of its own; for
        sharded parameters, float16, and what contradicts the trainer. After the first update: for another loss, or
        gradients that a hook has changed.
    """

    def __init__(
        self,
        world: DataWorld,
        *,
        batch: Callable[[Any], tuple[Tensor, Tensor]] | None = lambda b: (b[0], b[1]),
        **options: Any,
    ) -> None:
        super().__init__(world, **options)
        self._batch = batch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Copy the module and its optimizer."""
        if len(trainer.optimizers) != 1:
            raise InvalidInput(f"the module has {len(trainer.optimizers)} optimizers; the twin needs exactly one.")
        settings = lightning_settings(trainer, pl_module)
        self._last, self._seen = trainer.global_step, list[tuple[int, float]]()
        self._unchecked = self._batch is not None
        # micro-batches of the first update; gradients of several processes are averages that no single one can redo
        self._first: list[Any] | None = [] if self._unchecked and settings.world_size == 1 else None
        # The twin must not drag a copy of trainer and data loaders along.
        attached, pl_module._trainer = pl_module._trainer, None
        try:
            self._begin(settings, pl_module, trainer.optimizers[0])
        finally:
            pl_module._trainer = attached

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the random numbers that the batches of the first update are trained with."""
        if self._unchecked or self._first is not None:
            self._noise = torch.get_rng_state(), torch.cuda.get_rng_state_all() if _uses_cuda() else []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the twin follow."""
        assert self.twin is not None
        share = 1 / (trainer.accumulate_grad_batches * trainer.world_size)  # a scheduler may change it between epochs
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:  # None: training_step skipped the batch, which then adds no gradient
            if self._unchecked:
                self._unchecked = False
                # Lightning gives the loss as it is accumulated.
                self._check(self.twin, batch, float(loss) * trainer.accumulate_grad_batches)
            if self._first is not None:
                assert self._batch is not None
                self._first.append((*self._batch(batch), share, _drawn(self._noise)))
            self._seen.append((_samples(batch), share))
        if trainer.global_step > self._last:  # not while gradients are accumulated
            self._last = trainer.global_step
            if self._first:
                self._check_gradients(self.twin, self._first, pl_module)
                self._first = None
            self.twin.on_step(trainer.global_step, pl_module, self._seen * trainer.world_size)
            self._seen = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Let go of the optimizer."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._end()

    def _check(self, twin: IdealTwin, batch: Any, theirs: float) -> None:
        """The twin, which still has the first weights, must have the loss that the module had."""
        assert self._batch is not None
        try:
            x, y = self._batch(batch)
        except (KeyError, IndexError, TypeError, ValueError):
            raise InvalidInput(
                f"the inputs and labels of a batch (a {type(batch).__name__}) are not its first two parts; pass "
                "batch=lambda b: (inputs, labels)."
            ) from None
        with _drawn(self._noise):
            ours = twin.loss_of(x, y)
        tolerance = 1e-4 if twin.autocast is None else 0.02
        if abs(ours - theirs) > tolerance * max(abs(theirs), 1.0):
            raise InvalidInput(
                f"training_step had a loss of {theirs:.6g} on the first batch, but the twin's on it is {ours:.6g}; "
                "pass the loss that training_step minimizes, and forward if it does more than call the module."
            )

    def _check_gradients(self, twin: IdealTwin, parts: list[Any], module: nn.Module) -> None:
        """Nothing but what the twin does may have been done to the gradients of the first update."""
        pairs = list(zip(module.parameters(), twin.gradients_of(parts), strict=True))
        blank = [torch.zeros_like(p) for p, _ in pairs]
        theirs, ours = (
            torch.cat(
                [(zero if g is None else g.to_dense()).flatten().float() for g, zero in zip(grads, blank, strict=True)]
            )
            for grads in ([p.grad for p, _ in pairs], [g for _, g in pairs])
        )
        tolerance = 0.01 if twin.autocast is None else 0.1
        if float((theirs - ours).norm()) > tolerance * max(float(theirs.norm()), float(ours.norm())):
            raise InvalidInput(
                f"the gradients of the first update (norm {float(theirs.norm()):.4g}) are not those of the loss as the "
                f"Trainer clips them (norm {float(ours.norm()):.4g}): a hook of {type(module).__name__} or of its "
                "parameters changes them, which no twin can follow; leave clipping to the Trainer."
            )


@dataclass
class _Seen:
    """What the Trainer's network gave for a micro-batch in training, and what came back to it."""

    logits: Tensor
    y: Tensor | None  # None where the Trainer has taken the labels out
    items: bool  # whether the model was told how many items the whole update has
    loss: float | None  # the model's own, if it has one
    gradient: Tensor | None = None  # with respect to the logits
    scale: float | None = None  # what the Trainer multiplied the model's own loss by


class HuggingFaceBootstrap(_Following, HuggingFaceCallback):
    """The ideal twin of a Hugging Face model: ``Trainer(callbacks=[HuggingFaceBootstrap(world)])``.

    The size of the training set, batch size, number of updates, accumulation, clipping (1.0 unless you changed it),
    precision and label smoothing are read from the trainer; what contradicts it is refused. The gradients that reach
    the logits in the first update show whether the twin's loss is the Trainer's.

    Models that take keyword arguments need ``forward=lambda model, x: model(pixel_values=x).logits`` or the like.

    Parameters
    ----------
    world
        As for :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`.
    n, batch_size, steps : int, optional
        Only where the trainer cannot tell: data sets without a length.
    loss, train, evaluations, test_size, seed, forward : optional
        As for :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`.
    clip_norm, clip_value : float, optional
        Read from the trainer; given here, they must be the same.

    Attributes
    ----------
    twin
        The :class:`~mlcollage.papers.deep_bootstrap.twin.IdealTwin`; None before training.

    Raises
    ------
    MissingDependency
        If transformers is not installed.
    InvalidInput
        When training starts: for sharded parameters, several GPUs in one process, float16, and what contradicts the
        trainer. After the first update: for another loss.
    """

    _handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the model and its optimizer."""
        settings = transformers_settings(args, state, kwargs.get("train_dataloader"))
        self._begin(settings, kwargs["model"], kwargs["optimizer"])
        self._seen: list[_Seen] = []
        self._whole: float | None = None  # sum of the weights of an update's micro-batches, found in the first one
        self._world_size = settings.world_size
        self._handle = kwargs["model"].register_forward_hook(self._see, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the twin follow."""
        assert self.twin is not None
        seen, self._seen = self._seen, []
        if not seen:
            raise InvalidInput("the Trainer made an update without calling its model, so the twin cannot follow it.")
        sizes = [len(part.logits) for part in seen]
        # A model that is told the number of items divides by it; else the Trainer divides by the number of batches.
        told = all(part.items for part in seen)
        shares = [size / sum(sizes) if told else 1 / len(seen) for size in sizes]
        if self._whole is None:
            wholes = [_whole(self.twin, part, share) for part, share in zip(seen, shares, strict=True)]
            self._whole = _snapped(sum(wholes) / len(wholes))
        weights = [self._whole / self._world_size * share for share in shares]
        self.twin.on_step(state.global_step, kwargs["model"], list(zip(sizes, weights, strict=True)) * self._world_size)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        self._end()

    def _end(self) -> None:
        super()._end()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _see(self, module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        logits, loss = logits_of(output), output.get("loss") if isinstance(output, Mapping) else None
        items = named.get("num_items_in_batch") is not None
        seen = _Seen(logits.detach(), named.get("labels"), items, None if loss is None else float(loss.detach()))
        self._seen.append(seen)

        def keep_gradient(gradient: Tensor) -> None:
            seen.gradient = gradient.detach()

        def keep_scale(gradient: Tensor) -> None:
            seen.scale = float(gradient)

        for tensor, keep in ((logits, keep_gradient), (loss, keep_scale)):
            if tensor is not None and tensor.requires_grad and self._whole is None:
                tensor.register_hook(keep)


def _whole(twin: IdealTwin, part: _Seen, share: float) -> float:
    """The weight of a micro-batch divided by its share, if the Trainer's loss is the twin's; 1 unless a model errs."""
    logits, y = part.logits.float().requires_grad_(), part.y
    if part.gradient is not None:
        theirs = part.gradient.float()
        if y is None:  # of cross-entropy the gradient is (softmax - target) / B: the label is the largest target
            y = (logits.detach().softmax(-1) - theirs * len(logits) / share).argmax(-1)
        with torch.enable_grad():
            (ours,) = torch.autograd.grad(twin.training_loss(logits, y), logits)
        weight = float((theirs * ours).sum() / ours.square().sum())  # the best factor between the two
        same = float((theirs - weight * ours).norm()) <= 0.01 * float(theirs.norm())
    elif y is not None and part.loss is not None and part.scale is not None:
        # Under autocast accelerate hands on a copy of the logits, which no gradient reaches: compare the losses.
        weight = part.scale * part.loss / float(twin.training_loss(logits.detach(), y))
        same = abs(weight / share - round(weight / share)) < 0.02
    else:
        return 1.0
    if not same:
        raise InvalidInput(
            "the loss that the Trainer minimizes is not the twin's, as its gradients or values in the first update "
            "show; pass loss, a function of (logits, labels)."
        )
    return weight / share


def _uses_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


@contextmanager
def _drawn(noise: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """The random numbers (the dropout) of then, inside."""
    cpu, cuda = noise
    with torch.random.fork_rng(devices=range(len(cuda))):
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        yield


def _snapped(value: float) -> float:
    """A whole number where rounding alone separates the value from it."""
    return float(round(value)) if abs(value - round(value)) < 0.02 else value


def _samples(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    raise InvalidInput(f"a batch of the loader (a {type(batch).__name__}) holds no tensor, so its size is not known.")
