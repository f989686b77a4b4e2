"""Networks with one set of weights for each group of rows: linear layers, Gaussian heads and recurrent cells.

Rows are laid out (G, ..., N, F): G groups with weights of their own (one for each agent, or one for all). Each net
splits its first product into inputs that are known beforehand (``lift``, one product for all frames) and those that
are only known within the loop over time (``late``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """Group g maps its rows by :math:`x W_g^T + b_g`, initialized as ``torch.nn.Linear`` is.

    Parameters
    ----------
    groups
        G.
    parts
        Names and widths of the inputs, in the order of the weight's columns.
    n_out
        Width of the output.
    """

    def __init__(self, groups: int, parts: Mapping[str, int], n_out: int, bound_by: int | None = None) -> None:
        super().__init__()
        n_in = sum(parts.values())
        bound = 1 / math.sqrt(bound_by or n_in)
        self.weight = nn.Parameter(torch.empty(groups, n_out, n_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(groups, n_out).uniform_(-bound, bound))
        self.slices, start = {}, 0
        for name, width in parts.items():
            self.slices[name] = slice(start, start + width)
            start += width

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Sum over the inputs that are given and the bias, (G, ..., n_out); those that are not count as 0."""
        return grouped_product(self.joined(inputs), self.columns(inputs), self.bias)

    def add_to(self, pre: Tensor, inputs: Mapping[str, Tensor], weight: Tensor | None = None) -> Tensor:
        """``pre`` (G, N, n_out) and the sum over the inputs that are given; ``weight`` is what :meth:`columns` gave."""
        weight = self.columns(inputs) if weight is None else weight
        x = self.joined(inputs)
        if len(weight) == 1:
            return torch.addmm(pre[0], x[0], weight[0].T)[None]
        return torch.baddbmm(pre, x, weight.mT)

    def columns(self, names: Iterable[str]) -> Tensor:
        """The weight's columns for some inputs; cut once before a loop, they gather its gradients in a small tensor."""
        chosen = [name for name in self.slices if name in names]
        if len(chosen) == len(self.slices):
            return self.weight
        cut = [self.weight[..., self.slices[name]] for name in chosen]
        return cut[0] if len(cut) == 1 else torch.cat(cut, -1)

    def joined(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The inputs side by side, in the order of the columns."""
        x = [inputs[name] for name in self.slices if name in inputs]
        return x[0] if len(x) == 1 else torch.cat(x, -1)


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows x (G, ..., I) by weights (G, O, I), plus biases (G, O)."""
    if len(weight) == 1:
        return F.linear(x, weight[0], bias[0])
    rows = x.reshape(len(weight), -1, x.shape[-1])
    out = torch.baddbmm(bias[:, None], rows, weight.mT)
    return out.view(*x.shape[:-1], weight.shape[1])


class GaussianNet(nn.Module):
    """Linear, ReLU, linear, ReLU, and linear heads for the mean and, through a softplus, the standard deviation.

    Parameters
    ----------
    groups, parts
        As :class:`GroupedLinear` has them.
    hidden, n_out
        Widths of both hidden layers and of mean and deviation.
    min_std
        What is added to the softplus.
    """

    def __init__(self, groups: int, parts: Mapping[str, int], hidden: int, n_out: int, min_std: float) -> None:
        super().__init__()
        self.first = GroupedLinear(groups, parts, hidden)
        self.second = GroupedLinear(groups, {"a": hidden}, hidden)
        self.heads = GroupedLinear(groups, {"a": hidden}, 2 * n_out)
        self.min_std = min_std

    def lift(self, known: Mapping[str, Tensor]) -> Tensor:
        """The part of the first layer that does not wait for the loop, with its bias."""
        return self.first(_used(known, self.first))

    def late_weight(self, names: Iterable[str]) -> Tensor:
        """The first layer's columns for inputs that :meth:`late` gets, to be cut once before a loop."""
        return self.first.columns(names)

    def late(self, pre: Tensor, inputs: Mapping[str, Tensor], weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, given :meth:`lift` and the rest of the inputs."""
        rest = _used(inputs, self.first)
        a = F.relu(self.first.add_to(pre, rest, weight) if rest else pre)
        a = F.relu(self.second({"a": a}))
        mean, raw = self.heads({"a": a}).chunk(2, -1)
        return mean, F.softplus(raw) + self.min_std

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation where all inputs are known."""
        return self.late(self.lift(inputs), {})


def _used(inputs: Mapping[str, Tensor], layer: GroupedLinear) -> dict[str, Tensor]:
    return {name: v for name, v in inputs.items() if name in layer.slices}


class GroupedGRU(nn.Module):
    """Stacked GRU cells, gates in the order reset, update, new, as ``torch.nn.GRU`` has them.

    Parameters
    ----------
    groups, parts
        As :class:`GroupedLinear` has them, of the first layer's input.
    hidden, layers
        Width of each state, and number of cells.
    """

    def __init__(self, groups: int, parts: Mapping[str, int], hidden: int, layers: int) -> None:
        super().__init__()
        wide, self.hidden, self.groups = 3 * hidden, hidden, groups
        inputs = [parts, *[{"a": hidden}] * (layers - 1)]
        self.into = nn.ModuleList(GroupedLinear(groups, p, wide, bound_by=hidden) for p in inputs)
        self.back = nn.ModuleList(GroupedLinear(groups, {"h": hidden}, wide) for _ in range(layers))

    def initial(self, rows: int, like: Tensor) -> list[Tensor]:
        """States of zeros, (G, rows, hidden) a layer."""
        return [like.new_zeros(self.groups, rows, self.hidden) for _ in self.into]

    def lift(self, known: Mapping[str, Tensor]) -> Tensor:
        """The part of the first layer's gates that does not wait for the loop, with its bias."""
        first = self.into[0]
        assert isinstance(first, GroupedLinear)
        return first(_used(known, first))

    def late_weight(self, names: Iterable[str]) -> Tensor:
        """The first layer's columns for inputs that :meth:`step` gets, to be cut once before a loop."""
        first = self.into[0]
        assert isinstance(first, GroupedLinear)
        return first.columns(names)

    def step(
        self, pre: Tensor, inputs: Mapping[str, Tensor], states: Sequence[Tensor], weight: Tensor | None = None
    ) -> list[Tensor]:
        """New states; ``pre`` is :meth:`lift` of the frame and ``inputs`` the rest."""
        first = self.into[0]
        assert isinstance(first, GroupedLinear)
        rest = _used(inputs, first)
        out: list[Tensor] = []
        gates = first.add_to(pre, rest, weight) if rest else pre
        for layer, h in enumerate(states):
            if layer:
                gates = self.into[layer]({"a": out[-1]})
            held = self.back[layer]({"h": h})
            i, n = gates[..., : 2 * self.hidden], gates[..., 2 * self.hidden :]
            reset, update = torch.sigmoid(i + held[..., : 2 * self.hidden]).chunk(2, -1)
            new = torch.tanh(n + reset * held[..., 2 * self.hidden :])
            out.append(torch.lerp(new.to(h.dtype), h, update.to(h.dtype)))  # casts where types are mixed
        return out


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of a normal distribution, entry by entry."""
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def kl_normal(mean: Tensor, std: Tensor, mean_p: Tensor, std_p: Tensor) -> Tensor:
    r""":math:`\mathrm{KL}(N(\mu, \sigma^2) \,\|\, N(\mu_p, \sigma_p^2))`, entry by entry."""
    return (std_p / std).log() + (std**2 + (mean - mean_p) ** 2) / (2 * std_p**2) - 0.5
