"""Trace a network, find its symmetries, and return none that does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn

from merganser.symmetry.checking import failing
from merganser.symmetry.finding import Tap, find
from merganser.symmetry.record import Output, record_run
from merganser.symmetry.spec import Part, Spec, groups_in


@dataclass(frozen=True)
class Symmetries:
    """What was found.

    Attributes:
        spec: groups that hold.
        unsound: groups that the rules gave and the check refused.
        unknown: operations without a rule, whose tensors are pinned.
        unused: parameters that the run did not use.
        coverage: share of the parameters that some group moves.
        checked: whether the self-check ran.
        taps: activations that show the units of groups; those of refused groups are left in.
        factors: those, and what is made of parameters alone: all that products take in.
    """

    spec: Spec
    unsound: tuple[str, ...]
    unknown: tuple[str, ...]
    unused: tuple[str, ...]
    coverage: float
    checked: bool
    taps: tuple[Tap, ...] = ()
    factors: tuple[Tap, ...] = ()


def symmetries(
    network: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: Output | None = None,
    check: bool = True,
    seed: int = 0,
) -> Symmetries:
    """The permutation symmetries of a network.

    Args:
        network: any network; it is run once in evaluation mode and left as it is.
        args: positional inputs, such as a batch of two pictures.
        kwargs: named inputs.
        output: what of the result must stay as it is, such as `lambda result: result.logits`; by default all of it.
        check: run it some times more, in float64, to see that random group elements leave the output as it is; groups
            that do not are left out. A network on `meta` cannot be checked.
        seed: of the check.
    """
    found = find(record_run(network, args, kwargs, output))
    spec, unsound = found.spec, tuple[str, ...]()
    while check and (bad := failing(network, args, kwargs, spec, output=output, seed=seed)):
        unsound = tuple(dict.fromkeys((*unsound, *bad)))
        spec = _weaker(spec, bad)
    covered = coverage(network, spec)
    return Symmetries(spec, unsound, found.unknown, found.unused, covered, check, found.taps, found.factors)


def _weaker(spec: Spec, names: Sequence[str]) -> Spec:
    """A spec that claims less of some groups: one common order in place of one a place, and then none."""
    if loose := [name for name in names if spec.groups[name].within is not None]:
        groups = {n: replace(g, within=None) if n in loose else g for n, g in spec.groups.items()}
        return replace(spec, groups=groups)
    return without(spec, names)


def without(spec: Spec, names: Sequence[str]) -> Spec:
    """A spec in which some groups are pinned."""
    groups = {n: replace(g, within=None) if g.within in names else g for n, g in spec.groups.items() if n not in names}

    def fixed(part: Part) -> Part:
        if isinstance(part, str):
            return spec.groups[part].size if part in names else part
        if isinstance(part, dict):
            ((kind, parts),) = part.items()
            return {kind: [fixed(p) for p in parts]}
        return part

    axes = {n: tuple(map(fixed, parts)) for n, parts in spec.axes.items()}
    pinned = dict(spec.pinned) | {
        f"{n}[{i}]": "refused by the self-check"
        for n, parts in spec.axes.items()
        for i, part in enumerate(parts)
        if any(g in names for g in groups_in(part))
    }
    return Spec(groups, axes, spec.roles, pinned, spec.tied)


def coverage(network: nn.Module, spec: Spec) -> float:
    """Share of the parameters, tied ones counted once, that some group moves."""
    seen = dict(network.named_parameters())
    moved = sum(x.numel() for n, x in seen.items() if spec.moves(n))
    return moved / max(1, sum(prod(x.shape) for x in seen.values()))
