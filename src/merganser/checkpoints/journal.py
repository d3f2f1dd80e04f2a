"""A journal in a folder that is being written: what the work is, and which tensors are there, a line each.

A process that dies leaves it behind, and the next one of the same work goes on from it.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

JOURNAL_NAME = ".journal"


class Journal:
    """The journal of one folder.

    Args:
        folder: where it is.
        key: the work, as one line.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path, self._key, self._lock = folder / JOURNAL_NAME, key, threading.Lock()

    def begin(self, entries: Mapping[str, str]) -> None:
        """Write it anew: digests of tensors by name."""
        lines = [self._key, *(_line(name, digest) for name, digest in entries.items())]
        self._path.write_text("\n".join(lines) + "\n", "utf-8")

    def add(self, name: str, digest: str) -> None:
        """One more tensor is written."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(_line(name, digest) + "\n")

    def entries(self) -> dict[str, str]:
        """Digests by name; a line that was cut off does not count."""
        found: dict[str, str] = {}
        *lines, _ = self._path.read_text("utf-8").split("\n")[1:]
        for line in lines:
            digest, _, quoted = line.partition(" ")
            try:
                found[json.loads(quoted)] = digest
            except ValueError:
                continue
        return found

    def end(self) -> None:
        """Remove it: the folder is whole."""
        self._path.unlink()


def _line(name: str, digest: str) -> str:
    return f"{digest} {json.dumps(name)}"


def adopted(target: Path, key: str) -> tuple[Path, int] | None:
    """A leftover beside `target` of the same work, whose writer is dead, and the descriptor of its lock."""
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*")):
        try:
            lock = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (leftover / JOURNAL_NAME).read_text("utf-8").splitlines()[:1] == [key]:
                return leftover, lock
        except (OSError, ValueError):  # its writer lives, or it has no journal
            pass
        os.close(lock)
    return None
