"""How the site renders equations and docstrings, without a script from the network.

Equations become pictures inside the page (matplotlib's mathtext, as one SVG path each), in ``math`` fences of the pages
and in the docstrings. The reStructuredText roles of the docstrings become Markdown.
"""

import html
import re
from typing import Any

import griffe
from matplotlib.path import Path
from matplotlib.textpath import TextPath

_STEP = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
_EM = 10.0
_MATHTEXT = (  # what mathtext spells otherwise
    (re.compile(r"\\(?:Big|big|Bigl|Bigr|bigl|bigr)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\sqrt\s+(\\?\w+)"), r"\\sqrt{\1}"),
    (re.compile(r"\\t?frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(le|ge|ne)(?![A-Za-z])"), r"\\\1q"),
    (re.compile(r"\\[lr]Vert(?![A-Za-z])"), r"\\Vert"),
)
_FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DISPLAY = re.compile(r"^([ ]*)\.\. math::[ ]*(.*)\n((?:[ ]*\n|\1[ ]+.*(?:\n|$))*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]*)`")
_ROLE = re.compile(r":(class|func|meth|mod|data|attr|exc):`(~?)([^`]+)`")
_DIRECTIVE = re.compile(r"^::$", re.MULTILINE)


def svg(equation: str, *, display: bool) -> str:
    """The equation as an inline SVG in the color of the text; its source is the text alternative."""
    text = " ".join(equation.split())
    for spelling, other in _MATHTEXT:
        text = spelling.sub(other, text)
    try:
        path = TextPath((0, 0), f"${text}$", size=_EM, usetex=False)
    except ValueError:  # beyond mathtext: the source itself
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


def display(equation: str) -> str:
    """One or more equations, a blank line between them, as blocks of their own."""
    parts = [part for part in re.split(r"\n\s*\n", equation.strip()) if part.strip()]
    return "\n\n".join(f'<div class="equations">{svg(part, display=True)}</div>' for part in parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``math`` fences of a page (called by mkdocs)."""
    return _FENCE.sub(lambda match: display(match[1]), markdown)


def _display_block(match: re.Match[str]) -> str:
    """A ``math`` directive, at its own indentation."""
    lines = display(match[2] + "\n" + match[3]).split("\n")
    return "".join(f"{match[1]}{line}\n" for line in lines) + "\n"


def to_markdown(text: str) -> str:
    """A docstring's reStructuredText, as far as ours goes, as Markdown."""
    text = _DISPLAY.sub(_display_block, text)
    text = _INLINE.sub(lambda m: svg(m[1], display=False), text)
    text = _ROLE.sub(lambda m: f"`{m[3].rsplit('.', 1)[-1] if m[2] or m[3].startswith('.') else m[3]}`", text)
    return _DIRECTIVE.sub("", text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed (called by mkdocstrings)."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
