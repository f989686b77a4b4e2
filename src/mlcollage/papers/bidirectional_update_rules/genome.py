"""The genome: a handful of numbers, shared by all neurons, layers and tasks, that say how a network learns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.infer import tensor_file

from ._activations import ACTIVATIONS

_KIND = "genome of bidirectional update rules"
BackwardRule = Literal["additive", "multiplicative", "multiplicative_second", "none"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "backward": ("additive", "multiplicative", "multiplicative_second", "none"),
    "norm": ("both", "forward", "backward", "none"),
    "second_state": ("activation", "derivative"),
    "oja": ("none", "weights", "activations"),
    "synapse_norm": ("none", "in_use", "stored"),
    "saturation": ("none", "tanh", "exp", "exp_tanh"),
    "feedback": ("labels", "softmax"),
    "reduction": ("mean", "sum"),
    "initial_scale": ("fan_in", "plain"),
    "step_scale": ("fan_in", "plain"),
    "hebb_pre_states": ("backward", "forward"),
}


@dataclass(frozen=True)
class GenomeSettings:
    r"""What a genome's numbers mean: the variant of the rule.

    Parameters
    ----------
    k
        States of a neuron, and channels of a synapse.
    symmetric
        Feedback travels over the transpose of the forward synapses; else over synapses of its own, which learn too.
    multistate
        A synapse has a channel for each state; else one channel serves all.
    backward
        How feedback changes a neuron: ``additive`` (paper, eq. 6), ``multiplicative``, ``multiplicative_second``
        (state 0 is kept, the others are multiplied; backprop is of this kind), or ``none`` (it replaces the state).
        The update gate has no part in the multiplicative ones.
    norm
        Where messages are normalized over the batch, per neuron and state, with gains and shifts in the genome:
        ``both`` ways, ``forward``, ``backward`` or ``none``. The top layer is never normalized.
    activation, backward_activation
        Names from :data:`ACTIVATIONS`, of hidden layers. A network made of a user's modules has its own activations.
    top_activation
        That of the last layer on the way forward.
    second_state
        What a layer's activation does to states above 0: the same (``activation``), or its ``derivative``, as backprop
        needs.
    oja
        The term that bounds synapses: from the ``weights`` (its first part, which the authors kept), from the
        post-synaptic ``activations``, or ``none``.
    tied
        Of asymmetric synapses: those that run back get the transposed Hebbian product of the forward ones. This is what
        the official code calls symmetric; the Oja term and the normalization of synapses make the two differ in time.
    synapse_norm
        Divide synapses by the norm of those that reach the same neuron, the bias's included, times the genome's
        ``synapse_gain``: only ``in_use``, or as they are ``stored``. Symmetric feedback uses the result's transpose.
    saturation
        ``tanh``: synapses pass through s·tanh(w/s); ``exp``: changes shrink by exp(-abs(w)·s).
    feedback
        What is written into state 1 of the top layer: +1 for the true class and -1 for others (``labels``), or the
        gradient of the cross-entropy (``softmax``), which backprop needs.
    reduction
        The Hebbian product is summed over the rows of a batch as in the official code, or their ``mean`` is taken,
        which makes a genome independent of the batch size.
    initial_scale
        Initial synapses have deviation ``initial_std`` / √inputs (``fan_in``), or ``initial_std`` (``plain``, as in the
        official code).
    step_scale
        Hebbian products are divided by the number of a neuron's senders, and of its positions in a convolution
        (``fan_in``), so that one genome fits narrow and wide layers; or not (``plain``, official, as gradients are).
    hebb_pre_states
        Pre-synaptic states in the Hebbian product: as the ``backward`` pass left them, or as the ``forward`` pass did.
    forward_update
        Synapses change after the forward pass too, by matrices and gates of their own.
    layers
        Number of synapse layers that have numbers of their own; 0: all share them.
    """

    k: int = 2
    symmetric: bool = True
    tied: bool = False
    multistate: bool = True
    backward: BackwardRule = "additive"
    norm: Literal["both", "forward", "backward", "none"] = "both"
    activation: str = "tanh"
    backward_activation: str = "tanh"
    top_activation: str = "identity"
    second_state: Literal["activation", "derivative"] = "activation"
    oja: Literal["none", "weights", "activations"] = "none"
    synapse_norm: Literal["none", "in_use", "stored"] = "none"
    saturation: Literal["none", "tanh", "exp", "exp_tanh"] = "none"
    feedback: Literal["labels", "softmax"] = "labels"
    reduction: Literal["mean", "sum"] = "mean"
    initial_scale: Literal["fan_in", "plain"] = "fan_in"
    step_scale: Literal["fan_in", "plain"] = "fan_in"
    hebb_pre_states: Literal["backward", "forward"] = "backward"
    forward_update: bool = False
    layers: int = 0

    def __post_init__(self) -> None:
        if checks.integer("k", self.k, least=1) < 2:
            raise InvalidInput("k=1: a genome needs at least 2 states, one for the prediction, one for the feedback.")
        checks.integer("layers", self.layers, least=0)
        for name, known in _CHOICES.items():
            checks.choice(name, getattr(self, name), known)
        for name in ("activation", "backward_activation", "top_activation"):
            checks.choice(name, getattr(self, name), ACTIVATIONS)
        if self.tied and self.symmetric:
            raise InvalidInput("tied=True is about asymmetric synapses; give symmetric=False too.")
        if self.second_state == "derivative" and self.backward == "additive":
            raise InvalidInput(
                "backward='additive' with second_state='derivative' is not backprop: its second state must be "
                "multiplied by the feedback; use backward='multiplicative_second'."
            )

    @property
    def channels(self) -> int:
        """Channels that a synapse stores."""
        return self.k if self.multistate else 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every number of the genome."""
        k, s = (self.k,), dict[str, tuple[int, ...]]()
        s |= dict.fromkeys(("nu", "mu", "hebb_pre", "hebb_post"), (self.k, self.k))
        s |= dict.fromkeys(("keep", "update", "synapse_keep", "synapse_update"), ())
        for way in ("forward", "backward"):
            if self.norm in ("both", way):
                s |= {f"gain_{way}": k, f"shift_{way}": k}
        if self.forward_update:
            s |= {"forward_hebb_pre": (self.k, self.k), "forward_hebb_post": (self.k, self.k)}
            s |= {"forward_synapse_keep": (), "forward_synapse_update": ()}
        if self.oja != "none":
            s["oja"] = ()
        if self.saturation != "none":
            s["saturation"] = ()
        if self.synapse_norm != "none":
            s["synapse_gain"] = ()
        if self.layers:
            s = {name: (self.layers, *shape) for name, shape in s.items()}
        return {**s, "initial_std": ()}


class Genome:
    r"""The numbers of an update rule, or of a population of rules that share their settings.

    With states :math:`a_i^c` of neuron i, channels :math:`w_{ij}^c` of the synapse from i to j, and messages
    normalized where the settings say so, one step of learning is (paper, eqs. 5 to 7; rows of the matrices are *from*
    states, as in the official code)

    .. math:: a_j^c \leftarrow \sigma(f a_j^c + \eta \sum_{i,d} w_{ij}^c \nu^{dc} a_i^d)

    .. math:: a_i^c \leftarrow \sigma(f a_i^c + \eta \sum_{j,d} w_{ji}^c \mu^{dc} a_j^d)

    .. math:: w_{ij}^c \leftarrow \tilde f w_{ij}^c + \tilde\eta \sum_{e,d} a_i^e \tilde\nu^{ec} \tilde\mu^{cd} a_j^d

    Parameters
    ----------
    settings
        The variant.
    numbers
        A tensor for each name in ``settings.shapes()``: ``nu``, ``mu``, ``hebb_pre`` (ν̃) and ``hebb_post`` (μ̃, rows are
        channels) of shape (k, k); ``keep`` (f), ``update`` (η), ``synapse_keep`` (f̃), ``synapse_update`` (η̃, which is
        added) without dimensions; gains and shifts (k,). All may have one more dimension in front, the population.
    card
        What is known of the genome: tasks, horizon, seeds, validation. Plain values; it is saved with the numbers.

    Raises
    ------
    InvalidInput
        If a number is missing, superfluous or of a wrong shape.

    Examples
    --------
    >>> genome = Genome.random(k=2, seed=0)
    >>> genome.to_vector().shape
    torch.Size([29])
    >>> Genome.random(k=2, seed=0, population=5)[3].population is None
    True
    """

    def __init__(
        self, settings: GenomeSettings, numbers: Mapping[str, Tensor], card: Mapping[str, Any] | None = None
    ) -> None:
        shapes = settings.shapes()
        if set(shapes) != set(numbers):
            raise InvalidInput(
                f"this variant has the numbers {', '.join(shapes)}; "
                f"missing: {sorted(set(shapes) - set(numbers))}, superfluous: {sorted(set(numbers) - set(shapes))}."
            )
        extra = numbers["nu"].ndim - len(shapes["nu"])
        lead = tuple(numbers["nu"].shape[:1]) if extra == 1 else ()
        for name, shape in shapes.items():
            if tuple(numbers[name].shape) != (*lead, *shape):
                raise InvalidInput(
                    f"{name} of the genome must have shape {(*lead, *shape)}, not {tuple(numbers[name].shape)}."
                )
        self.settings = settings
        self.numbers = {name: numbers[name] for name in shapes}
        self.card = dict(card or {})

    # ------------------------------------------------------------------ making

    @classmethod
    def random(
        cls, k: int = 2, *, seed: int, population: int | None = None, spread: float = 1.0, **settings: Any
    ) -> Genome:
        """Transforms with standard normal entries; gates that keep synapses and change them a little.

        Parameters
        ----------
        k, settings
            Of :class:`GenomeSettings`.
        seed
            Of the draw; the global random state is left alone.
        population
            How many, in one object; None: one without that dimension.
        spread
            Deviation of the entries.
        """
        s = GenomeSettings(k=k, **settings)
        checks.positive("spread", spread)
        g = generator(checks.integer("seed", seed, least=0), 0x6E)
        count = 1 if population is None else checks.integer("population", population, least=1)
        numbers = {}
        for name, shape in s.shapes().items():
            if name.endswith(("hebb_pre", "hebb_post")) or name in ("nu", "mu"):
                numbers[name] = spread * torch.randn(count, *shape, generator=g)
            else:
                numbers[name] = torch.full((count, *shape), _NEUTRAL[name])
        genome = cls(s, numbers)
        return genome[0] if population is None else genome

    @classmethod
    def backprop(
        cls,
        k: int = 2,
        *,
        learning_rate: float = 0.1,
        noise: float = 0.0,
        seed: int = 0,
        population: int | None = None,
        exact: bool = True,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Genome:
        """Stochastic gradient descent as a genome (paper, sec. 3.1), or genomes that begin beside it.

        Parameters
        ----------
        k
            States; those above 1 are idle.
        learning_rate
            Of gradient descent on the mean loss, or on the sum with ``reduction="sum"``.
        noise
            Deviation of normal noise added to the matrices, so that a population differs.
        seed, population
            As in :meth:`random`.
        exact
            The settings with which it *is* backprop: one symmetric channel, multiplicative second state, derivative as
            second state, no normalization, feedback by softmax. False: only the matrices, "backprop init" of sec. 4.5.
        dtype
            Of the numbers; a learning rate of 0.1 is another number in single precision.
        settings
            Replace those.

        Examples
        --------
        >>> Genome.backprop().numbers["nu"]
        tensor([[1., 1.],
                [0., 0.]])
        """
        own: dict[str, Any] = {}
        if exact:
            own = {"symmetric": True, "multistate": False, "backward": "multiplicative_second", "norm": "none"}
            own |= {"second_state": "derivative", "backward_activation": "identity", "oja": "none"}
            own |= {"synapse_norm": "none", "saturation": "none", "forward_update": False}
            if different := [name for name in own if settings.get(name, own[name]) != own[name]]:
                name = different[0]
                raise InvalidInput(
                    f"with {name}={settings[name]!r} the genome is not backprop, which needs {name}={own[name]!r}; "
                    "exact=False gives its matrices under any settings."
                )
            own |= {"feedback": "softmax", "step_scale": "plain"}
        s = GenomeSettings(k=k, **{**own, **settings})
        g = generator(checks.integer("seed", seed, least=0), 0xB9)
        count = 1 if population is None else checks.integer("population", population, least=1)
        start = {"nu": torch.zeros(k, k), "mu": torch.eye(k), "hebb_pre": torch.eye(k), "hebb_post": torch.eye(k)}
        start["nu"][0, :2] = 1.0
        start["hebb_post"][:2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        numbers = {}
        for name, shape in s.shapes().items():
            base = start[name].expand(shape) if name in start else torch.full(shape, _NEUTRAL[name])
            numbers[name] = base.repeat(count, *[1] * len(shape))
            numbers[name] = numbers[name].to(dtype)
            if name in start and noise:
                numbers[name] = numbers[name] + noise * torch.randn(count, *shape, generator=g)
        # Feedback by labels points to the truth, a gradient away from it.
        sign = -1.0 if s.feedback == "softmax" else 1.0
        numbers["synapse_update"] = torch.full_like(numbers["synapse_update"], sign * learning_rate)
        genome = cls(s, numbers)
        return genome[0] if population is None else genome

    @classmethod
    def stack(cls, genomes: Sequence[Genome]) -> Genome:
        """A population of genomes that share their settings."""
        if not genomes:
            raise InvalidInput("genomes is empty; give at least one.")
        different = next((g for g in genomes if g.settings != genomes[0].settings), None)
        if different is not None:
            raise InvalidInput(
                f"genomes of one population share their settings; these differ: {genomes[0].settings} and "
                f"{different.settings}."
            )
        parts = [g.lifted() for g in genomes]
        return cls(genomes[0].settings, {n: torch.cat([p.numbers[n] for p in parts]) for n in parts[0].numbers})

    # ------------------------------------------------------------------ a population

    @property
    def population(self) -> int | None:
        """How many members; None for a genome by itself."""
        nu = self.numbers["nu"]
        return int(nu.shape[0]) if nu.ndim > 2 + bool(self.settings.layers) else None

    def lifted(self) -> Genome:
        """The same as a population: of one, if it was by itself."""
        if self.population is not None:
            return self
        return Genome(self.settings, {n: v.unsqueeze(0) for n, v in self.numbers.items()}, self.card)

    def __getitem__(self, member: int | Sequence[int] | Tensor | slice) -> Genome:
        """A member, or some of them as a population."""
        if self.population is None:
            raise InvalidInput("this genome is no population; it has no members.")
        return Genome(self.settings, {n: v[member] for n, v in self.numbers.items()}, self.card)

    def __len__(self) -> int:
        return self.population or 1

    def __iter__(self) -> Iterator[Genome]:
        return (self.lifted()[i] for i in range(len(self)))

    def layer(self, index: int) -> dict[str, Tensor]:
        """The numbers of a synapse layer, with the population in front."""
        lifted = self.lifted().numbers
        if not self.settings.layers:
            return lifted
        return {n: v if n == "initial_std" else v[:, index] for n, v in lifted.items()}

    # ------------------------------------------------------------------ other forms

    def to(self, *args: Any, **options: Any) -> Genome:
        """On another device, or in another type, as ``Tensor.to``."""
        return self.map(lambda v: v.to(*args, **options))

    def map(self, function: Any) -> Genome:
        """The genome with a function applied to each tensor."""
        return Genome(self.settings, {n: function(v) for n, v in self.numbers.items()}, self.card)

    def with_settings(self, **settings: Any) -> Genome:
        """The same numbers under other settings; those that are new begin neutral, those without a place are left."""
        s = replace(self.settings, **settings)
        lead = () if self.population is None else (self.population,)
        like = self.numbers["nu"]
        made = {
            n: self.numbers[n] if n in self.numbers else like.new_full((*lead, *shape), _NEUTRAL[n])
            for n, shape in s.shapes().items()
        }
        return Genome(s, made, self.card)

    def to_vector(self) -> Tensor:
        """All numbers, ``(d,)``, or ``(P, d)`` of a population; in the order of ``settings.shapes()``."""
        lead = () if self.population is None else (self.population,)
        return torch.cat([v.reshape(*lead, -1) for v in self.numbers.values()], dim=-1)

    def from_vector(self, vector: Tensor) -> Genome:
        """A genome of these settings from what :meth:`to_vector` gave, for any population: ``(d,)`` or ``(P, d)``.

        Examples
        --------
        >>> genome = Genome.random(k=3, seed=1)
        >>> bool((genome.from_vector(genome.to_vector()).numbers["mu"] == genome.numbers["mu"]).all())
        True
        """
        shapes = self.settings.shapes()
        sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
        if vector.ndim not in (1, 2) or vector.shape[-1] != sum(sizes):
            raise InvalidInput(f"a vector of this genome has {sum(sizes)} numbers; got shape {tuple(vector.shape)}.")
        parts = vector.split(sizes, dim=-1)
        return Genome(
            self.settings,
            {n: p.reshape((*vector.shape[:-1], *s)) for (n, s), p in zip(shapes.items(), parts, strict=True)},
            self.card,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write numbers, settings and card to a safetensors file; the old one stays until the new one is complete."""
        settings = {**asdict(self.settings)}
        return tensor_file.save(path, _KIND, {"settings": settings, "numbers": self.numbers, "card": self.card})

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Genome:
        """Read a file, or a genome that comes with the package by its name.

        Raises
        ------
        UnknownName
            If there is no shipped genome of that name.
        MissingFile, InvalidInput
            If there is no such file, or it is damaged or holds something else.

        Examples
        --------
        >>> Genome.load("digits-2s").settings.k
        2
        """
        path = Path(name)
        # a bare word is a name, all else a file
        if path.suffix != ".safetensors" and not path.exists() and path.name == str(name):
            path = _FOLDER / f"{checks.choice('genome', str(name), shipped_genomes())}.safetensors"
        found = tensor_file.load(path, _KIND)
        known = {f.name for f in fields(GenomeSettings)}
        if unknown := set(found["settings"]) - known:
            raise InvalidInput(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}.")
        return cls(GenomeSettings(**found["settings"]), found["numbers"], found["card"])

    def __repr__(self) -> str:
        s = self.settings
        kind = ", ".join(
            (
                s.backward,
                "symmetric" if s.symmetric else "asymmetric",
                "multi-channel" if s.multistate else "single-channel",
                f"norm {s.norm}",
            )
        )
        several = "" if self.population is None else f"{self.population} x "
        return f"Genome({several}{s.k} states, {kind}; {self.to_vector().shape[-1]} numbers)"


_NEUTRAL = {
    **dict.fromkeys(("keep", "update", "synapse_keep", "forward_synapse_keep"), 1.0),
    **dict.fromkeys(("gain_forward", "gain_backward", "initial_std", "oja", "saturation", "synapse_gain"), 1.0),
    **dict.fromkeys(("shift_forward", "shift_backward"), 0.0),
    **dict.fromkeys(("synapse_update", "forward_synapse_update"), -1.0),
}
_FOLDER = Path(str(resources.files(__package__))) / "genomes"


def shipped_genomes() -> list[str]:
    """Names of the genomes that come with the package.

    Examples
    --------
    >>> "digits-2s" in shipped_genomes()
    True
    """
    return sorted(file.stem for file in _FOLDER.glob("*.safetensors"))


def as_genome(genome: Genome | str | os.PathLike[str]) -> Genome:
    """A genome, or the one that a name or file stands for."""
    if isinstance(genome, Genome):
        return genome
    if isinstance(genome, str | os.PathLike):
        return Genome.load(genome)
    raise UnknownName(
        f"genome must be a Genome, a file or one of {', '.join(shipped_genomes())}; not {type(genome).__name__}."
    )
