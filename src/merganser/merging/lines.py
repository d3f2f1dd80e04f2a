"""Tensors whose rows are too long to stream by, such as all experts of a layer in one, as lines along their last axis.

Row-major order is the same either way, so whatever looks at single elements gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from merganser.merging.plan import Piece, TensorPlan
from merganser.merging.survey import CELL_ELEMENTS
from merganser.merging.vocabulary_rows import unwrapped
from merganser.types import Source


def is_long(shape: Sequence[int]) -> bool:
    """Whether a row of axis 0 is more than is measured at a time, and has lines.

    >>> is_long((128, 1536, 2048)), is_long((151936, 4096)), is_long((512, 512, 3, 3))
    (True, False, False)
    """
    return len(shape) > 2 and prod(shape[1:]) > CELL_ELEMENTS


def reads_lines(source: Source, name: str) -> bool:
    """Whether a source can read some lines of a tensor without its whole rows."""
    source = unwrapped(source)
    readable: Any = getattr(source, "in_lines", None)
    return hasattr(source, "read_lines") if readable is None else name in readable


def in_lines(tensor: TensorPlan) -> TensorPlan:
    """The same tensor as a matrix of its lines."""
    shape = tensor.info.shape
    return replace(tensor, info=replace(tensor.info, shape=(prod(shape[:-1]), shape[-1])))


def read_part(source: Source, piece: Piece, part: tuple[int, int] | None, tensor: TensorPlan) -> Tensor:
    """Some of a piece: lines where the tensor is seen so, else rows.

    Args:
        source: that holds the piece.
        piece: of the tensor.
        part: which; None for all.
        tensor: as it is seen.
    """
    if len(tensor.info.shape) == len(source.infos[piece.name].shape):
        return source.read(piece.name, part)
    inner: Any = unwrapped(source)
    lines: Tensor = inner.read_lines(piece.name, part)
    return lines
