"""Makes matplotlib's SVG look the same anywhere: fonts travel inside it, and it says what it shows.

With ``svg.fonttype="none"`` text stays text, but matplotlib only names the fonts. Here each face is cut down to the
characters used and embedded as WOFF; a picture stays around 100 kB and can be searched, selected and read aloud.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import unicodedata
from collections import defaultdict
from html import escape, unescape

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from matplotlib import font_manager

from mlcollage.collage.theme import register_fonts

_TEXT = re.compile(r'<(?:text|tspan)\b[^>]*?style="([^"]*font-family:[^"]*)"[^>]*>([^<]*)<')
_OPEN = re.compile(r"<svg\b[^>]*>")
_PROLOGUE = re.compile(r"<!DOCTYPE[^>]*>\s*")
_STYLED = re.compile(r'\bstyle="([^"]*)"')
_EMPTY_TURN = re.compile(r' transform="rotate\(-?0 [^)]*\)"')

Face = tuple[str, str, int]  # family, style, weight


def finish(svg: str, title: str, description: str) -> str:
    """Embed the fonts used, and add title, description and role.

    Parameters
    ----------
    svg
        As written by matplotlib.
    title, description
        What a screen reader says, and what a browser shows as the tooltip.

    Returns
    -------
    str
        The same picture, complete in itself. The same input gives the same output, byte for byte.
    """
    svg = _EMPTY_TURN.sub("", _PROLOGUE.sub("", svg, count=1))
    rules = "".join(font_face(face, "".join(sorted(characters))) for face, characters in sorted(_faces(svg).items()))
    head = (
        f"\n <title>{escape(title, quote=False)}</title>\n <desc>{escape(description, quote=False)}</desc>"
        f'\n <style type="text/css">text{{white-space:pre}}{rules}</style>'
    )
    opening = _OPEN.search(svg)
    if opening is None:
        raise ValueError("this is not an SVG: it has no <svg> element.")
    tag = opening.group()[:-1] + ' role="img" xml:space="preserve" stroke-linejoin="round">'
    return svg[: opening.start()] + tag + head + _STYLED.sub(_as_attributes, svg[opening.end() :])


def _as_attributes(match: re.Match[str]) -> str:
    """``style="fill: #fff"`` as ``fill="#fff"``: sites that clean pictures drop style, and keep attributes."""
    kept = []
    for part in unescape(match.group(1)).split(";"):
        name, _, value = (x.strip() for x in part.partition(":"))
        if name == "font-family":
            value += ", serif" if "STIX" in value else ", sans-serif"
        if value:
            kept.append(f'{name}="{escape(value)}"')
    return " ".join(kept)


def _faces(svg: str) -> dict[Face, set[str]]:
    """Characters set in each face, where a character goes to the first family of its list that has it."""
    used: dict[Face, set[str]] = defaultdict(set)
    for css, content in _TEXT.findall(svg):
        fields = dict(part.strip().split(":", 1) for part in unescape(css).split(";") if ":" in part)
        families = [name.strip().strip("'\"") for name in fields["font-family"].split(",")]
        slant = fields.get("font-style", "normal").strip()
        weight = int(fields.get("font-weight", "400").strip())
        for character in unescape(content):
            for family in families:
                # As a browser does: the first family of the list that has the character.
                if ord(character) in _characters(*_locate(family, slant, weight)):
                    used[family, slant, weight].add(character)
                    break
    return used


@functools.lru_cache(maxsize=64)
def _locate(family: str, slant: str, weight: int) -> tuple[str, int]:
    wanted = font_manager.FontProperties(family=family, style=slant, weight=weight)  # type: ignore[arg-type]
    found = font_manager.findfont(wanted)
    return str(found), int(getattr(found, "face_index", 0))


@functools.lru_cache(maxsize=64)
def _characters(path: str, index: int) -> frozenset[int]:
    with TTFont(path, fontNumber=index, lazy=True) as font:
        return frozenset(font.getBestCmap())


@functools.lru_cache(maxsize=256)
def font_face(face: Face, characters: str) -> str:
    """A CSS ``@font-face`` rule with the font inside, cut down to the characters that it has of those given."""
    register_fonts()
    family, slant, weight = face
    path, index = _locate(*face)  # a file may hold several faces
    font = TTFont(path, fontNumber=index, recalcTimestamp=False)
    options = Options(
        layout_features=["kern", "mark", "mkmk", "ccmp", "tnum"],
        hinting=False,
        desubroutinize=True,
        notdef_outline=True,
    )
    options.drop_tables += ["FFTM", "PfEd"]  # FontForge's own notes in DejaVu
    subsetter = Subsetter(options)
    # Browsers compose accents before they look for a glyph.
    both = {ord(c) for c in characters} | {ord(c) for d in characters for c in unicodedata.normalize("NFC", d)}
    subsetter.populate(unicodes=both)
    subsetter.subset(font)
    font.flavor = "woff"
    file = io.BytesIO()
    font.save(file)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'@font-face{{font-family:"{family}";font-style:{slant};font-weight:{weight};'
        f'src:url("data:font/woff;base64,{data}") format("woff")}}'
    )
