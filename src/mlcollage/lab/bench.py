"""Benchmarks: ours and our peers side by side in one run, recorded with the machine they ran on."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import mlcollage
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MissingFile
from mlcollage.lab.paper import find_paper, papers

__all__ = ["benchmarked", "find_benchmark", "machine", "record", "to_markdown"]

Row = dict[str, Any]


def find_benchmark(slug: str) -> tuple[Path, Callable[..., list[Row]]]:
    """The file ``benchmarks/<slug>.py`` and its function ``bench``.

    Looked for in the current folder, then in the source checkout that mlcollage is imported from.

    Raises
    ------
    UnknownName
        If there is no such paper.
    MissingFile
        If there is none: benchmarks are part of the source, not of the installed package.
    """
    file = _file_of(slug)
    if file is None:
        find_paper(slug)  # a slip of the pen gets the nearest name
        raise MissingFile(f"there is no benchmarks/{slug}.py here; run the command in a checkout of the source.")
    spec = importlib.util.spec_from_file_location(f"benchmark_{slug}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with users_code(f"importing {file}"):
        spec.loader.exec_module(module)
    if not hasattr(module, "bench"):
        raise InvalidInput(f"{file} has no function bench(); add one that returns a list of rows.")
    return file, module.bench


def benchmarked() -> list[str]:
    """Slugs of the built papers that have a benchmark here.

    Raises
    ------
    MissingFile
        If there is none.
    """
    found = [p.slug for p in papers().values() if p.built and _file_of(p.slug) is not None]
    if not found:
        raise MissingFile("there is no folder benchmarks/ here; run the command in a checkout of the source.")
    return found


def _file_of(slug: str) -> Path | None:
    roots = [Path.cwd(), Path(mlcollage.__file__).parents[2]]
    return next((f for root in roots if (f := root / "benchmarks" / f"{slug}.py").exists()), None)


def machine() -> str:
    """The machine in words."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def to_markdown(rows: Sequence[Row]) -> str:
    """Rows with name, what, value, unit and ratio (to the row named as baseline, or None) as a table."""
    lines = ["| what | who | value | ratio |", "| --- | --- | ---: | ---: |"]
    for row in rows:
        ratio = row.get("ratio")
        shown = "" if ratio is None else f"{ratio:.3g}×"
        lines.append(
            f"| {row['what']} | {row['name']} | {format_value(row['value'])} {row.get('unit', '')} | {shown} |"
        )
    return "\n".join(lines)


def format_value(value: float) -> str:
    """Three digits, thousands separated; nothing for a peer that is not there (NaN)."""
    # NaN: a peer that could not be timed.
    if value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def record(slug: str, rows: Sequence[Row], file: Path) -> None:
    """Replace the benchmark's section of ``RESULTS.md`` (or add it)."""
    start, end = f"<!-- {slug} -->", f"<!-- /{slug} -->"
    body = f"{start}\n## {slug}\n\n{to_markdown(rows)}\n\n{machine()}; {date.today().isoformat()}.\n{end}"
    text = file.read_text("utf-8") if file.exists() else "# Benchmarks\n\nWritten by `mlcollage bench <slug>`.\n"
    if start in text and end in text:
        before, rest = text.split(start, 1)
        text = before + body + rest.split(end, 1)[1]
    else:
        # A paper's first results go to the end; later ones replace what stands between its marks.
        text = f"{text.rstrip()}\n\n{body}\n"
    file.write_text(text, "utf-8")
