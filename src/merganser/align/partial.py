"""Merge two networks in part, under a budget: match, choose which pairs stay apart, lay out, refit.

    Both = Pair(found, one, two, batches)         measured once
    merged = Both.merged(budget=1.2)              any number of times, from what was measured

Source: Nasery et al. 2024, arXiv:2407.02447 (PLeaS). Layers are refitted in closed form, by default from front to back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch, activation_costs
from merganser.align.blocks import blocked
from merganser.align.budget import choose
from merganser.align.cost import Costs, Quadratic, flops, parameters, quadratic
from merganser.align.costs import WeightCosts
from merganser.align.layers import Layer, Measure, layers_of
from merganser.align.layout import Split, Splits, head_axis, head_of, widened
from merganser.align.match import Progress, match
from merganser.align.moments import Joint, joint_groups
from merganser.align.outputs import Outputs
from merganser.align.ran import Ran, cut, examples, layers_run
from merganser.align.refit import Refitted, Target, check_share, refit
from merganser.align.renorm import measure_batch_norm, reset_batch_norm
from merganser.align.sensitivity import kept_apart, unit_values
from merganser.align.separable import fault, separable
from merganser.align.sequence import Blend, Sampling, refit_in_sequence, to_note
from merganser.align.wider import Record, filled, others, plan, rewidened
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Orders, Symmetries
from merganser.symmetry.record import Output

Way = Literal["sequence", "layers", "none"]
Matching = Literal["activations", "weights"]


@dataclass(frozen=True)
class Settings:
    """How two networks are merged in part.

    Attributes:
        way: "sequence" refits front to back on what the merged network gives; "layers" each layer by itself, on what
            its parents take in; "none" leaves the block average.
        target: with "layers": what a layer shall give.
        share: of B in what is merged, in (0, 1): 1 / N where A is what N - 1 networks were merged into.
        ridge: pull to the block average, in [0, inf).
        measure: what the budget counts.
        multiple: channels that are kept apart at a time.
        match: how units are paired.
        recalibrate: measure the parents' BatchNorm on the batches first: with "sequence" on all of them at once, as
            that of the merged network is.
        heads: layers whose outputs stay apart, for label spaces that differ; their outputs are A's, then B's.
        sampling: rows a layer is fitted to, and memory.
        seed: of matching and of the check.
        dense: count layers as `PartlyMerged.network` has them, zeros and all, and not as blocks.
    """

    way: Way = "sequence"
    target: Target = "averaged"
    share: float = 0.5
    ridge: float = 1e-3
    measure: Measure = "flops"
    multiple: int = 1
    match: Matching = "activations"
    recalibrate: bool = True
    heads: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    dense: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, words in (("way", Way), ("target", Target), ("measure", Measure), ("match", Matching)):
            if (value := getattr(self, name)) not in get_args(words):
                raise ParameterError(f"{name} is {value!r}; it is {' or '.join(get_args(words))}")
        if not 0 <= self.ridge < inf:
            raise ParameterError(f"ridge is {self.ridge}; it is a number of at least 0")
        check_share(self.share, self.target)


@dataclass(frozen=True)
class PartlyMerged:
    """A network from two.

    Attributes:
        network: with dense layers, in evaluation mode.
        record: how it differs from one of its parents.
        splits: which units are apart.
        costs: as blocks, or as it is, as the settings say.
        refitted: what refitting did.
    """

    network: nn.Module
    record: Record
    splits: Splits
    costs: Costs
    refitted: Refitted

    def blocks(self) -> nn.Module:
        """The same network with layers of three blocks each, without zeros."""
        return blocked(self.network, self.record)


class Pair:
    """Two networks and what is measured of them, for any number of budgets.

    Args:
        found: symmetries of both, traced on inputs of the shapes of the batches.
        one: network A; left as it is, as B is.
        two: network B, of the same architecture; only heads that are kept apart may differ in their outputs.
        batches: inputs without labels, of both tasks, all of one shape.
        output: what of the network's result counts.
        settings: how.
        progress: called while something is measured, as (done, all).

    Raises:
        ParameterError: If there is no batch, or a head is none.
        ShapeError: If the networks differ in more than the heads.
        NonFiniteError: If the batches give BatchNorm NaN or infinity.
    """

    def __init__(
        self,
        found: Symmetries,
        one: nn.Module,
        two: nn.Module,
        batches: Sequence[Batch],
        *,
        output: Output | None = None,
        settings: Settings | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not batches:
            raise ParameterError("there is no batch to compare and fit the networks by")
        self.found, self.batches, self.output = found, batches, output
        self.settings, self.progress = settings or Settings(), progress
        self.one, self._two = (copy.deepcopy(n).eval() for n in (one, two))
        self._check()
        if self.settings.recalibrate:
            measure = measure_batch_norm if self.settings.way == "sequence" else reset_batch_norm
            for network in (self.one, self._two):
                measure(network, batches)
        self.a = _tensors(self.one)
        self._moments: dict[str, Joint] | None = None
        self._noted: tuple[Outputs, Outputs] | None = None

    @cached_property
    def orders(self) -> Orders:
        """The order of B's units that is nearest to A's."""
        spec, how = self.found.spec, self.settings
        if how.match == "activations":
            return match(spec, activation_costs(self.found, self.one, self._two, self.batches), seed=how.seed).orders
        b = _tensors(self._two)
        same = {n: x for n, x in self.a.items() if n in spec.axes and b[n].shape == x.shape}
        return match(spec, WeightCosts(spec, same, {n: b[n] for n in same}), seed=how.seed).orders

    @cached_property
    def two(self) -> nn.Module:
        """Network B in A's order."""
        spec, other = self.found.spec, copy.deepcopy(self._two)
        state = {n: spec.apply(self.orders, n, x) if n in spec.axes else x for n, x in other.state_dict().items()}
        return filled(other, state)

    @cached_property
    def b(self) -> dict[str, Tensor]:
        """Tensors of B in A's order."""
        return _tensors(self.two)

    @cached_property
    def reasons(self) -> dict[str, str | None]:
        """Why each group cannot be split; None where it can."""
        args, kwargs = self.few
        return separable(self.found, self.one, args, kwargs, self.output, seed=self.settings.seed)

    @cached_property
    def groups(self) -> list[str]:
        """Groups that can be split."""
        return [group for group, reason in self.reasons.items() if reason is None]

    @cached_property
    def layers(self) -> list[Layer]:
        """What one batch multiplies, and all parameters."""
        args, kwargs = self._example
        return layers_of(self.one, self.found.spec, args, kwargs, taps=self.found.factors)

    @cached_property
    def cost(self) -> Quadratic:
        """What the budget counts, by how many units of each group are apart."""
        how = self.settings
        return quadratic(self.layers, self.found.spec, self.groups, how.measure, heads=self._outputs, dense=how.dense)

    @cached_property
    def gains(self) -> dict[str, Tensor]:
        """What is gained by keeping each pair of each group apart, by its number."""
        spec, how = self.found.spec, self.settings
        total = {group: torch.zeros(spec.groups[group].size, dtype=torch.float64) for group in self.groups}
        a, b = kept_apart(self.a, self.b, how.heads, how.share)
        if how.way == "sequence":
            self._noted = to_note(self.one, self._ran, self.batches, how.sampling)
        for moments in self.moments() if how.way == "layers" else self._passes(self._noted):
            for group, gains in unit_values(spec, a, b, moments, self.groups, share=how.share).items():
                total[group] += gains
            del moments  # before the next pass
        return total

    @property
    def worthless(self) -> list[str]:
        """Groups of which no pair gains anything apart: alike in both, or in no layer that is measured."""
        return [group for group, gains in self.gains.items() if not bool((gains > 0).any())]

    def moments(self) -> Iterator[dict[str, Joint]]:
        """Second moments of what all layers take in, for `way: layers`: a pass over the batches at a time.

        Where one pass does, they are kept for the next call.
        """
        if self._moments is not None:
            yield self._moments
            return
        for found in self._passes():
            if len(found) == len(self._ran.layers):
                self._moments = found
            yield found
            del found  # before the next pass

    def splits(self, budget: float) -> dict[str, Split]:
        """Which units stay apart under a budget.

        Args:
            budget: in costs of one parent, A, in [1, 2]; at 1 nothing stays apart, and nothing is measured. Nor does
                anything where heads of both take all of it, or more: `costs` tells.

        Raises:
            ParameterError: If it is out of range, or units cannot be split together.
        """
        if not 1 <= budget <= 2:
            raise ParameterError(
                f"budget is {budget}; it is in [1, 2], in costs of one network", "2 holds both networks whole"
            )
        if budget == 1 or budget * self.cost.original <= self.cost.constant:
            return {}
        gains = {g: x.sort(descending=True, stable=True) for g, x in self.gains.items()}
        counts = choose(
            self.found.spec,
            self.groups,
            {group: x.values for group, x in gains.items()},
            self.cost,
            budget,
            multiple=self.settings.multiple,
        )
        return {
            group: Split(len(gains[group].indices), tuple(sorted(gains[group].indices[:count].tolist())))
            for group, count in counts.items()
            if count
        }

    def costs(self, splits: Splits) -> Costs:
        """What the network with these splits takes."""
        spec, apart = self.found.spec, {group: len(split.apart) for group, split in splits.items()}
        counted = [
            count(self.layers, spec, which, heads=heads, dense=self.settings.dense)
            for which, heads in ((apart, self._outputs), ({}, {}))
            for count in (flops, parameters)
        ]
        many = max(1, examples(self._example))
        return Costs(counted[0] // many, counted[1], counted[2] // many, counted[3])

    def merged(self, budget: float = 1.0, *, blends: Mapping[str, Blend] | None = None) -> PartlyMerged:
        """One network of both.

        Args:
            budget: in costs of one parent, in [1, 2].
            blends: by layer, what it shall give in place of the mean of both, for `way: sequence`.

        Raises:
            ParameterError: As `splits`; or if the network cannot hold these units apart.
        """
        return self.laid_out(self.splits(budget), blends=blends)

    def laid_out(self, splits: Splits, *, blends: Mapping[str, Blend] | None = None) -> PartlyMerged:
        """One network of both, with these units apart; arguments as for `merged`."""
        spec, how = self.found.spec, self.settings
        if blends and how.way != "sequence":
            raise ParameterError(f"way is {how.way}, and blends are for the way sequence")
        args, kwargs = self.few
        if splits and (why := fault(spec, self.one, splits, args, kwargs, self.output, seed=how.seed)):
            raise ParameterError(f"these units cannot be kept apart together: {why}", "give a smaller budget")
        state = {n: widened(spec, n, x, self.b[n], splits, how.heads, how.share) for n, x in self.a.items()}
        record = plan(self.one, spec, splits, others(self.one, spec, state, how.heads))
        network = filled(rewidened(self.one, record), state).eval()
        done = Refitted({}, {})
        if how.way == "sequence":
            done = refit_in_sequence(
                network,
                self.one,
                self.two,
                spec,
                splits,
                self.batches,
                ridge=how.ridge,
                sampling=how.sampling,
                apart_heads=how.heads,
                blends=blends,
                share=how.share,
                progress=self.progress,
                noted=self._noted,
            )
        elif how.way == "layers":
            for moments in self.moments():
                some = refit(
                    spec,
                    self.a,
                    self.b,
                    state,
                    moments,
                    splits,
                    ridge=how.ridge,
                    target=how.target,
                    free=self._ran.free,
                    apart_heads=how.heads,
                    share=how.share,
                    spent=moments is not self._moments,
                )
                del moments  # before the next pass
                done |= some
            done.kept.update(self._ran.left)
            filled(network, {**state, **done.tensors})
        if how.way != "sequence":
            reset_batch_norm(network, self.batches)
        return PartlyMerged(network, record, splits, self.costs(splits), done)

    @property
    def _example(self) -> Batch:
        """One batch, of the shapes that the symmetries were traced on."""
        return self.batches[0]

    @property
    def last(self) -> str:
        """The last layer that is refitted."""
        return self._ran.layers[-1]

    @property
    def few(self) -> Batch:
        """Two of its examples, to try what can be split."""
        return cut(self._example, 0, 2)

    @cached_property
    def _outputs(self) -> dict[str, tuple[int, int]]:
        """How many outputs A and B have in heads that stay apart."""
        found = {}
        for head in self.settings.heads:
            first, second = (n.get_parameter(f"{head}.weight").shape for n in (self.one, self._two))
            axis = head_axis(self.found.spec, f"{head}.weight")
            found[head] = first[axis], second[axis]
        return found

    @cached_property
    def _ran(self) -> Ran:
        return layers_run(self.one, self._example)

    def _passes(self, noted: tuple[Outputs, Outputs] | None = None) -> Iterator[dict[str, Joint]]:
        """Second moments of what layers take in."""
        how = self.settings.sampling
        return joint_groups(
            *(self.one, self.two, self.batches),
            layers=self._ran.layers,
            rows=how.rows,
            memory_bytes=how.memory_bytes,
            seed=how.seed,
            progress=self.progress,
            noted=noted,
        )

    def _check(self) -> None:
        own, other = self.one.state_dict(), self._two.state_dict()
        last = [f"the last linear layer is {n}" for n, m in self.one.named_modules() if isinstance(m, nn.Linear)]
        for head in self.settings.heads:
            if f"{head}.weight" not in own:
                raise ParameterError(f"there is no head {head}", last[-1] if last else None)
            head_axis(self.found.spec, f"{head}.weight")  # refuses a layer that is none
        for name in sorted(own.keys() ^ other.keys()):
            raise ShapeError(f"only one of the networks has {name}", "both must be of one architecture")
        for name, x in own.items():
            if x.shape != other[name].shape and head_of(name, self.settings.heads) is None:
                raise ShapeError(
                    f"{name} is {tuple(x.shape)} in A and {tuple(other[name].shape)} in B",
                    "both must be of one architecture; name a head with other labels as one that stays apart",
                )


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in network.state_dict().items()}
