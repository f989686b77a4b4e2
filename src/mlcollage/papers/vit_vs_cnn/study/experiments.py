"""The study's experiment: networks of one seed, trained alike, and what is measured of them."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sized
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mlcollage.data import Labeled, fashion_mnist
from mlcollage.data.fresh_networks import fresh
from mlcollage.data.problem import Problem, problem
from mlcollage.errors import InvalidInput
from mlcollage.lab import Measurements, Scale, Task
from mlcollage.measure import (
    CKAResult,
    LayerTap,
    TokenGrid,
    attention_distance,
    effective_receptive_field,
    remove_skip,
    residual_sums,
    skip_ratio,
    token_grid,
    token_localization,
    token_probes,
)
from mlcollage.nn import build
from mlcollage.train import accuracy, evaluate, evaluating

from ..compare import compare
from ..comparison import LayerComparison
from .models import Networks, makers, patch_of, train

GRID = (4, 4)  # where a network has no patches


def on_workload(s: Networks, workload: Labeled, scale: Scale) -> Networks:
    """Sizes that the user's images allow; refuses data and models that the study has no use for."""
    size, tests = (len(cast(Sized, part)) for part in (workload.train, workload.test))
    shape = tuple(workload.train[0][0].shape)
    if len(shape) != 3:
        raise InvalidInput(
            f"the study compares networks on images (channels, height, width); {workload.name} has inputs {shape}."
        )
    if size < 40 or tests < 40:
        raise InvalidInput(f"the study needs 40 training and 40 test images; {workload.name} has {size} and {tests}.")
    both = [workload.model, workload.other_model]
    if (both[0] is None) != (both[1] is None):
        raise InvalidInput(
            f"the study compares two networks: give {workload.name} model and other_model, which take the places of "
            "the vision transformer and the residual network, or neither."
        )
    if both[0] is None:
        patch_of(shape[1]), patch_of(shape[2])
    trained = min(s.train, size)
    batch = max(8, min(s.batch, trained // 8))
    # Small sets get as many updates as the study's own data give.
    epochs = round(max(s.epochs, s.epochs * s.train / s.batch * batch / trained), 2)
    compared = min(s.compared, tests)
    return dataclasses.replace(
        s,
        train=trained,
        test=min(s.test, tests),
        batch=batch,
        epochs=epochs,
        compared=compared,
        compared_at_once=min(s.compared_at_once, max(4, compared // 2)),
        probe=min(s.probe, trained),
        users=both[0] is not None,
    )


@cache
def _fashion() -> Labeled:
    x, y, xt, yt = fashion_mnist.load()
    return Labeled.from_arrays(x.reshape(-1, 1, 28, 28), y, xt.reshape(-1, 1, 28, 28), yt, 10)


def to_learn(task: Task[Networks]) -> Problem:
    """A seed's images; each has training images of its own, so that intervals are over data as well."""
    s = task.settings
    return problem(
        task.workload,
        _fashion,
        rng=np.random.default_rng([task.seed, 32]),
        train=s.train,
        test=s.test,
        standardize="sample",
        model=lambda shape, classes: makers(s, shape, classes)["vit"](),
        device=task.device,
    )


def networks(task: Task[Networks]) -> Measurements:
    """Train the networks of a seed and measure them."""
    s, seed, m = task.settings, task.seed, Measurements()
    p = to_learn(task)
    if s.users:
        make = {"vit": p.make_model, "cnn": fresh(task.workload.other_model)}
    else:
        make = makers(s, p.shape, p.num_classes)
    nets = {name: train(maker, p, s, seed) for name, maker in make.items()}
    x = p.test.x[: s.compared]
    with warnings.catch_warnings():
        # Dead and giant units are part of what is measured; the health of the maps is in the numbers below.
        warnings.simplefilter("ignore", UserWarning)
        for name, net in nets.items():
            m.add("accuracy", evaluate(net, *p.test, accuracy), arm=name)
        found = _maps(m, nets["vit"], nets["cnn"], x, s, ("vit", "cnn"), seed == 0)
        _maps(
            m, build(make["vit"], seed).to(p.device), build(make["cnn"], seed).to(p.device), x, s, _UNTRAINED, seed == 0
        )
        if seed == 0:
            m.array("cross", found.cross.matrix)
            m.array("path", found.path()["depth_a"].to_numpy())
        _path(m, found)
        for name, net in nets.items():
            _skips(m, name, net, x)
            _fields(m, name, net, p.test.x[: s.field])
            _places(m, name, net, x, s, seed == 0)
            _probes(m, name, net, p, s)
        _heads(m, nets["vit"], p.test.x[: s.field])
        if not s.users:
            _few(m, nets["vit"], train(make["vit"], p, s, seed, few=True), x, s)
            _cut(m, nets["vit"], make["vit"], p, s, seed)
            _likeness(m, nets, x, s)
    return m


_UNTRAINED = ("vit untrained", "cnn untrained")


def blocks_of(net: nn.Module, x: Tensor) -> list[str]:
    """Paths of the modules that end a residual block."""
    found = list(dict.fromkeys(s.module for s in residual_sums(net, x[:2]) if s.module))
    if not found:
        raise InvalidInput(f"{type(net).__name__} has no residual block that is a module.")
    return found


@contextlib.contextmanager
def _if_possible() -> Iterator[None]:
    """What a user's network does not have is not measured."""
    with contextlib.suppress(InvalidInput):
        yield


def _maps(
    m: Measurements, a: nn.Module, b: nn.Module, x: Tensor, s: Networks, names: tuple[str, str], keep: bool
) -> LayerComparison:
    """Uniformity of two networks; maps are kept of the first seed."""
    found = compare(a, b, x, batch_size=s.compared_at_once)
    for which, name in zip(("a", "b"), names, strict=True):
        own = found.a if which == "a" else found.b
        m.add("uniformity", _ends(own), arm=name)
        if keep:
            m.array(f"map_{name.replace(' ', '_')}", own.matrix)
    return found


def _ends(own: CKAResult) -> float:
    quarter = max(1, len(own.names_a) // 4)
    return float(np.nanmean(own.matrix[:quarter, -quarter:]))


def _path(m: Measurements, found: LayerComparison) -> None:
    """The depth in the first network that the layers of the second are most like."""
    path = found.path()
    for half, part in (("lower", path[path["depth_b"] < 0.5]), ("upper", path[path["depth_b"] >= 0.5])):
        m.add("matched_depth", float(part["depth_a"].mean()), arm="vit", half=half)


def _skips(m: Measurements, name: str, net: nn.Module, x: Tensor) -> None:
    with _if_possible():
        found = skip_ratio(net, x[:256])
        medians = found.to_dataframe()["median"]
        usable = medians[np.isfinite(medians) & (medians > 0)]
        m.add("skip_ratio", float(np.exp(np.log(usable).mean())), arm=name)
        for i, ratio in enumerate(medians):
            m.add("skip", float(ratio), arm=name, step=i + 1)
        if name != "vit":
            return
        prefix = token_grid(net).prefix
        for i, one in enumerate(found.sums):
            places = np.log(found.per_place(one.name))
            if places.ndim == 1 and prefix and np.isfinite(places).all():
                m.add("class_over_patch", float(places[0] - places[prefix:].mean()), arm=name, step=i + 1)


def _fields(m: Measurements, name: str, net: nn.Module, x: Tensor) -> None:
    with _if_possible():
        for i, block in enumerate(blocks_of(net, x)):
            m.add("field", effective_receptive_field(net, block, x).area(), arm=name, step=i + 1)


def _places(m: Measurements, name: str, net: nn.Module, x: Tensor, s: Networks, keep: bool) -> None:
    """Localization of the last block, and the map of its token in the middle."""
    with _if_possible():
        try:
            where = token_grid(net)
        except InvalidInput:  # feature maps
            where = TokenGrid(GRID)
            if name == "mixer":
                where = TokenGrid((x.shape[2] // patch_of(x.shape[2]), x.shape[3] // patch_of(x.shape[3])))
        last = blocks_of(net, x)[-1]
        found = token_localization(net, last, x, where=where, batch_size=s.compared_at_once)
        m.add_all({"localization": found.score, "own_patch": found.rank_one}, arm=name)
        rows, columns = found.where.grid
        if keep:
            m.array(f"place_{name}", found.maps[found.where.prefix + rows // 2 * columns + columns // 2])


def _probes(m: Measurements, name: str, net: nn.Module, p: Problem, s: Networks) -> None:
    """Accuracy of linear probes on tokens, by block."""
    with _if_possible():
        try:
            prefix = token_grid(net).prefix
        except InvalidInput:
            if name != "mixer":
                raise
            prefix = 0
        blocks = blocks_of(net, p.test.x)
        train_x, train_y = (t[: s.probe] for t in p.train)
        tokens = [_tokens(net, blocks, x) for x in (train_x, p.test.x)]
        for read, metric in (("each", "token_probe"), ("pooled", "pooled_probe")):
            found = token_probes(tokens[0], train_y, tokens[1], p.test.y, read=cast(Any, read), prefix=prefix)
            for i, value in enumerate(found.values()):
                m.add(metric, value, arm=name, step=i + 1)


def _tokens(net: nn.Module, blocks: list[str], x: Tensor) -> dict[str, Tensor]:
    with evaluating(net), torch.no_grad(), LayerTap(net, blocks) as tap:
        net(x)
    return {name: tap[name] for name in blocks}


def _heads(m: Measurements, net: nn.Module, x: Tensor) -> None:
    with _if_possible():
        for i, heads in enumerate(attention_distance(net, x).matrix):
            m.add("head_sd", float(np.nanstd(heads, ddof=1)), arm="vit", step=i + 1)
            m.add("head_distance", float(np.nanmean(heads)), arm="vit", step=i + 1)


def _few(m: Measurements, net: nn.Module, few: nn.Module, x: Tensor, s: Networks) -> None:
    blocks = blocks_of(net, x)
    cross = compare(net, few, x, layers_a=blocks, layers_b=blocks, batch_size=s.compared_at_once).cross.matrix
    for i, value in enumerate(np.diagonal(cross)):
        m.add("settled", float(value), arm="few", step=i + 1)


def _cut(m: Measurements, net: nn.Module, make: Any, p: Problem, s: Networks, seed: int) -> None:
    """Similarity across a block in the middle, with its skips and, in a network trained so, without."""
    x = p.test.x[: s.compared]
    blocks = blocks_of(net, x)
    middle = max(1, len(blocks) // 2 - 1)  # the fourth of eight
    cut = train(make, p, s, seed, cut=blocks[middle])
    with remove_skip(cut, blocks[middle], x[:2]):
        m.add("accuracy", evaluate(cut, *p.test, accuracy), arm="cut")
        found = compare(net, cut, x, batch_size=s.compared_at_once)
    for name, own in (("vit", found.a), ("cut", found.b)):
        before, after = (
            [i for i, layer in enumerate(own.names_a) if any(layer == b or layer.startswith(f"{b}.") for b in part)]
            for part in (blocks[:middle], blocks[middle + 1 :])
        )
        m.add("across", float(np.nanmean(own.matrix[np.ix_(before, after)])), arm=name)
    if seed == 0:
        m.array("map_cut", found.b.matrix)


def _likeness(m: Measurements, nets: dict[str, nn.Module], x: Tensor, s: Networks) -> None:
    """Mean similarity of the Mixer's blocks to those of the other two."""
    blocks = {name: blocks_of(nets[name], x) for name in ("vit", "cnn", "mixer")}
    mixed = partial(compare, batch_size=s.compared_at_once, layers_b=blocks["mixer"])
    for name in ("vit", "cnn"):
        cross = mixed(nets[name], nets["mixer"], x, layers_a=blocks[name]).cross.matrix
        m.add("likeness", float(np.nanmean(cross)), arm=name)
