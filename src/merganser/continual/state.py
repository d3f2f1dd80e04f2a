"""A fold's folder on disk: who may write to it, what it holds, and the one rename that moves it on.

    STATE/ledger.json      who is in, with what settings; replacing it is the commit
    STATE/base.json        digests and roles of the base's tensors, written once
    STATE/sums-00007/      the slots of generation 7, an ordinary checkpoint; those of one tensor lie in one file

A new generation is written beside the old one and becomes real when the ledger names it; whatever the ledger does not
name is rubbish of an interrupted run, which the next writer removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from merganser.checkpoints.folder import open_folder
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, RECEIPT_NAME, CheckpointWriter
from merganser.continual.ledger import LEDGER_NAME, Ledger, read_ledger, write_record
from merganser.errors import CheckpointError, OutputError, StateError
from merganser.numerics import raw_bytes
from merganser.types import TensorInfo

#: Folders that the package makes in a state: a generation, and the temporary sibling that it is written to.
_GENERATION = re.compile(r"sums-\d{5,}|\.sums-\d{5,}\.partial-.+")


@contextmanager
def locked(state: Path, *, write: bool) -> Iterator[Ledger]:
    """Hold a state for reading or for writing, and read its ledger.

    Raises:
        StateError: If the folder is no state, or another process holds it.
    """
    read_ledger(state)
    descriptor = os.open(state, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another process is working on {state}", "wait for it to end") from None
        ledger = read_ledger(state)
        if write:
            _remove_rubbish(state, ledger)
        yield ledger
    finally:
        os.close(descriptor)


def _remove_rubbish(state: Path, ledger: Ledger) -> None:
    """Roll back what an interrupted run left: generations that the ledger does not name."""
    try:
        for path in sorted(state.iterdir()):
            if _GENERATION.fullmatch(path.name) and path.name != ledger.sums and path.is_dir():
                shutil.rmtree(path)
        for path in state.glob(".*.json.new"):
            path.unlink()
    except OSError as error:
        raise OutputError(f"{state} cannot be written: {error.strerror}") from error


class CheckedSums:
    """The current sums, whose bytes are compared with their receipt as they are read, each tensor once from its start.

    Args:
        folder: of the generation.
        expected: header of every slot that it must hold.

    Raises:
        CheckpointError: If a slot is missing, has another shape or type, or the receipt is damaged.
    """

    def __init__(self, folder: Path, expected: Mapping[str, TensorInfo]) -> None:
        self.source = open_folder(folder, str(folder))
        self.infos = self.source.infos
        for name in sorted({*expected, *self.infos}):
            if self.infos.get(name) != expected.get(name):
                raise CheckpointError(f"{folder}: {name} is {self.infos.get(name)}, and should be {expected.get(name)}")
        try:
            self.digests: dict[str, str] = json.loads((folder / RECEIPT_NAME).read_text("utf-8"))["outputs"]
            if set(self.digests) != set(expected):
                raise ValueError("it lists other tensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / RECEIPT_NAME} is damaged: {error}") from error
        self._hashes = {name: hashlib.sha256() for name in expected}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a slot, or the next rows of it.

        Raises:
            CheckpointError: If the bytes are not those that were written.
        """
        x = self.source.read(name, rows)
        self._hashes[name].update(raw_bytes(x))
        ended = rows is None or rows[1] == self.infos[name].rows
        if ended and self._hashes[name].hexdigest() != self.digests[name]:
            raise CheckpointError(f"{name} of {self.source.ref} is damaged", "put the state back from a copy")
        return x


def open_sums(state: Path, ledger: Ledger, expected: Mapping[str, TensorInfo]) -> CheckedSums | None:
    """The current sums, or None before the first expert.

    Args:
        state: folder of the state.
        ledger: of the state.
        expected: header of every slot.

    Raises:
        StateError: If they are missing.
        CheckpointError: If they are damaged.
    """
    if ledger.sums is None:
        return None
    folder = state / ledger.sums
    if not folder.is_dir():
        raise StateError(f"{folder} is missing, and {LEDGER_NAME} names it")
    return CheckedSums(folder, expected)


def next_generation(
    state: Path, ledger: Ledger, infos: Mapping[str, TensorInfo], shard_bytes: int = DEFAULT_SHARD_BYTES
) -> CheckpointWriter:
    """A writer of the generation behind the ledger's, whose files hold all slots of a tensor or none."""
    return CheckpointWriter(
        state / f"sums-{ledger.generation + 1:05d}",
        infos,
        stem="sums",
        shard_bytes=shard_bytes,
        together=lambda slot: slot.partition("/")[2],
    )


def advance(state: Path, before: Ledger, after: Ledger) -> None:
    """Make `after` the state's ledger, in one step, and remove the generation that it replaces."""
    try:
        write_record(state, LEDGER_NAME, after)
    except OSError as error:
        raise OutputError(f"{state} cannot be written: {error.strerror}") from error
    if before.sums is not None and before.sums != after.sums:
        shutil.rmtree(state / before.sums)


def bytes_on_disk(state: Path) -> int:
    """Size in bytes of all files of a state."""
    return sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
