"""Rules that make one network of two that started apart; none of them sees a label.

    average       the mean, unit by unit
    weights       the second in the order whose weights are nearest to the first's (Git Re-Basin), then the mean
    activations   in the order whose units do the most alike, then the mean
    dual          both, with a balance (MuDSC), then the mean
    zip           units joined within and across by what they do (ZipIt)
    dual_zip      by both, with a balance (MuDSC)
    part_zip      zipped up to a depth, two networks from there on (ZipIt)
    ensemble      both networks
    regmean       least squares, layer by layer, on what the parents take in; no order is looked for (RegMean)
    pleas         in the order of activations, least squares to the mean of both, layer by layer (PLeaS)
    refit         the same from front to back, each layer on what the merged network gives it
    refit_answers refit, and the last layer to the answer that both give together with their own heads

The last three may keep units of both apart: refit@1.2 may cost 1.2 times the FLOPs of one network.

Balances are chosen without labels: `align.balancing`. After every merge statistics come from data: BatchNorm's are
measured anew, and where there is none every layer gets its parents' means and deviations back (REPAIR).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from merganser.align.activations import ActivationCosts, Batch, activation_costs
from merganser.align.balancing import choose_balance
from merganser.align.costs import DualCosts, WeightCosts
from merganser.align.many import mean_of
from merganser.align.match import match
from merganser.align.partial import Pair, Settings, Way
from merganser.align.renorm import layer_statistics, repair, reset_batch_norm
from merganser.align.zipping import zip_networks, zip_partly
from merganser.study.apart import State, state_of
from merganser.study.words_apart import IN_PART, Rule, Zipping
from merganser.symmetry import Orders, Spec, symmetries


@dataclass(frozen=True)
class Merged:
    """What a rule made.

    Attributes:
        networks: one, or as many as there were.
        statistics: where those of the units come from.
        pictures: how many were looked at, by what for.
        balance: share of the weights that was chosen.
        distances: from the parents' mean answer, by the balances that were tried.
        size: FLOPs and parameters, in those of one network.
    """

    networks: list[nn.Module]
    statistics: str
    pictures: dict[str, int]
    balance: float | None = None
    distances: dict[float, float] = field(default_factory=dict)
    size: tuple[float, float] | None = None


@dataclass
class Bench:
    """Two networks and what rules may look at.

    Attributes:
        one: stays.
        two: moves.
        compare: inputs to compare units by.
        measure: inputs for statistics.
        held_out: inputs to choose a balance by.
        answers: from a network's output to what balances are compared by.
        balances: to try.
        zipping: settings of zips.
        together: from both networks' outputs to the one that has the answer of both.
    """

    one: nn.Module
    two: nn.Module
    compare: Sequence[Batch]
    measure: Sequence[Batch]
    held_out: Sequence[Batch] = ()
    answers: Callable[[Tensor], Tensor] | None = None
    balances: Sequence[float] = ()
    zipping: Zipping = field(default_factory=Zipping)
    together: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Trace once; BatchNorm of both is measured on all classes, as where these rules were published."""
        self.statistics = "BatchNorm anew" if reset_batch_norm(self.one, self.measure) else "REPAIR"
        reset_batch_norm(self.two, self.measure)
        args, kwargs = self.compare[0]
        self.found = symmetries(self.one, args, kwargs)
        self.a, self.b = state_of(self.one), state_of(self.two)

    @property
    def spec(self) -> Spec:
        """Symmetries of both."""
        return self.found.spec

    @cached_property
    def seen(self) -> ActivationCosts:
        """What the two do on the same inputs."""
        return activation_costs(self.found, self.one, self.two, self.compare)

    @cached_property
    def by_activations(self) -> Orders:
        """The order of the second network by what its units do."""
        return match(self.spec, self.seen).orders

    @cached_property
    def by_weights(self) -> Orders:
        """The order of the second network by its weights."""
        return match(self.spec, WeightCosts(self.spec, self.a, self.b)).orders

    def by_both(self, balance: float) -> Orders:
        """The order of the second network by both."""
        costs = DualCosts(WeightCosts(self.spec, self.a, self.b, "pearson"), self.seen, balance)
        return match(self.spec, costs, start=self.by_activations).orders

    def ordered(self, orders: Orders) -> State:
        """The second network's tensors in an order."""
        return {n: self.spec.apply(orders, n, x) if n in self.spec.axes else x for n, x in self.b.items()}

    def network(self, state: State) -> nn.Module:
        """A network with these tensors."""
        made = copy.deepcopy(self.one)
        made.load_state_dict(state)
        return made

    def mean(self, orders: Orders) -> nn.Module:
        """The mean with the second network in an order, statistics from data."""
        merged = self.network(mean_of(self.spec, [self.a, self.b], [self.spec.identity(), orders]))
        if not reset_batch_norm(merged, self.measure):
            other = layer_statistics(self.network(self.ordered(orders)), self.measure)
            repair(merged, [self._own_statistics, other], self.measure)
        return merged

    def zipped(self, balance: float) -> nn.Module:
        """A zip, statistics from data."""
        merged = zip_networks(
            self.found,
            [self.one, self.two],
            self.compare,
            repeat=self.zipping.repeat,
            within=self.zipping.within,
            balance=balance,
            repairs=self.statistics == "REPAIR",
        )
        reset_batch_norm(merged, self.measure)
        return merged

    def partly(self) -> list[nn.Module]:
        """A zip up to a depth; without BatchNorm the statistics are what they come to."""
        both = zip_partly(
            self.found,
            [self.one, self.two],
            self.compare,
            share=self.zipping.share,
            repeat=self.zipping.repeat,
            within=self.zipping.within,
        )
        for network in both:
            reset_batch_norm(network, self.measure)
        return both

    @cached_property
    def _own_statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        return layer_statistics(self.one, self.measure)

    @cached_property
    def _pairs(self) -> dict[Way, Pair]:
        return {}

    def pair(self, way: Way) -> Pair:
        """Both networks and what is measured of them for merging in part; their BatchNorm is measured already."""
        if way not in self._pairs:
            how = Settings(way=way, recalibrate=False)
            self._pairs[way] = Pair(self.found, self.one, self.two, [*self.compare, *self.measure], settings=how)
            self._pairs[way].orders = self.by_activations
            if other := next((p for w, p in self._pairs.items() if w != way), None):
                self._pairs[way].reasons, self._pairs[way].layers = other.reasons, other.layers
        return self._pairs[way]

    def in_part(self, way: Way, budget: float, *, answers: bool = False) -> Merged:
        """Merged in part under a budget."""
        pair, blends = self.pair(way), {}
        if answers:
            assert self.together is not None
            blends = {pair.last: self.together}
        made = pair.merged(budget, blends=blends)
        sizes = made.costs.flops / made.costs.parent_flops, made.costs.parameters / made.costs.parent_parameters
        return Merged([made.network], self._after_fit, self.looked_at("compare", "measure"), size=sizes)

    def regmean(self) -> Merged:
        """Least squares on the parents' own inputs, in the order that they are in."""
        pair = Pair(
            self.found,
            self.one,
            self.two,
            [*self.compare, *self.measure],
            settings=Settings(way="layers", target="separate", recalibrate=False),
        )
        pair.orders = self.spec.identity()
        return Merged([pair.merged(1.0).network], self._after_fit, self.looked_at("compare", "measure"))

    @property
    def _after_fit(self) -> str:
        return "none" if self.statistics == "REPAIR" else self.statistics

    def looked_at(self, *keys: str) -> dict[str, int]:
        """How many pictures, by what for."""
        return {key: sum(len(args[0]) for args, _ in getattr(self, key)) for key in keys}

    def best(self, merge: Callable[[float], nn.Module], *keys: str) -> Merged:
        """With the balance whose answers are nearest to the parents' mean."""
        parents = [self.one, self.two]
        chosen = choose_balance(merge, parents, self.held_out, balances=self.balances, output=self.answers)
        return Merged(
            [chosen.network], self.statistics, self.looked_at(*keys, "held_out"), chosen.balance, chosen.distances
        )


def _zip(bench: Bench) -> Merged:
    return Merged([bench.zipped(0.0)], bench.statistics, bench.looked_at(*_zip_keys(bench)))


def _zip_keys(bench: Bench) -> tuple[str, ...]:
    """A zip repairs by what it compares."""
    return ("compare",) if bench.statistics == "REPAIR" else ("compare", "measure")


def _part(bench: Bench) -> Merged:
    statistics = "none" if bench.statistics == "REPAIR" else bench.statistics
    return Merged(bench.partly(), statistics, bench.looked_at("compare", "measure"))


def merge(rule: Rule, bench: Bench) -> Merged:
    """What a rule makes of two networks."""
    name, _, budget = rule.partition("@")
    if name not in IN_PART:
        return RULES[name](bench)
    way: Way = "layers" if name == "pleas" else "sequence"
    return bench.in_part(way, float(budget or 1), answers=name == "refit_answers")


def label(rule: Rule) -> str:
    """A rule in a table."""
    name, at, budget = rule.partition("@")
    return f"{LABELS[name]}, {float(budget):g}x" if at else LABELS[name]


RULES: dict[str, Callable[[Bench], Merged]] = {
    "average": lambda b: Merged([b.mean(b.spec.identity())], b.statistics, b.looked_at("measure")),
    "weights": lambda b: Merged([b.mean(b.by_weights)], b.statistics, b.looked_at("measure")),
    "activations": lambda b: Merged([b.mean(b.by_activations)], b.statistics, b.looked_at("compare", "measure")),
    "dual": lambda b: b.best(lambda x: b.mean(b.by_both(x)), "compare", "measure"),
    "zip": _zip,
    "dual_zip": lambda b: b.best(b.zipped, *_zip_keys(b)),
    "part_zip": _part,
    "ensemble": lambda b: Merged([b.one, b.two], "none", {}, size=(2.0, 2.0)),
    "regmean": lambda b: b.regmean(),
}

LABELS: dict[str, str] = {
    "average": "average",
    "weights": "aligned by weights (Git Re-Basin)",
    "activations": "aligned by activations",
    "dual": "aligned by both (MuDSC)",
    "zip": "zipped by activations (ZipIt)",
    "dual_zip": "zipped by both (MuDSC)",
    "part_zip": "zipped in part, two ends",
    "ensemble": "both networks",
    "regmean": "RegMean, in the order they are in",
    "pleas": "PLeaS, layer by layer",
    "refit": "refitted from front to back",
    "refit_answers": "refitted to the answers of both",
}


@torch.no_grad()
def embeddings(network: nn.Module, batches: Sequence[Tensor], *, bfloat16: bool = False) -> Tensor:
    """What a network makes of pictures, shape (n, width)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return torch.cat([network(x).float() for x in batches])
