"""Record one run of a network: which operation made which tensor from which, down to ATen.

The run may be on any device, `meta` included, where no weight needs memory.

A run is recorded rather than the graph of torch.export: that graph is the record of one run, too, on the same inputs
and with the same sizes, and it refuses networks whose way depends on numbers. Here those are recorded as well; what
they may have left out is in `Record.branches`. A program that was exported is run and recorded like any network.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from merganser.errors import DtypeError, ParameterError

#: Where a tensor comes from.
Origin = Literal["parameter", "buffer", "input", "constant", "activation"]


@dataclass(frozen=True)
class Value:
    """A tensor of the run.

    Attributes:
        number: unique in a record.
        shape: of the tensor.
        origin: what it is.
        dtype: of its entries.
        stride: entries of memory from one place of an axis to the next.
        offset: of its first entry in that memory.
    """

    number: int
    shape: tuple[int, ...]
    origin: Origin
    dtype: torch.dtype
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Call:
    """One operation.

    Attributes:
        op: its name without overload, such as "addmm".
        args: by the names of its schema, every tensor a `Value`; defaults included.
        outputs: tensors that it gave.
        place: name of the module that was running.
        acts: whether it does more than give its outputs: writes into a tensor, or tells Python a number.
    """

    op: str
    args: Mapping[str, Any]
    outputs: tuple[Value, ...]
    place: str
    acts: bool = False


@dataclass
class Record:
    """A run, in order.

    Attributes:
        calls: operations.
        values: all tensors by number.
        names: of parameters and buffers; tied ones are one value of several names.
        outputs: what the network gave.
        branches: operations whose results a network may have taken a branch by.
        entangled: parameters that share memory with another in another form, and that they do.
    """

    calls: list[Call] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    names: dict[str, Value] = field(default_factory=dict)
    outputs: tuple[Value, ...] = ()
    branches: list[str] = field(default_factory=list)
    entangled: list[tuple[Value, str]] = field(default_factory=list)


#: Operations that hand numbers to Python, or whose results have a shape that depends on numbers.
BRANCHES = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "equal", "is_nonzero")


#: What oneDNN makes of a whole recurrent layer. Convolutions are the same operations with it and without, and faster.
FUSED = "mkldnn_rnn"

#: What of a network's result must stay as it is.
Output = Callable[[Any], Any]


def tensors_of(result: Any, output: Output | None) -> list[Tensor]:
    """Tensors that a network gives, in any nesting of lists, tuples, mappings and dataclasses.

    Raises:
        ParameterError: If there is none.
    """
    found = list(_tensors(result if output is None else output(result)))
    if not any(x.numel() for x in found):
        raise ParameterError(f"the network gives no number: {type(result).__name__}", "tell what counts with output=")
    return found


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for part in result.values():
            yield from _tensors(part)
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)
    elif is_dataclass(result):
        for field_ in fields(result):
            yield from _tensors(getattr(result, field_.name))


def copied(network: nn.Module) -> nn.Module:
    """A copy that shares parameters, so that a run may write into buffers and attributes.

    Raises:
        ParameterError: If the network cannot be copied.
    """
    try:
        return copy.deepcopy(network, {id(p): p for p in network.parameters()})
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"the network cannot be copied: {error}") from error


def record_run(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, output: Output | None = None
) -> Record:
    """Record one run in evaluation mode, without gradients; the network is left in the mode it was in.

    Args:
        network: any network.
        args: its positional inputs; tensors may be nested in lists, tuples and dicts.
        kwargs: its named inputs.
        output: what of the result must stay as it is; by default all of it.

    Raises:
        ParameterError: If the network is a script, whose modules cannot be looked into.
        DtypeError: If a parameter is complex.
    """
    for name, x in network.named_parameters():
        if x.is_complex():  # nothing that compares, moves and merges units knows these numbers
            raise DtypeError(
                f"{name} is complex; what units such parameters have is not found",
                "hold real and imaginary parts in one real tensor: torch.view_as_real",
            )
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ParameterError("the network is TorchScript, which hides its operations", "give the Python network")
    _recorded(network, args, kwargs or {}, output)  # may fill caches that outlive a network: what follows has them, too
    return _recorded(network, args, kwargs or {}, output).record


def record_tensors(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Collection[int]
) -> dict[int, Tensor]:
    """Run a network as `record_run` does, and keep tensors of the run by their numbers in its record."""
    fast = _recorded(network, args, kwargs, None, frozenset(numbers), fused=True)
    if not any(call.op.startswith(FUSED) for call in fast.record.calls):
        return fast.kept
    return _recorded(network, args, kwargs, None, frozenset(numbers)).kept


def _recorded(
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Output | None,
    keep: frozenset[int] = frozenset(),
    *,
    fused: bool = False,
) -> _Recorder:
    network = copied(network)
    recorder = _Recorder(network, keep)
    _run(recorder, network, args, kwargs, output, fused)
    return recorder


_UNRECORDED: ContextVar[bool] = ContextVar("unrecorded", default=False)


@contextmanager
def unrecorded() -> Iterator[None]:
    """What is done in here is no part of a run that is recorded."""
    token = _UNRECORDED.set(True)
    try:
        yield
    finally:
        _UNRECORDED.reset(token)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, and after it every module in the mode that it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _run(
    recorder: _Recorder,
    network: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Output | None,
    fused: bool,
) -> None:
    recorder.enter({"args": args, "kwargs": dict(kwargs)}, "input")
    fast = torch.backends.mha.get_fastpath_enabled()
    hooks = [
        hook
        for name, module in network.named_modules()
        for hook in (module.register_forward_pre_hook(recorder.into(name)), module.register_forward_hook(recorder.out))
    ]
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operation that nobody can look into
        devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
        unseen = torch.random.fork_rng(devices), torch.inference_mode(False), warnings.catch_warnings()
        with unseen[0], unseen[1], unseen[2], evaluating(network), torch.no_grad(), recorder:
            warnings.simplefilter("ignore")  # of switching a fused kernel off
            with torch.backends.mkldnn.flags(enabled=fused and torch.backends.mkldnn.enabled):
                result = network(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    recorder.record.outputs = tuple(recorder.value(x, "constant") for x in tensors_of(result, output))


def _first(x: Tensor) -> int:
    return int(x.storage_offset())


def _last(x: Tensor) -> int:
    """One behind the last entry in memory."""
    return _first(x) + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every ATen operation of a run."""

    def __init__(self, network: nn.Module, keep: frozenset[int] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = Record()
        self.kept: dict[int, Tensor] = {}
        self._keep = keep
        self._seen: dict[int, tuple[Value, ref[Tensor]]] = {}  # an address is used again after a tensor is gone
        self._places: list[str] = []
        named = {"parameter": network.named_parameters, "buffer": network.named_buffers}
        by_storage: dict[Any, Value] = {}
        stored = network.state_dict(keep_vars=True)
        memory: dict[Any, dict[str, Tensor]] = {}
        for origin, tensors in named.items():
            for name, x in tensors(remove_duplicate=False):
                if name not in stored:
                    continue  # made anew by whoever builds the network: a constant
                key = (x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride())
                if key not in by_storage:
                    by_storage[key] = self._new(x, origin)  # type: ignore[arg-type]
                self.record.names[name] = self._know(x, by_storage[key])
                if x.device.type != "meta" and x.numel():
                    memory.setdefault(x.untyped_storage()._cdata, {})[name] = x
        self._entangle(memory.values())

    def _entangle(self, memory: Iterable[Mapping[str, Tensor]]) -> None:
        """Find parameters that share memory and are not the same tensor: no order of one could be the other's."""
        for sharing in memory:
            for (_, x), (other, y) in itertools.permutations(sharing.items(), 2):
                one, two = self.value(x, "parameter"), self.value(y, "parameter")
                if one is not two and _first(x) < _last(y) and _first(y) < _last(x):
                    self.record.entangled.append((one, f"shares memory with {other} in another form"))

    def enter(self, tree: Any, origin: Origin) -> None:
        """Make the tensors of a tree known."""
        for x in tree_leaves(tree):
            if isinstance(x, Tensor):
                self.value(x, origin)

    def value(self, x: Tensor, origin: Origin) -> Value:
        """The value of a tensor; a new one of that origin where it is unknown."""
        known, reference = self._seen.get(id(x), (None, None))
        if known is not None and reference is not None and reference() is x:
            return known
        return self._know(x, self._new(x, origin))

    def _know(self, x: Tensor, value: Value) -> Value:
        self._seen[id(x)] = value, ref(x)
        return value

    def _new(self, x: Tensor, origin: Origin) -> Value:
        value = Value(len(self.record.values), tuple(x.shape), origin, x.dtype, x.stride(), int(x.storage_offset()))
        self.record.values.append(value)
        if value.number in self._keep:
            self.kept[value.number] = x.detach().clone()
        return value

    def into(self, name: str) -> Callable[..., None]:
        """A hook for when a module begins."""

        def hook(module: nn.Module, args: Any) -> None:
            self._places.append(name)

        return hook

    def out(self, module: nn.Module, args: Any, result: Any) -> None:
        """A hook for when a module ends."""
        self._places.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _UNRECORDED.get():
            return func(*args, **kwargs)
        schema = func._schema
        taken = {a.name: a.default_value for a in schema.arguments}
        taken |= dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        op = func._opname if hasattr(func, "_opname") else schema.name.partition("::")[2]
        named = tree_map_only(Tensor, lambda x: self.value(x, "constant"), taken)
        result = func(*args, **kwargs)
        if op in BRANCHES:
            self.record.branches.append(f"{op} in {self._place()}")
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if writes:  # whoever holds a view of it sees axes that are the same, whatever is in them now
            op = op.removesuffix("_")
        if torch.Tag.inplace_view in func.tags:  # the same object with other axes
            for x in (x for x in tree_leaves(result) if isinstance(x, Tensor)):
                self._know(x, self._new(x, "activation"))
        outputs = tuple(self.value(x, "activation") for x in tree_leaves(result) if isinstance(x, Tensor))
        self.record.calls.append(Call(op, named, outputs, self._place(), writes or op in BRANCHES))
        return result

    def _place(self) -> str:
        return next((place for place in reversed(self._places) if place), "the network")
