"""What the rules give with the check off holds: random elements leave the output as it is, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.symmetry import Spec, symmetries

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """Units between two linear layers, and layers of others."""

    def __init__(self, formula: Callable[[Between, Tensor], Tensor], layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.up, self.down, self.formula = nn.Linear(12, 12), nn.Linear(12, 5), formula
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.formula(self, torch.tanh(self.up(x))).flatten(1))


def built(formula: Callable[[Between, Tensor], Tensor], **layers: Callable[[], nn.Module]) -> Between:
    torch.manual_seed(0)
    network = Between(formula, {name: make() for name, make in layers.items()}).eval()
    with torch.no_grad():
        for x in network.state_dict().values():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if x.ndim < 2 else torch.randn_like(x))
    return network


def largest_change(network: nn.Module, spec: Spec, seed: int) -> float:
    """Of the output under a random element, as a share of its largest entry."""
    network = copy.deepcopy(network).double()
    orders = spec.random(torch.Generator().manual_seed(seed))
    moved = copy.deepcopy(network)
    moved.load_state_dict(
        {n: spec.apply(orders, n, x) for n, x in network.state_dict().items() if n in spec.axes}, False
    )
    with torch.no_grad():
        one, two = network(X.double()), moved(X.double())
    return float((one - two).abs().max() / one.abs().max())


def groups(spec: Spec) -> list[tuple[int, int | None]]:
    """Sizes of all groups that move, and of what they lie within."""
    moving = [group for group in spec.groups.values() if not group.fixed]
    pairs = [(group.size, None if group.within is None else spec.groups[group.within].size) for group in moving]
    return sorted(pairs, key=lambda pair: (pair[0], pair[1] or 0))


def channels(h: Tensor) -> Tensor:
    """Three channels of four places."""
    return h.view(-1, 3, 4)


def places(h: Tensor) -> Tensor:
    """Three places of four channels, channels first."""
    return h.view(-1, 3, 4).transpose(1, 2)


class Table(nn.Module):
    """A matrix, one row a unit, that a layer is applied to before anything else is."""

    def __init__(self, layer: nn.Module, *shape: int, added: bool = False) -> None:
        super().__init__()
        self.table, self.layer, self.added = nn.Parameter(torch.zeros(12, *shape)), layer, added

    def forward(self) -> Tensor:
        made = self.layer(self.table)
        return (made + self.table if self.added else made).flatten(1)


CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, int | None]]]] = {
    "a convolution of one tap that mixes channels": (
        lambda: built(lambda it, h: channels(h) + it.mix(channels(h)), mix=lambda: nn.Conv1d(3, 3, 1)),
        [(3, None), (4, None)],
    ),
    "one of two dimensions": (
        lambda: built(
            lambda it, h: h.view(-1, 3, 2, 2) + it.mix(h.view(-1, 3, 2, 2)), mix=lambda: nn.Conv2d(3, 3, 1, bias=False)
        ),
        [(2, None), (2, 2), (3, None)],
    ),
    "one turned round": (
        lambda: built(lambda it, h: channels(h) + it.mix(channels(h)), mix=lambda: nn.ConvTranspose1d(3, 3, 1)),
        [(3, None), (4, None)],
    ),
    "one that mixes no channels": (
        lambda: built(lambda it, h: channels(h) + it.mix(channels(h)), mix=lambda: nn.Conv1d(3, 3, 1, groups=3)),
        [(3, None), (4, 3)],
    ),
    "one that mixes within groups": (
        lambda: built(
            lambda it, h: h.view(-1, 4, 3) + it.mix(h.view(-1, 4, 3)), mix=lambda: nn.Conv1d(4, 4, 1, groups=2)
        ),
        [(2, None), (2, 2), (3, 2)],
    ),
    "a linear layer over the last axis": (
        lambda: built(lambda it, h: places(h) + it.mix(places(h)), mix=lambda: nn.Linear(3, 3)),
        [(3, None), (4, None)],
    ),
    "instance norm of channels that differ by place": (
        lambda: built(lambda it, h: it.norm(places(h)).mT, norm=lambda: nn.InstanceNorm1d(4)),
        [(3, None), (4, None)],
    ),
    "instance norm of places that differ by channel": (
        lambda: built(lambda it, h: it.norm(channels(h)), norm=lambda: nn.InstanceNorm1d(3, affine=True)),
        [(3, None), (4, 3)],
    ),
    "batch norm that measures": (
        lambda: built(lambda it, h: functional.batch_norm(places(h), None, None, training=True).mT),
        [(3, None), (4, None)],
    ),
    "batch norm that measures and keeps": (
        lambda: built(
            lambda it, h: (
                functional.batch_norm(
                    places(h), it.norm.running_mean.clone(), it.norm.running_var.clone(), training=True
                ).mT
            ),
            norm=lambda: nn.BatchNorm1d(4),
        ),
        [(3, None), (4, None)],
    ),
    "batch norm with units in the batch": (
        lambda: built(lambda it, h: functional.batch_norm(h.view(-1, 4, 1), None, None, training=True).view(-1, 12)),
        [(3, None), (4, None)],
    ),
    "slopes of channels": (
        lambda: built(lambda it, h: it.slope(channels(h)), slope=lambda: nn.PReLU(3)),
        [(3, None), (4, 3)],
    ),
    "slopes of as many channels as places": (
        lambda: built(lambda it, h: it.slope(h.view(-1, 2, 3, 2)), slope=lambda: nn.PReLU(2)),
        [(2, None), (2, 2), (3, 2)],
    ),
    "slopes of a parameter's channels": (
        lambda: built(lambda it, h: h @ it.rows(), rows=lambda: Table(nn.PReLU(2), 2, 3, 2)),
        [(2, None), (2, 2), (3, 2), (12, None)],
    ),
    "a linear layer over a parameter's last axis": (
        lambda: built(lambda it, h: h @ it.rows(), rows=lambda: Table(nn.Linear(3, 3), 4, 3, added=True)),
        [(3, None), (4, None), (12, None)],
    ),
    "one slope for all": (
        lambda: built(lambda it, h: it.slope(channels(h)), slope=nn.PReLU),
        [(3, None), (4, 3)],
    ),
}


@pytest.mark.parametrize("inference", [False, True], ids=["down to ATen", "whole operations"])
@pytest.mark.parametrize("name", CASES)
def test_what_the_rules_give_holds_without_the_check(name: str, inference: bool) -> None:
    make, expected = CASES[name]
    with torch.inference_mode(inference):  # what is made here is recorded by other names
        network = make()
        found = symmetries(network, (X.clone(),), check=False)
    assert max(largest_change(network, found.spec, seed) for seed in range(4)) < 1e-12
    assert groups(found.spec) == expected
    assert found.unknown == ()
