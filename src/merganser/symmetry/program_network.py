"""A network that runs a program of torch.export step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from merganser.errors import ParameterError


@dataclass(frozen=True)
class Made:
    """What an earlier step gave, or an input, by its name."""

    name: str


@dataclass(frozen=True)
class Stored:
    """A tensor of the network, by its name."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation, or one layer.

    Attributes:
        name: of what it gives.
        call: an operation; or the name of a module.
        args: by place; tensors are `Made` or `Stored`.
        kwargs: by name.
        rank: axes of the first tensor.
        last: what no later step reads.
    """

    name: str
    call: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rank: int = 0
    last: tuple[str, ...] = ()

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of an operation by the names of its schema, defaults included."""
        schema = self.call._schema.arguments
        taken = {a.name: a.default_value for a in schema}
        return taken | dict(zip((a.name for a in schema), self.args, strict=False)) | dict(self.kwargs)


@dataclass(frozen=True)
class Way:
    """All steps, and what goes in and out; copies of a network share it.

    Attributes:
        steps: in order.
        inputs: of the program.
        result: tensors that it gives.
        inside: nesting of positional and named inputs.
        outside: nesting of what it gives.
        words: names of positional inputs, then of named ones.
        constants: tensors that are no state.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Input, ...]
    result: Any
    inside: Any
    outside: Any
    words: tuple[str, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Way:
        """Itself: nothing of it changes."""
        return self


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        name: of it.
        shape: its sizes, None where any size may be; None for what is no tensor.
        value: what it must be, where it is no tensor.
    """

    name: str
    shape: tuple[int | None, ...] | None = None
    value: Any = None


class ProgramNetwork(nn.Module):
    """A network that runs a program step by step; its tensors have the program's names."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self._way = way

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program gives.

        Raises:
            ParameterError: If inputs are not those of the program, or of other sizes.
        """
        way = self._way
        known = dict(way.constants) | dict(zip((it.name for it in way.inputs), self._leaves(args, kwargs), strict=True))
        for step in way.steps:
            call = self.get_submodule(step.call) if isinstance(step.call, str) else step.call
            args, kwargs = fx.node.map_aggregate((step.args, dict(step.kwargs)), lambda x: self._filled(x, known))
            known[step.name] = call(*args, **kwargs)
            for name in step.last:
                del known[name]
        leaves = [self._filled(x, known) for x in way.result]
        return pytree.tree_unflatten(leaves, way.outside)

    def _filled(self, x: Any, known: Mapping[str, Any]) -> Any:
        if isinstance(x, Made):
            return known[x.name]
        return tensor_of(self, x.name) if isinstance(x, Stored) else x

    def _leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Inputs in the order of the program; those by place may be given by name, and the other way round."""
        way = self._way
        places, named = way.inside.children()[0].num_children, dict(kwargs)
        given = [*args, *(named.pop(word) for word in way.words[len(args) : places] if word in named)]
        named |= dict(zip(way.words[places:], given[places:], strict=False))
        wanted = way.inside.children()[1].context or []
        ordered = {word: named[word] for word in wanted if word in named} | named
        leaves, tree = pytree.tree_flatten((tuple(given[:places]), ordered))
        if tree != way.inside:
            told = ", ".join(way.words) or f"{len(way.inputs)} tensors"
            raise ParameterError(f"the program takes {told}; it was given {len(args)} by place and {list(kwargs)}")
        for it, x in zip(way.inputs, leaves, strict=True):
            _check_input(it, x)
        return leaves


def tensor_of(network: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, last = name.rpartition(".")
    found = getattr(network.get_submodule(owner), last)
    assert isinstance(found, Tensor)
    return found


def _check_input(it: Input, x: Any) -> None:
    if it.shape is None:
        if not isinstance(x, Tensor) and x != it.value:
            raise ParameterError(f"{it.name} is {x!r}, and the program was made for {it.value!r}")
        return
    fits = isinstance(x, Tensor) and len(x.shape) == len(it.shape)
    if not fits or any(n is not None and n != size for n, size in zip(it.shape, x.shape, strict=True)):
        told = "(" + ", ".join("any" if n is None else str(n) for n in it.shape) + ")"
        found = tuple(x.shape) if isinstance(x, Tensor) else x
        raise ParameterError(
            f"{it.name} is {found}, and the program was made for {told}",
            "export it with dynamic_shapes, or give batches of that size",
        )
