r"""The Fisher penalty and its relatives, to be added to the loss of any training loop.

Jastrzębski et al., "Catastrophic Fisher Explosion", ICML 2021, section 2 and the section on the Fisher penalty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlcollage.errors import InvalidInput

from ._gradients import (
    Closure,
    batch_coupled,
    check_double_backward,
    frozen_noise_and_statistics,
    gradient_at,
    gradient_change,
    gradient_tangent,
    logits_of,
    mean_over_ranks,
    nll,
    rank,
    trainable,
    unwrap,
    world_size,
)
from .labels import SOURCES, check_alike, check_logits, check_true_labels, sample_labels, stream

__all__ = ["FisherPenalty"]

_TARGETS = ("params", "input")
_ESTIMATORS = ("minibatch", "per_example", "exact")
_GRADS = ("double_backprop", "finite_difference", "jvp")
_NORMALIZE = ("none", "batch")


class FisherPenalty(nn.Module):
    r"""A penalty on the trace of the Fisher information, by the squared norm of a mini-batch gradient.

    With a classifier :math:`p_\theta(y \mid x)` and :math:`g(x, y) = \nabla_\theta [-\log p_\theta(y \mid x)]`, the
    Fisher information matrix has the trace

    .. math::

        \mathrm{Tr}(F) = \mathbb{E}_x\, \mathbb{E}_{\hat y \sim p_\theta(\cdot \mid x)} \| g(x, \hat y) \|^2 .

    The penalized loss of a batch of B samples is

    .. math::

        \frac{1}{B} \sum_i \ell(x_i, y_i) + \alpha \Big\| \frac{1}{B} \sum_i g(x_i, \hat y_i) \Big\|^2 ,
        \qquad \hat y_i \sim p_\theta(\cdot \mid x_i),

    where the drawn labels are constants to the gradient. Since :math:`\mathbb{E}_{\hat y}\, g(x, \hat y) = 0`, the
    expected penalty is exactly :math:`\alpha\, \mathrm{Tr}(F) / B` for the batch: a coefficient belongs to a batch
    size. ``normalize="batch"`` multiplies by B, so that it need not be tuned again when B changes.

    ========  =========================  ==========================================
    paper's   here                       labels of the gradient
    ========  =========================  ==========================================
    FP        the default                drawn from the model
    GP        ``labels="true"``          of the data set (the *empirical* Fisher)
    GPr       ``labels="uniform"``       drawn uniformly
    GPx       ``labels="true",``         of the data set; the gradient is that of
              ``target="input"``         the loss with respect to the input
    ========  =========================  ==========================================

    Parameters
    ----------
    model
        The network whose parameters are penalized; also wrapped in DistributedDataParallel or compiled. It is not
        registered as a submodule.
    alpha
        Coefficient, at least 0; may be changed between steps (``penalty.alpha = ...``). About 0.01 to 1 at B = 100
        for small networks; too large a value stops learning. Tune it on a validation set.
    labels
        ``"model"`` (default), ``"true"`` or ``"uniform"``.
    target
        ``"params"`` (default) or ``"input"``.
    estimator
        ``"minibatch"`` (default): the squared norm of the mean gradient, as in the paper. ``"per_example"``: the mean
        of the squared norms of the samples' gradients, an estimate of Tr(F) with far less noise at the cost of one more
        forward pass; needs ``x`` and no batch norm in training mode. ``"exact"``: the expectation over all labels
        instead of drawn ones; about C times the cost. With the last two, ``alpha`` weighs Tr(F) itself: use
        :math:`\alpha / B` where the mini-batch form has :math:`\alpha`.
    grad
        ``"double_backprop"`` (default): :meth:`forward` returns a term to add to the loss. ``"finite_difference"`` and
        ``"jvp"`` need no double backward: call :meth:`step_grad` after ``loss.backward()``. They are for
        ``estimator="minibatch"`` and ``target="params"``.
    interval
        Penalize every so many optimization steps (default 10, as in the paper).
    start, stop
        First step that may be penalized, and the first that no longer is (None: never stop).
    rescale_by_interval
        Multiply by ``interval`` on penalized steps, so that the average weight does not depend on it. Default False.
    normalize
        ``"none"`` (default) or ``"batch"``: multiply the mini-batch form by B. No effect on the other estimators,
        which do not depend on B.
    params
        Parameters to penalize, or their names; None (default) for all that require gradients. Frozen ones are left
        out.
    score_term
        Only for ``"exact"`` with ``labels="model"``: also differentiate the probabilities that weigh the classes, which
        drawn labels leave out. Default False.
    fd_step
        Length h of the finite difference in parameter space; None (default) for
        :math:`\sqrt{\epsilon}\,(1 + \|\theta\|)`.
    accumulation_steps
        Calls for each optimization step (micro-batches). Default 1.
    generator
        Where labels are drawn from. An int (default 0) seeds each step's own stream, together with the process's rank:
        a resumed training then draws what an unbroken one would. A ``torch.Generator`` is used as it comes, and its
        state is part of ``state_dict()``. The global generators are never used.

    Attributes
    ----------
    steps : int
        Optimization steps seen so far.
    last : Tensor or None
        Squared norm (or trace) at the last penalized step, before any coefficient; detached, shape ().

    Raises
    ------
    InvalidInput
        For settings that do not exist or do not go together, and, on the first penalized step, for logits that are
        probabilities, targets that are not class numbers, and networks whose backward pass cannot be differentiated.

    Notes
    -----
    *Mixed precision.* Add the penalty to the unscaled loss and scale the sum: ``scaler.scale(loss + p).backward()``.
    The scale is then applied once. Hand the scaler to :meth:`forward` as well, so that the inner gradient does not
    underflow: it is taken of the scaled loss and divided by the scale before it is squared.

    *Accumulation.* Each micro-batch has its own penalty; divide loss and penalty by the number of micro-batches, as
    ever. Its expectation is that of the micro-batch's size: use ``normalize="batch"`` to be independent of it.

    *Several processes.* The mini-batch form is that of the joint batch of all processes: gradients are averaged over
    them (one all-reduce on penalized steps), and the gradient that DistributedDataParallel averages afterwards is
    exactly that of the joint penalty. Processes draw their labels independently if
    ``generator`` is an int; give each its own seed if it is a Generator.

    *Clipping* after ``backward()`` clips the sum of both gradients. *Batch norm in training mode* is differentiated
    through its batch statistics; the identity with Tr(F)/B then does not hold. *Losses with* ``reduction="sum"`` are B
    times as large as what the penalty was written for: multiply ``alpha`` by B.

    Examples
    --------
    >>> from mlcollage.nn.init import build
    >>> g = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(32, 4, generator=g), torch.randint(0, 3, (32,), generator=g)
    >>> model = build(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), seed=0)
    >>> penalty = FisherPenalty(model, alpha=0.1, interval=2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for step in range(4):
    ...     logits = model(x)
    ...     loss = nn.functional.cross_entropy(logits, y) + penalty(logits)
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> penalty.steps, bool(penalty.last > 0)
    (4, True)
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float,
        *,
        labels: Literal["model", "true", "uniform"] = "model",
        target: Literal["params", "input"] = "params",
        estimator: Literal["minibatch", "per_example", "exact"] = "minibatch",
        grad: Literal["double_backprop", "finite_difference", "jvp"] = "double_backprop",
        interval: int = 10,
        start: int = 0,
        stop: int | None = None,
        rescale_by_interval: bool = False,
        normalize: Literal["none", "batch"] = "none",
        params: Iterable[nn.Parameter] | Iterable[str] | None = None,
        score_term: bool = False,
        fd_step: float | None = None,
        accumulation_steps: int = 1,
        generator: torch.Generator | int | None = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InvalidInput(f"model must be a torch.nn.Module, not {type(model).__name__}.")
        self._model = [model]  # in a list, so that it does not become a submodule
        self.alpha = alpha
        self.labels = check_alike("labels", labels, SOURCES)
        self.target = check_alike("target", target, _TARGETS)
        self.estimator = check_alike("estimator", estimator, _ESTIMATORS)
        self.grad = check_alike("grad", grad, _GRADS)
        self.normalize = check_alike("normalize", normalize, _NORMALIZE)
        self.interval = _whole("interval", interval, 1)
        self.start = _whole("start", start, 0)
        self.stop = None if stop is None else _whole("stop", stop, self.start + 1)
        self.accumulation_steps = _whole("accumulation_steps", accumulation_steps, 1)
        self.rescale_by_interval, self.score_term, self.fd_step = bool(rescale_by_interval), bool(score_term), fd_step
        self._check_combination()
        self._chosen = _choose(model, params)
        self._seed = generator if isinstance(generator, int) else 0
        self._generator = generator if isinstance(generator, torch.Generator) else None
        if generator is not None and not isinstance(generator, int | torch.Generator):
            raise InvalidInput(f"generator must be an int or a torch.Generator, not {type(generator).__name__}.")
        self._calls = 0
        self._checked = False
        self.last: Tensor | None = None

    @property
    def alpha(self) -> float:
        """Coefficient of the penalty."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InvalidInput(f"alpha={value!r} must be a finite number of at least 0.")
        self._alpha = float(value)

    @property
    def steps(self) -> int:
        """Optimization steps seen so far; may be set when training is resumed without a state."""
        return self._calls // self.accumulation_steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._calls = _whole("steps", value, 0) * self.accumulation_steps

    @property
    def active(self) -> bool:
        """Whether the next call is penalized."""
        t = self.steps
        due = t >= self.start and (self.stop is None or t < self.stop) and (t - self.start) % self.interval == 0
        return due and self.training and self.alpha > 0

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"alpha={self.alpha:g}, labels={self.labels!r}, target={self.target!r}, estimator={self.estimator!r}, "
            f"grad={self.grad!r}, interval={self.interval}"
        )

    def forward(self, logits: Any, x: Any = None, y: Tensor | None = None, *, scaler: Any = None) -> Tensor:
        """The penalty of this step, to be added to the loss; counts the call.

        Parameters
        ----------
        logits
            The model's output for the batch, (B, C), with its graph.
        x
            The model's input; needed for ``target="input"`` (with ``x.requires_grad_()`` before the forward pass) and
            for the estimators ``"per_example"`` and ``"exact"``, where it may be a tuple or dict of arguments.
        y
            Class numbers (B,); needed for ``labels="true"``, refused otherwise.
        scaler
            The loop's ``GradScaler``, if there is one. The returned penalty is not scaled.

        Returns
        -------
        Tensor
            Shape (), float32 (float64 for float64 logits). Zero, without a graph, on steps that are not penalized, and
            in evaluation mode, where steps are not counted.
        """
        if self.grad != "double_backprop":
            raise InvalidInput(
                f"grad={self.grad!r} gives no term for the loss; call step_grad(closure) after loss.backward()."
            )
        logits = logits_of(logits)
        if not self.active:
            self._calls += int(self.training)
            kind = torch.float64 if getattr(logits, "dtype", None) == torch.float64 else torch.float32
            return torch.zeros((), dtype=kind, device=getattr(logits, "device", None))
        check_logits(logits, first=not self._checked)
        self._check_call(logits, x, y)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        value = self._value(logits, x, y, scale)
        self._calls += 1
        self.last = value.detach()
        return self._weight() * value

    def step_grad(self, closure: Closure, *, y: Tensor | None = None, scaler: Any = None, scale: float = 1.0) -> Tensor:
        r"""Add the penalty's gradient to ``.grad`` of the parameters, without double backpropagation.

        With :math:`\bar g` the gradient of the batch,
        :math:`\nabla_\theta \|\bar g\|^2 = 2 H \bar g`. The product with the Hessian is a difference of two gradients
        (``"finite_difference"``) or the tangent of one (``"jvp"``; group norm has none and is differentiated backward
        twice). All of them see the same drawn labels and dropout
        masks, and running statistics of batch norm are left as they were.

        Parameters
        ----------
        closure
            Computes the batch's logits again, ``lambda: model(x)``. Called two or three times on penalized steps, else
            never.
        y
            Class numbers (B,), for ``labels="true"``.
        scaler
            The loop's ``GradScaler``, if its ``unscale_`` was not called yet: the added gradient is then scaled like
            what ``backward()`` left.
        scale
            A further factor, such as 1 / number of micro-batches.

        Returns
        -------
        Tensor
            The weighted penalty, detached, shape (); zero on other steps.

        Examples
        --------
        >>> from mlcollage.nn.init import build
        >>> model = build(lambda: nn.Linear(4, 3), seed=0)
        >>> x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
        >>> penalty = FisherPenalty(model, alpha=0.1, grad="jvp", interval=1)
        >>> nn.functional.cross_entropy(model(x), y).backward()
        >>> value = penalty.step_grad(lambda: model(x))  # then clip, and optimizer.step()
        >>> bool(value > 0)
        True
        """
        if self.grad == "double_backprop":
            raise InvalidInput(
                "step_grad is for grad='finite_difference' and 'jvp'; here, add penalty(logits) to loss."
            )
        if not callable(closure):
            raise InvalidInput("step_grad needs a function that computes the logits again, such as lambda: model(x).")
        parameters = trainable(self._model[0], self._chosen)
        if not self.active:
            self._calls += int(self.training)
            return torch.zeros((), device=next(iter(parameters.values())).device)
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        with torch.enable_grad():
            square, b, gradient = self._square_and_gradient(closure, y, parameters, factor)
        weight = self._weight() * (b * world_size() if self.normalize == "batch" else 1)
        with torch.no_grad():
            for p, g in zip(parameters.values(), gradient, strict=True):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad.add_(g.to(p.dtype), alpha=weight * scale * factor)
        self._calls += 1
        self.last = square if self.normalize == "none" else square * b * world_size()
        return weight * square

    def get_extra_state(self) -> dict[str, Any]:
        """Steps counted, and the state of a generator of the user's."""
        state = None if self._generator is None else self._generator.get_state()
        return {"calls": self._calls, "generator": state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`get_extra_state`."""
        self._calls = int(state["calls"])
        if self._generator is not None and state["generator"] is not None:
            self._generator.set_state(state["generator"].cpu())

    # --- the three estimators ---------------------------------------------------------------------------------------

    def _value(self, logits: Tensor, x: Any, y: Tensor | None, scale: float) -> Tensor:
        if self.target == "input":
            return self._input_norm(logits, x, y, scale)
        if self.estimator == "minibatch":
            return self._minibatch(logits, self._draw(logits, y), scale)
        return self._per_example(logits, x, y)

    def _minibatch(self, logits: Tensor, y: Tensor, scale: float) -> Tensor:
        parameters = list(trainable(self._model[0], self._chosen).values())
        own = gradient_at(nll(logits, y), parameters, create_graph=True, scale=scale)
        square = _square(own)
        if world_size() > 1:
            # d|mean g|^2 = 2 <mean g, mean dg>: each process contributes 2 <mean g, dg>, and averaging sums it up.
            joint = mean_over_ranks(own)
            along = 2 * torch.stack([(a * b).sum() for a, b in zip(own, joint, strict=True)]).sum()
            square = along - along.detach() + _square(joint)
        return square * (len(logits) * world_size()) if self.normalize == "batch" else square

    def _per_example(self, logits: Tensor, x: Any, y: Tensor | None) -> Tensor:
        """Mean over samples of squared gradient norms, at drawn labels or in expectation over all of them."""
        from mlcollage.measure.fisher import fisher_sqnorm

        model = unwrap(self._model[0])
        chosen = list(trainable(model, self._chosen).values())
        if self.estimator == "exact":
            settings: dict[str, Any] = {"labels": self.labels, "method": "exact", "score_term": self.score_term}
        else:
            settings = {"labels": self._draw(logits, y), "method": "mc"}
        norms = fisher_sqnorm(model, x, params=chosen, retain_graph=False, **settings)
        assert isinstance(norms, Tensor)
        return norms.mean()

    def _input_norm(self, logits: Tensor, x: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """GPx: squared norm of the loss gradient with respect to the batch of inputs."""
        b, classes = logits.shape

        def norms(labels: Tensor) -> Tensor:
            (g,) = gradient_at(nll(logits, labels) * b, [x], create_graph=True, scale=scale)
            return g.flatten(1).square().sum(1)

        if self.estimator == "exact":
            weights = self._class_weights(logits)
            every = [norms(torch.full_like(logits[:, 0], k, dtype=torch.long)) for k in range(classes)]
            return (weights * torch.stack(every, 1)).sum(1).mean()
        mean = norms(self._draw(logits, y)).mean()
        raw = self.estimator == "minibatch" and self.normalize == "none"
        return mean / (b * world_size()) if raw else mean

    def _square_and_gradient(
        self, closure: Closure, y: Tensor | None, parameters: dict[str, nn.Parameter], factor: float
    ) -> tuple[Tensor, int, list[Tensor]]:
        """Squared norm of the joint mini-batch gradient, B, and the gradient of that square."""
        model = self._model[0]
        with frozen_noise_and_statistics(model) as replay:
            with replay():
                logits = logits_of(closure())
            check_logits(logits, first=not self._checked)
            self._check_call(logits, None, y)
            labels = self._draw(logits, y)
            own = gradient_at(nll(logits, labels), list(parameters.values()), create_graph=False, scale=factor)
            joint = mean_over_ranks(own)
            if self.grad == "jvp":
                product = gradient_tangent(model, closure, labels, parameters, joint, replay, factor)
            else:
                _check_precision(logits, parameters)
                product = gradient_change(model, closure, labels, parameters, own, joint, self.fd_step, replay, factor)
        return _square(joint), len(logits), [2 * h for h in mean_over_ranks(product)]

    def _draw(self, logits: Tensor, y: Tensor | None) -> Tensor:
        if self.labels == "true":
            return check_true_labels(y, logits)
        generator = self._generator or stream(self._seed, rank(), self._calls)
        return sample_labels(logits, self.labels, generator)

    def _class_weights(self, logits: Tensor) -> Tensor:
        """Probabilities with which labels would be drawn, (B, C)."""
        p = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        if self.labels == "uniform":
            return torch.full_like(p, 1 / logits.shape[1])
        return p if self.score_term else p.detach()

    def _weight(self) -> float:
        return self.alpha * (self.interval if self.rescale_by_interval else 1)

    # --- what can be wrong ------------------------------------------------------------------------------------------

    def _check_combination(self) -> None:
        if self.fd_step is not None and not (math.isfinite(self.fd_step) and self.fd_step > 0):
            raise InvalidInput(f"fd_step={self.fd_step!r} must be a positive number, or None.")
        if self.grad != "double_backprop" and (self.estimator != "minibatch" or self.target != "params"):
            raise InvalidInput(
                f"grad={self.grad!r} is for estimator='minibatch' and target='params', not for {self.estimator!r} and "
                f"{self.target!r}; use grad='double_backprop'."
            )
        if self.estimator == "exact" and self.labels == "true":
            raise InvalidInput(
                "estimator='exact' takes the expectation over labels, of which labels='true' has one a sample; use "
                "estimator='per_example'."
            )
        if self.score_term and (self.estimator, self.labels) != ("exact", "model"):
            raise InvalidInput("score_term=True is for estimator='exact' with labels='model': only it weighs classes.")

    def _check_call(self, logits: Tensor, x: Any, y: Tensor | None) -> None:
        if y is not None and self.labels != "true":
            raise InvalidInput(
                f"labels={self.labels!r} draws its own labels, so y must not be passed: the data set's labels would "
                "make it the empirical Fisher, a different penalty; leave y out, or use labels='true'."
            )
        if logits.grad_fn is None:
            raise InvalidInput(
                "the logits have no graph (made under torch.no_grad(), or detached), so no penalty can be "
                "differentiated; pass what the model returned in this training step."
            )
        if self.target == "input":
            if x is None:
                raise InvalidInput("target='input' differentiates by the input; pass it as x.")
            if not (isinstance(x, Tensor) and x.requires_grad):
                raise InvalidInput(
                    "target='input' needs x.requires_grad_() before logits = model(x), and that same x passed here; "
                    "whole numbers such as token ids have no gradient, penalize their embeddings."
                )
        elif self.estimator != "minibatch":
            if x is None:
                raise InvalidInput(f"estimator={self.estimator!r} runs the model again on the batch; pass it as x.")
            if coupled := batch_coupled(self._model[0]):
                raise InvalidInput(
                    f"estimator={self.estimator!r} needs gradients of single samples, but batch norm in training mode "
                    f"({coupled[0]}{' and others' if len(coupled) > 1 else ''}) makes each output depend on the whole "
                    "batch; put these layers in eval() (running statistics), use group norm, or estimator='minibatch'."
                )
        if not self._checked:
            if self.grad == "double_backprop":
                check_double_backward(logits)
            self._checked = True


def _square(tensors: Iterable[Tensor]) -> Tensor:
    """Squared Euclidean norm of all of them together, in at least single precision."""
    flat = [(t if t.dtype == torch.float64 else t.float()).reshape(-1) for t in tensors]
    return torch.stack([torch.dot(t, t) for t in flat]).sum()


def _whole(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{name}={value!r} must be a whole number of at least {least}.")
    return value


def _choose(model: nn.Module, params: Iterable[nn.Parameter] | Iterable[str] | None) -> list[nn.Parameter] | None:
    if params is None:
        trainable(model, None)
        return None
    known = dict(unwrap(model).named_parameters())
    chosen: list[nn.Parameter] = []
    for item in params:
        if isinstance(item, str):
            if item not in known:
                raise InvalidInput(
                    f"params names {item!r}, which is no parameter of the model; see named_parameters()."
                )
            chosen.append(known[item])
        elif any(item is p for p in known.values()):
            chosen.append(item)
        else:
            raise InvalidInput("params holds a tensor that is not a parameter of the model.")
    trainable(model, chosen)
    return chosen


def _check_precision(logits: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    low = {logits.dtype, *(p.dtype for p in parameters.values())} & {torch.float16, torch.bfloat16}
    if low:
        raise InvalidInput(
            f"finite differences of gradients in {next(iter(low))} are rounding noise; let the closure run without "
            "autocast, or use grad='jvp' or 'double_backprop'."
        )
