"""Matching by what two networks do on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import activation_costs
from merganser.align.costs import DualCosts, WeightCosts
from merganser.align.match import match
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Spec, Symmetries, symmetries


class Grouped(nn.Module):
    """Units within units on one axis: a grouped convolution, or GroupNorm."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), mix
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.mix(x)).flatten(1))


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 3)), (32, 5)


def grouped() -> tuple[nn.Module, tuple[int, ...]]:
    return Grouped(nn.Conv2d(8, 8, 3, padding=1, groups=4)), (16, 3, 4, 4)


def group_norm() -> tuple[nn.Module, tuple[int, ...]]:
    return Grouped(nn.GroupNorm(2, 8)), (16, 3, 4, 4)


def attention() -> tuple[nn.Module, tuple[int, ...]]:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 4)), (8, 6, 5)


class Pair:
    """A network and a copy of it in a random order of units."""

    def __init__(self, make: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> None:
        torch.manual_seed(0)
        self.one, shape = make()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.one.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        self.one.eval()
        self.batches = [((torch.randn(shape, generator=generator),), {}) for _ in range(4)]
        self.found: Symmetries = symmetries(self.one, *self.batches[0])
        self.spec: Spec = self.found.spec
        self.moved = self.spec.random(torch.Generator().manual_seed(3))
        self.a = {n: x.detach() for n, x in self.one.state_dict().items()}
        self.b = {n: self.spec.apply(self.moved, n, x) if n in self.spec.axes else x for n, x in self.a.items()}
        self.two = copy.deepcopy(self.one)
        self.two.load_state_dict(self.b)


@pytest.mark.parametrize("taps", ["last", "all"])
@pytest.mark.parametrize("make", [mlp, grouped, group_norm, attention])
def test_a_permuted_copy_is_recovered_from_activations_and_from_both(make, taps) -> None:
    pair = Pair(make)
    seen = activation_costs(pair.found, pair.one, pair.two, pair.batches, taps=taps)
    undone = pair.spec.inverse(pair.moved)
    for costs in (seen, DualCosts(WeightCosts(pair.spec, pair.a, pair.b, "pearson"), seen, 0.5)):
        found = match(pair.spec, costs).orders
        assert all(torch.equal(found[name], undone[name]) for name in undone)


def test_similarities_are_correlations_over_all_samples_of_all_batches() -> None:
    pair = Pair(mlp)
    seen = activation_costs(pair.found, pair.one, pair.two, pair.batches)
    x, y = (torch.cat([net[:2](args[0]).detach() for args, _ in pair.batches]).double() for net in (pair.one, pair.two))
    found = seen.units("0", pair.spec.identity())
    for i in range(9):
        for j in range(9):
            pairs = torch.stack([x[:, i], y[:, j]])
            expected = 0.0 if (pairs == pairs[:, :1]).all(1).any() else float(torch.corrcoef(pairs)[0, 1])
            assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)


def test_a_balance_of_one_is_weights_and_of_zero_activations() -> None:
    pair = Pair(attention)
    weights = WeightCosts(pair.spec, pair.a, pair.b, "pearson")
    seen = activation_costs(pair.found, pair.one, pair.two, pair.batches)
    orders = pair.spec.random(torch.Generator().manual_seed(7))
    for name, group in pair.spec.groups.items():
        method = "units" if group.within is None else "inner_units"
        one, zero = (getattr(DualCosts(weights, seen, b), method)(name, orders) for b in (1.0, 0.0))
        assert torch.equal(one, getattr(weights, method)(name, orders))
        assert torch.equal(zero, getattr(seen, method)(name, orders))


@pytest.mark.parametrize("balance", [-0.1, 1.1, float("nan")])
def test_a_balance_that_is_no_share_is_refused(balance: float) -> None:
    pair = Pair(mlp)
    weights = WeightCosts(pair.spec, pair.a, pair.b)
    with pytest.raises(ParameterError, match="balance"):
        DualCosts(weights, weights, balance)


def test_no_batch_and_batches_of_another_shape_are_refused() -> None:
    pair = Pair(mlp)
    with pytest.raises(ParameterError, match="no batch"):
        activation_costs(pair.found, pair.one, pair.two, [])
    with pytest.raises(ShapeError, match=r"\(5, 9\), and was \(32, 9\) when the network was traced"):
        activation_costs(pair.found, pair.one, pair.two, [((torch.randn(5, 5),), {})])
