"""What happens to gradients in a loop that is not ours, between the backward pass and the optimizer.

The twin makes each update from the gradient of its own loss. It can follow your loop only if yours does so too: if
gradients are cleared between updates, no hook on a parameter changes them, and nothing but the clipping that the twin
was told of happens to them before the step. :class:`GradientWatch` looks at each of these while you train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LOOKS = 3  # updates at the beginning whose gradients are compared with what backward gave


class GradientWatch:
    """Hooks on a model's parameters that look, and change nothing.

    Parameters
    ----------
    model
        Whose parameters are watched.
    optimizer
        That trains them.
    clip_norm, clip_value
        What the loop is said to do to gradients.

    Attributes
    ----------
    problem : str or None
        A sentence, once something was seen that a twin cannot follow.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None, clip_value: float | None
    ) -> None:
        self.problem: str | None = None
        self._model, self._closures = model, False
        self._optimizer, self._clip = optimizer, (clip_norm, clip_value)
        self._handles: list[Any] = []  # of hooks for the coming update only
        self._around: dict[
            int, tuple[list[Any], frozenset[int]]
        ] = {}  # by parameter: our hooks, and whose they enclose
        self._given: dict[int, Tensor] = {}  # gradients as backward left them, by parameter
        self._update = 0
        self._enclose()
        self._arm()
        self._keep()

    def before_step(self, *, closure: bool) -> None:
        """To be called when the optimizer is about to step; ``closure`` if the backward pass is still to come."""
        self._update += 1
        self._closures = closure
        if self._given and not closure:
            self._compare()

    def after_step(self, *, look: bool) -> None:
        """To be called when it has; ``look`` if the gradients of the next update shall be compared."""
        self._enclose()
        self._arm()
        if not self._closures and (look or self._update < _LOOKS):
            self._keep()

    def stop(self) -> None:
        """Take all hooks away."""
        for handle in (*self._handles, *(h for ours, _ in self._around.values() for h in ours)):
            handle.remove()
        self._handles, self._around, self._given = [], {}, {}

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)

    # --- gradients that were not cleared ------------------------------------------------------------------------------

    def _arm(self) -> None:
        """See whether the gradient of one parameter is cleared before the next backward pass adds to it."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._given = [], {}
        trained = (p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad)
        p = next((p for p in trained if p.grad is not None and _any(p.grad)), None)
        if p is None:
            return
        stale, update = False, self._update + 1

        def before(_: Tensor) -> None:
            nonlocal stale
            stale = p.grad is not None and _any(p.grad)

        def after(_: Tensor) -> None:  # not by torch.autograd.grad, which adds to nothing
            if stale:
                self.problem = (
                    f"gradients were not cleared before the backward pass of update {update}, so that they "
                    "add up over updates, which no twin can follow; call optimizer.zero_grad() in every update (in "
                    "Lightning, leave optimizer_zero_grad as it is)."
                )
            for handle in mine:
                handle.remove()

        mine = [p.register_hook(before), p.register_post_accumulate_grad_hook(after)]
        self._handles += mine

    # --- hooks on parameters ------------------------------------------------------------------------------------------

    def _enclose(self) -> None:
        """Put hooks of ours before and behind those of others, which shows what these do to the gradient."""
        for name, p in self._parameters():
            ours, known = self._around.get(id(p), ([], frozenset()))
            mine = {h.id for h in ours}
            tables = (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
            others = frozenset(key for table in tables for key in table or () if key not in mine)
            if others == known:
                continue
            for handle in ours:
                handle.remove()
            self._around[id(p)] = (self._hooks_around(name, p) if others else [], others)

    def _hooks_around(self, name: str, p: Tensor) -> list[Any]:
        seen: dict[str, Tensor | None] = {}

        def look(when: str) -> Callable[[Tensor | None], None]:
            def hook(g: Tensor | None) -> None:
                seen[when] = None if g is None else g.detach().clone()

            return hook

        def compare(when: str) -> Callable[[Tensor], None]:
            def hook(g: Tensor | None) -> None:
                was = seen.pop(when, None)
                if was is not None and (g is None or not _same(was, g)):
                    self.problem = (
                        f"a hook on the parameter {name} changes its gradient, and hooks on parameters are not copied "
                        "to the twin; take it away, or change the loss or the optimizer instead."
                    )

            return hook

        handles = []
        if p._backward_hooks:
            handles += [_first(p._backward_hooks, p.register_hook(look("before"))), p.register_hook(compare("before"))]
        if table := getattr(p, "_post_accumulate_grad_hooks", None):
            behind, ahead = look("behind"), compare("behind")
            handles.append(_first(table, p.register_post_accumulate_grad_hook(lambda q: behind(q.grad))))
            handles.append(p.register_post_accumulate_grad_hook(lambda q: ahead(q.grad)))
        return handles

    # --- gradients that were changed behind the backward pass ---------------------------------------------------------

    def _keep(self) -> None:
        """Keep the next update's gradients as backward gives them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return  # averaging over processes comes later

        def keep(p: Tensor) -> None:
            self._given[id(p)] = p.grad.detach().clone()  # type: ignore[union-attr]  # the last of an update stays

        self._handles += [p.register_post_accumulate_grad_hook(keep) for _, p in self._parameters()]

    def _compare(self) -> None:
        """Refuse gradients (P,) that are not those of backward, scaled back or clipped as was said."""
        pairs = [(self._given[id(p)], p.grad) for _, p in self._parameters() if id(p) in self._given]
        if any(g is None or g.is_sparse for _, g in pairs):
            return
        given, now = (torch.cat([g.reshape(-1).double() for g in side]) for side in zip(*pairs, strict=True))
        norm, value = self._clip
        if not bool(given.isfinite().all()):
            return  # a scaler skips such an update, and a diverged run says so itself
        for scale in _scales(float(now.norm()) / max(float(given.norm()), 1e-300)):
            expected = given * scale
            if norm is not None:
                expected = expected * min(1.0, norm / (float(expected.norm()) + 1e-6))
            if value is not None:
                expected = expected.clamp(-value, value)
            if float((now - expected).norm()) <= 1e-3 * float(expected.norm()) + 1e-12:
                return
        said = ", ".join(
            f"{n}={v}" for n, v in zip(("clip_norm", "clip_value"), self._clip, strict=True) if v is not None
        )
        self.problem = (
            f"the gradients of update {self._update} (norm {float(now.norm()):.4g}) are not those that backward gave "
            f"(norm {float(given.norm()):.4g}){f' clipped by {said}' if said else ''}: something changed them "
            "before the optimizer's step; tell the twin of clipping by clip_norm or clip_value, and leave them alone "
            "otherwise."
        )


def _any(gradient: Tensor) -> bool:
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_sparse or b.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _first(table: dict[int, Any], handle: Any) -> Any:
    """Put the hook of a handle before those that are there: the order of the dictionary is that of the calls."""
    others = {key: hook for key, hook in table.items() if key != handle.id}
    mine = table[handle.id]
    table.clear()
    table[handle.id] = mine
    table.update(others)
    return handle


def _scales(factor: float) -> set[float]:
    """What the gradients may have been multiplied by before they were clipped: 1, or what a scaler of gradients takes.

    Its scale is a large power of two; a smaller one is what a loop does on purpose.
    """
    if not 0 < factor < 2.0**-6:
        return {1.0}
    return {1.0, *(2.0 ** math.floor(math.log2(factor) + shift) for shift in (0, 0.5, 1))}


def gives_closure(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the optimizer was handed a function that makes the backward pass, in the arguments of its step."""
    return kwargs.get("closure") is not None or len([a for a in args if callable(a) and not isinstance(a, Tensor)]) > 0
