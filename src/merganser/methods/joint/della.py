"""DELLA: drop entries of each change at random, the small ones of a row more often, divide the rest by their chance.

    p_k = density + epsilon (r_k / (n - 1) - 1/2)      r_k = rank of |d_k| in its row of n entries, 0 for the smallest
    x_k = m_k d_k / p_k        m_k = 1 where u_k < p_k, else 0        E[x_k] = d_k
    D   = scale * mean of the w_k x_k that agree in sign                  della, as in TIES
    D   = scale * sum_k w_k x_k                                           della_linear

A row of one entry has p = density, and at density 1 nothing is dropped, whatever epsilon is. A vector is one row, so
it has to come whole.

Source: Deep et al. 2024, arXiv:2406.11617; there epsilon is the whole range of p, as here, and the last rank falls
epsilon / n short of its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._elect import elected
from merganser.methods.joint._keep import factors_of, kept, less, shares_of
from merganser.methods.joint._sum import weighted_sum, weights_of
from merganser.numerics import per_model

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

RESCALES = ("share", "l1", "none")
Chances = list[tuple[float, float]]


def della_mask(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    u: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.3,
    row: str = "first",
) -> Bool[Tensor, " K *S"]:
    """The entries that are kept.

    Args:
        d: each model minus the base.
        u: noise, uniform on [0, 1).
        density: expected share kept; one number or one a model.
        epsilon: chance of the largest entry of a row less that of the smallest; one number or one a model.
        row: "first" for all that one index of the first axis holds, "last" for a line along the last axis.

    Raises:
        ParameterError: If a setting is out of range.

    >>> della_mask(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([[False,  True]])
    """
    chances = _chances(density, epsilon, row, len(d))
    kept_entries = torch.empty(len(d), *d[0].shape, dtype=torch.bool, device=d[0].device)
    for mask, d_k, u_k, between in zip(kept_entries, d, u, chances, strict=True):
        less(u_k, _chance(d_k, between, row), out=mask)
    return kept_entries


def della_linear(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    u: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    mask: Bool[Tensor, " K *S"] | Iterable[Bool[Tensor, "*S"]] | None = None,
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.3,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "share",
    row: str = "first",
) -> Float[Tensor, "*S"]:
    """Weighted sum of K changes, each thinned by rank.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        u: noise, uniform on [0, 1).
        mask: what `della_mask` gives, where that is known; used unless `rescale` is "share", which needs the chances.
        stretch: needed where `rescale` is "l1".
        density: expected share kept, in (0, 1]; one number or one a model.
        epsilon: chance of the largest entry of a row less that of the smallest; density +- epsilon / 2
            is in (0, 1] where density is not 1.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the sum of weights.
        rescale: "share" divides each entry by its chance, which makes the drop unbiased; "l1" gives each thinned
            change the L1 norm it had; "none" leaves it.
        row: "first" for all that one index of the first axis holds, "last" for a line along the last axis.

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or the weights add up to 0 and `normalize` is set.

    >>> d, u = torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 0.5]])
    >>> della_linear(d, weight=[1.0], u=u, density=0.5, epsilon=0.5)
    tensor([ 0., -4.])
    """
    chances = _chances(density, epsilon, row, len(d))
    factors = factors_of(rescale, stretch, len(d), choices=RESCALES)
    weights = weights_of(weight, len(d))
    changes = _thinned(d, u, chances, factors, mask, share=rescale == "share", row=row)
    return weighted_sum(changes, weights, normalize=normalize, scale=scale)


def della(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    weight: Float[Tensor, " K"] | Sequence[float],
    u: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    mask: Bool[Tensor, " K *S"] | Iterable[Bool[Tensor, "*S"]] | None = None,
    stretch: Float[Tensor, " K"] | Sequence[float] | None = None,
    density: float | Sequence[float] = 0.5,
    epsilon: float | Sequence[float] = 0.3,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: str = "share",
    row: str = "first",
    cancelled: str = "none",
) -> Float[Tensor, "*S"]:
    """Mean of the changes, thinned by rank, that agree in sign.

    Args:
        d: each model minus the base.
        weight: one real factor a model.
        u: noise, uniform on [0, 1).
        mask: what `della_mask` gives, where that is known; used unless `rescale` is "share", which needs the chances.
        stretch: needed where `rescale` is "l1".
        density: expected share kept, in (0, 1]; one number or one a model.
        epsilon: chance of the largest entry of a row less that of the smallest; density +- epsilon / 2
            is in (0, 1] where density is not 1.
        scale: the coefficient lambda, any finite number.
        normalize: whether to divide by the weights of those who agree.
        rescale: "share" divides each entry by its chance; "l1" gives each thinned change the L1 norm it had; "none"
            leaves it.
        row: "first" for all that one index of the first axis holds, "last" for a line along the last axis.
        cancelled: sign where the votes add up to 0: "none", so that the entry is 0, or "plus".

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range, or all weights are 0 and `normalize` is set.

    >>> d, u = torch.tensor([[1.0, 3.0], [-2.0, 1.0]]), torch.full((2, 2), 0.5)
    >>> della(d, weight=[1.0, 1.0], u=u, density=0.5, epsilon=0.5)
    tensor([-2.6667,  4.0000])
    """
    chances = _chances(density, epsilon, row, len(d))
    factors = factors_of(rescale, stretch, len(d), choices=RESCALES)
    weights = weights_of(weight, len(d))
    changes = _thinned(d, u, chances, factors, mask, share=rescale == "share", row=row)
    return elected(changes, weights, normalize=normalize, cancelled=cancelled, scale=scale)


def della_locality(settings: Mapping[str, Any]) -> Literal["line", "row"]:
    """What the functions may be given under these settings.

    Args:
        settings: of `della`; what is missing has its default.

    Returns:
        "line" where ranks are those in a line along the last axis, else "row".

    >>> della_locality({"row": "last"})
    'line'
    """
    return "line" if settings.get("row", "first") == "last" else "row"


def _chances(density: float | Sequence[float], epsilon: float | Sequence[float], row: str, models: int) -> Chances:
    """Chance of the smallest and of the largest entry of a row, of each model."""
    if row not in ("first", "last"):
        raise ParameterError(f"row is {row!r}; it is 'first' or 'last'")
    chances = []
    for p, e in zip(shares_of("density", density, models), per_model(epsilon, models), strict=True):
        if not 0 <= e <= 1:
            raise ParameterError(f"epsilon is {e}; it is a difference of chances, in [0, 1]{_half(e)}")
        if p == 1:
            e = 0.0
        if not 0 < p - e / 2 <= p + e / 2 <= 1:
            raise ParameterError(
                f"epsilon is {e} at density {p}; density - epsilon/2 and density + epsilon/2 are in (0, 1]{_half(e)}"
            )
        chances.append((p - e / 2, p + e / 2))
    return chances


def _half(epsilon: float) -> str:
    return f" (in mergekit's language epsilon is epsilon/2, here {epsilon / 2:g})"


def _thinned(
    d: Tensor | Sequence[Tensor],
    u: Tensor | Sequence[Tensor],
    chances: Chances,
    factors: list[float],
    mask: Tensor | Iterable[Tensor] | None,
    *,
    share: bool,
    row: str,
) -> Iterator[Tensor]:
    """Each change with zeros where it is dropped, rescaled."""
    if mask is not None and not share:
        yield from (x.mul_(factor) for x, factor in zip(kept(d, mask), factors, strict=True))
        return
    for d_k, u_k, between, factor in zip(d, u, chances, factors, strict=True):
        chance = _chance(d_k, between, row)
        x = torch.lt(u_k, chance, out=torch.empty_like(d_k)).mul_(d_k)
        yield x.div_(chance) if share else x.mul_(factor)


def _chance(d: Tensor, between: tuple[float, float], row: str) -> Tensor:
    """Chance of each entry to be kept, linear in its rank of magnitude; among equal ones the later has the higher."""
    (low, high), shape = between, d.shape
    d = d if d.ndim > 1 else d.reshape(1, -1)
    rows = d.flatten(1) if row == "first" else d.flatten(0, -2)
    n = rows.shape[1]
    if n < 2 or low == high:
        return torch.full_like(d, (low + high) / 2).reshape(shape)
    line = torch.linspace(low, high, n, dtype=torch.float64, device=d.device).to(d.dtype)
    return torch.empty_like(rows).scatter_(1, _order(rows), line.expand_as(rows)).reshape(shape)


def _order(rows: Tensor) -> Tensor:
    """Columns of each row from the smallest magnitude to the largest, equal ones in their order.

    Bits of float32 numbers that are not negative order as the numbers do. With the column in place of their lowest
    bits no two are equal, and the fastest sort there is will do. Those bits are 0 in nearly every difference of two
    bfloat16 numbers; a row where they mattered is sorted again.
    """
    size, n = rows.abs(), rows.shape[1]
    if rows.dtype != torch.float32 or rows.device.type != "cpu":
        return torch.sort(size, dim=1, stable=True).indices
    bits, width = size.view(torch.int32), (n - 1).bit_length()
    low = (1 << width) - 1
    some = bits[:: 1 + len(bits) // 8]  # enough to see what kind of numbers they are
    if width > 13 or int(torch.count_nonzero(some & low)) > some.numel() // 50:
        return _order_of_long_keys(bits)
    keys = torch.bitwise_and(bits, ~low).bitwise_or_(torch.arange(n, dtype=torch.int32))
    keys.numpy().sort(axis=1)
    order = keys.bitwise_and_(low).long()
    placed = bits.gather(1, order).numpy()
    wrong = placed[:, 1:] < placed[:, :-1]
    if wrong.any():
        again = torch.from_numpy(wrong.any(axis=1))
        order[again] = _order_of_long_keys(bits[again])
    return order


def _order_of_long_keys(bits: Tensor) -> Tensor:
    """The same with the column below all bits."""
    keys = bits.long().mul_(1 << 32).add_(torch.arange(bits.shape[1]))
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_((1 << 32) - 1)
