"""The arithmetic of one LoRA, in row blocks that do not depend on which rows are asked for.

    W' = W + s B A                                   LoRA
    W' = diag(m / |W + s B A|_2) (W + s B A)         DoRA, norms over the inputs of each output

A matrix product may round one row differently when it stands among other rows. So rows are always computed in the
same blocks, [0, 256), [256, 512), ..., and a slice is cut from them.

Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 256


def blocks(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Blocks of a tensor of so many rows that cover [start, stop).

    >>> list(blocks(300, 520, 600))
    [(256, 512), (512, 600)]
    """
    first = start - start % BLOCK_ROWS
    for low in range(first, stop if start < stop else first, BLOCK_ROWS):
        yield low, min(low + BLOCK_ROWS, rows)


def low_rank_rows(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Rows of the change s L R, for some rows of L.

    Args:
        left: shape (rows, r).
        right: shape (r, columns).
        scaling: s.

    >>> low_rank_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), 0.5)
    tensor([[1.5000, 2.0000],
            [3.0000, 4.0000]])
    """
    return (left @ right).mul_(scaling)


def dora_rows(w: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of a Linear's weight (out, in), rescaled to norm `magnitude`.

    >>> dora_rows(torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]))
    tensor([[6., 8.]])
    """
    factor: Tensor = magnitude / torch.linalg.vector_norm(w, dim=1)
    return factor.unsqueeze(1) * w


def dora_columns(w: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Rows of a Conv1D's weight (in, out), whose columns of length `norm` are rescaled to `magnitude`."""
    return (magnitude / norm) * w
