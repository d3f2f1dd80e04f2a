"""A cluster on paper: the real coordinator, workers that are nothing but a clock.

A part begins when a worker is free, and takes as long as a function says. What the coordinator does by itself for a
part takes time too, one part after the other, so that the figures show where one coordinator stops to be enough.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from merganser.merging.cluster_jobs import LostError, Part, coordinate


class SimulatedWorkers:
    """Workers that only let time pass.

    Args:
        number: of them.
        seconds: that a part takes.
        coordinator_s: seconds of the coordinator for a part, half when it is given out and half when it ends.
        is_lost: part, how often it was given out -> whether its worker dies at its end.

    Attributes:
        busy_s: seconds of all workers together in which they worked.
    """

    def __init__(
        self,
        number: int,
        seconds: Callable[[Part], float],
        *,
        coordinator_s: float = 0.0,
        is_lost: Callable[[Part, int], bool] = lambda _part, _time: False,
    ) -> None:
        self._seconds, self._half_s, self._is_lost = seconds, coordinator_s / 2, is_lost
        self._now = self.busy_s = 0.0
        self._free = [0.0] * number
        self._ends: list[tuple[float, int]] = []
        self._parts: dict[int, Part] = {}
        self._given: dict[int, int] = {}
        self._handles = count()

    def start(self, part: Part) -> int:
        """Give a part to the worker that is free first."""
        self._now += self._half_s
        handle, seconds = next(self._handles), self._seconds(part)
        end = max(self._now, heapq.heappop(self._free)) + seconds
        heapq.heappush(self._free, end)
        heapq.heappush(self._ends, (end, handle))
        self._parts[handle] = part
        self._given[part.number] = self._given.get(part.number, 0) + 1
        self.busy_s += seconds
        return handle

    def now(self) -> float:
        """Seconds of the clock."""
        return self._now

    def ended(self, handles: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """Those that have ended; the clock goes on to the first end, if it must."""
        if not self._ends or self._ends[0][0] > self._now + timeout_s:
            self._now += timeout_s
            return []
        self._now = max(self._now, self._ends[0][0])
        found = []
        while self._ends and self._ends[0][0] <= self._now:
            handle = heapq.heappop(self._ends)[1]
            if handle in self._parts:
                found.append(handle)
        return found

    def result(self, handle: Any) -> None:
        """Nothing, or that its worker died.

        Raises:
            LostError: If it did.
        """
        self._now += self._half_s
        part = self._parts.pop(handle)
        if self._is_lost(part, self._given[part.number]):
            raise LostError("its process died")

    def stop(self, handles: Sequence[Any]) -> None:
        """End what is under way."""
        for handle in handles:
            self._parts.pop(handle, None)


@dataclass(frozen=True)
class Simulated:
    """What a simulation found.

    Attributes:
        wall_s: of the merge, by the clock on paper.
        busy: share of that in which the workers worked.
        lost: how often a part was.
    """

    wall_s: float
    busy: float
    lost: int


def simulated(
    parts: Sequence[Part],
    number: int,
    seconds: Callable[[Part], float],
    *,
    coordinator_s: float = 0.0,
    is_lost: Callable[[Part, int], bool] = lambda _part, _time: False,
    done: Callable[[Part], None] = lambda _: None,
) -> Simulated:
    """Have parts done by workers on paper.

    Args:
        parts: of a merge.
        number: of workers.
        seconds: that a part takes.
        coordinator_s: seconds of the coordinator for a part.
        is_lost: part, how often it was given out -> whether its worker dies at its end.
        done: called for every part that ended.

    Raises:
        ClusterError: If a part was lost too often.
    """
    workers = SimulatedWorkers(number, seconds, coordinator_s=coordinator_s, is_lost=is_lost)
    lost = coordinate(
        parts, workers, workers.start, lambda part, _: done(part), window=2 * number, sign=lambda _: workers.now()
    )
    wall_s = workers.now()
    return Simulated(wall_s, workers.busy_s / (number * wall_s) if wall_s else 1.0, lost)
