"""Iso-CTS: common directions of all changes and some of each change alone, all of one strength.

    S = sum_k d_k;  U, V = its first c singular directions
    U_k, V_k = the first s singular directions of (I - U U^T) d_k            c + K s = p = min(m, n)
    D = scale * mean(sigma) * W_u W_v^T      W_u = whitened [U, U_1 .. U_K],  W_v = whitened [V, V_1 .. V_K]

The mean runs over the p singular values that go with these directions. s is the whole number that brings c nearest to
`common_space_fraction` of p. Directions below rounding are left out, and count as 0 in the mean.

Source: Marczak et al. 2025, arXiv:2502.04959, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._spectrum import whitened
from merganser.methods.joint._sum import weighted_sum, weights_of
from merganser.numerics import live_factors, product, singular_tolerance

if TYPE_CHECKING:
    from jaxtyping import Float


def iso_cts(
    d: Float[Tensor, "K m n"] | Sequence[Float[Tensor, "m n"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    scale: float = 1.5,
    common_space_fraction: float = 0.8,
) -> Float[Tensor, "m n"]:
    """Isotropic merge in the common and the task-specific subspaces.

    Args:
        d: the changes, each (out, in).
        weight: one factor a change.
        scale: alpha, strength relative to the mean singular value, above 0; the paper tunes it to 1.1 .. 1.9.
        common_space_fraction: share of the rank for common directions, in [0, 1]; 1 is Iso-C.

    Returns:
        The merged change; zeros for zeros.

    Raises:
        ParameterError: If `scale` is not a finite number above 0, the fraction is outside [0, 1], or a weight is not
            finite.

    >>> d = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    >>> iso_cts(d, weight=[1.0, 1.0], scale=1.0)
    tensor([[3., 0.],
            [0., 3.]])
    """
    if not 0 < scale < inf:
        raise ParameterError(f"scale is {scale}; it is a finite number above 0")
    if not 0 <= common_space_fraction <= 1:
        raise ParameterError(f"common_space_fraction is {common_space_fraction}; it is a share of the rank, in [0, 1]")
    weights, (m, n), dtype = weights_of(weight, len(d)), d[0].shape, d[0].dtype
    p = min(m, n)
    own = min(round((p - int(p * common_space_fraction)) / len(d)), p // len(d))
    u, sigma, v = (f[..., : p - own * len(d)] for f in live_factors(weighted_sum(d, weights)))
    lefts, sigmas, rights = [u], [sigma], [v]
    for d_k, w in zip(d, weights, strict=True) if own else ():
        change = d_k.double() * w
        rest = change - product(u, product(u.T.contiguous(), change))
        u_k, s_k, v_k = live_factors(rest.to(dtype))
        count = min(own, int((s_k > singular_tolerance((m, n), dtype) * torch.linalg.matrix_norm(change)).sum()))
        for kept, factor in zip((lefts, sigmas, rights), (u_k, s_k, v_k), strict=True):
            kept.append(factor[..., :count])
    strength = scale * float(torch.cat(sigmas).sum()) / max(p, 1)
    return product(whitened(lefts, dtype), whitened(rights, dtype).T).mul_(strength).to(dtype)
