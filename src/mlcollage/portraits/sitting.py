"""The sitting: instruments one after the other, the cheapest first, within the minutes that there are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from mlcollage import _checks as checks
from mlcollage._users import described, users_code
from mlcollage.errors import MLCollageError, UserCodeError
from mlcollage.portraits.instrument import DoesNotApply, Instrument, Reading
from mlcollage.portraits.registry import INSTRUMENTS
from mlcollage.portraits.result import Portrait
from mlcollage.portraits.subject import MOST_TEST, Loss, Output, Subject, prepare, undisturbed

Progress = Callable[[int, int, str], None]


def portrait(
    model: nn.Module,
    data: Any,
    untrained: nn.Module | None = None,
    minutes: float = 10,
    *,
    output: Output = None,
    loss: Loss | None = None,
    task: str | None = None,
    layers: Any = None,
    only: Sequence[str] | None = None,
    name: str = "",
    max_examples: int = MOST_TEST,
    seed: int = 0,
    progress: bool | Progress = True,
) -> Portrait:
    """Look at a trained network with the instruments of the sixteen papers, the cheapest first, within some minutes.

    What does not apply says why; what does not fit into the minutes says what it would need; an instrument that fails
    says so in a sentence, and the others go on. The network is copied: the user's own keeps its parameters, gradients,
    modes and hooks, and random numbers go on as if nothing had been drawn.

    Parameters
    ----------
    model
        Any trained ``torch.nn.Module``: plain, of this package, of Hugging Face. It stays as it is.
    data
        ``{"train": ..., "test": ...}``, or an object with such attributes (a workload), or one set of data. Each is a
        pair (inputs, targets) of tensors or arrays, a data set, a ``DataLoader``, or a dict of named inputs with
        ``labels``, as for :func:`~mlcollage.data.batches.read_batch`.
    untrained
        The same network before training (``copy.deepcopy(model)`` before the first step), for what compares the two.
    minutes
        Time for all instruments together. An instrument is begun only if its estimate fits into what is left.
    output
        Which of several outputs is meant: a number, a name or a function of what the model returns.
    loss
        ``loss(output, targets)``, the mean over examples. By default that of the task.
    task
        ``"classification"`` (logits (n, classes), labels (n,)), ``"binary"`` (one logit), ``"regression"`` or
        ``"other"``. By default what outputs and targets look like, which the page says.
    layers
        Layers to read one by one, as for :class:`~mlcollage.measure.LayerTap`. By default the ReLUs, else other
        activations, else linear and convolutional layers; at most 24.
    only
        Names of instruments; by default all, see :data:`~mlcollage.portraits.INSTRUMENTS`.
    name
        What the network is called; by default its class.
    max_examples
        Test examples that are looked at, at most.
    seed
        Of all random choices; the same seed gives the same numbers on the same machine.
    progress
        Show a bar where there is a terminal; or a function of (done, total, what is measured now).

    Returns
    -------
    Portrait
        ``.table``, ``.page()``, ``.save(folder)``, ``.plot()``.

    Raises
    ------
    InvalidInput
        For what is no network, data that do not fit it, a twin with other parameters.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    >>> net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> found = portrait(net, (x, (x[:, 0] > 0).long()), minutes=1, only=["quality", "fisher"], progress=False)
    >>> found.table["quantity"].tolist()[:2]
    ['accuracy', 'ece']
    """
    minutes = checks.real("minutes", minutes, above=0)
    chosen = _chosen(only)
    start = time.monotonic()
    with undisturbed(seed), _bar(progress) as told:
        told(0, len(chosen), "reading the data")
        subject = prepare(
            model,
            data,
            untrained,
            output=output,
            loss=loss,
            task=task,
            layers=layers,
            name=name,
            seed=seed,
            max_examples=max_examples,
        )
        readings = sit(subject, chosen, start + 60 * minutes, told)
    return Portrait.of(subject, readings, minutes, time.monotonic() - start)


def _chosen(only: Sequence[str] | None) -> tuple[Instrument, ...]:
    known = {i.name: i for i in INSTRUMENTS}
    if only is None:
        return INSTRUMENTS
    return tuple(
        known[checks.choice("each name in only", n, known)] for n in ([only] if isinstance(only, str) else only)
    )


def sit(
    subject: Subject, instruments: Sequence[Instrument], deadline: float, told: Progress | None = None
) -> list[Reading]:
    """Measure what fits before a time of :func:`time.monotonic`, the cheapest first; readings in the order given."""
    told = told or (lambda done, total, what: None)
    found: dict[str, Reading] = {}
    waiting: list[tuple[float, Instrument]] = []
    for instrument in instruments:
        why = instrument.why_not(subject)
        if why:
            found[instrument.name] = Reading(instrument.name, "does not apply", sentence=_sentence(why))
        else:
            waiting.append((instrument.cost(subject), instrument))
    pace = 1.0  # seconds taken over seconds estimated, of what was measured so far
    spent = estimated = 0.0
    for cost, instrument in sorted(waiting, key=lambda pair: pair[0]):
        told(len(found), len(instruments), instrument.title)
        needed = cost * pace
        if time.monotonic() + needed > deadline:
            left = max(deadline - time.monotonic(), 0.0)
            sentence = f"It would need about {_duration(needed)}, and {_duration(left)} of the minutes were left."
            found[instrument.name] = Reading(instrument.name, "no time", sentence=sentence, seconds=needed)
            continue
        begun = time.perf_counter()
        found[instrument.name] = _read(instrument, subject)
        taken = time.perf_counter() - begun
        if found[instrument.name].state == "measured":
            spent, estimated = spent + taken, estimated + cost
            pace = max(1.0, spent / max(estimated, 1.0))  # of less than a second nothing follows
        found[instrument.name] = replace(found[instrument.name], seconds=taken)
    told(len(instruments), len(instruments), "")
    return [found[i.name] for i in instruments]


def _read(instrument: Instrument, subject: Subject) -> Reading:
    """What an instrument says; whatever goes wrong in it is a sentence."""
    try:
        with users_code(f"the instrument {instrument.name}"):
            return instrument.measure(subject)
    except DoesNotApply as error:
        return Reading(instrument.name, "does not apply", sentence=_sentence(str(error)))
    except UserCodeError as error:
        cause = described(error.__cause__) if error.__cause__ is not None else str(error)
        return Reading(instrument.name, "failed", sentence=_sentence(f"It failed with {cause}"))
    except MLCollageError as error:
        return Reading(instrument.name, "failed", sentence=_sentence(str(error)))


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bar(progress: bool | Progress) -> Iterator[Progress]:
    """Where progress is told: the user's function, a bar on a terminal, or nowhere."""
    if callable(progress):
        yield progress
        return
    if not (progress and sys.stderr.isatty()):
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("portrait"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}")
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("portrait", total=len(INSTRUMENTS), now="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, now=what)
