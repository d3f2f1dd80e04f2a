"""Gram with its ridge at the noise of the changes, and towards their sum instead of zero.

    minimise_D  sum_i w_i ||(D - d_i) d_i^T||_F^2 / ||d_i||_F^2  +  rho ||D - anchor S||_F^2
    D = (B + rho anchor S) (G + rho I)^-1      G, B as for gram,  S = sum_i w_i d_i
    rho = max(eps mean(lambda), the share `noise` of G's eigenvalues lambda lies below it)

Where G is weaker than rho it tells nothing of any expert's inputs, and the changes just add up, as in task arithmetic.
With anchor 1 a single change comes out as it is, and so do changes whose inputs are orthogonal; gram shrinks both.
How much of a change is noise differs: a few steps of fine-tuning leave a flat spectrum of G, long training a steep one.

Source: ours; the terms are those of WUDI, Cheng et al. 2025, arXiv:2503.08099, eq. 9.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def gram_anchored(
    s: Float[Tensor, "m n"],
    g: Float[Tensor, "n n"],
    b: Float[Tensor, "m n"],
    *,
    noise: float = 0.25,
    anchor: float = 1.0,
    eps: float = 1e-3,
) -> Float[Tensor, "m n"]:
    """Solve the anchored normal equations in float64.

    Args:
        s: sum of the changes.
        g: sum of weighted right Grams, symmetric and positive semidefinite.
        b: sum of the matching right-hand sides.
        noise: share of G's eigenvalues that are taken for noise, in [0, 1).
        anchor: factor of the sum that the ridge pulls towards, not negative; 0 pulls to zero, as gram does.
        eps: least ridge as a share of G's mean eigenvalue, in [1e-9, 1].

    Returns:
        The merged change, (out, in), in b's dtype; zeros where every change was zero.

    Raises:
        ParameterError: If a setting is out of range, or G is not positive semidefinite (a negative weight).

    >>> d = torch.tensor([[1.0, 2.0]])
    >>> gram_anchored(d, d.T @ d / 5, d)  # one change: B = d d^T d / ||d||^2 = d
    tensor([[1., 2.]])
    """
    if not 0 <= noise < 1:
        raise ParameterError(f"noise is {noise}; it is a share of the eigenvalues, in [0, 1)")
    if not 1e-9 <= eps <= 1:
        raise ParameterError(f"eps is {eps}; it is a share of the mean eigenvalue, in [1e-9, 1]")
    if not 0 <= anchor < inf:
        raise ParameterError(f"anchor is {anchor}; it is a finite factor, not negative")
    n = g.shape[0]
    g64 = g.double()
    trace = float(g64.trace()) if n else 0.0
    if trace == 0:
        return torch.zeros_like(b)
    rho = max(eps * trace / n, float(torch.linalg.eigvalsh(g64)[int(noise * n)]) if noise > 0 else 0.0)
    regularised = g64 if g64 is not g else g64.clone()
    regularised.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(regularised)
    if failed:
        raise ParameterError(
            "the sum of Grams is not positive semidefinite; every weight must be positive for gram_anchored"
        )
    target = torch.add(b.double(), s.double(), alpha=rho * anchor)
    return torch.cholesky_solve(target.T, factor).T.to(b.dtype)
