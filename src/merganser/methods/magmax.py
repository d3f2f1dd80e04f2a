"""MagMax: each entry takes the change of largest magnitude that has arrived.

    D_t = d_t where |d_t| > |D_{t-1}|, else D_{t-1}

Equal to the joint rule argmax_i |d_i| per entry; on equal magnitudes the earlier arrival stays, so the order
of arrival matters only where two changes are exactly opposite.

Source: Marczak et al. 2024, arXiv:2407.06322.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def magmax(merged: Float[Tensor, "*S"], d: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Entry of larger magnitude of the merged change and the arriving one.

    Args:
        merged: merged change so far; zeros before the first arrival.
        d: the arriving change, already weighted.

    Returns:
        The merged change including `d`.

    >>> magmax(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([-2.0, 1.0, -2.0]))
    tensor([-2., -3.,  2.])
    """
    return torch.where(d.abs() > merged.abs(), d, merged)
