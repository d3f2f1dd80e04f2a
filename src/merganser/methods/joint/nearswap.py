"""Nearswap: move each entry of the base towards another model, by t at most.

    W = W_0 + s (W_1 - W_0)        s = min(t / |W_1 - W_0|, 1)

Where the two differ by t or less, W is W_1 itself, also where they are equal.

Source: alchemonaut's QuartetAnemoi-70B-t0.0001, Hugging Face, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float


def nearswap(x: Float[Tensor, " 2 *S"] | Sequence[Float[Tensor, "*S"]], *, t: float) -> Float[Tensor, "*S"]:
    """The base with entries of another model where they are near.

    Args:
        x: the base and the other model.
        t: farthest that an entry moves, not negative; 0 gives the base.

    Returns:
        The merged tensor.

    Raises:
        ParameterError: If there are not two models, or `t` is out of range.

    >>> nearswap(torch.tensor([[0.0, 1.0, 2.0], [0.25, -3.0, 2.0]]), t=0.5)
    tensor([0.2500, 0.5000, 2.0000])
    """
    if len(x) != 2:
        raise ParameterError(f"nearswap takes the base and one other model; there are {len(x)}")
    if not 0 <= t < inf:
        raise ParameterError(f"t is {t}; it is a finite number, not negative")
    base, other = x
    step = other - base
    near = step.abs()
    far = torch.gt(near, t, out=torch.empty_like(near))
    moved = step.clamp_(-t, t).add_(base).mul_(far)
    return moved.add_(torch.le(near, t, out=near).mul_(other))  # exact, as one of the two is 0
