"""Continual methods in a recipe: folded over its models in order, with the factor on the whole that OPCM has.

    D = f u      f = mean_i |w_i d_i| / |u|      norms over all matrices and vectors; models of weight 0 do not count

The factor is measured before anything is written, so such a method reads and folds everything twice. Sums are exactly
rounded: no order or thread shows. A run that can be gone on with leaves its factors to the next one.

Source: OPCM, arXiv:2501.09522, eq. 9.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import fsum, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from merganser.continual.kinds import kind_of
from merganser.continual.passing import NORMED
from merganser.continual.stream import Job, Progress, run_jobs
from merganser.methods import METHODS, Step
from merganser.numerics import sum_of_squares

if TYPE_CHECKING:
    from torch import Tensor

    from merganser.merging.held import Rows
    from merganser.merging.merged import Merged
    from merganser.merging.plan import TensorPlan

#: Factors that were measured, in a folder that is being written.
MEASURED_NAME = ".measured.json"


@dataclass(frozen=True)
class Figures:
    """What one tensor adds to the norms.

    Attributes:
        whole: squares of the merged change.
        each: of every model's weighted change; None where it weighs nothing.
    """

    whole: float = 0.0
    each: tuple[float | None, ...] = ()


def has_factor(merged: Merged) -> bool:
    """Whether a merge is by such a method."""
    row = METHODS.get(merged.plan.recipe.method)
    return isinstance(row, Step) and row.scale is not None


def folded(
    merged: Merged, tensor: TensorPlan, rows: Rows, each: Callable[[Tensor], object] | None = None
) -> tuple[Tensor, Tensor]:
    """The change of some rows, before the factor, and the base's rows.

    Args:
        merged: by a continual method.
        tensor: which.
        rows: of it.
        each: called with every model's change; only one is in memory at a time.
    """
    kind = kind_of(merged.plan.recipe.method, tensor.settings)
    role, shape = tensor.role, tensor.info.shape
    state: dict[str, Tensor] = {}
    double = any(merged.plan.sources[p.ref].infos[p.name].dtype == "F64" for p in tensor.pieces)
    for t, (piece, weight) in enumerate(zip(tensor.models, tensor.weight, strict=True), 1):
        (d,), base = merged.stack(replace(tensor, models=(piece,)), rows, changes=not double)
        if double and base is not None:  # of any model or the base: then all is float64, whatever comes last
            base = base.double()
            d = d.double() - base
        if each is not None:
            each(d)
        state = kind.update(role, shape, state, kind.seen(role, shape, d), weight=weight, t=t)
    change = kind.finalise(kind.method, role, shape, state, kind.given, sum(tensor.weight))
    assert base is not None
    return kind.restored(role, shape, change.to(base.dtype)), base


def figures(merged: Merged, name: str) -> Figures:
    """What one tensor of a merge adds."""
    tensor = merged.plan.tensors[name]
    if tensor.role not in NORMED:
        return Figures()
    whole: list[float] = []
    parts: list[list[float]] = []  # of all models in turn
    for rows in merged.chunks(name):
        squares: list[float] = []
        change, _ = folded(merged, tensor, rows, lambda d, squares=squares: squares.append(sum_of_squares(d)))  # type: ignore[misc]
        whole.append(sum_of_squares(change))
        parts.append(squares)
    each = (fsum(column) for column in zip(*parts, strict=True))
    return Figures(fsum(whole), tuple(w**2 * x if w else None for w, x in zip(tensor.weight, each, strict=True)))


def factor(merged: Merged, found: Mapping[str, Figures]) -> float:
    """The factor, from what all tensors add."""
    row = METHODS[merged.plan.recipe.method]
    assert isinstance(row, Step)
    assert row.scale is not None
    columns = zip(*(figure.each for figure in found.values() if figure.each), strict=True)
    weighed = [[x for x in column if x is not None] for column in columns]
    norms = [sqrt(fsum(squares)) for squares in weighed if squares]
    return row.scale(norms, sqrt(fsum(figure.whole for figure in found.values())))


def factor_of(merged: Merged) -> float:
    """The factor of a merge, measured here where nobody did it before."""
    with merged.measuring:
        if merged.factor is None:
            merged.factor = factor(merged, {name: figures(merged, name) for name in merged.infos})
        return merged.factor


def unmeasured(merged: Merged) -> list[Merged]:
    """The merge and the stages that it reads, as far as their factors are still to be measured, in an order for it."""
    return [stage for stage in merged.stages() if has_factor(stage) and stage.factor is None]


def measure(
    stages: Sequence[Merged], peak_bytes: Callable[[Merged, str], int], threads: int, progress: Progress | None = None
) -> None:
    """Give merges their factors.

    Args:
        stages: of `unmeasured`.
        peak_bytes: memory of merging one tensor.
        threads: tensors at a time.
        progress: called as (bytes done, bytes in all).
    """
    total, before = sum(map(size, stages)), 0
    for stage in stages:
        jobs = [
            Job(name, partial(figures, stage, name), peak_bytes(stage, name), info.nbytes)
            for name, info in stage.infos.items()
        ]
        found = run_jobs(jobs, threads=threads, progress=onward(progress, before, total))
        stage.factor = factor(stage, found)
        before += size(stage)


def remember(merged: Merged, folder: Path) -> None:
    """Leave the factors of a merge and its stages to the next run of it."""
    found = [None if stage.factor is None else stage.factor.hex() for stage in merged.stages()]
    new = folder / f"{MEASURED_NAME}.new"
    new.write_text(json.dumps(found), "utf-8")
    os.replace(new, folder / MEASURED_NAME)


def recall(merged: Merged, folder: Path) -> None:
    """Take over the factors that an interrupted run of the same merge left, if it did."""
    try:
        found = json.loads((folder / MEASURED_NAME).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return
    for stage, factor_ in zip(merged.stages(), found, strict=True):
        stage.factor = None if factor_ is None else float.fromhex(factor_)


def forget(folder: Path) -> None:
    """Remove what `remember` left: the folder is whole."""
    (folder / MEASURED_NAME).unlink(missing_ok=True)


def size(merged: Merged) -> int:
    """Bytes of what a merge writes."""
    return sum(info.nbytes for info in merged.infos.values())


def onward(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one of several passes: so many bytes are behind it, of so many in all."""
    return None if progress is None else lambda done, _: progress(before + done, total)
