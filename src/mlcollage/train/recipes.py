r"""Pre-training and fine-tuning of vision transformers as Steiner et al. (2022, arXiv:2106.10270, section 3.4) do it.

A recipe is an optimizer, a schedule and a clipping norm that belong together. It counts optimizer steps, not batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn.wrapped import unwrap
from mlcollage.train.schedules import Schedule, cosine, linear

#: Steps with their warm-up, and peak rates, that the paper tries when it fine-tunes on a data set.
FINETUNE_GRID = MappingProxyType(
    {
        "imagenet": (((20_000, 500),), (0.01, 0.03)),
        "pets": (((500, 100), (2500, 200)), (0.001, 0.003, 0.01)),
        "kitti": (((500, 100), (2500, 200)), (0.001, 0.003, 0.01)),
        "cifar100": (((2500, 200), (10_000, 500)), (0.001, 0.003, 0.01)),
        "resisc45": (((2500, 200), (10_000, 500)), (0.001, 0.003, 0.01)),
        "vtab": (((500, 100), (2500, 200)), (0.001, 0.003, 0.01, 0.03)),
    }
)


def reference_schedule(
    total: int, warmup: int, decay: str = "cosine", *, final: float = 0.0, timescale: int = 10_000, cooldown: int = 0
) -> Schedule:
    r"""Linear warm-up from rate 0 and a decay, as in the released code.

    .. math::

        f(t) = \min(1, t / w) \, d(t), \qquad
        d_\mathrm{cosine} = \tfrac12 (1 + \cos \pi u), \quad d_\mathrm{linear} = f_T + (1 - f_T)(1 - u), \quad
        d_\mathrm{rsqrt} = \Bigl(1 + \frac{t - w}{\tau}\Bigr)^{-1/2} \min\Bigl(1, \frac{T - t}{c}\Bigr)

    with :math:`u = (t - w) / (T - w)` for :math:`t \ge w` and 0 before. The first step has rate 0.

    Parameters
    ----------
    total
        Steps T, warm-up included.
    warmup
        Steps w of warm-up; 0 for none.
    decay
        ``"cosine"``, ``"linear"`` or ``"rsqrt"``.
    final
        Factor :math:`f_T` at the end of the linear decay.
    timescale, cooldown
        Steps :math:`\tau`, and steps c of the linear descent to 0 at the end; for ``"rsqrt"`` only.

    Examples
    --------
    >>> f = reference_schedule(6, 2)
    >>> [round(f(t), 3) for t in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    checks.choice("decay", decay, ("cosine", "linear", "rsqrt"))
    if decay != "rsqrt":
        after = cosine(total, 0.0, warmup) if decay == "cosine" else linear(total, final, warmup)
        return lambda step: step / warmup if step < warmup else after(step)
    linear(total, 0.0, warmup)  # checks both
    checks.integer("timescale", timescale, least=1), checks.integer("cooldown", cooldown, least=0)

    def factor(step: int) -> float:
        rate = 1 / math.sqrt(1 + max(0, step - warmup) / timescale)
        if cooldown:
            rate *= max(0.0, min(1.0, (total - step) / cooldown))
        return rate * (min(1.0, step / warmup) if warmup else 1.0)

    return factor


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Mean over samples of the sum over classes of binary cross-entropies, the loss of pre-training.

    .. math:: \frac1B \sum_i \sum_k -y_{ik} \log \sigma(z_{ik}) - (1 - y_{ik}) \log(1 - \sigma(z_{ik}))

    A mean over classes would shrink the gradient by their number, so that clipping at norm 1 would never act.

    Parameters
    ----------
    logits
        Shape (B, C).
    targets
        Weights of the classes (B, C), from 0 to 1.

    Examples
    --------
    >>> round(float(sigmoid_cross_entropy(torch.zeros(2, 1000), torch.zeros(2, 1000))), 3)  # 1000 log 2
    693.147
    """
    if logits.shape != targets.shape or logits.ndim != 2:
        raise InvalidInput(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be (B, C).")
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum") / len(logits)


def kernel_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: kernels of linear, convolution and attention layers, and all else without weight decay.

    Kernels are told by the module that holds them, not by their axes: class tokens, position embeddings and tables of
    embeddings have two axes or more and are not decayed.

    Parameters
    ----------
    model
        Any module.
    weight_decay
        Of the kernels.

    Examples
    --------
    >>> from mlcollage.nn.vit import ViT
    >>> kernels, rest = kernel_groups(ViT((1, 4, 4), 2, dim=8, depth=1, heads=2), 0.1)
    >>> len(kernels["params"]), len(rest["params"]), rest["weight_decay"]
    (6, 14, 0.0)
    """
    weight_decay = checks.real("weight_decay", weight_decay, least=0)
    kernels: dict[int, nn.Parameter] = {}
    for module in model.modules():
        convolution = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or "conv" in type(module).__name__.lower()
        weight = getattr(module, "weight", None)
        if convolution and isinstance(weight, nn.Parameter) and weight.ndim > 1:
            kernels[id(weight)] = weight
        if isinstance(module, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if (part := getattr(module, name)) is not None:
                    kernels[id(part)] = part
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InvalidInput("no parameter of the model is trained: all have requires_grad=False.")
    groups = [
        {"params": [p for p in trained if id(p) in kernels], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in kernels], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass
class TrainingRecipe:
    """Optimizer, schedule and clipping that belong together.

    Attributes
    ----------
    optimizer
        Its rates are set by :meth:`update`.
    schedule
        From the step, counted from 0, to the factor on the rates.
    clip_norm
        The gradient of the whole model is scaled down to this norm if it is longer; None for no clipping.
    loss
        From logits and rows of class weights to a scalar.
    total
        Steps of the schedule.
    steps_done
        Updates so far.

    Examples
    --------
    >>> model = nn.Linear(4, 3)
    >>> recipe = finetune_recipe(model, steps=10, warmup=2, lr=0.1)
    >>> x, y = torch.ones(2, 4), torch.eye(3)[:2]
    >>> rates = []
    >>> for _ in range(3):
    ...     rates.append(recipe.rate)
    ...     _ = recipe.step(recipe.loss(model(x), y))
    >>> rates
    [0.0, 0.05, 0.1]
    """

    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clip_norm: float | None
    loss: Callable[[Tensor, Tensor], Tensor]
    total: int
    steps_done: int = 0

    def __post_init__(self) -> None:
        if self.clip_norm is not None:
            checks.positive("clip_norm", self.clip_norm)
        self._base = [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def rate(self) -> float:
        """Learning rate of the next update."""
        return self._base[0] * self.schedule(self.steps_done)

    def step(self, loss: Tensor) -> float:
        """Gradients of a loss and one update; returns the norm of the gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return self.update()

    def update(self) -> float:
        """One update with the gradients that are there, for accumulation and scaled losses (unscale them first)."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            raise InvalidInput("no parameter has a gradient: call backward() on a loss of this model before update().")
        if self.steps_done == self.total:
            warnings.warn(
                f"the schedule's {self.total} steps are done and the rate stays at its end: count optimizer steps, "
                "not batches, when gradients are accumulated.",
                stacklevel=2,
            )
        norm = clip_by_global_norm(parameters, self.clip_norm)
        factor = self.schedule(self.steps_done)
        for group, base in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor
        self.optimizer.step()
        self.steps_done += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
            "total": self.total,
            "rates": self._rates(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run stopped; a schedule of another length is refused, since the rate would jump."""
        if missing := [key for key in ("optimizer", "steps_done", "total") if key not in state]:
            raise InvalidInput(f"the state has no {', '.join(map(repr, missing))}; state_dict() of a recipe makes one.")
        if state["total"] != self.total:
            raise InvalidInput(
                f"the run was scheduled for {state['total']} steps and this recipe for {self.total}: the rate would "
                f"jump; make the recipe with steps={state['total']}."
            )
        if not np.allclose(state.get("rates", self._rates()), self._rates(), rtol=1e-9, atol=0):
            raise InvalidInput(
                "the run had other learning rates than this recipe (lr, warm-up or decay): the rate would jump; make "
                "the recipe as the run's was made."
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise InvalidInput(f"the optimizer's state is of another model or recipe: {error}.") from error
        self.steps_done = checks.integer("steps_done", state["steps_done"], least=0)

    def _rates(self) -> list[float]:
        """Learning rate at eleven places of the schedule: what a resumed run must have too."""
        return [self._base[0] * self.schedule(self.total * k // 10) for k in range(11)]


def clip_by_global_norm(parameters: Iterable[nn.Parameter], most: float | None) -> float:
    r"""Scale all gradients by :math:`\min(1, c / \|g\|)`, without the 1e-6 that torch adds to the norm.

    Examples
    --------
    >>> p = nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> clip_by_global_norm([p], 1.0), [round(float(v), 6) for v in p.grad]
    (5.0, [0.6, 0.8])
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    norm = torch.stack([torch.linalg.vector_norm(g).to(grads[0].device) for g in grads]).norm()
    if most is not None:
        scale = (most / norm).clamp(max=1.0)
        # A norm that is not finite would spread NaN over every weight.
        if not bool(torch.isfinite(norm)):
            raise InvalidInput("the gradient holds NaN or infinite numbers: lower the rate, or look for bad samples.")
        for g in grads:
            g.mul_(scale.to(g.device, g.dtype))
    return float(norm)


def pretrain_recipe(
    model: nn.Module,
    steps: int,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    warmup: int = 10_000,
    clip_norm: float | None = 1.0,
    loss: str = "sigmoid",
    prior_bias: bool = False,
) -> TrainingRecipe:
    r"""Pre-training from scratch: Adam with decoupled weight decay, warm-up, cosine, clipping at norm 1.

    .. math:: \theta \leftarrow \theta - s_t \, \eta \, (\mathrm{adam}_t + \lambda \, \theta)

    with decay on kernels only. big_vision's configurations name the product :math:`\eta \lambda`, 1e-4 here.

    Parameters
    ----------
    model
        Any classifier.
    steps
        Optimizer steps of the whole run. The paper has 300 epochs at batch 4096.
    lr, weight_decay
        Peak rate and :math:`\lambda`; the paper has 0.03 and 0.1.
    warmup
        Steps of linear warm-up from 0, fewer than ``steps``.
    clip_norm
        Largest norm of the gradient.
    loss
        ``"sigmoid"``, summed over classes, or ``"softmax"``.
    prior_bias
        Set the head's bias to :math:`-\log(K - 1)`, where each of K classes has probability 1 / K: -6.9 for 1000
        classes and -10 for 21843, which the released code has. Needs a ``head`` with a bias.

    Returns
    -------
    TrainingRecipe

    Raises
    ------
    InvalidInput
        If the warm-up does not fit, or ``prior_bias`` finds no head.

    Examples
    --------
    >>> recipe = pretrain_recipe(nn.Linear(4, 3), 200, warmup=10)
    >>> type(recipe.optimizer).__name__, recipe.clip_norm, recipe.schedule(10)
    ('AdamW', 1.0, 1.0)
    """
    steps = checks.integer("steps", steps, least=2)
    warmup = checks.integer("warmup", warmup, least=0)
    if warmup >= steps:
        raise InvalidInput(f"warmup={warmup} must be shorter than steps={steps}; the paper's runs warm up for a tenth.")
    checks.choice("loss", loss, ("sigmoid", "softmax"))
    if prior_bias:
        head = getattr(unwrap(model), "head", None)
        if not isinstance(head, nn.Linear) or head.bias is None or head.out_features < 2:
            raise InvalidInput("prior_bias needs a model with a linear `head` that has a bias and two classes or more.")
        nn.init.constant_(head.bias, -math.log(head.out_features - 1))
    optimizer = torch.optim.AdamW(
        kernel_groups(model, weight_decay), lr=checks.positive("lr", lr), betas=(0.9, 0.999), eps=1e-8
    )
    function = sigmoid_cross_entropy if loss == "sigmoid" else F.cross_entropy
    return TrainingRecipe(optimizer, reference_schedule(steps, warmup), clip_norm, function, steps)


def finetune_recipe(
    model: nn.Module,
    dataset: str | None = None,
    *,
    steps: int | None = None,
    warmup: int | None = None,
    lr: float | None = None,
    clip_norm: float | None = 1.0,
) -> TrainingRecipe:
    """Fine-tuning: SGD with momentum 0.9, no weight decay, warm-up, cosine, clipping at norm 1, softmax loss.

    Parameters
    ----------
    model
        With a new head of zeros, as :func:`mlcollage.nn.load_augreg_npz` gives with ``head="zero"``, and no dropout.
    dataset
        ``"imagenet"``, ``"pets"``, ``"kitti"``, ``"cifar100"``, ``"resisc45"`` or ``"vtab"``: the paper's longest run
        and its middle rate for what is not given; :data:`FINETUNE_GRID` has the others.
    steps, warmup, lr
        Of your own. The warm-up is a twentieth of the steps unless given.
    clip_norm
        Largest norm of the gradient.

    Returns
    -------
    TrainingRecipe

    Raises
    ------
    InvalidInput
        If neither a data set nor steps and lr are given.

    Examples
    --------
    >>> recipe = finetune_recipe(nn.Linear(4, 3), "pets")
    >>> recipe.total, recipe.optimizer.param_groups[0]["momentum"], recipe.schedule(200)
    (2500, 0.9, 1.0)
    """
    if dataset is not None:
        lengths, rates = FINETUNE_GRID[checks.choice("dataset", dataset, FINETUNE_GRID)]
        if steps is None:
            steps, own = lengths[-1]
            warmup = own if warmup is None else warmup
        lr = rates[len(rates) // 2] if lr is None else lr
    if steps is None or lr is None:
        raise InvalidInput(f"give steps and lr, or a dataset: one of {', '.join(FINETUNE_GRID)}.")
    steps = checks.integer("steps", steps, least=2)
    warmup = steps // 20 if warmup is None else checks.integer("warmup", warmup, least=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidInput("no parameter of the model is trained: all have requires_grad=False.")
    optimizer = torch.optim.SGD(parameters, lr=checks.positive("lr", lr), momentum=0.9)
    return TrainingRecipe(optimizer, reference_schedule(steps, warmup), clip_norm, F.cross_entropy, steps)
