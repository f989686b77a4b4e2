"""What a network is besides its weights, in words: files of weights keep it, so that no other network takes them."""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_LIBRARIES = ("torch", "mlcollage")


def signature(model: nn.Module) -> dict[str, str]:
    """Class and settings of each layer by its name, the whole under the empty name.

    Weights do not enter, nor does what changes while a network is used: its mode, the share that dropout drops. Of
    classes that are not a library's it also says which functions their ``forward`` names, since an activation may stand
    there.

    Examples
    --------
    >>> signature(nn.Sequential(nn.Linear(2, 1), nn.Tanh()))
    {'': 'Sequential()', '0': 'Linear(in_features=2, out_features=1, bias=True)', '1': 'Tanh()'}
    """
    return {name: _described(part) for name, part in model.named_modules()}


def _described(part: nn.Module) -> str:
    kind = type(part)
    settings = "" if isinstance(part, _DropoutNd) else part.extra_repr()
    code = getattr(kind.forward, "__code__", None)
    if kind.__module__.partition(".")[0] in _LIBRARIES or not isinstance(code, CodeType):
        return f"{kind.__name__}({settings})"
    # names and not bytecode, which is another one in each version of Python
    used = [name for name in code.co_names if name not in ("self", "torch", "F", "nn")]
    return f"{kind.__name__}({settings}) with {', '.join(used) or 'nothing'} in forward"


def other_layer(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """The first layer in which two signatures differ, in words; None if they agree.

    Examples
    --------
    >>> other_layer({"": "Tanh()"}, {"": "ReLU()"})
    'it is Tanh() there and ReLU() here'
    """
    for name in dict.fromkeys((*there, *here)):
        mine, other = here.get(name, "missing"), there.get(name, "missing")
        if mine != other:
            return f"{f'layer {name}' if name else 'it'} is {other} there and {mine} here"
    return None
