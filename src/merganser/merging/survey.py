"""Passes that only measure: inner products and sums of whole tensors, streamed in chunks.

Everything is added up on a grid that depends on a tensor's shape alone, so no figure depends on how it was chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import fsum, prod

import torch
from torch import Tensor

from merganser.numerics import gram_of_rows

#: Elements of one cell of the grid, about.
CELL_ELEMENTS = 1 << 16

#: Elements of all models together that are multiplied at a time, about: they stay in the processor's cache.
BLOCK_ELEMENTS = 1 << 17

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


def spread_rows(shape: Sequence[int], elements: int) -> list[tuple[int, int] | None]:
    """Rows of about that many elements in all, at eight places that are evenly spread; (None,) of a scalar.

    >>> spread_rows((100, 10), 200)
    [(0, 3), (13, 16), (27, 30), (41, 44), (55, 58), (69, 72), (83, 86), (97, 100)]
    """
    if not shape:
        return [None]
    wanted = min(shape[0], -(-elements // max(1, prod(shape[1:]))))
    places = min(wanted, 8)
    height = -(-wanted // places)
    starts = [place * (shape[0] - height) // max(1, places - 1) for place in range(places)]
    return [(start, start + height) for start in starts]


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
        wide = 1 << (BLOCK_ELEMENTS // models).bit_length() - 1
        buffer = torch.empty(models, wide, dtype=torch.float64)
        rows = stack[0].shape[0] if stack[0].dim() else 1
        for start in range(0, rows, rows_of_a_cell):
            parts = [_part(x, start, start + rows_of_a_cell).reshape(-1) for x in stack]
            for low in range(0, parts[0].numel(), wide):
                block = buffer[:, : min(wide, parts[0].numel() - low)]
                for row, part in zip(block, parts, strict=True):
                    row.copy_(part[low : low + wide])
                found.append(gram_of_rows(block).reshape(-1).tolist())
    if not found:
        return torch.zeros(models, models, dtype=torch.float64)
    dots = [fsum(column) for column in zip(*found, strict=True)]
    return torch.tensor(dots, dtype=torch.float64).reshape(models, models)


def sums(chunks: Iterable[Iterable[Tensor]], rows_of_a_cell: int, each: Callable[[Tensor], float]) -> list[float]:
    """Sum over the entries of each of K tensors, from the chunks of their stack in order.

    Args:
        chunks: K tensors each, of the same rows; one is done with before the next is asked for.
        rows_of_a_cell: of the grid.
        each: what is summed up: some entries -> what they add, in float64.
    """
    found: list[list[float]] = []
    for stack in chunks:
        for k, x in enumerate(stack):
            if k == len(found):
                found.append([])
            rows = x.shape[0] if x.dim() else 1
            for start in range(0, rows, rows_of_a_cell):
                found[k].append(each(_part(x, start, start + rows_of_a_cell)))
    return [fsum(terms) for terms in found]


def norm_ratios(parts: Iterable[tuple[Stack, Iterable[Tensor]]], rows_of_a_cell: int) -> Tensor:
    """L1 norm of each of K tensors over that of what is kept of it; 1 where nothing is.

    Args:
        parts: chunk by chunk, the K tensors and the K with zeros where they are not kept.
        rows_of_a_cell: of the grid.

    Returns:
        float64, shape (K,).
    """
    both = sums((chain(d, kept) for d, kept in parts), rows_of_a_cell, _size)
    whole, left = both[: len(both) // 2], both[len(both) // 2 :]
    return torch.tensor([a / b if b else 1.0 for a, b in zip(whole, left, strict=True)], dtype=torch.float64)


def _size(x: Tensor) -> float:
    return float(x.abs().sum(dtype=torch.float64))


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop] if x.dim() else x
