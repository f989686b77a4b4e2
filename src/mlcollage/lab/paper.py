"""Which papers there are: built in, planned, and those of installed plug-ins."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MLCollageError, UnknownName

ENTRY_POINTS = "mlcollage.papers"
IDEAS = ("causal", "bootstrap", "regularize", "multilevel", "compute", "adaptive", "robust", "explore")
_PACKAGE = "mlcollage.papers"
_PLANNED = Path(__file__).parent.parent / "papers" / "planned.toml"  # papers that have only their identity yet


@dataclass(frozen=True)
class Paper:
    """Identity of a paper, as its ``paper.toml`` gives it."""

    slug: str
    title: str
    authors: tuple[str, ...]
    month: str
    venue: str
    arxiv: str
    ideas: tuple[str, ...]
    byline: str = ""
    official_code: str = ""
    tagline: str = ""
    summary: str = ""
    usage: str = ""
    number: int | None = None
    package: str | None = None

    @property
    def built(self) -> bool:
        """Whether the method and the study exist (a planned paper has only its identity)."""
        return self.package is not None

    @property
    def built_in(self) -> bool:
        """Whether it comes with this package, and not with a plug-in."""
        return self.package is not None and self.package.startswith(f"{_PACKAGE}.")

    @property
    def short_authors(self) -> str:
        """The byline of the slide."""
        if self.byline:
            return self.byline
        return ", ".join(self.authors) if len(self.authors) <= 3 else f"{self.authors[0]} et al."

    def module(self, room: str) -> ModuleType:
        """Import one room of the paper's folder: ``"study"`` or ``"slide"``."""
        if self.package is None:
            raise UnknownName(
                f"{self.slug} is planned but not built yet, so it has no {room}; `mlcollage list` shows the built ones."
            )
        with users_code(f"importing the {room} of {self.slug}"):
            return importlib.import_module(f"{self.package}.{room}")

    @cached_property
    def origin(self) -> Path | None:
        """Folder of the paper's package."""
        spec = find_spec(self.package) if self.package else None
        return Path(spec.origin).parent if spec and spec.origin else None


def _parse(file: Path, package: str | None) -> Paper:
    try:
        raw: dict[str, Any] = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise InvalidInput(f"{file} is not valid TOML ({error}); correct it.") from error
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read ({error.strerror or error}); make it readable.") from error
    return _build(raw, str(file), package)


def _build(raw: dict[str, Any], where: str, package: str | None) -> Paper:
    needed = {"slug", "title", "authors", "month", "venue", "arxiv", "ideas"}
    known = needed | {"byline", "official_code", "tagline", "summary", "usage", "number"}
    if absent := sorted(needed - set(raw)):
        raise InvalidInput(f"{where} lacks {', '.join(absent)}; add it (see an existing paper.toml).")
    if unknown := sorted(set(raw) - known):
        raise InvalidInput(f"{where} has unknown keys {', '.join(unknown)}; known are: {', '.join(sorted(known))}.")
    for key, value in raw.items():
        kind: type[Any] = {"authors": list, "ideas": list, "number": int}.get(key, str)
        if type(value) is not kind or (kind is list and not all(isinstance(v, str) for v in value)):
            wanted = {list: "a list of strings", int: "a whole number"}.get(kind, "a string")
            raise InvalidInput(f"{key} in {where} must be {wanted}; it is {value!r}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", raw["slug"]):
        raise InvalidInput(f"slug in {where} must be lower-case letters, digits and '_'; it is {raw['slug']!r}.")
    code = raw.get("official_code", "")
    if code and not re.fullmatch(r"https?://[\x21-\x7e]+", code):
        raise InvalidInput(f"official_code in {where} must be an http or https address; it is {code!r}.")
    if not re.fullmatch(r"(\d{4}\.\d{4,5}|[a-z.-]+/\d{7})?", raw["arxiv"]):
        raise InvalidInput(f"arxiv in {where} must be a number like 2012.14193, or empty; it is {raw['arxiv']!r}.")
    if not re.fullmatch(r"\d{4}-\d{2}", raw["month"]):
        raise InvalidInput(f"month in {where} must be written like 2021-05; it is {raw['month']!r}.")
    if strange := sorted(set(raw["ideas"]) - set(IDEAS)):
        raise InvalidInput(f"{where} names unknown ideas {', '.join(strange)}; the eight are: {', '.join(IDEAS)}.")
    if raw.get("number", 1) < 1:
        raise InvalidInput(f"number in {where} is the paper's place in a series, 1 or more; it is {raw['number']}.")
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v.strip() if isinstance(v, str) else v for k, v in raw.items()
    }
    return Paper(**fields, package=package)


def papers() -> dict[str, Paper]:
    """All papers by slug, in the order of months: built in, planned, then plug-ins.

    Reads only ``paper.toml`` files, so it is fast and imports no study. A plug-in is an installed package
    with an entry point in the group ``mlcollage.papers`` that names its package. Broken ones are left out, see
    :func:`broken_plugins`.

    Raises
    ------
    InvalidInput
        If the ``paper.toml`` of a paper that is built in is damaged.
    """
    return _look()[0]


def broken_plugins() -> dict[str, str]:
    """What is wrong with plug-ins that cannot be found or read, or whose slug another paper has: a sentence by name."""
    return _look()[1]


def _look() -> tuple[dict[str, Paper], dict[str, str]]:
    """Papers by slug, and sentences on plug-ins that are broken by their names."""
    found: dict[str, Paper] = {}
    home = Path(__file__).parent.parent / "papers"
    # Read, not imported: listing papers takes no time, and a broken paper does not hide the others.
    for file in sorted(home.glob("*/paper.toml")):
        paper = _parse(file, f"{_PACKAGE}.{file.parent.name}")
        found[paper.slug] = paper
    for raw in tomllib.loads(_PLANNED.read_text("utf-8")).get("paper", []) if _PLANNED.exists() else []:
        paper = _build(raw, str(_PLANNED), None)
        found.setdefault(paper.slug, paper)
    broken: dict[str, str] = {}
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        try:
            paper = _plugin(entry)
            # A plug-in may build a paper that is only planned here; it may not replace a built one.
            if paper.slug in found and found[paper.slug].built:
                raise InvalidInput(f"two papers are called {paper.slug!r}; rename the one in {entry.value}.")
        except MLCollageError as error:
            broken[entry.name] = str(error)
        else:
            found[paper.slug] = paper
    return dict(sorted(found.items(), key=lambda item: (item[1].month, item[0]))), broken


def _plugin(entry: importlib.metadata.EntryPoint) -> Paper:
    with users_code(f"finding the plug-in {entry.name}"):
        try:
            spec = find_spec(entry.module)
        except ModuleNotFoundError:  # the package that it lies in is gone
            spec = None
    if spec is None or spec.origin is None:
        raise InvalidInput(f"plug-in {entry.name} names {entry.value!r}, which cannot be found; reinstall it.")
    file = Path(spec.origin).parent / "paper.toml"
    if not file.exists():
        raise InvalidInput(f"plug-in {entry.name} has no paper.toml beside {spec.origin}; add one.")
    return _parse(file, entry.module)


def find_paper(slug: str) -> Paper:
    """The paper of that slug.

    Raises
    ------
    UnknownName
        With the closest names.
    InvalidInput
        If it is of a plug-in that is broken.
    """
    known, broken = _look()
    if slug not in known and slug in broken:
        raise InvalidInput(broken[slug])
    if slug not in known:
        from difflib import get_close_matches

        close = get_close_matches(slug, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`mlcollage list` shows all."
        raise UnknownName(f"there is no paper {slug!r}; {hint}")
    return known[slug]
