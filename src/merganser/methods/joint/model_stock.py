"""Model Stock: the mean of the models, drawn towards the base as far as their changes disagree.

    D = t mean(d)      t = K c / (1 + (K - 1) c)      c = mean of cos(d_i, d_j) over all pairs i < j

The angles are those of whole tensors or of rows. Changes that disagree on average (c <= 0) give the base: t would be
negative and without bound, down to a pole at c = -1 / (K - 1), where the changes cancel.

Source: Jang et al. 2024, arXiv:2403.19522; t = 0 for c <= 0 is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._sphere import square_of, sums_of_products
from merganser.methods.joint._sum import weighted_sum

if TYPE_CHECKING:
    from jaxtyping import Float


def model_stock(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    dots: Float[Tensor, "K K"],
    filter_wise: bool = False,
    negative: bool = False,
) -> Float[Tensor, "*S"]:
    """Mean change times a ratio from the angles between the changes.

    Args:
        d: the models minus the base, two at least.
        dots: inner products of the whole changes.
        filter_wise: whether every row of axis 0 has its own ratio; a tensor of one axis is one row.
        negative: whether a ratio may be below 0, as the equation has it, where 1 + (K - 1) c is above 1e-6.

    Returns:
        The merged change. A zero change has cosine 0 with all others.

    Raises:
        ParameterError: If there are fewer than two models.

    >>> d = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    >>> model_stock(d, dots=d.double() @ d.double().T)
    tensor([1.2426, 0.4142])
    """
    models = len(d)
    if models < 2:
        raise ParameterError(f"model_stock needs the angles between two models at least; there are {models}")
    if not filter_wise or d[0].ndim < 2:
        t = _ratio(_mean_cosine(square_of(dots, models)), models, negative)
        return weighted_sum(d, [t / models] * models)
    total = torch.zeros_like(d[0])
    units = torch.zeros_like(d[0].flatten(1), dtype=torch.float64)
    lengths = units.new_zeros(units.shape[0])
    for d_k in d:
        total.add_(d_k)
        rows = d_k.flatten(1)
        square = sums_of_products(rows, rows, -1)
        inverse = torch.where(square > 0, 1 / square.sqrt(), 0)
        units.add_(rows * inverse[:, None])
        lengths.add_(square > 0)
    # ||sum_i u_i||^2 holds every pair twice and every u_i once
    cosine = (sums_of_products(units, units, -1) - lengths) / (models * (models - 1))
    ratios = [_ratio(c, models, negative) / models for c in cosine.tolist()]
    t_rows = torch.tensor(ratios, dtype=torch.float64).to(total.device, total.dtype)
    return total.mul_(t_rows.reshape(-1, *[1] * (total.ndim - 1)))


def model_stock_locality(settings: Mapping[str, Any]) -> Literal["element", "row"]:
    """What the function may be given under these settings.

    Args:
        settings: of `model_stock`; what is missing has its default.

    Returns:
        "row" where every row has its own ratio, else "element".

    >>> model_stock_locality({"filter_wise": True})
    'row'
    """
    return "row" if settings.get("filter_wise", False) else "element"


def _mean_cosine(dots: Sequence[Sequence[float]]) -> float:
    norms = [sqrt(max(row[i], 0)) for i, row in enumerate(dots)]
    pairs = [(i, j) for i in range(len(dots)) for j in range(i)]
    return sum(dots[i][j] / norms[i] / norms[j] for i, j in pairs if norms[i] > 0 and norms[j] > 0) / len(pairs)


def _ratio(cosine: float, models: int, negative: bool) -> float:
    below = 1 + (models - 1) * cosine
    if below <= 1e-6 or (cosine <= 0 and not negative):
        return 0.0
    return models * cosine / below
