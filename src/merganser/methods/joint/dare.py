"""DARE: drop entries of each change at random, divide the rest by the share kept.

    x_k = m_k d_k / density_k        m_k = 1 where u_k < density_k, else 0        E[x_k] = d_k
    D   = scale * sum_k w_k x_k                                       dare_linear
    D   = scale * mean of the w_k x_k that agree in sign              dare_ties, as in TIES

Source: Yu et al. 2023, arXiv:2311.03099; the paper's drop rate p is 1 - density.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merganser.methods.joint._elect import elected
from merganser.methods.joint._keep import factors_of, kept, less, shares_of
from merganser.methods.joint._sum import total_of, weighted_sum, weights_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

RESCALES = ("share", "l1", "none")


def dare_mask(
    u: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]], *, density: float | Sequence[float] = 0.5
) -> Bool[Tensor, " K *S"]:
    """The entries that are kept: those where u < density.

    Args:
        u: noise, uniform on [0, 1).
        density: expected share kept, in (0, 1]; one number or one a model.

    Raises:
        ParameterError: If `density` is out of range.

    >>> dare_mask(torch.tensor([[0.1, 0.9]]))
    tensor([[ True, False]])
    """
    kept_entries = torch.empty(len(u), *u[0].shape, dtype=torch.bool, device=u[0].device)
    for mask, u_k, p in zip(kept_entries, u, shares_of("density", density, len(u)), strict=True):
        less(u_k, p, out=mask)
    return kept_entries


def dare_linear(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    u: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    mask: Bool[Tensor, " K *S"] | Iterable[Bool[Tensor, "*S"]] | None = None,
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "share",
) -> Float[Tensor, "*S"]:
    """Weighted sum of K changes, each thinned to `density` of its entries.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        u: noise, uniform on [0, 1).
        mask: what `dare_mask` gives, where that is known; `u` is not looked at then.
        stretch: needed where `rescale` is "l1".
        density: expected share kept, in (0, 1]; one number or one a model.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the sum of weights.
        rescale: "share" divides by `density`, which makes the drop unbiased; "l1" gives each thinned change the L1
            norm it had; "none" leaves it.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or the weights add up to 0 and `normalize` is set.

    >>> dare_linear(torch.tensor([[2.0, 4.0]]), weight=[1.0], u=torch.tensor([[0.1, 0.9]]))
    tensor([4., 0.])
    """
    densities, factors = _shares_and_factors(density, rescale, stretch, len(d))
    weights = weights_of(weight, len(d))
    parts = [w * factor for w, factor in zip(weights, factors, strict=True)]
    merged = weighted_sum(_thinned(d, u, densities, mask), parts, scale=scale)
    return merged.div_(total_of(weights)) if normalize else merged


def dare_ties(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    u: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    mask: Bool[Tensor, " K *S"] | Iterable[Bool[Tensor, "*S"]] | None = None,
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: str = "share",
    cancelled: str = "none",
) -> Float[Tensor, "*S"]:
    """Mean of the changes, thinned at random, that agree in sign.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        u: noise, uniform on [0, 1).
        mask: what `dare_mask` gives, where that is known; `u` is not looked at then.
        stretch: needed where `rescale` is "l1".
        density: expected share kept, in (0, 1]; one number or one a model.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the weights of those who agree.
        rescale: "share" divides by `density`; "l1" gives each thinned change the L1 norm it had; "none" leaves it.
        cancelled: sign where the votes add up to 0: "none", so that the entry is 0, or "plus".

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or all weights are 0 and `normalize` is set.

    >>> d, u = torch.tensor([[2.0, 4.0], [-1.0, 2.0]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    >>> dare_ties(d, weight=[1.0, 1.0], u=u)
    tensor([4., 6.])
    """
    densities, factors = _shares_and_factors(density, rescale, stretch, len(d))
    weights = weights_of(weight, len(d))
    changes = _thinned(d, u, densities, mask)
    return elected(changes, weights, factors=factors, normalize=normalize, cancelled=cancelled, scale=scale)


def _shares_and_factors(
    density: float | Sequence[float], rescale: str, stretch: Tensor | Sequence[float] | None, models: int
) -> tuple[list[float], list[float]]:
    """Density and factor of each model."""
    densities = shares_of("density", density, models)
    factors = factors_of(rescale, stretch, models, choices=RESCALES)
    return densities, [1 / p for p in densities] if rescale == "share" else factors


def _thinned(
    d: Tensor | Sequence[Tensor],
    u: Tensor | Sequence[Tensor],
    densities: list[float],
    mask: Tensor | Iterable[Tensor] | None,
) -> Iterator[Tensor]:
    """Each change with zeros where it is dropped, one after another in the same buffer."""
    if mask is not None:
        yield from kept(d, mask)
        return
    buffer = torch.empty_like(d[0])
    for d_k, u_k, p in zip(d, u, densities, strict=True):
        yield torch.lt(u_k, p, out=buffer).mul_(d_k)
