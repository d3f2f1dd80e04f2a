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


def plain(
    similarity: Tensor, networks: int, repeat: float, within: float, *, published: bool = False
) -> list[set[int]]:
    """As the words say it: look at all pairs, join the best, again.

    Where joins within networks are limited, n clusters of units of several networks are begun and no more. `published`:
    every join is discounted, and a cluster is its first unit's network's.
    """
    total = len(similarity)
    n = total // networks
    clusters: dict[int, set[int]] = {i: {i} for i in range(total)}
    s = {frozenset(p): float(similarity[p]) for p in itertools.combinations(range(total), 2)}
    budget = [int((total - n) // networks * within)] * networks

    def close(k: int) -> None:
        for i, j in itertools.combinations(clusters, 2):
            if k in common(i, j):
                s[frozenset((i, j))] = -inf

    def of(i: int) -> set[int]:
        return {unit // n for unit in clusters[i]}

    def common(i: int, j: int) -> set[int]:
        return {i // n} & {j // n} if published else of(i) & of(j)

    def likeness(pair: tuple[int, int]) -> float:
        begins = len(of(pair[0])) == len(of(pair[1])) == 1 and of(pair[0]) != of(pair[1])
        return -inf if begins and full else s[frozenset(pair)]

    for k in range(networks):
        if not budget[k]:
            close(k)
    while len(clusters) > n:
        full = within < 1 and sum(len(of(i)) > 1 for i in clusters) == n
        i, j = max(itertools.combinations(sorted(clusters), 2), key=likeness)
        assert s[frozenset((i, j))] > -inf
        charged = common(i, j)
        clusters[i] |= clusters.pop(j)
        for k in clusters:
            if k != i:
                least = min(s[frozenset((i, k))], s[frozenset((j, k))])
                repeats = published or len(clusters[i] | clusters[k]) > len(of(i) | of(k))
                s[frozenset((i, k))] = repeat * (1 + least) - 1 if repeats else least
        for k in charged:
            budget[k] -= 1
            if not budget[k]:
                close(k)
    return [clusters[i] for i in sorted(clusters)]


@settings(deadline=None, max_examples=100)
@given(
    st.integers(2, 4),
    st.integers(1, 7),
    st.floats(0.05, 1),
    st.one_of(st.just(0.0), st.floats(0, 1)),
    st.integers(0, 1000),
)
def test_the_fast_way_joins_what_the_plain_way_joins(
    n: int, size: int, repeat: float, within: float, seed: int
) -> None:
    similarity = draw(n * size, seed) if n * size > 1 else torch.ones(1, 1)
    expected = plain(similarity, n, repeat, within)
    labels = zip_units(similarity, n, repeat=repeat, within=within)
    found = [set(torch.nonzero(labels == c).flatten().tolist()) for c in range(size)]
    assert found == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(7, 9), st.floats(0.05, 0.5), st.integers(0, 1000))
def test_two_networks_are_zipped_as_published_where_no_budget_is_spent(size: int, repeat: float, seed: int) -> None:
    similarity = draw(2 * size, seed)
    for within in (0.0, 1.0):
        labels = zip_units(similarity, 2, repeat=repeat, within=within)
        found = [set(torch.nonzero(labels == c).flatten().tolist()) for c in range(size)]
        assert found == plain(similarity, 2, repeat, within, published=True)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 4), st.integers(1, 7), st.floats(0.05, 1), st.floats(0, 1), st.integers(0, 1000))
def test_clusters_do_not_depend_on_the_order_of_networks(
    n: int, size: int, repeat: float, within: float, seed: int
) -> None:
    similarity = draw(n * size, seed) if n * size > 1 else torch.ones(1, 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    units = torch.arange(n * size).reshape(n, size)[order].flatten()
    one = zip_units(similarity, n, repeat=repeat, within=within)[units]
    two = zip_units(similarity[units][:, units], n, repeat=repeat, within=within)
    assert torch.equal(one[:, None] == one, two[:, None] == two)


@pytest.mark.parametrize("repeat", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("networks", [2, 3, 4, 5])
def test_equal_networks_are_zipped_unit_by_unit(networks: int, repeat: float) -> None:
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orders = [torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(networks)]
    labels = zip_units(torch.corrcoef(torch.cat([x[o] for o in orders])), networks, repeat=repeat)
    labels = labels.reshape(networks, 7)
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("networks", [2, 3, 4, 5])
def test_no_join_within_a_network_where_none_is_allowed(networks: int, seed: int) -> None:
    """Every cluster has one unit of every network, also of three or more."""
    labels = zip_units(draw(10 * networks, seed), networks, within=0).reshape(networks, 10)
    assert all(sorted(mine.tolist()) == list(range(10)) for mine in labels)


def test_several_permuted_networks_are_paired_unit_by_unit_across_networks_alone() -> None:
    """Three networks of the same units in other orders: each cluster is one unit in all of them."""
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orders = [torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    noise = 0.1 * torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    units = torch.cat([(x + e)[order] for e, order in zip(noise, orders, strict=True)])
    labels = zip_units(torch.corrcoef(units), 3, within=0).reshape(3, 12)
    for mine, order in zip(labels, orders, strict=True):
        assert torch.equal(mine[order.argsort()], labels[0][orders[0].argsort()])


@pytest.mark.parametrize(
    "change", [{"repeat": 0.0}, {"repeat": 1.5}, {"within": -0.1}, {"within": 1.1}, {"networks": 3}]
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        zip_units(draw(8, 0), **{"networks": 2, **change})  # type: ignore[arg-type]
