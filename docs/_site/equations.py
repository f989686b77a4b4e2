"""How the site renders equations and docstrings, without a script from the network.

Equations become pictures inside the page (matplotlib's mathtext, as one SVG path each), in ``math`` fences of the pages
and in the docstrings. The reStructuredText roles of the docstrings become Markdown.

What cannot be rendered, an equation beyond mathtext or a reStructuredText table, is a warning that names the page or
the object. The site is built strictly (``strict`` in ``mkdocs.yml``), so it fails the build.
"""

import html
import logging
import re
from typing import Any

import griffe
from matplotlib.path import Path
from matplotlib.textpath import TextPath

_STEP = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
_EM = 10.0
_PHONE = 20.0  # em
_LOG = logging.getLogger("mkdocs.hooks.equations")  # below "mkdocs", whose warnings a strict build counts


class _Dummies(logging.Handler):
    """What matplotlib says when it draws a dummy in place of a character that its fonts lack."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.said.append(record.getMessage())


_DUMMIES = _Dummies()
logging.getLogger("matplotlib.mathtext").addHandler(_DUMMIES)
_MATHTEXT = (  # what mathtext spells otherwise
    (re.compile(r"\\(?:Big|big|Bigl|Bigr|bigl|bigr)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\sqrt\s+(\\?\w+)"), r"\\sqrt{\1}"),
    (re.compile(r"\\[td]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\w)\s*(\w)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\w)\s*(?=\{)"), r"\\frac{\1}"),
    (re.compile(r"\\(le|ge|ne)(?![A-Za-z])"), r"\\\1q"),
    (re.compile(r"\\[lr]Vert(?![A-Za-z])"), r"\\Vert"),
)
_FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DISPLAY = re.compile(r"^([ ]*)\.\. math::[ ]*(.*)\n((?:[ ]*\n|\1[ ]+.*(?:\n|$))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]*)`")
_ROLE = re.compile(r":(class|func|meth|mod|data|attr|exc):`(~?)([^`]+)`")
_LITERAL = re.compile(r"^([ ]*)(.*)::$", re.MULTILINE)
_TABLE = re.compile(r"^[ ]*={3,}(?:[ ]+={3,})+[ ]*$", re.MULTILINE)


def _tall(text: str) -> str:
    """Fractions that stand by themselves in a displayed equation, in full size."""
    depth, out = 0, []
    for i, part in enumerate(re.split(r"(\\frac(?![A-Za-z])|[{}])", text)):
        depth += (part == "{") - (part == "}")
        out.append("\\dfrac" if i % 2 and part == "\\frac" and depth == 0 else part)
    return "".join(out)


def svg(equation: str, *, display: bool, where: str) -> str:
    """The equation as an inline SVG in the color of the text; its source is the text alternative.

    ``where`` is the page or object that holds it, for the warning if it cannot be typeset.
    """
    text = " ".join(equation.split())
    for spelling, other in _MATHTEXT:
        text = spelling.sub(other, text)
    _DUMMIES.said.clear()
    try:
        path = TextPath((0, 0), f"${_tall(text) if display else text}$", size=_EM, usetex=False)
        if _DUMMIES.said:
            raise ValueError(_DUMMIES.said[0])
    except ValueError as error:  # beyond mathtext
        why = str(error).strip().splitlines()[-1]
        _LOG.warning("%s: the equation '%s' cannot be typeset: %s", where, " ".join(equation.split()), why)
        return f"<code>{html.escape(text)}</code>"
    steps = [
        _STEP[int(code)] + " ".join(f"{x:.2f} {-y:.2f}" for x, y in points.reshape(-1, 2) if code != Path.CLOSEPOLY)
        for points, code in path.iter_segments(simplify=False)
    ]
    box = path.get_extents()
    width, height = box.width + 0.2, box.height + 0.2
    style = "" if display else f"vertical-align:{(box.y0 - 0.1) / _EM:.3f}em;"
    return (
        f'<svg class="equation" role="img" aria-label="{html.escape(text, quote=True)}" '
        f'style="{style}width:{width / _EM:.3f}em;height:{height / _EM:.3f}em" '
        f'viewBox="{box.x0 - 0.1:.2f} {-box.y1 - 0.1:.2f} {width:.2f} {height:.2f}">'
        f'<path fill="currentColor" d="{"".join(steps)}"/></svg>'
    )


def display(equation: str, where: str) -> str:
    """One or more equations, a blank line between them, as blocks of their own."""
    parts = [part for part in re.split(r"\n\s*\n", equation.strip()) if part.strip()]
    return "\n\n".join(_block(svg(part, display=True, where=where)) for part in parts)


def _block(equation: str) -> str:
    """A block; one that is wider than a phone scrolls by itself, so the keyboard must reach it."""
    width = re.search(r"width:([\d.]+)em", equation)
    reach = ' tabindex="0" role="group" aria-label="equation"' if width and float(width[1]) > _PHONE else ""
    return f'<div class="equations"{reach}>{equation}</div>'


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace ``math`` fences of a page (called by mkdocs)."""
    return _FENCE.sub(lambda match: display(match[1], page.file.src_uri), markdown)


def _display_block(match: re.Match[str], where: str) -> str:
    """A ``math`` directive, at its own indentation."""
    lines = display(match[2] + "\n" + match[3], where).split("\n")
    return "".join(f"{match[1]}{line}\n" for line in lines) + "\n"


def to_markdown(text: str, where: str) -> str:
    """A docstring's reStructuredText, as far as ours goes, as Markdown; ``where`` names the object in warnings."""
    if _TABLE.search(text):
        _LOG.warning("%s: a table of '====' lines does not render; write it with pipes, as in Markdown", where)
    text = _DISPLAY.sub(lambda m: _display_block(m, where), text)
    text = _INLINE.sub(lambda m: svg(m[1], display=False, where=where), text)
    text = _ROLE.sub(lambda m: f"`{m[3].rsplit('.', 1)[-1] if m[2] or m[3].startswith('.') else m[3]}`", text)
    return _LITERAL.sub(lambda m: f"{m[1]}{m[2]}:" if m[2] else "", text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed (called by mkdocstrings)."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj.path)
