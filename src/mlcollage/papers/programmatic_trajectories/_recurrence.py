"""The loop over time that trains the VRNNs: encoder and recurrent network, with a backward pass of its own.

What the loop computes is small, so that most of its time is bookkeeping. Here states are written into buffers, and
weights get their gradients in one product for all frames instead of one for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._nets import GaussianNet, GroupedGRU, GroupedLinear


def recurrence(
    encoder: Any, rnn: Any, pre: Tensor, gates: Tensor, draws: Tensor, there: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """States before each frame, latents, means and deviations; None where only a plain loop is right.

    Parameters
    ----------
    encoder, rnn
        The networks of the loop.
    pre, gates
        What they know before the loop, (G, T, N, hidden) and (G or 1, T, N, 3 rnn).
    draws
        Standard normal numbers (G, T, N, z).
    there
        Which states move, (G, T, N, 1); None is all.
    """
    if not isinstance(encoder, GaussianNet) or not isinstance(rnn, GroupedGRU):
        return None
    first = rnn.into[0]
    assert isinstance(first, GroupedLinear)
    ours = torch.is_grad_enabled() and not draws.requires_grad and "h" in encoder.first.slices
    # Tracing, transforms of functions and automatic casts want plain operations.
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not ours or plain or torch.is_autocast_enabled(pre.device.type) or not {"z", "Z"} & set(first.slices):
        return None
    layers: list[Tensor] = []
    for i, (into, back) in enumerate(zip(rnn.into, rnn.back, strict=True)):
        assert isinstance(into, GroupedLinear)
        assert isinstance(back, GroupedLinear)
        layers += [into.columns("zZ") if i == 0 else into.weight, into.bias, back.weight, back.bias]
    read = encoder.first.columns("h")
    net = [read, encoder.second.weight, encoder.second.bias, encoder.heads.weight, encoder.heads.bias]
    made: tuple[Tensor, Tensor, Tensor, Tensor] = _Recurrence.apply(
        encoder.min_std, draws, there, pre, gates, *net, *layers
    )
    return made


def _add(pre: Tensor, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``pre`` (G, N, O) and rows x (G, N, I) by weights (G, O, I)."""
    if len(weight) == 1:
        return torch.addmm(pre[0], x[0], weight[0].T, out=None if out is None else out[0])[None]
    return torch.baddbmm(pre, x, weight.mT, out=out)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """Rows x (G, N, O) by weights (G, O, I)."""
    return torch.mm(x[0], weight[0])[None] if len(weight) == 1 else torch.bmm(x, weight)


def _gathered(slope: Tensor, x: Tensor) -> Tensor:
    """The gradient of weights (G, O, I), over all frames: slopes (G, T, N, O), inputs (G, T, N, I)."""
    return torch.bmm(slope.flatten(1, 2).mT, x.flatten(1, 2))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, min_std: float, draws: Tensor, there: Tensor | None, pre: Tensor, gates: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        read, w2, b2, w3, b3 = weights[:5]
        layers = [weights[i : i + 4] for i in range(5, len(weights), 4)]
        (g, t, n, size), one, rnn = draws.shape, len(gates), gates.shape[-1] // 3
        shared = one != g
        a1, a2 = torch.empty_like(pre), torch.empty_like(pre)
        heads, std, z = pre.new_empty(g, t, n, 2 * size), torch.empty_like(draws), torch.empty_like(draws)
        states = [pre.new_zeros(one, t + 1, n, rnn) for _ in layers]
        turns = [pre.new_empty(one, t, n, 3 * rnn) for _ in layers]  # reset, update, new
        held = [pre.new_empty(one, t, n, 3 * rnn) for _ in layers]
        wide = [b[:, None].expand(-1, n, -1) for b in (b2, b3)]
        known = [
            (into_b[:, None].expand(-1, n, -1), back_b[:, None].expand(-1, n, -1)) for _, into_b, _, back_b in layers
        ]
        for s in range(t):
            h = states[-1][:, s].expand(g, -1, -1)
            torch.relu_(_add(pre[:, s], h, read, a1[:, s]))
            torch.relu_(_add(wide[0], a1[:, s], w2, a2[:, s]))
            _add(wide[1], a2[:, s], w3, heads[:, s])
            mean, raw = heads[:, s, :, :size], heads[:, s, :, size:]
            std[:, s] = F.softplus(raw).add_(min_std)
            torch.addcmul(mean, std[:, s], draws[:, s], out=z[:, s])
            below = z[:, s].permute(1, 0, 2).flatten(1)[None] if shared else z[:, s]
            for i, (into, _, back, _) in enumerate(layers):
                own, turn, hold = states[i][:, s], turns[i][:, s], held[i][:, s]
                _add(gates[:, s] if i == 0 else known[i][0], below, into, turn)
                _add(known[i][1], own, back, hold)
                both = turn[..., : 2 * rnn]
                both.add_(hold[..., : 2 * rnn]).sigmoid_()
                new = turn[..., 2 * rnn :].addcmul_(turn[..., :rnn], hold[..., 2 * rnn :]).tanh_()
                below = torch.lerp(new, own, turn[..., rnn : 2 * rnn])
                states[i][:, s + 1] = below if there is None or shared else torch.where(there[:, s], below, own)
        ctx.save_for_backward(draws, there, *weights, a1, a2, heads, std, *states, *turns, *held)
        ctx.layers = len(layers)
        before = states[-1][:, :t].expand(g, -1, -1, -1)
        return before.clone(), z, heads[..., :size].clone(), std.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.layers
        draws, there, *kept = ctx.saved_tensors
        (read, w2, _, w3, _), kept = kept[:5], kept[5:]
        layers, kept = [kept[4 * i : 4 * i + 4] for i in range(count)], kept[4 * count :]
        (a1, a2, heads, std), kept = kept[:4], kept[4:]
        states, turns, held = kept[:count], kept[count : 2 * count], kept[2 * count :]
        on_h, on_z, on_mean, on_std = slopes
        (g, t, n, size), one, rnn = draws.shape, len(states[0]), states[0].shape[-1]
        shared = one != g
        d1, d2, d3 = torch.empty_like(a1), torch.empty_like(a2), torch.empty_like(heads)
        d_in, d_held = [torch.empty_like(v) for v in turns], [torch.empty_like(v) for v in held]
        ahead = [torch.zeros_like(v[:, 0]) for v in states]  # of the states after the frame
        # What does not wait for the loop: slopes of the activations.
        on1, on2 = a1 > 0, a2 > 0
        bend = torch.sigmoid(heads[..., size:])
        for s in range(t - 1, -1, -1):
            down = None
            for i in range(count - 1, -1, -1):
                own, turn, hold = states[i][:, s], turns[i][:, s], held[i][:, s]
                reset, update, new = turn[..., :rnn], turn[..., rnn : 2 * rnn], turn[..., 2 * rnn :]
                slope = ahead[i] if down is None else ahead[i] + down
                stay = None
                if there is not None and not shared:
                    stay = slope.masked_fill(there[:, s], 0.0)
                    slope = slope.masked_fill(~there[:, s], 0.0)
                into, still = d_in[i][:, s], d_held[i][:, s]
                kept_part = slope * update
                on_new = (slope - kept_part).mul_(1 - new * new)
                into[..., 2 * rnn :] = on_new
                into[..., :rnn] = on_new * hold[..., 2 * rnn :]
                into[..., rnn : 2 * rnn] = slope * (own - new)
                pair = turn[..., : 2 * rnn]
                into[..., : 2 * rnn] *= pair * (1 - pair)
                still[..., : 2 * rnn] = into[..., : 2 * rnn]
                still[..., 2 * rnn :] = on_new * reset
                ahead[i] = _add(kept_part, still, layers[i][2].mT)
                if stay is not None:
                    ahead[i] += stay
                down = _times(into, layers[i][0])
            assert down is not None
            if shared:
                down = down[0].view(n, g, size).permute(1, 0, 2)
            latent = on_z[:, s] + down
            d3[:, s, :, :size] = on_mean[:, s] + latent
            d3[:, s, :, size:] = torch.addcmul(on_std[:, s], latent, draws[:, s]).mul_(bend[:, s])
            d2[:, s] = _times(d3[:, s], w3).mul_(on2[:, s])
            d1[:, s] = _times(d2[:, s], w2).mul_(on1[:, s])
            top = on_h[:, s] + _times(d1[:, s], read)
            ahead[-1] += top.sum(0, keepdim=True) if shared else top
        before = [v[:, :t] for v in states]
        z = torch.addcmul(heads[..., :size], std, draws)
        below = z.permute(1, 2, 0, 3).flatten(2)[None] if shared else z
        net = [_gathered(d1, before[-1].expand(g, -1, -1, -1)), _gathered(d2, a1), d2.sum((1, 2)), _gathered(d3, a2)]
        found: list[Tensor | None] = [*net, d3.sum((1, 2))]
        for i in range(count):
            # Rows that stayed have no slope, so that it does not matter that they read the state that stayed.
            x = below if i == 0 else states[i - 1][:, 1:]
            bias = None if i == 0 else d_in[i].sum((1, 2))
            found += [_gathered(d_in[i], x), bias, _gathered(d_held[i], before[i]), d_held[i].sum((1, 2))]
        return None, None, None, d1, d_in[0], *found
