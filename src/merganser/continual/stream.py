"""Run many independent jobs, one a tensor, in a bounded amount of memory.

Every job runs on one thread with single-threaded linear algebra, so its bits do not depend on how many run at once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from merganser.errors import ParameterError
from merganser.lapack import single_threaded

T = TypeVar("T")
Progress = Callable[[int, int], None]

#: Elements that are handled at a time where a rule looks at one element only.
CHUNK_ELEMENTS = 1 << 20
#: Within a job, freed blocks up to this many bytes are kept for the next ones of the same size.
KEPT_BLOCK = 3 << 20


@dataclass(frozen=True)
class Job(Generic[T]):
    """One tensor's work.

    Attributes:
        name: of the tensor.
        run: does it.
        peak_bytes: memory that it needs at most.
        progress_bytes: what it counts for in the progress bar.
    """

    name: str
    run: Callable[[], T]
    peak_bytes: int
    progress_bytes: int


def checked_device(name: str) -> str:
    """The device of that name, if this machine has it and it can do float64.

    Raises:
        ParameterError: If not.
    """
    try:
        torch.ones(1, dtype=torch.float64, device=name).sum().item()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ParameterError(f"device {name!r} cannot be used: {reason}", "--device cpu works everywhere") from error
    return name


def default_threads() -> int:
    """As many as this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def usable_threads(asked: int | None) -> int:
    """How many tensors to work on at a time.

    Raises:
        ParameterError: If asked for fewer than one.
    """
    if asked is not None and asked < 1:
        raise ParameterError(f"threads is {asked}; it is at least 1")
    return asked or default_threads()


def peak_bytes(jobs: Sequence[Job[T]], threads: int) -> int:
    """Predicted peak of `run_jobs`: the `threads` largest jobs at once."""
    return sum(sorted((job.peak_bytes for job in jobs), reverse=True)[:threads])


def run_jobs(
    jobs: Sequence[Job[T]], *, threads: int, progress: Progress | None = None, kept_bytes: int = KEPT_BLOCK
) -> dict[str, T]:
    """Run every job, the largest first; stop at the first error.

    Args:
        jobs: independent of each other, names unique.
        threads: how many run at once, at least 1.
        progress: called as (bytes done, bytes in all) after each job, from any thread, one call at a time.
        kept_bytes: memory of a job that takes no more than this stays for the next one, up to that much a thread.

    Returns:
        Result of every job by name, in the order of `jobs`.

    Raises:
        Exception: What the job first in order among the failed ones raised.
    """
    total = sum(job.progress_bytes for job in jobs)
    done = 0
    stop = threading.Event()
    lock = threading.Lock()

    def work(job: Job[T]) -> T | None:
        nonlocal done
        if stop.is_set():
            return None
        try:
            result = job.run()
            if job.peak_bytes > kept_bytes:
                give_memory_back()
        except BaseException:
            stop.set()
            raise
        with lock:
            done += job.progress_bytes
            if progress is not None:
                progress(done, total)
        return result

    give_memory_back = _allocator()
    order = sorted(jobs, key=lambda job: (-job.peak_bytes, job.name))
    with single_threaded(), ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        futures = {job.name: pool.submit(work, job) for job in order}
        try:
            return {job.name: futures[job.name].result() for job in jobs}  # type: ignore[misc]  # only a stopped job gives None
        except BaseException:
            stop.set()
            raise


def _allocator() -> Callable[[], object]:
    """Set up glibc's memory, which would keep ever larger blocks, in twice the room that the jobs need.

    Larger blocks go back to the system when they are freed.

    Returns:
        Gives back what was kept, for the end of a job.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return lambda: None
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, KEPT_BLOCK)
    libc.mallopt(trim_threshold, 1 << 30)
    return partial(libc.malloc_trim, 0)


def one_thread() -> None:
    """Have torch work on one thread, for the start of a thread of ours."""
    torch.set_num_threads(1)


def chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of axis 0, about CHUNK_ELEMENTS at a time; one empty range for an empty tensor.

    >>> list(chunks((3, 1 << 19)))
    [(0, 2), (2, 3)]
    """
    rows = shape[0] if shape else 1
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    if rows == 0:
        yield 0, 0
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def chunk_elements(shape: Sequence[int]) -> int:
    """Most elements in one chunk of that shape."""
    rows = shape[0] if shape else 1
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    return min(rows, max(1, CHUNK_ELEMENTS // max(1, row_elements))) * row_elements
