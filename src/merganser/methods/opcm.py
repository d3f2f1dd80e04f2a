r"""OPCM: of every arriving change, keep what is orthogonal to the leading directions merged so far.

    u_1 = d_1,   u_t = u_{t-1} + clean(d_t; u_{t-1}),   D_t = u_t * mean_i ||d_i|| / ||u_t||

    u = U diag(s) V^T,   P = U^T d V,   k = #{i : (s_1 + .. + s_i) / sum(s) <= alpha}
    clean(d; u) = d - U E V^T,   E = P on the leading k x k block and on the diagonal, 0 elsewhere

Published with a normalised state and two scalars; singular directions do not see the scale, so the unnormalised sum u
and one factor on export give the same D.

Source: Tang et al. 2025, arXiv:2501.09522, eq. 6-9. `diagonal="keep"` leaves the diagonal behind the block in d: the
released code of the first version zeroed a copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import eigen_of_rows, product, singular_tolerance

if TYPE_CHECKING:
    from jaxtyping import Float


def opcm(
    merged: Float[Tensor, "m n"], d: Float[Tensor, "m n"], *, alpha: float = 0.5, diagonal: str = "drop"
) -> Float[Tensor, "m n"]:
    """Add the cleaned change to the unnormalised sum of cleaned changes.

    Args:
        merged: the sum u so far; zeros before the first arrival.
        d: the arriving change.
        alpha: share of the nuclear norm whose directions are blocked, in [0, 1]; 1 blocks all of them.
        diagonal: "drop" removes the part of d along every u_i v_i^T, so that <u, clean(d)> = 0; "keep" only the block.

    Returns:
        The next u, same shape and dtype.

    Raises:
        ParameterError: If alpha is outside [0, 1] or diagonal is neither word.

    >>> opcm(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2, 2), alpha=0.75)
    tensor([[3., 1.],
            [1., 1.]])
    """
    if not 0 <= alpha <= 1:
        raise ParameterError(f"alpha is {alpha}; it is a share of the nuclear norm, in [0, 1]")
    if diagonal not in ("drop", "keep"):
        raise ParameterError(f'diagonal is {diagonal!r}; it is "drop" or "keep"')
    if not merged.any():  # nothing merged so far
        return d + merged
    if merged.shape[0] > merged.shape[1]:
        tall: Tensor = opcm(merged.T, d.T, alpha=alpha, diagonal=diagonal)
        return tall.T.contiguous()
    tolerance = singular_tolerance((merged.shape[0], merged.shape[1]), merged.dtype)
    if merged.dtype == torch.float64:
        U, s, Vh = torch.linalg.svd(merged, full_matrices=False)
        k, rank = _leading(s, alpha, tolerance)
    else:  # s_i and u_i from the small Gram matrix in float64 resolve s down to 1e-8 s_1; then v_i = u^T u_i / s_i
        wide = merged.double()
        squares, exact = eigen_of_rows(wide)
        s, U = squares.clamp(min=0).sqrt(), exact.to(d.dtype)
        k, rank = _leading(s, alpha, tolerance)
        strong = min(rank, int((s > 0.01 * s[0]).sum()))  # float32 is enough for their v_i, and twice as fast
        squarable = 1e-12 < float(s[0]) < 1e12  # in float32
        if squarable and strong == rank and 3 * rank * merged.shape[1] > 2 * merged.shape[0] * sum(merged.shape):
            del wide, exact
            return _without_right(merged, d, U[:, :rank], s[:rank].to(d.dtype), k, diagonal)
        Vh = merged.new_empty(rank, merged.shape[1])
        Vh[:strong] = product(U[:, :strong].T, merged)
        Vh[strong:] = product(exact[:, strong:rank].T, wide)
        del wide, exact
        Vh /= s[:rank, None].to(d.dtype)
    kept = product(d, Vh[:rank].T)  # d V; from here on, in place, U E
    _keep_entries(kept, U[:, :rank], k, diagonal)
    used = rank if diagonal == "drop" else k
    return product(kept[:, :used], Vh[:used]).neg_().add_(d).add_(merged)


def _without_right(merged: Tensor, d: Tensor, U: Tensor, s: Tensor, k: int, diagonal: str) -> Tensor:
    """The same where d is wide and no s is small: two large products, not three, since V = u^T U S^-1 is never made.

    U E V^T = U E S^-1 U^T u,   P S^-1 = U^T (d u^T) U S^-2
    """
    kept = product(product(d, merged.T), U).div_(s.square())
    _keep_entries(kept, U, k, diagonal)
    return product(product(kept, U.T), merged).neg_().add_(d).add_(merged)


def _keep_entries(x: Tensor, U: Tensor, k: int, diagonal: str) -> None:
    """From U P to U E, in place; with "keep" there is nothing behind the block."""
    x[:, :k] = U[:, :k] @ (U[:, :k].T @ x[:, :k])
    if diagonal == "drop":
        torch.mul(U[:, k:], torch.linalg.vecdot(U[:, k:], x[:, k:], dim=0), out=x[:, k:])
    else:
        x[:, k:] = 0


def _leading(s: Tensor, alpha: float, tolerance: float) -> tuple[int, int]:
    """Size k of the block, and how many directions the data determine; k is at most that."""
    rank = int((s > tolerance * s[0]).sum())
    k = rank if alpha == 1 else int((s.cumsum(0) / s.sum() <= alpha).sum())
    return min(k, rank), rank


def opcm_scale(norms: Sequence[float], merged_norm: float) -> float:
    """The factor that gives the merged change the mean norm of the experts' changes (eq. 9).

    Args:
        norms: Frobenius norm of each change, over the whole model.
        merged_norm: ||u|| over the whole model.

    Returns:
        mean(norms) / merged_norm, and 1 where nothing was merged.

    >>> opcm_scale([2.0, 4.0], 6.0)
    0.5
    """
    return fsum(norms) / len(norms) / merged_norm if norms and merged_norm > 0 else 1.0
