"""What one run of a network multiplies, and which parameters it has: layers, each with what its axes are made of.

A product by a weight belongs to that weight, whether a module computes it or a function, and in slices or as a whole;
a product of two activations, as those of attention, stands alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, Literal

from torch import nn

from merganser.symmetry import Spec
from merganser.symmetry.finding import MOVING, Tap
from merganser.symmetry.flow import values_in
from merganser.symmetry.record import Call, Record, Value, record_run
from merganser.symmetry.spec import Part, groups_in

#: What a layer is. The first three can be built as blocks; the others are as large as their axes.
Kind = Literal["linear", "conv1d", "conv2d", "product", "activations", "entries"]
#: Modules that can be built as blocks, as far as they compute what theirs compute.
BLOCKS: Mapping[Kind, type[nn.Module]] = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d}
Measure = Literal["flops", "parameters"]

#: Arguments that are multiplied, by operation.
FACTORS = {
    "mm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "linear": ("input", "weight"),
    "convolution": ("input", "weight"),
}
#: Operations that give a tensor's own entries, all of them and in no other form than turned.
TURNING = frozenset(("t", "transpose", "permute", "detach", "alias", "view", "_unsafe_view"))
#: A tensor and one of its axes.
_Axis = tuple[Value, int]


@dataclass(frozen=True)
class Layer:
    """A weight with the products that take it, a product of activations, or a parameter that no product takes.

    Attributes:
        name: of the module that computes it; where there is none, of the parameter, or of the module around it.
        kind: what it is.
        weight: name of its parameter; None for a product of activations.
        rows: what its outputs are made of.
        columns: what its inputs are made of.
        taps: entries for every row and column, as places of a kernel.
        positions: places that it is computed at in the run, all examples together; a fraction where only a part of
            the weight is, 0 where it multiplies nothing.
        bias: whether it has one, of as many entries as rows, that no other entry of the list counts.
    """

    name: str
    kind: Kind
    weight: str | None
    rows: Part
    columns: Part
    taps: int = 1
    positions: int | Fraction = 0
    bias: bool = False

    def factor(self, measure: Measure) -> int | Fraction:
        """What every entry of rows times columns costs."""
        if measure == "flops":
            return 2 * self.positions * self.taps
        return self.taps if self.weight is not None else 0


@dataclass(frozen=True)
class _Use:
    """A product by a weight: its FLOPs, the module that computes it, and as what kind of layer."""

    flops: int
    place: str
    kind: Kind


def layers_of(
    network: nn.Module,
    spec: Spec,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    taps: Sequence[Tap] = (),
) -> list[Layer]:
    """Everything that one run multiplies and every parameter, each once: parameters in their order, then the rest.

    Args:
        network: any network; it is run once in evaluation mode and left as it is.
        spec: its symmetries.
        args: positional inputs; one example gives the FLOPs of one.
        kwargs: named inputs.
        taps: factors of its symmetries, traced on inputs of these shapes: they tell which products of activations grow
            with which group. Without them such products count as they are.
    """
    record = record_run(network, args, kwargs)
    run = _Run(record, network)
    layers = [_layer(name, value, spec, run) for name, value in run.parameters.items()]
    biases = {f"{layer.name}.bias" for layer in layers if layer.bias}
    seen = {tap.number: tap.axes for tap in taps}
    alone = [_alone(place, axes, spec, seen) for place, axes in run.alone]
    return [*(layer for layer in layers if layer.weight not in biases), *alone]


class _Run:
    """The products of a record.

    Attributes:
        uses: of every parameter, by its number.
        alone: of activations: where, and the axes that they run over.
        parameters: by their first names.
    """

    def __init__(self, record: Record, network: nn.Module) -> None:
        self.uses: dict[int, list[_Use]] = {}
        self.alone: list[tuple[str, list[_Axis]]] = []
        self.parameters: dict[str, Value] = {}
        self._kinds = _kinds(network)
        self._weights = {n: v for n, v in record.names.items() if v.origin == "parameter"}
        met: set[int] = set()
        for name, value in self._weights.items():
            if value.number not in met:
                self.parameters[name] = value
                met.add(value.number)
        self._owners = {v.number: v for v in self._weights.values()}  # the parameter whose entries a tensor holds
        self._whole = set(self._owners)  # tensors that are a parameter, at most turned
        self._live = {v.number for v in record.values if v.origin == "input"}
        for call in record.calls:
            self._see(call)

    def _see(self, call: Call) -> None:
        if call.op in FACTORS:
            one, two = (call.args[name] for name in FACTORS[call.op])
            self._multiply(call, one, two)
        elif "query" in call.args and "scaled_dot_product" in call.op:
            q, k, v = (call.args[name] for name in ("query", "key", "value"))
            heads = [(q, i) for i in range(len(q.shape) - 1)]
            places = (k, len(k.shape) - 2)
            self.alone.append((call.place, [*heads, places, (q, len(q.shape) - 1)]))
            self.alone.append((call.place, [*heads, places, (v, len(v.shape) - 1)]))
        self._pass_on(call)

    def _multiply(self, call: Call, one: Value, two: Value) -> None:
        flops, axes = _work(call, one, two)
        owned = [v for v in (one, two) if v.number in self._owners]
        if not owned:
            self.alone.append((call.place, axes))
            return
        weight = max(owned, key=lambda v: prod(v.shape))
        owner = self._owners[weight.number]
        kind = self._kind(call, owner) if weight.number in self._whole else "product"
        self.uses.setdefault(owner.number, []).append(_Use(flops, call.place, kind))

    def _kind(self, call: Call, owner: Value) -> Kind:
        """As what a module multiplies by its own weight, or `product` where it is no module to be built as blocks."""
        weight = self._weights.get(f"{call.place}.weight")
        own = weight is not None and weight.number == owner.number
        return self._kinds.get(call.place, "product") if own else "product"

    def _pass_on(self, call: Call) -> None:
        """Which tensors hold the entries of a parameter, and which hang on the inputs."""
        inputs, outputs = values_in(call.args), {v.number for v in call.outputs}
        if any(v.number in self._live for v in inputs):
            self._live |= outputs
            for number in outputs:
                self._owners.pop(number, None)
                self._whole.discard(number)
            return
        owned = [v for v in inputs if v.number in self._owners]
        if not owned or call.op in FACTORS:
            return
        largest = max(owned, key=lambda v: prod(v.shape))
        for value in call.outputs:
            if call.op in MOVING or prod(value.shape) == prod(largest.shape):
                self._owners.setdefault(value.number, self._owners[largest.number])
                if call.op in TURNING and largest.number in self._whole:
                    self._whole.add(value.number)


def _kinds(network: nn.Module) -> dict[str, Kind]:
    """Modules that can be built as blocks: of one group, without hooks, that share no parameter with another."""
    holders = Counter(id(p) for m in network.modules() for p in m._parameters.values() if p is not None)
    kinds: dict[str, Kind] = {}
    for name, module in network.named_modules():
        kind = block_kind(module)
        if kind is not None and all(holders[id(p)] == 1 for p in module._parameters.values() if p is not None):
            kinds[name] = kind
    return kinds


def block_kind(module: nn.Module) -> Kind | None:
    """As what a module can be built in blocks: it computes what nn.Linear, nn.Conv1d or nn.Conv2d does, and no more."""
    if getattr(module, "groups", 1) != 1 or module._forward_hooks or module._forward_pre_hooks:
        return None
    if "forward" in vars(module):
        return None
    return next((kind for kind, known in BLOCKS.items() if _computes(type(module)) == _computes(known)), None)


def _computes(kind: type[nn.Module]) -> tuple[Any, Any]:
    """What says how modules of a kind compute."""
    return kind.forward, getattr(kind, "_conv_forward", None)


def _work(call: Call, one: Value, two: Value) -> tuple[int, list[_Axis]]:
    """FLOPs of a product of two tensors, and the axes that it runs over, the one that it sums over last."""
    if call.op == "convolution":
        seen = one if call.args.get("transposed") else call.outputs[0]
        places = [(seen, i) for i in range(2, len(seen.shape))]
        axes = [(one, 0), *places, *((two, i) for i in range(len(two.shape)))]
    else:
        outer = 0 if call.op == "linear" else len(two.shape) - 1
        axes = [(one, i) for i in range(len(one.shape) - 1)]
        axes += [(two, outer)] if len(two.shape) > 1 else []
        axes += [(one, len(one.shape) - 1)]
    return 2 * prod(value.shape[i] for value, i in axes), axes


def _layer(name: str, value: Value, spec: Spec, run: _Run) -> Layer:
    """A parameter, with the products that take it."""
    parts: tuple[Part, ...] = spec.axes.get(name, value.shape)
    uses = run.uses.get(value.number, [])
    positions = Fraction(sum(use.flops for use in uses), 2 * max(1, prod(value.shape)))
    kinds = {use.kind for use in uses}
    if len(kinds) == 1 and kinds <= BLOCKS.keys():
        place, (kind,) = uses[0].place, kinds
        taps = prod(map(spec.size, parts[2:]))
        return Layer(place, kind, name, parts[0], parts[1], taps, _whole(positions), f"{place}.bias" in run.parameters)
    roles = spec.roles.get(name, (None,) * len(parts))
    taps = prod(part for part in parts if isinstance(part, int))
    moving = [(part, role) for part, role in zip(parts, roles, strict=True) if not isinstance(part, int)]
    rows = _joined([part for part, role in moving if role != "consumer"])
    columns = _joined([part for part, role in moving if role == "consumer"])
    return Layer(name, "product" if uses else "entries", name, rows, columns, taps, _whole(positions))


def _alone(place: str, axes: Sequence[_Axis], spec: Spec, seen: Mapping[int, Sequence[Part]]) -> Layer:
    """A product of activations; what it sums over counts as columns."""
    parts: list[Part] = []
    for value, axis in axes:
        part: Part = value.shape[axis]
        if value.number in seen:
            named = seen[value.number][axis]
            if all(group in spec.groups for group in groups_in(named)) and spec.size(named) == part:
                part = named
        parts.append(part)
    taps = prod(part for part in parts if isinstance(part, int))
    rows, columns = ([p for p in some if not isinstance(p, int)] for some in (parts[:-1], parts[-1:]))
    return Layer(place, "activations", None, _joined(rows), _joined(columns), taps, 1)


def _joined(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return {"product": list(parts)} if parts else 1


def _whole(number: Fraction) -> int | Fraction:
    return int(number) if number.denominator == 1 else number
