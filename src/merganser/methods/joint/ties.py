"""TIES: trim each change to its largest entries, elect a sign for every entry, take the mean of those who agree.

    x_k = d_k on its round(density n) entries of largest |d_k|, else 0        v = sum_k w_k x_k
    D   = scale * sum_k a_k w_k x_k / sum_k a_k |w_k|                         a_k = 1 where w_k x_k v > 0, else 0

Entries whose votes cancel exactly add nothing. Without normalize the sum is not divided.

Source: Yadav et al. 2023, arXiv:2306.01708, whose lambda is `scale`; its resolution of exact ties by the majority of
all other signs is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from merganser.methods.joint._elect import elected
from merganser.methods.joint._keep import entries, factors_of, kept, shares_of
from merganser.methods.joint._sum import weights_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def ties_ranks(n: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """The ranks that are kept: the first round(density n), at least one.

    Args:
        n: entries of the tensor.
        settings: of one model: density, and how to count.

    Raises:
        ParameterError: If a setting is out of range.

    >>> ties_ranks(7, {"density": 0.25, "count": "round"})
    (0, 2)
    """
    (density,) = shares_of("density", settings["density"], 1)
    return 0, min(n, max(1, entries(density, n, settings["count"])))


def ties(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    keep: Bool[Tensor, " K *S"] | Sequence[Bool[Tensor, "*S"]],
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    count: str = "round",
    cancelled: str = "none",
    rescale: str = "none",
) -> Float[Tensor, "*S"]:
    """Mean of the trimmed changes that agree in sign.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        keep: the entries of largest magnitude, as `ties_ranks` counts them.
        stretch: needed where `rescale` is "l1".
        density: share of the entries of each tensor that is kept, in (0, 1]; one number or one a model.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the weights of those who agree.
        count: "round" keeps the nearest whole number of entries, "floor" the one below; at least one.
        cancelled: sign where the votes add up to 0: "none", so that the entry is 0, or "plus".
        rescale: "l1" gives each trimmed change the L1 norm it had, "none" leaves it.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or all weights are 0 and `normalize` is set.

    >>> import torch
    >>> d = torch.tensor([[4.0, 1.0, -2.0, 0.0], [2.0, 1.0, 8.0, 0.0]])
    >>> ties(d, weight=[1.0, 1.0], keep=torch.tensor([[True, False, True, False]] * 2), density=0.5)
    tensor([3., 0., 8., 0.])
    """
    shares_of("density", density, len(d))
    entries(1.0, 1, count)
    factors = factors_of(rescale, stretch, len(d), choices=("none", "l1"))
    weights = weights_of(weight, len(d))
    return elected(kept(d, keep), weights, factors=factors, normalize=normalize, cancelled=cancelled, scale=scale)
