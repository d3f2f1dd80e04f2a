"""A merge done by many machines: the bytes are those of one process, and one process makes the folder real.

    plan -> [measure: figures of whole models -> plan] -> parts -> tasks write files in place -> index, receipt, rename

The writer lays out all files of the output in its temporary folder, as ever. Tasks put tensors into them and answer
with digests, which the writer takes over as if it had written them itself, journal and all; so a merge that was begun
over Ray may be gone on with in one process, and the other way round. Nothing else differs from `merganser.merging.run`.

All machines must see models and output at the same paths.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any

from merganser.checkpoints.overlap import refuse_overlap
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, peak_memory, refuse_taken
from merganser.continual.stream import Progress, usable_threads
from merganser.errors import ParameterError
from merganser.merging.adapter_plan import AdapterMerge
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_tasks import Handout, Limits, Tasks, threads_of
from merganser.merging.cluster_work import Each, Work, Written, measure_part, write_part
from merganser.merging.cluster_worker import Failure
from merganser.merging.folding import factor, figures, measure, recall, remember, unmeasured
from merganser.merging.merged import Merged
from merganser.merging.recipe import Recipe
from merganser.merging.run import (
    files_of,
    finish,
    fitting_threads,
    job_bytes,
    key_of,
    open_writer,
    peak_bytes,
    plan_any,
)
from merganser.merging.vocabulary_rows import beneath


def merge_on(
    tasks: Tasks,
    recipes: Sequence[Recipe],
    out: Path,
    *,
    limits: Limits | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    digests: bool = True,
    progress: Progress | None = None,
    write: Callable[..., Written | Failure] = write_part,
) -> Path:
    """Merge several models into one, by tasks that each write whole files.

    Args:
        tasks: who does the work.
        recipes: as `plan_recipes` takes them.
        out: folder to make.
        limits: of the work.
        shard_bytes: size in bytes at which the next file is begun; no more tasks than files work at a time.
        resume: go on with what an interrupted run of the same plan left; leave it again when interrupted.
        overwrite: replace a folder that is there.
        digests: whether the receipt holds the sha256 of every tensor that is read.
        progress: called as (bytes done, bytes in all).
        write: what a task does.

    Returns:
        `out`.

    Raises:
        ParameterError: If no machine has room for a task, or the recipe is of adapters.
        ClusterError: If workers were lost too often, or are not like each other.
        MerganserError: If a model cannot be read or merged, or the folder not be written; then nothing is there.
    """
    began = time.perf_counter()
    merged = _planned(recipes)
    with open_writer(merged, out, shard_bytes=shard_bytes, resume=resume, overwrite=overwrite) as writer:
        recall(merged, writer.folder)
        if unmeasured(merged):
            _measure_factors(tasks, recipes, merged, limits)
            if resume:
                remember(merged, writer.folder)
        sizes = {name: moved_bytes(merged, name) for name in writer.infos if name not in writer.done}
        handout, threads = _handout(tasks, merged, sizes, writer.files, limits or Limits(), progress, writer)
        shared = tasks.share(replace(_work(recipes, merged, threads, writer.folder, out), digests=digests))
        read: dict[str, dict[str, str]] = {}
        peaks = [peak_memory()]

        def start(part: Part) -> Any:
            return handout.start(write, shared, part, {name: writer.places[name] for name in part.names})

        def done(part: Part, result: Written) -> None:
            for name in part.names:
                writer.take(name, result.digests[name])
            for ref, digests in result.read.items():
                read.setdefault(ref, {}).update(digests)
            peaks.append(result.peak_bytes)

        handout.run(start, done)
        ordered = {ref: dict(sorted(digests.items())) for ref, digests in read.items()}
        finish(merged, writer, ordered, wall_s=time.perf_counter() - began, peak_memory_bytes=max(peaks))
    return out


def refuse(recipes: Sequence[Recipe], out: Path, *, overwrite: bool = False) -> None:
    """Refuse what cannot succeed, before any worker is looked for; nothing is written.

    Args:
        recipes: as `plan_recipes` takes them.
        out: folder to make.
        overwrite: whether a folder that is there may be replaced.

    Raises:
        MerganserError: As `merge_on`.
    """
    refuse_overlap(out, list(files_of(_planned(recipes))))
    refuse_taken(out, overwrite=overwrite)


def measure_on(
    tasks: Tasks,
    recipes: Sequence[Recipe],
    each: Each,
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A figure of every tensor of a merge, before it: what a first phase measures of whole models.

    Args:
        tasks: who does the work.
        recipes: as `plan_recipes` takes them.
        each: planned merge, name of a tensor -> its figure; a function of a module that the machines have.
        limits: of the work.
        progress: called as (bytes done, bytes in all).

    Returns:
        By name, in the order of the plan.

    Raises:
        MerganserError: As `merge_on`.
    """
    merged = _planned(recipes)
    sizes = {name: moved_bytes(merged, name) for name in merged.infos}
    files = {name: name for name in sizes}
    handout, threads = _handout(tasks, merged, sizes, files, limits or Limits(), progress, None)
    shared = tasks.share(_work(recipes, merged, threads, None, None))
    found: dict[str, Any] = {}
    handout.run(
        lambda part: handout.start(measure_part, shared, part, each),
        lambda _, result: found.update(result),
    )
    return {name: found[name] for name in sizes}


def summed(figures: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    """Figures of whole models from those of their tensors: sums, exactly rounded, so that no order or split shows.

    >>> summed({"a": (1e16, 1.0), "b": (1.0, 2.0), "c": (-1e16, 3.0)})
    (1.0, 6.0)
    """
    return tuple(fsum(column) for column in zip(*figures.values(), strict=True))


def measure_then_merge(
    tasks: Tasks,
    recipes: Sequence[Recipe],
    each: Each,
    then: Callable[[tuple[float, ...]], Sequence[Recipe]],
    out: Path,
    **options: Any,
) -> Path:
    """Two phases: sums over whole models first, then the merge that they go into as weights or settings.

    Args:
        tasks: who does the work.
        recipes: whose models are measured.
        each: planned merge, name of a tensor -> its share of every sum.
        then: the sums -> recipes to run. They stand in the plan, so an interrupted second phase can be gone on with.
        out: folder to make.
        options: of `merge_on`.

    Raises:
        MerganserError: As `merge_on`.
    """
    return merge_on(tasks, then(summed(measure_on(tasks, recipes, each))), out, **options)


def moved_bytes(merged: Merged, name: str) -> int:
    """Bytes that are read and written for one tensor, through all stages, each model once."""
    tensor = merged.plan.tensors[name]
    total = tensor.info.nbytes
    for piece in dict.fromkeys(p for p in (*tensor.models, tensor.base) if p is not None):
        source = merged.plan.sources[piece.ref]
        stage = beneath(source)
        if isinstance(stage, Merged) and piece.name in stage.infos:
            total += moved_bytes(stage, piece.name)
        else:
            total += source.infos[piece.name].nbytes
    return total


def _measure_factors(tasks: Tasks, recipes: Sequence[Recipe], merged: Merged, limits: Limits | None) -> None:
    """Of methods with a factor on the whole change: that of the merge by the tasks, of its stages by this process."""
    asked = unmeasured(merged)
    measure([stage for stage in asked if stage is not merged], job_bytes, usable_threads(None))
    if merged in asked:
        merged.factor = factor(merged, measure_on(tasks, recipes, figures, limits=limits))


def _planned(recipes: Sequence[Recipe]) -> Merged:
    merged = plan_any(recipes)
    if isinstance(merged, AdapterMerge):
        raise ParameterError("adapters are merged with each other by one process", "leave --ray out: it is one file")
    return merged


def _handout(
    tasks: Tasks,
    merged: Merged,
    sizes: Mapping[str, int],
    files: Mapping[str, str],
    limits: Limits,
    progress: Progress | None,
    writer: CheckpointWriter | None,
) -> tuple[Handout, int]:
    """The work of a merge for the tasks, and how many threads each has."""
    threads = threads_of(tasks, limits, len({files[name] for name in sizes}))
    threads = fitting_threads(merged, threads, limits.memory_bytes)
    return Handout(
        tasks,
        sizes,
        files,
        threads=threads,
        peak_bytes=peak_bytes(merged, threads),
        limits=limits,
        progress=progress,
        folder=writer.folder if writer is not None else None,
    ), threads


def _work(recipes: Sequence[Recipe], merged: Merged, threads: int, folder: Path | None, target: Path | None) -> Work:
    return Work(
        tuple(recipes),
        key_of(merged),
        os.getcwd(),
        str(folder.absolute()) if folder is not None else "",
        str(target) if target is not None else "",
        threads,
        tuple(stage.factor for stage in merged.stages()),
    )
