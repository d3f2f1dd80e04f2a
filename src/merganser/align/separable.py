"""Which groups of units a network can hold apart, by trying it.

A wider network with some units apart is run in float64 in three states, and must give what the network gave:

    A's units are the network's, B's are anything, and what reads both reads A's alone
    the same with A and B exchanged
    both are the network's, laid out as two that are merged
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from merganser.align.layout import Side, Split, Splits, coefficients, layout, taken, widened
from merganser.align.wider import plan, rewidened
from merganser.errors import MerganserError, ParameterError, ShapeError
from merganser.symmetry import Spec, Symmetries
from merganser.symmetry.checking import (
    DRAWS,
    TOLERANCE,
    differences,
    doubled,
    in_double,
    largest_change,
    scales_of,
    stirred,
    whole,
)
from merganser.symmetry.record import Output, copied, tensors_of


def separable(
    found: Symmetries,
    network: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    output: Output | None = None,
    *,
    seed: int = 0,
) -> dict[str, str | None]:
    """Groups of units that may be split; those that lie within others go with these.

    Args:
        found: symmetries of the network.
        network: left as it is.
        args: positional inputs.
        kwargs: named inputs.
        output: what of the result must stay; by default all of it.
        seed: of the weights' noise, and of which units are tried.

    Returns:
        For every group that may move and lies within none: None, or why it cannot be split. Two groups that can be
        split each may still not be split together: `fault` tells.
    """
    spec = found.spec
    names = [name for name, group in spec.groups.items() if group.within is None and not group.fixed]
    trial = _Trial(spec, network, args, kwargs, output, seed)
    generator = torch.Generator().manual_seed(seed)
    some = _some({name: spec.groups[name].size for name in names}, generator)
    every = {name: Split(spec.groups[name].size, tuple(range(spec.groups[name].size))) for name in names}
    reasons: dict[str, str | None] = {}
    for splits in (some, every):
        reasons |= trial.sift({name: splits[name] for name in names if reasons.get(name) is None})
    return {name: reasons[name] for name in names}


def fault(
    spec: Spec,
    network: nn.Module,
    splits: Splits,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    output: Output | None = None,
    *,
    seed: int = 0,
) -> str | None:
    """Why a network with these splits would not hold two networks, or None where it does.

    Args:
        spec: symmetries of the network.
        network: left as it is.
        splits: of groups.
        args: positional inputs.
        kwargs: named inputs.
        output: what of the result must stay; by default all of it.
        seed: of the weights' noise.
    """
    return _Trial(spec, network, args, kwargs, output, seed).fault(splits)


def _some(sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Split]:
    """Some random units of every group; of groups of one size, each another number, as far as there are so many."""
    splits: dict[str, Split] = {}
    seen: dict[int, int] = {}
    for name, size in sizes.items():
        seen[size] = seen.get(size, int(torch.randint(size, (), generator=generator))) + 1
        chosen = torch.randperm(size, generator=generator)[: 1 + seen[size] % size]
        splits[name] = Split(size, tuple(sorted(chosen.tolist())))
    return splits


class _Trial:
    """A network in float64 with a little noise on its weights, and what it gives."""

    def __init__(
        self,
        spec: Spec,
        network: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        output: Output | None,
        seed: int,
    ) -> None:
        self.spec, self.output, self.seed = spec, output, seed
        try:
            self.given = network.state_dict()
            self.network = copy.deepcopy(network).double().eval()
        except (RuntimeError, TypeError) as error:
            raise ParameterError(f"the network cannot be copied: {error}") from error
        self.args, self.kwargs = (tree_map_only(Tensor, doubled, x) for x in (tuple(args), dict(kwargs or {})))
        self.drawn = seed - 1
        self._draw(seed)
        self.draws = DRAWS if whole(self.differences) else 1

    def _draw(self, seed: int) -> None:
        """Take other noise, and run the network with it; the network is left with it."""
        if seed == self.drawn:
            return
        generator = torch.Generator().manual_seed(seed)
        self.tensors = self._stirred(generator)
        wild = {id(x): _anything(x, generator) for x in {id(x): x for x in self.tensors.values()}.values()}
        self.wild = {name: wild[id(x)] for name, x in self.tensors.items()}
        others = self._run_with(self._stirred(generator))
        self.reference = self._run_with(self.tensors)
        self.differences = differences(self.reference, others)
        self.scales, self.drawn = scales_of(self.reference, others), seed

    def _stirred(self, generator: torch.Generator) -> dict[str, Tensor]:
        """All tensors with noise; tied ones stay one tensor."""
        own = self.network.state_dict(keep_vars=True)
        known: dict[int, Tensor] = {}
        for name, x in own.items():
            if id(x) not in known:
                known[id(x)] = stirred(doubled(self.given[name].detach()), generator)
        return {name: known[id(x)] for name, x in own.items()}

    def _run_with(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        self.network.load_state_dict(tensors)
        return self._run(self.network)

    def sift(self, splits: Splits) -> dict[str, str | None]:
        """Why each group cannot be split; where all can be together, none is tried alone."""
        if not splits:
            return {}
        reason = self.fault(splits)
        names = list(splits)
        if reason is None or len(names) == 1:
            return dict.fromkeys(names, reason)
        half = len(names) // 2
        return {
            n: why
            for part in (names[:half], names[half:])
            for n, why in self.sift({n: splits[n] for n in part}).items()
        }

    def fault(self, splits: Splits) -> str | None:
        """Why a network with these splits would not hold two networks, or None where it does."""
        try:
            wide = rewidened(self.network, plan(self.network, self.spec, splits))
            for draw in range(self.draws):
                self._draw(self.seed + draw)
                for state in (self._one, self._other, self._twin):
                    results = self._run(self._filled(wide, state, splits))
                    change = largest_change(self.reference, results, self.scales)
                    if change > TOLERANCE:
                        return self._words(change, splits)
        except MerganserError as error:
            return error.message
        except Exception as error:  # whatever the code of a network does
            return f"the wider network cannot be run: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None

    def _words(self, change: float, splits: Splits) -> str:
        together = [
            name.rpartition(".")[0]
            for group in splits
            for name, axis in self.spec.members(group)
            if self.spec.axes[name][axis] == group and self._normalises(name)
        ]
        if change == inf:
            return "the output is of another shape, not finite, or of other whole numbers where its units were split"
        why = f": {together[0]} normalises its units together" if together else ""
        return f"the output changed by {change:.0e} where its units were split{why}"

    def _normalises(self, name: str) -> bool:
        """Whether a tensor is of a norm over all units of one place."""
        module = self.network.get_submodule(name.rpartition(".")[0])
        apart = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
        return "Norm" in type(module).__name__ and not apart

    def _filled(self, wide: nn.Module, make: Callable[[str, Splits], Tensor], splits: Splits) -> nn.Module:
        """The wide network with other entries, a tensor at a time: all at once would take as much memory again."""
        for name, own in wide.state_dict().items():
            x = make(name, splits) if name in self.spec.axes else self.tensors[name]
            if x.shape != own.shape:
                raise ShapeError(f"{name} is {tuple(x.shape)}, and the wider network's {tuple(own.shape)}")
            own.copy_(x)
        return wide

    def _one(self, name: str, splits: Splits) -> Tensor:
        return self._alone(name, splits, Side.FIRST)

    def _other(self, name: str, splits: Splits) -> Tensor:
        return self._alone(name, splits, Side.SECOND)

    def _twin(self, name: str, splits: Splits) -> Tensor:
        return widened(self.spec, name, self.tensors[name], self.tensors[name], splits)

    def _alone(self, name: str, splits: Splits, side: Side) -> Tensor:
        """One side's entries where they count, anything where the other side's units are made, zero elsewhere."""
        x, laid = self.tensors[name], layout(self.spec, name, splits)
        if not x.is_floating_point():
            return self._twin(name, splits)
        mine, its = coefficients(laid) if side == Side.FIRST else coefficients(laid)[::-1]
        other = Side.SECOND if side == Side.FIRST else Side.FIRST
        zero = torch.zeros((), dtype=x.dtype)
        rest = torch.where(its == 1, taken(self.wild[name], laid, side), zero)
        return torch.where(mine > 0, taken(x, laid, other), rest)

    def _run(self, network: nn.Module) -> list[Tensor]:
        network = copied(network)  # a run may keep things
        with in_double():
            result = network(*self.args, **self.kwargs)
        return tensors_of(result, self.output)


def _anything(x: Tensor, generator: torch.Generator) -> Tensor:
    """Another tensor of this kind: of about its size, positive where it is."""
    if not x.is_floating_point() or not x.numel():
        return x
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    if bool((x >= 0).all()) and bool((x > 0).any()):
        return x * torch.exp(noise)
    return (float(x.square().mean().sqrt()) or 0.1) * noise
