"""Model breadcrumbs: drop the largest and the smallest entries of each change, keep the middle.

    x_k = d_k on the entries whose rank of |d_k|, the largest first, is in [g, g + c), else 0
    c   = round(density n), at least 1        g = round(gamma n), at most n - c
    D   = scale * sum_k w_k x_k                                        breadcrumbs
    D   = scale * mean of the w_k x_k that agree in sign               breadcrumbs_ties, as in TIES

So the largest gamma and the smallest 1 - density - gamma are dropped. The paper's beta and gamma are two quantiles:
density is their difference, and ours drops what lies above the upper one.

Source: Davari and Belilovsky 2023, arXiv:2312.06795.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._elect import elected
from merganser.methods.joint._keep import entries, factors_of, kept, shares_of
from merganser.methods.joint._sum import total_of, weighted_sum, weights_of
from merganser.numerics import per_model

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def breadcrumbs_ranks(n: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """The ranks that are kept: behind the round(gamma n) largest, round(density n), at least one.

    Args:
        n: entries of the tensor.
        settings: of one model: density, gamma, how to count, and what an excess does.

    Raises:
        ParameterError: If a setting is out of range.

    >>> breadcrumbs_ranks(100, {"density": 0.9, "gamma": 0.01, "count": "round", "excess": "refuse"})
    (1, 91)
    """
    density, gamma, count = (settings[name] for name in ("density", "gamma", "count"))
    _check(density, gamma, count, settings["excess"], 1)
    kept_entries = min(n, max(1, entries(density, n, count)))
    start = min(entries(gamma, n, count), n - kept_entries)
    return start, start + kept_entries


def breadcrumbs(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    keep: Bool[Tensor, " K *S"] | Sequence[Bool[Tensor, "*S"]],
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.9,
    gamma: float | Sequence[float] = 0.01,
    scale: float = 1.0,
    normalize: bool = False,
    count: str = "round",
    excess: str = "refuse",
    rescale: str = "none",
) -> Float[Tensor, "*S"]:
    """Weighted sum of K changes without their largest and smallest entries.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        keep: the entries of middling magnitude, as `breadcrumbs_ranks` counts them.
        stretch: needed where `rescale` is "l1".
        density: share of the entries of each tensor that is kept, in (0, 1]; one number or one a model.
        gamma: share of the largest entries that is dropped, in [0, 1); one number or one a model.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the sum of weights.
        count: "round" counts the nearest whole number of entries, "floor" the one below.
        excess: where density and gamma exceed 1, "refuse" them, or drop no more of the largest than "density" leaves.
        rescale: "l1" gives each thinned change the L1 norm it had, "none" leaves it.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or the weights add up to 0 and `normalize` is set.

    >>> import torch
    >>> d, keep = torch.tensor([[9.0, 2.0, 0.1, -3.0]]), torch.tensor([[False, True, False, True]])
    >>> breadcrumbs(d, weight=[1.0], keep=keep, density=0.5, gamma=0.25)
    tensor([ 0.,  2.,  0., -3.])
    """
    _check(density, gamma, count, excess, len(d))
    factors = factors_of(rescale, stretch, len(d), choices=("none", "l1"))
    weights = weights_of(weight, len(d))
    divisor = total_of(weights) if normalize else 1.0
    parts = [w * factor for w, factor in zip(weights, factors, strict=True)]
    merged = weighted_sum(kept(d, keep), parts, scale=scale)
    return merged if divisor == 1 else merged.div_(divisor)


def breadcrumbs_ties(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    keep: Bool[Tensor, " K *S"] | Sequence[Bool[Tensor, "*S"]],
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.9,
    gamma: float | Sequence[float] = 0.01,
    scale: float = 1.0,
    normalize: bool = True,
    count: str = "round",
    excess: str = "refuse",
    cancelled: str = "none",
    rescale: str = "none",
) -> Float[Tensor, "*S"]:
    """Mean of the changes, without their largest and smallest entries, that agree in sign.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        keep: the entries of middling magnitude, as `breadcrumbs_ranks` counts them.
        stretch: needed where `rescale` is "l1".
        density: share of the entries of each tensor that is kept, in (0, 1]; one number or one a model.
        gamma: share of the largest entries that is dropped, in [0, 1); one number or one a model.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the weights of those who agree.
        count: "round" counts the nearest whole number of entries, "floor" the one below.
        excess: where density and gamma exceed 1, "refuse" them, or drop no more of the largest than "density" leaves.
        cancelled: sign where the votes add up to 0: "none", so that the entry is 0, or "plus".
        rescale: "l1" gives each thinned change the L1 norm it had, "none" leaves it.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or all weights are 0 and `normalize` is set.

    >>> import torch
    >>> d = torch.tensor([[9.0, 2.0, 0.1, -3.0], [1.0, -4.0, 8.0, -2.0]])
    >>> keep = torch.tensor([[False, True, False, True]] * 2)
    >>> breadcrumbs_ties(d, weight=[1.0, 1.0], keep=keep, density=0.5, gamma=0.25)
    tensor([ 0.0000, -4.0000,  0.0000, -2.5000])
    """
    _check(density, gamma, count, excess, len(d))
    factors = factors_of(rescale, stretch, len(d), choices=("none", "l1"))
    weights = weights_of(weight, len(d))
    return elected(kept(d, keep), weights, factors=factors, normalize=normalize, cancelled=cancelled, scale=scale)


def _check(
    density: float | Sequence[float], gamma: float | Sequence[float], count: str, excess: str, models: int
) -> None:
    """Refuse what is out of range."""
    entries(1.0, 1, count)
    if excess not in ("refuse", "density"):
        raise ParameterError(f"excess is {excess!r}; it is 'refuse' or 'density'")
    for p, g in zip(shares_of("density", density, models), per_model(gamma, models), strict=True):
        if not 0 <= g < 1:
            raise ParameterError(f"gamma is {g}; it is a fraction in [0, 1), not a percentage")
        if p + g > 1 + 1e-9 and excess == "refuse":
            raise ParameterError(
                f"gamma is {g} at density {p}; what is kept and what is dropped exceed the whole",
                hint=f"gamma is at most {1 - p:g} there; or set excess to 'density'",
            )
