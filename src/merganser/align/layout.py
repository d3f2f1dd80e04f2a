"""Where the units of two networks stand in one that merges some of them and keeps others apart.

Both networks are in one order of units. A group of d units, s of them apart, becomes d + s units:

    [ A's apart | merged | B's apart ]       so that A's units, and B's, are neighbours

A weight has a block for what makes a unit (row) and what it is read from (column):

             A's          merged       B's
    A's      A            A            0
    merged   A / 2        (A + B) / 2  B / 2
    B's      0            B            B

Rows that no group splits count as merged, and so do columns. With all units apart the network gives the mean of both;
with none, it is the mean of their weights. Where B is to count for a share s other than 1 / 2, merged rows have 1 - s
of A and s of B.

Source: Nasery et al. 2024, arXiv:2407.02447 (PLeaS). Columns that merged rows read are halved in the last layer too, so
that both networks count alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import groupby

import torch
from torch import Tensor

from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Spec
from merganser.symmetry.spec import Part, groups_in

#: Roles of an axis that makes units, or goes along with them.
MAKING = ("producer", "additive", "scale")


class Side(IntEnum):
    """Whose a unit is."""

    BOTH = 0
    FIRST = 1
    SECOND = 2


@dataclass(frozen=True)
class Split:
    """Which units of a group are kept apart.

    Attributes:
        size: number of units of one network.
        apart: numbers of those that both networks keep, ascending.

    Raises:
        ParameterError: If a number is out of range, or they do not ascend.
    """

    size: int
    apart: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse units that are not there."""
        if any(not 0 <= unit < self.size for unit in self.apart):
            raise ParameterError(f"units {self.apart} are not all in a group of {self.size}")
        if list(self.apart) != sorted(set(self.apart)):
            raise ParameterError(f"units {self.apart} do not ascend")

    @property
    def merged(self) -> tuple[int, ...]:
        """Numbers of the other units, ascending."""
        apart = frozenset(self.apart)
        return tuple(unit for unit in range(self.size) if unit not in apart)

    @property
    def width(self) -> int:
        """Number of units of the wider network."""
        return self.size + len(self.apart)


#: Group -> which of its units are apart; a group that is missing is merged whole.
Splits = Mapping[str, Split]


@dataclass(frozen=True)
class Places:
    """Places of an axis of the wider network.

    Attributes:
        index: for every new place the old one, int64, shape (size,).
        side: whose it is, uint8, shape (size,).
    """

    index: Tensor
    side: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def apart(self) -> bool:
        """Whether any of them is one network's alone."""
        return bool((self.side != Side.BOTH).any())

    def runs(self) -> list[tuple[Side, int]]:
        """Neighbours of one side, and how many they are, in order."""
        return [(Side(side), len(list(run))) for side, run in groupby(self.side.tolist())]


@dataclass(frozen=True)
class Layout:
    """Places of all axes of a tensor of the wider network.

    Attributes:
        axes: places along each.
        rows: the axis that makes units of a split group, where there is one.
        columns: the axis that reads them.
    """

    axes: tuple[Places, ...]
    rows: int | None
    columns: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(map(len, self.axes))


def check_splits(spec: Spec, splits: Splits) -> None:
    """Refuse splits that the symmetries do not know.

    Raises:
        ParameterError: If a group is unknown, fixed, of another size or lies within another.
    """
    for name, split in splits.items():
        group = spec.groups.get(name)
        if group is None or group.fixed:
            raise ParameterError(f"{name} is no group of units that may move", f"groups are {', '.join(spec.groups)}")
        if group.within is not None:
            raise ParameterError(f"{name} lies within {group.within}", f"split {group.within}; its units go with it")
        if group.size != split.size:
            raise ParameterError(f"{name} has {group.size} units, and its split is one of {split.size}")


def wider_spec(spec: Spec, splits: Splits) -> Spec:
    """Symmetries of the wider network, as far as sizes go: its shapes are `wider_spec(spec, splits).shapes()`."""
    check_splits(spec, splits)
    groups = {n: replace(g, size=splits[n].width) if n in splits else g for n, g in spec.groups.items()}
    return replace(spec, groups=groups)


def places(spec: Spec, part: Part, splits: Splits) -> Places:
    """Places of an axis that is made of a part.

    Raises:
        ParameterError: If a product holds two groups that are split.
    """
    if isinstance(part, str) and part in splits and splits[part].apart:
        split = splits[part]
        sizes = (Side.FIRST, len(split.apart)), (Side.BOTH, len(split.merged)), (Side.SECOND, len(split.apart))
        sides = [torch.full((count,), int(side), dtype=torch.uint8) for side, count in sizes]
        return Places(torch.tensor([*split.apart, *split.merged, *split.apart]), torch.cat(sides))
    if not isinstance(part, dict) or not any(split_groups(part, splits)):
        return _merged(spec.size(part))
    ((kind, parts),) = part.items()
    if kind == "sum":
        pieces, start = [], 0
        for p in parts:
            piece = places(spec, p, splits)
            pieces.append(Places(piece.index + start, piece.side))
            start += spec.size(p)
        return Places(torch.cat([p.index for p in pieces]), torch.cat([p.side for p in pieces]))
    done = _merged(1)
    for factor in parts:
        inner = places(spec, factor, splits)
        if done.apart and inner.apart:
            names = " and ".join(dict.fromkeys(split_groups(part, splits)))
            raise ParameterError(f"{names} are both split, and an axis is a product of them", "split one of them")
        index = (done.index[:, None] * spec.size(factor) + inner.index[None]).reshape(-1)
        done = Places(index, torch.maximum(done.side[:, None], inner.side[None]).reshape(-1))
    return done


def split_groups(part: Part, splits: Splits) -> list[str]:
    """Groups in a part that keep units apart."""
    return [group for group in groups_in(part) if group in splits and splits[group].apart]


def layout(spec: Spec, name: str, splits: Splits, head: tuple[int, int] | None = None) -> Layout:
    """Places of all axes of a tensor.

    Args:
        spec: symmetries.
        name: of the tensor.
        splits: of groups.
        head: for a tensor of a head that is kept apart, the rows of A and of B.

    Raises:
        ParameterError: If the role of an axis that is split is unknown, or two axes that are split have the same.
    """
    axes = [places(spec, part, splits) for part in spec.axes[name]]
    if head is not None:
        axes[head_axis(spec, name)] = _two(*head)
    rows, columns = None, None
    for axis, here in enumerate(axes):
        if not here.apart:
            continue
        role = spec.roles[name][axis] if name in spec.roles else None
        if role == "consumer" and columns is None:
            columns = axis
        elif role in MAKING and rows is None:
            rows = axis
        elif role is None:
            raise ParameterError(f"what axis {axis} of {name} does is unknown", "merge its units")
        else:
            raise ParameterError(f"two axes of {name} that do the same are split", "merge the units of one of them")
    return Layout(tuple(axes), rows, columns)


def head_axis(spec: Spec, name: str) -> int:
    """The axis of a head's tensor that makes its outputs.

    Raises:
        ParameterError: If it has none, or its outputs are units that move.
    """
    for axis, (role, part) in enumerate(zip(spec.roles[name], spec.axes[name], strict=True)):
        if role in MAKING and not any(True for _ in groups_in(part)):
            return axis
    raise ParameterError(f"{name} makes no outputs of the network", "name the last layer as head")


def head_of(name: str, apart_heads: Collection[str]) -> str | None:
    """The head that a tensor is of, where it is of one that is kept apart."""
    module = name.rpartition(".")[0]
    return module if module in apart_heads else None


def widened(
    spec: Spec,
    name: str,
    a: Tensor,
    b: Tensor,
    splits: Splits,
    apart_heads: Collection[str] = (),
    share: float = 0.5,
) -> Tensor:
    """A tensor of the wider network.

    Args:
        spec: symmetries of both networks.
        name: of the tensor; one without axes in the spec is averaged.
        a: the first network's.
        b: the second's, in the order of the first.
        splits: of groups.
        apart_heads: modules whose outputs stay apart: all of A's, then all of B's, which may be more or fewer.
        share: of B in what is merged.

    Returns:
        Of a's type; where it is no floating one, A's entries, and B's in B's own places.

    Raises:
        ParameterError: As for `layout`.
        ShapeError: If a or b has another shape than the spec says.
    """
    head = head_of(name, apart_heads) is not None
    _check_shapes(spec, name, a, b, head)
    if name not in spec.axes:
        laid = Layout(tuple(map(_merged, a.shape)), None, None)
    else:
        axis = head_axis(spec, name) if head else 0
        laid = layout(spec, name, splits, (a.shape[axis], b.shape[axis]) if head else None)
    first, second = coefficients(laid, share)
    a, b = taken(a, laid, Side.SECOND), taken(b, laid, Side.FIRST)
    if not (a.is_floating_point() or a.is_complex()):
        zero = torch.zeros((), dtype=a.dtype)
        return torch.where(first > 0, a, torch.where(second > 0, b.to(a.dtype), zero))
    return (first.to(a.device) * a + second.to(b.device) * b).to(a.dtype)  # in float64, as shares are


def _shares(share: float) -> tuple[Tensor, Tensor]:
    """Of A's entry and of B's, by the side of the row and that of the column, as `Side` counts them."""
    rest = 1 - share
    first, second = [[rest, rest, 0], [1, 1, 0], [0, 0, 0]], [[share, 0, share], [0, 0, 0], [1, 0, 1]]
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


def coefficients(laid: Layout, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Share of A's entry and of B's in every entry of a tensor, float64, of a shape that broadcasts to it.

    Args:
        laid: places of its axes.
        share: of B in what is merged.
    """
    rank = len(laid.axes)
    row, column = (
        torch.zeros(1, dtype=torch.int64) if axis is None else laid.axes[axis].side.long()
        for axis in (laid.rows, laid.columns)
    )
    shape = [1] * rank
    for axis, side in ((laid.rows, row), (laid.columns, column)):
        if axis is not None:
            shape[axis] = len(side)
    turned = laid.rows is not None and laid.columns is not None and laid.columns < laid.rows
    tables = []
    for table in _shares(share):
        block = table[row[:, None], column[None]]
        tables.append((block.T if turned else block).reshape(shape))
    return tables[0], tables[1]


def taken(x: Tensor, laid: Layout, other: Side) -> Tensor:
    """One network's entries at their new places; any of them where a place is the other's alone."""
    for axis, here in enumerate(laid.axes):
        if here.apart:
            index = torch.where(here.side == other, 0, here.index)  # it counts for nothing there
            x = x.index_select(axis, index.to(x.device))
    return x


def _merged(size: int) -> Places:
    return Places(torch.arange(size), torch.zeros(size, dtype=torch.uint8))


def _two(first: int, second: int) -> Places:
    sides = torch.full((first,), int(Side.FIRST)), torch.full((second,), int(Side.SECOND))
    return Places(torch.cat([torch.arange(first), torch.arange(second)]), torch.cat(sides).to(torch.uint8))


def _check_shapes(spec: Spec, name: str, a: Tensor, b: Tensor, head: bool) -> None:
    """Refuse tensors of another network; a head's outputs may be of any number."""
    shapes: Sequence[Sequence[int]] = [list(a.shape), list(b.shape)]
    expected = list(a.shape) if name not in spec.axes else [spec.size(part) for part in spec.axes[name]]
    if head and name in spec.axes:
        axis = head_axis(spec, name)
        shapes = [[*shape[:axis], expected[axis], *shape[axis + 1 :]] for shape in shapes]
    for whose, x, shape in zip("AB", (a, b), shapes, strict=True):
        if shape != expected:
            raise ShapeError(f"{name} of network {whose} is {tuple(x.shape)}, and the symmetries say {tuple(expected)}")
