"""Linear: the weighted mean of the models.

    W = sum_k w_k W_k / sum_k w_k        without normalize: W = sum_k w_k W_k

Source: Wortsman et al. 2022, arXiv:2203.05482 ("model soups").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.methods.joint._sum import weighted_sum, weights_of

if TYPE_CHECKING:
    from jaxtyping import Float


def linear(
    x: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    normalize: bool = True,
) -> Float[Tensor, "*S"]:
    """Weighted mean of K models.

    Args:
        x: the models.
        weight: one real factor a model.
        normalize: whether to divide by the sum of weights.

    Returns:
        The merged tensor.

    Raises:
        ParameterError: If a weight is not finite, or they add up to 0 and `normalize` is set.

    >>> import torch
    >>> linear(torch.tensor([[2.0, 4.0], [6.0, 0.0]]), weight=[1.0, 3.0])
    tensor([5., 1.])
    """
    return weighted_sum(x, weights_of(weight, len(x)), normalize=normalize)
