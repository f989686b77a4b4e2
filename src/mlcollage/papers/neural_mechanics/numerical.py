r"""Symmetries confirmed, and where there is no graph found, by numbers.

A law with generator A holds if and only if :math:`⟨g, Aθ⟩ = 0` for the gradient of every batch. A probe draws batches
like the example, with random targets, on a float64 copy of the model. Confirmation measures the residual of every law
against random generators (the same entries, random weights) and applies the finite action. Detection stacks
:math:`r_{ij} = ⟨g_i, A_jθ⟩` over batches for all rows, columns and entries of parameters: its null space is the laws.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics._families import module_of, unique_names
from mlcollage.papers.neural_mechanics.symmetry import Kind, Symmetry, Term, typical_size

__all__ = ["Probe", "confirm", "dead_biases", "detect"]

EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps")
BROKEN_AT_MOST = 0.1  # residual up to which a law may be called broken by an epsilon
MOST_CANDIDATES = 64


class Probe:
    """Random batches and their gradients on a float64 copy of a model; the model itself is never run.

    Parameters
    ----------
    model
        The user's model, copied in its present mode.
    args, kwargs
        Example inputs: batches have their shapes, the moments of their floats and the values of their integers.
    loss, targets
        As for ``find_symmetries``; without a loss, gradients are of random linear functions of the outputs.
    seed
        Of all batches, and of what the model draws itself (dropout).
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Callable[[Any, Any], Tensor] | None = None,
        targets: Any = None,
        seed: int = 0,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.args, self.kwargs, self.loss, self.targets, self.seed = args, kwargs, loss, targets, seed
        self.dtype = torch.float64
        self.model.double()
        try:
            self.value(0)
        except (RuntimeError, TypeError, ValueError):  # code that fixes a type: stay in the model's own
            self.model = copy.deepcopy(model)
            self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            self.value(0)

    @property
    def precision(self) -> float:
        """Relative precision of the copy's type."""
        return torch.finfo(self.dtype).eps

    def parameters(self) -> dict[str, Tensor]:
        """Trainable parameters of the copy."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def batch(self, k: int) -> tuple[Any, Any, Any]:
        """Inputs, keyword inputs and targets of batch `k`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + k)
        given = (self.args, self.kwargs, self.targets)
        args, kwargs, targets = pytree.tree_map(lambda leaf: self._like(leaf, generator), given)
        return args, kwargs, targets

    def _like(self, leaf: Any, generator: torch.Generator) -> Any:
        if not isinstance(leaf, Tensor) or leaf.numel() == 0:
            return leaf
        if leaf.is_floating_point():
            value = leaf.detach().to("cpu", torch.float64)
            spread = float(value.std(correction=0)) or 1.0
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            return (value.mean() + spread * noise).to(leaf.device, self.dtype)
        if leaf.dtype == torch.bool or leaf.is_complex():
            return leaf
        pick = torch.randint(leaf.numel(), leaf.shape, generator=generator)
        return leaf.detach().flatten()[pick.to(leaf.device)]

    def value(self, k: int, parameters: dict[str, Tensor] | None = None) -> list[Tensor]:
        """The loss of batch `k`, or all floating outputs without one; with other parameters if given."""
        args, kwargs, targets = self.batch(k)
        cuda = sorted({p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"})
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed + k)
            state = dict(self.model.named_parameters()) if parameters is None else parameters
            out = torch.func.functional_call(self.model, {**state, **buffers}, args, kwargs, tie_weights=True)
            if self.loss is not None:
                out = self.loss(out, targets)
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not leaves:
            raise InvalidInput("the model gives no floating-point output; pass a loss_fn that makes one from it.")
        if self.loss is not None and leaves[0].numel() != 1:
            raise InvalidInput(f"loss_fn must give one number; it gave a tensor of shape {tuple(leaves[0].shape)}.")
        return leaves

    def gradients(self, k: int) -> dict[str, Tensor | None]:
        """Gradient by parameter on batch `k` (None where the parameter is not used)."""
        leaves = [leaf for leaf in self.value(k) if leaf.requires_grad]
        if not leaves:
            raise InvalidInput("no output depends on a trainable parameter: unfreeze parameters or check the model.")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009 + k)
        seeds = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in leaves]
        if self.loss is not None:
            seeds = [torch.ones_like(leaf) for leaf in leaves]
        named = self.parameters()
        found = torch.autograd.grad(leaves, list(named.values()), seeds, allow_unused=True)
        grads: dict[str, Tensor | None] = dict(zip(named, found, strict=True))
        if any(grad is not None and not bool(torch.isfinite(grad).all()) for grad in found):
            raise InvalidInput(
                "a gradient is not finite on a random batch like example_inputs; check model and loss_fn."
            )
        return grads

    @contextmanager
    def small_eps(self, factor: float) -> Iterator[int]:
        """Every module's epsilon times `factor` for a while; gives their number."""
        changed = []
        for module in self.model.modules():
            for name in EPS_NAMES:
                value = getattr(module, name, None)
                if isinstance(value, float) and 0 < value < 0.1:
                    changed.append((module, name, value))
        try:
            for module, name, value in changed:
                setattr(module, name, value * factor)
            yield len(changed)
        finally:
            for module, name, value in changed:
                setattr(module, name, value)


@dataclass(frozen=True)
class _Measured:
    """Residuals of one family, (batches, laws), and of random generators of the same entries, (draws, laws)."""

    residuals: NDArray[np.float64]
    controls: NDArray[np.float64]
    noise: float

    @property
    def worst(self) -> float:
        return float(self.residuals.max())

    @property
    def control(self) -> float:
        """Median residual of the random generators; NaN if no law of the family has a gradient to speak of."""
        loud = self.controls[self.controls > self.noise]
        return float(np.median(loud)) if loud.size else float("nan")

    @property
    def p_value(self) -> float:
        """Share of random generators that fit as well as the law; NaN if no law has a gradient to speak of."""
        loud = self.controls > self.noise
        if not loud.any():
            return float("nan")
        return float((1 + (loud & (self.controls <= self.residuals.max(0))).sum()) / (1 + loud.sum()))


def confirm(
    symmetries: Sequence[Symmetry], probe: Probe, tol: float = 1e-6, batches: int = 3, found_by: str = "graph"
) -> tuple[list[Symmetry], list[str]]:
    """Keep the laws whose gradient constraint and finite action hold; the others as sentences.

    Parameters
    ----------
    symmetries
        Candidates.
    probe
        Batches and gradients.
    tol
        Largest residual of an exact law, and largest relative change of the loss (or outputs) under its action.
    batches
        Number of random batches.
    found_by
        Written into the certificate.

    Returns
    -------
    tuple
        The confirmed families with ``residual`` and ``certificate`` (found_by, batches, dtype, p_value, control: median
        residual of random generators, action: relative change under the finite action, eps_residual), and why others
        were rejected.
    """
    tol = max(tol, 100 * probe.precision)
    measured = _measure(symmetries, probe, batches)
    small: dict[str, float] = {}
    if any(m.worst > tol for m in measured):
        with probe.small_eps(1e-3) as count:
            if count:
                again = _measure(symmetries, probe, 1, controls=0)
                small = {law.name: m.worst for law, m in zip(symmetries, again, strict=True)}
    plain = [m.worst <= tol and not law.broken_by for law, m in zip(symmetries, measured, strict=True)]
    moved = _actions(symmetries, plain, probe, tol)
    kept, refused = [], []
    for law, m, action in zip(symmetries, measured, moved, strict=True):
        shrunk = small.get(law.name, m.worst)
        by_eps = m.worst <= BROKEN_AT_MOST and (shrunk <= max(tol, m.worst / 30) or (law.broken_by and m.worst <= 1e-3))
        if m.worst > tol and not by_eps:
            refused.append(f"{law.name}: rejected, its gradient constraint fails by {m.worst:.1e} on random batches")
            continue
        if action > (tol if m.worst <= tol and not law.broken_by else BROKEN_AT_MOST):
            refused.append(f"{law.name}: rejected, its finite action changes the result by {action:.1e}")
            continue
        certificate = {
            "found_by": found_by,
            "batches": batches,
            "dtype": str(probe.dtype).removeprefix("torch."),
            "p_value": m.p_value,
            "control": m.control,
            "action": action,
            "eps_residual": shrunk if m.worst > tol else float("nan"),
        }
        broken = law.broken_by if m.worst > probe.precision * 1e3 else None
        if m.worst > tol and broken is None:
            broken = "eps"
        kept.append(replace(law, residual=m.worst, certificate=certificate, broken_by=broken))
    return kept, refused


def _measure(symmetries: Sequence[Symmetry], probe: Probe, batches: int, controls: int = 20) -> list[_Measured]:
    params = {name: value.detach() for name, value in probe.parameters().items()}
    residuals: list[list[Any]] = [[] for _ in symmetries]
    random: list[list[Any]] = [[] for _ in symmetries]
    generator = torch.Generator().manual_seed(probe.seed + 77)
    for k in range(batches):
        grads = probe.gradients(k)
        drawn = [_weighted(grads, generator) for _ in range(-(-controls // batches))] if controls else []
        typical, sizes = typical_size(grads), [typical_size(g) for g in drawn]
        for law, found, control in zip(symmetries, residuals, random, strict=True):
            found.append(law.residuals(params, grads, typical).cpu().numpy())
            control += [law.residuals(params, g, t).cpu().numpy() for g, t in zip(drawn, sizes, strict=True)]
    noise = 1e3 * probe.precision
    return [
        _Measured(np.stack(a), np.stack(b) if b else np.empty((0, law.blocks)), noise)
        for law, a, b in zip(symmetries, residuals, random, strict=True)
    ]


def _weighted(grads: dict[str, Tensor | None], generator: torch.Generator) -> dict[str, Tensor | None]:
    """Gradients with random weights: θ and g then meet in a random diagonal generator of the same entries."""
    return {
        name: None if grad is None else grad * torch.randn(grad.shape, generator=generator).to(grad)
        for name, grad in grads.items()
    }


def _strength(law: Symmetry, generator: torch.Generator) -> Tensor:
    noise = torch.randn(law.shape, generator=generator, dtype=torch.float64)
    if law.size is not None:
        return torch.eye(law.size, dtype=torch.float64) + 0.2 * noise / law.size**0.5
    return 0.1 * noise if law.kind == "translation" else torch.exp(0.3 * noise)


def _actions(symmetries: Sequence[Symmetry], exact: Sequence[bool], probe: Probe, tol: float) -> list[float]:
    """Relative change of the result under each finite action.

    The exact laws first act all together, and so do those that an epsilon breaks; only where that changes the result
    too much does each act alone.
    """
    generator = torch.Generator().manual_seed(probe.seed + 78)
    strengths = [_strength(law, generator) for law in symmetries]
    out = [0.0] * len(symmetries)
    with torch.no_grad():
        before = probe.value(0)
        for wanted, limit in ((True, tol), (False, BROKEN_AT_MOST)):
            group = [k for k, ok in enumerate(exact) if ok is wanted]
            change = _changed(probe, before, [(symmetries[k], strengths[k]) for k in group])
            for k in group:
                out[k] = change if change <= limit else _changed(probe, before, [(symmetries[k], strengths[k])])
    return out


def _changed(probe: Probe, before: list[Tensor], actions: Sequence[tuple[Symmetry, Tensor]]) -> float:
    state: dict[str, Tensor] = dict(probe.model.named_parameters())
    for law, strength in actions:
        state = {**state, **law.apply(state, strength)}
    after = probe.value(0, state)
    sizes = [float((b - a).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(after, before, strict=True)]
    return max(sizes, default=0.0)


def dead_biases(probe: Probe, taken: set[str], batches: int = 3) -> list[Symmetry]:
    """Entries of one-dimensional parameters whose gradient is zero though their layer learns (key biases, for one).

    A bias whose weight row has no gradient either (a dead unit) does not count.
    """
    grads = [probe.gradients(k) for k in range(batches)]
    shown = [float(max(g.abs().max() for g in batch.values() if g is not None)) for batch in grads]
    out = []
    for name, value in probe.parameters().items():
        weight = _partner(name, probe)
        if value.dim() != 1 or name in taken or weight is None or grads[0][name] is None:
            continue
        dead = torch.ones(value.numel(), dtype=torch.bool, device=value.device)
        alive = torch.zeros_like(dead)
        for batch, scale in zip(grads, shown, strict=True):
            own, rows = batch[name], batch[weight]
            axis = None if own is None or rows is None else _axis_of(rows, own.numel())
            if own is None or rows is None or axis is None:
                continue
            dead &= own.abs() <= 1e3 * probe.precision * scale
            alive |= rows.abs().movedim(axis, 0).flatten(1).amax(1) > 1e4 * probe.precision * scale
        index = torch.nonzero(dead & alive).flatten().tolist()
        if not index:
            continue
        start, stop = index[0], index[-1] + 1
        rows_ = None if len(index) == value.numel() else (start, stop)
        laws = None
        if len(index) != stop - start:
            place = {entry: law for law, entry in enumerate(index)}
            rows_, laws = None, tuple(place.get(entry, -1) for entry in range(value.numel()))
        term = Term(name, 1, keep=0, rows=rows_, laws=laws)
        out.append(Symmetry("translation", f"translation:{name}", (term,), len(index)))
    return out


def _axis_of(weight: Tensor, count: int) -> int | None:
    """The axis of a weight that its bias of `count` entries belongs to."""
    return next((axis for axis in (0, 1) if weight.shape[axis] == count), None)


def _partner(bias: str, probe: Probe) -> str | None:
    """The weight that the bias belongs to, by the naming of torch.nn."""
    guess = bias[: -len("bias")] + "weight" if bias.endswith("bias") else ""
    found = probe.parameters().get(guess)
    return guess if found is not None and found.dim() >= 2 else None


# --- detection without a graph --------------------------------------------------------------------------------------


def detect(probe: Probe, tol: float = 1e-6) -> tuple[list[Symmetry], list[str]]:
    """Scale, rescale and translation families from gradients alone, with notes of what this cannot see.

    Candidates are the rows, the columns and, for vectors, the entries of every parameter, and columns in equal runs
    (a linear layer after a flatten). For candidates of one count n, the null space of the (batches·n, candidates)
    matrix of :math:`⟨g, Aθ⟩` gives families whose k-th law joins the k-th row, column or entry of each.
    """
    notes = [
        "found by numbers alone: matrix laws, and laws that pair channels in another order than their own, are not seen"
    ]
    with probe.small_eps(1e-4):
        groups = _candidates(probe)
        largest = max((len(terms) for terms in groups.values()), default=0)
        count = min(max(6, 2 * largest), 40)
        grads = [probe.gradients(k) for k in range(count)]
        out = _zero_sums(probe, grads)
        for size, terms in sorted(groups.items()):
            if len(terms) > MOST_CANDIDATES or len(grads) * size < 2 * len(terms):
                notes.append(f"{len(terms)} candidates for families of {size} laws are too many to be told apart")
                continue
            out += _null_families(probe, grads, terms, size)
    return list(unique_names(out)), notes


def _candidates(probe: Probe) -> dict[int, list[Term]]:
    groups: dict[int, list[Term]] = defaultdict(list)
    matrices = []
    for name, value in probe.parameters().items():
        if value.dim() == 0 or not bool((value != 0).any()):
            continue
        groups[value.shape[0]].append(Term(name, 1, keep=0))
        if value.dim() >= 2:
            groups[value.shape[1]].append(Term(name, 1, keep=1))
            matrices.append((name, tuple(value.shape)))
    for name, shape in matrices:
        if len(shape) == 2:
            for size in sorted(groups):
                if 1 < size < shape[1] and shape[1] % size == 0 and len(groups[size]) > 1:
                    groups[size].append(Term(name, 1, (shape[0], size, shape[1] // size), 1))
    return {size: terms for size, terms in groups.items() if size > 1}


def _null_families(
    probe: Probe, grads: Sequence[dict[str, Tensor | None]], terms: Sequence[Term], size: int
) -> list[Symmetry]:
    params = probe.parameters()
    table = np.zeros((len(grads), size, len(terms)))
    scale = np.zeros(len(terms))
    for j, term in enumerate(terms):
        for i, batch in enumerate(grads):
            grad = batch[term.parameter]
            if grad is None:
                continue
            table[i, :, j] = term.bilinear(params[term.parameter], grad, size).cpu().numpy()
            scale[j] += float(grad.norm() * params[term.parameter].detach().norm())
    flat = table.reshape(-1, len(terms))
    used = np.flatnonzero(scale > 1e-9 * scale.max())  # a parameter without a gradient has no law of this kind
    if not used.size:
        return []
    flat = flat[:, used]
    exact = 1e-8 * np.abs(flat).max()
    out = []
    for vector in _integer_null_vectors(flat, exact):
        chosen = [(terms[used[j]], int(sign)) for j, sign in enumerate(vector) if sign]
        touched = [replace(term, sign=sign) for term, sign in chosen]
        if touched[0].sign < 0:
            touched = [replace(term, sign=-term.sign) for term in touched]
        touched.sort(key=lambda term: term.sign < 0)
        kind: Kind = "scale" if all(term.sign > 0 for term in touched) else "rescale"
        name = f"{kind}:{module_of(touched[0].parameter)}"
        if kind == "rescale":
            name += f"->{module_of(next(t.parameter for t in touched if t.sign < 0))}"
        out.append(Symmetry(kind, name, tuple(touched), size))
    return out


def _integer_null_vectors(table: NDArray[np.float64], exact: float) -> list[NDArray[np.int64]]:
    """A sparse basis of the null space by row reduction, of which vectors of small whole numbers are kept."""
    _, singular, right = np.linalg.svd(table, full_matrices=True)
    rank = int((singular > exact * np.sqrt(table.shape[0])).sum())
    basis = right[rank:].copy()
    pivots: list[int] = []
    for row in range(len(basis)):
        block = np.abs(basis[row:])
        block[:, pivots] = 0.0
        at, pivot = np.unravel_index(int(block.argmax()), block.shape)
        swapped = row + int(at)
        basis[[row, swapped]] = basis[[swapped, row]]
        basis[row] /= basis[row, pivot]
        others = [r for r in range(len(basis)) if r != row]
        basis[others] -= np.outer(basis[others, pivot], basis[row])
        pivots.append(int(pivot))
    out = []
    for vector in basis:
        whole = np.round(vector)
        if np.abs(vector - whole).max() < 1e-4 and 0 < np.abs(whole).max() <= 4:
            out.append(whole.astype(np.int64))
    return out


def _zero_sums(probe: Probe, grads: Sequence[dict[str, Tensor | None]]) -> list[Symmetry]:
    """Translations: parameters whose gradient sums to zero over rows (for each column) or over columns."""
    out = []
    for name, value in probe.parameters().items():
        rest = tuple(range(1, value.dim()))
        options: dict[tuple[int, ...], Any] = {(0,): None if value.dim() == 1 else rest if len(rest) > 1 else 1}
        if rest:
            options[rest] = 0
        for axes, keep in options.items():
            summed = int(np.prod([value.shape[axis] for axis in axes])) if value.dim() else 1
            if summed > 1 and _sums_vanish([batch[name] for batch in grads], axes):
                term = Term(name, 1, keep=keep)
                out.append(Symmetry("translation", f"translation:{module_of(name)}", (term,), value.numel() // summed))
                break
    return out


def _sums_vanish(grads: Sequence[Tensor | None], axes: tuple[int, ...]) -> bool:
    present = [grad for grad in grads if grad is not None]
    small = [float(grad.sum(axes).abs().max()) <= 1e-9 * float(grad.norm()) for grad in present]
    return len(present) == len(grads) and all(small) and any(float(grad.norm()) > 0 for grad in present)
