"""One order for several networks by Frank-Wolfe: the objective, the step, and what comes out."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.align.many import mean_of
from merganser.align.universe import _Problem, universe
from merganser.errors import ParameterError
from merganser.symmetry import Group, Spec

PLAIN = Spec(
    {"x": Group(6), "y": Group(5), "z": Group(4)},
    {
        "in": ("x", 5),
        "mid": ("y", "x"),
        "joined": ("z", {"sum": ["x", 2, "y"]}),
        "flat": (3, {"product": ["z", 4]}),
        "free": (3,),
    },
    {},
    {},
)
HEADS = Spec(
    {"x": Group(6), "heads": Group(2), "d": Group(3, "heads")},
    {"in": ("x", 5), "mid": ({"product": ["heads", "d"]}, "x"), "out": (4, {"product": ["heads", "d"]})},
    {},
    {},
)


def family(
    spec: Spec, count: int, noise: float, seed: int = 0
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Noisy copies of one network in random orders, and the orders that undo them."""
    generator = torch.Generator().manual_seed(seed)
    one = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in spec.shapes().items()}
    networks, undone = [], []
    for _ in range(count):
        order = spec.random(generator)
        noisy = {n: x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in one.items()}
        networks.append({n: spec.apply(order, n, x) for n, x in noisy.items()})
        undone.append(spec.inverse(order))
    return networks, undone


def likeness(spec: Spec, networks: list[dict[str, Tensor]], orders: list[dict[str, Tensor]]) -> float:
    """f by its definition, over tensors that some group moves: a loop over pairs of networks."""
    total = 0.0
    for a, b in combinations(range(len(networks)), 2):
        for name in spec.axes:
            if spec.moves(name):
                one, two = (spec.apply(orders[m], name, networks[m][name]) for m in (a, b))
                total += float((one * two).sum())
    return total


@pytest.mark.parametrize("spec", [PLAIN, HEADS], ids=["plain", "heads"])
def test_copies_in_random_orders_become_one(spec: Spec) -> None:
    networks, _ = family(spec, 5, noise=0.0)
    found = universe(spec, networks)
    middle = mean_of(spec, networks, found.orders)
    for network, orders in zip(networks, found.orders, strict=True):
        for name, x in network.items():
            torch.testing.assert_close(spec.apply(orders, name, x), middle[name], rtol=0, atol=1e-14)


def test_noisy_copies_come_into_one_order_up_to_a_common_one() -> None:
    networks, undone = family(PLAIN, 5, noise=0.1)
    found = universe(PLAIN, networks, starts=10).orders
    for group in PLAIN.groups:
        common = {tuple(u[group].argsort()[o[group]].tolist()) for u, o in zip(undone, found, strict=True)}
        assert len(common) == 1


def test_more_starts_are_never_worse() -> None:
    networks, _ = family(PLAIN, 4, noise=1.0)
    found = [universe(PLAIN, networks, starts=n).objective for n in (1, 3, 6)]
    assert found == sorted(found)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_the_objective_is_the_sum_over_pairs(seed: int, count: int) -> None:
    networks, _ = family(PLAIN, count, noise=1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    orders = [PLAIN.random(generator) for _ in networks]
    problem = _Problem(PLAIN, list(PLAIN.groups), networks, [PLAIN.identity() for _ in networks])
    matrices = [
        torch.stack([torch.eye(PLAIN.groups[g].size, dtype=torch.float64)[o[g]] for o in orders]) for g in PLAIN.groups
    ]
    assert problem.value(matrices) == pytest.approx(likeness(PLAIN, networks, orders), rel=1e-10, abs=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_a_step_is_the_best_of_its_line(seed: int) -> None:
    networks, _ = family(PLAIN, 3, noise=1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    problem = _Problem(PLAIN, list(PLAIN.groups), networks, [PLAIN.identity() for _ in networks])
    x = problem.identity()
    corner = [y[:, torch.randperm(y.shape[1], generator=generator)] for y in x]
    t, value = problem.best_step(x, corner)

    def at(t: float) -> float:
        return problem.value([y + t * (s - y) for y, s in zip(x, corner, strict=True)])

    assert at(t) == pytest.approx(value, rel=1e-9, abs=1e-8)
    assert value >= max(at(i / 200) for i in range(201)) - 1e-8 * abs(value)


@pytest.mark.parametrize("seed", range(5))
def test_coordinate_ascent_after_it_never_loses(seed: int) -> None:
    networks, _ = family(PLAIN, 5, noise=1.0, seed=seed)
    found = universe(PLAIN, networks)
    assert found.objective >= found.rounded - 1e-9 * abs(found.rounded)
    assert found.objective == pytest.approx(likeness(PLAIN, networks, found.orders), rel=1e-10)
    assert found.objective >= likeness(PLAIN, networks, [PLAIN.identity()] * 5)


@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_does_not_depend_on_the_order_of_networks(count: int) -> None:
    networks, _ = family(HEADS, count, noise=1.0)
    first = universe(HEADS, networks, starts=2, steps=5)
    middle = mean_of(HEADS, networks, first.orders)
    for places in ([1, 0, 2][:count], [count - 1, *range(count - 1)]):
        turned = [networks[i] for i in places]
        found = universe(HEADS, turned, starts=2, steps=5)
        assert found.objective == pytest.approx(first.objective, rel=1e-12)
        for place, orders in zip(places, found.orders, strict=True):
            assert all(torch.equal(order, first.orders[place][group]) for group, order in orders.items())
        for name, x in mean_of(HEADS, turned, found.orders).items():
            torch.testing.assert_close(x, middle[name], rtol=1e-12, atol=1e-12)


def test_one_network_has_no_common_order() -> None:
    networks, _ = family(PLAIN, 1, noise=0.0)
    with pytest.raises(ParameterError, match="1 network"):
        universe(PLAIN, networks)


def test_a_common_order_without_a_start_is_refused() -> None:
    networks, _ = family(PLAIN, 2, noise=0.0)
    with pytest.raises(ParameterError, match="starts is 0"):
        universe(PLAIN, networks, starts=0)
