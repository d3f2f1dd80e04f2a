"""Run a plan: every tensor is merged chunk by chunk and written, several tensors at a time; one rename at the end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from merganser.checkpoints import base_and_adapter, open_adapter, open_source
from merganser.checkpoints.adapter import AdapterSource
from merganser.checkpoints.folder import stem_for
from merganser.checkpoints.lora_config import CONFIG_NAME
from merganser.checkpoints.overlap import refuse_overlap, stamp
from merganser.checkpoints.placed import PlacedWriter
from merganser.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, peak_memory, write_json
from merganser.continual.roles import is_matrix
from merganser.continual.stream import Job, Progress, run_jobs, usable_threads
from merganser.errors import ParameterError
from merganser.merging.adapter_out import STEM, card_of, config_of, infos_of, receipt_of, write_target
from merganser.merging.adapter_plan import AdapterMerge, plan_adapters
from merganser.merging.ahead import reading_ahead
from merganser.merging.companions import CARD_NAME, check_companions, write_companions
from merganser.merging.digested import Digested
from merganser.merging.folding import forget, measure, onward, recall, remember, size, unmeasured
from merganser.merging.merged import CHUNK_ELEMENTS, Merged
from merganser.merging.native import read_recipes
from merganser.merging.plan import Piece, make_plan
from merganser.merging.recipe import Recipe
from merganser.merging.vocabulary_rows import adapters_on, beneath, unwrapped
from merganser.numerics import TORCH_DTYPES
from merganser.types import Source
from merganser.version import __version__

#: Bytes an element that a rule for whole matrices takes beside its inputs: float64 copies and factors.
MATRIX_BYTES = 72
#: Memory of a tensor that takes no more than this is not given back before the next: many are small and alike.
KEPT_BYTES = 1 << 26


def merge(recipe: str | Path, out: str | Path, *, lenient: bool = False, digests: bool = True, **options: Any) -> Path:
    """Merge several models into one, as a recipe says.

    Args:
        recipe: a YAML file, in our language or in mergekit's.
        out: folder to make.
        lenient: do not refuse keys that mergekit ignores.
        digests: whether the receipt holds the sha256 of every tensor that is read.
        options: of `run`: shard_bytes, threads, resume, overwrite, progress.

    Returns:
        `out`.

    Raises:
        MerganserError: Whatever is wrong with the recipe or its models; then nothing is there.
    """
    recipes, _ = read_recipes(Path(recipe), lenient=lenient)
    return run(plan_any(recipes, digests=digests), Path(out), **options)


def plan_recipes(recipes: Sequence[Recipe], *, chunk_elements: int = CHUNK_ELEMENTS, digests: bool = True) -> Merged:
    """Plan recipes that may use each other's outputs; the last one's merge is returned and reads the others as it goes.

    Args:
        recipes: in an order in which each one stands behind those that it uses.
        chunk_elements: elements at a time.
        digests: whether to keep a digest of what is read, for the receipt.

    Raises:
        MerganserError: Whatever is wrong with a recipe or its models; nothing was written.
    """
    stages: dict[str, Source] = {}
    opened: dict[str, Source] = {}
    merged: Merged | None = None
    for recipe in recipes:
        if recipe.adapter is not None:
            raise ParameterError(
                f"{recipe.name or 'the recipe'} merges adapters with each other, which only `merge` and `plan` do",
                "stages and the doctor take whole models: leave adapter out and write BASE+ADAPTER for each",
            )
        refs = (*recipe.refs, *recipe.statistics)
        for ref in refs:
            if ref not in opened:
                opened[ref] = _on_stage(ref, stages) or _from_files(ref, digests=digests)
        sources = {ref: opened[ref] for ref in refs}
        merged = Merged(make_plan(recipe, sources), chunk_elements=chunk_elements)
        if recipe.name is not None:
            stages[recipe.name] = merged
    if merged is None:
        raise ParameterError("there is no recipe to run")
    check_companions(merged.plan)
    return merged


def _on_stage(ref: str, stages: Mapping[str, Source]) -> Source | None:
    """The output of an earlier recipe, with adapters applied to it or not; None where a reference is to files alone."""
    below, adapter = base_and_adapter(ref)
    if ref in stages or below is None:
        return stages.get(ref)
    stage = _on_stage(below, stages)
    return open_adapter(adapter, stage) if stage is not None else None


def _from_files(ref: str, *, digests: bool) -> Source:
    return Digested(open_source(ref)) if digests else open_source(ref)


def plan_any(
    recipes: Sequence[Recipe], *, chunk_elements: int = CHUNK_ELEMENTS, digests: bool = True
) -> Merged | AdapterMerge:
    """Plan recipes of whole models, or the one that merges adapters with each other; arguments as of `plan_recipes`.

    Raises:
        MerganserError: Whatever is wrong with a recipe or its models; nothing was written.
    """
    if not recipes or recipes[-1].adapter is None:
        return plan_recipes(recipes, chunk_elements=chunk_elements, digests=digests)
    names = {recipe.name for recipe in recipes if recipe.name is not None}
    for ref in recipes[-1].refs:
        if made := [part for part in base_and_adapter(ref) if part in names]:
            raise ParameterError(
                f"{made[0]} is a recipe of this file, and adapters are merged from folders alone",
                "merge it first, and name the folder",
            )
    return plan_adapters(recipes[-1], digests=digests)


def run(
    merged: Merged | AdapterMerge,
    out: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    threads: int | None = None,
    memory_bytes: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a planned merge as a checkpoint folder.

    Args:
        merged: of `plan_recipes` or `plan_any`.
        out: folder to make.
        shard_bytes: size in bytes at which the next file is begun; an adapter is one file.
        threads: tensors at a time, at most.
        memory_bytes: memory that it may take beside Python and torch; fewer tensors at a time keep to it.
        resume: go on with what an interrupted run of the same plan left; leave it again when interrupted. A merge of
            adapters, which is short, begins afresh.
        overwrite: replace a folder that is there.
        progress: called as (bytes done, bytes in all).

    Returns:
        `out`.

    Raises:
        ParameterError: If the largest tensor alone needs more memory than that.
        MerganserError: If a model cannot be read or merged, or the folder not be written; then nothing is there.
    """
    threads = fitting_threads(merged, usable_threads(threads), memory_bytes)
    if isinstance(merged, AdapterMerge):
        return _run_adapters(merged, out, threads=threads, overwrite=overwrite, progress=progress)
    began = time.perf_counter()
    with open_writer(merged, out, shard_bytes=shard_bytes, resume=resume, overwrite=overwrite) as writer:
        jobs = [
            Job(name, partial(write_tensor, merged, writer, name), job_bytes(merged, name), info.nbytes)
            for name, info in writer.infos.items()
            if name not in writer.done
        ]
        recall(merged, writer.folder)
        asked = unmeasured(merged)
        first = sum(map(size, asked))
        total = first + sum(job.progress_bytes for job in jobs)
        with reading_ahead(merged.stages(), threads):
            measure(asked, job_bytes, threads, onward(progress, 0, total))
            if asked and resume:
                remember(merged, writer.folder)
            run_jobs(jobs, threads=threads, progress=onward(progress, first, total), kept_bytes=KEPT_BYTES)
        read = {ref: digests_of(source) for ref, source in files_of(merged).items()}
        finish(merged, writer, read, wall_s=time.perf_counter() - began, peak_memory_bytes=peak_memory())
    return out


def open_writer(merged: Merged, out: Path, *, shard_bytes: int, resume: bool, overwrite: bool) -> CheckpointWriter:
    """The writer of a planned merge.

    Raises:
        OutputError: If the folder may not be written, or is among what is read.
    """
    refuse_overlap(out, list(files_of(merged)))
    return CheckpointWriter(
        out,
        merged.infos,
        aliases=merged.aliases,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        stem=stem_for(merged.companions()),
        resume=f"{key_of(merged)} {shard_bytes}" if resume else None,
    )


def finish(
    merged: Merged,
    writer: CheckpointWriter,
    read: Mapping[str, Mapping[str, str]],
    *,
    wall_s: float,
    peak_memory_bytes: int,
) -> None:
    """Add the files beside the tensors, which are all written, and make the folder real.

    Args:
        merged: what was written.
        writer: that wrote it.
        read: digests of the tensors that were read, by reference and name.
        wall_s: seconds that it took.
        peak_memory_bytes: memory that it took.
    """
    recipe = merged.plan.recipe
    companions = write_companions(merged.plan, writer.folder, taken={*writer.files.values()})
    receipt = {
        "merganser": __version__,
        "torch": torch.__version__,
        "recipe": recipe.text,
        "method": recipe.method,
        "dialect": recipe.dialect,
        "inputs": {
            ref: {"identity": _identity(source), "tensors": read.get(ref, {})}
            for ref, source in files_of(merged).items()
        },
        "resumed": sorted(writer.done),
        "seed": recipe.seed,
        "wall_s": round(wall_s, 3),
        "peak_bytes": peak_memory_bytes,
        "outputs": writer.digests(),
    }
    forget(writer.folder)
    writer.commit(receipt, companions)


def _run_adapters(merge: AdapterMerge, out: Path, *, threads: int, overwrite: bool, progress: Progress | None) -> Path:
    began = time.perf_counter()
    infos = infos_of(merge)
    total = sum(info.nbytes for info in infos.values())
    refuse_overlap(out, merge.recipe.refs)
    with CheckpointWriter(out, infos, shard_bytes=max(1, total), overwrite=overwrite, stem=STEM) as writer:
        jobs = [
            Job(name, partial(write_target, merge, writer, name), merge.job_bytes(name), prod(target.shape))
            for name, target in merge.targets.items()
        ]
        cuts = run_jobs(jobs, threads=threads, progress=progress)
        write_json(writer.folder / CONFIG_NAME, config_of(merge))
        (writer.folder / CARD_NAME).write_text(card_of(merge), "utf-8")
        receipt = {
            "merganser": __version__,
            **receipt_of(merge, cuts),
            "wall_s": round(time.perf_counter() - began, 3),
            "peak_bytes": peak_memory(),
            "outputs": writer.digests(),
        }
        writer.commit(receipt)
    return out


def write_tensor(merged: Merged, writer: CheckpointWriter | PlacedWriter, name: str) -> None:
    """Merge one tensor, chunk by chunk, into its place."""
    for part in merged.chunks(name):
        writer.put(name, merged.read_lines(name, part), part[0] if part is not None else 0)
    merged.forget(name)


def job_bytes(merged: Merged, name: str) -> int:
    """Memory in bytes that merging one tensor takes at most, by its models' number, types and chunks."""
    tensor = merged.tensors[name]
    elements = prod(tensor.info.shape)
    rows = next(iter(merged.chunks(name)))
    if rows is not None and tensor.info.rows:
        elements = elements // tensor.info.rows * (rows[1] - rows[0])
    item = 8 if tensor.info.dtype == "F64" else 4
    matrix = MATRIX_BYTES if rows is None and is_matrix(tensor.role) else 0
    sources = [p for p in (*tensor.models, tensor.base) if p is not None]
    below = sum(map(partial(_stage_bytes, merged), dict.fromkeys(tensor.pieces)))
    stored = sum(TORCH_DTYPES[merged.plan.sources[p.ref].infos[p.name].dtype].itemsize for p in sources)
    return (
        elements * (stored * (1 if rows is None else 2) + item * (2 * len(sources) + 6) + matrix)
        + merged.held_bytes(name)
        + below
        + (1 << 20)
    )


def _stage_bytes(merged: Merged, piece: Piece) -> int:
    """Memory in bytes that an earlier recipe takes for a tensor, whole beneath an adapter, which reads in blocks."""
    source = merged.plan.sources[piece.ref]
    stage = beneath(source)
    if not isinstance(stage, Merged) or piece.name not in stage.infos:
        return 0
    whole = stage.infos[piece.name].nbytes if adapters_on(source) else 0
    return job_bytes(stage, piece.name) + whole


def peak_bytes(merged: Merged | AdapterMerge, threads: int) -> int:
    """Predicted memory in bytes of a merge beside Python and torch: its largest tensors at once."""
    return sum(sorted(_sizes(merged).values(), reverse=True)[:threads])


def fitting_threads(merged: Merged | AdapterMerge, threads: int, memory_bytes: int | None) -> int:
    """As many tensors at a time as the memory allows.

    Raises:
        ParameterError: If it does not allow one.
    """
    if memory_bytes is None:
        return threads
    for count in range(threads, 0, -1):
        if peak_bytes(merged, count) <= memory_bytes:
            return count
    size, name = max((size, name) for name, size in _sizes(merged).items())
    recipe = merged.recipe if isinstance(merged, AdapterMerge) else merged.plan.recipe
    raise ParameterError(
        f"{name} alone takes about {size:,} bytes with {recipe.method}, and {memory_bytes:,} are allowed",
        "allow more with --memory; methods that need singular values hold one tensor of every model",
    )


def _sizes(merged: Merged | AdapterMerge) -> dict[str, int]:
    if isinstance(merged, AdapterMerge):
        return {name: merged.job_bytes(name) for name in merged.targets}
    return {name: job_bytes(merged, name) for name in merged.infos}


def files_of(merged: Merged) -> dict[str, Source]:
    """Every source that is read from files, through all stages, by its reference."""
    sources = {ref: source for stage in merged.stages() for ref, source in stage.plan.sources.items()}
    found = {ref: unwrapped(source) for ref, source in sources.items() if not isinstance(beneath(source), Merged)}
    return found | {adapter.ref: adapter for source in sources.values() for adapter in adapters_on(source)}


def _identity(source: Source) -> str | None:
    return source.own_identity if isinstance(source, AdapterSource) else source.identity


def digests_of(source: Source) -> dict[str, str]:
    """Digests of the tensors of a source that were read whole, by name; none where nobody kept them."""
    return source.digests() if isinstance(source, Digested) else {}


def key_of(merged: Merged) -> str:
    """One line that stands for the merge: what every tensor is made of, and the files as they are now."""
    hashed = hashlib.sha256(__version__.encode())
    for plan in (stage.plan for stage in merged.stages()):
        recipe = plan.recipe
        parts: list[object] = [recipe.method, recipe.post, recipe.dialect, recipe.seed, recipe.vocabulary]
        parts += [(name, tensor) for name, tensor in plan.tensors.items()]
        parts += [sorted(plan.aliases.items()), sorted(recipe.written.items())]  # by what is written noise is drawn
        hashed.update(repr(parts).encode())
    hashed.update(stamp(files_of(merged)).encode())
    return hashed.hexdigest()
