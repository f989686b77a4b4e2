"""A user's function may return any kind of workload, as an object of it, a dictionary or an object with its fields."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from mlcollage.data import Labeled, Workload, kinds
from mlcollage.errors import InvalidInput

DATA = TensorDataset(torch.rand(8, 2), torch.arange(8) % 2)


@dataclass(frozen=True)
class Songs(Workload):
    songs: list[str]
    tempo: int = 100


@dataclass(frozen=True)
class Covers(Workload):
    songs: list[str]
    artists: int


@pytest.fixture(autouse=True)
def three_kinds(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", (Labeled, Songs, Covers))


@pytest.mark.parametrize("form", [lambda **fields: fields, SimpleNamespace])
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"train": DATA, "test": DATA, "num_classes": 2}, Labeled),
        ({"songs": ["a"], "tempo": 90}, Songs),
        ({"songs": ["a"], "name": "mine"}, Songs),
    ],
)
def test_the_fields_tell_the_kind(form, fields, kind):
    workload = kinds.as_workload(form(**fields), "mine.py:f")
    assert type(workload) is kind
    assert {name: getattr(workload, name) for name in fields} == fields


def test_an_object_of_any_kind_is_taken_as_it_is():
    class Unlisted(Workload):
        pass

    for workload in (Songs(songs=["a"]), Unlisted()):
        assert kinds.as_workload(workload, "f") is workload


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"songs": ["a"], "tempi": 3},
            "f must return a mlcollage.data.Songs.* with songs .and perhaps tempo.*has tempi too",
        ),
        ({"artists": 3}, "return a mlcollage.data.Covers.*the dict it returned lacks songs"),
        ({"train": DATA}, "return a mlcollage.data.Labeled.*lacks test, num_classes"),
        (
            (DATA, DATA),
            "other kinds are mlcollage.data.Songs, mlcollage.data.Covers; the tuple it returned lacks train",
        ),
        (None, "the NoneType it returned lacks train"),
        (SimpleNamespace(songs=["a"], artists=1), "has the fields of a Songs and of a Covers; return one of these"),
        ({"songs": ["a"], "name": 3}, "name of what f returned must be a string; it is 3"),
        (Songs(songs=["a"], fingerprint=b"x"), "fingerprint of what f returned must be a string"),
    ],
)
def test_what_fits_no_kind_or_several_is_refused(given, message):
    with pytest.raises(InvalidInput, match=message):
        kinds.as_workload(given, "f")
