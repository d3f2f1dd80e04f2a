"""Fit the last layer of a merged network to labels: a linear probe, the one step here that needs them.

    W, b = argmin mean_i -log softmax(W x_i + b)[c_i] + ridge m / 2 |W - W_0|^2      m: mean square of an input

x is what the merged network hands to its head, and W_0 is the head that the merge gave, so that few labels change
little. Blocks that a split makes zero stay zero. The objective is convex: L-BFGS in float64, from W_0 and b_0.

Source: Alain and Bengio 2016, arXiv:1610.01644 (linear probes); a pull to given weights in place of one to 0 is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.normal import readable
from merganser.align.wider import Record
from merganser.errors import NonFiniteError, ParameterError
from merganser.numerics import all_finite
from merganser.symmetry.record import evaluating

#: Of L-BFGS: steps at most, and the slope and the relative gain that are none.
PRECISE = {"maxiter": 1000, "maxfun": 2000, "gtol": 1e-9, "ftol": 1e-15}


@dataclass(frozen=True)
class Probed:
    """A head that was fitted to labels.

    Attributes:
        weight: new, of the type of the old.
        bias: new, or None where the head has none.
        examples: how many it was fitted to.
        losses: mean cross-entropy on these before and after, nats.
    """

    weight: Tensor
    bias: Tensor | None
    examples: int
    losses: tuple[float, float]


def probe(
    network: nn.Module,
    record: Record,
    layer: str,
    labelled: Sequence[tuple[Batch, Tensor]],
    *,
    ridge: float = 1e-3,
) -> Probed:
    """Fit a head to labels; the network stays as it is.

    Args:
        network: merged, with dense layers.
        record: how it was laid out.
        layer: name of its head, an nn.Linear that gives one row of logits an example.
        labelled: batches, and the class of every example: the number of its row in the head; with heads that stay
            apart, A's classes first, then B's.
        ridge: pull to the head that is there, in [0, inf), times the mean square of what it takes in.

    Raises:
        ParameterError: If the layer is no such head, a class is none of its rows, or the ridge is out of range.
        NonFiniteError: If what the head takes in is not finite.
    """
    if not 0 <= ridge < inf:
        raise ParameterError(f"ridge is {ridge}; it is a number of at least 0")
    head = dict(network.named_modules()).get(layer)
    if not isinstance(head, nn.Linear):
        kind = "the network has no such layer" if head is None else f"it is {type(head).__name__}"
        raise ParameterError(f"a probe is for a linear head, and {layer}: {kind}")
    x, classes = _taken_in(network, layer, head, labelled)
    weight, bias = head.weight.detach().double().cpu(), head.bias
    offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    found_w, found_b, losses = _fitted(
        x, classes, weight, offset, _free(record, layer, weight), ridge, bias is not None
    )
    return Probed(found_w.to(head.weight), None if bias is None else found_b.to(bias), len(x), losses)


def _taken_in(
    network: nn.Module, layer: str, head: nn.Linear, labelled: Sequence[tuple[Batch, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What the head takes in, (examples, entries) in float64, and the classes."""
    rows: list[Tensor] = []
    hook = head.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append((args[0] if args else kwargs["input"]).detach()), with_kwargs=True
    )
    parts: list[Tensor] = []
    wanted: list[Tensor] = []
    try:
        with evaluating(network), torch.no_grad():
            for (args, kwargs), classes in labelled:
                rows.clear()
                network(*args, **kwargs)
                found = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]) if rows else head.weight[:0]
                if len(found) != classes.numel():
                    raise ParameterError(
                        f"{layer} takes in {len(found)} rows of a batch of {classes.numel()} classes",
                        "a probe is for a head that gives one row of logits an example",
                    )
                parts.append(found.double().cpu())
                wanted.append(classes.reshape(-1).cpu())
    finally:
        hook.remove()
    if not parts or not sum(map(len, parts)):
        raise ParameterError("there is no example to fit the head to")
    x, classes = torch.cat(parts), torch.cat(wanted)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ParameterError(f"classes are {classes.dtype}; they are whole numbers, one an example")
    classes = classes.long()
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= head.out_features:
        raise ParameterError(
            f"classes are {low} to {high}, and {layer} has {head.out_features} outputs", "they count from 0"
        )
    if not all_finite(x):
        raise NonFiniteError(f"the labelled batches give {layer} NaN or infinity", "see that they hold neither")
    return x, classes


def _free(record: Record, layer: str, weight: Tensor) -> Tensor:
    """1 where an entry may change, 0 in blocks of zeros; shape of the weight."""
    if layer not in record.sides:
        return torch.ones_like(weight)
    rows, columns = (torch.tensor([side for side, n in runs for _ in range(n)]) for runs in record.sides[layer])
    return readable(rows, columns)


def _fitted(
    x: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, free: Tensor, ridge: float, biased: bool
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Weight, bias, and the mean cross-entropy before and after."""
    import numpy as np
    from scipy.optimize import minimize

    pull = ridge * float(x.square().mean())
    places = torch.arange(len(x))

    def cross_entropy(step: Tensor, shift: Tensor) -> tuple[float, Tensor]:
        """Mean, and its derivative by the logits."""
        logs = torch.log_softmax(x @ (weight + step).T + bias + shift, 1)
        slope = logs.exp()
        slope[places, classes] -= 1
        return -float(logs[places, classes].mean()), slope / len(x)

    def objective(flat: Any) -> tuple[float, Any]:
        step, shift = torch.from_numpy(flat[: -len(bias)]).view_as(weight), torch.from_numpy(flat[-len(bias) :])
        value, slope = cross_entropy(step, shift)
        by_step = (slope.T @ x + pull * step) * free
        by_shift = slope.sum(0) if biased else torch.zeros_like(bias)
        gradient = torch.cat([by_step.reshape(-1), by_shift]).numpy()
        return value + pull / 2 * float(step.square().sum()), gradient

    start = np.zeros(weight.numel() + len(bias))
    best = minimize(objective, start, jac=True, method="L-BFGS-B", options=PRECISE)
    step, shift = torch.from_numpy(best.x[: -len(bias)]).view_as(weight), torch.from_numpy(best.x[-len(bias) :])
    none = torch.zeros_like(step), torch.zeros_like(shift)
    return weight + step, bias + shift, (cross_entropy(*none)[0], cross_entropy(step, shift)[0])
