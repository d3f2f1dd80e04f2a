"""How the changes of a planned merge stand to each other: measured before anything is merged.

    norm_k       = ||w_k d_k||, over all tensors
    opposing_ij  = sum |w_i d_i w_j d_j| [signs differ] / sum |w_i d_i w_j d_j|; 1/2 where unrelated
    lost_k       = share of the nonzero entries of d_k below half a unit in the last place of the output at the base
    overlap_ij   = ||V_i^T V_j||^2 / q        V_k: the q = n/16 leading right singular vectors of d_k (m x n)
    left, right  = ||U^T U - I||, ||V^T V - I||     U, V: the min(m, n) / T leading ones of each of T changes, in a row

`left` and `right` are what TSV-M whitens away (Gargiulo et al. 2024, arXiv:2412.00081). Divided by their largest
possible value and squared they are shares, as the overlap is: 1 where all changes use the same directions. Chance is
what random directions would give.

All models' chunks are read side by side once; linear weights once more, one at a time, for their singular vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import fsum, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from merganser.continual.roles import is_matrix, matrix_shape
from merganser.continual.stream import Job, Progress, run_jobs, usable_threads
from merganser.errors import NonFiniteError, ParameterError
from merganser.merging.layers import place_of
from merganser.merging.lines import read_part
from merganser.merging.merged import Merged
from merganser.merging.plan import Piece, Plan, TensorPlan
from merganser.merging.spectra import leading
from merganser.merging.survey import cell_rows, chunk_rows
from merganser.merging.vocabulary_rows import beneath
from merganser.numerics import TORCH_DTYPES, product

#: Share of a layer's input directions that count as leading.
LEADING = 1 / 16
#: Elements of every model that are read at a time.
CHUNK_ELEMENTS = 1 << 18
#: Output types whose resolution a change can fall below.
COARSE = ("BF16", "F16")


@dataclass
class OfModel:
    """Figures of one model over all tensors that were measured.

    Attributes:
        norm: of its change.
        weighted: norm of its change times its weights.
        base: norm of the base.
        changed: number of entries that differ from the base.
        lost: how many of them fall below the resolution of the output.
    """

    norm: float = 0.0
    weighted: float = 0.0
    base: float = 0.0
    changed: int = 0
    lost: int = 0


@dataclass
class OfPair:
    """Figures of two models.

    Attributes:
        equal: whether all tensors that were measured are.
        cosine: between their changes; None where one has none.
        opposing: share of the products of their weighted changes that is negative; None likewise.
        overlap: of their leading input directions, a mean over linear weights; None where there is none.
        chance: overlap of random directions.
    """

    equal: bool
    cosine: float | None
    opposing: float | None
    overlap: float | None
    chance: float | None


@dataclass(frozen=True)
class OfLayer:
    """Figures of one linear weight.

    Attributes:
        overlap: of leading input directions, by pair.
        chance: overlap of random directions, by pair.
        left: norm of U^T U - I.
        right: norm of V^T V - I.
        left_share: of the largest possible left^2.
        right_share: of the largest possible right^2.
        left_chance: share of random directions.
        right_chance: share of random directions.
    """

    overlap: Mapping[tuple[str, str], float]
    chance: Mapping[tuple[str, str], float]
    left: float
    right: float
    left_share: float
    right_share: float
    left_chance: float
    right_chance: float


@dataclass(frozen=True)
class Conflicts:
    """What was measured of one merge.

    Attributes:
        models: by label: the reference, with a number where a model is given several times.
        pairs: by two labels.
        layers: by the name of the linear weight.
        nonfinite: by label, or the base's reference, and by tensor: entries that are NaN or infinite, where any are.
        tensors: how many were measured.
    """

    models: Mapping[str, OfModel]
    pairs: Mapping[tuple[str, str], OfPair]
    layers: Mapping[str, OfLayer]
    nonfinite: Mapping[str, Mapping[str, int]]
    tensors: int


def measure(
    merged: Merged, *, layers: int | None = None, threads: int | None = None, progress: Progress | None = None
) -> Conflicts:
    """Measure the changes of a planned merge. Without a base, only what is equal or not finite is known.

    Args:
        merged: of `merganser.merging.run.plan_recipes`.
        layers: how many layers of each stack to look at, evenly spread; None for all.
        threads: tensors at a time.
        progress: called as (bytes done, bytes in all).

    Raises:
        ParameterError: If `layers` or `threads` is below 1.
        NonFiniteError: If squares of a tensor are beyond float64.
    """
    plan = merged.plan
    names = _sampled(plan, layers)
    jobs = []
    for name in names:
        tensor = merged.tensors[name]
        nbytes = tensor.info.nbytes * len(tensor.models)
        needed = tensor.info.numel * 8 if is_matrix(tensor.role) else 0
        jobs.append(Job(name, partial(_measured, plan, tensor), needed, nbytes))
    found = run_jobs(jobs, threads=usable_threads(threads), progress=progress)
    return _joined(found)


def labels_of(plan: Plan, tensor: TensorPlan) -> dict[str, int]:
    """The models that bring a change, by label: positions in `tensor.models`. A base among the models brings none."""
    found: dict[str, int] = {}
    first = 1 if plan.rules.base_is_model and tensor.models[0] == tensor.base else 0
    for k, piece in enumerate(tensor.models[first:], first):
        times = sum(other.ref == piece.ref for other in tensor.models[first : k + 1])
        found[piece.ref if times == 1 else f"{piece.ref} ({times})"] = k
    return found


def half_unit(x: Tensor, dtype: str) -> Tensor:
    """Half a unit in the last place of a coarse type at every x: less than that added to x may be rounded away.

    >>> half_unit(torch.tensor([1.0, 1.5, 4.0]), "BF16").log2().tolist()
    [-8.0, -8.0, -6.0]
    """
    limits = torch.finfo(TORCH_DTYPES[dtype])
    power = (x.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.double().clamp_(min=limits.tiny).mul_(limits.eps / 2)


# one tensor


class _Found:
    """Sums of one tensor, by positions in `labels`.

    Attributes:
        dots: inner products of the changes; zeros where there is no base, or anything is not finite.
        absolute: the same of their absolute values.
        base: squared norm of the base.
        nonfinite: entries that are NaN or infinite: a number a model and, last, that of the base.
        equal: whether model i equals model j < i, at [i][j].
    """

    def __init__(self, labels: Mapping[str, int], tensor: TensorPlan) -> None:
        count = len(labels)
        self.labels = list(labels)
        self.weight = [tensor.weight[k] for k in labels.values()]
        self.based_on = tensor.base.ref if tensor.base is not None else ""
        self.dots = self.absolute = torch.zeros(count, count, dtype=torch.float64)
        self.base = 0.0
        self.changed, self.lost, self.nonfinite = [0] * count, [0] * count, [0] * (count + 1)
        self.equal = [[True] * count for _ in labels]
        self.layer: OfLayer | None = None


def _measured(plan: Plan, tensor: TensorPlan) -> _Found:
    labels = labels_of(plan, tensor)
    pieces = [tensor.models[k] for k in labels.values()]
    count = len(pieces)
    found = _Found(labels, tensor)
    dots: list[list[float]] = []
    absolute: list[list[float]] = []
    bases: list[float] = []
    counts = tensor.base is not None and tensor.role != "statistic"
    for cells in _cells(plan, tensor, pieces):
        for i, x in enumerate(cells):
            if x is not None and not isfinite(float(x.sum())):
                found.nonfinite[i] += x.numel() - int(x.isfinite().sum())
        *models, base = cells
        for i, j in combinations(range(count), 2):
            found.equal[j][i] = found.equal[j][i] and torch.equal(models[j], models[i])
        if base is None:
            continue
        for i, x in enumerate(models):
            found.changed[i] += int((x != base).count_nonzero())
        if not counts or any(found.nonfinite):
            continue
        d = torch.stack(models).sub_(base)
        if tensor.info.dtype in COARSE:
            half = half_unit(base, tensor.info.dtype)
            for i, d_i in enumerate(d):
                size = d_i.abs()
                found.lost[i] += int(((size < half) & (size > 0)).count_nonzero())
        bases.append(float(torch.dot(base, base)))
        if not all(map(isfinite, (bases[-1], *torch.linalg.vecdot(d, d).tolist()))):
            raise NonFiniteError(
                f"{pieces[0].name} holds values of 1e154 and more, whose squares are beyond float64",
                "such models can be merged, and not measured",
            )
        dots.append(product(d, d.T).reshape(-1).tolist())
        d.abs_()
        absolute.append(product(d, d.T).reshape(-1).tolist())
    if dots and not any(found.nonfinite):
        found.dots, found.absolute, found.base = _summed(dots, count), _summed(absolute, count), fsum(bases)
        if is_matrix(tensor.role):
            found.layer = _layer(plan, tensor, [(n, k) for i, (n, k) in enumerate(labels.items()) if found.dots[i, i]])
    for piece in (*pieces, tensor.base):
        if piece is not None and (stage := _stage(plan, piece)) is not None:
            stage.forget(piece.name)
    return found


def _stage(plan: Plan, piece: Piece) -> Merged | None:
    """The merge that a tensor comes from; None where it comes from a file."""
    source = beneath(plan.sources[piece.ref])
    return source if isinstance(source, Merged) else None


def _cells(plan: Plan, tensor: TensorPlan, pieces: Sequence[Piece]) -> Iterator[list[Any]]:
    """Every cell of the grid of all models and, last, of the base, flat and in float64."""
    shape = tensor.info.shape
    read = [*pieces, tensor.base]
    whole = not shape or any(_stage(plan, p) is not None for p in read if p is not None)
    cell = cell_rows(shape)
    for rows in [None] if whole else chunk_rows(shape, CHUNK_ELEMENTS):
        parts = [None if p is None else read_part(plan.sources[p.ref], p, rows, tensor) for p in read]
        for start in range(0, (rows[1] - rows[0]) if rows is not None else tensor.info.rows, cell):
            yield [None if x is None else (x[start : start + cell] if shape else x).reshape(-1).double() for x in parts]


def _summed(parts: Sequence[Sequence[float]], count: int) -> Tensor:
    return torch.tensor([fsum(column) for column in zip(*parts, strict=True)], dtype=torch.float64).reshape(
        count, count
    )


def _layer(plan: Plan, tensor: TensorPlan, live: Sequence[tuple[str, int]]) -> OfLayer | None:
    m, n = matrix_shape(tensor.role, tensor.info.shape)
    share = min(m, n) // max(1, len(live))
    if len(live) < 2 or not share or min(m, n) < 2:
        return None
    few = max(1, min(round(LEADING * n), m, n))
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    for label, k in live:
        left[label], right[label] = leading(_change(plan, tensor, k), max(few, share))
    overlap: dict[tuple[str, str], float] = {}
    chance: dict[tuple[str, str], float] = {}
    for i, j in combinations(left, 2):
        v_i, v_j = right[i][:, :few], right[j][:, :few]
        fewest = min(v_i.shape[1], v_j.shape[1])
        overlap[i, j] = float(product(v_i.T, v_j).square().sum()) / fewest
        chance[i, j] = v_i.shape[1] * v_j.shape[1] / n / fewest
    kept = [[x[:, :share] for x in side.values()] for side in (left, right)]
    return OfLayer(overlap, chance, *_interference(*kept))


def _interference(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[float, float, float, float, float, float]:
    """Norms of U^T U - I and V^T V - I, the same as shares, and the shares of random directions."""
    ranks = [x.shape[1] for x in left]
    most = sum(2 * min(pair) for pair in combinations(ranks, 2))
    between = sum(2 * a * b for a, b in combinations(ranks, 2))
    norms = []
    for blocks in (left, right):
        joined = torch.cat(list(blocks), dim=1)
        gram = product(joined.T, joined)
        norms.append(float(torch.linalg.vector_norm(gram - torch.eye(len(gram), dtype=gram.dtype))))
    shares = [norm**2 / most for norm in norms]
    chances = [between / len(blocks[0]) / most for blocks in (left, right)]
    return norms[0], norms[1], shares[0], shares[1], chances[0], chances[1]


def _change(plan: Plan, tensor: TensorPlan, k: int) -> Tensor:
    """One model minus the base as a matrix (out, in); float32, or float64 where either is."""
    assert tensor.base is not None
    x, base = (plan.sources[p.ref].read(p.name) for p in (tensor.models[k], tensor.base))
    dtype = torch.float64 if torch.float64 in (x.dtype, base.dtype) else torch.float32
    d = (x.to(dtype) - base.to(dtype)).reshape(x.shape[0], -1)
    return d.T if tensor.role == "transposed" else d


# all tensors


def _joined(found: Mapping[str, _Found]) -> Conflicts:
    models: dict[str, OfModel] = {}
    nonfinite: dict[str, dict[str, int]] = {}
    for name, one in found.items():
        for i, label in enumerate(one.labels):
            model = models.setdefault(label, OfModel())
            model.changed += one.changed[i]
            model.lost += one.lost[i]
        for label, count in zip((*one.labels, one.based_on), one.nonfinite, strict=True):
            if count:
                nonfinite.setdefault(label, {})[name] = count
    for label, model in models.items():
        own = [(f, f.labels.index(label)) for f in found.values() if label in f.labels]
        model.norm = sqrt(fsum(float(f.dots[i, i]) for f, i in own))
        model.weighted = sqrt(fsum(f.weight[i] ** 2 * float(f.dots[i, i]) for f, i in own))
        model.base = sqrt(fsum(f.base for f, _ in own))
    layers = {name: one.layer for name, one in found.items() if one.layer is not None}
    pairs = {
        (i, j): pair
        for i, j in combinations(models, 2)
        if (pair := _pair(i, j, [f for f in found.values() if i in f.labels and j in f.labels], layers)) is not None
    }
    return Conflicts(models, pairs, layers, nonfinite, len(found))


def _pair(one: str, other: str, found: Sequence[_Found], layers: Mapping[str, OfLayer]) -> OfPair | None:
    if not found:
        return None
    at = [(f, f.labels.index(one), f.labels.index(other)) for f in found]
    dot = fsum(float(f.dots[i, j]) for f, i, j in at)
    norms = [sqrt(fsum(float(f.dots[k[s], k[s]]) for f, *k in at)) for s in (0, 1)]
    signed = fsum(f.weight[i] * f.weight[j] * float(f.dots[i, j]) for f, i, j in at)
    size = fsum(abs(f.weight[i] * f.weight[j]) * float(f.absolute[i, j]) for f, i, j in at)
    shared = [layer for layer in layers.values() if (one, other) in layer.overlap]
    return OfPair(
        all(f.equal[max(i, j)][min(i, j)] for f, i, j in at),
        dot / norms[0] / norms[1] if all(norms) else None,
        (1 - signed / size) / 2 if size else None,
        fsum(layer.overlap[one, other] for layer in shared) / len(shared) if shared else None,
        fsum(layer.chance[one, other] for layer in shared) / len(shared) if shared else None,
    )


def _sampled(plan: Plan, layers: int | None) -> list[str]:
    """Names of the tensors to measure: what is merged, in some layers of each stack, and all outside them."""
    if layers is not None and layers < 1:
        raise ParameterError(f"layers is {layers}; it is at least 1")
    found = []
    for name, tensor in plan.tensors.items():
        place = place_of(name)
        count = plan.layers.get(place.stack, 0) if place is not None else 0
        if tensor.role in ("fixed", "exact"):
            continue
        if place is None or layers is None or layers >= count or place.index in _spread(count, layers):
            found.append(name)
    return found


def _spread(count: int, layers: int) -> set[int]:
    """So many of the layers 0 to count - 1, evenly spread, both ends among them."""
    return {round(i * (count - 1) / max(1, layers - 1)) for i in range(layers)}
