"""NUFILT in closed form: filter the arriving change by the null space of the merge, then repair its own directions.

    D_t = D_{t-1} + d P + Y       P = I - V_p V_p^T    V_p: top right singular vectors of D_{t-1}
    Y = R V_n^T (V_n V_n^T + V_p V_p^T + rho I)^-1     V_n: top right singular vectors of d
    R = d V_p V_p^T V_n - D_{t-1} V_n

Y minimises ||Y V_n - R||^2 + ||Y V_p||^2 + rho ||Y||^2: on V_n the result acts like d, on V_p like D_{t-1}. With
N = [V_n V_p] it is [R 0] (N^T N + rho I)^-1 N^T, a system of the size of the ranks and not of the input width.

The columns of N are unit vectors, so rho is measured against 1: it takes 1 % of the repair where V_n and V_p are
orthogonal, and where they nearly coincide it holds the gain of the repair at 1 / (2 sqrt(rho)) = 5.

Source: Null-Space Filtering, arXiv:2509.21413 (ICLR 2026), where Y is trained by 50 steps of Adam.
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


def nufilt(
    merged: Float[Tensor, "m n"],
    d: Float[Tensor, "m n"],
    *,
    t: int,
    rank_merged: float = 1 / 6,
    rank_new: float = 1 / 96,
    rho: float = 1e-2,
) -> Float[Tensor, "m n"]:
    """Merged change that keeps its top input directions and learns those of the arriving change.

    Args:
        merged: merged change so far, (out, in); zeros at t = 1.
        d: the arriving change, already weighted.
        t: number of this arrival, from 1; the first is taken as it is (P = I).
        rank_merged: number of directions of the merge as a share of the input width, in (0, 1]; rounded to
            the nearest, at least one, and only directions that are above rounding.
        rank_new: the same for the arriving change.
        rho: ridge of the repair, above 0.

    Returns:
        The merged change including `d`.

    Raises:
        ParameterError: If a rank is outside (0, 1], or `rho` is not a finite number above 0.

    >>> merged, d = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    >>> nufilt(merged, d, t=2)
    tensor([[1., 0.],
            [0., 3.]])
    """
    for name, rank in {"rank_merged": rank_merged, "rank_new": rank_new}.items():
        if not 0 < rank <= 1:
            raise ParameterError(f"{name} is {rank}; it is a fraction of the input width in (0, 1], not a count")
    if not 0 < rho < inf:
        raise ParameterError(f"rho is {rho}; it is a finite number above 0")
    if t == 1:
        return d.clone()
    width = d.shape[1]
    _, _, vp = live_factors(merged)
    _, _, vn = live_factors(d)
    vp, vn = vp[:, : max(1, round(rank_merged * width))], vn[:, : max(1, round(rank_new * width))]
    old, new = merged.double(), d.double()
    repair = new @ vp @ (vp.T @ vn) - old @ vn
    basis = torch.cat([vn, vp], dim=1)
    gram = basis.T @ basis + rho * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    y: Tensor = repair @ torch.linalg.solve(gram, basis.T)[: vn.shape[1]]
    return (old + new - new @ vp @ vp.T + y).to(d.dtype)
