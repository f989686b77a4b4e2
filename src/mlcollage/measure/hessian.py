r"""Trace and extreme eigenvalues of the Hessian of a loss, from Hessian-vector products.

.. math:: \mathrm{Tr}\, H = E[v^\top H v] \quad \text{for independent entries } v_j = \pm 1, \qquad
    H v = \nabla_\theta (v^\top \nabla_\theta L)

(Girard 1989; Hutchinson 1989; Pearlmutter 1994 for the products.) The Hessian of a network is not positive definite:
its trace may well be negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlcollage import _checks as checks
from mlcollage.data.batches import Parts, batches_of
from mlcollage.errors import InvalidInput, MissingDependency
from mlcollage.measure._likelihood import as_generator
from mlcollage.measure._tape import REENTRANT, second_derivatives
from mlcollage.measure.grad_norms import (
    GhostNorms,
    call,
    count_examples,
    graph_nodes,
    layer_name,
    loss_of,
    refuse_once_differentiable,
    setting_of,
)
from mlcollage.measure.trace import TraceResult
from mlcollage.nn.init import seeded

_METHODS = ("hutchinson", "hutchpp", "xtrace")
_ROUND = 8  # vectors between two looks at the tolerance


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    *,
    n_vectors: int = 32,
    tol: float | None = None,
    method: str = "hutchinson",
    repeats: int = 1,
    per_layer: bool = False,
    params: Iterable[nn.Parameter] | None = None,
    generator: torch.Generator | int | None = None,
    parts: Parts = None,
    ignore_index: int | None = None,
) -> TraceResult:
    r"""Estimate of the trace of the Hessian of the mean loss over the data.

    Parameters
    ----------
    model
        Any module, in evaluation mode if it has batch normalization or dropout.
    loss_fn
        ``loss_fn(output, y)``: the mean over examples, or one loss for each; a sum if its ``reduction`` says so, or if
        it is twice as large when all examples come twice.
    data
        A pair (x, y) or a dict of named parts, or an iterable of such, as for
        :func:`~mlcollage.data.batches.read_batch`. Losses of batches are weighted by their numbers of examples; where
        some targets are ``ignore_index``, by their numbers of others, over which torch's losses average, and where
        classes have a ``weight``, by the sums of these.
    n_vectors
        Random vectors, at most; each costs about two backward passes over the data.
    tol
        Stop when the standard error is below ``tol`` times the trace's absolute value; looked at after each 8 vectors.
        For ``"hutchinson"``.
    method
        ``"hutchinson"``: the mean of :math:`v^\top H v`. ``"hutchpp"`` (Meyer et al. 2021; n_vectors a multiple of 3)
        and ``"xtrace"`` (Epperly et al. 2024; even) first find the directions of largest curvature, which lowers the
        error where a few dominate; they hold n_vectors vectors at once, and need curvlinops
        (``pip install 'mlcollage[curvature]'``).
    repeats
        Independent estimates, averaged, for the standard error of ``"hutchpp"`` and ``"xtrace"``.
    per_layer
        Give the traces of the modules' own diagonal blocks as well; for ``"hutchinson"``, from the same products.
    params
        Parameters to differentiate by; by default all that require a gradient.
    generator
        Source of the vectors, or a seed.
    parts
        What the parts of a batch are, where there are more than inputs and targets.
    ignore_index
        A target that ``loss_fn`` leaves out; default its own ``ignore_index``, else -100.

    Returns
    -------
    TraceResult
        ``stderr`` is NaN for ``"hutchpp"`` and ``"xtrace"`` without ``repeats``. ``draws`` is the number of vectors
        used.

    Raises
    ------
    InvalidInput
        For batch normalization in training mode, compiled models, reentrant checkpointing, a loss that is not finite or
        has no second derivative, numbers of vectors that a method cannot use, no generator.
    UnknownName
        For an unknown method.
    MissingDependency
        For ``"hutchpp"`` and ``"xtrace"`` without curvlinops.

    Examples
    --------
    >>> model = nn.Linear(3, 1, bias=False)
    >>> x, y = torch.eye(3), torch.zeros(3, 1)
    >>> found = hessian_trace(model, nn.functional.mse_loss, (x, y), generator=0)  # H = 2/3 I
    >>> round(found.value, 4), round(found.stderr, 4)
    (2.0, 0.0)
    """
    checks.choice("method", method, _METHODS)
    hessian = _Hessian(model, loss_fn, data, params, parts, ignore_index)
    _check(method, n_vectors, tol, repeats, per_layer, hessian.size)
    generator = as_generator(generator, hessian.device)
    if method != "hutchinson":
        return _sketched(hessian, method, n_vectors, repeats, generator)
    draws: dict[str, list[Tensor]] = {}  # by layer, a tensor of v^T H v for each round
    done = 0
    while done < n_vectors:
        now = min(_ROUND, n_vectors - done) if tol is not None else n_vectors
        for layer, values in hessian.quadratic_forms(now, generator).items():
            draws.setdefault(layer, []).append(values)
        done += now
        # (layers, draws) to (draws,): one estimate of the trace for each vector
        total = torch.stack([torch.cat(v) for v in draws.values()]).sum(0)
        stderr = float(total.std() / math.sqrt(done)) if done > 1 else math.nan
        if tol is not None and stderr <= tol * abs(float(total.mean())):
            break
    layers = {layer: float(torch.cat(v).mean()) for layer, v in draws.items()}
    return TraceResult(math.fsum(layers.values()), stderr, layers if per_layer else None, draws=done)


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    *,
    k: int = 1,
    which: str = "LA",
    tol: float = 1e-3,
    max_products: int = 500,
    params: Iterable[nn.Parameter] | None = None,
    generator: torch.Generator | int | None = 0,
    parts: Parts = None,
    ignore_index: int | None = None,
) -> np.ndarray:
    """Extreme eigenvalues of the Hessian of the mean loss, by Lanczos iteration (``scipy.sparse.linalg.eigsh``).

    Parameters
    ----------
    model, loss_fn, data, params, parts, ignore_index
        As for :func:`hessian_trace`.
    k
        Number of eigenvalues.
    which
        ``"LA"`` the largest, ``"SA"`` the smallest (most negative), ``"LM"`` the largest in absolute value.
    tol
        Relative accuracy.
    max_products
        Products with the Hessian after which to give up.
    generator
        Source of the start vector, or a seed.

    Returns
    -------
    ndarray
        (k,), from the largest down.

    Raises
    ------
    InvalidInput
        As for :func:`hessian_trace`; for k outside 1..P - 1 with P parameters; if the iteration did not converge.
    UnknownName
        For an unknown ``which``.

    Examples
    --------
    >>> model = nn.Linear(3, 1, bias=False)
    >>> x, y = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.zeros(3, 1)
    >>> hessian_eigenvalues(model, nn.functional.mse_loss, (x, y)).round(3)  # 2/3 of 9
    array([6.])
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    checks.choice("which", which, ("LA", "SA", "LM"))
    hessian = _Hessian(model, loss_fn, data, params, parts, ignore_index)
    k = checks.integer("k", k, least=1, most=hessian.size - 1)  # Lanczos iteration cannot give all eigenvalues
    products = 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        if products > max_products:
            raise InvalidInput(
                f"the eigenvalues did not converge to tol={tol:g} within {max_products} products: raise either."
            )
        column = torch.from_numpy(np.ascontiguousarray(v).reshape(-1, 1)).to(hessian.device, hessian.dtype)  # (P, 1)
        return hessian.times(column)[:, 0].double().cpu().numpy()

    start = torch.randn(
        hessian.size,
        generator=as_generator(generator, hessian.device),
        device=hessian.device,
        dtype=torch.float64 if hessian.device.type != "mps" else torch.float32,  # Apple's GPUs have no float64
    )
    operator = LinearOperator((hessian.size, hessian.size), matvec=product, dtype=np.float64)
    try:
        values = eigsh(operator, k, which=which, tol=tol, v0=start.double().cpu().numpy(), return_eigenvectors=False)
    except ArpackError as error:
        raise InvalidInput(f"the eigenvalues did not converge ({error}): raise tol or max_products.") from error
    return np.sort(values)[::-1]  # eigsh gives them from the smallest up


def hessian_vector_product(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Any,
    vector: Tensor,
    *,
    params: Iterable[nn.Parameter] | None = None,
    parts: Parts = None,
    ignore_index: int | None = None,
) -> Tensor:
    """The Hessian of the mean loss times a vector.

    Parameters
    ----------
    model, loss_fn, data, params, parts, ignore_index
        As for :func:`hessian_trace`.
    vector
        (P,) or (P, K), over all parameters in the order of ``model.parameters()``.

    Returns
    -------
    Tensor
        In the shape of ``vector``.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
    >>> hessian_vector_product(model, nn.functional.mse_loss, (x, y), torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    hessian = _Hessian(model, loss_fn, data, params, parts, ignore_index)
    if vector.ndim not in (1, 2) or len(vector) != hessian.size:
        raise InvalidInput(f"vector must have {hessian.size} rows, one for each parameter, not {tuple(vector.shape)}.")
    columns = vector.reshape(hessian.size, -1).to(hessian.device, hessian.dtype)
    return hessian.times(columns).reshape(vector.shape)


class _Hessian:
    """Products with the Hessian of the mean loss over batches."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        data: Any,
        params: Iterable[nn.Parameter] | None,
        parts: Parts,
        ignore_index: int | None,
    ) -> None:
        ghost = GhostNorms(model, params)  # for its checks of the model and the parameters
        self.model, self.loss_fn = ghost.model, loss_fn
        if any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            raise InvalidInput(
                "batch normalization in training mode makes the loss of a batch depend on which batch it is: call "
                "model.eval() first (or only its BatchNorm layers'), or use GroupNorm or LayerNorm."
            )
        names = {name: self.model.get_parameter(name) for name in ghost.names.values()}
        self.params = list(names.values())
        self.layers = [layer_name(self.model, name) for name in names]
        self.sizes = [p.numel() for p in self.params]
        self.size = sum(self.sizes)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self.batches = list(_pairs(data, parts, self.device, self.model))
        if not self.batches:
            raise InvalidInput("there are no data: at least one batch is needed.")
        ignored = setting_of(loss_fn, "ignore_index", -100) if ignore_index is None else ignore_index
        by_class = setting_of(loss_fn, "weight") if setting_of(loss_fn, "reduction") == "mean" else None
        counted = [_counted(y, ignored, by_class) for _, y, _ in self.batches]
        whole = all(c is None or c == y.numel() for c, (_, y, _) in zip(counted, self.batches, strict=True))
        # Examples of each batch, or targets that count if some do not, or the sums of their weights.
        self.weights = [n if whole or c is None else c for c, (_, _, n) in zip(counted, self.batches, strict=True)]

    @contextmanager
    def gradient(self, x: Any, y: Any, n: int, weight: float) -> Iterator[list[Tensor]]:
        """The gradient of one batch's share of the mean loss, with its graph."""
        # Products too: checkpointing runs layers again in them, and must find the kernels of the first time.
        with torch.inference_mode(False), torch.enable_grad(), second_derivatives(self.model):
            loss = _mean_loss(self.loss_fn, call(self.model, x), y, n, weight)
            if any(type(node).__name__ == "CheckpointFunctionBackward" for node in graph_nodes([loss])):
                raise InvalidInput(REENTRANT)
            if not torch.isfinite(loss):
                raise InvalidInput("the loss is not a finite number, so it has no Hessian.")
            # Weighted, so that the sum over batches is the mean over all of them.
            share = loss * (weight / sum(self.weights))
            found = torch.autograd.grad(share, self.params, create_graph=True, materialize_grads=True)
            refuse_once_differentiable(found)
            yield list(found)

    def product(self, gradient: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """One product, from the graph of the gradient."""
        # Where the gradient is constant its derivative is zero, and autograd would refuse it.
        pairs = [(g, v.to(g.dtype)) for g, v in zip(gradient, vectors, strict=True) if g.requires_grad]
        if not pairs:  # a loss that is linear in the parameters
            return [torch.zeros_like(p) for p in self.params]
        outputs, along = zip(*pairs, strict=True)
        try:
            return list(torch.autograd.grad(outputs, self.params, along, retain_graph=True, materialize_grads=True))
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0]
            raise InvalidInput(
                f"the model uses an operation without second derivative ({why}): put one that has it in its place."
            ) from error

    def quadratic_forms(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws (count,) of v^T H v, split by layer; each batch has vectors of its own, which lowers the error."""
        sums = {layer: torch.zeros(count, dtype=torch.float64, device=self.device) for layer in self.layers}
        for (x, y, n), weight in zip(self.batches, self.weights, strict=True):
            with self.gradient(x, y, n, weight) as gradient:
                for k in range(count):
                    v = [_signs(p, generator) for p in self.params]
                    # The part of a layer is v_l^T (H v)_l, whose mean is the trace of its own diagonal block.
                    for layer, a, b in zip(self.layers, v, self.product(gradient, v), strict=True):
                        sums[layer][k] += (a * b).sum(dtype=torch.float64)
        return sums

    def times(self, columns: Tensor) -> Tensor:
        """H V for V (P, K)."""
        out = torch.zeros_like(columns)
        for (x, y, n), weight in zip(self.batches, self.weights, strict=True):
            with self.gradient(x, y, n, weight) as gradient:
                for k in range(columns.shape[1]):
                    parts = columns[:, k].split(self.sizes)  # of (P,), those of the parameters one after the other
                    v = [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]
                    out[:, k] += torch.cat([h.flatten() for h in self.product(gradient, v)])
        return out


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    """Independent entries +1 and -1 in the shape of p: of all with variance 1 they give the smallest error."""
    bits = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
    return bits.to(p.dtype).mul_(2).sub_(1)


def _sketched(hessian: _Hessian, method: str, n_vectors: int, repeats: int, generator: torch.Generator) -> TraceResult:
    """Hutch++ and XTrace of curvlinops, with our products."""
    try:
        from curvlinops import hutchpp_trace, xtrace
        from curvlinops._torch_base import PyTorchLinearOperator
    except ImportError as error:
        raise MissingDependency(
            f"method={method!r} needs curvlinops: pip install 'mlcollage[curvature]', or use method='hutchinson'."
        ) from error

    class Operator(PyTorchLinearOperator):
        device, dtype = hessian.device, hessian.dtype

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [hessian.times(X[0])]  # one block of parameters, (P, columns)

    estimate = hutchpp_trace if method == "hutchpp" else xtrace
    shape = [(hessian.size,)]
    values = []
    for _ in range(repeats):
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        with seeded(seed):  # curvlinops draws from the global generator
            values.append(float(estimate(Operator(shape, shape), n_vectors)))
    stderr = float(np.std(values, ddof=1) / math.sqrt(repeats)) if repeats > 1 else math.nan
    return TraceResult(float(np.mean(values)), stderr, draws=repeats * n_vectors)


def _check(method: str, n_vectors: int, tol: float | None, repeats: int, per_layer: bool, size: int) -> None:
    checks.integer("n_vectors", n_vectors, least=1)
    checks.integer("repeats", repeats, least=1)
    if tol is not None:
        checks.positive("tol", tol)
    if method == "hutchinson":
        if repeats != 1:
            raise InvalidInput("method='hutchinson' has a standard error without repeats: raise n_vectors instead.")
        return
    if per_layer or tol is not None:
        raise InvalidInput(f"method={method!r} has no per_layer and no tol: use method='hutchinson'.")
    divisor = 3 if method == "hutchpp" else 2  # the vectors are shared out equally to the parts of the method
    if n_vectors % divisor or n_vectors >= size:
        raise InvalidInput(
            f"method={method!r} needs n_vectors to be a multiple of {divisor} and less than the {size} parameters, "
            f"not {n_vectors}."
        )


def _pairs(data: Any, parts: Parts, device: torch.device, model: nn.Module) -> Iterator[tuple[Any, Any, int]]:
    """Inputs, targets and numbers of examples of the batches, on the model's device."""
    for batch in batches_of(data, parts, batch_size=None):
        x, y = (_moved(v, device) for v in (batch.check(model).x, batch.y))
        yield x, y, count_examples(x)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if not isinstance(value, Tensor):
        return value
    # Autograd does not accept what inference mode made, but copies of it.
    return value.clone().to(device) if value.is_inference() else value.to(device)


def _counted(y: Any, ignore_index: int, by_class: Tensor | None) -> float | None:
    """How many targets count, or the sum of their weights; None of targets that are no labels."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex():
        return None
    counted = y[y != ignore_index]
    return len(counted) if by_class is None else float(by_class.to(y.device)[counted].sum(dtype=torch.float64))


def _mean_loss(loss_fn: Callable[..., Tensor], output: Any, y: Any, n: int, weight: float) -> Tensor:
    loss = loss_of(loss_fn, output, y, n)
    if loss.ndim:  # (n,), one loss for each example
        return loss.sum() / weight
    return loss / weight if _is_sum(loss_fn, output, y, loss) else loss


@torch.no_grad()
def _is_sum(loss_fn: Callable[..., Tensor], output: Any, y: Any, loss: Tensor) -> bool:
    """Does the loss say so, or is it twice as large of all examples twice?"""
    reduction = setting_of(loss_fn, "reduction")
    if reduction is not None or not isinstance(output, Tensor) or not isinstance(y, Tensor):
        return bool(reduction == "sum")
    try:
        twice = loss_fn(torch.cat([output, output]), torch.cat([y, y]))
    except Exception:  # whatever a loss of one's own does with a batch of another size
        return False
    return bool(loss != 0) and bool(torch.isclose(twice, 2 * loss, rtol=1e-3))
