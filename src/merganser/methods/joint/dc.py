"""DC-Merge: balance the directions of every change, and merge them in one orthonormal frame that covers them all.

    d_k ~ U_k diag(sigma_k) V_k^T, r = min(m, n) // K directions each;  s_k = smoothed sigma_k of the same sum
    F_u = whitened [U_1 .. U_K],  F_v = whitened [V_1 .. V_K]
    M_k = F_u^T U_k diag(s_k) V_k^T F_v, of which only the largest entries are kept
    M   = entry by entry the mean of the M_k whose sign is that of their sum
    D   = scale * F_u (M o B) F_v^T        B = 1 in the K blocks (U_k, V_k) of the diagonal, else 0

Of M_k's entries the share `density` is kept, as many as d_k has directions at least, and all that equal the least of
these. Directions below rounding are left out. With more models than min(m, n), each keeps one direction. K copies of
one change share their frame, and B leaves 1/K of it.

Source: Zhang et al. 2026, arXiv:2603.06242; without smoothing it is the variant for full fine-tunes (appendix E.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._spectrum import whitened
from merganser.methods.joint._sum import weights_of
from merganser.numerics import live_factors, product

if TYPE_CHECKING:
    from jaxtyping import Float


def dc(
    d: Float[Tensor, "K m n"] | Sequence[Float[Tensor, "m n"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    scale: float = 1.0,
    smoothing: str = "average",
    rho: float = 5.0,
    density: float = 1e-3,
) -> Float[Tensor, "m n"]:
    """Merge of the changes with consistent directions.

    Args:
        d: the changes, each (out, in).
        weight: one factor a change.
        scale: factor on the result, above 0.
        smoothing: "average" gives the kept directions of a change one strength, "linear" strengths that fall evenly
            from the first to the last, "none" leaves them.
        rho: with "linear", first strength over last, at most; from 1.
        density: share of the entries of each M_k that is kept, in (0, 1].

    Returns:
        The merged change; zeros for zeros.

    Raises:
        ParameterError: If a setting is outside its range or a weight is not finite.

    >>> d = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    >>> dc(d, weight=[1.0, 1.0])
    tensor([[4., 0.],
            [0., 2.]])
    """
    if not 0 < scale < inf:
        raise ParameterError(f"scale is {scale}; it is a finite number above 0")
    if smoothing not in ("average", "linear", "none"):
        raise ParameterError(f'smoothing is {smoothing!r}; it is one of "average", "linear" and "none"')
    if not 1 <= rho < inf:
        raise ParameterError(f"rho is {rho}; it is a ratio from 1")
    if not 0 < density <= 1:
        raise ParameterError(f"density is {density}; it is a fraction in (0, 1], not a percentage")
    r, dtype = max(1, min(d[0].shape) // len(d)), d[0].dtype
    lefts, strengths, rights = [], [], []
    for d_k, w in zip(d, weights_of(weight, len(d)), strict=True):
        u, sigma, v = (f[..., :r] for f in live_factors(d_k))
        lefts.append(u)
        strengths.append(_smoothed(sigma, smoothing, rho) * w)
        rights.append(v)
    frame_u, frame_v = whitened(lefts, dtype), whitened(rights, dtype)
    blocks = [slice(end - s.numel(), end) for s, end in zip(strengths, _ends(strengths), strict=True)]
    merged = _merged_in_frame(
        [
            (product(frame_u.T.contiguous(), u) * s, product(v.T.contiguous(), frame_v))
            for u, s, v in zip(lefts, strengths, rights, strict=True)
        ],
        blocks,
        density,
    )
    return product(product(frame_u, merged), frame_v.T).mul_(scale).to(dtype)


def _ends(strengths: Sequence[Tensor]) -> list[int]:
    """Column behind the last of each block."""
    return [sum(s.numel() for s in strengths[: k + 1]) for k in range(len(strengths))]


def _smoothed(sigma: Tensor, smoothing: str, rho: float) -> Tensor:
    """Strengths of the same sum."""
    if smoothing == "none" or sigma.numel() == 0:
        return sigma
    ratio = min(rho, float(sigma[0] / sigma[-1])) if smoothing == "linear" else 1.0
    shape = torch.linspace(ratio, 1.0, sigma.numel(), dtype=sigma.dtype, device=sigma.device)
    return shape * (sigma.sum() / shape.sum())


def _merged_in_frame(factors: Sequence[tuple[Tensor, Tensor]], blocks: Sequence[slice], density: float) -> Tensor:
    """M o B from the two factors of each M_k; of an M_k no more than its diagonal blocks is kept at a time."""
    size = blocks[-1].stop
    parts: list[list[Tensor]] = []
    for (left, right), own in zip(factors, blocks, strict=True):
        m_k = product(left, right)
        count = max(own.stop - own.start, int(density * m_k.numel()))
        if 0 < count < m_k.numel():
            magnitude = m_k.abs()
            least = magnitude.reshape(-1).kthvalue(m_k.numel() - count + 1).values
            m_k[magnitude < (1 - 1e-6) * least] = 0  # what is equal up to rounding stands or falls together
        parts.append([m_k[b, b].clone() for b in blocks])
    merged = torch.zeros(size, size, dtype=torch.float64, device=factors[0][0].device)
    for i, b in enumerate(blocks):
        stack = [part[i] for part in parts]
        sign = torch.sign(sum(stack, torch.zeros_like(stack[0])))
        agree = [(x * sign > 0) for x in stack]
        votes = sum((a.double() for a in agree), torch.zeros_like(stack[0])).clamp(min=1)
        merged[b, b] = sum((x * a for x, a in zip(stack, agree, strict=True)), torch.zeros_like(stack[0])) / votes
    return merged
