"""Passthrough: the tensor of one model.

    W = factor * W_1        with factor 1 bit for bit

Source: mergekit's documentation of `passthrough`, whose `scale` is `factor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import per_model

if TYPE_CHECKING:
    from jaxtyping import Float


def passthrough(
    x: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]], *, factor: float | Sequence[float] = 1.0
) -> Float[Tensor, "*S"]:
    """A copy of the only model, times `factor`.

    Args:
        x: the one model.
        factor: any finite number.

    Returns:
        The tensor, in memory of its own.

    Raises:
        ParameterError: If there is not one model, or `factor` is not finite.

    >>> import torch
    >>> passthrough(torch.tensor([[1.0, -2.0]]), factor=0.5)
    tensor([ 0.5000, -1.0000])
    """
    if len(x) != 1:
        raise ParameterError(f"passthrough takes one model a tensor; there are {len(x)}")
    (value,) = per_model(factor, 1)
    if not isfinite(value):
        raise ParameterError(f"factor is {value}; it is a finite number")
    (only,) = x
    return only.clone() if value == 1 else only * value
