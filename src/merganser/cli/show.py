"""What commands share: progress bars, sizes for people, the console."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where results go: as they are, since brackets and colons stand in names; never wrapped when it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False, emoji=False)


@contextmanager
def progress_bar(
    label: str, *, quiet: bool = False, unit: str = "bytes"
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar by bytes, or by something else, on stderr; shown on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(count: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "group"), counted(2, "batch"), counted(3, "axis")
    ('1 group', '2 batches', '3 axes')
    """
    if count == 1:
        return f"1 {thing}"
    plural = thing[:-2] + "es" if thing.endswith("is") else thing + ("es" if thing.endswith("ch") else "s")
    return f"{count} {plural}"


def size(count: float) -> str:
    """Bytes for people.

    >>> size(999), size(1_500_000)
    ('999 B', '1.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
