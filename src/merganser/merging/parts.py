"""What a merge does with one chunk of one tensor before and after the method's function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merganser.errors import NonFiniteError
from merganser.merging.plan import Piece, TensorPlan
from merganser.merging.ranking import Ranked
from merganser.methods.joint import Joint
from merganser.numerics import sum_is_finite


@dataclass
class Measured:
    """What was measured of one whole tensor.

    Attributes:
        brought: figures that the function asks for.
        ranks: for each model (or for all at once) which entries are kept; None where the function does not ask.
        position: row that must be asked for next, since ranks are given out in order.
    """

    brought: dict[str, Any]
    ranks: list[Ranked | None] | None = None
    position: int = 0


def refuse_nonfinite(piece: Piece, x: Tensor) -> None:
    """Refuse NaN and infinity in what was read of a model.

    Raises:
        NonFiniteError: Names the tensor and the model.
    """
    if not (sum_is_finite(x) or bool(torch.isfinite(x).all())):
        raise NonFiniteError(f"{piece.name} of {piece.ref} holds NaN or infinity", "leave the model out")


def kept_of(row: Joint, measured: Measured, stack: Sequence[Tensor]) -> list[Tensor]:
    """For each model, or for all at once, 1 where the next entries are kept, else 0."""
    assert row.score is not None
    assert measured.ranks is not None
    return [
        torch.zeros_like(score) if ranks is None else ranks.mask(score)
        for ranks, score in zip(measured.ranks, row.score(stack), strict=True)
    ]


def seen(x: Tensor, tensor: TensorPlan) -> Tensor:
    """A tensor as a rule for matrices sees it: (out, in)."""
    flat = x.flatten(1)
    return flat.T.contiguous() if tensor.role == "transposed" else flat


def restored(x: Tensor, tensor: TensorPlan) -> Tensor:
    """The inverse of `seen`."""
    return (x.T if tensor.role == "transposed" else x).reshape(tensor.info.shape)
