"""Weighted sum of changes, as it stands.

    D = S      S = sum_i w_i d_i

Source: Wortsman et al. 2022, arXiv:2203.05482, without normalisation of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def linear(s: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The weighted sum itself.

    Args:
        s: sum of weight times change.

    Returns:
        The merged change.

    >>> import torch
    >>> linear(torch.tensor([2.0, 6.0]))
    tensor([2., 6.])
    """
    return s
