"""Similarities by weights that follow the orders: only what moved since they were last asked for is multiplied.

    c' = c + a[:, M] (b[:, p'(M)] - b[:, p(M)])^T      M = {m: p'(m) != p(m)}

for units along one axis of a tensor, and places m along the axis that other groups move from p to p'. In coordinate
ascent few units move after the first sweeps, and a product is as large as the number of those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from merganser.align.activations import ActivationCosts
from merganser.align.costs import Costs, DualCosts, Moments, WeightCosts, attached, grown, products, unfold
from merganser.symmetry import Orders
from merganser.symmetry.spec import Part, groups_in

#: Memory for similarities; groups that they do not fit in for are compared anew every time.
KEPT_BYTES = 1 << 31
#: Rounding of updates, as a share of the largest similarity, from which all is multiplied anew.
MOST_ROUNDING = 5e-13
UNIT_ROUNDOFF = 2.0**-53
#: Share of what touches a group's units that moved, from which all is multiplied anew: there is less to subtract.
MOST_MOVED = 0.85
#: Entries that are made float64 at a time, at least: so many stay near the processor.
BLOCK = 1 << 19


def following(costs: Costs) -> Costs:
    """Costs that keep what they found about weights, for as long as the tensors stay as they are.

    They are for one matching: they hold similarities of all groups.
    """
    if isinstance(costs, DualCosts):
        return replace(costs, weights=following(costs.weights))
    if type(costs) is WeightCosts:
        return FollowingCosts(costs.spec, costs.a, costs.b, costs.kind)
    if isinstance(costs, ActivationCosts) and type(costs.weights) is WeightCosts:
        weights = costs.weights
        return replace(costs, weights=FollowingCosts(weights.spec, weights.a, weights.b, weights.kind))
    return costs


@dataclass(frozen=True)
class _Meeting:
    """A tensor along one axis of which a group's units lie, and no others.

    Attributes:
        name: of the tensor.
        axis: of the units.
        places: of the axis: the unit at each, or -1.
        other: the axis that other groups move, if any.
    """

    name: str
    axis: int
    places: Tensor
    other: int | None


@dataclass
class _Kept:
    """What is known of a group.

    Attributes:
        meetings: all that touches its units.
        moments: of its units, in the orders that others had; none before the first time.
        positions: of every tensor along its other axis, in those orders.
        rounding: of the similarities, at most, by what was added up.
    """

    meetings: list[_Meeting]
    moments: Moments | None = None
    positions: dict[str, Tensor] = field(default_factory=dict)
    rounding: float = 0.0


@dataclass(frozen=True)
class FollowingCosts(WeightCosts):
    """Similarities of two networks' units by their weights, whose tensors may not change while it is in use."""

    _kept: dict[str, _Kept] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Choose the groups to keep similarities of."""
        room = KEPT_BYTES
        for group, about in self.spec.groups.items():
            meetings, taken = self._meetings_of(group), 8 * about.size**2
            if meetings and taken <= room:
                room -= taken
                self._kept[group] = _Kept(meetings)

    def _meetings_of(self, group: str) -> list[_Meeting]:
        """All that touches a group's units; none where a tensor is more than its units by what others move."""
        spec, found = self.spec, list[_Meeting]()
        if spec.groups[group].within is not None or spec.inner(group):
            return []
        for name in self._tensors(group):
            parts = spec.axes[name]
            along = [set(groups_in(part)) for part in parts]
            axis, *twice = (i for i, here in enumerate(along) if group in here)
            others = [i for i, here in enumerate(along) if here and i != axis]
            governed = any(spec.groups[g].within not in (None, *here) for here in along for g in here)
            if twice or governed or len(others) > 1 or not _alone(parts[axis], group):
                return []
            found.append(_Meeting(name, axis, spec.places_in(parts[axis], group), others[0] if others else None))
        return found

    def units(self, group: str, orders: Orders) -> Tensor:
        """As `WeightCosts.units`, but for rounding."""
        kept = self._kept.get(group)
        if kept is None:
            return super().units(group, orders)
        held = attached(self.spec, group, orders)
        new = {
            at.name: self.spec.positions(self.spec.axes[at.name][at.other], held)
            for at in kept.meetings
            if at.other is not None
        }
        if kept.moments is None or self._share_moved(kept, new) > MOST_MOVED:
            self._begin(kept, new)
        else:
            self._follow(kept, kept.moments, new)
        assert kept.moments is not None
        if not kept.rounding <= MOST_ROUNDING * _largest(kept.moments.cross):
            self._begin(kept, new)
        return kept.moments.cross if self.kind == "frobenius" else kept.moments.pearson()

    def _share_moved(self, kept: _Kept, new: Mapping[str, Tensor]) -> float:
        """Of all that touches the units: how much is no longer where it was."""
        sizes = {at.name: self.b[at.name].numel() for at in kept.meetings}
        moved = sum(sizes[name] * int((old != new[name]).sum()) / len(old) for name, old in kept.positions.items())
        return moved / max(1, sum(sizes.values()))

    def _begin(self, kept: _Kept, new: Mapping[str, Tensor]) -> None:
        """Similarities from all that touches the units."""
        moments = None
        for at in kept.meetings:
            for x, y in self._blocks(at, None, new.get(at.name)):
                more = grown(None, x, y) if self.kind == "pearson" else _products_alone(x, y)
                moments = more if moments is None else moments.with_more(more)
        kept.moments, kept.positions, kept.rounding = moments, dict(new), 0.0

    def _follow(self, kept: _Kept, moments: Moments, new: Mapping[str, Tensor]) -> None:
        """Bring similarities from the positions that they are for to others."""
        for at in kept.meetings:
            if at.other is None or torch.equal(new[at.name], kept.positions[at.name]):
                continue
            change = torch.zeros_like(moments.cross)
            for x, y in self._blocks(at, kept.positions[at.name], new[at.name]):
                change += products(x, y)
            kept.rounding += UNIT_ROUNDOFF * (_largest(moments.cross) + _largest(change))
            moments.cross, kept.positions[at.name] = moments.cross + change, new[at.name]

    def _blocks(self, at: _Meeting, old: Tensor | None, new: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """What touches the units, some at a time: of a, and of b; where there are old positions, b less b as it was.

        What is where it was is left out.
        """
        x, y, other = self.a[at.name], self.b[at.name], at.other
        if other is None or new is None:
            yield unfold(x, at.axis, at.places), unfold(y, at.axis, at.places)
            return
        places = torch.arange(len(new)) if old is None else (new != old).nonzero().flatten()
        entries = max(1, x.numel() // len(new))
        for some in torch.split(places, max(1, max(BLOCK, x.shape[at.axis] ** 2) // entries)):
            here = unfold(x.index_select(other, some.to(x.device)), at.axis, at.places)
            there = unfold(y.index_select(other, new[some].to(y.device)), at.axis, at.places)
            if old is not None:
                there = there.sub_(unfold(y.index_select(other, old[some].to(y.device)), at.axis, at.places))
            yield here, there


def _products_alone(x: Tensor, y: Tensor) -> Moments:
    """Moments of which nothing but the products is asked for."""
    none = x.new_zeros(())
    return Moments(products(x, y), (none, none), (none, none))


def _alone(part: Part, group: str) -> bool:
    """Whether no other group moves the places of a group."""
    if isinstance(part, dict) and "sum" in part:
        return all(_alone(p, group) for p in part["sum"])
    here = set(groups_in(part))
    return group not in here or here == {group}


def _largest(x: Tensor) -> float:
    least, most = x.aminmax()
    return max(-float(least), float(most))
