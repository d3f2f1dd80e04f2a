"""Units of networks compared by what they do on an agent's own pictures.

Every network runs once, an agent's own one once for all of its neighbours. In that run BatchNorm has the statistics of
the pictures that run: those that came with a network are of its last few batches. (As published, a run before takes
them.) Where a network is nearly in the best order already, it is left in its own: an order that gains next to nothing
is noise, and every new order moves the mean of all agents.

Source: Saadati et al. 2024, arXiv:2404.08079; Ainsworth et al. 2022, arXiv:2209.04836, section 3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from merganser.align.activations import ActivationCosts, Shown, part_of, taps_by_group, units_of
from merganser.align.costs import Moments, WeightCosts, grown
from merganser.align.match import match
from merganser.align.renorm import measuring
from merganser.decentral.distances import fixed_fraction
from merganser.decentral.learner import Match, Tensors
from merganser.errors import NonFiniteError, ParameterError
from merganser.numerics import all_finite
from merganser.symmetry import Orders, Symmetries, symmetries
from merganser.symmetry.finding import Tap
from merganser.symmetry.record import record_tensors

#: Share of the similarity that a new order must gain.
LEAST_GAIN = 1e-3


class NetworkAligner:
    """Activation matching of networks of one architecture.

    Args:
        network: of that architecture; it is copied.
        batches: inputs, all of one shape; at least one.
        least_gain: share of the similarity that a new order must gain, or the old one is kept.

    Raises:
        ParameterError: If there is no batch, or batches differ in shape.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Tensor], *, least_gain: float = LEAST_GAIN) -> None:
        if not batches:
            raise ParameterError("there is no batch to compare units by")
        if len({tuple(x.shape) for x in batches}) > 1:
            raise ParameterError("batches to compare units by differ in shape", "leave the last, smaller one out")
        self._one = copy.deepcopy(network).eval()
        self._batches, self._least_gain = list(batches), least_gain
        self._found: Symmetries | None = None

    @property
    def found(self) -> Symmetries:
        """The network's symmetries, traced when they are first asked for."""
        if self._found is None:
            self._found = symmetries(self._one, (self._batches[0],))
        return self._found

    def match(self, stays: Tensors, moves: Sequence[Tensors]) -> list[Match]:
        """How each of some models is brought into the order of one."""
        return [self._match(costs) for costs in self._costs(stays, moves)]

    def moved(self, orders: Orders, model: Tensors) -> dict[str, Tensor]:
        """A model with its units in another order; its function is the same."""
        spec = self.found.spec
        return {n: spec.apply(orders, n, x) if n in spec.axes and spec.moves(n) else x for n, x in model.items()}

    def _costs(self, stays: Tensors, moves: Sequence[Tensors]) -> list[ActivationCosts]:
        spec = self.found.spec
        chosen = taps_by_group(self.found, "last")
        taps = {tap.number: tap for seen in chosen.values() for tap in seen}
        moments: list[dict[int, Moments]] = [{} for _ in moves]
        for batch in self._batches:
            own = self._units(stays, batch, taps)
            for model, summed in zip(moves, moments, strict=True):
                for number, units in self._units(model, batch, taps).items():
                    summed[number] = grown(summed.get(number), own[number], units)
        # a model that diverged correlates with nothing, and stays as it is
        shown = [{number: m.pearson().nan_to_num() for number, m in summed.items()} for summed in moments]
        return [
            ActivationCosts(
                spec,
                {g: [Shown(part_of(tap), seen[tap.number]) for tap in t] for g, t in chosen.items()},
                WeightCosts(spec, stays, model, "pearson") if all(map(all_finite, model.values())) else None,
            )
            for seen, model in zip(shown, moves, strict=True)
        ]

    def _units(self, model: Tensors, batch: Tensor, taps: Mapping[int, Tap]) -> dict[int, Tensor]:
        """Activations of a model, shape (units, samples) each."""
        self._one.load_state_dict(dict(model))
        try:
            with measuring(self._one):
                tensors = record_tensors(self._one, (batch,), {}, taps)
        except NonFiniteError:  # a model that diverged
            tensors = record_tensors(self._one, (batch,), {}, taps)
        return {number: units_of(self.found.spec, tap, tensors) for number, tap in taps.items()}

    def _match(self, costs: ActivationCosts) -> Match:
        spec = self.found.spec
        orders: dict[str, Tensor] = spec.identity()
        if not self._nearly_best(costs, orders):
            orders = match(spec, costs).orders
        groups = [name for name, group in spec.groups.items() if not group.fixed]
        fixed = {name: fixed_fraction(orders[name]) for name in groups}
        return Match(orders, fixed, dict(self._correlations(costs, orders)))

    def _nearly_best(self, costs: ActivationCosts, orders: Orders) -> bool:
        """Whether no order could gain more than `least_gain`: no row gives more than its largest entry."""
        for name, group in costs.spec.groups.items():
            if group.within is not None or costs.spec.inner(name):
                return False
            similarity = costs.units(name, orders)
            now, best = float(similarity.trace()), float(similarity.max(1).values.sum())
            if best - now > self._least_gain * max(abs(best), 1e-300):
                return False
        return True

    @staticmethod
    def _correlations(costs: ActivationCosts, orders: Orders) -> Mapping[str, float]:
        found = {}
        for name, group in costs.spec.groups.items():
            if group.within is None and not group.fixed and not costs.spec.inner(name):
                similarity = costs.units(name, orders)
                found[name] = float(similarity[torch.arange(group.size), orders[name]].mean())
        return found
