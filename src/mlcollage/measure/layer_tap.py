"""Activations by name, in execution order, from any module: forward hooks that keep no copies unless asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlcollage.errors import InvalidInput, UnknownName
from mlcollage.nn.wrapped import unwrap

__all__ = ["LayerTap", "layers_of"]

Layers = str | type[nn.Module] | Sequence[str | type[nn.Module]]


class LayerTap(Mapping[str, Tensor]):
    """A mapping from the names of layers to what they put out, filled by each forward pass of a model.

    While the tap is open, ``tap[name]`` is the output of the layer at that path (``model.get_submodule(name)``) in
    the last forward pass; iteration follows the order of execution. The model is not changed, and its hooks are gone
    when the tap is closed. Nothing is copied: the values are the tensors that the model itself made, so a tap costs
    the time of a few Python calls, and the memory of outputs that would otherwise be freed during the pass. With
    ``reduce`` only the reduced values are held; with ``consume`` nothing is.

    * A layer that is called several times in one pass gives ``name``, ``name#1``, ``name#2``, ...
    * Of an output with several tensors (a tuple, list or dict) the first has the layer's name, the others
      ``name[1]``, ``name[2][0]``, ``name[key]``.
    * Calls during the backward pass are those of gradient checkpointing, and are not recorded again.
    * An output that was overwritten before it is read, usually by an in-place ReLU, is refused when read. Ask for
      the ReLU's own output, for ``copy=True``, or give ``reduce``, which sees the output in time.

    Parameters
    ----------
    model
        Any module. Of one wrapped for distributed training the inner module is tapped, under its own names.
    layers
        ``"*"`` (all modules without children, and attention modules), ``"relu"`` (all ``nn.ReLU`` and ``nn.ReLU6``),
        a path or shell-style pattern of paths (``"block*.relu2"``), a type of module, or a sequence of paths,
        patterns and types.
    reduce
        Called with each output, in the hook; what it returns is kept in the output's place. Such as
        ``lambda h: h.flatten(2).mean(2)``, the mean over space.
    consume
        Called with the name and each (reduced) output, which is then not kept.
    detach
        Give values without their graph. With False they can be part of a loss.
    copy
        Keep a copy of each (reduced) output.

    Raises
    ------
    InvalidInput
        For compiled and scripted models, ``nn.DataParallel``, and models in which nothing is to be tapped; in a forward
        pass, with ``detach=False``, for a layer that runs without gradients in a model that has them; when read,
        for an output that was overwritten.
    UnknownName
        For a path or pattern that no module has, and a layer that the last pass did not call.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with LayerTap(model) as tap:
    ...     logits = model(torch.ones(5, 4))
    >>> {name: tuple(h.shape) for name, h in tap.items()}
    {'0': (5, 3), '1': (5, 3), '2': (5, 2)}
    >>> with LayerTap(model, "relu", reduce=lambda h: h.mean(0)) as tap:
    ...     logits = model(torch.ones(5, 4))
    >>> tap["1"].shape
    torch.Size([3])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "*",
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        consume: Callable[[str, Tensor], None] | None = None,
        detach: bool = True,
        copy: bool = False,
    ) -> None:
        if isinstance(model, nn.DataParallel):
            raise InvalidInput("nn.DataParallel runs one copy of the model per device: tap model.module and run that.")
        self.model = hookable(model, "LayerTap")
        self.layers = layers_of(self.model, layers)
        self._reduce, self._consume, self._detach, self._copy = reduce, consume, detach, copy
        self._handles: list[RemovableHandle] = []
        self._values: dict[str, tuple[Tensor, int | None]] = {}  # each with its version when the layer had run
        self._calls: dict[str, int] = {}  # of each layer in this pass
        self._grad = torch.is_grad_enabled()

    # The hooks -------------------------------------------------------------------------------------------------

    def open(self) -> LayerTap:
        """Install the hooks; a tap that is open stays so."""
        if not self._handles:
            hookable(self.model, "LayerTap")  # it may have been compiled in the meantime
            # A function, not a bound method: copying the model would copy the tap, and what it holds, with the latter.
            self._handles.append(self.model.register_forward_pre_hook(lambda module, args: self._start(module, args)))
            for name, module in self.layers.items():
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def close(self) -> None:
        """Remove the hooks; the values of the last pass can still be read."""
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        """Forget the values of the last pass, and so free their memory."""
        self._values.clear()
        self._calls.clear()

    def __enter__(self) -> LayerTap:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy of the model has this hook too; checkpointing of the whole model runs it again in the backward pass.
        if module is self.model and not _in_backward():
            self.clear()
            self._grad = torch.is_grad_enabled()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if _in_backward() or module is not self.layers[name]:
                return  # gradient checkpointing runs the layer a second time; a deep copy of the model has our hooks
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            full = f"{name}#{call}" if call else name
            # The first tensor has the layer's name, whatever it is nested in.
            for i, (suffix, value) in enumerate(_tensors(output)):
                self._record(full + (suffix if i else ""), value)

        return hook

    def _record(self, name: str, value: Tensor) -> None:
        if self._detach:
            value = value.detach()
        elif self._grad and not torch.is_grad_enabled():
            raise InvalidInput(
                f"layer {name!r} runs without gradients inside a model that has them, as reentrant checkpointing "
                "does, so its output cannot be part of a loss: checkpoint with use_reentrant=False, leave the layer "
                "out, or set detach=True."
            )
        if self._reduce is not None:
            value = self._reduce(value)
        if self._copy:
            value = value.clone()
        if self._consume is not None:
            self._consume(name, value)
            return
        version = _version(value)
        # A reduced or copied value is a tensor of its own as a rule, which nothing overwrites.
        if version is None and not self._copy and self._reduce is None and _has_inplace(self.model):
            raise InvalidInput(
                "in inference mode a tap cannot see whether this model's in-place layers overwrite an output: use "
                "torch.no_grad() instead, or copy=True."
            )
        self._values[name] = (value, version)

    # The mapping -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            known = ", ".join(self._values) or "nothing: run the model while the tap is open"
            raise UnknownName(f"the last forward pass gave no output called {name!r}; it gave {known}.")
        value, version = self._values[name]
        if version is not None and _version(value) != version:  # in-place operations count it up
            raise InvalidInput(
                f"the output of layer {name!r} was overwritten in place after the layer ran, by an in-place ReLU for "
                "instance: tap the layer that overwrites it, or use copy=True."
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read, and so refuse what was overwritten
        return name in self._values

    def __repr__(self) -> str:
        state = "open" if self._handles else "closed"
        return f"LayerTap({state}, {len(self.layers)} layers, {len(self)} values)"


def layers_of(model: nn.Module, layers: Layers = "*") -> dict[str, nn.Module]:
    """Modules of ``model`` by path, selected as :class:`LayerTap` does, in the order of registration.

    Parameters
    ----------
    model
        Any module.
    layers
        ``"*"``, ``"relu"``, a path or pattern, a type, or a sequence of these.

    Raises
    ------
    UnknownName
        For a path or pattern that no module has.
    InvalidInput
        If there is no module of the types asked for.

    Examples
    --------
    >>> list(layers_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.Linear))
    ['0', '2']
    """
    modules = {name: m for name, m in model.named_modules() if name}  # without the model itself
    wanted = [layers] if isinstance(layers, str | type) else list(layers)
    chosen: set[str] = set()
    for want in wanted:
        matched = {name for name, m in modules.items() if _matches(want, name, m)}
        if not matched:
            raise _nothing(want, modules)
        chosen |= matched
    if not chosen:
        raise InvalidInput("no layer was asked for: give paths, patterns or types of modules, or '*' for all.")
    return {name: m for name, m in modules.items() if name in chosen}


def _matches(want: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    if isinstance(want, type):
        return isinstance(module, want)
    if want == "*":  # attention has children, but computes with their weights without calling them
        return isinstance(module, nn.MultiheadAttention) or next(module.children(), None) is None
    return want == name or fnmatchcase(name, want) or (want == "relu" and isinstance(module, nn.ReLU | nn.ReLU6))


def _nothing(want: str | type[nn.Module], modules: Mapping[str, nn.Module]) -> InvalidInput:
    some = ", ".join(list(modules)[:8]) + (", ..." if len(modules) > 8 else "")
    if want == "relu" or isinstance(want, type):
        kind = "ReLU" if want == "relu" else getattr(want, "__name__", str(want))
        return InvalidInput(
            f"the model has no module of type {kind} (functions such as torch.relu cannot be tapped): name the layers "
            "before it and rectify what they give (reduce=torch.relu of a LayerTap, negative='relu' of a selectivity), "
            f"or choose others; its modules are {some or 'none'}."
        )
    close = get_close_matches(want.replace("*", "").replace("?", ""), list(modules), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    return UnknownName(f"the model has no layer {want!r}; its modules are {some or 'none'}{hint}")


def hookable(model: nn.Module, caller: str) -> nn.Module:
    """The network inside its parallel wrapper, if its hooks run.

    Parameters
    ----------
    model
        Any module, also in ``DistributedDataParallel`` or ``DataParallel``.
    caller
        Name at the head of the sentence.

    Raises
    ------
    InvalidInput
        For a compiled or scripted model, or one with such a part, in which hooks are skipped or ignored.
    """
    network = unwrap(model)
    for module in model.modules():
        # torch.compile(model) wraps a module, model.compile() changes how it is called.
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            how = "torch.compile" if compiled else "torch.jit"
            raise InvalidInput(
                f"{caller} reads a model through hooks, which a model from {how} does not run: pass the original "
                "module (model._orig_mod of a compiled one); the two share their parameters."
            )
    return network


def _in_backward() -> bool:
    # The number of the backward pass that this thread is in, -1 outside of one.
    return torch._C._current_graph_task_id() != -1


def _version(value: Tensor) -> int | None:
    # Tensors of inference mode are not counted.
    return None if value.is_inference() else value._version


def _has_inplace(model: nn.Module) -> bool:
    return any(getattr(m, "inplace", False) is True for m in model.modules())


def _tensors(output: Any, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a nested output, each with where it lies."""
    if isinstance(output, Tensor):
        yield suffix, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{suffix}[{key}]")
    elif isinstance(output, list | tuple):
        for i, value in enumerate(output):
            yield from _tensors(value, f"{suffix}[{i}]")
