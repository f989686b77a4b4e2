"""Networks over a set of objects: each object is embedded by itself, and the largest embedding of each unit is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from .heads import checked_bins, outputs_of
from .inputs import flags

Linear = Callable[[str, Tensor], Tensor]

__all__ = ["SetPolicy", "SetValue"]


class _SetNetwork(nn.Module):
    """Rows of ``[robot | object 1 | object 2 ...]``, each object beginning with 1 (there) or 0 (padding)."""

    def __init__(
        self, robot: int, features: int, outputs: int, *, embed: Sequence[int], hidden: Sequence[int], lstm: int
    ) -> None:
        super().__init__()
        self.robot = checks.integer("robot", robot, least=0)
        self.features = checks.integer("features", features, least=2)
        self.lstm = checks.integer("lstm", lstm, least=0)
        wide, deep = widths("embed", embed), widths("hidden", hidden)
        self.embed = _mlp([features - 1, *wide])
        self.body = _mlp([robot + wide[-1], *deep])
        last = [robot + wide[-1], *deep][-1]
        if lstm:
            self.input, self.recurrent = nn.Linear(last, 4 * lstm), nn.Linear(lstm, 4 * lstm, bias=False)
            for p in (*self.input.parameters(), *self.recurrent.parameters()):
                nn.init.uniform_(p, -(lstm**-0.5), lstm**-0.5)
        self.head = nn.Linear(lstm or last, outputs)
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # starts near the uniform policy, and near value 0
            self.head.bias.zero_()

    @property
    def memory_size(self) -> int:
        """Numbers that are remembered from step to step, 0 without an LSTM."""
        return 2 * self.lstm

    def forward(self, x: Tensor, memory: Tensor | None = None, begins: Tensor | None = None) -> Any:
        """Outputs (n, outputs) of rows (n, robot + K * features), for any number K of objects.

        With an LSTM: of sequences (n, T, ...) the outputs (n, T, outputs), and the memory (n, 2 lstm) after them.
        """

        def linear(name: str, part: Tensor) -> Tensor:
            found: Tensor = self.get_submodule(name)(part)
            return found

        return self._run(x, linear, getattr(self, "log_std", None), x.ndim, memory, begins)

    def stacked(self, parameters: Mapping[str, Tensor], x: Tensor, memory: Tensor | None = None) -> Any:
        """What R networks of this architecture give for inputs (R, ...), as products of stacked matrices."""

        def linear(name: str, part: Tensor) -> Tensor:
            weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")  # (R, out, in), (R, out)
            flat = part.flatten(1, -2)
            found = flat @ weight.mT if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
            return found.view(*part.shape[:-1], -1)

        x = x.to(parameters["head.weight"].dtype)
        memory = None if memory is None else memory.to(x.dtype)
        # Without padding, which is looked for once, there is nothing to leave out; the numbers are the same.
        objects = self._parts(x)[1] if self._fits(x) else x
        whole = bool((objects[..., 0] > 0.5).all())
        return self._run(x, linear, parameters.get("log_std"), x.ndim - 1, memory, None, whole)

    def _run(
        self,
        x: Tensor,
        linear: Linear,
        spread: Tensor | None,
        dims: int,
        memory: Tensor | None,
        begins: Tensor | None,
        whole: bool = False,
    ) -> Any:
        """``dims`` is the number of dimensions of x, without the one of stacked networks; ``whole``: no padding."""
        if not self._fits(x):
            raise InvalidInput(
                f"rows have {x.shape[-1]} numbers; expected {self.robot} of the robot and {self.features} for each "
                "object."
            )
        if self.lstm:
            self._check_sequences(x, dims, memory, begins)
        elif memory is not None or begins is not None:
            raise InvalidInput("this network has no memory; make it with lstm=64, say, or give rows alone.")
        robot, objects = self._parts(x)
        there = objects[..., :1] > 0.5  # (n, K, 1)
        # Padding may hold anything, also NaN, whose gradient of 0 would be NaN. Zeros are put into the whole row, which
        # keeps it in one piece: products of other strides round in another way.
        if not whole:
            kept = torch.where(there, objects, torch.zeros_like(objects))
            robot, objects = self._parts(torch.cat((robot, kept.flatten(-2)), -1))
        e = self._layers("embed", objects[..., 1:], linear)  # (n, K, width)
        if not whole:  # padding must not win the maximum: values of tanh lie above -2
            e = torch.where(there, e, torch.full_like(e, -2.0))
        e = e.squeeze(-2) if e.shape[-2] == 1 else e.amax(-2)
        h = self._layers("body", torch.cat((robot, e), -1), linear)
        if not self.lstm:
            return _with_spread(linear("head", h), spread)
        h, memory = self._remember(linear("input", h), linear, memory, begins)
        return _with_spread(linear("head", h), spread), memory

    def _layers(self, name: str, x: Tensor, linear: Linear) -> Tensor:
        for number in range(0, len(getattr(self, name)), 2):  # every other one is a tanh
            x = linear(f"{name}.{number}", x).tanh()
        return x

    def _remember(
        self, gates: Tensor, linear: Linear, memory: Tensor | None, begins: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The LSTM over (..., n, T, 4 lstm): outputs (..., n, T, lstm), and the memory (..., n, 2 lstm) at the end."""
        if memory is None:
            memory = gates.new_zeros(*gates.shape[:-2], self.memory_size)
        h, c = memory.chunk(2, -1)
        found = []
        for t in range(gates.shape[-2]):
            if begins is not None:
                new = begins[..., t, None]
                h, c = (torch.where(new, torch.zeros_like(v), v) for v in (h, c))
            i, f, g, o = (gates[..., t, :] + linear("recurrent", h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            found.append(h)
        return torch.stack(found, -2), torch.cat((h, c), -1)

    def _check_sequences(self, x: Tensor, dims: int, memory: Tensor | None, begins: Tensor | None) -> None:
        if dims != 3 or not x.shape[-2]:
            raise InvalidInput(
                f"a network with a memory takes sequences (n, T, numbers), steps of one game beside each other; it got "
                f"{tuple(x.shape)}. Of single rows (n, numbers) give x[:, None], and the memory."
            )
        flags(begins=begins)
        if memory is not None and memory.shape != (*x.shape[:-2], self.memory_size):
            raise InvalidInput(
                f"memory has shape {tuple(memory.shape)}; expected {(*x.shape[:-2], self.memory_size)} for sequences "
                f"{tuple(x.shape)}, n first."
            )
        if begins is not None and begins.shape != x.shape[:-1]:
            raise InvalidInput(
                f"begins has shape {tuple(begins.shape)}; expected {tuple(x.shape[:-1])} for sequences "
                f"{tuple(x.shape)}, n first: True where a step's observation is the first of an episode."
            )

    def _fits(self, x: Tensor) -> bool:
        return x.shape[-1] > self.robot and (x.shape[-1] - self.robot) % self.features == 0

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.robot], x[..., self.robot :].unflatten(-1, (-1, self.features))


def _with_spread(out: Tensor, spread: Tensor | None) -> Tensor:
    """Outputs, and after them the log-standard deviations (D,) or (R, D) of continuous heads."""
    if spread is None:
        return out
    between = (1,) * (out.ndim - spread.ndim)
    return torch.cat((out, spread.view(*spread.shape[:-1], *between, -1).expand(*out.shape[:-1], -1)), -1)


def widths(name: str, value: Any) -> tuple[int, ...]:
    """Widths of layers: whole numbers of 1 at least; ``embed`` needs one, ``hidden`` may be empty.

    Examples
    --------
    >>> widths("embed", [64, 32])
    (64, 32)
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or (name == "embed" and not value):
        raise InvalidInput(f"{name} must be the widths of its layers, such as (64,), not {value!r}.")
    return tuple(checks.integer(name, w, least=1) for w in value)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers)


class SetPolicy(_SetNetwork):
    r"""A policy over any number of objects in any order, with one head for each dimension of the action.

    .. math::

        \pi(a \mid s) = \prod_d \pi_d(a_d \mid s), \qquad
        \ell = W h\bigl(\text{robot}, \max_k e(\text{object}_k)\bigr)

    A head is categorical, :math:`\operatorname{softmax}(\ell_d)`, or for a continuous dimension Gaussian, with mean
    :math:`\ell_d` and a standard deviation that depends on no observation.

    Parameters
    ----------
    robot
        Numbers of the robot at the head of each row.
    features
        Numbers of each object, of which the first says whether it is there (1) or padding (0).
    bins
        Choices of each dimension of the action; 0 for a continuous one.
    embed, hidden
        Widths of the layers for each object, and after the maximum. The paper gives none; 64 each by default.
    lstm
        Units of an LSTM before the heads, as in the paper; 0, the default, is a policy without a memory.

    Raises
    ------
    InvalidInput
        For sizes that are no whole numbers in range, rows whose length does not fit, and with an LSTM whatever is not a
        sequence (n, T, ...).

    Notes
    -----
    Rows (n, robot + K * features) give outputs (n, O), which :func:`sample_actions` and :func:`action_logp` read: O is
    the sum of ``bins``, where 0 counts 2. A network trained on two objects takes three. Exchanging objects, and adding
    padding, changes nothing, to the last bit.

    With an LSTM, ``policy(x, memory, begins)`` takes sequences (n, T, ...), the memory (n, 2 lstm) before them (None is
    an empty one), and ``begins`` (n, T) bool, True where a step's observation is the first of an episode (not: where
    its action ends one). It gives outputs (n, T, O) and the memory after them. Log-probabilities of a demonstration
    need the memory that this policy would have had on its way: hand in the whole demonstration as one sequence.

    Examples
    --------
    >>> policy = SetPolicy(3, 4, bins=(5, 5))
    >>> policy(torch.ones(7, 3 + 2 * 4)).shape, policy(torch.ones(7, 3 + 3 * 4)).shape
    (torch.Size([7, 10]), torch.Size([7, 10]))
    >>> remembers = SetPolicy(3, 4, bins=(0, 0), lstm=8)
    >>> outputs, memory = remembers(torch.ones(7, 20, 3 + 4))
    >>> outputs.shape, memory.shape
    (torch.Size([7, 20, 4]), torch.Size([7, 16]))
    """

    def __init__(
        self,
        robot: int,
        features: int,
        bins: Sequence[int],
        *,
        embed: Sequence[int] = (64,),
        hidden: Sequence[int] = (64,),
        lstm: int = 0,
    ) -> None:
        self.bins = checked_bins(bins)
        continuous = self.bins.count(0)
        super().__init__(robot, features, outputs_of(self.bins) - continuous, embed=embed, hidden=hidden, lstm=lstm)
        if continuous:
            self.log_std = nn.Parameter(torch.full((continuous,), -0.5))


class SetValue(_SetNetwork):
    """The value of a state: the same network as :class:`SetPolicy`, with weights of its own and one output, (n, 1).

    Parameters
    ----------
    robot, features, embed, hidden, lstm
        As for :class:`SetPolicy`.

    Examples
    --------
    >>> SetValue(3, 4)(torch.ones(7, 11)).shape
    torch.Size([7, 1])
    """

    def __init__(
        self,
        robot: int,
        features: int,
        *,
        embed: Sequence[int] = (64,),
        hidden: Sequence[int] = (64,),
        lstm: int = 0,
    ) -> None:
        super().__init__(robot, features, 1, embed=embed, hidden=hidden, lstm=lstm)
