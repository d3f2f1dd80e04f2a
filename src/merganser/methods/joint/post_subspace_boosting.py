"""Subspace boosting: raise the weak directions of a merged change to the strength of a stronger one.

    D' = U diag(max(sigma, sigma_c)) V^T      D = U diag(sigma) V^T
    c = the least with sigma_1 + .. + sigma_c >= beta sum(sigma)

Directions below rounding stay as they are: they are not of the models.

Source: Skorobogat et al. 2025, arXiv:2506.16506; beta 0.01 is its choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merganser.errors import ParameterError
from merganser.numerics import live_factors, product

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def subspace_boosting(merged: Float[Tensor, "m n"], *, beta: float = 0.01) -> Float[Tensor, "m n"]:
    """A merged change with its spectrum raised behind an index.

    Args:
        merged: the merged change, (out, in).
        beta: share of the nuclear norm that stays as it is, in [0, 1]; 0 gives all directions the strength of the
            first, 1 changes nothing.

    Returns:
        The boosted change; zeros for zeros.

    Raises:
        ParameterError: If `beta` is outside [0, 1].

    >>> import torch
    >>> subspace_boosting(torch.diag(torch.tensor([5.0, 3.0, 1.0])), beta=0.7)
    tensor([[5., 0., 0.],
            [0., 3., 0.],
            [0., 0., 3.]])
    """
    if not 0 <= beta <= 1:
        raise ParameterError(f"beta is {beta}; it is a share of the nuclear norm, in [0, 1]")
    u, sigma, v = live_factors(merged)
    sums = sigma.cumsum(0)
    c = int((sums < beta * (1 - 1e-12) * sums[-1:]).sum())  # 1e-12: a share that is met up to rounding is met
    raised = (sigma[c : c + 1] - sigma).clamp(min=0)
    return merged.double().add(product(u * raised, v.T)).to(merged.dtype)
