"""Iso-C: give every direction of the summed changes the same strength.

    D = scale * mean(sigma) * U V^T       U diag(sigma) V^T = SVD(S)    S = sum_i d_i

The mean runs over all min(m, n) singular values. U V^T is undefined where S has no energy, so only directions
whose sigma is above rounding take part: a rank-r sum gives a rank-r result.

Source: Marczak et al. 2025, arXiv:2502.04959.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from merganser.errors import ParameterError
from merganser.numerics import live_factors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def iso_c(s: Float[Tensor, "m n"], *, scale: float = 1.5) -> Float[Tensor, "m n"]:
    """Sum of changes with its spectrum flattened to `scale` times the mean.

    Args:
        s: sum of the changes, (out, in).
        scale: strength relative to the mean singular value, above 0.

    Returns:
        The merged change; zeros for zeros.

    Raises:
        ParameterError: If `scale` is not a finite number above 0.

    >>> import torch
    >>> iso_c(torch.tensor([[4.0, 0.0, 0.0], [0.0, -2.0, 0.0]]), scale=1.0)
    tensor([[ 3.,  0.,  0.],
            [ 0., -3.,  0.]])
    """
    if not 0 < scale < inf:
        raise ParameterError(f"scale is {scale}; it is a finite number above 0")
    u, sigma, v = live_factors(s)
    strength = scale * float(sigma.sum()) / max(min(s.shape), 1)
    return (strength * (u @ v.T)).to(s.dtype)
