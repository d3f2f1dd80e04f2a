"""How parts of any work are handed to tasks and seen through: who does them, with how much, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from merganser.continual.stream import Progress, usable_threads
from merganser.merging.cluster_jobs import (
    ATTEMPTS,
    PATIENCE_S,
    Machine,
    Part,
    Workers,
    chosen_threads,
    coordinate,
    part_count,
    places_for,
    split,
)
from merganser.merging.cluster_worker import Failure

#: Memory in bytes that Python and torch take in every task.
BASE_BYTES = 500_000_000


class Tasks(Workers, Protocol):
    """Workers that run functions: Ray's (`cluster_ray.py`), or this process."""

    @property
    def machines(self) -> Sequence[Machine]:
        """Those that are there."""
        ...

    def share(self, value: Any) -> Any:
        """Make a value known to all tasks; what is returned is handed to `start` in its place."""
        ...

    def start(self, task: Callable[..., Any], *args: Any, label: str, threads: int, memory_bytes: int) -> Any:
        """Have a function called somewhere, and return a handle."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much the work may take and bear.

    Attributes:
        workers: tasks at a time; None for as many as the machines have room for.
        threads: of a task; None for one, or more where there are fewer files than processors.
        memory_bytes: of a task beside Python and torch.
        attempts: how often a part is given out.
        patience_s: seconds without any sign of work after which what is under way counts as lost.
    """

    workers: int | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    attempts: int = ATTEMPTS
    patience_s: float = PATIENCE_S


def threads_of(tasks: Tasks, limits: Limits, files: int) -> int:
    """Threads of a task.

    Raises:
        ParameterError: If fewer than one are asked for.
    """
    return usable_threads(limits.threads if limits.threads is not None else chosen_threads(tasks.machines, files))


class Handout:
    """Some work, cut into parts for the tasks that there is room for.

    Args:
        tasks: who does it.
        sizes: bytes that are read and written for every tensor.
        files: name of the file of every tensor.
        threads: of a task.
        peak_bytes: memory of a task beside Python and torch.
        limits: of the work.
        progress: called as (bytes done, bytes in all).
        folder: where the files are; None where nothing is written.

    Raises:
        ParameterError: If no machine has room for a task.
    """

    def __init__(
        self,
        tasks: Tasks,
        sizes: Mapping[str, int],
        files: Mapping[str, str],
        *,
        threads: int,
        peak_bytes: int,
        limits: Limits,
        progress: Progress | None,
        folder: Path | None,
    ) -> None:
        self._tasks, self._limits, self._progress, self._folder = tasks, limits, progress, folder
        self._threads, self._memory_bytes = threads, BASE_BYTES + peak_bytes
        places = places_for(tasks.machines, threads, self._memory_bytes)
        self._parts = split(sizes, files, part_count(sum(sizes.values()), limits.workers or places))
        self._window = limits.workers or 2 * places  # one waits behind each, so that none is idle

    def start(self, task: Callable[..., Any], shared: Any, part: Part, *args: Any) -> Any:
        """Give a part out."""
        return self._tasks.start(
            task, shared, part, *args, label=part.label, threads=self._threads, memory_bytes=self._memory_bytes
        )

    def run(self, start: Callable[[Part], Any], done: Callable[[Part, Any], None]) -> None:
        """See all parts done; a task's error is raised here as what it is.

        Args:
            start: gives a part out.
            done: takes what a part gave, once a part.
        """
        total, moved = sum(part.size for part in self._parts), 0

        def taken(part: Part, result: Any) -> None:
            nonlocal moved
            if isinstance(result, Failure):
                raise result.error()
            done(part, result)
            moved += part.size
            if self._progress is not None:
                self._progress(moved, total)

        coordinate(
            self._parts,
            self._tasks,
            start,
            taken,
            window=self._window,
            attempts=self._limits.attempts,
            patience_s=self._limits.patience_s,
            sign=self._sign,
        )

    def _sign(self, parts: Sequence[Part]) -> object:
        """When the files under way were last written to: it changes with every chunk."""
        if self._folder is None:
            return None
        return [(self._folder / file).stat().st_mtime_ns for part in parts for file in part.files]
