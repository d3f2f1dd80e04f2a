"""Which tensors the layers of two networks take in, layer by layer, and which layers take in the same.

Layers are nn.Linear, nn.Conv1d and nn.Conv2d (without groups) and transformers' Conv1D that are called as modules.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.autocorrelation import Windows, pair_count
from merganser.align.orientation import entries_of, is_turned
from merganser.errors import ParameterError, ShapeError, and_more
from merganser.symmetry.record import evaluating

#: Called with a layer's name, what it takes in, and how often it ran before in this batch.
Show = Callable[[str, Tensor, int], None]
_SAME_WAY = "inputs must take the same way through both networks"


@dataclass(frozen=True)
class Stream:
    """What some layers take in.

    Attributes:
        names: of all layers that take it in, in the order of the run; the first stands for the rest.
        asked: those whose moments are wanted.
        calls: how often they run in a batch.
        entries: of a row of one network.
        windows: of a convolution; None for a linear layer.
        by_shifts: whether moments of all windows may be summed by shifts.
        nbytes: memory for sums, and for inputs that wait.
    """

    names: tuple[str, ...]
    asked: tuple[str, ...]
    calls: int
    entries: int
    windows: Windows | None
    by_shifts: bool
    nbytes: int


class _Enough(BaseException):
    """All that is watched was seen; no error, so that no network that excepts errors stops it."""


def run_watched(
    network: nn.Module,
    batch: Batch,
    show: Show,
    names: Iterable[str],
    calls: Mapping[str, int] | None = None,
    *,
    whole: bool = False,
) -> None:
    """Run a network and show what layers take in; it is left when all ran as often as `calls` says, unless `whole`.

    Raises:
        ShapeError: If one runs more often before that, or less often.
    """
    seen: Counter[str] = Counter()

    def watched(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if calls is not None and seen[name] == calls[name]:
                raise ShapeError(f"{name} runs more often in a batch than in the first", _SAME_WAY)
            show(name, args[0] if args else kwargs["input"], seen[name])
            seen[name] += 1
            if calls is not None and not whole and dict(seen) == calls:
                raise _Enough

        return hook

    args, kwargs = batch
    fast = torch.backends.mha.get_fastpath_enabled()
    modules = dict(network.named_modules())
    hooks = [modules[name].register_forward_pre_hook(watched(name), with_kwargs=True) for name in names]
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it runs no module
        with evaluating(network), torch.no_grad(), suppress(_Enough):
            network(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    for name in calls or ():
        if calls is not None and seen[name] != calls[name]:
            raise ShapeError(f"{name} runs less often in a batch than in the first", _SAME_WAY)


def _inputs(network: nn.Module, batch: Batch, names: Iterable[str]) -> dict[str, list[tuple[int, Tensor]]]:
    """What layers take in, run by run: a number of the tensor, the same for the same one, and its form on `meta`."""
    alive: dict[int, tuple[ReferenceType[Tensor], int, int]] = {}
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    numbers = itertools.count()

    def show(name: str, x: Tensor, _call: int) -> None:
        version = 0 if x.is_inference() else x._version  # a tensor that was written to is another
        reference, then, number = alive.get(id(x), (None, 0, 0))
        if reference is None or reference() is not x or then != version:
            number = next(numbers)
            alive[id(x)] = ref(x), version, number
        seen.setdefault(name, []).append((number, torch.empty_like(x, device="meta")))

    run_watched(network, batch, show, names)
    return seen


def _measurable(layer: nn.Module) -> bool:
    convolution = isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1
    return isinstance(layer, nn.Linear) or convolution or is_turned(layer)


def streams_of(
    one: nn.Module, two: nn.Module, batch: Batch, layers: Sequence[str] | None, share: int | None
) -> list[Stream]:
    """What layers take in, in the order of the run."""
    modules = {name: layer for name, layer in one.named_modules() if _measurable(layer)}
    theirs = dict(two.named_modules())
    for name in modules if layers is None else layers:
        if name not in modules or not _measurable(theirs.get(name, nn.Identity())):
            raise ParameterError(
                f"{name!r} is no layer of both networks that can be measured",
                "those are nn.Linear, nn.Conv1d and nn.Conv2d without groups, and Conv1D of transformers",
            )
    a, b = (_inputs(network, batch, modules) for network in (one, two))
    together: dict[Any, list[str]] = {}
    for name, runs in a.items():
        if [x.shape for _, x in runs] != [x.shape for _, x in b.get(name, ())]:
            raise ShapeError(f"{name} does not take in the same shapes in both networks", "they differ in architecture")
        sources = tuple(number for number, _ in runs), tuple(number for number, _ in b[name])
        together.setdefault((sources, _windows(modules[name])), []).append(name)
    if missing := [name for name in layers or () if name not in a]:
        raise ParameterError(f"{missing[0]} does not run as a module{and_more(missing)}", "leave it out of the layers")
    streams = []
    for (_, windows), names in together.items():
        asked = tuple(name for name in names if layers is None or name in layers)
        if asked:
            entries = entries_of(modules[names[0]])
            seen = [x for _, x in a[names[0]]]
            shifts = windows is not None and any(_by_shifts(windows, x) for x in seen)
            nbytes = _nbytes(seen, entries, windows, share, shifts)
            streams.append(Stream(tuple(names), asked, len(seen), entries, windows, shifts, nbytes))
    return streams


def _windows(layer: nn.Module) -> Windows | None:
    return Windows.of(layer) if isinstance(layer, nn.Conv1d | nn.Conv2d) else None


def _by_shifts(windows: Windows, x: Tensor) -> bool:
    images, _, height, width = windows.padded(x).shape
    return windows.by_shifts(height, width, images)


def _nbytes(runs: Sequence[Tensor], entries: int, windows: Windows | None, share: int | None, shifts: bool) -> int:
    """Memory for sums, and for one network's inputs in a batch."""
    sums, waiting = (2 * entries + 1) ** 2, 0
    for x in runs:
        held = x if windows is None else windows.padded(x)
        rows = x.numel() // entries if windows is None else prod(windows.windows_of(x))
        drawn = share is not None and share < rows * len(runs)
        waiting += x.itemsize * (min(rows, share or 0) * entries if drawn else held.numel())
        if windows is not None and not drawn and shifts:
            sums = max(sums, (2 * entries + 1) ** 2 + pair_count(windows.kernel) * (2 * held.shape[1]) ** 2)
    return 8 * sums + waiting


def grouped(streams: Sequence[Stream], memory_bytes: int) -> list[list[Stream]]:
    """Streams of one pass together, in the order of the run."""
    groups: list[list[Stream]] = []
    free = 0
    for stream in streams:
        if stream.nbytes > memory_bytes:
            raise ParameterError(
                f"moments of {stream.names[0]} take {stream.nbytes:,} bytes, and memory_bytes is {memory_bytes:,}",
                "give more, smaller batches, fewer rows, or leave it out of the layers",
            )
        if not groups or stream.nbytes > free:
            groups.append([])
            free = memory_bytes
        groups[-1].append(stream)
        free -= stream.nbytes
    return groups
