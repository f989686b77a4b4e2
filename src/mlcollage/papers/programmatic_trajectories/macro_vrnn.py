"""The paper's model: macro-intents from one network, movements from a VRNN for each agent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlcollage import _checks as checks

from .frames import TrackBatch, carried, centered
from .macro import IntentModel
from .vrnn import AgentVRNN, Wiring

__all__ = ["MacroVRNN"]


class MacroVRNN(AgentVRNN):
    r"""Trajectories of several agents given their macro-intents, and a model of the intents.

    .. math::

        p(x, g) = \prod_t p(g_t \mid g_{<t}, x_t) \prod_k p_k(x_{t+1}^k \mid x_{\le t}, g_t)

    The labels of labeling functions stand for g in training, so that both factors are trained apart, without gradients
    through discrete draws; they share no weights, so that minimizing the sum trains each as if alone (clip gradients of
    ``model.macro`` apart). In the paper: equations 4 to 8 and figure 3.

    Parameters
    ----------
    n_agents, n_intents
        K and the number of macro-intents.
    shared_intent
        One intent for all agents (Boids), instead of one for each (basketball).
    joint_macro
        One recurrent network reads the intents of all agents, which coordinates them, as in the paper; with False each
        agent's intents follow from its own only.
    macro_rnn
        Width of the macro model's state; by default ``rnn``.
    macro_params
        ``"separate"`` or ``"tied"`` weights of the macro model's decoders; by default as ``agent_params``.
    wiring
        Which inputs each network reads; by default as in the official code, where the prior of the model with an intent
        for each agent does not read the context. With ``context="neighbors"`` encoder and prior read it.
    options
        Sizes, scales and layouts, as :class:`AgentVRNN` has them: ``z``, ``hidden``, ``rnn``, ``layers``,
        ``min_std``, ``agent_params``, ``context``, ``neighbors``, ``target``, ``shift``, ``scale``, ``step_scale``,
        ``dim``.

    Raises
    ------
    InvalidInput
        If sizes are no whole numbers, or options do not go together.

    Examples
    --------
    >>> model = MacroVRNN(n_agents=3, n_intents=4, z=2, hidden=8, rnn=8)
    >>> x, g = torch.randn(5, 12, 3, 2), torch.randint(4, (5, 12, 3))
    >>> sorted(model.loss((x, g)))
    ['ce', 'kl', 'loss', 'nll', 'steps']
    >>> plays, intents = model.sample(x[:, :4], steps=6, intents=[[1, -1, 2]] * 6, n=2)
    >>> plays.shape, intents[:, :, 3:, 0].unique().tolist()
    (torch.Size([2, 5, 10, 3, 2]), [1])
    """

    def __init__(
        self,
        n_agents: int,
        n_intents: int,
        shared_intent: bool = False,
        *,
        joint_macro: bool = True,
        macro_rnn: int | None = None,
        macro_params: str | None = None,
        wiring: Wiring | None = None,
        **options: Any,
    ) -> None:
        self.n_intents = checks.integer("n_intents", n_intents, least=2)
        self.shared_intent = bool(shared_intent)
        if wiring is None:
            blind = not shared_intent and options.get("context", "joint") == "joint"
            wiring = Wiring("xgh", "gh", "ygzh", "xz") if blind else Wiring("xygh", "ygh", "ygzh", "xz")
        super().__init__(n_agents, wiring, **options)
        macro_params = self.agent_params if macro_params is None else macro_params
        checks.choice("macro_params", macro_params, ("separate", "tied"))
        self.macro = IntentModel(
            self.n_agents,
            self.n_intents,
            self.context_width,
            shared=self.shared_intent,
            groups=self.n_agents if macro_params == "separate" else 1,
            hidden=options.get("hidden", 200),
            rnn=options.get("rnn", 200) if macro_rnn is None else checks.integer("macro_rnn", macro_rnn, least=1),
            layers=options.get("layers", 2),
            joint=joint_macro,
        )

    def loss(
        self, batch: Any, *, generator: torch.Generator | None = None, eps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The negative evidence lower bound given the intents, and the intents' cross-entropy.

        Parameters
        ----------
        batch, generator, eps
            As :meth:`AgentVRNN.loss` takes them; the batch has intents.

        Returns
        -------
        terms
            ``loss``, which is ``nll`` + ``kl`` + ``ce``, each the mean over sequences of sums over frames and agents;
            frames without an intent (-1) count nothing in ``ce``; ``steps`` as :meth:`AgentVRNN.loss` has it.
        """
        made = TrackBatch.of(batch)
        terms = super().loss(made, generator=generator, eps=eps)
        ce = self.intent_nll(made).mean()
        return {**terms, "loss": terms["loss"] + ce, "ce": ce}

    def intent_nll(self, batch: Any) -> Tensor:
        """Negative log probability of each sequence's intents, (B,); the last frame's is not used."""
        batch = TrackBatch.of(batch)
        self._check(batch.x)
        seen = batch.seen()
        x = carried(centered(batch.x, self.shift), seen)
        context = self.macro_context(self._context(x[:, :-1], seen[:, :-1]), seen[:, :-1])
        return self.macro.cross_entropy(self.labels(batch)[:, :-1], context).sum(1)
