"""Folders above one that is to be written: made where they lack, and taken away again if nothing comes of it."""

from __future__ import annotations

from pathlib import Path


def make_parents(target: Path) -> list[Path]:
    """Make the folders that `target` lies in.

    Returns:
        Those that were not there, the innermost first.

    Raises:
        OSError: If one cannot be made; then none of them is there.
    """
    missing: list[Path] = []
    for folder in target.parents:
        if folder.exists():
            break
        missing.append(folder)
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.insert(0, folder)
    except OSError:
        remove_parents(made)
        raise
    return made


def remove_parents(made: list[Path]) -> None:
    """Remove folders of `make_parents`, up to the first that holds something."""
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            return
