"""Linear assignment that begins from scaled costs, against scipy's that does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits
from torch import Tensor

from merganser.align.assignment import SCALED_FROM, assign


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(n: int) -> Tensor:
    """Of random units that are as large as they like."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    return (x * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]) @ y.T


N = SCALED_FROM + 22
HARD = {
    "normal": noise(N),
    "below the size that is scaled": noise(SCALED_FROM - 1),
    "just the size that is scaled": noise(SCALED_FROM),
    "heavy tails": noise(N).tan(),
    "units of many sizes": products(N),
    "rank one": torch.outer(noise(N)[0], noise(N)[1]),
    "whole numbers": noise(N).round(),
    "zeros but for a corner": torch.nn.functional.pad(noise(5), (0, N - 5, 0, N - 5)),
    "all rows alike": noise(N)[:1].expand(N, -1).contiguous(),
    "a row that drowns the rest": noise(N) + 1e9 * (torch.arange(N) == 3)[:, None] * noise(N, 1),
    "a column that nobody wants": noise(N) - 1e4 * (torch.arange(N) == 3)[None],
    "two that want one": noise(N) + 20 * torch.eye(N).index_copy(0, torch.tensor([1]), torch.eye(N)[:1]),
    "a constant": torch.full((N, N), 0.1, dtype=torch.float64),
    "huge": 1e280 * noise(N),
    "tiny": 1e-280 * noise(N),
    "so tiny that its size is zero": torch.nn.functional.pad(torch.full((1, 1), 5e-324), (0, N - 1, 0, N - 1)).double(),
}


@pytest.mark.parametrize("name", HARD)
def test_no_assignment_is_better(name: str) -> None:
    similarity = HARD[name]
    found = assign(similarity)
    assert torch.equal(found.sort().values, torch.arange(len(similarity)))
    rows, best = linear_sum_assignment(similarity.numpy(), maximize=True)
    size = float(similarity.abs().max())
    value, expected = ((similarity[rows, p] / max(size, 1e-300)).sum() for p in (found, torch.from_numpy(best)))
    assert float(value) == pytest.approx(float(expected), rel=1e-13, abs=1e-12)


def test_units_that_want_different_ones_get_what_they_want() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign(noise(N) + 20 * torch.eye(N)[order]), order)


def test_where_rows_are_scaled_the_one_best_assignment_is_found() -> None:
    """Five units that are alike but for noise a hundred thousand times smaller."""
    similarity = noise(N)
    similarity[:5] = similarity[0] + 1e-5 * noise(N, 1)[:5]
    _, best = linear_sum_assignment(similarity.numpy(), maximize=True)
    assert np.array_equal(assign(similarity).numpy(), best)


@pytest.mark.parametrize("n", [8, N])
def test_what_is_no_number_is_refused(n: int) -> None:
    similarity = noise(n) + 20 * torch.eye(n)
    similarity[2, 2] = float("nan")
    with pytest.raises(ValueError, match="invalid"):
        assign(similarity)


def test_threads_do_not_choose_between_units_that_are_equally_good() -> None:
    similarity = noise(2 * N).round()
    with threadpool_limits(1):
        one = assign(similarity)
    with threadpool_limits(2):
        assert torch.equal(assign(similarity), one)
