"""Anchored Gram: against float64 loops, and what its anchor promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.errors import ParameterError
from merganser.methods import gram_terms
from merganser.methods.gram import gram
from merganser.methods.gram_anchored import gram_anchored


def sums(changes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    terms = [gram_terms(d) for d in changes]
    return sum(d.double() for d in changes), sum(g for g, _ in terms), sum(b for _, b in terms)  # type: ignore[return-value]


def draw(m: int, n: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank or n, generator=generator, dtype=torch.float64)
    return left if rank is None else left @ torch.randn(rank, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("noise", "anchor", "eps"), [(0.1, 1.0, 1e-3), (0.5, 2.0, 1e-3), (0.25, 0.0, 0.2), (0.0, 1.0, 0.05)]
)
def test_it_is_where_the_gradient_of_its_objective_vanishes(noise: float, anchor: float, eps: float) -> None:
    changes = [draw(6, 8, seed) for seed in range(3)]
    s, g, b = sums(changes)
    found = gram_anchored(s, g, b, noise=noise, anchor=anchor, eps=eps).numpy()
    total, gram_ = np.zeros((6, 8)), np.zeros((8, 8))
    for d in (d.numpy() for d in changes):
        gram_ += d.T @ d / np.sum(d * d)
        total += (found - d) @ d.T @ d / np.sum(d * d)
    eigenvalues = sorted(np.linalg.eigvalsh(gram_))
    rho = max(eps * np.mean(eigenvalues), eigenvalues[int(8 * noise)] if noise else 0.0)
    total += rho * (found - anchor * sum(d.numpy() for d in changes))
    assert np.abs(total).max() < 1e-12


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_a_single_change_comes_out_as_it_is(m: int, n: int, seed: int) -> None:
    d = draw(m, n, seed)
    assert torch.allclose(gram_anchored(*sums([d])), d, rtol=1e-9, atol=1e-9)


def test_changes_with_orthogonal_inputs_are_all_kept() -> None:
    one, two = torch.zeros(5, 8, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    one[:, :3], two[:, 3:7] = draw(5, 3, 0), draw(5, 4, 1)
    assert torch.allclose(gram_anchored(*sums([one, two])), one + two, rtol=1e-10)


def test_without_anchor_and_noise_it_is_gram() -> None:
    s, g, b = sums([draw(6, 8, seed) for seed in range(3)])
    assert torch.allclose(gram_anchored(s, g, b, noise=0, anchor=0, eps=0.02), gram(g, b, eps=0.02), rtol=1e-12)


def test_a_ridge_without_end_gives_the_sum() -> None:
    """Between gram, which follows the regression, and task arithmetic, which adds."""
    s, g, b = sums([draw(6, 8, seed, rank=3) for seed in range(3)])
    far = gram_anchored(s, g, b, noise=0, anchor=0.5, eps=1.0)
    near = gram_anchored(s, g, b, noise=0, anchor=0.5, eps=1e-6)
    assert float((far - 0.5 * s).norm()) < float((near - 0.5 * s).norm())


def test_zeros_give_zeros() -> None:
    zero = torch.zeros(4, 3)
    assert not gram_anchored(*sums([zero])).any()


@pytest.mark.parametrize(
    "setting", [{"noise": -0.1}, {"noise": 1.0}, {"eps": 0.0}, {"eps": 2.0}, {"anchor": float("nan")}]
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(ParameterError, match=next(iter(setting))):
        gram_anchored(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), **setting)


def test_a_sum_of_grams_that_is_none_is_refused() -> None:
    with pytest.raises(ParameterError, match="weight must be positive"):
        gram_anchored(torch.eye(2), -torch.eye(2), torch.eye(2))
