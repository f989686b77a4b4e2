"""The study's splits and networks: its own data or a user's, and inputs from elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mlcollage.data import Labeled, Problem, load_workload, problem
from mlcollage.errors import InvalidInput
from mlcollage.lab import Task
from mlcollage.nn import MLP, ResNet, build


@dataclass(frozen=True)
class Sizes:
    """Data, network and budgets: the same for every experiment, so that their arms compare."""

    data: str = "digits"  # digits, fashion_mnist, cifar10 or workload
    network: str = "mlp"  # mlp, resnet or user
    train: int = 200  # samples trained on
    validation: int = 200  # samples that rivals are tuned on
    test: int = 1000  # samples tested on
    variance: float = 0.1  # of the Gaussian prior on every weight
    step_size: float | None = 0.007  # of HMC's leapfrog; None adapts it
    chains: int = 4  # of HMC and of the stochastic-gradient samplers
    burn_in: int = 8  # iterations of HMC before draws are kept, the first half without a Metropolis test
    draws: int = 24  # of HMC, per chain
    members: int = 8  # of the ensemble
    epochs: int = 250  # steps of optima and of variational inference
    sg_epochs: int = 300  # of the stochastic-gradient samplers


def split(task: Task[Sizes]) -> tuple[Problem, Tensor]:
    """Training, validation and test samples of one seed, standardized by the training samples, and foreign inputs.

    MLPs get vectors.
    """
    s = task.settings
    rng = np.random.default_rng([task.seed, 11])
    p = problem(
        task.workload,
        partial(_own, s, task.seed),
        rng=rng,
        train=s.train,
        validation=s.validation,
        test=s.test,
        standardize_users=True,
        flat=s.network == "mlp",
        device=task.device,
    )
    return p, _foreign(s, p, rng)


def _own(s: Sizes, seed: int) -> Labeled:
    if s.data == "digits":
        from mlcollage.data import load_digits_split

        return Labeled.from_arrays(*load_digits_split(seed, s.test), 10, name="digits")
    if s.data == "fashion_mnist":
        return load_workload("fashion_mnist", Labeled)
    folder = os.environ.get("MLCOLLAGE_DATA")
    if not folder:
        raise InvalidInput("scale paper needs CIFAR-10: put its binary version into $MLCOLLAGE_DATA/cifar10.")
    return load_workload(f"cifar10:{Path(folder) / 'cifar10'}", Labeled)


def _foreign(s: Sizes, p: Problem, rng: np.random.Generator) -> Tensor:
    """Inputs from elsewhere: clothes among digits, else the test inputs with each feature shuffled over samples."""
    x = p.test.x
    if s.data == "digits":
        from mlcollage.data import fashion_mnist

        images = fashion_mnist.load(limit=len(x))[2].reshape(-1, 28, 28)[:, 2:26, 2:26]
        small = images.reshape(-1, 8, 3, 8, 3).mean(axis=(2, 4)).reshape(-1, 64)  # 3 x 3 pixels become one
        return p.standardize(small).to(x.device)
    shuffled = rng.permuted(x.flatten(1).cpu().numpy(), axis=0)
    return torch.from_numpy(shuffled).reshape(x.shape).to(x.device)


def network(task: Task[Sizes], p: Problem, norm: str = "frn") -> nn.Module:
    """A fresh network of the kind that the settings name, initialized by the seed."""
    s = task.settings
    if p.users_model:
        return build(p.make_model, task.seed).eval().to(p.device)
    if s.network == "resnet":
        channels, height, width = p.shape
        make = partial(
            ResNet,
            (channels, height, width),
            p.num_classes,
            width=16 if s.data == "cifar10" else 8,
            norm=norm,
            activation="silu",
            conv_bias=True,
        )
        return build(make, task.seed).to(p.device)
    return build(partial(MLP, p.shape, p.num_classes, widths=(50, 50)), task.seed).to(p.device)
