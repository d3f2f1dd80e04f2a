"""Operations that move entries and change none: reshapes, transposes, slices, concatenations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from merganser.symmetry.axes import ONE, Axis, Family, NestingError, Product, Sum
from merganser.symmetry.flow import Flow, Rule
from merganser.symmetry.record import Call, Value


def regrouped(flow: Flow, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Row-major factors of axes, gathered into axes of other sizes.

    Raises:
        NestingError: If boundaries do not nest.
    """
    factors: list[Axis] = []
    for axis in axes:
        known = flow.atoms.canonical(axis)
        factors += known.parts if isinstance(known, Product) else [known]
    out: list[Axis] = []
    for size in sizes:
        group: list[Axis] = []
        while prod(map(flow.atoms.size, group)) < size:
            need = size // prod(map(flow.atoms.size, group))
            head = factors.pop(0)
            if flow.atoms.size(head) > need:
                head, tail = flow.atoms.split(head, need)
                factors.insert(0, tail)
            if need % max(flow.atoms.size(head), 1):
                raise NestingError
            group.append(head)
        out.append(Product(tuple(group)) if len(group) != 1 else group[0])
    return out


def reshape(flow: Flow, call: Call) -> None:
    """The same entries in the same order."""
    (value,) = call.outputs
    source = call.args["self"]
    if prod(source.shape) == 0:
        flow.give_up(f"{call.op} of nothing")
    else:
        flow.set(value, regrouped(flow, flow.of(source), value.shape))


def restrided(flow: Flow, call: Call) -> None:
    """as_strided, where it says nothing new: pooling uses it to mark a memory format."""
    (value,), source = call.outputs, call.args["self"]
    same = value.shape == source.shape and value.offset == source.offset
    if same and all(n == 1 or a == b for n, a, b in zip(value.shape, value.stride, source.stride, strict=True)):
        flow.set(value, flow.of(source))
    else:
        flow.give_up("as_strided")


def permute(flow: Flow, call: Call) -> None:
    """Axes in another order."""
    axes, dims = flow.of(call.args["self"]), call.args["dims"]
    flow.set(call.outputs[0], [axes[d] for d in dims])
    flow.turned(call.outputs[0], call.args["self"], [d % len(axes) for d in dims])


def transpose(flow: Flow, call: Call) -> None:
    """Two axes change places."""
    axes = flow.of(call.args["self"])
    order = list(range(len(axes)))
    if len(axes) > 1:
        a, b = (call.args.get(f"dim{i}", call.args.get(f"axis{i}", i)) for i in (0, 1))
        order[a], order[b] = order[b], order[a]
    flow.set(call.outputs[0], [axes[i] for i in order])
    flow.turned(call.outputs[0], call.args["self"], order)


def squeeze(flow: Flow, call: Call) -> None:
    """Axes of one unit come or go; the others keep their order."""
    (value,) = call.outputs
    left = [axis for axis, size in zip(flow.of(call.args["self"]), call.args["self"].shape, strict=True) if size != 1]
    flow.set(value, [ONE if size == 1 else left.pop(0) for size in value.shape])


def expand(flow: Flow, call: Call) -> None:
    """An axis of one unit is repeated: all along it is the same."""
    (value,), source = call.outputs, call.args["self"]
    old = [ONE] * (len(value.shape) - len(source.shape)) + flow.of(source)
    flow.set(
        value,
        [
            axis if flow.atoms.size(axis) == size else flow.uniform(size)
            for axis, size in zip(old, value.shape, strict=True)
        ],
    )


def repeat(flow: Flow, call: Call) -> None:
    """Copies of an axis one after the other: a product with an outer axis along which all is the same."""
    (value,), source = call.outputs, call.args["self"]
    old = [ONE] * (len(value.shape) - len(source.shape)) + flow.of(source)
    times = [size // flow.atoms.size(axis) for axis, size in zip(old, value.shape, strict=True)]
    flow.set(value, [Product((flow.uniform(n), axis)) for n, axis in zip(times, old, strict=True)])


def concatenate(flow: Flow, call: Call) -> None:
    """One after the other along an axis; all others are equal."""
    (value,) = call.outputs
    parts: list[Value] = [x for x in call.args["tensors"] if x.shape != (0,)]
    dim = call.args["dim"] % len(value.shape)
    axes = list(flow.of(parts[0]))
    for part in parts[1:]:
        for i, axis in enumerate(flow.of(part)):
            if i != dim:
                flow.unify(axes[i], axis)
    axes[dim] = Sum(tuple(flow.of(part)[dim] for part in parts))
    flow.set(value, axes)


def stack(flow: Flow, call: Call) -> None:
    """A new axis whose places are told apart."""
    (value,) = call.outputs
    parts: list[Value] = call.args["tensors"]
    dim = call.args["dim"] % len(value.shape)
    axes = list(flow.of(parts[0]))
    for part in parts[1:]:
        for one, two in zip(axes, flow.of(part), strict=True):
            flow.unify(one, two)
    axes.insert(dim, flow.atoms.new(len(parts), pinned="stacked"))
    flow.set(value, axes)


def select(flow: Flow, call: Call) -> None:
    """One place along an axis, or every place on its own."""
    source = call.args["self"]
    dim = call.args["dim"] % len(source.shape)
    first = call.args["index"] % source.shape[dim] if call.op == "select" else 0
    for i, value in enumerate(call.outputs):
        flow.set(value, _picked(flow, source, dim, first + i))


def _picked(flow: Flow, source: Value, dim: int, place: int) -> list[Axis]:
    axes = flow.of(source)
    along = flow.atoms.canonical(axes[dim])
    rest = [axis for i, axis in enumerate(axes) if i != dim]
    if isinstance(along, int) and source.origin == "activation":
        if not any(_depends(flow, axis, along) for axis in rest):
            flow.pin_axis(along, f"{flow.call.op if flow.call else ''} along it")
            flow.atoms.families(along, [axis for axis in rest if _came_with(flow, axis, along)])
        return [flow.atoms.at(axis, along, place) for axis in rest]
    flow.pin_axis(along, "one place of it is taken")
    return rest


def _depends(flow: Flow, axis: Axis, index: int) -> bool:
    known = flow.atoms.canonical(axis)
    return isinstance(known, Family) and known.index == index


def _came_with(flow: Flow, axis: Axis, index: int) -> bool:
    """Whether the atoms of an axis are in no tensor without the atom `index`: copies may differ then."""
    mine = set(flow.atoms.atoms(axis))
    for axes in flow.axes.values():
        inside = {atom for other in axes for atom in flow.atoms.atoms(other)}
        if mine & inside and index not in inside:
            return False
    return True


def narrow(flow: Flow, call: Call) -> None:
    """A stretch of an axis."""
    (value,), source = call.outputs, call.args["self"]
    dim, size = call.args["dim"] % len(source.shape), source.shape[call.args["dim"]]
    start, stop, step = (call.args.get(name) for name in ("start", "end", "step"))
    axes = list(flow.of(source))
    first, last = (_clamped(x, size, default) for x, default in ((start, 0), (stop, size)))
    if (step or 1) != 1:
        flow.pin_axis(axes[dim], "a slice with steps")
        axes[dim] = flow.atoms.new(value.shape[dim], pinned="a slice with steps")
    elif value.shape[dim] != size:
        axes[dim] = flow.atoms.cut(axes[dim], [first, max(first, last)])[1]
    flow.set(value, axes)


def _clamped(x: int | None, size: int, default: int) -> int:
    x = default if x is None else x
    return min(max(x + size if x < 0 else x, 0), size)


def split(flow: Flow, call: Call) -> None:
    """Consecutive stretches of an axis."""
    source = call.args["self"]
    dim = call.args.get("dim", 0) % len(source.shape)
    axes = flow.of(source)
    places: list[int] = []
    for value in call.outputs[:-1]:
        places.append((places[-1] if places else 0) + value.shape[dim])
    for value, piece in zip(call.outputs, flow.atoms.cut(axes[dim], places), strict=True):
        flow.set(value, [piece if i == dim else axis for i, axis in enumerate(axes)])


def pad(flow: Flow, call: Call) -> None:
    """Equal entries before and after."""
    (value,), source, widths = call.outputs, call.args["self"], call.args["pad"]
    axes = list(flow.of(source))
    for i in range(len(widths) // 2):
        before, after = widths[2 * i : 2 * i + 2]
        dim = len(axes) - 1 - i
        if before < 0 or after < 0:
            flow.pin_axis(axes[dim], "cut by a negative padding")
            axes[dim] = flow.atoms.new(value.shape[dim], pinned="cut by a negative padding")
        elif before or after:
            parts = [flow.uniform(n) for n in (before, after) if n]
            axes[dim] = Sum((*parts[: bool(before)], axes[dim], *parts[bool(before) :]))
    flow.set(value, axes)


def lookup(flow: Flow, call: Call) -> None:
    """Rows of a table: which row is fixed, what is in it flows."""
    table, indices = call.args["weight"], call.args["indices"]
    row, *axes = flow.of(table)
    flow.pin_axis(row, "rows are looked up")
    for axis in range(1, len(table.shape)):
        flow.role(table, axis, "producer")
    flow.set(call.outputs[0], [*flow.of(indices), *axes])


def index(flow: Flow, call: Call) -> None:
    """Entries at given places: axes that places are given for are pinned."""
    (value,), source = call.outputs, call.args["self"]
    axes, given = flow.of(source), list(call.args["indices"])
    if any(isinstance(x, Value) and x.dtype in (torch.bool, torch.uint8) and len(x.shape) > 1 for x in given):
        flow.give_up("a mask over several axes")
        return
    given += [None] * (len(axes) - len(given))
    told = [i for i, x in enumerate(given) if x is not None]
    for i in told:
        flow.pin_axis(axes[i], "places along it are looked up")
    for x in given:
        if isinstance(x, Value):
            flow.pin(x, "places to look up")
    kept = [axis for i, axis in enumerate(axes) if i not in told]
    count = len(value.shape) - len(kept)
    at = told[0] if told and told == list(range(told[0], told[-1] + 1)) else 0
    fresh = [flow.atoms.new(size, pinned="looked up") for size in value.shape[at : at + count]]
    flow.set(value, [*kept[:at], *fresh, *kept[at:]])


def index_along(flow: Flow, call: Call) -> None:
    """index_select, index_add: places along one axis are given; all other axes are equal."""
    (value,), source = call.outputs, call.args["self"]
    dim = call.args["dim"] % len(source.shape)
    axes = list(flow.of(source))
    flow.pin_axis(axes[dim], "places along it are looked up")
    flow.pin(call.args["index"], "places to look up")
    other: Any = call.args.get("source")
    if isinstance(other, Value):
        for i, axis in enumerate(flow.of(other)):
            if i == dim:
                flow.pin_axis(axis, "places along it are looked up")
            else:
                flow.unify(axes[i], axis)
    axes[dim] = flow.atoms.new(value.shape[dim], pinned="looked up")
    flow.set(value, axes)


def gather(flow: Flow, call: Call) -> None:
    """Entries at given places along one axis; the others are those of both tensors where these are of one size."""
    (value,), source, places = call.outputs, call.args["self"], call.args["index"]
    dim = call.args["dim"] % len(source.shape)
    axes = []
    for i, (axis, other) in enumerate(zip(flow.of(source), flow.of(places), strict=True)):
        if i == dim or source.shape[i] != places.shape[i]:
            flow.pin_axis(axis, "places along it are looked up")
            flow.pin_axis(other, "places along it are looked up")
        else:
            flow.unify(axis, other)
        axes.append(other)
    flow.set(value, axes)


def shuffle(flow: Flow, call: Call) -> None:
    """Pixel and channel shuffles: reshape, permute, reshape."""
    (value,), source = call.outputs, call.args["self"]
    axes = flow.of(source)
    n, c, h, w = source.shape
    if call.op == "pixel_shuffle":
        r = call.args["upscale_factor"]
        a = regrouped(flow, axes, (n, c // (r * r), r, r, h, w))
        moved = [a[0], a[1], a[4], a[2], a[5], a[3]]
    elif call.op == "pixel_unshuffle":
        r = call.args["downscale_factor"]
        a = regrouped(flow, axes, (n, c, h // r, r, w // r, r))
        moved = [a[0], a[1], a[3], a[5], a[2], a[4]]
    else:
        groups = call.args["groups"]
        a = regrouped(flow, axes, (n, groups, c // groups, h, w))
        moved = [a[0], a[2], a[1], a[3], a[4]]
    flow.set(value, regrouped(flow, moved, value.shape))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_copy", "flatten", "unflatten", "_reshape_alias"), reshape
    ),
    **dict.fromkeys(("transpose", "t", "transpose_", "swapaxes"), transpose),
    **dict.fromkeys(("squeeze", "unsqueeze"), squeeze),
    **dict.fromkeys(("select", "unbind"), select),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"), split),
    **dict.fromkeys(("index_select", "index_add"), index_along),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"), shuffle),
    "as_strided": restrided,
    "permute": permute,
    "expand": expand,
    "repeat": repeat,
    "cat": concatenate,
    "stack": stack,
    "slice": narrow,
    "constant_pad_nd": pad,
    "embedding": lookup,
    "index": index,
    "gather": gather,
}
