r"""The Fisher penalty and its relatives, to be added to the loss of any training loop.

Jastrzębski et al., "Catastrophic Fisher Explosion", ICML 2021, section 2 and the section on the Fisher penalty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage import _random
from mlcollage.errors import InvalidInput
from mlcollage.measure import fisher_sqnorm, sample_labels
from mlcollage.nn import logits_of, unwrap
from mlcollage.train import Replicas

from ._arguments import (
    check_belongs,
    check_call,
    check_graph,
    check_logits,
    check_precision,
    check_settings,
    choose,
    trainable,
    true_labels,
)
from ._gradients import (
    Closure,
    dot,
    frozen_noise_and_statistics,
    gradient_at,
    gradient_change,
    gradient_of,
    gradient_tangent,
    mean_over_ranks,
    nll,
    rank,
    world_size,
)


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

    | paper's | here                           | labels of the gradient                                     |
    | ------- | ------------------------------ | ---------------------------------------------------------- |
    | FP      | the default                    | drawn from the model                                       |
    | GP      | ``labels="true"``              | of the data set (the *empirical* Fisher)                   |
    | GPr     | ``labels="uniform"``           | drawn uniformly                                            |
    | GPx     | ``labels="true", wrt="input"`` | of the data set; the gradient is with respect to the input |

    Parameters
    ----------
    model
        The network whose parameters are penalized; also wrapped in DistributedDataParallel or compiled. It is not
        registered as a submodule. Or :class:`~mlcollage.train.replicas.Replicas`: each replica then has the penalty
        that it would have alone, and penalties have shape (R,).
    alpha
        Coefficient, at least 0; may be changed between steps (``penalty.alpha = ...``). About 0.01 to 1 at B = 100
        for small networks; too large a value stops learning. Tune it on a validation set. For replicas one for all,
        or one for each.
    labels
        ``"model"`` (default), ``"true"`` or ``"uniform"``.
    wrt
        With respect to what the gradient is taken: ``"params"`` (default) or ``"input"``.
    estimator
        ``"minibatch"`` (default): the squared norm of the mean gradient, as in the paper. ``"per_example"``: the mean
        of the squared norms of the samples' gradients, an estimate of Tr(F) with far less noise at the cost of one more
        forward pass; needs ``x`` and no batch norm in training mode. ``"exact"``: the expectation over all labels
        instead of drawn ones; about C times the cost. With the last two, ``alpha`` weighs Tr(F) itself: use
        :math:`\alpha / B` where the mini-batch form has :math:`\alpha`.
    mode
        ``"double_backprop"`` (default): :meth:`forward` returns a term to add to the loss. ``"finite_difference"`` and
        ``"jvp"`` need no double backward: call :meth:`add_gradient_` after ``loss.backward()``. They are for single
        networks with ``estimator="minibatch"`` and ``wrt="params"``.
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
        Parameters to penalize, or their names; None (default) for all that require gradients, which the logits must
        then depend on. Frozen ones are left out.
    score_term
        Only for ``"exact"`` with ``labels="model"``: also differentiate the probabilities that weigh the classes, which
        drawn labels leave out. Default False.
    fd_step
        Length h of the finite difference in parameter space; None (default) for
        :math:`\sqrt{\epsilon}\,(1 + \|\theta\|)`.
    accumulation_steps
        Calls per optimization step (micro-batches). Default 1.
    generator
        Where labels are drawn from. An int (default 0) seeds each step's own stream, together with the process's rank:
        a resumed training then draws what an unbroken one would. A ``torch.Generator`` is used as it comes, and its
        state is part of ``state_dict()``. For replicas also a sequence of ints, one for each; with one int all of them
        draw from equal streams, as networks trained alone would. The global generators are never used.

    Attributes
    ----------
    steps : int
        Optimization steps seen so far.
    last : Tensor or None
        Squared norm (or trace) at the last penalized step, before any coefficient; detached, shape () or (R,).

    Raises
    ------
    InvalidInput
        For settings that do not go together; for targets that are not class numbers, and logits of another copy of the
        network; on the first penalized step, for logits that are probabilities or do not depend on all parameters
        (unless ``params`` names those to penalize), networks whose backward pass cannot be differentiated, and
        reentrant checkpointing.
    UnknownName
        For settings that do not exist.

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

    *Gradient checkpointing* with ``use_reentrant=False`` gives the same numbers in all modes; the reentrant kind is
    refused. *weight_norm* is refused where the logits are differentiated twice, since torch's own second derivative of
    it is wrong; ``mode="jvp"``, ``"finite_difference"`` and the estimators of single samples are right.

    *Clipping* after ``backward()`` clips the sum of both gradients. *Batch norm in training mode* is differentiated
    through its batch statistics; the identity with Tr(F)/B then does not hold. *Losses with* ``reduction="sum"`` are B
    times as large as what the penalty was written for: multiply ``alpha`` by B.

    *Replicas.* ``replicas.update(lambda: losses(logits := replicas(x, in_dim=0), y) + penalty(logits))`` trains each
    replica as a network with a penalty of its own. ``x`` has shape (R, B, ...) where it is needed. The estimators of
    single samples go through the replicas one after the other, in evaluation mode: batch norm at its running
    statistics, no dropout.

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
        model: nn.Module | Replicas,
        alpha: float | Sequence[float],
        *,
        labels: Literal["model", "true", "uniform"] = "model",
        wrt: Literal["params", "input"] = "params",
        estimator: Literal["minibatch", "per_example", "exact"] = "minibatch",
        mode: Literal["double_backprop", "finite_difference", "jvp"] = "double_backprop",
        interval: int = 10,
        start: int = 0,
        stop: int | None = None,
        rescale_by_interval: bool = False,
        normalize: Literal["none", "batch"] = "none",
        params: Iterable[Tensor] | Iterable[str] | None = None,
        score_term: bool = False,
        fd_step: float | None = None,
        accumulation_steps: int = 1,
        generator: torch.Generator | int | Sequence[int] | None = 0,
    ) -> None:
        super().__init__()
        check_settings(
            model, labels=labels, wrt=wrt, estimator=estimator, mode=mode, normalize=normalize, score_term=score_term
        )
        self._model = [model]  # in a list, so that it does not become a submodule
        self._replicas = model.size if isinstance(model, Replicas) else None
        self._lead = 0 if self._replicas is None else 1  # dimensions in front of a network's own
        self.alpha = alpha
        self.labels, self.wrt, self.estimator, self.mode, self.normalize = labels, wrt, estimator, mode, normalize
        self.interval = checks.integer("interval", interval, least=1)
        self.start = checks.integer("start", start, least=0)
        self.stop = None if stop is None else checks.integer("stop", stop, least=self.start + 1)
        self.accumulation_steps = checks.integer("accumulation_steps", accumulation_steps, least=1)
        self.rescale_by_interval, self.score_term = bool(rescale_by_interval), bool(score_term)
        self.fd_step = None if fd_step is None else checks.positive("fd_step", fd_step)
        self._chosen = choose(model, params)
        self._generator = generator if isinstance(generator, torch.Generator) else None
        seeds = 0 if generator is None or self._generator is not None else generator
        self._seeds = [checks.integer("generator", seed) for seed in self._for_each("generator", seeds)]
        self._calls = 0  # micro-batches seen
        self._checked = False  # whether the dearer checks of the first penalized step were made
        self.last: Tensor | None = None

    def _for_each(self, name: str, given: Any) -> list[Any]:
        """One value for each replica, or one for the network."""
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        size = self._replicas or 1
        if len(values) not in (1, size):
            raise InvalidInput(f"{name} holds {len(values)} values for {size} networks; give one, or one for each.")
        return values * size if len(values) == 1 else values

    @property
    def alpha(self) -> float | tuple[float, ...]:
        """Coefficient of the penalty; for replicas one for all, or one for each."""
        return self._alpha[0] if len(set(self._alpha)) == 1 else self._alpha

    @alpha.setter
    def alpha(self, value: float | Sequence[float]) -> None:
        self._alpha = tuple(checks.real("alpha", v, least=0) for v in self._for_each("alpha", value))

    @property
    def steps(self) -> int:
        """Optimization steps seen so far; may be set when training is resumed without a state."""
        return self._calls // self.accumulation_steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._calls = checks.integer("steps", value, least=0) * self.accumulation_steps

    @property
    def active(self) -> bool:
        """Whether the next call is penalized."""
        t = self.steps
        due = t >= self.start and (self.stop is None or t < self.stop) and (t - self.start) % self.interval == 0
        return due and self.training and max(self._alpha) > 0

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"alpha={self.alpha}, labels={self.labels!r}, wrt={self.wrt!r}, estimator={self.estimator!r}, "
            f"mode={self.mode!r}, interval={self.interval}"
        )

    def forward(self, logits: Any, x: Any = None, y: Tensor | None = None, *, scaler: Any = None) -> Tensor:
        """The penalty of this step, to be added to the loss; counts the call.

        Parameters
        ----------
        logits
            The model's output for the batch, (B, C) or of replicas (R, B, C), with its graph.
        x
            The model's input; needed for ``wrt="input"`` (with ``x.requires_grad_()`` before the forward pass) and
            for the estimators ``"per_example"`` and ``"exact"``, where it may be a tuple or dict of arguments.
        y
            Class numbers (B,) or (R, B); needed for ``labels="true"``, refused otherwise.
        scaler
            The loop's ``GradScaler``, if there is one. The returned penalty is not scaled.

        Returns
        -------
        Tensor
            Shape () or (R,), float32 (float64 for float64 logits). Zero, without a graph, on steps that are not
            penalized, and in evaluation mode, where steps are not counted.
        """
        if self.mode != "double_backprop":
            raise InvalidInput(f"mode={self.mode!r} gives no term; call add_gradient_(closure) after loss.backward().")
        logits = logits_of(logits)
        if not self.active:
            self._calls += int(self.training)
            # At least single precision, as on penalized steps: a loop's loss then keeps one type.
            kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
            return torch.zeros(logits.shape[: self._lead], dtype=kind, device=logits.device)
        self._check(logits, x, y)
        value = self._value(logits, x, y, 1.0 if scaler is None else float(scaler.get_scale()))
        self._calls += 1
        self.last = value.detach()
        return self._weight(value) * value

    def add_gradient_(
        self, closure: Closure, *, y: Tensor | None = None, scaler: Any = None, scale: float = 1.0
    ) -> Tensor:
        r"""Add the penalty's gradient to ``.grad`` of the parameters, without double backpropagation.

        With :math:`\bar g` the gradient of the batch,
        :math:`\nabla_\theta \|\bar g\|^2 = 2 H \bar g`. The product with the Hessian is a difference of two gradients
        (``"finite_difference"``) or the tangent of one (``"jvp"``; group norm has none and is differentiated backward
        twice). All of them see the same drawn labels and dropout masks, and running statistics of batch norm are left
        as they were.

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
        >>> penalty = FisherPenalty(model, alpha=0.1, mode="jvp", interval=1)
        >>> nn.functional.cross_entropy(model(x), y).backward()
        >>> value = penalty.add_gradient_(lambda: model(x))  # then clip, and optimizer.step()
        >>> bool(value > 0)
        True
        """
        if self.mode == "double_backprop":
            raise InvalidInput("add_gradient_ is for 'finite_difference' and 'jvp'; add penalty(logits) to the loss.")
        if not callable(closure):
            raise InvalidInput("add_gradient_ needs a function that recomputes the logits, such as lambda: model(x).")
        parameters = trainable(self._model[0], self._chosen)
        if not self.active:
            self._calls += int(self.training)
            return torch.zeros((), device=next(iter(parameters.values())).device)
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        with torch.enable_grad():  # the call may stand after backward(), under torch.no_grad()
            square, b, gradient = self._square_and_gradient(closure, y, parameters, factor)
        joint = b * world_size() if self.normalize == "batch" else 1  # samples of the joint batch
        weight = self._weight(square)
        with torch.no_grad():
            for p, g in zip(parameters.values(), gradient, strict=True):
                if p.grad is None:  # a parameter that the loss does not depend on
                    p.grad = torch.zeros_like(p)
                p.grad.add_(g.to(p.dtype), alpha=float(weight) * joint * scale * factor)
        self._calls += 1
        self.last = square * joint
        return weight * self.last

    def get_extra_state(self) -> dict[str, Any]:
        """Steps counted, and the state of a generator of the user's."""
        state = None if self._generator is None else self._generator.get_state()
        return {"calls": self._calls, "generator": state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`get_extra_state`."""
        self._calls = int(state["calls"])
        if self._generator is not None and state["generator"] is not None:
            self._generator.set_state(state["generator"].cpu())

    def _check(self, logits: Tensor, x: Any, y: Tensor | None) -> None:
        check_logits(logits, replicas=self._replicas, first=not self._checked)
        check_call(self._model[0], logits, x, y, labels=self.labels, wrt=self.wrt, estimator=self.estimator)
        parameters = trainable(self._model[0], self._chosen)
        if self._checked:
            check_belongs(logits, self._model[0], parameters)
            return
        # The estimators of single samples differentiate a pass of their own.
        twice = self.mode == "double_backprop" and (self.wrt == "input" or self.estimator == "minibatch")
        check_graph(logits, self._model[0], parameters, twice=twice, complete=self._chosen is None)
        self._checked = True

    def _weight(self, like: Tensor) -> Tensor:
        """Coefficient of a penalized step, () or (R,)."""
        own = like.new_tensor(self._alpha).view(like.shape)
        return own * (self.interval if self.rescale_by_interval else 1)

    # --- the three estimators, () of one network or (R,) of replicas --------------------------------------------------

    def _value(self, logits: Tensor, x: Any, y: Tensor | None, scale: float) -> Tensor:
        if self.wrt == "input":
            return self._input_norm(logits, x, y, scale)
        if self.estimator == "minibatch":
            return self._minibatch(logits, self._draw(logits, y), scale)
        labels = None if self.estimator == "exact" else self._draw(logits, y)  # (B,) or (R, B)
        model = self._model[0]
        if not isinstance(model, Replicas):
            names = list(trainable(model, self._chosen))
            return self._of_examples(unwrap(model), x, labels, names)
        return torch.stack([self._of_one_replica(model, r, x, labels) for r in range(model.size)])

    def _minibatch(self, logits: Tensor, y: Tensor, scale: float) -> Tensor:
        parameters = list(trainable(self._model[0], self._chosen).values())
        # The inner gradient has a graph of its own, so that backward() of its square goes through it once more.
        own = gradient_at(nll(logits, y), parameters, create_graph=True, scale=scale)
        square = dot(own, own, self._lead)  # () or (R,)
        if world_size() > 1:
            # d|mean g|^2 = 2 <mean g, mean dg>: each process contributes 2 <mean g, dg>, and averaging sums it up.
            joint = mean_over_ranks(own)
            along = 2 * dot(own, joint, self._lead)
            square = along - along.detach() + dot(joint, joint, self._lead)
        return square * (y.shape[-1] * world_size()) if self.normalize == "batch" else square

    def _of_examples(self, model: nn.Module, x: Any, labels: Tensor | None, names: Iterable[str]) -> Tensor:
        """Mean over samples of squared gradient norms, at given labels or in expectation over all of them."""
        settings: dict[str, Any] = {"labels": labels, "method": "mc"}
        if labels is None:
            settings = {"labels": self.labels, "method": "exact", "score_term": self.score_term}
        chosen = [model.get_parameter(name) for name in names]
        norms = fisher_sqnorm(model, x, params=chosen, retain_graph=False, **settings)  # (B,)
        assert isinstance(norms, Tensor)
        return norms.mean()

    def _of_one_replica(self, replicas: Replicas, r: int, x: Tensor, labels: Tensor | None) -> Tensor:
        """That of a copy of replica r, whose gradient is handed on to the stacked parameters."""
        model = replicas.module(r)
        names = trainable(replicas, self._chosen)
        value = self._of_examples(model, x[r], None if labels is None else labels[r], names)
        every = trainable(replicas, None)  # what is penalized may depend on more than it is the gradient of
        gradient = gradient_at(value, [model.get_parameter(name) for name in every], create_graph=False)
        # Linear in the stacked parameters: worth nothing itself, it has the gradient that the value has in the copy.
        along = dot([p[r] for p in every.values()], gradient)
        return value.detach() + along - along.detach()

    def _input_norm(self, logits: Tensor, x: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """GPx: squared norms of the samples' loss gradients with respect to the input."""
        *_, b, classes = logits.shape

        def norms(labels: Tensor) -> Tensor:
            # B times the mean loss: row i of its gradient is that of sample i's own loss.
            (g,) = gradient_at(nll(logits, labels) * b, [x], create_graph=True, scale=scale)
            return g.reshape(*labels.shape, -1).square().sum(-1)  # (B,) or (R, B)

        if self.estimator == "exact":
            # (..., B) for each class, stacked to (..., B, C)
            every = [norms(torch.full(logits.shape[:-1], k, device=logits.device)) for k in range(classes)]
            return (self._class_weights(logits) * torch.stack(every, -1)).sum(-1).mean(-1)
        mean = norms(self._draw(logits, y)).mean(-1)
        # The mean loss over the joint batch has the rows g_i / (B ranks), and so the squared norm mean / (B ranks).
        raw = self.estimator == "minibatch" and self.normalize == "none"
        return mean / (b * world_size()) if raw else mean

    def _square_and_gradient(
        self, closure: Closure, y: Tensor | None, parameters: dict[str, Tensor], factor: float
    ) -> tuple[Tensor, int, list[Tensor]]:
        """Squared norm of the joint mini-batch gradient, B, and the gradient of that square."""
        model = self._model[0]
        assert isinstance(model, nn.Module)
        with frozen_noise_and_statistics(model) as replay:
            with replay():  # so that this forward pass has the noise of those that follow
                logits = logits_of(closure())
            self._check(logits, None, y)
            labels = self._draw(logits, y)
            own = gradient_at(nll(logits, labels), list(parameters.values()), create_graph=False, scale=factor)
            joint = mean_over_ranks(own)
            gradient = gradient_of(model, closure, labels, replay, factor)
            if self.mode == "jvp":
                product = gradient_tangent(model, gradient, parameters, joint)
            else:
                check_precision(logits, parameters.values())
                product = gradient_change(gradient, parameters, own, joint, self.fd_step)
        # d|g|^2 = 2 H g with the joint g; processes have the Hessians of their batches, whose mean is the joint one.
        return dot(joint, joint), len(logits), [2 * h for h in mean_over_ranks(product)]

    def _draw(self, logits: Tensor, y: Tensor | None) -> Tensor:
        """Labels (B,) or (R, B)."""
        if self.labels == "true":
            return true_labels(y, logits)
        given = logits.detach() if self.labels == "model" else torch.zeros_like(logits)
        rows = given if self._lead else given.unsqueeze(0)  # (R, B, C)
        # A stream for each step and process: a resumed training draws what an unbroken one would.
        streams = [self._generator or _random.generator(seed, rank(), self._calls) for seed in self._seeds]
        drawn = [sample_labels(z, generator=g)[0] for z, g in zip(rows, streams, strict=True)]
        return torch.stack(drawn).view(logits.shape[:-1])

    def _class_weights(self, logits: Tensor) -> Tensor:
        """Probabilities with which labels would be drawn, (..., C)."""
        p = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        if self.labels == "uniform":
            return torch.full_like(p, 1 / p.shape[-1])
        return p if self.score_term else p.detach()
