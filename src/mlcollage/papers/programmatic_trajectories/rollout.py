"""Free rollouts after a burn-in, with intents that are given, drawn or asked for at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlcollage._users import users_code
from mlcollage.errors import InvalidInput

from .frames import carried, centered, placed
from .labeling import LabelingFunction
from .macro import IntentModel, intent_code

Model = Any
"""An ``AgentVRNN``, which imports this module."""


class Draws:
    """Where a rollout's random numbers come from."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def latent(self, t: int, like: Tensor) -> Tensor:
        """Standard normal numbers for the latents of frame t, shaped as ``like``."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def position(self, t: int, like: Tensor) -> Tensor:
        """Standard normal numbers for what is generated at frame t."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def intent(self, t: int, probabilities: Tensor) -> Tensor:
        """Classes (B, K) drawn from probabilities (B, K, M)."""
        flat = probabilities.flatten(0, -2)
        return torch.multinomial(flat, 1, generator=self.generator).view(probabilities.shape[:-1])


@dataclass(frozen=True)
class IntentPlan:
    """Intents of all frames but the last, (B, T - 1, K), -1 where they are free, and who is asked in the steps."""

    fixed: Tensor
    ask: Callable[..., Any] | None = None


def plan_intents(model: Model, burn_in: Tensor, steps: int, intents: Any, history: Any, n: int) -> IntentPlan | None:
    """Check and join what was given for burn-in (B, T, K, D) and steps."""
    if not model.n_intents:
        if intents is not None or history is not None:
            raise InvalidInput(f"{type(model).__name__} has no macro-intents; it takes neither intents nor history.")
        return None
    b, t, k, _ = burn_in.shape
    k = 1 if model.shared_intent else k
    past = torch.full((b, t - 1, k), -1, device=burn_in.device)
    if isinstance(history, LabelingFunction):
        found = history(burn_in.detach().cpu().numpy())
        history = found[..., 0] if model.shared_intent else found
    if history is not None:
        past = _intents(model, history, (b, t), "history", "the burn-in has")[:, : t - 1].to(burn_in.device)
    ask = intents if callable(intents) else None
    if intents is None or ask is not None:
        ahead = torch.full((b, steps, k), -1, device=burn_in.device)
    else:
        ahead = _intents(model, intents, (b, steps), "intents", "there are").to(burn_in.device)
    return IntentPlan(torch.cat([past, ahead], 1).repeat(n, 1, 1), ask)


def _intents(model: Model, given: Any, size: tuple[int, int], name: str, what: str) -> Tensor:
    """Whole numbers (B, frames, K) of what was given for all sequences or for each."""
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    b, frames = size
    per = () if model.shared_intent else (model.n_agents,)
    if array.shape not in ((frames, *per), (b, frames, *per)):
        each = "one for all agents" if model.shared_intent else f"one for each of {model.n_agents} agents"
        raise InvalidInput(
            f"{name} must be {(frames, *per)} or {(b, frames, *per)} ({what} {frames} frames, {each}); got "
            f"{array.shape}."
        )
    if array.dtype.kind not in "iu" or array.min() < -1 or array.max() >= model.n_intents:
        raise InvalidInput(
            f"{name} must be whole numbers from 0 to {model.n_intents - 1}, or -1 for free; got {array.dtype} from "
            f"{array.min()} to {array.max()}."
        )
    out = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).expand(b, frames, *per)
    return out[..., None] if model.shared_intent else out


def roll_out(
    model: Model, burn_in: Tensor, steps: int, plan: IntentPlan | None, draws: Draws, latent: str
) -> tuple[Tensor, Tensor | None]:
    """Positions (B, T + steps, K, D) and intents of all frames but the last."""
    finite = burn_in.isfinite().all(-1)
    x = list(carried(centered(burn_in, model.shift), finite).unbind(1))
    given, seen = len(x), list(finite.unbind(1))
    absent = ~seen[-1]
    b = len(burn_in)
    states = model.rnn.initial(b * (model.n_agents // model.groups), x[0])
    past: Tensor | None = None
    before: Tensor | None = None
    chosen = []
    for t in range(given + steps - 1):
        here = seen[min(t, given - 1)]
        context = model._context(x[t][:, None], here[:, None], x[t - 1][:, None] if t else None)
        known = {"y": model._by_group(context)[:, 0]}
        if plan is not None:
            macro: IntentModel = model.macro
            if before is None:
                before = macro.initial(x[0].new_zeros(b, 1, macro.n_agents, model.n_intents))
            probabilities = macro.logits(before, model.macro_context(context, here[:, None]))[:, 0].softmax(-1)
            g = _choose(model, plan, t, given, (x, burn_in), probabilities, draws)
            chosen.append(g)
            code = intent_code(g, model.n_intents).to(x[0].dtype)
            before, past = macro.read(code[:, None], past)
            known["g"] = model._by_group(code.expand(-1, model.n_agents, -1)[:, None])[:, 0]
        h = model._h(states)
        mean, std = model.prior(known | {"h": h})
        ahead = t + 1 < given
        counts = None
        if ahead:
            known["x"] = model._by_group(model._target(x[t], x[t + 1])[:, None])[:, 0]
            both = here & seen[t + 1]
            counts = None if bool(both.all()) else model._by_group(both[:, None, :, None])[:, 0]
            if latent == "posterior":
                mean, std = model.encoder(known | {"h": h})
        z = mean + std * draws.latent(t, mean)
        if not ahead:
            mean, std = model.decoder(known | {"h": h, "z": z})
            known["x"] = mean + std * draws.position(t, mean)
            step = model._by_agent(known["x"][:, None], b)[:, 0]
            x.append(model._position(x[t], step))
        into = {name: v[:1] for name, v in known.items()} if model.wiring.shared_rnn else known
        states = model._advance(model.rnn.lift(into), z, states, counts)
    out = placed(torch.stack(x, 1), model.shift, burn_in)
    out[:, :given] = burn_in
    if bool(absent.any()):
        out[:, given:][absent[:, None].expand(-1, steps, -1)] = torch.nan
    if plan is None:
        return out, None
    g = torch.stack(chosen, 1)
    return out, g[..., 0] if model.shared_intent else g


def _choose(
    model: Model, plan: IntentPlan, t: int, given: int, so_far: tuple[list[Tensor], Tensor],
    probabilities: Tensor, draws: Draws,
) -> Tensor:  # fmt: skip
    (x, like), fixed = so_far, plan.fixed[:, t]
    if plan.ask is not None and t >= given - 1:
        p = probabilities[:, 0] if model.shared_intent else probabilities
        with users_code("the intents' function"):
            answer = torch.as_tensor(plan.ask(t, placed(torch.stack(x, 1), model.shift, like), p))
        if answer.shape != p.shape[:-1] or answer.is_floating_point():
            raise InvalidInput(
                f"the intents' function must return whole numbers {tuple(p.shape[:-1])}; got {answer.dtype} "
                f"{tuple(answer.shape)}."
            )
        fixed = answer.to(fixed).view_as(fixed)
        if int(fixed.min()) < -1 or int(fixed.max()) >= model.n_intents:
            raise InvalidInput(
                f"the intents' function returned {int(fixed.min())} to {int(fixed.max())}; the model knows 0 to "
                f"{model.n_intents - 1}, and -1 for free."
            )
    if bool((fixed >= 0).all()):
        return fixed
    return torch.where(fixed >= 0, fixed, draws.intent(t, probabilities))
