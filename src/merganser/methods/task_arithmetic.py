"""Task arithmetic: add up the changes and scale the sum.

    D = scale * S      S = sum_i w_i d_i

The continual form D <- D + scale * d_t gives the same D.

Source: Ilharco et al. 2022, arXiv:2212.04089, eq. 1; scale 0.3 is its choice for 8 tasks.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float


def task_arithmetic(s: Float[Tensor, "*S"], *, scale: float = 0.3) -> Float[Tensor, "*S"]:
    """Scaled sum of changes.

    Args:
        s: sum of weight times change.
        scale: the coefficient lambda, any finite number; best values fall as experts are added.

    Returns:
        The merged change.

    Raises:
        ParameterError: If scale is not finite.

    >>> import torch
    >>> task_arithmetic(torch.tensor([2.0, 6.0]), scale=0.5)
    tensor([1., 3.])
    """
    if not isfinite(scale):
        raise ParameterError(f"scale is {scale}; it is a finite number")
    return s * scale
