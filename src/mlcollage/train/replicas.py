"""R networks trained as one stacked model: many seeds, or settings, at little more than the cost of one.

Small networks leave a processor idle: each step is a row of small operations that cost more to start than to compute.
:class:`Replicas` stacks the parameters of R networks along a new first dimension and runs all of them
with ``torch.func.vmap``, so that R small matrix products become one batched product. Every replica computes what it
would compute alone, to rounding.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mlcollage import _checks as checks
from mlcollage.data.fresh_networks import refuse_same
from mlcollage.errors import InvalidInput
from mlcollage.nn.init import build, seeded
from mlcollage.nn.wrapped import inputs_of
from mlcollage.train.loop import tensor_of
from mlcollage.train.sam import SAM

Loss = Callable[[Tensor, Tensor], Tensor]
InDims = tuple[int | None, int | None]


def stackable(model: nn.Module) -> str | None:
    """Why copies of a model cannot be trained as one stacked model, in one sentence; None if it can be stacked.

    Looks at the modules only. What a ``forward`` does in plain Python (``.item()``, branches on values, indexing with
    masks) shows when it runs; :meth:`Replicas.step` then says so.

    Parameters
    ----------
    model
        Any network.

    Examples
    --------
    >>> stackable(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))) is None
    True
    >>> print(stackable(nn.LSTM(3, 8)))
    it uses LSTM, which torch.vmap cannot run; train the seeds one after the other, or in processes.
    """
    for name, module in model.named_modules():
        where = f"its layer {name!r}" if name else "it"
        # The fused recurrent kernels have no rule for vmap.
        if isinstance(module, nn.RNNBase):
            return (
                f"{where} uses {type(module).__name__}, which torch.vmap cannot run; "
                "train the seeds one after the other, or in processes."
            )
        if isinstance(module, nn.SyncBatchNorm):
            return f"{where} is a SyncBatchNorm, which spans processes; use BatchNorm2d or group norm."
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.track_running_stats
            and module.momentum is None
        ):
            return (
                f"{where} is a batch norm with momentum=None, whose cumulative average torch.vmap cannot run; "
                "give it a momentum such as 0.1, or use group norm."
            )
        # A sparse gradient has no dimension for the replicas.
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            return f"{where} is an embedding with sparse gradients; make it with sparse=False."
    return _untrainable(model)


def _untrainable(model: nn.Module) -> str | None:
    """What keeps a model from being trained, stacked or not."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            return f"its parameter {name!r} is lazy; run one batch through the model in model_fn before returning it."
    if not any(p.requires_grad for p in model.parameters()):
        return "it has no trainable parameter."
    return None


class Replicas:
    r"""R networks of one architecture, trained together.

    With stacked parameters :math:`\theta = (\theta_1, \dots, \theta_R)` and the sum
    :math:`L(\theta) = \sum_r L_r(\theta_r)`, one backward pass gives every replica its own gradient, since
    :math:`\nabla_{\theta_r} L = \nabla L_r`. Optimizers that work element by element (SGD with momentum and weight
    decay, Adam, AdamW, RMSprop, ...) then update the stack as they would update each network. A learning rate for
    each replica is exact for every optimizer whose update is proportional to it: the step is taken with the largest
    rate :math:`\eta_\max` and each replica goes the share :math:`\eta_r / \eta_\max` of it,
    :math:`\theta_r \leftarrow \theta_r + (\eta_r / \eta_\max) \, (\theta_r^+ - \theta_r)`. Both properties are tried
    out on a tiny problem when the object is made, and an optimizer that lacks them is refused.

    Parameters
    ----------
    model_fn
        Makes a fresh network; called once for each seed, always giving the same architecture.
    seeds
        One for each replica; replica r starts as ``build(model_fn, seeds[r])`` does.
    optimizer
        A ``torch.optim`` class, or a function from the list of stacked parameters (each with a first dimension of
        R) to an optimizer.
    lr
        One learning rate for all, or one for each replica. Needed with a class; with a function None keeps its own.
    device
        Where to train; by default where ``model_fn`` puts the network.
    stacked
        True (default): refuse networks that ``torch.vmap`` cannot run. None: call these one after the other, with the
        same results at the price of separate trainings. False: call any network one after the other.
    **optimizer_kwargs
        Handed to ``optimizer``, e.g. ``momentum=0.9``. With ``optimizer=SAM``: ``base_optimizer``, and ``rho``, one
        for all or one for each replica.

    Attributes
    ----------
    size : int
        R.
    parameters, buffers : dict of str to Tensor
        The stacked state, each (R, ...).
    optimizer : torch.optim.Optimizer
        Over ``parameters``.
    steps_done : int
        Updates so far.
    stacked : bool
        Whether the networks run as one; False once they are called one after the other.

    Raises
    ------
    InvalidInput
        If ``model_fn`` hands out the same network again, the network cannot be stacked (see :func:`stackable`) although
        ``stacked=True``, the optimizer does not work
        element by element, or there is not one learning rate for each seed.

    Notes
    -----
    *Memory.* R times the parameters, gradients, optimizer state and activations of one network, and one more copy of
    the parameters during a step with different learning rates. If it does not fit, train the seeds in groups: the
    result is the same.

    *Speed.* The gain is in what does not depend on size: calls, kernel launches, threads that wait for each other.
    Expect it for small layers and batches, on several threads, and most of all on a GPU; one thread that is busy with
    large matrix products gains nothing. Convolutions become grouped convolutions, which on a CPU are no faster than
    one network after the other and often slower: use processes there.

    *Batch norm* works: each replica has its own running statistics. *Dropout* draws different noise for each replica
    (seeded by the seeds and the step), hence not the noise that a network trained alone would draw.

    *Divergence.* The losses of a replica that diverges become NaN; the others are not touched by it.

    Examples
    --------
    >>> from mlcollage.nn.mlp import MLP
    >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> replicas = Replicas(lambda: MLP((5,), 2, (16,)), seeds=[0, 1, 2], lr=[0.5, 0.05, 0.0], momentum=0.9)
    >>> losses = torch.stack([replicas.step(x, y) for _ in range(20)])
    >>> [bool(b) for b in losses[-1] < 0.2 * losses[0]]
    [True, False, False]
    >>> tuple(replicas.predict(x).shape), type(replicas.module(0)).__name__
    ((3, 64, 2), 'MLP')

    An objective of one's own, here the loss on logits plus a small multiple of their squares, and a branch of it:

    >>> def objective():
    ...     logits = replicas(x)  # (R, 64, 2)
    ...     losses = torch.stack([F.cross_entropy(z, y) for z in logits])
    ...     return losses + 1e-3 * logits.square().mean((1, 2))
    >>> branch = replicas.copy()
    >>> tuple(replicas.update(objective).shape), replicas.steps_done, branch.steps_done
    ((3,), 21, 20)
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        seeds: Sequence[int],
        *,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float | Sequence[float] | None = None,
        device: torch.device | str | None = None,
        stacked: bool | None = True,
        **optimizer_kwargs: Any,
    ) -> None:
        self.seeds = tuple(int(s) for s in seeds)
        if not self.seeds:
            raise InvalidInput("Replicas needs at least one seed, such as seeds=range(8).")
        models = [build(model_fn, seed).to(device) for seed in self.seeds]
        reason = stackable(models[0])
        # Lazy or non-float weights cannot be trained in either way; all else can be trained one after the other.
        if reason is not None and (stacked or reason == _untrainable(models[0])):
            raise InvalidInput(f"{type(models[0]).__name__} cannot be trained as one stacked model: {reason}")
        if len(models) > 1:
            refuse_same(models[0], models[1], "model_fn")
        _check_same_architecture(models)
        # Every tensor gets R in front: a weight (out, in) becomes (R, out, in).
        parameters, buffers = stack_module_state(models)
        self.parameters: dict[str, Tensor] = dict(parameters)
        self.buffers: dict[str, Tensor] = dict(buffers)
        self.steps_done = 0
        self.stacked = reason is None and stacked is not False
        self._may_fall_back = self.stacked and stacked is None  # until the first pass has shown that vmap can run it
        self._model = models[0]  # its own weights are never read: functional_call puts the stacked ones in
        self._device = next(iter(self.parameters.values())).device
        self._make, ratios = _optimizer_factory(optimizer, lr, len(self.seeds), optimizer_kwargs)
        # One optimizer updates all replicas at once, which is right only if it treats every number by itself.
        _check_elementwise(self._make, ratios)
        self._ratios = None if ratios is None else ratios.to(self._device)
        self.optimizer = self._make(self.trainable)
        self._base_rates = [float(g["lr"]) for g in self.optimizer.param_groups]  # before any factor of a schedule

    @property
    def size(self) -> int:
        """Number of replicas R."""
        return len(self.seeds)

    @property
    def trainable(self) -> list[Tensor]:
        """The stacked parameters that require gradients."""
        return [p for p in self.parameters.values() if p.requires_grad]

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Replicas({type(self._model).__name__}, seeds={self.seeds}, {type(self.optimizer).__name__})"

    def __call__(
        self, x: Tensor, *more: Tensor, in_dim: int | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> Any:
        """Outputs (R, b, ...) in training mode, with their graph; for objectives of your own (:meth:`update`).

        Parameters
        ----------
        x
            Inputs (b, ...) that all replicas share, or (R, b, ...) with ``in_dim=0``.
        more
            Further arguments of ``forward``, of the same kind: memories of a recurrent network, say.
        in_dim
            None if the replicas share x, 0 if x holds a batch for each.
        parameters
            Stacked tensors (R, ...) that stand in for parameters of these names: weights a step further, say.
        """

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], *args: Tensor) -> Any:
            return functional_call(self._model, (parameters, buffers), args)

        self._model.train()
        args = (inputs_of(self._model, x), *more)
        moved = [arg.to(self._device, non_blocking=True) for arg in args]
        return self._map(one, (in_dim,) * len(args), *moved, parameters=parameters)

    def step(
        self,
        x: Tensor,
        y: Tensor,
        *,
        loss: Loss = F.cross_entropy,
        lr_factor: float = 1.0,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        in_dims: InDims | None = None,
    ) -> Tensor:
        """One update of every replica, in training mode.

        Parameters
        ----------
        x
            Inputs (b, ...) that all replicas share, or (R, b, ...), a batch for each.
        y
            Targets (b, ...) or (R, b, ...).
        loss
            From one replica's output and targets to a scalar.
        lr_factor, clip_norm
            As for :meth:`update`.
        autocast
            ``torch.bfloat16`` runs model and loss under ``torch.autocast``.
        in_dims
            Says for x and y whether they are shared (None) or one for each replica (0), as in ``torch.vmap``. Only
            needed where the shapes do not tell: integer labels (b,) or (R, b) do.

        Returns
        -------
        Tensor
            Losses before the update, (R,), detached.

        Raises
        ------
        InvalidInput
            For shapes that do not fit, a loss that is not a scalar, or a model or loss that ``torch.vmap`` cannot run.
        """
        x, y = inputs_of(self._model, x), inputs_of(self._model, y, "y")
        x, y = x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)
        in_dims = _infer_dims(x, y, self.size) if in_dims is None else _check_dims(x, y, self.size, in_dims)

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(tensor_of(self._model, functional_call(self._model, (parameters, buffers), (x,))), y)

        def objective() -> Tensor:
            self._model.train()
            with torch.autocast(self._device.type, dtype=autocast, enabled=autocast is not None):
                return self._map(one, in_dims, x, y)

        return self.update(objective, lr_factor=lr_factor, clip_norm=clip_norm)

    def update(
        self, objective: Callable[[], Tensor], *, lr_factor: float = 1.0, clip_norm: float | None = None
    ) -> Tensor:
        """One update of every replica down the gradient of an objective of your own.

        Parameters
        ----------
        objective
            Gives one number for each replica, (R,), with its graph: losses of ``replicas(x)``, a penalty added, and so
            on. Called once; with :class:`~mlcollage.train.sam.SAM` as optimizer twice, the second time at the weights
            uphill.
        lr_factor
            Factor on the learning rates in this step: a schedule's value.
        clip_norm
            Scale each replica's gradient down to this Euclidean norm if it is longer.

        Returns
        -------
        Tensor
            The objective before the update, (R,), detached.

        Raises
        ------
        InvalidInput
            For an objective of another shape, or factors that are no positive numbers.
        """
        lr_factor = checks.real("lr_factor", lr_factor, least=0)
        values = self._backward(objective)
        if isinstance(self.optimizer, SAM):
            self.optimizer.first_step()
            self._backward(objective)
            self.optimizer.restore()
        if clip_norm is not None:
            self._clip(checks.positive("clip_norm", clip_norm))
        self._descend(lr_factor)
        self.steps_done += 1
        return values

    def predict(
        self, x: Tensor, *, batch_size: int = 1024, activations: bool = False, in_dim: int | None = None
    ) -> Any:
        """Outputs of every replica in evaluation mode, without gradients.

        Parameters
        ----------
        x
            Inputs (n, ...) that all replicas share, or (R, n, ...) with ``in_dim=0``.
        batch_size
            Samples at once.
        activations
            Also return the intermediate activations, for models whose ``forward`` offers them.
        in_dim
            None if the replicas share x, 0 if x holds a set for each.

        Returns
        -------
        Tensor
            (R, n, classes); with ``activations=True`` a pair of it and a dict of activations, each (R, n, ...).
        """
        x = inputs_of(self._model, x)
        samples = 1 if in_dim == 0 else 0  # the dimension of x that holds the samples
        if in_dim == 0 and len(x) != self.size:
            raise InvalidInput(f"x holds inputs for {len(x)} replicas, but there are {self.size}.")
        if x.ndim <= samples or x.shape[samples] == 0 or batch_size < 1:
            raise InvalidInput(f"predict needs at least one sample and batch_size >= 1, not x of {tuple(x.shape)}.")

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            extra = {"activations": True} if activations else {}
            return functional_call(self._model, (parameters, buffers), (x,), extra)

        # Running statistics of batch norm (R, channels) are used, and not updated.
        self._model.eval()
        with torch.no_grad():
            parts = [
                self._map(one, (in_dim,), part.to(self._device, non_blocking=True))
                for part in x.split(batch_size, samples)
            ]
        if not activations:
            return torch.cat(parts, 1)
        # Each part is a pair: outputs (R, b, ...), and activations by name, each (R, b, ...).
        names = parts[0][1]
        return torch.cat([p[0] for p in parts], 1), {n: torch.cat([p[1][n] for p in parts], 1) for n in names}

    def module(self, r: int) -> nn.Module:
        """A copy of replica r as an ordinary network, in evaluation mode, sharing nothing with the stack."""
        if not -self.size <= r < self.size:
            raise InvalidInput(f"replica {r} does not exist; there are {self.size}, counted from 0.")
        model = copy.deepcopy(self._model)
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                # Copied: the module can then be trained without a change of the replicas.
                tensor.copy_((self.parameters if name in self.parameters else self.buffers)[name][r])
        return model.eval()

    def copy(self) -> Replicas:
        """The same replicas in the same state, the optimizer's included, sharing nothing: a branch of the training."""
        twin = copy.copy(self)
        twin.parameters = {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in self.parameters.items()}
        twin.buffers = {k: b.clone() for k, b in self.buffers.items()}
        twin.optimizer = self._make(twin.trainable)
        # State is matched to parameters by position, so that the twin's own tensors take it.
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # torch's loading shares tensors
        return twin

    def _map(
        self,
        one: Callable[..., Any],
        dims: tuple[int | None, ...],
        *args: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Run ``one`` for every replica; noise is different for each and depends on the seeds and the step only."""
        state = {**self.parameters, **(parameters or {})}
        # Dropout and the like: the numbers of a step depend on nothing that was drawn before it.
        with seeded(self.steps_done, *self.seeds):
            if self.stacked:
                kept = {k: b.clone() for k, b in self.buffers.items()} if self._may_fall_back else {}
                try:
                    # checkpointed layers would run again in the backward pass, where vmap is over
                    no_checkpoints = "torch.vmap cannot run gradient checkpointing"
                    with warnings.catch_warnings(), torch.autograd.graph.disable_saved_tensors_hooks(no_checkpoints):
                        warnings.filterwarnings("ignore", message="There is a performance drop")
                        # Different: each replica has dropout masks of its own, as if it were trained alone.
                        found = vmap(one, in_dims=(0, 0, *dims), randomness="different")(state, self.buffers, *args)
                    self._may_fall_back = False
                    return found
                except RuntimeError as error:
                    if not self._may_fall_back:
                        self._refuse_vmap(error)
                    self.stacked = self._may_fall_back = False
                    self.buffers |= kept  # the pass may have updated some of them
            return self._one_by_one(one, dims, state, args)

    def _one_by_one(
        self, one: Callable[..., Any], dims: tuple[int | None, ...], state: Mapping[str, Tensor], args: Sequence[Tensor]
    ) -> Any:
        """What ``torch.vmap`` gives, by a loop."""
        rows, shared = [], self._model
        try:
            for r in range(self.size):
                buffers = {k: b[r].clone() for k, b in self.buffers.items()}  # updated in place by batch norm
                own = [a if dim is None else a[r] for a, dim in zip(args, dims, strict=True)]
                parameters = {k: p[r] for k, p in state.items()}
                if torch.is_grad_enabled():
                    self._model = _holding(shared, {**parameters, **buffers})
                rows.append(one(parameters, buffers, *own))
                for k, b in buffers.items():
                    self.buffers[k][r] = b.detach()
        finally:
            self._model = shared
        return _stack(rows)

    def _refuse_vmap(self, error: RuntimeError) -> None:
        if "vmap" not in str(error):
            raise error
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(
            f"torch.vmap cannot run this {type(self._model).__name__} or its loss ({reason}); rewrite that operation, "
            "or use Replicas(..., stacked=None), which calls such networks one after the other."
        ) from error

    def _backward(self, objective: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        values = objective()
        if values.shape != (self.size,):
            raise InvalidInput(
                f"the loss of one replica must be one number, {(self.size,)} for all, but has shape "
                f"{tuple(values.shape)}."
            )
        values.sum().backward()  # the gradient of the sum with respect to replica r is that of its own term
        return values.detach()

    def _clip(self, clip_norm: float) -> None:
        """What ``clip_grad_norm_`` does, for each replica by itself."""
        grads = [p.grad for p in self.trainable if p.grad is not None]
        # (parameters, R) norms of each part, then (R,) of the whole
        # Each replica is clipped by its own norm; one norm of all would let them slow each other down.
        norm = torch.stack([g.reshape(self.size, -1).norm(dim=1) for g in grads]).norm(dim=0)
        scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(_along(scale, g))

    @torch.no_grad()
    def _descend(self, lr_factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * lr_factor
        if self._ratios is None:
            _base(self.optimizer).step()
        else:
            _scaled_step(self.optimizer, self.trainable, self._ratios)


def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A network that holds one pass's weights for good.

    Gradient checkpointing runs layers again in the backward pass, and must find the weights of their pass in them.
    """
    module = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})  # these are not copied
    first = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    for owner in module.modules():
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for table in tables:
            table.update({leaf: tensors[first[id(t)]] for leaf, t in table.items() if t is not None})
        if isinstance(owner, nn.RNNBase):  # has a list of its weights
            owner._flat_weights = [getattr(owner, name) for name in owner._flat_weights_names]
    return module


def _stack(rows: Sequence[Any]) -> Any:
    """Outputs of R networks as one with a new first dimension: tensors, or tuples and dicts of such."""
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.stack(list(rows))
    if isinstance(first, Mapping):
        return {k: _stack([row[k] for row in rows]) for k in first}
    return tuple(_stack(column) for column in zip(*rows, strict=True))


def _base(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What makes the update: with SAM, the optimizer inside."""
    return optimizer.base_optimizer if isinstance(optimizer, SAM) else optimizer


@torch.no_grad()
def _scaled_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], ratios: Tensor) -> None:
    """Step with the largest rate, then go back to each replica's share of the way."""
    # The optimizer has one rate for all. It takes the largest, and each replica keeps the share of its update that its
    # own rate gives: right for updates that are proportional to the rate.
    before = [p.clone() for p in parameters]
    _base(optimizer).step()
    for p, old in zip(parameters, before, strict=True):
        p.copy_(torch.lerp(old, p, _along(ratios, p).to(p.dtype)))


def _along(values: Tensor, like: Tensor) -> Tensor:
    """(R,) as (R, 1, ..., 1), to be broadcast against ``like`` (R, ...)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def _optimizer_factory(
    optimizer: Callable[..., torch.optim.Optimizer],
    lr: float | Sequence[float] | None,
    size: int,
    kwargs: dict[str, Any],
) -> tuple[Callable[[list[Tensor]], torch.optim.Optimizer], Tensor | None]:
    """A function that makes the optimizer at the largest rate, and each replica's share of it (None: all the same)."""
    rates = None if lr is None else _one_each("learning rates", lr, size)  # (R,)
    largest = None if rates is None else max(rates)
    if "rho" in kwargs:
        kwargs = {**kwargs, "rho": _one_each("lengths rho", kwargs["rho"], size)}

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        if isinstance(optimizer, type):
            made = optimizer(parameters, lr=largest, **kwargs)
        else:
            made = optimizer(parameters, **kwargs)
            for group in made.param_groups:
                group["lr"] = group["lr"] if largest is None else largest
        if isinstance(made, SAM):
            made.stacked = True  # its norms are then those of each replica
        return made

    if not callable(optimizer):
        raise InvalidInput(
            f"optimizer is a {type(optimizer).__name__} of other parameters; give its class, or a function from "
            "a list of parameters to an optimizer."
        )
    if isinstance(optimizer, type) and rates is None:
        raise InvalidInput(f"lr is missing: give one learning rate, or one for each of the {size} replicas.")
    # One rate for all needs no copy of the parameters in each step.
    if rates is None or largest == 0 or len(set(rates)) == 1:
        return make, None
    return make, torch.tensor([r / max(rates) for r in rates], dtype=torch.float64)


def _one_each(what: str, values: float | Sequence[float], size: int) -> list[float]:
    found = [float(v) for v in values] if isinstance(values, Iterable) else [float(values)] * size
    if len(found) != size:
        raise InvalidInput(f"there are {len(found)} {what} for {size} replicas; give one, or one for each.")
    for value in found:
        checks.real(what, value, least=0)
    return found


def _check_elementwise(make: Callable[[list[Tensor]], torch.optim.Optimizer], ratios: Tensor | None) -> None:
    """Three steps on two tiny replicas, stacked and apart: an optimizer that mixes elements gives itself away."""
    g = torch.Generator().manual_seed(0)
    # Two replicas of a (3, 4) weight, three steps, once stacked and once each by itself. An optimizer that mixes
    # entries (LBFGS, or one with a norm of the whole tensor) gives different numbers.
    start = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    grads = torch.randn(3, 2, 3, 4, generator=g, dtype=torch.float64)
    shares = torch.tensor([1.0, 1.0 if ratios is None else 0.5], dtype=torch.float64)

    def run(parameter: Tensor, grads: Tensor, share: Tensor | None, rate: float = 1.0) -> Tensor:
        parameter = parameter.clone().requires_grad_()
        optimizer = make([parameter])
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * rate
        for grad in grads:
            parameter.grad = grad.clone()
            if share is None:
                _base(optimizer).step()
            else:
                _scaled_step(optimizer, [parameter], share)
        return parameter.detach()

    try:
        together = run(start, grads, None if ratios is None else shares)
        apart = [run(start[r], grads[:, r], None, float(shares[r])) for r in range(2)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"the optimizer cannot be used on stacked parameters ({error}); use one that works element by element, "
            "such as SGD, Adam or AdamW."
        ) from error
    if not torch.allclose(together, torch.stack(apart), rtol=1e-9, atol=1e-12):
        raise InvalidInput(
            "the optimizer does not work element by element"
            + ("" if ratios is None else ", or its update is not proportional to the learning rate")
            + ", so that stacked training would differ from separate training; use SGD, Adam, AdamW or RMSprop."
        )


def _check_same_architecture(models: Sequence[nn.Module]) -> None:
    def signature(model: nn.Module) -> dict[str, tuple[object, ...]]:
        state = (*model.named_parameters(), *model.named_buffers())
        return {name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in state}

    first = signature(models[0])
    for model in models[1:]:
        if type(model) is not type(models[0]) or signature(model) != first:
            raise InvalidInput("model_fn must return the same architecture for every seed, but the parameters differ.")


def _infer_dims(x: Tensor, y: Tensor, size: int) -> InDims:
    """Shared or per replica, from labels (b,) or (R, b) and the leading sizes of x."""
    if y.is_floating_point() or y.is_complex() or y.ndim not in (1, 2):
        raise InvalidInput(
            f"whether targets of shape {tuple(y.shape)} and type {y.dtype} are shared cannot be told; pass in_dims, "
            "e.g. (None, None) if all replicas share x and y, (0, 0) if each has its own."
        )
    y_dim = None if y.ndim == 1 else 0
    b = y.shape[-1]
    # Both hold where size == b == x.shape[1]; the targets then decide.
    own, shared = x.shape[:2] == (size, b), x.shape[:1] == (b,)
    if not (own or shared):
        raise InvalidInput(
            f"x of shape {tuple(x.shape)} does not fit targets of shape {tuple(y.shape)}; expected ({b}, ...) shared, "
            f"or ({size}, {b}, ...) with a batch for each replica."
        )
    x_dim = y_dim if own and shared else (0 if own else None)
    return _check_dims(x, y, size, (x_dim, y_dim))


def _check_dims(x: Tensor, y: Tensor, size: int, in_dims: InDims) -> InDims:
    for name, tensor, dim in (("x", x, in_dims[0]), ("y", y, in_dims[1])):
        if dim not in (None, 0):
            raise InvalidInput(f"in_dims must hold None (shared) or 0 (one for each replica), not {in_dims}.")
        if dim == 0 and tensor.shape[:1] != (size,):
            raise InvalidInput(f"{name} of shape {tuple(tensor.shape)} must begin with the {size} replicas.")
    return in_dims
