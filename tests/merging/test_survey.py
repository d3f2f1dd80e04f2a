"""Ranks, inner products and norms are exact, and the same in any chunks."""

from __future__ import annotations

from itertools import pairwise
from math import fsum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.merging.ranking import ranked
from merganser.merging.survey import cell_rows, chunk_rows, inner_products, sums
from merganser.noise import uniform

FEW = st.sampled_from([0.0, -0.0, 1e-40, 0.5, 0.5000001, 1.0, 3.0, 1e30])
SCORES = st.lists(FEW | st.floats(0, 100, width=32), min_size=1, max_size=60)


def expected_ranks(scores: list[float], start: int, stop: int) -> list[bool]:
    """Plain sorting; among equals the first in order rank higher."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen = set(order[start:stop])
    return [i in chosen for i in range(len(scores))]


@given(data=st.data(), scores=SCORES, dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_ranks_are_those_of_a_plain_sort_in_any_chunks(
    data: st.DataObject, scores: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor(scores, dtype=dtype)
    start = data.draw(st.integers(0, len(scores) - 1))
    stop = data.draw(st.integers(start + 1, len(scores)))
    cut = data.draw(st.integers(1, len(scores)))
    parts = x.split(cut)
    chosen = data.draw(st.lists(st.sampled_from(scores), max_size=12) | st.none())
    sample = None if chosen is None else [torch.tensor(chosen, dtype=dtype)]
    (found,) = ranked(lambda: ([p] for p in parts), [(start, stop)], len(scores), sample)
    assert found is not None
    kept = torch.cat([found.mask(p) for p in parts]).bool().tolist()
    assert kept == expected_ranks(x.tolist(), start, stop)


@pytest.mark.parametrize("kind", ["none", "good", "misleading", "of one score"])
def test_ranks_of_several_tensors_are_found_together(kind: str) -> None:
    a, b, c = (torch.rand(1000, generator=torch.Generator().manual_seed(i)) for i in range(3))
    samples = {"good": [x[::3] for x in (a, b, c)], "misleading": [x[:200] / 9 for x in (a, b, c)]}
    samples["of one score"] = [torch.full((50,), 0.5)] * 3
    sample = samples.get(kind)
    found = ranked(lambda: [[a, b, c]], [(0, 10), None, (500, 900)], 1000, sample)
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    assert found[0].mask(a).bool().tolist() == expected_ranks(a.tolist(), 0, 10)
    assert found[2].mask(c).bool().tolist() == expected_ranks(c.tolist(), 500, 900)


def test_ranks_among_many_equals_are_those_of_a_plain_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    for values in ([1.0], [0.0, 1.0], [0.25, 0.5, 0.5, 0.5, 2.0]):
        x = torch.tensor(values)[torch.randint(len(values), (70_000,), generator=generator)]
        for start, stop in ((0, 7), (0, 35_000), (100, 69_000), (10_000, 10_001)):
            (found,) = ranked(lambda x=x: ([p] for p in x.split(9_999)), [(start, stop)], x.numel(), [x[::50]])
            assert found is not None
            kept = torch.cat([found.mask(p) for p in x.split(9_999)]).bool().tolist()
            assert kept == expected_ranks(x.tolist(), start, stop)


def cells(x: Tensor, elements: int) -> list[list[Tensor]]:
    return [[k[a:b] for k in x] for a, b in chunk_rows(x.shape[1:], elements)]


def test_inner_products_are_those_of_a_float64_loop_and_the_same_bits_in_any_chunks() -> None:
    x = torch.randn(3, 700, 300, generator=torch.Generator().manual_seed(0))
    shape = x.shape[1:]
    assert len(list(chunk_rows(shape, 1))) > 2
    found = [inner_products(cells(x, n), cell_rows(shape)) for n in (1, 140_000, 10_000_000)]
    flat = x.reshape(3, -1).double().tolist()
    for i in range(3):
        for j in range(3):
            exact = fsum(p * q for p, q in zip(flat[i], flat[j], strict=True))
            assert found[0][i, j].item() == pytest.approx(exact, rel=1e-12, abs=1e-9)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[0].T)


def test_sums_are_those_of_a_float64_loop_and_the_same_bits_in_any_chunks() -> None:
    x = torch.randn(2, 700, 300, generator=torch.Generator().manual_seed(1))
    found = [
        sums(cells(x, n), cell_rows(x.shape[1:]), lambda part: float(part.double().abs().sum()))
        for n in (1, 140_000, 10_000_000)
    ]
    for k in range(2):
        assert found[0][k] == pytest.approx(fsum(map(abs, x[k].reshape(-1).tolist())), rel=1e-12)
    assert found[0] == found[1] == found[2]


@given(rows=st.integers(0, 400), columns=st.integers(0, 5000), elements=st.integers(1, 1 << 20))
def test_chunks_tile_the_rows_by_whole_cells(rows: int, columns: int, elements: int) -> None:
    parts = list(chunk_rows((rows, columns), elements))
    assert parts[0][0] == 0
    assert parts[-1][1] == rows
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(start % cell_rows((rows, columns)) == 0 for start, _ in parts)


@given(st.integers(0, 200_000), st.integers(0, 200_000))
@settings(max_examples=30, deadline=None)
def test_noise_of_a_place_is_the_same_whatever_else_is_drawn(a: int, b: int) -> None:
    low, high = sorted((a, b))
    whole = uniform(7, "model", "tensor", 0, 200_000)
    assert torch.equal(uniform(7, "model", "tensor", low, high), whole[low:high])


def test_noise_is_uniform_and_independent_between_keys() -> None:
    n = 1 << 18
    u = uniform(0, "a", "w", 0, n)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / n) ** 0.5)
    counts = torch.histc(u, 64, 0, 1)
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert 20 < chi_square < 130  # 63 degrees of freedom
    for key in ((1, "a", "w"), (0, "b", "w"), (0, "a", "v")):
        other = uniform(*key, 0, n)
        assert abs(float(torch.corrcoef(torch.stack([u, other]))[0, 1])) < 5 / n**0.5
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 5 / n**0.5
