"""Loss on the straight line between two networks: a barrier says that their mean is worse than they are.

    barrier = max_t  L((1 - t) a + t b) - ((1 - t) L(a) + t L(b)),   L the mean cross entropy

Source: Frankle et al. 2020, arXiv:1912.05671; this baseline: Ainsworth et al. 2022, arXiv:2209.04836, definition 2.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.activations import Batch
from merganser.align.renorm import reset_batch_norm
from merganser.errors import ParameterError, ShapeError


@dataclass(frozen=True)
class Line:
    """What was measured from one network to another.

    Attributes:
        places: t, from 0 to 1.
        losses: mean cross entropy, in nats.
        accuracies: in percent.
        items: examples of each.
    """

    places: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    items: int

    @property
    def barrier(self) -> tuple[float, float]:
        """The largest rise above the line between the ends, in nats, and where it is."""
        first, last = self.losses[0], self.losses[-1]
        rises = [(x - ((1 - t) * first + t * last), t) for x, t in zip(self.losses, self.places, strict=True)]
        return max(rises, key=lambda rise: rise[0])


def loss_line(
    network: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    labelled: Sequence[tuple[Batch, Tensor]],
    *,
    points: int = 11,
    reset: bool = False,
    measured: Sequence[Batch] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Line:
    """Judge networks on the line between two.

    Args:
        network: of their architecture; left as it is.
        a: tensors at t = 0.
        b: tensors at t = 1; what is neither floating nor complex stays that of a.
        labelled: inputs and classes, each of shape (examples,).
        points: places, both ends among them; at least 3.
        reset: measure BatchNorm's statistics anew at every place, the ends included.
        measured: inputs to measure them on; by default those that are judged.
        progress: called as (places done, places).

    Raises:
        ParameterError: If there are fewer than three points or no example, or the network returns no logits.
        ShapeError: If logits and classes do not fit.
    """
    if points < 3:
        raise ParameterError(f"points is {points}; a line has two ends and at least one place between")
    if not labelled:
        raise ParameterError("there is no batch to judge by")
    between = copy.deepcopy(network).eval()
    places = tuple(i / (points - 1) for i in range(points))
    found = []
    for done, t in enumerate(places, 1):
        between.load_state_dict(
            {n: torch.lerp(x, b[n].to(x), t) if x.is_floating_point() or x.is_complex() else x for n, x in a.items()}
        )
        if reset:
            reset_batch_norm(between, [batch for batch, _ in labelled] if measured is None else measured)
        found.append(mean_loss(between, labelled))
        if progress is not None:
            progress(done, points)
    items = sum(len(classes) for _, classes in labelled)
    return Line(places, tuple(x for x, _ in found), tuple(100 * x for _, x in found), items)


def mean_loss(network: nn.Module, labelled: Sequence[tuple[Batch, Tensor]]) -> tuple[float, float]:
    """Mean cross entropy, and share of right answers.

    Raises:
        ParameterError: If there is no example, or the network returns no logits.
        ShapeError: If logits and classes do not fit.
    """
    loss, right, count = 0.0, 0, 0
    for (args, kwargs), classes in labelled:
        with torch.no_grad():
            result: Any = network(*args, **kwargs)
        logits = getattr(result, "logits", result)
        if not isinstance(logits, Tensor):
            raise ParameterError(f"the network returns a {type(logits).__name__}, and no logits")
        if logits.ndim != 2 or classes.shape != logits.shape[:1]:
            raise ShapeError(
                f"logits are {tuple(logits.shape)}, and classes {tuple(classes.shape)}",
                "they must be (examples, classes) and (examples,)",
            )
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[1]:
            raise ParameterError(
                f"classes go from {int(classes.min())} to {int(classes.max())}, and there are {logits.shape[1]} logits"
            )
        loss += float(functional.cross_entropy(logits.double(), classes.long(), reduction="sum"))
        right += int((logits.argmax(1) == classes).sum())
        count += len(classes)
    if not count:
        raise ParameterError("there is no example to judge by")
    return loss / count, right / count
