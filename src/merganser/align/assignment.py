"""Linear assignment: which unit of one network stands for which of another, all in all most alike.

    maximise sum_i c_i,p(i) over permutations p

A number that is added to a whole row or column is in every such sum, so that it does not change which p is best; but
how far the shortest augmenting paths have to be looked for does change. Rows and columns are therefore first brought
near to where the best entries of all are equally good, by Sinkhorn's scaling of exp(sharpness c / unit), sharper from
stage to stage, where the unit is the mean distance from the mean. That is only where the search begins: the search
itself is exact, in float64.

Source: Sharify et al. 2013, arXiv:1104.3830 (scaling before the search); Crouse 2016, doi 10.1109/TAES.2016.140952
(the search, as in scipy).
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Units from which scaling takes less time than it saves.
SCALED_FROM = 128
#: Sharpness of a stage, and how often its columns and rows are scaled.
STAGES = ((5, 3), (20, 5), (80, 10))
#: What a sum is taken to be at least: entries that are far from the best one underflow.
LEAST_SUM = 1e-30


def assign(similarity: Tensor) -> Tensor:
    """The one-to-one assignment of rows to columns with the largest sum: the column of every row.

    Args:
        similarity: shape (n, n), finite.

    >>> assign(torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    cost = -similarity.detach().cpu().double().numpy()
    if len(cost) >= SCALED_FROM and np.isfinite(cost).all():
        best = cost.argmin(1)
        if np.bincount(best, minlength=len(cost)).max() == 1:  # no two rows want the same column
            return torch.from_numpy(best)
        cost = _shifted(cost)
    _, columns = linear_sum_assignment(cost)
    return torch.from_numpy(columns).to(torch.int64)


def _shifted(cost: Any) -> Any:
    """Costs with something added to every row and column: at least 0, and near 0 where a good assignment is.

    Sums are numpy's own, which are the same whatever the number of threads.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        unit = float(np.abs(cost - cost.mean()).mean())
    if not 0 < unit < inf:
        return cost
    shift = np.zeros(len(cost))
    for sharpness, times in STAGES:
        shifted = cost + shift
        shifted -= shifted.min(1, keepdims=True)
        near = np.exp((shifted * (-sharpness / unit)).astype(np.float32))
        columns = np.ones(len(cost), np.float32)
        for _ in range(times):
            rows = 1 / np.maximum(np.einsum("ij,j->i", near, columns), LEAST_SUM)
            columns = 1 / np.maximum(np.einsum("i,ij->j", rows, near), LEAST_SUM)
        shift -= np.log(columns.astype(np.float64)) * (unit / sharpness)
    shifted = cost + shift
    shifted -= shifted.min(1, keepdims=True)
    return shifted
