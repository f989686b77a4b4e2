"""The study's networks and objectives, and how those of a block of seeds are trained and judged together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage.measure import few_shot_split, ridge_probe
from mlcollage.train import Replicas, warmup_cosine

from ..loss import barlow_twins_loss
from ..model import BarlowProjector
from .data import Probed, Source

_CALIBRATION = 10  # batches from which an untrained network gets its running statistics
DRAWS = 3  # of the few labeled rows, over which accuracies are averaged


@dataclass(frozen=True)
class Variant:
    """How one arm differs from Barlow Twins as it is.

    Parameters
    ----------
    rows
        Under which arms, and with which values of free columns, its numbers are recorded.
    objective
        ``"barlow"``, ``"redundancy"`` (that term alone), ``"infonce"`` or ``"none"`` (untrained).
    width, batch
        Factors on the settings' own.
    lambd
        Factor on lambda; 0 leaves the invariance term alone.
    normalize, norm
        Of the loss, and whether the projector has batch norms.
    stop, predictor
        Whether one view gets no gradient, and whether the other goes through a further network.
    """

    rows: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    objective: str = "barlow"
    width: float = 1.0
    batch: float = 1.0
    lambd: float = 1.0
    normalize: Any = "batch"
    norm: bool = True
    stop: bool = False
    predictor: bool = False


@dataclass(frozen=True)
class Training:
    """Sizes and rates; rates, weight and temperature were chosen in pilots with other seeds, with equal budgets."""

    samples: int = 38_400  # pairs of views that each network sees, whatever the batch
    batch: int = 256  # rows of a batch
    width: int = 128  # of the embedding, the widest
    lambd: float = 0.04  # weight of the redundancy term
    temperature: float = 0.1  # of InfoNCE
    lr: tuple[float, ...] = (3e-3, 1e-2, 1e-2)  # of Barlow Twins for batches of 1/8, 1/4 and all of the rows
    infonce_lr: tuple[float, ...] = (3e-3, 3e-3, 1e-2)  # of InfoNCE for the same
    fit: int = 1000  # rows that a probe is fitted on
    test: int = 2000  # rows that it is tested on
    shots: int = 10  # labeled rows of each class, where labels are few
    supervised_lr: float = 1e-2  # of a network trained on these rows alone
    supervised_decay: float = 1.0  # its weight decay
    supervised_steps: int = 150  # its updates, all rows in each

    def rate(self, rates: tuple[float, ...], batch: float) -> float:
        """The rate for a factor on the batch."""
        return dict(zip((1 / 8, 1 / 4, 1.0), rates, strict=True))[batch]


class Twins(nn.Module):
    """Encoder, projector and, in some variants, a predictor; activations name the representation."""

    def __init__(self, encoder: nn.Module, width: int, norm: bool, predictor: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = BarlowProjector(64, (128, width), norm=norm)
        self.predictor = BarlowProjector(width, (128, width), norm=norm) if predictor else nn.Identity()

    def forward(self, x: Tensor, activations: bool = False) -> Any:
        """The embedding, and after it the prediction, side by side; with ``activations`` the representation too."""
        h = self.encoder(x)
        z = self.projector(h)
        out = torch.cat([z, self.predictor(z)], 1)
        return (out, {"h": h}) if activations else out


def infonce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss: each of 2 N rows must find its partner among the 2 N - 1 others, by cosine."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similar = (z @ z.T) / temperature - 1e9 * torch.eye(len(z), dtype=z.dtype, device=z.device)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similar, partner)


def objective(v: Variant, s: Training) -> Callable[[Tensor, Tensor], Tensor]:
    """From one network's outputs for the two views, (N, 2 D), to its loss."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        (a, predicted), (b, _) = a.chunk(2, 1), b.chunk(2, 1)
        a, b = predicted if v.predictor else a, b.detach() if v.stop else b
        if v.objective == "infonce":
            return infonce(a, b, s.temperature)
        terms = barlow_twins_loss(
            a, b, lambd=s.lambd * v.lambd, normalize=v.normalize, impl="direct", check=False, return_terms=True
        )
        return terms.redundancy if v.objective == "redundancy" else terms.loss

    return loss


@dataclass(frozen=True)
class Trained:
    """Networks of a block of seeds after training, and the course of the loss."""

    replicas: Replicas
    losses: np.ndarray  # (steps, R)


def train(
    source: Source, v: Variant, s: Training, seeds: Sequence[int], device: str, watch: Callable[[Replicas], None] | None
) -> Trained:
    """All seeds of one variant; initialization and samples depend on the seed only, as far as shapes allow."""
    width, batch = round(s.width * v.width), round(s.batch * v.batch)
    rate = s.rate(s.infonce_lr if v.objective == "infonce" else s.lr, v.batch)

    def make() -> nn.Module:
        return Twins(source.encoder(), width, v.norm, v.predictor)

    replicas = Replicas(
        make, seeds, optimizer=torch.optim.AdamW, lr=rate, device=device, stacked=source.stacked, weight_decay=1e-4
    )
    if watch is not None:
        watch(replicas)
    each = torch.func.vmap(objective(v, s))
    steps = max(2, round(s.samples / batch))
    schedule, losses = warmup_cosine(steps, max(1, steps // 20)), []
    for step in range(_CALIBRATION if v.objective == "none" else steps):
        x_a, x_b = source.views(batch)
        if v.objective == "none":
            with torch.no_grad():
                replicas(x_a, in_dim=0)
            continue

        def losses_of(a: Tensor = x_a, b: Tensor = x_b) -> Tensor:
            outputs: Tensor = each(replicas(a, in_dim=0), replicas(b, in_dim=0))
            return outputs

        losses.append(replicas.update(losses_of, lr_factor=schedule(step), clip_norm=100.0))
    return Trained(replicas, torch.stack(losses).cpu().numpy() if losses else np.zeros((0, len(seeds))))


def represent(replicas: Replicas, x: Tensor) -> Tensor:
    """Representations (R, n, F) in evaluation mode."""
    h: Tensor = replicas.predict(x, activations=True, in_dim=0)[1]["h"]
    return h.cpu()


def probe_scores(replicas: Replicas, p: Probed) -> list[float]:
    """Of each seed: R^2 of the targets, or accuracy, of a ridge probe on the frozen representation."""
    fit, test = represent(replicas, p.x), represent(replicas, p.x_test)
    return [_score(fit[r], p.target[r], test[r], p.target_test[r]) for r in range(len(fit))]


def few_label_scores(replicas: Replicas, p: Probed, shots: int, seeds: Sequence[int]) -> list[float]:
    """Of each seed: accuracy of a ridge probe that is fitted on a few rows of each class."""
    fit, test = represent(replicas, p.x), represent(replicas, p.x_test)
    scores = []
    for draw in range(DRAWS):
        rows = enumerate(labeled_rows(p, shots, seeds, draw))
        scores.append([_score(fit[r, i], p.y[r, i], test[r], p.y_test[r]) for r, i in rows])
    return [float(score) for score in np.mean(scores, axis=0)]


def labeled_rows(p: Probed, shots: int, seeds: Sequence[int], draw: int) -> list[np.ndarray]:
    """The few labeled rows of each seed in one draw, equally many; fewer of each class where there are not as many."""
    fewest = min(int(y.unique(return_counts=True)[1].min()) for y in p.y)
    each = min(shots, fewest)
    rows = [few_shot_split(y, each, seed=1000 * seed + draw)[0] for y, seed in zip(p.y, seeds, strict=True)]
    return [i[: min(map(len, rows))] for i in rows]  # a seed may lack a class of a user's data


def _score(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> float:
    probe = ridge_probe(x, y)
    if probe.names is None:
        return probe.score(x_test, y_test)
    return float((probe.predict(x_test) == y_test.numpy()).mean())  # classes that were not seen count as wrong


def supervised_scores(source: Source, s: Training, seeds: Sequence[int], device: str) -> list[float]:
    """Of each seed: accuracy of the same encoder with a linear layer, trained on the few labeled rows from scratch."""
    p = source.probed
    classes = int(p.y.max()) + 1

    def make() -> nn.Module:
        return nn.Sequential(source.encoder(), nn.Linear(64, classes))

    found = []
    for draw in range(DRAWS):
        rows = labeled_rows(p, s.shots, seeds, draw)
        x = torch.stack([p.x[r, i] for r, i in enumerate(rows)])
        y = torch.stack([p.y[r, i] for r, i in enumerate(rows)])
        replicas = Replicas(
            make,
            seeds,
            optimizer=torch.optim.AdamW,
            lr=s.supervised_lr,
            device=device,
            stacked=source.stacked,
            weight_decay=s.supervised_decay,
        )
        for _ in range(s.supervised_steps):
            replicas.step(x, y, in_dims=(0, 0))
        won = replicas.predict(p.x_test, in_dim=0).argmax(-1).cpu()  # (R, n)
        found.append((won == p.y_test).double().mean(1))
    return torch.stack(found).mean(0).tolist()
