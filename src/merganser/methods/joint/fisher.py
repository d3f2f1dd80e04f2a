"""Fisher merging: a mean of the models, each entry weighted by how much that model depends on it.

    W = sum_k w_k F_k W_k / sum_k w_k F_k        where every w_k F_k is 0: W = sum_k w_k W_k / sum_k w_k

Only ratios of the F_k of one entry count, so they are taken first: neither product nor sum underflows.

Source: Matena & Raffel 2022, arXiv:2111.09832, eq. 3 with the diagonal of the Fisher information.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._mean import shares

if TYPE_CHECKING:
    from jaxtyping import Float


def fisher(
    x: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    fisher: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    weight: Float[Tensor, " K"] | Sequence[float],
) -> Float[Tensor, "*S"]:
    """Mean of the models by Fisher information.

    Args:
        x: the models.
        fisher: diagonal of the Fisher information of each model, not negative.
        weight: lambda, not negative; only the ratios count.

    Returns:
        The merged tensor.

    Raises:
        ParameterError: If a weight is negative or not finite, all are 0, or an entry of `fisher` is negative.

    >>> x, f = torch.tensor([[2.0, 8.0], [4.0, 4.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> fisher(x, fisher=f, weight=[1.0, 1.0])
    tensor([2.5000, 6.0000])
    """
    parts = [part for part in zip(x, fisher, shares(weight, len(x)), strict=True) if part[2] > 0]
    top = torch.zeros_like(x[0])
    for _, f_k, _ in parts:
        if bool((f_k < 0).any()):
            raise ParameterError("an entry of fisher is negative; it is a mean of squares")
        torch.maximum(top, f_k, out=top)
    merged, total = torch.zeros_like(top), torch.zeros_like(top)
    for x_k, f_k, w in parts:
        share = torch.where(top > 0, f_k / top, 1).mul_(w)
        total.add_(share)
        merged.add_(share.mul_(x_k))
    return merged.div_(total)
