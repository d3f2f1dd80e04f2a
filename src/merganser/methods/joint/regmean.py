"""RegMean: the one linear layer whose outputs are nearest to those of every model on that model's own inputs.

    minimise_W  sum_k w_k ||(W - W_k) X_k||^2
    W = M + (sum_k w_k (W_k - M) G_k) (sum_k w_k G_k)^-1      M = sum_k w_k W_k / sum_k w_k
    G_k = reduction * X_k X_k^T + (1 - reduction) diag(X_k X_k^T)

That is (sum w W G) (sum w G)^-1, written around the mean: an input that no model ever saw takes the mean, and copies
come back. The system is scaled to a diagonal of ones, where its eigenvalues are at least 1 - reduction; a ridge fills
up what is missing from that to the rounding of the Gram matrices.

Source: Jin et al. 2023, arXiv:2212.09849, eq. 2; the mean and the ridge are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._mean import shares
from merganser.numerics import product

if TYPE_CHECKING:
    from jaxtyping import Float


def regmean(
    x: Float[Tensor, "K m n"] | Sequence[Float[Tensor, "m n"]],
    *,
    gram: Float[Tensor, "K n n"] | Sequence[Float[Tensor, "n n"]],
    weight: Float[Tensor, " K"] | Sequence[float],
    reduction: float = 0.95,
) -> Float[Tensor, "m n"]:
    """Least-squares merge of linear weights.

    Args:
        x: the models' weights, each (out, in).
        gram: second moments of each model's inputs, (in, in).
        weight: not negative; only the ratios count.
        reduction: factor on the entries off the diagonal, in [0, 1]; 1 is plain least squares.

    Returns:
        The merged weight.

    Raises:
        ParameterError: If `reduction` is outside [0, 1], a weight is negative or not finite, all are 0, or a matrix is
            not one of second moments.

    >>> x = torch.tensor([[[2.0, 2.0]], [[4.0, 4.0]]])
    >>> gram = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    >>> regmean(x, gram=gram, weight=[1.0, 1.0])
    tensor([[2.5000, 3.0000]])
    """
    if not 0 <= reduction <= 1:
        raise ParameterError(f"reduction is {reduction}; it is a factor in [0, 1]")
    weights = shares(weight, len(x))
    mean = torch.zeros(x[0].shape, dtype=torch.float64, device=x[0].device)
    for x_k, w in zip(x, weights, strict=True):
        mean.add_(x_k.double(), alpha=w)
    n = mean.shape[1]
    g = torch.zeros(n, n, dtype=torch.float64, device=mean.device)
    b = torch.zeros_like(mean)
    for x_k, g_k, w in zip(x, gram, weights, strict=True):
        moments = g_k.double() * (w * reduction)
        moments.diagonal().add_(g_k.double().diagonal(), alpha=w * (1 - reduction))
        g.add_(moments)
        b.add_(product(x_k.double() - mean, moments))
    diagonal = g.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 1)
    unit = scale[:, None] * g * scale
    ridge = max(0.0, (1e-10 if gram[0].dtype == torch.float64 else 1e-6) - (1 - reduction))
    unit.diagonal().fill_(1 + ridge)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if failed or bool((diagonal < 0).any()):
        raise ParameterError("the sum of the Gram matrices is not positive semidefinite: it is not of second moments")
    solution = torch.cholesky_solve((b * scale).T, factor).T * scale
    return mean.add_(solution).to(x[0].dtype)
