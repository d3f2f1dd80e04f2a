"""Similarities that follow the orders, against those that are computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits
from torch import Tensor

from merganser.align import follow
from merganser.align.activations import ActivationCosts, Shown
from merganser.align.costs import DualCosts, Similarity, WeightCosts
from merganser.align.follow import FollowingCosts, following
from merganser.align.match import match
from merganser.symmetry import Group, Spec
from merganser.symmetry.spec import Part

#: Convolutions, places that no group moves, two groups along one axis, a group along two, heads.
MIXED = Spec(
    {"x": Group(6), "y": Group(5), "z": Group(4), "t": Group(3), "heads": Group(2), "d": Group(3, "heads")},
    {
        "stem": ("x", 3, 2, 2),
        "conv": ("y", "x", 3, 3),
        "scale": ("x",),
        "joined": ("z", {"sum": ["x", 2, "y"]}),
        "whole": ({"product": [2, "x"]}, "y"),
        "out": (3, "z"),
        "square": ("t", "t"),
        "t in": ("t", "z"),
        "q": ({"product": ["heads", "d"]}, "x"),
        "o": (2, {"product": ["heads", "d"]}),
    },
    {},
    {},
)
CHAIN = Spec(
    {"x": Group(9), "y": Group(8), "z": Group(7), "r": Group(6)},
    {
        "in": ("x", 4),
        "xy": ("y", "x", 3),
        "yz": ("z", "y"),
        "zx": ("x", "z"),
        "b": ("y",),
        "xr": ("r", "x"),
        "o": (3, "r"),
    },
    {},
    {},
)


def draw(spec: Spec, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in spec.shapes().items()}


def pair(spec: Spec, seed: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return draw(spec, seed, dtype), draw(spec, seed + 1000, dtype)


@dataclass
class Anew:
    """The same costs, which matching cannot look into."""

    costs: WeightCosts

    def units(self, group: str, orders: Mapping[str, Tensor]) -> Tensor:
        return self.costs.units(group, orders)

    def inner_units(self, group: str, orders: Mapping[str, Tensor]) -> Tensor:
        return self.costs.inner_units(group, orders)

    def meetings(self) -> Iterable[Sequence[Part]]:
        return self.costs.meetings()


def stepped(spec: Spec, orders: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Some groups in another order, all of their units or two of them."""
    new = dict(orders)
    for name in spec.groups:
        how = int(torch.randint(3, (), generator=generator))
        if how == 1:
            new[name] = spec.random(generator, [name])[name]
        elif how == 2:
            new[name] = orders[name].clone()
            i, j = torch.randperm(new[name].shape[-1], generator=generator)[:2].tolist()
            new[name][..., [i, j]] = orders[name][..., [j, i]]
    return new


@pytest.mark.parametrize("kind", ["frobenius", "pearson"])
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000))
def test_they_are_the_same_after_any_steps(kind: Similarity, seed: int) -> None:
    a, b = pair(MIXED, seed)
    plain = WeightCosts(MIXED, a, b, kind)
    kept = following(plain)
    assert isinstance(kept, FollowingCosts)
    assert list(kept._kept) == ["x", "y", "z"]  # t lies along two axes, and heads hold an order each
    generator = torch.Generator().manual_seed(seed)
    orders = MIXED.identity()
    for _ in range(4):
        for group in ("x", "y", "z", "t", "heads"):
            torch.testing.assert_close(kept.units(group, orders), plain.units(group, orders), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(kept.inner_units("d", orders), plain.inner_units("d", orders))
        orders = stepped(MIXED, orders, generator)


def test_they_are_sums_over_everything_that_touches_the_units() -> None:
    """By loops, after two steps."""
    a, b = pair(CHAIN, 0, torch.float32)
    kept = following(WeightCosts(CHAIN, a, b))
    generator = torch.Generator().manual_seed(0)
    orders = CHAIN.identity()
    for _ in range(3):
        found = kept.units("y", orders)
        orders = stepped(CHAIN, orders, generator)
    found = kept.units("y", orders)
    x, z = orders["x"].tolist(), orders["z"].tolist()
    for i in range(8):
        for j in range(8):
            expected = float(a["b"][i].double() * b["b"][j].double())
            expected += sum(float(a["xy"][i, k].double() @ b["xy"][j, x[k]].double()) for k in range(9))
            expected += sum(float(a["yz"][k, i].double() * b["yz"][z[k], j].double()) for k in range(7))
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_only_what_moved_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(CHAIN, 0)
    kept = following(WeightCosts(CHAIN, a, b))
    orders = CHAIN.identity()
    entries = list[int]()
    real = follow.products
    monkeypatch.setattr(follow, "products", lambda x, y: entries.append(x.shape[1]) or real(x, y))
    kept.units("y", orders)
    assert sorted(entries) == [1, 7, 27]  # the bias, all of z, all of x with three taps each
    entries.clear()
    kept.units("y", orders | {"y": orders["y"].flip(0)})  # its own order moves none of what it is compared by
    assert entries == []
    moved = orders["x"].clone()
    moved[[2, 5]] = moved[[5, 2]]
    kept.units("y", orders | {"x": moved})
    assert entries == [2 * 3]


def test_groups_that_are_crossed_along_one_axis_are_compared_anew() -> None:
    """Where one of them moves, so do the places of the other."""
    spec = Spec(
        {"row": Group(4), "column": Group(3)},
        {"rows": ("row", 2), "columns": ("column", 2), "last": (2, {"product": ["row", "column"]})},
        {},
        {},
    )
    plain = WeightCosts(spec, *pair(spec, 0))
    kept = following(plain)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        orders = spec.random(generator)
        for group in spec.groups:
            torch.testing.assert_close(kept.units(group, orders), plain.units(group, orders), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["frobenius", "pearson"])
def test_blocks_are_the_whole(kind: Similarity, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = WeightCosts(MIXED, *pair(MIXED, 0), kind)
    monkeypatch.setattr(follow, "BLOCK", 60)  # conv, of 5 x 6 x 9 entries, by one place at a time
    kept = following(plain)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        orders = MIXED.random(generator)
        for group in ("x", "y", "z"):
            torch.testing.assert_close(kept.units(group, orders), plain.units(group, orders), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(["float32", "float64"]), st.sampled_from(["frobenius", "pearson"]))
def test_matching_takes_every_step_as_if_they_were_computed_anew(seed: int, dtype: str, kind: Similarity) -> None:
    # to costs that it cannot look into, a group along two axes is linear, as it is to Pearson's
    spec = MIXED if kind == "pearson" else CHAIN
    costs = WeightCosts(spec, *pair(spec, seed, getattr(torch, dtype)), kind)
    found, expected = match(spec, costs, seed=seed, sweeps=12), match(spec, Anew(costs), seed=seed, sweeps=12)
    assert found.sweeps == expected.sweeps
    assert all(torch.equal(found.orders[n], expected.orders[n]) for n in spec.groups)


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_at_a_fixed_point_of_float64(seed: int) -> None:
    """Float32 weights; similarities by einsum on whole float64 tensors, assignments by scipy alone."""
    a, b = pair(CHAIN, seed, torch.float32)
    found = match(CHAIN, WeightCosts(CHAIN, a, b), seed=seed)
    assert found.settled
    for group in CHAIN.groups:
        held = {**found.orders, group: torch.arange(CHAIN.groups[group].size)}
        similarity = torch.zeros(CHAIN.groups[group].size, CHAIN.groups[group].size, dtype=torch.float64)
        for name, axis in CHAIN.members(group):
            x, y = (t.double().movedim(axis, 0) for t in (a[name], CHAIN.apply(held, name, b[name])))
            similarity += torch.einsum("ie,je->ij", x.reshape(len(x), -1), y.reshape(len(y), -1))
        rows, best = linear_sum_assignment(similarity.numpy(), maximize=True)
        now = float(similarity[rows, found.orders[group]].sum())
        assert now == pytest.approx(float(similarity[rows, best].sum()), rel=1e-12)


def test_a_large_term_that_came_and_went_leaves_no_rounding_behind() -> None:
    """1e9 against 1e9 leaves 1e2 of rounding in what is near 1 otherwise."""
    spec = Spec({"h": Group(4), "m": Group(3)}, {"w": ("h", "m"), "up": ("m", 2)}, {}, {})
    a, b = pair(spec, 0)
    a["w"][:, 0] = 1e9 * (1 + torch.rand(4, dtype=torch.float64))
    b["w"][:, 1] = 1e9 * (1 + torch.rand(4, dtype=torch.float64))
    a["w"][:, 1:], b["w"][:, [0, 2]] = 1e-9, 1e-9
    kept = following(plain := WeightCosts(spec, a, b))
    apart, met = spec.identity(), {**spec.identity(), "m": torch.tensor([1, 0, 2])}
    for orders in (apart, met, apart):
        found = kept.units("h", orders)
    torch.testing.assert_close(found, plain.units("h", apart), rtol=1e-12, atol=0)


def test_groups_that_there_is_no_room_for_are_compared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = WeightCosts(CHAIN, *pair(CHAIN, 0))
    expected = match(CHAIN, costs).orders
    monkeypatch.setattr(follow, "KEPT_BYTES", 8 * 8**2)
    kept = following(costs)
    assert isinstance(kept, FollowingCosts)
    assert list(kept._kept) == ["y"]  # x is too large, and z no longer fits
    found = match(CHAIN, kept).orders
    assert all(torch.equal(found[n], expected[n]) for n in found)


def test_weights_are_followed_beside_activations_too() -> None:
    weights = WeightCosts(CHAIN, *pair(CHAIN, 0), "pearson")
    activations = ActivationCosts(CHAIN, {"x": [Shown("x", torch.eye(9).double())]}, weights)
    dual = following(DualCosts(weights, activations, 0.5))
    alone = following(activations)
    assert isinstance(dual, DualCosts)
    assert isinstance(alone, ActivationCosts)
    assert isinstance(dual.weights, FollowingCosts)
    assert isinstance(alone.weights, FollowingCosts)
    assert type(weights) is WeightCosts


def test_threads_change_no_order() -> None:
    spec = Spec(
        {"x": Group(160), "y": Group(150), "z": Group(140)},
        {"in": ("x", 40), "xy": ("y", "x", 3), "yz": ("z", "y", 3), "zx": ("x", "z"), "out": (30, "z")},
        {},
        {},
    )
    costs = WeightCosts(spec, *pair(spec, 0, torch.float32))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            found.append(match(spec, costs))
    torch.set_num_threads(before)
    assert found[0].sweeps == found[1].sweeps
    assert all(torch.equal(found[0].orders[n], found[1].orders[n]) for n in spec.groups)
