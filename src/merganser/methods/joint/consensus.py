"""Consensus: keep an entry of the sum only where at least two models need it.

    y_k = w_k d_k        S = sum_k y_k        m_k = 1 where |y_k| > tall_k |S - y_k|, else 0
    D   = scale * S where sum_k m_k >= agree, else 0

m_k is the TALL mask of model k: entries where the sum is nearer to that model than to the base, in units of tall.

Source: Wang et al. 2024, arXiv:2405.07813 (TALL masks, Consensus task arithmetic), whose lambda_t is `tall`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sum import checked_scale, weighted_sum, weights_of
from merganser.numerics import per_model

if TYPE_CHECKING:
    from jaxtyping import Float


def consensus(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    tall: float | Sequence[float] = 0.4,
    agree: int = 2,
    scale: float = 1.0,
) -> Float[Tensor, "*S"]:
    """Weighted sum of K changes, where enough of them need it.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        tall: how much nearer, above 0; the paper chooses from 0.2 to 0.6; one number or one a model.
        agree: fewest masks that an entry must be in, from 0 to K; 1 drops what no model needs, 2 also what only one
            does.
        scale: factor on the result, any finite number.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range.

    >>> consensus(torch.tensor([[2.0, 3.0, 1.0], [1.0, 0.0, -1.0]]), weight=[1.0, 1.0])
    tensor([3., 0., 0.])
    """
    talls, weights = per_model(tall, len(d)), weights_of(weight, len(d))
    for value in talls:
        if not 0 < value < inf:
            raise ParameterError(f"tall is {value}; it is a finite number above 0")
    if not 0 <= agree <= len(d) or agree != int(agree):
        raise ParameterError(f"agree is {agree}; it is a whole number of models, in [0, {len(d)}]")
    checked_scale(scale)
    total = weighted_sum(d, weights)
    masks, y, rest = torch.zeros_like(total), torch.empty_like(total), torch.empty_like(total)
    for d_k, w, value in zip(d, weights, talls, strict=True):
        torch.mul(d_k, w, out=y)
        torch.sub(total, y, out=rest).abs_().mul_(value)
        masks.add_(torch.gt(y.abs_(), rest, out=rest))
    total.mul_(torch.ge(masks, agree, out=masks))
    return total if scale == 1 else total.mul_(scale)
