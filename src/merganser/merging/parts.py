"""What a merge does with one chunk of one tensor before and after the method's function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merganser.errors import NonFiniteError
from merganser.merging.plan import Piece, TensorPlan
from merganser.merging.ranking import Ranked
from merganser.numerics import all_finite


@dataclass
class Measured:
    """What was measured of one whole tensor.

    Attributes:
        brought: figures that the function asks for.
        ranks: for each model (or for all at once) which entries are kept; None where the function does not ask.
        position: row that must be asked for next, since ranks are given out in order.
        masks: by rows, the masks of all models that were drawn while `stretch` was measured, as bits.
    """

    brought: dict[str, Any]
    ranks: list[Ranked | None] | None = None
    position: int = 0
    masks: dict[tuple[int, int] | None, list[Any]] = field(default_factory=dict)


def refuse_nonfinite(piece: Piece, x: Tensor) -> None:
    """Refuse NaN and infinity in what was read of a model.

    Raises:
        NonFiniteError: Names the tensor and the model.
    """
    if not all_finite(x):
        raise NonFiniteError(f"{piece.name} of {piece.ref} holds NaN or infinity", "leave the model out")


def kept_of(measured: Measured, scores: Sequence[Tensor]) -> list[Tensor]:
    """For each model, or for all at once, 1 where the next entries are kept, else 0."""
    assert measured.ranks is not None
    return [
        torch.zeros_like(score) if ranks is None else ranks.mask(score)
        for ranks, score in zip(measured.ranks, scores, strict=True)
    ]


def mean_of(stack: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Running statistics of several models: the mean weighted by the sizes of the weights, whatever the method.

    >>> mean_of([torch.tensor([1.0]), torch.tensor([4.0])], [2.0, -1.0])
    tensor([2.])
    """
    sizes = [abs(w) for w in weight]
    total = sum(sizes)
    if not total:
        sizes, total = [1.0] * len(stack), float(len(stack))
    merged = stack[0] * (sizes[0] / total)
    for x, size in zip(stack[1:], sizes[1:], strict=True):
        merged.add_(x, alpha=size / total)
    return merged


def packed(masks: Tensor) -> list[Any]:
    """Masks of several models as bits, an eighth of their room."""
    return [np.packbits(mask.numpy()) for mask in masks]


def unpacked(bits: Sequence[Any], shape: Sequence[int]) -> Iterator[Tensor]:
    """The masks again, one after another.

    >>> [mask.tolist() for mask in unpacked(packed(torch.tensor([[True, False]])), (2,))]
    [[True, False]]
    """
    for some in bits:
        yield torch.from_numpy(np.unpackbits(some, count=prod(shape))).view(torch.bool).reshape(tuple(shape))


def seen(x: Tensor, tensor: TensorPlan) -> Tensor:
    """A tensor as a rule for matrices sees it: (out, in)."""
    flat = x.flatten(1)
    return flat.T.contiguous() if tensor.role == "transposed" else flat


def restored(x: Tensor, tensor: TensorPlan) -> Tensor:
    """The inverse of `seen`."""
    return (x.T if tensor.role == "transposed" else x).reshape(tensor.info.shape)
