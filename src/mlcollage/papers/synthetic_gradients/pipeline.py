"""Pipelines of processes: decoupled stages, and the locked schedules that they are compared with."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput, RunFailed
from mlcollage.infer import tensor_file

from .context import Context, Divisor, LossFn
from .stage import AsyncStage, LockedStage, Stage, StageParts
from .timeline import COMPUTE, StageLog, Timeline

_KIND = "stage of a pipeline"

Schedule = Literal["dni", "sequential", "gpipe", "1f1b"]
Batches = Iterable[tuple[Tensor, Tensor]] | Callable[[], Iterable[tuple[Tensor, Tensor]]]


def run_pipeline(
    build: Callable[[int], StageParts],
    batches: Batches,
    *,
    stages: int,
    loss_fn: LossFn,
    schedule: Schedule = "dni",
    context: Context | None = None,
    divisor: Divisor = None,
    max_staleness: int = 4,
    wait_at_bound: bool = True,
    microbatches: int = 4,
    backend: str = "gloo",
    timeout: float = 60.0,
    threads: int = 1,
    start_method: Literal["forkserver", "spawn"] = "forkserver",
    checkpoint: str | Path | None = None,
    every: int = 100,
) -> Timeline:
    """Train a chain of stages, each in a process of its own.

    Parameters
    ----------
    build
        Called in each process with its rank; gives its :class:`StageParts`. A function of an importable module.
    batches
        Pairs of inputs and targets, or a function that gives them (called in the first process; with ``"gpipe"`` and
        ``"1f1b"`` in the last one too, for the targets).
    stages
        Number of processes.
    loss_fn
        From the last stage's output and the targets to one number; importable or one of torch's.
    schedule
        ``"dni"``: stages update along synthetic gradients and do not wait. ``"sequential"``: one batch at a time goes
        all the way up and down. ``"gpipe"`` and ``"1f1b"``: those of ``torch.distributed.pipelining``, exact gradients
        with ``microbatches`` parts of each batch under way; batches of another size than the first are refused.
    context, divisor, max_staleness
        As for :class:`AsyncStage`.
    wait_at_bound
        Its ``wait``.
    backend
        ``"gloo"`` on CPUs, ``"nccl"`` where each stage has a GPU.
    timeout
        Seconds without a sign of a neighbor after which it counts as gone.
    threads
        Of each process.
    start_method
        Of ``multiprocessing``; a script needs ``if __name__ == "__main__":``. Processes of a ``"forkserver"`` start
        faster, ``"spawn"`` is there on every system.
    checkpoint, every
        A folder, and after how many batches each stage writes a file there. The same call goes on from the last step of
        which all stages have a file, and skips the batches that were done. Files hold parameters, optimizers,
        synthesizers, the context's units, the step and the state of random numbers; a stage waits for the gradients
        that are under way before it writes one. With ``max_staleness=0`` and ``"sequential"`` a run that was stopped
        gives the numbers of one that was not. Not for torch's schedules.

    Returns
    -------
    Timeline
        If a process dies, the others go on until the bound; ``Timeline.dead`` names it. With the locked schedules,
        which cannot go on, too.

    Raises
    ------
    RunFailed
        If a stage raises, with its message; if none finished. That a checkpoint is of other parts, another schedule or
        another number of stages is told so too.

    Notes
    -----
    On one machine with fewer cores than stages nothing is gained. A run of one process is faster than a decoupled run
    of one process, since synthesizers are extra work.
    """
    stages = checks.integer("stages", stages, least=2)
    checks.choice("schedule", schedule, ("dni", "sequential", "gpipe", "1f1b"))
    checks.integer("microbatches", microbatches, least=1), checks.integer("threads", threads, least=1)
    checks.positive("timeout", timeout)
    options = {
        "stages": stages, "loss_fn": loss_fn, "schedule": schedule, "context": context, "divisor": divisor,
        "max_staleness": max_staleness, "wait": wait_at_bound, "microbatches": microbatches, "backend": backend,
        "timeout": timeout, "threads": threads, "checkpoint": None if checkpoint is None else str(checkpoint),
        "every": checks.integer("every", every, least=1),
    }  # fmt: skip
    if checkpoint is not None and schedule in ("gpipe", "1f1b"):
        raise InvalidInput(f"checkpoint is for schedule='dni' and 'sequential', not for torch's {schedule!r}.")
    if start_method not in mp.get_all_start_methods():
        start_method = "spawn"
    context_of: Any = mp.get_context(start_method)
    if start_method == "forkserver":  # which imports once what each process needs
        context_of.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, ends = [], []
        for rank in range(stages):
            here, there = context_of.Pipe(duplex=False)
            process = context_of.Process(target=_work, args=(rank, store, there, build, batches, options), daemon=True)
            with _children_allowed():
                process.start()
            there.close()
            processes.append(process)
            ends.append(here)
        found, dead, errors = _gather(processes, ends, timeout)
    if errors:
        rank, message = next(iter(errors.items()))
        raise RunFailed(f"stage {rank} of {stages} failed: {message}")
    if not found:
        raise RunFailed(f"no stage finished; {', '.join(f'stage {r} {why}' for r, why in dead.items())}.")
    logs = [found[r][0] if r in found else StageLog(r, stopped=dead.get(r, "")) for r in range(stages)]
    return Timeline(schedule, logs, dead, {r: state for r, (_, state) in found.items()})


@contextmanager
def _children_allowed() -> Iterator[None]:
    """Workers of process pools are daemons, which multiprocessing lets have no children; ours end by themselves."""
    config = mp.current_process()._config  # type: ignore[attr-defined]
    before = config.get("daemon")
    try:
        config["daemon"] = False
        yield
    finally:
        config["daemon"] = before


def _gather(processes: list[Any], ends: list[Connection], timeout: float) -> tuple[Any, dict[int, str], dict[int, str]]:
    """Logs and states by rank, ranks that died, and messages of those that raised."""
    found: dict[int, Any] = {}
    dead: dict[int, str] = {}
    errors: dict[int, str] = {}
    open_ends: dict[Any, int] = {end: rank for rank, end in enumerate(ends)}
    patience: float | None = None
    while open_ends:
        ready = wait(list(open_ends), timeout=patience)
        if not ready:  # the others wait for one that is gone, and were given their time
            for rank in open_ends.values():
                dead[rank] = f"did not answer within {patience:g} s"
                processes[rank].terminate()
            break
        for end in ready:
            rank = open_ends.pop(end)
            try:
                kind, value = cast(Connection, end).recv()
                if kind == "done":
                    found[rank] = value
                else:
                    errors[rank] = value
            except EOFError:
                processes[rank].join(5)
                dead[rank] = f"died with exit code {processes[rank].exitcode}"
            patience = timeout * 1.5 if dead or errors else None
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.terminate()
    return found, dead, errors


def _work(
    rank: int,
    store: str,
    end: Connection,
    build: Callable[[int], StageParts],
    batches: Batches,
    options: dict[str, Any],
) -> None:
    """What a process does."""
    try:
        torch.set_num_threads(options["threads"])
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # neighbors are on this machine
        dist.init_process_group(
            options["backend"],
            init_method=f"file://{store}",
            rank=rank,
            world_size=options["stages"],
            timeout=timedelta(seconds=options["timeout"]),
        )
        parts = build(rank)
        if not isinstance(parts, StageParts):
            raise InvalidInput(f"build({rank}) returned {type(parts).__name__}; StageParts is needed.")
        stage = _stage(rank, parts, options)
        if stage is not None and options["checkpoint"]:
            _resume(stage, options["checkpoint"])
        source = batches() if callable(batches) else batches
        dist.barrier()  # builds take different times, which are no part of the run
        if stage is None:
            log = _torch_schedule(rank, parts, source, options)
        else:
            save = partial(_save, options["checkpoint"], options["every"]) if options["checkpoint"] else None
            log = stage.run(islice(source, stage.step, None) if rank == 0 else None, after=save)
        modules = {"block": parts.block, "synthesizer": parts.synthesizer}
        state = {
            f"{name}.{k}": _array(v) for name, m in modules.items() if m is not None for k, v in m.state_dict().items()
        }
        end.send(("done", (log, state)))
    except BaseException as error:  # told to the one who asked, whatever it is
        line = traceback.extract_tb(error.__traceback__)[-1]
        end.send(("raised", f"{type(error).__name__}: {error} ({Path(line.filename).name}, line {line.lineno})"))
    finally:
        end.close()
        os._exit(0)  # threads may still wait for neighbors that are gone


def _array(v: Tensor) -> NDArray[Any]:
    """As numpy has it: it knows no bfloat16, whose numbers are all among those of float32."""
    return (v.float() if v.dtype == torch.bfloat16 else v).numpy(force=True)


def _stage(rank: int, parts: StageParts, options: dict[str, Any]) -> Stage | None:
    """The stage of one of our own schedules."""
    given = (rank, options["stages"], parts, options["loss_fn"])
    if options["schedule"] == "sequential":
        return LockedStage(*given)
    if options["schedule"] != "dni":
        return None
    return AsyncStage(
        *given, context=options["context"], divisor=options["divisor"], max_staleness=options["max_staleness"],
        wait=options["wait"],
    )  # fmt: skip


def _save(folder: str, every: int, stage: Stage) -> None:
    """After every so many steps, a file of the stage's own; the last files stay, since stages are not equally far."""
    if stage.step % every or (isinstance(stage, AsyncStage) and not stage.settle()):
        return
    content = {"schedule": stage.schedule, "random": torch.get_rng_state(), **stage.state_dict()}
    tensor_file.save(Path(folder) / f"stage{stage.rank}-{stage.step}.safetensors", _KIND, content)
    for step in sorted(_saved(folder, stage.rank))[: -2 - stage.stages]:
        (Path(folder) / f"stage{stage.rank}-{step}.safetensors").unlink()


def _saved(folder: str, rank: int) -> set[int]:
    """Steps of which a stage has a file."""
    return {int(p.stem.partition("-")[2]) for p in Path(folder).glob(f"stage{rank}-*.safetensors")}


def _resume(stage: Stage, folder: str) -> None:
    """Go on from the last step of which all stages have a file, if there is one."""
    if beyond := [p.name for p in Path(folder).glob(f"stage{stage.stages}-*.safetensors")]:
        raise InvalidInput(f"{folder} holds {beyond[0]}, of a longer chain than these {stage.stages} stages.")
    common = set.intersection(*(_saved(folder, rank) for rank in range(stage.stages)))
    if not common:
        return
    state = tensor_file.load(Path(folder) / f"stage{stage.rank}-{max(common)}.safetensors", _KIND)
    if state["schedule"] != stage.schedule:
        raise InvalidInput(f"{folder} is of schedule={state['schedule']!r}, but this run has {stage.schedule!r}.")
    stage.load_state_dict(state)
    torch.set_rng_state(state["random"])


def _torch_schedule(rank: int, parts: StageParts, source: Iterable[Any], options: dict[str, Any]) -> StageLog:
    """GPipe and 1F1B of torch's own pipelining."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    stages, micro = options["stages"], options["microbatches"]
    stage = PipelineStage(parts.block, rank, stages, torch.device("cpu"))
    kind = ScheduleGPipe if options["schedule"] == "gpipe" else Schedule1F1B
    schedule: Any = kind(stage, n_microbatches=micro, loss_fn=options["loss_fn"])
    spans, losses, log, size = [], [], StageLog(rank), None
    for step, (x, y) in enumerate(_same_size(source, micro)):
        size = len(x) if size is None else size
        if parts.optimizer is not None:
            parts.optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        if rank == 0:
            schedule.step(x)
        elif rank == stages - 1:
            parts_of_loss: list[Tensor] = []
            schedule.step(target=y, losses=parts_of_loss)
            losses.append(float(torch.stack(parts_of_loss).mean().detach()))
        else:
            schedule.step()
        if parts.optimizer is not None:
            parts.optimizer.step()
        spans.append((COMPUTE, start, time.perf_counter(), step))  # waiting inside cannot be told apart
        log.steps += 1
    log.spans, log.losses = np.array(spans).reshape(-1, 4), np.array(losses)
    return log


def _same_size(source: Iterable[Any], micro: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = None
    for x, y in source:
        size = len(x) if size is None else size
        if len(x) != size or size % micro:
            raise InvalidInput(
                f"torch's schedules need batches of one size that {micro} microbatches divide, not {size} and "
                f"{len(x)}: drop the last batch."
            )
        yield x, y
