"""One call that finds the symmetries of a model: from its graph, confirmed by numbers, or by numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.papers.neural_mechanics._families import unique_names
from mlcollage.papers.neural_mechanics.graph import TracingFailed, structural_symmetries, trace
from mlcollage.papers.neural_mechanics.numerical import Probe, confirm, dead_biases, detect
from mlcollage.papers.neural_mechanics.symmetry import Symmetry, SymmetrySet

__all__ = ["find_symmetries"]

Method = Literal["both", "structural", "numerical"]


def find_symmetries(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    targets: Any = None,
    method: Method = "both",
    tol: float = 1e-6,
    batches: int = 3,
    seed: int = 0,
) -> SymmetrySet:
    r"""Symmetries of any model: translation, scale, rescale and matrix laws, each with a certificate.

    The graph of the model (``torch.export``) gives all diagonal symmetries, and the matrix symmetries of attention
    heads and linear chains; random batches in float64 then confirm or reject each one, by its gradient constraint and
    by its finite action. A model that cannot be traced is searched by numbers alone; ``.unhandled`` then says why.

    Parameters
    ----------
    model
        Any module, in the mode in which it will be trained: batch norm has its scale law in training mode only. It is
        copied, never run or changed. Frozen parameters count as constants.
    example_inputs
        A tensor, a tuple of positional inputs, or a mapping of keyword inputs; a batch of at least two examples.
    loss_fn
        ``loss_fn(outputs, targets)`` giving one number. None: the symmetries that leave the outputs themselves
        unchanged, which are those of every loss; the translation of the last layer needs a loss to be seen.
    targets
        Example targets for the loss. None: class numbers are tried in the shapes of ``cross_entropy``, then floats
        like the outputs.
    method
        ``"both"``: graph, confirmed by numbers. ``"structural"``: graph only (no forward pass at all).
        ``"numerical"``: numbers only.
    tol
        Largest residual (a cosine) of an exact law. A law that only an epsilon breaks is kept, its ``broken_by`` says
        so and its ``residual`` by how much.
    batches
        Random batches for the confirmation.
    seed
        Of everything random; the global generator is not touched.

    Returns
    -------
    SymmetrySet
        Families of laws; ``.unhandled`` names what was not decided or was rejected, and why.

    Raises
    ------
    InvalidInput
        Lazy, complex, quantized or sparse parameters, no trainable ones, one example only with batch norm, a loss that
        is not one finite number.

    References
    ----------
    Kunin et al. 2021, section 3. Marcotte et al. 2023 count the laws of small networks by a Lie algebra's rank.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> found = find_symmetries(model, torch.randn(16, 4), nn.functional.cross_entropy)
    >>> for law in found:
    ...     print(law.name, law.n_laws, law.residual < 1e-12)
    translation:2 9 True
    rescale:0->2 8 True
    """
    args, kwargs = _inputs(example_inputs)
    _check(model, args, kwargs, loss_fn, method, tol, batches, seed)
    if loss_fn is not None and targets is None:
        targets = _guess_targets(model, args, kwargs, loss_fn, seed)
    probe = None if method == "structural" else _probe(model, args, kwargs, loss_fn, targets, seed)
    if method == "numerical":
        return _by_numbers(_need(probe), tol, batches, ())
    try:
        found = structural_symmetries(trace(model, args, kwargs, loss_fn, targets))
    except TracingFailed as problem:
        if probe is None:
            raise
        return _by_numbers(probe, tol, batches, (f"{problem}; searched by numbers alone",))
    if probe is None:
        return found
    kept, refused = confirm(list(found), probe, tol, batches)
    taken = {term.parameter for law in kept if law.kind == "translation" for term in law.terms}
    dead, _ = confirm(dead_biases(probe, taken, batches), probe, tol, batches, found_by="numbers")
    shifts = [law for law in kept if law.kind == "translation"] + dead
    others = [law for law in kept if law.kind != "translation"]
    extra: list[Symmetry] = []
    if any(note.startswith("operator ") for note in found.unhandled):
        extra = _unseen(probe, [*shifts, *others], tol, batches)
    return SymmetrySet(unique_names([*shifts, *others, *extra]), (*found.unhandled, *refused))


def _by_numbers(probe: Probe, tol: float, batches: int, notes: tuple[str, ...]) -> SymmetrySet:
    candidates, limits = detect(probe, tol)
    taken = {term.parameter for law in candidates if law.kind == "translation" for term in law.terms}
    candidates += dead_biases(probe, taken, batches)
    kept, refused = confirm(unique_names(candidates), probe, tol, batches, found_by="numbers")
    kept.sort(key=lambda law: law.kind != "translation")
    return SymmetrySet(tuple(kept), (*notes, *limits, *refused))


def _unseen(probe: Probe, known: list[Symmetry], tol: float, batches: int) -> list[Symmetry]:
    """Laws that only numbers find, where the graph holds an operator without a rule."""
    covered = {frozenset((term.parameter, term.sign) for term in law.terms) for law in known}
    moved = {term.parameter for law in known if law.kind == "translation" for term in law.terms}
    candidates = [
        law
        for law in detect(probe, tol)[0]
        if frozenset((term.parameter, term.sign) for term in law.terms) not in covered
        and not (law.kind == "translation" and moved & set(law.parameters))
    ]
    return confirm(unique_names(candidates), probe, tol, batches, found_by="numbers")[0]


def _need(probe: Probe | None) -> Probe:
    if probe is None:
        raise InvalidInput("this method needs forward passes.")
    return probe


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, list):
        return tuple(example), {}
    raise InvalidInput(
        f"example_inputs must be a tensor, a tuple of inputs or a mapping of keyword inputs, not a "
        f"{type(example).__name__}."
    )


def _check(model: Any, args: Any, kwargs: Any, loss_fn: Any, method: str, tol: float, batches: int, seed: int) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be a torch.nn.Module, not a {type(model).__name__}.")
    if method not in ("both", "structural", "numerical"):
        raise UnknownName(f"method must be 'both', 'structural' or 'numerical'; got {method!r}.")
    if not (isinstance(tol, int | float) and math.isfinite(tol) and 0 < tol < 1):
        raise InvalidInput(f"tol must be a number between 0 and 1; got {tol!r}.")
    if not isinstance(batches, int) or batches < 1:
        raise InvalidInput(f"batches must be a whole number of at least 1; got {batches!r}.")
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidInput(
            f"loss_fn must be called as loss_fn(outputs, targets); a {type(loss_fn).__name__} cannot be."
        )
    for name, value in model.named_parameters():
        _check_parameter(name, value)
    if not any(value.requires_grad for value in model.parameters()):
        raise InvalidInput("the model has no trainable parameters; unfreeze some, or pass the module that has them.")
    sizes = [x.shape[0] for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    norms = [name or "the model" for name, module in model.named_modules() if _uses_batch(module)]
    if norms and sizes and max(sizes) < 2:
        raise InvalidInput(
            f"{norms[0]} takes batch statistics, for which example_inputs must hold at least 2 examples."
        )


def _uses_batch(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def _check_parameter(name: str, value: Tensor) -> None:
    if isinstance(value, nn.parameter.UninitializedParameter):
        raise InvalidInput(f"the parameter {name!r} is lazy; run one batch through the model first.")
    if value.is_complex():
        raise InvalidInput(f"the parameter {name!r} is complex; only real parameters have these laws.")
    if value.is_quantized or not value.is_floating_point():
        raise InvalidInput(f"the parameter {name!r} is quantized ({value.dtype}); pass the model before quantization.")
    if value.layout != torch.strided:
        raise InvalidInput(f"the parameter {name!r} is sparse ({value.layout}); make it dense first.")


def _probe(model: nn.Module, args: Any, kwargs: Any, loss_fn: Any, targets: Any, seed: int) -> Probe:
    try:
        return Probe(model, args, kwargs, loss_fn, targets, seed)
    except InvalidInput:
        raise
    except Exception as problem:  # whatever the user's own forward raises
        text = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise InvalidInput(
            f"the model does not run on random inputs like example_inputs ({text}); pass a batch as in training."
        ) from problem


def _guess_targets(model: nn.Module, args: Any, kwargs: Any, loss_fn: Any, seed: int) -> Any:
    """Targets in the usual shapes, the first with which the loss runs."""
    probe = _probe(model, args, kwargs, None, None, seed)
    out = probe.value(0)[0].detach()
    generator = torch.Generator().manual_seed(seed + 1)
    device = out.device
    options: list[Tensor] = []
    if out.dim() >= 2:
        options.append(torch.randint(out.shape[1], (out.shape[0], *out.shape[2:]), generator=generator))
        options.append(torch.randint(out.shape[-1], out.shape[:-1], generator=generator))
    options.append(torch.rand(out.shape, generator=generator).to(torch.get_default_dtype()))
    for option in options:
        try:
            value = Probe(model, args, kwargs, loss_fn, option.to(device), seed).value(0)[0]
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        if value.numel() == 1:
            return option.to(device)
    raise InvalidInput("loss_fn runs with none of the usual targets; pass example targets=... as in training.")
