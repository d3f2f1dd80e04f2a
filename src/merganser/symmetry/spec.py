"""Which orders of a network's units leave its function as it is: as data, for any tensor by its name.

A group is a set of units in one order. An axis of a tensor is made of groups:

    5                          five entries in a fixed order
    "fc1"                      the units of group fc1
    {"product": [a, b, ..]}    row-major: b within each place of a
    {"sum": [a, b, ..]}        one after the other

A group may lie `within` another: then it has an order of its own for each place of that one (wreath product), as the
units of an attention head have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from merganser.errors import ParameterError, ShapeError

#: A part of an axis, as in JSON.
Part = int | str | dict[str, Any]
#: Group -> for every new place the old one: shape (size,), or (size of the outer group, size) where it lies within one.
Orders = Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Units that may change places.

    Attributes:
        size: how many.
        within: the group for each place of which it has an order of its own.
        fixed: whether they stay where they are, and are there for others to lie within.
    """

    size: int
    within: str | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Spec:
    """The permutation symmetries of a network.

    Attributes:
        groups: by name.
        axes: of every parameter and buffer, by its name.
        roles: what every axis does: producer, consumer, additive, scale, or none that is known.
        pinned: for every tensor and axis with units that cannot move: why.
        tied: names of tensors that are another one, and the name of that.
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Part, ...]]
    roles: Mapping[str, tuple[str | None, ...]]
    pinned: Mapping[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)

    def members(self, group: str) -> list[tuple[str, int]]:
        """Tensors and axes that a group moves."""
        return [(n, i) for n, axes in self.axes.items() for i, axis in enumerate(axes) if group in groups_in(axis)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(self.size(axis) for axis in axes) for name, axes in self.axes.items()}

    def size(self, part: Part) -> int:
        """Number of units of a part."""
        if isinstance(part, int):
            return part
        if isinstance(part, str):
            return self.groups[part].size
        return prod(map(self.size, part["product"])) if "product" in part else sum(map(self.size, part["sum"]))

    def places(self, group: str) -> tuple[int, ...]:
        """Shape of an order of a group."""
        found = self.groups[group]
        return (found.size,) if found.within is None else (self.groups[found.within].size, found.size)

    def inner(self, group: str) -> list[str]:
        """Groups that have an order of their own for each place of a group."""
        return [name for name, g in self.groups.items() if g.within == group]

    def identity(self) -> dict[str, Tensor]:
        """The order that everything is in."""
        return {name: torch.arange(g.size).expand(self.places(name)).clone() for name, g in self.groups.items()}

    def random(self, generator: torch.Generator, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A random element of the whole group, or of some groups alone."""
        orders = self.identity()
        for name in self.groups if only is None else only:
            if self.groups[name].fixed:
                continue
            noise = torch.rand(self.places(name), generator=generator)
            orders[name] = noise.argsort(dim=-1)
        return orders

    def moves(self, name: str) -> bool:
        """Whether some group moves a tensor."""
        return any(not self.groups[group].fixed for part in self.axes[name] for group in groups_in(part))

    def check(self, shapes: Mapping[str, Sequence[int]], ref: str) -> None:
        """Refuse tensors that this is not the symmetry of.

        Raises:
            ShapeError: Names the first tensor of another shape.
        """
        expected = self.shapes()
        for name, shape in shapes.items():
            if tuple(shape) != expected[name]:
                raise ShapeError(
                    f"{name} of {ref} is {tuple(shape)}, and the symmetries are those of one of {expected[name]}",
                    "they are another network's",
                )

    def apply(self, orders: Orders, name: str, x: Tensor) -> Tensor:
        """A tensor with its units in another order.

        Args:
            orders: of every group.
            name: of the tensor.
            x: the tensor.
        """
        parts = self.axes[name]
        moved = [axis for axis, part in enumerate(parts) if any(True for _ in groups_in(part))]
        # an axis that tells another's orders apart goes first: those orders are by its new places
        for axis in sorted(moved, key=lambda axis: self._governor(parts, axis) is not None):
            x = self._along(orders, name, x, axis)
        return x

    def _along(self, orders: Orders, name: str, x: Tensor, axis: int) -> Tensor:
        parts = self.axes[name]
        outer = self._governor(parts, axis)
        if outer is None:
            return x.index_select(axis, self.positions(parts[axis], orders).to(x.device))
        other, group = outer  # an order for each place of a group that another axis holds
        places = self._index(parts[axis], orders, x.shape[other], {group: self.places_in(parts[other], group)})
        shape = [1] * x.ndim
        shape[other], shape[axis] = places.shape
        places = (places if other < axis else places.T).reshape(shape)
        return x.take_along_dim(places.to(x.device), dim=axis)

    def _governor(self, parts: Sequence[Part], axis: int) -> tuple[int, str] | None:
        """The other axis that tells which of its orders a group of this one is in."""
        for group in groups_in(parts[axis]):
            within = self.groups[group].within
            if within is not None and within not in groups_in(parts[axis]):
                return next(i for i, part in enumerate(parts) if within in groups_in(part)), within
        return None

    def places_in(self, part: Part, group: str) -> Tensor:
        """For every place of a part: the place in a group, or -1; shape (size,)."""
        if isinstance(part, dict) and "sum" in part:
            return torch.cat([self.places_in(p, group) for p in part["sum"]])
        if not isinstance(part, dict):
            return torch.arange(self.size(part)) if part == group else torch.full((self.size(part),), -1)
        where = torch.full((1,), -1)
        for factor in part["product"]:
            mine = self.places_in(factor, group)
            where = torch.maximum(where[:, None], mine[None]).reshape(-1)
        return where

    def _index(self, part: Part, orders: Orders, rows: int, known: Mapping[str, Tensor]) -> Tensor:
        """For every new place of a part, the old one, shape (rows, size); `known` holds each row's place in a group."""
        if isinstance(part, int):
            return torch.arange(part).expand(rows, part)
        if isinstance(part, str):
            order, within = orders[part], self.groups[part].within
            return order.expand(rows, -1) if within is None else order[known[within]]
        if "sum" in part:
            pieces, start = [], 0
            for p in part["sum"]:
                pieces.append(self._index(p, orders, rows, known) + start)
                start += self.size(p)
            return torch.cat(pieces, dim=1)
        index, here = torch.zeros(rows, dtype=torch.int64), dict(known)
        for factor in part["product"]:
            size = self.size(factor)
            inside = self._index(factor, orders, len(index), here)
            index = (index[:, None] * size + inside).reshape(-1)
            here = {group: places.repeat_interleave(size) for group, places in here.items()}
            for group in groups_in(factor):
                here[group] = self.places_in(factor, group).repeat(len(index) // size)
        return index.reshape(rows, -1)

    def positions(self, part: Part, orders: Orders) -> Tensor:
        """For every new place of an axis that is made of this part, the old one, shape (size,)."""
        return self._index(part, orders, 1, {})[0]

    def compose(self, first: Orders, then: Orders) -> dict[str, Tensor]:
        """One order that does what two do, one after the other."""
        done: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            if group.within is None:
                done[name] = first[name][then[name]]
            else:
                blocks = first[name][then[group.within]]  # the block that is now at each place, in its own order
                done[name] = blocks.gather(1, then[name])
        return done

    def inverse(self, orders: Orders) -> dict[str, Tensor]:
        """The order that undoes another."""
        done: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            back = orders[name].argsort(dim=-1)
            done[name] = back if group.within is None else back[orders[group.within].argsort()]
        return done

    # as text

    def to_json(self) -> str:
        """All of it, as text."""
        groups = {n: {k: v for k, v in asdict(g).items() if v} for n, g in self.groups.items()}
        content = {"groups": groups, "axes": self.axes, "roles": self.roles, "pinned": self.pinned, "tied": self.tied}
        return json.dumps({"merganser_symmetry": 1, **content}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """What `to_json` gave.

        Raises:
            ParameterError: If the text is something else.
        """
        try:
            content = json.loads(text)
            if content["merganser_symmetry"] != 1:
                raise ParameterError(f"these symmetries are of format {content['merganser_symmetry']}; known is 1")
            groups = {
                str(n): Group(g["size"], g.get("within"), bool(g.get("fixed"))) for n, g in content["groups"].items()
            }
            for name, group in groups.items():
                _check_group(name, group, groups)
            axes = {n: tuple(_checked(p, groups) for p in _list(parts)) for n, parts in content["axes"].items()}
            roles = {n: tuple(_list(r)) for n, r in content["roles"].items()}
            pinned, tied = ({str(n): str(x) for n, x in content[key].items()} for key in ("pinned", "tied"))
            for name, parts in axes.items():
                inside = {g for part in parts for g in groups_in(part)}
                for g in inside:
                    if groups[g].within not in (None, *inside):
                        raise ValueError(f"{name} holds {g} without {groups[g].within}, which it lies within")
            for name in (*tied, *tied.values(), *roles):
                if name not in axes:
                    raise ValueError(f"{name!r} has no axes")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ParameterError(
                f"this is no file of symmetries: {error!r}", "merganser symmetry show writes one"
            ) from error
        return cls(groups, axes, roles, pinned, tied)


def _check_group(name: str, group: Group, groups: Mapping[str, Group]) -> None:
    if isinstance(group.size, bool) or not isinstance(group.size, int) or group.size < 1:
        raise ValueError(f"group {name} has size {group.size!r}")
    if group.within is not None and (group.within not in groups or groups[group.within].within is not None):
        raise ValueError(f"group {name} lies within {group.within}, which is none that others may lie within")


def _list(parts: Any) -> list[Any]:
    if not isinstance(parts, list):
        raise TypeError(f"{parts!r} is no list")
    return parts


def _checked(part: Any, groups: Mapping[str, Group]) -> Part:
    if isinstance(part, bool) or (isinstance(part, str) and part not in groups):
        raise ValueError(f"{part!r} is no group")
    if isinstance(part, dict):
        ((kind, parts),) = part.items()
        if kind not in ("product", "sum"):
            raise ValueError(f"{kind!r} is neither product nor sum")
        return {kind: [_checked(p, groups) for p in _list(parts)]}
    if not isinstance(part, int | str) or (isinstance(part, int) and part < 0):
        raise TypeError(f"{part!r} is no part of an axis")
    return part


def groups_in(part: Part) -> Iterator[str]:
    """Names of the groups in a part of an axis."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for inner in next(iter(part.values())):
            yield from groups_in(inner)
