"""Makes the shipped font files from the Inter 3.19 release: ``python tools/build_fonts.py FOLDER``.

Inter is under the SIL Open Font License 1.1 without a reserved font name; "Inter" is a trademark of its author,
so the modified files carry another family name. What is changed: fewer characters, no alternates, and quadratic
outlines instead of cubic ones, because TrueType outlines can be embedded in a PDF as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fontTools.pens.cu2quPen import Cu2QuPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont, newTable

FAMILY = "MLCollage Sans"
STYLES = ("Regular", "Italic", "SemiBold", "Bold")
RANGES = (
    (0x20, 0x7E),  # Basic Latin
    (0xA0, 0x17F),  # Latin-1, Latin Extended-A
    (0x370, 0x3FF),  # Greek
    (0x2000, 0x209F),  # punctuation, superscripts and subscripts
    (0x20A0, 0x20BF),  # currency
    (0x2100, 0x22FF),  # letter-like, number forms, arrows, mathematical operators
    (0x25A0, 0x25FF),  # geometric shapes
    (0x2713, 0x2717),  # check marks
)


def convert(source: Path, target: Path, style: str) -> None:
    """Subset one static OpenType file, rename it and write it with TrueType outlines."""
    font = TTFont(source)
    options = Options(layout_features=["kern", "mark", "mkmk", "ccmp", "tnum"], hinting=False, notdef_outline=True)
    options.name_IDs = ["*"]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=[code for lo, hi in RANGES for code in range(lo, hi + 1)])
    subsetter.subset(font)
    _to_quadratic(font)
    names = {1: FAMILY, 2: style, 3: f"{FAMILY} {style}", 4: f"{FAMILY} {style}", 16: FAMILY, 17: style}
    names[6] = f"{FAMILY.replace(' ', '')}-{style}"
    table = font["name"]
    table.names = [n for n in table.names if n.nameID in (0, 5, 13, 14)]
    for name_id, text in names.items():
        table.setName(text, name_id, 3, 1, 0x409)
    font.save(target)


def _to_quadratic(font: TTFont) -> None:
    glyphs, order = font.getGlyphSet(), font.getGlyphOrder()
    outlines = {}
    for name in order:
        pen = TTGlyphPen(glyphs)
        glyphs[name].draw(Cu2QuPen(pen, max_err=1.5, reverse_direction=True))
        outlines[name] = pen.glyph()
    font["loca"] = newTable("loca")
    font["glyf"] = glyf = newTable("glyf")
    glyf.glyphOrder, glyf.glyphs = order, outlines
    del font["CFF "]
    glyf.compile(font)
    maxp = font["maxp"]
    maxp.tableVersion = 0x00010000
    for key in ["maxTwilightPoints", "maxStorage", "maxFunctionDefs", "maxInstructionDefs", "maxStackElements"]:
        setattr(maxp, key, 0)
    maxp.maxZones, maxp.maxSizeOfInstructions = 1, 0
    maxp.maxComponentElements = 0
    font["post"].formatType = 3.0
    font["post"].extraNames, font["post"].mapping, font["post"].glyphOrder = [], {}, order
    font["head"].glyphDataFormat = 0
    font.sfntVersion = "\000\001\000\000"


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "src/mlcollage/collage/fonts"
    for style in STYLES:
        convert(Path(sys.argv[1]) / f"Inter-{style}.otf", target / f"MLCollageSans-{style}.ttf", style)
