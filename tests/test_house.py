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
FLOORS = (
    "__main__",
    "cli",
    "testing",
    "portraits",
    "papers",
    "lab",
    "collage",
    "train",
    "measure",
    "infer",
    "stats",
    "nn",
    "data",
)
SHARED = {"errors", "_checks", "_npz", "_random", "_users"}  # and mlcollage itself, for its version
MODULES = sorted(SOURCE.rglob("*.py"))
LAYOUT = ("__init__.py", "__init__.pyi", "paper.toml", "study/__init__.py", "study/claims.py", "slide.py")
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


def graph_of(root: Path) -> dict[str, set[str]]:
    """Each module and the modules of the same package that it imports anywhere, by dotted name; packages left out.

    Imports may be absolute or relative, at the top, in a function or for type checkers.
    """
    files = {".".join(f.relative_to(root).with_suffix("").parts): f for f in root.rglob("*.py")}
    modules = {name for name, f in files.items() if f.name != "__init__.py"}
    graph = {}
    for name in modules:
        package = name.split(".")[:-1]
        targets = set()
        for node in ast.walk(ast.parse(files[name].read_text("utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*start, *(node.module.split(".") if node.module else [])])
                targets |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        graph[name] = (targets & modules) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or over others."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    reached = {name: reach(name) for name in graph}
    around = {tuple(sorted(o for o in reached[n] if n in reached[o])) for n in graph if n in reached[n]}
    return [list(group) for group in sorted(around)]


def test_no_import_goes_round_in_a_circle():
    assert circles(graph_of(SOURCE.parent)) == []


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("from .b import x", "from . import a"),
        ("from house.b import x", "def f():\n    from .a import y"),
        ("import house.b", "if TYPE_CHECKING:\n    from house import a"),
    ],
)
def test_a_planted_circle_is_found(tmp_path, a, b):
    (tmp_path / "house").mkdir()
    for name, text in (("__init__", ""), ("a", a), ("b", b), ("c", "from . import a")):
        (tmp_path / "house" / f"{name}.py").write_text(text)
    assert circles(graph_of(tmp_path)) == [["house.a", "house.b"]]


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_every_paper_has_the_one_layout(folder):
    assert [part for part in LAYOUT if not (folder / part).exists()] == []
    identity = tomllib.loads((folder / "paper.toml").read_text("utf-8"))
    assert identity["slug"] == folder.name
    assert identity["summary"].strip()
    assert identity["usage"].strip()
    study = importlib.import_module(f"mlcollage.papers.{folder.name}.study").STUDY
    assert 3 <= len(study.headlines) <= 6


@pytest.mark.parametrize("folder", PAPERS, ids=lambda p: p.name)
def test_a_method_never_imports_its_study(folder):
    of_the_study = f"mlcollage.papers.{folder.name}.study"
    for module, targets in graph_of(SOURCE.parent).items():
        inside = module.startswith((of_the_study, f"mlcollage.papers.{folder.name}.slide"))
        if module.startswith(f"mlcollage.papers.{folder.name}.") and not inside:
            assert not [t for t in targets if t.startswith(of_the_study)], module


def test_no_class_name_has_two_meanings():
    """Public classes: a name stands for one thing in the whole house."""
    homes: dict[str, list[str]] = {}
    for file in MODULES:
        if any(part.startswith("_") for part in parts(file)) or "study" in parts(file):
            continue
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name_of(file))
    # BayesianNetwork.fit takes a settings object named like the sampler of mlcollage.infer that it runs: one meaning.
    one_meaning = {"Ensemble", "SGHMC", "SGLD", "SWAG"}
    assert {name: files for name, files in homes.items() if len(files) > 1 and name not in one_meaning} == {}


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
def test_modules_say_which_concept_they_hold(file):
    assert ast.get_docstring(ast.parse(file.read_text("utf-8"))), "a module begins with a docstring"


@pytest.mark.parametrize("file", [f for f in MODULES if f.name != "__init__.py"], ids=name_of)
def test_public_names_exist_and_are_documented(file):
    """Public is what ``__all__`` lists, or, in a module without it, what has no leading underscore."""
    module = importlib.import_module(".".join(["mlcollage", *parts(file)]))
    own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    public = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    assert len(set(public)) == len(public)
    for name in public:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"
            assert not (inspect.isclass(thing) and thing.__doc__ is None), f"{name} has no docstring of its own"
