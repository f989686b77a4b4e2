"""Which network draws belong to: files keep it, so that no other network predicts with them in silence.

Names and shapes of parameters do not tell a tanh from a ReLU, nor one frozen backbone from another. A file therefore
holds a digest of every frozen value, and what network, likelihood and prior gave at a few made-up inputs and targets
(never data), at weights that follow from a seed. Behavior rather than code is compared: a class that was renamed or
moved is the same network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mlcollage.nn import logits_of
from mlcollage.nn.signature import other_layer, signature

from .backends import exact_matmul
from .function import NetworkFunction
from .layout import Layout

_PROBES = 8  # made-up data
_RTOL = 1e-4  # devices, types and versions round differently
_COUNTERS = ("num_batches_tracked",)  # which no output depends on


def identity(network: NetworkFunction, x: Tensor | None, y: Tensor | None) -> dict[str, Any]:
    """What tells this network from others, for a file.

    Parameters
    ----------
    network
        With likelihood and prior.
    x, y
        Inputs and targets (n, ...) whose shapes, types and ranges the made-up ones share; None if not known, then
        outputs (and without targets likelihoods) are not compared.

    Returns
    -------
    dict
        Tensors and words, as :func:`~mlcollage.infer.tensor_file.save` takes them.
    """
    numbers = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {"inputs": None if x is None else _like(x, numbers)}
    made["targets"] = None if x is None or y is None else _like(y, numbers)
    return made | _behavior(network, made)


def other_network(written: Mapping[str, Any], network: NetworkFunction) -> str | None:
    """What makes this network another one than the file's, in words; None if it is the same.

    Parameters
    ----------
    written
        From :func:`identity`.
    network
        Of the same layout.
    """
    here = _behavior(network, written)
    for name in dict.fromkeys((*written["frozen"], *here["frozen"])):
        if written["frozen"].get(name) != here["frozen"].get(name):
            return f"its frozen value {name} is another one"
    if not _alike(written["outputs"], here["outputs"], most=True):
        where = other_layer(written["layers"], here["layers"])
        return "its outputs at equal weights are others" + (f" ({where})" if where else "")
    for part in ("likelihood", "prior"):
        same = _alike(written[f"at_{part}"], here[f"at_{part}"], most=part == "likelihood")
        if not same or written[part][0] != here[part][0]:
            words = [of[part][1] for of in (written, here)]
            told = f" ({words[0]} there, {words[1]} here)" if words[0] != words[1] else ""
            return f"its {part} is another one{told}"
    return None


def _behavior(network: NetworkFunction, probes: Mapping[str, Any]) -> dict[str, Any]:
    """Digests of what is frozen, and what network, likelihood and prior give at the probes."""
    here = network.parameters_flat
    q = _position(network.layout).to(here)  # (P,)
    outputs = _outputs(network, q, probes["inputs"])  # (m, ...)
    scores = _scores(network, outputs, probes["targets"])  # (m,)
    # a number for each parameter, so that a small one's prior is not lost among millions
    by_name = network.layout.unflatten(network.placed_prior.gradient(q[None])[0])
    return {
        "frozen": _frozen(network),
        "layers": signature(network.module),
        "outputs": None if outputs is None else outputs.double().reshape(len(outputs), -1),
        "at_likelihood": scores,
        "at_prior": torch.stack([part.double().norm() for part in by_name.values()]),
        "likelihood": _words(network.likelihood),
        "prior": _words(network.prior),
    }


def _like(values: Tensor, numbers: torch.Generator) -> Tensor:
    """Made-up data in the range of each entry of (n, ...): whole where all are, so that labels and tokens are some."""
    low, high = values.amin(dim=0).cpu(), values.amax(dim=0).cpu()
    part = torch.rand((_PROBES, *low.shape), generator=numbers, dtype=torch.float64)
    made = low.double() + part * (high.double() - low.double())
    whole = not values.dtype.is_floating_point or bool((values == values.round()).all())
    return (made.round() if whole else made).to(values.dtype)


def _position(layout: Layout) -> Tensor:
    """Weights of a seed, (P,), of the size at which signals pass through a network."""
    numbers, parts = torch.Generator().manual_seed(1), list[Tensor]()
    for shape in layout.shapes:
        drawn = torch.randn(shape, generator=numbers, dtype=torch.float64)
        parts.append((drawn / max(drawn[0].numel(), 1) ** 0.5 if drawn.ndim > 1 else drawn).reshape(-1))
    return torch.cat(parts)


def _outputs(network: NetworkFunction, q: Tensor, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    try:
        with torch.no_grad(), exact_matmul(q.device):
            return logits_of(functional_call(network.module, network.layout.unflatten(q), (network.inputs(x),)))
    except Exception:  # whatever a network of one's own does with inputs that were made up
        return None


def _scores(network: NetworkFunction, outputs: Tensor | None, y: Tensor | None) -> Tensor | None:
    if outputs is None or y is None:
        return None
    try:
        checked = network.likelihood.check(outputs, y.to(outputs.device))
        return network.likelihood.log_prob(outputs, checked).detach().double()
    except Exception:  # whatever a likelihood of one's own does with targets that were made up
        return None


def _frozen(network: NetworkFunction) -> dict[str, str]:
    """A digest of each value that is not sampled; of floating-point numbers in single precision."""
    sampled = {id(p) for p in network.module.parameters() if p.requires_grad}
    found = {}
    for name, value in network.module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in sampled and not name.endswith(_COUNTERS):
            plain = value.detach().cpu()
            plain = (plain.float() if plain.dtype.is_floating_point else plain).contiguous().reshape(-1)
            found[name] = hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    return found


def _words(part: Any) -> list[str]:
    """The class, and how it describes itself if that holds no address."""
    kind, shown = type(part).__name__, repr(part)
    return [kind, kind if " at 0x" in shown else shown]


def _alike(there: Tensor | None, here: Tensor | None, *, most: bool) -> bool:
    """Whether numbers (m, ...) agree but for rounding; or in most rows, where rounding may send a row another way."""
    if there is None or here is None:
        return True
    here = here.cpu()
    if there.shape != here.shape:
        return False
    if here.numel() == 0:
        return True
    there, here = there.reshape(len(there), -1), here.reshape(len(here), -1)
    # of outputs that nearly cancel, rounding is as large as of the others; a prior's numbers stand for themselves
    scale = float(there.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if most else 0.0
    same = torch.isclose(there, here, rtol=_RTOL, atol=_RTOL * scale, equal_nan=True).all(dim=1).double().mean()
    return bool(same > 0.5) if most else bool(same == 1)
