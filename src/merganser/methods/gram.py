"""Gram: the one matrix whose outputs agree best with every expert's, on inputs inferred from the changes.

    minimise_D  sum_i w_i ||(D - d_i) d_i^T||_F^2 / ||d_i||_F^2  +  ridge
    D = B (G + eps tr(G)/n I)^-1      G = sum_i w_i d_i^T d_i / ||d_i||_F^2
                                      B = sum_i w_i d_i d_i^T d_i / ||d_i||_F^2

Fine-tuning changes a layer within the span of its inputs, so d^T d stands in for the inputs' covariance in RegMean.
The sums G and B do not depend on the order, and an expert's terms can be subtracted again.

Source: closed form of WUDI, Cheng et al. 2025, arXiv:2503.08099, eq. 9, as data-free RegMean, arXiv:2212.09849, eq. 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import gram_of_rows

if TYPE_CHECKING:
    from jaxtyping import Float


def gram_terms(d: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "m n"]]:
    """One expert's terms of G and B, of weight 1, in float64: in float32 their rounding comes back 1/eps times larger.

    Args:
        d: the expert's change, (out, in).

    Returns:
        d^T d / ||d||^2 and d d^T d / ||d||^2; zeros for a zero change.

    >>> gram_terms(torch.tensor([[0.0, 2.0]]))
    (tensor([[0., 0.],
            [0., 1.]], dtype=torch.float64), tensor([[0., 2.]], dtype=torch.float64))
    """
    m, n = d.shape
    unit = d.double()
    norm = torch.linalg.vector_norm(unit)  # no float32 change, however small, has squares that underflow in float64
    if not norm > 0:
        return unit.new_zeros(n, n), torch.zeros_like(unit)
    unit = unit / norm
    g = gram_of_rows(unit.T)
    b = gram_of_rows(unit) @ unit if m < n else unit @ g
    return g, b.mul_(norm)


def gram(g: Float[Tensor, "n n"], b: Float[Tensor, "m n"], *, eps: float = 0.01) -> Float[Tensor, "m n"]:
    """Solve the regularised normal equations in float64.

    Args:
        g: sum of weighted right Grams, symmetric and positive semidefinite.
        b: sum of the matching right-hand sides.
        eps: ridge as a share of G's mean eigenvalue, in [1e-9, 1]; 1e-3 to 1e-1 work alike.

    Returns:
        The merged change, (out, in), in b's dtype; zeros where every change was zero.

    Raises:
        ParameterError: If eps is outside [1e-9, 1], or G is not positive semidefinite (a negative weight).

    >>> gram(torch.eye(2), torch.tensor([[1.01, 2.02]]), eps=0.01)
    tensor([[1., 2.]])
    """
    if not 1e-9 <= eps <= 1:
        raise ParameterError(f"eps is {eps}; it is a share of the mean eigenvalue, in [1e-9, 1]")
    n = g.shape[0]
    g64 = g.double()
    trace = float(g64.trace()) if n else 0.0
    if trace == 0:
        return torch.zeros_like(b)
    regularised = g64 if g64 is not g else g64.clone()
    regularised.diagonal().add_(eps * trace / n)
    factor, failed = torch.linalg.cholesky_ex(regularised)
    if failed:
        raise ParameterError("the sum of Grams is not positive semidefinite; every weight must be positive for gram")
    return torch.cholesky_solve(b.double().T, factor).T.to(b.dtype)
