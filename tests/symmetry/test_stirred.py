"""Noise on the weights that a spec is checked with."""

from __future__ import annotations

import pytest
import torch

from merganser.symmetry.checking import LARGE, stirred

#: Fewest entries of each kind of noise, so many that its size is known to a hundredth.
SIZES = [LARGE // 2, LARGE]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_noise_is_a_tenth_of_the_tensor(size: int, scale: float) -> None:
    x = scale * torch.randn(size, generator=generator(1), dtype=torch.float64)
    noise = stirred(x, generator()) - x
    assert float(noise.square().mean().sqrt() / x.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)
    assert abs(float(noise.mean())) < 0.1 * scale * 5 / size**0.5


@pytest.mark.parametrize("size", SIZES)
def test_what_is_positive_stays_so_and_changes_by_a_tenth(size: int) -> None:
    x = 0.01 + torch.rand(size, generator=generator(1), dtype=torch.float64)
    new = stirred(x, generator())
    assert bool((new > 0).all())
    assert float((new / x).log().std()) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_entries_that_were_alike_no_longer_are(size: int, value: float) -> None:
    """Of what is drawn on a grid of 2^24 values, fewer than one in a hundred are drawn twice."""
    x = torch.full((size,), value, dtype=torch.float64)
    new = stirred(x, generator())
    assert new.dtype == torch.float64
    assert len(new.unique()) > 0.99 * size if size >= LARGE else len(new.unique()) == size


@pytest.mark.parametrize("size", SIZES)
def test_two_draws_have_nothing_in_common(size: int) -> None:
    x = torch.zeros(size, dtype=torch.float64)
    drawn = generator()
    one, two = stirred(x, drawn), stirred(x, drawn)
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / size**0.5
