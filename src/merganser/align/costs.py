"""How alike two networks' units are: from their weights, from their activations, or from both.

For units i of one network and j of another, over everything that touches them:

    Frobenius   c_ij = sum_l a_il b_jl                                           (Git Re-Basin, arXiv:2209.04836, eq. 4)
    Pearson     c_ij = cov(a_i, b_j) / (sigma_i sigma_j), 0 for a unit that is always the same
    dual        balance * weights + (1 - balance) * activations, both Pearson     (MuDSC, arXiv:2403.01753, eq. 7)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.numerics import product
from merganser.symmetry import Orders, Spec
from merganser.symmetry.spec import Part, groups_in

Similarity = Literal["frobenius", "pearson"]


class Costs(Protocol):
    """What matching asks for."""

    def units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of a group's units, shape (n, n)."""
        ...

    def inner_units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of an inner group's units for every pair of outer places, shape (outer, outer, n, n)."""
        ...

    def meetings(self) -> Iterable[Sequence[Part]]:
        """Axes of what is compared: similarities of one group depend on the orders of those that it meets there."""
        ...


@dataclass
class Moments:
    """First and second moments of two networks' units over the same entries.

    Attributes:
        cross: sum of products, shape (*places, n, n): units of the one by units of the other.
        sums: sums of entries of either network's units, shape (*, n).
        squares: sums of their squares.
        count: entries a unit.
    """

    cross: Tensor
    sums: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    count: int = 0

    def with_more(self, more: Moments) -> Moments:
        """Over these entries and others."""
        return Moments(
            self.cross + more.cross,
            (self.sums[0] + more.sums[0], self.sums[1] + more.sums[1]),
            (self.squares[0] + more.squares[0], self.squares[1] + more.squares[1]),
            self.count + more.count,
        )

    def pearson(self) -> Tensor:
        """Correlations, in [-1, 1]."""
        n = max(self.count, 1)
        deviations = []
        for sums, squares in zip(self.sums, self.squares, strict=True):
            variance = squares / n - (sums / n).square()
            constant = variance <= 1e-12 * squares / n  # rounding of a unit that never changes
            deviations.append(torch.where(constant, torch.inf, variance.clamp(min=0).sqrt()))
        (a, b), (s, t) = self.sums, deviations
        if self.cross.ndim == 2:
            covariance = self.cross / n - a[:, None] * b[None] / n**2
            return covariance / (s[:, None] * t[None])
        covariance = self.cross / n - a[:, None, :, None] * b[None, :, None, :] / n**2
        return covariance / (s[:, None, :, None] * t[None, :, None, :])


@dataclass(frozen=True)
class WeightCosts:
    """Similarities of two networks' units by their weights, in float64.

    Attributes:
        spec: symmetries of both.
        a: tensors of the network that stays.
        b: tensors of the network that moves.
        kind: of similarity.
    """

    spec: Spec
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    kind: Similarity = "frobenius"

    def units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of a group's units where all other groups of b are in their order: shape (n, n).

        Inner groups keep the order that they have in each unit of the group. Where the group has inner groups, entries
        that those move are left out.
        """
        return self._similarity(self._pairs(group, orders), (self.spec.groups[group].size,) * 2)

    def inner_units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of an inner group's units, for every pair of places of its outer group.

        Returns:
            Shape (outer, outer, n, n): [i, k] compares place i of a with what is place k of b before its outer group
            moves. The outer group's other inner groups keep the order that they have in each of its units.
        """
        outer, size = self.spec.places(group)
        return self._similarity(self._inner_pairs(group, orders), (outer, outer, size, size))

    def _pairs(self, group: str, orders: Orders) -> Iterator[tuple[Tensor, Tensor]]:
        """What touches the units of a group in both networks, a tensor at a time."""
        held = attached(self.spec, group, orders)
        inner = set(self.spec.inner(group))
        for name in self._tensors(group):
            for axis, part in enumerate(self.spec.axes[name]):
                here = set(groups_in(part))
                elsewhere = {g for other in self.spec.axes[name] for g in groups_in(other)}
                if group not in here or (inner & (elsewhere - here)):
                    continue
                places = self.spec.places_in(part, group)
                for other in inner & here:
                    places = torch.where(self.spec.places_in(part, other) >= 0, -1, places)
                if bool((places >= 0).any()):
                    moved = self._along_its_other_axes(
                        group, orders, name, axis, self.spec.apply(held, name, self.b[name])
                    )
                    yield unfold(self.a[name], axis, places), unfold(moved, axis, places)

    def _along_its_other_axes(self, group: str, orders: Orders, name: str, axis: int, x: Tensor) -> Tensor:
        """With the group in its order along every axis but one, for tensors that it lies along twice."""
        for other, part in enumerate(self.spec.axes[name]):
            if other != axis and group in groups_in(part) and not self.spec.inner(group):
                alone = {**self.spec.identity(), group: orders[group]}
                x = x.index_select(other, self.spec.positions(part, alone).to(x.device))
        return x

    def _inner_pairs(self, group: str, orders: Orders) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of an inner group, by places of its outer one."""
        within = self.spec.groups[group].within
        assert within is not None
        held = {**attached(self.spec, within, orders), group: self.spec.identity()[group]}
        for name in self._tensors(group):
            axes = self.spec.axes[name]
            moved = self.spec.apply(held, name, self.b[name])
            for axis, part in enumerate(axes):
                if group in groups_in(part):
                    other = next(i for i in (axis, *range(len(axes))) if within in groups_in(axes[i]))
                    outer = (other, self.spec.places_in(axes[other], within))
                    units = (axis, self.spec.places_in(part, group))
                    yield unfold_two(self.a[name], outer, units), unfold_two(moved, outer, units)

    def _similarity(self, pairs: Iterator[tuple[Tensor, Tensor]], shape: tuple[int, ...]) -> Tensor:
        """Of units, from everything that touches them; zeros where nothing does."""
        if self.kind == "frobenius":
            return sum((products(x, y) for x, y in pairs), torch.zeros(shape, dtype=torch.float64))
        moments = None
        for x, y in pairs:
            moments = grown(moments, x, y)
        return torch.zeros(shape, dtype=torch.float64) if moments is None else moments.pearson()

    def meetings(self) -> Iterable[Sequence[Part]]:
        """Axes of all tensors."""
        return self.spec.axes.values()

    def objective(self, orders: Orders) -> float:
        """Sum of <a, b in that order> over all tensors that may move."""
        names = [n for n in self.spec.axes if self.spec.moves(n)]
        return float(
            sum((self.a[n].double() * self.spec.apply(orders, n, self.b[n]).double()).sum() for n in self._own(names))
        )

    def _tensors(self, group: str) -> list[str]:
        return self._own(list(dict.fromkeys(name for name, _ in self.spec.members(group))))

    def _own(self, names: list[str]) -> list[str]:
        """Floating tensors, tied ones once; running statistics are no weights, and large ones would drown the rest."""
        return [
            n
            for n in names
            if n not in self.spec.tied and n in self.a and self.a[n].is_floating_point() and not is_statistic(n)
        ]


def is_statistic(name: str) -> bool:
    """Whether a tensor is BatchNorm's running mean or variance."""
    return name.endswith(("running_mean", "running_var"))


def attached(spec: Spec, group: str, orders: Orders) -> dict[str, Tensor]:
    """Orders in which a group has not moved, and its inner groups are as they are in each of its units."""
    back = orders[group].argsort()
    return {**orders, group: torch.arange(len(back)), **{name: orders[name][back] for name in spec.inner(group)}}


@dataclass(frozen=True)
class DualCosts:
    """Weights and activations together, both as correlations.

    Attributes:
        weights: Pearson similarities of weights, which follow the orders.
        activations: similarities of activations.
        balance: share of the weights, in [0, 1].
    """

    weights: Costs
    activations: Costs
    balance: float

    def __post_init__(self) -> None:
        """Refuse a balance that is no share."""
        if not 0 <= self.balance <= 1:
            raise ParameterError(f"balance is {self.balance}; it is the share of the weights, in [0, 1]")

    def units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of a group's units, shape (n, n)."""
        return self._both(self.weights.units(group, orders), self.activations.units(group, orders))

    def inner_units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of an inner group's units for every pair of outer places, shape (outer, outer, n, n)."""
        return self._both(self.weights.inner_units(group, orders), self.activations.inner_units(group, orders))

    def meetings(self) -> Iterable[Sequence[Part]]:
        """Axes of all tensors and activations."""
        return (*self.weights.meetings(), *self.activations.meetings())

    def _both(self, weights: Tensor, activations: Tensor) -> Tensor:
        return self.balance * weights + (1 - self.balance) * activations


def unfold(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """Everything that touches each unit, shape (units, entries), in float64; in memory perhaps the other way round."""
    units = int(places.max()) + 1
    order = places.argsort(stable=True)[int((places < 0).sum()) :]
    if not torch.equal(order, torch.arange(len(places))):
        x = x.index_select(axis, order.to(x.device))
    if axis and x.shape[axis] == units:  # units stay where they are in memory, one beside the other
        return x.movedim(axis, -1).reshape(-1, units).double().T
    return x.movedim(axis, 0).reshape(units, -1).double()


def unfold_two(x: Tensor, outer: tuple[int, Tensor], inner: tuple[int, Tensor]) -> Tensor:
    """Everything that touches each inner unit of each place, shape (places, units, entries), in float64."""
    (first, blocks), (second, units) = outer, inner
    count, size = int(blocks.max()) + 1, int(units.max()) + 1
    if first == second:
        joined = torch.where(units >= 0, blocks * size + units, -1)
        return unfold(x, first, joined).reshape(count, size, -1)
    x = x.index_select(first, blocks.argsort(stable=True)[int((blocks < 0).sum()) :])
    x = x.index_select(second, units.argsort(stable=True)[int((units < 0).sum()) :])
    x = x.movedim((first, second), (0, 1))
    x = x.reshape(count, x.shape[0] // count, size, x.shape[1] // size, *x.shape[2:])
    return x.movedim(2, 1).reshape(count, size, -1).double()


def products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of units: (units, entries) to (n, n), (places, units, entries) to (places, places, n, n)."""
    return product(x, y.T) if x.ndim == 2 else torch.einsum("ial,kbl->ikab", x, y)


def grown(moments: Moments | None, x: Tensor, y: Tensor) -> Moments:
    """Moments with more entries; x and y are (units, entries) or (places, units, entries)."""
    new = Moments(products(x, y), (x.sum(-1), y.sum(-1)), (x.square().sum(-1), y.square().sum(-1)), x.shape[-1])
    return new if moments is None else moments.with_more(new)
