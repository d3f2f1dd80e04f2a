"""The weighted sum that most joint methods end in.

One buffer of the size of one model, filled in the order of the models: the result depends neither on how a tensor
was cut nor on whether the models came as one stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum, isfinite

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import per_model


def weights_of(weight: Tensor | Sequence[float], models: int) -> list[float]:
    """One finite weight a model.

    Raises:
        ParameterError: If there are more or fewer, or one is not finite.

    >>> weights_of(torch.tensor([0.5, 2.0]), 2)
    [0.5, 2.0]
    """
    weights = per_model(weight.tolist() if isinstance(weight, Tensor) else weight, models)
    for w in weights:
        if not isfinite(w):
            raise ParameterError(f"weight is {w}; it is a finite number")
    return weights


def total_of(weights: Sequence[float]) -> float:
    """Sum of the weights, to divide by.

    Raises:
        ParameterError: If it is zero up to rounding.

    >>> total_of([0.25, 0.5])
    0.75
    """
    total = fsum(weights)
    if not abs(total) > 1e-12 * fsum(map(abs, weights)):
        raise ParameterError(
            f"the weights {list(weights)} add up to 0, and normalize divides by their sum",
            hint="change a weight, or set normalize to false",
        )
    return total


def checked_scale(scale: float) -> float:
    """The factor itself.

    Raises:
        ParameterError: If it is not finite.
    """
    if not isfinite(scale):
        raise ParameterError(f"scale is {scale}; it is a finite number")
    return scale


def weighted_sum(
    changes: Iterable[Tensor], weights: Sequence[float], *, normalize: bool = False, scale: float = 1.0
) -> Tensor:
    """Sum of weight times change, times `scale`, over the sum of weights if `normalize`.

    Args:
        changes: one tensor a model; it is read before the next is asked for, and not written to.
        weights: one factor a model.
        normalize: whether to divide by the sum of weights.
        scale: factor on the result, any finite number.

    Raises:
        ParameterError: If `scale` is not finite, or the weights to be normalised add up to 0.

    >>> weighted_sum(torch.tensor([[2.0, 4.0], [6.0, 0.0]]), [1.0, 0.5])
    tensor([5., 4.])
    """
    checked_scale(scale)
    divisor = total_of(weights) if normalize else 1.0
    total: Tensor | None = None
    for x, w in zip(changes, weights, strict=True):
        total = torch.mul(x, w) if total is None else total.add_(x, alpha=w)
    if total is None:
        raise ParameterError("there is no model to merge")
    if divisor != 1:
        total.div_(divisor)
    return total if scale == 1 else total.mul_(scale)
