"""Normal equations of one layer: sums over rows of its inputs and targets, and the weight that is nearest to these.

    W = argmin sum |W x - y|^2 + lambda |W - W_0|^2        lambda = ridge mean(diag(x x^T))

with entries left at zero where an output may not read an input. Outputs that read everything and A's share one
Cholesky factor: with columns as [merged | A | B] A's problem is a leading block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from merganser.align.layout import Side
from merganser.align.triangles import cholesky, solved, taken
from merganser.errors import ParameterError
from merganser.numerics import product

#: Share of the largest mean square of an input, or of the targets' squares, below which there is only rounding.
ROUNDING = 1e-12
#: Whose each output is and whose each input, as `Side`: shapes (R,) and (F,).
Sides = tuple[Tensor, Tensor]


@dataclass
class Normal:
    """Normal equations of one layer: sums over rows, float64.

    Attributes:
        gram: of inputs, shape (F, F).
        cross: of inputs with targets, shape (F, R).
        inputs: sums of inputs, shape (F,).
        targets: sums of targets, shape (R,).
        squares: sum of all squared targets.
        count: rows.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    squares: float
    count: int

    @classmethod
    def empty(cls, entries: int, rows: int) -> Normal:
        """No rows yet."""
        gram, cross, inputs, targets = (
            torch.zeros(shape, dtype=torch.float64)
            for shape in ((entries, entries), (entries, rows), (entries,), (rows,))
        )
        return cls(gram, cross, inputs, targets, squares=0.0, count=0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, float64: inputs (n, F) and targets (n, R)."""
        self.gram += product(x.T, x)
        self.cross += product(x.T, y)
        self.inputs += x.sum(0)
        self.targets += y.sum(0)
        self.squares += float(y.square().sum())
        self.count += len(x)

    def centred(self) -> Normal:
        """About the means, which a bias or a norm that follows takes up; in the memory of these, which are gone."""
        n = self.count
        gram = self.gram.addr_(self.inputs, self.inputs, alpha=-1 / n)
        cross = self.cross.addr_(self.inputs, self.targets, alpha=-1 / n)
        squares = self.squares - float(self.targets.square().sum()) / n
        squares = squares if squares > ROUNDING * self.squares else 0.0
        return Normal(gram, cross, self.inputs, self.targets, squares, n)

    def residual(self, weight: Tensor, sides: Sides | None = None) -> float:
        """Share of the targets' squares that a weight does not meet; it is 0 where `sides` say that none is read."""
        through = product(weight, self.gram) if sides is None else _through(self.gram, weight, sides)
        left = self.squares - 2 * float((weight.T * self.cross).sum()) + float((through * weight).sum())
        return max(left, 0.0) / self.squares if self.squares > 0 else 0.0

    def rounding(self) -> float:
        """What of the sums of products is rounding; means may have been taken off."""
        squares = self.gram.diagonal() + self.inputs.square() / max(1, self.count)
        return ROUNDING * float(squares.max()) if len(squares) else 0.0


def solve(normal: Normal, prior: Tensor, rows: Tensor, columns: Tensor, ridge: float) -> Tensor:
    """The weight nearest to the targets.

    Args:
        normal: equations of a layer.
        prior: the weight that the ridge pulls to, float64, shape (R, F).
        rows: whose each output is, as `Side`, shape (R,).
        columns: whose each input is, shape (F,).
        ridge: in [0, inf), times the mean of the diagonal. At 0 the least of all solutions, about the prior.

    Returns:
        Shape (R, F); entries of A's rows for B's columns, and the other way round, are zero.

    Raises:
        ParameterError: If the ridge is out of range.
    """
    if not 0 <= ridge < inf:
        raise ParameterError(f"ridge is {ridge}; it is at least 0, times the mean square of a layer's inputs")
    strength = ridge * float(normal.gram.diagonal().mean()) if len(normal.gram) else 0.0
    noise = normal.rounding()
    found = prior * readable(rows, columns)
    missed = normal.cross.T - _through(normal.gram, found, (rows, columns))  # W - W_0 has a ridge at zero
    whole: Tensor | None = None
    factor: Tensor | None = None
    for side, wanted, mine in _parts(rows, columns):
        if side == Side.SECOND:
            whole = factor = None  # no two factors at once
            factor = _factor(taken(normal.gram, mine), strength, noise)
        else:
            whole = _factor(taken(normal.gram, mine), strength, noise) if whole is None else whole
            factor = whole[: len(mine), : len(mine)]
        inside = missed[wanted][:, mine].T
        if bool(torch.isfinite(factor).all()):
            step = solved(factor, inside)
        else:
            shifted = taken(normal.gram, mine)
            shifted.diagonal().add_(strength)
            step = torch.linalg.pinv(shifted, atol=noise, rtol=0.0, hermitian=True) @ inside
        found[wanted[:, None], mine] += step.T
    return found


def readable(rows: Tensor, columns: Tensor) -> Tensor:
    """1 where a row may read a column, 0 in blocks of zeros."""
    free: Tensor = (rows[:, None] == Side.BOTH) | (columns == Side.BOTH) | (rows[:, None] == columns)
    return free.double()


def _parts(rows: Tensor, columns: Tensor) -> Iterator[tuple[Side, Tensor, Tensor]]:
    """Sides that have rows, these rows, and what they may read, in the order of [merged | A | B]."""
    order = columns.long().argsort(stable=True)
    for side, other in ((Side.BOTH, None), (Side.FIRST, Side.SECOND), (Side.SECOND, Side.FIRST)):
        wanted = (rows == side).nonzero()[:, 0]
        if len(wanted):
            yield side, wanted, order if other is None else order[columns[order] != other]


def _through(gram: Tensor, weight: Tensor, sides: Sides) -> Tensor:
    """Weight times gram in what rows may read, shape (R, F); outside of that the weight is zero, and so is this."""
    made = torch.zeros_like(weight)
    for _, wanted, mine in _parts(*sides):
        if len(mine) == len(gram):
            made[wanted] = product(weight[wanted], gram)
        else:
            made[wanted[:, None], mine] = product(weight[wanted][:, mine], taken(gram, mine))
    return made


def _factor(gram: Tensor, strength: float, noise: float) -> Tensor:
    """Lower Cholesky factor of gram + strength; NaN where there is none, or where rounding makes it. Changes gram."""
    gram.diagonal().add_(strength)
    factor = cholesky(gram)
    if factor is None or (len(gram) and float(factor.diagonal().min()) ** 2 <= noise):
        return gram.fill_(torch.nan)
    return factor
