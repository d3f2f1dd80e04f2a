"""SCE: select the entries on which the models differ most, calculate a weight of each model, erase minority signs.

    x_k = d_k on the round(select_topk n) entries of largest variance over the models, else 0
    e_k = sum of x_k**2 over the tensor        w_k = e_k / sum_j e_j        v = sum_k x_k
    D   = sum_k a_k w_k x_k / sum_k a_k w_k    a_k = 1 where x_k v > 0, else 0

n counts all entries, or with among "differing" those in which the models differ, as in mergekit. The variance
divides by the number of models. Weights are those of a tensor.

Source: Wan et al. 2024, arXiv:2408.07990 (FuseChat), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods.joint._elect import elected
from merganser.methods.joint._keep import entries, kept, shares_of
from merganser.numerics import per_model

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def sce_score(d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]]) -> Float[Tensor, " 1 *S"]:
    """Variance over the models, of every entry.

    Args:
        d: each model minus the base.

    >>> sce_score(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    tensor([[1., 0.]])
    """
    mean = torch.zeros_like(d[0])
    for d_k in d:
        mean.add_(d_k)
    mean.div_(len(d))
    score, part = torch.zeros_like(mean), torch.empty_like(mean)
    for d_k in d:
        torch.sub(d_k, mean, out=part)
        score.addcmul_(part, part)
    return score.div_(len(d)).unsqueeze(0)


def sce_ranks(n: int, settings: Mapping[str, Any]) -> tuple[int, int]:
    """The ranks that are kept: the first round(select_topk n), at least one.

    Args:
        n: entries that count.
        settings: select_topk, and how to count.

    Raises:
        ParameterError: If a setting is out of range.

    >>> sce_ranks(10, {"select_topk": 0.2, "count": "round"})
    (0, 2)
    """
    (share,) = shares_of("select_topk", settings["select_topk"], 1)
    return 0, min(n, max(1, entries(share, n, settings["count"])))


def sce(
    d: Float[Tensor, " K *S"] | Sequence[Float[Tensor, "*S"]],
    *,
    keep: Bool[Tensor, " 1 *S"] | Sequence[Bool[Tensor, "*S"]],
    energy: Float[Tensor, " K"] | Sequence[float],
    select_topk: float = 1.0,
    count: str = "round",
    among: str = "all",
    cancelled: str = "none",
) -> Float[Tensor, "*S"]:
    """Mean of the selected changes that agree in sign, weighted by energy.

    Args:
        d: each model minus the base.
        keep: the entries of largest variance, as `sce_ranks` counts them.
        energy: sum of squares of the kept entries of each whole change.
        select_topk: share of the entries that is selected, in (0, 1].
        count: "round" selects the nearest whole number of entries, "floor" the one below; at least one.
        among: whether "all" entries of a tensor count, or those in which the models are "differing".
        cancelled: sign where the votes add up to 0: "none", so that the entry is 0, or "plus".

    Returns:
        The merged change, to be added to the base.

    Raises:
        ParameterError: If a setting is out of range.

    >>> d = torch.tensor([[3.0, 1.0], [1.0, -1.0]])
    >>> sce(d, keep=torch.ones(1, 2, dtype=torch.bool), energy=[10.0, 2.0])
    tensor([2.6667, 0.0000])
    """
    shares_of("select_topk", select_topk, 1)
    entries(1.0, 1, count)
    if among not in ("all", "differing"):
        raise ParameterError(f"among is {among!r}; it is 'all' or 'differing'")
    energies = per_model(energy.tolist() if isinstance(energy, Tensor) else energy, len(d))
    largest = max(energies)
    if not largest > 0:
        return torch.zeros_like(d[0])
    weights = [e / largest for e in energies]
    return elected(kept(d, repeat(keep[0])), weights, cancelled=cancelled, weighted_vote=False)
