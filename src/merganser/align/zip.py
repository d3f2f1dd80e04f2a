"""Which units of several networks become one unit: greedy agglomeration within and across networks.

    S: similarity of all N n units of N networks;  until n clusters are left:
        join the most alike pair i < j;   for all others k
            S_ik <- min(S_ik, S_jk)             where i, j and k together hold one unit of a network at most,
            S_ik <- discount(min(S_ik, S_jk))   elsewhere

Complete linkage: a cluster is as like another as its least like members are. A discount below 1 makes second and third
joins less attractive than first ones; it acts on 1 + S, so that unlike pairs do not gain by it.

    discount(s) = repeat (1 + s) - 1

The first unit of a third network is no repeat: without that exception, units of three equal networks would be left
over in pairs of two. Of two networks, three units are always two of one, and every join is discounted.

A join is within a network if either side holds units of it. Each network may spend at most `within` of its share of
joins, (N n - n) / N, on these; with none, every cluster takes one unit of each network. From three networks on, greedy
joins under such a limit could end with more than n clusters of which no two may join. So where n clusters hold units of
several networks, no further one is begun: then every other cluster fits one of them, since n of them and itself would
hold n + 1 units of its network. Which network comes first decides between equally good pairs, and nothing else.

Source: Stoica et al. 2023, arXiv:2305.03053, algorithm 2 (ZipIt). There the discount multiplies s itself, which raises
negative similarities, and acts on every join; the budget is looked at only after the first join within a network; and a
cluster of several networks counts as the one's that its first unit is of.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merganser.errors import ParameterError


def zip_units(similarity: Tensor, networks: int, *, repeat: float = 0.5, within: float = 1.0) -> Tensor:
    """Join units until as many clusters as one network has units are left.

    Args:
        similarity: symmetric, of all units of all networks in turn, shape (networks * n, networks * n), in [-1, 1].
        networks: how many.
        repeat: discount of second joins, in (0, 1]; 1 is plain complete linkage, near 0 every cluster is a pair first.
        within: share of a network's joins that may be between its own units, in [0, 1].

    Returns:
        The cluster of every unit, 0 to n - 1, numbered by their first units; shape (networks * n,).

    Raises:
        ParameterError: If a setting is out of range, or the similarity is not square or of no such size.
    """
    total = similarity.shape[0]
    if similarity.ndim != 2 or similarity.shape[1] != total or networks < 1 or total % networks:
        raise ParameterError(f"similarity is {tuple(similarity.shape)}; it must be square, a multiple of {networks}")
    if not 0 < repeat <= 1:
        raise ParameterError(f"repeat is {repeat}; it is a discount in (0, 1]")
    if not 0 <= within <= 1:
        raise ParameterError(f"within is {within}; it is a share of the joins, in [0, 1]")
    n = total // networks
    s = similarity.double().cpu().numpy().copy()
    np.fill_diagonal(s, -np.inf)
    held = np.repeat(np.eye(networks, dtype=np.int64), n, axis=0)  # units of every network in every cluster
    budget = np.full(networks, int((total - n) // networks * within))
    for k in np.flatnonzero(budget == 0):
        _forbid(s, held[:, k] > 0)
    mixed = _Mixed(np.repeat(np.arange(networks), n), n if within < 1 else total)
    cluster = np.arange(total)  # union-find, flat: the first unit of every unit's cluster
    best = s.argmax(1)
    values = s[np.arange(total), best]
    for _ in range(total - n):
        i = int(values.argmax())
        assert values[i] > -np.inf, "no pair is left to join"
        i, j = sorted((i, int(best[i])))
        cluster[cluster == j] = i
        within_both = np.flatnonzero((held[i] > 0) & (held[j] > 0))
        held[i] += held[j]
        held[j] = 0
        least = np.minimum(s[i], s[j])
        joined = np.where((held + held[i] > 1).any(1), repeat * (1 + least) - 1, least)
        joined[np.isneginf(s[i]) | np.isneginf(s[j])] = -np.inf
        s[i], s[:, i] = joined, joined
        s[j], s[:, j] = -np.inf, -np.inf
        stale = (best == i) | (best == j)
        for k in within_both:
            budget[k] -= 1
            if budget[k] == 0:
                mine = held[:, k] > 0
                _forbid(s, mine)
                stale |= mine
        stale |= mixed.note(i, j)
        _refresh(s, best, values, stale, i, j, mixed)
    return torch.from_numpy(np.unique(cluster, return_inverse=True)[1].reshape(-1).astype(np.int64))


class _Mixed:
    """Clusters of units of several networks: whether another may be begun."""

    def __init__(self, owner: npt.NDArray[np.intp], most: int) -> None:
        self.owner, self.most = owner, most
        self.pure = np.ones(len(owner), dtype=bool)
        self.begun = 0

    @property
    def full(self) -> bool:
        """Whether as many are there as may be."""
        return self.begun == self.most

    def note(self, i: int, j: int) -> npt.NDArray[np.bool_]:
        """Note that j was joined to i; rows that this changes."""
        before = self.full
        same = self.pure[i] and self.pure[j] and self.owner[i] == self.owner[j]
        self.begun += 0 if same else int(self.pure[i]) + int(self.pure[j]) - 1
        self.pure[i], self.pure[j] = same, False
        return self.pure.copy() if before != self.full else np.zeros(len(self.pure), dtype=bool)

    def seen(self, s: npt.NDArray[np.float64], rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """Rows of the similarities, without pairs that would begin one too many."""
        if not self.full:
            return s[rows]
        begins = self.pure[rows][:, None] & self.pure & (self.owner[rows][:, None] != self.owner)
        return np.where(begins, -np.inf, s[rows])


def _forbid(s: npt.NDArray[np.float64], mine: npt.NDArray[np.bool_]) -> None:
    s[np.ix_(mine, mine)] = -np.inf


def _refresh(
    s: npt.NDArray[np.float64],
    best: npt.NDArray[np.intp],
    values: npt.NDArray[np.float64],
    stale: npt.NDArray[np.bool_],
    i: int,
    j: int,
    mixed: _Mixed,
) -> None:
    """Best partners anew where they may have changed; the first of equally good ones, as a whole search would find."""
    stale[[i, j]] = True
    rows = np.flatnonzero(stale)
    now = mixed.seen(s, rows)
    best[rows] = now.argmax(1)
    values[rows] = now[np.arange(len(rows)), best[rows]]
    column = mixed.seen(s, np.array([i]))[0]
    better = ~stale & ((column > values) | ((column == values) & (i < best)))
    best[better], values[better] = i, column[better]
