"""Which layers of a network a run reaches, in order, and which of them can be refitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from merganser.align.activations import Batch
from merganser.align.orientation import is_turned, outputs_of
from merganser.errors import ParameterError
from merganser.symmetry.record import evaluating

#: Layers that can be refitted, beside transformers' Conv1D.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def examples(batch: Batch) -> int:
    """How many examples a batch holds: the length of its first tensor; 0 where it has none."""
    return next((len(x) for x in tree_leaves((tuple(batch[0]), batch[1])) if isinstance(x, Tensor) and x.ndim), 0)


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Some of its examples: of every tensor that is as long as there are examples."""
    many = examples(batch)
    args, named = tree_map_only(
        Tensor, lambda x: x[start:stop] if x.ndim and len(x) == many else x, (tuple(batch[0]), dict(batch[1]))
    )
    return args, named


def joined(batches: Sequence[Batch]) -> tuple[Batch, int]:
    """All batches as one, and its number of examples: tensors end to end, everything else must be the same.

    Raises:
        ParameterError: If they hold no example, or do not fit together.
    """
    sizes = [examples(batch) for batch in batches]
    if not sum(sizes):
        raise ParameterError("there is no example to refit by", "give batches with tensors of some")

    def together(values: Sequence[Any]) -> Any:
        if all(isinstance(x, Tensor) and x.ndim and len(x) == n for x, n in zip(values, sizes, strict=True)):
            return torch.cat(list(values)) if len(values) > 1 else values[0]
        if all(_same(x, values[0]) for x in values):
            return values[0]
        raise ParameterError("batches differ in what is no tensor of examples", "give the same settings in all of them")

    leaves, trees = zip(*(tree_flatten((tuple(args), dict(named))) for args, named in batches), strict=True)
    if any(tree != trees[0] for tree in trees):
        raise ParameterError("batches differ in which inputs they have", "give the same inputs in all of them")
    try:
        args, named = tree_unflatten([together(values) for values in zip(*leaves, strict=True)], trees[0])
    except RuntimeError as error:
        raise ParameterError(f"batches cannot be joined: {error}", "give inputs of one shape in all of them") from error
    return (args, named), sum(sizes)


def _same(x: Any, y: Any) -> bool:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y))
    return bool(x == y)


@contextmanager
def watching(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode, without gradients, that runs all its layers as modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(network), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class Ran:
    """What a run showed of a network's layers.

    Attributes:
        layers: that can be refitted, in the order of the run.
        places: outputs of one example, over units.
        free: those whose outputs go to BatchNorm and nowhere else.
        left: those that cannot be refitted, and why.
    """

    layers: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    free: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)


class _Uses(TorchFunctionMode):
    """Which layers' outputs anything but BatchNorm takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[str, ReferenceType[Tensor]]] = {}
        self.elsewhere: set[str] = set()

    def of(self, x: Any) -> str | None:
        """The layer that gave a tensor."""
        name, reference = self.made.get(id(x), ("", None))
        return name if reference is not None and reference() is x else None

    def note(self, *values: Any) -> None:
        """Note what is taken in."""
        self.elsewhere.update(name for x in tree_leaves(values) if (name := self.of(x)) is not None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not functional.batch_norm and any(isinstance(x, Tensor) for x in tree_leaves(result)):
            self.note(args, kwargs)
        return result


def layers_run(network: nn.Module, batch: Batch) -> Ran:
    """Run a network once and look at its layers: nn.Linear, nn.Conv1d, nn.Conv2d and transformers' Conv1D.

    Args:
        network: left as it is.
        batch: inputs.
    """
    seen, runs, uses = Ran(), Counter[str](), _Uses()
    size = max(1, examples(batch))
    normed: set[str] = set()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LAYERS) or is_turned(layer)}

    def ran(name: str, layer: nn.Module, _args: Any, y: Any) -> None:
        runs[name] += 1
        if isinstance(y, Tensor):
            uses.made[id(y)] = name, ref(y)
            seen.places[name] = y.numel() // (size * outputs_of(layer))

    def into_norm(_norm: nn.Module, args: Any) -> None:
        normed.update(name for x in args[:1] if (name := uses.of(x)) is not None)

    with ExitStack() as stack, watching(network):
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(ran, name)).remove)
        for norm in network.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                stack.callback(norm.register_forward_pre_hook(into_norm).remove)
        with uses:
            result = network(*batch[0], **batch[1])
        uses.note(result)
    owners = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for name in dict.fromkeys([*runs, *layers]):
        why = _fault(layers[name], runs[name], owners)
        if why is None:
            seen.layers.append(name)
        else:
            seen.left[name] = why
    seen.free = {name for name in seen.layers if name in normed and name not in uses.elsewhere}
    return seen


def _fault(layer: nn.Module, runs: int, owners: Counter[int]) -> str | None:
    """Why a layer cannot be refitted, if it cannot."""
    known: Any = next((kind for kind in LAYERS if isinstance(layer, kind)), type(layer))
    if not runs:
        return "it does not run as a module"
    if not {"weight", "bias"} <= layer._parameters.keys():
        return "its weight or bias is computed from others"
    if any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
        return "its weight or bias is another tensor too"
    if runs > 1:
        return f"it runs {runs} times"
    if getattr(layer, "groups", 1) != 1:
        return "it is a convolution in groups"
    own = any(getattr(type(layer), f, None) is not getattr(known, f, None) for f in ("forward", "_conv_forward"))
    return f"it computes something else than {known.__name__}" if own else None
