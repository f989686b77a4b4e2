"""The macro model: how intents follow each other and what is on the court."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks

from ._nets import GroupedLinear

__all__ = ["IntentModel"]


class IntentModel(nn.Module):
    r"""The distribution of the next macro-intents, :math:`p(g_t^k \mid g_{<t}, x_t)`.

    A GRU reads past intents, of all agents together; for each agent (or once, where intents are shared) a network with
    one hidden layer maps its state and the frame's context to the classes' logits.

    Parameters
    ----------
    n_agents, n_intents
        K and the number of classes.
    context
        Width of a frame's context.
    shared
        One intent for all agents.
    groups
        Sets of weights of the decoders: K or 1.
    hidden, rnn, layers
        Widths and number of the GRU's layers.
    joint
        One GRU reads the intents of all agents, as in the paper; with False each agent's GRU reads its own only.
    """

    def __init__(
        self,
        n_agents: int,
        n_intents: int,
        context: int,
        *,
        shared: bool,
        groups: int,
        hidden: int,
        rnn: int,
        layers: int,
        joint: bool = True,
    ) -> None:
        super().__init__()
        hidden, rnn = checks.integer("hidden", hidden, least=1), checks.integer("rnn", rnn, least=1)
        layers = checks.integer("layers", layers, least=1)
        self.n_agents, self.n_intents, self.shared, self.joint = 1 if shared else n_agents, n_intents, shared, joint
        self.groups = 1 if shared else groups
        read = n_intents * (self.n_agents if joint else 1)
        many = 1 if joint else self.groups
        self.grus = nn.ModuleList(nn.GRU(read, rnn, layers, batch_first=True) for _ in range(many))
        self.first = GroupedLinear(self.groups, {"y": context, "h": rnn}, hidden)
        self.second = GroupedLinear(self.groups, {"a": hidden}, n_intents)

    def logits(self, states: Tensor, context: Tensor) -> Tensor:
        """Logits (B, T, K, M) of states (B, T, K, rnn) and contexts (B, T, K, C)."""
        b, t, k, _ = states.shape
        rows = {"y": _by_group(context, self.groups), "h": _by_group(states, self.groups)}
        out = self.second({"a": F.relu(self.first(rows))})  # (G, K B T / G, M)
        return out.reshape(k, b, t, -1).permute(1, 2, 0, 3)

    def read(self, code: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States after each frame (B, T, K, rnn) of intent codes (B, T, K, M), and what goes on to the next call."""
        b, t, k, m = code.shape
        if self.joint:
            out, carry = self.grus[0](code.reshape(b, t, k * m), carry)
            return out[:, :, None].expand(b, t, k, -1), carry
        per = len(self.grus)
        rows = code.permute(2, 0, 1, 3).reshape(per, k * b // per, t, m)
        parts = None if carry is None else carry.chunk(per, 1)
        found = [g(rows[i], None if parts is None else parts[i].contiguous()) for i, g in enumerate(self.grus)]
        out = torch.stack([f[0] for f in found]).reshape(k, b, t, -1).permute(1, 2, 0, 3)
        return out, torch.cat([f[1] for f in found], 1)

    def initial(self, code: Tensor) -> Tensor:
        """State before the first frame, (B, 1, K, rnn)."""
        gru = self.grus[0]
        assert isinstance(gru, nn.GRU)
        return code.new_zeros(code.shape[0], 1, code.shape[2], gru.hidden_size)

    def cross_entropy(self, labels: Tensor, context: Tensor) -> Tensor:
        r"""Sum over agents of :math:`-\log p`, by sequence and frame (B, T); labels (B, T, K), -1 counts nothing."""
        code = intent_code(labels, self.n_intents).to(context.dtype)
        before = self.initial(code)
        if labels.shape[1] > 1:
            before = torch.cat([before, self.read(code[:, :-1])[0]], 1)
        logits = self.logits(before, context)
        found = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-1, reduction="none")
        return found.view(labels.shape).sum(-1)


def intent_code(labels: Tensor, classes: int) -> Tensor:
    """One-hot codes (..., classes); no intent, -1, has a code of its own: zeros."""
    return F.one_hot(labels.clamp(min=0), classes) * (labels >= 0)[..., None]


def _by_group(v: Tensor, groups: int) -> Tensor:
    """(B, T, K, F) to (G, K B T / G, F), agent after agent."""
    return v.permute(2, 0, 1, 3).reshape(groups, -1, v.shape[-1])
