"""Similarities of two networks' units by what they do on the same inputs.

Both networks run on the same batches; for every activation that a product takes in, means and products of units are
summed up in float64, all of them in one run. Nothing about the order of units is assumed, so one pass serves any number
of matchings.

Source: Ainsworth et al. 2022, arXiv:2209.04836, section 3.1; the correlation of Li et al. 2015, arXiv:1511.07543.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merganser.align.costs import Moments, attached, grown, unfold
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Orders, Spec, Symmetries
from merganser.symmetry.finding import Tap
from merganser.symmetry.record import record_tensors
from merganser.symmetry.spec import Part, groups_in

#: Inputs of one run: positional, or positional and named.
Batch = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Shown:
    """Correlations of all units that one activation shows.

    Attributes:
        part: what its units are made of.
        similarity: of every unit of the one network with every unit of the other, in the order that each is in.
    """

    part: Part
    similarity: Tensor


@dataclass(frozen=True)
class ActivationCosts:
    """Correlations of two networks' units on the same inputs.

    Attributes:
        spec: symmetries of both.
        shown: activations to compare each group by.
    """

    spec: Spec
    shown: Mapping[str, Sequence[Shown]]

    def units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of a group's units, shape (n, n): the mean over activations and over units within units.

        Entries that the group's inner groups move are left out; zeros where nothing else shows the group.
        """
        size, inner = self.spec.groups[group].size, set(self.spec.inner(group))
        found = torch.zeros(size, size, dtype=torch.float64)
        for seen in self.shown.get(group, ()):
            places = self.spec.places_in(seen.part, group)
            for other in inner & set(groups_in(seen.part)):
                places = torch.where(self.spec.places_in(seen.part, other) >= 0, -1, places)
            if bool((places >= 0).any()):
                found += self._folded(seen, places, attached(self.spec, group, orders)) / len(self.shown[group])
        return found

    def inner_units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of an inner group's units for every pair of outer places, shape (outer, outer, n, n)."""
        within = self.spec.groups[group].within
        assert within is not None
        outer, size = self.spec.places(group)
        found = torch.zeros(outer, outer, size, size, dtype=torch.float64)
        held = {**attached(self.spec, within, orders), group: self.spec.identity()[group]}
        for seen in self.shown.get(group, ()):
            units = self.spec.places_in(seen.part, group)
            joined = torch.where(units >= 0, self.spec.places_in(seen.part, within) * size + units, -1)
            pairs = self._folded(seen, joined, held).reshape(outer, size, outer, size)
            found += pairs.transpose(1, 2) / len(self.shown[group])
        return found

    def meetings(self) -> Iterable[Sequence[Part]]:
        """What the units of all activations are made of."""
        return [(seen.part,) for shown in self.shown.values() for seen in shown]

    def _folded(self, seen: Shown, places: Tensor, orders: Orders) -> Tensor:
        """Mean over what else the units of a place are made of, which is paired in the order that it is in."""
        similarity = seen.similarity[:, self.spec.positions(seen.part, orders)]
        rows = places.argsort(stable=True)[int((places < 0).sum()) :].reshape(int(places.max()) + 1, -1)
        return torch.stack([similarity[at][:, at] for at in rows.T]).mean(0)


def activation_costs(
    found: Symmetries,
    one: nn.Module,
    two: nn.Module,
    batches: Iterable[Batch],
    *,
    taps: Literal["last", "all"] = "last",
) -> ActivationCosts:
    """Run both networks and correlate their units.

    Args:
        found: symmetries of both, traced on inputs of the shapes of the batches.
        one: the network that stays.
        two: the network that moves.
        batches: inputs; every batch has the shapes of the inputs that were traced.
        taps: "last" compares a group by the last product that takes it in, "all" by the mean over all of them.

    Raises:
        ParameterError: If there is no batch.
        ShapeError: If a batch is of another shape, or a network takes another way through it than the traced one.
    """
    chosen = taps_by_group(found, taps)
    moments: dict[int, Moments] = {}
    count = 0
    for args, kwargs in batches:
        count += 1
        numbers = {tap.number: tap for seen in chosen.values() for tap in seen}
        a, b = (record_tensors(network, args, kwargs, numbers) for network in (one, two))
        for number, tap in numbers.items():
            moments[number] = grown(moments.get(number), *(units_of(found.spec, tap, tensors) for tensors in (a, b)))
    if not count:
        raise ParameterError("there is no batch to compare the networks by")
    shown = {number: m.pearson() for number, m in moments.items()}
    return ActivationCosts(
        found.spec,
        {group: [Shown(part_of(tap), shown[tap.number]) for tap in seen] for group, seen in chosen.items()},
    )


def unit_correlations(found: Symmetries, networks: Sequence[nn.Module], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Correlations of all units of all networks, within and across them, on the same inputs.

    Args:
        found: symmetries of all, traced on inputs of the shapes of the batches.
        networks: to compare.
        batches: inputs.

    Returns:
        For every group without inner groups that an activation shows: shape (networks * n, networks * n), by the last
        product that takes it in.

    Raises:
        ParameterError: If there is no batch.
        ShapeError: As for `activation_costs`.
    """
    spec = found.spec
    chosen = {
        group: seen[-1]
        for group, seen in taps_by_group(found, "last").items()
        if not spec.inner(group) and spec.groups[group].within is None
    }
    moments: dict[str, Moments] = {}
    count = 0
    for args, kwargs in batches:
        count += 1
        numbers = {tap.number for tap in chosen.values()}
        runs = [record_tensors(network, args, kwargs, numbers) for network in networks]
        for group, tap in chosen.items():
            places = spec.places_in(part_of(tap), group)
            x = torch.cat([unfold(units_of(spec, tap, tensors), 0, places) for tensors in runs])
            moments[group] = grown(moments.get(group), x, x)
    if not count:
        raise ParameterError("there is no batch to compare the networks by")
    return {group: m.pearson() for group, m in moments.items()}


def taps_by_group(found: Symmetries, taps: Literal["last", "all"]) -> dict[str, list[Tap]]:
    """Activations to compare every group by."""
    shown: dict[str, list[Tap]] = {}
    for tap in found.taps:
        for group in dict.fromkeys(g for part in tap.axes for g in groups_in(part)):
            if group in found.spec.groups:
                shown.setdefault(group, []).append(tap)
    return {group: seen[-1:] if taps == "last" else seen for group, seen in shown.items()}


def part_of(tap: Tap) -> Part:
    """What the units of an activation are made of, all its axes that hold some taken together."""
    return {"product": [part for part in tap.axes if any(True for _ in groups_in(part))]}


def units_of(spec: Spec, tap: Tap, tensors: Mapping[int, Tensor]) -> Tensor:
    """An activation as (units, samples), in float64."""
    x = tensors.get(tap.number)
    sizes = tuple(spec.size(part) for part in tap.axes)
    if x is None or tuple(x.shape) != sizes:
        seen = "not there" if x is None else f"{tuple(x.shape)}"
        raise ShapeError(
            f"an activation is {seen}, and was {sizes} when the network was traced",
            "trace it on inputs of the shape of a batch",
        )
    axes = [i for i, part in enumerate(tap.axes) if any(True for _ in groups_in(part))]
    count = prod(x.shape[i] for i in axes)
    return x.movedim(axes, list(range(len(axes)))).reshape(count, -1).double()
