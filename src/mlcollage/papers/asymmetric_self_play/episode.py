"""A small page that plays turns of Alice and Bob beside each other: one file, no network."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mlcollage import _checks as checks
from mlcollage._random import generator
from mlcollage.errors import InvalidInput

from .game import AsymmetricSelfPlay
from .goals import GoalVerdict
from .turns import alice_turn, bob_turn

__all__ = ["episode_page"]


def episode_page(
    game: AsymmetricSelfPlay, path: str | os.PathLike[str], *, games: int = 6, seed: int = 0, replica: int = 0
) -> Path:
    """Write a page in which the present Alice sets goals and the present Bob tries to reach them.

    A world with a method ``frame(row)`` that gives a picture (height, width, 3) of a state is shown as it draws itself,
    as :class:`MujocoTabletop` does where OpenGL is at hand. Any other world, and one that cannot draw, is drawn from
    above.

    Objects are drawn by the first three numbers of what goals are about: x to the right, y away, and z, the height, as
    a shadow's distance. Two numbers are taken as x and y.

    Parameters
    ----------
    game
        A training; nothing in it is changed.
    path
        Where to write the HTML; folders are made.
    games
        Turns to show; those with a goal that Bob is asked for come first.
    seed
        Which start states.
    replica
        Which of the game's seeds plays.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InvalidInput
        If goals are about fewer than two numbers an object, and for a path that is a folder.

    Examples
    --------
    >>> import tempfile
    >>> from mlcollage.papers.asymmetric_self_play import ASPConfig, PlanarPush
    >>> small = AsymmetricSelfPlay(PlanarPush(), ASPConfig(envs=4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     "canvas" in episode_page(small, folder + "/episode.html", games=2).read_text()
    True
    """
    checks.integer("games", games, least=1)
    replica = checks.integer("replica", replica, least=0, most=len(game.seeds) - 1)
    turns = _turns(game, games, seed, replica)
    file = Path(path)
    if file.is_dir():
        raise InvalidInput(f"{file} is a folder; give the name of a file, such as episode.html.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_PAGE.replace("/*TURNS*/[]", json.dumps(turns)), "utf-8")
    return file


def _turns(game: AsymmetricSelfPlay, games: int, seed: int, replica: int) -> list[dict[str, Any]]:
    world, c, r = game.world, game.config, len(game.seeds)
    tried = 4 * games
    with torch.no_grad():
        start = world.initial(tried, generator(seed, 41)).to(game.device).expand(r, tried, -1).contiguous()
        alice = alice_turn(world, game.alice, start, c.alice_steps, (seed, 42))
        goal, verdict = game._judge(start, alice.states[-1])
        asked = verdict <= GoalVerdict.OUT_OF_ZONE
        begin = start
        if c.mode == "reverse":
            goal, begin = game._achieved(start), alice.states[-1]
        course = [begin]
        solved = bob_turn(world, game.bob, begin, goal, asked, c.bob_steps, (seed, 43), course=course).solved
        course += course[-1:] * (c.bob_steps + 1 - len(course))
    pictures = _pictures(world, start[replica, 0])
    order = (~asked[replica]).to(torch.uint8).argsort(stable=True)[:games].tolist()
    if goal.shape[-1] < 2:
        raise InvalidInput("goals are about one number an object; a page needs x and y at least.")
    return [
        {
            "alice": [_places(game, s[replica, g]) for s in alice.states],
            "bob": [_places(game, s[replica, g]) for s in course] if bool(asked[replica, g]) else [],
            "goal": _rounded(goal[replica, g][:, :3].tolist()),
            "frames": [
                [_jpeg(pictures(s[replica, g])) for s in states] if pictures is not None else []
                for states in (alice.states, course if bool(asked[replica, g]) else [])
            ],
            "verdict": GoalVerdict(int(verdict[replica, g])).name.lower().replace("_", " "),
            "solved": bool(solved[replica, g]),
        }
        for g in order
    ]


def _pictures(world: Any, row: torch.Tensor) -> Callable[[torch.Tensor], Any] | None:
    """How the world draws a state, or None if it does not."""
    frame: Callable[[torch.Tensor], Any] | None = getattr(world, "frame", None)
    if frame is None:
        return None
    try:
        frame(row)
    except InvalidInput:  # no OpenGL on this machine
        return None
    return frame


def _jpeg(picture: Any) -> str:
    """A picture (height, width, 3) of uint8 as text that a page can show."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _places(game: AsymmetricSelfPlay, state: torch.Tensor) -> dict[str, Any]:
    """Robot, by the first three numbers that are seen of it, and objects."""
    robot, _ = game.world.observe(state[None])
    return {
        "robot": _rounded([robot[0, :3].tolist()])[0],
        "objects": _rounded(game.world.achieved(state[None])[0][:, :3].tolist()),
    }


def _rounded(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(v, 3) for v in row] for row in rows]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Alice and Bob</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:880px;padding:0 1rem;color:#1b1b1b;background:#fff}
.pair{display:flex;gap:1rem;flex-wrap:wrap}figure{margin:0;flex:1 1 300px}canvas,img{width:100%}
canvas,img{border:1px solid #767676}[hidden]{display:none}
button,select{font:inherit;padding:.3rem .8rem;margin-right:.5rem}
@media (prefers-color-scheme:dark){body{background:#161616;color:#eee}}
</style></head><body>
<h1>Alice sets a goal, Bob tries to reach it</h1>
<p><label>Game <select id="game"></select></label><button id="play">Pause</button>
<label>Step <input id="step" type="range" min="0" value="0"></label></p>
<div class="pair">
<figure><canvas id="alice" width="420" height="420" role="img" aria-label="Alice's turn, seen from above"></canvas>
<img id="alice-frame" alt="Alice's turn, as the simulator draws it" hidden>
<figcaption>Alice</figcaption></figure>
<figure><canvas id="bob" width="420" height="420" role="img" aria-label="Bob's turn, seen from above"></canvas>
<img id="bob-frame" alt="Bob's turn, as the simulator draws it" hidden>
<figcaption id="goal-said">Bob; the ring is his goal</figcaption></figure></div>
<p id="said" aria-live="polite"></p>
<p id="view">Seen from above. The higher a thing is, the larger it is drawn, and the further from its shadow.</p>
<script>
const turns = /*TURNS*/[];
const $ = id => document.getElementById(id);
let game = 0, step = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
turns.forEach((t, i) => $("game").add(new Option(`${i + 1}: ${t.verdict}${t.bob.length ? t.solved ? ", Bob solves it" :
  ", Bob fails" : ""}`, i)));
const px = v => 210 + 290 * v;
function spot(g, p, color, size, ring) {
  const z = p.length > 2 ? p[2] : 0, x = px(p[0]), y = px(-p[1]);
  if (z > 0.01) { g.fillStyle = "rgba(0,0,0,.18)"; g.fillRect(x - size / 2, y - size / 2, size, size); }
  const s = size * (1 + z), dy = 60 * z;
  g.lineWidth = 3; g.strokeStyle = g.fillStyle = color;
  if (ring) { g.beginPath(); g.arc(x, y - dy, s * .8, 0, 7); g.stroke(); }
  else g.fillRect(x - s / 2, y - dy - s / 2, s, s);
}
function draw(id, course, t, goal, color) {
  const g = $(id).getContext("2d");
  g.fillStyle = "#f4f1ea"; g.fillRect(0, 0, 420, 420);
  g.strokeStyle = "#767676"; g.lineWidth = 1; g.strokeRect(px(-.6), px(-.6), 348, 348);
  if (goal) goal.forEach(p => spot(g, p, "#d55e00", 30, true));
  if (!course.length) return;
  const s = course[Math.min(t, course.length - 1)];
  s.objects.forEach(p => spot(g, p, color, 30, false));
  const r = s.robot; if (r.length > 1) spot(g, r, "#1b1b1b", 10, false);
}
function picture(id, frames, t) {
  const shown = frames.length > 0, image = $(id + "-frame");
  $(id).hidden = shown; image.hidden = !shown;
  if (shown) image.src = frames[Math.min(t, frames.length - 1)];
  return shown;
}
function show() {
  const t = turns[game]; if (!t) return;
  const own = t.frames[0].length > 0;
  $("view").hidden = own;
  $("goal-said").textContent = own ? "Bob; his goal is where Alice ends" : "Bob; the ring is his goal";
  const a = t.alice.length, b = t.bob.length, s = $("step");
  s.max = a + b; s.value = step;
  if (!picture("alice", t.frames[0], Math.min(step, a - 1)))
    draw("alice", t.alice, Math.min(step, a - 1), null, "#d55e00");
  if (!picture("bob", t.frames[1], Math.max(0, step - a)))
    draw("bob", t.bob, Math.max(0, step - a), step >= a ? t.goal : null, "#0072b2");
  let said = t.solved ? "Bob has reached the goal." : "Bob has failed.";
  if (step < a) said = `Alice, step ${step} of ${a - 1}.`;
  else if (!b) said = `The goal is ${t.verdict}: Bob is not asked.`;
  else if (step < a + b) said = `Bob, step ${step - a} of ${b - 1}.`;
  $("said").textContent = said;
}
$("game").onchange = e => { game = +e.target.value; step = 0; show(); };
$("step").oninput = e => { step = +e.target.value; playing = false; $("play").textContent = "Play"; show(); };
$("play").onclick = () => { playing = !playing; $("play").textContent = playing ? "Pause" : "Play"; };
$("play").textContent = playing ? "Pause" : "Play";
setInterval(() => { if (!playing || !turns.length) return; const t = turns[game];
  if (++step > t.alice.length + t.bob.length + 6) {
    step = 0; $("game").value = game = (game + 1) % turns.length;
  }
  show(); }, 160);
show();
</script></body></html>
"""
