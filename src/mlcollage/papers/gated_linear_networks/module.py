"""The network as a ``torch.nn.Module``: a head that learns by ``update()`` and not by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._settings import hidden_sizes
from .network import GatedNetwork


class GLN(nn.Module):
    r"""Gated linear network head: ``forward(p, z)`` predicts, ``update(p, z, target, lr)`` learns.

    One network per class (one-vs-all). Weights, hyperplanes, visit counts are buffers: optimizers do not see them,
    ``state_dict`` holds them, ``to()`` moves them. ``forward`` is differentiable in ``p``, so gradients can pass to a
    backbone. The arithmetic is that of :class:`GatedNetwork`, to rounding. ``forward`` gives NaN for a sample whose
    ``z`` is not finite or whose ``p`` lies outside [0, 1]; ``update`` refuses the batch and learns nothing from it.

    Parameters
    ----------
    n_inputs : int
        Base predictions ``d``.
    side_dim : int, optional
        Width of the side information; ``n_inputs`` by default.
    num_classes : int, default 10
        Networks; 1 for a single probability.
    hidden_layer_sizes : sequence of int, default (16, 16)
        Neurons in each layer below the output neuron.
    context_dim : int, default 4
        Hyperplanes of a neuron.
    eps, weight_clip, layer_bias, context_bias_scale, weight_init, gradient
        As in :class:`GLNClassifier`.
    seed : int, default 0
        Draws the hyperplanes: those of a :class:`GatedNetwork` of the same seed.
    device, dtype : optional
        Of the buffers.

    Examples
    --------
    A frozen backbone gives features ``f``; its sigmoid is the base prediction and ``f`` the side information.

    >>> head = GLN(8, num_classes=3)
    >>> f = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    >>> before = head.update(torch.sigmoid(f), f, torch.tensor([0, 1, 2, 0, 1]), lr=0.01)
    >>> head(torch.sigmoid(f), f).shape, before.shape
    (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    normals: Tensor
    offsets: Tensor

    def __init__(
        self,
        n_inputs: int,
        side_dim: int | None = None,
        num_classes: int = 10,
        *,
        hidden_layer_sizes: Sequence[int] = (16, 16),
        context_dim: int = 4,
        eps: float = 0.01,
        weight_clip: float = 200.0,
        layer_bias: float = 0.731,
        context_bias_scale: float = 0.05,
        weight_init: str = "mean",
        gradient: str = "paper",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.integer("n_inputs", n_inputs, least=1)
        checks.integer("num_classes", num_classes, least=1)
        side_dim = n_inputs if side_dim is None else side_dim
        core = GatedNetwork(  # checks the settings and draws the hyperplanes
            (*hidden_sizes(hidden_layer_sizes), 1),
            n_inputs,
            side_dim,
            context_dim=context_dim,
            eps=eps,
            weight_clip=weight_clip,
            layer_bias=layer_bias,
            context_bias_scale=context_bias_scale,
            weight_init=weight_init,
            gradient=gradient,
            tables="dense",
            dtype="float64",
            seed=seed,
        )
        core.add_heads(num_classes)
        self.n_inputs, self.side_dim, self.num_classes, self.context_dim = n_inputs, side_dim, num_classes, context_dim
        self.sizes = tuple(int(k) for k in core.sizes)
        self.limit, self.bias, self.weight_clip, self.official = core.limit, core.bias, weight_clip, core.official
        dtype = dtype or torch.get_default_dtype()
        # (classes, neurons, m, D) and (classes, neurons, m)
        normals = torch.from_numpy(core.contexts.normals).reshape(num_classes, core.neurons, context_dim, side_dim)
        offsets = torch.from_numpy(core.contexts.offsets).reshape(num_classes, core.neurons, context_dim)
        self.register_buffer("normals", normals.to(device, dtype))
        self.register_buffer("offsets", offsets.to(device, dtype))
        for layer in range(len(self.sizes)):
            weights = torch.from_numpy(core.layer_weights(layer))  # (classes, K_l, 2**m, K_{l-1} + 1)
            self.register_buffer(f"weight{layer}", weights.to(device, dtype))
            self.register_buffer(f"visits{layer}", torch.zeros(weights.shape[:3], dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return (
            f"{self.n_inputs}, side_dim={self.side_dim}, num_classes={self.num_classes}, sizes={self.sizes}, "
            f"context_dim={self.context_dim}"
        )

    def contexts(self, z: Tensor) -> Tensor:
        """Active context of every neuron, ``(n, num_classes, neurons)`` int64."""
        z = self._check(z, self.side_dim, "side information z")
        projected = torch.einsum("nd,ckmd->nckm", z, self.normals)  # v . z of every hyperplane
        powers = 2 ** torch.arange(self.context_dim, device=z.device)
        return ((projected > self.offsets) * powers).sum(dim=-1)

    def logits(self, p: Tensor, z: Tensor) -> Tensor:
        """Raw logit of each class's network, ``(n, num_classes)``."""
        p = self._check(p, self.n_inputs, "base predictions p")
        contexts = self.contexts(z).split(self.sizes, dim=2)  # per layer (n, classes, K_l)
        values = self._base(p)[:, None].expand(-1, self.num_classes, -1)  # logit(p) of the layer below, with the bias
        heads = torch.arange(self.num_classes, device=p.device)[None, :, None]
        raw = values
        for layer, (size, index) in enumerate(zip(self.sizes, contexts, strict=True)):
            neurons = torch.arange(size, device=p.device)[None, None]
            selected = self.get_buffer(f"weight{layer}")[heads, neurons, index]  # (n, classes, size, fan)
            raw = torch.einsum("nckf,ncf->nck", selected, values)
            values = self._with_bias(raw)
        # NaN and infinity in z select some region; the product makes that NaN without waiting for a device.
        return raw[:, :, 0] + (0 * z.detach().to(raw)).sum(dim=1, keepdim=True)

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Probability that each class's network gives, ``(n, num_classes)`` (they need not sum to one).

        Parameters
        ----------
        p : Tensor of shape (n, n_inputs)
            Base predictions in [0, 1].
        z : Tensor of shape (n, side_dim)
            Side information.
        """
        return torch.sigmoid(self.logits(p, z))

    @torch.no_grad()
    def update(self, p: Tensor, z: Tensor, target: Tensor, lr: float) -> Tensor:
        r"""Learn from the samples one after the other, and return the probabilities from before each.

        Parameters
        ----------
        p, z : Tensor
            As in :meth:`forward`.
        target : Tensor of shape (n,) or (n, num_classes)
            Class numbers, or 0 and 1 for each network.
        lr : float
            Step size :math:`\eta > 0`.

        Returns
        -------
        Tensor of shape (n, num_classes)

        Raises
        ------
        InvalidInput
            A wrong shape, ``p`` or ``target`` outside [0, 1], or ``z`` not finite. No sample has been learned from.
        """
        checks.positive("lr", lr)
        p = self._check(p, self.n_inputs, "base predictions p")
        z = self._check(z, self.side_dim, "side information z")
        goals = self._targets(target, len(p), p)
        if len(z) != len(p):
            raise InvalidInput(f"p and z must hold the same samples; got {len(p)} and {len(z)}.")
        # One answer for all three, so that a device is waited for once; comparisons with NaN are false.
        within = [((t >= 0) & (t <= 1)).all() for t in (p, goals)]
        if not bool(torch.stack([*within, z.isfinite().all()]).all()):
            raise InvalidInput(
                "update() needs base predictions p and targets from 0 to 1, such as torch.sigmoid(features), and "
                "finite side information z; nothing was learned from this batch."
            )
        contexts = self.contexts(z).split(self.sizes, dim=2)
        base = self._base(p)
        heads = torch.arange(self.num_classes, device=p.device)[:, None]
        neurons = [torch.arange(size, device=p.device)[None] for size in self.sizes]
        # Head and neuron numbers broadcast against contexts (classes, size): one row of weights per neuron.
        out = torch.empty(len(p), self.num_classes, dtype=p.dtype, device=p.device)
        for i in range(len(p)):
            values = base[i].expand(self.num_classes, -1)
            for layer, k in enumerate(neurons):
                weights, where = self.get_buffer(f"weight{layer}"), (heads, k, contexts[layer][i])
                selected = weights[where]  # (classes, size, fan)
                raw = torch.einsum("ckf,cf->ck", selected, values)  # w . logit(p)
                # w <- clip(w - eta (q - x) logit(p), -b, b)
                error = torch.sigmoid(raw) - goals[i][:, None]
                if self.official:
                    error = error.masked_fill(raw.abs() > self.limit, 0)
                moved = selected - lr * error[:, :, None] * values[:, None]
                weights[where] = moved.clamp(-self.weight_clip, self.weight_clip)
                self.get_buffer(f"visits{layer}")[where] += 1
                values = self._with_bias(raw)
            out[i] = torch.sigmoid(raw[:, 0])
        return out

    def _targets(self, target: Tensor, n: int, like: Tensor) -> Tensor:
        if target.shape == (n, self.num_classes):
            return target.to(like)
        if target.shape != (n,) or target.is_floating_point():
            raise InvalidInput(
                f"target must hold class numbers ({n},) or 0 and 1 of shape ({n}, {self.num_classes}); got "
                f"{tuple(target.shape)} of {target.dtype}."
            )
        if n and not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise InvalidInput(f"Class numbers in target must lie from 0 to {self.num_classes - 1}.")
        return nn.functional.one_hot(target.long(), self.num_classes).to(like)

    def _check(self, value: Tensor, width: int, name: str) -> Tensor:
        if value.ndim != 2 or value.shape[1] != width:
            raise InvalidInput(f"The {name} must have shape (n, {width}); got {tuple(value.shape)}.")
        return value.to(self.normals.dtype)

    def _base(self, p: Tensor) -> Tensor:
        values = torch.logit(p).clamp(-self.limit, self.limit)
        return torch.cat([values.new_full((len(values), 1), self.bias), values], dim=1)

    def _with_bias(self, raw: Tensor) -> Tensor:
        clipped = raw.clamp(-self.limit, self.limit)
        return torch.cat([torch.full_like(clipped[..., :1], self.bias), clipped], dim=-1)
