"""What the theme leaves out: names for its landmarks, upright slides on phones, and the slides' own type.

The search dialog is found by what the theme writes today. If a new version writes something else, the build says so
and, being strict, fails; the tests with axe then tell whether the change is still needed.
"""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FONTS = ROOT / "src" / "mlcollage" / "collage" / "fonts"
_LOG = logging.getLogger("mkdocs.hooks.pages")
_DIALOG = 'data-md-component="search" role="dialog"'
_UNNAMED = re.compile(r'aria-labelledby="__nav_(\d+)_label"')  # the label of a section with a page of its own is empty
_CONTENTS = re.compile(r'(<nav class="md-nav" aria-label=")([^"]*)(">)')
_SLIDE = re.compile(r'<img alt="([^"]*)" src="([^"]*/)?img/(\w+)\.png"\s*/?>')
WIDE, UPRIGHT = (1440, 810), (720, 900)  # pixels of the pictures that docs/_site/tables.py --record writes


def on_files(files: Files, *, config: Any, **_: Any) -> Files:
    """The fonts of the slides, for the pages' style sheet."""
    for font in sorted(FONTS.glob("*.ttf")):
        files.append(File.generated(config, f"fonts/{font.name}", abs_src_path=str(font)))
    return files


def on_page_content(html: str, *, config: Any, **_: Any) -> str:
    """Slides: known size, so that text does not jump; upright where the window is narrow; a click enlarges."""
    pictures = Path(config["docs_dir"]) / "img"

    def picture(match: re.Match[str]) -> str:
        alt, path, name = match[1], f"{match[2] or ''}img/", match[3]
        image = f'<img alt="{alt}" src="{path}{name}.png" width="{WIDE[0]}" height="{WIDE[1]}">'
        if (pictures / f"{name}-portrait.png").is_file():
            upright = f'{path}{name}-portrait.png" width="{UPRIGHT[0]}" height="{UPRIGHT[1]}'
            image = f'<picture><source media="(max-width: 600px)" srcset="{upright}">{image}</picture>'
        return f'<a class="slide" href="{path}{name}.png" title="Open the slide at its full size">{image}</a>'

    return _SLIDE.sub(picture, html)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Name the search dialog, and tell the parts of the table of contents from those of the navigation."""
    if _DIALOG not in output:
        _LOG.warning("%s: the theme no longer writes %s", page.file.src_uri, _DIALOG)
    output = output.replace(_DIALOG, f'{_DIALOG} aria-label="Search"')
    titles = dict(
        re.findall(r'<label class="md-nav__title" for="__nav_(\d+)">\s*<span[^>]*></span>\s*(.*?)\s*</label>', output)
    )
    output = _UNNAMED.sub(lambda m: f'aria-label="{titles[m[1]]}"' if m[1] in titles else m[0], output)
    seen: Counter[str] = Counter()

    def section(match: re.Match[str]) -> str:
        seen[match[2]] += 1  # a page may have two sections of one name; each landmark has a name of its own
        again = f", part {seen[match[2]]}" if seen[match[2]] > 1 else ""
        return f"{match[1]}Sections of {match[2]}{again}{match[3]}"

    return _CONTENTS.sub(section, output)
