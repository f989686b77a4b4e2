"""The Ideal World beside a training loop that exists already."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.data import DataWorld
from mlcollage.data.problem import refuse_shared
from mlcollage.data.row_hashes import row_hashes
from mlcollage.errors import InvalidInput
from mlcollage.nn import logits_of, seeded
from mlcollage.train.loop import Loss, evaluating, needs_closure

from .gradients import GradientWatch, gives_closure
from .result import COLUMNS, BootstrapResult
from .settings import check_labels, check_outputs, check_world, log_steps, loss_function, loss_name
from .training import FreshBatches, as_type, measure

Forward = Callable[[nn.Module, Tensor], Tensor]
MicroBatches = Sequence[tuple[int, float]]
"""Samples and weight of each micro-batch of an update, whose gradient is that of the weighted sum of mean losses."""


@dataclass
class _Settings:
    """How an update of the user's loop was made."""

    groups: list[dict[str, Any]]  # of the optimizer; parameters by their places in the model
    requires_grad: list[bool]  # of the parameters
    training: list[bool]  # modes of the modules

    def apply_to(self, net: nn.Module) -> None:
        """Freeze what was frozen, and put every module into its mode."""
        for parameter, trains in zip(net.parameters(), self.requires_grad, strict=True):
            parameter.requires_grad_(trains)
        for module, training in zip(net.modules(), self.training, strict=True):
            module.training = training


def call(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a network that is called with the inputs alone."""
    return logits_of(model(x))


class IdealTwin:
    """Trains an ideal twin beside a loop of yours, which is the Real World, and measures both.

    The twin starts as a copy of your network. Whenever your optimizer has made an update, the twin makes one with an
    optimizer of the same kind and the settings (learning rate, momentum, ...) that yours just used, on a fresh batch of
    the world. So the schedule is the same by construction, and so is what you freeze, unfreeze, or keep in evaluation
    mode. Hooks on parameters are not copied, so those that change gradients are refused; and so are gradients that are
    not cleared between updates, or changed otherwise than by the clipping told here. Your run is not changed: its
    random numbers, weights and modes are left as they are. It costs about one more training step per step.

    Parameters
    ----------
    world
        Where fresh samples come from; the distribution that your training set was drawn from.
    n
        Size of your training set.
    batch_size
        Samples of an update, as in your loop.
    steps
        Updates that your loop will make; evaluations are spaced logarithmically up to it.
    train
        Your training inputs and labels (or a fixed part of them) for the train metrics and T(n); None leaves them out.
    loss
        As in :class:`~mlcollage.papers.deep_bootstrap.framework.DeepBootstrap`; what your loop minimizes.
    clip_norm, clip_value
        Norm that your loop scales gradients down to, or value that it cuts them at; None (default) if it does not.
    autocast
        ``torch.bfloat16`` if your loop runs the network and the loss under ``torch.autocast``; None (default) if not.
    evaluations
        Number of evaluations, 24 by default, besides the start.
    test_size
        Samples of the test block.
    seed
        Names the repetition and its section of the world's stream.
    forward
        How a network is called: ``forward(model, x)`` gives logits. Default: ``model(x)``, or its ``.logits``.

    Examples
    --------
    >>> from mlcollage.data.glyphs import GlyphWorld
    >>> from mlcollage.nn.mlp import MLP
    >>> from mlcollage.train.loop import epochs
    >>> world = GlyphWorld.preset("easy16")
    >>> x, y = world.fixed(256).tensors
    >>> model = MLP(world.shape, 10, widths=(16,))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> twin = IdealTwin(world, n=256, batch_size=32, steps=20, train=(x, y), test_size=100)
    >>> twin.start(model, optimizer)
    >>> for step, (xb, yb) in zip(range(1, 21), epochs(x, y, 32, generator=0)):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(xb), yb).backward()
    ...     _ = optimizer.step()
    ...     twin.on_step(step, model)
    >>> twin.result().gap("error", at="end")["step"].tolist()
    [20]
    """

    def __init__(
        self,
        world: DataWorld,
        *,
        n: int,
        batch_size: int,
        steps: int,
        train: tuple[Tensor, Tensor] | None = None,
        loss: str | Loss = "cross_entropy",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        autocast: torch.dtype | None = None,
        evaluations: int = 24,
        test_size: int = 2000,
        seed: int = 0,
        forward: Forward = call,
    ) -> None:
        check_world(world)
        numbers = (("n", n), ("batch_size", batch_size), ("steps", steps), ("test_size", test_size))
        self.n, self.batch_size, self.steps, test_size = (checks.integer(name, v, least=1) for name, v in numbers)
        if autocast not in (None, torch.bfloat16):
            raise InvalidInput(
                f"autocast must be torch.bfloat16 or None, not {autocast}: gradients in float16 are scaled by numbers "
                "of your run, which the twin has not; train in bfloat16."
            )
        self.world, self.seed, self.loss, self.forward = world, checks.integer("seed", seed, least=0), loss, forward
        self.clip_norm, self.clip_value = (
            None if value is None else checks.positive(name, value)
            for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value))
        )
        self.autocast = autocast
        self.training_loss = loss_function(loss, world.num_classes)
        self._grid = set(log_steps(self.steps, evaluations))  # steps after which both networks are evaluated
        x, y = world.fixed(test_size, split="test").tensors
        self._tested = row_hashes(x)
        self._blocks = {"test": (x, y)}  # what is evaluated on, by split
        if train is not None:
            self._blocks["train"] = train
            refuse_shared(train[0], x, type(world).__name__)
        for _, labels in self._blocks.values():
            check_labels(labels, world.num_classes)
        self._rows: list[dict[str, Any]] = []
        self._pending: list[_Settings] = []  # of the updates that the twin has still to make
        self._done = 0  # updates of the twin
        self._noted = 0  # updates of the user's optimizer
        self._twin: nn.Module | None = None
        self._handles: list[Any] = []
        self._watch: GradientWatch | None = None

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the network and its optimizer; call it before the first update."""
        self.stop()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidInput(
                f"start needs the torch.optim.Optimizer that trains the model, not a {type(optimizer).__name__}."
            )
        self._twin = copy.deepcopy(model)
        first = next(model.parameters())
        device, self._dtype = first.device, first.dtype
        self._blocks = {
            k: (as_type(x.to(device), self._dtype), as_type(y.to(device), self._dtype))
            for k, (x, y) in self._blocks.items()
        }
        self._fresh = FreshBatches(self.world, self.seed, self.batch_size, self.steps, device)
        self._optimizer = _twin_optimizer(optimizer, model, self._twin)
        self._rows, self._pending, self._done, self._noted = [], [], 0, 0
        self._handles = [
            optimizer.register_step_pre_hook(partial(self._note, model)),
            optimizer.register_step_post_hook(self._stepped),
        ]
        self._watch = GradientWatch(model, optimizer, self.clip_norm, self.clip_value)
        # Two samples show whether the outputs fit the world, before anything is trained.
        x = self._blocks["test"][0][:2]
        with evaluating(model), torch.no_grad():
            check_outputs(self.forward(model, x), len(x), self.world.num_classes, model)
        self._evaluate(0, model)

    def on_step(self, step: int, model: nn.Module, micro_batches: MicroBatches | None = None) -> None:
        """Bring the twin up to your network and evaluate both if it is time; call it after each update.

        Parameters
        ----------
        step
            Updates made so far, 1 after the first.
        model
            Your network.
        micro_batches
            Where your loop accumulates gradients, or the last batch of an epoch is smaller: the number of samples of
            each micro-batch and the weight of its mean loss, such as ``[(16, 0.5), (16, 0.5)]``. None (default) is
            ``[(batch_size, 1.0)]``; none at all is a step without gradients, which changes nothing.
        """
        if self._twin is None:
            raise InvalidInput("on_step was called before start(model, optimizer), which copies the network.")
        if not self._pending and not self._done:
            raise InvalidInput("the optimizer given to start() made no update; give it the one that trains the model.")
        self._refuse_gradients()
        for settings in self._pending:  # several, where on_step is not called after every update
            self._update(settings, [(self.batch_size, 1.0)] if micro_batches is None else micro_batches)
        self._pending.clear()
        if step in self._grid:
            self._evaluate(step, model)

    def result(self) -> BootstrapResult:
        """What has been measured so far."""
        curves = pd.DataFrame(self._rows, columns=list(COLUMNS))
        settings = {"n": [self.n], "seeds": [self.seed], "steps": self.steps, "batch_size": self.batch_size}
        return BootstrapResult(curves, {**settings, "loss": loss_name(self.loss), "world": type(self.world).__name__})

    def loss_of(self, x: Tensor, y: Tensor) -> float:
        """The loss that the twin has on a batch as it is now, in training mode; nothing of it is changed."""
        with torch.no_grad():
            return float(self._loss(self._rehearsal(), x, y))

    def gradients_of(self, parts: Sequence[tuple[Tensor, Tensor, float, Any]]) -> list[Tensor | None]:
        """The gradients that are left of the next update, were it made on these micro-batches; nothing is changed.

        Each of ``parts`` has inputs, labels, weight, and a context in which the network is called. Clipping has been
        done, and what the optimizer itself does to gradients (Nesterov's momentum may be added in place).
        """
        net = self._rehearsal()
        net.zero_grad(set_to_none=True)
        optimizer = _twin_optimizer(self._optimizer, self._twin, net)  # type: ignore[arg-type]
        for x, y, weight, drawn in parts:
            with drawn, torch.enable_grad():
                (weight * self._loss(net, x, y)).backward()
        self._clip(net)
        optimizer.step()
        return [p.grad for p in net.parameters()]

    def _rehearsal(self) -> nn.Module:
        """A copy of the twin, in the modes of the update that comes next."""
        if self._twin is None:
            raise InvalidInput("loss_of was called before start(model, optimizer), which copies the network.")
        net = copy.deepcopy(self._twin).train()  # batch norm updates its statistics
        if self._pending:
            self._pending[0].apply_to(net)
        return net

    def _loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        device = next(net.parameters()).device
        x, y = (as_type(part.to(device), self._dtype) for part in (x, y))
        with self._cast(device):
            return self.training_loss(self.forward(net, x), y)

    def _clip(self, net: nn.Module) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), self.clip_norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(net.parameters(), self.clip_value)

    def stop(self) -> None:
        """Let go of your optimizer; the callbacks call it at the end of training."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _refuse_gradients(self) -> None:
        if self._watch is not None and self._watch.problem is not None:
            problem = self._watch.problem
            self.stop()
            raise InvalidInput(problem)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._watch is not None
        self._watch.after_step(look=self._noted in self._grid)

    def _note(self, model: nn.Module, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert self._watch is not None
        self._noted += 1
        self._watch.before_step(closure=gives_closure(args, kwargs))
        self._refuse_gradients()
        # Read when the update happens: whether a scheduler steps before or after on_step does not matter.
        place = {id(p): i for i, p in enumerate(model.parameters())}
        groups = [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in g.items()}
            | {"params": [place[id(p)] for p in g["params"] if id(p) in place]}
            for g in optimizer.param_groups
        ]
        self._pending.append(
            _Settings(groups, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
        )

    def _update(self, settings: _Settings, micro_batches: MicroBatches) -> None:
        assert self._twin is not None
        parameters, groups = list(self._twin.parameters()), self._optimizer.param_groups
        for new in settings.groups[len(groups) :]:  # of layers that were just unfrozen
            self._optimizer.add_param_group({**new, "params": [parameters[i] for i in new["params"]]})
        for group, new in zip(groups, settings.groups, strict=True):
            group.update({k: v for k, v in new.items() if k != "params"})
        settings.apply_to(self._twin)
        if not micro_batches:
            self._done += 1
            return
        sizes = [size for size, _ in micro_batches]
        if sum(sizes) > self.batch_size:
            raise InvalidInput(
                f"update {self._done + 1} of your loop used {sum(sizes)} samples, but batch_size is {self.batch_size}; "
                "give all samples of an update, those of accumulated batches too."
            )
        x, y = self._fresh.batch(self._done)
        parts = zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), micro_batches, strict=True)
        self._optimizer.zero_grad(set_to_none=True)
        # Frameworks call back without gradients; dropout draws from seeds of the step, not from the loop's generator.
        with torch.enable_grad(), seeded(self.seed, self._done):
            for inputs, labels, (_, weight) in parts:
                loss = self._loss(self._twin, inputs, labels)
                if not bool(loss.isfinite()):
                    raise InvalidInput(
                        f"the Ideal World's loss became {float(loss.detach())} at step {self._done + 1}; "
                        "lower the learning rate."
                    )
                (weight * loss).backward()
        self._clip(self._twin)
        self._optimizer.step()
        self._done += 1

    def _cast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _evaluate(self, step: int, model: nn.Module) -> None:
        assert self._twin is not None
        if self._done:
            self._fresh.refuse_tested(self._tested)
        for world, net, n in (("real", model, float(self.n)), ("ideal", self._twin, math.inf)):
            for split, (x, y) in self._blocks.items():
                if world == "ideal" and split == "train":  # it has no train set
                    continue
                with evaluating(net), torch.no_grad(), self._cast(x.device):
                    outputs = torch.cat([self.forward(net, part) for part in x.split(1024)])  # (N, K)
                outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # from bfloat16
                values = measure(outputs, y, self.loss, self.world.num_classes)
                self._rows.append({"world": world, "n": n, "seed": self.seed, "step": step, "split": split, **values})


def _twin_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, twin: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the same class, settings and state over the twin's parameters."""
    # Parameters are matched by position: the twin is a deep copy, so both orders are the same.
    pair = {id(a): b for a, b in zip(model.parameters(), twin.parameters(), strict=True)}
    if any(id(p) not in pair for g in optimizer.param_groups for p in g["params"]):
        raise InvalidInput("the optimizer holds parameters of another model; give start() the model that it trains.")
    if needs_closure(optimizer):
        raise InvalidInput(
            f"{type(optimizer).__name__} calls the loss several times in one step, which no twin can follow; use an "
            "optimizer that takes one gradient for each step, such as SGD or AdamW."
        )
    groups = [{**g, "params": [pair[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    try:
        made: torch.optim.Optimizer = type(optimizer)(groups)  # type: ignore[call-arg]
    except TypeError as reason:
        raise InvalidInput(
            f"a second {type(optimizer).__name__} could not be made from its groups alone ({reason}); use a "
            "torch.optim one."
        ) from reason
    # Momentum and the like, where training goes on from a checkpoint.
    made.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return made
