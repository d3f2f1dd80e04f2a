"""CART: task arithmetic around the mean of the experts, with what sets each apart cut to a low rank.

    D = M + scale * sum_k SVD_r(d_k - M)      M = (1/K) sum_k d_k      r = round(rank * min(m, n)), at least 1

SVD_r keeps the r strongest directions. At full rank the sum is zero and D is the mean; so it would be at rank 0.

Source: Choi et al. 2024, arXiv:2412.12153; rank 0.08 is its choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sum import weights_of
from merganser.numerics import live_factors, product

if TYPE_CHECKING:
    from jaxtyping import Float


def cart(
    d: Float[Tensor, "K m n"] | Sequence[Float[Tensor, "m n"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    scale: float = 1.0,
    rank: float = 0.08,
) -> Float[Tensor, "m n"]:
    """Mean change plus the leading part of every deviation from it.

    Args:
        d: the changes, each (out, in).
        weight: one factor a change.
        scale: lambda, any finite number.
        rank: share of the full rank that is kept of each deviation, in (0, 1].

    Returns:
        The merged change.

    Raises:
        ParameterError: If `rank` is outside (0, 1], or `scale` or a weight is not finite.

    >>> d = torch.tensor([[[4.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 4.0]]])
    >>> cart(d, weight=[1.0, 1.0], rank=0.5)
    tensor([[2., 0.],
            [0., 3.]])
    """
    if not 0 < rank <= 1:
        raise ParameterError(f"rank is {rank}; it is a share of the full rank, in (0, 1]")
    if not isfinite(scale):
        raise ParameterError(f"scale is {scale}; it is a finite number")
    weights = weights_of(weight, len(d))
    r = max(1, round(rank * min(d[0].shape)))
    mean = torch.zeros(d[0].shape, dtype=torch.float64, device=d[0].device)
    for d_k, w in zip(d, weights, strict=True):
        mean.add_(d_k.double(), alpha=w / len(d))
    total = mean.clone()
    for d_k, w in zip(d, weights, strict=True):
        u, sigma, v = live_factors((d_k.double() * w).sub_(mean).to(d_k.dtype))
        total.add_(product(u[:, :r] * sigma[:r], v[:, :r].T), alpha=scale)
    return total.to(d[0].dtype)
