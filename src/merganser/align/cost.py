"""What a network costs that keeps some units of two apart: multiplications and parameters, before it is built.

A group of d units of which s pairs are kept apart has s units of A's, d - s merged and s of B's. A product with rows
(r_A, r_m, r_B) and columns (c_A, c_m, c_B) has no entries from A's columns to B's rows and none the other way:

    entries = r_m (c_A + c_m + c_B) + r_A (c_A + c_m) + r_B (c_m + c_B)
            = d_r d_c [1 + s_r/d_r + s_c/d_c - (s_r/d_r)(s_c/d_c)]

Layers that are built as blocks store nothing of the rest, and need multiply nothing of it. That is what counts, also
where one takes less time with zeros and all, and multiplies up to twice as much (`ways`). Everything else is as large
as its axes: norms, tables, products of activations, and products by weights that stand in no layer of their own.

A multiplication with the addition after it is two FLOPs, and nothing else counts, as in torch.utils.flop_counter.

Source: Nasery et al. 2024, arXiv:2407.02447; the authors' cost of a layer, over all its axes and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

import numpy as np

from merganser.align.layers import BLOCKS, Layer, Measure
from merganser.errors import ParameterError
from merganser.symmetry import Spec
from merganser.symmetry.spec import Part, groups_in

#: Units of A's alone, merged ones, units of B's alone.
Sides = tuple[int, int, int]


def sides(spec: Spec, part: Part, apart: Mapping[str, int]) -> Sides:
    """How many places of an axis are A's, merged, and B's.

    Args:
        spec: symmetries of both networks.
        part: what the axis is made of.
        apart: group -> how many of its units are kept apart; 0 where it is missing. Inner groups go with their outer.

    Raises:
        ParameterError: If two groups that are split lie along one another.
    """
    if isinstance(part, int):
        return 0, part, 0
    if isinstance(part, str):
        split = apart.get(part, 0)
        return split, spec.groups[part].size - split, split
    if "sum" in part:
        pieces = [sides(spec, p, apart) for p in part["sum"]]
        first, both, second = (sum(piece[i] for piece in pieces) for i in range(3))
        return first, both, second
    factors = [sides(spec, p, apart) for p in part["product"]]
    split_ones = [f for f in factors if f[0] or f[2]]
    if len(split_ones) > 1:
        names = " and ".join(g for g in groups_in(part) if apart.get(g))
        raise ParameterError(f"{names} lie along one another and cannot both be split", "split one of them")
    times = prod(sum(f) for f in factors if not (f[0] or f[2]))
    first, both, second = split_ones[0] if split_ones else (0, 1, 0)
    return first * times, both * times, second * times


def flops(
    layers: Sequence[Layer],
    spec: Spec,
    apart: Mapping[str, int],
    *,
    heads: Mapping[str, tuple[int, int]] | None = None,
    dense: bool = False,
) -> int:
    """FLOPs of one run of the network that is built.

    Args:
        layers: of the network, from `layers.layers_of`.
        spec: its symmetries.
        apart: group -> how many of its units are kept apart.
        heads: layers of which both networks' outputs are kept -> how many A has, and B.
        dense: whether zero blocks are stored and multiplied.

    Raises:
        ParameterError: If a group cannot be split so, or a head is none.
    """
    return _total("flops", layers, spec, apart, heads or {}, dense)


def parameters(
    layers: Sequence[Layer],
    spec: Spec,
    apart: Mapping[str, int],
    *,
    heads: Mapping[str, tuple[int, int]] | None = None,
    dense: bool = False,
) -> int:
    """Parameters of the network that is built, tied ones once; arguments as for `flops`."""
    return _total("parameters", layers, spec, apart, heads or {}, dense)


def _total(
    measure: Measure,
    layers: Sequence[Layer],
    spec: Spec,
    apart: Mapping[str, int],
    heads: Mapping[str, tuple[int, int]],
    dense: bool,
) -> int:
    _check_apart(spec, apart)
    _check_heads(layers, heads)
    total: int | Fraction = 0
    for layer in layers:
        rows, columns = _rows(layer, spec, apart, heads), sides(spec, layer.columns, apart)
        blocked = layer.kind in BLOCKS and not dense
        total += layer.factor(measure) * (entries(rows, columns) if blocked else sum(rows) * sum(columns))
        if layer.bias and measure == "parameters":
            total += sum(rows)
    return round(total)


def entries(rows: Sides, columns: Sides) -> int:
    """Entries that are not zero by construction."""
    (a, m, b), (first, both, second) = rows, columns
    return m * (first + both + second) + a * (first + both) + b * (both + second)


def _rows(layer: Layer, spec: Spec, apart: Mapping[str, int], heads: Mapping[str, tuple[int, int]]) -> Sides:
    if layer.name in heads and layer.kind in BLOCKS:
        return heads[layer.name][0], 0, heads[layer.name][1]
    return sides(spec, layer.rows, apart)


def _check_apart(spec: Spec, apart: Mapping[str, int]) -> None:
    for name, count in apart.items():
        group = spec.groups.get(name)
        if group is None or group.fixed or group.within is not None:
            raise ParameterError(f"{name} is no group that can be split", "inner groups are split by their outer one")
        if not 0 <= count <= group.size:
            raise ParameterError(f"{count} units of {name} cannot be kept apart; it has {group.size}")


def _check_heads(layers: Sequence[Layer], heads: Mapping[str, tuple[int, int]]) -> None:
    known = {layer.name: layer for layer in layers if layer.kind in BLOCKS}
    for name in heads:
        if name not in known:
            raise ParameterError(f"{name} is no head", "a head is an nn.Linear, nn.Conv1d or nn.Conv2d by its name")
        if group := next(groups_in(known[name].rows), None):
            raise ParameterError(f"the outputs of {name} are units of {group}", "outputs of the network make a head")


@dataclass(frozen=True)
class Costs:
    """Size of a network, and of one of its parents.

    Attributes:
        flops: of one example.
        parameters: of the network.
        parent_flops: of one example in A.
        parent_parameters: of A.
    """

    flops: int
    parameters: int
    parent_flops: int
    parent_parameters: int


@dataclass(frozen=True)
class Quadratic:
    """A cost as a polynomial of how many units of every group are apart: constant + linear s + s curved s / 2.

    Attributes:
        groups: in the order of s.
        original: cost of one network.
        constant: cost with nothing apart; more than the original where both networks' heads are kept.
        linear: cost of the first unit of each, shape (groups,).
        curved: what a unit of one adds to the cost of a unit of another, symmetric, shape (groups, groups).
    """

    groups: tuple[str, ...]
    original: float
    constant: float
    linear: np.ndarray = field(repr=False)
    curved: np.ndarray = field(repr=False)

    def at(self, apart: np.ndarray) -> float:
        """Cost, with fractions of units too."""
        return float(self.constant + apart @ (self.linear + self.curved @ apart / 2))

    def slope(self, apart: np.ndarray) -> np.ndarray:
        """Derivative by each group's units."""
        return np.asarray(self.linear + self.curved @ apart)


def quadratic(
    layers: Sequence[Layer],
    spec: Spec,
    groups: Sequence[str],
    measure: Measure = "flops",
    *,
    heads: Mapping[str, tuple[int, int]] | None = None,
    dense: bool = False,
) -> Quadratic:
    """`flops` or `parameters` of every choice of units of some groups.

    Args:
        layers: of the network.
        spec: its symmetries.
        groups: that may be split.
        measure: which cost.
        heads: as for `flops`.
        dense: as for `flops`.

    Raises:
        ParameterError: If a group cannot be split, two of them lie along one another, or a head is none.
    """
    heads = heads or {}
    _check_apart(spec, dict.fromkeys(groups, 0))
    _check_heads(layers, heads)
    constant, linear, curved = 0.0, np.zeros(len(groups)), np.zeros((len(groups), len(groups)))
    for layer in layers:
        columns, more_columns = _growth(spec, layer.columns, groups)
        head = layer.name in heads and layer.kind in BLOCKS
        rows, more_rows = _growth(spec, sum(heads[layer.name]) if head else layer.rows, groups)
        factor = float(layer.factor(measure))
        blocked = layer.kind in BLOCKS and not dense
        constant += factor * rows * columns
        linear += factor * columns * more_rows
        if not (head and blocked):  # a head's rows are all apart: each reads as many columns as one network has
            linear += factor * rows * more_columns
            both = np.outer(more_rows, more_columns)
            curved += (-factor if blocked else factor) * (both + both.T)
        if layer.bias and measure == "parameters":
            constant += rows
            linear += more_rows
    original = _total(measure, layers, spec, {}, {}, dense)
    return Quadratic(tuple(groups), float(original), constant, linear, curved)


def _growth(spec: Spec, part: Part, groups: Sequence[str]) -> tuple[int, np.ndarray]:
    """Places of an axis, and how many more there are for every unit of each group that is kept apart."""
    here = set(groups_in(part))
    inside = [group for group in groups if group in here]
    sides(spec, part, dict.fromkeys(inside, 1))  # refuses two along one another
    return spec.size(part), np.array([sides(spec, part, {g: 1})[0] if g in here else 0 for g in groups], dtype=float)
