"""Passes that only measure: inner products and sums of whole tensors, streamed in chunks.

Everything is added up on a grid that depends on a tensor's shape alone, so no figure depends on how it was chunked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import fsum

import torch
from torch import Tensor

from merganser.numerics import product

#: Elements of one cell of the grid, about.
CELL_ELEMENTS = 1 << 16

#: Elements of every model that are multiplied at a time: they stay in the processor's cache.
BLOCK_ELEMENTS = 1 << 14

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
        buffer = torch.empty(models, BLOCK_ELEMENTS, dtype=torch.float64)
        rows = stack[0].shape[0] if stack[0].dim() else 1
        for start in range(0, rows, rows_of_a_cell):
            parts = [_part(x, start, start + rows_of_a_cell).reshape(-1) for x in stack]
            for low in range(0, parts[0].numel(), BLOCK_ELEMENTS):
                block = buffer[:, : min(BLOCK_ELEMENTS, parts[0].numel() - low)]
                for row, part in zip(block, parts, strict=True):
                    row.copy_(part[low : low + BLOCK_ELEMENTS])
                found.append(product(block, block.T).reshape(-1).tolist())
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


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop] if x.dim() else x
