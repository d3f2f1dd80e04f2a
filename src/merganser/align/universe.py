r"""Several networks in one order of units that none of them sets: Frank-Wolfe over doubly stochastic matrices (C2M3).

    maximise f(X) = sum_{a<b} sum_l <Y_a^l, Y_b^l>,   Y_m^l = tensor l of network m, X_m^g along every axis of group g
    S = argmax <grad f, S> over permutations (one assignment a matrix),   X <- X + t (S - X)

Along a step f is a polynomial in t, of twice as many degrees as matrices act on a tensor: evaluated that often and one
time more it is known, so t is its exact maximum on [0, 1]. Maps from one network to another go through the common
places, X_a^T X_b, so that going round a cycle changes nothing.

Source: Crisostomi et al. 2024, arXiv:2405.17897, algorithm 1. There t is found by a bounded search, and the result is
not improved by coordinate ascent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from merganser.align.assignment import assign
from merganser.align.costs import is_statistic
from merganser.align.many import Tensors, merge_many
from merganser.errors import ParameterError
from merganser.numerics import raw_bytes
from merganser.symmetry import Orders, Spec
from merganser.symmetry.spec import Part, groups_in

#: Gain of a step below which Frank-Wolfe ends, as a share of the objective.
LEAST_GAIN = 1e-9


@dataclass(frozen=True)
class Universe:
    """One order for all.

    Attributes:
        orders: of every network.
        steps: of Frank-Wolfe.
        objective: f at the orders, over tensors that the groups of Frank-Wolfe move.
        rounded: f at the orders that Frank-Wolfe gave, before coordinate ascent.
    """

    orders: list[dict[str, Tensor]]
    steps: int
    objective: float
    rounded: float


@torch.inference_mode(False)
def universe(
    spec: Spec,
    networks: Sequence[Tensors],
    *,
    start: Sequence[Orders] | None = None,
    starts: int = 3,
    steps: int = 200,
    improve: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Universe:
    """Bring all networks into one order of units, none of them being the reference.

    Groups that hold others, such as attention heads, and those within them keep the order of `start` while Frank-Wolfe
    runs; coordinate ascent moves them too.

    Networks are taken by what their tensors hold, so that their mean does not depend on the order in which they are
    given, but for rounding and for which of several equal units comes first.

    Args:
        spec: symmetries of all.
        networks: tensors by name, in memory.
        start: orders to begin with; by default those that the networks are in.
        starts: how often to begin, from `start` and then from random orders; the largest f counts.
        steps: of Frank-Wolfe, at most, a start.
        improve: go on from the rounded result by `merge_many`'s coordinate ascent, and take it if f is not lower.
        seed: of the random starts, and of the order in which coordinate ascent takes networks and groups.
        progress: called as (starts done, starts).

    Raises:
        ParameterError: If there are fewer than two networks, or no start.
        ShapeError: If a network has other shapes than the symmetries say.
    """
    if len(networks) < 2:
        raise ParameterError(f"{len(networks)} network; a common order takes two or more")
    if starts < 1:
        raise ParameterError(f"starts is {starts}; it is at least 1")
    for i, network in enumerate(networks):
        spec.check({n: x.shape for n, x in network.items() if n in spec.axes}, ref=f"network {i}")
    free = [n for n, g in spec.groups.items() if g.within is None and not g.fixed and not spec.inner(n)]
    begun = [dict(o) for o in start] if start is not None else [spec.identity() for _ in networks]
    taken = sorted(range(len(networks)), key=lambda i: _digest(spec, networks[i]))
    networks, begun = [networks[i] for i in taken], [begun[i] for i in taken]
    generator = torch.Generator().manual_seed(seed)
    found: Universe | None = None
    for attempt in range(starts):
        if attempt:
            noise = [{**spec.identity(), **spec.random(generator, free)} for _ in networks]
            begun = [spec.compose(o, then) for o, then in zip(begun, noise, strict=True)]
        problem = _Problem(spec, free, networks, begun)
        turned, done = _ascend(problem, steps)
        orders = [spec.compose(o, {**spec.identity(), **then}) for o, then in zip(begun, turned, strict=True)]
        rounded = _value(spec, free, networks, orders)
        result = Universe(orders, done, rounded, rounded)
        if improve:  # it moves groups, too, that f does not count, and may lose by that
            better = merge_many(spec, networks, start=orders, seed=seed)
            if (value := _value(spec, free, networks, better)) >= rounded:
                result = Universe(better, done, value, rounded)
        if found is None or result.objective > found.objective:
            found = result
        if progress is not None:
            progress(attempt + 1, starts)
    assert found is not None
    return replace(found, orders=[found.orders[taken.index(i)] for i in range(len(networks))])


def _digest(spec: Spec, network: Tensors) -> bytes:
    """Of all tensors that units lie along."""
    digest = hashlib.sha256()
    for name in sorted(spec.axes.keys() & network.keys()):
        digest.update(name.encode())
        digest.update(raw_bytes(network[name].detach().cpu()))
    return digest.digest()


def _ascend(problem: _Problem, steps: int) -> tuple[list[dict[str, Tensor]], int]:
    """Frank-Wolfe from where all networks are: orders of every network, and steps taken."""
    x = problem.identity()
    now = problem.value(x)
    for done in range(steps):
        corner = [torch.stack([_permutation(g) for g in of_group]) for of_group in problem.gradient(x)]
        t, value = problem.best_step(x, corner)
        if value - now <= LEAST_GAIN * max(1.0, abs(now)):
            return problem.rounded(x), done
        x, now = [y + t * (s - y) for y, s in zip(x, corner, strict=True)], value
    return problem.rounded(x), steps


def _value(spec: Spec, free: list[str], networks: Sequence[Tensors], orders: Sequence[Orders]) -> float:
    problem = _Problem(spec, free, networks, orders)
    return problem.value(problem.identity())


class _Problem:
    """f and what is needed of it; X is a list over groups of tensors (networks, n, n)."""

    def __init__(self, spec: Spec, free: list[str], networks: Sequence[Tensors], orders: Sequence[Orders]) -> None:
        self.spec, self.free, self.count = spec, free, len(networks)
        names = [
            n
            for n, parts in spec.axes.items()
            if n not in spec.tied
            and n in networks[0]
            and networks[0][n].is_floating_point()
            and not is_statistic(n)
            and any(g in free for part in parts for g in groups_in(part))
        ]
        self.tensors = {
            n: [spec.apply(o, n, net[n]).double() for net, o in zip(networks, orders, strict=True)] for n in names
        }
        self.degree = 2 * max((sum(_factors(part, free) for part in spec.axes[n]) for n in names), default=0)

    def identity(self) -> list[Tensor]:
        return [
            torch.eye(self.spec.groups[g].size, dtype=torch.float64).expand(self.count, -1, -1).clone()
            for g in self.free
        ]

    def rounded(self, x: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The nearest permutations, of every network."""
        return [{g: assign(y[m]) for g, y in zip(self.free, x, strict=True)} for m in range(self.count)]

    def objective(self, x: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, tensors in self.tensors.items():
            mapped = []
            for m, tensor in enumerate(tensors):
                of_network = {g: matrices[m] for g, matrices in zip(self.free, x, strict=True)}
                y = tensor
                for axis, part in enumerate(self.spec.axes[name]):
                    y = _mapped(self.spec, part, of_network, y, axis)
                mapped.append(y)
            total = total + (sum(mapped, torch.zeros(())).square().sum() - sum(y.square().sum() for y in mapped)) / 2
        return total

    def value(self, x: Sequence[Tensor]) -> float:
        with torch.no_grad():
            return float(self.objective(x))

    def gradient(self, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if not x:
            return ()
        with torch.enable_grad():
            variables = [y.detach().clone().requires_grad_() for y in x]
            return torch.autograd.grad(self.objective(variables), variables)

    def best_step(self, x: Sequence[Tensor], corner: Sequence[Tensor]) -> tuple[float, float]:
        """The t in [0, 1] with the largest f(x + t (corner - x)), and f there."""

        def at(t: float) -> float:
            return self.value([y + t * (s - y) for y, s in zip(x, corner, strict=True)])

        points = (1 - np.cos(np.linspace(0, np.pi, self.degree + 1))) / 2
        line = np.polynomial.Polynomial.fit(points, [at(float(t)) for t in points], self.degree, domain=[0, 1])
        roots = np.asarray(line.deriv().roots(), dtype=complex)
        turns = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
        return max(((t, float(line(t))) for t in (0.0, *turns, 1.0)), key=lambda found: found[1])


def _factors(part: Part, free: Sequence[str]) -> int:
    """How many matrices act on an entry of an axis."""
    if not isinstance(part, dict):
        return int(part in free)
    counts = [_factors(p, free) for p in next(iter(part.values()))]
    return max(counts) if "sum" in part else sum(counts)


def _permutation(gradient: Tensor) -> Tensor:
    return torch.eye(len(gradient), dtype=gradient.dtype)[assign(gradient)]


def _mapped(spec: Spec, part: Part, matrices: Mapping[str, Tensor], x: Tensor, axis: int) -> Tensor:
    """A tensor with a matrix along every piece of an axis that has one."""
    if not any(g in matrices for g in groups_in(part)):
        return x
    if isinstance(part, str):
        turned: Tensor = torch.tensordot(matrices[part], x, dims=([1], [axis]))
        return turned.movedim(0, axis)
    assert isinstance(part, dict)
    if "sum" in part:
        pieces = torch.split(x, [spec.size(p) for p in part["sum"]], dim=axis)
        return torch.cat(
            [_mapped(spec, p, matrices, piece, axis) for p, piece in zip(part["sum"], pieces, strict=True)], dim=axis
        )
    factors = part["product"]
    x = torch.unflatten(x, axis, [spec.size(p) for p in factors])
    for i, p in enumerate(factors):
        x = _mapped(spec, p, matrices, x, axis + i)
    return x.flatten(axis, axis + len(factors) - 1)
