"""Orthonormal stand-ins for a set of directions that are not orthogonal to each other.

W = P Q^T        B = P diag(.) Q^T        the orthonormal columns nearest to those of B (Loewdin, Procrustes)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.numerics import live_factors

if TYPE_CHECKING:
    from jaxtyping import Float


def whitened(blocks: Sequence[Float[Tensor, "m _"]], dtype: torch.dtype) -> Float[Tensor, "m c"]:
    """Columns of all blocks, made orthonormal together.

    Directions that the columns do not span above the rounding of `dtype` are left out, not blown up: two equal columns
    share one direction, and each becomes it over sqrt(2).

    Args:
        blocks: unit columns, of the data that they come from as exact as `dtype`.
        dtype: type of that data.

    Returns:
        float64, as many columns.

    >>> whitened([torch.tensor([[1.0], [0.0]]), torch.tensor([[0.6], [0.8]])], torch.float64)
    tensor([[ 0.9487,  0.3162],
            [-0.3162,  0.9487]], dtype=torch.float64)
    """
    p, _, q = live_factors(torch.cat([b.to(dtype) for b in blocks], dim=1))
    return p @ q.T
