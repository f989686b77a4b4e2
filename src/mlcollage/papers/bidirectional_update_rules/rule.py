"""The equations of one step, on states and synapses: messages, neurons, Hebbian products and what bounds them.

Shapes: a population P of genomes; k states; R rows (samples, or samples times positions of a convolution); n senders
and m receivers. States are ``(P, k, R, n)``; ``(P, 1, R, n)`` stands for states of which only the first is not zero, as
inputs have them. Synapses are ``(P, C, n [+ 1], m)`` with C = k channels, or 1 that serves all; the last row is the
bias's. Each contraction is one batched matrix product over P and k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ._activations import Activation
from .genome import GenomeSettings

Numbers = Mapping[str, Tensor]
EPS = 1e-5  # of the normalization of messages, inside the root
_MOST = 1e12  # norm of synapses that are normalized in use: beyond it a step changes no digit of them
_EPS_SYNAPSE = 1e-9  # of the normalization of synapses, as in the official code


def per_state(number: Tensor) -> Tensor:
    """A number per genome ``(P,)``, or per genome and state ``(P, k)``, shaped for states ``(P, k, R, n)``."""
    return number.reshape(*number.shape, *[1] * (4 - number.ndim))


def mix(states: Tensor, matrix: Tensor) -> Tensor:
    r"""Mix states: :math:`b^c = \sum_d M^{dc} a^d`, rows of the matrix are *from* states; ``(P, k, R, n)``."""
    p, d, r, n = states.shape
    if d == 1:  # only state 0 is not zero: no product is needed
        return states * per_state(matrix[:, 0])
    mixed = torch.bmm(matrix.transpose(1, 2), states.reshape(p, d, r * n))  # (P, k, R n)
    return mixed.reshape(p, -1, r, n)


def writes_freely() -> bool:
    """Whether results may be written into place: nobody differentiates, and no transform of ``torch.func`` looks on."""
    return not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


def product(left: Tensor, synapses: Tensor) -> Tensor:
    """``left @ synapses`` for every member and state, ``(P, k, R, m)``; one channel serves all states at once."""
    p, k, r, n = left.shape
    if synapses.shape[1] == 1:  # the synapses are read once for all states
        return torch.bmm(left.reshape(p, k * r, n), synapses[:, 0]).reshape(p, k, r, -1)
    return torch.matmul(left, synapses)


def forward_message(states: Tensor, synapses: Tensor, numbers: Numbers, *, bias: bool = True) -> Tensor:
    r"""What neurons receive from below, :math:`\sum_{i,d} w_{ij}^c \nu^{dc} a_i^d`; bias units are 1 in all states."""
    nu = numbers["nu"]
    rows = states.shape[-1]
    if states.shape[1] == 1 and synapses.shape[1] == 1:  # one product for the input, whatever k is
        message = product(states, synapses[:, :, :rows]) * per_state(nu[:, 0])
    elif states.shape[1] == 1 and writes_freely():
        message = _by_channel(states[:, 0], synapses[:, :, :rows].unbind(1)) * per_state(nu[:, 0])
    else:
        message = product(mix(states, nu), synapses[:, :, :rows])
    if bias:
        message = message + per_state(nu.sum(1)) * synapses[:, :, rows:]
    return message


def _by_channel(left: Tensor, right: Sequence[Tensor]) -> Tensor:
    """``left @ right[c]`` as (P, C, ...), where inputs, which all channels read, need not be copied for each."""
    out = left.new_empty(len(right), len(left), left.shape[1], right[0].shape[-1])
    for c, r in enumerate(right):  # into a tensor of its own: a product into a part of one is as slow as one by one
        torch.bmm(left, r, out=out[c])
    return out.transpose(0, 1)


def backward_message(states: Tensor, synapses: Tensor, numbers: Numbers) -> Tensor:
    r"""What neurons receive from above, :math:`\sum_{j,d} w_{ji}^c \mu^{dc} a_j^d`; ``synapses`` are (P, C, m, n)."""
    return product(mix(states, numbers["mu"]), synapses)


def normalize(message: Tensor, moments: tuple[Tensor, Tensor], gain: Tensor, shift: Tensor) -> Tensor:
    """Per neuron and state, over the rows of a batch: zero mean and unit deviation, then gain and shift per state."""
    mean, variance = moments
    return torch.addcmul(per_state(shift), message - mean, (variance + EPS).rsqrt() * per_state(gain))


def normalize_by_own(message: Tensor, gain: Tensor, shift: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """:func:`normalize` by the mean and variance over the rows, ``(P, k, 1, n)`` each, and these.

    The message is written over where :func:`writes_freely`.
    """
    # torch.var_mean over rows that are not contiguous takes ten times as long on the CPU.
    mean, free = message.mean(2, keepdim=True), writes_freely()
    centered = message.sub_(mean) if free else message - mean
    variance = centered.square().mean(2, keepdim=True)
    factor = (variance + EPS).rsqrt() * per_state(gain)
    if free:
        return _written(centered, shift, factor), (mean, variance)
    return torch.addcmul(per_state(shift), centered, factor), (mean, variance)


def message_normalized_by_own(
    states: Tensor, synapses: Tensor, numbers: Numbers, gain: Tensor, shift: Tensor, *, bias: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """:func:`normalize_by_own` of :func:`forward_message`, with fewer passes, where :func:`writes_freely`.

    The bias, which the mean takes away again, is added to the mean alone; ν of inputs goes to mean and deviation.
    """
    nu, n = numbers["nu"], states.shape[-1]
    if states.shape[1] > 1:
        raw, factor = product(mix(states, nu), synapses[:, :, :n]), None
    elif synapses.shape[1] == 1:
        raw, factor = product(states, synapses[:, :, :n]), per_state(nu[:, 0])
    else:
        raw, factor = _by_channel(states[:, 0], synapses[:, :, :n].unbind(1)), per_state(nu[:, 0])
    mean = raw.mean(2, keepdim=True)
    raw -= mean
    variance = raw.square().mean(2, keepdim=True)
    if factor is not None:
        mean, variance = mean * factor, variance * factor.square()
    scale = (variance + EPS).rsqrt() * per_state(gain)
    scale = scale if factor is None else scale * factor
    if bias:
        mean = mean + per_state(nu.sum(1)) * synapses[:, :, n:]
    return _written(raw, shift, scale), (mean, variance)


def _written(centered: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``shift + scale * centered`` into ``centered`` where it has a place for each state."""
    if centered.shape[1] < scale.shape[1]:
        return torch.addcmul(per_state(shift), centered, scale)
    return torch.addcmul(per_state(shift), centered, scale, out=centered)


_IN_PLACE = {torch.tanh: torch.tanh_, torch.sigmoid: torch.sigmoid_, torch.relu: torch.relu_}


def _applied(function: Callable[[Tensor], Tensor], total: Tensor) -> Tensor:
    """A function of a tensor that nobody else reads."""
    if writes_freely() and function in _IN_PLACE:
        return _IN_PLACE[function](total)
    return function(total)


def activate(total: Tensor, activation: Activation, second: str) -> Tensor:
    """The activation of all states; with ``derivative``, states above 0 are σ' of their own totals.

    ``total`` may be written over.
    """
    if second == "activation":
        return _applied(activation.function, total)
    return torch.cat([activation.function(total[:, :1]), activation.derivative(total[:, 1:])], dim=1)


def feed_back(
    old: Tensor,
    message: Tensor,
    numbers: Numbers,
    settings: GenomeSettings,
    activation: Activation,
    *,
    gated: bool = False,
) -> Tensor:
    """New states of hidden neurons on the way back; the update gate has no part in multiplicative rules.

    The message may be written over; ``gated``: it has been through the update gate.
    """
    f = per_state(numbers["keep"])
    if settings.backward == "additive":
        message = message if gated else per_state(numbers["update"]) * message
        total = torch.addcmul(message, f, old, out=message) if writes_freely() else torch.addcmul(message, f, old)
    elif settings.backward == "multiplicative":
        total = f * old * message
    elif settings.backward == "multiplicative_second":
        total = f * old
        total = torch.cat([total[:, :1], total[:, 1:] * message[:, 1:]], dim=1)
    else:
        total = message
    return _applied(activation.function, total)


def hebbian(below: Tensor, above: Tensor, pre: Tensor, post: Tensor, *, channels: int, bias: bool = True) -> Tensor:
    r"""Hebbian products summed over the rows, :math:`\sum_{e,d} a_i^e \tilde\nu^{ec} \tilde\mu^{cd} a_j^d`.

    Parameters
    ----------
    below, above
        States (P, k, R, n) and (P, k, R, m).
    pre, post
        ν̃ and μ̃, (P, k, k): rows of ``pre`` are *from* states, rows of ``post`` are channels.
    channels
        How many channels are wanted: k, or the first alone.
    bias
        Whether a last row for the bias unit, which is 1 in all states, is wanted.

    Returns
    -------
    Tensor
        (P, channels, n [+ 1], m).
    """
    right = mix(above, post[:, :channels].transpose(1, 2))  # (P, C, R, m)
    left = mix(below, pre[..., :channels])  # (P, C, R, n)
    change = torch.matmul(left.transpose(2, 3), right)
    if bias:
        unit = right.sum(2, keepdim=True) * per_state(pre.sum(1)[:, :channels])  # (P, C, 1, m)
        change = torch.cat([change, unit], dim=2)
    return change


def grown(
    synapses: Tensor, below: Tensor, above: Tensor, keep: Tensor, pre: Tensor, post: Tensor, *, bias: bool
) -> Tensor:
    r"""``change(synapses, hebbian(...))`` without saturation, written once, where :func:`writes_freely`.

    The step is in ``post`` already.
    """
    channels, n = synapses.shape[1], below.shape[3]
    right = mix(above, post[:, :channels].transpose(1, 2))  # (P, C, R, m)
    if below.shape[1] == 1:  # its factor goes to the smaller side
        scaled = right * per_state(pre[:, 0, :channels])
        product = _by_channel(below[:, 0].transpose(1, 2), scaled.unbind(1))
    else:
        product = torch.matmul(mix(below, pre[..., :channels]).transpose(2, 3), right)
    f, new = per_state(keep), torch.empty_like(synapses)
    torch.addcmul(product, f, synapses[:, :, :n], out=new[:, :, :n])
    if bias:
        unit = right.sum(2, keepdim=True) * per_state(pre.sum(1)[:, :channels])
        torch.addcmul(unit, f, synapses[:, :, n:], out=new[:, :, n:])
    return new


def hebbian_back(below: Tensor, above: Tensor, pre: Tensor, post: Tensor, *, channels: int) -> Tensor:
    """The same for synapses that run back, (P, C, m, n): the upper layer is sender and goes through ν̃."""
    left = mix(above, pre[..., :channels])  # (P, C, R, m)
    right = mix(below, post[:, :channels].transpose(1, 2))  # (P, C, R, n)
    return torch.matmul(left.transpose(2, 3), right)


def inhibition(synapses: Tensor, above: Tensor, numbers: Numbers, settings: GenomeSettings) -> Tensor:
    """The modified Oja term, to be added to the Hebbian product; the update gate's sign makes it inhibitory."""
    if settings.oja == "weights":  # the first part of eq. 8, by the synapses that reach the same neuron
        size = synapses.square().sum(2, keepdim=True)  # (P, C, 1, m)
    else:
        received = mix(above, numbers["hebb_post"][:, : synapses.shape[1]].transpose(1, 2))
        size = received.square().sum(2, keepdim=True)
        size = size / above.shape[2] if settings.reduction == "mean" else size
    sign = torch.sign(numbers["synapse_update"])
    return -per_state(numbers["oja"].abs() * sign) * synapses * size


def change(
    synapses: Tensor, product: Tensor, keep: Tensor, update: Tensor, numbers: Numbers, saturation: str
) -> Tensor:
    r"""New synapses, :math:`\tilde f w + \tilde\eta\,\Delta`, with the saturation of the settings."""
    f, eta = per_state(keep), per_state(update)
    if saturation in ("none", "tanh"):
        new = torch.addcmul(f * synapses, eta, product)
        if saturation == "tanh":
            limit = per_state(numbers["saturation"])
            new = limit * torch.tanh(new / limit)
        return new
    shrink = torch.exp(-synapses.abs() * (0.1 + per_state(numbers["saturation"].abs())))
    new = synapses + ((f - 1) * synapses + eta * product) * shrink
    return torch.tanh(new) if saturation == "exp_tanh" else new


def normalized(synapses: Tensor, gain: Tensor) -> Tensor:
    """Synapses divided by the norm of all that reach the same neuron, the bias's included, times a gain ``(P,)``."""
    return per_state(gain) * synapses * (synapses.square().sum(2, keepdim=True) + _EPS_SYNAPSE).rsqrt()


def bounded(synapses: Tensor) -> Tensor:
    """Synapses whose norm at a neuron is cut to 1e12: normalized in use they act the same, and never overflow."""
    # exactly 1 below the bound, and no root of zero, whose gradient is infinite
    return synapses * (synapses.square().sum(2, keepdim=True) / _MOST**2).clamp(min=1.0).rsqrt()
