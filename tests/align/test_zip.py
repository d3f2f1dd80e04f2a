"""Zipping: the fast agglomeration against the plain one, and what its settings mean."""

from __future__ import annotations

import itertools
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.align.match import assign
from merganser.align.zip import zip_units
from merganser.errors import ParameterError


def draw(total: int, seed: int) -> Tensor:
    x = torch.randn(total, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.corrcoef(x)


def plain(similarity: Tensor, networks: int, repeat: float, within: float) -> list[set[int]] | None:
    """As the words say it: look at all pairs, join the best, again. None where no pair is left."""
    total = len(similarity)
    n = total // networks
    clusters: dict[int, set[int]] = {i: {i} for i in range(total)}
    s = {frozenset(p): float(similarity[p]) for p in itertools.combinations(range(total), 2)}
    budget = [int((total - n) // networks * within)] * networks

    def close(k: int) -> None:
        for i, j in itertools.combinations(clusters, 2):
            if i // n == j // n == k:
                s[frozenset((i, j))] = -inf

    for k in range(networks):
        if not budget[k]:
            close(k)
    while len(clusters) > n:
        i, j = max(itertools.combinations(sorted(clusters), 2), key=lambda p: s[frozenset(p)])
        if s[frozenset((i, j))] == -inf:
            return None
        clusters[i] |= clusters.pop(j)
        for k in clusters:
            if k != i:
                least = min(s[frozenset((i, k))], s[frozenset((j, k))])
                s[frozenset((i, k))] = repeat * (1 + least) - 1
        if i // n == j // n:
            budget[i // n] -= 1
            if not budget[i // n]:
                close(i // n)
    return [clusters[i] for i in sorted(clusters)]


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 3), st.integers(1, 8), st.floats(0.05, 1), st.floats(0, 1), st.integers(0, 1000))
def test_the_fast_way_joins_what_the_plain_way_joins(
    n: int, size: int, repeat: float, within: float, seed: int
) -> None:
    similarity = draw(n * size, seed) if n * size > 1 else torch.ones(1, 1)
    expected = plain(similarity, n, repeat, within)
    if expected is None:
        with pytest.raises(ParameterError, match="no pair is left"):
            zip_units(similarity, n, repeat=repeat, within=within)
        return
    labels = zip_units(similarity, n, repeat=repeat, within=within)
    found = [set(torch.nonzero(labels == c).flatten().tolist()) for c in range(size)]
    assert found == expected


@pytest.mark.parametrize("networks", [2, 3])
def test_equal_networks_are_zipped_unit_by_unit(networks: int) -> None:
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orders = [torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(networks)]
    labels = zip_units(torch.corrcoef(torch.cat([x[o] for o in orders])), networks, repeat=1.0).reshape(networks, 7)
    for mine, order in zip(labels, orders, strict=True):
        assert torch.equal(mine[order.argsort()], labels[0][orders[0].argsort()])


def test_pairs_across_networks_alone_are_an_assignment() -> None:
    """Where one pairing is best by far, greedy joins across networks and the best assignment are the same."""
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    noise = 0.1 * torch.randn(9, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    similarity = torch.corrcoef(torch.cat([x, (x + noise)[order]]))
    labels = zip_units(similarity, 2, within=0, repeat=1e-4)
    column = assign(similarity[:9, 9:])
    assert torch.equal(labels[9:][column], labels[:9])


def test_no_join_within_a_network_where_none_is_allowed() -> None:
    labels = zip_units(draw(20, 3), 2, within=0).reshape(2, 10)
    assert all(sorted(mine.tolist()) == list(range(10)) for mine in labels)


@pytest.mark.parametrize(
    "change", [{"repeat": 0.0}, {"repeat": 1.5}, {"within": -0.1}, {"within": 1.1}, {"networks": 3}]
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        zip_units(draw(8, 0), **{"networks": 2, **change})  # type: ignore[arg-type]
