"""Election of signs: entry by entry the weighted sum of all decides a sign, and those of the other sign are left out.

    y_k = w_k x_k        v = sum_k y_k
    D   = sum of the y_k with y_k v > 0,   if normalize over the sum of |w_k| of the same

With P the sum of the positive y_k and N that of the negative ones, D is P where v > 0 and N where v < 0. So one pass
over the models is enough, and none of them is kept.

Source: Yadav et al. 2023, arXiv:2306.01708, section 3.2; |w_k| is ours: over the sum of w_k, a lone model of negative
weight would get its sign back, and weights that cancel would divide by 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sum import checked_scale, total_of


def elected(
    changes: Iterable[Tensor],
    weights: Sequence[float],
    *,
    factors: Sequence[float] | None = None,
    normalize: bool = True,
    cancelled: str = "none",
    scale: float = 1.0,
    weighted_vote: bool = True,
) -> Tensor:
    """Sum or mean of the weighted changes whose sign is the elected one, times `scale`.

    Args:
        changes: one tensor a model; one is done with before the next is asked for.
        weights: one factor a model.
        factors: what else a model's change is multiplied by, without counting as its weight.
        normalize: whether to divide by the sum of |weight| over those who agree.
        cancelled: what the sign is where the votes add up to 0: "none", so that the entry is 0, or "plus".
        scale: factor on the result, any finite number.
        weighted_vote: whether the weights count in the vote too.

    Raises:
        ParameterError: If a setting is out of range, or all weights are 0 under `normalize`.

    >>> elected([torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])], [1.0, 1.0])
    tensor([3.0000, 1.5000])
    """
    if cancelled not in ("none", "plus"):
        raise ParameterError(f"cancelled is {cancelled!r}; it is 'none' or 'plus'")
    checked_scale(scale)
    if normalize:
        total_of([abs(w) for w in weights])
    vote: Tensor | None = None
    for y, w, factor in zip(changes, weights, factors or [1.0] * len(weights), strict=True):
        if vote is None:
            # One block: of several smaller ones the allocator gives the pages back, and gets them again on each call.
            vote, part, *sides = y.new_zeros(6, *y.shape)
        if not weighted_vote:
            vote.add_(y)
        up, down, up_share, down_share = sides if w * factor >= 0 else (sides[1], sides[0], sides[3], sides[2])
        up.add_(torch.clamp(y, min=0, out=part), alpha=w * factor)
        down.add_(torch.clamp(y, max=0, out=part), alpha=w * factor)
        if normalize and factor:
            up_share.add_(torch.gt(y, 0, out=part), alpha=abs(w))
            down_share.add_(torch.lt(y, 0, out=part), alpha=abs(w))
    if vote is None:
        raise ParameterError("there is no model to merge")
    up, down, up_share, down_share = sides
    if weighted_vote:
        torch.add(up, down, out=vote)
    # Masks of 0.0 and 1.0: multiplying by them is exact, and many times faster than a choice by torch.where.
    torch.lt(vote, 0, out=part)
    (torch.ge if cancelled == "plus" else torch.gt)(vote, 0, out=vote)
    merged = torch.mul(up, vote).add_(down.mul_(part))
    if normalize:
        share = up_share.mul_(vote).add_(down_share.mul_(part))
        merged.div_(share.add_(torch.eq(share, 0, out=part)))
    return merged if scale == 1 else merged.mul_(scale)
