"""Plain mean (model soup, SWA): the control of every comparison.

    D = S / total      S = sum_i w_i d_i,  total = sum_i w_i

The recurrence D <- ((t - 1) D + d_t) / t of stochastic weight averaging gives the same D.

Source: Wortsman et al. 2022, arXiv:2203.05482; Izmailov et al. 2018, arXiv:1803.05407.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float


def mean(s: Float[Tensor, "*S"], *, total: float) -> Float[Tensor, "*S"]:
    """Weighted mean of changes from their weighted sum.

    Args:
        s: sum of weight times change.
        total: sum of the weights; positive.

    Returns:
        The merged change.

    Raises:
        ParameterError: If total is not positive.

    >>> import torch
    >>> mean(torch.tensor([2.0, 6.0]), total=2.0)
    tensor([1., 3.])
    """
    if not total > 0:
        raise ParameterError(f"the weights add up to {total}; a mean needs a positive sum")
    return s / total
