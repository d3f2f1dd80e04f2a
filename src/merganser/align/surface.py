"""Values on the plane through three networks: whether a merged network lies in a valley of both tasks.

    x = a + u e1 + v e2,    e1 along b - a,    e2 along what of c - a is at right angles to e1

Distances are those of all floating tensors but running statistics. Source of the picture: Garipov et al. 2018,
arXiv:1802.10026, section 3; of two tasks on it: Xu et al. 2024, arXiv:2403.01753.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from merganser.align.costs import is_statistic
from merganser.errors import ParameterError

State = Mapping[str, Tensor]
#: Values of one network, such as its losses on two tasks.
Judge = Callable[[nn.Module], Sequence[float]]


@dataclass(frozen=True)
class Surface:
    """What was measured on a plane.

    Attributes:
        corners: places of the three networks, (u, v) each; distances of weights.
        across: u of every column.
        up: v of every row.
        values: of every place, shape (values, rows, columns).
    """

    corners: tuple[tuple[float, float], ...]
    across: tuple[float, ...]
    up: tuple[float, ...]
    values: tuple[tuple[tuple[float, ...], ...], ...]


def surface(
    network: nn.Module,
    corners: tuple[State, State, State],
    judge: Judge,
    *,
    points: int = 9,
    margin: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> Surface:
    """Judge networks on a grid over the plane through three.

    Args:
        network: of their architecture; left as it is.
        corners: tensors of the three, in one order of units; what is not floating is the first one's.
        judge: gives the values of a network; may change it, as by measuring BatchNorm anew.
        points: along each side, at least 2.
        margin: around the three, as a share of their extent.
        progress: called as (places done, places).

    Raises:
        ParameterError: If the three lie on one line, or there are fewer than two points.
    """
    if points < 2:
        raise ParameterError(f"points is {points}; a side has two ends")
    a, b, c = corners
    moving = [n for n, x in a.items() if x.is_floating_point() and not is_statistic(n)]

    def inner(x: State, y: State) -> float:
        """Of differences from a."""
        return sum(float(((x[n].double() - a[n]) * (y[n].double() - a[n])).sum()) for n in moving)

    bb, bc, cc = inner(b, b), inner(b, c), inner(c, c)
    height = cc - bc**2 / bb if bb > 0 else 0.0
    if height <= 1e-9 * cc:
        raise ParameterError("the three networks lie on one line", "a plane takes one beside it")
    places = ((0.0, 0.0), (bb**0.5, 0.0), (bc / bb**0.5, height**0.5))
    across, up = (_ticks([place[i] for place in places], points, margin) for i in range(2))
    there = copy.deepcopy(network).eval()
    rows: list[list[Sequence[float]]] = []
    for v in up:
        rows.append([])
        for u in across:
            t = v / places[2][1]  # of c
            s = (u - t * places[2][0]) / places[1][0]  # of b
            there.load_state_dict(
                {n: x + s * (b[n] - x) + t * (c[n] - x) if x.is_floating_point() else x for n, x in a.items()}
            )
            rows[-1].append(judge(there))
            if progress is not None:
                progress((len(rows) - 1) * points + len(rows[-1]), points**2)
    values = tuple(tuple(tuple(place[k] for place in row) for row in rows) for k in range(len(rows[0][0])))
    return Surface(places, across, up, values)


def _ticks(values: Sequence[float], points: int, margin: float) -> tuple[float, ...]:
    low, high = min(values), max(values)
    extra = margin * (high - low)
    step = (high - low + 2 * extra) / (points - 1)
    return tuple(low - extra + i * step for i in range(points))
