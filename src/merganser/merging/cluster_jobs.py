"""How work is cut into parts for many workers, and how one coordinator sees them all done: no Ray, no file.

A part is a run of whole output files, so no two workers ever write to one file. The coordinator keeps a bounded number
of parts under way, the largest first; a part whose worker died is given out again, so many times; a silence of all
workers is not waited out for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from merganser.errors import ClusterError, ParameterError

#: How often a part is given out before the work is given up.
ATTEMPTS = 4
#: Seconds without any sign of work after which what is under way counts as lost.
PATIENCE_S = 3600.0
#: Seconds that are waited for at a time.
POLL_S = 5.0
#: Parts a worker, about: where parts differ, the last to end keeps the others waiting for a share of its time only.
PARTS_A_WORKER = 4
#: Bytes of a part, about, at most: no more is done again when a worker dies, or a merge is gone on with.
PART_BYTES = 20_000_000_000

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Part:
    """What one task does.

    Attributes:
        number: from 1 on, in the order of the files.
        names: of its tensors.
        files: of the output that hold them and nothing else.
        size: bytes that it reads and writes.
    """

    number: int
    names: tuple[str, ...]
    files: tuple[str, ...]
    size: int

    @property
    def label(self) -> str:
        """Its files, for people."""
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} to {self.files[-1]}"


def split(sizes: Mapping[str, int], files: Mapping[str, str], count: int) -> tuple[Part, ...]:
    """Cut tensors into parts of about equal bytes, by whole files and in their order.

    Args:
        sizes: bytes that are read and written for every tensor, those of one file next to each other.
        files: name of the file of every tensor.
        count: of parts, about: none holds more than that share of the bytes, or more than one file.

    >>> [p.files for p in split({"a": 5, "b": 1, "c": 2, "d": 2}, {"a": "1", "b": "2", "c": "2", "d": "3"}, 2)]
    [('1',), ('2', '3')]
    """
    held: dict[str, list[str]] = {}
    for name in sizes:
        held.setdefault(files[name], []).append(name)
    weights = {file: sum(sizes[name] for name in names) for file, names in held.items()}
    limit = -(-sum(weights.values()) // max(1, count))
    groups: list[list[str]] = []
    filled = 0
    for file, weight in weights.items():
        if not groups or filled + weight > limit:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += weight
    return tuple(
        Part(
            number,
            tuple(name for file in group for name in held[file]),
            tuple(group),
            sum(weights[file] for file in group),
        )
        for number, group in enumerate(groups, 1)
    )


def part_count(total: int, workers: int) -> int:
    """How many parts to cut work of so many bytes into, about.

    >>> part_count(10**9, 8), part_count(10**12, 8)
    (32, 50)
    """
    return max(PARTS_A_WORKER * workers, -(-total // PART_BYTES))


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine has to give.

    Attributes:
        processors: that it has.
        memory_bytes: that it has.
    """

    processors: int
    memory_bytes: int


def chosen_threads(machines: Sequence[Machine], parts: int) -> int:
    """Threads of a task where nobody asks for a number: more than one only if there are fewer parts than processors.

    >>> chosen_threads([Machine(8, 0), Machine(8, 0)], 4), chosen_threads([Machine(8, 0)], 100)
    (4, 1)
    """
    total = sum(machine.processors for machine in machines)
    widest = max((machine.processors for machine in machines), default=1)
    return max(1, min(8, widest, total // max(1, parts)))


def places_for(machines: Sequence[Machine], threads: int, memory_bytes: int) -> int:
    """How many tasks fit at once.

    Raises:
        ParameterError: If no machine has room for one.
    """
    need = max(1, memory_bytes)
    places = sum(min(m.processors // threads, m.memory_bytes // need) for m in machines)
    if not places:
        most = max((m.processors for m in machines), default=0), max((m.memory_bytes for m in machines), default=0)
        raise ParameterError(
            f"a task takes {threads} processors and {memory_bytes:,} bytes of memory, and no machine of the cluster "
            f"has both: the most are {most[0]} and {most[1]:,}",
            "fewer --threads take less of both",
        )
    return places


class LostError(Exception):
    """A part's worker is gone; the part may be given out again."""


class Workers(Protocol):
    """Whoever does the parts: Ray's processes, this one, or none at all but a clock."""

    def now(self) -> float:
        """Seconds of their clock."""
        ...

    def ended(self, handles: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those of what is under way that have ended; waits for one at most so long."""
        ...

    def result(self, handle: Any) -> Any:
        """What a part gave.

        Raises:
            LostError: If its worker is gone.
            MerganserError: If it can never succeed.
        """
        ...

    def stop(self, handles: Sequence[Any]) -> None:
        """End what is under way; none of it is waited for much longer."""
        ...


def coordinate(
    parts: Iterable[Part],
    workers: Workers,
    start: Callable[[Part], Any],
    done: Callable[[Part, Any], None],
    *,
    window: int,
    attempts: int = ATTEMPTS,
    patience_s: float = PATIENCE_S,
    sign: Callable[[Sequence[Part]], object] = lambda _: None,
) -> int:
    """Have every part done, the largest first.

    Args:
        parts: independent of each other.
        workers: who does them.
        start: gives a part out and returns its handle.
        done: takes what a part gave, once a part.
        window: how many are under way at most.
        attempts: how often a part is given out at most.
        patience_s: after so long without an end or a sign, what is under way counts as lost.
        sign: of what is under way: something that changes as long as anybody works.

    Returns:
        How often a part was lost.

    Raises:
        ClusterError: If a part was lost too often.
        MerganserError: Whatever a part, or `done`, raised; then nothing is under way any more.
    """
    waiting = deque(sorted(parts, key=lambda part: (-part.size, part.number)))
    running: dict[Any, Part] = {}
    given: Counter[int] = Counter()
    lost = 0
    seen: object = None
    last = workers.now()

    def missed(part: Part, why: str) -> None:
        if given[part.number] >= attempts:
            raise ClusterError(
                f"{part.label} was given to {attempts} workers one after the other and lost each time: {why}",
                "if memory ran out, fewer --threads, a smaller --shard-bytes or --memory (of merge) make tasks smaller",
            )
        waiting.appendleft(part)

    try:
        while waiting or running:
            while waiting and len(running) < window:
                part = waiting.popleft()
                given[part.number] += 1
                running[start(part)] = part
            ended = workers.ended([*running], POLL_S)
            for handle in ended:
                part = running.pop(handle)
                try:
                    result = workers.result(handle)
                except LostError as error:
                    lost += 1
                    missed(part, str(error))
                else:
                    done(part, result)
            if not ended and (found := sign([*running.values()])) != seen:
                seen, last = found, workers.now()
            elif ended:
                last = workers.now()
            elif workers.now() - last > patience_s:
                stuck = dict(running)
                running.clear()
                workers.stop([*stuck])
                lost += len(stuck)
                for part in stuck.values():
                    missed(part, f"no sign of work for {patience_s:,.0f} seconds")
                last = workers.now()
    finally:
        if running:
            workers.stop([*running])
    return lost
