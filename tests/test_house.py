"""The house: arrows point down only, papers have the same rooms, modules stay small, public names are documented."""

import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import mlcollage
from mlcollage.lab.paper import papers

SOURCE = Path(mlcollage.__file__).parent
FLOORS = ("cli", "testing", "papers", "lab", "collage", "train", "measure", "infer", "stats", "nn", "data")
SHARED = {"errors", "_checks", "_random"}  # and mlcollage itself, for its version
MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = ("__init__.py", "paper.toml", "study.py", "slide.py")
PAPERS = sorted(p.parent for p in (SOURCE / "papers").glob("*/paper.toml"))


def parts(file: Path) -> tuple[str, ...]:
    names = list(file.relative_to(SOURCE).with_suffix("").parts)
    return tuple(names[:-1] if names[-1] == "__init__" else names)


def imported(file: Path) -> list[tuple[str, ...]]:
    """Modules of this package that a file imports anywhere, also inside functions and for type checkers."""
    package = ["mlcollage", *file.relative_to(SOURCE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = [*start, *(node.module.split(".") if node.module else [])]
            found += [[*base, alias.name] for alias in node.names]
    return [tuple(name[1:]) for name in found if name[0] == "mlcollage" and len(name) > 1]


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def test_every_module_is_on_a_floor():
    assert {parts(f)[0] for f in MODULES if parts(f)} <= {*FLOORS, *SHARED}


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_arrows_point_down_only(file):
    here = parts(file)
    for target in imported(file):
        if target[0] in SHARED or target[0] == "__version__":
            continue
        assert here, f"mlcollage/__init__.py imports {target}: it must stay empty-handed"
        assert here[0] not in SHARED or target == ("errors", target[-1]), f"{here} may import errors only"
        if target[0] == here[0]:
            if here[0] == "papers":
                assert len(here) > 1, "papers/__init__.py imports a paper"
                assert target[1] == here[1], f"{name_of(file)} imports another paper, {target[1]}"
            continue
        assert FLOORS.index(target[0]) > FLOORS.index(here[0]), f"{name_of(file)} reaches up to {'.'.join(target)}"


def test_no_import_goes_round_in_a_circle():
    """Within a floor too: a module that a module imports at its top does not import that one at its top."""
    known = {parts(f): f for f in MODULES}

    def at_the_top(file: Path) -> set[tuple[str, ...]]:
        tree = ast.parse(file.read_text("utf-8"))
        tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        targets = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                name = tuple(node.module.split("."))[1:] if node.module.startswith("mlcollage.") else ()
                targets |= {t for t in (name, *((*name, a.name) for a in node.names)) if t in known and t}
        return targets - {parts(file)}

    graph = {name: at_the_top(file) for name, file in known.items()}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, set())
        assert start not in seen, f"{'.'.join(start)} imports itself in a circle"


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_every_paper_has_its_rooms(folder):
    assert [room for room in ROOMS if not (folder / room).exists()] == []
    identity = tomllib.loads((folder / "paper.toml").read_text("utf-8"))
    assert identity["slug"] == folder.name
    assert identity["summary"].strip()
    assert identity["usage"].strip()
    study = importlib.import_module(f"mlcollage.papers.{folder.name}.study")
    assert study.VERSION >= 1
    assert study.CLAIMS
    assert callable(study.runs)
    assert callable(study.measure)


def test_there_are_sixteen_papers_in_four_months():
    ours = [p for p in papers().values() if p.package is None or p.package.startswith("mlcollage.")]
    assert len(ours) == 16
    months = [p.month for p in ours]
    assert {m: months.count(m) for m in months} == {"2021-03": 4, "2021-05": 4, "2021-06": 4, "2021-09": 4}


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_the_papers_usage_runs_as_printed(folder, tmp_path, monkeypatch, capsys):
    usage = tomllib.loads((folder / "paper.toml").read_text("utf-8"))["usage"]
    monkeypatch.chdir(tmp_path)
    exec(compile(usage, f"usage of {folder.name}", "exec"), {"__name__": "usage"})  # noqa: S102 (our own five lines)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_modules_stay_small_and_say_what_they_are(file):
    text = file.read_text("utf-8")
    assert len(text.splitlines()) < 600
    assert ast.get_docstring(ast.parse(text)), "a module begins with a docstring"


@pytest.mark.parametrize("file", [f for f in MODULES if "__all__" in f.read_text("utf-8")], ids=name_of)
def test_public_names_exist_and_are_documented(file):
    module = importlib.import_module(".".join(["mlcollage", *parts(file)]))
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"
            assert not (inspect.isclass(thing) and thing.__doc__ is None), f"{name} has no docstring of its own"
