"""The forward pass of a model, with every use of a parameter noted where it happens.

A parameter is used by a function: ``linear(a, W, b)``, ``conv2d(a, W)``, ``embedding(ids, W)``, an addition. The tape
is a ``TorchFunctionMode``: it sees each such call, also those inside attention modules, of tied weights and of
functions that no module stands for, and keeps the input a, and the place of the output z in the graph of autograd. The
gradient of an example with respect to the parameter is then made of a and the gradient with respect to z alone. A use
of another kind is noted as such, and its parameter left to :mod:`mlcollage.measure._fallback`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from mlcollage.errors import InvalidInput
from mlcollage.measure._examples import Layout, layouts
from mlcollage.measure._uses import Conv, Dense, Embed, Linear, Normed, Prelu, Use

__all__ = ["REENTRANT", "Tape", "second_derivatives"]

Handler = Callable[..., Any]  # (tape, function, its positional and its named arguments) to the function's result
Note = Callable[["Tape", dict[str, Any], Tensor], None]  # (tape, the function's arguments by name, its output)


@dataclass
class _Tracked:
    """A parameter, or another view of it: reshaped, cast, or transposed."""

    param: nn.Parameter
    value: Tensor  # held, so that its id stays its own
    transposed: bool = False


@dataclass
class _Rows:
    """Rows of a table that were looked up once for all examples, as those of positions are."""

    param: nn.Parameter
    value: Tensor
    ids: Tensor
    padding: int | None


class Tape(TorchFunctionMode):
    """Runs a model once and knows afterwards which parameters were used, by what, and on which inputs."""

    def __init__(self, model: nn.Module, params: Iterable[nn.Parameter], batch: int) -> None:
        super().__init__()
        self.model, self.params, self.batch = model, list(params), batch
        self.uses: list[Use] = []
        self.activations = 0  # numbers in the outputs of all uses
        self.other: dict[int, nn.Parameter] = {}  # parameters with a use that is not understood
        # By id, since tensors compare elementwise; the entries hold the tensors, so that no id is given out twice.
        self._tracked = {id(p): _Tracked(p, p) for p in self.params}
        self._rows: dict[int, _Rows] = {}

    def run(self, args: Sequence[Any], kwargs: dict[str, Any], differentiable: bool = False) -> Any:
        """The model's output; ``differentiable`` for kernels of attention and recurrence with second derivatives."""
        kernels = second_derivatives(self.model) if differentiable else nullcontext()
        with torch.enable_grad(), kernels, self:
            return self.model(*args, **kwargs)

    # Every call of a torch function comes through here ------------------------------------------------------------

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm or func is torch.batch_norm:
            _refuse_batch_statistics(func, args, kwargs)
        if not self._concerns(args) and not (kwargs and self._concerns(kwargs.values())):
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        # Rows of a table that all examples share, such as positions, are followed only until they meet a batch.
        if self._rows and handler not in (_elementwise, _expand) and any(id(a) in self._rows for a in args):
            handler = None
        # Without gradients it is the inside of a custom autograd.Function, or something done deliberately.
        if not torch.is_grad_enabled():
            refuse_reentrant()
        if handler is None or not torch.is_grad_enabled():
            return self.unknown(func, args, kwargs)
        return handler(self, func, args, kwargs)

    def _concerns(self, values: Iterable[Any]) -> bool:
        for value in values:  # this runs for every call of a torch function
            if id(value) in self._tracked or id(value) in self._rows:
                return True
            if (type(value) is list or type(value) is tuple) and self._concerns(value):
                return True
        return False

    def unknown(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that is not understood."""
        return self.unknown_use(func(*args, **kwargs), args, kwargs)

    def unknown_use(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave the parameters among the arguments to the general method, if ``out`` can carry their gradient."""
        hidden = not torch.is_grad_enabled()
        known = self._tracked.keys() | self._rows.keys()
        # A result without gradient, such as a shape or a detached copy, can carry none to the parameter.
        if any((hidden or t.requires_grad) and id(t) not in known for t in _flat(out)):
            for value in _flat([*args, *kwargs.values()]):
                self.give_up(value)
        return out

    def give_up(self, value: Any) -> None:
        """Leave the parameter behind ``value``, if there is one, to the general method."""
        found = self._tracked.get(id(value)) or self._rows.get(id(value))
        if found is not None:
            self.other[id(found.param)] = found.param

    # Notes -----------------------------------------------------------------------------------------------------------

    def tracked(self, value: Any) -> _Tracked | None:
        """The parameter that ``value`` is."""
        return self._tracked.get(id(value))

    def alias(self, value: Tensor, of: _Tracked, transposed: bool) -> None:
        """``value`` is the parameter too, in another shape or type."""
        if id(value) not in self._tracked:
            self._tracked[id(value)] = _Tracked(of.param, value, transposed)

    def look_up(self, rows: _Rows) -> None:
        """These rows stand for their table until they meet a batch."""
        self._rows[id(rows.value)] = rows

    def each(self, value: Any) -> Callable[[], Use] | None:
        """Makes the use of a parameter, or of rows of a table, that is copied to all examples."""
        rows, found = self._rows.get(id(value)), self._tracked.get(id(value))
        if rows is not None:
            ids = rows.ids.reshape(1, -1).expand(self.batch, -1)  # (batch, positions): the same for all examples
            return lambda: Embed(rows.param, _FRONT, ids, rows.padding)
        if found is not None and not found.transposed:
            return lambda: Dense(found.param, _FRONT)
        return None

    def note(self, use: Use, out: Tensor) -> None:
        """Keep a use, with the place in the graph where its gradient will be asked for."""
        use.edge, use.shape, use.dtype = get_gradient_edge(out), tuple(out.shape), out.dtype
        self.activations += out.numel()
        self.uses.append(use)

    def rows(self, a: Tensor, free: int | None) -> tuple[Layout, ...]:
        """Where the input may have its examples, by its sizes; see :func:`~mlcollage.measure._examples.layouts`."""
        if a.ndim == 0 or self._tracked.get(id(a)) is not None:
            return ()
        return layouts(a.shape, self.batch, free)


@contextmanager
def second_derivatives(model: nn.Module) -> Iterator[None]:
    """Use kernels of attention, recurrence and weight normalization that can be differentiated twice.

    Raises InvalidInput for reentrant checkpointing, which hides the layers inside it, or drops them.
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(_Plain())
        yield


class _Plain(TorchFunctionMode):
    """Puts plain operations in the place of kernels whose second derivatives are wrong."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            # The backward pass of the fused kernel takes the norms for constants when it is differentiated.
            v = _bind("v g dim", args, kwargs)
            return v["v"] * (v["g"] / torch.norm_except_dim(v["v"], 2, v.get("dim", 0)))
        if not torch.is_grad_enabled() and any(isinstance(a, nn.Parameter) for a in _flat([*args, *kwargs.values()])):
            refuse_reentrant()
        return func(*args, **kwargs)


def refuse_reentrant() -> None:
    """Raise InvalidInput inside reentrant checkpointing, which runs layers without gradients."""
    frame, hidden = sys._getframe(1), CheckpointFunction.forward.__code__
    while frame is not None and frame.f_code is not hidden:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None:
        raise InvalidInput(REENTRANT)


REENTRANT = "reentrant checkpointing hides the layers inside it, or drops them: checkpoint with use_reentrant=False."


_FRONT = (Layout(0),)  # of what is copied to the examples, in front

# The functions that are understood -----------------------------------------------------------------------------------


def _bind(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name; ``names`` are those of the positional ones, in order."""
    return dict(zip(names.split(), args, strict=False)) | kwargs


def _noted(names: str, note: Note) -> Handler:
    """Call the function as it is, and note what it used."""

    def handle(tape: Tape, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        note(tape, _bind(names, args, kwargs), out)
        return out

    return handle


def _layer(
    tape: Tape,
    v: dict[str, Any],
    out: Tensor,
    make: Callable[[_Tracked | None, Tensor, tuple[Layout, ...]], Use],
    *,
    fits: bool = True,
    kept: int | None = None,
    bias_use: Callable[..., Use] = Dense,
) -> None:
    """Note the uses of a layer's weight and bias, or leave both to the general method if its input is no batch.

    ``make`` gives the use of the weight (None if that is no parameter) on the input, whose examples may lie in certain
    ways; ``fits`` says whether the shapes are those that the use is made for. A layer that treats all dimensions but
    the last ones alike says how many it has ``kept``.
    """
    a, weight, bias = v["input"], v.get("weight"), v.get("bias")
    tape.give_up(a)  # the input may be a parameter itself, such as a learned query
    rows = tape.rows(a, None if kept is None else a.ndim - kept) if fits else ()
    if not rows:
        tape.give_up(weight)
        tape.give_up(bias)
        return
    w, b = tape.tracked(weight), tape.tracked(bias)
    use = make(w, a, rows)
    if w is not None:
        tape.note(use, out)
    if b is not None:  # at the same place of the graph: both gradients are made of the output's
        tape.note(bias_use(b.param, rows), out)


def _param(found: _Tracked | None) -> nn.Parameter | None:
    return None if found is None else found.param


def _linear(tape: Tape, v: dict[str, Any], out: Tensor, turned: bool = False, fits: bool = True) -> None:
    """The map z = a W^T + b, or a W + b if ``turned``."""

    def make(w: _Tracked | None, a: Tensor, rows: tuple[Layout, ...]) -> Use:
        return Linear(_param(w), rows, a, turned != (w is not None and w.transposed))

    _layer(tape, v, out, make, fits=fits and v["input"].ndim > 1, kept=1)


def _addmm(tape: Tape, v: dict[str, Any], out: Tensor) -> None:
    plain = v.get("beta", 1) == 1 and v.get("alpha", 1) == 1 and v["input"].ndim == 1
    _linear(tape, {"input": v["mat1"], "weight": v["mat2"], "bias": v["input"]}, out, turned=True, fits=plain)


def _matmul(tape: Tape, v: dict[str, Any], out: Tensor) -> None:
    weight = next(v[name] for name in ("other", "mat2", "tensor2") if name in v)
    plain = weight.ndim == 2 and v["input"].ndim > 1
    _linear(tape, {"input": v["input"], "weight": weight}, out, turned=True, fits=plain)


def _conv(dims: int, transposed: bool) -> Note:
    def note(tape: Tape, v: dict[str, Any], out: Tensor) -> None:
        def make(w: _Tracked | None, a: Tensor, rows: tuple[Layout, ...]) -> Use:
            geometry = Conv.geometry(dims, v.get("stride", 1), v.get("padding", 0), v.get("dilation", 1))
            # weight (out, in / groups, *kernel), or (in, out / groups, *kernel) of a transposed convolution
            return Conv(_param(w), rows, a, v["weight"].shape[2:], geometry, v.get("groups", 1), transposed)

        # An input without the batch dimension is (channels, *positions), which has one dimension less.
        _layer(tape, v, out, make, fits=v["input"].ndim == dims + 2, bias_use=_channel_bias)

    return note


def _embedding(tape: Tape, v: dict[str, Any], out: Tensor) -> None:
    if v.get("scale_grad_by_freq"):
        raise InvalidInput(
            "scale_grad_by_freq divides an embedding's gradient by counts over the whole batch, so no example has a "
            "gradient of its own: build the embedding without it."
        )
    ids, padding = v["input"], v.get("padding_idx")
    weight, rows = tape.tracked(v["weight"]), tape.rows(ids, ids.ndim)
    # Ids (positions,) or (1, positions) are looked up once for all examples, as those of positions are.
    shared = ids.ndim == 1 or (ids.ndim > 1 and ids.shape[0] == 1)
    if weight is not None and not weight.transposed and shared and ids.shape[0] != tape.batch:
        tape.look_up(_Rows(weight.param, out, ids, padding))
    elif weight is None or not rows or weight.transposed:
        tape.give_up(v["weight"])
    else:
        tape.note(Embed(weight.param, rows, ids, padding), out)


def _norm(normalize: Callable[[Tensor, dict[str, Any]], Tensor], trailing: bool) -> Note:
    """Scale and bias of a normalization: of its trailing dimensions (layer norm), else of channels.

    ``normalize`` gives the normalized input without scale and bias, from the input and the function's arguments.
    """

    def note(tape: Tape, v: dict[str, Any], out: Tensor) -> None:
        kept = len(v["normalized_shape"]) if trailing else 0

        def make(w: _Tracked | None, a: Tensor, rows: tuple[Layout, ...]) -> Use:
            return Normed(_param(w), rows, a, lambda x: normalize(x, v), kept)

        fits, bias_use = v["input"].ndim > kept, Dense if trailing else _channel_bias
        _layer(tape, v, out, make, fits=fits, kept=kept if trailing else None, bias_use=bias_use)

    return note


def _channel_bias(param: nn.Parameter, rows: tuple[Layout, ...]) -> Use:
    return Dense(param, rows, channels=True)


def _batch_hat(x: Tensor, v: dict[str, Any]) -> Tensor:
    return F.batch_norm(x, v["running_mean"], v["running_var"], eps=v.get("eps", 1e-5))


def _group_hat(x: Tensor, v: dict[str, Any]) -> Tensor:
    return F.group_norm(x, v["num_groups"], eps=v.get("eps", 1e-5))


def _layer_hat(x: Tensor, v: dict[str, Any]) -> Tensor:
    return F.layer_norm(x, v["normalized_shape"], eps=v.get("eps", 1e-5))


def _rms_hat(x: Tensor, v: dict[str, Any]) -> Tensor:
    return F.rms_norm(x, v["normalized_shape"], eps=v.get("eps"))


def _instance_hat(x: Tensor, v: dict[str, Any]) -> Tensor:
    own = v.get("use_input_stats", True)
    # With statistics of its own the layer has already updated the running ones, which must not happen once more.
    mean, var = (None, None) if own else (v["running_mean"], v["running_var"])
    return F.instance_norm(x, mean, var, use_input_stats=own, eps=v.get("eps", 1e-5))


def _prelu(tape: Tape, v: dict[str, Any], out: Tensor) -> None:
    _layer(tape, v, out, lambda w, a, rows: Prelu(_param(w), rows, a), fits=v["input"].ndim > 1)


def _elementwise(tape: Tape, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """As x + p or x p: the function is given a copy of p for each example; their gradients are asked for."""
    pair = [a for a in args if isinstance(a, Tensor)]
    if len(pair) != 2 or pair[0] is pair[1]:
        return tape.unknown(func, args, kwargs)
    (p, use), (x, other) = ((t, tape.each(t)) for t in pair)
    if use is None or other is not None:
        (p, use), (x, other) = (x, other), (p, use)
    fits = x.ndim > 0 and x.shape[0] == tape.batch and (p.ndim < x.ndim or (p.ndim == x.ndim and p.shape[0] == 1))
    if use is None or other is not None or not fits or (func in _IN_PLACE and args[0] is p):
        return tape.unknown(func, args, kwargs)
    # p as (batch, ...), without a copy: ones for the dimensions that broadcasting adds, the batch for the first.
    each = p.reshape((1,) * (x.ndim - p.ndim) + tuple(p.shape)).expand(tape.batch, *(-1,) * (x.ndim - 1))
    if p.requires_grad:
        tape.note(use(), each)
    return func(*(each if a is p else a for a in args), **kwargs)


def _expand(tape: Tape, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A parameter of shape (1, ...) copied to all examples, as a class token is."""
    p, out = args[0], func(*args, **kwargs)
    use = tape.each(p)
    whole = out.ndim == p.ndim and out.shape[1:] == p.shape[1:]
    if use is not None and whole and p.shape[0] == 1 and out.shape[0] == tape.batch:
        tape.note(use(), out)
    else:
        tape.give_up(p)
    return out


def _view(turn: bool) -> Handler:
    """A view or copy of a whole parameter, in another shape or type; or its transpose."""

    def handle(tape: Tape, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        found = tape.tracked(args[0])
        if found is None or not isinstance(out, Tensor) or out.numel() != found.param.numel():
            return tape.unknown_use(out, args, kwargs)
        # Transposes are those of matrices; what is transposed may not be reshaped any more.
        if found.value.ndim != 2 if turn else found.transposed:
            return tape.unknown_use(out, args, kwargs)
        tape.alias(out, found, turn != found.transposed)
        return out

    return handle


def _attention(tape: Tape, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Packed attention, its projections done outside where they are seen, with identities put in their place.

    All inputs are (positions, batch, features) here, whatever ``batch_first`` is.
    """
    names = (
        "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn "
        "dropout_p out_proj_weight out_proj_bias"
    )
    v = _bind(names, args, kwargs)
    q, packed, bias = v["query"], v["in_proj_weight"], v["in_proj_bias"]
    if packed is None or q.ndim != 3 or q.shape[1] != tape.batch or v.get("use_separate_proj_weight"):
        return tape.unknown(func, args, kwargs)
    inputs = [v[name].transpose(0, 1) for name in ("query", "key", "value")]  # (batch, positions, features) each
    if q is v["key"] and q is v["value"]:  # self-attention: one product with the whole weight (3 features, features)
        heads = list(_seen(tape, inputs[0], packed, bias).chunk(3, -1))
    else:
        heads = [_seen(tape, x, packed, bias, part) for part, x in enumerate(inputs)]
    out_weight, out_bias = v["out_proj_weight"], v["out_proj_bias"]
    # The function itself now projects by identities, so it computes attention alone.
    eye = torch.eye(q.shape[-1], dtype=heads[0].dtype, device=q.device)
    v.update(zip(("query", "key", "value"), (h.transpose(0, 1) for h in heads), strict=True))
    v.update(in_proj_weight=eye.repeat(3, 1), in_proj_bias=None, out_proj_weight=eye, out_proj_bias=None)
    for name in ("bias_k", "bias_v"):
        tape.give_up(v[name])
    out, weights = func(**v)
    return _seen(tape, out.transpose(0, 1), out_weight, out_bias).transpose(0, 1), weights


def _seen(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, part: int | None = None) -> Tensor:
    """A projection of x (batch, positions, features) by a weight, or by one third of it."""
    third = (lambda t: t.chunk(3)[part]) if part is not None else (lambda t: t)  # rows of query, key or value
    out = F.linear(x, third(weight), third(bias) if bias is not None else None)
    w, b = tape.tracked(weight), tape.tracked(bias)
    if w is not None:
        tape.note(Linear(w.param, layouts(x.shape, tape.batch, x.ndim - 1), x, False, part=part), out)
    if b is not None:
        tape.note(Dense(b.param, layouts(x.shape, tape.batch, x.ndim - 1), part=part), out)
    return out


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, list | tuple) else []


def _refuse_batch_statistics(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = "input running_mean running_var weight bias training"
    if func is torch.batch_norm:
        names = "input weight bias running_mean running_var training"
    if _bind(names, args, kwargs).get("training", False):
        raise InvalidInput(
            "batch normalization in training mode couples the examples of a batch, so that none has a gradient of its "
            "own: call model.eval() (or only its BatchNorm layers' .eval()) first, or use GroupNorm or LayerNorm."
        )


_IN_PLACE: set[Any] = {Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_}
_ELEMENTWISE: list[Any] = [
    *_IN_PLACE,
    *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum),
    *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.maximum, Tensor.minimum, Tensor.__rsub__),
    *(Tensor.true_divide, Tensor.__rdiv__),
]
_VIEWS_AND_CASTS: list[Any] = [
    *(Tensor.view, Tensor.reshape, Tensor.unsqueeze, Tensor.squeeze, Tensor.flatten, torch.reshape, torch.unsqueeze),
    *(Tensor.contiguous, Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16),
]
_TRANSPOSES: list[Any] = [Tensor.t, torch.t, *(vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT"))]

# Names of positional arguments, as in the functions' signatures.
_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
_EMBEDDING = "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
_BATCH_NORM = "input running_mean running_var weight bias training momentum eps"
_INSTANCE_NORM = "input running_mean running_var weight bias use_input_stats momentum eps"

_HANDLERS: dict[Any, Handler] = {
    F.linear: _noted("input weight bias", _linear),
    torch.addmm: _noted("input mat1 mat2 beta alpha", _addmm),
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm], _noted("input other", _matmul)),
    F.embedding: _noted(_EMBEDDING, _embedding),
    F.batch_norm: _noted(_BATCH_NORM, _norm(_batch_hat, trailing=False)),
    F.instance_norm: _noted(_INSTANCE_NORM, _norm(_instance_hat, trailing=False)),
    F.group_norm: _noted("input num_groups weight bias eps", _norm(_group_hat, trailing=False)),
    F.layer_norm: _noted("input normalized_shape weight bias eps", _norm(_layer_hat, trailing=True)),
    F.rms_norm: _noted("input normalized_shape weight eps", _norm(_rms_hat, trailing=True)),
    F.multi_head_attention_forward: _attention,
    F.prelu: _noted("input weight", _prelu),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys([Tensor.expand, Tensor.repeat], _expand),
    **dict.fromkeys(_VIEWS_AND_CASTS, _view(turn=False)),
    **dict.fromkeys(_TRANSPOSES, _view(turn=True)),
    **{getattr(F, f"conv{n}d"): _noted(_CONV, _conv(n, transposed=False)) for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): _noted(_CONV_TRANSPOSED, _conv(n, transposed=True)) for n in (1, 2, 3)},
}
