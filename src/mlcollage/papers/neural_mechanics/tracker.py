r"""Watching the laws of a model while it trains, without a change to the training loop.

:class:`ConservationTracker` hangs two hooks on the optimizer. Before a step it sees the final gradients (after loss
scaling and clipping), after it the new parameters; what it keeps is a few numbers per law. For SGD the exact ledger of
:mod:`~mlcollage.papers.neural_mechanics.ledger` runs along, and if asked the closed form of
:mod:`~mlcollage.papers.neural_mechanics.closed_form`; for every other optimizer the exact split of each step's change.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from mlcollage._checks import choice, integer
from mlcollage.errors import InvalidInput
from mlcollage.nn import unwrap

from ._records import Records, tidy
from .checks import frozen_statistics
from .closed_form import SGDSettings, check_settings, propagator
from .ledger import LedgerState, budget, sgd_budget, sgd_step
from .symmetry import SymmetrySet
from .term import Kind, check_parameter

Mode = Literal["ledger", "closed_form", "both"]
Named = dict[str, "Tensor | None"]


@dataclass
class _Group:
    """A parameter group of the optimizer, and the part of every law that its parameters make up.

    `state` holds Q and P by law, each (laws,); laws that the group has no part in are zero.
    """

    index: int
    names: tuple[str, ...]
    state: LedgerState = field(default=LedgerState(0.0, 0.0))
    time: float = 0.0
    last: SGDSettings | None = None  # of the step before


@dataclass
class _Look:
    """What is seen of a group before a step; vectors are (laws,).

    `residual` is p(g) with the final gradient and `raw` with the unclipped one, `norm` is ⟨g, g⟩, and `first` says that
    the momentum buffer will be made in this step.
    """

    settings: SGDSettings
    residual: Tensor
    raw: Tensor | None
    norm: Tensor | None
    first: bool


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
    symmetries
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
        symmetries: SymmetrySet,
        every: int = 1,
        mode: Mode = "ledger",
        *,
        budget: bool = True,
        clipping: bool = False,
        scaler: Any = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not len(symmetries):
            raise InvalidInput("there is no law to track; find_symmetries(model, example) found none.")
        self.every = integer("every", every, least=1)
        self.mode = choice("mode", mode, ("ledger", "closed_form", "both"))
        self.model, self.symmetries = model, symmetries
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate, Lightning
        self.budget, self.clipping, self.scaler, self.dtype = budget, clipping, scaler, dtype
        self.steps = 0
        self._parameters = _parameters(model, symmetries)
        self._groups = _groups(self.optimizer, self._parameters)
        groups = [self.optimizer.param_groups[group.index] for group in self._groups]
        self._sgd = type(self.optimizer) is torch.optim.SGD and not any(group.get("nesterov") for group in groups)
        self._scales = len(symmetries.of_kind("scale")) > 0
        self._lay_out()
        if self.mode != "ledger":
            self._check_closed_form()
        self._handles: list[Any] = []
        self._raw: dict[str, Tensor] = {}  # gradients before clipping
        self._old: dict[str, Tensor] = {}  # parameters before the step, where they are needed
        self._records = Records()
        self._notes: list[str] = []
        self._sums: dict[str, Tensor] = {}  # parts of the budget since the last record
        self._ideal = LedgerState(0.0, 0.0)  # what is predicted, with every symmetry taken as exact
        self._flow: Tensor | None = None  # (2, laws): Q and dQ/dk of the closed form
        self._seen: tuple[list[_Look], bool, bool] | None = None  # looks, whether all is there for SGD, whether idle
        self._started = False
        self._resumed: Tensor | None = None  # quantities of a state that was loaded, to be compared at the start

    def _lay_out(self) -> None:
        """Of each law: whether it is quadratic, the groups that it spans, and its home, the first of them."""
        # Laws stand in a row, family by family; matrix laws by the upper triangles of their blocks.
        place = {name: i for i, group in enumerate(self._groups) for name in group.names}
        self._spans = [sorted({place[n] for n in law.parameters}) for law in self.symmetries]
        device = next(iter(self._parameters.values())).device
        quadratic = self._spread([0.0 if law.kind == "translation" else 1.0 for law in self.symmetries])
        self._quadratic = quadratic.to(device, self.dtype)  # (laws,)
        self._home = self._spread([span[0] for span in self._spans]).to(device)  # (laws,)

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> ConservationTracker:
        """Hang the hooks and measure; ``with tracker:`` does it."""
        self.stop()
        if not self._started:
            self._begin()
        self._check_resumed()
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
        """What has been measured so far, one row per step and family.

        Parameters
        ----------
        level
            ``"family"``: means over a family's laws. ``"law"``: one row per law.

        Returns
        -------
        DataFrame
            ``step``, ``time`` (the sum of η(1-d)), ``law``, ``kind``, ``n_laws`` (or ``index``), ``measured``, its
            ``change`` since the start, ``predicted``, and three relative errors of the family's vector: ``rel`` =
            ‖predicted - measured‖/‖measured‖, ``rel_change`` = ‖predicted - measured‖/‖measured - Q(0)‖, and
            ``rel_null`` = ‖Q(0) - measured‖/‖measured‖, which is ``rel`` of the prediction that nothing moves (its
            ``rel_change`` is 1). With ``mode="both"`` also ``closed_form``, ``closed_form_rel`` and
            ``closed_form_rel_change``. With a budget the parts since the row before (``symmetry``, ``weight_decay``,
            ...), which with ``unexplained`` sum to the change of ``measured``, and ``rel_accounted``: the error of the
            ledger that is told the residual of the symmetry. ``attrs["notes"]`` says what was odd.
        """
        frame = tidy(self.arrays(), choice("level", level, ("family", "law")))
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
        return self._records.arrays(self.symmetries)

    def state_dict(self) -> dict[str, Any]:
        """Everything measured and kept, as tensors, numbers and strings, for ``torch.save`` or a checkpoint."""
        if not self._started:
            raise InvalidInput("the tracker has not started; there is no state to save.")
        return {
            "laws": [law.name for law in self.symmetries],
            "steps": self.steps,
            "groups": [(list(g.state), g.time, g.last and list(g.last)) for g in self._groups],
            "ideal": list(self._ideal),
            "flow": self._flow,
            "sums": dict(self._sums),
            "notes": list(self._notes),
            "records": self._records.state(),
            "mode": self.mode,
            "quantities": self._vector(self.symmetries.quantities(self._values())),  # tells the weights from others
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a tracker of the same laws; call it before training goes on.

        Raises
        ------
        InvalidInput
            For other laws or another mode; and from :meth:`start`, if the weights are not those of the state then.
        """
        names = [law.name for law in self.symmetries]
        if list(state["laws"]) != names or len(state["groups"]) != len(self._groups):
            raise InvalidInput(
                f"the state is of the laws {', '.join(state['laws'])}; this tracker has {', '.join(names)}."
            )
        if state.get("mode", self.mode) != self.mode:
            raise InvalidInput(
                f"the state is of mode={state['mode']!r}; make the tracker with that, not {self.mode!r}."
            )
        self._resumed = state.get("quantities")
        for group, (kept, time, last) in zip(self._groups, state["groups"], strict=True):
            group.state, group.time, group.last = LedgerState(*kept), time, last and SGDSettings(*last)
        self.steps, self._ideal, self._flow = int(state["steps"]), LedgerState(*state["ideal"]), state["flow"]
        self._sums, self._notes = dict(state["sums"]), list(state["notes"])
        self._records, self._started = Records.from_state(state["records"]), True

    # --- hooks ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self) -> None:
        # A tracker may start in the middle of training, when there are momentum buffers already.
        values = self._values()
        for group in self._groups:
            mine = self._part(values, group)
            P = self._pair(mine, self._part(self._buffers(), group))
            group.state = LedgerState(self._vector(self.symmetries.quantities(mine)), P)
        Q, P = self._vector(self.symmetries.quantities(values)), sum(group.state.P for group in self._groups)
        self._ideal = LedgerState(Q, P)
        if self.mode != "ledger":
            rates = self._by_home([self._settings(group).lr for group in self._groups])
            self._flow = torch.stack([Q, -(1 + self._quadratic) * rates * P])
        self._started = True
        self._record()

    @torch.no_grad()
    def _check_resumed(self) -> None:
        """The weights must be those of the state, or what other weights did would be laid to training."""
        there, self._resumed = self._resumed, None
        if there is None:
            return
        here = self._vector(self.symmetries.quantities(self._values()))  # (laws,)
        if float((there.to(here) - here).norm()) > 1e-3 * max(float(there.norm()), float(here.norm())):
            raise InvalidInput(
                "the weights are not those with which the tracker's state was saved, as conserved quantities show: "
                "load the checkpoint of the network first, or begin without the state."
            )

    def _keep(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        _store(self._raw, name, parameter.grad.detach())

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._seen = None
        by_name = kwargs.get("closure") is not None
        closure = kwargs["closure"] if by_name else args[1] if len(args) > 1 else None
        if closure is None:
            self._look()
            return None
        # The gradients are made inside the step (Lightning, LBFGS): look when the closure has run.

        @functools.wraps(closure)
        def seen(*a: Any, **k: Any) -> Any:
            loss = closure(*a, **k)
            self._look()
            return loss

        return (args, {**kwargs, "closure": seen}) if by_name else ((args[0], seen, *args[2:]), kwargs)

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
        if self._scales and (frozen := frozen_statistics(self.model)):
            self._note(f"batch norm {frozen[0]!r} was in evaluation mode in a step: its scale law is void then")
        values, slopes, buffers = self._values(), self._slopes(), self._buffers()
        missing = [name for name, slope in slopes.items() if slope is None]
        fast = self._sgd and not missing
        settings = [self._settings(group) for group in self._groups]
        needed = self.budget or not fast or any(self._mixed(settings))
        looks = []
        for group, own in zip(self._groups, settings, strict=True):
            mine, g = self._part(values, group), self._part(slopes, group)
            # with maximize=True torch negates the gradient
            sign = -1.0 if self.optimizer.param_groups[group.index].get("maximize", False) else 1.0
            looks.append(
                _Look(
                    own,
                    sign * self._pair(mine, g) if needed else torch.zeros_like(self._quadratic),
                    sign * self._pair(mine, self._unclipped(g)) if self.clipping and self.budget else None,
                    self._norm(g) if fast and own.momentum == 0 else None,
                    all(buffers[n] is None for n in group.names),
                )
            )
        if not fast:  # the step will be measured
            for name, value in values.items():
                _store(self._old, name, value)
        self._seen = looks, fast, len(missing) == len(slopes)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._seen is None:
            raise InvalidInput("the optimizer stepped without its pre-step hook; start the tracker outside of a step.")
        (looks, fast, idle), self._seen = self._seen, None
        if fast:
            self._sgd_step(looks)
        else:
            self._any_step(looks, idle)
        for group, look in zip(self._groups, looks, strict=True):
            group.time += look.settings.lr * (1 - look.settings.dampening)
            group.last = look.settings
        self.steps += 1
        if self.steps % self.every == 0:
            self._record()

    # --- one step ---------------------------------------------------------------------------------------------------

    def _sgd_step(self, looks: list[_Look]) -> None:
        """The ledger's recursion, told the residual, and the prediction, which is not."""
        norms, forces = [], []  # by group, V = ‖v'‖², and what drives the closed form
        for group, look in zip(self._groups, looks, strict=True):
            if look.norm is not None:  # V = ‖g + λθ‖², from sums that are at hand
                decay = self._quadratic * look.settings.weight_decay
                own = decay * look.settings.weight_decay * group.state.Q
                norms.append(look.norm + 2 * decay * look.residual + own)
                forces.append(look.norm)
            else:
                norms.append(self._norm(self._part(self._buffers(), group)))
                forces.append(norms[-1])
        total: Any = sum(norms)  # (laws,)
        ideal = self._ideal
        for i, (group, look, V) in enumerate(zip(self._groups, looks, norms, strict=True)):
            same: dict[str, Any] = {"settings": look.settings, "quadratic": self._quadratic, "first": look.first}
            if self.budget:
                parts = sgd_budget(group.state, V, residual=look.residual, **same)
                if look.raw is not None:
                    symmetry = sgd_budget(group.state, V, residual=look.raw, **same)["symmetry"]
                    parts = {**parts, "symmetry": symmetry, "clipping": parts["symmetry"] - symmetry}
                self._add(parts)
            # a law's prediction follows its home's settings, driven by the norms of all groups
            group.state = sgd_step(group.state, V, residual=look.residual, **same)
            ideal = _chosen(self._home == i, sgd_step(self._ideal, total, **same), ideal)
        mixed = self._mixed([look.settings for look in looks])
        if any(mixed):  # no prediction without the residual where settings differ within a law
            ideal = _chosen(self._spread(mixed).to(self._home.device), self._accounted(), ideal)
        self._ideal = ideal
        if self._flow is not None:
            self._flow = self._advanced(self._flow, [look.settings for look in looks], sum(forces))

    def _advanced(self, before: Tensor, by_group: list[SGDSettings], force: Any) -> Tensor:
        """The closed form one step on, (2, laws)."""
        flow = before.clone()
        kinds: tuple[Kind, ...] = ("translation", "scale")  # linear and quadratic laws
        for (i, settings), (quadratic, kind) in product(enumerate(by_group), enumerate(kinds)):
            last, mine = self._groups[i].last, (self._home == i) & (self._quadratic == quadratic)
            one = propagator(*settings, kind=kind)
            # dQ/dk is in units of steps, whose length is the learning rate
            speed = before[1] * (settings.lr / last.lr if last is not None else 1.0)
            flow[1] = torch.where(mine, speed, flow[1])  # what a first-order flow leaves as it is
            for a, (row, gain) in enumerate(zip(one.transition.tolist(), one.gain.tolist(), strict=True)):
                new: Any = sum(t * q for t, q in zip(row, (before[0], speed), strict=False)) + gain * force
                flow[a] = torch.where(mine, new, flow[a])
        return flow

    def _any_step(self, looks: list[_Look], idle: bool) -> None:
        """The exact split of the measured step, for any optimizer; nothing is assumed of it but its lr and decay."""
        values, f = self._values(), 1 + self._quadratic
        # Δ, in float64: parameters and steps differ by orders of magnitude
        step: Named = {n: values[n].double() - old.double() for n, old in self._old.items()}
        for group, look in zip(self._groups, looks, strict=True):
            old, moved_by, state = self._part(self._old, group), self._part(step, group), group.state
            moved, second = f * self._pair(old, moved_by), self._norm(moved_by)
            if self.budget and not idle:
                lr, weight_decay = look.settings.lr, look.settings.weight_decay
                residual, decay = -lr * f * look.residual, -lr * weight_decay * f * state.Q
                raw = None if look.raw is None else -lr * f * look.raw
                momentum = self._momentum(group, look, old, moved, residual, decay)
                self._add(
                    budget(moved=moved, second=second, residual=residual, decay=decay, raw=raw, momentum=momentum)
                )
            new = self._part(values, group)
            P = self._pair(new, self._part(self._buffers(), group)) if self._sgd else state.P
            group.state = LedgerState(state.Q + moved + second, P)
        self._ideal = self._accounted()
        if self._flow is not None:
            self._note("a step in which some parameters had no gradient was not advanced in the closed form")

    def _momentum(
        self, group: _Group, look: _Look, old: Named, moved: Tensor, residual: Tensor, decay: Tensor
    ) -> Tensor | None:
        """-η f p(mean - g - λθ): for SGD all that is left of the first order, for Adam from its running mean."""
        if isinstance(self.optimizer, torch.optim.SGD):
            return moved - residual - decay
        if not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            return None
        options = self.optimizer.param_groups[group.index]
        decoupled = isinstance(self.optimizer, torch.optim.AdamW) or options.get("decoupled_weight_decay", False)
        means: Named = dict.fromkeys(old)
        for n in group.names:
            state = self.optimizer.state.get(self._parameters[n], {})
            if "exp_avg" in state:
                # the running mean without its bias towards zero
                means[n] = state["exp_avg"] / (1 - float(options["betas"][0]) ** float(state["step"]))
        direction = -look.settings.lr * (1 + self._quadratic) * self._pair(old, means)
        return direction - residual - (0 if decoupled else decay)

    def _record(self) -> None:
        flow = None if self._flow is None else self._flow[0]
        columns = {
            "time": self._by_home([group.time for group in self._groups]),
            "measured": self._vector(self.symmetries.quantities(self._values())),
            "predicted": flow if flow is not None and self.mode == "closed_form" else self._ideal.Q,
            "closed_form": flow if self.mode == "both" else None,
            "accounted": self._accounted().Q if self.budget or not self._sgd else None,
        }
        self._records.add(self.steps, columns, self._sums if self.budget else {})
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

    def _buffers(self) -> Named:
        return {n: self.optimizer.state.get(p, {}).get("momentum_buffer") for n, p in self._parameters.items()}

    def _part(self, values: Mapping[str, Tensor | None], group: _Group) -> Named:
        """The group's own of named values; None for the others."""
        return {n: values.get(n) if n in group.names else None for n in self._parameters}

    def _pair(self, values: Named, x: Named) -> Tensor:
        """p(x): ⟨θ, x⟩ by quadratic law, ⟨1_A, x⟩ by linear law; (laws,)."""
        return self._vector(self.symmetries.bilinear(values, x))

    def _norm(self, x: Named) -> Tensor:
        """⟨x, x⟩ by quadratic law, 0 by linear law; (laws,)."""
        return self._quadratic * self._vector(self.symmetries.bilinear(x, x))

    def _vector(self, by_family: Mapping[str, Tensor]) -> Tensor:
        """The laws of all families in a row; of a symmetric matrix, its upper triangle."""
        parts = []
        for law in self.symmetries:
            value = by_family[law.name]
            if law.size is not None:
                i, j = torch.triu_indices(law.size, law.size, device=value.device)
                value = value[:, i, j]
            parts.append(value.reshape(-1).to(self._quadratic))
        return torch.cat(parts)

    def _accounted(self) -> LedgerState:
        """The laws with the residuals told, over all groups."""
        Q, P = (sum(part) for part in zip(*(group.state for group in self._groups), strict=True))
        return LedgerState(Q, P)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _add(self, parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    # --- settings ---------------------------------------------------------------------------------------------------

    def _settings(self, group: _Group) -> SGDSettings:
        found = self.optimizer.param_groups[group.index]
        names = ("lr", "weight_decay", *(("momentum", "dampening") if self._sgd and found["momentum"] else ()))
        return SGDSettings(**{name: float(found.get(name, 0.0)) for name in names})

    def _mixed(self, settings: list[SGDSettings]) -> list[bool]:
        """Of each family, whether its parameters are trained with different settings."""
        mixed = [len({settings[i] for i in span}) > 1 for span in self._spans]
        if any(mixed) and self.mode != "ledger":
            raise InvalidInput(
                f"the law {self.symmetries[mixed.index(True)].name!r} spans parameter groups with different settings "
                "(learning rate, weight decay, momentum), for which there is no closed form; use mode='ledger'."
            )
        return mixed

    def _check_closed_form(self) -> None:
        if not self._sgd:
            kind = type(self.optimizer).__name__
            kind += " with Nesterov momentum" if isinstance(self.optimizer, torch.optim.SGD) else ""
            raise InvalidInput(f"there is no closed form for {kind}, only for plain SGD; use mode='ledger'.")
        found = [self._settings(group) for group in self._groups]
        for settings in found:
            check_settings(*settings)
        self._mixed(found)

    def _spread(self, by_family: list[Any]) -> Tensor:
        """One value per family as one per law, (laws,)."""
        sizes = torch.tensor([law.n_laws for law in self.symmetries])
        return torch.tensor(by_family).repeat_interleave(sizes)

    def _by_home(self, by_group: list[float]) -> Tensor:
        return torch.tensor(by_group, dtype=self.dtype, device=self._home.device)[self._home]


def _chosen(where: Tensor, these: LedgerState, others: LedgerState) -> LedgerState:
    """The first state for some laws, the second for the others."""
    return LedgerState(*(torch.where(where, a, b) for a, b in zip(these, others, strict=True)))


def _store(kept: dict[str, Tensor], name: str, value: Tensor) -> None:
    """A copy of a tensor, in the memory of the one before."""
    if name in kept:
        kept[name].copy_(value)
    else:
        kept[name] = value.clone()


def _parameters(model: nn.Module, symmetries: SymmetrySet) -> dict[str, nn.Parameter]:
    """The laws' parameters by name."""
    named = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for name in symmetries.parameters:
        if name not in named:
            raise InvalidInput(
                f"the laws act on {name!r}, which the model has not; find them with find_symmetries on this very model."
            )
        check_parameter(name, named[name])
    return {name: named[name] for name in symmetries.parameters}


def _groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[_Group]:
    """The optimizer's groups that hold parameters of the laws."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidInput(f"optimizer must be a torch.optim.Optimizer, not a {type(optimizer).__name__}.")
    where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in where]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (" and more" if len(missing) > 3 else "")
        raise InvalidInput(
            f"the optimizer does not train {shown}, on which the laws act; give it all parameters of the "
            "laws, or track laws of trained parameters only."
        )
    members: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        members.setdefault(where[id(parameter)], []).append(name)
    return [_Group(index, tuple(names)) for index, names in sorted(members.items())]
