r"""What a cheap posterior changes: the last layer's weights get a Gaussian, all others stay.

With the features :math:`\tilde x` that reach the last layer (and a 1 for its bias), its logits' probabilities p, and
n training examples, the curvature is taken as a Kronecker product,

.. math:: H \approx n \, A \otimes G, \qquad A = \frac1n \sum_i \tilde x_i \tilde x_i^\top, \qquad
    G = \frac1n \sum_i \mathrm{diag}(p_i) - p_i p_i^\top,

and logits of a new example are Gaussian, with the covariance that :math:`(H + \tau I)^{-1}` gives them. The prior's
precision :math:`\tau` maximizes the evidence (E. Daxberger et al., "Laplace Redux", NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mlcollage import _random
from mlcollage.measure import accuracy, brier, ece, nll, predictive_entropy
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.quality import OTHERS
from mlcollage.portraits.resampling import ends, weights
from mlcollage.portraits.subject import MOST_TRAIN, Examples, Subject, choose

_DRAWS = 100
_WIDEST = 8192  # features or classes whose eigenvectors are found
_PRECISIONS = torch.logspace(-6, 8, 113, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class LastLayerGaussian:
    """A Gaussian over the last layer's weights, as it acts on logits; made by :func:`fit_last_layer`.

    Attributes
    ----------
    weight
        (classes, features), of which the last belongs to the bias where there is one.
    vectors_in, values_in, vectors_out, values_out
        Eigenvectors (columns) and eigenvalues of A and of G.
    examples
        n.
    precision
        Of the prior.
    at_edge
        Whether the precision is the smallest or largest that was tried.
    """

    weight: Tensor
    vectors_in: Tensor
    values_in: Tensor
    vectors_out: Tensor
    values_out: Tensor
    examples: int
    precision: float
    at_edge: bool

    def variances(self, x: Tensor) -> Tensor:
        """Variances (n, classes) of the logits along the eigenvectors of G, for features (n, features)."""
        square = (x @ self.vectors_in).square()  # (n, features)
        curvature = self.examples * self.values_in[:, None] * self.values_out + self.precision  # (features, classes)
        return square @ curvature.reciprocal()

    def predict(self, x: Tensor, generator: torch.Generator, draws: int = _DRAWS) -> Tensor:
        """Class probabilities (n, classes), the mean over draws of logits."""
        mean, deviation = x @ self.weight.T, self.variances(x).sqrt()
        total = torch.zeros_like(mean)
        for _ in range(draws):
            z = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
            total += (mean + (z * deviation) @ self.vectors_out.T).softmax(1)
        return total / draws


def fit_last_layer(x: Tensor, y: Tensor, weight: Tensor, precision: float | None = None) -> LastLayerGaussian:
    """The Gaussian around a last layer's weights.

    Parameters
    ----------
    x, y
        Features (n, features) and labels (n,).
    weight
        (classes, features).
    precision
        Of the prior; None takes the one of the largest evidence.
    """
    z = x @ weight.T
    p = z.softmax(1)
    n = len(x)
    a, u = torch.linalg.eigh(x.T @ x / n)
    g, v = torch.linalg.eigh(torch.diag(p.mean(0)) - p.T @ p / n)
    a, g = a.clamp_min(0), g.clamp_min(0)
    tried = _PRECISIONS if precision is None else torch.tensor([precision], dtype=torch.float64)
    curvature = (n * a[:, None] * g).flatten()
    fit = -float(torch.nn.functional.cross_entropy(z, y, reduction="sum"))
    size, norm = weight.numel(), float(weight.square().sum())
    evidence = [
        fit - 0.5 * t * norm + 0.5 * (size * np.log(t) - float((curvature + t).log().sum())) for t in tried.tolist()
    ]
    best = int(np.argmax(evidence))
    edge = precision is None and best in (0, len(tried) - 1)
    return LastLayerGaussian(weight, u, a, v, g, n, float(tried[best]), edge)


def posterior(subject: Subject) -> Reading:
    """Confidence, calibration and likelihood with the last layer averaged over its posterior, minus without."""
    if subject.task != "classification" or subject.gives_probabilities:
        raise DoesNotApply("It changes the probabilities of logits of two classes or more, which are not there.")
    assert subject.train is not None
    last, name = _last(subject)
    if max(last.in_features, last.out_features) > _WIDEST:
        raise DoesNotApply(
            f"The last layer is {last.in_features:,} by {last.out_features:,}; up to {_WIDEST:,} are taken apart."
        )
    train, test = subject.train.take(MOST_TRAIN), subject.test
    x, foreign = (_reaching(subject, part, name) for part in (train, test))
    weight = last.weight.detach().double().cpu()
    if last.bias is not None:
        weight = torch.cat([weight, last.bias.detach().double().cpu()[:, None]], 1)
        x, foreign = (torch.cat([v, torch.ones(len(v), 1, dtype=v.dtype)], 1) for v in (x, foreign))
    found = fit_last_layer(x, train.y.reshape(-1).long().cpu(), weight)
    after = found.predict(foreign, _random.generator(subject.seed, 11)).numpy()
    before = (foreign @ weight.T).softmax(1).numpy()
    labels, n = subject.labels, test.size
    w = weights(n, subject.seed, 400)
    index = np.arange(n)
    tiny = np.finfo(np.float64).tiny
    change = {
        "confidence changed": after.max(1) - before.max(1),
        "nll changed": np.log(np.maximum(before[index, labels], tiny)) - np.log(np.maximum(after[index, labels], tiny)),
        "entropy changed": predictive_entropy(after) - predictive_entropy(before),
    }
    numbers = [
        Number(k, float(v.mean()), *ends(w @ v / n), unit="nats" if "conf" not in k else "", interval=OTHERS)
        for k, v in change.items()
    ]
    numbers += [
        Number("ece changed", ece(after, labels) - ece(before, labels)),
        Number("brier changed", brier(after, labels) - brier(before, labels)),
        Number("accuracy changed", accuracy(after, labels) - accuracy(before, labels)),
        Number("nll of posterior", nll(after, labels), unit="nats"),
    ]
    health = [
        f"A Gaussian over the {weight.numel():,} weights of {name}, from the curvature at {len(x):,} examples; "
        f"the evidence chose the prior's precision {found.precision:.3g}, averaged over {_DRAWS} draws."
    ]
    if found.at_edge:
        health.append("That is the end of the range that was tried: the evidence did not settle it.")
    health.append("If the network was trained on more examples than these, the posterior doubts more than it should.")
    return Reading("posterior", numbers=numbers, health=health, arrays={"before": before.max(1), "after": after.max(1)})


def _last(subject: Subject) -> tuple[nn.Linear, str]:
    """The linear layer whose output the logits are."""
    part = subject.test.take(8)
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            made[name] = out

        return hook

    layers = {name: m for name, m in subject.model.named_modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_hook(keep(name)) for name, m in layers.items()]
    try:
        with torch.no_grad():
            z = choose(subject.model(*part.batch.args, **part.batch.kwargs), subject.output)
    finally:
        for handle in handles:
            handle.remove()
    name = next((n for n, out in made.items() if out.shape == z.shape and torch.equal(out, z)), None)
    if name is None:
        raise DoesNotApply("The logits are not what a linear layer puts out, so there is no last layer to sample.")
    return layers[name], name


def _reaching(subject: Subject, examples: Examples, name: str) -> Tensor:
    """What reaches that layer, (n, d) float64 on the CPU."""
    rows: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(args[0].detach().double().cpu())

    handle = subject.model.get_submodule(name).register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            for part in examples.parts(128):
                subject.model(*part.batch.args, **part.batch.kwargs)
    finally:
        handle.remove()
    x = torch.cat(rows)
    if x.ndim != 2 or len(x) != examples.size:
        raise DoesNotApply(f"What reaches the last layer has the shape {tuple(x.shape)}, not a row for each example.")
    return x


def posterior_cost(subject: Subject) -> float:
    """Seconds: passes for the features, and eigenvectors."""
    examples = subject.test.size + (subject.train.size if subject.train else 0)
    return 0.5 + 2 * subject.forward * examples + 2e-5 * subject.classes * _DRAWS * subject.test.size / 1000
