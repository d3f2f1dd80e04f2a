"""Axis algebra: what every axis of every tensor of a network is made of.

An axis is an expression over atoms. An atom is a set of units that a network may hold in any order; equal atoms must be
held in the same order. Reshapes factor axes, concatenations add them, operations that pair two axes make them equal:

    atom                 units in any order, or pinned ones in a fixed order
    product (a, b, ...)  row-major: the units of b within each unit of a, as in heads x units of a head
    sum (a, b, ...)      one after the other, as in a fused projection or a concatenation
    family (i; a, b ..)  a where the axis of atom i is at 0, b where it is at 1, ...: what a stacked projection holds

Two expressions are made equal by cutting both at each other's boundaries. Where boundaries do not nest, everything
involved is pinned: that loses a symmetry, and never invents one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class Product:
    """Factors, outermost first."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class Sum:
    """Segments, in order."""

    parts: tuple[Axis, ...]


@dataclass(frozen=True)
class Family:
    """One expression for each place along the axis of an atom of the same tensor."""

    index: int
    parts: tuple[Axis, ...]


#: An atom's number, or an expression. The axis of one unit is the empty product.
Axis = int | Product | Sum | Family
ONE = Product(())


@dataclass
class Atoms:
    """All atoms of a network, and what is known of them.

    Attributes:
        sizes: number of units of every atom.
        pins: why an atom is pinned, by its number.
    """

    sizes: list[int] = field(default_factory=list)
    pins: dict[int, str] = field(default_factory=dict)
    _known: dict[int, Axis] = field(default_factory=dict)

    def new(self, size: int, *, pinned: str | None = None) -> Axis:
        """A fresh atom; an axis of one unit needs none."""
        if size == 1:
            return ONE
        self.sizes.append(size)
        if pinned is not None:
            self.pins[len(self.sizes) - 1] = pinned
        return len(self.sizes) - 1

    def size(self, axis: Axis) -> int:
        """Number of units."""
        if isinstance(axis, int):
            return self.sizes[axis]
        if isinstance(axis, Product):
            return prod(map(self.size, axis.parts))
        return self.size(axis.parts[0]) if isinstance(axis, Family) else sum(map(self.size, axis.parts))

    def canonical(self, axis: Axis) -> Axis:
        """The expression in its latest terms: no known atom, no nesting that says nothing, sums outermost."""
        if isinstance(axis, int):
            return self.canonical(self._known[axis]) if axis in self._known else axis
        parts = [self.canonical(part) for part in axis.parts]
        if isinstance(axis, Family):
            index = self.canonical(axis.index)
            if isinstance(index, int) and any(part != parts[0] for part in parts):
                return Family(index, tuple(parts))
            return parts[0]
        if isinstance(axis, Sum):
            flat = [p for part in parts for p in (part.parts if isinstance(part, Sum) else (part,))]
            flat = [p for p in flat if self.size(p)]
            return flat[0] if len(flat) == 1 else Sum(tuple(flat))
        factors = [p for part in parts for p in (part.parts if isinstance(part, Product) else (part,))]
        if len(factors) == 1:
            return factors[0]
        if factors and isinstance(factors[0], Sum):
            return self.canonical(Sum(tuple(Product((part, *factors[1:])) for part in factors[0].parts)))
        for i, factor in enumerate(factors):
            if isinstance(factor, Family) and factor.index in factors[:i]:
                return self.canonical(self._spread(factors, factor.index))
        return Product(tuple(factors))

    def _spread(self, factors: Sequence[Axis], index: int) -> Axis:
        """A product whose later factors depend on the place along an earlier one, as a sum over those places."""
        at = list(factors).index(index)
        terms = tuple(
            Product(tuple(_at(f, index, place) for f in factors[at + 1 :])) for place in range(self.sizes[index])
        )
        return Product((*factors[:at], Sum(terms)))

    def atoms(self, axis: Axis) -> Iterator[int]:
        """Atoms of an expression, as it is canonically."""
        axis = self.canonical(axis)
        if isinstance(axis, int):
            yield axis
        else:
            for part in axis.parts:
                yield from self.atoms(part)
            if isinstance(axis, Family):
                yield axis.index

    def pin(self, axis: Axis, why: str) -> None:
        """Fix the order of everything in an axis."""
        for atom in list(self.atoms(axis)):
            self.pins.setdefault(atom, why)

    def pinned(self, axis: Axis) -> bool:
        """Whether nothing in an axis may move."""
        return all(atom in self.pins for atom in self.atoms(axis))

    # equality

    def unify(self, one: Axis, two: Axis, why: str) -> None:
        """Make two axes equal.

        Args:
            one: of the same size as the other.
            two: likewise.
            why: what asks for it, for the record of a pin.
        """
        one, two = self.canonical(one), self.canonical(two)
        if one == two:
            return
        if self.size(one) != self.size(two):
            raise AssertionError(f"{why}: axes of {self.size(one)} and {self.size(two)} units")
        if isinstance(two, int) and (not isinstance(one, int) or (two in self.pins and one not in self.pins)):
            one, two = two, one  # what was free keeps its number, and the record of why it no longer is
        if isinstance(one, int):
            self._bind(one, two, why)
        elif isinstance(one, Family) or isinstance(two, Family):
            self._families(one, two, why)
        elif isinstance(one, Sum) or isinstance(two, Sum):
            self._segments(one, two, why)
        else:
            self._factors(one, two, why)

    def _bind(self, atom: int, axis: Axis, why: str) -> None:
        inside = list(self.atoms(axis))
        if atom in inside:  # an axis within itself: no order but the given one is safe
            for other in inside:
                self.pins.setdefault(other, f"{why}: an axis would be a part of itself")
            return
        if atom in self.pins:
            self.pin(axis, f"{why}, with {self.pins[atom].rpartition('with ')[2]}")
        elif inside and self.pinned(axis):
            self.pins[atom] = f"{why}, with {self.pins[inside[0]].rpartition('with ')[2]}"
        self._define(atom, axis)

    def _define(self, atom: int, axis: Axis) -> None:
        if not isinstance(axis, int):
            self.collapse(atom)  # an atom that tells copies apart must stay one
        self._known[atom] = axis

    def _families(self, one: Axis, two: Axis, why: str) -> None:
        if isinstance(one, Family) and isinstance(two, Family) and one.index == two.index:
            for a, b in zip(one.parts, two.parts, strict=True):
                self.unify(a, b, why)
            return
        if not isinstance(one, Family):
            one, two = two, one
        assert isinstance(one, Family)
        for part in one.parts:
            self.unify(part, two, why)

    def _segments(self, one: Axis, two: Axis, why: str) -> None:
        a: list[Axis] = [*one.parts] if isinstance(one, Sum) else [one]
        b: list[Axis] = [*two.parts] if isinstance(two, Sum) else [two]
        while a and b:
            size = min(self.size(a[0]), self.size(b[0]))
            for queue in (a, b):
                if self.size(queue[0]) > size:
                    try:
                        queue[:1] = self.cut(queue[0], [size])
                    except NestingError:
                        return self._give_up((*a, *b), why)
            # a cut may have changed what the other queue holds: take the heads anew
            self.unify(a.pop(0), b.pop(0), why)
        return None

    def _factors(self, one: Axis, two: Axis, why: str) -> None:
        a: list[Axis] = [*one.parts] if isinstance(one, Product) else [one]
        b: list[Axis] = [*two.parts] if isinstance(two, Product) else [two]
        while a and b:
            first, second = self.canonical(a[0]), self.canonical(b[0])
            if self.size(first) == self.size(second):
                a.pop(0)
                b.pop(0)
                self.unify(first, second, why)
                continue
            small, large = (a, b) if self.size(first) < self.size(second) else (b, a)
            try:
                large[:1] = self.split(large[0], self.size(small[0]))
            except NestingError:
                return self._give_up((*a, *b), why)
        return None

    def _give_up(self, axes: Sequence[Axis], why: str) -> None:
        for axis in axes:
            self.pin(axis, f"{why}: its parts do not nest")

    # cutting

    def cut(self, axis: Axis, places: Sequence[int]) -> list[Axis]:
        """Segments between places, which may be at the ends.

        Raises:
            NestingError: If a place is inside something that cannot be cut; nothing is pinned then.
        """
        rest, pieces, done = self.canonical(axis), [], 0
        for place in places:
            head, rest = self._cut_once(rest, place - done)
            pieces.append(head)
            done = place
        return [*pieces, rest]

    def _cut_once(self, axis: Axis, place: int) -> tuple[Axis, Axis]:
        axis, nothing = self.canonical(axis), Sum(())
        if place in (0, self.size(axis)):
            return (nothing, axis) if place == 0 else (axis, nothing)
        if isinstance(axis, int):
            why = self.pins.get(axis)
            parts = tuple(self.new(size, pinned=why) for size in (place, self.sizes[axis] - place))
            self._define(axis, Sum(parts))
            return parts[0], parts[1]
        if isinstance(axis, Sum):
            before: list[Axis] = []
            for i, part in enumerate(axis.parts):
                if place < self.size(part):
                    head, tail = self._cut_once(part, place)
                    return Sum((*before, head)), Sum((tail, *axis.parts[i + 1 :]))
                before.append(part)
                place -= self.size(part)
        if isinstance(axis, Product):
            inner = prod(map(self.size, axis.parts[1:]))
            if place % inner == 0:
                head, tail = self._cut_once(axis.parts[0], place // inner)
                return Product((head, *axis.parts[1:])), Product((tail, *axis.parts[1:]))
        raise NestingError

    def split(self, axis: Axis, outer: int) -> list[Axis]:
        """An axis as the product of an outer one of that size and an inner one.

        Raises:
            NestingError: If it is no such product; nothing is pinned then.
        """
        axis = self.canonical(axis)
        size = self.size(axis)
        if outer in (1, size):
            return [ONE, axis] if outer == 1 else [axis, ONE]
        if size % outer:
            raise NestingError
        if isinstance(axis, int):
            why = self.pins.get(axis)
            factors = [self.new(outer, pinned=why), self.new(size // outer, pinned=why)]
            self._define(axis, Product(tuple(factors)))
            return factors
        if isinstance(axis, Product):
            done: list[Axis] = []
            for i, part in enumerate(axis.parts):
                if outer == 1:
                    return [Product(tuple(done)), Product(axis.parts[i:])]
                if outer < self.size(part):
                    head, tail = self.split(part, outer)
                    return [Product((*done, head)), Product((tail, *axis.parts[i + 1 :]))]
                if outer % self.size(part):
                    raise NestingError
                done.append(part)
                outer //= self.size(part)
            return [Product(tuple(done)), ONE]
        if isinstance(axis, Sum) and self.pinned(axis):
            return [self.new(outer, pinned="fixed"), self.new(size // outer, pinned="fixed")]
        if isinstance(axis, Sum):
            return self._split_sum(axis, outer)
        raise NestingError

    def _split_sum(self, axis: Sum, outer: int) -> list[Axis]:
        """Segments that are products with an inner factor of one size; it becomes the same one."""
        inner = self.size(axis) // outer
        if any(self.size(part) % inner for part in axis.parts):
            raise NestingError
        pieces = [self.split(part, self.size(part) // inner) for part in axis.parts]
        for piece in pieces[1:]:
            self.unify(pieces[0][1], piece[1], "split together")
        return [Sum(tuple(piece[0] for piece in pieces)), pieces[0][1]]

    def families(self, axis: int, inside: Sequence[Axis]) -> None:
        """Let atoms depend on the place along another: each gets one copy a place, for whoever looks at one place.

        Args:
            axis: the atom to look along; it is pinned.
            inside: axes of the same tensor whose atoms came from the same split, and appear nowhere without `axis`.
        """
        self.pins.setdefault(axis, "places along it are told apart")
        for other in inside:
            for atom in list(self.atoms(other)):
                if atom != axis and atom not in self.pins:
                    copies = tuple(self.new(self.sizes[atom]) for _ in range(self.sizes[axis]))
                    self._define(atom, Family(axis, copies))

    def collapse(self, index: int) -> None:
        """Make the members of all families along an atom equal."""
        for axis in list(self._known.values()):
            if isinstance(axis, Family) and self.canonical(axis.index) == index:
                self.merge(axis)

    def merge(self, family: Family) -> None:
        """Make the members of a family equal."""
        for part in family.parts[1:]:
            self.unify(family.parts[0], part, "seen without the axis that tells its copies apart")

    def at(self, axis: Axis, index: int, place: int) -> Axis:
        """An axis where the axis of atom `index` is at a place."""
        return self.canonical(_at(self.canonical(axis), index, place))


class NestingError(Exception):
    """Boundaries do not nest."""


def _at(axis: Axis, index: int, place: int) -> Axis:
    if isinstance(axis, int):
        return axis
    if isinstance(axis, Family) and axis.index == index:
        return axis.parts[place]
    parts = tuple(_at(part, index, place) for part in axis.parts)
    return Family(axis.index, parts) if isinstance(axis, Family) else type(axis)(parts)
