"""TSV-M as models arrive: an equal share of the rank for each expert, then whitening of what they share.

    fold:      keep p // t triplets (u, sigma, v) of each of t experts, p = min(m, n), strongest first
    finalise:  D = alpha * U_ diag(s) V_^T      U_ = P Q^T from SVD(U) = P diag(.) Q^T, V_ likewise

Truncations nest: the top p // (t + 1) triplets of an expert are among its top p // t, so cutting on each arrival
equals the joint method, in the room of one full-rank set of factors. It cannot remove an expert.

Triplets below rounding are zero columns, and directions that U or V does not span are left out of P Q^T: there the
factors would be whatever the SVD routine returned. Hence two equal experts give one of them, cut to half the rank.

Source: Gargiulo et al. 2024, arXiv:2412.00081; the nesting is ours.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from merganser.errors import ParameterError
from merganser.numerics import live_factors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def tsv_m_fold(
    u: Float[Tensor, "m p"], s: Float[Tensor, " p"], v: Float[Tensor, "n p"], d: Float[Tensor, "m n"], *, t: int
) -> tuple[Float[Tensor, "m p"], Float[Tensor, " p"], Float[Tensor, "n p"]]:
    """Factors of t experts from those of t - 1 and the arriving change.

    Args:
        u: left singular vectors; block i of p // (t - 1) columns is expert i, the rest is zero. Zeros at t = 1.
        s: singular values in the same order, not negative.
        v: right singular vectors in the same order.
        d: the arriving change, already weighted, (out, in).
        t: number of this arrival, from 1 to p = min(m, n).

    Returns:
        The new (u, s, v), with blocks of p // t columns.

    Raises:
        ParameterError: If `t` is outside [1, p], so that an expert would have no triplet. An empty matrix takes any.

    >>> u, s, v = torch.zeros(2, 2), torch.zeros(2), torch.zeros(3, 2)
    >>> u, s, v = tsv_m_fold(u, s, v, torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), t=1)
    >>> u, s, v = tsv_m_fold(u, s, v, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), t=2)
    >>> s
    tensor([4., 3.])
    >>> tsv_m(u, s, v)
    tensor([[4., 0., 0.],
            [0., 0., 3.]])
    """
    p = min(d.shape)
    if p and not 1 <= t <= p:
        raise ParameterError(
            f"t is {t}; this matrix of shape {tuple(d.shape)} holds at most {p} experts, so t is in [1, {p}]",
            hint="merge tensors this thin with a vector rule such as the mean",
        )
    k, old = p // max(t, 1), p // max(t - 1, 1)
    kept = [block * old + i for block in range(t - 1) for i in range(k)]

    def append(state: Tensor, new: Tensor) -> Tensor:
        x = torch.cat([state[..., kept], new[..., :k].to(state.dtype)], dim=-1)
        return torch.nn.functional.pad(x, (0, p - x.shape[-1]))

    u_new, s_new, v_new = live_factors(d)
    return append(u, u_new), append(s, s_new), append(v, v_new)


def tsv_m(
    u: Float[Tensor, "m p"], s: Float[Tensor, " p"], v: Float[Tensor, "n p"], *, alpha: float = 1.0
) -> Float[Tensor, "m n"]:
    """Merged change of the experts whose factors have been folded.

    Args:
        u: left singular vectors of all experts, side by side.
        s: singular values; columns where it is 0 are unused.
        v: right singular vectors.
        alpha: factor on the result, above 0.

    Returns:
        The merged change, (out, in).

    Raises:
        ParameterError: If `alpha` is not a finite number above 0.

    >>> u, s, v = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([2.0, 2.0]), torch.tensor([[1.0, 1.0]])
    >>> tsv_m(u, s, v)
    tensor([[2.],
            [0.]])
    """
    if not 0 < alpha < inf:
        raise ParameterError(f"alpha is {alpha}; it is a finite number above 0")
    used = s > 0
    p_u, _, q_u = live_factors(u[:, used])
    p_v, _, q_v = live_factors(v[:, used])
    return (alpha * p_u @ (q_u.T * s[used].double() @ q_v) @ p_v.T).to(u.dtype)
