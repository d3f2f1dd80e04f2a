"""Multi-SLERP: the mean of the directions of K models, at the mean of their norms.

    y = (sum_k a_k n_k) m      m = sum_k a_k u_k / ||sum_k a_k u_k||      u_k = x_k / n_k      n_k = ||x_k||

Published as a log map at m, a mean in the tangent space and an exp map back, with projection for the log map. That
mean is sum_k a_k (u_k - <u_k, m> m) = 0, since sum_k a_k u_k is along m; so the two steps leave m as it is.
`karcher` takes the true log map. Where the directions cancel, m is that of the largest a_k n_k.

Source: the method of this name in mergekit, Goddard et al. 2024, arXiv:2403.13257.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.methods.joint._mean import shares
from merganser.methods.joint._sphere import directions, mean_direction
from merganser.methods.joint._sum import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float


def multislerp(
    x: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    dots: Float[Tensor, "K K"],
    normalize: bool = True,
) -> Float[Tensor, "*S"]:
    """Mean direction of the models times the mean of their norms.

    Args:
        x: the models.
        weight: a, not negative.
        dots: inner products of the whole tensors.
        normalize: whether the weights are divided by their sum; it changes the norm only.

    Returns:
        The merged tensor. A zero tensor counts in the norm and has no direction.

    Raises:
        ParameterError: If a weight is negative or not finite, or all are 0.

    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> multislerp(x, weight=[1.0, 1.0], dots=x.double() @ x.double().T)
    tensor([1.4142, 1.4142])
    """
    a = torch.tensor(shares(weight, len(x)), dtype=torch.float64)
    norms, inverse, cosines = directions(dots, len(x))
    m, _ = mean_direction(a, norms, cosines)
    norm = float(a @ norms) * (1 if normalize else sum(float(w) for w in weight))
    return weighted_sum(x, (norm * m * inverse).tolist())


def multislerp_delta(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    dots: Float[Tensor, "K K"],
    normalize: bool = True,
) -> Float[Tensor, "*S"]:
    """Mean direction of the changes times the mean of their norms.

    Args:
        d: the models minus the base.
        weight: a, not negative.
        dots: inner products of the whole changes.
        normalize: whether the weights are divided by their sum; it changes the norm only.

    Returns:
        The merged change.

    Raises:
        ParameterError: If a weight is negative or not finite, or all are 0.

    >>> d = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> multislerp_delta(d, weight=[1.0, 0.0], dots=d.double() @ d.double().T)
    tensor([3., 0.])
    """
    return multislerp(d, weight=weight, dots=dots, normalize=normalize)
