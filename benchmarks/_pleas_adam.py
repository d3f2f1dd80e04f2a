"""The objective of PLeaS as its authors solve it: Adam over all layers at once, and the same by least squares.

    min_W  sum_layers mean |conv((x_A + x_B) / 2; W) - (y_A + y_B) / 2|^2        entries of zero blocks stay zero

x and y are what the parents' layers take in and give, kept apart where units are apart. 400 steps from the block
average with batches of 16, learning rate 5e-4, cosine to 0. Here a step runs each parent once and takes its layers'
outputs from that run; the authors' code runs every layer of both parents anew, for the same targets.

Least squares look at the pictures once, for second moments; any splits and any ridge are solved from these.

Source: Nasery et al. 2024, arXiv:2407.02447 (PLeaS), section 3.2; the numbers are those of its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import Batch
from merganser.align.layout import Places, Side, Splits, widened
from merganser.align.moments import Joint, joint_moments
from merganser.align.partial import Pair
from merganser.align.ran import layers_run
from merganser.align.refit import Fit, fit_of, refit, shares
from merganser.align.sequence import Sampling

BATCH, RATE = 16, 5e-4
#: Weights and biases by name.
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What is to be solved.

    Attributes:
        pair: both networks.
        splits: units that stay apart.
        state: the block average.
        fits: where outputs and inputs of each layer stand.
    """

    pair: Pair
    splits: Splits
    state: Mapping[str, Tensor]
    fits: Mapping[str, Fit]

    def start(self) -> Tensors:
        """The block average, of the layers that are fitted."""
        names = [f"{layer}.{what}" for layer in self.fits for what in ("weight", "bias")]
        return {name: self.state[name].clone() for name in names if name in self.state}

    def measured(self) -> dict[str, Joint]:
        """What least squares need of the pictures; it does not depend on the splits."""
        pair, how = self.pair, Sampling()
        return joint_moments(
            pair.one,
            pair.two,
            pair.batches,
            layers=list(self.fits),
            rows=how.rows,
            memory_bytes=how.memory_bytes,
        )

    def solved(self, moments: dict[str, Joint]) -> Tensors:
        """By least squares, from second moments; constants are not left to BatchNorm here, as Adam does not either."""
        pair = self.pair
        return refit(pair.found.spec, pair.a, pair.b, self.state, moments, self.splits).tensors

    def descended(self, steps: int, *, anew: bool = False) -> Tensors:
        """By Adam; pictures are drawn from all batches, in a new order every time they are through.

        Args:
            steps: of it.
            anew: run the parents' layers again for their outputs, as the authors' code does.
        """
        images = torch.cat([args[0] for args, _ in self.pair.batches])
        tensors = {name: x.requires_grad_() for name, x in self.start().items()}
        masks = {f"{layer}.weight": _mask(fit, tensors[f"{layer}.weight"]) for layer, fit in self.fits.items()}
        adam = torch.optim.Adam(tensors.values(), lr=RATE)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        generator = torch.Generator().manual_seed(0)
        waiting = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(waiting) < BATCH:
                waiting = torch.randperm(len(images), generator=generator)
            chosen, waiting = waiting[:BATCH], waiting[BATCH:]
            adam.zero_grad()
            errors = self.errors(tensors, images[chosen], anew=anew)
            torch.stack([error.mean() for error, _ in errors.values()]).sum().backward()
            for name, mask in masks.items():
                gradient = tensors[name].grad
                if mask is not None and gradient is not None:
                    gradient.mul_(mask)
            adam.step()
            cosine.step()
        return {name: x.detach() for name, x in tensors.items()}

    def errors(
        self, tensors: Mapping[str, Tensor], x: Tensor, *, anew: bool = False
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer: squared errors on some pictures, and what it is to give."""
        first, second = self.seen(x)
        found = {}
        for layer, fit in self.fits.items():
            (a, of_a), (b, of_b) = first.pop(layer), second.pop(layer)
            if anew:
                with torch.no_grad():
                    of_a, of_b = self.pair.one.get_submodule(layer)(a), self.pair.two.get_submodule(layer)(b)
            taken, target = laid(fit.columns, a, b), laid(fit.rows, of_a, of_b)
            given = _given(self.pair.one.get_submodule(layer), taken, tensors, layer)
            found[layer] = (given - target).square(), target
        return found

    def seen(self, x: Tensor) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """What both parents' layers take in and give on some pictures."""
        return [_seen(network, ((x,), {}), self.fits) for network in (self.pair.one, self.pair.two)]

    def judged(self, tensors: Mapping[str, Tensor], known: Sequence[Batch], fresh: Tensor) -> dict[str, float]:
        """The objective, and the mean over layers of the share of squares that is left: known and fresh pictures."""
        said = {}
        for name, some in (
            ("known", [args[0] for args, _ in known]),
            ("fresh", list(fresh.split(len(known[0][0][0])))),
        ):
            sums = {layer: torch.zeros(3, dtype=torch.float64) for layer in self.fits}
            with torch.no_grad():
                for x in some:
                    for layer, (error, target) in self.errors(tensors, x).items():
                        squares = target.double().square().sum()
                        sums[layer] += torch.stack([error.double().sum(), squares, squares.new_tensor(error.numel())])
            said[f"objective_{name}"] = float(sum(e / n for e, _, n in sums.values()))
            said[f"share_{name}"] = float(sum(e / s for e, s, _ in sums.values())) / len(sums)
        return said


def problem_of(pair: Pair, splits: Splits) -> Problem:
    """The objective of a pair with these units apart."""
    state = {name: widened(pair.found.spec, name, x, pair.b[name], splits, ()) for name, x in pair.a.items()}
    fits = {}
    for layer in layers_run(pair.one, pair.batches[0]).layers:
        name = f"{layer}.weight"
        fit = fit_of(pair.found.spec, layer, pair.a[name], pair.b[name], splits)
        if isinstance(fit, Fit):
            fits[layer] = fit
    return Problem(pair, splits, state, fits)


def laid(places: Places, a: Tensor, b: Tensor) -> Tensor:
    """Channels of both networks as the merged one has them: means where they are merged."""
    if not places.apart and torch.equal(places.index, torch.arange(a.shape[1])):
        return (a + b) / 2
    of_a, of_b = (share.to(a).reshape(-1, *[1] * (a.ndim - 2)) for share in shares(places.side))
    at_a, at_b = (torch.where(places.side == other, 0, places.index) for other in (Side.SECOND, Side.FIRST))
    return a.index_select(1, at_a) * of_a + b.index_select(1, at_b) * of_b


def _mask(fit: Fit, weight: Tensor) -> Tensor | None:
    """1 where a row may read a column; None where all may."""
    rows, columns = fit.rows.side[:, None], fit.columns.side
    free = (rows == Side.BOTH) | (columns == Side.BOTH) | (rows == columns)
    return None if bool(free.all()) else free.to(weight).reshape(*free.shape, *[1] * (weight.ndim - 2))


def _given(layer: nn.Module, x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    assert isinstance(layer, nn.Conv2d)
    return functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)


def _seen(network: nn.Module, batch: Batch, layers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What layers take in and give."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def ran(name: str, _layer: nn.Module, args: Any, y: Tensor) -> None:
        found[name] = args[0], y  # BatchNorm writes into neither; nor does what follows here

    with ExitStack() as stack, torch.no_grad():
        for name in layers:
            stack.callback(network.get_submodule(name).register_forward_hook(partial(ran, name)).remove)
        network(*batch[0], **batch[1])
    return found
