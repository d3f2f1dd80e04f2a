"""What changed from one model to another, tensor by tensor and layer by layer.

    d = b - a      norm ||d||      relative ||d|| / ||a||      cosine <a, b> / (||a|| ||b||)      largest max |d_i|

Norms are Frobenius norms. Linear weights and kernels, seen as (out, in * kernel), have an effective rank too:
exp(-sum_i p_i ln p_i) with p_i = s_i^2 / sum_j s_j^2 over the singular values s of d.

Sums are taken in float64 on a grid that depends on shapes alone, so no figure depends on chunks or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import fsum, inf, isfinite, nan, sqrt

import torch
from torch import Tensor

from merganser.continual.roles import assign_roles, is_matrix, literal, matches, quoted
from merganser.continual.stream import Job, Progress, run_jobs, usable_threads
from merganser.errors import DtypeError, NonFiniteError, ParameterError, ShapeError
from merganser.merging.layers import place_of, stands_before
from merganser.merging.spectra import effective_rank, short_gram
from merganser.merging.survey import cell_rows, chunk_rows
from merganser.types import EXACT_DTYPES, FLOAT_DTYPES, Source, TensorInfo

#: Elements that are read at a time.
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Change:
    """How one tensor changed. Figures are NaN where either model holds NaN or infinity.

    Attributes:
        name: of the tensor, as the first model stores it where it does.
        info: its header in the first model.
        before: norm in the first model.
        after: norm in the second.
        norm: of the change.
        inner: inner product of the two tensors.
        largest: largest absolute entry of the change.
        changed: number of entries that differ.
        nonfinite: number of entries that are NaN or infinite in the first model and in the second.
        effective_rank: of the change; None where the tensor is no linear weight, or it was not asked for.
    """

    name: str
    info: TensorInfo
    before: float
    after: float
    norm: float
    inner: float
    largest: float
    changed: int
    nonfinite: tuple[int, int]
    effective_rank: float | None

    @property
    def relative(self) -> float:
        """Norm of the change over that of the first model's tensor; infinity where that is zero and this is not."""
        return _over(self.norm, self.before)

    @property
    def cosine(self) -> float:
        """Cosine of the two tensors; NaN where one is zero."""
        return _cosine(self.inner, self.before, self.after)


@dataclass(frozen=True)
class Summary:
    """Some tensors seen as one long vector.

    Attributes:
        name: of the layer, or of the module where it lies outside all layers.
        tensors: how many there are.
        norm: of their change.
        relative: norm over that in the first model.
        cosine: between the two models.
        largest: largest absolute entry of the change.
        effective_rank: mean over the linear weights among them; None where there is none.
    """

    name: str
    tensors: int
    norm: float
    relative: float
    cosine: float
    largest: float
    effective_rank: float | None


@dataclass(frozen=True)
class Difference:
    """What changed from model a to model b.

    Attributes:
        a: reference of the first.
        b: reference of the second.
        changes: of every tensor that both have, sorted by name.
        only_a: names that the second lacks.
        only_b: names that the first lacks.
    """

    a: str
    b: str
    changes: tuple[Change, ...]
    only_a: tuple[str, ...] = field(default=())
    only_b: tuple[str, ...] = field(default=())

    def most_changed(self, count: int) -> list[Change]:
        """The tensors with the largest relative change, those with NaN or infinity before all others."""
        differing = [c for c in self.changes if c.changed]
        return sorted(differing, key=lambda c: (not any(c.nonfinite), -c.relative, c.name))[:count]

    def layers(self) -> list[Summary]:
        """A summary of every layer, from the input to the output as far as names tell."""
        groups: dict[tuple[int, str, int], list[Change]] = {}
        for change in self.changes:
            groups.setdefault(_layer(change.name), []).append(change)
        return [
            summary(f"{stack}{index}" if index >= 0 else stack, group)
            for (_, stack, index), group in sorted(groups.items())
        ]

    def total(self) -> Summary:
        """The whole model."""
        return summary("all", self.changes)


def summary(name: str, changes: Sequence[Change]) -> Summary:
    """Some tensors seen as one long vector."""
    before, after, norm = (_root(getattr(c, part) for c in changes) for part in ("before", "after", "norm"))
    ranks = [c.effective_rank for c in changes if c.effective_rank is not None]
    return Summary(
        name,
        len(changes),
        norm,
        _over(norm, before),
        _cosine(fsum(c.inner for c in changes), before, after),
        max((c.largest for c in changes), default=0.0) if norm == norm else nan,
        fsum(ranks) / len(ranks) if ranks else None,
    )


def difference(
    a: Source,
    b: Source,
    *,
    ignore: Sequence[str] = (),
    rank: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Difference:
    """Measure what changed from one model to another.

    Args:
        a: the first model.
        b: the second.
        ignore: shell patterns of names that are left out.
        rank: whether to measure effective ranks, which takes most of the time and the change of one tensor in memory.
        threads: tensors at a time.
        progress: called as (bytes done, bytes in all).

    Raises:
        ShapeError: If a tensor has two shapes.
        DtypeError: If a tensor is complex, or floating in one model and not in the other.
        NonFiniteError: If a tensor holds values whose squares are beyond float64.
        ParameterError: If a pattern of `ignore` fits no name, or the models share no tensor.
        CheckpointError: If a file changed since its header was read.
    """
    names = sorted({*a.infos, *b.infos})
    for pattern in ignore:
        if not any(matches(name, (pattern,)) for name in names):
            raise ParameterError(f"no tensor is called {pattern!r}", "patterns are shell-like: *.bias")
    names = [name for name in names if not matches(name, ignore)]
    stored = {name: (_stored(a, name), _stored(b, name)) for name in names}
    pairs = {name: (one, other) for name, (one, other) in stored.items() if one is not None and other is not None}
    if not pairs:
        raise ParameterError(f"{a.ref} and {b.ref} share no tensor", "merganser inspect --tensors lists their names")
    _refuse(a, b, pairs)
    unknown = [n for n, info in a.infos.items() if info.dtype not in (*FLOAT_DTYPES, *EXACT_DTYPES)]
    roles = assign_roles(a, freeze=[literal(name) for name in unknown])
    jobs = []
    for name, (one, other) in pairs.items():
        info = a.infos[one]
        ranked = rank and is_matrix(roles[one])
        work = partial(_measured, name, (a, one), (b, other), ranked)
        needed = info.numel * 8 + 24 * min(info.rows, info.numel // max(1, info.rows)) ** 2 if ranked else 0
        jobs.append(Job(name, work, needed + 32 * CHUNK_ELEMENTS, info.nbytes + b.infos[other].nbytes))
    changes = run_jobs(jobs, threads=usable_threads(threads), progress=progress)
    return Difference(
        a.ref,
        b.ref,
        tuple(changes.values()),
        tuple(name for name, (_, other) in stored.items() if other is None),
        tuple(name for name, (one, _) in stored.items() if one is None),
    )


def _stored(source: Source, name: str) -> str | None:
    return name if name in source.infos else source.aliases.get(name)


def _refuse(a: Source, b: Source, pairs: dict[str, tuple[str, str]]) -> None:
    infos = {name: (a.infos[one], b.infos[other]) for name, (one, other) in pairs.items()}
    if uneven := [name for name, (one, other) in infos.items() if one.shape != other.shape]:
        one, other = infos[uneven[0]]
        more = f" (and {len(uneven) - 1} more differ)" if len(uneven) > 1 else ""
        raise ShapeError(
            f"{uneven[0]} has 2 shapes: {one.shape} in {a.ref}; {other.shape} in {b.ref}{more}",
            f"leave it out with --ignore {quoted(uneven[0])}, or compare models of one architecture",
        )
    for name, (one, other) in infos.items():
        if "C64" in (one.dtype, other.dtype):
            raise DtypeError(f"{name} is complex", f"leave it out with --ignore {quoted(name)}")
        if (one.dtype in EXACT_DTYPES) != (other.dtype in EXACT_DTYPES):
            raise DtypeError(
                f"{name} is {one.dtype} in {a.ref} and {other.dtype} in {b.ref}",
                f"a quantised model must be dequantised first, or leave it out with --ignore {quoted(name)}",
            )


def _measured(name: str, one: tuple[Source, str], other: tuple[Source, str], ranked: bool) -> Change:
    (a, a_name), (b, b_name) = one, other
    info = a.infos[a_name]
    double = "F64" in (info.dtype, b.infos[b_name].dtype)
    whole = torch.empty(info.numel if ranked else 0, dtype=torch.float64 if double else torch.float32)
    sums: list[tuple[float, float, float, float]] = []
    largest, changed, broken, position = 0.0, 0, [0, 0], 0
    for rows in chunk_rows(info.shape, CHUNK_ELEMENTS):
        part = rows if info.shape else None
        for x, y in zip(*(_cells(s.read(n, part), info.shape) for s, n in ((a, a_name), (b, b_name))), strict=True):
            d = y - x
            sums.append((_dot(x, x), _dot(y, y), _dot(d, d), _dot(x, y)))
            changed += int(d.count_nonzero())
            for i, z in enumerate((x, y)):
                if not sums[-1][i] < inf:
                    broken[i] += z.numel() - int(z.isfinite().sum())
            largest = max(largest, float(d.abs().max()) if d.numel() else 0.0)
            if ranked:
                whole[position : position + d.numel()] = d
                position += d.numel()
    if not any(broken) and not all(isfinite(x) for row in sums for x in row):
        raise NonFiniteError(
            f"{name} holds values of 1e154 and more, whose squares are beyond float64",
            f"leave it out with --ignore {quoted(name)}",
        )
    before, after, norm, inner = (fsum(column) for column in zip(*sums, strict=True)) if not any(broken) else (nan,) * 4
    found = None
    if ranked:
        found = effective_rank(short_gram(whole.reshape(info.rows, -1))) if not any(broken) and info.numel else 0.0
        found = nan if any(broken) else found
    return Change(
        name,
        info,
        sqrt(before),
        sqrt(after),
        sqrt(norm),
        inner,
        nan if any(broken) else largest,
        changed,
        (broken[0], broken[1]),
        found,
    )


def _cells(x: Tensor, shape: Sequence[int]) -> list[Tensor]:
    cell = cell_rows(shape)
    parts = torch.split(x, cell) if shape else (x,)
    return [part.reshape(-1).double() for part in parts]


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x, y))


def _layer(name: str) -> tuple[int, str, int]:
    """Where a tensor stands: before the layers, in a layer of a stack, or behind them."""
    if (place := place_of(name)) is not None:
        return 1, place.stack, place.index
    return 0 if stands_before(name) else 2, name.rpartition(".")[0] or name, -1


def _root(norms: Iterable[float]) -> float:
    return sqrt(fsum(norm * norm for norm in norms))


def _over(norm: float, before: float) -> float:
    if before == 0:
        return inf if norm > 0 else norm
    return norm / before


def _cosine(inner: float, before: float, after: float) -> float:
    return max(-1.0, min(1.0, inner / before / after)) if before > 0 and after > 0 else nan
