"""Axis algebra: what equal axes are cut into, and what is pinned rather than guessed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.symmetry.axes import ONE, Atoms, Family, NestingError, Product, Sum


def test_equal_atoms_become_one() -> None:
    atoms = Atoms()
    a, b, c = (atoms.new(6) for _ in range(3))
    atoms.unify(a, b, "x")
    atoms.unify(c, b, "x")
    assert atoms.canonical(a) == atoms.canonical(b) == atoms.canonical(c)
    assert not atoms.pinned(a)


def test_a_pin_reaches_everything_that_is_equal_and_says_why() -> None:
    atoms = Atoms()
    a, b, fixed = atoms.new(6), atoms.new(6), atoms.new(6, pinned="an output")
    atoms.unify(a, b, "add")
    atoms.unify(b, fixed, "mul in layer 3")
    assert atoms.pinned(a)
    assert atoms.pins[atoms.canonical(a)] == "mul in layer 3, with an output"  # type: ignore[index]


def test_an_axis_of_one_unit_is_no_atom() -> None:
    atoms = Atoms()
    assert atoms.new(1) == ONE
    assert atoms.canonical(Product((ONE, atoms.new(3)))) == 0


def test_products_are_made_equal_factor_by_factor() -> None:
    """Heads x units against an axis that is split further: 12 = 4 x 3 = 2 x 2 x 3."""
    atoms = Atoms()
    heads, units = atoms.new(4), atoms.new(3)
    a, b, c = atoms.new(2), atoms.new(2), atoms.new(3)
    atoms.unify(Product((heads, units)), Product((a, b, c)), "x")
    assert atoms.canonical(heads) == atoms.canonical(Product((a, b)))
    assert atoms.canonical(units) == atoms.canonical(c)


def test_factors_that_do_not_nest_are_pinned() -> None:
    atoms = Atoms()
    a, b = Product((atoms.new(2), atoms.new(3))), Product((atoms.new(3), atoms.new(2)))
    atoms.unify(a, b, "reshape")
    assert atoms.pinned(a)
    assert atoms.pinned(b)


def test_sums_are_cut_at_each_others_boundaries() -> None:
    """Segments of 2 + 5 against 4 + 3 make 2 + 2 + 3."""
    atoms = Atoms()
    a, b, c, d = (atoms.new(n) for n in (2, 5, 4, 3))
    atoms.unify(Sum((a, b)), Sum((c, d)), "cat")
    pieces = atoms.canonical(Sum((a, b)))
    assert isinstance(pieces, Sum)
    assert [atoms.size(p) for p in pieces.parts] == [2, 2, 3]
    assert pieces == atoms.canonical(Sum((c, d)))
    assert atoms.canonical(a) == pieces.parts[0]
    assert atoms.canonical(d) == pieces.parts[2]


def test_a_concatenation_times_places_is_a_concatenation_of_products() -> None:
    """What flatten does to a concatenation of channels."""
    atoms = Atoms()
    a, b, place = atoms.new(2), atoms.new(3), atoms.new(4, pinned="a place")
    flat, wide = Product((Sum((a, b)), place)), atoms.new(20)
    atoms.unify(wide, flat, "linear")
    assert atoms.canonical(wide) == Sum((Product((a, place)), Product((b, place))))


def test_an_axis_that_would_hold_itself_is_pinned() -> None:
    atoms = Atoms()
    a = atoms.new(4)
    x, y = atoms.split(a, 2)
    atoms.unify(x, y, "square")
    again = atoms.new(4)
    atoms.unify(again, Product((x, y)), "x")
    one, two = atoms.cut(again, [2])
    assert atoms.size(one) == atoms.size(two) == 2


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_a_split_of_a_product_finds_its_factors(p: int, q: int, r: int) -> None:
    atoms = Atoms()
    parts = tuple(atoms.new(n) for n in (p, q, r))
    outer, inner = atoms.split(Product(parts), p * q)
    assert atoms.canonical(outer) == atoms.canonical(Product(parts[:2]))
    assert atoms.canonical(inner) == atoms.canonical(parts[2])


def test_a_cut_inside_an_inner_factor_is_refused_and_pins_nothing() -> None:
    atoms = Atoms()
    axis = Product((atoms.new(3), atoms.new(4)))
    with pytest.raises(NestingError):
        atoms.cut(axis, [6])
    assert not atoms.pins
    head, tail = atoms.cut(axis, [8])
    assert (atoms.size(head), atoms.size(tail)) == (8, 4)


def test_places_of_a_stacked_projection_are_told_apart() -> None:
    """3 x 5 units, looked at place by place: every place has units of its own, and the whole is their sum."""
    atoms = Atoms()
    whole = atoms.new(15)
    stacked, units = atoms.split(whole, 3)
    assert isinstance(stacked, int)
    atoms.families(stacked, [units])
    q, k, v = (atoms.at(units, stacked, place) for place in range(3))
    assert len({q, k, v}) == 3
    assert atoms.canonical(whole) == Sum((q, k, v))
    atoms.unify(q, k, "bmm")
    assert atoms.canonical(whole) == Sum((k, k, v)) or atoms.canonical(whole) == Sum((q, q, v))


def test_collapsed_copies_are_one() -> None:
    atoms = Atoms()
    stacked, units = atoms.split(atoms.new(15), 3)
    assert isinstance(stacked, int)
    atoms.families(stacked, [units])
    assert isinstance(atoms.canonical(units), Family)
    atoms.unify(units, other := atoms.new(5), "add")
    atoms.collapse(stacked)
    assert len({atoms.canonical(atoms.at(units, stacked, place)) for place in range(3)} | {atoms.canonical(other)}) == 1
