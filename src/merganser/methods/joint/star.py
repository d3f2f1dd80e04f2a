"""STAR: of each change keep the strongest directions, and give them the strength of all.

    D = (1/K) sum_k U_r diag(sigma_1 .. sigma_r) V_r^T * sum(sigma) / (sigma_1 + .. + sigma_r)
    d_k = U diag(sigma) V^T        r = the least with sigma_1 + .. + sigma_r >= eta sum(sigma)

Source: Lee et al. 2025, arXiv:2502.10339, whose eta is in per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sum import weights_of
from merganser.numerics import live_factors, per_model, product

if TYPE_CHECKING:
    from jaxtyping import Float


def star(
    d: Float[Tensor, "K m n"] | Sequence[Float[Tensor, "m n"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    eta: float | Sequence[float] = 0.4,
) -> Float[Tensor, "m n"]:
    """Mean of the changes, each truncated and brought back to its nuclear norm.

    Args:
        d: the changes, each (out, in).
        weight: one factor a change.
        eta: share of the nuclear norm that is kept, in (0, 1]; one for all or one a model.

    Returns:
        The merged change.

    Raises:
        ParameterError: If `eta` is outside (0, 1] or a weight is not finite.

    >>> d = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    >>> star(d, weight=[1.0], eta=0.7)
    tensor([[4., 0.],
            [0., 0.]])
    """
    etas = per_model(eta, len(d))
    for e in etas:
        if not 0 < e <= 1:
            raise ParameterError(f"eta is {e}; it is a share of the nuclear norm, in (0, 1], not a percentage")
    total = torch.zeros(d[0].shape, dtype=torch.float64, device=d[0].device)
    for d_k, w, e in zip(d, weights_of(weight, len(d)), etas, strict=True):
        u, sigma, v = live_factors(d_k)
        sums = sigma.cumsum(0)
        r = int((sums < e * (1 - 1e-12) * sums[-1:]).sum()) + 1  # 1e-12: a share that is met up to rounding is met
        strength = sigma[:r] * (sums[-1:] / sums[r - 1 : r] * w / len(d))
        total.add_(product(u[:, :r] * strength, v[:, :r].T))
    return total.to(d[0].dtype)
