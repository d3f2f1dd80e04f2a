"""A spec as data: applying, composing, undoing orders, and its text."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Group, Spec

#: Heads with two kinds of units of their own, as in fused attention; a stream; a grouped convolution.
SPEC = Spec(
    groups={
        "stream": Group(4),
        "heads": Group(3),
        "qk": Group(2, "heads"),
        "v": Group(5, "heads"),
    },
    axes={
        "qkv": (
            {"sum": [{"product": ["heads", "qk"]}, {"product": ["heads", "qk"]}, {"product": ["heads", "v"]}]},
            "stream",
        ),
        "out": ("stream", {"product": ["heads", "v"]}),
        "partly": ({"product": ["heads", {"sum": [2, "qk"]}]},),
        "grouped": ({"product": ["heads", "v"]}, "qk", 3),
        "turned": ("qk", 3, {"product": ["heads", "v"]}),
    },
    roles={},
    pinned={},
)


def tensors() -> dict[str, Tensor]:
    return {
        name: torch.arange(float(torch.tensor(shape).prod())).reshape(shape) for name, shape in SPEC.shapes().items()
    }


def by_loops(name: str, x: Tensor, orders: Mapping[str, Tensor]) -> Tensor:
    """Entry by entry, from what the words of the spec mean."""
    heads, qk, v, stream = (orders[n].tolist() for n in ("heads", "qk", "v", "stream"))
    y = torch.empty_like(x)
    if name == "qkv":
        for h in range(3):
            for s in range(4):
                for d in range(2):
                    y[2 * h + d, s] = x[2 * heads[h] + qk[h][d], stream[s]]
                    y[6 + 2 * h + d, s] = x[6 + 2 * heads[h] + qk[h][d], stream[s]]
                for d in range(5):
                    y[12 + 5 * h + d, s] = x[12 + 5 * heads[h] + v[h][d], stream[s]]
    if name == "out":
        for s in range(4):
            for h in range(3):
                for d in range(5):
                    y[s, 5 * h + d] = x[stream[s], 5 * heads[h] + v[h][d]]
    if name == "partly":
        for h in range(3):
            for d in range(2):
                y[4 * h + d] = x[4 * heads[h] + d]
                y[4 * h + 2 + d] = x[4 * heads[h] + 2 + qk[h][d]]
    for h in range(3):
        for d in range(5):
            for e in range(2):
                if name == "grouped":
                    y[5 * h + d, e] = x[5 * heads[h] + v[h][d], qk[h][e]]
                if name == "turned":
                    y[e, :, 5 * h + d] = x[qk[h][e], :, 5 * heads[h] + v[h][d]]
    return y


@given(st.integers(0, 10_000))
def test_applying_an_order_is_what_the_words_mean(seed: int) -> None:
    orders = SPEC.random(torch.Generator().manual_seed(seed))
    for name, x in tensors().items():
        assert torch.equal(SPEC.apply(orders, name, x), by_loops(name, x, orders)), name


@given(st.integers(0, 10_000))
def test_two_orders_one_after_the_other_are_their_composition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two = SPEC.random(generator), SPEC.random(generator)
    for name, x in tensors().items():
        both = SPEC.apply(two, name, SPEC.apply(one, name, x))
        assert torch.equal(both, SPEC.apply(SPEC.compose(one, two), name, x)), name


@given(st.integers(0, 10_000))
def test_an_inverse_undoes_its_order(seed: int) -> None:
    orders = SPEC.random(torch.Generator().manual_seed(seed))
    for name, x in tensors().items():
        assert torch.equal(SPEC.apply(SPEC.inverse(orders), name, SPEC.apply(orders, name, x)), x), name


def test_a_random_order_of_some_groups_leaves_the_others() -> None:
    orders = SPEC.random(torch.Generator().manual_seed(0), only=["stream"])
    assert torch.equal(orders["heads"], torch.arange(3))
    assert not torch.equal(orders["stream"], torch.arange(4))


def test_members_are_the_tensors_and_axes_that_a_group_moves() -> None:
    assert SPEC.members("qk") == [("qkv", 0), ("partly", 0), ("grouped", 1), ("turned", 0)]


def test_a_spec_goes_through_its_text() -> None:
    assert Spec.from_json(SPEC.to_json()) == SPEC


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("merganser_symmetry"),
        lambda c: c.update(merganser_symmetry=2),
        lambda c: c.pop("groups"),
        lambda c: c["groups"].update(bad={"size": 0}),
        lambda c: c["groups"].update(bad={"size": 2, "within": "nowhere"}),
        lambda c: c["axes"].update(x=["nowhere"]),
        lambda c: c["axes"].update(x=[{"mean": [1]}]),
        lambda c: c["axes"].update(x=[{"sum": [1], "product": [2]}]),
        lambda c: c["axes"].update(x=[True]),
        lambda c: c["axes"].update(x=[1.5]),
        lambda c: c.update(roles=3),
    ],
)
def test_text_that_means_nothing_is_refused(change) -> None:
    content = json.loads(SPEC.to_json())
    change(content)
    with pytest.raises(ParameterError):
        Spec.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"merganser_symmetry": 1}'])
def test_text_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ParameterError):
        Spec.from_json(text)


def test_tensors_of_another_network_are_refused_by_name() -> None:
    shapes = {name: tuple(x.shape) for name, x in tensors().items()}
    SPEC.check(shapes, ref="a")
    with pytest.raises(ShapeError, match=r"out of a is \(4, 16\).*\(4, 15\)"):
        SPEC.check(shapes | {"out": (4, 16)}, ref="a")
