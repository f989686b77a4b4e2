"""Whether a module and data have a posterior at all: deterministic, decomposing over data, finite."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset, IterableDataset

from mlcollage.errors import InvalidInput
from mlcollage.nn import logits_of, seeded, unwrap

_REASON = "the likelihood must be deterministic and decompose over data"
_INSTEAD = "replace BatchNorm by FilterResponseNorm or GroupNorm"


def check_module(module: Any) -> None:
    """Refuse what cannot be sampled, with the reason."""
    if not isinstance(module, nn.Module):
        raise InvalidInput(f"module is {type(module).__name__}; a torch.nn.Module is needed, made and not its class.")
    unwrap(module)  # refuses the meta device
    for name, part in module.named_modules():
        where = f"{name or 'the module'} ({type(part).__name__})"
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise InvalidInput(f"{where} uses the statistics of the batch, but {_REASON}; {_INSTEAD}, or call eval().")
        # nn.LSTM and its kind have their dropout as a number
        drop = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0)
        if part.training and isinstance(drop, int | float) and drop > 0:
            raise InvalidInput(f"{where} drops at random, but {_REASON}; call eval() first.")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise InvalidInput("no parameter requires a gradient; there is nothing to sample.")
    kinds = set()  # type and device: all positions are one tensor
    for name, p in parameters.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise InvalidInput(f"parameter {name} has no shape yet; run one forward pass first.")
        if p.dtype not in (torch.float32, torch.float64):
            raise InvalidInput(f"parameter {name} is {p.dtype}; float32 or float64 is needed (module.float()).")
        if not bool(p.isfinite().all()):
            raise InvalidInput(f"parameter {name} is not finite; a network that has diverged cannot be sampled from.")
        kinds.add((p.dtype, p.device))
    if len(kinds) > 1:
        raise InvalidInput(f"parameters are of {len(kinds)} types or devices; one is needed (module.to(...)).")


def as_tensor(values: Any, what: str) -> Tensor:
    """Values as a tensor with at least one datum."""
    try:
        if values is None or isinstance(values, nn.Module):
            raise TypeError
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"{what} is {type(values).__name__}; an array or tensor (n, ...) is needed.") from None
    if tensor.ndim == 0 or tensor.numel() == 0:
        raise InvalidInput(f"{what} is empty (shape {tuple(tensor.shape)}); at least one datum is needed.")
    return tensor


def check_finite(values: Tensor, what: str, remedy: str) -> None:
    """Refuse values (n, ...) with a number that is not finite, naming the first datum that has one."""
    if values.dtype.is_floating_point and not bool(values.isfinite().all()):
        by_datum = values.reshape(len(values), -1).isfinite().all(dim=1)  # (n,)
        raise InvalidInput(f"{what} is not finite at datum {int((~by_datum).nonzero()[0])}; {remedy}.")


def as_data(X: Any, y: Any) -> tuple[Any, Any]:
    """Inputs and targets, from a pair or from a ``torch.utils.data.Dataset`` of pairs (y=None), read once.

    A dataset that returns something else when it is read again augments at random, and a warning says what that means.
    """
    if not isinstance(X, Dataset):
        return X, y
    if y is not None:
        raise InvalidInput("X is a Dataset and y was given too; a Dataset of pairs (input, target) comes with y=None.")
    if isinstance(X, IterableDataset) or not hasattr(X, "__len__") or len(X) == 0:
        raise InvalidInput("the Dataset is empty or has no length; every datum enters the likelihood, so all are read.")
    # every datum enters every gradient, so the whole set is held in memory
    pairs = [X[i] for i in range(len(X))]
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise InvalidInput("the Dataset must return pairs (input, target).")
    x, targets = (torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*pairs, strict=True))
    # a few data are read a second time: augmentation hides inside datasets
    if any(not torch.equal(torch.as_tensor(X[i][0]), x[i]) for i in range(min(len(x), 8))):
        warnings.warn(
            "the Dataset returns another input each time it is read: with augmentation the likelihood is no longer a "
            "product over the data. One reading of it is used; for augmentation on purpose, see transform= of SGHMC.",
            stacklevel=3,
        )
    return x, targets


def as_inputs(values: Any, module: nn.Module, what: str = "X") -> Tensor:
    """Inputs in the network's type, on its device, finite; whole numbers only for networks that look them up."""
    own: list[Tensor] = [*module.parameters()] or [torch.empty(0)]
    like = next((p for p in own if p.requires_grad), own[0])
    x = as_tensor(values, what).to(like.device)
    if x.dtype.is_floating_point:
        check_finite(x, what, "drop or impute such data")
        return x.to(like.dtype)
    looked_up = any(isinstance(m, nn.Embedding) for m in module.modules())
    if x.dtype.is_complex or x.dtype == torch.bool or not looked_up:
        raise InvalidInput(f"{what} is {x.dtype}; real numbers are needed, since the network looks nothing up.")
    return x


@torch.no_grad()
def check_behavior(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Run a few data twice, and one alone: outputs (m, ...), or a refusal where they are random or coupled."""
    few = x[:4]

    def run(part: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            return logits_of(functional_call(module, parameters, (part,)))

    # two seeds, so that noise inside the network shows
    try:
        first = run(few, 0)
    except RuntimeError as error:
        raise InvalidInput(f"the network cannot take inputs of shape {tuple(few.shape)}: {error}") from error
    if first.ndim == 0 or len(first) != len(few):
        shape = tuple(first.shape)
        raise InvalidInput(f"the network returns shape {shape} for {len(few)} inputs; (n, ...) is needed.")
    check_finite(first, "the network's output", "check its weights and the inputs")
    if not torch.equal(first, run(few, 1)):
        raise InvalidInput(f"the network returns something else each time, but {_REASON}; call eval() first.")
    # products of other shapes round differently, so not to the last bit
    scale = float(first.abs().max()) + 1e-30
    if len(few) > 1 and float((run(few[:1], 0) - first[:1]).abs().max()) > 1e-3 * scale:
        raise InvalidInput(f"outputs depend on the other data of a batch, but {_REASON}; {_INSTEAD}.")
    return first
