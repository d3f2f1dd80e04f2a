"""What a review found: each fault with the smallest case that showed it."""

from __future__ import annotations

import copy
from math import nan

import pytest
import torch
from torch import Tensor, nn

from merganser.align.activations import activation_costs
from merganser.align.balancing import choose_balance
from merganser.align.costs import DualCosts, WeightCosts
from merganser.align.match import match
from merganser.align.renorm import layer_statistics, repair, reset_batch_norm
from merganser.align.universe import _Problem, universe
from merganser.align.zipping import weight_correlations, zip_networks
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Group, Spec, symmetries


class Mixer(nn.Module):
    """Hidden units of tokens and channels meet in an activation, and in no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.stem, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.t2(torch.relu(self.t1(h.transpose(1, 2)))).transpose(1, 2)
        return self.head(h)


@pytest.mark.parametrize("balance", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_groups_that_meet_in_an_activation_alone_wait_for_each_other(seed: int, balance: float) -> None:
    torch.manual_seed(seed)
    one = Mixer().eval()
    batches = [((torch.randn(32, 4, 5),), {}) for _ in range(3)]
    found = symmetries(one, *batches[0])
    moved = found.spec.random(torch.Generator().manual_seed(7))
    two = copy.deepcopy(one)
    two.load_state_dict({n: found.spec.apply(moved, n, x) for n, x in one.state_dict().items()})
    a, b = ({n: x.detach() for n, x in net.state_dict().items()} for net in (one, two))
    seen = activation_costs(found, one, two, batches)
    costs = DualCosts(WeightCosts(found.spec, a, b, "pearson"), seen, balance) if balance else seen
    orders = match(found.spec, costs, seed=seed).orders
    assert all(torch.equal(found.spec.apply(orders, n, x), a[n]) for n, x in b.items())


SQUARE = Spec({"h": Group(6)}, {"in": ("h", 3), "again": ("h", "h"), "out": (2, "h")}, {}, {})


@pytest.mark.parametrize("seed", range(10))
def test_a_group_along_two_axes_never_makes_networks_less_alike(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SQUARE.shapes().items()}
        for _ in range(2)
    )
    costs, start = WeightCosts(SQUARE, a, b), SQUARE.random(generator)
    found = match(SQUARE, costs, start=start)
    assert found.settled
    assert costs.objective(found.orders) >= costs.objective(start)
    moved = SQUARE.random(generator)
    copied = {n: SQUARE.apply(moved, n, x) for n, x in a.items()}
    costs = WeightCosts(SQUARE, a, copied)
    back = match(SQUARE, costs).orders
    assert costs.objective(back) >= costs.objective(SQUARE.identity())


@pytest.mark.parametrize("seed", range(5))
def test_improving_a_common_order_never_loses(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    networks = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SQUARE.shapes().items()}
        for _ in range(3)
    ]
    found = universe(SQUARE, networks, starts=1)
    assert found.objective >= found.rounded


def test_a_tensor_with_two_groups_on_one_axis_is_of_a_higher_degree() -> None:
    spec = Spec({"x": Group(3), "y": Group(4)}, {"w": ({"product": ["x", "y"]}, "x"), "v": ("x", "y")}, {}, {})
    generator = torch.Generator().manual_seed(0)
    networks = [
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in spec.shapes().items()}
        for _ in range(3)
    ]
    problem = _Problem(spec, ["x", "y"], networks, [spec.identity()] * 3)
    assert problem.degree == 6
    x = problem.identity()
    corner = [y[:, torch.randperm(y.shape[1], generator=generator)] for y in x]
    t, value = problem.best_step(x, corner)
    assert problem.value([y + t * (s - y) for y, s in zip(x, corner, strict=True)]) == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_common_order_is_found_where_gradients_are_off(mode) -> None:
    generator = torch.Generator().manual_seed(0)
    networks = [{n: torch.randn(s, generator=generator) for n, s in SQUARE.shapes().items()} for _ in range(2)]
    expected = universe(SQUARE, networks)
    with mode():
        found = universe(SQUARE, [{n: x.clone() for n, x in net.items()} for net in networks])
    assert found.objective == expected.objective


def test_networks_of_another_shape_are_not_cropped() -> None:
    networks = [{n: torch.zeros(s) for n, s in SQUARE.shapes().items()} for _ in range(2)]
    networks[1]["in"] = torch.zeros(7, 3)
    with pytest.raises(ShapeError, match="network 1"):
        universe(SQUARE, networks)


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)).eval()


def test_running_statistics_drown_neither_common_orders_nor_zips() -> None:
    one = normed(0)
    spec = symmetries(one, (torch.randn(4, 5),)).spec
    (group,) = spec.groups
    moved = spec.random(torch.Generator().manual_seed(1))
    a = {n: x.detach().clone() for n, x in one.state_dict().items()}
    b = {n: spec.apply(moved, n, x) for n, x in a.items()}
    for state in (a, b):
        state["1.running_var"] = 1e6 * torch.rand(24)
    found = universe(spec, [a, b], improve=False, starts=1).orders
    assert torch.equal(spec.apply(found[1], "0.weight", b["0.weight"]), spec.apply(found[0], "0.weight", a["0.weight"]))
    clusters = {group: torch.arange(24).expand(2, -1)}
    alike = weight_correlations(spec, group, [a, b], [spec.identity()] * 2, clusters)[:24, 24:]
    assert torch.equal(alike.argmax(0), moved[group])


def test_single_examples_are_no_batch_to_repair_by() -> None:
    one = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    before = copy.deepcopy(one.state_dict())
    batches = [((row,), {}) for row in torch.randn(64, 5).split(1)]
    with pytest.raises(ParameterError, match="1 values of a unit"):
        repair(one, [layer_statistics(one, batches)], batches)
    assert all(torch.equal(x, before[n]) for n, x in one.state_dict().items())


class Shared(nn.Module):
    """A tied head, a layer that runs twice, one with weight norm, and one that can be repaired."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(5, 8)
        self.head.weight = self.embed.weight
        self.twice, self.once = nn.Linear(8, 8), nn.Linear(8, 5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.twice(self.twice(self.embed(x).relu()).relu()))
        return self.head(self.once(x.relu()))


def test_layers_that_no_scaling_can_repair_are_left_alone() -> None:
    torch.manual_seed(0)
    one, other = Shared().eval(), Shared().eval()
    batches = [((torch.randn(32, 5),), {}) for _ in range(2)]
    assert list(layer_statistics(one, batches)) == ["once"]
    before = copy.deepcopy(one.state_dict())
    assert repair(one, [layer_statistics(other, batches)], batches) == 1
    assert {n for n, x in one.state_dict().items() if not torch.equal(x, before[n])} == {"once.weight", "once.bias"}


def test_with_batch_norm_a_zip_is_not_repaired_on_top() -> None:
    networks = [normed(0), normed(1)]
    batches = [((torch.randn(32, 5),), {}) for _ in range(2)]
    found = symmetries(networks[0], *batches[0])
    plain, told = (zip_networks(found, networks, batches, repairs=repairs).state_dict() for repairs in (False, True))
    assert all(torch.equal(x, told[n]) for n, x in plain.items())


def test_statistics_come_back_where_measuring_them_fails() -> None:
    one = normed(0)
    one[1].running_mean.fill_(3)
    with pytest.raises(ParameterError, match="no batch"):
        reset_batch_norm(one, [])
    with pytest.raises(RuntimeError):
        reset_batch_norm(one, [((torch.randn(9, 5),), {}), ((torch.randn(9, 6),), {})])
    assert torch.equal(one[1].running_mean, torch.full((24,), 3.0))
    assert not one[1].training


def test_a_balance_that_gives_nan_is_not_chosen() -> None:
    one, broken = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        broken.weight.fill_(nan)
    found = choose_balance(lambda b: broken if b == 0 else one, [one], [((torch.randn(4, 3),), {})])
    assert found.balance == 0.1
    with pytest.raises(ParameterError, match="no parent"):
        choose_balance(lambda _: one, [], [((torch.randn(4, 3),), {})])
