r"""Watching the laws of a model while it trains, without a change to the training loop.

:class:`ConservationTracker` hangs two hooks on the optimizer. Before a step it sees the final gradients (after loss
scaling and clipping), after it the new parameters; what it keeps is a few numbers a law. For SGD the exact ledger of
:mod:`~mlcollage.papers.neural_mechanics.ledger` runs along, and if asked the closed form of
:mod:`~mlcollage.papers.neural_mechanics.closed_form`; for every other optimizer the exact split of each step's change.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput
from mlcollage.papers.neural_mechanics._records import Records, tidy
from mlcollage.papers.neural_mechanics._setup import Settings, group_of, mixed_words, one_kernel, tracked
from mlcollage.papers.neural_mechanics.checks import frozen_statistics
from mlcollage.papers.neural_mechanics.closed_form import check_settings
from mlcollage.papers.neural_mechanics.ledger import LedgerState, budget, sgd_budget, sgd_step
from mlcollage.papers.neural_mechanics.symmetry import SymmetrySet

__all__ = ["ConservationTracker"]

Mode = Literal["ledger", "closed_form", "both"]
Named = dict[str, "Tensor | None"]


class ConservationTracker:
    """Measured and predicted conserved quantities along training, and where their change comes from.

    Parameters
    ----------
    model
        The model that is trained (bare, compiled, or wrapped by DistributedDataParallel).
    optimizer
        Any ``torch.optim`` optimizer that trains all parameters of the laws. ``SGD`` with any momentum, dampening,
        weight decay and schedule gets the exact ledger, predicted from squared norms alone; all others (Nesterov
        momentum too) get the exact split of the measured step, with the running mean of Adam and AdamW told apart.
    syms
        Laws to track, as from ``find_symmetries``.
    every
        Measure every so many steps. Steps between are only added up.
    mode
        ``"ledger"`` (default), ``"closed_form"`` (the continuous theory) or ``"both"``. The closed form needs SGD
        without Nesterov momentum and one learning rate and weight decay within a law.
    budget
        False leaves out the parts of the breaking budget and the residual of the symmetry; a step then costs one
        reduction of the gradient (or momentum).
    clipping
        True keeps the gradients as they came from backward (a copy of the tracked parameters' gradients), so that what
        clipping did to first order shows as a part of its own. Clipping by norm does nothing there, for a scaled
        gradient still obeys the symmetry; clipping by value breaks it.
    scaler
        The ``GradScaler`` in use, for ``clipping`` only: raw gradients are divided by its scale.
    dtype
        Type of what is kept; sums are taken in float64.

    Raises
    ------
    InvalidInput
        If the optimizer does not train a parameter of a law, a parameter is complex or lazy, settings are out of range,
        or the closed form is asked for where there is none.

    Notes
    -----
    With a fused optimizer, ``GradScaler.step`` leaves unscaling to the optimizer, where no hook sees the gradients:
    call ``scaler.unscale_(optimizer)`` first (as one does for clipping), or make the optimizer with ``fused=False``.

    Examples
    --------
    >>> from mlcollage.papers.neural_mechanics.symmetry import Symmetry, Term
    >>> model = nn.Linear(3, 4).double()
    >>> law = Symmetry("translation", "softmax", (Term("weight", keep=1),), 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    >>> x, y = torch.eye(3).double(), torch.arange(3)
    >>> with ConservationTracker(model, optimizer, SymmetrySet((law,)), mode="both") as tracker:
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         nn.functional.cross_entropy(model(x), y).backward()
    ...         _ = optimizer.step()
    >>> last = tracker.result().iloc[-1]
    >>> int(last["step"]), bool(last["rel"] < 1e-12), bool(last["closed_form_rel_change"] < 0.01)
    (5, True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        syms: SymmetrySet,
        every: int = 1,
        mode: Mode = "ledger",
        *,
        budget: bool = True,
        clipping: bool = False,
        scaler: Any = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if isinstance(every, bool) or int(every) != every or every < 1:
            raise InvalidInput(f"every={every!r} must be a whole number of at least 1.")
        if mode not in ("ledger", "closed_form", "both"):
            raise InvalidInput(f"mode={mode!r} must be 'ledger', 'closed_form' or 'both'.")
        if not len(syms):
            raise InvalidInput("there is no law to track; find_symmetries(model, example) found none.")
        self.model, self.syms, self.every, self.mode = model, syms, int(every), mode
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate, Lightning
        self.budget, self.clipping, self.scaler, self.dtype = budget, clipping, scaler, dtype
        self._parameters = tracked(model, syms)
        self._groups = group_of(self.optimizer, self._parameters)
        self._cells = sorted(set(self._groups.values()))
        self._sgd = type(self.optimizer) is torch.optim.SGD and not any(
            self.optimizer.param_groups[c].get("nesterov") for c in self._cells
        )
        if mode != "ledger":
            self._check_closed_form(optimizer)
        self._handles: list[Any] = []
        self._raw: dict[str, Tensor] = {}
        self._old: dict[str, Tensor] = {}
        self._records = Records()
        self._notes: list[str] = []
        self._sums: dict[str, Tensor] = {}
        self._times = [0.0] * len(self._cells)
        self._last: list[Settings | None] = [None] * len(self._cells)
        self._flow: Tensor | None = None
        self._seen: dict[str, Any] | None = None
        self.steps = 0
        self._started = False

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> ConservationTracker:
        """Hang the hooks and measure; ``with tracker:`` does it."""
        self.stop()
        if not self._started:
            self._begin()
        step = self.optimizer.register_step_pre_hook(self._before)
        self._handles = [step, self.optimizer.register_step_post_hook(self._after)]
        if self.clipping:
            for name, parameter in self._parameters.items():
                self._handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(self._keep, name)))
        return self

    def stop(self) -> None:
        """Take the hooks away; the last step is measured if it was not."""
        if self._handles and self.steps and self._records.last_step != self.steps:
            with torch.no_grad():
                self._record()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ConservationTracker:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def result(self, level: Literal["family", "law"] = "family") -> pd.DataFrame:
        """What has been measured so far, one row a measured step and family of laws.

        Parameters
        ----------
        level
            ``"family"``: means over a family's laws. ``"law"``: one row a law.

        Returns
        -------
        DataFrame
            ``step``, ``time`` (the sum of η(1-d)), ``law``, ``kind``, ``n_laws`` (or ``index``), ``measured`` and
            ``predicted``, ``change`` since the start, and three relative errors of the family's vector: ``rel`` =
            ‖predicted - measured‖/‖measured‖, ``rel_change`` = ‖predicted - measured‖/‖measured - Q(0)‖, and
            ``rel_null`` = ‖Q(0) - measured‖/‖measured‖, which is ``rel`` of the prediction that nothing moves (its
            ``rel_change`` is 1). With ``mode="both"`` also ``closed_form``, ``closed_form_rel`` and
            ``closed_form_rel_change``. With a budget the parts since the row before (``symmetry``, ``weight_decay``,
            ...), which with ``unexplained`` sum to the change of ``measured``, and ``rel_accounted``: the error of the
            ledger that is told the residual of the symmetry. ``attrs["notes"]`` says what was odd.
        """
        frame = tidy(self._records, self.syms, level)
        frame.attrs["notes"] = list(dict.fromkeys(self._notes + self._records.notes()))
        return frame

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What has been measured so far, as arrays over all laws, for computing.

        Returns
        -------
        dict
            ``step`` (k,) for k measured steps; ``law`` and ``kind`` (n,), the family of each of n laws; and of shape
            (k, n) ``time``, ``measured``, ``predicted``, with ``mode="both"`` ``closed_form``, ``accounted``, and the
            parts of the budget since the row before.
        """
        return self._records.arrays(self.syms)

    def state_dict(self) -> dict[str, Any]:
        """Everything measured and kept, as tensors, numbers and strings, for ``torch.save`` or a checkpoint."""
        if not self._started:
            raise InvalidInput("the tracker has not started; there is no state to save.")
        return {
            "laws": [law.name for law in self.syms],
            "steps": self.steps,
            "times": list(self._times),
            "ideal": list(self._ideal),
            "cells": [list(s) for s in self._states],
            "flow": self._flow,
            "last": [list(s) if s else None for s in self._last],
            "sums": dict(self._sums),
            "notes": list(self._notes),
            "records": self._records.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a tracker of the same laws; call it before training goes on."""
        names = [law.name for law in self.syms]
        if list(state["laws"]) != names or len(state["cells"]) != len(self._cells):
            raise InvalidInput(
                f"the state is of the laws {', '.join(state['laws'])}; this tracker has {', '.join(names)}."
            )
        self.steps, self._times, self._started = int(state["steps"]), list(state["times"]), True
        self._ideal = LedgerState(*state["ideal"])
        self._states = [LedgerState(*s) for s in state["cells"]]
        self._flow, self._sums = state["flow"], dict(state["sums"])
        self._last = [Settings(*s) if s else None for s in state["last"]]
        self._notes = list(state["notes"])
        self._records = Records.from_state(state["records"])
        self._make_masks()

    # --- hooks ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        with torch.no_grad():
            self._make_masks()
            values = self._values()
            Q = self._vector(self.syms.quantities(values))
            self._states = []
            for cell in self._cells:
                mine = self._of_cell(values, cell)
                held = {n: self._buffer(n) for n in mine}
                P = self._pair(mine, held if any(h is not None for h in held.values()) else None)
                self._states.append(LedgerState(self._vector(self.syms.quantities(mine)), P))
            P = sum(s.P for s in self._states)
            self._ideal = LedgerState(Q, P)
            if self.mode != "ledger":
                rates = self._by_home([self._settings(c).lr for c in self._cells])
                self._flow = torch.stack([Q, -(1 + self._quadratic) * rates * P])
            self._started = True
            self._record()

    def _make_masks(self) -> None:
        device = next(iter(self._parameters.values())).device
        marks, homes = [], []
        for law in self.syms:
            marks.append(torch.full((law.n_laws,), 0.0 if law.kind == "translation" else 1.0))
            first = min(self._cells.index(self._groups[n]) for n in law.parameters)
            homes.append(torch.full((law.n_laws,), first))
        self._quadratic = torch.cat(marks).to(device, self.dtype)
        self._home = torch.cat(homes).to(device)
        self._flows = []  # which laws share a kernel of the closed form
        for i in range(len(self._cells)):
            for quadratic, kind in ((0.0, "translation"), (1.0, "scale")):
                mine = (self._home == i) & (self._quadratic == quadratic)
                if bool(mine.any()):
                    self._flows.append((i, kind, mine))
        self._spans = [sorted({self._cells.index(self._groups[n]) for n in law.parameters}) for law in self.syms]

    def _keep(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if name in self._raw:
            self._raw[name].copy_(parameter.grad)
        else:
            self._raw[name] = parameter.grad.detach().clone()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._seen = None
        place: Any = "closure" if kwargs.get("closure") is not None else 1
        closure = kwargs.get("closure") if place == "closure" else (args[1] if len(args) > 1 else None)
        if closure is None:
            self._look()
            return None
        # The gradients are made inside the step (Lightning, LBFGS): look when the closure has run.

        @functools.wraps(closure)
        def seen(*a: Any, **k: Any) -> Any:
            loss = closure(*a, **k)
            self._look()
            return loss

        if place == "closure":
            return args, {**kwargs, "closure": seen}
        return (args[0], seen, *args[2:]), kwargs

    @torch.no_grad()
    def _look(self) -> None:
        """Before the update, with final gradients: what is needed of them."""
        if self._seen is not None:  # a closure that is called again
            return
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise InvalidInput(
                "the gradients are still multiplied by the GradScaler's scale, because the optimizer is fused; call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or make it with fused=False."
            )
        frozen = frozen_statistics(self.model)
        if frozen and any(law.kind == "scale" for law in self.syms):
            self._note(f"batch norm {frozen[0]!r} was in evaluation mode in a step: its scale law is void then")
        values, slopes = self._values(), self._slopes()
        settings = [self._settings(c) for c in self._cells]
        mixed = self._mixed(settings)
        missing = [name for name, slope in slopes.items() if slope is None]
        fast = self._sgd and not missing
        needed = self.budget or not fast or any(mixed)
        residuals, raws, norms = [], [], []
        for cell, s in zip(self._cells, settings, strict=True):
            mine, g = self._of_cell(values, cell), self._of_cell(slopes, cell)
            sign = -1.0 if s.ascent else 1.0
            residuals.append(sign * self._pair(mine, g) if needed else torch.zeros_like(self._quadratic))
            raws.append(sign * self._pair(mine, self._unclipped(g)) if self.clipping and self.budget else None)
            norms.append(self._norm(g) if fast and s.momentum == 0 else None)
        if not fast:
            self._copy(values)
        firsts = [not any(self._buffer(n) is not None for n in self._names(c)) for c in self._cells]
        self._seen = {
            "settings": settings, "mixed": mixed, "fast": fast, "residuals": residuals, "raws": raws,
            "norms": norms, "firsts": firsts, "idle": len(missing) == len(slopes),
        }  # fmt: skip

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is None:
            raise InvalidInput("the optimizer stepped without its pre-step hook; start the tracker outside of a step.")
        settings: list[Settings] = seen["settings"]
        if seen["fast"]:
            self._sgd_step(seen)
        else:
            self._any_step(seen)
        for i, s in enumerate(settings):
            self._times[i] += s.lr * (1 - s.dampening)
            self._last[i] = s
        self.steps += 1
        if self.steps % self.every == 0:
            self._record()

    # --- one step ---------------------------------------------------------------------------------------------------

    def _sgd_step(self, seen: Mapping[str, Any]) -> None:
        settings: list[Settings] = seen["settings"]
        norms, forces = [], []
        for i, (cell, s) in enumerate(zip(self._cells, settings, strict=True)):
            if s.momentum == 0:  # V = ‖g + λθ‖², from sums that are at hand
                g2, Q = seen["norms"][i], self._states[i].Q
                decay = self._quadratic * s.weight_decay
                norms.append(g2 + 2 * decay * seen["residuals"][i] + decay * s.weight_decay * Q)
                forces.append(g2)
            else:
                norms.append(self._norm({n: self._buffer(n) for n in self._names(cell)}, cell))
                forces.append(norms[-1])
        total: Any = sum(norms)
        exact, ideal = [], self._ideal
        for i, s in enumerate(settings):
            common: dict[str, Any] = {
                "lr": s.lr, "weight_decay": s.weight_decay, "momentum": s.momentum, "dampening": s.dampening,
                "quadratic": self._quadratic, "first": seen["firsts"][i],
            }  # fmt: skip
            state, residual, raw = self._states[i], seen["residuals"][i], seen["raws"][i]
            if self.budget:
                parts = sgd_budget(state, norms[i], residual=residual if raw is None else raw, **common)
                if raw is not None:
                    bare = sgd_budget(state, norms[i], residual=residual, **common)["symmetry"]
                    parts["clipping"] = bare - parts["symmetry"]
                self._add(parts)
            exact.append(sgd_step(state, norms[i], residual=residual, **common))
            mine = self._home == i
            moved = sgd_step(self._ideal, total, **common)
            ideal = LedgerState(torch.where(mine, moved.Q, ideal.Q), torch.where(mine, moved.P, ideal.P))
        self._states = exact
        if any(seen["mixed"]):  # no prediction without the residual where settings differ within a law
            loose = self._spread(seen["mixed"])
            Q, P = sum(s.Q for s in exact), sum(s.P for s in exact)
            ideal = LedgerState(torch.where(loose, Q, ideal.Q), torch.where(loose, P, ideal.P))
        self._ideal = ideal
        if self._flow is not None:
            self._advance_flow(settings, sum(forces))

    def _advance_flow(self, settings: list[Settings], force: Any) -> None:
        assert self._flow is not None
        flow = self._flow.clone()
        for i, kind, mine in self._flows:
            s, last = settings[i], self._last[i]
            one = one_kernel(s.lr, s.weight_decay, s.momentum, s.dampening, kind)
            speed = self._flow[1] * (s.lr / last.lr if last is not None else 1.0)
            T, b = one.transition, one.gain
            if one.order == 1:
                new = [float(T[0, 0]) * self._flow[0] + float(b[0]) * force, speed]
            else:
                new = [float(T[a, 0]) * self._flow[0] + float(T[a, 1]) * speed + float(b[a]) * force for a in (0, 1)]
            for a, value in enumerate(new):
                flow[a] = torch.where(mine, value, flow[a])
        self._flow = flow

    def _any_step(self, seen: Mapping[str, Any]) -> None:
        """The exact split of the measured step, for any optimizer; nothing is assumed of it but its lr and decay."""
        settings: list[Settings] = seen["settings"]
        values = self._values()
        exact = []
        for i, (cell, s) in enumerate(zip(self._cells, settings, strict=True)):
            old: Named = {n: self._old[n] if self._groups[n] == cell else None for n in self._old}
            step: Named = {n: None if o is None else values[n].double() - o.double() for n, o in old.items()}
            f, state = 1 + self._quadratic, self._states[i]
            moved, second = f * self._pair(old, step), self._norm(step)
            if self.budget and not seen["idle"]:
                residual, decay = -s.lr * f * seen["residuals"][i], -s.lr * s.weight_decay * f * state.Q
                raw = None if seen["raws"][i] is None else -s.lr * f * seen["raws"][i]
                self._add(
                    budget(
                        moved=moved,
                        second=second,
                        residual=residual,
                        decay=decay,
                        raw=raw,
                        momentum=self._momentum(cell, s, f, old, moved, residual, decay),
                    )
                )
            new = self._of_cell(values, cell)
            held = {n: self._buffer(n) for n in new}
            P = self._pair(new, held) if self._sgd else state.P
            exact.append(LedgerState(state.Q + moved + second, P))
        self._states = exact
        self._ideal = LedgerState(sum(s.Q for s in exact), sum(s.P for s in exact))
        if self._flow is not None:
            self._note("a step in which some parameters had no gradient was not advanced in the closed form")

    def _momentum(
        self, cell: int, s: Settings, f: Tensor, old: Named, moved: Tensor, residual: Tensor, decay: Tensor
    ) -> Tensor | None:
        """-η f p(mean - g - λθ): for SGD all that is left of the first order, for Adam from its running mean."""
        if isinstance(self.optimizer, torch.optim.SGD):
            return moved - residual - decay
        if not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            return None
        group = self.optimizer.param_groups[cell]
        decoupled = isinstance(self.optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        means: Named = dict.fromkeys(old)
        for n in self._names(cell):
            state = self.optimizer.state.get(self._parameters[n], {})
            if "exp_avg" in state:
                means[n] = state["exp_avg"] / (1 - float(group["betas"][0]) ** float(state["step"]))
        direction = -s.lr * f * self._pair(old, means)
        return direction - residual - (0 if decoupled else decay)

    def _record(self) -> None:
        measured = self._vector(self.syms.quantities(self._values()))
        accounted: Any = sum(s.Q for s in self._states)
        flow = None if self._flow is None else self._flow[0]
        predicted = flow if flow is not None and self.mode == "closed_form" else self._ideal.Q
        self._records.add(
            self.steps,
            self._by_home(self._times),
            measured,
            predicted,
            flow if self.mode == "both" else None,
            accounted if self.budget or not self._sgd else None,
            self._sums if self.budget else {},
        )
        self._sums = {}

    # --- reductions -------------------------------------------------------------------------------------------------

    def _values(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._parameters.items()}

    def _slopes(self) -> Named:
        found: Named = {}
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            if grad is not None and grad.is_sparse:
                raise InvalidInput(f"the gradient of {name!r} is sparse; make its embedding with sparse=False.")
            found[name] = None if grad is None else grad.detach()
        return found

    def _unclipped(self, slopes: Named) -> Named:
        scale = float(self.scaler.get_scale()) if self.scaler is not None else 1.0
        return {n: None if g is None or n not in self._raw else self._raw[n] / scale for n, g in slopes.items()}

    def _names(self, cell: int) -> list[str]:
        return [n for n, c in self._groups.items() if c == cell]

    def _of_cell(self, values: Mapping[str, Tensor | None], cell: int) -> Named:
        if len(self._cells) == 1:
            return dict(values)
        return {n: v if self._groups[n] == cell else None for n, v in values.items()}

    def _buffer(self, name: str) -> Tensor | None:
        return self.optimizer.state.get(self._parameters[name], {}).get("momentum_buffer")

    def _pair(self, values: Named, x: Named | None) -> Tensor:
        """p(x): ⟨θ, x⟩ by quadratic law, ⟨1_A, x⟩ by linear law."""
        if x is None:
            return torch.zeros_like(self._quadratic)
        return self._vector(self.syms.reduce({"θ": values, "x": x}, [("θ", "x")])[("θ", "x")])

    def _norm(self, x: Named, cell: int | None = None) -> Tensor:
        """⟨x, x⟩ by quadratic law, 0 by linear law."""
        if cell is not None and len(self._cells) > 1:
            x = {n: x.get(n) for n in self._parameters}
        return self._quadratic * self._vector(self.syms.reduce({"x": x}, [("x", "x")])[("x", "x")])

    def _vector(self, by_family: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for law in self.syms:
            value = by_family[law.name]
            if law.size is not None:
                i, j = torch.triu_indices(law.size, law.size, device=value.device)
                value = value[:, i, j]
            parts.append(value.reshape(-1).to(self._quadratic))
        return torch.cat(parts)

    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if name in self._old:
                self._old[name].copy_(value)
            else:
                self._old[name] = value.clone()

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _add(self, parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    # --- settings ---------------------------------------------------------------------------------------------------

    def _settings(self, cell: int) -> Settings:
        group = self.optimizer.param_groups[cell]
        momentum = float(group.get("momentum", 0.0)) if self._sgd else 0.0
        return Settings(
            float(group["lr"]),
            float(group.get("weight_decay", 0.0)),
            momentum,
            float(group.get("dampening", 0.0)) if momentum else 0.0,
            bool(group.get("maximize", False)),
        )

    def _mixed(self, settings: list[Settings]) -> list[bool]:
        """Whether a family's parameters are trained with different settings."""
        mixed = [len({settings[i] for i in span}) > 1 for span in self._spans]
        if any(mixed) and self.mode != "ledger":
            raise InvalidInput(mixed_words(self.syms[mixed.index(True)].name))
        return mixed

    def _spread(self, by_family: list[bool]) -> Tensor:
        parts = [torch.full((law.n_laws,), flag) for law, flag in zip(self.syms, by_family, strict=True)]
        return torch.cat(parts).to(self._quadratic.device)

    def _by_home(self, by_cell: list[float]) -> Tensor:
        return torch.tensor(by_cell, dtype=self.dtype, device=self._home.device)[self._home]

    def _check_closed_form(self, optimizer: Any) -> None:
        if not self._sgd:
            kind = type(self.optimizer).__name__
            kind += " with Nesterov momentum" if isinstance(self.optimizer, torch.optim.SGD) else ""
            raise InvalidInput(f"there is no closed form for {kind}, only for plain SGD; use mode='ledger'.")
        found = {c: self._settings(c) for c in self._cells}
        for s in found.values():
            check_settings(s.lr, s.weight_decay, s.momentum, s.dampening)
        for law in self.syms:
            if len({found[self._groups[n]] for n in law.parameters}) > 1:
                raise InvalidInput(mixed_words(law.name))
