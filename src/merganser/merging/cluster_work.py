"""What one task of a cluster does, on whatever machine it runs: plan anew, do its part, say what came of it.

Recipes and names come in, digests and figures go out; tensors go from file to file and never between processes. A task
plans for itself, from the same files, and refuses to go on if that is not the plan of the one who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from merganser.checkpoints.placed import Place, PlacedWriter
from merganser.checkpoints.writer import peak_memory
from merganser.continual.stream import Job, run_jobs
from merganser.merging.ahead import reading_ahead
from merganser.merging.cluster_jobs import Part
from merganser.merging.cluster_worker import Failure, attempted, flush, refuse_missing, refuse_other
from merganser.merging.merged import Merged
from merganser.merging.recipe import Recipe
from merganser.merging.run import digests_of, files_of, job_bytes, key_of, plan_recipes, write_tensor

T = TypeVar("T")
#: A figure of one tensor.
Each = Callable[[Merged, str], Any]


@dataclass(frozen=True)
class Work:
    """What all tasks of a merge have in common.

    Attributes:
        recipes: of the merge, as `plan_recipes` takes them.
        key: of the plan, which a task's own must have too.
        cwd: folder that relative references start from.
        folder: temporary folder of the output, with its files laid out; "" where nothing is written.
        target: what it becomes.
        threads: tensors at a time.
        factors: on the changes of whole models, of the merge's stages in turn, where they have one.
        digests: whether to keep a digest of what is read.
    """

    recipes: tuple[Recipe, ...]
    key: str
    cwd: str
    folder: str
    target: str
    threads: int
    factors: tuple[float | None, ...] = ()
    digests: bool = True


@dataclass(frozen=True)
class Written:
    """What became of a part that was written.

    Attributes:
        digests: sha256 of every tensor written, by name.
        read: of every tensor read whole, by reference and name.
        peak_bytes: memory of the process.
    """

    digests: Mapping[str, str]
    read: Mapping[str, Mapping[str, str]]
    peak_bytes: int


def write_part(work: Work, part: Part, places: Mapping[str, Place]) -> Written | Failure:
    """Merge the tensors of a part into their places, and have them on disk.

    Args:
        work: the merge.
        part: of it.
        places: of the part's tensors.
    """

    def write(merged: Merged) -> Written:
        folder = Path(work.folder)
        refuse_missing(folder, part.files)
        writer = PlacedWriter(folder, Path(work.target), places)
        jobs = [
            Job(name, partial(write_tensor, merged, writer, name), job_bytes(merged, name), 0) for name in part.names
        ]
        with reading_ahead(merged.stages(), work.threads):
            run_jobs(jobs, threads=work.threads)
        flush(folder, part.files, Path(work.target))
        read = {ref: digests_of(source) for ref, source in files_of(merged).items()}
        return Written(writer.digests(), read, peak_memory())

    return _attempted(work, part, write)


def measure_part(work: Work, part: Part, each: Each) -> dict[str, Any] | Failure:
    """A figure of every tensor of a part, by name.

    Args:
        work: the merge.
        part: of it.
        each: planned merge, name of a tensor -> its figure.
    """

    def measure(merged: Merged) -> dict[str, Any]:
        jobs = [Job(name, partial(each, merged, name), job_bytes(merged, name), 0) for name in part.names]
        return run_jobs(jobs, threads=work.threads)

    return _attempted(work, part, measure)


def _attempted(work: Work, part: Part, do: Callable[[Merged], T]) -> T | Failure:
    def planned() -> T:
        merged = plan_recipes(work.recipes, digests=work.digests)
        refuse_other(key_of(merged), work.key)
        for stage, factor in zip(merged.stages(), work.factors, strict=False):  # none while they are measured
            stage.factor = factor
        return do(merged)

    return attempted(work.cwd, part.label, planned)
