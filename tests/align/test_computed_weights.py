"""Weights that are computed in the run are no activations: units are compared by what the input makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import activation_costs
from merganser.align.match import match
from merganser.align.partial import Pair, Settings
from merganser.align.zipping import zip_networks
from merganser.symmetry import symmetries


class Three(nn.Module):
    """Three layers; the second's weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.h = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def weight(self) -> Tensor:
        return self.m.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.relu(functional.linear(torch.relu(self.a(x)), self.weight(), self.m.bias)))


class Pruned(Three):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand(16, 16) > 0.5).float())

    def weight(self) -> Tensor:
        return self.m.weight * self.mask


class Scaled(Three):
    """StyleGAN's equalised learning rate."""

    def weight(self) -> Tensor:
        return self.m.weight * 1.5


class Normed(Three):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.utils.parametrizations.weight_norm(self.m)


class Cast(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class LowRank(Three):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(4, 16) / 4), nn.Parameter(torch.randn(16, 4) / 4)

    def weight(self) -> Tensor:
        return self.m.weight + self.up @ self.down


class Reshaped(Three):
    """Heads of an einsum."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bi,ijk->bjk", torch.relu(self.a(x)), self.m.weight.t().reshape(16, 4, 4))
        return self.h(torch.relu(h.flatten(1) + self.m.bias))


KINDS = [Pruned, Scaled, Normed, Cast, LowRank, Reshaped]


def own_permuted_copy(kind: type[Three]) -> tuple[nn.Module, nn.Module, list[tuple[tuple[Tensor], dict[str, Tensor]]]]:
    torch.manual_seed(0)
    one = kind().eval()
    batches = [((torch.randn(128, 6),), {}) for _ in range(3)]
    spec = symmetries(one, *batches[0]).spec
    orders = spec.random(torch.Generator().manual_seed(1))
    two = copy.deepcopy(one)
    two.load_state_dict({n: spec.apply(orders, n, x) if n in spec.axes else x for n, x in one.state_dict().items()})
    return one, two, batches


def share(network: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Largest difference of outputs, as a share of the largest."""
    with torch.no_grad():
        one, two = network(x), other(x)
    return float((one - two).abs().max() / one.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_copy_comes_back_where_weights_are_computed(kind: type[Three]) -> None:
    one, two, batches = own_permuted_copy(kind)
    found = symmetries(one, *batches[0])
    orders = match(found.spec, activation_costs(found, one, two, batches)).orders
    assert len(found.factors) > len(found.taps) == 2
    own, other = one.state_dict(), two.state_dict()
    assert sum(group.size for group in found.spec.groups.values()) > 16  # both layers' units
    assert all(torch.equal(found.spec.apply(orders, n, other[n]), own[n]) for n in found.spec.axes)
    x, close = batches[0][0][0], 1e-2 if kind is Cast else 1e-4
    assert share(one, zip_networks(found, [one, two], batches), x) < close
    assert share(one, Pair(found, one, two, batches, settings=Settings(way="none")).merged(1).network, x) < close


def test_what_the_input_is_written_into_shows_units_and_what_tells_places_does_where_nothing_else_can() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p, self.q, self.h = nn.Linear(6, 8), nn.Linear(1, 5), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            kept = torch.zeros(len(x), 2, 8)
            kept[:, 1] = torch.relu(self.a(x))
            places = self.q(torch.relu(self.p(torch.arange(2.0)[:, None])))
            return self.h(torch.tanh(kept + places)[:, 1]) + self.h(kept[:, 1])

    torch.manual_seed(0)
    found = symmetries(Written(), (torch.randn(4, 6),))
    assert [tap.axes for tap in found.taps] == [(2, "p"), (4, "a"), (4, "a")]
    assert found.factors == found.taps
