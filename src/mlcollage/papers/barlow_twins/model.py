"""A backbone, a projector and the loss as one module, from two batches of views to a number."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import derive, generator
from mlcollage.errors import InvalidInput
from mlcollage.train.loop import predict

from .loss import BarlowTerms, BarlowTwinsLoss
from .mixed import mixed_barlow_term
from .views import two_views

__all__ = ["BarlowProjector", "BarlowTwins", "accumulate_gradients"]

Pool = str | Callable[[Tensor], Tensor] | None
_POOLS = ("mean", "max", "tokens_mean", "cls", "channels_last_mean")


class BarlowProjector(nn.Sequential):
    """The projector of the paper: linear maps without biases, with batch norm and ReLU between them.

    Parameters
    ----------
    in_dim
        Width F of the representation.
    dims
        Widths of its layers, the last being D; by default three of 8,192, as in the paper.
    norm
        False leaves the batch norms out (an ablation of the paper); hidden layers then have biases.

    Examples
    --------
    >>> projector = BarlowProjector(2048, (64, 64, 128))
    >>> [type(layer).__name__ for layer in projector]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    >>> projector(torch.zeros(4, 2048)).shape
    torch.Size([4, 128])
    """

    def __init__(self, in_dim: int, dims: Sequence[int] = (8192, 8192, 8192), *, norm: bool = True) -> None:
        sizes = [checks.integer("in_dim", in_dim, least=1), *(checks.integer("each of dims", d, least=1) for d in dims)]
        if len(sizes) < 2:
            raise InvalidInput("dims is empty; give the widths of the projector's layers, such as (2048, 2048, 2048).")
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(sizes), start=2):
            last = i == len(sizes)
            layers.append(nn.Linear(before, after, bias=not (norm or last)))
            if not last:
                layers += [nn.BatchNorm1d(after)] if norm else []
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class BarlowTwins(nn.Module):
    r"""Two views through one network, and the loss of their embeddings.

    .. math:: h = f(x), \qquad z = g(h), \qquad L(g(f(x^A)), g(f(x^B)))

    The *representation* h is what is used afterwards, the *embedding* z only in the loss. The views go through the
    network one after the other, so that batch norms see each by itself, as in the official code.

    Parameters
    ----------
    backbone
        f, any module; what it returns must be (N, F), or become so by ``output`` and ``pool``.
    projector
        g, such as :class:`BarlowProjector`; None uses the representation as embedding.
    loss
        A module of two embeddings, by default :class:`~mlcollage.papers.barlow_twins.loss.BarlowTwinsLoss` ().
    output
        Which of several outputs of the backbone: a name (``"last_hidden_state"``) or an index.
    pool
        How an output with more than two axes becomes (N, F): ``"mean"`` or ``"max"`` over the positions of maps
        (N, F, H, W), ``"channels_last_mean"`` of (N, H, W, F), ``"tokens_mean"`` of (N, T, F), ``"cls"`` its first
        token, or a function. (N, F, 1, 1) needs none.
    mix
        Weight of the regularizer of mixed samples, a third pass
        (:func:`~mlcollage.papers.barlow_twins.mixed.mixed_barlow_term`); 0 (default) for none.
    mix_seed
        Seeds the mixing.

    Raises
    ------
    InvalidInput
        For batches without two views, outputs that are no (N, F), and a weight with a process group.

    Notes
    -----
    Under ``DistributedDataParallel`` wrap the whole object, not the backbone alone, which would be called twice in a
    step; convert batch norms with ``nn.SyncBatchNorm.convert_sync_batchnorm``, and give the loss its ``group``.

    Gradient checkpointing runs the batch norms of the backbone a second time, so that running statistics are updated
    twice; the loss is right, evaluation is not. A warning says so when it is seen.

    Examples
    --------
    >>> from mlcollage.nn import build
    >>> make = lambda: BarlowTwins(nn.Linear(8, 16), BarlowProjector(16, (32, 32)), BarlowTwinsLoss(0.02))
    >>> model, draw = build(make, 0), torch.Generator().manual_seed(0)
    >>> x = torch.randn(64, 8, generator=draw)
    >>> noise = torch.randn(2, 64, 8, generator=draw)
    >>> loss = model(x + 0.1 * noise[0], x + 0.1 * noise[1])
    >>> loss.backward()
    >>> model.encode(x).shape
    torch.Size([64, 16])
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module | None = None,
        loss: nn.Module | None = None,
        *,
        output: str | int | None = None,
        pool: Pool = None,
        mix: float = 0.0,
        mix_seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(pool, str):
            checks.choice("pool", pool, _POOLS)
        if not isinstance(backbone, nn.Module):
            raise InvalidInput(
                f"the backbone is a {type(backbone).__name__}; an nn.Module is needed, or its parameters stay unknown."
            )
        self.backbone = backbone
        self.projector = nn.Identity() if projector is None else projector
        self.loss = BarlowTwinsLoss() if loss is None else loss
        self.output: str | int | None = output
        self.pool: Pool = pool
        self.mix, self.mix_seed = checks.real("mix", mix, least=0), mix_seed
        self._calls = 0
        self._updates: int | None = None  # of the first batch norm, after the last pass in training mode
        settings = getattr(self.loss, "_settings", None)
        if self.mix and (settings is None or settings.group is not None or settings.normalize != "batch"):
            raise InvalidInput("mix needs a BarlowTwinsLoss with normalize='batch' and without a process group.")

    def forward(self, *batch: Any) -> Any:
        """The loss of two views: ``model(x_a, x_b)``, or a batch as a loader gives it (:func:`two_views`)."""
        x_a, x_b = two_views(batch[0] if len(batch) == 1 else batch)
        self._look_for_recomputation()
        z_a, z_b = self.embed(x_a), self.embed(x_b)
        loss = self.loss(z_a, z_b)
        if self.mix:
            loss = self._add_mixed(loss, x_a, x_b, z_a, z_b)
        self._calls += 1
        self._updates = self._counted()
        return loss

    def encode(self, x: Any) -> Tensor:
        """The representation (N, F) of a batch, in the present mode and with its graph."""
        out = self.backbone(**x) if isinstance(x, Mapping) else self.backbone(x)
        return _rows_of(out, self.output, self.pool)

    def embed(self, x: Any) -> Tensor:
        """The embedding (N, D) of a batch, in the present mode and with its graph."""
        z: Tensor = self.projector(self.encode(x))
        return z

    def representations(self, x: Tensor, batch_size: int = 1024) -> Tensor:
        """Representations (n, F) of all of x, in evaluation mode and without gradients; the mode is restored."""
        return predict(_Encoder(self), x, batch_size)

    def _add_mixed(self, loss: Any, x_a: Tensor, x_b: Tensor, z_a: Tensor, z_b: Tensor) -> Any:
        draw = generator(self.mix_seed, self._calls)
        alpha = float(torch.rand((), generator=draw))  # Beta(1, 1)
        index = torch.randperm(len(x_a), generator=draw).to(x_a.device)
        z_m = self.embed(alpha * x_a + (1 - alpha) * x_b[index])
        s: Any = self.loss._settings
        term = self.mix * mixed_barlow_term(
            z_m, z_a, z_b, index, alpha, lambd=s.lambd, eps=s.eps, correction=s.correction
        )
        return loss._replace(loss=loss.loss + term) if isinstance(loss, BarlowTerms) else loss + term

    def _counted(self) -> int | None:
        if not self.training or self._calls > 3:  # reading the counter waits for the device
            return None
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
                return int(module.num_batches_tracked)
        return None

    def _look_for_recomputation(self) -> None:
        before, now = self._updates, self._counted() if self._updates is not None else None
        if before is not None and now is not None and now > before:
            warnings.warn(
                f"a batch norm of the backbone was updated {now - before} times between two calls: gradient "
                "checkpointing computes forward passes twice, which spoils running statistics. Leave batch norms out "
                "of what is checkpointed, or estimate the statistics again before evaluation.",
                stacklevel=3,
            )
            self._updates = None


class _Encoder(nn.Module):
    """Only the way to the representation, for functions that call a module."""

    def __init__(self, model: BarlowTwins) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        return self.model.encode(x)


def accumulate_gradients(
    model: BarlowTwins, x_a: Tensor, x_b: Tensor, micro_batch: int, *, scale: float = 1.0
) -> Tensor:
    r"""Gradient of the loss of a large batch, a few rows at a time in the network (GradCache).

    The loss of a batch is no mean of losses of its parts, so that ordinary accumulation minimizes another one. Here all
    embeddings are computed first, without a graph; then the loss and its gradients :math:`\partial L / \partial z`;
    then each part again, with a graph, into which its rows of these gradients are sent. Both passes draw the same
    random numbers, and running statistics are updated by the first only.

    Parameters
    ----------
    model
        A :class:`BarlowTwins` without ``mix``.
    x_a, x_b
        The views (N, ...).
    micro_batch
        Rows at once, 2 or more.
    scale
        Factor on the gradients, such as that of a ``GradScaler`` (``scaler.get_scale()``).

    Returns
    -------
    Tensor
        The loss of the whole batch, detached; gradients are added to the parameters' own.

    Notes
    -----
    Batch norms inside of the network keep their statistics per part: only the loss is that of the whole batch. A last
    part of a single row is joined to the one before.

    References
    ----------
    Gao, Zhang, Han and Callan, "Scaling deep contrastive learning batch size under memory limited setup", 2021,
    arXiv:2101.06983.

    Examples
    --------
    >>> from mlcollage.nn import build
    >>> model = build(lambda: BarlowTwins(nn.Linear(3, 4)), 0)
    >>> x = torch.randn(2, 32, 3, generator=torch.Generator().manual_seed(0))
    >>> whole = float(model(x[0], x[1]).detach())
    >>> abs(float(accumulate_gradients(model, x[0], x[1], 8)) - whole) < 1e-4
    True
    """
    if model.mix:
        raise InvalidInput("accumulate_gradients has no mixed samples: make the model with mix=0.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInput("no parameter of the model is trained: all have requires_grad=False.")
    micro_batch = checks.integer("micro_batch", micro_batch, least=2)
    views = two_views((x_a, x_b))
    starts = list(range(0, len(x_a), micro_batch))
    if len(starts) > 1 and len(x_a) - starts[-1] < 2:
        starts.pop()
    parts = list(zip(starts, [*starts[1:], len(x_a)], strict=True))
    seed = int(torch.randint(2**31, ()))  # of the caller's stream, so that each step draws other numbers
    devices = [x_a.device] if x_a.device.type == "cuda" else []

    def embed(x: Tensor, key: tuple[int, int]) -> Tensor:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive(seed, *key))
            return model.embed(x)

    with torch.no_grad():
        cached = [torch.cat([embed(x[i:j], (v, i)) for i, j in parts]) for v, x in enumerate(views)]
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    leaves = [z.requires_grad_() for z in cached]
    loss = model.loss(*leaves)
    loss = loss.loss if isinstance(loss, BarlowTerms) else loss
    gradients = torch.autograd.grad(loss, leaves)
    model._updates = None  # these updates of batch norms are no recomputation
    for v, (x, gradient) in enumerate(zip(views, gradients, strict=True)):
        for i, j in parts:
            embed(x[i:j], (v, i)).backward(scale * gradient[i:j])
    with torch.no_grad():
        for buffer, before in statistics:
            buffer.copy_(before)
    return loss.detach()


def _rows_of(out: Any, output: str | int | None, pool: Pool) -> Tensor:
    """What a backbone returned as (N, F)."""
    if output is not None:
        try:
            out = out[output] if isinstance(output, int) or isinstance(out, Mapping) else getattr(out, output)
        except (AttributeError, LookupError, TypeError):
            raise InvalidInput(f"the backbone's {type(out).__name__} has no output {output!r}.") from None
    if not isinstance(out, Tensor):
        named = list(out) if isinstance(out, Mapping) else range(len(out)) if isinstance(out, tuple | list) else []
        raise InvalidInput(
            f"the backbone returns a {type(out).__name__}"
            + (f" with {', '.join(map(repr, named))}" if named else "")
            + "; say which output is the representation with output='last_hidden_state' or output=0."
        )
    if callable(pool):
        out = pool(out)
        if not isinstance(out, Tensor):
            raise InvalidInput(f"the function given as pool returns a {type(out).__name__}; a tensor (N, F) is needed.")
    elif pool is not None:
        out = _pooled(out, pool)
    elif out.ndim == 4 and out.shape[2:] == (1, 1):
        out = out.flatten(1)
    if out.ndim != 2:
        hint = {
            3: "tokens (N, T, F): pool='cls' or 'tokens_mean'",
            4: "maps: pool='mean' for (N, F, H, W), pool='channels_last_mean' for (N, H, W, F)",
        }.get(out.ndim, "give pool a function that makes (N, F) of it")
        raise InvalidInput(f"the backbone's output has shape {tuple(out.shape)}, not (N, F); {hint}.")
    return out


def _pooled(out: Tensor, pool: str) -> Tensor:
    wanted = 3 if pool in ("cls", "tokens_mean") else 4
    if out.ndim != wanted:
        raise InvalidInput(f"pool={pool!r} is for outputs of {wanted} axes; the backbone's has {tuple(out.shape)}.")
    if pool == "cls":
        return out[:, 0]
    if pool == "tokens_mean":
        return out.mean(1)
    if pool == "channels_last_mean":
        return out.mean((1, 2))
    return out.mean((2, 3)) if pool == "mean" else out.amax((2, 3))
