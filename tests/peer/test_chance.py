"""What draws noise: shares kept, norms and means over 20 seeds, against the theory and against mergekit's.

Every matrix of the models holds the same change, so a merge gives 14 draws of 40 x 40 entries.
"""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from peer_jobs import SEEDS, Merges, load
from torch import Tensor

WIDTH, DENSITY, EPSILON = 40, 0.3, 0.2


@pytest.fixture(scope="module")
def draws(merges: Merges) -> dict[str, tuple[Tensor, Tensor]]:
    """Merged changes of both programs, (draws, 40, 40), by method."""
    found = {}
    for name in ("dare_linear", "dare_linear, rescaled", "dare_ties", "della_linear", "della"):
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for seed in SEEDS:
            drawn = merges.theirs(f"{name} {seed}")
            wide = [n for n, x in drawn.items() if x.shape == (WIDTH, WIDTH)]
            assert len(wide) == 14
            merged = merges.planned(f"{name} {seed}", seed=seed)
            theirs += [drawn[n] for n in wide]
            ours += [merged.read(n) for n in wide]
        found[name] = torch.stack(ours).double(), torch.stack(theirs).double()
    return found


def change_of(merges: Merges, model: str = "a") -> Tensor:
    return load(merges.root / "models" / "wide.f32" / model)["model.layers.0.mlp.up_proj.weight"].double()


def both(draws: dict[str, tuple[Tensor, Tensor]], name: str) -> list[Tensor]:
    return [*draws[name]]


def test_every_draw_is_another(draws: dict[str, tuple[Tensor, Tensor]]) -> None:
    for pair in draws.values():
        for found in pair:
            assert len({x.numpy().tobytes() for x in found}) == len(found) == 14 * len(SEEDS)


@pytest.mark.parametrize("name", ["dare_linear", "dare_linear, rescaled", "della_linear"])
def test_the_share_kept_is_the_density(draws: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    for found in both(draws, name):
        share = float((found != 0).double().mean())
        assert abs(share - DENSITY) < 5 * sqrt(DENSITY * (1 - DENSITY) / found.numel())


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_is_kept_is_the_change_itself(merges: Merges, draws: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    change = change_of(merges)
    for found in both(draws, name):
        assert bool(((found == change) | (found == 0)).all())


def test_rescaling_keeps_the_sum_of_magnitudes(merges: Merges, draws: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The factor is the ratio of norms of the draw, not 1 / density."""
    change = change_of(merges)
    for found in both(draws, "dare_linear, rescaled"):
        norms = found.abs().sum((1, 2)) / change.abs().sum()
        assert float((norms - 1).abs().max()) < 1e-5
        factor = (found / change).flatten(1).amax(1)
        assert float(factor.std()) > 0.01
        assert abs(float(factor.mean()) - 1 / DENSITY) < 0.05


def test_della_keeps_an_entry_by_its_rank_in_the_row(merges: Merges, draws: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Chances from density - epsilon to density + epsilon, linear in the rank."""
    ranks = change_of(merges).abs().argsort(1).argsort(1)
    expected = DENSITY - EPSILON + 2 * EPSILON * torch.arange(WIDTH) / (WIDTH - 1)
    for found in both(draws, "della_linear"):
        kept = (found != 0).double().mean(0)
        by_rank = torch.stack([kept[ranks == r].mean() for r in range(WIDTH)])
        assert float((by_rank - expected).abs().max()) < 5 * sqrt(0.25 / (WIDTH * len(found)))


@pytest.mark.parametrize("name", ["dare_linear", "dare_linear, rescaled", "dare_ties", "della_linear", "della"])
def test_means_and_spreads_are_the_same(draws: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    """Differences of means over their standard errors are like draws of a normal distribution, entry by entry."""
    ours, theirs = draws[name]
    error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
    z = (ours.mean(0) - theirs.mean(0)) / error.clamp(min=1e-12)
    assert abs(float(z.square().mean()) - 1) < 0.2
    assert float(z.abs().max()) < 5
    assert abs(float((ours.var(0).sum() / theirs.var(0).sum()).log())) < 0.03
    assert abs(float((ours.abs().sum() / theirs.abs().sum()).log())) < 0.01


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_a_seed_gives_the_same_bytes(merges: Merges, name: str) -> None:
    one, other = (merges.planned(f"{name} 0", seed=3) for _ in range(2))
    tensor = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(one.read(tensor), other.read(tensor))
    assert not torch.equal(one.read(tensor), merges.planned(f"{name} 0", seed=4).read(tensor))
