"""Speed of two decoupled processes against locked schedules, and the cost of synthetic gradients in one process.

``mlcollage bench synthetic_gradients`` prints the table. Speeds of processes are steps per second of the wall clock,
after a warm-up, with the same batches; costs of a step are CPU seconds of one thread, the least of many short turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlcollage.nn.init import build
from mlcollage.nn.mlp import MLP
from mlcollage.papers.synthetic_gradients import Context, decouple, run_pipeline
from mlcollage.papers.synthetic_gradients.study.stages import CLASSES, batches, sleeping_stage, working_stage

Row = dict[str, Any]
IMAGE_CLASSES = 10
LOSS = nn.CrossEntropyLoss()


def bench(quick: bool = True) -> list[Row]:
    """Rows of name, what, value, unit and ratio."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_costs(quick), *_processes(quick)]
    finally:
        torch.set_num_threads(before)


def _row(name: str, what: str, value: float, unit: str, ratio: float | None = None) -> Row:
    return {"name": name, "what": what, "value": value, "unit": unit, "ratio": ratio}


def _in_turns(runs: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """CPU seconds of each, the least of many short turns, taken in turns: a busy machine changes it least."""
    least = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            start = time.process_time()
            for _ in range(4):  # one period of what is trained in every fourth step
                runs[name]()
            if turn:  # the first warms up
                least[name] = min(least[name], (time.process_time() - start) / 4)
    return least


def _costs(quick: bool) -> list[Row]:
    """A training step of a 4 x 256 MLP, gradients only."""
    rows = []
    for batch in (64, 256, 1024):
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(batch, 784, generator=g), torch.randint(IMAGE_CLASSES, (batch,), generator=g)
        plain = _network()
        parameters = list(plain.parameters())

        def step(x: Tensor = x, y: Tensor = y, model: nn.Module = plain, own: list[Any] = parameters) -> None:
            _forget(own)
            LOSS(model(x), y).backward()

        def cut(names: list[str], x: Tensor = x, y: Tensor = y, **options: Any) -> Callable[[], None]:
            net = decouple(_network(), names, example=x[:8], context=IMAGE_CLASSES, **options)
            own = list(net.parameters())

            def run() -> None:
                _forget(own)
                net.training_step(x, y, LOSS)

            return run

        every = [f"hidden{i}" for i in range(1, 5)]
        best = _in_turns(
            {
                "backpropagation (baseline)": step,
                "the same in two parts, one after the other": _by_hand(x, y, synthetic=False),
                "synthetic gradient, one cut": cut(["hidden2"]),
                "synthetic gradient of rank 9 (classes - 1), one cut": cut(["hidden2"], rank=IMAGE_CLASSES - 1),
                "synthetic gradient, one cut, trained in every second step": cut(["hidden2"], train_every=2),
                "synthetic gradient, one cut, trained in every fourth step": cut(["hidden2"], train_every=4),
                "synthetic gradient, one cut, written out by hand": _by_hand(x, y, synthetic=True),
                "synthetic gradients, four cuts": cut(every),
                "synthetic gradients of rank 9, four cuts": cut(every, rank=IMAGE_CLASSES - 1),
                "feedback alignment": cut(every, credit="fa"),
                "direct feedback alignment, four cuts": cut(every, credit="dfa"),
            },
            20 if quick else 100,
        )
        base = best["backpropagation (baseline)"]
        what = f"forward and backward pass, 4 x 256 MLP with batch norm, batch {batch}, one process"
        rows += [_row(name, what, 1e3 * seconds, "ms", seconds / base) for name, seconds in best.items()]
    # Products of a sample: three for each layer, of which the first needs none for its input; two for the synthesizer.
    layers = [784 * 256, *[256 * 256] * 3, 256 * IMAGE_CLASSES]
    whole, r = 3 * sum(layers) - layers[0], IMAGE_CLASSES - 1
    # Of rank r: two products forward; three backward, since the context needs none for itself.
    few = 2 * (256 * r + (r + IMAGE_CLASSES) * 256) + 256 * r
    for name, own in (("one linear synthesizer", 2 * (256 + IMAGE_CLASSES) * 256), (f"one of rank {r}", few)):
        rows.append(_row(f"multiplications of {name} over those of backpropagation", what, own / whole, "fraction"))
    return rows


def _network() -> nn.Module:
    return build(lambda: MLP((784,), IMAGE_CLASSES, (256,) * 4, norm="batch"), 0)


def _forget(parameters: list[Any]) -> None:
    """As optimizers do: the walk over modules of ``zero_grad`` costs more the more modules there are."""
    for p in parameters:
        p.grad = None


def _by_hand(x: Tensor, y: Tensor, *, synthetic: bool) -> Callable[[], None]:
    """What the operations of one cut cost without checks, hooks and report."""
    model, made = _network(), nn.Linear(256 + IMAGE_CLASSES, 256)
    parts = list(model.children())
    lower, upper = nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:])
    own, n = [*model.parameters(), *made.parameters()], len(x)

    def run() -> None:
        _forget(own)
        h = lower(x)
        top = h.detach().requires_grad_()
        if not synthetic:
            LOSS(upper(top), y).backward()
            h.backward(top.grad)
            return
        label = torch.zeros(n, IMAGE_CLASSES).scatter_(1, y[:, None], 1.0)
        said = made(torch.cat([h.detach(), label], 1))
        h.backward(said.detach() / n)
        LOSS(upper(top), y).backward()
        assert top.grad is not None
        said.backward(torch.sub(said.detach(), top.grad, alpha=n).mul_(2 / n))

    return run


def _processes(quick: bool) -> list[Row]:
    count = 40 if quick else 200
    rows = []
    for kind, build_stage, given in (
        ("10 ms forward, 20 ms backward asleep, batch 32", sleeping_stage, batches(count, 0)),
        ("3 layers of 512 units, batch 256", working_stage, batches(count, 0, 256, 512)),
    ):
        what = f"two processes, equal stages: {kind}"
        base = None
        for schedule, name in (
            ("sequential", "one batch at a time (baseline)"),
            ("gpipe", "GPipe of torch, 4 microbatches"),
            ("1f1b", "1F1B of torch, 4 microbatches"),
            ("dni", "decoupled by synthetic gradients"),
        ):
            found = run_pipeline(
                build_stage,
                given,
                stages=2,
                loss_fn=LOSS,
                schedule=schedule,  # type: ignore[arg-type]
                context=Context("labels", CLASSES),
                timeout=120,
            )
            base = base or found.steps_per_second
            rows.append(_row(name, what, found.steps_per_second, "steps/s", found.steps_per_second / base))
            if schedule == "dni":
                share = [s.seconds(1) / (s.seconds(0) + s.seconds(1)) for s in found.stages]
                rows.append(_row("decoupled: share of time blocked, worst stage", what, max(share), "fraction"))
    return rows


if __name__ == "__main__":
    from mlcollage.lab.bench import to_markdown

    print(to_markdown(bench()))
