"""How trajectories are read: axes in any order, long tables, SportVU, floodlight, kloppy; and what looks wrong."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from mlcollage import _checks as checks
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput

FROM_FILE = "told by the file"
"""Of tracks whose order of axes is not in doubt."""


@dataclass(frozen=True)
class Cut:
    """How recordings are cut: frames of a sequence, frames to the next, and the number of agents."""

    window: int
    stride: int | None
    agents: int | None


@dataclass(frozen=True)
class Found:
    """Tracks (N, T, K, D), their rate, and what was done to get them."""

    tracks: NDArray[np.float64]
    fps: float | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A sequence (window, agents, D), who its agents are, and which frames of a stretch it takes."""

    tracks: NDArray[np.float64]
    ids: tuple[Hashable, ...]
    used: NDArray[np.bool_]  # of all frames of the stretch, to be marked if the sequence is kept
    start: int


# --- arrays


def arranged(array: NDArray, layout: str, dim: int, agents: Sequence[int] | None) -> NDArray[np.float64]:
    """An array in any order of axes as (N, T, K, D)."""
    letters = str(layout).upper()
    whole = "F" in letters
    wanted = set("TF") if whole else set("TKD")
    if len(set(letters)) != len(letters) or not wanted <= set(letters) <= wanted | {"N"}:
        raise InvalidInput(f"layout has each of N, T, K, D once, or F in the place of K and D; got {layout!r}.")
    if array.ndim != len(letters) or array.dtype.kind not in "fiu":
        raise InvalidInput(f"layout {layout!r} has {len(letters)} axes; got {array.dtype} {array.shape}.")
    order = [letters.index(c) for c in ("NTF" if whole else "NTKD") if c in letters]
    x = array.transpose(order).astype(np.float64)
    x = x if "N" in letters else x[None]
    if whole:
        if x.shape[-1] % dim:
            raise InvalidInput(
                f"{x.shape[-1]} columns are no whole number of agents with {dim} coordinates; is a frame number or a "
                "height among them?"
            )
        x = x.reshape(*x.shape[:2], -1, dim)
    if x.shape[-1] < dim:
        raise InvalidInput(f"positions have {x.shape[-1]} coordinates; dim is {dim}.")
    x = x[..., :dim]
    if agents is None:
        return x
    chosen = [checks.integer("agents", a, least=0, most=x.shape[2] - 1) for a in agents]
    if not chosen or len(set(chosen)) != len(chosen):
        raise InvalidInput(f"agents must be different numbers below {x.shape[2]}, one at least; got {chosen}.")
    return x[:, :, chosen]


# --- what looks wrong


def axis_jumps(x: NDArray) -> list[float]:
    """Median size of the change of positions along sequences, frames and agents; NaN where an axis has one entry."""
    out = []
    for axis in range(3):
        if x.shape[axis] < 2:
            out.append(float("nan"))
            continue
        step = np.linalg.norm(np.diff(x, axis=axis), axis=-1)
        step = step[np.isfinite(step)]
        out.append(float(np.median(step)) if len(step) else float("nan"))
    return out


def suspected_swaps(x: NDArray, factor: float = 3.0, most: int = 2000) -> int:
    """Frames (of the first ``most`` with the longest steps) in which agents exchanged would have moved much less."""
    step = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    longest = np.nanmax(np.where(np.isfinite(step), step, -1), -1)
    usual = float(np.median(step[np.isfinite(step)]))
    flat = np.argsort(longest, axis=None)[::-1][:most]
    found = 0
    for n, t in zip(*np.unravel_index(flat, longest.shape), strict=True):
        if longest[n, t] <= factor * usual:
            break
        here = np.isfinite(step[n, t])
        a, b = x[n, t, here], x[n, t + 1, here]
        cost = np.linalg.norm(a[:, None] - b[None], axis=-1)
        rows, columns = linear_sum_assignment(cost)
        found += int(cost[rows, columns].sum() * factor < np.trace(cost))
    return found


def repeated_point(x: NDArray, seen: NDArray) -> str:
    """The most frequent exact position, if it is over 0.1 % of all: a sentinel for a missing one, perhaps."""
    points, counts = np.unique(x[seen], axis=0, return_counts=True)
    top = int(counts.argmax())
    share = counts[top] / counts.sum()
    if share <= 0.001 or counts[top] < 3:
        return "none"
    return f"({', '.join(f'{v:g}' for v in points[top])}), {share:.1%}: does it stand for a missing one?"


# --- long tables


def from_long(
    table: pd.DataFrame,
    names: Mapping[str, str],
    sequence: str | None,
    time: str | None,
    fps: float | None,
    cut: Cut,
) -> Found:
    """Cut a table with a row for each agent and frame into sequences."""
    rows = _columns(table, names, sequence, time)
    twice = rows[rows.duplicated(["sequence", "id", "frame"], keep=False)]
    if len(twice):
        first = "; ".join(
            f"{r.id} in frame {r.frame:g}" for r in twice.drop_duplicates(["sequence", "id", "frame"])[:3].itertuples()
        )
        raise InvalidInput(
            f"{len(twice):,} rows have an agent twice in one frame ({first}); keep one row each, or name the column "
            "that tells recordings apart with sequence."
        )
    rows = rows.sort_values(["sequence", "frame", "id"], kind="stable")
    steps = _steps(rows)
    rate = _rate(rows, steps, time, fps)
    parts: list[Part] = []
    books: list[NDArray[np.bool_]] = []
    splits = 0
    for which, recording in rows.groupby("sequence", sort=True):
        runs = list(_runs(recording, rate, time, steps.get(which, 1)))
        splits += len(runs) - 1
        parts += [window for run in runs for window in _windows(run, cut, books)]
    facts: dict[str, Any] = {"splits": splits}
    if (steps != 1).any():
        facts["frame numbers rise by"] = ", ".join(f"{v:g}" for v in sorted(set(steps)))
    if time is not None and rate is not None and rate < 0.5:
        facts["times"] = f"{1 / rate:g} seconds from frame to frame: are they milliseconds?"
    return _stacked(parts, books, cut, rate, facts)


def _columns(table: pd.DataFrame, names: Mapping[str, str], sequence: str | None, time: str | None) -> pd.DataFrame:
    named = dict(names) | ({"sequence": sequence} if sequence else {}) | ({"time": time} if time else {})
    missing = [f"{key}={column!r}" for key, column in named.items() if column not in table.columns]
    if missing:
        raise InvalidInput(
            f"the table has no column {', '.join(missing)}; its columns are {', '.join(map(str, table.columns))}."
        )
    rows = pd.DataFrame({key: table[column].to_numpy() for key, column in named.items()})
    if "sequence" not in rows:
        rows["sequence"] = 0
    for key in ("frame", "x", "y", *(["time"] if time else [])):
        if rows[key].dtype.kind in "mM":  # clocks and durations, as seconds
            rows[key] = (
                rows[key] - (rows[key].min() if rows[key].dtype.kind == "M" else pd.Timedelta(0))
            ).dt.total_seconds()
        try:
            rows[key] = pd.to_numeric(rows[key])
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"column {named[key]!r} ({key}) must hold numbers ({error}).") from None
    if not len(rows):
        raise InvalidInput("the table has no rows.")
    if time:
        rows["time"] = rows["time"].astype(np.float64).replace([np.inf, -np.inf], np.nan)
    for key in ("id", "frame", "sequence", *(["time"] if time else [])):
        if rows[key].isna().any():
            raise InvalidInput(f"column {named[key]!r} ({key}) has {int(rows[key].isna().sum())} missing values.")
    if (rows["frame"] % 1 != 0).any():
        raise InvalidInput(f"column {named['frame']!r} (frame) must hold whole numbers; name seconds with time.")
    if rows["id"].dtype == object:
        rows["id"] = rows["id"].astype(str)  # 7 and "7" are one agent
    rows[["x", "y"]] = rows[["x", "y"]].astype(np.float64).replace([np.inf, -np.inf], np.nan)
    return rows


def _steps(rows: pd.DataFrame) -> pd.Series:
    """The usual step of frame numbers of each recording with two frames at least."""
    frames = rows.drop_duplicates(["sequence", "frame"])
    step = frames.groupby("sequence")["frame"].diff()
    usual = step[step > 0].groupby(frames["sequence"]).agg(lambda v: int(v.mode().iloc[0]))
    if not len(usual):
        raise InvalidInput("each recording has one frame only; nothing moves.")
    return usual


def _rate(rows: pd.DataFrame, steps: pd.Series, time: str | None, fps: float | None) -> float | None:
    """Frames a second, from time where it is known."""
    fps = None if fps is None else checks.positive("fps", fps)
    if time is None:
        return fps
    frames = rows.drop_duplicates(["sequence", "frame"])
    by = frames.groupby("sequence")
    dt = by["time"].diff()[by["frame"].diff() == frames["sequence"].map(steps)]
    if not (dt.median() > 0):
        raise InvalidInput("the seconds of time do not rise from frame to frame.")
    rate = float(1 / dt.median())
    if rate > 1e4:
        raise InvalidInput(f"the times say {rate:,.0f} frames a second; time must be in seconds.")
    clock = rows.groupby(["sequence", "frame"])["time"]
    apart = clock.max() - clock.min()
    if apart.max() > 0.5 / rate:
        _, where = apart.index[int(apart.argmax())]
        raise InvalidInput(f"agents of one frame have times up to {apart.max():.3g} s apart (frame {where:g}).")
    long = dt.groupby(frames["sequence"]).agg(["median", "count"])
    each = 1 / long.loc[(long["count"] >= 10) & (long["median"] > 0), "median"]
    if len(each) and each.max() / each.min() > 1.01:
        raise InvalidInput(
            f"recordings have other rates, from {each.min():.4g} to {each.max():.4g} frames a second; resample them, "
            "or load them apart."
        )
    if fps is not None and abs(rate / fps - 1) > 0.01:
        raise InvalidInput(f"fps is {fps:g}, but the times say {rate:.4g}; leave fps out, or mend the times.")
    return rate


def _runs(recording: pd.DataFrame, rate: float | None, time: str | None, steps: int) -> Iterator[pd.DataFrame]:
    """Stretches without a gap for all agents."""
    frames = recording.drop_duplicates("frame")
    gap = frames["frame"].diff() != steps
    if time is not None and rate is not None:
        gap |= ~frames["time"].diff().between(0.5 / rate, 1.5 / rate)  # jumps, stopped clocks, clocks that start anew
    run = pd.Series(gap.cumsum().to_numpy(), index=frames["frame"].to_numpy())
    for _, part in recording.groupby(recording["frame"].map(run).to_numpy(), sort=True):
        yield part


def _windows(run: pd.DataFrame, cut: Cut, books: list[NDArray[np.bool_]]) -> Iterator[Part]:
    """Sequences, with agents in the order of their ids; only those seen in the window."""
    ids, agent = np.unique(run["id"], return_inverse=True)
    frames, at = np.unique(run["frame"], return_inverse=True)
    whole = np.full((len(frames), len(ids), 2), np.nan)
    whole[at, agent] = run[["x", "y"]].to_numpy()
    yield from _cut(whole, ids.tolist(), cut, books)


def _cut(whole: NDArray, ids: Sequence[Hashable], cut: Cut, books: list[NDArray[np.bool_]]) -> Iterator[Part]:
    stride = cut.window if cut.stride is None else checks.integer("stride", cut.stride, least=1)
    used = np.zeros(len(whole), dtype=bool)
    books.append(used)
    for start in range(0, len(whole) - cut.window + 1, stride):
        part = whole[start : start + cut.window]
        there = np.isfinite(part).all(-1).any(0)
        if there.any():
            yield Part(part[:, there], tuple(i for i, t in zip(ids, there, strict=True) if t), used, start)


def _stacked(
    parts: list[Part], books: list[NDArray[np.bool_]], cut: Cut, fps: float | None, facts: dict[str, Any]
) -> Found:
    """Sequences as one array; an agent keeps its place in all of them where there is a place for each."""
    if not parts:
        raise InvalidInput(
            f"no stretch without a gap has {cut.window} frames; choose a shorter window (facts: {facts or 'none'})."
        )
    most = max(len(p.ids) for p in parts)
    k = most if cut.agents is None else checks.integer("agents", cut.agents, least=1)
    kept = [p for p in parts if len(p.ids) <= k]
    if not kept:
        raise InvalidInput(f"every sequence has more than {k} agents.")
    everyone = sorted({i for p in kept for i in p.ids})  # type: ignore[type-var]
    place = {who: at for at, who in enumerate(everyone)} if len(everyone) <= k else None
    out = np.full((len(kept), cut.window, k, kept[0].tracks.shape[-1]), np.nan)
    for i, part in enumerate(kept):
        at = list(range(len(part.ids))) if place is None else [place[who] for who in part.ids]
        out[i][:, at] = part.tracks
        part.used[part.start : part.start + cut.window] = True
    frames = sum(len(used) for used in books)
    counted = {
        "sequences with too many agents": len(parts) - len(kept),
        "frames in no sequence": f"{1 - sum(int(used.sum()) for used in books) / frames:.1%} of {frames:,}",
        "places of agents": "by sequence: there are more agents than places" if place is None else "the same in all",
    }
    return Found(out, fps, facts | counted | {"axes": FROM_FILE})


# --- SportVU


def from_sportvu(game: Mapping[str, Any], team: str, cut: Cut, every: int, half_turn: bool) -> Found:
    """Cut a game's moments into sequences."""
    events = game.get("events") if isinstance(game, Mapping) else None
    if not isinstance(events, list) or not events:
        raise InvalidInput("a SportVU game has a list events; this one has none.")
    sides = {key: (events[0].get(key) or {}).get("teamid") for key in ("home", "visitor")}
    facts = {"moments": 0, "duplicates": 0, "moments without 11 entries": 0, "splits": 0, "half turns": 0}
    moments: dict[tuple[int, int], tuple[float, list[Any]]] = {}
    for event in events:
        for moment in event.get("moments") or []:
            facts["moments"] += 1
            try:
                period, stamp, clock, entries = int(moment[0]), int(moment[1]), float(moment[2]), moment[5]
            except (TypeError, ValueError, IndexError):
                raise InvalidInput(
                    "a moment is [period, milliseconds, game clock, shot clock, null, [[team, player, x, y, z], ...]]; "
                    f"got {str(moment)[:80]}."
                ) from None
            if (period, stamp) in moments:
                facts["duplicates"] += 1
            elif len(entries) != 11:
                facts["moments without 11 entries"] += 1
            else:
                moments[period, stamp] = clock, entries
    parts: list[Part] = []
    books: list[NDArray[np.bool_]] = []
    run: list[Any] = []
    before: tuple[Any, ...] | None = None
    lineup: tuple[Hashable, ...] = ()
    for key in sorted(moments):
        clock, entries = moments[key]
        chosen = [e for e in entries if team == "all" or (e[0] == sides.get(team) if team != "both" else e[0] != -1)]
        chosen.sort(key=lambda e: (e[0] != -1, e[0], e[1]))
        who = tuple((e[0] != -1, e[0], e[1]) for e in chosen)
        running = before is None or (
            key[0] == before[0] and key[1] - before[1] <= 60 and clock < before[2] and who == lineup
        )
        if not running:
            facts["splits"] += 1
            parts += _thinned(run, lineup, cut, every, books)
            run = []
        run.append([e[2:4] for e in chosen])
        before, lineup = (*key, clock), who
    parts += _thinned(run, lineup, cut, every, books)
    if half_turn:
        for i, part in enumerate(parts):
            if np.nanmean(part.tracks[..., 0]) > 47:
                parts[i] = replace(part, tracks=np.array([94.0, 50.0]) - part.tracks)
                facts["half turns"] += 1
    return _stacked(parts, books, cut, 25 / every, facts)


def _thinned(
    run: list[Any], who: tuple[Hashable, ...], cut: Cut, every: int, books: list[NDArray[np.bool_]]
) -> list[Part]:
    if not run or not run[0]:
        return []
    return list(_cut(np.asarray(run, dtype=np.float64)[::every], who, cut, books))


# --- objects of other packages, told by what they have


def from_floodlight(parts: Sequence[Any], cut: Cut) -> Found:
    """Cut the interleaved columns of floodlight's XY objects."""
    found: list[Part] = []
    books: list[NDArray[np.bool_]] = []
    rates = set()
    for part in parts:
        columns = np.asarray(getattr(part, "xy", None), dtype=np.float64)
        if columns.ndim != 2 or columns.shape[1] % 2:
            raise InvalidInput(f"an XY object has xy of shape (T, 2 K), interleaved; got {columns.shape}.")
        rates.add(getattr(part, "framerate", None))
        found += list(_cut(columns.reshape(len(columns), -1, 2), range(columns.shape[1] // 2), cut, books))
    if len(rates) != 1:
        raise InvalidInput(f"XY objects of one set must have one frame rate; got {sorted(map(str, rates))}.")
    (rate,) = rates
    return _stacked(found, books, cut, None if rate is None else float(rate), {})


def kloppy_table(dataset: Any, team: str | None) -> pd.DataFrame:
    """The frames of kloppy's tracking data set as a long table."""
    rows = []
    with users_code("the kloppy data set"):
        frames = list(getattr(dataset, "frames", None) or dataset)
        for number, frame in enumerate(frames):
            stamp = frame.timestamp
            seconds = stamp.total_seconds() if hasattr(stamp, "total_seconds") else float(stamp)
            for player, data in frame.players_data.items():
                side = str(getattr(getattr(player.team, "ground", ""), "value", ""))
                point = data.coordinates
                if point is not None and (team is None or side == team):
                    rows.append((player.player_id, number, frame.period.id, seconds, point.x, point.y))
    if not rows:
        raise InvalidInput(f"the kloppy data set has no positions{f' of team {team!r}' if team else ''}.")
    return pd.DataFrame(rows, columns=["id", "frame", "period", "time", "x", "y"])
