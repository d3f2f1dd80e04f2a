"""Passes that only measure: inner products, exact ranks and norms of whole tensors, streamed in chunks.

Everything is added up on a grid that depends on a tensor's shape alone, so no figure depends on how it was chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from merganser.numerics import product

#: Elements of one cell of the grid, about.
CELL_ELEMENTS = 1 << 16

Stack = Sequence[Tensor]


def cell_rows(shape: Sequence[int]) -> int:
    """Rows of axis 0 in one cell of the grid.

    >>> cell_rows((10, 1 << 15)), cell_rows((100,)), cell_rows(())
    (2, 65536, 65536)
    """
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    return max(1, CELL_ELEMENTS // max(1, row_elements))


def chunk_rows(shape: Sequence[int], elements: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of axis 0 by whole cells, about `elements` at a time, at least one cell.

    >>> list(chunk_rows((5, 1 << 15), 1 << 17))
    [(0, 4), (4, 5)]
    >>> list(chunk_rows((0, 3), 1 << 17))
    [(0, 0)]
    """
    rows = shape[0] if shape else 1
    cell = cell_rows(shape)
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    step = max(1, elements // max(1, cell * row_elements)) * cell
    if rows == 0:
        yield 0, 0
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def inner_products(chunks: Iterable[Stack], rows_of_a_cell: int) -> Tensor:
    """Inner products of K tensors, from the chunks of their stack in order.

    Args:
        chunks: K tensors each, of the same rows.
        rows_of_a_cell: of the grid.

    Returns:
        float64, shape (K, K), exactly symmetric.
    """
    found: list[list[float]] = []
    models = 0
    for stack in chunks:
        models = len(stack)
        rows = stack[0].shape[0] if stack[0].dim() else 1
        for start in range(0, rows, rows_of_a_cell):
            cell = torch.stack([_part(x, start, start + rows_of_a_cell).reshape(-1).double() for x in stack])
            found.append(product(cell, cell.T).reshape(-1).tolist())
    dots = torch.tensor([fsum(column) for column in zip(*found, strict=True)], dtype=torch.float64)
    dots = dots.reshape(models, models) if found else torch.zeros(models, models, dtype=torch.float64)
    return dots.triu() + dots.triu(1).T


def sums(chunks: Iterable[Stack], rows_of_a_cell: int, each: Callable[[Tensor], Tensor]) -> list[float]:
    """Sum over the entries of each of K tensors, from the chunks of their stack in order.

    Args:
        chunks: K tensors each, of the same rows.
        rows_of_a_cell: of the grid.
        each: what is summed up: entries -> their contributions.
    """
    found: list[list[float]] = []
    for stack in chunks:
        found = found or [[] for _ in stack]
        for terms, x in zip(found, stack, strict=True):
            rows = x.shape[0] if x.dim() else 1
            for start in range(0, rows, rows_of_a_cell):
                terms.append(float(each(_part(x, start, start + rows_of_a_cell)).sum(dtype=torch.float64)))
    return [fsum(terms) for terms in found]


@dataclass
class Ranked:
    """Which entries of one tensor of scores have a rank in [start, stop), the largest first, exactly.

    A score above `upper` ranks too high, one below `lower` too low; among equals at either edge the first in row-major
    order rank higher, so entries must be asked for in that order, from the first on.

    Attributes:
        upper: score of rank `start - 1`, infinity where start is 0.
        lower: score of rank `stop - 1`.
        skip: how many of the entries equal to `upper` rank too high.
        room: how many of the entries equal to `lower` are kept.
    """

    upper: float
    lower: float
    skip: int
    room: int

    def mask(self, scores: Tensor) -> Tensor:
        """1 where the next entries are kept, else 0, in the type of the scores: comparisons are fastest that way."""
        kept = torch.gt(scores, self.lower, out=torch.empty_like(scores))
        if self.upper == self.lower:  # both edges lie among the same equals
            kept.zero_()
        if self.room:
            self._take(kept, scores)
        if self.lower < self.upper < float("inf"):
            kept *= torch.lt(scores, self.upper, out=torch.empty_like(scores))
            at = (scores == self.upper).reshape(-1).nonzero().squeeze(1)
            kept.view(-1)[at[self.skip :]] = 1
            self.skip = max(0, self.skip - at.numel())
        return kept

    def _take(self, kept: Tensor, scores: Tensor) -> None:
        """Keep the first of those at the lower edge, as many as there is room for."""
        equal = torch.eq(scores, self.lower, out=torch.empty_like(scores))
        count = int(equal.sum(dtype=torch.float64))
        skip = min(self.skip, count) if self.upper == self.lower else 0
        if not skip and count <= self.room:
            kept += equal
        else:
            at = equal.reshape(-1).nonzero().squeeze(1)
            kept.view(-1)[at[skip : skip + self.room]] = 1
        if self.upper == self.lower:
            self.skip -= skip
        self.room = max(0, self.room - (count - skip))


def ranked(passes: Callable[[], Iterable[Stack]], spans: Sequence[tuple[int, int] | None]) -> list[Ranked | None]:
    """Find, for each of several tensors of scores, those at the edges of the ranks [start, stop).

    Two passes of histograms: the bits of a float32 that is not negative order like the number; the upper 16 are
    counted in the first pass, and the lower 16 of the bins at the edges in the second. float64 scores are sorted whole.

    Args:
        passes: gives all scores again, chunk by chunk, one tensor for each span; not negative, not NaN.
        spans: ranks [start, stop) that are kept, the largest score first; None where no edge is looked for.
    """
    if next(iter(passes()))[0].dtype == torch.float64:
        return [_sorted([stack[k] for stack in passes()], span) for k, span in enumerate(spans)]
    high = [torch.zeros(1 << 15, dtype=torch.int64) for _ in spans]
    for stack in passes():
        for counts, scores, span in zip(high, stack, spans, strict=True):
            if span is not None:
                counts += torch.bincount(_halves(scores)[1::2], minlength=1 << 15)
    above = [counts.flip(0).cumsum(0).flip(0) for counts in high]  # entries in this bin and all higher ones
    low = [
        {_bin(a, rank): torch.zeros(1 << 16, dtype=torch.int64) for rank in (span[0] - 1, span[1] - 1) if rank >= 0}
        if span is not None
        else {}
        for a, span in zip(above, spans, strict=True)
    ]
    for stack in passes():
        for bins, scores in zip(low, stack, strict=True):
            halves = _halves(scores) if bins else None
            for number, counts in bins.items():
                assert halves is not None
                inside = halves[::2][halves[1::2] == number]
                counts += torch.bincount(inside.to(torch.int32) & 0xFFFF, minlength=1 << 16)
    return [None if span is None else _located(a, bins, span) for a, bins, span in zip(above, low, spans, strict=True)]


def _located(above: Tensor, low: Mapping[int, Tensor], span: tuple[int, int]) -> Ranked:
    larger: dict[float, int] = {}

    def score_of(rank: int) -> float:
        number = _bin(above, rank)
        beyond = int(above[number + 1]) if number + 1 < len(above) else 0
        inside = low[number].flip(0).cumsum(0).flip(0) + beyond
        offset = _bin(inside, rank)
        score = float(torch.tensor((number << 16) | offset, dtype=torch.int32).view(torch.float32))
        larger[score] = int(inside[offset + 1]) if offset + 1 < len(inside) else beyond
        return score

    start, stop = span
    upper = score_of(start - 1) if start else None
    return _edges(upper, score_of(stop - 1), larger.__getitem__, start, stop)


def _sorted(parts: Sequence[Tensor], span: tuple[int, int] | None) -> Ranked | None:
    if span is None:
        return None
    start, stop = span
    order = torch.cat([part.reshape(-1) for part in parts]).sort(descending=True).values
    upper = float(order[start - 1]) if start else None
    return _edges(upper, float(order[stop - 1]), lambda score: int((order > score).sum()), start, stop)


def _bin(above: Tensor, rank: int) -> int:
    """The last bin with more than `rank` entries in it and the higher ones."""
    return int((above > rank).sum()) - 1


def _edges(upper: float | None, lower: float, larger: Callable[[float], int], start: int, stop: int) -> Ranked:
    if upper is None:
        return Ranked(float("inf"), lower, 0, stop - larger(lower))
    skip = start - larger(upper)
    return Ranked(upper, lower, skip, stop - start if upper == lower else stop - larger(lower))


def _halves(scores: Tensor) -> Tensor:
    """The two 16-bit halves of every float32, the lower first; minus zero counts as zero."""
    return (scores.reshape(-1) + 0.0).view(torch.int16)


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop] if x.dim() else x
