"""The boundary to code that is not ours: whatever it raises becomes one sentence that says what, where and why."""

import asyncio
import importlib
import os
import sys

import pytest
import torch

from mlcollage._users import described, users_code
from mlcollage.data import Labeled, arrays, load_workload, problem
from mlcollage.errors import InvalidInput, StoreError, UnknownName, UserCodeError
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.paper import find_paper
from mlcollage.lab.publish import make_slide
from mlcollage.lab.store import Store


class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")


class Leaving(SystemExit):
    pass


RAISED = [
    ("ValueError('a\\n b')", "ValueError: a"),
    ("KeyError('k')", "KeyError: 'k'"),
    ("EOFError", "EOFError"),
    ("StopIteration(3)", "StopIteration: 3"),
    ("AssertionError", "AssertionError"),
    ("SystemExit(2)", "SystemExit: 2"),
    ("GeneratorExit", GeneratorExit),
    ("KeyboardInterrupt", KeyboardInterrupt),
    ("MemoryError", "out of memory"),
    ("ValueError('\\ud800 \\x1b[31m')", r"ValueError: ? ?[31m"),
    ("UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'bad')", "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff"),
    ("OSError(2, 'gone', 'file')", "FileNotFoundError: [Errno 2] gone: 'file'"),
    ("BrokenPipeError", "BrokenPipeError"),
    ("ValueError('x' * 10000)", "ValueError: xxx"),
    ("ExceptionGroup('several', [ValueError('one')])", "ExceptionGroup: several (1 sub-exception)"),
]
BODY = "import torch\nfrom mlcollage.data import Labeled\n\ndef deep(n):\n    return deep(n + 1)\n\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the text of a module of the user's; gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        sys.modules.pop(f"mlcollage_user_{name[:-3]}", None)
        return name

    return write


def one_sentence(error, *words):
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert text.isprintable()
    assert text.endswith(".")
    assert len(text) < 500


@pytest.mark.parametrize(("raised", "said"), RAISED, ids=[r for r, _ in RAISED])
def test_whatever_a_function_raises_is_one_sentence(module, raised, said):
    file = module(f"{BODY}def f():\n    raise {raised}\n")
    if not isinstance(said, str):
        with pytest.raises(said):
            load_workload(f"{file}:f")
        return
    with pytest.raises(UserCodeError) as error:
        load_workload(f"{file}:f")
    one_sentence(error, f"the function mine.py:f failed with {said}", "(mine.py, line 8, in f)")
    assert error.value.__cause__ is not None


def test_errors_that_cannot_be_printed_and_others_that_are_no_exception():
    with (
        pytest.raises(UserCodeError, match=r"f failed with Mute \(its message cannot be printed: ValueError\)"),
        users_code("f"),
    ):
        raise Mute
    with pytest.raises(UserCodeError, match="CancelledError"), users_code("f"):
        raise asyncio.CancelledError
    with pytest.raises(UserCodeError, match="Leaving"), users_code("f"):
        raise Leaving
    with pytest.raises(UnknownName, match="ours"), users_code("f"):
        raise UnknownName("ours")
    assert described(ValueError()) == "ValueError"
    assert described(SyntaxError("no null bytes")) == "SyntaxError: no null bytes"  # of no file and no line


WHEN = {
    "import": ("raise EOFError\n", "importing mine.py failed with EOFError (mine.py, line 1, in <module>)"),
    "exit at import": ("import sys\nsys.exit(0)\n", "importing mine.py failed with SystemExit: 0 (mine.py, line 2, in"),
    "syntax": ("\ndef f(:\n", "importing mine.py failed with SyntaxError: invalid syntax (mine.py, line 2)"),
    "bytes": ("# \x00\ndef f(): pass\n", "importing mine.py failed with"),
    "package": ("import no_such_x.y\n", "the module mine.py needs 'no_such_x', which is not installed"),
    "name": ("from torch import no_such\n", "importing mine.py failed with ImportError: cannot import name 'no_such'"),
    "attribute": ("def __getattr__(n): raise EOFError(n)\n", "looking up f in mine.py failed with EOFError: f"),
    "absent": ("g = 1\n", "mine.py has no function 'f'; it has none"),
    "no function": ("f = 1\n", "mine.py:f is int, not a function"),
    "signature": ("def f(a, *, b): pass\n", "mine.py:f must be callable without arguments"),
    "none": ("def f(): pass\n", "the NoneType it returned lacks train, test, num_classes"),
    "list": ("def f(): return [1]\n", "the list it returned lacks train"),
    "coroutine": ("def f():\n    yield 1\n", "the generator it returned lacks train"),
    "property": (
        "class f:\n    @property\n    def train(self): raise EOFError('late')\n",
        "what mine.py:f returned failed with EOFError: late (mine.py, line 3, in train)",
    ),
    "name's type": (
        "def f(): return dict(train=[], test=[], num_classes=2, name=5)\n",
        "name of what mine.py:f returned",
    ),
    "recursion": (f"{BODY}def f(): return deep(0)\n", "the function mine.py:f failed with RecursionError"),
    "classes": ("def f(): return dict(train=[(1, 2)], test=[(1, 2)], num_classes='3')\n", "num_classes must be an int"),
}


@pytest.mark.parametrize("when", WHEN)
def test_what_can_go_wrong_before_the_data_are_there(module, when):
    text, said = WHEN[when]
    with pytest.raises(InvalidInput) as error:
        load_workload(f"{module(text)}:f")
    one_sentence(error, said)


DATASET = """
from torch.utils.data import Dataset
from torch import nn
class D(Dataset):
    def __init__(self, at=None, size=20): self.at, self.size = at, size
    def __len__(self):
        if self.at == "len": raise EOFError("lost count")
        return self.size
    def __getitem__(self, i):
        if i == self.at: raise StopIteration("cannot decode")
        return torch.full((2,), float(i)), i % 2
class Block(D):
    def __getitems__(self, rows): return [self[i] for i in rows]
class Short(D):
    def __getitems__(self, rows): return [self[i] for i in rows][1:]
def f(): return Labeled(D("len"), D(), 2)
def g(): return Labeled(D(19), D(), 2)
def h(): return Labeled(D(), D(size=-3), 2)
def i(): return Labeled(D(7), D(), 2)
def j(): return Labeled(Block(7), D(), 2)
def k(): return Labeled(Short(), D(), 2)
def m(): return Labeled(D(), D(), 2, lambda: exit())
class Net(nn.Module):
    def forward(self, x): raise EOFError("no forward")
def n(): return Labeled(D(), D(), 2, Net)
"""


def test_what_a_dataset_or_a_model_raises_names_the_sample(module):
    file = module(BODY + DATASET)
    for name, said in {
        "f": "the length of mine.py:f: train failed with EOFError: lost count (mine.py, line 13, in __len__)",
        "g": "mine.py:g: train[19] failed with StopIteration: cannot decode (mine.py, line 16, in __getitem__)",
        "h": "the length of mine.py:h: test failed with ValueError: __len__() should return >= 0",
        "k": "mine.py:k: train.__getitems__ gave 1 samples where 2 were asked for",
    }.items():
        with pytest.raises(InvalidInput) as error:
            load_workload(f"{file}:{name}")
        one_sentence(error, said)
    for name in "ij":
        workload = load_workload(f"{file}:{name}")
        for read in (
            lambda w: arrays(w.train),
            lambda w: arrays(torch.utils.data.Subset(w.train, [3, 7]), 2),
            lambda w: problem(w, lambda: w),
            lambda w: w.describe(every=True),
        ):
            with pytest.raises(UserCodeError, match=r"(\[7\]|\[1\]) failed with StopIteration: cannot decode") as error:
                read(workload)
            one_sentence(error)
    for name, said in {"m": "model() failed with SystemExit", "n": "failed with EOFError: no forward (mine.py"}.items():
        with pytest.raises(UserCodeError) as error:
            load_workload(f"{file}:{name}").describe()
        one_sentence(error, said)


def test_a_folder_that_was_changed_is_left_again(module, tmp_path):
    file = module(
        f"import os\nos.chdir('/')\n{BODY}{DATASET}def o():\n    os.chdir('/')\n    return Labeled(D(), D(), 2)\n"
    )
    assert len(load_workload(f"{file}:o").train) == 20
    assert os.getcwd() == str(tmp_path)


# Plug-ins


def edited(probe, monkeypatch, text, room="study", old=None):
    file = probe / "probe_paper" / f"{room}.py"
    file.write_text(text if old is None else file.read_text().replace(old, text))
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.startswith("probe_paper")]:
        monkeypatch.delitem(sys.modules, name)


ADAPT, MEASURE = "    return Probe(workload.num", "    measured = Measurements()"
BROKEN = {
    "import": ("raise EOFError('x')", None, "importing the study of probe failed with EOFError: x"),
    "exit": ("import sys; sys.exit()", None, "importing the study of probe failed with SystemExit"),
    "empty": ("", None, "must define STUDY"),
    "STUDY": ("    raise StopIteration", "    return Study(claims", "STUDY of probe failed with StopIteration"),
    "experiments": ("    assert False; settings", "    settings", "STUDY of probe failed with AssertionError"),
    "adapt": (
        "    return [].pop()",
        "    return Probe(workload.num",
        "adapt of experiment probe failed with IndexError",
    ),
    "adapted": (
        "    return 3 #",
        "    return Probe(workload.num",
        "adapt of experiment probe returned int; expected Probe",
    ),
    "measure": ("    raise SystemExit #", MEASURE, "experiment probe failed with SystemExit"),
    "returned": (
        "    return None #",
        "    measured = Measurements()",
        "returned NoneType; it must return Measurements",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_study_is_one_sentence(probe, monkeypatch, tmp_path, case):
    text, old, said = BROKEN[case]
    edited(probe, monkeypatch, text if old is None else f"{text}\n{old}", old=old)

    def measure():
        study = BoundStudy("probe", "smoke", "iris" if case.startswith("adapt") else None)
        return study.measure(study.runs()[0])

    with pytest.raises(InvalidInput) as error:
        measure()
    one_sentence(error, said)


def test_a_broken_slide_is_one_sentence(probe, monkeypatch, tmp_path):
    study = BoundStudy("probe", "smoke")
    store, run = Store(tmp_path / "r"), study.runs()[0]
    store.commit(run, study.measure(run), {})
    evidence = study.evidence(store)
    for text, said in {
        "def collage(e, v): raise EOFError": "the slide of probe failed with EOFError",
        "def collage(e): pass": "the slide of probe failed with TypeError: collage() takes 1",
        "def collage(e, v): pass": "the slide of probe returned NoneType; it must return a Collage",
        "": "the slide of probe failed with AttributeError",
        "import no_such_x": "importing the slide of probe failed with ModuleNotFoundError: No module named 'no_such_x'",
    }.items():
        edited(probe, monkeypatch, text, "slide")
        with pytest.raises(InvalidInput) as error:
            make_slide(study, evidence, {})
        one_sentence(error, said)


def test_a_broken_entry_point_is_one_sentence(probe, monkeypatch):
    points = probe / "probe_paper-0.1.dist-info" / "entry_points.txt"
    (probe / "probe_paper" / "__init__.py").write_text("raise EOFError('x')")
    for name in [n for n in sys.modules if n.startswith("probe_paper")]:
        monkeypatch.delitem(sys.modules, name)
    for value, said in {
        "probe_paper.inner": "EOFError: x",
        "probe paper!": "finding the plug-in probe failed with",
    }.items():
        points.write_text(f"[mlcollage.papers]\nprobe = {value}\n")
        with pytest.raises(InvalidInput) as error:
            find_paper("probe")
        one_sentence(error, said)
    points.write_text("[mlcollage.papers]\nprobe = probe_paper\n")
    (probe / "probe_paper" / "paper.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="is not valid TOML"):
        find_paper("probe")


def test_errors_of_ours_pass():
    with pytest.raises(StoreError), users_code("f"):
        raise StoreError("full")
    assert issubclass(UserCodeError, InvalidInput)
    data = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.arange(4) % 2)
    assert Labeled(data, data, 2).describe()["train"] == 4
