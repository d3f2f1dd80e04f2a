"""Karcher mean: the direction that is nearest to those of all models on the sphere, at the mean of their norms.

    minimise_m  sum_k a_k angle(m, u_k)^2        u_k = x_k / ||x_k||        y = (sum_k a_k ||x_k||) m

    m <- cos|g| m + sin|g| g / |g|       g = sum_k a_k (a_km / sin a_km) (u_k - cos a_km m),   a_km = angle(m, u_k)

m and g are combinations of the u_k, so an iteration costs K^2 on the inner products and no pass over the models.
It starts from the normalised mean; where the directions cancel, from that of the largest a_k ||x_k||, and stays there.

Source: Karcher 1977, doi:10.1002/cpa.3160300502; for models the method of this name in mergekit, arXiv:2403.13257.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, inf, sin
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._mean import shares
from merganser.methods.joint._sphere import OPPOSITE, directions, mean_direction
from merganser.methods.joint._sum import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float


def karcher(
    x: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    dots: Float[Tensor, "K K"],
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Float[Tensor, "*S"]:
    """Weighted Karcher mean of the directions times the mean of the norms.

    Args:
        x: the models.
        weight: not negative; only the ratios count.
        dots: inner products of the whole tensors.
        max_iter: most iterations, from 1.
        tol: length of g, an angle, at which to stop, above 0.

    Returns:
        The merged tensor. A zero tensor counts in the norm and has no direction.

    Raises:
        ParameterError: If a weight is negative or not finite, all are 0, or `max_iter` or `tol` is out of range.

    >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> karcher(x, weight=[1.0, 1.0], dots=x.double() @ x.double().T)
    tensor([1.4142, 1.4142])
    """
    if max_iter < 1:
        raise ParameterError(f"max_iter is {max_iter}; it is a count from 1")
    if not 0 < tol < inf:
        raise ParameterError(f"tol is {tol}; it is an angle above 0")
    a = torch.tensor(shares(weight, len(x)), dtype=torch.float64)
    norms, inverse, cosines = directions(dots, len(x))
    m, cancel = mean_direction(a, norms, cosines)
    if not cancel:
        live = torch.where(norms > 0, a, 0)
        m = _nearest(live / live.sum(), m, cosines, max_iter, tol)
    return weighted_sum(x, (float(a @ norms) * m * inverse).tolist())


def _nearest(a: Tensor, m: Tensor, cosines: Tensor, max_iter: int, tol: float) -> Tensor:
    """Fixed point of the equation for m, in coefficients of the unit vectors."""
    for _ in range(max_iter):
        c = (cosines @ m).clamp(-1, 1)
        s = ((1 - c) * (1 + c)).sqrt()
        stretch = torch.where(s > OPPOSITE, torch.atan2(s, c) / s, torch.where(c > 0, 1.0, 0.0))
        pull = a * stretch
        g = pull - (pull @ c) * m
        length = float((g @ cosines @ g).clamp(min=0).sqrt())
        if length < tol:
            break
        m = cos(length) * m + sin(length) / length * g
    return m
