"""Two networks in one order, and their merge refitted from front to back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from partial_networks import Two, of
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.layout import Split, widened
from merganser.align.refit import Refitted
from merganser.align.renorm import measure_batch_norm
from merganser.align.sequence import refit_in_sequence
from merganser.align.wider import widen
from merganser.symmetry import Spec

Splits = Mapping[str, Split]


class Job:
    """Two networks in one order, and their merge."""

    def __init__(self, one: nn.Module, two: nn.Module, spec: Spec, batches: Sequence[Batch]) -> None:
        self.one, self.two, self.spec, self.batches = one, two, spec, batches

    def run(self, splits: Splits | None = None, **options: Any) -> tuple[nn.Module, Refitted]:
        splits, heads = splits or {}, options.get("apart_heads", ())
        a, b = self.one.state_dict(), self.two.state_dict()
        state = {name: widened(self.spec, name, x, b[name], splits, heads) for name, x in a.items()}
        merged = widen(self.one, self.spec, splits, state, heads)
        done = refit_in_sequence(merged, self.one, self.two, self.spec, splits, self.batches, **options)
        return merged, done


def job_of(it: Two, args: Sequence[Batch] | None = None, *, b: Mapping[str, Tensor] | None = None) -> Job:
    """Of a network and another of its kind; BatchNorm measured on the batches."""
    batches: Sequence[Batch] = args or [(it.args, it.kwargs)]
    one, other = copy.deepcopy(it.network), copy.deepcopy(it.network)
    other.load_state_dict(dict(b or it.b))
    for network in (one, other):
        measure_batch_norm(network, batches)
    return Job(one, other, it.spec, batches)


def vectors(*sizes: int, width: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [((torch.randn(n, width, generator=generator, dtype=torch.float64),), {}) for n in sizes]


def small(*layers: nn.Module, batches: Sequence[Batch] | None = None) -> Job:
    torch.manual_seed(0)
    for layer in layers:
        for child in layer.modules():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()  # type: ignore[operator]
    batches = batches or vectors(40, 20)
    return job_of(of(nn.Sequential(*layers), tuple(batches[0][0])), batches)


def fitted(x: np.ndarray, y: np.ndarray, prior: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias by least squares on rows, the weight held to a prior."""
    strength = np.sqrt(ridge * ((x - x.mean(0)) ** 2).sum(0).mean())
    damping = strength * np.eye(x.shape[1], x.shape[1] + 1)
    inputs = np.concatenate([np.concatenate([x, np.ones((len(x), 1))], 1), damping])
    found = np.linalg.lstsq(inputs, np.concatenate([y, strength * prior.T]), rcond=None)[0]
    return found[:-1].T, found[-1]
