"""The selectivity regularizer: one term for the loss of any network, from the class means of its minibatches."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlcollage import _checks as checks
from mlcollage.data.batches import fit_mask, mask_inputs
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.measure import LayerUnits
from mlcollage.measure.class_means import rows_and_weights
from mlcollage.measure.layer_tap import Layers, LayerTap
from mlcollage.measure.representation import masked_mean
from mlcollage.measure.units import named
from mlcollage.nn import unwrap

from .guards import check_belongs, check_captured, check_classes, check_responses, check_targets, warn_of_few
from .index import Negative, check_policy, targets_for, transform
from .memory import ClassMemory, make_memory
from .sums import IGNORED, SelectivityFunction, class_sums

Alpha = float | Callable[[int], float]
_CHECK_EVERY = 50  # on a GPU, where looking at values makes the host wait
_NON_NEGATIVE = nn.ReLU | nn.ReLU6 | nn.Sigmoid | nn.Softplus | nn.Softmax | nn.Hardsigmoid  # need no look at signs


class SelectivityRegularizer(nn.Module):
    r"""The term :math:`-\alpha\,\mu_{SI}` to add to the loss of any network.

    .. math:: L = \mathrm{CE}(\hat y, y) - \alpha\, \mu_{SI}, \qquad
              \mu_{SI} = \frac1{|L|} \sum_l \frac1{U_l} \sum_{u \in l} \mathrm{SI}_u

    **Sign as in the paper: negative α discourages class selectivity, positive α promotes it.** The index of
    :func:`~mlcollage.papers.class_selectivity.index.selectivity_index` is computed inside each minibatch, of responses
    averaged over space; gradients flow through the class means and the largest of them. Every layer weighs the same.

    ::

        penalty = SelectivityRegularizer(model, alpha=-2.0)
        for x, y in batches:
            loss = F.cross_entropy(model(x), y) + penalty(y)

    Parameters
    ----------
    model
        Any module; its layers are read by hooks, which :meth:`remove` or leaving a ``with`` block takes off.
    alpha
        :math:`\alpha`, or a function of the number of earlier training calls, such as
        :func:`~.controller.alpha_schedule` gives. The attribute can be set at any time;
        :class:`~.controller.SelectivityController` does.
    layers
        ``"relu"`` (default), or paths, patterns, types as for :class:`~mlcollage.measure.layer_tap.LayerTap`. A module
        that is called several times in a pass counts as a layer each time.
    per_layer_alpha
        Alphas of single layers, by name or pattern, in place of ``alpha``; ``{"layer4*": 0.0}`` leaves some out.
    num_classes
        C. Default: from each batch. Needed with ``memory`` and with several processes.
    memory
        For many classes and small batches: class sums are kept over batches, as an exponential mean (``"ema"``,
        ``memory_decay``) or of the last ``memory_size`` samples (``"queue"``). Gradients flow through the present
        batch, scaled so that on average they are those of the whole memory.
    min_per_class
        Classes with fewer samples (in batch and memory) are left out.
    negative
        Sign policy: ``"error"`` (default), or ``"shift"``, ``"abs"``, ``"relu"`` for layers such as GELU or tanh.
    unit_axis, batch_dim
        As for :class:`~mlcollage.measure.units.LayerUnits`, which finds out where layers have their units by two small
        passes before the first one.
    mask
        Takes the model's inputs, as they are passed to it, and gives which positions (N, T), (N, H, W) or samples (N,)
        count. Default: its ``attention_mask``, or what is not in its ``..._key_padding_mask``, if it is given one;
        padding of a model that takes masks of several sequences is refused.
    ignore_index
        Label of samples or positions to leave out, such as 255 for void.
    exclude_output
        Leave out a layer whose output is the model's own (the logits).
    shuffle_targets
        Seed of the control arm: the same penalty with labels permuted afresh in each batch, so of the same size and
        without class meaning. None (default): the labels as they are.
    eps
        :math:`\varepsilon` of the index.
    dense
        Targets are those of positions, (N, H, W) labels or (N, C, H, W) soft ones, as in segmentation: feature maps are
        kept whole, and each gets the targets at its own size by nearest neighbor.
    sync
        With ``torch.distributed``: add up class sums over processes, so that the term is that of the whole batch. Its
        gradient is scaled for averaging over processes, as DistributedDataParallel does. False: each process by itself.

    Raises
    ------
    InvalidInput
        In construction: settings that make no sense, layers that match nothing, compiled models. When called: no
        forward pass before it, other sizes or targets than the batch had, one class only, negative or non-finite
        responses (the layer is named), activations captured without gradients.

    Notes
    -----
    Sums are at least float32, also under autocast. With ``torch.use_deterministic_algorithms`` they are a one-hot
    matrix product, because adding by index is not deterministic on CUDA. There, values are looked at in the first calls
    and every fiftieth only. Non-reentrant gradient checkpointing, in-place and shared ReLUs work; a compiled model
    does not run hooks, so attach before ``torch.compile`` or use the uncompiled model.

    A batch with few samples per class overstates selectivity, since the largest of noisy means is too large. A warning
    says by how much once, if the median is below four. Report
    :func:`~mlcollage.papers.class_selectivity.index.measure_selectivity` over a data set, never :attr:`last`.

    References
    ----------
    Leavitt and Morcos, "Selectivity considered harmful: evaluating the causal impact of class selectivity in DNNs",
    ICLR 2021, arXiv:2003.01262, section "A single knob to control class selectivity".

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
    >>> with SelectivityRegularizer(model, alpha=-1.0) as penalty:
    ...     logits = model(x)
    ...     term = penalty(y)
    >>> list(penalty.last), bool(abs(float(term.detach()) - penalty.last["1"]) < 1e-6)
    (['1'], True)
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: Alpha,
        layers: Layers = "relu",
        *,
        per_layer_alpha: Mapping[str, Alpha] | None = None,
        num_classes: int | None = None,
        memory: Literal["ema", "queue"] | None = None,
        memory_decay: float = 0.95,
        memory_size: int = 4096,
        min_per_class: int = 1,
        negative: Negative = "error",
        unit_axis: int | Mapping[str, int] | None = None,
        batch_dim: int = 0,
        mask: Callable[..., Tensor | None] | None = None,
        ignore_index: int = IGNORED,
        exclude_output: bool = True,
        shuffle_targets: int | None = None,
        eps: float = 1e-6,
        dense: bool = False,
        sync: bool = True,
    ) -> None:
        super().__init__()
        check_policy(negative, eps)
        if dense and memory is not None:
            raise InvalidInput("dense targets have samples enough in a batch; use them without a memory.")
        self.alpha, self.per_layer_alpha = alpha, dict(per_layer_alpha or {})
        for value in (alpha, *self.per_layer_alpha.values()):
            _alpha(value, 0)
        self.num_classes = None if num_classes is None else checks.integer("num_classes", num_classes, least=2)
        self.min_per_class = checks.integer("min_per_class", min_per_class, least=1)
        self.negative, self.eps = negative, eps
        self.exclude_output, self.dense, self.sync, self.steps = exclude_output, dense, sync, 0
        self._memory: ClassMemory | None = make_memory(memory, num_classes, memory_decay, memory_size)
        self._generator = None if shuffle_targets is None else torch.Generator().manual_seed(shuffle_targets)
        self._kept: dict[str, Tensor] = {}  # (N, U) of each layer, or whole maps with dense
        self._made: dict[str, weakref.ref[Tensor]] = {}  # outputs as the layers gave them, to know the model's own
        self._least: dict[str, Tensor] = {}  # smallest response of layers that may be negative
        self._running = self._graded = self._warned = self._told = self._other = self._belongs = False
        self._calls = 0
        self._averages: tuple[tuple[int, ...], Tensor] | None = None
        self._last: tuple[list[str], Tensor] | None = None
        # A tap is no module, so that the model does not become a part of its regularizer.
        self._tap = LayerTap(model, layers, consume=self._keep, detach=False)
        self.mask: Callable[..., Tensor | None] = mask or partial(_given_mask, model)
        self._mask: Tensor | None = None  # (N, ...) of the last pass, true for what counts
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        self._units = LayerUnits(model, layers, unit_axis=unit_axis, batch_dim=batch_dim)
        unknown = [p for p in self.per_layer_alpha if not any(named(p, name) for name in self._tap.layers)]
        if unknown:
            raise UnknownName(f"per_layer_alpha names {unknown[0]!r}; the layers are {', '.join(self._tap.layers)}.")
        self._handles: list[RemovableHandle] = []
        self.attach()

    # Hooks -----------------------------------------------------------------------------------------------------

    def attach(self) -> SelectivityRegularizer:
        """Put the hooks back on after :meth:`remove`."""
        if not self._handles:
            self._tap.open()
            # Functions, not bound methods: a deep copy of the model would copy this object with the latter.
            self._handles = [
                self._tap.model.register_forward_pre_hook(
                    lambda module, args, named: self._start(module, args, named), with_kwargs=True
                ),
                self._tap.model.register_forward_hook(lambda module, args, output: self._end(output)),
            ]
        return self

    def remove(self) -> None:
        """Take the hooks off the model and forget what they saw."""
        self._tap.close()
        while self._handles:
            self._handles.pop().remove()
        self._kept, self._made = {}, {}

    def __enter__(self) -> SelectivityRegularizer:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _start(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:  # a whole model that is checkpointed runs again in backward
            return
        self._running = module is self._tap.model  # a deep copy of the model has our hooks too
        self._other = not self._running and module.training and torch.is_grad_enabled()
        if self._running:
            self._kept, self._made, self._least = {}, {}, {}
            self._graded = torch.is_grad_enabled()
            self._units.look(*args, **named)
            mask = self.mask(*args, **named)
            self._mask = None if mask is None else mask != 0

    def _keep(self, name: str, h: Tensor) -> None:
        if not self._running:
            return
        if not h.is_floating_point():
            raise InvalidInput(f"layer {name!r} gives {h.dtype}; selectivity needs floating-point responses.")
        if self.exclude_output:
            self._made[name] = weakref.ref(h)
        places = self._mask is not None or self.dense
        rows = self._units(name, h, places=places) if h.ndim > 1 else h  # (N, U, *positions)
        if rows is None:
            return
        if self.negative == "error" and not isinstance(self._tap.layers.get(name.split("#")[0]), _NON_NEGATIVE):
            least = rows.detach()
            if self._mask is not None:  # whatever is at positions that do not count
                keep = fit_mask(self._mask, rows.shape[2:], f"layer {name!r}")
                least = torch.where(keep.unsqueeze(1), least, 0.0)
            self._least[name] = least.amin()
        h = transform(rows, self.negative)
        self._kept[name] = h if self.dense or h.ndim < 2 else _pooled(h, self._mask, f"layer {name!r}")

    def _end(self, output: Any) -> None:
        if not self._running:
            return
        self._running = False
        for name, made in self._made.items():
            h = made()
            if h is not None and any(_same_storage(h, out) for out in _tensors(output)):
                self._kept.pop(name, None)
        self._made = {}

    # The term --------------------------------------------------------------------------------------------------

    def forward(self, targets: Tensor, loss: Tensor | None = None) -> Tensor:
        r"""The term to **add** to the loss: :math:`-\alpha\,\mu_{SI}` of the last forward pass.

        Parameters
        ----------
        targets
            Labels (N,) of the batch that the model has just seen, soft targets (N, C) in a float type (mixup, label
            smoothing); with ``dense`` targets of positions. Those labeled ``ignore_index`` are left out.
        loss
            The loss that the term is added to; if given, a term ten times as large is warned of, once, and a loss that
            does not depend on the model, as that of a copy, is refused.

        Returns
        -------
        Tensor
            Shape (); differentiable.
        """
        if loss is not None and loss.grad_fn is not None and not self._belongs:
            check_belongs(loss, self.model)
            self._belongs = True
        if self._other:
            raise InvalidInput(
                "a copy of the model ran after it, whose layers the regularizer does not read: make one for the "
                "network that is trained, or call it right after that network's own pass."
            )
        if not isinstance(targets, Tensor):
            raise InvalidInput(f"targets must be a tensor of class numbers, not a {type(targets).__name__}.")
        with torch.autocast(targets.device.type, enabled=False):
            names, per_layer = self._indices(targets)  # per_layer (L,)
        alphas = self._alphas(names)
        if len(set(alphas)) == 1:
            term = -alphas[0] * per_layer.mean()
        else:
            term = -(per_layer * per_layer.new_tensor(alphas)).mean()
        self._last = (names, per_layer.detach())
        if loss is not None and not self._warned and abs(float(term.detach())) > 10 * abs(float(loss.detach())):
            self._warned = True
            warnings.warn(
                f"the selectivity term is {float(term.detach()):.3g}, more than ten times the loss of "
                f"{float(loss.detach()):.3g}: it may drown it; use a smaller alpha or a warm-up.",
                UserWarning,
                stacklevel=4,
            )
        if self._graded:
            self.steps += 1
        self._kept = {}
        return term

    @property
    def last(self) -> dict[str, float]:
        """Mean index of each layer in the last call's batch (biased upwards in small batches)."""
        if self._last is None:
            return {}
        names, values = self._last
        return dict(zip(names, values.tolist(), strict=True))

    @property
    def model(self) -> nn.Module:
        """The network whose layers are read."""
        return self._tap.model

    def get_extra_state(self) -> dict[str, Any]:
        """Steps made and the memory, for ``state_dict``."""
        memory = self._memory.state() if self._memory is not None else {}
        return {"steps": torch.tensor(self.steps), "memory": memory, "layers": list(self._tap.layers)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`get_extra_state`; a memory of other layers or of another kind is refused."""
        here, there = list(self._tap.layers), state.get("layers")
        if self._memory is not None and state["memory"] and there is not None and list(there) != here:
            raise InvalidInput(
                f"the state remembers units of the layers {', '.join(there)}, not of {', '.join(here)}: give the same "
                "layers, or begin without the state."
            )
        self.steps = int(state["steps"])
        if self._memory is not None:
            self._memory.load(state["memory"])

    def _alphas(self, names: list[str]) -> list[float]:
        common = _alpha(self.alpha, self.steps)
        if not self.per_layer_alpha:
            return [common] * len(names)
        own = {name: [a for p, a in self.per_layer_alpha.items() if named(p, name)] for name in names}
        return [_alpha(own[name][0], self.steps) if own[name] else common for name in names]

    def _indices(self, targets: Tensor) -> tuple[list[str], Tensor]:
        """Names of the layers and the mean index (L,) of their units."""
        kept = self._kept
        check_captured(kept, targets, self.dense, self.model, attached=bool(self._handles))
        self._calls += 1
        looking = targets.device.type == "cpu" or self._calls <= 3 or self._calls % _CHECK_EVERY == 0
        targets, classes = check_targets(
            targets, self.num_classes, self.ignore_index, looking=looking, together=self._together()
        )
        if self.ignore_index != IGNORED and not targets.is_floating_point():
            targets = targets.masked_fill(targets == self.ignore_index, IGNORED)
        if self._mask is not None and not self.dense:  # samples none of whose positions count
            counted = fit_mask(self._mask, ()).to(targets.device)
            soft = targets.is_floating_point()
            targets = targets * counted[:, None] if soft else targets.masked_fill(~counted, IGNORED)
        if self._generator is not None:  # the control arm: the same labels, of other samples
            targets = targets[torch.randperm(len(targets), generator=self._generator).to(targets.device)]
        if self.dense:
            sums, counts = _dense_sums(kept, targets, classes, self._mask)  # both (C, U), U units of all layers
        else:
            rows = torch.cat(list(kept.values()), dim=1)  # (N, U)
            sums, counts = class_sums(rows, targets, classes)  # (C, U) and (C, 1)
            if looking and not self._told and self._memory is None:
                self._told = warn_of_few(counts, lambda y: self._index(*class_sums(rows, y, classes)), targets)
            if self._memory is not None:
                sums, counts = self._memory.add(sums, counts, rows, targets, keep=self._graded)
        if looking:
            check_responses(kept, sums, self._least)
        sums, counts, scale = self._over_processes(sums, counts, len(targets))
        if looking:
            check_classes(counts, self.min_per_class)
        index = self._index(sums, counts, scale)  # (U,)
        return list(kept), self._averaging(kept, index) @ index

    def _index(self, sums: Tensor, counts: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        present = counts >= self.min_per_class
        index: Tensor = SelectivityFunction.apply(sums, counts, present, self.eps, self.negative == "shift", scale)
        return index

    def _averaging(self, kept: Mapping[str, Tensor], index: Tensor) -> Tensor:
        """(L, U): row l averages over the units of layer l; one product for all layers. Kept from step to step."""
        sizes = tuple(h.shape[1] for h in kept.values())
        if self._averages is None or self._averages[0] != sizes or self._averages[1].device != index.device:
            rows_of = [torch.full((1, u), 1 / u, dtype=torch.float64) for u in sizes]
            self._averages = (sizes, torch.block_diag(*rows_of).to(index))
        return self._averages[1].to(index)

    def _together(self) -> bool:
        dist = torch.distributed
        return self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _over_processes(self, sums: Tensor, counts: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """Sums of all processes, and the factor of the gradient: memory over batch, times the processes."""
        ratio = counts.sum() / batch if self._memory is not None else 1.0
        if not self._together():
            return sums, counts, ratio
        # One message: sums (C, U), counts (C, 1) or (C, U) and the number of samples.
        flat = torch.cat([sums.detach().flatten(), counts.flatten(), counts.new_tensor([batch])])
        torch.distributed.all_reduce(flat)
        total, counts = flat[: sums.numel()].view_as(sums), flat[sums.numel() : -1].view_as(counts)
        if self._memory is not None:
            ratio = counts.sum() / flat[-1]
        # The value is that of all processes; the gradient flows through this one's part.
        return sums + (total - sums.detach()), counts, ratio * torch.distributed.get_world_size()


def _dense_sums(
    kept: Mapping[str, Tensor], targets: Tensor, classes: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Class sums over positions: each layer has its own grid, and so its own counts (C, U)."""
    parts = []
    for h in kept.values():
        # (N * positions, U) and labels (N * positions,) or weights (N * positions, C) in the same order
        rows, own = rows_and_weights(h, targets_for(h, targets), classes, unit_axis=1, mask=mask, ignore_index=IGNORED)
        rows = rows.to(_sum_type(h))
        sums, counts = class_sums(rows, own, classes)
        parts.append((sums, counts.expand_as(sums)))
    return torch.cat([s for s, _ in parts], dim=1), torch.cat([c for _, c in parts], dim=1)


def _pooled(h: Tensor, mask: Tensor | None, layer: str) -> Tensor:
    """Mean (N, U) over positions in the sums' own type, in one reduction; the feature map is not copied.

    As a sum, whose gradient is a view that repeats itself; that of a mean is a whole feature map of its own.
    """
    h = h.to(_sum_type(h)) if h.ndim == 2 or mask is not None else h
    if h.ndim == 2:
        return h
    if mask is not None:
        return masked_mean(h, fit_mask(mask, h.shape[2:], layer))
    return h.sum(dim=list(range(2, h.ndim)), dtype=_sum_type(h)) / h.shape[2:].numel()


def _given_mask(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
    """What a model is told of padding, by the names of its inputs: true for positions that count."""
    given = inspect.signature(unwrap(model).forward).bind(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    names = mask_inputs(unwrap(model))
    masks = {name: given[name] for name in names if isinstance(given.get(name), Tensor) and given[name].ndim == 2}
    masks = {name: m == 0 if name.endswith("key_padding_mask") else m != 0 for name, m in masks.items()}
    if len(names) > 1 and not all(bool(m.all()) for m in masks.values()):
        raise InvalidInput(
            f"the model takes masks of several sequences ({', '.join(names)}), and which one a layer has cannot be "
            "told: choose layers of one sequence and give mask=, a function of the model's inputs."
        )
    return next(iter(masks.values()), None)


def _sum_type(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _alpha(alpha: Alpha, step: int) -> float:
    return checks.real("alpha (negative discourages selectivity)", alpha(step) if callable(alpha) else alpha)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    # A view of the same memory counts: a ReLU in place, or a reshape of the logits.
    return a is b or (a.numel() == b.numel() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
