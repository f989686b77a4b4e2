"""``mlcollage new``: a plug-in package with a paper's modules that works from the first minute."""

from __future__ import annotations

import keyword
import re
from datetime import date
from importlib.resources import files
from pathlib import Path
from string import Template

from mlcollage.errors import InvalidInput
from mlcollage.lab.paper import papers

_PLACES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "paper.toml": "src/{slug}/paper.toml",
    "__init__.py": "src/{slug}/__init__.py",
    "method.py": "src/{slug}/method.py",
    "study_init.py": "src/{slug}/study/__init__.py",
    "study_claims.py": "src/{slug}/study/claims.py",
    "study_experiments.py": "src/{slug}/study/experiments.py",
    "slide.py": "src/{slug}/slide.py",
    "test_paper.py": "tests/test_{slug}.py",
}


def create(slug: str, parent: Path) -> Path:
    """Write the package into ``parent/<slug with dashes>`` and return that folder.

    Raises
    ------
    InvalidInput
        If the slug is no Python name, is taken, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug) or keyword.iskeyword(slug):
        raise InvalidInput(f"{slug!r} cannot be a paper's name; use lower-case letters, digits and '_', e.g. my_paper.")
    if slug in papers() and papers()[slug].built:
        raise InvalidInput(f"there is a paper {slug!r} already; choose another name.")
    folder = parent / slug.replace("_", "-")
    if folder.exists():
        raise InvalidInput(f"{folder} exists already; choose another name or another --dir.")
    values = {
        "slug": slug,
        "dashed": slug.replace("_", "-"),
        "title": slug.replace("_", " ").capitalize(),
        "month": f"{date.today():%Y-%m}",
    }
    templates = files("mlcollage.lab") / "new_paper"
    for name, place in _PLACES.items():
        target = folder / place.format(slug=slug)
        target.parent.mkdir(parents=True, exist_ok=True)
        # string.Template, since braces are part of the Python code in the templates.
        text = Template((templates / f"{name}.txt").read_text("utf-8")).substitute(values)
        target.write_text(text, "utf-8")
    return folder
