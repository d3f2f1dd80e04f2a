"""Several networks at once, and BatchNorm after a merge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from merganser.align.many import mean_of, merge_many, star
from merganser.align.renorm import reset_batch_norm
from merganser.errors import ParameterError
from merganser.symmetry import Group, Spec

SPEC = Spec(
    {"x": Group(6), "heads": Group(2), "d": Group(3, "heads")},
    {"in": ("x", 5), "mid": ({"product": ["heads", "d"]}, "x"), "out": (4, {"product": ["heads", "d"]}), "free": (3,)},
    {},
    {},
)


def family(count: int, noise: float, seed: int = 0) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Noisy copies of one network in random orders, and the orders that undo them."""
    generator = torch.Generator().manual_seed(seed)
    one = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SPEC.shapes().items()}
    networks, undone = [], []
    for i in range(count):
        order = SPEC.random(generator) if i else SPEC.identity()
        noisy = {n: x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in one.items()}
        networks.append({n: SPEC.apply(order, n, x) for n, x in noisy.items()})
        undone.append(SPEC.inverse(order))
    return networks, undone


def spread(networks: list[dict[str, Tensor]], orders: list[dict[str, Tensor]]) -> float:
    """Sum of squared distances to the mean."""
    middle = mean_of(SPEC, networks, orders)
    return sum(
        float((SPEC.apply(o, n, x) - middle[n]).square().sum())
        for net, o in zip(networks, orders, strict=True)
        for n, x in net.items()
    )


@pytest.mark.parametrize("align", [star, merge_many])
def test_noisy_copies_come_back_into_one_order(align) -> None:
    networks, undone = family(4, noise=0.05)
    for found, expected in zip(align(SPEC, networks), undone, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in SPEC.groups)


@pytest.mark.parametrize("seed", range(5))
def test_merge_many_is_never_farther_from_the_mean_than_a_star(seed: int) -> None:
    networks, _ = family(5, noise=1.0, seed=seed)
    assert spread(networks, merge_many(SPEC, networks)) <= spread(networks, star(SPEC, networks)) + 1e-9


def test_one_network_stays_as_it_is_and_none_is_refused() -> None:
    networks, _ = family(1, noise=0)
    assert all(torch.equal(x, SPEC.identity()[n]) for n, x in merge_many(SPEC, networks)[0].items())
    with pytest.raises(ParameterError, match="no network"):
        star(SPEC, [])


def test_statistics_of_batch_norm_become_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    network[2].eval()
    weights = copy.deepcopy([p.detach() for p in network.parameters()])
    batches = [torch.randn(6, 3) for _ in range(3)]
    assert reset_batch_norm(network, [((x,), {}) for x in batches]) == 1
    seen = [network[0](x).detach().double() for x in batches]
    assert torch.allclose(network[1].running_mean.double(), torch.stack([z.mean(0) for z in seen]).mean(0), atol=1e-6)
    assert torch.allclose(network[1].running_var.double(), torch.stack([z.var(0) for z in seen]).mean(0), atol=1e-6)
    assert [m.training for m in network] == [True, True, False, True]
    assert network[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))


def test_a_network_without_batch_norm_needs_no_data_and_one_with_it_does() -> None:
    assert reset_batch_norm(nn.Linear(2, 2), []) == 0
    with pytest.raises(ParameterError, match="no batch"):
        reset_batch_norm(nn.BatchNorm1d(2), [])
