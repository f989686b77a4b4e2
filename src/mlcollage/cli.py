"""The command line: parses, calls, prints. What it does lives in :mod:`mlcollage.lab`."""

from __future__ import annotations

import enum
import io
import json as json_module
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mlcollage import __version__, lab
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MLCollageError, RunFailed, StoreError, UnknownName, UserCodeError
from mlcollage.lab.run import Scale

if TYPE_CHECKING:
    from mlcollage.collage.content import Entry
    from mlcollage.lab import BoundStudy, Claim, Engine, Event, Evidence, Run, Store, Verdict

# Modules that import torch or pandas are imported inside the commands: `--help` and shell completion are instant.
app = typer.Typer(
    name="mlcollage",
    help="Sixteen deep-learning papers: methods to import, studies that re-measure their claims, one-page pictures.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(help="Data sources: list, prepare, check.", invoke_without_command=True)
app.add_typer(data_app, name="data")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_STYLES = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", "untested": "dim", "pending": "dim"}


LOG_EVERY = 30.0  # seconds between two lines of a log without a terminal


class DigestFormat(enum.StrEnum):
    """What ``mlcollage digest`` writes."""

    page = "page"
    post = "post"


Slug = Annotated[str, typer.Argument(help="The paper's short name; see `mlcollage list`.")]
ScaleOption = Annotated[
    Scale, typer.Option(help="How large: quick (minutes, CPU), full (a GPU), paper (original sizes).")
]
# The same options have the same names, short forms and defaults in every command.
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="MLCOLLAGE_STORE", help="Folder of results; commands may share one.")
]
WorkloadOption = Annotated[
    str | None,
    typer.Option(
        "--workload",
        "-w",
        help="Your model and data: module:function, .npz, .csv, .parquet, an image folder, or a name.",
    ),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", "-j", help="Runs at a time; default one per core.")]
EngineOption = Annotated[str, typer.Option("--engine", help="Where runs are executed: local, slurm or ray.")]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the engine, e.g. partition=gpu; repeatable. See also mlcollage.toml."),
]
Address = Annotated[str | None, typer.Option("--address", help="A running Ray cluster, host:port.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    """Entry point: errors made on purpose, and the system's, are one sentence, never a traceback."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # --workload module:function finds modules in the current folder
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    # What a user's function prints must not end up in the JSON.
    try:
        with redirect_stdout(sys.stderr) if "--json" in sys.argv else nullcontext():
            app()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MLCollageError as error:
        if "--traceback" in sys.argv:
            traceback.print_exception(error)
        _print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        # Of the system: a disk that is full, a folder without permission.
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}; choose another file or folder.")
        sys.exit(MLCollageError.exit_code)


def _print_error(sentence: str) -> None:
    err.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)


def _print_table(
    headers: Sequence[str], rows: Iterable[Sequence[str | Text]], *, wrapped: Sequence[str] = (), title: str = ""
) -> None:
    """Only some columns may be wrapped: names, numbers and verdicts stay whole."""
    table = Table(box=None, header_style="bold", title=escape(title) or None, title_justify="left")
    # A folded name cannot be copied, and a folded number can be misread.
    for header in headers:
        table.add_column(header, no_wrap=header not in wrapped, overflow="fold")
    for cells in rows:
        table.add_row(*(cell if isinstance(cell, Text) else escape(cell) for cell in cells))
    # In a pipe a row is a line, however long, so that grep and cut work.
    piped = not out.is_terminal and "COLUMNS" not in os.environ
    (Console(width=10_000) if piped else out).print(table)  # COLUMNS is how a user asks for a width in a pipe


def _print_lines(*lines: object) -> None:
    """Text as it is: paths and code are neither wrapped nor read as markup."""
    for line in lines:
        out.print(str(line), soft_wrap=True, markup=False)


def _version(value: bool) -> None:
    if value:
        out.print(f"mlcollage {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    _: Annotated[  # read by main
        bool, typer.Option("--traceback", help="Before the command: print the traceback of an error too.")
    ] = False,
) -> None:
    """Commands share one folder of results; what is finished is never run twice."""
    if context.invoked_subcommand not in (None, "doctor"):  # which finds them itself
        for name, sentence in lab.broken_plugins().items():
            _note(f"the plug-in {name} is left out: {sentence}")


def _print_json(value: Any) -> None:
    stream = sys.__stdout__ or sys.stdout  # see main
    stream.write(json_module.dumps(value, indent=1) + "\n")
    stream.flush()


def _answer_json(value: Any) -> NoReturn:
    """Print it and end the command: with --json nothing else is written to standard output."""
    _print_json(value)
    raise typer.Exit


@app.command("list")
def list_papers(json: Json = False) -> None:
    """List the sixteen papers, and those of installed plug-ins."""
    rows = list(lab.papers().values())
    if json:
        _answer_json([_identity(p) for p in rows])
    states = {True: Text("built", "green"), False: Text("planned", "dim")}
    cells = ((p.month, p.slug, p.title, states[p.built]) for p in rows)
    _print_table(("month", "paper", "title", "state"), cells, wrapped=["title"])


def _identity(p: Any) -> dict[str, Any]:
    # Not all fields: the usage and the summary are long, and `show` prints them.
    names = ("slug", "title", "month", "venue", "arxiv", "official_code", "built")
    return {**{n: getattr(p, n) for n in names}, "authors": list(p.authors), "ideas": list(p.ideas)}


@app.command()
def show(
    slug: Slug,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print the settings of each experiment at --scale instead.")
    ] = False,
    scale: ScaleOption = Scale.QUICK,
    json: Json = False,
) -> None:
    """Show a paper: what it is, how to use the method, what is claimed and how each claim is tested."""
    paper = lab.find_paper(slug)
    if settings:
        _show_settings(slug, scale, json)
        return
    claims = lab.BoundStudy(slug, scale).claims if paper.built else ()
    if json:
        _answer_json({**_identity(paper), "usage": paper.usage, "claims": [c.to_dict() for c in claims]})
    out.print(f"[bold]{escape(paper.title)}[/]\n{escape(', '.join(paper.authors))}")
    out.print(escape(" · ".join(x for x in (paper.venue, paper.arxiv and f"arXiv {paper.arxiv}", paper.month) if x)))
    out.print()
    if not paper.built:
        out.print("Planned: the method and the study are not built yet.")
        return
    out.print(escape(paper.summary) + "\n")
    _print_lines(paper.usage, "")
    headers = ("claim", "headline", "title", "as tested here", "source", "paper", "from scale")
    cells = (
        (c.id, "yes" if c.headline else "", c.title, c.sentence, c.source, c.paper_value, c.from_scale) for c in claims
    )
    _print_table(headers, cells, wrapped=headers[2:6])


def _show_settings(slug: str, scale: Scale, json: bool) -> None:
    """What each experiment is run with: arms, seeds, and every setting with its meaning."""
    from mlcollage.lab.experiment import settings_lines

    bound = lab.BoundStudy(slug, scale)
    shown: list[dict[str, Any]] = []  # built first, so that JSON and tables say the same
    for e in bound.study.experiments:
        chosen = e.settings.get(bound.scale)
        if chosen is None:  # the experiment is not part of this scale
            continue
        facts: dict[str, Any] = {"experiment": e.name, "arms": list(e.arms), "version": e.version}
        facts["seeds"] = len(e.registered(bound.scale, bound.seeds))
        lines = (dict(zip(("name", "value", "meaning"), line, strict=True)) for line in settings_lines(chosen))
        shown.append({**facts, "settings": list(lines)})
    if json:
        _answer_json(shown)
    for facts in shown:
        seeds = f"{facts['seeds']} seed{'' if facts['seeds'] == 1 else 's'}"
        out.print(f"[bold]{escape(facts['experiment'])}[/]: {escape(', '.join(facts['arms']))}; {seeds}")
        cells = (list(line.values()) for line in facts["settings"])
        _print_table(("setting", "value", "meaning"), cells, wrapped=["value", "meaning"])
        out.print()


@contextmanager
def _progress(study: BoundStudy, total: int, done: int) -> Iterator[Callable[[Event], None]]:
    """A bar with counts and time left; failures are printed as they happen.

    Without a terminal, a line at most every 30 seconds, so that a log shows that there is progress.
    """
    from rich import progress as bars

    if not err.is_terminal:
        yield _LogLines(study.slug, total, done)
        return

    columns = (
        bars.TextColumn("[bold]{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("runs"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("[dim]{task.fields[now]}"),
    )
    with bars.Progress(*columns, console=err) as progress:
        task = progress.add_task(study.slug, total=total, completed=done, now="")

        tally = _Tally()

        def on_event(event: Event) -> None:
            tally.add(event)
            if event.kind in ("failed", "interrupted"):
                progress.console.print(f"[red]{event.kind}[/] {escape(str(event.run))}: {escape(event.reason)}")
            if event.kind in ("done", "failed"):
                progress.advance(task)
            progress.update(task, now=escape(tally.line()))

        yield on_event
        progress.update(task, now="")


@dataclass
class _LogLines:
    """Writes how far a study has come: at most every half minute, and at the end."""

    slug: str
    total: int
    done: int
    said: float = field(default_factory=time.monotonic)
    tally: _Tally = field(default_factory=lambda: _Tally())

    def __call__(self, event: Event) -> None:
        self.tally.add(event)
        if event.kind in ("failed", "interrupted"):
            err.print(f"{event.kind} {escape(str(event.run))}: {escape(event.reason)}", soft_wrap=True)
        self.done += event.kind in ("done", "failed")
        now = time.monotonic()
        ended = self.done == self.total and event.kind in ("done", "failed")
        if ended or now - self.said >= LOG_EVERY:
            self.said = now
            state = f"; {self.tally.line()}" if self.tally.line() else ""
            last = f", last {event.run}" if event.kind in ("done", "failed") else ""
            err.print(escape(f"{self.slug}: {self.done} of {self.total} runs{last}{state}"), soft_wrap=True)


@dataclass
class _Tally:
    """How many runs are queued, run, wait or were interrupted, in words."""

    state: dict[Run, str] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)  # the last one of each state
    interrupted: int = 0

    def add(self, event: Event) -> None:
        self.interrupted += event.kind == "interrupted"
        if event.kind in ("queued", "started", "waiting"):
            self.state[event.run] = event.kind
            self.reason[event.kind] = event.reason
        else:
            self.state.pop(event.run, None)

    def line(self) -> str:
        counts = Counter(self.state.values())
        parts = []
        for kind, word in (("queued", "queued"), ("started", "running"), ("waiting", "waiting")):
            if counts[kind]:
                why = f" ({self.reason[kind]})" if self.reason.get(kind) else ""
                parts.append(f"{counts[kind]} {word}{why}")
        if self.interrupted:
            parts.append(f"interrupted {self.interrupted} times")
        return ", ".join(parts)


@dataclass
class _WithProgress:
    """An engine that shows a bar, and says what is kept when it is stopped."""

    engine: Engine

    def execute(self, study: BoundStudy, runs: Sequence[Run], store: Store, on_event: Callable[[Event], None]) -> None:
        # Added seeds are counted by themselves; the study's own runs together with those that are finished.
        registered = study.runs()
        done = len(registered) - len(store.missing(registered)) if set(runs) <= set(registered) else 0
        total = done + len(runs)
        try:
            with _progress(study, total, done) as on_event:
                self.engine.execute(study, runs, store, on_event)
        except KeyboardInterrupt as stop:
            kept = total - len(store.missing(runs))
            err.print(f"stopped; {kept} of {total} runs are kept. The same command goes on from there.")
            if str(stop):  # what becomes of a cluster's jobs
                err.print(f"{escape(str(stop))}.", soft_wrap=True)
            raise typer.Exit(130) from None  # what a shell reports for Ctrl-C


def _engine(
    name: str, workers: int | None, settings: Sequence[str] | None = None, address: str | None = None
) -> _WithProgress:
    from mlcollage.lab.engines import get_engine, read_settings

    given = read_settings(name, [*(settings or ()), *([f"address={address}"] if address else [])])
    engine = get_engine(name, workers=workers, **given)
    if hasattr(engine, "say"):
        engine.say = lambda sentence: err.print(escape(sentence), soft_wrap=True)
    return _WithProgress(engine)


def _say_round(claims: list[Claim], seeds: range, runs: list[Run]) -> None:
    names = escape(", ".join(c.id for c in claims))
    err.print(f"open: {names}; adding seeds {seeds.start} to {seeds.stop - 1} ({len(runs)} runs)")


def _studies(slugs: Sequence[str], scale: Scale, workload: str | None) -> list[BoundStudy]:
    if list(slugs) != ["all"]:
        return [lab.BoundStudy(name, scale, workload) for name in dict.fromkeys(slugs)]
    studies = []
    for paper in lab.papers().values():
        try:
            if paper.built:
                study = lab.BoundStudy(paper.slug, scale, workload)
                _ = study.study
                studies.append(study)
        except MLCollageError as error:
            if paper.built_in:
                raise
            _note(f"the plug-in {paper.slug} is left out: {error}")
    return studies


def _note(text: str, claims: str = "") -> None:
    err.print(f"[yellow]note:[/]{claims} {escape(text)}", soft_wrap=True)


def _say_damaged(evidence: Evidence) -> None:
    for failure in evidence.damaged:
        _note(failure.reason)


def _report_failures(evidences: Sequence[Evidence]) -> None:
    failed = [f for e in evidences for f in e.failures]
    if failed:
        first = "; ".join(f"{f.run}: {f.reason.rstrip('.')}" for f in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        # Raised last, when all that worked has been printed; scripts see the exit code.
        raise RunFailed(f"{len(failed)} runs failed ({first}{more}); the others are kept, run again to retry.")


def _print_verdict_table(verdicts: Iterable[Verdict], title: str) -> None:
    headers = ("claim", "", "paper", "here [95% interval]", "seeds", "p (Holm)", "verdict")
    rows = []
    for v in verdicts:
        # Untested and exact claims have no p value.
        p = "" if v.p_holm is None else f"{v.p_holm:.2g}"
        word = Text(f"{v.status.mark} {v.status.value}", _STYLES[v.status.value])
        rows.append((v.claim.id, v.claim.title, v.claim.paper_value, v.effect, str(v.seeds or ""), p, word))
    _print_table(headers, rows, wrapped=headers[1:4], title=title)


def _print_verdicts(study: BoundStudy, evidence: Evidence) -> None:
    verdicts = study.judge(evidence)
    _print_verdict_table(verdicts.values(), f"{study.slug} · {study.scale} · {study.workload_name}")
    notes: dict[str, list[str]] = {}  # each with the claims that it is about
    for v in verdicts.values():
        nothing = v.estimate is None and v.status == "inconclusive"  # the reason is not in the table
        for text in (*v.warnings, *([v.reason] if nothing else [])):
            notes.setdefault(text, []).append(v.claim.id)
    judged = sum(v.status != "untested" for v in verdicts.values())
    for text, ids in sorted(notes.items()):
        # A note on all claims names none.
        of = f" {', '.join(ids)}:" if len(ids) < judged else ""
        _note(text, of)


@app.command()
def run(
    slugs: Annotated[list[str], typer.Argument(help="Papers to run, or `all`.")],
    scale: ScaleOption = Scale.QUICK,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    settings: EngineSettings = None,
    address: Address = None,
    until_settled: Annotated[
        bool, typer.Option("--until-settled", help="Add seeds where a verdict is open; tests stay valid under this.")
    ] = False,
    max_seeds: Annotated[
        int | None, typer.Option("--max-seeds", help="Seeds at most with --until-settled; default 4 times the study's.")
    ] = None,
    json: Json = False,
) -> None:
    """Run what is missing of a study, then print its verdicts. Stop it at any time: nothing finished is lost."""
    from mlcollage.lab.running import check_settling, settle

    if max_seeds is not None and not until_settled:
        raise InvalidInput("--max-seeds limits what --until-settled adds; give both.")
    place, runner = lab.Store(store), _engine(engine, workers, settings, address)
    evidences = []
    studies = _studies(slugs, scale, workload)
    # Before the first run, so that a wrong option does not cost an hour.
    for study in studies if until_settled else ():
        check_settling(study, max_seeds)
    for study in studies:
        evidence = lab.run_missing(study, place, runner)
        if until_settled:
            evidence = settle(study, place, runner, max_seeds=max_seeds, on_round=_say_round)
        evidences.append(evidence)
        if json or not evidence.runs:
            continue
        if scale is Scale.SMOKE:
            out.print(f"{study.slug}: {len(evidence.runs)} runs finished; scale smoke gives no verdicts")
            out.print("  means at the last step:")
            _print_lines(*_measured(evidence))
        else:
            _print_verdicts(study, evidence)
    if json:
        _print_json([_run_summary(e) for e in evidences])
    _report_failures(evidences)


def _measured(evidence: Evidence) -> Iterator[str]:
    """What was measured, a line for each metric: its mean in each arm, at the last step that the arm has."""
    for experiment, rows in evidence.table.groupby("experiment"):
        yield f"  {experiment}"
        for metric, of_metric in rows.groupby("metric"):
            last = of_metric[of_metric["step"] == of_metric.groupby("arm", dropna=False)["step"].transform("max")]
            means = last.groupby("arm", dropna=False)["value"].mean()
            yield f"    {metric}: " + ", ".join(
                f"{arm} {value:.4g}" if isinstance(arm, str) and arm else f"{value:.4g}" for arm, value in means.items()
            )


def _run_summary(evidence: Evidence) -> dict[str, Any]:
    return {
        "study": evidence.study,
        "scale": str(evidence.scale),
        "workload": evidence.workload,
        "finished": [r.id for r in evidence.runs],
        "failed": [{"id": f.run.id, "run": f.run.to_dict(), "reason": f.reason} for f in evidence.failures],
    }


@app.command()
def logs(
    slug: Slug,
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's id or its start.")] = None,
    store: StoreOption = Path("results"),
    json: Json = False,
) -> None:
    """Show why runs failed: the reason, where, the traceback and the last lines that were printed."""
    lab.find_paper(slug)
    notes = lab.Store(store).notes(slug)
    if run_id is not None:
        notes = [note for note in notes if note["id"].startswith(run_id)]
    if json:
        _answer_json(notes)
    if not notes:
        which = f"run {run_id}" if run_id else "any run"
        _print_lines(f"nothing is noted of {which} of {slug} in {store}: no failure and no interruption")
    for note in notes if run_id or len(notes) == 1 else ():
        _print_lines(_headline(note), *_details(note), "")
    if len(notes) > 1 and run_id is None:
        _print_lines(*(_headline(note) for note in notes), "", f"mlcollage logs {slug} RUN shows one of them whole")


def _headline(note: dict[str, Any]) -> str:
    where = "".join(f", {word} {note[key]}" for key, word in (("host", "on"), ("job", "job")) if note.get(key))
    peak = f", peak {note['peak_memory_mb']:.0f} MB" if note.get("peak_memory_mb") else ""
    arm = f"{note['experiment']}/{note['arm']} seed {note['seed']} ({note['scale']})"
    return f"{note['id']} {note['kind']} {arm}{where}{peak}: {note['reason']}"


def _details(note: dict[str, Any]) -> Iterator[str]:
    for k, attempt in enumerate(note.get("history", []), 1):
        yield f"attempt {k}: {attempt['reason']}"
    for part in dict.fromkeys((note.get("detail", ""), note.get("log", ""))):
        if part:
            yield part.rstrip()


@app.command()
def judge(
    slug: Slug,
    scale: ScaleOption = Scale.QUICK,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    json: Json = False,
) -> None:
    """Judge the claims by what has been measured so far."""
    study = lab.BoundStudy(slug, scale, workload)
    evidence = study.evidence(lab.Store(store))
    _say_damaged(evidence)
    if not evidence.runs:
        # Everything failed: that is said, and not that nothing was measured.
        _report_failures([evidence])
        again = f"mlcollage run {slug} --scale {scale}" + (f" --workload {workload}" if workload else "")
        raise InvalidInput(f"nothing is measured for {slug} at scale {scale}; run `{again}` first.")
    if json:
        _answer_json([v.to_dict() for v in study.judge(evidence).values()])
    _print_verdicts(study, evidence)


@app.command()
def audit(
    slugs: Annotated[list[str], typer.Argument(help="Papers whose study is audited, or `all`.")],
    scale: ScaleOption = Scale.QUICK,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    draws: Annotated[int, typer.Option("--draws", help="Permutations of the arms' labels.")] = 200,
    json: Json = False,
) -> None:
    """Say how far verdicts can be trusted: labels permuted, arms swapped, power at the margin. Nothing is run."""
    found = []
    for study in _studies(slugs, scale, workload):
        with err.status(f"permuting {study.slug}"):
            found.append(lab.audit(study.claims, study.evidence(lab.Store(store)), draws=draws))
    if json:
        _answer_json([a.to_dict() for a in found])
    _print_table(
        ("study", "claims permuted", "any supported by chance", "promised at most", "kept when swapped", "80 % power"),
        [a.cells() for a in found],
        title=f"{draws} permutations",
    )


@app.command()
def pool(
    slug: Slug,
    scale: ScaleOption = Scale.QUICK,
    store: StoreOption = Path("results"),
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Draw a forest plot: .svg, .png or .pdf.")] = None,
    json: Json = False,
) -> None:
    """Pool each claim's effect over the workloads that the study was run on; verdicts stay with `judge`."""
    from mlcollage.lab.pool import draw_forest

    pooled = lab.pool(slug, scale, store=store)
    if to is not None:
        draw_forest(pooled, to)
    if json:
        _answer_json([p.to_dict() for p in pooled])
    for p in pooled:
        _print_table(("workload", "seeds", "alone [95%]", "pooled [95%]"), p.cells(), title=p.title)
        _print_lines(*p.sentences(), "")
    if to is not None:
        _print_lines(to)


@app.command()
def slide(
    slug: Slug,
    scale: ScaleOption = Scale.QUICK,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; default <store>/slides.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="svg, png, pdf or portrait; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Draw the slide from what has been measured."""
    from mlcollage.collage.slide import FORMATS
    from mlcollage.lab.publish import draw_slide

    study = lab.BoundStudy(slug, scale, workload)
    evidence = study.evidence(lab.Store(store))
    _say_damaged(evidence)
    with err.status(f"drawing {slug}"):
        _, files = draw_slide(study, evidence, study.judge(evidence), to or store / "slides", formats or FORMATS)
    if json:
        _answer_json({kind: str(path) for kind, path in files.items()})
    _print_lines(*files.values())


@app.command()
def digest(
    months: Annotated[list[str] | None, typer.Argument(help="Months such as 2021-05; default all.")] = None,
    scale: ScaleOption = Scale.QUICK,
    store: StoreOption = Path("results"),
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; default <store>/digest.")] = None,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    settings: EngineSettings = None,
    address: Address = None,
    run_missing: Annotated[bool, typer.Option("--run/--no-run", help="Measure what is missing first.")] = True,
    formats: Annotated[
        DigestFormat, typer.Option("--format", "-f", help="page, or post: also Markdown and pictures for a blog.")
    ] = DigestFormat.page,
    json: Json = False,
) -> None:
    """Run what is missing, draw all slides and write the digest pages; each slide appears as soon as it is done."""
    from mlcollage.lab.publish import publish_study, with_planned, write_pages

    folder, place, runner = to or store / "digest", lab.Store(store), _engine(engine, workers, settings, address)
    # Pages are written before the first study and after each: what is done can be looked at while others run.
    entries: dict[str, Entry] = {}
    pages = write_pages(entries, folder)
    evidences, not_drawn = [], []
    for slug in _slugs_of(months):
        try:
            study = lab.BoundStudy(slug, scale)
            evidence = lab.run_missing(study, place, runner) if run_missing else study.evidence(place)
        except UserCodeError as error:
            not_drawn.append(f"{slug}: {error}")
            continue
        evidences.append(evidence)
        _say_damaged(evidence)
        if not evidence.runs:
            continue
        try:
            with err.status(f"drawing {study.slug}"):
                published = publish_study(study, place, folder)
        except (UnknownName, StoreError, UserCodeError) as error:  # what the slide needs failed, is missing or damaged
            not_drawn.append(f"{study.slug}: {error}")
            continue
        entries[study.slug] = published.entry
        pages = write_pages(entries, folder)
        if not json:
            _print_verdict_table(published.verdicts.values(), f"{study.slug} · {study.scale}")
            _print_lines(f"slide: {published.files['svg']}", "")
    posts = []
    if formats is DigestFormat.post:
        from mlcollage.collage.post import write_post

        found = sorted({e.month for e in entries.values()})
        posts = [write_post(month, list(with_planned(entries).values()), folder / "posts")[0] for month in found]
    if json:
        _print_json(
            {"pages": [str(p) for p in [*pages, *posts]], "slides": {k: str(e.slide_svg) for k, e in entries.items()}}
        )
    else:
        _print_lines(f"open {folder / 'index.html'} in a browser", *(f"post: {path}" for path in posts))
    _report_failures(evidences)
    if not_drawn:
        raise RunFailed(f"{len(not_drawn)} slides could not be drawn ({'; '.join(not_drawn)}); the others are there.")


def _slugs_of(months: Sequence[str] | None) -> list[str]:
    known = lab.papers().values()
    # Also months without a built paper: their pages say what is planned.
    all_months = sorted({p.month for p in known})
    if unknown := sorted(set(months or ()) - set(all_months)):
        raise InvalidInput(f"there is no month {', '.join(unknown)}; choose among {', '.join(all_months)}.")
    return [p.slug for p in known if p.built and (not months or p.month in months)]


@app.command()
def portrait(
    spec: Annotated[
        str,
        typer.Argument(help="A function that returns your model and data: path/to/file.py:function, module:function."),
    ],
    minutes: Annotated[float, typer.Option("--minutes", "-m", help="Time for all instruments together.")] = 10.0,
    to: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page, the slide and the table.")] = Path(
        "portrait"
    ),
    only: Annotated[list[str] | None, typer.Option("--only", help="Names of instruments; repeatable.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all random choices.")] = 0,
    json: Json = False,
) -> None:
    """Look at one trained network of yours with the papers' instruments, the cheapest first: a page and a slide."""
    from mlcollage.portraits import given as users

    found = users.portrait_of(spec, minutes=minutes, only=only, seed=seed, progress=not json)
    with err.status("drawing the page"):
        files = found.save(to)
    if json:
        _answer_json({**found.to_dict(), "files": {kind: str(path) for kind, path in files.items()}})
    headers = ("quantity", "here, with interval", "recorded networks")
    _print_table(headers, users.lines(found), wrapped=headers[2:], title=f"Portrait of {found.name}")
    for reading in found.readings:
        if reading.state != "measured":
            _note(f"{reading.instrument}: {reading.sentence}", f" {reading.state}:")
    _print_lines(f"open {files['page']} in a browser", f"slide: {files['png']}")


@app.command()
def bench(
    slugs: Annotated[list[str], typer.Argument(help="Papers whose method is timed, or `all`.")],
    full: Annotated[bool, typer.Option("--full", help="Larger sizes, more repetitions.")] = False,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Write the rows into benchmarks/RESULTS.md.")
    ] = True,
    json: Json = False,
) -> None:
    """Run ours and our peers side by side and print the ratios."""
    from mlcollage.lab import bench as lab_bench

    # `all`: those that have a benchmark, in a checkout of the source.
    names = lab_bench.benchmarked() if slugs == ["all"] else list(dict.fromkeys(slugs))
    found = {name: lab_bench.find_benchmark(name) for name in names}  # a wrong name is said before anything is timed
    timed: dict[str, Any] = {}
    for slug, (file, function) in found.items():
        with err.status(f"timing {slug} and its peers, a minute or so"), users_code(f"the benchmark of {slug}"):
            rows = timed[slug] = function(quick=not full)
        if record:
            lab_bench.record(slug, rows, file.with_name("RESULTS.md"))
        if not json:
            _print_bench(slug, rows)
    if json:
        _print_json({"machine": lab_bench.machine(), "rows": timed})


def _print_bench(slug: str, rows: Sequence[dict[str, Any]]) -> None:
    from mlcollage.lab.bench import format_value

    cells = []
    for row in rows:
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3g}×"
        cells.append((row["what"], row["name"], format_value(row["value"]), row.get("unit", ""), ratio))
    _print_table(("what", "who", "value", "", "ratio"), cells, wrapped=["what", "who"], title=slug)


@app.command()
def new(
    slug: Annotated[str, typer.Argument(help="Short name of the paper, e.g. my_paper.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to make the package's folder.")] = Path("."),
) -> None:
    """Make a plug-in package for a paper, ready to install, run and test."""
    from mlcollage.lab.scaffold import create

    made = create(slug, folder)
    _print_lines(
        f"made {made}; next:",
        f"  pip install -e {made}",
        f"  mlcollage run {slug} --scale smoke",
        f"  python -m pytest {made}",
    )


@data_app.callback()
def _data(context: typer.Context, json: Json = False) -> None:
    """List the data sources and say which are there."""
    if context.invoked_subcommand is not None:
        return
    from mlcollage.data.catalog import catalog

    rows = catalog()
    if json:
        _answer_json(rows)
    there = {True: Text("yes", "green"), False: Text("no", "yellow")}
    cells = ((row["name"], row["what"], there[row["available"]]) for row in rows)
    _print_table(("name", "what", "there"), cells, wrapped=["what"])


@data_app.command("prepare")
def data_prepare() -> None:
    """Find or fetch Fashion-MNIST; says in one line what was found."""
    from mlcollage.data.fashion_mnist import prepare

    with err.status("looking for Fashion-MNIST"):
        line = prepare()
    _print_lines(line)


@data_app.command("check")
def data_check(
    spec: Annotated[str, typer.Argument(help="What you would give to --workload.")],
    every: Annotated[bool, typer.Option("--all", help="Read every sample, also those that must be decoded.")] = False,
    json: Json = False,
) -> None:
    """Load a workload and say what it holds."""
    from mlcollage.data.loading import load_workload

    facts = load_workload(spec).describe(every=every)
    if json:
        _answer_json(facts)
    for key, value in facts.items():
        out.print(f"[bold]{key}[/]: {escape(str(value))}", soft_wrap=True)


@app.command()
def doctor(
    store: StoreOption = Path("results"),
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged runs aside, so that the next `run` measures them again.")
    ] = False,
    json: Json = False,
) -> None:
    """Check the installation; exits 1 if something must be corrected."""
    from mlcollage.lab.doctor import examine

    with err.status("checking"):
        # Each check says its detail, and only `problem` fails the command: a missing optional package is a `note`.
        checks = list(examine(store, repair=repair))
    if json:
        _print_json([asdict(c) for c in checks])
    else:
        marks = {"ok": "[green]✓[/]", "note": "[yellow]○[/]", "problem": "[red]✗[/]"}  # color is never the only cue
        for c in checks:
            out.print(f"{marks[c.state]} [bold]{c.name}[/]: {escape(c.detail)}", soft_wrap=True)
    if any(c.state == "problem" for c in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
