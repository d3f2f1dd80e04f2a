"""Task arithmetic: add up the changes and scale the sum.

    D = scale * sum_k w_k d_k        with normalize: over sum_k w_k

Source: Ilharco et al. 2022, arXiv:2212.04089, eq. 1, whose lambda is `scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.methods.joint._sum import weighted_sum, weights_of

if TYPE_CHECKING:
    from jaxtyping import Float


def task_arithmetic(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    scale: float = 1.0,
    normalize: bool = False,
) -> Float[Tensor, "*S"]:
    """Scaled sum of K changes.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        scale: the coefficient lambda, any finite number; best values fall as models are added.
        normalize: whether to divide by the sum of weights.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a number is not finite, or the weights add up to 0 and `normalize` is set.

    >>> import torch
    >>> task_arithmetic(torch.tensor([[2.0, 4.0], [6.0, 0.0]]), weight=[1.0, 1.0], scale=0.5)
    tensor([4., 2.])
    """
    return weighted_sum(d, weights_of(weight, len(d)), normalize=normalize, scale=scale)
