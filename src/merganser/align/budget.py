"""How many units of every group to keep apart, under a budget.

    maximise  sum_g gain_g(s_g)   where   cost(s) <= budget * cost of one network,   0 <= s_g <= d_g

gain_g(s) is what is gained by keeping the s worst pairs of group g apart: concave, since the worst come first. A unit
costs less where what it meets is apart already, so this is a knapsack of bilinear cost. Three ways are tried: from
nothing up by gain over cost, from everything down by the same, and relaxations to fractions of units, rounded down.
Each is filled up with what still fits, and in the best of them steps are exchanged as long as that helps.

Source: Nasery et al. 2024, arXiv:2407.02447, whose objective is linear; here every pair has a gain of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, inf

import numpy as np
from torch import Tensor

from merganser.align.cost import Quadratic, sides
from merganser.errors import ParameterError
from merganser.symmetry import Spec
from merganser.symmetry.spec import groups_in

#: What a sum of whole numbers may be off by in float64, as a share of it.
ROUNDING = 1e-12
#: What a step that costs nothing counts as, in FLOPs or parameters.
FREE = 1e-9


def choose(
    spec: Spec,
    groups: Sequence[str],
    values: Mapping[str, Tensor],
    cost: Quadratic,
    budget: float,
    *,
    multiple: int = 1,
) -> dict[str, int]:
    """How many units of every group to keep apart.

    Args:
        spec: symmetries of both networks.
        groups: that may be split.
        values: group -> gain of keeping each pair apart, the worst pair first, shape (size,). Where a gain is larger
            than one before it, both count as their mean; one below 0 counts as 0.
        cost: of every choice, with these groups in this order.
        budget: in costs of one network, in [1, 2].
        multiple: how many channels are kept apart at a time; the last step of a group may be smaller. Units of several
            channels, as heads are, count with all of them.

    Returns:
        Numbers of pairs, never above the budget: nothing at 1, everything at 2 where the network is built as blocks.

    Raises:
        ParameterError: If a setting is out of range, a gain is missing, of another shape or not finite, or not even
            the network with nothing apart is within the budget.
    """
    if not 1 <= budget <= 2:
        raise ParameterError(f"budget is {budget}; it is in [1, 2], in costs of one network")
    if multiple < 1:
        raise ParameterError(f"multiple is {multiple}; it is a number of channels of at least 1")
    if cost.groups != tuple(groups):
        raise ParameterError("the cost is of other groups, or of these in another order")
    limit = budget * cost.original
    if cost.constant > limit * (1 + ROUNDING):
        least = cost.constant / cost.original
        raise ParameterError(
            f"budget is {budget}, and with nothing apart the network costs {least:.4f} of one",
            f"its outputs are kept for both networks: a budget of {least:.4f} or more",
        )
    gains = [_marginal(group, spec.groups[group].size, values) for group in groups]
    steps = [step_of(spec, group, multiple) for group in groups]
    found = _Problem(cost, gains, steps, limit).best()
    return {group: int(count) for group, count in zip(groups, found, strict=True)}


def step_of(spec: Spec, group: str, multiple: int) -> int:
    """How many units of a group make a multiple of channels wherever it lies."""
    channels = 0
    for parts in spec.axes.values():
        for part in parts:
            if group in groups_in(part):
                channels = gcd(channels, sides(spec, part, {group: 1})[0])
    return min(spec.groups[group].size, multiple // gcd(multiple, max(1, channels)))


def concave(gains: np.ndarray) -> np.ndarray:
    """Gains that never grow: the nearest by squares, which are means of neighbours.

    >>> concave(np.array([3.0, 1.0, 2.0, 0.5]))
    array([3. , 1.5, 1.5, 0.5])
    """
    blocks: list[tuple[float, int]] = []
    for gain in gains.tolist():
        total, count = gain, 1
        while blocks and blocks[-1][0] * count < total * blocks[-1][1]:
            above, more = blocks.pop()
            total, count = total + above, count + more
        blocks.append((total, count))
    return np.concatenate([np.full(count, total / count) for total, count in blocks]) if blocks else np.zeros(0)


def _marginal(group: str, size: int, values: Mapping[str, Tensor]) -> np.ndarray:
    if group not in values:
        raise ParameterError(f"there are no gains of {group}")
    gains = values[group].detach().double().cpu().numpy()
    if gains.shape != (size,):
        raise ParameterError(f"gains of {group} are {gains.shape}; it has {size} units")
    if not np.isfinite(gains).all():
        raise ParameterError(f"a gain of {group} is not finite")
    return concave(np.maximum(gains, 0))


@dataclass
class _Problem:
    """Gains of every unit, a cost, and a limit to it."""

    cost: Quadratic
    gains: Sequence[np.ndarray]
    steps: Sequence[int]
    limit: float

    def __post_init__(self) -> None:
        self.count = len(self.gains)
        self.sizes = np.array([len(g) for g in self.gains], dtype=np.int64)
        self.sums = [np.concatenate([[0.0], np.cumsum(g)]) for g in self.gains]
        self.bound = self.limit * (1 + ROUNDING)

    def gain(self, apart: np.ndarray) -> float:
        """What is gained by keeping so many of each apart."""
        return float(sum(s[n] for s, n in zip(self.sums, apart, strict=True)))

    def fits(self, apart: np.ndarray) -> bool:
        """Whether it is within the budget."""
        return self.cost.at(apart) <= self.bound

    def best(self) -> np.ndarray:
        """The best choice found."""
        if self.fits(self.sizes):
            return self.sizes
        up = self.grown(np.zeros(self.count, dtype=np.int64))
        down = self.grown(self.shrunk(self.sizes))
        choices = [up, down]
        for start in self.starts(up, down):
            choices.append(self.grown(self.shrunk(self.rounded(self.relaxed(start)))))
        return self.exchanged(max(choices, key=self.gain))  # the first of equal ones: it nests

    def starts(self, *choices: np.ndarray) -> list[np.ndarray]:
        """Shares to begin a relaxation at: those of choices, the same one everywhere, and four at random."""
        same = np.full(self.count, min(1.0, self.limit / self.cost.original - 1))
        random = np.random.default_rng(0).random((4, self.count))
        return [*(choice / self.sizes for choice in choices), same, *random]

    def grown(self, apart: np.ndarray, *, held: int | None = None) -> np.ndarray:
        """With steps added as long as one fits: always the one of the most gain over cost.

        Args:
            apart: to begin with.
            held: a group that is left as it is.
        """
        apart = apart.copy()
        slope, curved = self.cost.slope(apart), self.cost.curved
        spent, own = self.cost.at(apart), curved.diagonal()
        step = np.array([self._up(g, apart[g]) for g in range(self.count)])
        gain = np.array([self.sums[g][apart[g] + step[g]] - self.sums[g][apart[g]] for g in range(self.count)])
        if held is not None:
            gain[held] = 0.0
        while True:
            price = step * (slope + own * step / 2)
            worth = np.where((gain > 0) & (spent + price <= self.bound), gain / np.maximum(price, FREE), -inf)
            g = int(worth.argmax()) if self.count else 0
            if not self.count or worth[g] == -inf:
                return apart
            spent += price[g]
            slope += curved[g] * step[g]
            apart[g] += step[g]
            step[g] = self._up(g, apart[g])
            gain[g] = self.sums[g][apart[g] + step[g]] - self.sums[g][apart[g]]

    def shrunk(self, apart: np.ndarray, *, held: int | None = None) -> np.ndarray:
        """With steps taken off until the rest fits: always the one of the least gain over cost.

        Args:
            apart: to begin with.
            held: a group that is left as it is.
        """
        apart = apart.copy()
        slope, curved = self.cost.slope(apart), self.cost.curved
        spent, own = self.cost.at(apart), curved.diagonal()
        step = np.array([self._down(g, apart[g]) for g in range(self.count)])
        loss = np.array([self.sums[g][apart[g]] - self.sums[g][apart[g] - step[g]] for g in range(self.count)])
        if held is not None:
            step[held] = 0
        while spent > self.bound and step.any():
            saved = step * (slope - own * step / 2)
            worth = np.where(step > 0, loss / np.maximum(saved, FREE), inf)
            g = int(worth.argmin())
            spent -= saved[g]
            slope -= curved[g] * step[g]
            apart[g] -= step[g]
            step[g] = self._down(g, apart[g])
            loss[g] = self.sums[g][apart[g]] - self.sums[g][apart[g] - step[g]]
        return apart

    def exchanged(self, apart: np.ndarray) -> np.ndarray:
        """With a group's steps given for steps of others, or the other way round, as long as that gains."""
        best, value = apart, self.gain(apart)
        while True:
            for other in self.neighbours(best):
                if self.gain(other) > value * (1 + 1e-9) and self.fits(other):
                    best, value = other, self.gain(other)
                    break
            else:
                return best

    def neighbours(self, apart: np.ndarray) -> Iterator[np.ndarray]:
        """Choices in which one group has a step less, or more, and the others what then fits."""
        for g in range(self.count):
            for change in (-self._down(g, apart[g]), self._up(g, apart[g])):
                if change:
                    other = apart.copy()
                    other[g] += change
                    if change < 0:
                        yield self.grown(self.grown(other, held=g))
                    elif self.fits(np.where(np.arange(self.count) == g, other, 0)):
                        yield self.grown(self.shrunk(other, held=g))

    def relaxed(self, start: np.ndarray) -> np.ndarray:
        """Shares of every group where units may be cut: a stationary point of the relaxation, shape (groups,)."""
        from scipy.optimize import minimize

        scale = self.gain(self.sizes) or 1.0
        curves = [_Curve(gains) for gains in self.gains]

        def value(share: np.ndarray) -> tuple[float, np.ndarray]:
            pairs = [curve.at(s) for curve, s in zip(curves, share * self.sizes, strict=True)]
            total = -sum(v for v, _ in pairs) / scale
            return float(total), -np.array([d for _, d in pairs]) * self.sizes / scale

        def room(share: np.ndarray) -> float:
            return (self.limit - self.cost.at(share * self.sizes)) / self.cost.original

        def slope(share: np.ndarray) -> np.ndarray:
            return np.asarray(-self.cost.slope(share * self.sizes) * self.sizes / self.cost.original)

        done = minimize(
            value,
            start,
            jac=True,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * self.count,
            constraints=[{"type": "ineq", "fun": room, "jac": slope}],
            options={"maxiter": 200, "ftol": 1e-9},
        )
        shares: np.ndarray = np.clip(np.nan_to_num(done.x), 0.0, 1.0)
        return shares

    def rounded(self, share: np.ndarray) -> np.ndarray:
        """Whole steps, none more than a share."""
        units = np.floor(share * self.sizes + 1e-6).astype(np.int64)
        steps = np.array(self.steps, dtype=np.int64)
        whole: np.ndarray = np.where(units == self.sizes, units, units // steps * steps)
        return whole

    def _up(self, g: int, apart: int) -> int:
        """Units of the next step of a group."""
        return int(min(self.steps[g], self.sizes[g] - apart))

    def _down(self, g: int, apart: int) -> int:
        """Units of its last step."""
        if apart == 0:
            return 0
        return int(apart % self.steps[g] or self.steps[g])


class _Curve:
    """Gain of a fraction of units: smooth, with the gain of each unit in its middle."""

    def __init__(self, gains: np.ndarray) -> None:
        size = len(gains)
        self.places = np.concatenate([[0.0], np.arange(size) + 0.5, [float(size)]])
        self.slopes = np.concatenate([gains[:1], gains, gains[-1:]])
        areas = np.diff(self.places) * (self.slopes[1:] + self.slopes[:-1]) / 2
        self.sums = np.concatenate([[0.0], np.cumsum(areas)])

    def at(self, units: float) -> tuple[float, float]:
        """Value, and its derivative."""
        i = min(max(int(np.searchsorted(self.places, units, side="right")) - 1, 0), len(self.places) - 2)
        inside = units - self.places[i]
        bend = (self.slopes[i + 1] - self.slopes[i]) / (self.places[i + 1] - self.places[i])
        return float(self.sums[i] + inside * (self.slopes[i] + bend * inside / 2)), float(
            self.slopes[i] + bend * inside
        )
