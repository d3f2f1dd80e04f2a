"""From a record to a spec: follow the axes, then keep what may move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merganser.symmetry.axes import Axis, Family, Product
from merganser.symmetry.flow import Flow, values_in
from merganser.symmetry.record import Record
from merganser.symmetry.rules import RULES, shapes
from merganser.symmetry.spec import Group, Part, Spec, groups_in

#: Operations that only hand entries on.
MOVING = frozenset(shapes.RULES) - {"embedding", "index", "index_add"} | {
    *("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "copy")
}


@dataclass(frozen=True)
class Tap:
    """A tensor that a product takes in and that is no parameter.

    Attributes:
        number: of the tensor in a record of the network.
        axes: of what it is made, in the words of the spec.
    """

    number: int
    axes: tuple[Part, ...]


@dataclass(frozen=True)
class Found:
    """Symmetries, before they are checked.

    Attributes:
        spec: what may move.
        taps: activations that show the units of groups, in the order of the run.
        factors: those, and what is made of parameters alone.
        unknown: operations without a rule.
        unused: parameters that no operation read.
    """

    spec: Spec
    taps: tuple[Tap, ...]
    factors: tuple[Tap, ...]
    unknown: tuple[str, ...]
    unused: tuple[str, ...]


def find(record: Record) -> Found:
    """Derive the symmetries of a recorded run."""
    flow = Flow(record)
    flow.follow(RULES)
    unused = tuple(
        name for name, value in record.names.items() if value.number not in flow.read and value.origin == "parameter"
    )
    for name in unused:
        flow.pin(record.names[name], "never used in the run")
    if record.branches and unused:
        why = f"{record.branches[0]} may take a branch that uses {unused[0]}, which this run did not"
        for value in record.names.values():
            flow.pin(value, why)
    _collapse(flow)
    _pin_unused(flow)
    spec, names = _spec(flow)
    factors = []
    for number in dict.fromkeys(flow.taps):
        axes = tuple(_part(flow.atoms.canonical(axis), flow, names) for axis in flow.axes[number])
        if any(True for axis in axes for _ in groups_in(axis)):
            factors.append(Tap(number, axes))
    return Found(spec, _activations(record, factors), tuple(factors), tuple(dict.fromkeys(flow.unknown)), unused)


def _activations(record: Record, factors: Sequence[Tap]) -> tuple[Tap, ...]:
    """Factors that the input is in: a mask times a weight, or a weight in fewer bits, tells nothing of what units do.

    Others stay, before these, where they are all that shows some group: as units of a network of places.
    """
    live = _fed(record)
    shown = {g for tap in factors if tap.number in live for part in tap.axes for g in groups_in(part)}
    alone = [
        tap
        for tap in factors
        if tap.number not in live and any(g not in shown for part in tap.axes for g in groups_in(part))
    ]
    return (*alone, *(tap for tap in factors if tap.number in live))


def _fed(record: Record) -> set[int]:
    """Numbers of the tensors that the inputs of the network are in.

    What is written into a view is in the whole tensor, too. Where no input is a tensor, all tensors count.
    """
    found = {value.number for value in record.values if value.origin == "input"}
    if not found:
        return {value.number for value in record.values}
    whole: dict[int, int] = {}
    for call in record.calls:
        inputs = values_in(call.args)
        if any(value.number in found for value in inputs):
            for value in call.outputs:
                at: int | None = value.number
                while call.acts and at is not None and at not in found:
                    found.add(at)
                    at = whole.get(at)
                found.add(value.number)
        elif inputs and call.op in MOVING:
            whole |= {value.number: inputs[0].number for value in call.outputs}
    return found


def _pin_unused(flow: Flow) -> None:
    """What no operation read but to move it, as rows that a slice left out: another input may use it."""
    read: set[int] = set()
    for call in flow.calls:
        if call.op not in MOVING:
            for value in values_in(call.args):
                read.update(a for axis in flow.of(value) for a in flow.atoms.atoms(axis))
    for value in flow.record.names.values():
        for axis in flow.of(value):
            for atom in flow.atoms.atoms(axis):
                if atom not in read:
                    flow.atoms.pins.setdefault(atom, "not used in the run")


def _collapse(flow: Flow) -> None:
    """Families stand for what differs along another axis of the same tensor; elsewhere their members are one."""
    changed = True
    while changed:
        changed = False
        for value in flow.record.values:
            axes = [flow.atoms.canonical(axis) for axis in flow.axes.get(value.number, ())]
            inside = [set(_plain(axis)) for axis in axes]
            for i, axis in enumerate(axes):
                for family in _families(axis):
                    others = [atoms for j, atoms in enumerate(inside) if j != i]
                    if value.origin != "activation" or not any(family.index in atoms for atoms in others):
                        flow.atoms.merge(family)
                        changed = True
            if changed:
                break


def _families(axis: Axis) -> Iterator[Family]:
    if isinstance(axis, Family):
        yield axis
    if not isinstance(axis, int):
        for part in axis.parts:
            yield from _families(part)


def _plain(axis: Axis) -> Iterator[int]:
    """Atoms of an expression, the places that tell copies apart left out."""
    if isinstance(axis, int):
        yield axis
    else:
        for part in axis.parts:
            yield from _plain(part)


def _monomials(axis: Axis) -> list[list[int]]:
    """Atoms of every segment, outermost first."""
    if isinstance(axis, int):
        return [[axis]]
    if isinstance(axis, Product):
        rows: list[list[int]] = [[]]
        for part in axis.parts:
            rows = [[*row, *inner] for row in rows for inner in _monomials(part)]
        return rows
    return [row for part in axis.parts for row in _monomials(part)]


def _spec(flow: Flow) -> tuple[Spec, dict[int, str]]:
    """The spec, and the name of every atom that may move."""
    record, atoms = flow.record, flow.atoms
    axes = {name: [atoms.canonical(axis) for axis in flow.of(value)] for name, value in record.names.items()}
    met = dict.fromkeys(a for parts in axes.values() for axis in parts for a in atoms.atoms(axis))
    moving = [a for a in met if a not in atoms.pins]
    outers = _outers(flow, moving)
    held = [a for a in dict.fromkeys(outers.values()) if a in atoms.pins]
    names = _names(flow, axes, [*moving, *held])
    groups = {names[a]: Group(atoms.sizes[a], names[outers[a]] if a in outers else None) for a in moving}
    groups |= {names[a]: Group(atoms.sizes[a], fixed=True) for a in held}
    pinned = {
        f"{name}[{i}]": why
        for name, parts in axes.items()
        for i, axis in enumerate(parts)
        for why in [next((atoms.pins[a] for a in atoms.atoms(axis) if a in atoms.pins), None)]
        if why is not None
    }
    spec_axes = {name: tuple(_part(axis, flow, names) for axis in parts) for name, parts in axes.items()}
    roles = {
        name: tuple(flow.roles.get((value.number, i)) for i in range(len(value.shape)))
        for name, value in record.names.items()
    }
    first: dict[int, str] = {}
    for name, value in record.names.items():
        first.setdefault(value.number, name)
    tied = {name: first[value.number] for name, value in record.names.items() if first[value.number] != name}
    return Spec(groups, spec_axes, roles, pinned, tied), names


def _part(axis: Axis, flow: Flow, names: dict[int, str]) -> Part:
    """An axis in words; fixed neighbours become one."""
    if isinstance(axis, int):
        return names.get(axis, flow.atoms.sizes[axis])
    if not any(a in names for a in flow.atoms.atoms(axis)):
        return flow.atoms.size(axis)
    merged: list[Part] = []
    product = isinstance(axis, Product)
    for part in (_part(p, flow, names) for p in axis.parts):
        if isinstance(part, int) and merged and isinstance(merged[-1], int):
            merged[-1] = merged[-1] * part if product else merged[-1] + part
        elif part != 1 or not product:
            merged.append(part)
    return merged[0] if len(merged) == 1 else {"product" if product else "sum": merged}


def _outers(flow: Flow, moving: Sequence[int]) -> dict[int, int]:
    """For every atom that has an order of its own for each place of another: that other."""
    candidates: dict[int, set[int]] = {}
    chosen = set(moving)
    tensors: list[list[list[list[int]]]] = []
    for value in flow.record.values:
        rows = [_monomials(flow.atoms.canonical(axis)) for axis in flow.axes.get(value.number, ())]
        if any(a in chosen for axis in rows for row in axis for a in row):
            tensors.append(rows)
    tensors += [[_monomials(flow.atoms.canonical(axis)) for axis in axes] for axes in flow.products]
    for axes in tensors:
        here = {a for rows in axes for row in rows for a in row}
        for a in here & chosen:
            governed = {h for h in here - {a} if _governs(h, a, axes)}
            candidates[a] = candidates[a] & governed if a in candidates else governed
    # Two levels and no more: what others lie within lies within nothing. One that moves is better than a fixed one.
    found: dict[int, int] = {}
    for a in sorted(candidates, key=lambda a: (len(candidates[a]), a)):
        free = [h for h in candidates[a] if h not in found]
        if free and a not in found.values():
            found[a] = max(free, key=lambda h: (h in chosen, flow.atoms.sizes[h], -h))
    return found


def _governs(h: int, a: int, axes: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether every unit of `a` in a tensor has one place in `h` beside it, which is further out."""
    for i, rows in enumerate(axes):
        for row in rows:
            if a not in row:
                continue
            if h in row:
                if row.count(h) != 1 or row.index(h) > row.index(a):
                    return False
                continue
            beside = [j for j, other in enumerate(axes) if j != i and all(h in r for r in other)]
            if len(beside) != 1 or any(r.count(h) != 1 for r in axes[beside[0]]):
                return False
    return True


def _names(flow: Flow, axes: dict[str, list[Axis]], moving: Sequence[int]) -> dict[int, str]:
    """Every group is called after the first tensor whose axis it makes."""
    names: dict[int, str] = {}
    taken: Counter[str] = Counter()
    record = flow.record
    for a in moving:
        homes = [(n, i) for n, parts in axes.items() for i, axis in enumerate(parts) if a in flow.atoms.atoms(axis)]
        made = [(n, i) for n, i in homes if flow.roles.get((record.names[n].number, i)) == "producer"]
        name = (made or homes)[0][0].removesuffix(".weight")
        taken[name] += 1
        names[a] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names
