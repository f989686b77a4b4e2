"""Trajectories: tracks of several agents as a kind of workload, from arrays, tables and tracking files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mlcollage import _checks as checks
from mlcollage.data import _linking, _tracks
from mlcollage.data._reading import check_options, file_hash, read_npz, whole_number
from mlcollage.data.workload import Workload
from mlcollage.errors import InvalidInput, MissingFile

__all__ = ["Trajectories", "load"]


@dataclass(frozen=True)
class Trajectories(Workload):
    """Sequences of the positions of several agents.

    Parameters
    ----------
    tracks
        Positions (N, T, K, D): sequences, frames, agents, coordinates. What is not finite was not seen.
    mask
        True where an agent was seen, (N, T, K); None where all that is finite was.
    fps
        Frames a second, or None if it is not known.
    units
        Of positions, as printed: ``"ft"``, ``"m"``, ``"px"``.
    court
        Length and width of the field from (0, 0), in these units, or None.
    intents
        Macro-intents (N, T, K), or (N, T) where they are shared, -1 for none; None leaves them to the study.
    labeling
        A labeling function: from tracks (N, T, K, D) and mask to intents; for studies that use such labels.
    n_intents
        How many macro-intents there are; by default one more than the largest.
    facts
        What the loader did, in plain numbers: splits, duplicates, frames that are in no sequence.
    name, fingerprint
        As every :class:`~mlcollage.data.workload.Workload` has them.

    Examples
    --------
    >>> walk = np.random.default_rng(0).normal(0, 0.3, (8, 50, 5, 2)).cumsum(1) + 20
    >>> Trajectories(walk, fps=6.25, units="ft").describe()["shape"]
    [8, 50, 5, 2]
    """

    tracks: NDArray
    mask: NDArray | None = None
    fps: float | None = None
    units: str = "units"
    court: tuple[float, float] | None = None
    intents: NDArray | None = None
    labeling: Callable[..., NDArray] | None = None
    n_intents: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    # --- what it holds

    def seen(self) -> NDArray[np.bool_]:
        """True where an agent was seen and its position is finite, (N, T, K)."""
        finite: NDArray[np.bool_] = np.asarray(np.isfinite(self.tracks).all(-1))
        return finite if self.mask is None else finite & np.asarray(self.mask, dtype=bool)

    def check(self, where: str, *, every: bool = False) -> None:
        """Refuse what no study can use.

        Raises
        ------
        InvalidInput
            If shapes do not fit, nothing moves or was seen, the rate or the court cannot be, or another axis than the
            second is time: positions must change less from frame to frame than between agents or sequences.
        """
        x = np.asarray(self.tracks)
        if x.ndim != 4 or x.dtype.kind not in "fiu" or 0 in x.shape:
            raise InvalidInput(
                f"{where}: tracks must be numbers (N, T, K, D): sequences, frames, agents, coordinates; got {x.dtype} "
                f"{x.shape}. Trajectories.from_array(array, layout=...) reads other orders."
            )
        if x.shape[1] < 2:
            raise InvalidInput(f"{where}: a sequence needs two frames at least; got tracks {x.shape}.")
        if not isinstance(self.units, str):
            raise InvalidInput(f"{where}: units must be a name such as 'ft'; got {self.units!r}.")
        if self.mask is not None:
            mask = np.asarray(self.mask)
            if mask.shape != x.shape[:3] or not ((mask == 0) | (mask == 1)).all():
                raise InvalidInput(
                    f"{where}: the mask must be True or False, {x.shape[:3]}; got {mask.dtype} {mask.shape}."
                )
        if self.fps is not None:
            checks.positive(f"{where}: fps", self.fps)
        if self.court is not None and not _is_court(self.court):
            raise InvalidInput(f"{where}: court must be (length, width), both above 0; got {self.court!r}.")
        if self.labeling is not None and not callable(self.labeling):
            raise InvalidInput(f"{where}: labeling must be a function of tracks and mask; got {self.labeling!r}.")
        if self.n_intents is not None:
            checks.integer(f"{where}: n_intents", self.n_intents, least=2)
        if self.intents is not None:
            _check_intents(where, np.asarray(self.intents), x.shape[:3], self.n_intents)
        seen = self.seen()
        if not seen.any():
            raise InvalidInput(f"{where}: no position is finite and seen.")
        if not (seen[:, 1:] & seen[:, :-1]).any():
            raise InvalidInput(f"{where}: no agent is seen in two frames after one another.")
        jumps = _tracks.axis_jumps(np.where(seen[..., None], x, np.nan).astype(np.float64))
        if not jumps[1] > 0 and float(np.nanmax(np.abs(np.diff(np.where(seen[..., None], x, np.nan), axis=1)))) == 0:
            raise InvalidInput(f"{where}: no agent moves.")
        others = [jumps[a] for a in (0, 2) if np.isfinite(jumps[a]) and x.shape[a] > 1]
        if self.facts.get("axes") != _tracks.FROM_FILE and others and min(others) < jumps[1]:
            said = ", ".join(f"{j:.3g}" for j in jumps)
            raise InvalidInput(
                f"{where}: the median change of positions along the axes of {x.shape[:3]} is {said}; the second, time, "
                "should be the smallest. Give the array with layout=, such as 'TNKD' or 'NKTD'."
            )

    def describe(self, *, every: bool = False) -> dict[str, Any]:
        """Shape, unit, rate, what is missing, speeds, and what looks wrong, in plain values."""
        self.check(self.name, every=every)
        facts = super().describe()
        x, seen = np.where(self.seen()[..., None], self.tracks, np.nan).astype(np.float64), self.seen()
        step = np.linalg.norm(np.diff(x, axis=1), axis=-1)
        moves = step[np.isfinite(step)]
        rate = self.fps or 1.0
        unit = f"{self.units}/{'s' if self.fps else 'frame'}"
        low, high = np.nanmin(x, (0, 1, 2)), np.nanmax(x, (0, 1, 2))
        outside = "no court was given"
        if self.court is not None:
            out = ((x < 0) | (x > np.asarray(self.court))).any(-1) & seen
            outside = f"{out.sum() / seen.sum():.1%}"
        return {
            "name": facts.pop("name"),
            "shape": list(x.shape),
            "units": self.units,
            "fps": "not known" if self.fps is None else float(self.fps),
            "range": "; ".join(f"{a:g} to {b:g}" for a, b in zip(low, high, strict=True)),
            "not seen": f"{1 - seen.mean():.1%}",
            "outside of the court": outside,
            "median speed": f"{np.median(moves) * rate:.3g} {unit}",
            "fastest": f"{moves.max() * rate:.3g} {unit}",
            "jumps": int((moves > 10 * max(np.quantile(moves, 0.99), 1e-12)).sum()),
            "swaps suspected": _tracks.suspected_swaps(x),
            "positions rounded to": _rounded(x, np.asarray(self.tracks).dtype),
            "most repeated point": _tracks.repeated_point(x, seen),
            "intents": "the study's" if self.intents is None and self.labeling is None else "its own",
            **{str(k): v for k, v in self.facts.items()},
            **facts,
        }

    # --- mended, when asked for

    def relinked(self, *, max_gap: int = 10, factor: float = 3.0, reach: float | None = None) -> Trajectories:
        """Mend identities: agents whose names were exchanged, and tracks that break off and go on under another name.

        Parameters
        ----------
        max_gap
            Frames for which an agent may be gone before another name continues its track.
        factor
            Names are exchanged only where agents would have moved less by this factor; of two tracks that could
            be continued one is taken only if it is nearer by it. ``describe`` counts suspected swaps by the same rule.
        reach
            Farthest way for each frame of a gap, in the tracks' units; by default three times the 99 % quantile of
            steps.

        Returns
        -------
        tracks
            A copy; ``facts`` counts swaps and breaks. Agents that are left with no frame are dropped. Given intents
            belong to names, so that tracks with intents for each agent are refused.

        Raises
        ------
        InvalidInput
            If there are intents for each agent, or numbers are out of range.

        Examples
        --------
        >>> x = np.zeros((1, 6, 2, 2))
        >>> x[0, :, 0, 0], x[0, :, 1, 0] = np.arange(6), 30 + np.arange(6)
        >>> x[0, 3:] = x[0, 3:, ::-1]
        >>> mended = Trajectories(x).relinked()
        >>> mended.tracks[0, :, 0, 0].tolist(), mended.facts["swaps mended"]
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 1)
        """
        self.check(self.name)
        if self.intents is not None and np.ndim(self.intents) == 3:
            raise InvalidInput(
                f"{self.name}: intents belong to agents by name; leave them out, and label mended tracks."
            )
        checks.integer("max_gap", max_gap, least=0)
        checks.real("factor", factor, least=1)
        away = None if reach is None else checks.positive("reach", reach)
        x = np.where(self.seen()[..., None], self.tracks, np.nan).astype(np.float64)
        made, swaps, breaks = _linking.relinked(x, factor, max_gap, away)
        kept = np.asarray(np.isfinite(made).all(-1)).any(axis=(0, 1))
        facts = {"swaps mended": swaps, "tracks re-linked": breaks, "agents dropped": int((~kept).sum())}
        return self._changed(made[:, :, kept], facts)

    def dequantized(self, step: float | None = None, *, seed: int = 0) -> Trajectories:
        """Add uniform noise of one step of rounding, so that densities exist: rounded numbers earn any likelihood.

        The mean log density of such tracks is at most the log probability of the rounded ones per cell of that size.
        Noise makes still agents move a little: compare speeds with tracks that were treated alike.

        Parameters
        ----------
        step
            What positions were rounded to; by default what ``describe`` finds.
        seed
            Of the noise, uniform on [-step / 2, step / 2].

        Raises
        ------
        InvalidInput
            If no step is given and positions lie on no grid.

        Examples
        --------
        >>> x = np.random.default_rng(0).normal(size=(4, 30, 2, 2)).cumsum(1).round(1)
        >>> made = Trajectories(x).dequantized()
        >>> made.facts["noise of dequantization"], bool(np.abs(made.tracks - x).max() <= 0.05)
        (0.1, True)
        """
        self.check(self.name)
        x = np.where(self.seen()[..., None], self.tracks, np.nan).astype(np.float64)
        found = _linking.resolution(x) if step is None else checks.positive("step", step)
        if found is None:
            raise InvalidInput(f"{self.name}: positions lie on no grid; give the step that they were rounded to.")
        rng = np.random.default_rng([25, checks.integer("seed", seed, least=0)])
        made = x + rng.uniform(-found / 2, found / 2, x.shape)
        return self._changed(made, {"noise of dequantization": float(f"{found:.6g}")})

    def _changed(self, tracks: NDArray, facts: Mapping[str, Any]) -> Trajectories:
        mark = f"{self.fingerprint}+{sorted(facts.items())}" if self.fingerprint else ""
        hashed = hashlib.sha256(mark.encode()).hexdigest() if mark else ""
        return replace(self, tracks=tracks, mask=None, facts={**self.facts, **facts}, fingerprint=hashed)

    # --- from what people have

    @classmethod
    def from_array(
        cls, array: NDArray, layout: str = "NTKD", *, dim: int = 2, agents: Sequence[int] | None = None, **fields: Any
    ) -> Trajectories:
        """Make it of an array in any order of axes.

        Parameters
        ----------
        array
            Positions.
        layout
            The axes' letters: N sequences, T frames, K agents, D coordinates, and F for agents and coordinates in one
            axis, interleaved as x1, y1, x2, y2: ``"TNF"`` is sequence-first and flat, ``"NKTD"`` agent-first. N may be
            missing for one sequence.
        dim
            Coordinates of a position: how F is cut, and how many of D are kept (a height or a flag beyond is dropped
            if it is 2 and D is more).
        agents
            Which agents, in this order; all by default. For arrays of ball, offense and defense ``range(1, 6)``.
        fields
            Of :class:`Trajectories`.

        Raises
        ------
        InvalidInput
            If the letters do not fit the array, or F does not divide.

        Examples
        --------
        >>> flat = np.random.default_rng(0).normal(size=(50, 8, 22)).cumsum(0)
        >>> Trajectories.from_array(flat, "TNF", agents=range(1, 6)).tracks.shape
        (8, 50, 5, 2)
        """
        made = cls(_tracks.arranged(np.asarray(array), layout, dim, agents), **fields)
        made.check("the array")
        return made

    @classmethod
    def from_dataframe(
        cls,
        table: pd.DataFrame,
        id: str = "id",
        frame: str = "frame",
        x: str = "x",
        y: str = "y",
        *,
        sequence: str | None = None,
        time: str | None = None,
        fps: float | None = None,
        window: int = 50,
        stride: int | None = None,
        agents: int | None = None,
        **fields: Any,
    ) -> Trajectories:
        """Make it of a long table: a row for each agent and frame, in any order.

        Parameters
        ----------
        table
            The rows.
        id, frame, x, y
            Names of the columns. Frames are whole numbers.
        sequence
            Column that tells recordings apart; without it there is one.
        time
            Column of seconds, times of day or durations, from which the rate is taken; recordings are also split where
            it jumps, stands still or starts anew.
        fps
            Frames (rows of an agent, whatever the step of their numbers) a second, if known; refused if it disagrees
            with ``time`` by over 1 %.
        window, stride
            Frames of a sequence, and frames from one to the next (``window`` by default). No sequence reaches over a
            frame that is missing for all.
        agents
            K; by default the largest number of agents of a sequence. Agents that are missing are not seen; sequences
            with more agents are dropped and counted. Where there are no more ids than K, an agent has the same place in
            all sequences; otherwise those of a sequence stand in the order of their ids (``facts`` says which).
        fields
            Of :class:`Trajectories`.

        Raises
        ------
        InvalidInput
            If columns are missing or no numbers, an agent is twice in one frame (the first three are named), no
            sequence is long enough, or rates disagree, also those of recordings or the times of one frame.

        Examples
        --------
        >>> table = pd.DataFrame({"id": [7, 3] * 6, "frame": np.arange(12) // 2, "x": np.arange(12.0), "y": 0.0})
        >>> Trajectories.from_dataframe(table, window=3).tracks[0, :, 0, 0].tolist()  # of agent 3
        [1.0, 3.0, 5.0]
        """
        names = {"id": id, "frame": frame, "x": x, "y": y}
        cut = _tracks.Cut(checks.integer("window", window, least=2), stride, agents)
        found = _tracks.from_long(table, names, sequence, time, fps, cut)
        fields = {"facts": found.facts, **fields}
        made = cls(found.tracks, fps=found.fps, **fields)
        made.check("the table")
        return made

    @classmethod
    def from_sportvu(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        team: str = "home",
        window: int = 50,
        stride: int | None = None,
        every: int = 4,
        half_turn: bool = False,
    ) -> Trajectories:
        """Make it of a game of SportVU tracking: a JSON file, or what it holds.

        A file has ``events``, each with ``moments`` ``[period, unix milliseconds, game clock, shot clock, null,
        [[team, player, x, y, z], ...]]``, the ball first with team -1, 25 a second, in feet on 94 x 50. Events overlap:
        of moments with one period and stamp the first is kept. Sequences end at gaps, new periods, stopped clocks and
        substitutions; all of these are counted in ``facts``.

        Parameters
        ----------
        source
            Path or the parsed JSON.
        team
            ``"home"``, ``"visitor"``, ``"both"`` (ten players), or ``"all"`` (the ball first).
        window, stride
            Frames of a sequence, and frames to the next, after thinning.
        every
            Keep every so many moments: 4 gives 6.25 a second, as in the paper.
        half_turn
            Turn sequences that are mostly played on the right half by 180 degrees, so that all attack one basket; their
            number is in ``facts``. Never done unasked.

        Raises
        ------
        MissingFile, InvalidInput
            If there is no such file, it is no such JSON, or no sequence is long enough.
        """
        game: Any = source
        if not isinstance(source, Mapping):
            path = Path(source).expanduser()
            if not path.is_file():
                raise MissingFile(f"there is no file {path}.")
            try:
                game = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise InvalidInput(f"{path} is no JSON ({error}).") from None
        checks.choice("team", team, ("home", "visitor", "both", "all"))
        cut = _tracks.Cut(checks.integer("window", window, least=2), stride, None)
        found = _tracks.from_sportvu(game, team, cut, checks.integer("every", every, least=1), half_turn)
        made = cls(found.tracks, fps=found.fps, units="ft", court=(94.0, 50.0), facts=found.facts)
        made.check("the game")
        return made

    @classmethod
    def from_floodlight(cls, xy: Any, *, window: int = 50, stride: int | None = None, **fields: Any) -> Trajectories:
        """Make it of floodlight's ``XY`` object (or a list of them): interleaved columns and a frame rate.

        Raises
        ------
        InvalidInput
            If it has no ``xy``, an odd number of columns, or no sequence is long enough.
        """
        parts = xy if isinstance(xy, list | tuple) else [xy]
        found = _tracks.from_floodlight(parts, _tracks.Cut(checks.integer("window", window, least=2), stride, None))
        made = cls(found.tracks, fps=found.fps, **{"facts": found.facts, **fields})
        made.check("the XY object")
        return made

    @classmethod
    def from_kloppy(
        cls, dataset: Any, *, team: str | None = None, window: int = 50, stride: int | None = None, **fields: Any
    ) -> Trajectories:
        """Make it of a tracking data set of kloppy, in its own coordinates.

        Parameters
        ----------
        dataset
            With ``frames``, of which each has ``timestamp``, ``period.id`` and ``players_data``.
        team
            ``"home"`` or ``"away"``; all players by default.
        window, stride
            As :meth:`from_dataframe` has them.
        fields
            Of :class:`Trajectories`. The rate is taken from timestamps, since files declare others than they have.

        Raises
        ------
        InvalidInput
            If there are no such frames or coordinates, or no sequence is long enough.
        """
        table = _tracks.kloppy_table(dataset, team)
        columns: dict[str, Any] = {"sequence": "period", "time": "time", "window": window, "stride": stride}
        return cls.from_dataframe(table, **columns, **fields)


_OPTIONS = (
    "id", "frame", "x", "y", "sequence", "time", "fps", "window", "stride", "agents", "units", "length", "width", "sep",
    "layout", "dim", "team", "every", "half_turn",
)  # fmt: skip
_OF = {
    ".csv": _OPTIONS[:14],
    ".parquet": _OPTIONS[:13],
    ".npz": ("fps", "units", "length", "width", "layout", "dim"),
    ".json": ("team", "window", "stride", "every", "half_turn"),
}


def _rounded(x: NDArray, dtype: np.dtype) -> str:
    """The grid of positions, and whether their type holds enough digits for a step."""
    moves = np.linalg.norm(np.diff(x, axis=1), axis=-1)
    usual = float(np.median(moves[moves > 0])) if (moves > 0).any() else 0.0
    if dtype.kind == "f" and usual > 0:
        digit = float(np.spacing(np.abs(np.nanmax(np.abs(x))).astype(dtype)))
        if digit > 0.05 * usual:
            return (
                f"{digit:g}, the last digit of {dtype}, at a usual step of {usual:.3g}: load them in double precision"
            )
    found = _linking.resolution(x)
    return "no grid" if found is None else f"{found:.6g}"


def _is_court(court: Any) -> bool:
    size = np.asarray(court)
    return size.shape == (2,) and size.dtype.kind in "fiu" and bool((np.isfinite(size) & (size > 0)).all())


def _check_intents(where: str, intents: NDArray, shape: tuple[int, ...], classes: int | None) -> None:
    if intents.shape not in (shape[:2], shape):
        raise InvalidInput(f"{where}: intents must be {shape} or {shape[:2]}; got {intents.shape}.")
    low, high = intents.min(), intents.max()
    if intents.dtype.kind not in "iu" or low < -1 or (classes is not None and high >= classes):
        known = "0 up" if classes is None else f"0 to {classes - 1}"
        raise InvalidInput(
            f"{where}: intents must be whole numbers from {known}, -1 for none; got {intents.dtype} from "
            f"{low} to {high}."
        )
    if high < 0:
        raise InvalidInput(f"{where}: all intents are -1, which stands for none; leave them out.")


def load(name: str, options: Mapping[str, str]) -> Trajectories:
    """Load ``tracks:file``: a table ``.csv`` or ``.parquet``, arrays ``.npz``, or SportVU's ``.json``."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingFile(
            f"there is no file {name or '(none was named)'}; write tracks:file.csv?id=..&frame=..&x=..&y=.."
        )
    kind = path.suffix.lower()
    if kind not in _OF:
        raise InvalidInput(f"tracks come from {', '.join(_OF)}; {path} is none of these.")
    check_options(options, _OF[kind], f"tracks:{path}")
    sizes = {key: whole_number(options, key) for key in ("window", "stride", "agents", "every", "dim")}
    given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    about: dict[str, Any] = {key: options[key] for key in ("units",) if key in options}
    hashed = file_hash(path, extra=str(dict(options)))
    if kind == ".json":
        turn = options.get("half_turn", "no")
        if turn not in ("yes", "no"):
            raise InvalidInput(f"option half_turn must be yes or no; got {turn!r}.")
        made = Trajectories.from_sportvu(path, team=options.get("team", "home"), half_turn=turn == "yes", **given)
        return _named(made, path, hashed)
    if "fps" in options:
        about["fps"] = _number(options, "fps")
    if "length" in options or "width" in options:
        if not {"length", "width"} <= set(options):
            raise InvalidInput("a court needs both options, length and width.")
        about["court"] = (_number(options, "length"), _number(options, "width"))
    if kind == ".npz":
        held = read_npz(path)
        key = next((k for k in ("tracks", "data", "x") if k in held), None)
        if key is None:
            raise InvalidInput(
                f"{path} must hold an array tracks, (N, T, K, D); it holds {', '.join(held) or 'nothing'}."
            )
        more: dict[str, Any] = {k: held[k] for k in ("mask", "intents") if k in held}
        made = Trajectories.from_array(held[key], options.get("layout", "NTKD"), **given, **about, **more)
        return _named(made, path, hashed)
    sep = {"comma": ",", "semicolon": ";", "tab": "\t"}.get(options.get("sep", "comma"), "")
    if not sep:
        raise InvalidInput(f"option sep must be comma, semicolon or tab; got {options['sep']!r}.")
    try:
        table = pd.read_csv(path, sep=sep) if kind == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as a table ({error}).") from None
    columns: dict[str, Any] = {k: options[k] for k in ("id", "frame", "x", "y", "sequence", "time") if k in options}
    return _named(Trajectories.from_dataframe(table, **columns, **given, **about), path, hashed)


def _number(options: Mapping[str, str], key: str) -> float:
    try:
        return checks.positive(f"option {key}", float(options[key]))
    except ValueError:
        raise InvalidInput(f"option {key} must be a number above 0; got {options[key]!r}.") from None


def _named(made: Trajectories, path: Path, hashed: str) -> Trajectories:
    return replace(made, name=path.name, fingerprint=hashed)
