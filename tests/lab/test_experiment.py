"""An experiment multiplies arms by seeds; its settings are typed on both ends."""

from dataclasses import dataclass

import pytest

from mlcollage.errors import InvalidInput
from mlcollage.lab import Experiment, Measurements, Run, Scale, Task, each_seed
from mlcollage.lab.experiment import settings_lines


@dataclass(frozen=True)
class Stream:
    """One pass."""

    widths: tuple[int, ...] = (50, 25)  # neurons per layer
    grid: tuple[tuple[float, int], ...] = ((0.1, 1), (0.3, 2))  # rates and batch sizes
    data: str = "digits"  # which set
    limit: int | None = None


class Kind:
    """A kind of workload."""


class Other:
    """Another one."""


def record(task: Task[Stream]) -> Measurements:
    m = Measurements()
    m.add("total", task.seed + sum(task.settings.widths), step=task.seed, arm=task.arm)
    m.array("line", [task.seed])
    return m


def make(**options) -> Experiment[Stream]:
    return Experiment("stream", record, **{"arms": ("a", "b"), "settings": {Scale.QUICK: Stream()}, **options})


def keys(runs):
    return [(r.arm, r.seed, r.count) for r in runs]


def test_runs_are_arms_times_seeds():
    assert keys(make().runs("demo", Scale.QUICK, range(2))) == [("a", 0, 1), ("a", 1, 1), ("b", 0, 1), ("b", 1, 1)]
    assert list(make().runs("demo", Scale.FULL, range(2))) == []  # not part of that scale


def test_blocks_share_the_seeds_and_the_last_one_may_be_short():
    assert keys(make(arms=("a",), block=4).runs("demo", Scale.QUICK, range(10))) == [
        ("a", 0, 4),
        ("a", 4, 4),
        ("a", 8, 2),
    ]
    assert keys(make(arms=("a",), block=None).runs("demo", Scale.QUICK, range(5, 10))) == [("a", 5, 5)]
    assert list(make(block=None).runs("demo", Scale.QUICK, range(0))) == []


def test_registered_seeds_are_the_studys_the_experiments_own_or_one():
    assert make().registered(Scale.QUICK, 7) == range(7)
    assert make(seeds={Scale.QUICK: 3}).registered(Scale.QUICK, 7) == range(3)
    assert make(seeds={Scale.QUICK: 3}).registered(Scale.FULL, 7) == range(7)
    assert make(once=True).registered(Scale.QUICK, 7) == range(1)


def test_settings_come_back_from_a_run_as_they_were():
    (run, *_) = make().runs("demo", Scale.QUICK, range(1))
    again = Run.from_dict(__import__("json").loads(__import__("json").dumps(run.to_dict())))
    assert again == run
    task = make().task(again)
    assert task.settings == Stream()
    assert isinstance(task.settings.grid[0], tuple)
    assert (task.arm, task.seed, task.scale) == ("a", 0, Scale.QUICK)


def test_on_a_users_workload_the_kinds_and_the_adapted_settings_decide():
    def adapt(settings, workload, scale):
        return None if scale is Scale.FULL else Stream(data="workload")

    everywhere = {Scale.QUICK: Stream(), Scale.FULL: Stream()}
    own = make(settings=everywhere)
    takes = make(settings=everywhere, workloads=(Kind,), adapt=adapt)
    only = make(settings=everywhere, workloads=(Kind,), own_data=False)
    seeds = range(1)
    assert list(own.runs("demo", Scale.QUICK, seeds, workload=Kind())) == []
    assert [r.settings["data"] for r in takes.runs("demo", Scale.QUICK, seeds, workload=Kind(), name="w")] == [
        "workload"
    ] * 2
    assert list(takes.runs("demo", Scale.QUICK, seeds, workload=Other())) == []
    assert list(takes.runs("demo", Scale.FULL, seeds, workload=Kind())) == []
    assert list(only.runs("demo", Scale.QUICK, seeds)) == []
    assert keys(only.runs("demo", Scale.QUICK, seeds, workload=Kind())) == [("a", 0, 1), ("b", 0, 1)]


def test_each_seed_of_a_block_is_measured_by_itself():
    found = each_seed(record)(Task("a", (3, 4), Stream()))
    assert found.table[["seed", "value", "step"]].to_numpy().tolist() == [[3, 78, 3], [4, 79, 4]]
    assert sorted(found.arrays) == ["line.3", "line.4"]
    with pytest.raises(InvalidInput, match="holds the seeds"):
        record(Task("a", (3, 4), Stream()))


def test_comments_document_the_fields():
    lines = {name: (value, comment) for name, value, comment in settings_lines(Stream())}
    assert lines["widths"] == ("(50, 25)", "neurons per layer")
    assert lines["grid"][1] == "rates and batch sizes"
    assert lines["limit"] == ("None", "")


@dataclass
class Loose:
    rate: float = 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ()}, "needs at least one arm"),
        ({"settings": {}}, "needs at least one arm and the settings"),
        ({"settings": {Scale.QUICK: Loose()}}, "objects of one frozen dataclass; they are Loose"),
        ({"settings": {Scale.QUICK: {"rate": 1}}}, "frozen dataclass; they are dict"),
        ({"block": 0}, "block of experiment 'stream' must be a whole number of at least 1"),
        ({"version": 0}, "version of experiment 'stream'"),
    ],
)
def test_what_is_no_experiment_is_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        make(**options)


def test_a_setting_that_cannot_be_written_down_is_refused():
    @dataclass(frozen=True)
    class Odd:
        names: object = frozenset({1})

    with pytest.raises(InvalidInput, match=r"setting names=frozenset\(\{1\}\) of run demo/stream/a seed 0 is no plain"):
        list(make(settings={Scale.QUICK: Odd()}).runs("demo", Scale.QUICK, range(1)))
