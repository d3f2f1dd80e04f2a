"""LiNeS: scale a merged change by the depth of its layer.

    D' = (alpha + beta * depth) D        depth = (l - 1) / (L - 1) for layer l of L

Shallow layers stay nearer to the base, where they hold what all tasks share.

Source: Wang et al. 2024, arXiv:2410.17146.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def lines(merged: Float[Tensor, "*S"], *, depth: float, alpha: float, beta: float) -> Float[Tensor, "*S"]:
    """A merged change times a factor that grows with depth.

    Args:
        merged: the merged change.
        depth: place of the layer, in [0, 1]: 0 is the first, 1 the last.
        alpha: factor of the first layer.
        beta: what the last layer has more.

    Returns:
        The scaled change.

    Raises:
        ParameterError: If `depth` is outside [0, 1], or `alpha` or `beta` is not finite.

    >>> import torch
    >>> lines(torch.tensor([2.0, 4.0]), depth=0.5, alpha=0.5, beta=1.0)
    tensor([2., 4.])
    """
    if not 0 <= depth <= 1:
        raise ParameterError(f"depth is {depth}; it is the place of a layer, in [0, 1]")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not isfinite(value):
            raise ParameterError(f"{name} is {value}; it is a finite number")
    return merged * (alpha + beta * depth)
