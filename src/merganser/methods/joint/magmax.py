"""MagMax: each entry takes the change of largest magnitude.

    D = scale * w_k d_k        k = argmax_j |w_j d_j|, entry by entry

On equal magnitudes the first model stays.

Source: Marczak et al. 2024, arXiv:2407.06322.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.methods.joint._sum import checked_scale, weights_of

if TYPE_CHECKING:
    from jaxtyping import Float


def magmax(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    scale: float = 1.0,
) -> Float[Tensor, "*S"]:
    """Entry of largest magnitude among K weighted changes.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        scale: factor on the result, any finite number.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a number is not finite.

    >>> magmax(torch.tensor([[1.0, -3.0, 2.0], [-2.0, 1.0, -2.0]]), weight=[1.0, 1.0])
    tensor([-2., -3.,  2.])
    """
    checked_scale(scale)
    merged, size = torch.zeros_like(d[0]), torch.zeros_like(d[0])
    y, size_y, mask = (torch.empty_like(d[0]) for _ in range(3))
    for d_k, w in zip(d, weights_of(weight, len(d)), strict=True):
        torch.abs(torch.mul(d_k, w, out=y), out=size_y)
        y.mul_(torch.gt(size_y, size, out=mask))
        merged.mul_(torch.le(size_y, size, out=mask)).add_(y)  # exact, as one of the two is 0
        torch.maximum(size, size_y, out=size)
    return merged if scale == 1 else merged.mul_(scale)
