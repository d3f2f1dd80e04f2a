"""Write a checkpoint folder so that it is there whole or not at all.

All bytes go to a temporary sibling of the target; everything is flushed to disk; one rename makes it real. A process
killed at any moment leaves the target as it was, and a leftover that the next writer to that place removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from merganser.checkpoints.journal import Journal, adopted
from merganser.checkpoints.parents import make_parents, remove_parents
from merganser.checkpoints.placed import Place, PlacedWriter
from merganser.checkpoints.shards import plan_shards
from merganser.errors import MerganserError, OutputError
from merganser.types import ITEM_BYTES, TensorInfo

RECEIPT_NAME = "merganser.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
FLUSH_BYTES = 1 << 26


def refuse_taken(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a place for a folder that is taken; nothing is written.

    Args:
        target: where the folder shall be.
        overwrite: whether a folder that was made here and is there already may be replaced.

    Raises:
        OutputError: If it may not be, or is not a folder.
    """
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise OutputError(f"{target} exists and is not a folder")
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                hint = "choose another name; merge, export and convert can also --overwrite"
                raise OutputError(f"{target} exists", hint)
            if not (target / RECEIPT_NAME).is_file():
                raise OutputError(f"{target} holds no {RECEIPT_NAME}: it was not made here", "remove it yourself")
        if target.is_dir() and target.samefile("."):  # its place would be taken by a new folder under its name
            raise OutputError(f"{target} is the folder that this runs in", "name another, or run it elsewhere")
    except OSError as error:
        raise OutputError(f"{target.parent} cannot be written: {error.strerror}") from error


class FolderTransaction:
    """A folder that appears at `target` by one rename when `commit` is called, and never otherwise.

    Args:
        target: where the folder shall be.
        overwrite: whether a folder that is there already may be replaced; it stays until the rename.
        resume: what is written; a leftover of the same, whose writer is dead, is gone on with.

    Attributes:
        resumed: whether `folder` is such a leftover.

    Raises:
        OutputError: If the target exists and may not be replaced, is not a folder, or cannot be written.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, resume: str | None = None) -> None:
        self.target, self._overwrite = target, overwrite
        self._parents: list[Path] = []
        try:
            refuse_taken(target, overwrite=overwrite)
            self._parents = make_parents(target)
            leftover = adopted(target, resume) if resume is not None else None
            self.resumed = leftover is not None
            remove_leftovers(target)
            self.folder, self._lock = leftover or _locked_sibling(target)
        except OSError as error:
            remove_parents(self._parents)
            raise OutputError(f"{target.parent} cannot be written: {error.strerror}") from error

    def commit(self) -> None:
        """Flush, then rename."""
        for path in (*sorted(self.folder.rglob("*")), self.folder):
            sync(path)
        try:
            self.folder.rename(self.target)  # replaces an empty folder too; to look first would be too early
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not self._overwrite:
                raise OutputError(f"{self.target} appeared meanwhile", "choose another name") from error
            _exchange(self.folder, self.target)
        sync(self.target.parent)
        shutil.rmtree(self.folder, ignore_errors=True)  # the old content, if any; what stays is the next writer's
        os.close(self._lock)

    def abort(self, *, leave: bool = False) -> None:
        """Remove what was written, or leave it to be gone on with."""
        os.close(self._lock)
        if not leave:
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_parents(self._parents)


def _locked_sibling(target: Path) -> tuple[Path, int]:
    """A new temporary folder beside `target`, and the descriptor whose lock tells that its writer lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer took it for a leftover before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            os.fchmod(lock, 0o777 & ~_umask())
            return folder, lock
        os.close(lock)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step, so that there is no moment without `other`.

    Raises:
        OutputError: If this system or file system cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):  # Linux
        at_cwd, exchange = -100, 2
        failed = libc.renameat2(at_cwd, names[0], at_cwd, names[1], exchange)
    elif hasattr(libc, "renamex_np"):  # macOS
        failed = libc.renamex_np(names[0], names[1], 2)  # RENAME_SWAP
    else:
        failed = -1
    if failed:
        raise OutputError(f"{other} cannot be replaced in one step on this file system", "remove it first")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_sync(path: Path) -> None:
    """Flush early; an error shows again in the flush that counts, and a file that is gone needs none."""
    with contextlib.suppress(OSError):
        sync(path)


def remove_leftovers(target: Path) -> None:
    """Remove temporary siblings of `target` whose writer is dead; a live writer holds a lock on its own."""
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*")):
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its writer has just ended
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(leftover, ignore_errors=True)  # another writer may be at it too
        finally:
            os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def peak_memory() -> int:
    """Most resident memory in bytes of this process so far, for its receipt."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CheckpointWriter:
    """Writes the tensors of one checkpoint in any order, from any thread, whole or by rows.

    Used as a context manager: leaving it without `commit` removes everything.

    Args:
        target: folder to make.
        infos: header of every tensor, which fixes the layout; written sorted by name.
        aliases: tied names, declared in the metadata: alias -> name.
        shard_bytes: size in bytes at which the next file is begun; a larger tensor gets a file of its own.
        overwrite: replace a folder that is there.
        stem: first part of the files' names.
        resume: what is written, as one line: an interrupted writer leaves its folder to the next one of the same
            line, which finds in `done` what is there already.
        together: name -> key; tensors of one key lie in one file.

    Attributes:
        done: names of tensors that an earlier writer wrote; their bytes have been compared with their digests.

    Raises:
        OutputError: If the target may not be written, or the disk lacks the room.
    """

    def __init__(
        self,
        target: Path,
        infos: Mapping[str, TensorInfo],
        *,
        aliases: Mapping[str, str] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        overwrite: bool = False,
        stem: str = "model",
        resume: str | None = None,
        together: Callable[[str], str] | None = None,
    ) -> None:
        if "__metadata__" in infos or "format" in (aliases or {}):
            raise OutputError(
                f"{target}: safetensors cannot hold a tensor called __metadata__, or a tied one called format",
                "rename it",
            )
        self.target = target
        self.infos = {name: infos[name] for name in sorted(infos)}
        self._aliases, self._stem = dict(aliases or {}), stem
        self._total_bytes = sum(info.nbytes for info in self.infos.values())
        self._transaction = FolderTransaction(target, overwrite=overwrite, resume=resume)
        self._journal = Journal(self.folder, resume) if resume is not None else None
        try:
            free = shutil.disk_usage(self._transaction.folder).free
            if free < self._total_bytes and not self._transaction.resumed:
                raise OutputError(f"{target} needs {self._total_bytes:,} bytes, and the disk has {free:,} free")
            self._placed = PlacedWriter(self.folder, target, self._open_files(shard_bytes, together))
            self.done: frozenset[str] = self._recovered() if self._transaction.resumed else frozenset()
            if self._journal is not None:
                digests = self._placed.digests()
                self._journal.begin({name: digests[name] for name in self.done})
        except OSError as error:
            self._transaction.abort()
            raise OutputError(f"{target} cannot be written: {error.strerror}") from error
        except BaseException:
            self._transaction.abort()
            raise
        self._lock = threading.Lock()
        self._unflushed = 0
        self._flusher: threading.Thread | None = None
        self._open = True

    @property
    def folder(self) -> Path:
        """The temporary folder; files put here become part of the checkpoint."""
        return self._transaction.folder

    @property
    def places(self) -> Mapping[str, Place]:
        """Where the bytes of every tensor go, in files that are there: another process may put them (see `take`)."""
        return self._placed.places

    def _open_files(self, shard_bytes: int, together: Callable[[str], str] | None) -> dict[str, Place]:
        shards = plan_shards(self.infos, shard_bytes, together)
        places: dict[str, Place] = {}
        self.files: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            tail = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            path = self.folder / f"{self._stem}{tail}.safetensors"
            metadata = {"format": "pt"} | {a: n for a, n in sorted(self._aliases.items()) if n in names}
            entries: dict[str, Any] = {"__metadata__": metadata}
            position = 0
            # Larger items first keeps every tensor aligned to its item size.
            for name in sorted(names, key=lambda n: (-ITEM_BYTES[self.infos[n].dtype], n)):
                info = self.infos[name]
                entries[name] = {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "data_offsets": [position, position + info.nbytes],
                }
                places[name] = Place(info, path.name, position)
                self.files[name] = path.name
                position += info.nbytes
            text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            start = 8 + len(text)
            with path.open("r+b" if path.exists() else "wb") as file:  # a resumed file keeps its data
                file.write(struct.pack("<Q", len(text)) + text)
                file.truncate(start + position)
            for name in names:
                places[name] = replace(places[name], offset=start + places[name].offset)
        return places

    def put(self, name: str, tensor: Tensor, start_row: int = 0) -> None:
        """Write a tensor, or the rows of it from `start_row` on; rows of one tensor come in order.

        Raises:
            OutputError: If the disk is full.
            NonFiniteError: If a finite value does not fit the tensor's type.
        """
        count = self._placed.put(name, tensor, start_row)
        if self._journal is not None and self._placed.is_whole(name):
            self._journal.add(name, self._placed.digest(name))
        self._flush_behind(self.folder / self.files[name], count)

    def take(self, name: str, digest: str) -> None:
        """Count a tensor as written that another process put in its place.

        Args:
            name: of the tensor.
            digest: sha256 of its bytes.
        """
        self._placed.take(name, digest)
        if self._journal is not None:
            self._journal.add(name, digest)

    def _recovered(self) -> frozenset[str]:
        """Tensors of the journal whose bytes are there: a machine that failed may have lost some."""
        assert self._journal is not None
        for name, digest in self._journal.entries().items():
            place = self._placed.places[name]
            left, hashed = place.info.nbytes, hashlib.sha256()
            with (self.folder / place.file).open("rb") as file:
                file.seek(place.offset)
                while left and (block := file.read(min(left, FLUSH_BYTES))):
                    hashed.update(block)
                    left -= len(block)
            if hashed.hexdigest() == digest:
                self._placed.take(name, digest)
        return frozenset(name for name in self.infos if self._placed.is_begun(name))

    def _flush_behind(self, path: Path, count: int) -> None:
        """Begin to flush what is written while the next is computed, so that the commit need not wait for all of it."""
        with self._lock:
            self._unflushed += count
            due = self._unflushed >= FLUSH_BYTES and (self._flusher is None or not self._flusher.is_alive())
            if due:
                self._unflushed = 0
                self._flusher = threading.Thread(target=_try_sync, args=(path,), daemon=True)
                self._flusher.start()

    def digests(self) -> dict[str, str]:
        """sha256 of every tensor's bytes."""
        return self._placed.digests()

    def commit(self, receipt: Mapping[str, Any], companions: Iterable[Path] = ()) -> None:
        """Add index, companions and receipt, flush all to disk, and rename the folder into place.

        Raises:
            OutputError: If a companion cannot be copied or the rename fails.
        """
        if unwritten := [name for name in self.infos if not self._placed.is_whole(name)]:
            raise ValueError(f"never written in full: {unwritten[:3]}")
        try:
            if len(set(self.files.values())) > 1:
                index = {
                    "metadata": {"total_size": self._total_bytes},
                    "weight_map": self.files | {a: self.files[n] for a, n in sorted(self._aliases.items())},
                }
                write_json(self.folder / f"{self._stem}.safetensors.index.json", index)
            for path in companions:
                shutil.copyfile(path, self.folder / path.name)
            write_json(self.folder / RECEIPT_NAME, receipt)
            if self._journal is not None:
                self._journal.end()
            self._transaction.commit()
        except OSError as error:
            raise OutputError(f"{self.target} cannot be written: {error}") from error
        self._open = False

    def abort(self, *, leave: bool = False) -> None:
        """Remove what was written, or leave it to be gone on with; nothing once it was committed."""
        if self._open:
            self._open = False
            self._transaction.abort(leave=leave)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort(leave=self._journal is not None and isinstance(error, KeyboardInterrupt | MerganserError))
