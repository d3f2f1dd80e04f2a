"""Running mean, running sum: the rules for vectors, and two baselines for whole models.

    mean:  D_t = D_{t-1} + (d_t - D_{t-1}) / t
    sum:   D_t = D_{t-1} + d_t

Source: the mean is Izmailov et al. 2018, arXiv:1803.05407 (SWA); the sum, with d_t already multiplied by
its factor, is task arithmetic, Ilharco et al. 2022, arXiv:2212.04089.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def running_mean(merged: Float[Tensor, "*S"], d: Float[Tensor, "*S"], *, t: int) -> Float[Tensor, "*S"]:
    """Mean of the first t changes, from the mean of the first t - 1.

    Args:
        merged: mean so far; zeros at t = 1.
        d: the arriving change, already weighted.
        t: number of this arrival, from 1.

    Returns:
        The mean including `d`.

    >>> import torch
    >>> running_mean(torch.tensor([2.0, 4.0]), torch.tensor([5.0, 1.0]), t=3)
    tensor([3., 3.])
    """
    return merged + (d - merged) / t


def running_sum(merged: Float[Tensor, "*S"], d: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Sum of the changes so far.

    Args:
        merged: sum so far; zeros before the first arrival.
        d: the arriving change, already weighted.

    Returns:
        The sum including `d`.

    >>> import torch
    >>> running_sum(torch.tensor([2.0, 4.0]), torch.tensor([5.0, 1.0]))
    tensor([7., 5.])
    """
    return merged + d
