"""Similarities to orders: linear assignment, two levels of it for units within units, coordinate ascent over groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from merganser.align.activations import ActivationCosts
from merganser.align.assignment import assign
from merganser.align.costs import Costs, WeightCosts
from merganser.align.follow import following
from merganser.symmetry import Orders, Spec
from merganser.symmetry.spec import groups_in

#: Gain below which a change is rounding, as a share of the value.
LEAST_GAIN = 1e-12

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Matched:
    """An alignment.

    Attributes:
        orders: of the network that moves.
        sweeps: until nothing changed.
        settled: whether nothing changed at the end, rather than the sweeps having run out.
    """

    orders: dict[str, Tensor]
    sweeps: int
    settled: bool


def match(
    spec: Spec,
    costs: Costs,
    *,
    start: Orders | None = None,
    sweeps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Matched:
    """Coordinate ascent: the best order of one group after another, the others as they are, until nothing changes.

    Groups that activations do not show join in when the others have settled: their weights are compared by what they
    share with those.

    Args:
        spec: symmetries.
        costs: similarities, of tensors that stay as they are until it returns.
        start: orders to begin with; by default those that the networks are in.
        sweeps: at most.
        seed: of the order of groups in a sweep.
        progress: called as (groups done, groups of a sweep), anew in every sweep.
    """
    costs = following(costs)
    orders = dict(spec.identity() if start is None else start)
    top = [name for name, group in spec.groups.items() if group.within is None]
    touched = _neighbours(spec, costs)
    late = _late(spec, costs, top)
    waiting = set(top) - late  # groups whose similarities may have changed since they were last looked at
    generator = torch.Generator().manual_seed(seed)
    for sweep in range(1, sweeps + 1):
        for done, place in enumerate(torch.randperm(len(top), generator=generator).tolist(), 1):
            group = top[place]
            if group in waiting:
                waiting.discard(group)
                if _improve(spec, costs, orders, group):
                    waiting |= touched[group] - late
            if progress is not None:
                progress(done, len(top))
        if not waiting and late:
            waiting, late = late, set()
        elif not waiting:
            return Matched(orders, sweep, settled=True)
    return Matched(orders, sweeps, settled=False)


def _late(spec: Spec, costs: Costs, top: list[str]) -> set[str]:
    """Groups that lie within none, and are compared by weights for want of activations, or hold one that is."""
    hidden = set(costs.hidden()) if isinstance(costs, ActivationCosts) else set()
    return {group for group in top if hidden & {group, *spec.inner(group)}}


def _neighbours(spec: Spec, costs: Costs) -> dict[str, set[str]]:
    """For every group that lies within none: those whose similarities its order has a part in.

    A group is its own neighbour where it lies along two axes of one tensor, and where its inner groups are matched
    after it.
    """
    found: dict[str, set[str]] = {
        n: {n} if spec.inner(n) else set() for n, g in spec.groups.items() if g.within is None
    }
    for parts in costs.meetings():
        along = [{spec.groups[g].within or g for g in groups_in(part)} for part in parts]
        for axis, groups in enumerate(along):
            others = set[str]().union(*along[:axis], *along[axis + 1 :])
            for group in groups:
                found[group] |= others | (groups - {group})
    return found


def _improve(spec: Spec, costs: Costs, orders: dict[str, Tensor], group: str) -> bool:
    """Give a group, with its inner ones, its best order; whether that is better than the one it had."""
    inner = spec.inner(group)
    if not inner:
        similarity = costs.units(group, orders)
        if isinstance(costs, WeightCosts) and costs.kind == "frobenius" and _twice(spec, group):
            # to it the similarity is a linear view of something quadratic
            return _accept(orders, {group: assign(similarity)}, costs.objective, [group])
        return _accept(orders, {group: assign(similarity)}, lambda new: _value(similarity, new[group]), [group])
    changed = not spec.groups[group].fixed and _improve_outer(spec, costs, orders, group, inner)
    for name in inner:
        pairs = costs.inner_units(name, orders)
        here = pairs[torch.arange(len(pairs)), orders[group]]  # what stands at each place now, shape (outer, n, n)
        best = torch.stack([assign(s) for s in here])
        changed |= _accept(
            orders,
            {name: best},
            lambda new, name=name, here=here: sum(_value(s, o) for s, o in zip(here, new[name], strict=True)),  # type: ignore[misc]
            [name],
        )
    return changed


def _twice(spec: Spec, group: str) -> bool:
    return any(sum(group in groups_in(part) for part in parts) > 1 for parts in spec.axes.values())


def _improve_outer(spec: Spec, costs: Costs, orders: dict[str, Tensor], group: str, inner: list[str]) -> bool:
    """Two levels: the best inner order for every pair of places says how alike the places are."""
    score = costs.units(group, orders)
    size = spec.groups[group].size
    solved: dict[str, Tensor] = {}
    for name in inner:
        pairs = costs.inner_units(name, orders)
        solved[name] = torch.stack([torch.stack([assign(pairs[i, k]) for k in range(size)]) for i in range(size)])
        matched = pairs.gather(3, solved[name].unsqueeze(-1)).squeeze(-1)
        score = score + matched.sum(-1)
    best = assign(score)
    places = torch.arange(size)
    new = {group: best, **{name: solved[name][places, best] for name in inner}}
    # what it has now is scored with the inner orders that it has now
    now = costs.units(group, orders)[places, orders[group]].sum()
    for name in inner:
        here = costs.inner_units(name, orders)[places, orders[group]]
        now = now + here.gather(2, orders[name].unsqueeze(-1)).sum()
    gain = float(score[places, best].sum() - now)
    if gain <= LEAST_GAIN * max(1.0, abs(float(now))) or all(torch.equal(new[n], orders[n]) for n in new):
        return False
    orders.update(new)
    return True


def _value(similarity: Tensor, order: Tensor) -> float:
    return float(similarity.gather(1, order.unsqueeze(-1)).sum())


def _accept(
    orders: dict[str, Tensor], new: dict[str, Tensor], value: Callable[[Orders], float], names: list[str]
) -> bool:
    if all(torch.equal(new[n], orders[n]) for n in names):
        return False
    now = value(orders)
    if value({**orders, **new}) - now <= LEAST_GAIN * max(1.0, abs(now)):
        return False
    orders.update(new)
    return True
