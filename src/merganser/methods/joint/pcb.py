"""PCB: weigh every entry by how much it matters to its model and how well it fits the others, drop those below.

    b_k = softmax(K norm(d_k**2)) * sum_j softmax(norm(d_k d_j))        over the entries of the tensor
    b_k = 0 outside the round(density n) entries of largest b_k
    D   = scale * sum_k b_k w_k d_k / sum_k b_k

norm moves the range of its argument over the tensor to [0, 1]: then no exponential is larger than e**K, and the
scale of the changes does not matter. Each softmax is taken n times its size, which cancels in D.

Source: Du et al. 2024, arXiv:2410.02396, section 3, whose lambda is `scale` and r is `density`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.methods.joint._keep import entries, shares_of
from merganser.methods.joint._sum import checked_scale, weights_of

if TYPE_CHECKING:
    from jaxtyping import Float


def pcb(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    density: float = 0.2,
    scale: float = 1.0,
) -> Float[Tensor, "*S"]:
    """Mean of the changes, every entry weighted by its balance.

    Args:
        d: each model minus the base, whole tensors.
        weight: one real factor a model, not part of the balance.
        density: share of the entries of each model that is kept, in (0, 1]: to the nearest whole number, at least
            one; among equal balances the first in row-major order are kept.
        scale: the coefficient lambda, any finite number.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range.

    >>> pcb(torch.tensor([[4.0, 1.0, 0.0, 0.0], [3.0, -2.0, 0.0, 0.0]]), weight=[1.0, 1.0], density=0.25)
    tensor([3.5393, 0.0000, 0.0000, 0.0000])
    """
    shares_of("density", density, 1)
    checked_scale(scale)
    weights = weights_of(weight, len(d))
    total, shares = torch.zeros_like(d[0]), torch.zeros_like(d[0])
    if not total.numel():
        return total
    for d_k, w in zip(d, weights, strict=True):
        unit = d_k / d_k.abs().amax().clamp(min=torch.finfo(d_k.dtype).tiny)
        inter = torch.zeros_like(total)
        for d_j in d:
            inter.add_(_softmax(unit * d_j, 1))
        balance = _largest(_softmax(unit.square_(), len(d)).mul_(inter), density)
        shares.add_(balance)
        total.add_(balance.mul_(d_k), alpha=w)
    total.div_(shares.masked_fill_(shares == 0, 1))
    return total if scale == 1 else total.mul_(scale)


def _softmax(x: Tensor, factor: int) -> Tensor:
    """Number of entries times the softmax of `factor` times x, whose range is first moved to [0, 1]. Overwrites x."""
    low, high = x.aminmax()
    span = high - low
    x.sub_(high).mul_(factor / float(span) if span > 0 else 0.0).exp_()
    blocks = torch.split(x.reshape(-1), 1 << 15)  # no sum is shared out among threads
    return x.div_(fsum(float(block.sum(dtype=torch.float64)) for block in blocks) / x.numel())


def _largest(x: Tensor, density: float) -> Tensor:
    """Zero all but the largest share of x; ties by index."""
    flat = x.reshape(-1)
    k = max(1, entries(density, flat.numel(), "round"))
    if k == flat.numel():
        return x
    threshold = flat.kthvalue(flat.numel() - k + 1).values
    keep = flat > threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    keep[tied[: k - int(keep.sum())]] = True
    return (flat * keep).reshape(x.shape)
