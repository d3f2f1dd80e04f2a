"""Continual TIES: trim the old merge and the arriving change, elect signs, add the mean of those who agree.

    D_1 = s d_1        D_t = D_{t-1} + s TIES(D_{t-1}, d_t)
    TIES(x_1, x_2) = sum_i a_i y_i / max(1, sum_i a_i)
    y_i = the round(density n) entries of x_i of largest |.|, else 0       a_i = 1 where y_i sign(y_1 + y_2) > 0, else 0

The old merge takes part in the vote and is added again: that is the published baseline. Entries whose votes
cancel exactly add nothing.

Source: Yadav et al. 2023, arXiv:2306.01708; the continual form is a baseline of Tang et al. 2025, arXiv:2501.09522.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def ties(
    merged: Float[Tensor, "*S"], d: Float[Tensor, "*S"], *, t: int, scale: float = 0.3, density: float = 0.2
) -> Float[Tensor, "*S"]:
    """Merged change plus `scale` times the TIES merge of it with the arriving change.

    Args:
        merged: merged change so far; zeros at t = 1.
        d: the arriving change, already weighted.
        t: number of this arrival, from 1.
        scale: s, above 0.
        density: share of the entries of each tensor that is kept, in (0, 1]: to the nearest whole number
            of entries, at least one; among equal magnitudes the first in row-major order are kept.

    Returns:
        The merged change including `d`.

    Raises:
        ParameterError: If `density` is outside (0, 1], or `scale` is not a finite number above 0.

    >>> merged, d = torch.tensor([4.0, 1.0, -2.0, 0.0]), torch.tensor([2.0, 1.0, 8.0, 0.0])
    >>> ties(merged, d, t=2, scale=0.5, density=0.5)
    tensor([5.5000, 1.0000, 2.0000, 0.0000])
    """
    if not 0 < density <= 1:
        raise ParameterError(f"density is {density}; it is a fraction in (0, 1], not a percentage")
    if not 0 < scale < inf:
        raise ParameterError(f"scale is {scale}; it is a finite number above 0")
    if t == 1:
        return scale * d
    a, b = _keep_top(merged, density), _keep_top(d, density)
    sign = torch.sign(a + b)
    agree_a, agree_b = a * sign > 0, b * sign > 0
    total = torch.where(agree_a, a, 0) + torch.where(agree_b, b, 0)
    votes = (agree_a.to(d.dtype) + agree_b.to(d.dtype)).clamp(min=1)
    return merged + scale * total / votes


def _keep_top(x: Float[Tensor, "*S"], density: float) -> Float[Tensor, "*S"]:
    """Zero all but the round(density * n) entries of largest magnitude, at least one; ties by index."""
    size = x.reshape(-1).abs()
    k = max(1, round(density * size.numel()))
    if k >= size.numel():
        return x
    threshold = size.kthvalue(size.numel() - k + 1).values
    keep = size > threshold
    tied = (size == threshold).nonzero().squeeze(1)
    keep[tied[: k - int(keep.sum())]] = True
    return torch.where(keep.reshape(x.shape), x, 0)
