"""Matching: what LAP and coordinate ascent find, against exhaustive search and loops."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from merganser.align.assignment import assign
from merganser.align.costs import Moments, Similarity, WeightCosts
from merganser.align.match import match
from merganser.symmetry import Group, Spec, symmetries
from merganser.symmetry.spec import Part

#: One hidden layer.
MLP = Spec({"h": Group(4)}, {"up": ("h", 3), "bias": ("h",), "down": (2, "h")}, {}, {})
#: Two heads of three units, of which queries and keys have one order and values another.
HEADS = Spec(
    {"heads": Group(2), "qk": Group(3, "heads"), "v": Group(3, "heads")},
    {
        "q": ({"product": ["heads", "qk"]}, 5),
        "k": ({"product": ["heads", "qk"]}, 5),
        "v": ({"product": ["heads", "v"]}, 5),
        "o": (5, {"product": ["heads", "v"]}),
        "table": (7, "heads"),
    },
    {},
    {},
)


def draw(spec: Spec, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in spec.shapes().items()}


def inner(spec: Spec, a: Mapping[str, Tensor], b: Mapping[str, Tensor], orders: Mapping[str, Tensor]) -> float:
    return float(sum((a[n] * spec.apply(orders, n, b[n])).sum() for n in a))


def every_order(spec: Spec) -> list[dict[str, Tensor]]:
    """All elements of the group."""
    choices = []
    for name, group in spec.groups.items():
        places = spec.places(name)
        rows = list(itertools.permutations(range(group.size)))
        count = 1 if len(places) == 1 else places[0]
        choices.append([torch.tensor(rows_).reshape(places) for rows_ in itertools.product(rows, repeat=count)])
    return [dict(zip(spec.groups, orders, strict=True)) for orders in itertools.product(*choices)]


@pytest.mark.parametrize("seed", range(5))
def test_one_group_gets_the_best_of_all_orders(seed: int) -> None:
    a, b = draw(MLP, seed), draw(MLP, seed + 100)
    found = match(MLP, WeightCosts(MLP, a, b))
    best = max(inner(MLP, a, b, orders) for orders in every_order(MLP))
    assert inner(MLP, a, b, found.orders) == pytest.approx(best, rel=1e-12)
    assert found.settled


@pytest.mark.parametrize("seed", range(3))
def test_heads_and_their_units_get_the_best_of_all_orders(seed: int) -> None:
    """2 x (3!)^2 x (3!)^2 = 2,592 orders; the heads of queries, keys, values and outputs are one choice."""
    a, b = draw(HEADS, seed), draw(HEADS, seed + 100)
    found = match(HEADS, WeightCosts(HEADS, a, b))
    best = max(inner(HEADS, a, b, orders) for orders in every_order(HEADS))
    assert inner(HEADS, a, b, found.orders) == pytest.approx(best, rel=1e-12)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_step_never_lowers_the_inner_product(seed: int) -> None:
    spec = Spec(
        {"x": Group(4), "y": Group(5), "z": Group(3)},
        {"xy": ("y", "x"), "yz": ("z", "y"), "zx": ("x", "z"), "in": ("x", 6), "out": (2, "z")},
        {},
        {},
    )
    a, b = draw(spec, seed), draw(spec, seed + 1)
    costs = WeightCosts(spec, a, b)
    orders: dict[str, Tensor] = spec.identity()
    value = costs.objective(orders)
    for sweep in range(4):
        orders = match(spec, costs, start=orders, sweeps=1, seed=sweep).orders
        after = costs.objective(orders)
        assert after >= value - 1e-9
        assert after == pytest.approx(inner(spec, a, b, orders), rel=1e-12)
        value = after


def test_a_start_at_the_answer_stays_there() -> None:
    a = draw(HEADS, 0)
    true = HEADS.random(torch.Generator().manual_seed(1))
    b = {n: HEADS.apply(true, n, x) for n, x in a.items()}
    undone = HEADS.inverse(true)
    found = match(HEADS, WeightCosts(HEADS, a, b), start=undone)
    assert found.sweeps == 1
    assert all(torch.equal(found.orders[n], undone[n]) for n in undone)


@pytest.mark.parametrize("kind", ["frobenius", "pearson"])
def test_units_are_compared_over_everything_that_touches_them(kind: Similarity) -> None:
    a, b = draw(MLP, 0), draw(MLP, 1)
    found = WeightCosts(MLP, a, b, kind).units("h", MLP.identity())
    for i in range(4):
        for j in range(4):
            x = torch.cat([a["up"][i], a["bias"][i : i + 1], a["down"][:, i]])
            y = torch.cat([b["up"][j], b["bias"][j : j + 1], b["down"][:, j]])
            expected = x @ y if kind == "frobenius" else torch.corrcoef(torch.stack([x, y]))[0, 1]
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-10)


def test_inner_units_are_compared_for_every_pair_of_places() -> None:
    """By loops, with the other inner group and the heads of b out of order."""
    a, b = draw(HEADS, 0), draw(HEADS, 1)
    orders = HEADS.random(torch.Generator().manual_seed(4))
    found = WeightCosts(HEADS, a, b).inner_units("qk", orders)
    for i, k, x, y in itertools.product(range(2), range(2), range(3), range(3)):
        expected = sum(float(a[n][3 * i + x] @ b[n][3 * k + y]) for n in ("q", "k"))
        assert float(found[i, k, x, y]) == pytest.approx(expected, rel=1e-10)


def test_a_unit_that_never_changes_is_like_no_other() -> None:
    cross = torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    flat = torch.tensor([4.0, 1.0], dtype=torch.float64)
    moments = Moments(cross, (flat, flat), (torch.tensor([8.0, 5.0]).double(), torch.tensor([8.0, 5.0]).double()), 2)
    found = moments.pearson()
    assert found[0].tolist() == found[:, 0].tolist() == [0.0, 0.0]
    assert torch.isfinite(found).all()


@given(st.integers(1, 7), st.integers(0, 10_000))
def test_an_assignment_is_the_best_permutation(n: int, seed: int) -> None:
    similarity = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = assign(similarity)
    assert sorted(found.tolist()) == list(range(n))
    value = float(similarity[torch.arange(n), found].sum())
    best = max(sum(float(similarity[i, p[i]]) for i in range(n)) for p in itertools.permutations(range(n)))
    assert value == pytest.approx(best, abs=1e-9)


def test_matched_attention_is_the_same_network() -> None:
    """The published handling gives queries and values heads of their own, and changes the output."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0), nn.Linear(12, 4)
    ).eval()
    x = torch.randn(2, 5, 12)
    spec = symmetries(network, (x,)).spec
    a = {n: t.detach().double() for n, t in network.state_dict().items()}
    moved = spec.random(torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    b = {
        n: spec.apply(moved, n, t + 0.05 * torch.randn(t.shape, generator=noise, dtype=torch.float64))
        for n, t in a.items()
    }
    found = match(spec, WeightCosts(spec, a, b))
    back = {n: spec.apply(found.orders, n, t) for n, t in b.items()}
    network.double()
    one, two = (torch.func.functional_call(network, t, (x.double(),)) for t in (b, back))
    assert float((one - two).abs().max()) < 1e-12
    undone = spec.inverse(moved)
    assert all(torch.equal(found.orders[n], undone[n]) for n in undone)


class Counting:
    """Costs that count how often they are asked for."""

    def __init__(self, costs: WeightCosts) -> None:
        self.costs, self.asked = costs, list[str]()

    def units(self, group: str, orders: Mapping[str, Tensor]) -> Tensor:
        self.asked.append(group)
        return self.costs.units(group, orders)

    def inner_units(self, group: str, orders: Mapping[str, Tensor]) -> Tensor:
        return self.costs.inner_units(group, orders)

    def meetings(self) -> Iterable[Sequence[Part]]:
        return self.costs.meetings()


def layers(count: int) -> tuple[Spec, dict[str, Tensor], dict[str, Tensor]]:
    """Two random networks of that many hidden layers of seven units."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(*[nn.Linear(7, 7) for _ in range(count + 1)]))
    a, b = ({n: x.detach() for n, x in net.state_dict().items()} for net in nets)
    return symmetries(nets[0], (torch.randn(2, 7),)).spec, a, b


@pytest.mark.parametrize("seed", range(4))
def test_it_ends_where_no_group_has_a_better_order(seed: int) -> None:
    spec, a, b = layers(6)
    costs = WeightCosts(spec, a, b)
    found = match(spec, costs, seed=seed)
    assert found.settled
    for group in spec.groups:
        similarity, order = costs.units(group, found.orders), found.orders[group]
        best = similarity.gather(1, assign(similarity)[:, None]).sum()
        assert float(similarity.gather(1, order[:, None]).sum()) == pytest.approx(float(best), rel=1e-11)


def test_groups_whose_neighbours_stayed_are_not_looked_at_again() -> None:
    spec, a, b = layers(6)
    costs = Counting(WeightCosts(spec, a, b))
    found = match(spec, costs, start=match(spec, costs).orders)
    assert found.sweeps == 1
    costs.asked.clear()
    settled = match(spec, costs)
    assert len(costs.asked) < settled.sweeps * len(spec.groups)
    costs.asked.clear()
    match(spec, costs, start=settled.orders)
    assert sorted(costs.asked) == sorted(spec.groups)


def test_running_statistics_are_no_weights() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    spec = symmetries(one, (torch.randn(3, 4),)).spec
    a = {n: x.detach().clone() for n, x in one.state_dict().items()}
    order = torch.randperm(8)
    b = {n: x[:, order] if n == "3.weight" else x[order] if x.shape[:1] == (8,) else x for n, x in a.items()}
    b |= {"1.running_var": 1e6 * torch.rand(8), "1.running_mean": 1e6 * torch.rand(8)}
    a |= {"1.running_var": 1e6 * torch.rand(8)}
    for kind in ("frobenius", "pearson"):
        found = match(spec, WeightCosts(spec, a, b, kind)).orders
        assert torch.equal(spec.apply(found, "0.weight", b["0.weight"]), a["0.weight"])
