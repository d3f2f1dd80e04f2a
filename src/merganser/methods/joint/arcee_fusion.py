"""Arcee Fusion: take from another model the entries that stand out, in rows whose distribution changed.

    i = |W_1 - W_0| * KL(softmax(W_1) || softmax(W_0))        softmax and KL along the last axis
    W = W_1 where i >= median(i) + 1.5 (q_3(i) - q_1(i)), else W_0

Median and quartiles are those of the whole tensor, interpolated between neighbours, never of a sample. The
divergences are taken in float64: they are small differences of nearly equal numbers.

Source: mergekit's documentation of `arcee_fusion` (release 0.1, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.errors import ParameterError

if TYPE_CHECKING:
    from jaxtyping import Float


def arcee_fusion(x: Float[Tensor, " 2 *S"] | Sequence[Float[Tensor, "*S"]]) -> Float[Tensor, "*S"]:
    """The base with the important entries of another model.

    Args:
        x: the base and the other model, whole tensors.

    Returns:
        The merged tensor: every entry is one of the two.

    Raises:
        ParameterError: If there are not two models.

    >>> base, other = torch.zeros(3, 3), torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.2]])
    >>> arcee_fusion([base, other])
    tensor([[0.0000, 0.0000, 2.0000],
            [0.0000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.2000]])
    """
    if len(x) != 2:
        raise ParameterError(f"arcee_fusion takes the base and one other model; there are {len(x)}")
    base, other = x
    if not base.numel():
        return base.clone()
    importance = (other - base).abs_().mul_(_divergence(base, other))
    q1, median, q3 = _quantiles(importance.flatten(), (0.25, 0.5, 0.75))
    return torch.where(importance >= median + 1.5 * (q3 - q1), other, base)


def _divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL divergence of each row of the last axis, as a column."""
    shape = (-1, base.shape[-1] if base.ndim else 1)
    rows, others = (torch.split(m.reshape(shape), 256) for m in (base, other))
    parts = []
    for q, p in zip(rows, others, strict=True):
        log_q, log_p = torch.log_softmax(q.double(), dim=1), torch.log_softmax(p.double(), dim=1)
        terms = torch.split(log_p.exp() * (log_p - log_q), 1 << 15, dim=1)  # no sum is shared out among threads
        parts.append(torch.stack([block.sum(dim=1) for block in terms]).sum(dim=0).clamp_(min=0))
    column = torch.cat(parts).to(base.dtype)
    return column.reshape((*base.shape[:-1], 1) if base.ndim else ())


def _quantiles(x: Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles of a vector, linear between their two neighbours in order."""
    last = x.numel() - 1
    places = [q * last for q in shares]
    if x.device.type == "cpu":
        x = x.clone()
        x.numpy().partition(sorted({min(floor(place) + step, last) for place in places for step in (0, 1)}))
    else:
        x = x.sort().values
    found = []
    for place in places:
        low, high = float(x[floor(place)]), float(x[min(floor(place) + 1, last)])
        found.append(low + (place - floor(place)) * (high - low))
    return found
