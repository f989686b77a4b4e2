"""The loop that HMC and NUTS share: warm up, draw, and go on from where a run stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mlcollage._checks import integer
from mlcollage.errors import InvalidInput
from mlcollage.infer.adaptation import approach
from mlcollage.infer.chains import Chains, Info
from mlcollage.infer.density import Generator, LogDensity, State, start, torch_generator
from mlcollage.infer.health import warn_of
from mlcollage.infer.metric import Metric
from mlcollage.infer.warmup import Mass as Mass
from mlcollage.infer.warmup import RunSettings, Stage, WarmUp

DIVERGENCE = 1000.0  # energy error beyond which a trajectory has left the level set, as in Stan

Progress = Callable[[int, int], None]  # iterations done, and in all
Store = Callable[[Tensor], Tensor | None]  # what is kept of positions (chains, dim)
Save = Callable[[dict[str, Any]], None]  # takes the state of a run
_COLUMNS = ("log_prob", "accept", "energy", "diverging", "steps", "error")


class Kernel(Protocol):
    """One iteration of all chains, and what it remembers from one to the next."""

    @property
    def chooses_steps(self) -> bool:
        """Whether it finds by itself how many steps a trajectory takes."""

    def __call__(self, state: State, step: Tensor, metric: Metric, stage: Stage) -> tuple[State, Info]:
        """The next state, given the step size (groups,)."""

    def one_step(self, state: State, metric: Metric) -> Callable[[Tensor], Tensor]:
        """See :func:`mlcollage.infer.adaptation.one_step`."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""


class Run:
    """A run that can stop between any two iterations of warm-up, or draws, and go on from its state.

    Parameters
    ----------
    density, init
        What is sampled, and where the chains start.
    kernel
        Makes an iteration; it draws from ``generator``.
    """

    def __init__(
        self,
        density: LogDensity,
        state: State,
        kernel: Kernel,
        settings: RunSettings,
        store: Store | None,
        generator: torch.Generator,
        resume: Mapping[str, Any] | None = None,
    ):
        self.density, self.kernel, self.settings, self.store, self.generator = (
            density,
            kernel,
            settings,
            store,
            generator,
        )
        self.state = state
        self.drawn = 0  # draws of each chain so far
        self.kept: list[Tensor] = []  # positions (chains, dim), or what the store made of them
        self.columns: list[list[Tensor]] = [[] for _ in _COLUMNS]  # (chains,) of each draw
        if resume is not None:
            self.load_state_dict(resume)
        else:
            if settings.learns_mass and settings.step_size is None:  # what is given fits where the chains start
                self.state = approach(density, state)
            self.warmup = WarmUp(settings, self.state, kernel.one_step)

    def advance(self, progress: Progress | None, save: Save | None, save_every: int) -> Run:
        """Do all that is left."""
        s = self.settings
        total = s.warmup + s.draws * s.thin

        def tell(done: int) -> None:
            if progress:
                progress(done, total)

        while self.warmup.at < s.warmup:
            self.state, info = self.kernel(self.state, self.warmup.step, self.warmup.metric, self.warmup.stage)
            self.state = self.warmup.update(self.state, info.accept, self.generator)
            tell(self.warmup.at)
            if save and self.warmup.at % save_every == 0:
                save(self.state_dict())
        while self.drawn < s.draws:
            infos = []  # of the iterations that this draw stands for
            for i in range(s.thin):
                self.state, info = self.kernel(self.state, self.warmup.step, self.warmup.metric, "draw")
                infos.append(info)
                tell(s.warmup + self.drawn * s.thin + i + 1)
            self._keep(infos)
            if save and (self.drawn % save_every == 0 or self.drawn == s.draws):
                save(self.state_dict())
        return self

    def _keep(self, infos: list[Info]) -> None:
        self.drawn += 1
        # compiled iterations have chains as the last dimension in memory, which a store need not be ready for
        position = self.state.position
        value = position if self.store is None else self.store(position.contiguous())
        if value is not None:
            self.kept.append(value)
        one = len(infos) == 1
        row = (
            self.state.log_prob * self.density.temperature,  # of the density itself
            infos[0].accept if one else torch.stack([i.accept for i in infos]).mean(dim=0),
            infos[-1].energy,
            infos[0].diverging if one else torch.stack([i.diverging for i in infos]).any(dim=0),
            infos[0].steps if one else torch.stack([i.steps for i in infos]).sum(dim=0),
            infos[0].error if one else torch.stack([i.error for i in infos]).amax(dim=0),
        )
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def chains(self) -> Chains:
        """What was drawn, with a warning if it cannot be trusted."""
        # (chains,) of each draw become (chains, draws)
        columns = {name: torch.stack(column, dim=1) for name, column in zip(_COLUMNS, self.columns, strict=True)}
        # (chains, draws, ...); without any draw kept, still as many rows as chains
        empty = self.state.position.new_empty((len(self.state.position), 0))
        draws = torch.stack(self.kept, dim=1) if self.kept else empty
        state = State(self.state.position.contiguous(), self.state.log_prob, self.state.gradient.contiguous())
        error = columns.pop("error")
        steps = float(columns["steps"].double().mean()) / self.settings.thin  # of an iteration
        made = Chains(
            draws, **columns, step_size=self.warmup.step, mass=self.warmup.metric.mass, state=state,
            pooled=self.settings.pooled, moved=self.warmup.moved, nonfinite=error.isinf(),
            mean_steps=steps if self.kernel.chooses_steps else None,
        )  # fmt: skip
        warn_of(made.health())
        return made

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as a flat dictionary of tensors and numbers.

        ``draws`` is what was kept so far, (chains, draws, ...): not there if nothing was, as with a ``store`` that
        returns None.
        """
        state: dict[str, Any] = {
            "position": self.state.position.contiguous(),
            "generator": self.generator.get_state(),
            "warmup": self.settings.warmup,
            "drawn": self.drawn,
        }
        if self.kept:
            state["draws"] = torch.stack(self.kept, dim=1)
        if self.drawn:
            state |= {f"columns.{n}": torch.stack(c, dim=1) for n, c in zip(_COLUMNS, self.columns, strict=True)}
        state |= {f"kernel.{name}": value for name, value in self.kernel.state_dict().items()}
        return state | {f"adapted.{name}": value for name, value in self.warmup.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; the run may ask for more draws than that one did.

        Raises
        ------
        InvalidInput
            If it is of other chains, of another warm-up, or has more draws than are asked for.
        """
        missing = [n for n in ("position", "generator", "warmup", "drawn", "adapted.at") if n not in state]
        if missing:
            raise InvalidInput(f"the state to resume has no {missing[0]!r}; give what save= was called with.")
        position, here = state["position"], self.state.position
        if position.shape != here.shape or position.dtype != here.dtype:
            raise InvalidInput(
                f"the state to resume has positions {tuple(position.shape)} of {position.dtype}; init has "
                f"{tuple(here.shape)} of {here.dtype}."
            )
        if int(state["warmup"]) != self.settings.warmup:
            raise InvalidInput(
                f"the state to resume is of warmup={int(state['warmup'])}, not {self.settings.warmup}; give the same."
            )
        self.drawn = int(state["drawn"])
        if self.drawn > self.settings.draws:
            raise InvalidInput(f"the state to resume has {self.drawn} draws; ask for draws of at least that.")
        position = position.to(here.device)
        self.state = self.density.state(position)
        self.kept = list(state["draws"].to(here.device).unbind(dim=1)) if "draws" in state else []
        if self.drawn:
            # states of before this column have none of it
            columns = {"columns.error": torch.zeros_like(state["columns.energy"]), **state}
            self.columns = [list(columns[f"columns.{name}"].to(here.device).unbind(dim=1)) for name in _COLUMNS]
        moved = {k: v.to(here.device) if isinstance(v, Tensor) else v for k, v in state.items()}
        self.warmup = WarmUp(self.settings, self.state, self.kernel.one_step)
        self.warmup.load_state_dict(_under(moved, "adapted."))
        self.kernel.load_state_dict(_under(state, "kernel."))
        # the state of a generator is on the CPU, wherever the generator is; last, since what is above draws from it
        self.generator.set_state(state["generator"].cpu())


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def sample(
    log_prob: Any,
    init: Any,
    settings: RunSettings,
    make_kernel: Callable[[LogDensity, torch.Generator], Kernel],
    *,
    temperature: float,
    store: Store | None,
    generator: Generator,
    progress: Progress | None,
    resume: Mapping[str, Any] | None,
    save: Save | None,
    save_every: int,
) -> Chains:
    """Check what was asked for, make the run and do it."""
    integer("save_every", save_every, least=1)
    density = LogDensity(log_prob, temperature)
    state = start(density, init)
    generator = torch_generator(generator, state.position.device)
    run = Run(density, state, make_kernel(density, generator), settings, store, generator, resume)
    return run.advance(progress, save, save_every).chains()
