"""The command line: what each command prints, how it ends, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mlcollage import cli, lab
from mlcollage.lab import engine
from mlcollage.lab.bound import BoundStudy
from mlcollage.lab.running import run_study
from mlcollage.lab.store import Store


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    def says(self, *words: str) -> bool:
        """Ended by an error of one line that holds these words."""
        lines = self.err.strip().splitlines()
        assert "Traceback" not in self.err
        assert len(lines) == 1, self.err
        return all(word in lines[0] for word in words)


@pytest.fixture
def mlcollage(capfd, monkeypatch, tmp_path):
    """Call the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLCOLLAGE_STORE", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(*words: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["mlcollage", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        code = end.value.code
        return Result(0 if code is None else int(code), out, err)

    return call


COMMANDS = ("list", "show", "run", "judge", "audit", "pool", "slide", "digest", "bench", "new", "data", "doctor")


# --- starting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["-c", "import mlcollage"], ["-m", "mlcollage.cli", "--help"]], ids=["import", "help"]
)
def test_nothing_heavy_is_imported_to_start(words):
    shown = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "mlcollage" in loaded
    assert not loaded & {"torch", "numpy", "pandas", "matplotlib", "scipy", "sklearn", "numba", "pyarrow"}


def test_list_and_show_of_a_planned_paper_import_nothing_heavy():
    script = (
        "import sys; sys.argv = ['mlcollage', 'list', '--json']\n"
        "from mlcollage import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_help_names_every_command_and_each_has_its_own(mlcollage):
    top = mlcollage("--help")
    assert top.code == 0
    for command in COMMANDS:
        assert f" {command} " in top.out
        own = mlcollage(command, "--help")
        assert own.code == 0
        assert "--json" in own.out or command == "new"


def test_version(mlcollage):
    from mlcollage import __version__

    assert mlcollage("--version").out.split() == ["mlcollage", __version__]


# --- list and show --------------------------------------------------------------------------------------------------


def test_list_in_a_pipe_is_one_whole_line_a_paper(mlcollage):
    shown = mlcollage("list")
    assert shown.code == 0
    assert "…" not in shown.out
    rows = shown.out.splitlines()[1:]
    papers = mlcollage("list", "--json").json
    assert len(papers) == 16
    assert [row.split()[1] for row in rows] == [p["slug"] for p in papers]
    assert all(p["title"] in row for p, row in zip(papers, rows, strict=True))
    assert {p["slug"] for p in papers if p["built"]} >= {"deep_bootstrap", "gated_linear_networks"}


@pytest.mark.parametrize("columns", ["80", "60"])
def test_a_narrow_terminal_loses_no_name(mlcollage, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(cli, "out", Console(width=int(columns)))
    shown = mlcollage("list").out
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= int(columns)
    for paper in mlcollage("list", "--json").json:
        assert paper["slug"] in shown


def test_show_gives_the_claims_and_code_that_can_be_copied(mlcollage, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = mlcollage("show", "gated_linear_networks")
    facts = mlcollage("show", "gated_linear_networks", "--json").json
    assert facts["usage"] in shown.out, "code must not be wrapped"
    assert facts["title"] in shown.out
    ids = [c["id"] for c in facts["claims"]]
    assert len(set(ids)) == len(ids) > 5
    assert all(f" {i} " in shown.out for i in ids)
    monkeypatch.delenv("COLUMNS")
    rows = mlcollage("show", "gated_linear_networks").out.splitlines()
    for c in facts["claims"]:
        (row,) = [row for row in rows if row.split()[:1] == [c["id"]]]
        assert f" {c['title']} " in row
        assert (row.split()[1] == "yes") == c["headline"]
    assert all(c["sentence"] and c["estimand"] and c["test"] for c in facts["claims"])


def test_show_of_a_planned_paper_says_so(mlcollage, planned):
    shown = mlcollage("show", planned)
    assert shown.code == 0
    assert "Planned" in shown.out
    assert mlcollage("show", planned, "--json").json["claims"] == []


@pytest.mark.parametrize("command", ["show", "run", "judge", "slide", "bench"])
def test_a_slip_of_the_pen_gets_the_nearest_name(mlcollage, command):
    done = mlcollage(command, "deep_bootstrp")
    assert done.code == 2
    assert done.says("there is no paper 'deep_bootstrp'", "did you mean 'deep_bootstrap'?")


@pytest.mark.parametrize("command", ["run", "judge", "slide"])
def test_a_planned_paper_cannot_be_run(mlcollage, planned, command):
    done = mlcollage(command, planned)
    assert done.code == 2
    assert done.says("planned but not built", "mlcollage list")


# --- run ------------------------------------------------------------------------------------------------------------


def test_run_measures_judges_and_says_what_is_there(mlcollage, probe):
    done = mlcollage("run", "probe")
    assert done.code == 0
    assert "✓ supported" in done.out
    assert "○ untested" in done.out
    again = mlcollage("run", "probe", "--json")
    assert again.code == 0
    (summary,) = again.json
    assert (summary["study"], summary["scale"], summary["workload"]) == ("probe", "quick", "default")
    assert len(summary["finished"]) == 3
    assert summary["failed"] == []


def test_run_at_smoke_scale_gives_no_verdicts(mlcollage, probe):
    done = mlcollage("run", "probe", "--scale", "smoke", "-j", "1")
    assert done.code == 0
    assert "supported" not in done.out
    # What was measured is printed: 2, 2.01 and 2.02, in one thread each.
    assert [line.strip() for line in done.out.splitlines()[-3:]] == ["probe", "threads: ok 1", "value: ok 2.01"]


def test_a_failed_run_ends_the_command_with_1_and_keeps_the_others(mlcollage, probe, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "ok,raise,refuse")
    monkeypatch.setenv("PROBE_SEEDS", "2")
    done = mlcollage("run", "probe", "--json")
    assert done.code == 1
    (summary,) = done.json
    assert len(summary["finished"]) == 2
    assert {f["reason"].partition(" (")[0] for f in summary["failed"]} == {
        "experiment probe failed with RuntimeError: the loss is not a number",
        "the setting is wrong; use another.",
    }
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("error: 4 runs failed")
    assert "and 1 more" in last
    assert "Traceback" not in done.err
    monkeypatch.setenv("PROBE_ARMS", "ok")
    assert mlcollage("run", "probe").code == 0


MORE_SEEDS = """

import numpy as np

CLAIMS = (
    Claim("C1", "A coin", "The coin is not fair.", "here", Level("value", "ok"), "greater", margin=0.01),
    Claim("C2", "Two is two", "Two is at least 1.5.", "here", Level("two", "ok"), "at_least", null=1.5),
)


def probe(task):
    measured = Measurements()
    measured.add("value", np.random.default_rng(task.seed).normal())
    measured.add("two", 2.0 + 0.01 * np.random.default_rng(task.seed).normal())
    return measured
"""


def test_run_until_settled_adds_seeds_and_says_for_which_claims(mlcollage, probe, monkeypatch):
    monkeypatch.setenv("PROBE_SEEDS", "5")
    file = probe / "probe_paper" / "study.py"
    file.write_text(file.read_text() + MORE_SEEDS)
    assert mlcollage("run", "probe", "--until-settled", "--max-seeds", "7").says("needs at least 10")
    assert mlcollage("run", "probe", "--until-settled", "--scale", "smoke").says("gives no verdicts")
    assert mlcollage("run", "probe", "--max-seeds", "20").says("give both")
    done = mlcollage("run", "probe", "--until-settled", "--max-seeds", "15")
    assert done.code == 0
    assert "open: C1; adding seeds 5 to 9" in done.err
    assert "open: C1; adding seeds 10 to 14" in done.err
    verdicts = {v["id"]: v for v in mlcollage("judge", "probe", "--json").json}
    assert {k: v["status"] for k, v in verdicts.items()} == {"C1": "inconclusive", "C2": "supported"}
    assert "anytime-valid, 15 seeds" in verdicts["C1"]["reason"]


def test_what_a_study_prints_does_not_end_up_in_the_json(mlcollage, probe, monkeypatch):
    monkeypatch.setenv("PROBE_ARMS", "noisy")
    assert len(mlcollage("run", "probe", "--scale", "smoke", "--json").json[0]["finished"]) == 3


def test_run_checks_all_names_before_it_runs_any(mlcollage, probe, tmp_path):
    done = mlcollage("run", "probe", "a", "b")
    assert done.code == 2
    assert done.says("there is no paper 'a'")
    assert not (tmp_path / "results").exists()


def test_the_same_paper_named_twice_is_run_once(mlcollage, probe):
    assert len(mlcollage("run", "probe", "probe", "--scale", "smoke", "--json").json) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--workload", "nowhere.npz"], "there is no file nowhere.npz"),
        (["--workload", "no_such_module:f"], "there is no module 'no_such_module'"),
        (["--workload", "nonsense"], "there is no workload 'nonsense'"),
        (["--engine", "sge"], "there is no engine 'sge'"),
        (["--workers", "0"], "must be at least 1"),
        (["--store", "a_file"], "is a file"),
    ],
)
def test_bad_options_are_one_sentence_and_2(mlcollage, probe, tmp_path, words, sentence):
    (tmp_path / "a_file").write_text("")
    done = mlcollage("run", "probe", "--scale", "smoke", *words)
    assert done.code == 2
    assert done.says(sentence)


@pytest.mark.parametrize("words", [["run", "probe", "--scale", "huge"], ["run"], ["nonsense"], ["judge", "a", "b"]])
def test_wrong_usage_ends_with_2(mlcollage, words):
    done = mlcollage(*words)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_ctrl_c_says_what_is_kept(mlcollage, probe, monkeypatch):
    execute = engine.LocalEngine.execute

    def interrupted(self, study, runs, store, on_event):
        execute(self, study, runs[:2], store, on_event)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.LocalEngine, "execute", interrupted)
    done = mlcollage("run", "probe", "--scale", "smoke")
    assert done.code == 130
    assert "stopped; 2 of 3 runs are kept. The same command goes on from there." in done.err


def test_the_store_can_come_from_the_environment(mlcollage, probe, monkeypatch, tmp_path):
    monkeypatch.setenv("MLCOLLAGE_STORE", str(tmp_path / "elsewhere"))
    assert mlcollage("run", "probe", "--scale", "smoke").code == 0
    assert len(list((tmp_path / "elsewhere" / "runs" / "probe").iterdir())) == 3
    assert not (tmp_path / "results").exists()
    assert len(mlcollage("judge", "probe", "--scale", "smoke", "--json").json) == 2


def test_run_on_a_users_workload_is_kept_apart(mlcollage, probe, tmp_path):
    rng = np.random.default_rng(0)
    np.savez("mine.npz", X=rng.normal(size=(40, 3)), y=np.arange(40) % 4)
    assert mlcollage("run", "probe", "--scale", "smoke").code == 0
    (summary,) = mlcollage("run", "probe", "--scale", "smoke", "-w", "mine.npz", "--json").json
    assert summary["workload"].startswith("mine.npz")
    assert len(list((tmp_path / "results" / "runs" / "probe").iterdir())) == 6


# --- judge, slide, digest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["judge", "slide"])
def test_an_empty_store_says_which_command_fills_it(mlcollage, probe, command):
    done = mlcollage(command, "probe", "--scale", "full", "-w", "digits")
    assert done.code == 2
    assert done.says("nothing is measured for probe", "`mlcollage run probe --scale full --workload digits`")


def test_judge_prints_whole_verdicts(mlcollage, probe):
    mlcollage("run", "probe")
    shown = mlcollage("judge", "probe")
    assert "Two is two" in shown.out
    assert "2.01 [1.9" in shown.out
    c1, c2 = mlcollage("judge", "probe", "--json").json
    assert (c1["id"], c1["status"], c1["seeds"]) == ("C1", "supported", 3)
    assert c1["interval"][0] < c1["estimate"] < c1["interval"][1]
    assert (c2["status"], c2["reason"]) == ("untested", "not tested at this scale")


def test_slide_writes_the_formats_asked_for(mlcollage, probe, tmp_path):
    mlcollage("run", "probe", "--scale", "smoke")
    done = mlcollage("slide", "probe", "--scale", "smoke", "-f", "svg", "-f", "png", "--out", "[drawn]")
    assert done.code == 0
    assert done.out.splitlines() == [f"[drawn]/probe-smoke.{kind}" for kind in ("svg", "png")]
    assert (tmp_path / "[drawn]" / "probe-smoke.png").stat().st_size > 10_000
    files = mlcollage("slide", "probe", "--scale", "smoke", "--json").json
    assert set(files) == {"svg", "png", "pdf", "portrait"}
    wrong = mlcollage("slide", "probe", "--scale", "smoke", "-f", "bmp")
    assert wrong.code == 2
    assert wrong.says("'bmp'", "svg, png, pdf")


def test_out_that_is_a_file_is_said_in_a_sentence(mlcollage, probe, tmp_path):
    mlcollage("run", "probe", "--scale", "smoke")
    (tmp_path / "taken").write_text("")
    for command in (["slide", "probe"], ["digest", "2021-03", "--no-run"]):
        done = mlcollage(*command, "--scale", "smoke", "--out", "taken")
        assert done.code == 2
        assert done.says("taken", "choose another")


def test_digest_of_months_without_results_still_makes_pages(mlcollage, tmp_path):
    done = mlcollage("digest", "2021-03", "--no-run", "--scale", "smoke", "--json")
    assert done.code == 0
    assert done.json["slides"] == {}
    assert {Path(p).name for p in done.json["pages"]} >= {"index.html", "2021-03.html", "2021-09.html"}
    assert (tmp_path / "results" / "digest" / "index.html").stat().st_size > 1000
    wrong = mlcollage("digest", "May")
    assert wrong.code == 2
    assert wrong.says("there is no month May", "2021-05")


def test_digest_shows_every_slide_that_can_be_drawn_and_says_which_cannot(mlcollage, probe, monkeypatch, tmp_path):
    """The slide of the probe needs the arm ``ok``, all of whose runs fail here; other papers are not harmed."""
    monkeypatch.setattr("mlcollage.cli._slugs_of", lambda months: ["probe"])
    assert mlcollage("digest", "--scale", "smoke").code == 0
    assert (tmp_path / "results/digest/slides/probe-smoke.svg").exists()
    monkeypatch.setenv("PROBE_ARMS", "slow")
    broken = mlcollage("digest", "--scale", "smoke", "--store", "other")
    assert broken.code == 1
    assert broken.err.strip().splitlines()[-1].startswith("error: 1 slides could not be drawn (probe: ")
    assert (tmp_path / "other/digest/index.html").exists()


# --- bench, new, data, doctor ---------------------------------------------------------------------------------------

BENCH = """
def bench(quick=True):
    return [{"name": "ours [fast]", "what": "a pass", "value": 1234.5, "unit": "samples/s", "ratio": 2.0},
            {"name": "peer", "what": "a pass", "value": 617.0, "unit": "samples/s", "ratio": None}]
"""


def test_bench_prints_ratios_and_records_them_once(mlcollage, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "deep_bootstrap.py").write_text(BENCH)
    shown = mlcollage("bench", "deep_bootstrap")
    assert shown.code == 0
    assert "ours [fast]" in shown.out
    assert "2×" in shown.out
    mlcollage("bench", "deep_bootstrap")
    recorded = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert recorded.count("## deep_bootstrap") == 1
    assert "1,234" in recorded
    assert "cores" in recorded
    facts = mlcollage("bench", "deep_bootstrap", "--no-record", "--json").json
    assert [row["name"] for row in facts["rows"]["deep_bootstrap"]] == ["ours [fast]", "peer"]


def test_a_paper_without_a_benchmark_says_where_they_are(mlcollage, planned):
    done = mlcollage("bench", planned)
    assert done.code == 2
    assert done.says(f"benchmarks/{planned}.py")


def test_a_benchmark_without_its_function(mlcollage, planned, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / f"{planned}.py").write_text("")
    done = mlcollage("bench", planned)
    assert done.code == 2
    assert done.says("no function bench()")


def test_new_says_what_to_do_next(mlcollage, tmp_path):
    done = mlcollage("new", "my_paper", "--dir", "papers of [mine]")
    assert done.code == 0
    assert "pip install -e papers of [mine]/my-paper" in done.out
    assert (tmp_path / "papers of [mine]/my-paper/src/my_paper/study/claims.py").exists()
    again = mlcollage("new", "my_paper", "--dir", "papers of [mine]")
    assert again.code == 2
    assert again.says("exists already")


def test_data_lists_the_sources(mlcollage):
    names = {row["name"] for row in mlcollage("data", "--json").json}
    assert {"digits", "fashion_mnist", "glyphs:easy16"} <= names
    shown = mlcollage("data")
    assert shown.code == 0
    assert all(name in shown.out for name in names)


def test_data_prepare_is_one_line(mlcollage, monkeypatch):
    monkeypatch.setattr("mlcollage.data.fashion_mnist.prepare", lambda: "found in /some/[place]")
    done = mlcollage("data", "prepare")
    assert done.code == 0
    assert done.out == "found in /some/[place]\n"


def test_data_check_says_what_a_workload_holds(mlcollage):
    shown = mlcollage("data", "check", "iris")
    assert shown.code == 0
    assert "num_classes: 3" in shown.out
    facts = mlcollage("data", "check", "iris", "--json").json
    assert facts["train"] + facts["test"] == 150
    wrong = mlcollage("data", "check", "nowhere.csv")
    assert wrong.code == 2
    assert wrong.says("there is no file nowhere.csv")


def test_doctor_ends_with_1_if_something_must_be_mended(mlcollage, tmp_path):
    checks = mlcollage("doctor", "--json")
    assert checks.code == 0
    assert {"python", "torch", "machine", "results"} <= {c["name"] for c in checks.json}
    (tmp_path / "taken").write_text("")
    wrong = mlcollage("doctor", "--store", "taken")
    assert wrong.code == 1
    assert "✗ results: taken is a file" in wrong.out


# --- users' code ------------------------------------------------------------------------------------------------------

MINE = """
import sys
import torch
from torch.utils.data import TensorDataset
print("hello from the top")

def f():
    print("hello from f")
    data = TensorDataset(torch.rand(20, 2), torch.arange(20) % 2)
    return {"train": data, "test": data, "num_classes": 2}

def eof(): input_that_ends = iter(()); raise EOFError("the input ended")
def leave(): sys.exit(0)
def hide(): sys.stdout = None; raise ValueError("\\ud800")
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eof", "EOFError: the input ended (mine.py, line 12, in eof)"),
        ("leave", "SystemExit: 0"),
        ("hide", "ValueError"),
    ],
)
@pytest.mark.parametrize("command", [["data", "check"], ["run", "probe", "-w"], ["judge", "probe", "-w"]])
def test_what_users_code_raises_is_one_line_of_every_command(mlcollage, probe, command, name, said):
    Path("mine.py").write_text(MINE)
    done = mlcollage(*command, f"mine.py:{name}")
    assert done.code == 2
    assert done.says(f"error: the function mine.py:{name} failed with {said}")


def test_the_traceback_is_there_for_whoever_asks(mlcollage):
    Path("mine.py").write_text(MINE)
    done = mlcollage("--traceback", "data", "check", "mine.py:eof")
    assert done.code == 2
    assert 'mine.py", line 12, in eof' in done.err
    assert "EOFError: the input ended" in done.err


def test_what_users_code_prints_is_not_in_the_json(mlcollage):
    Path("mine.py").write_text(MINE)
    done = mlcollage("data", "check", "mine.py:f", "--json")
    assert done.json["train"] == 20
    assert "hello from the top\nhello from f" in done.err
    assert "hello from f" in mlcollage("data", "check", "mine.py:f").out


@pytest.mark.parametrize("room", ["study", "slide"])
def test_a_broken_plug_in_does_not_take_the_digest_with_it(mlcollage, probe, monkeypatch, tmp_path, room):
    (probe / "probe_paper" / f"{room}.py").write_text("raise EOFError('broken')")
    monkeypatch.setattr("mlcollage.cli._slugs_of", lambda months: ["probe"])
    done = mlcollage("digest", "--scale", "smoke")
    assert done.code == 1
    assert f"(probe: importing the {room} of probe failed with EOFError: broken (" in done.err.splitlines()[-1]
    assert (tmp_path / "results/digest/index.html").exists()


def test_a_broken_plug_in_is_one_line_and_all_commands_go_on(mlcollage, probe, tmp_path):
    identity = probe / "probe_paper" / "paper.toml"
    identity.write_text(identity.read_text().replace("slug =", "slag ="))
    for command in (
        ["list"],
        ["show", "barlow_twins"],
        ["data", "list"],
        ["judge", "statistical_ideas"],
        ["digest", "--no-run"],
    ):
        done = mlcollage(*command)
        assert "Traceback" not in done.err
        assert sum("the plug-in probe is left out: " in line for line in done.err.splitlines()) == 1, command
        assert "paper.toml lacks slug" in done.err
    assert len(mlcollage("list", "--json").json) == 16
    done = mlcollage("run", "probe")
    assert done.code == 2
    assert "lacks slug" in done.err.splitlines()[-1]
    done = mlcollage("doctor", "--json")
    found = {check["name"]: check for check in done.json}
    assert found["plug-in probe"]["state"] == "problem"
    assert "lacks slug" in found["plug-in probe"]["detail"]
    assert done.code == 1


@pytest.mark.parametrize("room", ["study", "slide"])
def test_a_plug_in_that_cannot_be_imported_is_left_out_of_all(mlcollage, probe, planned, monkeypatch, room):
    only = {"probe": lab.find_paper("probe"), planned: lab.find_paper(planned)}
    monkeypatch.setattr(lab, "papers", lambda: only, raising=False)
    (probe / "probe_paper" / f"{room}.py").write_text("raise EOFError('broken')")
    done = mlcollage("run", "all", "--scale", "smoke")
    left_out = "note: the plug-in probe is left out: importing the study of probe failed" in done.err
    assert left_out == (room == "study")
    assert done.code == 0


@pytest.mark.parametrize("command", ["judge", "show", "slide"])
def test_all_is_no_paper_where_one_is_asked_for(mlcollage, command):
    done = mlcollage(command, "all")
    assert done.code == 2
    assert "there is no paper 'all'" in done.err


def test_the_doctor_imports_plug_ins(mlcollage, probe):
    def state():
        return next(c["state"] for c in mlcollage("doctor", "--json").json if c["name"] == "plug-in probe")

    assert state() == "ok"
    (probe / "probe_paper" / "slide.py").write_text("raise EOFError('broken')")
    sys.modules.pop("probe_paper.slide", None)
    assert state() == "problem"


def test_a_run_that_leaves_the_process_is_a_failed_run(mlcollage, probe, monkeypatch):
    file = probe / "probe_paper" / "study.py"
    leaving = {0: "raise SystemExit(3)", 1: "os._exit(3)", 2: "os._exit(0)"}
    lines = "".join(f"    if task.seed == {seed}: {how}\n" for seed, how in leaving.items())
    file.write_text(file.read_text().replace("    log = os", f"{lines}    log = os"))
    (summary,) = mlcollage("run", "probe", "--scale", "smoke", "--json").json
    reasons = [f["reason"] for f in sorted(summary["failed"], key=lambda f: f["run"]["seed"])]
    assert reasons[0].startswith("experiment probe failed with SystemExit: 3 (")
    assert reasons[1:] == [f"its process ended with exit code {code} and left no result" for code in (3, 0)]


# --- the system's own errors ----------------------------------------------------------------------------------------


def test_a_reader_that_leaves_early_gets_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "mlcollage.cli", "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert "Traceback" not in process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=30) in (0, 1)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_cannot_be_written(mlcollage, probe, monkeypatch, call):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "results/locks")

    target = "pathlib.Path.mkdir" if call == "mkdir" else "filelock.FileLock.acquire"
    monkeypatch.setattr(target, refuse)
    done = mlcollage("run", "probe", "--scale", "smoke")
    assert done.code == 2
    assert "results/locks cannot be written" in done.err.strip().splitlines()[-1]
    assert "Traceback" not in done.err


def test_a_damaged_result_is_named_and_measured_again(mlcollage, probe, tmp_path):
    mlcollage("run", "probe", "--scale", "smoke")
    folder = next((tmp_path / "results" / "runs" / "probe").iterdir())
    (folder / "measurements.parquet").write_bytes(b"PAR1 not really")
    judged = mlcollage("judge", "probe", "--scale", "smoke")
    assert judged.code == 0
    assert "is damaged" in judged.err
    assert "`mlcollage run probe` measures it again" in judged.err
    found = mlcollage("doctor")
    assert found.code == 1
    assert f"probe/{folder.name}" in found.out
    assert mlcollage("run", "probe", "--scale", "smoke").code == 0
    assert "is damaged" not in mlcollage("judge", "probe", "--scale", "smoke").err
    assert (tmp_path / "results" / "damaged" / "probe" / folder.name).exists()


def test_results_of_another_version_of_an_experiment_are_not_mixed_in(mlcollage, probe, monkeypatch, tmp_path):
    mlcollage("run", "probe", "--scale", "smoke")
    source = probe / "probe_paper" / "study.py"
    source.write_text(source.read_text().replace("arms=arms,", "arms=arms, version=2,"))
    monkeypatch.delitem(sys.modules, "probe_paper.study")
    done = mlcollage("judge", "probe", "--scale", "smoke")
    assert done.code == 2
    assert done.says("nothing is measured")
    store = Store(tmp_path / "results")
    assert len(run_study("probe", "smoke", store=store).runs) == 3
    assert all(run.version == 2 for run in BoundStudy("probe", "smoke").runs())
    assert len(list((tmp_path / "results" / "runs" / "probe").iterdir())) == 6


def test_the_entry_point_is_installed():
    command = Path(sys.executable).with_name("mlcollage" + (".exe" if os.name == "nt" else ""))
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mlcollage ")
