"""The network inside its wrappers, and the logits inside what it returns."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mlcollage.errors import InvalidInput
from mlcollage.nn.wrapped import logits_of, unwrap


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        nn.DataParallel,
        compiled,
        lambda m: compiled(nn.DataParallel(m)),
        lambda m: nn.DataParallel(compiled(nn.DataParallel(m))),
    ],
)
def test_unwrap_finds_the_network_itself(wrap):
    model = nn.Sequential(nn.Linear(3, 2))
    assert unwrap(wrap(model)) is model


def wrapped_by_processes(rank, size):
    model = nn.Linear(3, 2)
    parallel = nn.parallel.DistributedDataParallel(model)
    around = nn.parallel.DistributedDataParallel(compiled(model))
    return {"found": [unwrap(network) is model for network in (parallel, compiled(parallel), around)]}


def test_unwrap_finds_the_network_in_distributed_data_parallel(in_processes):
    (only,) = in_processes(__file__, "wrapped_by_processes", 1)
    assert only["found"].tolist() == [True] * 3


def test_unwrap_leaves_a_module_with_a_child_called_module_alone():
    model = nn.Module()
    model.module = nn.Linear(3, 2)
    assert unwrap(model) is model


def test_unwrap_refuses_what_is_no_module():
    with pytest.raises(InvalidInput, match=r"must be an nn\.Module, not function"):
        unwrap(lambda x: x)


def test_logits_are_found_where_models_put_them():
    z = torch.ones(2, 3)
    named = namedtuple("Output", ["loss", "logits"])
    for output in (z, {"loss": z.sum(), "logits": z}, SimpleNamespace(logits=z), named(z.sum(), z)):
        assert logits_of(output) is z


@pytest.mark.parametrize("output", [(torch.ones(2, 3),), [torch.ones(2, 3)], {"last_hidden_state": 1}, None, 3.0])
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(InvalidInput, match=rf"the model returned {type(output).__name__}; it must return logits"):
        logits_of(output)


def test_a_model_without_numbers_is_refused():
    with pytest.raises(InvalidInput, match="the model is on the meta device"):
        unwrap(nn.DataParallel(nn.Linear(2, 2)).module.to("meta"))
