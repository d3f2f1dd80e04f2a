"""Units of one group seen at every place of another, and examples that are no units."""

from __future__ import annotations

from math import prod

import pytest
import torch
from test_activations import Pair, attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from merganser.align.activations import activation_costs, taps_by_group, unit_correlations
from merganser.align.match import match
from merganser.align.zipping import zip_networks, zip_partly


class Mixer(nn.Module):
    """Tokens mixed channel by channel: the tap is a product of examples and channels, by tokens' units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.mix, self.back = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x + self.back(self.mix(x.mT).relu()).mT
        return self.head(x.mean(1))


class OneKey(nn.Module):
    """Attention of several heads to one key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.both, self.out = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(2, (4, 3)).transpose(1, 2)
        k, v = (z[:, None].expand(-1, 4, -1, -1) for z in self.both(x).chunk(2, -1))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Eager(nn.Module):
    """Attention by products of four axes, which run as products of three: examples and heads on one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(5, 12), nn.Linear(12, 4)
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        q, k, v = (f(x).unflatten(2, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def mixer() -> tuple[nn.Module, tuple[int, ...]]:
    return Mixer(), (16, 4, 6)


def one_key() -> tuple[nn.Module, tuple[int, ...]]:
    return OneKey(), (16, 5, 8)


def eager() -> tuple[nn.Module, tuple[int, ...]]:
    return Eager(), (16, 6, 5)


def outputs(network: nn.Module, pair: Pair) -> Tensor:
    ((x,), _) = pair.batches[0]
    with torch.no_grad():
        given: Tensor = network(x)
    return given


@pytest.mark.parametrize("make", [mixer, one_key, eager, attention])
def test_a_permuted_copy_is_zipped_into_the_network_across_other_groups(make) -> None:
    pair = Pair(make)
    expected = outputs(pair.one, pair)
    merged = zip_networks(pair.found, [pair.one, pair.two], pair.batches)
    torch.testing.assert_close(outputs(merged, pair), expected, rtol=1e-3, atol=1e-4)


def test_a_permuted_copy_is_partly_zipped_into_the_network_across_other_groups() -> None:
    pair = Pair(mixer)
    for own in zip_partly(pair.found, [pair.one, pair.two], pair.batches, share=1.0):
        torch.testing.assert_close(outputs(own, pair), outputs(pair.one, pair), rtol=1e-3, atol=1e-4)


def test_units_are_compared_across_places_in_the_order_that_those_are_brought_into() -> None:
    pair = Pair(mixer)
    orders = [pair.spec.identity(), pair.spec.inverse(pair.moved)]
    found = unit_correlations(pair.found, [pair.one, pair.two], pair.batches, orders)["mix"]
    with torch.no_grad():
        seen = [pair.one.mix(pair.one.up(x).mT).relu().double() for (x,), _ in pair.batches]
    rows = torch.cat(seen).movedim(2, 0).reshape(8, -1)
    expected = torch.corrcoef(torch.cat([rows, rows[pair.moved["mix"]]]))
    alive = ~expected.isnan()
    torch.testing.assert_close(found[alive], expected[alive], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [mixer, eager])
@pytest.mark.parametrize("count", [1, 3])
def test_examples_are_no_units(make, count: int) -> None:
    """Similarities are as large as the groups are, and one batch alone recovers a permuted copy."""
    pair = Pair(make)
    seen = activation_costs(pair.found, pair.one, pair.two, pair.batches[:count])
    for group, shown in seen.shown.items():
        (one,) = shown
        (tap,) = taps_by_group(pair.found, "last")[group]
        groups = [g for g in pair.spec.groups if any(pair.spec.places_in(part, g).max() >= 0 for part in tap.axes)]
        units = prod(pair.spec.groups[g].size for g in groups)
        assert one.similarity.shape == (units, units)
    orders, undone = match(pair.spec, seen).orders, pair.spec.inverse(pair.moved)
    assert all(torch.equal(orders[g], undone[g]) for g in undone)
