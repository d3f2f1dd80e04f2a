"""The wider network: a copy of a network whose tensors, and what it knows of their sizes, fit some splits.

What changes is written down, so that the network can be built again without its symmetries.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.layout import Layout, Side, Splits, head_axis, head_of, layout, split_groups, wider_spec
from merganser.align.orientation import is_turned
from merganser.errors import ExtraTensorError, MissingTensorError, ParameterError, ShapeError, and_more
from merganser.symmetry import Spec
from merganser.symmetry.spec import Part

#: What modules call their number of heads.
COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"),
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"),
)
#: What modules that have heads call the units of all heads together.
WIDTHS = ("all_head_size", "inner_dim", "split_size", "embed_dim", "hidden_size")


@dataclass(frozen=True)
class Record:
    """How a wider network differs from the one it was made of; as JSON by `dataclasses.asdict`.

    Attributes:
        attributes: by the module's name: what it knows of sizes, by the attribute's.
        shapes: of tensors that changed.
        sides: by the name of a layer whose weight has blocks of zeros: runs of (side, number of places) of its rows and
            of its columns.
    """

    attributes: Mapping[str, Mapping[str, int | Sequence[int]]] = field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sides: Mapping[str, Sequence[Sequence[Sequence[int]]]] = field(default_factory=dict)
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Record:
        """What `as_json` gave.

        Raises:
            ParameterError: If the content is something else.
        """
        try:
            attributes = {
                str(n): {str(a): _sizes_of(v) for a, v in found.items()} for n, found in content["attributes"].items()
            }
            shapes = {str(n): [_size(v) for v in shape] for n, shape in content["shapes"].items()}
            sides = {
                str(n): [[[int(Side(side)), _size(count)] for side, count in runs] for runs in (rows, columns)]
                for n, (rows, columns) in content["sides"].items()
            }
            heads = {str(n): [_size(a), _size(b)] for n, (a, b) in content["heads"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ParameterError(f"this is no layout of a partly merged network: {error!r}") from error
        return cls(attributes, shapes, sides, heads)


def _size(x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or x < 0:
        raise ValueError(f"{x!r} is no size")
    return x


def _sizes_of(x: Any) -> int | list[int]:
    return [_size(v) for v in x] if isinstance(x, list | tuple) else _size(x)


def widen(
    network: nn.Module,
    spec: Spec,
    splits: Splits,
    state: Mapping[str, Tensor],
    apart_heads: Collection[str] = (),
) -> nn.Module:
    """The wider network.

    Args:
        network: of one of both; it is left as it is.
        spec: its symmetries.
        splits: of groups.
        state: tensors by name, as `layout.widened` gives them.
        apart_heads: modules whose outputs stay apart.

    Raises:
        ParameterError: If it cannot be built.
        MissingTensorError: If the state lacks a tensor.
        ExtraTensorError: If it has one that the network has not.
        ShapeError: If a tensor does not fit the splits.
    """
    return filled(rewidened(network, plan(network, spec, splits, others(network, spec, state, apart_heads))), state)


def others(network: nn.Module, spec: Spec, state: Mapping[str, Tensor], apart_heads: Collection[str]) -> dict[str, int]:
    """How many outputs B has in each head that is kept apart: those that are not A's."""
    counts: dict[str, int] = {}
    for name, own in network.state_dict().items():
        head = head_of(name, apart_heads)
        if head is not None and name in state:
            axis = head_axis(spec, name)
            counts[head] = state[name].shape[axis] - own.shape[axis]
    return counts


def filled(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A network with these tensors, changed in place.

    Raises:
        MissingTensorError: If the state lacks a tensor.
        ExtraTensorError: If it has one that the network has not.
        ShapeError: If one has another shape.
        ParameterError: If a tensor cannot be written to, as one that repeats its entries.
    """
    own = network.state_dict()
    if more := [name for name in state if name not in own]:
        raise ExtraTensorError(f"the state has {more[0]}{and_more(more)}, and the wider network has not")
    for name, x in own.items():
        if name not in state:
            raise MissingTensorError(f"the state lacks {name} of the wider network")
        if state[name].shape != x.shape:
            raise ShapeError(f"{name} is {tuple(state[name].shape)}, and the wider network's {tuple(x.shape)}")
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ParameterError(f"the network cannot be filled: {str(error).splitlines()[-1].strip()}") from error
    return network


def rewidened(network: nn.Module, record: Record) -> nn.Module:
    """The network that a record tells of; tensors of other shapes than before are zero.

    Args:
        network: as it was before; it is left as it is.
        record: what changed.

    Raises:
        ParameterError: If the record is of another network, or the network cannot be copied.
    """
    own = network.state_dict(keep_vars=True)
    fresh: dict[int, Any] = {}
    for name, shape in record.shapes.items():
        if name not in own:
            raise ParameterError(f"the layout has {name}, and the network has no such tensor", "name its network")
        if len(shape) != own[name].ndim:
            raise ParameterError(f"the layout has {name} of {len(shape)} axes, and the network's has {own[name].ndim}")
        fresh.setdefault(id(own[name]), _zeros(own[name], shape))
        if tuple(fresh[id(own[name])].shape) != tuple(shape):
            raise ParameterError(f"{name} is another tensor too, which would be of another shape")
    try:
        wide = copy.deepcopy(network, fresh)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"the network cannot be copied: {error}") from error
    modules = dict(wide.named_modules(remove_duplicate=False))
    for name, attributes in record.attributes.items():
        for attribute, value in attributes.items():
            if name not in modules or not hasattr(modules[name], attribute):
                raise ParameterError(f"the layout has {name}.{attribute}, and the network has none", "name its network")
            if not (_is_int if _is_int(value) else _is_sizes)(getattr(modules[name], attribute)):
                raise ParameterError(f"{name}.{attribute} cannot be {value}: the network's is something else")
            setattr(modules[name], attribute, value if isinstance(value, int) else tuple(value))
    return wide


def _zeros(x: Tensor, shape: Sequence[int]) -> Tensor:
    try:
        zeros = torch.zeros(tuple(shape), dtype=x.dtype, device=x.device)
    except (RuntimeError, TypeError) as error:  # there is no such memory, or no such number
        raise ParameterError(f"a tensor of shape {tuple(shape)} cannot be made") from error
    return nn.Parameter(zeros, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else zeros


def plan(network: nn.Module, spec: Spec, splits: Splits, heads: Mapping[str, int] | None = None) -> Record:
    """What has to change.

    Args:
        network: of one of both.
        spec: its symmetries.
        splits: of groups.
        heads: modules whose outputs stay apart, and how many of them B has.

    Raises:
        ParameterError: If a tensor cannot be laid out, or a module cannot be made to fit.
        ShapeError: If the symmetries are another network's.
    """
    heads, wider = heads or {}, wider_spec(spec, splits)
    own = {name: tuple(x.shape) for name, x in network.state_dict().items() if name in spec.axes}
    for head in heads:
        if not any(head_of(name, (head,)) for name in own):
            raise ParameterError(f"there is no head {head}", "name the module of the last layer")
    laid: dict[str, Layout] = {}
    outputs: dict[str, tuple[int, int]] = {}
    for name, shape in own.items():
        last = head_of(name, heads)
        if last is not None:
            outputs[last] = shape[head_axis(spec, name)], heads[last]
        laid[name] = layout(spec, name, splits, None if last is None else outputs[last])
    spec.check({name: shape for name, shape in own.items() if head_of(name, heads) is None}, "the network")
    shapes = {name: here.shape for name, here in laid.items() if here.shape != own[name]}
    changes = _Changes(network)
    for name, shape in shapes.items():
        owner, _, tensor = name.rpartition(".")
        part = spec.axes[name][0] if spec.axes[name] else 1
        changes.fit(owner, tensor, shape, lambda per, part=part: stretches(spec, wider, part, per))
    for group in splits:
        changes.count_heads(group, spec, wider, splits)
    sides = {
        name.rpartition(".")[0]: [[[int(side), n] for side, n in runs] for runs in _runs(here)]
        for name, here in laid.items()
        if name.rpartition(".")[2] == "weight" and has_zeros(here)
    }
    return Record(changes.made, shapes, sides, outputs)


def has_zeros(laid: Layout) -> bool:
    """Whether a tensor has a block of zeros."""
    if laid.rows is None or laid.columns is None:
        return False
    rows, columns = ({side for side, _ in laid.axes[axis].runs()} for axis in (laid.rows, laid.columns))
    return (Side.FIRST in rows and Side.SECOND in columns) or (Side.SECOND in rows and Side.FIRST in columns)


def _runs(laid: Layout) -> list[list[tuple[Side, int]]]:
    assert laid.rows is not None
    assert laid.columns is not None
    return [laid.axes[laid.rows].runs(), laid.axes[laid.columns].runs()]


def stretches(spec: Spec, wider: Spec, part: Part, per: int) -> int:
    """Number of stretches in the wider network that were of `per` places before: groups of channels, or heads.

    Raises:
        ParameterError: If the groups that are split do not leave such stretches whole.
    """
    old, new = spec.size(part), wider.size(part)
    if old == new or per == 1:
        return new // per
    if isinstance(part, dict):
        ((kind, parts),) = part.items()
        if kind == "sum" and all(spec.size(p) % per == 0 for p in parts):
            return sum(stretches(spec, wider, p, per) for p in parts)
        if kind == "product":
            *outer, last = parts
            inner = spec.size(last)
            if per % inner == 0:
                return stretches(spec, wider, {"product": outer}, per // inner)
            if inner % per == 0:
                return prod(map(wider.size, outer)) * stretches(spec, wider, last, per)
    if per == old:
        return 1
    raise ParameterError(f"its units lie in groups of {per} that do not stay whole")


class _Changes:
    """Attributes of modules that have to change, as they are found."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.made: dict[str, dict[str, int | Sequence[int]]] = {}

    def note(self, module: str, **values: int | Sequence[int]) -> None:
        """Note values, where the module has such attributes."""
        for attribute, value in values.items():
            if not hasattr(self.modules[module], attribute):
                continue
            if self.made.setdefault(module, {}).setdefault(attribute, value) != value:
                raise ParameterError(
                    f"{module}.{attribute} would have to be {value} and {self.made[module][attribute]}"
                )

    def fit(self, name: str, tensor: str, shape: Sequence[int], groups: Any) -> None:
        """Let a module know the shape of its tensor.

        Args:
            name: of the module.
            tensor: name in it.
            shape: the new one.
            groups: gives the number of groups of so many places of the first axis, where there are groups.
        """
        module = self.modules[name]
        if tensor != "weight":
            if isinstance(module, nn.modules.batchnorm._NormBase):
                self.note(name, num_features=shape[0])
        elif isinstance(module, nn.Linear):
            self.note(name, out_features=shape[0], in_features=shape[1])
        elif isinstance(module, nn.modules.conv._ConvNd):
            count = groups(module.weight.shape[0] // module.groups)
            first, second = shape[0], shape[1] * count
            inputs, outputs = (first, second) if module.transposed else (second, first)
            self.note(name, in_channels=inputs, out_channels=outputs, groups=count)
        elif isinstance(module, nn.GroupNorm):
            self.note(name, num_channels=shape[0], num_groups=groups(module.num_channels // module.num_groups))
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            self.note(name, num_features=shape[0])
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            self.note(name, normalized_shape=shape)
        elif isinstance(module, nn.Embedding):
            self.note(name, num_embeddings=shape[0], embedding_dim=shape[1])
        elif isinstance(module, nn.PReLU):
            self.note(name, num_parameters=shape[0])
        elif is_turned(module):
            self.note(name, nx=shape[0], nf=shape[1])

    def count_heads(self, group: str, spec: Spec, wider: Spec, splits: Splits) -> None:
        """Let modules that hold the layers of a group of heads know how many there are."""
        axes = {(name, axis): spec.axes[name][axis] for name, axis in spec.members(group)}
        products = {place: list(_products(part, group)) for place, part in axes.items()}
        paths = [name.split(".")[:-1] for (name, _), found in products.items() if found]
        if not paths or not split_groups(group, splits):
            return
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
        counts: dict[int, set[int]] = {}
        widths: dict[int, set[int]] = {}
        for product in (p for found in products.values() for p in found):
            old, new = ([of.size(factor) for factor in product] for of in (spec, wider))
            for end in range(1, len(product) + 1):
                table = widths if end == len(product) else counts
                table.setdefault(prod(old[:end]), set()).add(prod(new[:end]))
        for path in paths:
            for end in range(len(shared), len(path) + 1):
                self._recount(".".join(path[:end]), counts, widths)

    def _recount(self, name: str, counts: Mapping[int, set[int]], widths: Mapping[int, set[int]]) -> None:
        module = self.modules[name]
        if not any(_is_int(getattr(module, a, None)) for a in COUNTS):
            return
        for names, table in ((COUNTS, counts), (WIDTHS, widths)):
            for attribute in names:
                old: Any = getattr(module, attribute, None)
                if _is_int(old) and len(table.get(old, ())) == 1:
                    (new,) = table[old]
                    self.note(name, **{attribute: new})


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_sizes(x: Any) -> bool:
    return isinstance(x, tuple) and all(map(_is_int, x))


def _products(part: Part, group: str) -> Iterator[Sequence[Part]]:
    """Factors of products that have a group outside of something."""
    if isinstance(part, dict):
        ((kind, parts),) = part.items()
        if kind == "product" and group in parts[:-1]:
            yield parts
        for p in parts:
            yield from _products(p, group)
