"""One step of learning as a pure function, and the network that keeps what it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput, MLCollageError

from . import rule
from ._activations import ACTIVATIONS
from ._layers import Path, from_module, from_sizes
from .genome import Genome, as_genome
from .health import GROWN, LearningHealth, Record, look, say

Feedback = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100  # a label that means: this row is not there


class Diverged(MLCollageError, ArithmeticError):
    """Synapses or logits are no finite numbers any more."""


class Weights(NamedTuple):
    """The synapses of all layers, for each member of a population.

    Attributes
    ----------
    forward
        For each layer (P, C, n [+ 1], m); the last row is the bias's.
    backward
        For each layer (P, C, m, n) where feedback has synapses of its own; empty if they are symmetric. The first
        layer's carry no feedback, since inputs do not change, and have no place here: it is an empty tensor.
    """

    forward: tuple[Tensor, ...]
    backward: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class InnerStep:
    """What a step found and did.

    Attributes
    ----------
    weights
        The new synapses.
    logits
        State 0 of the top layer before the feedback, (P, B, classes).
    statistics
        Mean and variance of each hidden layer's messages, where they are normalized; for predictions.
    states
        States of all layers above the input after the backward pass, the top with its feedback.
    forward_states
        The same before the feedback.
    """

    weights: Weights
    logits: Tensor
    statistics: tuple[tuple[Tensor, Tensor], ...]
    states: tuple[Tensor, ...] = field(repr=False, default=())
    forward_states: tuple[Tensor, ...] = field(repr=False, default=())


class _Pass(NamedTuple):
    inputs: list[Tensor]  # what the synapses of each layer read
    chosen: list[list[Any]]  # what poolings chose
    states: list[Tensor]  # of each layer above the input
    statistics: tuple[tuple[Tensor, Tensor], ...]


def init_weights(
    path: Path, genome: Genome, *, seed: int | Sequence[int], dtype: torch.dtype = torch.float32
) -> Weights:
    """Normal initial synapses, those of the bias included; the genome's ``initial_std`` scales them.

    The draw depends on the seed and the shapes only: members of a population begin alike, up to their scale.

    Parameters
    ----------
    path, genome
        The layers, and one genome or a population.
    seed
        One for all members, or one for each.
    dtype
        Of the synapses.

    Examples
    --------
    >>> from mlcollage.papers.bidirectional_update_rules import BlurNetwork
    >>> [tuple(w.shape) for w in init_weights(BlurNetwork((4, 3, 2)).path, Genome.random(seed=0), seed=1).forward]
    [(1, 2, 5, 3), (1, 2, 4, 2)]
    """
    s, std = genome.settings, genome.lifted().numbers["initial_std"].reshape(-1, 1, 1, 1)
    seeds = [seed] if isinstance(seed, int) else list(seed)
    generators = [generator(n, 0x57) for n in seeds]

    def draw(rows: int, columns: int, fan: int) -> Tensor:
        drawn = torch.stack([torch.randn(s.channels, rows, columns, generator=g) for g in generators])
        scale = fan**-0.5 if s.initial_scale == "fan_in" else 1.0
        return std * drawn.to(std.device, dtype) * scale

    forward: list[Tensor] = []
    for layer in path.layers:
        shared = layer.shared >= 0
        new = forward[layer.shared] if shared else draw(layer.inputs + layer.bias, layer.outputs, layer.inputs)
        forward.append(new)
    if s.symmetric:
        return Weights(tuple(forward))
    if s.tied:
        back = [w[:, :, : layer.inputs].transpose(2, 3) for w, layer in zip(forward, path.layers, strict=True)]
    else:
        back = [draw(layer.outputs, layer.inputs, layer.outputs) for layer in path.layers[1:]]
        back = [forward[0].new_zeros(0), *back]
    return Weights(tuple(forward), (forward[0].new_zeros(0), *back[1:]))


def _normalized(weights: Weights, genome: Genome, when: str) -> Weights:
    if when == "none" or genome.settings.synapse_norm != when:
        return weights
    gains = [genome.layer(i)["synapse_gain"] for i in range(len(weights.forward))]
    return Weights(
        *(
            tuple(rule.normalized(w, g) if w.numel() else w for w, g in zip(part, gains, strict=False))
            for part in weights
        )
    )


def _forward(
    path: Path,
    weights: Weights,
    genome: Genome,
    x: Tensor,
    statistics: Sequence[tuple[Tensor, Tensor]] | None = None,
    before: Sequence[Tensor] | None = None,
) -> _Pass:
    """Layer by layer upward; ``statistics`` normalize instead of the batch's own, ``before`` are kept states."""
    s = genome.settings
    states = path.read(x, weights.forward[0].shape[0])
    inputs, chosen, above, used = [], [], [], []
    for i, (layer, w) in enumerate(zip(path.layers, weights.forward, strict=True)):
        g = genome.layer(i)
        read, saved = layer.gather(states)
        top = i == len(path.layers) - 1
        if s.norm in ("both", "forward") and not top:
            update = rule.per_state(g["update"])[:, :, 0, 0]  # the gate goes to the gain and the shift
            gain, shift = update * g["gain_forward"], update * g["shift_forward"]
            if statistics is not None:
                message = rule.forward_message(read, w, g, bias=layer.bias)
                total, moments = rule.normalize(message, statistics[i], gain, shift), statistics[i]
            elif rule.writes_freely():
                total, moments = rule.message_normalized_by_own(read, w, g, gain, shift, bias=layer.bias)
            else:
                message = rule.forward_message(read, w, g, bias=layer.bias)
                total, moments = rule.normalize_by_own(message, gain, shift)
            used.append(moments)
        else:
            total = rule.per_state(g["update"]) * rule.forward_message(read, w, g, bias=layer.bias)
        if before is not None:
            total = total + rule.per_state(g["keep"]) * before[i]
        states = rule.activate(total, layer.activation, s.second_state)
        inputs.append(read)
        chosen.append(saved)
        above.append(states)
    return _Pass(inputs, chosen, above, tuple(used))


def _backward(path: Path, weights: Weights, genome: Genome, done: _Pass) -> None:
    """Top-down through the hidden layers, in place of the lists' entries; synapses are those of the forward pass."""
    s = genome.settings
    own = ACTIVATIONS[s.backward_activation]
    for i in range(len(path.layers) - 1, 0, -1):
        layer, g = path.layers[i], genome.layer(i)
        back = weights.forward[i][:, :, : layer.inputs].transpose(2, 3) if s.symmetric else weights.backward[i]
        message = layer.scatter(rule.backward_message(done.states[i], back, g), done.chosen[i])
        gated = s.backward == "additive" and s.norm in ("both", "backward")
        if s.norm in ("both", "backward"):
            gate = rule.per_state(g["update"])[:, :, 0, 0] if gated else 1.0  # it goes to the gain and the shift
            message, _ = rule.normalize_by_own(message, gate * g["gain_backward"], gate * g["shift_backward"])
        done.states[i - 1] = rule.feed_back(done.states[i - 1], message, g, s, own, gated=gated)


def _read_again(path: Path, done: _Pass) -> list[Tensor]:
    """What the synapses read once the backward pass has changed the states; poolings choose what they chose before."""
    above = [layer.gather(done.states[i], done.chosen[i + 1])[0] for i, layer in enumerate(path.layers[1:])]
    return [done.inputs[0], *above]


def _changed(
    path: Path, weights: Weights, genome: Genome, read: list[Tensor], above: list[Tensor], prefix: str = ""
) -> Weights:
    """New synapses of all layers, from what they read and the states above them."""
    s = genome.settings
    forward, backward = list(weights.forward), list(weights.backward)
    shares = any(layer.shared >= 0 for layer in path.layers)
    in_one = s.symmetric and s.oja == "none" and s.saturation == "none" and not shares and rule.writes_freely()
    products: dict[int, Tensor] = {}
    gates: dict[int, tuple[Tensor, Tensor, Any]] = {}
    for i, layer in enumerate(path.layers):
        g = genome.layer(i)
        pre, post = g[f"{prefix}hebb_pre"], g[f"{prefix}hebb_post"]
        keep, update = g[f"{prefix}synapse_keep"], g[f"{prefix}synapse_update"]
        # A convolution's positions are all rows of one sample: their products are added, as in a gradient.
        samples = max(1, above[i].shape[2] // layer.positions)
        scale = 1 / samples if s.reduction == "mean" else 1.0
        fans = (layer.inputs * layer.positions, layer.outputs * layer.positions)
        up, down = (scale / n if s.step_scale == "fan_in" else scale for n in fans)
        if in_one:
            step = post * (up * rule.per_state(update)[..., 0])
            new = rule.grown(weights.forward[i], read[i], above[i], keep, pre, step, bias=layer.bias)
            forward[i] = _thawed(layer, weights.forward[i], new)
            continue
        product = rule.hebbian(read[i], above[i], pre, up * post, channels=s.channels, bias=layer.bias)
        product_of_the_way_up = product
        if s.oja != "none":
            product = product + rule.inhibition(weights.forward[i], above[i], g, s)
        home = layer.shared if layer.shared >= 0 else i
        products[home] = products[home] + product if home in products else product
        gates.setdefault(home, (keep, update, g))
        if not s.symmetric and i:
            if s.tied:
                product = product_of_the_way_up[:, :, : layer.inputs].transpose(2, 3)
            else:
                product = rule.hebbian_back(read[i], above[i], down * pre, post, channels=s.channels)
            if s.oja != "none":
                product = product + rule.inhibition(weights.backward[i], read[i], g, s)
            backward[i] = rule.change(weights.backward[i], product, keep, update, g, s.saturation)
    for home, product in products.items():
        keep, update, g = gates[home]
        new = rule.change(weights.forward[home], product, keep, update, g, s.saturation)
        forward[home] = _thawed(path.layers[home], weights.forward[home], new)
    for i, layer in enumerate(path.layers):
        if layer.shared >= 0:
            forward[i] = forward[layer.shared]
    if s.synapse_norm == "in_use":
        forward, backward = ([rule.bounded(w) if w.numel() else w for w in part] for part in (forward, backward))
    return Weights(tuple(forward), tuple(backward))


def _thawed(layer: Any, old: Tensor, new: Tensor) -> Tensor:
    """The new synapses, but for those of a user's frozen parameters."""
    weight, bias = layer.frozen
    if weight:
        new = torch.cat([old[:, :, : layer.inputs], new[:, :, layer.inputs :]], dim=2)
    if bias and layer.bias:
        new = torch.cat([new[:, :, : layer.inputs], old[:, :, layer.inputs :]], dim=2)
    return new


def labels_feedback(logits: Tensor, y: Tensor) -> Tensor:
    """+1 for the true class, -1 for the others, (P, B, classes)."""
    return 2.0 * torch.nn.functional.one_hot(y, logits.shape[-1]).to(logits.dtype) - 1.0


def softmax_feedback(logits: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy by the logits, softmax minus one-hot."""
    return torch.softmax(logits, dim=-1) - torch.nn.functional.one_hot(y, logits.shape[-1]).to(logits.dtype)


_FEEDBACK = {"labels": labels_feedback, "softmax": softmax_feedback}


def functional_forward(
    path: Path,
    weights: Weights,
    genome: Genome,
    x: Tensor,
    statistics: Sequence[tuple[Tensor, Tensor]] | None = None,
    states: Sequence[Tensor] | None = None,
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
    """Logits (P, B, classes) of inputs (P, B, ...), and the statistics that normalized the messages.

    Parameters
    ----------
    path, weights, genome
        ``network.path``, :attr:`BlurNetwork.weights` and :attr:`BlurNetwork.genome`.
    x
        Inputs; P may be 1 for inputs that the whole population shares.
    statistics
        Of an earlier pass or step; None takes those of this batch, so that rows depend on their company.
    states
        Of an earlier step, to be kept; by default neurons begin at zero.
    """
    weights = _normalized(weights, genome, genome.settings.synapse_norm)
    done = _forward(path, weights, genome, x, statistics, states)
    return done.states[-1][:, 0], done.statistics


def functional_step(
    path: Path,
    weights: Weights,
    genome: Genome,
    x: Tensor,
    y: Tensor | None,
    *,
    feedback: Feedback | None = None,
    states: Sequence[Tensor] | None = None,
) -> InnerStep:
    """One step of learning: forward, feedback at the top, backward, change of the synapses.

    Nothing is changed in place. A pure function of tensors: ``torch.func`` and autograd go through it, in the
    weights, the genome and the inputs.

    Parameters
    ----------
    path
        The layers, ``network.path``.
    weights, genome
        Of a population; a genome by itself is a population of one.
    x
        Inputs (P, B, features) or (P, B, channels, height, width).
    y
        Labels (P, B) from 0; or anything that ``feedback`` takes. None: the forward pass only.
    feedback
        Takes logits (P, B, classes) and ``y``, and gives what is written into state 1 of the top layer; default is the
        genome's own, :func:`labels_feedback` or :func:`softmax_feedback`. Where the second state is a derivative, it is
        the gradient of a loss by the activated output, and is multiplied by that derivative.
    states
        Of an earlier step, to be kept; by default neurons begin at zero.

    Returns
    -------
    InnerStep
    """
    s = genome.settings
    weights = _normalized(weights, genome, "stored")
    used = _normalized(weights, genome, "in_use")
    done = _forward(path, used, genome, x, before=states)
    logits, on_the_way_up = done.states[-1][:, 0], tuple(done.states)
    new = weights
    if s.forward_update and y is not None:
        new = _changed(path, new, genome, done.inputs, done.states, "forward_")
        used = _normalized(new, genome, "in_use")
    if y is not None:
        at_first = list(done.inputs)
        signal = (feedback or _FEEDBACK[s.feedback])(logits, y)
        if signal.ndim < 2 or signal.shape[-2:] != logits.shape[-2:]:
            raise InvalidInput(
                f"feedback must be of the logits' shape {tuple(logits.shape)}, not {tuple(signal.shape)}."
            )
        signal = signal.expand_as(logits).unsqueeze(1)  # (P, 1, B, classes)
        if s.second_state == "derivative":
            signal = signal * done.states[-1][:, 1:2]
        rest = torch.zeros_like(done.states[-1][:, 2:])
        done.states[-1] = torch.cat([done.states[-1][:, :1], signal, rest], dim=1)
        _backward(path, used, genome, done)
        read = at_first if s.hebb_pre_states == "forward" else _read_again(path, done)
        new = _changed(path, new, genome, read, done.states)
    return InnerStep(new, logits, done.statistics, tuple(done.states), on_the_way_up)


@dataclass(frozen=True)
class Learned:
    """How a step of :meth:`BlurNetwork.learn` went.

    Attributes
    ----------
    step
        Steps of learning so far.
    rows
        Rows that were learned from; those with label -100 are not.
    accuracy
        Share of them that was predicted right before the change.
    change
        Norm of the change of all synapses, relative to their norm.
    saturated, dead
        Shares of outputs of hidden units at a bound of their activation, and of hidden units that gave all rows the
        same output.
    """

    step: int
    rows: int
    accuracy: float
    change: float
    saturated: float = 0.0
    dead: float = 0.0


class BlurNetwork(nn.Module):
    """A network that a genome trains: no gradient, no loss, no optimizer.

    Parameters
    ----------
    layers
        Numbers of neurons, inputs first, as ``(64, 32, 10)``; or an ``nn.Sequential`` of Linear, Conv2d, activations,
        pooling and Flatten. The weights of its modules become channel 0 of the synapses (the other channels are drawn);
        modules keep their own activations, and frozen parameters stay as they are. The model itself is not changed; see
        :meth:`to_module`.
    genome
        A :class:`Genome`, or the name or file of one. Default: ``digits-2s``, which comes with the package.
    input_shape
        (channels, height, width), for models that begin with a convolution.
    seed
        Of the initial synapses.
    dtype
        Of the synapses, ``float32`` or ``float64``; default: that of the model's weights, or ``float32``. A model's
        device is kept as well.

    Raises
    ------
    InvalidInput
        If the model has a layer that cannot be followed; the message names it and lists what can.

    Notes
    -----
    A max pooling follows state 0 and hands the other states on from the same place. A convolution's positions are
    rows of one sample. A module that occurs twice gets the sum of both changes, as with gradients.

    Examples
    --------
    >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0).long()
    >>> network = BlurNetwork((8, 16, 2), "digits-2s", seed=0)
    >>> for _ in range(10):
    ...     learned = network.learn(x, y)
    >>> learned.step, float((network(x).argmax(1) == y).float().mean()) > 0.8
    (10, True)
    """

    steps: Tensor
    genome_nu: Tensor
    genome_update: Tensor

    def __init__(
        self,
        layers: Sequence[int] | nn.Sequential,
        genome: Genome | str = "digits-2s",
        *,
        input_shape: Sequence[int] | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        genome = as_genome(genome)
        if genome.population not in (None, 1):
            raise InvalidInput(
                f"a network has one genome; this is a population of {genome.population}: take genome[0]."
            )
        s = self.settings = genome.settings
        self.card = genome.card
        self._users = layers if isinstance(layers, nn.Module) else None
        device = genome.numbers["nu"].device
        if isinstance(layers, nn.Module):
            self.path = from_module(layers, input_shape)
            like = next(layers.parameters())
            dtype, device = dtype or like.dtype, like.device
        else:
            self.path = from_sizes(layers, ACTIVATIONS[s.activation], ACTIVATIONS[s.top_activation])
        dtype = dtype or torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise InvalidInput(
                f"synapses must be float32 or float64, not {dtype}, in which small changes are lost by rounding; "
                "inputs may be of any type."
            )
        genome = genome.lifted().map(lambda v: v.detach().to(device, dtype))
        if not bool(torch.isfinite(genome.to_vector()).all()):
            raise InvalidInput("the genome has numbers that are not finite: its training diverged; take another one.")
        if s.layers and s.layers != len(self.path.layers):
            raise InvalidInput(
                f"the genome has numbers for {s.layers} layers; the network has {len(self.path.layers)}."
            )
        for name, value in genome.numbers.items():
            self.register_buffer(f"genome_{name}", value.clone())
        weights = self._with_users(init_weights(self.path, genome, seed=checks.integer("seed", seed), dtype=dtype))
        # Parameters without gradients: they move and are saved with the module, and no optimizer takes them.
        own = [w for w, layer in zip(weights.forward, self.path.layers, strict=True) if layer.shared < 0]
        self._forward_weights = nn.ParameterList([nn.Parameter(w.clone(), requires_grad=False) for w in own])
        self._backward_weights = nn.ParameterList(
            [nn.Parameter(w.clone(), requires_grad=False) for w in weights.backward]
        )
        if s.norm in ("both", "forward"):
            for i, layer in enumerate(self.path.layers[:-1]):
                for name in ("mean", "variance"):
                    self.register_buffer(f"{name}_{i}", torch.full((1, s.k, 1, layer.outputs), torch.nan, dtype=dtype))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._record = Record()
        self._told: set[str] | None = set()  # kinds of advice that were given; None: none is given
        self.register_load_state_dict_pre_hook(_without_wrappers)

    def _with_users(self, weights: Weights) -> Weights:
        """The user's weights in channel 0."""
        forward = list(weights.forward)
        for i, layer in enumerate(self.path.layers):
            if layer.module is None or layer.shared >= 0:
                forward[i] = forward[layer.shared] if layer.shared >= 0 else forward[i]
                continue
            rows = layer.module.weight.detach().reshape(layer.outputs, layer.inputs).T  # type: ignore[operator]
            if layer.bias:
                rows = torch.cat([rows, layer.module.bias.detach()[None]])  # type: ignore[operator]
            forward[i] = forward[i].clone()
            forward[i][0, 0] = rows
        if self.settings.tied:
            back = [w[:, :, : e.inputs].transpose(2, 3) for w, e in zip(forward[1:], self.path.layers[1:], strict=True)]
            return Weights(tuple(forward), (weights.backward[0], *back))
        return Weights(tuple(forward), weights.backward)

    # ------------------------------------------------------------------ what it holds

    @property
    def genome(self) -> Genome:
        """The genome, as a population of one, on the network's device."""
        names = self.settings.shapes()
        return Genome(self.settings, {n: getattr(self, f"genome_{n}") for n in names}, self.card)

    @property
    def weights(self) -> Weights:
        """The synapses, a population of one; for :func:`functional_step`."""
        own = iter(self._forward_weights)
        forward: list[Tensor] = []
        for layer in self.path.layers:
            forward.append(next(own) if layer.shared < 0 else forward[layer.shared])
        return Weights(tuple(forward), tuple(self._backward_weights))

    @weights.setter
    def weights(self, new: Weights) -> None:
        with torch.no_grad():  # copied, so that what inference mode made can be differentiated later
            own = [w for w, layer in zip(new.forward, self.path.layers, strict=True) if layer.shared < 0]
            for parameter, w in zip(
                (*self._forward_weights, *self._backward_weights), (*own, *new.backward), strict=True
            ):
                parameter.copy_(w)

    @property
    def statistics(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Mean and variance of each hidden layer's messages, by which predictions are normalized."""
        if self.settings.norm not in ("both", "forward"):
            return ()
        return tuple(
            (getattr(self, f"mean_{i}"), getattr(self, f"variance_{i}")) for i in range(len(self.path.layers) - 1)
        )

    def _keep(self, statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for i, (mean, variance) in enumerate(statistics):
                getattr(self, f"mean_{i}").copy_(mean)
                getattr(self, f"variance_{i}").copy_(variance)

    # ------------------------------------------------------------------ use

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes); a row's do not depend on the other rows, since the statistics are stored ones.

        Raises
        ------
        InvalidInput
            If messages are normalized and no statistics are known yet.
        """
        statistics = self.statistics
        if statistics and bool(torch.isnan(statistics[0][0]).all()):
            raise InvalidInput(
                "the network has learned nothing yet, so that no statistics are known; call learn first."
            )
        with torch.autocast(self.genome_nu.device.type, enabled=False):
            logits = functional_forward(self.path, self.weights, self.genome, self._inputs(x)[None], statistics)[0][0]
        if not bool(torch.isfinite(logits).all()):  # argmax would call them class 0
            raise Diverged(
                "the logits are not finite: the network has diverged, or was given such synapses; train anew."
            )
        return logits

    def calibrate(self, x: Tensor) -> None:
        """Take the statistics that normalize predictions from these rows, best all of the training set."""
        if self.statistics:
            with torch.inference_mode():
                statistics = functional_forward(self.path, self.weights, self.genome, self._inputs(x, least=2)[None])[1]
            self._keep(statistics)
            self._record.calibrated = True

    def health(self, *, kept: bool = False) -> LearningHealth:
        """How learning went since the network was made, with advice in words; ``learn`` warns of the same.

        ``kept`` says that the synapses of the best step were put back, so that a fall of accuracy does no harm.
        """
        norm = _norm((*self._forward_weights, *self._backward_weights))
        # normalized in use, the size of synapses does no harm until it is no finite number
        grown = GROWN if self.settings.synapse_norm == "none" else 1e30
        return self._record.report(
            norm, normalized=bool(self.statistics), horizon=self.card.get("horizon"), grown=grown, kept=kept
        )

    def learn(self, x: Tensor, y: Tensor, *, feedback: Feedback | None = None) -> Learned:
        """One step: forward, feedback, backward, Hebbian change; under inference mode, without gradients.

        Parameters
        ----------
        x
            Inputs (B, features) or (B, channels, height, width).
        y
            Classes from 0, (B,); rows labeled -100 are left out, of the statistics too. With ``feedback``, anything
            that it takes, (B, ...).
        feedback
            As in :func:`functional_step`; for targets that are no classes.

        Raises
        ------
        InvalidInput
            If inputs or labels do not fit, or if there is one row and messages are normalized.
        Diverged
            If synapses would be no finite numbers any more; they stay as they were.
        """
        x = self._inputs(x, least=0, finite=False)
        if feedback is None:
            y = self._labels(y, len(x))
            if bool((there := y != IGNORED).logical_not().any()):
                x, y = x[there], y[there]
        x = self._inputs(x, least=0)  # rows that are not there may hold anything
        if not len(x):
            return Learned(int(self.steps), 0, float("nan"), 0.0)
        if self.settings.norm != "none" and len(x) * self.path.layers[0].positions < 2:
            raise InvalidInput(
                "a batch of one row has no statistics; use at least 2 rows, or a genome with norm='none'."
            )
        old = self.weights
        # Autocast would take the sums over a batch in half precision.
        with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
            step = functional_step(self.path, old, self.genome, x[None], y[None], feedback=feedback)
            before, after = old.forward + old.backward, step.weights.forward + step.weights.backward
            size, moved = _norm(before), _norm([a - b for a, b in zip(after, before, strict=True)])
            accuracy = float("nan")
            if feedback is None:
                accuracy = float((step.logits[0].argmax(-1) == y).float().mean())
            saturated, dead = look(self.path, step.forward_states)
        if not moved < float("inf"):
            self._diverged(step.weights, size)
        self.weights = step.weights
        self._keep(step.statistics)
        self.steps += 1
        labels = y if feedback is None else None
        self._record.note(accuracy, labels, self.path.classes, size, saturated, dead, len(x))
        # at steps 1, 2, 4, 8 and so on
        said = list(self.health().advice) if self._record.steps.bit_count() == 1 else []
        trained = self.card.get("batch_size")
        if self._record.steps == 1 and self.settings.reduction == "sum" and trained and trained != len(x):
            said.append(
                f"The genome was trained on batches of {trained} rows, and its steps grow with them; this one has "
                f"{len(x)}."
            )
        say(said, self._told)
        return Learned(int(self.steps), len(x), accuracy, moved / max(size, 1e-30), saturated, dead)

    def _diverged(self, new: Weights, size: float) -> None:
        names = [e.name for e in self.path.layers]
        bad = [n for n, w in zip(names, new.forward, strict=True) if not bool(torch.isfinite(w).all())]
        raise Diverged(
            f"step {int(self.steps) + 1} would make synapses of layer {(bad or names)[0]} infinite (their norm was "
            f"{size:.3g}); they were left as they were. Standardize the inputs, or use a genome with oja='weights' or "
            "synapse_norm='in_use'."
        )

    def _inputs(self, x: Tensor, *, least: int = 1, finite: bool = True) -> Tensor:
        x = _tensor("inputs", x)
        like = self.genome_nu
        shape = self.path.input_shape
        if x.ndim != 1 + len(shape) or tuple(x.shape[1:]) != shape:
            told = "(batch, features)" if len(shape) == 1 else "(batch, channels, height, width)"
            raise InvalidInput(
                f"rows must be {told} with {shape} each; got {tuple(x.shape)}. Images become features by x.flatten(1)."
            )
        if len(x) < least:
            raise InvalidInput(f"at least {least} rows are needed; got {len(x)}.")
        if x.dtype.is_complex or x.dtype is torch.bool:
            raise InvalidInput(f"inputs must be real numbers, not {x.dtype}.")
        if x.device != like.device:
            raise InvalidInput(
                f"inputs are on {x.device}, the network and its genome on {like.device}; move one of them."
            )
        # Sums over a batch overflow in half precision: synapses and sums keep the network's own type.
        x = x.detach().to(like.dtype)
        if finite and not bool(torch.isfinite(x).all()):
            raise InvalidInput("inputs have values that are not finite; replace or leave out those rows.")
        return x

    def _labels(self, y: Tensor, rows: int) -> Tensor:
        y = _tensor("labels", y)
        classes = self.path.classes
        if classes < 2:
            raise InvalidInput("a network with one output cannot get feedback for classes; give it two outputs.")
        if y.ndim != 1 or len(y) != rows:
            raise InvalidInput(
                f"y must be class numbers of shape ({rows},), not {tuple(y.shape)}; one-hot rows: y.argmax(1)."
            )
        if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype is torch.bool:
            raise InvalidInput(
                f"y must be class numbers from 0 as integers, not {y.dtype}; for targets, give feedback."
            )
        y = y.long()
        wrong = (y != IGNORED) & ((y < 0) | (y >= classes))
        if bool(wrong.any()):
            raise InvalidInput(
                f"y must hold classes from 0 to {classes - 1}, or {IGNORED} for rows that are not there; "
                f"it has {int(y[wrong][0])}."
            )
        return y

    def to_module(self) -> nn.Module:
        """The network as plain modules, for those genomes whose forward pass is one.

        Raises
        ------
        InvalidInput
            If state 0 of the forward pass depends on the other states, or messages are normalized.
        """
        s, nu = self.settings, self.genome_nu[0]
        if s.layers or s.norm in ("both", "forward") or bool((nu[1:, 0] != 0).any()) or s.synapse_norm == "in_use":
            raise InvalidInput(
                "the forward pass of this genome mixes states or normalizes messages, so that no plain network "
                "computes the same; use the BlurNetwork itself."
            )
        scale = nu[0, 0] * self.genome_update[0]
        targets: list[Any]
        if self._users is not None:
            model = copy.deepcopy(self._users)
            copied = dict(zip([id(m) for m in self._users.modules()], model.modules(), strict=True))
            targets = [copied[id(layer.module)] for layer in self.path.layers]
        else:
            # without a draw from the global generator: the weights are copied below
            targets = [nn.utils.skip_init(nn.Linear, layer.inputs, layer.outputs) for layer in self.path.layers]
            names = [s.activation] * (len(targets) - 1) + [s.top_activation]
            pairs = zip(targets, names, strict=True)
            model = nn.Sequential(*(m for linear, name in pairs for m in (linear, _Function(name)))).to(nu)
        with torch.no_grad():
            for layer, w, target in zip(self.path.layers, self.weights.forward, targets, strict=True):
                target.weight.copy_((scale * w[0, 0, : layer.inputs]).T.reshape(target.weight.shape))
                if layer.bias:
                    target.bias.copy_(scale * w[0, 0, -1])
        return model


def _norm(parts: Sequence[Tensor]) -> float:
    return sum(float(w.double().square().sum()) for w in parts) ** 0.5


def _tensor(what: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidInput(
            f"{what} must be a tensor or an array of numbers, not {type(value).__name__}; tables have to_numpy()."
        ) from error


class _Function(nn.Module):
    """A named activation as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name].function(x)


def _without_wrappers(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Names as they were before ``torch.compile`` or ``DataParallel`` wrapped the network."""
    for name in list(state):
        bare = name.removeprefix(prefix)
        while bare.startswith(("_orig_mod.", "module.")):
            bare = bare.split(".", 1)[1]
        if (renamed := prefix + bare) != name and name.startswith(prefix):
            state[renamed] = state.pop(name)
