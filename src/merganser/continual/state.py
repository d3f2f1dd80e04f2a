"""A fold's folder on disk: who may write to it, what it holds, and the one rename that moves it on.

    STATE/ledger.json      who is in, with what settings; replacing it is the commit
    STATE/base.json        digests and roles of the base's tensors, written once
    STATE/sums-00007/      the slots of generation 7, an ordinary checkpoint

A new generation is written beside the old one and becomes real when the ledger names it; whatever the ledger does not
name is rubbish of an interrupted run, which the next writer removes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from merganser.checkpoints.folder import open_folder
from merganser.checkpoints.writer import CheckpointWriter
from merganser.continual.kinds import Kind
from merganser.continual.ledger import LEDGER_NAME, BaseRecord, Ledger, read_ledger, write_record
from merganser.errors import StateError
from merganser.types import Source, TensorInfo


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
    for path in (*state.glob("sums-*"), *state.glob(".sums-*")):
        if path.name != ledger.sums:
            shutil.rmtree(path)
    for path in state.glob(".*.json.new"):
        path.unlink()


def open_sums(state: Path, ledger: Ledger) -> Source | None:
    """The current sums, or None before the first expert.

    Raises:
        StateError: If they are missing.
        CheckpointError: If they are damaged.
    """
    if ledger.sums is None:
        return None
    folder = state / ledger.sums
    if not folder.is_dir():
        raise StateError(f"{folder} is missing, and {LEDGER_NAME} names it")
    return open_folder(folder, str(folder))


def slot_infos(kind: Kind, record: BaseRecord, base: Mapping[str, TensorInfo], dtype: str) -> dict[str, TensorInfo]:
    """Header of every slot of a state, by its name on disk."""
    return {
        f"{slot}/{name}": TensorInfo(shape, dtype)
        for name, role in record.roles.items()
        for slot, shape in kind.slot_shapes(role, base[name].shape).items()
    }


def next_generation(state: Path, ledger: Ledger, infos: Mapping[str, TensorInfo]) -> CheckpointWriter:
    """A writer of the generation behind the ledger's."""
    return CheckpointWriter(state / f"sums-{ledger.generation + 1:05d}", infos, stem="sums")


def advance(state: Path, before: Ledger, after: Ledger) -> None:
    """Make `after` the state's ledger, in one step, and remove the generation that it replaces."""
    write_record(state, LEDGER_NAME, after)
    if before.sums is not None and before.sums != after.sums:
        shutil.rmtree(state / before.sums)


def bytes_on_disk(state: Path) -> int:
    """Size in bytes of all files of a state."""
    return sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
