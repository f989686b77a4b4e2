"""The official code's sizes and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._nets import GaussianNet, GroupedGRU, GroupedLinear
from .baselines import VRAEMI, RNNGauss, VRNNIndep, VRNNMixed, VRNNSingle
from .macro import IntentModel
from .macro_vrnn import MacroVRNN

__all__ = ["load_official_weights", "official_model"]

_COURT = {"shift": (25.0, 25.0), "scale": (94.0, 50.0)}
_MADE: Mapping[str, Any] = {
    "macro_vrnn": lambda **o: MacroVRNN(5, 90, **{"z": 16, "hidden": 200, "rnn": 200, **o}),
    "vrnn_indep": lambda **o: VRNNIndep(5, **{"z": 16, "hidden": 200, "rnn": 250, **o}),
    "vrnn_single": lambda **o: VRNNSingle(5, **{"z": 80, "hidden": 250, "rnn": 900, **o}),
    "rnn_gauss": lambda **o: RNNGauss(5, **{"hidden": 250, "rnn": 900, **o}),
}


def official_model(name: str) -> nn.Module:
    """A fresh model in the sizes of the official code's trained basketball models, for five players in feet.

    Parameters
    ----------
    name
        ``"macro_vrnn"``, ``"vrnn_indep"``, ``"vrnn_single"`` or ``"rnn_gauss"``. (The code has no trained models of
        the others.)

    Examples
    --------
    >>> sum(p.numel() for p in official_model("vrnn_indep").parameters())
    4367340
    """
    return _MADE[checks.choice("name", name, tuple(_MADE))](**_COURT)


def load_official_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the official code's weights into a model of the same kind and sizes.

    Parameters
    ----------
    model
        :class:`MacroVRNN` with separate weights, or one of the baselines.
    state
        The official state dictionary, as ``torch.load(path, weights_only=True)`` gives it.

    Raises
    ------
    InvalidInput
        If a weight is missing, has another shape, or is left over.
    """
    copy = _Copy(dict(state))
    with torch.no_grad():
        if isinstance(model, RNNGauss | VRAEMI):
            copy.torch_gru(model.rnn, "rnn")
            copy.net(model.decoder, "dec")
            if isinstance(model, VRAEMI):
                copy.net(model.encoder, "enc")
                copy.net(model.discriminator, "discrim")
        elif isinstance(model, MacroVRNN | VRNNIndep | VRNNMixed | VRNNSingle):
            for net, name in ((model.encoder, "enc"), (model.prior, "prior"), (model.decoder, "dec")):
                copy.net(net, name)
            copy.gru(model.rnn, "gru_micro" if model.n_intents else "rnn")
            if model.n_intents:
                copy.macro(model.macro)
        else:
            raise InvalidInput(f"the official code has no model like {type(model).__name__}.")
    if copy.state:
        raise InvalidInput(f"the state has {len(copy.state)} entries that the model lacks, such as {min(copy.state)}.")


class _Copy:
    """Takes weights out of a state dictionary, agent by agent."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def take(self, into: Tensor, names: list[str]) -> None:
        missing = [name for name in names if name not in self.state]
        if missing:
            raise InvalidInput(f"the state has no {missing[0]}; it belongs to another kind of model, or other sizes.")
        value = torch.stack([torch.as_tensor(self.state.pop(name)) for name in names])
        value = value if into.ndim == value.ndim else value[0]
        if value.shape != into.shape:
            raise InvalidInput(f"{names[0]} gives {tuple(value.shape)}; the model has {tuple(into.shape)}.")
        into.copy_(value)

    def names(self, module: str, rest: str, groups: int) -> list[str]:
        """``module.k.rest`` for each agent, or ``module.rest`` where there are no agents."""
        single = f"{module}.{rest}" if rest else module
        each = [f"{module}.{k}.{rest}" if rest else f"{module}.{k}" for k in range(groups)]
        return [single] if groups == 1 and f"{each[0]}.weight" not in self.state else each

    def linear(self, layer: GroupedLinear, module: str, rest: str, rows: slice = slice(None)) -> None:
        names = self.names(module, rest, len(layer.weight))
        self.take(layer.weight[:, rows], [f"{n}.weight" for n in names])
        self.take(layer.bias[:, rows], [f"{n}.bias" for n in names])

    def net(self, net: GaussianNet, name: str) -> None:
        half = net.heads.weight.shape[1] // 2
        self.linear(net.first, name, "0")
        self.linear(net.second, name, "2")
        self.linear(net.heads, f"{name}_mean", "", slice(0, half))
        self.linear(net.heads, f"{name}_std", "0", slice(half, None))

    def gru(self, gru: GroupedGRU, name: str) -> None:
        each = [f"{name}.{k}" for k in range(gru.groups)]
        names = [name] if gru.groups == 1 and f"{each[0]}.weight_ih_l0" not in self.state else each
        for side, layers in (("ih", gru.into), ("hh", gru.back)):
            for i, layer in enumerate(layers):
                assert isinstance(layer, GroupedLinear)
                self.take(layer.weight, [f"{n}.weight_{side}_l{i}" for n in names])
                self.take(layer.bias, [f"{n}.bias_{side}_l{i}" for n in names])

    def torch_gru(self, gru: nn.Module, name: str) -> None:
        for key, value in gru.named_parameters():
            self.take(value, [f"{name}.{key}"])

    def macro(self, macro: IntentModel) -> None:
        if not macro.joint:
            raise InvalidInput("the official macro model reads the intents of all agents together.")
        self.torch_gru(macro.grus[0], "gru_macro")
        self.linear(macro.first, "dec_macro", "0")
        self.linear(macro.second, "dec_macro", "2")
