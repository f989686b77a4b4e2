"""What the self-contained pages share: their frame, and the drawing of a court with players."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray


def rounded(play: NDArray) -> list[Any]:
    """Positions (T, K, 2) with two digits; what is not finite is null."""
    return [[[None if not np.isfinite(v) else round(float(v), 2) for v in p] for p in frame] for frame in play]


def page(title: str, body: str, data: dict[str, Any], script: str) -> str:
    """One HTML page with its data and script inside, nothing loaded from elsewhere."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n{body}</main>\n"
        f'<script type="application/json" id="data">{text}</script>\n<script>{script}</script></body></html>\n'
    )


def court_script() -> str:
    """The functions that draw; ``draw(canvas, play, t, cells)``."""
    return _DRAW


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfb; --line: #8a8a86; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --paper: #161616; --line: #999; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
canvas { width: 100%; height: auto; border: 1px solid var(--line); }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
button, select { font: inherit; padding: .4rem .8rem; }
button:focus-visible, select:focus-visible { outline: 3px solid #2a6fb0; }
"""
_DRAW = """
const data = JSON.parse(document.getElementById("data").textContent);
const colors = ["#0072b2", "#d55e00", "#009e73", "#a8630a", "#7a4fa3", "#444444", "#b0306a", "#1f7a8c"];
// A frame's time may lie a little before the click that started the play.
const moment = (ms, last) => Math.min(Math.max(ms, 0) / 1000 * data.fps, last);
function draw(canvas, play, t, cells) {
  const [length, width] = data.court, scale = 10;
  if (canvas.width !== Math.round(length * scale)) {
    canvas.width = Math.round(length * scale); canvas.height = Math.round(width * scale);
  }
  const c = canvas.getContext("2d");
  c.clearRect(0, 0, canvas.width, canvas.height);
  c.globalAlpha = 0.35;
  cells.forEach(([x, y, w, h, k]) => {
    c.fillStyle = colors[k % colors.length]; c.fillRect(x * scale, y * scale, w * scale, h * scale);
  });
  c.globalAlpha = 1;
  const i = Math.floor(t), f = t - i, next = Math.min(i + 1, play.length - 1);
  play[0].forEach((_, k) => {
    c.strokeStyle = c.fillStyle = colors[k % colors.length]; c.lineWidth = 2; c.beginPath();
    let open = false;
    for (let s = 0; s <= i; s++) {
      const [x, y] = play[s][k];
      if (x === null) { open = false; continue; }
      open ? c.lineTo(x * scale, y * scale) : c.moveTo(x * scale, y * scale); open = true;
    }
    c.stroke();
    const a = play[i][k], b = play[next][k];
    if (a[0] === null || b[0] === null) return;
    const x = (a[0] + f * (b[0] - a[0])) * scale, y = (a[1] + f * (b[1] - a[1])) * scale;
    c.beginPath(); c.arc(x, y, 9, 0, 7); c.fill();
    c.fillStyle = "#fff"; c.font = "bold 12px sans-serif"; c.textAlign = "center"; c.fillText(k + 1, x, y + 4);
  });
}
"""
