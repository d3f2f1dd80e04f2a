"""Exact ranks in whole tensors that are only seen chunk by chunk: which entries are the largest, ties by place.

A sample brackets the score at each edge; one pass counts what lies above the bracket and collects what lies inside, so
the score is found exactly whatever the sample was. Where the bracket misses it, or too much lies inside, two passes of
histograms find it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Entries of a sample: with them a bracket holds some three hundredths of all.
SAMPLE_ELEMENTS = 1 << 14
#: Share of all entries that may be collected inside a bracket.
MOST_INSIDE = 0.1

Stack = Sequence[Tensor]
Span = tuple[int, int]


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
        array = _array(scores)
        if self.upper == self.lower:  # both edges lie among the same equals
            kept = torch.zeros_like(scores)
            at = np.flatnonzero(array == self.lower)
            kept.view(-1)[at[self.skip : self.skip + self.room]] = 1
            skipped = min(self.skip, len(at))
            self.skip, self.room = self.skip - skipped, max(0, self.room - (len(at) - skipped))
            return kept
        kept, equals = torch.empty_like(scores), _count(array, self.lower) if self.room else 0
        (torch.gt if equals > self.room or not self.room else torch.ge)(scores, self.lower, out=kept)
        if equals > self.room:
            kept.view(-1)[np.flatnonzero(array == self.lower)[: self.room]] = 1
        self.room = max(0, self.room - equals)
        if self.upper < inf:
            equals = _count(array, self.upper) if self.skip else 0
            compare = torch.le if equals > self.skip or not self.skip else torch.lt
            kept *= compare(scores, self.upper, out=torch.empty_like(scores))
            if equals > self.skip:
                kept.view(-1)[np.flatnonzero(array == self.upper)[: self.skip]] = 0
            self.skip = max(0, self.skip - equals)
        return kept


def ranked(
    passes: Callable[[], Iterable[Stack]], spans: Sequence[Span | None], size: int, samples: Stack | None = None
) -> list[Ranked | None]:
    """Find, for each of several tensors of scores, those at the edges of the ranks [start, stop).

    Args:
        passes: gives all scores again, chunk by chunk, one tensor for each span; not negative, not NaN.
        spans: ranks [start, stop) that are kept, the largest score first; None where no edge is looked for.
        size: scores of each tensor in all.
        samples: some of the scores of each tensor; without them, or in float64, another way is taken to the same end.
    """
    some = samples if samples is not None else next(iter(passes()))
    if some[0].dtype == torch.float64:
        return [_sorted([stack[k] for stack in passes()], span) for k, span in enumerate(spans)]
    if samples is None:
        return _counted(passes, spans)
    brackets = [_brackets(sample, span, size) for sample, span in zip(samples, spans, strict=True)]
    for stack in passes():
        for edges, scores in zip(brackets, stack, strict=True):
            for edge in edges:
                edge.add(_array(scores))
    if not all(edge.holds() for edges in brackets for edge in edges):
        return _counted(passes, spans)
    found: list[Ranked | None] = []
    for span, edges in zip(spans, brackets, strict=True):
        if span is None:
            found.append(None)
            continue
        values = [edge.score() for edge in edges]
        upper = values[0][0] if span[0] else None
        found.append(_edges(upper, values[-1][0], dict(values).__getitem__, *span))
    return found


def _brackets(sample: Tensor, span: Span | None, size: int) -> list[_Bracket]:
    """Where to look for the edges of a span: the upper one, unless it is the top, and the lower one."""
    if span is None:
        return []
    ordered = np.sort(_array(sample))[::-1]
    return [_Bracket.of(rank, ordered, size) for rank in (span[0] - 1, span[1] - 1) if rank >= 0]


@dataclass
class _Bracket:
    """Where the score of one rank is looked for.

    Attributes:
        rank: from 0, the largest score first.
        low: scores below it rank lower, as the sample says.
        high: scores above it rank higher.
        most: how many scores may be collected.
        above: how many scores are above `high`.
        inside: how many are from `low` to `high`.
        parts: those, chunk by chunk; not collected where `low` is `high`, dropped where there are too many.
    """

    rank: int
    low: float
    high: float
    most: float
    above: int = 0
    inside: int = 0
    parts: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, rank: int, ordered: Any, size: int) -> _Bracket:
        """The bracket of a rank among `size` scores, from a sample in falling order."""
        share, count = (rank + 0.5) / size, len(ordered)
        spread = 4 * sqrt(count * share * (1 - share)) + 1
        first, last = int(share * count - spread), int(share * count + spread) + 1
        high = float(ordered[first]) if first >= 0 else inf
        low = float(ordered[last]) if last < count else -1.0
        return cls(rank, low, high, max(SAMPLE_ELEMENTS, MOST_INSIDE * size))

    def add(self, scores: Any) -> None:
        """Look at some more scores."""
        higher, reached = scores > self.high, scores >= self.low
        above = int(np.count_nonzero(higher))
        self.above += above
        self.inside += int(np.count_nonzero(reached)) - above
        if self.low == self.high:
            return
        if self.inside > self.most:
            self.parts.clear()
        else:
            reached ^= higher
            self.parts.append(scores.take(np.flatnonzero(reached)))

    def holds(self) -> bool:
        """Whether the score of the rank is inside, and was collected."""
        within = self.above <= self.rank < self.above + self.inside
        return within and (self.low == self.high or self.inside <= self.most)

    def score(self) -> tuple[float, int]:
        """The score of the rank, and how many scores are larger."""
        if self.low == self.high:
            return self.high, self.above
        ordered = np.sort(np.concatenate(self.parts))  # np.partition takes longer where many are equal
        score = ordered[len(ordered) - 1 - (self.rank - self.above)]
        return float(score), self.above + len(ordered) - int(np.searchsorted(ordered, score, side="right"))


def _count(array: Any, value: float) -> int:
    return int(np.count_nonzero(array == value))


def _array(x: Tensor) -> Any:
    return x.reshape(-1).numpy()


def _counted(passes: Callable[[], Iterable[Stack]], spans: Sequence[Span | None]) -> list[Ranked | None]:
    """The edges by two passes of histograms.

    The bits of a float32 that is not negative order like the number: the upper 16 are counted in the first pass, and
    the lower 16 of the bins at the edges in the second.
    """
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
