"""Where the study's networks are trained: data, laws, training steps under the tracker, for one seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Task
from mlcollage.nn import build, seeded
from mlcollage.train import Step, epochs, steps

from ..find import find_symmetries
from ..symmetry import SymmetrySet
from ..term import KINDS
from ..tracker import ConservationTracker
from .models import networks, row_transformer, samples

Arrays = dict[str, npt.NDArray[Any]]
_RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)  # of the wanted learning rate, tried in turn on a user's model


@dataclass(frozen=True)
class Common:
    """Data, networks and training that both experiments share."""

    data: str = "fashion_mnist"  # fashion_mnist, tiny_imagenet or workload
    network: str = "cnn"  # cnn, vgg or user
    samples: int = 8192  # training samples
    pixels: int = 14  # height and width of Fashion-MNIST: averaged, or padded to 32
    width: int = 8  # channels of the first convolution
    steps: int = 250  # updates of each training
    batch_size: int = 128  # samples per update
    lr: float = 0.1  # of SGD without momentum
    momenta: tuple[tuple[float, float, float], ...] = (
        (0.9, 0.1, 1e-3),
        (0.99, 0.02, 1e-2),
    )  # momentum, learning rate and weight decay of each training with momentum
    every: int = 1  # steps per record of the tracker


@dataclass(frozen=True)
class Net:
    """A network of the study, which can be made again and again from the same start."""

    name: str
    make: Callable[[], nn.Module]
    symmetries: SymmetrySet
    rate: float  # factor of all learning rates

    @property
    def exact(self) -> SymmetrySet:
        """The laws that no epsilon breaks."""
        return SymmetrySet(tuple(law for law in self.symmetries if law.broken_by is None))

    @property
    def broken(self) -> list[str]:
        """Names of the laws that an epsilon breaks."""
        return [law.name for law in self.symmetries if law.broken_by is not None]

    def double(self, x: Tensor) -> Net | None:
        """The network in float64; None if its code insists on float32."""
        make: Callable[[], nn.Module] = lambda: self.make().double()  # noqa: E731
        try:
            with torch.no_grad(), seeded(0):
                model = make()
                model(x[:2].to(_device(model), torch.float64))
        except (RuntimeError, TypeError):
            return None
        return dataclasses.replace(self, make=make)


class Bench:
    """One seed's data, settings and measurements."""

    def __init__(self, task: Task[Any]) -> None:
        self.s, self.seed, self.device, self.m = task.settings, task.seed, task.device, Measurements()
        self.problem = samples(task.workload, self.s.data, self.s.samples, self.s.pixels)
        self.x, self.y = self.problem.train
        self.batch_size = min(self.s.batch_size, max(2, len(self.x) // 4))

    def networks(self) -> Iterator[Net]:
        """The study's two networks, or the user's, each with the laws that are found on it."""
        p = self.problem
        own = networks(self.s.network, p.shape, p.num_classes, self.s.width) if not p.users_model else {}
        for name, factory in (own or {"user": p.make_model}).items():
            make = self._maker(factory)
            yield self._found(name, make, 1.0 if own else self._rate(make))

    def transformer(self) -> Net:
        """The study's transformer in float64; from now on the bench holds inputs of at least two axes."""
        self.x = self.x if self.x.dim() > 2 else self.x.unsqueeze(-1)
        shape, classes = tuple(self.x.shape[1:]), self.problem.num_classes
        return self._found("attention", self._maker(lambda: row_transformer(shape, classes).double()), 1.0)

    def _maker(self, factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: build(factory, self.seed).to(self.device)

    def _found(self, name: str, make: Callable[[], nn.Module], rate: float) -> Net:
        model = make()
        with seeded(0):
            found = find_symmetries(model, self.x[:16].to(_device(model), _type(model)), F.cross_entropy)
        for kind in KINDS:
            families = found.of_kind(kind)
            self.m.add_all({"laws": families.n_laws, "families": len(families)}, arm=name, kind=kind)
        self.m.add_all({"not_handled": len(found.unhandled), "rate": rate}, arm=name)
        rows = [
            (str(law.kind), law.name, str(law.n_laws), law.broken_by or "", f"{law.residual or 0:.1e}") for law in found
        ]
        self.m.array(f"laws_{name}", np.array(rows or [("", "", "", "", "")], dtype=str))
        self.m.array(f"not_handled_{name}", np.array(list(found.unhandled) or [""], dtype=str))
        return Net(name, make, found, rate)

    def _rate(self, make: Callable[[], nn.Module]) -> float:
        """The largest factor of the study's learning rates at which a user's model trains for a few steps."""
        momentum, lr, _ = self.s.momenta[0]
        for factor in _RATES:
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), lr=lr * factor, momentum=momentum)
            try:
                losses = [float(step.loss) for step in self.steps(model, optimizer, min(40, self.s.steps))]
            except InvalidInput:
                continue
            if losses[-1] < 3 * losses[0]:
                return factor
        raise InvalidInput(
            f"the workload's model diverges at every learning rate down to {lr * _RATES[-1]:g}; check its "
            "initialization."
        )

    def steps(self, model: nn.Module, optimizer: torch.optim.Optimizer, count: int, **more: Any) -> Iterator[Step]:
        """Train, on the same batches in the same order whatever the network."""
        batches = epochs(self.x.to(_type(model)), self.y, self.batch_size, generator=1_000_003 * self.seed + 17)
        return steps(model, batches, optimizer, max_steps=count, seed=self.seed, **more)

    def loss(self, chosen: Tensor | slice) -> Callable[[nn.Module], Tensor]:
        """The loss of some samples, as a function of the model."""

        def loss(model: nn.Module) -> Tensor:
            x, y = self.x[chosen].to(_device(model), _type(model)), self.y[chosen].to(_device(model))
            with seeded(0):  # dropout draws the same mask at every call
                return F.cross_entropy(model(x), y)

        return loss

    def warm(self, net: Net) -> nn.Module:
        """The network after a few steps: not at its initialization, where biases are zero."""
        model = net.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.s.lr * net.rate)
        for _ in self.steps(model, optimizer, self.s.warm_steps):
            pass
        return model

    def track(
        self,
        net: Net,
        optimizer_of: Callable[..., torch.optim.Optimizer],
        count: int,
        mode: Any = "ledger",
        watch: Watch | None = None,
        **more: Any,
    ) -> Arrays:
        """Train under the tracker, and under `watch` if there is one; the tracker's arrays."""
        model = net.make()
        optimizer = optimizer_of(model.parameters())
        if watch is not None:
            watch.start(model)
        with ConservationTracker(model, optimizer, net.symmetries, self.s.every, mode) as tracker:
            for _ in self.steps(model, optimizer, count, **more):
                if watch is not None:
                    watch.look()
        return tracker.arrays()


class Watch:
    """Norms of the rows of each weight matrix, and a sample of its entries, step by step."""

    def start(self, model: nn.Module, entries: int = 64) -> None:
        """Choose the entries, and look for the first time."""
        self.weights = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and p.numel() > 1}
        g = torch.Generator().manual_seed(0)
        self.chosen = {n: torch.randperm(p.numel(), generator=g)[:entries] for n, p in self.weights.items()}
        self.seen: dict[tuple[str, str], list[Tensor]] = {}
        self.look()

    def look(self) -> None:
        """Look once."""
        for name, p in self.weights.items():
            flat = p.detach().double()
            self.seen.setdefault((name, "norm"), []).append(flat.flatten(1).square().sum(1).sqrt())
            self.seen.setdefault((name, "entry"), []).append(flat.reshape(-1)[self.chosen[name]])

    def roughness(self, m: Measurements, arm: str) -> None:
        """Total variation over net change, median over the rows' norms and over the entries of each weight matrix."""
        for (layer, what), seen in sorted(self.seen.items()):
            path = torch.stack(seen).cpu().numpy()  # (steps + 1, rows or entries)
            variation, net = np.abs(np.diff(path, axis=0)).sum(axis=0), np.abs(path[-1] - path[0])
            m.add("roughness", float(np.median(variation / np.maximum(net, 1e-300))), arm=arm, layer=layer, what=what)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _type(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
