"""Judging plays by people: a blinded page of pairs, and the Bradley-Terry analysis of what they preferred."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput

from ._page import court_script, page, rounded
from .labeling import tracks

__all__ = ["bradley_terry", "rating_page"]


def rating_page(
    file: str | Path,
    sources: Mapping[str, NDArray],
    *,
    pairs: int = 25,
    court: tuple[float, float] = (47.0, 50.0),
    fps: float = 6.25,
    seed: int = 0,
) -> pd.DataFrame:
    """Write a page that shows two plays side by side and asks which looks more real.

    The page works from disk, without a network. It does not hold the names of the sources: sides and order are drawn by
    ``seed``, and the key that tells them is what this function returns. The judge's answers are saved by the page as a
    JSON file for :func:`bradley_terry`.

    Parameters
    ----------
    file
        Where to write the page.
    sources
        Tracks (N, T, K, 2) by name: two sources at least, with as many sequences each, where sequence i of all has the
        same burn-in.
    pairs
        How many pairs are shown.
    court
        Length and width of what is drawn.
    fps
        Frames a second.
    seed
        Of order and sides.

    Returns
    -------
    key
        Columns ``pair``, ``left``, ``right`` and ``sequence``; keep it from the judges.

    Raises
    ------
    InvalidInput
        If there are fewer than two sources, or they differ in shape.

    Examples
    --------
    >>> import tempfile
    >>> x = np.zeros((3, 5, 2, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     key = rating_page(Path(folder) / "judge.html", {"real": x, "ours": x + 1}, pairs=4)
    >>> list(key.columns), len(key)
    (['pair', 'left', 'right', 'sequence'], 4)
    """
    checks.integer("pairs", pairs, least=1)
    names = sorted(sources)
    parts = [tracks(sources[name])[0] for name in names]
    if len(names) < 2 or len({p.shape for p in parts}) != 1 or parts[0].shape[-1] != 2:
        shapes = ", ".join(f"{n} {p.shape}" for n, p in zip(names, parts, strict=True))
        raise InvalidInput(
            f"give tracks (N, T, K, 2) of two sources at least, all of one shape; got {shapes or 'none'}."
        )
    rng = np.random.default_rng([30, seed])
    rows, shown = [], []
    for i in range(pairs):
        a, b = rng.choice(len(names), 2, replace=False)
        n = int(rng.integers(len(parts[0])))
        rows.append({"pair": i, "left": names[a], "right": names[b], "sequence": n})
        shown.append([rounded(parts[a][n]), rounded(parts[b][n])])
    data = {"court": list(court), "fps": checks.positive("fps", fps), "pairs": shown}
    Path(file).write_text(page("Which play looks more real?", _BODY, data, court_script() + _SCRIPT), "utf-8")
    return pd.DataFrame(rows)


def bradley_terry(answers: Any, key: pd.DataFrame, *, draws: int = 500, seed: int = 0) -> pd.DataFrame:
    r"""Strengths of the sources from pairwise preferences.

    .. math::

        P(i \text{ preferred to } j) = \frac{1}{1 + e^{-(\theta_i - \theta_j)}}, \qquad \sum_i \theta_i = 0

    A tie counts as half a win of each. A weak normal prior (standard deviation 3) keeps strengths finite where one
    source always wins. Intervals come from a bootstrap over pairs, so that several judges of one pair stay together.

    Parameters
    ----------
    answers
        What the page saved: a file, or a list of objects with ``pair`` and ``answer``, ``"left"``, ``"right"`` or
        ``"tie"``. Several judges' lists may be joined.
    key
        As :func:`rating_page` returned it.
    draws, seed
        Of the bootstrap.

    Returns
    -------
    table
        By source: ``wins``, ``ties``, ``losses``, ``strength``, ``low`` and ``high`` (95 % interval), strongest first.

    Raises
    ------
    InvalidInput
        If an answer is none of these or its pair is not in the key.

    Examples
    --------
    >>> key = pd.DataFrame({"pair": [0, 1, 2], "left": ["a"] * 3, "right": ["b"] * 3, "sequence": 0})
    >>> answers = [{"pair": 0, "answer": "left"}, {"pair": 1, "answer": "left"}, {"pair": 2, "answer": "tie"}]
    >>> bradley_terry(answers, key, draws=20).loc["a", ["wins", "ties", "losses"]].astype(int).tolist()
    [2, 1, 0]
    """
    if isinstance(answers, str | Path):
        try:
            answers = json.loads(Path(answers).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{answers} cannot be read ({error}).") from None
    names = sorted({*key["left"], *key["right"]})
    number = {name: i for i, name in enumerate(names)}
    by_pair = key.set_index("pair")
    games = []
    for item in answers:
        pair, answer = (item.get(k) if isinstance(item, Mapping) else None for k in ("pair", "answer"))
        if pair not in by_pair.index or answer not in ("left", "right", "tie"):
            raise InvalidInput(f"an answer has a pair of the key and left, right or tie; got {escape(str(item))[:80]}.")
        row = by_pair.loc[pair]
        score = {"left": 1.0, "right": 0.0, "tie": 0.5}[answer]
        games.append((pair, number[row["left"]], number[row["right"]], score))
    if not games:
        raise InvalidInput("there are no answers.")
    table = np.array([g[1:] for g in games])
    strengths = _strengths(table, len(names))
    groups = pd.Series(range(len(games))).groupby([g[0] for g in games]).apply(list).tolist()
    rng = np.random.default_rng([31, seed])
    found = []
    for _ in range(checks.integer("draws", draws, least=2)):
        rows = [i for g in rng.integers(len(groups), size=len(groups)) for i in groups[g]]
        found.append(_strengths(table[rows], len(names)))
    low, high = np.quantile(np.array(found), [0.025, 0.975], axis=0)
    a, b, s = table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2]
    count = lambda left, right: np.bincount(np.concatenate([a[left], b[right]]), minlength=len(names))  # noqa: E731
    made = pd.DataFrame(
        {
            "wins": count(s == 1, s == 0),
            "ties": count(s == 0.5, s == 0.5),
            "losses": count(s == 0, s == 1),
            "strength": strengths,
            "low": low,
            "high": high,
        },
        index=pd.Index(names, name="source"),
    )
    return made.sort_values("strength", ascending=False)


def _strengths(games: NDArray, n: int) -> NDArray[np.float64]:
    """Posterior mode for games (left, right, score)."""
    a, b, s = games[:, 0].astype(int), games[:, 1].astype(int), games[:, 2]

    def loss(theta: NDArray) -> tuple[float, NDArray]:
        gap = theta[a] - theta[b]
        p = 1 / (1 + np.exp(-gap))
        value = np.logaddexp(0, -gap) @ s + np.logaddexp(0, gap) @ (1 - s) + (theta**2).sum() / 18
        slope = np.bincount(a, p - s, n) + np.bincount(b, s - p, n) + theta / 9
        return float(value), slope

    theta = minimize(loss, np.zeros(n), jac=True, method="L-BFGS-B").x
    return np.asarray(theta - theta.mean())


_BODY = """
<p id="count" aria-live="polite"></p>
<div class="two"><canvas id="left" role="img" aria-label="the left play, animated"></canvas>
<canvas id="right" role="img" aria-label="the right play, animated"></canvas></div>
<p class="buttons"><button data-answer="left">The left one</button> <button data-answer="tie">I cannot tell</button>
<button data-answer="right">The right one</button> <button id="again">Play again</button></p>
<p id="end" hidden>Thank you. <a id="save" download="answers.json">Save your answers</a> and hand the file back.</p>
"""
_SCRIPT = """
const answers = []; let at = 0, start = performance.now();
const canvases = ["left", "right"].map(id => document.getElementById(id));
function ask() {
  document.getElementById("count").textContent = at < data.pairs.length
    ? `Pair ${at + 1} of ${data.pairs.length}: which play looks more like real players?` : "";
  start = performance.now();
  if (at === data.pairs.length) {
    document.querySelector(".buttons").hidden = true;
    document.getElementById("end").hidden = false;
    document.getElementById("save").href = "data:application/json," + encodeURIComponent(JSON.stringify(answers));
  }
}
function frame(now) {
  if (at < data.pairs.length) {
    const plays = data.pairs[at], t = moment(now - start, plays[0].length - 1);
    plays.forEach((play, i) => draw(canvases[i], play, t, []));
  }
  requestAnimationFrame(frame);
}
document.querySelectorAll("[data-answer]").forEach(b => b.addEventListener("click", () => {
  answers.push({pair: at, answer: b.dataset.answer, seconds: Math.round((performance.now() - start) / 100) / 10});
  at += 1; ask();
}));
document.getElementById("again").addEventListener("click", () => { start = performance.now(); });
ask(); requestAnimationFrame(frame);
"""
