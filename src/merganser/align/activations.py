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

from merganser.align.costs import Moments, WeightCosts, attached, grown, unfold
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
        weights: to compare those by that none shows, as the units of experts that are computed by no known operation or
            the rank of an update that is multiplied out before it runs; without, such groups stay as they are.
    """

    spec: Spec
    shown: Mapping[str, Sequence[Shown]]
    weights: WeightCosts | None = None

    def hidden(self) -> list[str]:
        """Groups that weights are looked at for."""
        if self.weights is None:
            return []
        return [name for name, group in self.spec.groups.items() if not group.fixed and name not in self.shown]

    def units(self, group: str, orders: Orders) -> Tensor:
        """Similarity of a group's units, shape (n, n): the mean over activations and over units within units.

        Entries that the group's inner groups move are left out; zeros where nothing else shows the group.
        """
        if self.weights is not None and group not in self.shown:
            return self.weights.units(group, orders)
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
        if self.weights is not None and group not in self.shown:
            return self.weights.inner_units(group, orders)
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
        """What the units of all activations are made of; axes of all tensors where weights are looked at."""
        parts: list[Sequence[Part]] = [(seen.part,) for shown in self.shown.values() for seen in shown]
        return [*parts, *self.spec.axes.values()] if self.hidden() else parts

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
    """Run both networks and correlate their units; those that no activation shows are compared by their weights.

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
        _weights(found.spec, one.state_dict(), two.state_dict()),
    )


def _weights(spec: Spec, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> WeightCosts:
    """By tensors that both have in the size that the symmetries say."""
    names = [n for n, shape in spec.shapes().items() if all(n in s and tuple(s[n].shape) == shape for s in (a, b))]
    return WeightCosts(spec, {n: a[n].detach() for n in names}, {n: b[n].detach() for n in names}, "pearson")


def unit_correlations(
    found: Symmetries, networks: Sequence[nn.Module], batches: Iterable[Batch], orders: Sequence[Orders]
) -> dict[str, Tensor]:
    """Correlations of all units of all networks, within and across them, on the same inputs.

    Where an activation shows a unit at every place of another group, each of these places is a sample, in the order
    that the other group is brought into.

    Args:
        found: symmetries of all, traced on inputs of the shapes of the batches.
        networks: to compare.
        batches: inputs.
        orders: of every network, for the groups but the one that is compared.

    Returns:
        For every group without inner groups that an activation shows: shape (networks * n, networks * n), by the last
        product that takes it in.

    Raises:
        ParameterError: If there is no batch.
        ShapeError: As for `activation_costs`.
    """
    spec = found.spec
    chosen = _compared(found)
    parts = {group: part_of(tap) for group, tap in chosen.items()}
    across = crossing(found)
    moments: dict[str, Moments] = {}
    count = 0
    for args, kwargs in batches:
        count += 1
        numbers = {tap.number for tap in chosen.values()}
        runs = [record_tensors(network, args, kwargs, numbers) for network in networks]
        for group, tap in chosen.items():
            rows = [units_of(spec, tap, tensors) for tensors in runs]
            if group in across:
                held = [{**o, group: torch.arange(spec.groups[group].size)} for o in orders]
                rows = [x[spec.positions(parts[group], o).to(x.device)] for x, o in zip(rows, held, strict=True)]
            places = spec.places_in(parts[group], group)
            x = torch.cat([unfold(row, 0, places) for row in rows])
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


def _compared(found: Symmetries) -> dict[str, Tap]:
    """Groups of which single units are compared within and across networks, and the activation that shows each."""
    spec = found.spec
    return {
        group: seen[-1]
        for group, seen in taps_by_group(found, "last").items()
        if not spec.inner(group) and spec.groups[group].within is None
    }


def crossing(found: Symmetries) -> list[str]:
    """Groups whose units `unit_correlations` compares across the places of other groups."""

    def crosses(group: str, part: Part) -> bool:
        mine = found.spec.places_in(part, group) >= 0
        others = set(groups_in(part)) - {group}
        return any(bool((mine & (found.spec.places_in(part, other) >= 0)).any()) for other in others)

    return [group for group, tap in _compared(found).items() if crosses(group, part_of(tap))]


def part_of(tap: Tap) -> Part:
    """What the units of an activation are made of, all its factors that hold some taken together."""
    return {"product": [factor for factor in _factors(tap) if any(True for _ in groups_in(factor))]}


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
    factors = _factors(tap)
    x = x.reshape([spec.size(factor) for factor in factors])
    axes = [i for i, factor in enumerate(factors) if any(True for _ in groups_in(factor))]
    count = prod(x.shape[i] for i in axes)
    return x.movedim(axes, list(range(len(axes)))).reshape(count, -1).double()


def _factors(tap: Tap) -> list[Part]:
    """What an activation is made of, axes that are products as their factors: examples are no units.

    The last axis stays whole. What it holds beside units is, in a flattened picture, places with weights of their own.
    """
    found: list[Part] = []
    for part in tap.axes[:-1]:
        found += _split(part)
    return [*found, *tap.axes[-1:]]


def _split(part: Part) -> list[Part]:
    if not isinstance(part, dict) or "product" not in part:
        return [part]
    return [factor for inner in part["product"] for factor in _split(inner)]
