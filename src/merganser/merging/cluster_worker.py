"""What tasks of every kind have in common, on whatever machine they run: where they work, and what a failure is.

Errors go back as plain words, so that they are raised where the work was asked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from merganser import errors
from merganser.checkpoints.writer import sync
from merganser.errors import ClusterError, MerganserError, OutputError

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """An error of a task.

    Attributes:
        kind: name of the class in `merganser.errors`.
        message: what and where, with the machine.
        hint: what to do.
    """

    kind: str
    message: str
    hint: str | None

    def error(self) -> MerganserError:
        """The error."""
        kind: type[MerganserError] = getattr(errors, self.kind, ClusterError)
        return kind(self.message, self.hint)


def attempted(cwd: str, label: str, do: Callable[[], T]) -> T | Failure:
    """Do a part where relative references mean what they mean to the one who asked.

    Args:
        cwd: folder that relative references start from.
        label: of the part, for people.
        do: the part.
    """
    host = socket.gethostname()
    try:
        with _working_in(cwd):
            return do()
    except MerganserError as error:
        return Failure(type(error).__name__, f"{error.message} (on {host})", error.hint)
    except Exception as error:
        return Failure(
            "ClusterError", f"{label} failed with {type(error).__name__}: {error} (on {host})", None
        )  # a defect, of ours or of what we use: its kind and words, not its trace


def refuse_other(key: str, expected: str) -> None:
    """Refuse to work on anything but what was asked for.

    Args:
        key: what this machine would do, as one line.
        expected: what is to be done.

    Raises:
        ClusterError: If they differ.
    """
    if key != expected:
        raise ClusterError(
            "other files, or another version of merganser, than where this was begun",
            "all machines need the same version, and the same models at the same paths",
        )


def refuse_missing(folder: Path, files: Sequence[str]) -> None:
    """Refuse to write to files that were not laid out where this machine looks for them.

    Raises:
        ClusterError: Names the first.
    """
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ClusterError(
            f"{folder / missing[0]} is not there",
            "models and output must lie on a file system that all machines see, at the same paths",
        )


def flush(folder: Path, files: Sequence[str], target: Path) -> None:
    """Have files on disk.

    Args:
        folder: where they are.
        files: their names.
        target: what the folder becomes, for errors.

    Raises:
        OutputError: If the disk is full.
    """
    try:
        for file in files:
            sync(folder / file)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}") from error


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """Where a folder cannot be entered, opening what lies in it says so."""
    before = os.getcwd()
    with suppress(OSError):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
