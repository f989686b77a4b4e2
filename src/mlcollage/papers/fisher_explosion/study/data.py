"""Data and networks of the study: a part of a data set for each seed, with labels of which a share may be wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlcollage.data import Labeled, add_label_noise, load_workload
from mlcollage.data.problem import Problem, Samples, problem
from mlcollage.nn import MLP, ConvNet


@dataclass(frozen=True)
class Settings:
    """What all experiments share: data, network, learning rate and evaluations."""

    data: str = "fashion_14"  # Fashion-MNIST at 14 x 14 (fashion_14), another built-in source, or workload
    network: str = "mlp"  # mlp or convnet, both without batch norm; not used where the workload has a model
    train: int = 1000  # training samples per seed
    validation: int = 1000  # samples on which coefficients are chosen
    test: int = 1500  # test samples
    traced: int = 300  # training samples on which Tr(F) is drawn
    batch: int = 100  # batch size; less where there are fewer than four batches
    evaluations: int = 20  # about so many per training
    interval: int = 10  # steps from one penalized step to the next
    lr: float | None = 0.3  # the large learning rate; None for the best of four on validation
    large_steps: int = 500  # steps of a training at the large learning rate


@dataclass(frozen=True)
class SeedData:
    """What one seed trains, validates and tests on.

    Parameters
    ----------
    problem
        Its training and validation labels may be wrong, those of the test set are not.
    wrong
        Which training labels are, (n,) bool.
    """

    problem: Problem
    wrong: Tensor


def own_data(name: str) -> Labeled:
    """Fashion-MNIST at 14 x 14, or another source by its name."""
    return _pooled_fashion() if name == "fashion_14" else load_workload(name, Labeled)


@cache
def _pooled_fashion() -> Labeled:
    from mlcollage.data.fashion_mnist import load

    x, y, x_test, y_test = load()

    def pool(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return images.reshape(-1, 1, 14, 2, 14, 2).mean((3, 5))  # (n, 1, 14, 14)

    return Labeled.from_arrays(pool(x), y, pool(x_test), y_test, 10, name="fashion_14")


def network(name: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The study's own networks, without batch norm."""
    if name == "convnet" and len(shape) == 3:
        return ConvNet(shape, classes, (32, 64, 128), norm=None)
    return MLP(shape, classes, (128, 128))


def seed_data(
    settings: Settings, seed: int, *, wrong: float = 0.0, workload: Labeled | None = None, device: str = "cpu"
) -> SeedData:
    """A seed's samples, a share ``wrong`` of whose training and validation labels is wrong."""
    rng = np.random.default_rng([seed, 11])
    drawn = problem(
        workload,
        partial(own_data, settings.data),
        rng=rng,
        train=settings.train,
        validation=settings.validation,
        test=settings.test,
        share=0.7,
        model=partial(network, settings.network),
        device=device,
    )
    # Validation labels are as wrong as the training labels: a user has no others.
    parts, masks = [], []
    for x, y in (drawn.train, drawn.validation):
        noisy, mask = add_label_noise(y.cpu().numpy(), wrong, num_classes=drawn.num_classes, rng=rng)
        parts.append(Samples(x, torch.from_numpy(noisy).to(device)))
        masks.append(mask)
    changed = replace(drawn, train=parts[0], validation=parts[1])
    return SeedData(changed, torch.from_numpy(masks[0]).to(device))
