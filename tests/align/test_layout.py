"""Where units of two networks stand, and what each entry of the wider tensor is: against loops over entries."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merganser.align.layout import Side, Split, places, widened, wider_spec
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Group, Spec

GROUPS = {"g": Group(4), "h": Group(3), "i": Group(2, within="h"), "held": Group(2, fixed=True)}
#: Share of A's entry and of B's: row, then column, each of A's, merged, or of B's.
SHARES = {
    ("A", "A"): (1.0, 0.0),
    ("A", "m"): (1.0, 0.0),
    ("A", "B"): (0.0, 0.0),
    ("m", "A"): (0.5, 0.0),
    ("m", "m"): (0.5, 0.5),
    ("m", "B"): (0.0, 0.5),
    ("B", "A"): (0.0, 0.0),
    ("B", "m"): (0.0, 1.0),
    ("B", "B"): (0.0, 1.0),
}
LETTER = {Side.FIRST: "A", Side.BOTH: "m", Side.SECOND: "B"}


def spec(axes: dict[str, tuple[Any, ...]], roles: dict[str, tuple[str | None, ...]]) -> Spec:
    return Spec(GROUPS, axes, roles, {})


def listed(part: Any, splits: dict[str, Split]) -> list[tuple[int, str]]:
    """For every new place the old one and whose it is, by loops."""
    if isinstance(part, int):
        return [(i, "m") for i in range(part)]
    if isinstance(part, str):
        size = GROUPS[part].size
        apart = splits[part].apart if part in splits else ()
        merged = [i for i in range(size) if i not in apart]
        return [(i, "A") for i in apart] + [(i, "m") for i in merged] + [(i, "B") for i in apart]
    ((kind, parts),) = part.items()
    if kind == "sum":
        found, start = [], 0
        for p in parts:
            found += [(start + i, side) for i, side in listed(p, splits)]
            start += len(listed(p, {}))
        return found
    sizes = [len(listed(p, {})) for p in parts]
    found = []
    for combination in itertools.product(*(listed(p, splits) for p in parts)):
        place = 0
        for (i, _), size in zip(combination, sizes, strict=True):
            place = place * size + i
        sides = {side for _, side in combination} - {"m"}
        assert len(sides) <= 1
        found.append((place, sides.pop() if sides else "m"))
    return found


def entries(a: Tensor, b: Tensor, rows: list[tuple[int, str]], columns: list[tuple[int, str]]) -> Tensor:
    """A matrix of rows and columns, entry by entry."""
    made = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for (i, (row, r)), (j, (column, c)) in itertools.product(enumerate(rows), enumerate(columns)):
        of_a, of_b = SHARES[r, c]
        made[i, j] = of_a * a[row, column].item() + of_b * b[row, column].item()
    return made


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


SPLIT = {"g": Split(4, (1, 3)), "h": Split(3, (0,))}


def test_a_group_is_laid_out_as_ones_own_then_merged_then_the_others() -> None:
    found = places(spec({}, {}), "g", SPLIT)
    assert found.index.tolist() == [1, 3, 0, 2, 1, 3]
    assert found.side.tolist() == [1, 1, 0, 0, 2, 2]
    assert found.runs() == [(Side.FIRST, 2), (Side.BOTH, 2), (Side.SECOND, 2)]


PARTS = st.recursive(
    st.one_of(st.integers(1, 3), st.sampled_from(["g", "h"])),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"sum": parts}),
        st.tuples(st.integers(1, 3), inner, st.integers(1, 2)).map(lambda parts: {"product": list(parts)}),
        st.tuples(inner, st.integers(1, 3)).map(lambda parts: {"product": list(parts)}),
    ),
    max_leaves=5,
)


@given(part=PARTS, g=st.sets(st.integers(0, 3)), h=st.sets(st.integers(0, 2)))
def test_places_of_sums_and_products_are_those_of_loops(part: Any, g: set[int], h: set[int]) -> None:
    splits = {"g": Split(4, tuple(sorted(g))), "h": Split(3, tuple(sorted(h)))}
    found = places(spec({}, {}), part, splits)
    sides = [LETTER[Side(side)] for side in found.side.tolist()]
    assert list(zip(found.index.tolist(), sides, strict=True)) == listed(part, splits)
    assert len(found) == wider_spec(spec({}, {}), splits).size(part)


@given(g=st.sets(st.integers(0, 3)), h=st.sets(st.integers(0, 2)))
def test_a_weight_of_two_groups_is_that_of_loops(g: set[int], h: set[int]) -> None:
    splits = {"g": Split(4, tuple(sorted(g))), "h": Split(3, tuple(sorted(h)))}
    a, b = pair(3, 4)
    it = spec({"w": ("h", "g")}, {"w": ("producer", "consumer")})
    expected = entries(a, b, listed("h", splits), listed("g", splits))
    assert torch.equal(widened(it, "w", a, b, splits), expected)
    turned = spec({"w": ("g", "h")}, {"w": ("consumer", "producer")})
    assert torch.equal(widened(turned, "w", a.T, b.T, splits), expected.T)


def test_kernels_have_a_block_a_place() -> None:
    a, b = pair(3, 4, 2, 2)
    it = spec({"w": ("h", "g", 2, 2)}, {"w": ("producer", "consumer", None, None)})
    found = widened(it, "w", a, b, SPLIT)
    for y, x in itertools.product(range(2), repeat=2):
        expected = entries(a[..., y, x], b[..., y, x], listed("h", SPLIT), listed("g", SPLIT))
        assert torch.equal(found[..., y, x], expected)


@pytest.mark.parametrize("role", ["producer", "additive", "scale"])
def test_what_makes_units_is_averaged_where_they_are_merged(role: str) -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
    found = widened(spec({"x": ("g",)}, {"x": (role,)}), "x", a, b, SPLIT)
    assert found.tolist() == [2.0, 4.0, 5.5, 16.5, 20.0, 40.0]
    assert found.dtype == torch.float32


def test_rows_that_no_group_splits_read_half_of_each_networks_own() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    found = widened(spec({"x": (1, "g")}, {"x": ("producer", "consumer")}), "x", a, b, SPLIT)
    assert found.tolist() == [[1.0, 2.0, 5.5, 16.5, 10.0, 20.0]]


def test_units_of_inner_groups_go_with_their_outer_one() -> None:
    it = spec({"x": ({"product": ["h", "i"]},)}, {"x": ("producer",)})
    found = widened(it, "x", torch.arange(6.0), 10 * torch.arange(6.0), {"h": Split(3, (1,))})
    assert found.tolist() == [2.0, 3.0, 0.0, 5.5, 22.0, 27.5, 20.0, 30.0]


def test_tensors_of_no_split_group_are_averaged() -> None:
    a, b = pair(4, 3)
    it = spec({"x": ("g", "h")}, {"x": ("producer", "consumer")})
    assert torch.equal(widened(it, "x", a, b, {}), (a + b) / 2)
    assert torch.equal(widened(it, "x", a, b, {"g": Split(4)}), (a + b) / 2)
    assert torch.equal(widened(it, "of no axes", a, b, SPLIT), (a + b) / 2)


def test_integers_are_the_first_networks_and_the_seconds_in_its_own_places() -> None:
    a, b = torch.tensor([1, 2, 3, 4]), torch.tensor([10, 20, 30, 40])
    found = widened(spec({"x": ("g",)}, {"x": ("scale",)}), "x", a, b, SPLIT)
    assert found.tolist() == [2, 4, 1, 3, 20, 40]
    assert widened(spec({"n": ()}, {"n": ()}), "n", torch.tensor(3), torch.tensor(7), SPLIT).item() == 3


def test_a_head_that_is_apart_gives_the_outputs_of_both() -> None:
    it = spec(
        {"head.weight": (2, "g"), "head.bias": (2,), "other.bias": (2,)},
        {"head.weight": ("producer", "consumer"), "head.bias": ("additive",), "other.bias": ("additive",)},
    )
    (a, _), (_, b) = pair(2, 4), pair(3, 4)
    rows = [(0, "A"), (1, "A"), (0, "B"), (1, "B"), (2, "B")]
    found = widened(it, "head.weight", a, b, SPLIT, ["head"])
    expected = [[entries(x, x, [row], listed("g", SPLIT))] for row, x in zip(rows, (a, a, b, b, b), strict=True)]
    assert torch.equal(found, torch.cat([x for (x,) in expected]))
    bias = widened(it, "head.bias", torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0]), SPLIT, ["head"])
    assert bias.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert widened(it, "other.bias", torch.ones(2), torch.zeros(2), SPLIT, ["head"]).tolist() == [0.5, 0.5]


def test_the_mean_of_large_float16_entries_does_not_overflow() -> None:
    x = torch.full((4,), 60000.0, dtype=torch.float16)
    assert widened(spec({"x": ("g",)}, {"x": ("scale",)}), "x", x, x, {}).tolist() == [60000.0] * 4


def test_the_wider_symmetries_have_the_shapes_of_wider_tensors() -> None:
    it = spec({"x": ({"product": ["h", 2]}, "g")}, {"x": ("producer", "consumer")})
    a, b = pair(6, 4)
    assert wider_spec(it, SPLIT).shapes()["x"] == tuple(widened(it, "x", a, b, SPLIT).shape) == (8, 6)


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"nobody": Split(4, (0,))}, "nobody is no group"),
        ({"held": Split(2, (0,))}, "held is no group of units that may move"),
        ({"i": Split(2, (0,))}, "i lies within h"),
        ({"g": Split(3, (0,))}, "g has 4 units, and its split is one of 3"),
    ],
)
def test_splits_that_the_symmetries_do_not_know_are_refused(splits: dict[str, Split], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        wider_spec(spec({}, {}), splits)


@pytest.mark.parametrize("apart", [(4,), (-1,), (2, 1), (1, 1)])
def test_units_that_are_not_there_or_do_not_ascend_are_refused(apart: tuple[int, ...]) -> None:
    with pytest.raises(ParameterError, match="units"):
        Split(4, apart)


@pytest.mark.parametrize(
    ("axes", "roles", "words"),
    [
        (({"product": ["g", "h"]},), ("producer",), "g and h are both split"),
        (({"product": ["g", "g"]},), ("producer",), "g are both split"),
        (("g",), (None,), "what axis 0 of x does is unknown"),
        (("g", "h"), ("additive", "producer"), "two axes of x that do the same are split"),
        (("g", "h"), ("consumer", "consumer"), "two axes of x that do the same are split"),
    ],
)
def test_tensors_that_have_no_layout_are_refused(axes: Any, roles: Any, words: str) -> None:
    it = spec({"x": axes}, {"x": roles})
    shape = it.shapes()["x"]
    with pytest.raises(ParameterError, match=words):
        widened(it, "x", torch.zeros(shape), torch.zeros(shape), SPLIT)


def test_tensors_of_another_network_are_refused() -> None:
    it = spec({"x": ("g",), "head.bias": ("h",)}, {"x": ("scale",), "head.bias": ("additive",)})
    with pytest.raises(ShapeError, match=r"x of network B is \(3,\), and the symmetries say \(4,\)"):
        widened(it, "x", torch.zeros(4), torch.zeros(3), SPLIT)
    with pytest.raises(ParameterError, match=r"head\.bias makes no outputs"):
        widened(it, "head.bias", torch.zeros(3), torch.zeros(3), SPLIT, ["head"])
