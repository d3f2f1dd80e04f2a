"""RAM: average what several models changed, keep what only one changed.

    c_k = 1 where |d_k| > epsilon, else 0        n = sum_k c_k
    D   = sum_k f_k c_k d_k / max(n, 1)
    f_k = 1                                                                                          ram
    f_k = 1 + r min(shared_k / unique_k, alpha) where n = 1, else 1                                  ramplus_tl

shared_k and unique_k count the entries of the tensor that model k changed and another did too, or did not.

Source: Yuan et al. 2026, arXiv:2601.13572; the counts are taken tensor by tensor, as in mergekit's `ramplus_tl`.
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


def ram(d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]], *, epsilon: float = 1e-5) -> Float[Tensor, "*S"]:
    """Mean of each entry over the models that changed it.

    Args:
        d: each model minus the base.
        epsilon: what counts as a change is larger than this, not negative.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If `epsilon` is out of range.

    >>> ram(torch.tensor([[2.0, 3.0, 0.0], [4.0, 0.0, 0.0]]))
    tensor([3., 3., 0.])
    """
    _check("epsilon", epsilon)
    return _averaged(d, _changers(d, epsilon), epsilon, [1.0] * len(d))


def ramplus_tl(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    epsilon: float = 1e-5,
    r: float = 0.1,
    alpha: float = 0.2,
) -> Float[Tensor, "*S"]:
    """Mean of each entry over the models that changed it; where that is one model, enlarged by its overlap.

    Args:
        d: each model minus the base, whole tensors.
        epsilon: what counts as a change is larger than this, not negative.
        r: how much the overlap enlarges, not negative.
        alpha: largest ratio of shared to unique entries that is told apart, not negative.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range.

    >>> ramplus_tl(torch.tensor([[2.0, 3.0, 0.0], [4.0, 0.0, 0.0]]), r=0.5, alpha=2.0)
    tensor([3.0000, 4.5000, 0.0000])
    """
    for name, value in (("epsilon", epsilon), ("r", r), ("alpha", alpha)):
        _check(name, value)
    changers = _changers(d, epsilon)
    factors = []
    for d_k in d:
        mine = d_k.abs() > epsilon
        unique = int((mine & (changers == 1)).sum())
        shared = int(mine.sum()) - unique
        factors.append(1 + r * min(shared / unique, alpha) if unique else 1.0)
    return _averaged(d, changers, epsilon, factors)


def _check(name: str, value: float) -> None:
    """Refuse a negative or infinite number."""
    if not 0 <= value < inf:
        raise ParameterError(f"{name} is {value}; it is a finite number, not negative")


def _changers(d: Tensor | Sequence[Tensor], epsilon: float) -> Tensor:
    """How many models changed each entry."""
    n, part = torch.zeros_like(d[0]), torch.empty_like(d[0])
    for d_k in d:
        n.add_(torch.gt(torch.abs(d_k, out=part), epsilon, out=part))
    return n


def _averaged(d: Tensor | Sequence[Tensor], n: Tensor, epsilon: float, factors: Sequence[float]) -> Tensor:
    """Sum of the changes over the number of changers, each times its factor where it is the only one."""
    total, part = torch.zeros_like(n), torch.empty_like(n)
    for d_k, factor in zip(d, factors, strict=True):
        torch.gt(torch.abs(d_k, out=part), epsilon, out=part).mul_(d_k)
        if factor != 1:
            part.mul_((n == 1).to(n.dtype).mul_(factor).add_(n != 1))
        total.add_(part)
    return total.div_(n.clamp(min=1))
