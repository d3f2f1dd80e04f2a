"""Means: what a rule for matrices or for measured layers does with everything else.

mean_of_changes = (1/K) sum_k w_k d_k        mean_of_models = sum_k w_k x_k / sum_k w_k
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sum import weighted_sum, weights_of

if TYPE_CHECKING:
    from jaxtyping import Float


def mean_of_changes(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]], *, weight: Float[Tensor, " K"] | Sequence[float]
) -> Float[Tensor, "*S"]:
    """Mean over the K models of weight times change; the weights are not normalised.

    Args:
        d: the changes.
        weight: one factor a model.

    Returns:
        The merged change.

    Raises:
        ParameterError: If a weight is not finite.

    >>> import torch
    >>> mean_of_changes(torch.tensor([[4.0], [2.0]]), weight=[1.0, 3.0])
    tensor([5.])
    """
    return weighted_sum(d, [w / len(d) for w in weights_of(weight, len(d))])


def mean_of_models(
    x: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]], *, weight: Float[Tensor, " K"] | Sequence[float]
) -> Float[Tensor, "*S"]:
    """Weighted mean of the models.

    Args:
        x: the models.
        weight: one share a model; only their ratios count.

    Returns:
        The merged tensor.

    Raises:
        ParameterError: If a weight is negative or not finite, or all are 0.

    >>> import torch
    >>> mean_of_models(torch.tensor([[4.0], [2.0]]), weight=[1.0, 3.0])
    tensor([2.5000])
    """
    return weighted_sum(x, shares(weight, len(x)))


def shares(weight: Float[Tensor, " K"] | Sequence[float], models: int) -> list[float]:
    """Weights divided by their sum.

    Args:
        weight: one a model.
        models: how many there are.

    Returns:
        Numbers in [0, 1] that sum to 1.

    Raises:
        ParameterError: If there are more or fewer, one is negative or not finite, or all are 0.

    >>> shares([1, 3], 2)
    [0.25, 0.75]
    """
    w = weights_of(weight, models)
    total = fsum(w)
    if min(w) < 0 or not total > 0:
        raise ParameterError(f"the weights are {w}; each is a number from 0, and their sum is above 0")
    return [w_k / total for w_k in w]
