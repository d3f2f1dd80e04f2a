"""Distances between numbers of bfloat16, and what does not agree yet."""

from __future__ import annotations

import torch
from torch import Tensor


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of bfloat16 lie from one to the other."""
    return (places(a) - places(b)).abs()


def places(x: Tensor) -> Tensor:
    """Place of each number of bfloat16 in their order; 0 and -0 share one."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
