"""The network inside its wrappers, and the logits inside what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mlcollage.data.batches import in_type_of
from mlcollage.errors import InvalidInput


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, in any nesting.

    It shares its parameters with the wrapper, and its parameters and modules have their own names, without the
    wrapper's ``module.`` or ``_orig_mod.``. A model that was not wrapped is returned as it is; so is one after
    ``fully_shard``, which changes modules in place, and ``FullyShardedDataParallel``, whose inside cannot run alone.

    Parameters
    ----------
    model
        Any module.

    Raises
    ------
    InvalidInput
        If ``model`` is not a module, or has no numbers since it is on the meta device.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> unwrap(nn.DataParallel(model)) is model
    True
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"a model must be an nn.Module, not {type(model).__name__}.")
    if (first := next(model.parameters(), None)) is not None and first.is_meta:
        raise InvalidInput(
            "the model is on the meta device, where parameters have no numbers; make it on another one, or load its "
            "weights (model.to_empty(device='cpu') and load_state_dict)."
        )
    while True:
        # Only these: a module of the user's may have a part that it calls "module".
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's OptimizedModule
            model = inner
        else:
            return model


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returned: itself if it is a tensor, else its entry or attribute ``logits``.

    Parameters
    ----------
    output
        A tensor, a mapping with the key ``"logits"``, or an object with the attribute ``logits``, such as the outputs
        of Hugging Face models.

    Raises
    ------
    InvalidInput
        If there are no logits; a plain tuple does not say which of its tensors they are.

    Examples
    --------
    >>> import torch
    >>> logits_of({"loss": torch.zeros(()), "logits": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise InvalidInput(f"the model returned {type(output).__name__}; it must return logits, or hold them as 'logits'.")


def inputs_of(model: nn.Module, x: Any, name: str = "x") -> Any:
    """A tensor that is given to a model; float64, which numpy makes of everything, in the type of its parameters.

    Parameters
    ----------
    model
        Any module.
    x
        Inputs or targets.
    name
        What the refusal calls them.

    Raises
    ------
    InvalidInput
        If ``x`` is no tensor.

    Examples
    --------
    >>> import torch
    >>> inputs_of(nn.Linear(2, 1), torch.zeros(3, 2, dtype=torch.float64)).dtype
    torch.float32
    """
    if not isinstance(x, Tensor):
        raise InvalidInput(f"{name} must be a tensor, not a {type(x).__name__}; give torch.as_tensor({name}).")
    return in_type_of(model, x)
