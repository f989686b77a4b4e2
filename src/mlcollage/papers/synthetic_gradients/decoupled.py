"""A network cut in pieces, each trained by a gradient that it gets from a rule of credit assignment, not from above."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import derive
from mlcollage.errors import InvalidInput
from mlcollage.nn.init import seeded
from mlcollage.nn.wrapped import logits_of

from .agreement import compare_gradients
from .context import Context, Divisor, Given, LossFn, divisor_of, losses_of_samples
from .cuts import Place, call, in_backward, name_outputs, open_output, refuse_paths_around, refuse_reentrant, warn_once
from .feedback import feedback_alignment, feedback_weights
from .learning import CHANGED, Said, learn, outside, say
from .synthesizer import SyntheticGradient, intercept_gradient

Credit = Literal["sg", "bp", "fa", "dfa", "kickback", "critic", "noise", "none"]
Unlock = Literal["update", "backward", "full"]
CREDITS = ("sg", "bp", "fa", "dfa", "kickback", "critic", "noise", "none")
LOCAL = ("sg", "critic", "noise", "none")  # what these send down is known as soon as the activation is


@dataclass(eq=False)
class _Live:
    """One cut during one step."""

    index: int
    below: Tensor | None  # the activation with the graph of the part below; None once that was run backward
    above: Tensor | None  # what the part above reads: a leaf, whose gradient is what arrives
    rows: Tensor | None
    predicted: Said | None = None  # by the synthesizer or critic, with what its gradients need
    guess: Tensor | None = None  # gradient of one sample that the rule has before anything arrives
    made: Tensor | None = None  # a synthetic input, with its graph
    real: Tensor | None = None  # what it should have been
    arrived: Tensor | None = None


@dataclass(eq=False)
class _Step:
    """What all cuts of one step share."""

    given: Given
    divisor: float
    scale: float
    x: Any
    drawn: list[bool]
    now: bool  # whether parts are updated as soon as their forward pass is done
    learns: bool  # whether synthesizers are trained
    function: bool = False  # whether the backward pass is the user's
    live: list[_Live | None] = field(default_factory=list)
    error: Tensor | None = None  # gradient of the loss by the network's output

    @property
    def factor(self) -> float:
        """From gradients of one sample to those of the loss."""
        return self.scale / self.divisor


class _Seen(NamedTuple):
    """What a synthesizer said and what arrived, of which the report is made."""

    predicted: Tensor
    arrived: Tensor
    factor: float  # from what arrived to the gradient of one sample
    divisor: float
    rows: Tensor | None
    loss: Tensor
    first: Tensor  # the loss when something arrived for the first time


class Decoupled(nn.Module):
    r"""Any network, cut behind some of its modules, with one switch for what each part learns from.

    With :math:`h_i` the activation at cut i and :math:`g_i` what is sent into the part below,

    * ``sg``: :math:`g_i = \hat g_i = M_i(h_i, y)`, trained on
      :math:`\lVert \hat g_i - g_{i+1}^\top \partial h_{i+1} / \partial h_i \rVert^2` (bootstrapped);
    * ``bp``: the true gradient;
    * ``fa``: feedback alignment, which is ``bp`` with fixed random matrices for the transposed weights;
    * ``dfa``: direct feedback alignment, a fixed random matrix times the error at the output;
    * ``kickback``: the error, one number a sample (the mean over the last cut's units of its true gradient), times each
      unit's influence on the next part, :math:`(\partial h_{i+1} / \partial h_i)^\top 1`;
    * ``critic``: the slope of a prediction of the sample's loss, which learns from the true loss;
    * ``noise``: a random vector of length about 1, divided as the loss is;
    * ``none``: nothing, so that only the part behind the last cut learns;

    and with ``lam`` :math:`\lambda`, :math:`g_i = (1 - \lambda) \hat g_i + \lambda g_{i+1}^\top \partial h_{i+1} /
    \partial h_i`, from synthetic gradients (0) to backpropagation (1).

    Made by :func:`decouple`, or of a chain of blocks by :class:`DecoupledSequential`. The network itself is not
    changed: hooks are there only during a step, so it can be copied, saved and called as before, and ``net(x)`` is
    ``net.model(x)``. Synthesizers are submodules of this object, not of the network.

    Parameters
    ----------
    model
        Any module; it runs once in each step.
    places
        The cuts, of :func:`~mlcollage.papers.synthetic_gradients.cuts.find_places`.
    synthesizers
        By name of the cut; for ``sg`` gradients, for ``critic`` losses.
    context
        What they are given of the targets.
    credit
        The rule.
    lam
        :math:`\lambda` in [0, 1], for ``sg``, ``critic``, ``noise`` and ``none``.
    unlock
        ``"update"``: a part is run backward, and its activations are freed, as soon as its forward pass is done.
        ``"backward"``: when the loss is known. ``"full"``: besides, each part reads a synthetic input and need not wait
        for the parts below. Rules that need the error use ``"backward"`` whatever is said.
    inputs
        Synthesizers of activations by name of the cut, from the flattened network input; for ``unlock="full"``.
    divisor
        What the loss divides by, where it cannot be read; see
        :func:`~mlcollage.papers.synthetic_gradients.divisor_of`.
    target_scale
        ``"sample"``: synthesizers learn gradients of one sample's loss, so that nothing depends on the batch size.
        ``"batch"``: of the mean loss as it is, as older public code does.
    probability
        Of each part being updated in a step; below 1 the times are random.
    batch_dim
        Axis of samples in activations: 1 for models that are called with (T, B, ...).
    allow_paths
        Let tensors carry true gradient around a cut, and losses lie inside.
    train_synthesizers
        False keeps the synthesizers as they are.
    train_every
        Train the synthesizers in every k-th step only, for ``credit="sg"`` with ``lam`` 0. In the steps between no
        gradient is computed at the cuts, so that a step costs little more than backpropagation's.
    seed
        Of random matrices, noise and times.

    Raises
    ------
    InvalidInput
        For settings that do not fit each other.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[Place],
        synthesizers: Mapping[str, nn.Module] | None = None,
        context: Context | None = None,
        *,
        credit: Credit = "sg",
        lam: float = 0.0,
        unlock: Unlock = "update",
        inputs: Mapping[str, nn.Module] | None = None,
        divisor: Divisor = None,
        target_scale: Literal["sample", "batch"] = "sample",
        probability: float = 1.0,
        batch_dim: int = 0,
        allow_paths: bool = False,
        train_synthesizers: bool = True,
        train_every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.cuts = tuple(p.name for p in places)
        self._keys = [p.key for p in places]
        self.credit: Credit = checks.choice("credit", credit, CREDITS)
        self.unlock: Unlock = checks.choice("unlock", unlock, ("update", "backward", "full"))
        self.target_scale = checks.choice("target_scale", target_scale, ("sample", "batch"))
        self.lam = checks.real("lam", lam, least=0, most=1)
        self.probability = checks.real("probability", probability, above=0, most=1)
        self.batch_dim = checks.integer("batch_dim", batch_dim, least=0, most=1)
        self.divisor, self.allow_paths, self.seed = divisor, allow_paths, seed
        self.train_synthesizers = train_synthesizers
        self.train_every = checks.integer("train_every", train_every, least=1)
        if self.train_every > 1 and (credit != "sg" or lam):
            raise InvalidInput("train_every spares gradients at the cuts, which only credit='sg' with lam=0 can do.")
        self.context = context or Context("none")
        self.synthesizers = nn.ModuleDict({k.replace(".", "/"): m for k, m in (synthesizers or {}).items()})
        self.inputs = nn.ModuleDict({k.replace(".", "/"): m for k, m in (inputs or {}).items()})
        if lam and credit not in LOCAL:
            raise InvalidInput(
                f"lam mixes a guess with what arrives; credit={credit!r} has no guess, so lam must be 0."
            )
        if self.unlock == "full" and (credit != "sg" or lam):
            raise InvalidInput("unlock='full' trains each part alone; it needs credit='sg' and lam=0.")
        for what, given in (("synthesizer", self.synthesizers), ("input synthesizer", self.inputs)):
            needed = credit in ("sg", "critic") if what == "synthesizer" else self.unlock == "full"
            lacking = [p.name for p in places if p.key not in given] if needed else []
            extra = sorted(set(given) - set(self._keys))
            if lacking or extra:
                raise InvalidInput(
                    f"there is no {what} for the cut {lacking[0]!r}." if lacking else f"no cut {extra[0]!r}."
                )
        self._random: dict[str, Tensor] = {}  # of direct feedback
        self._feedback = nn.ParameterDict()
        if credit == "fa":  # parameters that no optimizer should move: they are saved with the rest
            for name, value in feedback_weights(model, seed).items():
                self._feedback[name.replace(".", "/")] = nn.Parameter(value, requires_grad=False)
        self.steps = 0
        self._checked = False  # whether paths around cuts were looked for
        self._warned: set[str] = set()
        self._largest: dict[int, float] = {}
        self._seen: dict[int, _Seen] = {}  # of the last step
        self.skipped: dict[str, int] = {}
        self._step: _Step | None = None

    # What a user calls -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network itself."""
        return self.model(*args, **kwargs)

    def base_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the network, under an optimizer, clipping and schedule of their own."""
        return self.model.parameters()

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """Parameters of the synthesizers (or critics) and of the synthesizers of inputs."""
        return [*self.synthesizers.parameters(), *self.inputs.parameters()]

    def training_step(
        self,
        x: Any,
        y: Any = None,
        loss_fn: LossFn | None = None,
        *,
        mask: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """One forward pass and all gradients: of the network's parts, and of the synthesizers.

        Gradients are added to ``.grad``, as ``backward`` does; the optimizers are yours.

        Parameters
        ----------
        x
            The network's input: a tensor, a tuple of arguments, or a mapping of named ones.
        y
            Targets.
        loss_fn
            From output and targets to one number; without it the network must return its ``loss``.
        mask
            (B,) or (B, T), true for rows that count; others are not in the synthesizers' loss, and get none of their
            gradient.
        scale
            Factor on all gradients: 1 / n when n batches are accumulated.

        Returns
        -------
        Tensor
            The loss. All gradients are there already: calling ``backward`` on it is refused.

        Raises
        ------
        InvalidInput
            For a loss or gradient that is not finite, labels beyond the classes, float16 activations, a path around a
            cut, a part that got no gradient.
        """
        step = self._begin(x, y, loss_fn, mask, scale)
        with ExitStack() as stack:  # through the backward pass too, in which checkpointing runs parts again
            stack.enter_context(self._hooks(step))
            if self.credit == "fa":
                stack.enter_context(feedback_alignment(self.model, self._fixed()))
            output, loss = self._forward_pass(x, y, loss_fn, step)
            self._backward_pass(output, loss, step)
        self._train(step, losses_of_samples(loss_fn, output, y) if self.credit == "critic" else None)
        if not self._checked and self.credit != "none" and all(step.drawn):
            self._refuse_untrained()
        self._checked = True
        self.steps += 1
        return loss.detach().as_subclass(_Finished)

    def _forward_pass(self, x: Any, y: Any, loss_fn: LossFn | None, step: _Step) -> tuple[Any, Tensor]:
        """The network's output and the loss; the first time, look for paths around the cuts."""
        names: dict[Any, str] = {}
        looks = not self._checked and not self.allow_paths
        handles = name_outputs(self.model, names) if looks else []
        try:
            output = call(self.model, x)
            loss = self._loss(output, y, loss_fn)
        finally:
            for handle in handles:
                handle.remove()
        if looks:
            below = [(self.cuts[c.index], c.below) for c in step.live if c is not None and c.below is not None]
            refuse_paths_around(loss, below, names)
        if not self._checked and self._spares:
            refuse_reentrant([loss, *(c.below for c in step.live if c is not None and c.below is not None)])
        if not math.isfinite(value := loss.item()):
            raise InvalidInput(f"the loss is {value} at step {self.steps}, so nothing was updated.")
        return output, loss

    def _backward_pass(self, output: Any, loss: Tensor, step: _Step) -> None:
        """The part behind the last cut, then those below that have not had their turn, from the top down."""
        if self.credit == "dfa" and (logits := logits_of(output)).requires_grad:
            logits.register_hook(partial(setattr, step, "error"))
        if step.drawn[-1] and loss.requires_grad:
            (loss if step.scale == 1 else loss * step.scale).backward(retain_graph=self.allow_paths)
        for cut in reversed(step.live):
            if cut is not None:
                cut.arrived = cut.above.grad if cut.above is not None else cut.arrived
                self._send_down(cut, step)

    @contextmanager
    def cut(
        self, y: Any = None, loss_fn: LossFn | None = None, *, mask: Tensor | None = None, scale: float = 1.0
    ) -> Iterator[None]:
        """Cuts for a loop that calls ``backward`` itself, such as a trainer's.

        Call the network inside, ``loss.backward()`` inside or after, and then :meth:`fill_synthesizers`.

        Parameters
        ----------
        y, mask
            As for :meth:`training_step`.
        loss_fn
            Only its divisor is read; needed unless ``divisor`` was said.
        scale
            What your loop multiplies the loss by before it calls ``backward``: 1 / n when n batches are accumulated.

        Examples
        --------
        >>> from mlcollage.papers.synthetic_gradients import decouple
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(6, 4), torch.arange(6) % 3
        >>> net, loss_fn = decouple(model, ["1"], example=x, context=3), nn.CrossEntropyLoss()
        >>> with net.cut(y, loss_fn):
        ...     loss_fn(model(x), y).backward()
        >>> float(net.fill_synthesizers()) > 0
        True
        """
        if self.credit in ("fa", "dfa", "kickback", "critic") or self.unlock == "full":
            what = "unlock='full'" if self.unlock == "full" else f"credit={self.credit!r}"
            raise InvalidInput(f"{what} needs training_step; a loop that calls backward itself cannot do it.")
        step = self._begin(None, y, loss_fn, mask, scale)
        step.now, step.function = False, True
        self._step = step
        with self._hooks(step):
            yield

    def fill_synthesizers(self) -> Tensor:
        """Fill the gradients of the synthesizers from what arrived in the backward pass; returns their loss."""
        step, self._step = self._step, None
        if step is None:
            raise InvalidInput(
                "fill_synthesizers follows a backward pass of a loss that was computed inside net.cut(...)."
            )
        try:
            losses = self._train(step)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise InvalidInput(CHANGED) from error
        self.steps += 1
        return torch.stack(losses).sum() if losses else torch.zeros(())

    # One step --------------------------------------------------------------------------------------------------

    def _begin(self, x: Any, y: Any, loss_fn: LossFn | None, mask: Tensor | None, scale: float) -> _Step:
        scale = scale if scale == 1.0 else checks.positive("scale", scale)
        given = _in_mode(self.context, self.training)(y)
        if mask is not None:
            rows = mask.bool()
            given = Given(
                given.context,
                rows if given.rows is None or given.rows.shape != rows.shape else rows & given.rows,
                given.below,
            )
        plain = self.credit == "sg" and self.target_scale == "batch"
        rows = _first_of(x) if y is None else y
        divisor = 1.0
        if self._guesses and not plain:
            divisor = divisor_of(loss_fn, rows, self.divisor, below=given.below)
        self._refuse_one_row(x)
        drawn = [True] * (len(self.cuts) + 1)
        if self.probability < 1:
            g = torch.Generator().manual_seed(derive(self.seed, 72, self.steps))
            drawn = (torch.rand(len(drawn), generator=g) < self.probability).tolist()
        # The first step keeps all graphs, to look for paths around the cuts.
        at_once = self.unlock != "backward" and self.credit in LOCAL and not self.lam
        now = at_once and self._checked and not self.allow_paths
        learns = self.train_synthesizers and self.steps % self.train_every == 0
        return _Step(given, divisor, scale, x, drawn, now, learns, live=[None] * len(self.cuts))

    @property
    def _guesses(self) -> bool:
        return self.credit in LOCAL and self.credit != "none"

    @property
    def _spares(self) -> bool:
        """Whether gradients at cuts are for synthesizers only."""
        return self.train_every > 1 and self.credit == "sg" and not self.lam

    @contextmanager
    def _hooks(self, step: _Step) -> Iterator[None]:
        handles = []
        try:
            for i, name in enumerate(self.cuts):
                handles.append(self.model.get_submodule(name).register_forward_hook(partial(self._at_cut, step, i)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_cut(self, step: _Step, i: int, module: nn.Module, args: Any, output: Any) -> Any:
        name = self.cuts[i]
        if in_backward():
            raise InvalidInput(
                f"the cut {name!r} lies inside a checkpointed region; checkpoint the parts between cuts."
            )
        h, put = open_output(output, name)
        if h.dtype == torch.float16:
            raise InvalidInput(
                f"the activation at {name!r} is float16, in which gradients of single samples vanish; use bfloat16."
            )
        if not h.requires_grad:
            self._skip(f"{name}: nothing to train below")
            return output
        if step.live[i] is not None:
            raise InvalidInput(f"the module {name!r} ran twice in one step; a cut must run once.")
        cut = step.live[i] = _Live(i, h, None, self._fit_rows(step.given.rows, h, name))
        self._guess(cut, h, step)
        if step.function:
            return put(intercept_gradient(h, partial(self._arrives, cut, step)))
        if step.now:
            self._send_down(cut, step)
            if i and (lower := step.live[i - 1]) is not None and lower.above is not None:
                # Nothing can arrive there any more: this part was its reader.
                lower.arrived, lower.above = lower.above.grad, None
        value = h.detach() if cut.made is None else cut.made.detach().to(h.dtype)
        # Where nothing learns from what arrives, the part above need not compute it.
        cut.above = value.requires_grad_(step.learns or not self._checked or not self._spares)
        return put(cut.above.clone())  # in-place layers above write into their own copy

    def _guess(self, cut: _Live, h: Tensor, step: _Step) -> None:
        """What the rule can say from the activation alone."""
        key, context = self._keys[cut.index], self._fit_context(step.given.context, h)
        if self.credit == "noise":
            with seeded(derive(self.seed, 73, self.steps, cut.index)):
                cut.guess = torch.randn_like(h) / (h[0].numel() if self.batch_dim == 0 else h[:, 0].numel()) ** 0.5
        if self.credit not in ("sg", "critic"):
            return
        module = _in_mode(self.synthesizers[key], self.training)
        graph = step.learns or self.credit == "critic"
        mixed = torch.is_autocast_enabled(h.device.type)
        plain = torch.autocast(h.device.type, enabled=False) if mixed else nullcontext()
        with plain, torch.set_grad_enabled(graph):
            read = self._samples_first(h.detach()).to(_dtype(module))
            if self.credit == "critic":
                with torch.enable_grad():
                    read.requires_grad_(True)
                    losses = module(read, context)  # (B,)
                    (slope,) = torch.autograd.grad(losses.sum(), read, retain_graph=True)
                cut.predicted = Said(losses)
                cut.guess = self._samples_first(slope)
                return
            cut.predicted = self._predict(module, read, context)
            cut.guess = self._samples_first(cut.predicted.value)
            if self.unlock == "full":
                maker = _in_mode(self.inputs[key], self.training)
                x = step.x if isinstance(step.x, Tensor) else None
                if x is None or not x.is_floating_point():
                    raise InvalidInput(
                        "unlock='full' makes activations from the network's input, one floating-point tensor."
                    )
                with torch.enable_grad():
                    made = maker(x.flatten(1).to(_dtype(maker)), context)
                cut.made, cut.real = made.reshape(h.shape), h.detach()
                # The synthesizer learns at what the part above has read.
                cut.predicted = self._predict(module, cut.made.detach().to(_dtype(module)), context)

    def _predict(self, module: nn.Module, read: Tensor, context: Tensor | None) -> Said:
        out = say(module, read, context)
        if out.value.shape != read.shape:
            raise InvalidInput(
                f"a synthesizer gave {tuple(out.value.shape)} for an activation of {tuple(read.shape)}; they must "
                "agree."
            )
        return out

    def _send_down(self, cut: _Live, step: _Step) -> None:
        """Run the part below backward with what the rule sends."""
        below, cut.below = cut.below, None
        if below is None or not step.drawn[cut.index]:
            if below is not None:
                self._skip("not drawn for an update")
            return
        sent = self._sent(cut, step, cut.arrived)
        if sent is None:
            return
        # A sum is several times cheaper than a look at each number, and not finite if one of them is not.
        if not math.isfinite(float(sent.sum())) and not bool(sent.isfinite().all()):
            raise InvalidInput(
                f"the gradient for the cut {self.cuts[cut.index]!r} is not finite at step {self.steps} (norm "
                f"{float(sent.norm())}, credit {self.credit!r}); lower the synthesizers' learning rate."
            )
        if self.credit == "kickback" and cut.index and (lower := step.live[cut.index - 1]) is not None:
            assert lower.above is not None
            (lower.guess,) = torch.autograd.grad(below, lower.above, torch.ones_like(below), retain_graph=True)
        below.backward(sent.to(below.dtype), retain_graph=self.allow_paths)

    def _sent(self, cut: _Live, step: _Step, arrived: Tensor | None) -> Tensor | None:
        """What goes down into the part below, of what has arrived."""
        if self.credit in ("bp", "fa") or self.lam == 1:
            return arrived
        if self.credit == "dfa":
            return self._direct(cut, step)
        if self.credit == "kickback":
            return arrived if self._is_last(cut, step) else self._kick(cut, step)
        if cut.guess is None:  # credit none
            return None if not self.lam or arrived is None else self.lam * arrived
        guess = cut.guess * step.factor
        if cut.rows is not None:
            rows = cut.rows if self.batch_dim == 0 or cut.rows.ndim == 1 else cut.rows.T
            rows = rows[None] if self.batch_dim == 1 and cut.rows.ndim == 1 else rows
            guess = guess.masked_fill(outside(rows, guess), 0.0)
        if self.lam:
            return guess * (1 - self.lam) + (0.0 if arrived is None else self.lam * arrived)
        return guess

    def _is_last(self, cut: _Live, step: _Step) -> bool:
        return all(c is None for c in step.live[cut.index + 1 :])

    def _direct(self, cut: _Live, step: _Step) -> Tensor | None:
        """Direct feedback alignment: the output's error through a fixed matrix, by token where both have tokens."""
        error, h = step.error, cut.above
        if error is None or h is None:
            return None
        tokens = error.ndim == h.ndim == 3 and error.shape[:2] == h.shape[:2]
        shape = h.shape[2:] if tokens else h.shape[1:]
        e = error.flatten(0, 1) if tokens else error.flatten(1)
        key = self._keys[cut.index]
        if key not in self._random:  # drawn of the seed, so a resumed training has the same
            g = torch.Generator().manual_seed(derive(self.seed, 74, cut.index))
            self._random[key] = torch.randn(e.shape[1], shape.numel(), generator=g) / e.shape[1] ** 0.5
        self._random[key] = self._random[key].to(e)
        return (e @ self._random[key]).reshape(h.shape)

    def _kick(self, cut: _Live, step: _Step) -> Tensor | None:
        """One number for the sample, times the influence of each unit on the part above."""
        last = next(c for c in reversed(step.live) if c is not None)
        if last.arrived is None or cut.guess is None:
            return None
        error = last.arrived.flatten(1).mean(1)  # (B,)
        return cut.guess * error.reshape(-1, *(1,) * (cut.guess.ndim - 1))

    def _arrives(self, cut: _Live, step: _Step, g: Tensor) -> Tensor | None:
        """The user's own backward pass has come to a cut; of several passes the gradients add up."""
        again, cut.below = cut.arrived is not None, None
        cut.arrived = g if cut.arrived is None else cut.arrived + g
        if not step.drawn[cut.index]:
            self._skip("not drawn for an update")
            return None
        if again and cut.guess is not None:  # the guess was sent with the first pass
            return self.lam * g
        return self._sent(cut, step, g)

    def _train(self, step: _Step, losses: Tensor | None = None) -> list[Tensor]:
        """Gradients of synthesizers, critics (from the samples' losses) and synthesizers of inputs; their losses."""
        found = []
        for cut in step.live:
            if cut is None or cut.predicted is None or not step.learns:
                continue
            i, rows, factor = cut.index, cut.rows, 1 / step.factor
            if losses is not None:
                arrived, factor = losses, 1.0
                rows = rows if rows is None or rows.ndim == 1 else None
            elif cut.arrived is None:
                self._skip(f"{self.cuts[i]}: no gradient arrived")
                continue
            else:
                arrived = self._samples_first(cut.arrived)
            loss = learn(cut.predicted, arrived, rows, factor=factor, scale=step.scale)
            if losses is None:
                first = self._seen[i].first if i in self._seen else loss
                self._seen[i] = _Seen(cut.predicted.value, arrived, factor, step.divisor, rows, loss, first)
            self._watch(i, loss, arrived, factor)
            if cut.made is not None and cut.real is not None:
                error = F.mse_loss(cut.made, cut.real.to(cut.made.dtype))
                (error * step.scale).backward()
                loss = loss + error.detach()
            found.append(loss)
        return found

    # Shapes, checks, health ------------------------------------------------------------------------------------

    def _samples_first(self, h: Tensor) -> Tensor:
        return h.transpose(0, 1) if self.batch_dim == 1 and h.ndim > 2 else h

    def _fit_context(self, context: Tensor | None, h: Tensor) -> Tensor | None:
        """Contexts of tokens for activations of tokens, in two axes or one, else their mean for each sample."""
        h = self._samples_first(h)
        if context is None or context.ndim == 2 or (h.ndim == 3 and h.shape[:2] == context.shape[:2]):
            return context
        tokens = h.ndim == 2 and len(h) == context[..., 0].numel()
        return context.flatten(0, -2) if tokens else context.flatten(1, -2).mean(1)

    def _fit_rows(self, rows: Tensor | None, h: Tensor, name: str) -> Tensor | None:
        h = self._samples_first(h)
        if rows is None or (rows.ndim < h.ndim and h.shape[: rows.ndim] == rows.shape):
            return rows
        if rows.ndim > 1:
            rows = rows.flatten() if rows.numel() == len(h) else rows.flatten(1).any(1)
        if len(rows) != len(h):
            raise InvalidInput(
                f"the targets or the mask are of {len(rows)} samples, but the activation at {name!r} is "
                f"{tuple(h.shape)}."
            )
        return rows

    def _fixed(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): value for key, value in self._feedback.items()}

    def _loss(self, output: Any, y: Any, loss_fn: LossFn | None) -> Tensor:
        loss = getattr(output, "loss", None) if loss_fn is None else loss_fn(output, y)
        if loss_fn is None and loss is None and isinstance(output, Mapping):
            loss = output.get("loss")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = (
                "the network returned no 'loss', so give loss_fn" if loss_fn is None else "the loss must be one number"
            )
            raise InvalidInput(f"{what}; it gave {type(loss).__name__}{tuple(getattr(loss, 'shape', ()))}.")
        return loss

    def _refuse_one_row(self, x: Any) -> None:
        first = _first_of(x)
        if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != 1:
            return
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if any(isinstance(m, norms) and m.training for m in self.modules()):
            raise InvalidInput("batch norm cannot normalize a batch of one row; use larger batches or layer norm.")

    def _refuse_untrained(self) -> None:
        for name in self.cuts:
            own = [p for p in self.model.get_submodule(name).parameters() if p.requires_grad]
            if own and all(p.grad is None for p in own):
                raise InvalidInput(
                    f"the part that ends in {name!r} got no gradient: something in it runs without one, such as "
                    "reentrant checkpointing (use use_reentrant=False) or torch.no_grad."
                )

    def _skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _watch(self, i: int, error: Tensor, arrived: Tensor, factor: float) -> None:
        """Warn of a synthesizer whose error outgrows what it is to predict: activations too large for its rate."""
        if self.steps not in (5, 10) and (not self.steps or self.steps % 20):
            return
        size = float((arrived * factor).square().sum()) / max(len(arrived), 1)
        largest = self._largest[i] = max(self._largest.get(i, 0.0), size)
        if float(error.detach()) > 1e3 * max(largest, 1e-300):
            name = self.cuts[i]
            message = (
                f"the synthesizer's error at {name!r} is {float(error.detach()):.3g} at step {self.steps}, while the "
                f"gradients there have squared norms up to {largest:.3g}: it diverges. Lower its learning rate, or "
                "normalize the activation there."
            )
            warn_once(self._warned, f"diverges {name}", message)

    def report(self) -> dict[str, dict[str, float]]:
        """Health of each synthesizer on the last batch.

        Returns
        -------
        dict of str to dict
            By cut: ``cosine`` (mean over rows whose gradient is not zero), ``relative_error`` (squared error over
            squared norm), ``sign``, ``ratio`` of norms, ``zero_rows`` (share of rows without gradient), ``rows``, the
            synthesizer's ``loss`` and its ``first_loss``, and the ``divisor`` that the loss was read with. NaN where no
            row has a gradient. What got none, and why, is counted in ``skipped``.
        """
        numbers = [
            {"loss": float(s.loss), "first_loss": float(s.first), "divisor": s.divisor} for s in self._seen.values()
        ]
        return {
            name: compare_gradients(*learned) | rest
            for (name, learned), rest in zip(self.targets().items(), numbers, strict=True)
        }

    def targets(self) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """What each synthesizer said on the last batch, what it should have said, and which rows count.

        Returns
        -------
        dict of str to tuple
            By cut: predictions and targets, gradients of one sample (B, ...), and rows (B,) or (B, T), or None.
        """
        return {self.cuts[i]: (s.predicted, s.arrived.to(s.loss) * s.factor, s.rows) for i, s in self._seen.items()}

    def get_extra_state(self) -> Tensor:
        """What a file must say besides tensors, as bytes of JSON."""
        state = {"cuts": self.cuts, "credit": self.credit, "steps": self.steps, "scale": self.target_scale}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state of other cuts or another rule."""
        saved = json.loads(bytes(state.tolist()).decode())
        for name, own in (("cuts", list(self.cuts)), ("credit", self.credit), ("scale", self.target_scale)):
            if saved[name] != own:
                raise InvalidInput(f"the saved state has {name} {saved[name]}, but this network has {own}.")
        self.steps = saved["steps"]


class _Finished(Tensor):
    """The loss of a finished step."""

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """Refused: nothing is left to do."""
        raise InvalidInput(
            "training_step has filled all gradients already, so its loss needs no backward(); call optimizer.step()."
        )


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    """The module in training or evaluation mode, set only where it is not: a walk over its parts takes time."""
    return module if module.training == training else module.train(training)


def _dtype(module: nn.Module) -> torch.dtype:
    if type(module) is SyntheticGradient:  # asked in each step, and a walk over parameters takes time
        return next(iter(module.layers._modules["0"].parameters(recurse=False))).dtype
    return next((p.dtype for p in module.parameters()), torch.float32)


def _first_of(x: Any) -> Any:
    """The first of the network's inputs."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Mapping):
        return next(iter(x.values()), None)
    return x[0] if isinstance(x, tuple) and x else x
