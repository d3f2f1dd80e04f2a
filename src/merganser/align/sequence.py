"""Refit a merged network from front to back, each layer on what the layers before it, already refitted, really give.

    x: what the merged network hands to a layer        y: what its parents' layers give on the same inputs
    W = argmin sum |W x - y|^2 + lambda |W - W_0|^2

All inputs run through the merged network at once: a layer is refitted when they reach it and then applied, so that one
run does all layers. BatchNorm takes the statistics of this run, which are those of all inputs. Parents run in
evaluation mode, batch by batch; their BatchNorm should have been measured on all these inputs before, at once.

Source: the layer-wise targets of Nasery et al. 2024, arXiv:2407.02447 (PLeaS), with the merged network's own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.autocorrelation import Windows
from merganser.align.layout import Splits
from merganser.align.match import Progress
from merganser.align.normal import Normal, solve
from merganser.align.orientation import entries_of, matrix_of, outputs_of, weight_of
from merganser.align.outputs import Outputs
from merganser.align.ran import Ran, cut, examples, joined, layers_run, watching
from merganser.align.refit import Fit, Refitted, fit_of
from merganser.align.renorm import measuring
from merganser.errors import NonFiniteError, ParameterError, ShapeError, and_more
from merganser.noise import drawn
from merganser.numerics import all_finite
from merganser.symmetry import Spec

#: From what both parents' layer gives, (n, out) each, to what the merged layer shall give.
Blend = Callable[[Tensor, Tensor], Tensor]
#: Rows that are multiplied at once.
CHUNK = 4096
#: What an example's outputs may change by in other company, as a share of the largest.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Sampling:
    """Which rows a layer is fitted to.

    Attributes:
        rows: at most so many a layer, drawn from all places of all inputs; at least 4 times as many as a row has
            entries are taken where there are so many.
        seed: of the drawing.
        memory_bytes: for what the parents give at these places; they run again when it is used up. Where all of it
            fits, it is noted while gains are measured and kept for every budget.
    """

    rows: int = 20_000
    seed: int = 0
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Refuse no rows."""
        if self.rows < 1:
            raise ParameterError(f"rows is {self.rows}; it is how many a layer, at least 1")

    def drawn(self, layer: str, entries: int, total: int) -> Tensor:
        """Numbers of rows, ascending."""
        return drawn(self.seed, "rows", layer, total, max(self.rows, 4 * entries))


def refit_in_sequence(
    merged: nn.Module,
    one: nn.Module,
    two: nn.Module,
    spec: Spec,
    splits: Splits,
    batches: Sequence[Batch],
    *,
    ridge: float = 1e-3,
    sampling: Sampling | None = None,
    apart_heads: Collection[str] = (),
    blends: Mapping[str, Blend] | None = None,
    share: float = 0.5,
    progress: Progress | None = None,
    noted: tuple[Outputs, Outputs] | None = None,
) -> Refitted:
    """Refit the layers of a merged network in the order in which they run.

    Layers are nn.Linear, nn.Conv1d and nn.Conv2d without groups and transformers' Conv1D that own their weight and run
    once; others are left.

    Args:
        merged: the block average, as `wider.widen` builds it; changed in place, BatchNorm's statistics too.
        one: network A, in evaluation mode.
        two: network B, in A's order.
        spec: symmetries of A.
        splits: of groups.
        batches: inputs of one shape but for the number of examples; all run through `merged` at once.
        ridge: pull to the block average, in [0, inf).
        sampling: which rows a layer is fitted to.
        apart_heads: layers whose outputs stay apart.
        blends: by layer, what it shall give in place of the mean.
        share: of B in the mean, where units are merged.
        progress: called as (layers done, layers).
        noted: what A's and B's layers gave on these batches, as `to_note` asks; the parents run for what is not there.

    Raises:
        ParameterError: If there is no example, or one value of a unit for BatchNorm, batches cannot be joined, a blend
            is of a layer that is not refitted, or the ridge is out of range.
        ShapeError: If the networks take in tensors of different shapes, or a blend gives another shape.
        NonFiniteError: If a layer takes in or gives NaN or infinity.
    """
    sampling = sampling or Sampling()
    whole, count = joined(batches)
    seen = layers_run(one, batches[0])
    if len(batches) > 1 and not apart_alike(one, whole, seen.layers):
        batches, noted = [whole], None  # rows of all examples together do not follow each other example by example
    work = _Work(merged, (one, two), batches, sampling.memory_bytes, ridge, blends or {}, progress, noted)
    weights = [dict(n.named_parameters()) for n in (one, two)]
    for layer, why in seen.left.items():
        work.done.kept[layer] = why
    for layer in seen.layers:
        name = f"{layer}.weight"
        fit = fit_of(spec, layer, weights[0][name], weights[1][name], splits, apart_heads, share)
        if isinstance(fit, str):
            work.done.kept[layer] = fit
        else:
            work.fits[layer] = fit
    if lost := [layer for layer in work.blends if layer not in work.fits]:
        raise ParameterError(
            f"there is a blend for {lost[0]}{and_more(lost)}, which is not refitted: "
            + work.done.kept.get(lost[0], "the network has no such layer")
        )
    work.places, work.free = seen.places, seen.free
    for layer in work.fits:
        entries = entries_of(merged.get_submodule(layer))
        work.drawn[layer] = sampling.drawn(layer, entries, count * seen.places[layer])
    with ExitStack() as stack, measuring(merged):
        for layer in work.fits:
            hook = merged.get_submodule(layer).register_forward_pre_hook(partial(work.reached, layer), with_kwargs=True)
            stack.callback(hook.remove)
        merged(*whole[0], **whole[1])
    work.done.kept.update(
        {name: "the merged network did not run it" for name in work.fits if name not in work.done.residuals}
    )
    return work.done


def to_note(
    network: nn.Module, ran: Ran, batches: Sequence[Batch], sampling: Sampling
) -> tuple[Outputs, Outputs] | None:
    """Where to note what both parents' layers give, for any split; None where that is more than memory holds."""
    count = sum(map(examples, batches))
    drawn: dict[str, Tensor] = {}
    free = sampling.memory_bytes
    for name in ran.layers:
        layer = network.get_submodule(name)
        drawn[name] = sampling.drawn(name, 2 * entries_of(layer), count * ran.places[name])  # those of fewer among them
        free -= 2 * layer.get_parameter("weight").itemsize * len(drawn[name]) * outputs_of(layer)
    return (Outputs(drawn, ran.places), Outputs(drawn, ran.places)) if free >= 0 else None


def apart_alike(network: nn.Module, batch: Batch, layers: Sequence[str]) -> bool:
    """Whether layers give two examples' rows one after the other, as if each ran by itself."""
    if examples(batch) < 2:
        return True
    given: list[dict[str, Tensor]] = []

    def ran(name: str, layer: nn.Module, _args: Any, y: Tensor) -> None:
        given[-1][name] = flat_rows(layer, y)

    with ExitStack() as stack, watching(network):
        for name in layers:
            stack.callback(network.get_submodule(name).register_forward_hook(partial(ran, name)).remove)
        for start, stop in ((0, 2), (0, 1), (1, 2)):
            args, kwargs = cut(batch, start, stop)
            given.append({})
            network(*args, **kwargs)
    both, *alone = given
    if any(name not in found for name in layers for found in given):
        return False  # it takes another way through two examples than through one
    for name, y in both.items():
        apart = torch.cat([found[name] for found in alone])
        if y.shape != apart.shape or float((y - apart).abs().max()) > ROUNDING * float(y.abs().max()):
            return False
    return True


@dataclass
class _Work:
    """A run through the merged network, layer after layer."""

    merged: nn.Module
    parents: tuple[nn.Module, nn.Module]
    batches: Sequence[Batch]
    memory_bytes: int
    ridge: float
    blends: Mapping[str, Blend]
    progress: Progress | None
    noted: tuple[Outputs, Outputs] | None
    fits: dict[str, Fit] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)
    free: Collection[str] = ()
    wanted: dict[str, Tensor] = field(default_factory=dict)
    done: Refitted = field(default_factory=lambda: Refitted({}, {}))

    def reached(self, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Refit a layer on what it takes in."""
        x = args[0] if args else kwargs["input"]
        y, fit, weight = self._targets(name), self.fits[name], layer.get_parameter("weight")
        normal = Normal.empty(entries_of(layer), len(fit.rows))
        if y.shape != (len(self.drawn[name]), len(fit.rows)):
            wanted = len(self.drawn[name]), len(fit.rows)
            raise ShapeError(f"the blend for {name} gives {tuple(y.shape)}; its layer gives {wanted}")
        for part, rows in zip(torch.split(y, CHUNK), rows_of(layer, x, self.drawn[name]), strict=True):
            finite = all_finite(rows) and all_finite(part)
            if finite:
                normal.add(rows, part.double().cpu())
            if not finite or not (all_finite(normal.gram.diagonal()) and all_finite(normal.cross)):
                raise NonFiniteError(f"the batches give {name} NaN or infinity", "see that they hold neither")
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        normal = normal.centred() if bias is not None or name in self.free else normal
        prior = matrix_of(weight, turned=fit.turned)
        sides = fit.rows.side, fit.entries.side
        found = solve(normal, prior, *sides, self.ridge)
        self.done.residuals[name] = normal.residual(found, sides)
        weight.copy_(weight_of(found, weight, turned=fit.turned))
        self.done.tensors[f"{name}.weight"] = weight.detach()
        if bias is not None:
            bias.copy_((normal.targets - found @ normal.inputs) / normal.count)
            self.done.tensors[f"{name}.bias"] = bias.detach()
        if self.progress is not None:
            self.progress(len(self.done.residuals), len(self.fits))

    def _targets(self, name: str) -> Tensor:
        """What a layer shall give at its rows; the parents run for this one and as many after it as memory holds."""
        if self.noted is not None:
            given = [outputs.at(name, self.drawn[name]) for outputs in self.noted]
            if given[0] is not None and given[1] is not None:
                return self.blends.get(name, self.fits[name].blend)(given[0], given[1])
        if name not in self.wanted:
            layers = list(self.fits)
            free = self.memory_bytes
            some: list[str] = []
            for later in layers[layers.index(name) :]:
                each = self.parents[0].get_submodule(later).get_parameter("weight").itemsize
                free -= 2 * each * len(self.drawn[later]) * len(self.fits[later].rows)
                if some and free < 0:
                    break
                some.append(later)
            first, second = (self._given(parent, some) for parent in self.parents)
            for later in some:
                blend = self.blends.get(later, self.fits[later].blend)
                self.wanted[later] = blend(first.pop(later), second.pop(later))
        return self.wanted.pop(name)

    def _given(self, parent: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
        """What layers of a parent give at their rows, in its own type."""
        noted = Outputs({name: self.drawn[name] for name in layers}, self.places)
        with watching(parent):
            for batch in self.batches:
                with noted.noting(parent, batch):
                    parent(*batch[0], **batch[1])
        found = {name: noted.found.get(name, []) for name in layers}
        if lost := [name for name, parts in found.items() if len(parts) != len(self.batches)]:
            raise ParameterError(
                f"the layers that run differ between batches: {lost[0]}{and_more(lost)} did not run in each of them, "
                "or not in all examples together",
                "give inputs that take the same way through the networks, or refit nothing",
            )
        given = {name: torch.cat(parts) for name, parts in found.items()}
        for name, y in given.items():
            if len(y) != len(self.drawn[name]):
                raise ShapeError(
                    f"{name} gives {len(y)} rows, and {len(self.drawn[name])} were drawn", "inputs differ in shape"
                )
        return given


def flat_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """What a layer gives, shape (rows, units)."""
    axis = 1 - layer.get_parameter("weight").ndim  # places come behind the units of a convolution
    return y.movedim(axis, -1).reshape(-1, y.shape[axis])


def rows_of(layer: nn.Module, x: Tensor, chosen: Tensor) -> Iterator[Tensor]:
    """Some rows of what a layer takes in, `CHUNK` at a time: float64, shape (n, entries)."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        flat = x.reshape(-1, x.shape[-1])
        yield from (flat[part.to(x.device)].double().cpu() for part in torch.split(chosen, CHUNK))
        return
    windows = Windows.of(layer)
    for part in torch.split(chosen, CHUNK):
        yield windows.rows(x, part).double().cpu()
