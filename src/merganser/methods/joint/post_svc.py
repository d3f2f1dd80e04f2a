"""SVC: weaken the directions of a merged change that several models have added up in, strengthen the others.

    D' = U diag(gamma sigma) V^T      D = U diag(sigma) V^T      gamma_r = K / sum_i max(alpha, s_ir)
    s_ir = <a_r, a_ir> / ||a_ir||^2        a_r = u_r^T D = sigma_r v_r^T,   a_ir = u_r^T d_i

s_ir is how many times model i's own response along u_r is in the merge. Where that response is below rounding, s_ir
is 0: noise would make it anything. Directions of D below rounding stay as they are.

Source: Li et al. 2026, arXiv:2602.05536.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import live_factors, product, singular_tolerance

if TYPE_CHECKING:
    from jaxtyping import Float


def svc(
    merged: Float[Tensor, "m n"],
    d: Float[Tensor, "K m n"] | Sequence[Float[Tensor, "m n"]],
    *,
    alpha: float | None = None,
) -> Float[Tensor, "m n"]:
    """A merged change with calibrated singular values.

    Args:
        merged: the merged change, (out, in).
        d: the changes that it is a merge of.
        alpha: least s that counts, above 0; None is 1/K, and 1 goes with merges that whiten, such as TSV-M.

    Returns:
        The calibrated change; zeros for zeros.

    Raises:
        ParameterError: If `alpha` is not a finite number above 0.

    >>> d = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -1.0]]])
    >>> svc(d.sum(0), d)
    tensor([[1., 0.],
            [0., 0.]])
    """
    least = 1 / len(d) if alpha is None else alpha
    if not 0 < least < inf:
        raise ParameterError(f"alpha is {alpha}; it is a finite number above 0")
    u, sigma, v = live_factors(merged)
    tolerance = singular_tolerance((merged.shape[0], merged.shape[1]), merged.dtype)
    total = torch.zeros_like(sigma)
    for d_i in d:
        change = d_i.double()
        responses = product(u.T.contiguous(), change)
        squares = responses.square().sum(1)
        felt = squares.sqrt() > tolerance * torch.linalg.matrix_norm(change)
        s = torch.where(felt, sigma * (responses * v.T).sum(1) / squares, 0)
        total.add_(s.clamp(min=least))
    gamma = len(d) / total
    return merged.double().add(product(u * (sigma * (gamma - 1)), v.T)).to(merged.dtype)
