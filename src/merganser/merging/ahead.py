"""Reading ahead: while some rows of a tensor are merged, another thread reads, checks and digests the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.continual.stream import default_threads, one_thread
from merganser.merging.held import Rows

if TYPE_CHECKING:
    from merganser.merging.merged import Merged
    from merganser.merging.plan import Piece

Read = Callable[[Rows], list[Tensor]]


class Ahead:
    """Rows of one tensor of several models, each read before it is asked for where rows are asked for in turn.

    Args:
        pool: who reads ahead.
        read: some rows, or all -> the tensors; what it raises shows when these rows are asked for.
        stop: rows in all.
    """

    def __init__(self, pool: Executor, read: Read, stop: int) -> None:
        self._pool, self._read, self._stop = pool, read, stop
        self._end = 0
        self._next: tuple[Rows, Future[list[Tensor]]] | None = None
        self._lock = threading.Lock()

    def __call__(self, rows: Rows) -> list[Tensor]:
        """The tensors' rows."""
        with self._lock:
            found, self._next = self._next, None
        stored = found[1].result() if found is not None and found[0] == rows else self._read(rows)
        if rows is not None:
            self._begin_next(*rows)
        return stored

    def _begin_next(self, start: int, stop: int) -> None:
        with self._lock:
            in_turn, self._end = start == self._end, stop
            following = (stop, min(2 * stop - start, self._stop))
            if in_turn and following[0] < following[1] and self._next is None:
                self._next = following, self._pool.submit(self._read, following)


class Readers:
    """Who reads what tensors are made of: whoever asks, or, where there is a pool, one of its threads ahead of him."""

    def __init__(self, pool: Executor | None = None) -> None:
        self._pool = pool
        self._known: dict[tuple[Piece, ...], Ahead] = {}

    def of(self, pieces: tuple[Piece, ...], read: Read, stop: int) -> Read:
        """The reader of some pieces of one tensor; arguments as of `Ahead`."""
        return read if self._pool is None else self._known.setdefault(pieces, Ahead(self._pool, read, stop))

    def forget(self, pieces: tuple[Piece, ...]) -> None:
        """Drop the readers of these pieces, together or one at a time."""
        for known in tuple(self._known):
            if {*known} <= {*pieces}:
                self._known.pop(known, None)


@contextmanager
def reading_ahead(stages: Sequence[Merged], threads: int) -> Iterator[None]:
    """Within it, merges read ahead, if there are processors to spare: it costs a tenth more of their time.

    Args:
        stages: the merges.
        threads: that merge.
    """
    spare = default_threads() - threads
    if spare < 1:
        yield
        return
    with ThreadPoolExecutor(min(threads, spare), initializer=one_thread) as pool:
        for stage in stages:
            stage.readers = Readers(pool)
        try:
            yield
        finally:
            for stage in stages:
                stage.readers = Readers()
