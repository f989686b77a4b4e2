"""A page that plays a rollout and lets its reader send one agent elsewhere, among rollouts made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._page import court_script, page, rounded
from .labeling import GridIntent, LabelingFunction
from .macro_vrnn import MacroVRNN

__all__ = ["play_page"]


def play_page(
    file: str | Path,
    model: MacroVRNN,
    burn_in: Tensor,
    steps: int,
    *,
    agent: int,
    choices: Sequence[int],
    grid: GridIntent,
    fps: float = 6.25,
    history: LabelingFunction | None = None,
    seed: int = 0,
) -> int:
    """Write the page: the play as the model draws it, and with one agent's intent set to each of several cells.

    All rollouts have the same random numbers, so that what differs comes of the intent. The page holds everything,
    works
    from disk without a network, by mouse and keyboard.

    Parameters
    ----------
    file
        Where to write it.
    model
        With an intent for each agent, cells of ``grid``.
    burn_in
        What was seen, (T, K, 2).
    steps
        Frames to generate.
    agent
        Whose intent can be moved.
    choices
        Cells to choose from.
    grid
        Of the intents; its extent is what is drawn.
    fps
        Frames a second.
    history
        Labels the burn-in; the grid by default.
    seed
        Of the rollouts.

    Returns
    -------
    size
        Of the file, in bytes.

    Raises
    ------
    InvalidInput
        If the model's intents are no cells of the grid, or an agent or a cell does not exist.

    Examples
    --------
    >>> import tempfile
    >>> grid = GridIntent()
    >>> model = MacroVRNN(2, 90, z=2, hidden=4, rnn=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "play.html"
    ...     size = play_page(file, model, torch.ones(4, 2, 2), 3, agent=1, choices=[5, 80], grid=grid)
    >>> size > 2000
    True
    """
    if model.shared_intent or model.n_intents != grid.classes:
        raise InvalidInput(f"the model needs an intent for each agent, one of the grid's {grid.classes} cells.")
    agent, steps = (
        checks.integer("agent", agent, least=0, most=model.n_agents - 1),
        checks.integer("steps", steps, least=1),
    )
    choices = [checks.integer("choices", cell, least=0, most=grid.classes - 1) for cell in choices]
    if not choices:
        raise InvalidInput("choices is empty; give a cell at least where the agent can be sent.")
    plans: list[NDArray | None] = [None]
    for cell in choices:
        sent = np.full((steps, model.n_agents), -1)
        sent[:, agent] = cell
        plans.append(sent)
    shown = []
    for plan in plans:
        draw = torch.Generator(device=burn_in.device).manual_seed(seed)
        x, g = model.sample(burn_in, steps, plan, history=history or grid, generator=draw)
        assert g is not None
        shown.append({"play": rounded(x[0, 0].double().cpu().numpy()), "intents": g[0, 0].tolist()})
    i, j = np.divmod(np.asarray(choices, dtype=int), grid.shape[1])
    names = ["as the model draws it", *(f"column {a + 1}, row {b + 1}" for a, b in zip(i, j, strict=True))]
    data = {
        "court": list(grid.extent),
        "fps": checks.positive("fps", fps),
        "cell": grid.cell,
        "rows": grid.shape[1],
        "agent": agent,
        "versions": shown,
    }
    options = "".join(f'<option value="{n}">{name}</option>' for n, name in enumerate(names))
    body = _BODY.format(agent=agent + 1, options=options)
    text = page("A generated play", body, data, court_script() + _SCRIPT)
    return Path(file).write_text(text, "utf-8")


_BODY = """
<p><label>Send player {agent} to <select id="version">{options}</select></label>
<button id="again">Play again</button> <label>Frame <input id="time" type="range" min="0" value="0"></label></p>
<canvas id="court" role="img" aria-label="the play, animated; a cell in a player's color is his intent"></canvas>
"""
_SCRIPT = """
const canvas = document.getElementById("court"), choose = document.getElementById("version");
const slider = document.getElementById("time");
let start = performance.now(), held = null;
slider.max = data.versions[0].play.length - 1;
function frame(now) {
  const version = data.versions[choose.value], last = version.play.length - 1;
  const t = held === null ? moment(now - start, last) : held;
  if (held === null) slider.value = Math.floor(t);
  const c = data.cell, cells = version.intents[Math.min(Math.floor(t), last - 1)]
    .map((g, k) => [Math.floor(g / data.rows) * c, (g % data.rows) * c, c, c, k]).filter(v => v[0] >= 0);
  draw(canvas, version.play, t, cells);
  requestAnimationFrame(frame);
}
const again = () => { held = null; start = performance.now(); };
choose.addEventListener("change", again);
document.getElementById("again").addEventListener("click", again);
slider.addEventListener("input", () => { held = Number(slider.value); });
requestAnimationFrame(frame);
"""
