"""Normal equations of layers with blocks of zeros, against loops, and what they take from memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merganser.align import normal as normal_module
from merganser.align.layout import Side
from merganser.align.memory import give_back
from merganser.align.normal import Normal, readable, solve
from merganser.align.triangles import cholesky, solved

A, M, B = Side.FIRST, Side.BOTH, Side.SECOND
SIDES = {
    "merged": ((M,) * 4, (M,) * 6),
    "mixed": ((A, M, B, B), (A, M, M, B, A, B)),
    "apart": ((A, A, B, B), (A, A, A, B, B, B)),
    "into merged": ((M,) * 4, (A, A, A, B, B, B)),
    "from merged": ((A, B, A, B), (M,) * 6),
    "only B": ((B,) * 4, (M, M, A, A, B, B)),
}


def sides(which: str) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.tensor([int(side) for side in some], dtype=torch.uint8) for some in SIDES[which])
    return rows, columns


def normal_of(count: int = 50, seed: int = 0) -> tuple[Normal, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64) + 1
    y = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    normal = Normal.empty(6, 4)
    for part, target in zip(x.split(20), y.split(20), strict=True):
        normal.add(part, target)
    return normal, x, y


@pytest.mark.parametrize("which", SIDES)
def test_what_is_not_met_is_the_same_with_and_without_the_blocks_of_zeros(which: str) -> None:
    normal, x, y = normal_of()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight *= readable(*sides(which))
    expected = sum(
        (float(y[n, r]) - sum(float(weight[r, c]) * float(x[n, c]) for c in range(6))) ** 2
        for n in range(len(x))
        for r in range(4)
    ) / float(y.square().sum())
    assert normal.residual(weight, sides(which)) == pytest.approx(expected, rel=1e-12)
    assert normal.residual(weight) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("which", SIDES)
def test_the_slope_is_zero_in_what_may_be_read_and_the_rest_stays_zero(which: str) -> None:
    normal, x, y = normal_of()
    prior = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = solve(normal, prior, *sides(which), 0.1)
    free = readable(*sides(which)).bool()
    strength = 0.1 * float((x.T @ x).diagonal().mean())
    slope = (found @ x.T - y.T) @ x + strength * (found - prior)
    assert float(slope[free].abs().max()) < 1e-10
    assert not found[~free].any()


@pytest.fixture
def taken_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sides of the matrices that are copied for a solution."""
    sizes: list[int] = []
    original = normal_module.taken

    def noted(gram: Tensor, places: Tensor) -> Tensor:
        sizes.append(len(places))
        return original(gram, places)

    monkeypatch.setattr(normal_module, "taken", noted)
    return sizes


def test_networks_that_are_wholly_apart_are_solved_in_matrices_of_one_of_them(taken_sizes: list[int]) -> None:
    normal, _, _ = normal_of()
    solve(normal, torch.zeros(4, 6, dtype=torch.float64), *sides("apart"), 0.1)
    assert max(taken_sizes) == 3


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_leading_block_of_a_factor_solves_its_own_equations(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    gram, right = x.T @ x, torch.randn(size, count, generator=generator, dtype=torch.float64)
    factor = cholesky(gram.clone())
    assert factor is not None
    before = right.clone()
    found = solved(factor[:size, :size], right)
    torch.testing.assert_close(gram[:size, :size] @ found, right, rtol=1e-11, atol=1e-11)
    assert torch.equal(right, before)


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    pytest.skip("this system does not tell")


@pytest.mark.skipif(
    not (Path("/proc/self/status").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
    reason="it is glibc that keeps memory, and Linux that tells what a process holds",
)
def test_what_was_freed_below_a_tensor_that_stays_goes_back() -> None:
    torch.zeros(31 * 2**20, dtype=torch.uint8)  # from here on blocks of up to 31 MB are kept
    blocks = [torch.ones(2**18) for _ in range(200)]
    last = blocks.pop()
    blocks.clear()
    before = resident_mb()
    give_back()
    assert resident_mb() < before - 100
    assert float(last.sum()) == 2**18
