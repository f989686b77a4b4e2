"""How curved is the loss, and how sensitive are the outputs? Traces of the Fisher and of the Hessian matrix."""

from __future__ import annotations

import torch

from mlcollage.measure import fisher_trace, hessian_trace
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.quality import OTHERS
from mlcollage.portraits.resampling import mean_interval
from mlcollage.portraits.subject import Subject

_FISHER, _HESSIAN = 256, 128  # examples
_VECTORS = 32
_EXACT = 10  # classes up to which the labels' distribution is summed and not drawn from
_DRAWS = 4
LIKELIHOODS = {"classification": "categorical", "binary": "bernoulli", "regression": "gaussian"}


def fisher(subject: Subject) -> Reading:
    """Tr(F), mean over test examples of the expected squared norm of the gradient under the network's own labels."""
    if subject.task == "other":
        raise DoesNotApply("It needs to know what the outputs mean; say task=.")
    if subject.gives_probabilities:
        raise DoesNotApply("The outputs are probabilities, and Tr(F) is computed from logits: return them instead.")
    examples = subject.test.take(_FISHER)
    exact = subject.classes <= _EXACT
    found = fisher_trace(
        subject.asked,
        examples.batch,
        method="exact" if exact else "mc",
        draws=1 if exact else _DRAWS,
        per_layer=True,
        per_example=True,
        likelihood=LIKELIHOODS[subject.task],
        generator=subject.seed,
        batch_size=64,
        ignore_index=-100,
    )
    assert found.per_example is not None
    numbers = [Number("tr_fisher", found.value, *mean_interval(found.per_example.cpu().numpy()), interval=OTHERS)]
    numbers += [Number("tr_fisher", v, layer=name) for name, v in (found.per_layer or {}).items()]
    health = [
        f"Of {examples.size} examples; labels "
        + ("summed over exactly." if exact else f"drawn {_DRAWS} times from the network.")
    ]
    if subject.task == "regression":
        health.append("The network's outputs are read as means of unit variance; the value scales with the targets'.")
    top = float(found.per_example.sort(descending=True).values[: max(1, examples.size // 20)].sum())
    share = top / max(float(found.per_example.sum()), 1e-300)
    health.append(f"The 5% of examples with the largest traces hold {share:.0%} of it.")
    return Reading("fisher", numbers=numbers, health=health)


def fisher_cost(subject: Subject) -> float:
    """Seconds: a backward pass for each class, or draw."""
    passes = subject.classes if subject.classes <= _EXACT else _DRAWS
    return 0.3 + 2 * max(passes, 1) * subject.backward * min(_FISHER, subject.test.size)


def hessian(subject: Subject) -> Reading:
    """Tr(H) of the mean loss over test examples, by Hutchinson's estimate."""
    if subject.loss is None:
        raise DoesNotApply("It needs a loss of outputs and targets; say task= or loss=.")
    examples = subject.test.take(_HESSIAN)
    found = hessian_trace(
        subject.model,
        subject.loss_fn,
        examples.batch,
        n_vectors=_VECTORS,
        per_layer=True,
        generator=torch.Generator().manual_seed(subject.seed),
    )
    interval = f"95%, other random vectors on the same {examples.size} examples"
    numbers = [Number("tr_hessian", found.value, *found.interval(), interval=interval)]
    numbers += [Number("tr_hessian", v, layer=name) for name, v in (found.per_layer or {}).items()]
    health = [f"Of the mean loss of {examples.size} examples, from {found.draws} random vectors."]
    if found.stderr > 0.25 * abs(found.value):
        health.append("Its standard error is more than a quarter of it.")
    return Reading("hessian", numbers=numbers, health=health)


def hessian_cost(subject: Subject) -> float:
    """Seconds: two backward passes for each vector."""
    return 0.3 + 3 * _VECTORS * subject.backward * min(_HESSIAN, subject.test.size)
