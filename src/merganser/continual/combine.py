"""Combine: states of sums over one base add up, so a fold can be split over machines or people."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from merganser.checkpoints.overlap import refuse_overlap
from merganser.checkpoints.writer import CheckpointWriter, FolderTransaction
from merganser.continual.kinds import kind_of
from merganser.continual.ledger import BASE_NAME, LEDGER_NAME, Ledger, read_base_record, write_record
from merganser.continual.state import CheckedSums, locked, open_sums
from merganser.continual.stream import Job, Progress, chunk_elements, chunks, run_jobs, usable_threads
from merganser.errors import ParameterError, StateError
from merganser.version import __version__


def combine(states: Sequence[Path], out: Path, *, threads: int | None = None, progress: Progress | None = None) -> None:
    """Add up states of sums into a new one, which is as if all experts had been added to it.

    Args:
        states: two or more folders, unchanged afterwards.
        out: folder to make.
        threads: tensors at a time.
        progress: called as (bytes done, bytes in all).

    Raises:
        ParameterError: If there are fewer than two states.
        StateError: If they differ in base, sums, types or roles, share an expert, or cannot be added up.
        OutputError: If `out` exists, or lies within a state, the base or an expert.
    """
    if len(states) < 2:
        raise ParameterError(f"{len(states)} state given; combining needs at least 2")
    with ExitStack() as stack:
        ledgers = [stack.enter_context(locked(state, write=False)) for state in states]
        _check(states, ledgers)
        record = read_base_record(states[0])
        first = ledgers[0]
        expected = kind_of(first.method, first.settings, first.slots).expected_slots(record, first.sums_dtype)
        opened = [open_sums(path, ledger, expected) for path, ledger in zip(states, ledgers, strict=True)]
        filled = [sums for sums in opened if sums is not None]
        refs = [c.ref for ledger in ledgers for c in ledger.contributors]
        transaction = FolderTransaction(out)
        try:
            refuse_overlap(out, [*map(str, states), *(ledger.base_ref for ledger in ledgers), *refs])
            sums = _add(filled, transaction.folder / "sums-00001", threads, progress) if filled else None
            ledger = first.model_copy(
                update={
                    "version": __version__,
                    "contributors": tuple(c for one in ledgers for c in one.contributors),
                    "generation": 1 if sums else 0,
                    "sums": sums.name if sums else None,
                }
            )
            write_record(transaction.folder, BASE_NAME, record)
            write_record(transaction.folder, LEDGER_NAME, ledger)
            transaction.commit()
        except BaseException:
            transaction.abort()
            raise


def _check(states: Sequence[Path], ledgers: Sequence[Ledger]) -> None:
    first = ledgers[0]
    if not kind_of(first.method, first.settings, first.slots).removable:
        raise StateError(f"{first.method} is sequential: its states do not add up", "use a method of sums")
    for path, ledger in zip(states[1:], ledgers[1:], strict=True):
        if ledger.base_digest != first.base_digest:
            raise StateError(f"{states[0]} and {path} stand on different bases")
        if read_base_record(path).roles != read_base_record(states[0]).roles:
            raise StateError(f"{states[0]} and {path} treat tensors differently", "init both with the same patterns")
        for field in ("method", "settings", "slots", "sums_dtype", "float64"):
            if getattr(ledger, field) != getattr(first, field):
                raise StateError(
                    f"{states[0]} and {path} differ in {field}: {getattr(first, field)}, {getattr(ledger, field)}"
                )
    seen: dict[str, str] = {}
    for path, ledger in zip(states, ledgers, strict=True):
        for entry in ledger.contributors:
            for key in (entry.digest, f"name {entry.name}"):
                if key in seen:
                    raise StateError(f"{entry.name} is in {seen[key]} and in {path}", "remove it from one of them")
                seen[key] = str(path)


def _add(sources: Sequence[CheckedSums], target: Path, threads: int | None, progress: Progress | None) -> Path:
    infos = sources[0].infos
    with CheckpointWriter(target, infos, stem="sums") as writer:

        def add(name: str) -> None:
            shape = infos[name].shape
            for start, stop in chunks(shape):
                rows = (start, stop) if shape else None
                total = sources[0].read(name, rows)
                for source in sources[1:]:
                    total = total + source.read(name, rows)
                writer.put(name, total, start)

        jobs = [Job(n, partial(add, n), 24 * chunk_elements(i.shape), i.nbytes) for n, i in infos.items()]
        run_jobs(jobs, threads=usable_threads(threads), progress=progress)
        writer.commit({"merganser": __version__, "generation": 1, "outputs": writer.digests()})
    return target
