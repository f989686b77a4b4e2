"""The command line: parses, calls, prints. What it does lives in :mod:`mlcollage.lab`."""

from __future__ import annotations

import enum
import io
import json as json_module
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlcollage import __version__
from mlcollage._users import users_code
from mlcollage.errors import InvalidInput, MLCollageError, RunFailed, StoreError, UnknownName, UserCodeError

if TYPE_CHECKING:
    from mlcollage.collage.content import Entry
    from mlcollage.lab.bound import BoundStudy
    from mlcollage.lab.claim import Claim, Verdict
    from mlcollage.lab.engine import Engine, Event
    from mlcollage.lab.evidence import Evidence
    from mlcollage.lab.run import Run
    from mlcollage.lab.store import Store

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

out = Console()
err = Console(stderr=True)
_STYLES = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", "untested": "dim"}


class ScaleName(enum.StrEnum):
    """Scales, as the command line offers them (the lab's own type is imported only when it is used)."""

    smoke = "smoke"
    quick = "quick"
    full = "full"
    paper = "paper"


Slug = Annotated[str, typer.Argument(help="The paper's short name; see `mlcollage list`.")]
Scale = Annotated[
    ScaleName, typer.Option(help="How large: quick (minutes, CPU), full (a GPU), paper (original sizes).")
]
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
EngineOption = Annotated[str, typer.Option("--engine", help="Where runs are executed; `local` so far.")]
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
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}; choose another file or folder.")
        sys.exit(MLCollageError.exit_code)


def _print_error(sentence: str) -> None:
    err.print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)


def _table(*headers: str, wrapped: Sequence[str], title: str = "") -> Table:
    """A table in which only some columns may be wrapped: names, numbers and verdicts stay whole."""
    table = Table(box=None, header_style="bold", title=escape(title) or None, title_justify="left")
    for header in headers:
        table.add_column(header, no_wrap=header not in wrapped, overflow="fold")
    return table


def _print_table(table: Table) -> None:
    """Fit the terminal; in a pipe a row is a line, however long, so that grep and cut work."""
    piped = not out.is_terminal and "COLUMNS" not in os.environ
    (Console(width=10_000) if piped else out).print(table)


def _print_lines(*lines: object) -> None:
    """Text as it is: paths and code are neither wrapped nor read as markup."""
    for line in lines:
        out.print(str(line), soft_wrap=True, highlight=False, markup=False)


def _version(value: bool) -> None:
    if value:
        out.print(f"mlcollage {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    _: Annotated[  # read by main
        bool, typer.Option("--traceback", help="Before the command: print the traceback of an error too.")
    ] = False,
) -> None:
    """Commands share one folder of results; what is finished is never run twice."""


def _print_json(value: Any) -> None:
    stream = sys.__stdout__ or sys.stdout  # see main
    stream.write(json_module.dumps(value, indent=1) + "\n")
    stream.flush()


@app.command("list")
def list_papers(json: Json = False) -> None:
    """List the sixteen papers, and those of installed plug-ins."""
    from mlcollage.lab.paper import papers

    rows = list(papers().values())
    if json:
        _print_json([_identity(p) for p in rows])
        return
    table = _table("month", "paper", "title", "state", wrapped=["title"])
    for p in rows:
        table.add_row(p.month, p.slug, escape(p.title), "[green]built[/]" if p.built else "[dim]planned[/]")
    _print_table(table)


def _identity(p: Any) -> dict[str, Any]:
    names = ("slug", "title", "month", "venue", "arxiv", "official_code", "built")
    return {**{n: getattr(p, n) for n in names}, "authors": list(p.authors), "ideas": list(p.ideas)}


@app.command()
def show(
    slug: Slug,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print the settings of each experiment at --scale instead.")
    ] = False,
    scale: Scale = ScaleName.quick,
    json: Json = False,
) -> None:
    """Show a paper: what it is, how to use the method, what is claimed and how each claim is tested."""
    from mlcollage.lab.paper import find_paper

    paper = find_paper(slug)
    if settings:
        _show_settings(slug, scale, json)
        return
    claims = _studies([slug], scale, None)[0].claims if paper.built else ()
    if json:
        _print_json({**_identity(paper), "usage": paper.usage, "claims": [c.to_dict() for c in claims]})
        return
    out.print(f"[bold]{escape(paper.title)}[/]\n{escape(', '.join(paper.authors))}")
    out.print(escape(" · ".join(x for x in (paper.venue, paper.arxiv and f"arXiv {paper.arxiv}", paper.month) if x)))
    out.print()
    if not paper.built:
        out.print("Planned: the method and the study are not built yet.")
        return
    out.print(escape(paper.summary) + "\n")
    _print_lines(paper.usage, "")
    table = _table(
        "claim", "as tested here", "source", "paper", "from scale", wrapped=["as tested here", "source", "paper"]
    )
    for c in claims:
        table.add_row(c.id, escape(c.sentence), escape(c.source), escape(c.paper_value), str(c.from_scale))
    _print_table(table)


_SETTING = ("name", "value", "meaning")


def _show_settings(slug: str, scale: ScaleName, json: bool) -> None:
    """What each experiment is run with: arms, seeds, and every setting with its meaning."""
    from mlcollage.lab.experiment import settings_lines

    (bound,) = _studies([slug], scale, None)
    shown = []
    for e in bound.study.experiments:
        chosen = e.settings.get(bound.scale)
        if chosen is None:
            continue
        facts: dict[str, Any] = {"experiment": e.name, "arms": list(e.arms), "version": e.version}
        facts["seeds"] = len(e.registered(bound.scale, bound.seeds))
        shown.append({**facts, "settings": [dict(zip(_SETTING, s, strict=True)) for s in settings_lines(chosen)]})
    if json:
        _print_json(shown)
        return
    for facts in shown:
        seeds = f"{facts['seeds']} seed{'' if facts['seeds'] == 1 else 's'}"
        out.print(
            f"[bold]{escape(facts['experiment'])}[/]: {escape(', '.join(facts['arms']))}; {seeds}", highlight=False
        )
        table = _table("setting", "value", "meaning", wrapped=["value", "meaning"])
        for s in facts["settings"]:
            table.add_row(*(escape(s[k]) for k in _SETTING))
        _print_table(table)
        out.print()


@contextmanager
def _progress(study: BoundStudy, total: int, done: int) -> Iterator[Callable[[Event], None]]:
    """A bar with counts and time left; failures are printed as they happen."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[now]}"),
    )
    with Progress(*columns, console=err, transient=False) as progress:
        task = progress.add_task(study.slug, total=total, completed=done, now="")

        def on_event(event: Event) -> None:
            if event.kind == "failed":
                progress.console.print(f"[red]failed[/] {escape(str(event.run))}: {escape(event.reason)}")
            if event.kind in ("done", "failed"):
                progress.advance(task)
            elif event.kind == "waiting":
                progress.update(task, now="waiting for another command")
            else:
                progress.update(task, now=f"{event.run.arm} seed {event.run.seed}")

        yield on_event
        progress.update(task, now="")


@dataclass
class _WithProgress:
    """An engine that shows a bar, and says what is kept when it is stopped."""

    engine: Engine

    def execute(self, study: BoundStudy, runs: Sequence[Run], store: Store, on_event: Callable[[Event], None]) -> None:
        total = [run for run in study.runs() if store.has(run)] if set(runs) <= set(study.runs()) else []
        try:
            with _progress(study, len(total) + len(runs), len(total)) as on_event:
                self.engine.execute(study, runs, store, on_event)
        except KeyboardInterrupt:
            kept = len(total) + sum(store.has(run) for run in runs)
            all_runs = len(total) + len(runs)
            err.print(f"stopped; {kept} of {all_runs} runs are kept. The same command goes on from there.")
            raise typer.Exit(130) from None


def _engine(name: str, workers: int | None) -> _WithProgress:
    from mlcollage.lab.engine import get_engine

    return _WithProgress(get_engine(name, workers=workers))


def _execute(study: BoundStudy, store: Store, engine: str, workers: int | None) -> Evidence:
    from mlcollage.lab.running import run_missing

    return run_missing(study, store, _engine(engine, workers))


def _settle(study: BoundStudy, store: Store, engine: str, workers: int | None, max_seeds: int | None) -> Evidence:
    """Add seeds while a verdict is open; each round says for which claims."""
    from mlcollage.lab.running import settle

    def say(claims: list[Claim], seeds: range, runs: list[Run]) -> None:
        names = ", ".join(c.id for c in claims)
        err.print(
            f"open: {escape(names)}; adding seeds {seeds.start} to {seeds.stop - 1} ({len(runs)} runs)",
            highlight=False,
        )

    return settle(study, store, _engine(engine, workers), max_seeds=max_seeds, on_round=say)


def _studies(slugs: Sequence[str], scale: ScaleName, workload: str | None) -> list[BoundStudy]:
    from mlcollage.lab.bound import BoundStudy
    from mlcollage.lab.paper import papers
    from mlcollage.lab.run import Scale as LabScale

    names = [p.slug for p in papers().values() if p.built] if list(slugs) == ["all"] else dict.fromkeys(slugs)
    return [BoundStudy(name, LabScale(scale.value), workload) for name in names]


def _say_damaged(evidences: Sequence[Evidence]) -> None:
    for failure in (f for e in evidences for f in e.damaged):
        err.print(f"[yellow]note:[/] {escape(failure.reason)}", soft_wrap=True)


def _report_failures(evidences: Sequence[Evidence]) -> None:
    failed = [f for e in evidences for f in e.failures]
    if failed:
        first = "; ".join(f"{f.run}: {f.reason.rstrip('.')}" for f in failed[:3])
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise RunFailed(f"{len(failed)} runs failed ({first}{more}); the others are kept, run again to retry.")


def _verdict_table(verdicts: Sequence[Verdict], title: str) -> Table:
    headers = ("claim", "", "paper", "here [95% interval]", "seeds", "p (Holm)", "verdict")
    table = _table(*headers, wrapped=["", "paper", "here [95% interval]"], title=title)
    for v in verdicts:
        p = "" if v.p_holm is None else f"{v.p_holm:.2g}"
        word = f"[{_STYLES[v.status.value]}]{v.status.mark} {v.status.value}[/]"
        cells = (v.claim.id, v.claim.title, v.claim.paper_value, v.effect, str(v.seeds or ""), p)
        table.add_row(*(escape(c) for c in cells), word)
    return table


def _print_verdicts(study: BoundStudy, evidence: Evidence) -> None:
    verdicts = study.judge(evidence)
    _print_table(_verdict_table(list(verdicts.values()), f"{study.slug} · {study.scale} · {study.workload_name}"))
    notes: dict[str, list[str]] = {}  # each with the claims that it is about
    for v in verdicts.values():
        nothing = v.estimate is None and v.status == "inconclusive"  # the reason is not in the table
        for text in (*v.warnings, *([v.reason] if nothing else [])):
            notes.setdefault(text, []).append(v.claim.id)
    judged = sum(v.status != "untested" for v in verdicts.values())
    for text, ids in sorted(notes.items()):
        of = f" {', '.join(ids)}:" if len(ids) < judged else ""
        err.print(f"[yellow]note:[/]{of} {escape(text)}", soft_wrap=True)


@app.command()
def run(
    slugs: Annotated[list[str], typer.Argument(help="Papers to run, or `all`.")],
    scale: Scale = ScaleName.quick,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    until_settled: Annotated[
        bool, typer.Option("--until-settled", help="Add seeds where a verdict is open; tests stay valid under this.")
    ] = False,
    max_seeds: Annotated[
        int | None, typer.Option("--max-seeds", help="Seeds at most with --until-settled; default 4 times the study's.")
    ] = None,
    json: Json = False,
) -> None:
    """Run what is missing of a study, then print its verdicts. Stop it at any time: nothing finished is lost."""
    from mlcollage.lab.running import check_settling
    from mlcollage.lab.store import Store

    if max_seeds is not None and not until_settled:
        raise InvalidInput("--max-seeds limits what --until-settled adds; give both.")
    place = Store(store)
    evidences = []
    studies = _studies(slugs, scale, workload)
    for study in studies if until_settled else ():
        check_settling(study, max_seeds)
    for study in studies:
        evidence = _execute(study, place, engine, workers)
        if until_settled:
            evidence = _settle(study, place, engine, workers, max_seeds)
        evidences.append(evidence)
        if json or not evidence.runs:
            continue
        if scale is ScaleName.smoke:
            out.print(
                f"{study.slug}: {len(evidence.runs)} runs finished; scale smoke gives no verdicts", highlight=False
            )
        else:
            _print_verdicts(study, evidence)
    if json:
        _print_json([_run_summary(e) for e in evidences])
    _report_failures(evidences)


def _run_summary(evidence: Evidence) -> dict[str, Any]:
    return {
        "study": evidence.study,
        "scale": str(evidence.scale),
        "workload": evidence.workload,
        "finished": [r.id for r in evidence.runs],
        "failed": [{"id": f.run.id, "run": f.run.to_dict(), "reason": f.reason} for f in evidence.failures],
    }


@app.command()
def judge(
    slug: Slug,
    scale: Scale = ScaleName.quick,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    json: Json = False,
) -> None:
    """Judge the claims by what has been measured so far."""
    from mlcollage.lab.store import Store

    (study,) = _studies([slug], scale, workload)
    evidence = study.evidence(Store(store))
    _say_damaged([evidence])
    if not evidence.runs:
        _report_failures([evidence])
        again = f"mlcollage run {slug} --scale {scale.value}" + (f" --workload {workload}" if workload else "")
        raise InvalidInput(f"nothing is measured for {slug} at scale {scale.value}; run `{again}` first.")
    if json:
        _print_json([v.to_dict() for v in study.judge(evidence).values()])
        return
    _print_verdicts(study, evidence)


@app.command()
def pool(
    slug: Slug,
    scale: Scale = ScaleName.quick,
    store: StoreOption = Path("results"),
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Draw a forest plot: .svg, .png or .pdf.")] = None,
    json: Json = False,
) -> None:
    """Pool each claim's effect over the workloads that the study was run on; verdicts stay with `judge`."""
    from mlcollage.lab.pool import draw_forest
    from mlcollage.lab.pool import pool as pool_claims

    pooled = pool_claims(slug, scale.value, store=store)
    if to is not None:
        draw_forest(pooled, to)
    if json:
        _print_json([p.to_dict() for p in pooled])
        return
    for p in pooled:
        table = _table("workload", "seeds", "alone [95%]", "pooled [95%]", wrapped=[], title=p.title)
        for cells in p.cells():
            table.add_row(*map(escape, cells))
        _print_table(table)
        _print_lines(*p.sentences(), "")
    if to is not None:
        _print_lines(to)


@app.command()
def slide(
    slug: Slug,
    scale: Scale = ScaleName.quick,
    workload: WorkloadOption = None,
    store: StoreOption = Path("results"),
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; default <store>/slides.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", "-f", help="svg, png, pdf; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Draw the slide from what has been measured."""
    from mlcollage.lab.publish import FORMATS, draw_slide
    from mlcollage.lab.store import Store

    (study,) = _studies([slug], scale, workload)
    evidence = study.evidence(Store(store))
    _say_damaged([evidence])
    with err.status(f"drawing {slug}"):
        _, files = draw_slide(study, evidence, study.judge(evidence), to or store / "slides", formats or FORMATS)
    if json:
        _print_json({kind: str(path) for kind, path in files.items()})
        return
    _print_lines(*files.values())


@app.command()
def digest(
    months: Annotated[list[str] | None, typer.Argument(help="Months such as 2021-05; default all.")] = None,
    scale: Scale = ScaleName.quick,
    store: StoreOption = Path("results"),
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; default <store>/digest.")] = None,
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    run_missing: Annotated[bool, typer.Option("--run/--no-run", help="Measure what is missing first.")] = True,
    json: Json = False,
) -> None:
    """Run what is missing, draw all slides and write the digest pages; each slide appears as soon as it is done."""
    from mlcollage.lab.publish import publish_study, write_pages
    from mlcollage.lab.store import Store

    folder, place = to or store / "digest", Store(store)
    entries: dict[str, Entry] = {}
    pages = write_pages(entries, folder)
    evidences, not_drawn = [], []
    for slug in _slugs_of(months):
        try:
            (study,) = _studies([slug], scale, None)
            evidence = _execute(study, place, engine, workers) if run_missing else study.evidence(place)
        except UserCodeError as error:
            not_drawn.append(f"{slug}: {error}")
            continue
        evidences.append(evidence)
        _say_damaged([evidence])
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
            _print_table(_verdict_table(list(published.verdicts.values()), f"{study.slug} · {study.scale}"))
            _print_lines(f"slide: {published.files['svg']}", "")
    if json:
        _print_json({"pages": [str(p) for p in pages], "slides": {k: str(e.slide_svg) for k, e in entries.items()}})
    else:
        _print_lines(f"open {folder / 'index.html'} in a browser")
    _report_failures(evidences)
    if not_drawn:
        raise RunFailed(f"{len(not_drawn)} slides could not be drawn ({'; '.join(not_drawn)}); the others are there.")


def _slugs_of(months: Sequence[str] | None) -> list[str]:
    from mlcollage.lab.paper import papers

    known = papers().values()
    all_months = sorted({p.month for p in known})
    if unknown := sorted(set(months or ()) - set(all_months)):
        raise InvalidInput(f"there is no month {', '.join(unknown)}; choose among {', '.join(all_months)}.")
    return [p.slug for p in known if p.built and (not months or p.month in months)]


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

    names = lab_bench.benchmarked() if slugs == ["all"] else list(dict.fromkeys(slugs))
    found = {name: lab_bench.find_benchmark(name) for name in names}  # a wrong name is said before anything is timed
    timed: dict[str, Any] = {}
    for slug, (file, function) in found.items():
        with err.status(f"timing {slug} and its peers, a minute or so"), users_code(f"the benchmark of {slug}"):
            rows = timed[slug] = function(quick=not full)
        if record:
            lab_bench.record(slug, rows, file.with_name("RESULTS.md"))
        if not json:
            _print_table(_bench_table(slug, rows))
    if json:
        _print_json({"machine": lab_bench.machine(), "rows": timed})


def _bench_table(slug: str, rows: Sequence[dict[str, Any]]) -> Table:
    from mlcollage.lab.bench import format_value

    table = _table("what", "who", "value", "", "ratio", wrapped=["what", "who"], title=slug)
    for row in rows:
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.3g}×"
        cells = (row["what"], row["name"], format_value(row["value"]), row.get("unit", ""), ratio)
        table.add_row(*(escape(c) for c in cells))
    return table


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
        _print_json(rows)
        return
    table = _table("name", "what", "there", wrapped=["what"])
    for row in rows:
        table.add_row(row["name"], row["what"], "[green]yes[/]" if row["available"] else "[yellow]no[/]")
    _print_table(table)


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
        _print_json(facts)
        return
    for key, value in facts.items():
        out.print(f"[bold]{key}[/]: {escape(str(value))}", highlight=False, soft_wrap=True)


@app.command()
def doctor(
    store: StoreOption = Path("results"),
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged runs aside, so that the next `run` measures them again.")
    ] = False,
    json: Json = False,
) -> None:
    """Check the installation; exits 1 if something must be corrected."""
    from dataclasses import asdict

    from mlcollage.lab.doctor import examine

    with err.status("checking"):
        checks = list(examine(store, repair=repair))
    if json:
        _print_json([asdict(c) for c in checks])
    else:
        marks = {"ok": "[green]✓[/]", "note": "[yellow]○[/]", "problem": "[red]✗[/]"}
        for c in checks:
            out.print(f"{marks[c.state]} [bold]{c.name}[/]: {escape(c.detail)}", highlight=False, soft_wrap=True)
    if any(c.state == "problem" for c in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
