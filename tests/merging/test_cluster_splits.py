"""A merge in parts: how it is split, handed out to workers that may die, and how long it takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.errors import ClusterError, OutputError, ParameterError
from merganser.merging.cluster_jobs import Machine, Part, chosen_threads, coordinate, places_for, split
from merganser.merging.cluster_simulation import SimulatedWorkers, simulated

# the split


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 4)), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_a_split_has_every_tensor_once_in_order_by_whole_files_and_no_part_is_larger_than_asked(
    tensors: list[tuple[int, int]], count: int
) -> None:
    sizes = {f"t{i:02d}": size for i, (size, _) in enumerate(tensors)}
    starts = [i == 0 or step > 2 for i, (_, step) in enumerate(tensors)]
    files = {name: f"f{sum(starts[: i + 1]):02d}" for i, name in enumerate(sizes)}
    parts = split(sizes, files, count)
    assert [name for part in parts for name in part.names] == [*sizes]
    assert [file for part in parts for file in part.files] == [*dict.fromkeys(files.values())]
    assert [part.number for part in parts] == [*range(1, len(parts) + 1)]
    largest = max(sum(s for n, s in sizes.items() if files[n] == f) for f in files.values())
    for part in parts:
        assert {files[name] for name in part.names} == {*part.files}
        assert part.size == sum(sizes[name] for name in part.names)
        assert part.size <= max(math.ceil(sum(sizes.values()) / count), largest)
    assert len(parts) <= max(1, 2 * count)


def parts_of(sizes: Sequence[int]) -> list[Part]:
    return [Part(i, (f"t{i}",), (f"f{i}",), size) for i, size in enumerate(sizes, 1)]


def test_threads_are_one_unless_there_are_fewer_files_than_processors() -> None:
    machines = [Machine(16, 0), Machine(4, 0)]
    assert [chosen_threads(machines, n) for n in (1, 2, 5, 10, 100)] == [8, 8, 4, 2, 1]
    assert chosen_threads([Machine(1, 0)] * 50, 2) == 1, "a task has one machine"


def test_tasks_take_processors_and_memory_of_one_machine_each() -> None:
    machines = [Machine(8, 100), Machine(3, 1000), Machine(1, 1000)]
    assert places_for(machines, 2, 40) == 2 + 1
    with pytest.raises(ParameterError, match=r"takes 4 processors and 200 bytes .* the most are 8 and 1,000"):
        places_for(machines, 4, 200)


# the coordinator


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_every_part_is_done_once_whatever_dies_and_no_more_are_under_way_than_allowed(
    sizes: list[int], number: int, deaths: int, dice: Any
) -> None:
    parts, done, under_way = parts_of(sizes), Counter[int](), [0]
    doomed = {part.number: dice.randint(0, deaths) for part in parts}
    workers = SimulatedWorkers(number, lambda p: p.size, is_lost=lambda p, time: time <= doomed[p.number])

    def start(part: Part) -> int:
        under_way[0] += 1
        return workers.start(part)

    def ended(handles: Sequence[Any], timeout_s: float, inner: Any = workers.ended) -> Sequence[Any]:
        assert len(handles) == under_way[0] <= number
        found = inner(handles, timeout_s)
        under_way[0] -= len(found)
        return found

    workers.ended = ended  # type: ignore[method-assign]
    lost = coordinate(parts, workers, start, lambda part, _: done.update([part.number]), window=number)
    assert done == Counter(part.number for part in parts)
    assert lost == sum(doomed.values())


def test_a_part_lost_too_often_ends_the_merge_and_names_the_files() -> None:
    with pytest.raises(ClusterError, match=r"^f2 was given to 4 workers one after the other .*: its process died"):
        simulated(parts_of([5, 9, 5]), 2, lambda p: p.size, is_lost=lambda p, _: p.number == 2)


def test_the_first_error_stops_what_is_under_way() -> None:
    workers, stopped = SimulatedWorkers(3, lambda p: p.size), []
    workers.stop = stopped.extend  # type: ignore[method-assign]

    def done(part: Part, _: object) -> None:
        raise OutputError(f"{part.label} is full")

    with pytest.raises(OutputError, match="f3 is full"):
        coordinate(parts_of([5, 6, 4, 4]), workers, workers.start, done, window=3)
    assert len(stopped) == 2


def test_workers_that_stand_still_are_given_up_after_a_bounded_time() -> None:
    workers = SimulatedWorkers(2, lambda _: math.inf)
    with pytest.raises(ClusterError, match="no sign of work for 100 seconds"):
        coordinate(parts_of([1, 1]), workers, workers.start, lambda *_: None, window=2, patience_s=100, attempts=3)
    assert 300 <= workers.now() <= 330


def test_a_worker_that_writes_is_waited_for_however_long_it_takes() -> None:
    workers = SimulatedWorkers(1, lambda _: 1000.0)
    lost = coordinate(
        parts_of([1]), workers, workers.start, lambda *_: None, window=1, patience_s=50, sign=lambda _: workers.now()
    )
    assert (lost, workers.now()) == (0, 1000.0)


@pytest.mark.parametrize(("jobs", "number", "cost"), [(100, 7, 0.0), (1000, 1000, 0.0), (1000, 50, 0.1)])
def test_equal_parts_take_the_time_of_the_closed_form(jobs: int, number: int, cost: float) -> None:
    found = simulated(parts_of([1] * jobs), number, lambda _: 2.0, coordinator_s=cost)
    if cost == 0:
        assert found.wall_s == math.ceil(jobs / number) * 2.0
        assert found.busy == pytest.approx(jobs * 2.0 / (number * found.wall_s))
    else:  # one coordinator is the limit: it works without a break, but for the last part's own time
        assert jobs * cost <= found.wall_s + 1e-9
        assert found.wall_s <= jobs * cost + 2.0 + 1e-9


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_unequal_parts_take_at_most_the_mean_load_and_the_bound_of_list_scheduling(
    sizes: list[int], number: int
) -> None:
    found = simulated(parts_of(sizes), number, lambda part: part.size)
    best = max(sum(sizes) / number, *sizes)
    assert best - 1e-9 <= found.wall_s <= sum(sizes) / number + max(sizes) * (1 - 1 / number) + 1e-9
