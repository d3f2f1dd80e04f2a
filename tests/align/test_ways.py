"""Zeros are multiplied where steps of 16 channels say so, counted one by one, and nowhere else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.align.cost import Sides
from merganser.align.ways import SMALL, Way, way


def steps(rows: int, columns: int) -> int:
    """Pieces of at most 16 x 16 that a product is cut into."""
    return len(list(itertools.product(range(0, rows, 16), range(0, columns, 16))))


SIDES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)).filter(any)


@given(rows=SIDES, columns=SIDES, taps=st.integers(1, 49))
def test_a_small_weight_is_dense_where_that_takes_hardly_more_steps(rows: Sides, columns: Sides, taps: int) -> None:
    (a, m, b), (first, both, second) = rows, columns
    dense = steps(a + m + b, first + both + second)
    blocks = steps(a, first + both) + steps(m, first + both + second) + steps(b, both + second)
    small = sum(rows) * sum(columns) * taps <= SMALL
    assert way(rows, columns, taps=taps) is (Way.DENSE if small and dense <= 1.1 * blocks else Way.BLOCKS)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((16, 0, 16), (16, 0, 16), Way.GROUPS),
        ((64, 0, 64), (16, 0, 16), Way.GROUPS),
        ((24, 0, 24), (8, 0, 8), Way.GROUPS),
        ((12, 0, 12), (12, 0, 12), Way.BLOCKS),
        ((16, 0, 32), (16, 0, 16), Way.BLOCKS),
        ((12, 4, 12), (12, 4, 12), Way.DENSE),
        ((16, 16, 16), (16, 16, 16), Way.BLOCKS),
    ],
)
def test_the_ways_of_some_convolutions(rows: Sides, columns: Sides, expected: Way) -> None:
    assert way(rows, columns, taps=9, groups=True) is expected
    assert way(rows, columns, taps=9) is not Way.GROUPS


def test_a_large_weight_is_not_put_together_at_each_run() -> None:
    few = (1, 300, 1)
    assert way(few, few) is Way.DENSE
    assert way(few, few, taps=9) is Way.BLOCKS
