"""Experts folded by many machines, or weighed anew: the bytes are those of one process, which holds the state.

    lock -> pass -> parts -> tasks write files of the new generation in place -> checks, receipt, ledger

Every task opens base, experts and state for itself, from the same files, folds its tensors, and answers with digests
and squares. What is made of those, who is refused and what is committed is `continual.changing`'s, as without a
cluster. All machines must see base, experts and state at the same paths.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from merganser.checkpoints.overlap import stamp
from merganser.checkpoints.placed import Place, PlacedWriter
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from merganser.continual.changing import How, arrivals, set_weight, take_in, weighing
from merganser.continual.entries import check_weight, new_entries
from merganser.continual.ledger import Contributor, read_base_record, read_ledger
from merganser.continual.passing import Outcome, Pass, Result
from merganser.continual.stream import Progress, peak_bytes, run_jobs
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_tasks import Handout, Limits, Tasks, threads_of
from merganser.merging.cluster_worker import Failure, attempted, flush, refuse_missing, refuse_other
from merganser.version import __version__


@dataclass(frozen=True)
class FoldWork:
    """What all tasks of a pass have in common.

    Attributes:
        state: folder of the state.
        entries: of the experts that come in.
        base: where the base is, if it has moved.
        key: of the pass, which a task's own must have too.
        cwd: folder that relative references start from.
        folder: temporary folder of the new generation, with its files laid out.
        target: what it becomes.
        threads: tensors at a time.
        expert: that is in, and gets another weight.
        weight: which; None for one that goes out.
    """

    state: str
    entries: tuple[Contributor, ...]
    base: str | None
    key: str
    cwd: str
    folder: str
    target: str
    threads: int
    expert: str | None = None
    weight: float | None = None

    def step(self) -> Pass:
        """The pass, opened here."""
        state = Path(self.state)
        ledger, record = read_ledger(state), read_base_record(state)
        if self.expert is not None:
            return weighing(state, ledger, record, self.expert, self.weight, base=self.base)[0]
        return arrivals(state, ledger, record, self.entries, base=self.base)


@dataclass(frozen=True)
class Folded:
    """What became of a part.

    Attributes:
        digests: sha256 of every slot written, by its name on disk.
        outcomes: what was seen of every tensor.
    """

    digests: Mapping[str, str]
    outcomes: Mapping[str, Outcome]


def fold_part(work: FoldWork, part: Part, places: Mapping[str, Place]) -> Folded | Failure:
    """Fold the tensors of a part into their places, and have them on disk.

    Args:
        work: the pass.
        part: of it.
        places: of the slots of the part's tensors.
    """

    def folded() -> Folded:
        folder, target = Path(work.folder), Path(work.target)
        refuse_missing(folder, part.files)
        step = work.step()
        refuse_other(key_of_pass(step), work.key)
        writer = PlacedWriter(folder, target, places)
        names = frozenset(part.names)
        outcomes = run_jobs([job for job in step.jobs(writer) if job.name in names], threads=work.threads)
        flush(folder, part.files, target)
        return Folded(writer.digests(), outcomes)

    return attempted(work.cwd, part.label, folded)


def add_on(
    tasks: Tasks,
    state: str | Path,
    experts: Sequence[str | Path],
    *,
    weight: float = 1.0,
    name: str | None = None,
    ignore: Sequence[str] = (),
    rename: Sequence[str] = (),
    allow_nonfinite: bool = False,
    allow_distant: bool = False,
    base: str | Path | None = None,
    limits: Limits | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    fold: Callable[..., Folded | Failure] = fold_part,
) -> tuple[Contributor, ...]:
    """Take in experts in order, in one pass, by tasks that each write whole files of the new state.

    Args:
        tasks: who does the work.
        state: folder of the fold, which this process holds for as long as it takes.
        experts: as for `Fold.add_all`, and so the others that it has too.
        weight: factor of their changes.
        name: for one expert only.
        ignore: patterns of tensor names to leave out.
        rename: prefixes to replace.
        allow_nonfinite: count NaN and infinity as unchanged.
        allow_distant: accept a change that is larger than the base.
        base: where the base is, if it has moved.
        limits: of the work; `memory_bytes` does not count here.
        shard_bytes: size in bytes at which the next file is begun; no more tasks than files work at a time.
        progress: called as (bytes done, bytes in all).
        fold: what a task does.

    Returns:
        The ledger's new entries.

    Raises:
        ParameterError: If no machine has room for a task.
        ClusterError: If workers were lost too often, or are not like each other; the state is as it was.
        MerganserError: As `Fold.add_all`; the state is as it was.
    """
    state = Path(state)
    check_weight(read_ledger(state), weight)
    entries = tuple(new_entries(experts, weight, name, ignore, rename, allow_nonfinite))
    work = FoldWork(str(state), entries, None if base is None else str(base), "", os.getcwd(), "", "", 1)
    run = partial(_handed, tasks, work, limits or Limits(), shard_bytes, progress, fold)
    return take_in(state, entries, How(base=base, run=run), allow_distant=allow_distant)[1]


def set_weight_on(
    tasks: Tasks,
    state: str | Path,
    expert: str | Path,
    weight: float | None,
    *,
    base: str | Path | None = None,
    limits: Limits | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
    fold: Callable[..., Folded | Failure] = fold_part,
) -> Contributor:
    """Give an expert another weight, or take it out, by tasks that each write whole files of the new state.

    Args:
        tasks: who does the work.
        state: folder of the fold, which this process holds for as long as it takes.
        expert: its name in the ledger, or where it is now if it has moved.
        weight: the new factor of its change; None takes it out.
        base: where the base is, if it has moved.
        limits: of the work; `memory_bytes` does not count here.
        shard_bytes: size in bytes at which the next file is begun; no more tasks than files work at a time.
        progress: called as (bytes done, bytes in all).
        fold: what a task does.

    Returns:
        Its new entry, or the old one if it is out.

    Raises:
        ParameterError: If no machine has room for a task.
        ClusterError: If workers were lost too often, or are not like each other; the state is as it was.
        MerganserError: As `Fold.reweight` and `Fold.remove`; the state is as it was.
    """
    state = Path(state)
    where = None if base is None else str(base)
    work = FoldWork(str(state), (), where, "", os.getcwd(), "", "", 1, str(expert), weight)
    run = partial(_handed, tasks, work, limits or Limits(), shard_bytes, progress, fold)
    return set_weight(state, expert, weight, How(base=base, run=run))[1]


def _handed(
    tasks: Tasks,
    work: FoldWork,
    limits: Limits,
    shard_bytes: int,
    progress: Progress | None,
    fold: Callable[..., Folded | Failure],
    step: Pass,
) -> Result:
    """A pass done by tasks, but for its commit."""
    with step.begun(shard_bytes) as writer:
        jobs = step.jobs()
        files = _files(step, writer)
        threads = threads_of(tasks, limits, len({*files.values()}))
        handout = Handout(
            tasks,
            {job.name: job.progress_bytes for job in jobs},
            files,
            threads=threads,
            peak_bytes=peak_bytes(jobs, threads),
            limits=limits,
            progress=progress,
            folder=writer.folder,
        )
        folder, target = str(writer.folder.absolute()), str(writer.target)
        shared = tasks.share(
            replace(work, key=key_of_pass(step), folder=folder, target=target, threads=threads),
        )
        outcomes: dict[str, Outcome] = {}

        def start(part: Part) -> Any:
            places = {slot: writer.places[slot] for name in part.names for slot in step.slots(name)}
            return handout.start(fold, shared, part, places)

        def done(_: Part, result: Folded) -> None:
            for slot, digest in result.digests.items():
                writer.take(slot, digest)
            outcomes.update(result.outcomes)

        handout.run(start, done)
        return step.result(writer, outcomes)


def key_of_pass(step: Pass) -> str:
    """One line that stands for a pass: the state, who comes in and how, and the files as they are now."""
    hashed = hashlib.sha256(__version__.encode())
    hashed.update(step.ledger.model_dump_json().encode())
    hashed.update(step.record.model_dump_json().encode())
    for a in step.arrivals:
        parts = a.expert.ref, sorted(a.found.items()), a.factor, a.statistic_factor, a.t, a.allow_nonfinite
        hashed.update(repr(parts).encode())
    sums = [str(step.state / step.ledger.sums)] if step.ledger.sums is not None else []
    hashed.update(stamp([step.base.ref, *sums, *(a.expert.ref for a in step.arrivals)]).encode())
    return hashed.hexdigest()


def _files(step: Pass, writer: CheckpointWriter) -> dict[str, str]:
    """File of every tensor: that of its slots, which lie together; what has none goes with the one before it."""
    file = min(path.name for path in writer.folder.glob("*.safetensors"))
    found: dict[str, str] = {}
    for name in step.record.roles:
        if slots := step.slots(name):
            file = writer.files[slots[0]]
        found[name] = file
    return found
