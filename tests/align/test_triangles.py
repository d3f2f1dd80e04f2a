"""Symmetric matrices in place are what they are by torch's own products and factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.align.triangles import add_products, cholesky, mirrored, taken


def rows(count: int, entries: int, seed: int = 0) -> Tensor:
    return torch.randn(count, entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=3), entries=st.integers(1, 12), block=st.integers(1, 13))
def test_sums_of_products_of_parts_are_those_of_the_whole(sizes: list[int], entries: int, block: int) -> None:
    x = rows(sum(sizes), entries)
    gram = torch.zeros(entries, entries, dtype=torch.float64)
    where = gram.data_ptr()
    for part in x.split(sizes):
        add_products(gram, part)
    found = mirrored(gram, block)
    assert found.data_ptr() == where
    torch.testing.assert_close(found, x.T @ x, rtol=1e-13, atol=1e-13)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("entries", [0, 1, 40])
def test_a_factor_lies_where_the_matrix_lay(entries: int) -> None:
    x = rows(60, entries)
    gram = x.T @ x
    before, where = gram.clone(), gram.data_ptr()
    factor = cholesky(gram)
    assert factor is not None
    assert factor.data_ptr() == where
    torch.testing.assert_close(factor, torch.linalg.cholesky(before), rtol=1e-12, atol=1e-12)
    assert torch.equal(factor, factor.tril())


def test_a_matrix_with_a_negative_direction_has_no_factor() -> None:
    assert cholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)) is None


@pytest.mark.parametrize("places", [[6, 1, 3], [0, 1, 2, 3, 4, 5, 6], [4], []])
def test_rows_and_columns_of_places_are_taken_in_their_order(places: list[int]) -> None:
    gram = torch.arange(49.0, dtype=torch.float64).reshape(7, 7)
    found = taken(gram, torch.tensor(places, dtype=torch.int64), 2)
    assert found.tolist() == [[7.0 * i + j for j in places] for i in places]
