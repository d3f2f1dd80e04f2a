"""Files that are whole or not there, and on disk once they are written."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from merganser.errors import OutputError


def write(path: Path, content: str | bytes) -> None:
    """Write a file beside, have it on disk, and rename it; its folder is made.

    Raises:
        OutputError: If it cannot be written; what was there is as it was.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unwritten(path, error) from error


def append(path: Path, text: str) -> None:
    """Write at the end of a file, and have it on disk.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> OutputError:
    """The error of a file that cannot be written, and what to do about it where there is something."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "make room, and run again with --resume" if full else None
    return OutputError(f"{path} cannot be written: {error.strerror}", hint)
