"""Let axes flow through a record, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils._pytree import tree_leaves

from merganser.symmetry.axes import Atoms, Axis, NestingError
from merganser.symmetry.record import Call, Record, Value

#: What an axis of a parameter does: it makes units, takes them in, is added to them, or multiplies them.
Role = Literal["producer", "consumer", "additive", "scale"]

Rule = Callable[["Flow", Call], None]


@dataclass
class Flow:
    """Axes of all tensors of a record, as far as it has been followed.

    Attributes:
        record: the run.
        atoms: of all axes.
        axes: of every tensor, by its number.
        roles: of axes of parameters, by the tensor's number and the axis.
        views: parameters of which a tensor is one with its axes in another order, and that order.
        products: axes of what is summed up by an operation, of which its result shows a part.
        taps: tensors that a product takes in and that are no parameter, by their numbers.
        unknown: operations without a rule that met something that moves.
        call: the operation at hand.
    """

    record: Record
    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[int, list[Axis]] = field(default_factory=dict)
    roles: dict[tuple[int, int], Role] = field(default_factory=dict)
    views: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    products: list[list[Axis]] = field(default_factory=list)
    taps: list[int] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    call: Call | None = None

    def __post_init__(self) -> None:
        """Leave out what nothing comes from, and note which tensors anything reads."""
        self.calls = self._live()
        self.read = {value.number for call in self.calls for value in values_in(call.args)}
        self.read.update(value.number for value in self.record.outputs)

    def follow(self, rules: Mapping[str, Rule]) -> None:
        """Apply the rule of every operation; what has no rule is pinned."""
        for value in self.record.values:
            if value.origin in ("parameter", "buffer"):
                self.axes[value.number] = [self.atoms.new(size) for size in value.shape]
            elif value.origin != "activation":
                self.fix(value, f"the {value.origin} of the network")
        for call in self.calls:
            self.call = call
            inputs = values_in(call.args)
            if call.op not in SPREADING and all(self.fixed(value) for value in inputs):
                for value in call.outputs:  # made of nothing that moves
                    self.fix(value, "fixed things alone")
            elif (rule := rules.get(call.op)) is None:
                self.unknown.append(call.op)
                self.give_up(f"{call.op} has no rule")
            else:
                try:
                    rule(self, call)
                except NestingError:
                    self.give_up(f"{call.op}: its axes do not nest")
                except (AssertionError, LookupError, StopIteration, TypeError, ValueError) as error:
                    self.unknown.append(call.op)  # a form of the operation that its rule does not know
                    self.give_up(f"{call.op}: its rule failed ({error})")
        self.call = None
        for value in self.record.outputs:
            self.pin(value, "output of the network")
        for value, why in self.record.entangled:
            self.pin(value, why)

    def _live(self) -> list[Call]:
        """Calls that the outputs come from, or that do something else than giving their outputs."""
        needed = {value.number for value in self.record.outputs}
        live = []
        for call in reversed(self.record.calls):
            if call.acts or any(value.number in needed for value in call.outputs):
                needed.update(value.number for value in values_in(call.args))
                live.append(call)
        return live[::-1]

    def of(self, value: Value) -> list[Axis]:
        """Axes of a tensor."""
        return self.axes[value.number]

    def set(self, value: Value, axes: Sequence[Axis]) -> None:
        """Say what the axes of a result are."""
        sizes = tuple(self.atoms.size(axis) for axis in axes)
        assert sizes == value.shape, (self.call, sizes, value.shape)
        if value.number in self.axes:  # a view of itself, or written in place
            for old, new in zip(self.axes[value.number], axes, strict=True):
                self.unify(old, new)
        self.axes[value.number] = list(axes)

    def fixed(self, value: Value) -> bool:
        """Whether nothing of a tensor may move."""
        return all(self.atoms.pinned(axis) for axis in self.of(value))

    def fix(self, value: Value, why: str) -> None:
        """A tensor none of whose axes may move."""
        self.axes[value.number] = [self.atoms.new(size, pinned=why) for size in value.shape]

    def pin(self, value: Value, why: str) -> None:
        """Pin all axes of a tensor."""
        for axis in self.of(value):
            self.pin_axis(axis, why)

    def pin_axis(self, axis: Axis, why: str) -> None:
        """Pin an axis, and write down where."""
        self.atoms.pin(axis, self._where(why))

    def give_up(self, why: str) -> None:
        """Pin everything that the operation at hand has to do with."""
        assert self.call is not None
        for value in values_in(self.call.args):
            self.pin(value, why)
        for value in self.call.outputs:
            if value.number in self.axes:
                self.pin(value, why)
            else:
                self.fix(value, self._where(why))

    def unify(self, one: Axis, two: Axis) -> None:
        """Make two axes equal."""
        self.atoms.unify(one, two, self._where(self.call.op if self.call else ""))

    def uniform(self, size: int) -> Axis:
        """An axis along which all entries are the same: it may be anything."""
        return self.atoms.new(size)

    def role(self, value: Value, axis: int, role: Role) -> None:
        """Write down what an axis does, where it is a parameter's or one of a turned parameter."""
        number, axes = self.views.get(value.number, (value.number, tuple(range(len(value.shape)))))
        if axis >= 0 and self.record.values[number].origin in ("parameter", "buffer"):
            self.roles.setdefault((number, axes[axis]), role)

    def tap(self, *values: Value) -> None:
        """Note tensors that a product takes in, parameters and turned ones left out."""
        for value in values:
            root = self.views.get(value.number, (value.number,))[0]
            if self.record.values[root].origin == "activation":
                self.taps.append(value.number)

    def turned(self, value: Value, source: Value, order: Sequence[int]) -> None:
        """Remember that a tensor is another with its axes in another order."""
        number, axes = self.views.get(source.number, (source.number, tuple(range(len(source.shape)))))
        self.views[value.number] = number, tuple(axes[i] for i in order)

    def _where(self, why: str) -> str:
        return f"{why} in {self.call.place}" if self.call is not None else why


LIKE = (("", ""), ("new_", ""), ("", "_like"))
#: Operations that make a tensor of equal entries from nothing.
FACTORIES = frozenset(f"{kind}{name}{like}" for name in ("zeros", "ones", "full", "empty") for kind, like in LIKE)
#: Operations whose results hold equal entries whatever they are given.
SPREADING = FACTORIES | {"expand", "repeat"}


def values_in(args: Mapping[str, Any]) -> list[Value]:
    """Tensors among arguments, in order."""
    return [x for x in tree_leaves(dict(args)) if isinstance(x, Value)]
