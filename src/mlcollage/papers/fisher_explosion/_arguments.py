"""What can be wrong with the settings of a penalty and with what a training step hands to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.measure._tape import REENTRANT
from mlcollage.measure.grad_norms import count_examples, graph_nodes
from mlcollage.measure.other_copies import of_another_copy, running_means_of
from mlcollage.nn import unwrap
from mlcollage.train import Replicas

# Backward passes that have no derivative of their own: how autograd's graph calls them, what they are, and what to do.
_NO_DOUBLE_BACKWARD: Mapping[str, tuple[str, str]] = {
    "CompiledFunction": ("a part of the network that torch.compile compiled", "torch.compile(model, backend='eager')"),
    "WeightNormInterface": (
        "weight_norm, of which torch's fused kernel has a wrong second derivative",
        "v * (g / torch.norm_except_dim(v, 2, 0)) in its place",
    ),
    "CudnnRnn": ("a cuDNN recurrent layer", "torch.backends.cudnn.flags(enabled=False)"),
    **{
        f"ScaledDotProduct{kind}": (what, "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
        for kind, what in {
            "Flash": "flash attention",
            "Efficient": "memory-efficient attention",
            "Cudnn": "cuDNN's fused attention",
            "Fused": "fused attention",
        }.items()
    },
}


# --- settings ---------------------------------------------------------------------------------------------------------


def check_settings(
    model: Any, *, labels: str, wrt: str, estimator: str, mode: str, normalize: str, score_term: bool
) -> None:
    """Refuse words that are not known, and settings that do not go together."""
    if not isinstance(model, nn.Module | Replicas):
        raise InvalidInput(f"model must be a torch.nn.Module or Replicas, not {type(model).__name__}.")
    checks.choice("labels", labels, ("model", "true", "uniform"))
    checks.choice("wrt", wrt, ("params", "input"))
    checks.choice("estimator", estimator, ("minibatch", "per_example", "exact"))
    checks.choice("mode", mode, ("double_backprop", "finite_difference", "jvp"))
    checks.choice("normalize", normalize, ("none", "batch"))
    if mode != "double_backprop" and (estimator != "minibatch" or wrt != "params" or isinstance(model, Replicas)):
        raise InvalidInput(
            f"mode={mode!r} is for single networks with estimator='minibatch' and wrt='params', not for {estimator!r} "
            f"and {wrt!r} of a {type(model).__name__}; use mode='double_backprop'."
        )
    if estimator == "exact" and labels == "true":
        raise InvalidInput(
            "estimator='exact' takes the expectation over labels, of which labels='true' has one per sample; use "
            "estimator='per_example'."
        )
    if score_term and (estimator, labels) != ("exact", "model"):
        raise InvalidInput("score_term=True is for estimator='exact' with labels='model': only it weighs classes.")


def trainable(model: nn.Module | Replicas, chosen: Iterable[Tensor] | None) -> dict[str, Tensor]:
    """Parameters that require gradients now, by name, among the chosen ones (None: all)."""
    keep = None if chosen is None else {id(p) for p in chosen}  # by identity: == compares tensors element by element
    found = {n: p for n, p in _named(model).items() if p.requires_grad and (keep is None or id(p) in keep)}
    if not found:
        raise InvalidInput("no penalized parameter requires a gradient; unfreeze some, or choose others with params.")
    return found


def choose(model: nn.Module | Replicas, params: Iterable[Tensor] | Iterable[str] | None) -> list[Tensor] | None:
    """The parameters meant by ``params``, names or the parameters themselves; None if all are."""
    known = _named(model)
    places = {id(p): n for n, p in known.items()}
    names = None if params is None else [(p if isinstance(p, str) else places.get(id(p), "")) for p in params]
    if names is not None and (missing := [n for n in names if n not in known]):
        what = f"names {missing[0]!r}, which is no" if missing[0] else "holds a tensor that is not a"
        raise InvalidInput(f"params {what} parameter of the model; see named_parameters().")
    chosen = None if names is None else [known[n] for n in names]
    trainable(model, chosen)
    return chosen


def _named(model: nn.Module | Replicas) -> Mapping[str, Tensor]:
    return model.parameters if isinstance(model, Replicas) else dict(unwrap(model).named_parameters())


# --- a training step --------------------------------------------------------------------------------------------------


def check_logits(logits: Any, *, replicas: int | None, first: bool) -> None:
    """Refuse what cannot be the logits (B, C) of a batch, or (R, B, C); look for a softmax on the ``first`` step."""
    want = "(B, C)" if replicas is None else f"({replicas}, B, C)"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInput(f"logits must be a floating point tensor {want}, not {what}.")
    *lead, b, classes = logits.shape if logits.ndim > 1 else (-1, -1, -1)
    if lead != ([] if replicas is None else [replicas]):
        raise InvalidInput(
            f"logits must have shape {want}, but have {tuple(logits.shape)}; flatten tokens or pixels into the batch, "
            "as in logits.reshape(-1, C)."
        )
    if classes < 2:
        raise InvalidInput(
            f"logits of shape {tuple(logits.shape)} have one class, whose probability is always 1 and Tr(F) always 0; "
            "give a binary classifier two logits, as in torch.cat([torch.zeros_like(z), z], 1)."
        )
    if b == 0:
        raise InvalidInput("the batch is empty; skip the step.")
    values = logits.detach()
    if not bool(values.isfinite().all()):
        raise InvalidInput(
            f"{int((~values.isfinite()).sum())} of {values.numel()} logits are NaN or infinite; lower the learning "
            "rate or alpha, or look for such values in the data."
        )
    # Rows that sum to 1 by rounding only; looked for once, as it costs a pass over the logits.
    rounding = 1e-2 if values.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if first and bool((values >= 0).all()) and bool((values.double().sum(-1) - 1).abs().max() < rounding):
        raise InvalidInput(
            "every row of the logits is non-negative and sums to 1: these are probabilities; pass the values before "
            "the softmax."
        )


def true_labels(y: Any, logits: Tensor) -> Tensor:
    """The data set's labels, one for each row of the logits, or a sentence on why these cannot be used."""
    if y is None:
        raise InvalidInput("labels='true' penalizes the gradient at the data set's labels; pass them as y.")
    rows = logits.shape[:-1]  # (B,), or (R, B) of replicas, which may share labels (B,)
    if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim not in (1, len(rows)):
        shape = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise InvalidInput(
            f"y must hold one class number per sample, integers (B,), not {shape}; soft and multi-label targets have "
            "no single class: use labels='model', which needs no y."
        )
    if y.shape != rows[-y.ndim :]:
        raise InvalidInput(f"y holds {len(y)} labels for {rows[-1]} rows of logits; give one for each.")
    low, high = int(y.min()), int(y.max())
    if low < 0:
        raise InvalidInput(
            f"y holds the label {low}; rows to ignore (ignore_index) must be left out of logits and y, as in "
            "keep = y >= 0; penalty(logits[keep], y=y[keep])."
        )
    if high >= logits.shape[-1]:
        raise InvalidInput(f"y holds the label {high}, but there are {logits.shape[-1]} classes, counted from 0.")
    return y.to(logits.device).long().expand(rows)


def check_call(
    model: nn.Module | Replicas, logits: Tensor, x: Any, y: Any, *, labels: str, wrt: str, estimator: str
) -> None:
    """Refuse a step whose arguments do not fit the settings."""
    if y is not None and labels != "true":
        raise InvalidInput(
            f"labels={labels!r} draws its own labels, so y must not be passed: the data set's labels would make it the "
            "empirical Fisher, a different penalty; leave y out, or use labels='true'."
        )
    if logits.grad_fn is None:
        raise InvalidInput(
            "the logits have no graph (made under torch.no_grad(), or detached), so no penalty can be differentiated; "
            "pass what the model returned in this training step."
        )
    if wrt == "params" and estimator == "minibatch":
        return
    if x is None:
        why = "differentiates by the input" if wrt == "input" else "runs the model again on the batch"
        raise InvalidInput(f"{f'wrt={wrt!r}' if wrt == 'input' else f'estimator={estimator!r}'} {why}; pass it as x.")
    if isinstance(model, Replicas) and (not isinstance(x, Tensor) or x.shape[:2] != logits.shape[:2]):
        raise InvalidInput(
            f"x must hold a batch for each replica, {tuple(logits.shape[:2])} in front; if they share one, pass "
            "x.expand(len(replicas), *x.shape), before the forward pass for wrt='input'."
        )
    if wrt == "params" and not isinstance(model, Replicas) and (given := count_examples(x)) != len(logits):
        raise InvalidInput(f"x holds {given} examples for {len(logits)} rows of logits; pass the x that made these.")
    if wrt == "input" and not (isinstance(x, Tensor) and x.requires_grad):
        raise InvalidInput(
            "wrt='input' needs x.requires_grad_() before logits = model(x), and that same x passed here; whole numbers "
            "such as token ids have no gradient, penalize their embeddings."
        )
    coupled = [] if wrt == "input" or isinstance(model, Replicas) else _batch_coupled(model)
    if coupled:
        raise InvalidInput(
            f"estimator={estimator!r} needs gradients of single samples, but batch norm in training mode "
            f"({coupled[0]}{' and others' if len(coupled) > 1 else ''}) makes each output depend on the whole batch; "
            "put these layers in eval() (running statistics), use group norm, or estimator='minibatch'."
        )


def _batch_coupled(model: nn.Module) -> list[str]:
    """Names of layers whose output for one sample now depends on the others: batch norm in training mode."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [
        name or type(m).__name__
        for name, m in unwrap(model).named_modules()
        if isinstance(m, kinds) and (m.training or not m.track_running_stats)
    ]


def check_graph(
    logits: Tensor, model: nn.Module | Replicas, parameters: Mapping[str, Tensor], *, twice: bool, complete: bool
) -> None:  # fmt: skip
    """Walk the graph of the logits; refuse one that lacks parameters, or that cannot be differentiated ``twice``.

    Without this the penalty would silently be zero or lack a block, or the error would come out of the user's
    ``loss.backward()``, far from its cause. ``complete`` if all parameters must be there, else one is enough.
    """
    leaves = set()
    for node in graph_nodes([logits]):
        leaves.add(id(getattr(node, "variable", None)))
        name = type(node).__name__
        if name == "CheckpointFunctionBackward":
            raise InvalidInput(REENTRANT)
        for start, (what, remedy) in _NO_DOUBLE_BACKWARD.items():
            if twice and name.startswith(start):
                raise InvalidInput(
                    f"the logits come out of {what} ({name}), whose backward pass cannot be differentiated again; use "
                    f"mode='finite_difference' or 'jvp' with add_gradient_, or use {remedy}."
                )
    check_belongs(logits, model, parameters)
    missing = [name for name, p in parameters.items() if id(p) not in leaves]
    if missing and complete:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InvalidInput(
            f"the logits do not depend on the parameters {names}: reentrant checkpointing drops a block whose input "
            "has no gradient (checkpoint with use_reentrant=False); if they are unused on purpose, give params."
        )


def check_belongs(logits: Tensor, model: nn.Module | Replicas, parameters: Mapping[str, Tensor]) -> None:
    """Refuse logits of another copy of the network, also of one that shares some of its parameters."""
    # stacked networks have no modules of their own to look into
    means = [] if isinstance(model, Replicas) else running_means_of(model)
    whole = [p for p in _named(model).values() if p.requires_grad]
    if of_another_copy([logits], parameters.values()) or of_another_copy([logits], whole, means):
        raise InvalidInput(
            "the logits do not depend on the penalized parameters, or on others in their place; hand over those of the "
            "network (or Replicas) that the penalty was made for, not of a copy of it."
        )


def check_precision(logits: Tensor, parameters: Iterable[Tensor]) -> None:
    """Refuse finite differences in half precision."""
    low = {logits.dtype, *(p.dtype for p in parameters)} & {torch.float16, torch.bfloat16}
    if low:
        raise InvalidInput(
            f"finite differences of gradients in {next(iter(low))} are rounding noise; let the closure run without "
            "autocast, or use mode='jvp' or 'double_backprop'."
        )
