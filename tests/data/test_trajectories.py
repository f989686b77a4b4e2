"""Tracks as a kind of workload: layouts, tables, tracking files, and what is refused or reported."""

import json
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mlcollage.data import Trajectories, load_workload
from mlcollage.data.kinds import as_workload
from mlcollage.errors import InvalidInput, MissingFile


def walks(n=8, t=50, k=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 45, (n, 1, k, 2)) + rng.normal(0, 0.3, (n, t, k, 2)).cumsum(1)


def test_a_function_may_return_them():
    workload = as_workload({"tracks": walks(), "fps": 6.25, "units": "ft"}, "mine.py:f")
    assert type(workload) is Trajectories
    facts = workload.describe()
    assert (facts["fps"], facts["shape"], facts["swaps suspected"], facts["jumps"]) == (6.25, [8, 50, 5, 2], 0, 0)
    assert facts["median speed"].endswith("ft/s")


@pytest.mark.parametrize("layout", ["NTKD", "TNKD", "NKTD", "NDTK", "TNF", "NTF"])
def test_layouts(layout):
    x = walks()
    if "F" in layout:
        given = x.reshape(8, 50, 10).transpose(["NTF".index(c) for c in layout])
    else:
        given = x.transpose(["NTKD".index(c) for c in layout])
    assert np.array_equal(Trajectories.from_array(given, layout).tracks, x)


def test_time_must_be_the_smooth_axis():
    x = walks()
    with pytest.raises(InvalidInput, match=r"the second, time,.*layout="):
        Trajectories.from_array(x.transpose(0, 2, 1, 3))
    with pytest.raises(InvalidInput, match="the second, time"):
        Trajectories(x.transpose(1, 0, 2, 3)).check("mine")


def test_interleaved_columns_and_more_coordinates():
    row = np.array([1.0, 10.0, 2.0, 20.0])
    flat = row + np.arange(3)[:, None] * 0.01
    assert Trajectories.from_array(flat, "TF").tracks[0, 0].tolist() == [[1, 10], [2, 20]]
    with pytest.raises(InvalidInput, match="no whole number of agents"):
        Trajectories.from_array(flat[:, :3], "TF")
    nba = np.concatenate([walks(), np.zeros((8, 50, 5, 2))], -1)  # height and a flag
    assert Trajectories.from_array(nba, agents=[1, 2]).tracks.shape == (8, 50, 2, 2)
    with pytest.raises(InvalidInput, match="agents must be a whole number of at least 0 and at most 4, not 5"):
        Trajectories.from_array(nba, agents=[5])
    with pytest.raises(InvalidInput, match="layout"):
        Trajectories.from_array(nba, "NTKK")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"tracks": np.zeros((3, 4, 2))}, r"\(N, T, K, D\)"),
        ({"tracks": np.full((1, 4, 2, 2), np.nan)}, "finite and seen"),
        ({"tracks": np.zeros((1, 4, 1, 2))}, "no agent moves"),
        ({"tracks": walks()[:, :1]}, "two frames"),
        ({"tracks": walks(), "mask": np.ones((8, 50))}, "the mask must be"),
        ({"tracks": walks(), "fps": 0}, "fps"),
        ({"tracks": walks(), "court": (0, 50)}, "court must be"),
        ({"tracks": walks(), "labeling": 3}, "labeling must be"),
        ({"tracks": walks(), "intents": np.zeros((8, 3), int)}, "intents must be"),
    ],
)
def test_what_no_study_can_use(fields, match):
    with pytest.raises(InvalidInput, match=match):
        Trajectories(**fields).check("mine")


def test_what_looks_wrong_is_reported():
    t = np.arange(50) * 0.2
    x = np.zeros((1, 50, 2, 2))
    x[0, :, 0, 0], x[0, :, 1, 0] = t, t + 30
    x[0, 25:] = x[0, 25:, ::-1]
    facts = Trajectories(x, fps=25).describe()
    assert facts["swaps suspected"] == 1
    x = walks()
    x[:, ::10, 2] = 0
    facts = Trajectories(x, court=(45, 50)).describe()
    assert facts["most repeated point"].startswith("(0, 0), 2.0%")
    assert facts["median speed"].endswith("units/frame")
    mask = np.ones(x.shape[:3], bool)
    mask[:, ::10, 2] = False
    assert Trajectories(x, mask).describe()["most repeated point"] == "none"
    assert Trajectories(x, mask).describe()["not seen"] == "2.0%"


def long(x, ids=None):
    n, t, k, _ = x.shape
    rows = [(i, (ids or range(k))[a], f, *x[i, f, a]) for i in range(n) for f in range(t) for a in range(k)]
    return pd.DataFrame(rows, columns=["game", "who", "f", "px", "py"])


NAMES = {"id": "who", "frame": "f", "x": "px", "y": "py", "sequence": "game"}


def test_long_tables_in_any_order():
    x = walks(3, 20, 4)
    table = long(x).sample(frac=1, random_state=0)
    made = Trajectories.from_dataframe(table, **NAMES, window=10)
    assert np.allclose(made.tracks, x.reshape(3, 2, 10, 4, 2).reshape(6, 10, 4, 2))
    assert made.fps is None


def test_doubled_rows_and_missing_columns():
    table = long(walks(1, 20, 2))
    with pytest.raises(InvalidInput, match=r"4 rows have an agent twice in one frame \(0 in frame 3; 1 in frame 3"):
        Trajectories.from_dataframe(pd.concat([table, table[table["f"] == 3]]), **NAMES)
    with pytest.raises(InvalidInput, match=r"no column id='player'.*game, who"):
        Trajectories.from_dataframe(table, **NAMES | {"id": "player"})
    with pytest.raises(InvalidInput, match="must hold numbers"):
        Trajectories.from_dataframe(table.assign(px="left"), **NAMES)
    with pytest.raises(InvalidInput, match="whole numbers; name seconds"):
        Trajectories.from_dataframe(table.assign(f=table["f"] / 25), **NAMES)
    with pytest.raises(InvalidInput, match="missing values"):
        Trajectories.from_dataframe(table.assign(who=np.nan), **NAMES)
    with pytest.raises(InvalidInput, match="shorter window"):
        Trajectories.from_dataframe(table, **NAMES, window=21)


def test_gaps_split_and_absent_agents_are_not_seen():
    table = long(walks(1, 30, 3))
    table = table[(table["f"] != 14) & ~((table["who"] == 1) & (table["f"] < 5))]
    made = Trajectories.from_dataframe(table, **NAMES, window=7)
    assert made.tracks.shape == (4, 7, 3, 2)  # two before the gap and two after it
    assert made.facts["splits"] == 1
    assert made.seen()[0, :, 1].tolist() == [False] * 5 + [True] * 2
    fewer = Trajectories.from_dataframe(table, **NAMES, window=5, agents=2)
    assert fewer.facts["sequences with too many agents"] == 4
    assert len(fewer.tracks) == 1


def test_the_rate_is_that_of_the_times():
    table = long(walks(1, 30, 2)).assign(s=lambda d: d["f"] / 29.97)
    made = Trajectories.from_dataframe(table, **NAMES, time="s", window=10)
    assert made.fps == pytest.approx(29.97)
    with pytest.raises(InvalidInput, match=r"fps is 25, but the times say 29\.97"):
        Trajectories.from_dataframe(table, **NAMES, time="s", fps=25)
    late = table.assign(s=table["s"] + (table["f"] >= 15))
    assert Trajectories.from_dataframe(late, **NAMES, time="s", window=10).facts["splits"] == 1
    # Frames six apart are one step.
    assert len(Trajectories.from_dataframe(table.assign(f=table["f"] * 6), **NAMES, window=10).tracks) == 3


def test_a_csv_by_name(tmp_path):
    file = tmp_path / "game.csv"
    long(walks(2, 20, 3)).to_csv(file, index=False)
    spec = f"tracks:{file}?id=who&frame=f&x=px&y=py&sequence=game&window=10&fps=10&units=m&length=45&width=50"
    made = load_workload(spec, Trajectories)
    assert made.tracks.shape == (4, 10, 3, 2)
    assert (made.name, made.units, made.fps, made.court) == ("game.csv", "m", 10.0, (45.0, 50.0))
    assert made.fingerprint
    np.savez(tmp_path / "a.npz", tracks=walks().transpose(1, 0, 2, 3))
    assert load_workload(f"tracks:{tmp_path / 'a.npz'}?layout=TNKD").tracks.shape == (8, 50, 5, 2)
    with pytest.raises(InvalidInput, match="no option 'speed'"):
        load_workload(f"tracks:{file}?speed=3")
    with pytest.raises(InvalidInput, match="length and width"):
        load_workload(f"tracks:{file}?length=3")
    with pytest.raises(InvalidInput, match="number above 0"):
        load_workload(f"tracks:{file}?fps=fast")
    with pytest.raises(MissingFile):
        load_workload(f"tracks:{tmp_path / 'no.csv'}")
    with pytest.raises(InvalidInput, match="tracks come from"):
        load_workload(f"tracks:{__file__}")


def game(frames=200, repeat=True):
    """A small game: two events that overlap, a stopped clock, a moment without the ball, a substitution."""
    moments = []
    for f in range(frames):
        entries = [[-1, -1, 20.0, 20.0, 5.0]]
        for side, team in ((1, 100), (2, 200)):
            for p in range(5):
                player = 10 * side + p + (5 if side == 1 and p == 4 and f >= 150 else 0)
                entries.append([team, player, 60 + p + 0.05 * f, 10.0 + 3 * p + 20 * (side - 1), 0.0])
        clock = 720 - f / 25 if f < 100 or f >= 110 else 720 - 100 / 25
        moments.append([1, 1_450_000_000_000 + 40 * f, round(clock, 4), None, None, entries])
    moments[40][5] = moments[40][5][1:]
    events = [{"home": {"teamid": 100}, "visitor": {"teamid": 200}, "moments": moments[:120]}]
    events.append({"moments": moments[80:] if repeat else moments[120:]})
    return {"gameid": "1", "events": [*events, {"moments": []}]}


def test_sportvu(tmp_path):
    made = Trajectories.from_sportvu(game(), window=8, every=4)
    assert made.facts["duplicates"] == 40
    assert made.facts["moments without 11 entries"] == 1
    assert made.facts["splits"] >= 3
    assert made.tracks.shape[1:] == (8, 5, 2)
    assert made.fps == 6.25
    assert np.allclose(np.diff(made.tracks[..., 0], axis=1), 0.2)
    turned = Trajectories.from_sportvu(game(), window=8, half_turn=True)
    assert turned.facts["half turns"] == len(turned.tracks)
    assert np.allclose(turned.tracks, np.array([94.0, 50.0]) - made.tracks)
    assert Trajectories.from_sportvu(game(), team="all", window=8).tracks.shape[2] == 11
    assert Trajectories.from_sportvu(game(), team="both", window=8).tracks.shape[2] == 10
    file = tmp_path / "game.json"
    file.write_text(json.dumps(game(repeat=False)))
    assert load_workload(f"tracks:{file}?window=8&half_turn=yes").facts["duplicates"] == 0
    file.write_text("{")
    with pytest.raises(InvalidInput, match="no JSON"):
        Trajectories.from_sportvu(file)
    with pytest.raises(InvalidInput, match="list events"):
        Trajectories.from_sportvu({"moments": []})
    with pytest.raises(InvalidInput, match="a moment is"):
        Trajectories.from_sportvu({"events": [{"moments": [[1, 2]]}]})


def test_floodlight():
    xy = SimpleNamespace(xy=walks(1, 30, 3)[0].reshape(30, 6), framerate=25)
    assert Trajectories.from_floodlight(xy, window=10).tracks.shape == (3, 10, 3, 2)
    with pytest.raises(InvalidInput, match="interleaved"):
        Trajectories.from_floodlight(SimpleNamespace(xy=xy.xy[:, :5], framerate=25))
    with pytest.raises(InvalidInput, match="one frame rate"):
        Trajectories.from_floodlight([xy, SimpleNamespace(xy=xy.xy, framerate=10)], window=10)


def test_kloppy():
    x = walks(1, 30, 2)[0]
    sides = [SimpleNamespace(ground=SimpleNamespace(value=v)) for v in ("home", "away")]
    players = [SimpleNamespace(player_id=f"p{a}", team=sides[a]) for a in range(2)]

    class Player:
        """Hashable, as kloppy's are."""

    keys = []
    for p in players:
        key = Player()
        key.player_id, key.team = p.player_id, p.team
        keys.append(key)
    frames = [
        SimpleNamespace(
            timestamp=pd.Timedelta(seconds=f / 25),
            period=SimpleNamespace(id=1),
            players_data={
                k: SimpleNamespace(coordinates=SimpleNamespace(x=x[f, a, 0], y=x[f, a, 1])) for a, k in enumerate(keys)
            },
        )
        for f in range(30)
    ]
    made = Trajectories.from_kloppy(SimpleNamespace(frames=frames), window=10, units="m")
    assert np.allclose(made.tracks.reshape(30, 2, 2), x)
    assert made.fps == pytest.approx(25)
    assert Trajectories.from_kloppy(SimpleNamespace(frames=frames), team="away", window=10).tracks.shape[2] == 1
    with pytest.raises(InvalidInput, match="no positions of team 'red'"):
        Trajectories.from_kloppy(SimpleNamespace(frames=frames), team="red")


def long_table(n=60, ids=(7, 3, 9), games=1):
    rows = [
        (g, a, f, f / 10, i * 30 + f * 0.5, 3 * i + g + f * 0.1)
        for g in range(games)
        for i, a in enumerate(ids)
        for f in range(n)
    ]
    table = pd.DataFrame(rows, columns=["sequence", "id", "frame", "time", "x", "y"])
    return table.sample(frac=1, random_state=1).reset_index(drop=True)


def test_clocks_of_tables():
    table = long_table()
    cut = {"window": 12, "time": "time"}
    start = pd.Timestamp("2020-01-01") + pd.to_timedelta(table["time"], unit="s")
    assert Trajectories.from_dataframe(table.assign(time=start), **cut).fps == pytest.approx(10)
    for time, said in (
        (table["time"].where(table["frame"] != 4), r"'time' \(time\) has 3 missing"),
        (table["time"] + table["id"], "agents of one frame have times up to 6 s apart"),
        (table["time"] * 1e-6, "must be in seconds"),
    ):
        with pytest.raises(InvalidInput, match=said):
            Trajectories.from_dataframe(table.assign(time=time), **cut)
    slow = Trajectories.from_dataframe(table.assign(time=table["frame"] * 100), **cut)
    assert "milliseconds?" in slow.describe()["times"]
    # A clock that starts anew at half time, and one that stands still: no sequence crosses either.
    for clock in (table["time"] % 3, table["time"] - 0.1 * (table["frame"] >= 30)):
        found = Trajectories.from_dataframe(table.assign(time=clock), **cut)
        assert (found.tracks[:, 0, 0, 0] - 30).tolist() == [0, 6, 15, 21]
        assert (found.facts["splits"], found.facts["frames in no sequence"]) == (1, "20.0% of 60")
    two = long_table(games=2)
    with pytest.raises(InvalidInput, match="recordings have other rates, from 5 to 10"):
        Trajectories.from_dataframe(two.assign(time=two["time"] * (1 + two["sequence"])), sequence="sequence", **cut)


def test_recordings_may_number_their_frames_in_other_steps():
    two = long_table(games=2)
    numbers = two.assign(frame=two["frame"] * np.where(two["sequence"] == 0, 6, 10))
    found = Trajectories.from_dataframe(numbers, sequence="sequence", window=20, fps=2.5)
    assert np.array_equal(found.tracks, Trajectories.from_dataframe(two, sequence="sequence", window=20).tracks)
    assert found.facts["frame numbers rise by"] == "6, 10"


def test_an_agent_keeps_its_place():
    table = long_table()
    table.loc[(table["id"] == 9) & (table["frame"] >= 30), "id"] = 11  # a substitute
    table = table[~((table["id"] == 3) & (table["frame"] >= 40))]
    found = Trajectories.from_dataframe(table, window=20)
    counts = np.isfinite(found.tracks).all(-1).sum(1)
    assert counts.tolist() == [[20, 20, 20, 0], [20, 20, 10, 10], [0, 20, 0, 20]]  # 3, 7, 9, 11
    assert found.facts["places of agents"] == "the same in all"
    few = Trajectories.from_dataframe(table, window=20, agents=3)
    assert few.facts["sequences with too many agents"] == 1
    assert few.facts["frames in no sequence"] == "33.3% of 60"
    assert few.facts["places of agents"].startswith("by sequence")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"court": (94.0, float("nan"))}, "court must be"),
        ({"court": 94.0}, "court must be"),
        ({"mask": np.full((8, 50, 5), 2)}, "mask must be True or False"),
        ({"intents": np.full((8, 50, 5), -2)}, "from -2 to -2"),
        ({"intents": np.full((8, 50), 1.5)}, "whole numbers from 0 up"),
        ({"intents": np.full((8, 50), 4), "n_intents": 4}, "whole numbers from 0 to 3"),
        ({"intents": np.full((8, 50), -1)}, "all intents are -1"),
        ({"n_intents": 0}, "n_intents must be"),
        ({"units": 3}, "units must be"),
    ],
)
def test_fields_are_checked(fields, said):
    with pytest.raises(InvalidInput, match=said):
        Trajectories(walks(), **fields).check("mine")


def test_agents_are_chosen_once():
    with pytest.raises(InvalidInput, match="different numbers below 5"):
        Trajectories.from_array(walks(), agents=[0, 0])


def crossing(n=1, t=40, k=4, seed=0):
    """Agents that keep far from each other."""
    rng = np.random.default_rng(seed)
    lanes = 30.0 * np.arange(k)[:, None] * [0, 1]
    return lanes + rng.normal(0, 0.2, (n, t, k, 2)).cumsum(1)


def test_swaps_are_mended_when_asked():
    x = crossing(3)
    mixed = x.copy()
    mixed[0, 12:] = mixed[0, 12:, [1, 2, 0, 3]].swapaxes(0, 1)  # three change places
    mixed[0, 30:] = mixed[0, 30:, [3, 1, 2, 0]].swapaxes(0, 1)  # and then two
    mixed[2, 5:9] = mixed[2, 5:9, [0, 2, 1, 3]].swapaxes(0, 1)  # back again after four frames
    made = Trajectories(mixed).relinked()
    assert np.array_equal(made.tracks, x)
    assert made.facts["swaps mended"] == 4
    assert made.describe()["swaps suspected"] == 0
    same = Trajectories(x).relinked()
    assert np.array_equal(same.tracks, x)
    assert (same.facts["swaps mended"], same.facts["tracks re-linked"]) == (0, 0)


def test_broken_tracks_are_linked_when_asked():
    x = crossing(2)
    broken = np.concatenate([x, np.full_like(x[:, :, :2], np.nan)], 2)  # two names to spare
    broken[0, 20:, 4], broken[0, 17:, 1] = x[0, 20:, 1], np.nan  # three frames gone, then another name
    broken[0, 31:, 5], broken[0, 30:, 4] = x[0, 31:, 1], np.nan
    broken[1, 10:15, 2] = np.nan  # gone and back under its own name
    made = Trajectories(broken).relinked()
    assert made.tracks.shape == x.shape
    want = x.copy()
    want[0, 17:20, 1], want[0, 30, 1], want[1, 10:15, 2] = np.nan, np.nan, np.nan
    assert np.array_equal(made.tracks, want, equal_nan=True)
    assert (made.facts["tracks re-linked"], made.facts["agents dropped"]) == (2, 2)
    few = Trajectories(broken).relinked(max_gap=2)
    assert few.facts["tracks re-linked"] == 1  # three frames are too long, one is not


def test_what_is_in_doubt_is_left_alone():
    x = np.zeros((1, 12, 3, 2))
    x[0, :, :, 0] = 0.1 * np.arange(12)[:, None]
    x[0, :, 1, 1] = 0.2  # beside the first: either could be the third's past
    x[0, 6:, :2], x[0, :7, 2], x[0, 7:, 2, 1] = np.nan, np.nan, 0.1
    assert Trajectories(x).relinked().facts["tracks re-linked"] == 0
    far = x.copy()
    far[0, 7:, 2, 1] = 60.0  # out of reach
    assert Trajectories(far).relinked().facts["tracks re-linked"] == 0
    with pytest.raises(InvalidInput, match="intents belong to"):
        Trajectories(crossing(), intents=np.zeros((1, 40, 4), int)).relinked()
    with pytest.raises(InvalidInput, match="max_gap must be"):
        Trajectories(crossing()).relinked(max_gap=-1)


@pytest.mark.parametrize("step", [0.1, 1 / 32, 5.0, 0.3048])
def test_rounded_positions_are_found_and_get_noise(step):
    x = np.round(walks(seed=3) / step) * step
    facts = Trajectories(x).describe()
    assert float(facts["positions rounded to"]) == pytest.approx(step, rel=1e-3)
    made = Trajectories(x).dequantized(seed=1)
    noise = (made.tracks - x).ravel()
    assert np.abs(noise).max() <= step / 2 * 1.001
    assert noise.std() == pytest.approx(step / 12**0.5, rel=0.05)  # of a uniform distribution
    assert abs(noise.mean()) < 0.02 * step
    assert np.array_equal(Trajectories(x).dequantized(seed=1).tracks, made.tracks)
    assert Trajectories(made.tracks).describe()["positions rounded to"] == "no grid"


def test_no_grid_is_said_and_refused():
    assert Trajectories(walks()).describe()["positions rounded to"] == "no grid"
    with pytest.raises(InvalidInput, match="no grid; give the step"):
        Trajectories(walks()).dequantized()
    assert np.abs(Trajectories(walks()).dequantized(0.5).tracks - walks()).max() <= 0.25


def test_digits_that_single_precision_lost_are_reported():
    x = crossing() + np.array([448_262.0, 5_411_932.0])
    said = Trajectories(x.astype(np.float32)).describe()["positions rounded to"]
    assert "the last digit of float32" in said
    assert Trajectories(x).describe()["positions rounded to"] == "no grid"


def test_the_real_kloppy():
    domain = pytest.importorskip("kloppy.domain")
    x = walks(1, 30, 2)[0]
    sides = (("a", domain.Ground.HOME), ("b", domain.Ground.AWAY))
    teams = [domain.Team(team_id=v, name=v, ground=g) for v, g in sides]
    players = [domain.Player(player_id=f"p{a}", team=teams[a], jersey_no=a + 1) for a in range(2)]
    start = timedelta(0)
    period = domain.Period(id=1, start_timestamp=start, end_timestamp=timedelta(seconds=2))
    pitch = domain.MetricPitchDimensions(
        x_dim=domain.Dimension(0, 105), y_dim=domain.Dimension(0, 68), standardized=False
    )
    system = domain.CustomCoordinateSystem(
        origin=domain.Origin.BOTTOM_LEFT,
        vertical_orientation=domain.VerticalOrientation.BOTTOM_TO_TOP,
        pitch_dimensions=pitch,
    )
    metadata = domain.Metadata(
        teams=teams, periods=[period], pitch_dimensions=pitch, frame_rate=25, orientation=domain.Orientation.HOME_AWAY,
        flags=None, provider=domain.Provider.OTHER, coordinate_system=system,
    )  # fmt: skip
    points = [
        {p: domain.PlayerData(coordinates=domain.Point(x=v[a, 0], y=v[a, 1])) for a, p in enumerate(players)} for v in x
    ]
    frames = [
        domain.Frame(
            timestamp=timedelta(seconds=f / 25), frame_id=f, ball_owning_team=None, ball_state=None, period=period,
            players_data=data, other_data={}, ball_coordinates=None, statistics=[],
        )
        for f, data in enumerate(points)
    ]  # fmt: skip
    dataset = domain.TrackingDataset(records=frames, metadata=metadata)
    made = Trajectories.from_kloppy(dataset, window=10, units="m")
    assert np.allclose(made.tracks.reshape(30, 2, 2), x)
    assert made.fps == pytest.approx(25)
    assert np.allclose(Trajectories.from_kloppy(dataset, team="away", window=10).tracks.reshape(30, 2), x[:, 1])


def test_the_real_floodlight():
    floodlight = pytest.importorskip("floodlight")
    x = walks(1, 30, 3)[0]
    xy = floodlight.XY(xy=x.reshape(30, 6), framerate=25)
    made = Trajectories.from_floodlight(xy, window=10, units="m")
    assert np.array_equal(made.tracks.reshape(30, 3, 2), x)
    assert made.fps == 25
    assert np.array_equal(made.tracks[0, :, 1], xy.player(1)[:10])
