"""Where a command may write a file of results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path


def check_file(
    path: Path, inputs: Sequence[str], *, overwrite: bool, own: Callable[[object], bool] | None = None
) -> None:
    """Refuse a file that cannot be written, that is read, or that is there and was not made by this command.

    Args:
        path: of the file.
        inputs: what the command reads: files, folders, and code as FILE:NAME.
        overwrite: replace what is there, if it is not read.
        own: whether the content of a JSON file is what this command writes.

    Raises:
        OutputError: If that is so.
    """
    from merganser.errors import OutputError

    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: " + ("it is a folder" if path.is_dir() else "no such folder"))
    if not path.exists():
        return
    place = path.resolve()
    for name in inputs:
        given = Path(name) if Path(name).exists() else Path(name.rpartition(":")[0] or name)
        if given.exists() and place.is_relative_to(given.resolve()):
            raise OutputError(f"{path} is read, or lies in {given}, which is", "name another file")
    if not overwrite and not (own is not None and _holds(path, own)):
        raise OutputError(f"{path} exists, and was not made by this command", "name another file, or add --overwrite")


def _holds(path: Path, own: Callable[[object], bool]) -> bool:
    try:
        return own(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return False
