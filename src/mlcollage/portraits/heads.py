"""How far do heads look, and how much does a block add? Attention distance and skip ratios."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from mlcollage.errors import InvalidInput
from mlcollage.measure import AttentionTap, TokenGrid, attention_distance, map_distance, skip_ratio
from mlcollage.portraits.instrument import DoesNotApply, Number, Reading
from mlcollage.portraits.quality import OTHERS
from mlcollage.portraits.resampling import Floats, ends, mean_interval, weights
from mlcollage.portraits.subject import Subject

_IMAGES, _SKIPS = 128, 256


def attention(subject: Subject) -> Reading:
    """Mean attention distance of heads: in pixels of an image, in tokens of a text."""
    examples = subject.test.take(_IMAGES)
    one = examples.take(1).batch
    try:
        with AttentionTap(subject.model) as tap, torch.no_grad():
            subject.model(*one.args, **one.kwargs)
        attends = len(tap) > 0
    except InvalidInput as error:  # nothing was seen, of modules that are called attention or of none
        if any("attention" in type(m).__name__.lower() for m in subject.model.modules()):
            raise DoesNotApply(f"Its attention cannot be seen: {error}") from error
        attends = False
    if not attends:
        raise DoesNotApply("The network does not attend: it has no attention module, and no map was seen in a pass.")
    images = _images(examples.x)
    if images is not None:
        try:
            found = attention_distance(subject.model, images, batch_size=32)
        except InvalidInput as error:
            raise DoesNotApply(f"Its attention has no distances: {error}") from error
        each, unit, uniform = dict(found.per_image), "pixels", found.uniform
    else:
        each, uniform = _in_tokens(subject)
        unit = "tokens"
    means = np.concatenate([v.mean(1, keepdims=True) for v in each.values()], axis=1).mean(1)  # (images,)
    numbers = [Number("attention distance", float(means.mean()), *mean_interval(means), unit=unit, interval=OTHERS)]
    shares = means / uniform
    numbers += [Number("attention reach", float(shares.mean()), *mean_interval(shares), interval=OTHERS)]
    numbers += [
        Number("attention distance", float(v.mean()), *mean_interval(v.mean(1)), unit=unit, layer=name, interval=OTHERS)
        for name, v in each.items()
    ]
    health = [
        f"A head that attends to all places alike has {uniform:.3g} {unit}; reach is the distance in that unit.",
        f"{len(means)} examples; heads of a block are averaged in the table, single heads are in the picture.",
    ]
    heads = max(v.shape[1] for v in each.values())
    table = np.full((len(each), heads), np.nan)
    for i, v in enumerate(each.values()):
        table[i, : v.shape[1]] = v.mean(0)
    return Reading("attention", numbers=numbers, health=health, arrays={"heads": table})


def _images(x: object) -> Tensor | None:
    """The pictures among the inputs."""
    if isinstance(x, dict) and len(x) == 1:
        (x,) = x.values()
    return x if isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() else None


def _in_tokens(subject: Subject) -> tuple[dict[str, Floats], float]:
    """Distances along a sequence by module, (examples, heads); and that of uniform attention."""
    each: dict[str, list[Floats]] = {}
    total, size = 0.0, 0
    for part in subject.test.take(_IMAGES).parts(32):
        with AttentionTap(subject.model) as tap, torch.no_grad():
            subject.model(*part.batch.args, **part.batch.kwargs)
        mask = part.batch.mask
        for name, a in tap.items():
            if a.ndim != 4 or a.shape[-1] != a.shape[-2] or len(a) != part.size:
                raise DoesNotApply(f"The attention of {name} has the shape {tuple(a.shape)}, which has no distances.")
            line = TokenGrid((1, a.shape[-1]))
            valid = mask if mask is not None and mask.shape == (part.size, a.shape[-1]) else None
            try:
                each.setdefault(name, []).append(map_distance(a, line, valid=valid))
            except InvalidInput as error:
                raise DoesNotApply(f"Its attention has no distances: {error}") from error
            size = a.shape[-1]
        lengths = np.full(part.size, size) if mask is None else (mask != 0).sum(1).cpu().numpy()
        total += float(((lengths**2 - 1) / (3 * np.maximum(lengths, 1))).sum())
    return {name: np.concatenate(v) for name, v in each.items()}, max(total / subject.test.take(_IMAGES).size, 1e-9)


def attention_cost(subject: Subject) -> float:
    """Seconds: passes in which maps are looked at."""
    return 0.5 + 8 * subject.forward * min(_IMAGES, subject.test.size)


def skips(subject: Subject) -> Reading:
    """Norm of each skip connection over the norm of what its block adds."""
    examples = subject.test.take(_SKIPS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = skip_ratio(subject.model, examples.x, batch_size=64)
    except InvalidInput as error:
        if "no sum of an input" in str(error):
            raise DoesNotApply("The network has no skip connections: no sum of an input and of its output.") from error
        raise
    medians: dict[str, Floats] = {}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an example with NaN in all places
        for name, r in found.ratios.items():
            medians[name] = np.nanmedian(r.reshape(len(r), -1), axis=1)  # (examples,)
    usable = {k: v for k, v in medians.items() if np.isfinite(v).sum() >= 2}
    if not usable:
        raise DoesNotApply("No skip connection has a finite ratio for two examples.")
    each = np.stack([np.where(np.isfinite(v), v, np.nan) for v in usable.values()])  # (sums, examples)
    draw = weights(each.shape[1], subject.seed, 200).astype(bool)  # which are drawn at all: a median of those
    whole = np.array([np.nanmedian(np.nanmedian(each[:, rows], axis=1)) for rows in draw])
    middle = np.nanmedian(each, axis=1)
    numbers = [Number("skip ratio", float(np.median(middle)), *ends(whole), interval=OTHERS)]
    for k, (name, value) in enumerate(zip(usable, middle, strict=True)):
        limits = ends([np.nanmedian(each[k][rows]) for rows in draw])
        numbers.append(Number("skip ratio", float(value), *limits, layer=name, interval=OTHERS))
    health = [f"{len(usable)} residual sums, medians over {each.shape[1]} examples; 1: skip and block are alike large."]
    if found.ambiguous:
        health.append(f"Not told apart which way is the skip: {', '.join(found.ambiguous)}.")
    if len(usable) < len(medians):
        health.append("Left out, since their block adds nothing: " + ", ".join(set(medians) - set(usable)) + ".")
    return Reading("skips", numbers=numbers, health=health)


def skips_cost(subject: Subject) -> float:
    """Seconds: passes in which all sums are looked at."""
    return 0.5 + 6 * subject.forward * min(_SKIPS, subject.test.size)
