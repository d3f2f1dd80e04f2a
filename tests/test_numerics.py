"""Shared arithmetic: packing, sums of squares, the rounding threshold, raw bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.numerics import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    all_finite,
    compute_dtype,
    live_factors,
    pack_symmetric,
    raw_bytes,
    singular_tolerance,
    sum_of_squares,
    unpack_symmetric,
)
from merganser.types import ITEM_BYTES


def symmetric(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x + x.T


@pytest.mark.parametrize("n", range(10))
def test_a_symmetric_matrix_packs_into_h_by_2h_plus_1_and_comes_back_bit_for_bit(n: int) -> None:
    g = symmetric(n, n)
    packed = pack_symmetric(g)
    h = math.ceil(n / 2)
    assert packed.shape == (h, 2 * h + 1)
    assert torch.equal(unpack_symmetric(packed, n), g)


@given(n=st.integers(0, 40), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_packing_loses_no_bit_at_any_order(n: int, seed: int, dtype: torch.dtype) -> None:
    g = symmetric(n, seed, dtype)
    back = unpack_symmetric(pack_symmetric(g), n)
    assert back.dtype == dtype
    assert torch.equal(back, g)
    assert torch.equal(back, back.T)


@pytest.mark.parametrize("n", range(2, 10, 2))
def test_an_even_order_packs_without_a_number_of_waste(n: int) -> None:
    assert pack_symmetric(symmetric(n, 0)).numel() == n * (n + 1) // 2


@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
def test_any_matrix_of_the_packed_shape_unpacks_to_a_symmetric_one(n: int, seed: int) -> None:
    h = math.ceil(n / 2)
    packed = torch.randn(h, 2 * h + 1, generator=torch.Generator().manual_seed(seed))
    g = unpack_symmetric(packed, n)
    assert g.shape == (n, n)
    assert torch.equal(g, g.T)


@given(seed=st.integers(0, 100), n=st.integers(0, 9))
def test_packing_is_linear_so_packed_sums_are_sums_packed(seed: int, n: int) -> None:
    one, other = symmetric(n, seed), symmetric(n, seed + 1)
    assert torch.equal(pack_symmetric(one) + pack_symmetric(other), pack_symmetric(one + other))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=50))
def test_sum_of_squares_equals_fsum_to_float64_rounding(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    expected = math.fsum(float(v) ** 2 for v in x)
    assert sum_of_squares(x) == pytest.approx(expected, rel=1e-13, abs=0)


def test_sum_of_squares_adds_in_float64_whatever_the_type() -> None:
    x = torch.full((4096, 8), 300.0, dtype=torch.float16)  # 300**2 is past the range of float16
    assert sum_of_squares(x) == 4096 * 8 * 90000.0
    ones = torch.ones(2**24 + 3, dtype=torch.uint8)  # float32 would stay at 2**24
    assert sum_of_squares(ones) == 2**24 + 3
    assert sum_of_squares(torch.empty(0)) == 0.0
    assert sum_of_squares(torch.arange(6.0).reshape(2, 3).T) == 55.0


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    rank=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-12, 1e12),
    decades=st.floats(0, 6),
)
def test_rounding_a_low_rank_matrix_to_float32_keeps_spurious_singular_values_below_the_tolerance(
    m: int, n: int, rank: int, seed: int, scale: float, decades: float
) -> None:
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -decades, rank, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=generator)).Q
    exact = scale * (left * spectrum) @ right.T
    s = torch.linalg.svdvals(exact.float().double())
    assert bool((s[rank:] <= singular_tolerance((m, n), torch.float32) * s[0]).all())


def test_the_tolerance_is_8_float32_eps_and_max_side_float64_eps() -> None:
    assert singular_tolerance((3, 700), torch.float32) == 8 * 2**-23
    assert singular_tolerance((3, 700), torch.float64) == 700 * 2**-52


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    rank=st.integers(0, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_live_factors_find_the_rank_and_multiply_back_to_the_matrix(
    m: int, n: int, rank: int, seed: int, dtype: torch.dtype
) -> None:
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=generator)).Q
    x = (left * torch.linspace(1, 2, rank, dtype=torch.float64) @ right.T).to(dtype)
    u, s, v = live_factors(x)
    assert (u.shape, s.shape, v.shape) == ((m, rank), (rank,), (n, rank))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close((u * s) @ v.T, x.double(), rtol=0, atol=40 * eps)
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64), rtol=0, atol=40 * eps)
    torch.testing.assert_close(s, torch.linalg.svdvals(x.double())[:rank], rtol=40 * eps, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_live_factors_of_nothing_or_zeros_have_rank_0(shape: tuple[int, int], dtype: torch.dtype) -> None:
    u, s, v = live_factors(torch.zeros(shape, dtype=dtype))
    assert (u.shape, s.shape, v.shape) == ((shape[0], 0), (0,), (shape[1], 0))


def test_raw_bytes_are_the_little_endian_bytes_in_row_order() -> None:
    assert bytes(raw_bytes(torch.tensor([1.0, -2.0]))) == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert bytes(raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T)) == b"\x01\0\x03\0\x02\0\x04\0"
    assert bytes(raw_bytes(torch.tensor(7, dtype=torch.int64))) == b"\x07" + bytes(7)
    assert bytes(raw_bytes(torch.tensor([True, False]))) == b"\x01\x00"
    assert bytes(raw_bytes(torch.tensor(1.0, dtype=torch.bfloat16))) == b"\x80\x3f"
    assert bytes(raw_bytes(torch.empty(0, 3))) == b""


def test_raw_bytes_of_a_contiguous_tensor_are_the_tensors_own_memory() -> None:
    x = torch.zeros(4, dtype=torch.uint8)
    raw_bytes(x)[2] = 9
    assert x.tolist() == [0, 0, 9, 0]
    part = torch.arange(8, dtype=torch.uint8)[2:5]
    assert bytes(raw_bytes(part)) == b"\x02\x03\x04"


def test_the_two_tables_of_dtypes_hold_the_same_names_and_item_sizes() -> None:
    assert set(TORCH_DTYPES) == set(ITEM_BYTES)
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == dict(ITEM_BYTES)
    assert all(DTYPE_NAMES[TORCH_DTYPES[name]] == name for name in TORCH_DTYPES)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_arithmetic_is_in_float32_unless_float64_is_stored_or_asked_for(stored: torch.dtype) -> None:
    assert compute_dtype(stored) == torch.float32
    assert compute_dtype(stored, float64=True) == torch.float64
    assert compute_dtype(torch.float64) == torch.float64


@given(
    count=st.integers(1, 300),
    place=st.floats(0, 1, exclude_max=True),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    strided=st.booleans(),
)
def test_one_entry_that_is_not_finite_is_seen_wherever_it_stands(
    count: int, place: float, bad: float, dtype: torch.dtype, strided: bool
) -> None:
    x = torch.linspace(-1, 1, 3 * count).to(dtype)
    x = x[1::3] if strided else x[:count]
    assert all_finite(x)
    x[int(place * count)] = bad
    assert not all_finite(x)
    assert not all_finite(x[int(place * count)])


def test_the_largest_numbers_of_a_type_and_no_numbers_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert all_finite(torch.full((5, 7), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.tensor(True))
