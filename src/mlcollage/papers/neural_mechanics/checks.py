r"""Do a model's gradient and Hessian obey the constraints that its symmetries give?

For a symmetry with generator A (the action is :math:`θ → θ + αAθ + O(α^2)`, a translation's is a constant vector) every
batch's gradient g and Hessian H obey (Kunin et al. 2021, section 3)

.. math:: ⟨g, Aθ⟩ = 0 \qquad\text{and}\qquad H\,Aθ + A^{⊤}g = 0 .

Both reports set what is found beside a control: the same index sets laid over a random rearrangement of all parameters
and their gradients, that is random index sets of the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput

from ._calculus import Loss, derivatives, loss_value
from .symmetry import Symmetry, SymmetrySet

_HEAD = ("kind", "name", "n_laws")
_FEWEST = 4  # random vectors that the Hessian's typical effect is taken from
Named = dict[str, Tensor]


def frozen_statistics(model: nn.Module) -> list[str]:
    """Names of batch-norm layers that use running statistics now: in that mode their scale laws are void."""
    kind = nn.modules.batchnorm._BatchNorm
    norms = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return [name for name, norm in norms.items() if not norm.training and norm.running_mean is not None]


def check_gradient(
    model: nn.Module, symmetries: SymmetrySet, loss: Loss, *, controls: int = 4, generator: torch.Generator | int = 0
) -> pd.DataFrame:
    """Residuals of the gradient constraints on one batch, beside those of random index sets.

    Parameters
    ----------
    model
        In training mode if it has batch norm. Its parameters, gradients and buffers are left as they are.
    symmetries
        Laws to check.
    loss
        ``loss(model)`` gives the loss of one batch as one number.
    controls
        How many random rearrangements; 0 leaves them out.
    generator
        Draws them; an int seeds a fresh one.

    Returns
    -------
    DataFrame
        One row per family: ``kind``, ``name``, ``n_laws``, ``residual`` (largest over its laws, a cosine in [0, 1]),
        ``median``, ``control`` (median over random index sets of the same sizes; NaN without controls).

    Raises
    ------
    InvalidInput
        If the loss is not one finite number, there is no law, or batch norm is in evaluation mode.

    Examples
    --------
    >>> from mlcollage.papers.neural_mechanics import Term
    >>> with torch.random.fork_rng(devices=[]):
    ...     _ = torch.manual_seed(0)
    ...     model = nn.Linear(3, 4).double()
    >>> law = Symmetry("translation", "softmax", (Term("weight", keep=1),), 3)
    >>> x, y = torch.eye(3).double(), torch.arange(3)
    >>> report = check_gradient(model, SymmetrySet((law,)), lambda m: nn.functional.cross_entropy(m(x), y))
    >>> bool(report["residual"][0] < 1e-15 < 1e-2 < report["control"][0])
    True
    """
    _check(model, symmetries)
    with _undisturbed(model):
        parameters, slopes = _slopes(model, loss)
    draw = _generator(generator)
    found: dict[str, list[Tensor]] = {law.name: [] for law in symmetries}
    for _ in range(integer("controls", controls, least=0)):
        theta, g = rearranged((parameters, slopes), draw)
        for law in symmetries:
            found[law.name].append(law.residuals(theta, g))
    rows = []
    for law in symmetries:
        residuals, random = law.residuals(parameters, slopes), found[law.name]
        control = float(torch.stack(random).median()) if random else math.nan
        rows.append((*_head(law), float(residuals.max()), float(residuals.median()), control))
    return pd.DataFrame(rows, columns=[*_HEAD, "residual", "median", "control"])


def check_hessian(
    model: nn.Module,
    symmetries: SymmetrySet,
    loss: Loss,
    *,
    most: int = 8,
    chunk: int = 8,
    generator: torch.Generator | int = 0,
) -> pd.DataFrame:
    r"""Residuals of the Hessian constraints on one batch, from one Hessian-vector product per law.

    The residual is :math:`‖H Aθ + A^⊤ g‖ / (‖H r‖ + ‖A^⊤ g‖)` with r the tangent Aθ rearranged at random over all
    parameters: the Hessian's effect on a random vector of the same entries (root mean square over the family's, at
    least four). The control puts r in the place of Aθ.

    Parameters
    ----------
    model, symmetries, loss
        As for :func:`check_gradient`. The loss must have second derivatives.
    most
        At most so many laws of a family, drawn at random.
    chunk
        How many Hessian-vector products share one vectorized pass; where an operation cannot be vectorized they are
        done one by one.
    generator
        Draws laws and rearrangements.

    Returns
    -------
    DataFrame
        One row per family: ``kind``, ``name``, ``n_laws``, ``checked`` (how many), ``residual`` (largest), ``control``
        (median).

    Raises
    ------
    InvalidInput
        As for :func:`check_gradient`, or if an operation has no second derivative.

    Examples
    --------
    >>> from mlcollage.papers.neural_mechanics import Term
    >>> model = nn.Linear(3, 4).double()
    >>> law = Symmetry("translation", "softmax", (Term("weight", keep=1),), 3)
    >>> x, y = torch.eye(3).double(), torch.arange(3)
    >>> report = check_hessian(model, SymmetrySet((law,)), lambda m: nn.functional.cross_entropy(m(x), y))
    >>> int(report["checked"][0]), bool(report["residual"][0] < 1e-14)
    (3, True)
    """
    _check(model, symmetries)
    most, chunk = integer("most", most, least=1), integer("chunk", chunk, least=1)
    draw = _generator(generator)
    rows = []
    with _undisturbed(model), sdpa_kernel([SDPBackend.MATH]):  # the fused kernels have no second derivative
        parameters, slopes = _slopes(model, loss, create_graph=True)
        held = {name: slope.detach() for name, slope in slopes.items()}
        for law in symmetries:
            chosen = _chosen(law, most, draw)
            tangents = [_whole(_tangent(law, index, parameters), parameters) for index in chosen]
            # Aᵀg, what H Aθ must cancel; the adjoint of E_ij is E_ji
            answers = [
                _whole({} if law.kind == "translation" else _tangent(law, (index[0], *index[:0:-1]), held), parameters)
                for index in chosen
            ]
            count = max(len(chosen), _FEWEST)
            shuffled = [rearranged((tangents[i % len(chosen)],), draw)[0] for i in range(count)]
            bent = _products(parameters, slopes, tangents + shuffled, chunk)
            random = bent[len(chosen) :]
            typical = math.sqrt(sum(_norm(h) ** 2 for h in random) / count)
            residuals, controls = [], []
            for i, answer in enumerate(answers):
                size = typical + _norm(answer)
                residuals.append(_norm(_sum(bent[i], answer)) / size if size else 0.0)
                controls.append(_norm(_sum(random[i], answer)) / size if size else math.nan)
            control = float(np.nanmedian(controls)) if np.isfinite(controls).any() else math.nan
            rows.append((*_head(law), len(chosen), max(residuals), control))
    return pd.DataFrame(rows, columns=[*_HEAD, "checked", "residual", "control"])


def rearranged(sources: Sequence[Mapping[str, Tensor]], generator: torch.Generator) -> list[Named]:
    """Every source's entries rearranged over all its tensors, all sources by one and the same permutation."""
    first = sources[0]
    total = sum(t.numel() for t in first.values())
    order = torch.randperm(total, generator=generator, device=generator.device)
    out = []
    for source in sources:
        flat = torch.cat([source[name].detach().reshape(-1) for name in first])
        parts = flat[order.to(flat.device)].split([t.numel() for t in first.values()])
        out.append({name: part.reshape(t.shape) for (name, t), part in zip(first.items(), parts, strict=True)})
    return out


# --- pieces -----------------------------------------------------------------------------------------------------------


def _head(law: Symmetry) -> tuple[str, str, int]:
    return law.kind, law.name, law.n_laws


def _generator(generator: torch.Generator | int) -> torch.Generator:
    return torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator


def _check(model: nn.Module, symmetries: SymmetrySet) -> None:
    if not len(symmetries):
        raise InvalidInput("there is no law to check; find_symmetries(model, example) found none, or none was given.")
    frozen = frozen_statistics(model)
    if frozen and symmetries.of_kind("scale"):
        raise InvalidInput(
            f"batch norm {frozen[0]!r} is in evaluation mode, in which the scale laws do not hold; call model.train() "
            "first, or leave the laws of kind 'scale' out."
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics) are put back, and gradients are recorded whatever the caller's mode."""
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        with torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def _slopes(model: nn.Module, loss: Loss, *, create_graph: bool = False) -> tuple[Named, Named]:
    """Parameters and gradients by name; a frozen or unused parameter has gradient zero."""
    named: Named = dict(model.named_parameters())
    free = [name for name, p in named.items() if p.requires_grad]
    found = derivatives([loss_value(loss, model)], [named[name] for name in free], create_graph=create_graph)
    return named, _whole(dict(zip(free, found, strict=True)), named)


def _chosen(law: Symmetry, most: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Laws to check: (law,), or (block, i, j) for the generator E_ij of a matrix law."""
    count = law.n_laws if law.size is None else law.blocks * law.size**2
    order = torch.randperm(count, generator=generator, device=generator.device)[:most].tolist()
    if law.size is None:
        return [(k,) for k in sorted(order)]
    d = law.size
    return [(k // d**2, k // d % d, k % d) for k in sorted(order)]


def _tangent(law: Symmetry, index: tuple[int, ...], values: Mapping[str, Tensor]) -> Named:
    """A applied to `values` for one generator, from the finite action alone.

    A translation moves zeros to its vector. With α = 2 the diagonal actions turn ones into 2^A. And (I + E)^-1 = I - E
    for E = E_ij with i ≠ j, so that the action of I + E is exactly I + A.
    """
    own = {name: values[name].detach() for name in law.parameters}
    if law.kind == "translation":
        alpha = torch.zeros(law.n_laws, dtype=torch.float64)
        alpha[index] = 1.0
        return law.apply({n: torch.zeros_like(v) for n, v in own.items()}, alpha)
    if law.size is None:
        alpha = torch.ones(law.n_laws, dtype=torch.float64)
    else:
        alpha = torch.eye(law.size, dtype=torch.float64).repeat(law.blocks, 1, 1)
    if law.size is None or index[1] == index[2]:
        alpha[index] = 2.0
        powers = law.apply({n: torch.ones_like(v, dtype=torch.float64) for n, v in own.items()}, alpha)
        return {n: (own[n].double() * power.log2()).to(own[n].dtype) for n, power in powers.items()}
    alpha[index] = 1.0
    moved = law.apply({n: v.double() for n, v in own.items()}, alpha)
    return {n: (after - own[n].double()).to(own[n].dtype) for n, after in moved.items()}


def _whole(part: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Named:
    """Tensors for all parameters, zero where `part` has none."""
    return {name: part[name] if name in part else torch.zeros_like(p).detach() for name, p in parameters.items()}


def _products(
    parameters: Mapping[str, Tensor], slopes: Mapping[str, Tensor], vectors: Sequence[Named], chunk: int
) -> list[Named]:
    """Hessian-vector products, several in one vectorized backward pass where that works."""
    roots = [name for name, slope in slopes.items() if slope.requires_grad]
    free = {name: p for name, p in parameters.items() if p.requires_grad}
    if not roots:  # a loss that is linear in every parameter
        return [_whole({}, parameters) for _ in vectors]
    outputs, inputs = [slopes[name] for name in roots], list(free.values())
    out: list[Named] = []
    for begin in range(0, len(vectors), chunk):
        part = vectors[begin : begin + chunk]
        along = [torch.stack([v[name] for v in part]) for name in roots]  # each (vectors, *shape)
        try:
            bent = derivatives(outputs, inputs, along, retain_graph=True, is_grads_batched=True)
        except RuntimeError:  # no batching rule
            single = [derivatives(outputs, inputs, list(one), retain_graph=True) for one in zip(*along, strict=True)]
            bent = [torch.stack(same) for same in zip(*single, strict=True)]
        out += [_whole({n: b[i] for n, b in zip(free, bent, strict=True)}, parameters) for i in range(len(part))]
    return out


def _sum(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Named:
    return {name: a[name] + b[name] for name in a}


def _norm(vector: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(v.detach().double().square().sum()) for v in vector.values()))
