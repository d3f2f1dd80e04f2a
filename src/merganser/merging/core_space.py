"""Core space: low-rank changes in one small frame that holds all of them exactly, and the way back to low rank.

    U = orthonormal columns that span [B_1 .. B_K]        V = those that span [A_1; ..; A_K]^T
    M_i = (U^T B_i) s_i (A_i V)                           U M_i V^T = s_i B_i A_i, nothing is lost
    M   = rule(M_1 .. M_K)                                D = U M V^T
    M   = P diag(sigma) Q^T                              B' = U P_r diag(sigma_r)^1/2,  A' = diag(sigma_r)^1/2 (V Q_r)^T
    ||D - B' A'||_F / ||D||_F = sqrt(sum_{k > r} sigma_k^2 / sum_k sigma_k^2)

The columns of U are the left singular vectors of the stacked B, those of V of the stacked A, the strongest first; what
is below rounding is left out. B and A are never averaged apart: (B_1 + B_2)(A_1 + A_2) holds products of one model's B
with another's A.

A rule that sees only inner products and singular values gives in the core what it gives on the whole change. A rule
that takes the number of directions from the size of the matrix sees p, the adapters times their largest rank, where it
would see min(m, n): `iso_c` comes out min(m, n) / p times as strong, the ridge of `gram` is n / p times as large. A
rule that looks at single entries (ties, dare, breadcrumbs, magmax, ...) looks at those of M_i, each the strength of one
pair of directions, which is the paper's meaning and not what it does to the entries of the whole change.

Source: Panariello et al. 2025, arXiv:2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.numerics import product, singular_tolerance

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Frame:
    """Orthonormal bases of what several low-rank changes write and read.

    Attributes:
        u: float64, shape (m, p), p at least 1.
        v: float64, shape (n, q), q at least 1.
    """

    u: Float[Tensor, "m p"]
    v: Float[Tensor, "n q"]


@dataclass(frozen=True)
class Factors:
    """A change as a product of two thin matrices, and what it cost to make them thin.

    Attributes:
        up: B', shape (m, r).
        down: A', shape (r, n).
        lost: squared Frobenius norm of what was cut off.
        whole: squared Frobenius norm of the change before.
    """

    up: Float[Tensor, "m r"]
    down: Float[Tensor, "r n"]
    lost: float
    whole: float

    @property
    def error(self) -> float:
        """Relative truncation error; 0 for a zero change."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


def frame_of(ups: Sequence[Float[Tensor, "m _"]], downs: Sequence[Float[Tensor, "_ n"]]) -> Frame:
    """The frame of some changes.

    Args:
        ups: B of each change.
        downs: A of each change.

    >>> frame = frame_of([torch.tensor([[1.0], [0.0], [0.0]])], [torch.tensor([[3.0, 4.0]])])
    >>> frame.u.shape, frame.v.shape
    (torch.Size([3, 1]), torch.Size([2, 1]))
    """
    return Frame(span(torch.cat([*ups], dim=1)), span(torch.cat([*downs]).T))


def span(x: Float[Tensor, "m c"]) -> Float[Tensor, "m p"]:
    """Left singular vectors of the columns of x, the strongest first; one at least, so that nothing is empty.

    Which directions are there is judged by unit columns: one small beside the others has a direction as well.

    >>> span(torch.tensor([[1.0, 2.0], [0.0, 0.0]])).abs().round()
    tensor([[1.],
            [0.]], dtype=torch.float64)
    """
    wide = x.double()
    norms = torch.linalg.vector_norm(wide, dim=0)
    q, r = torch.linalg.qr(wide / norms.masked_fill(norms == 0, 1.0))
    turned, s, _ = torch.linalg.svd(r, full_matrices=False)
    live = int((s > singular_tolerance((x.shape[0], x.shape[1]), torch.float64) * s[0]).sum())
    q = product(q, turned[:, : max(1, live)].contiguous())
    turned, _, _ = torch.linalg.svd(product(q.T.contiguous(), wide), full_matrices=False)
    return product(q, turned.contiguous())


def core_of(up: Float[Tensor, "m r"], down: Float[Tensor, "r n"], scaling: float, frame: Frame) -> Float[Tensor, "p q"]:
    """The core M of one change s B A that lies in the frame.

    >>> up, down = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0, 3.0]])
    >>> core_of(up, down, 0.5, frame_of([up], [down])).abs()
    tensor([[3.]], dtype=torch.float64)
    """
    left = product(frame.u.T.contiguous(), up.double())
    return product(left, product(down.double().contiguous(), frame.v)).mul_(scaling)


def factors_of(core: Float[Tensor, "p q"], frame: Frame, rank: int) -> Factors:
    """The best change of a rank, as a product of two factors of equal strength.

    Args:
        core: the merged core.
        frame: that it is in.
        rank: of the factors, from 1; above the core's own rank they are filled up with zeros.

    >>> frame = Frame(torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    >>> found = factors_of(torch.tensor([[4.0, 0.0], [0.0, 3.0], [0.0, 0.0]]), frame, rank=1)
    >>> found.up @ found.down
    tensor([[4., 0.],
            [0., 0.],
            [0., 0.]], dtype=torch.float64)
    >>> found.error
    0.6
    """
    p, sigma, qh = torch.linalg.svd(core.double(), full_matrices=False)
    kept = min(rank, sigma.numel())
    root = sigma[:kept].sqrt()
    up = frame.u.new_zeros(frame.u.shape[0], rank)
    down = frame.v.new_zeros(rank, frame.v.shape[0])
    up[:, :kept] = product(frame.u, p[:, :kept] * root)
    down[:kept] = product(root.unsqueeze(1) * qh[:kept], frame.v.T)
    energy = sigma.square()
    return Factors(up, down, float(energy[kept:].sum()), float(energy.sum()))
