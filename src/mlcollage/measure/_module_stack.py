"""Which module of a model is running, for instruments that see single functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ModuleStack:
    """Paths of the modules that run, outermost first, while it is open.

    Attributes
    ----------
    inside : list of str
        The path of the model itself is "". Empty outside of its passes, and in backward passes.
    counts : Counter
        For each module that runs, in the same order: yours to count with. A call of a module begins with an empty one.
    ran : set of str
        Modules that were called in the last pass.
    passes : int
        Calls of the whole model.
    """

    def __init__(self, model: nn.Module, on_pass: Callable[[], None] | None = None) -> None:
        self.model, self._on_pass = model, on_pass
        self.inside: list[str] = []
        self.counts: list[Counter[str]] = []
        self.ran: set[str] = set()
        self.passes = 0
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Install the hooks."""
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name, module)))
            self._handles.append(module.register_forward_hook(self._leave(name, module), always_call=True))

    def close(self) -> None:
        """Remove them."""
        while self._handles:
            self._handles.pop().remove()
        self.inside.clear()
        self.counts.clear()

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        def enter(called: nn.Module, args: Any) -> None:
            if called is not module or in_backward():  # a copy of the model has our hooks
                return
            if not name:
                self.passes += 1
                self.inside.clear()
                self.counts.clear()
                self.ran.clear()
                if self._on_pass is not None:
                    self._on_pass()
            self.ran.add(name)
            self.inside.append(name)
            self.counts.append(Counter())

        return enter

    def _leave(self, name: str, module: nn.Module) -> Callable[..., None]:
        def leave(called: nn.Module, args: Any, output: Any) -> None:
            if called is module and self.inside and self.inside[-1] == name:
                self.inside.pop()
                self.counts.pop()

        return leave


def in_backward() -> bool:
    """Whether this thread is in a backward pass, where gradient checkpointing runs modules again."""
    return torch._C._current_graph_task_id() != -1
