"""The balance of weights and activations, chosen without labels.

For every balance: merge, run, and see how far the outputs are from the parents' mean,

    r(balance) = sum_x ||f(x) - mean_k f_k(x)||^2 / sum_x ||mean_k f_k(x)||^2

The squared distances to each parent differ from N times that by what no balance changes. The least r is taken, and the
smaller balance of two that are level. Xu et al. 2024, arXiv:2403.01753, take the best accuracy on labelled data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.errors import ParameterError

#: Shares of the weights that are tried.
BALANCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Chosen:
    """A balance, and what spoke for it.

    Attributes:
        balance: the share of the weights.
        network: merged with it.
        distances: r of every balance that was tried.
    """

    balance: float
    network: nn.Module
    distances: dict[float, float]


def choose_balance(
    merge: Callable[[float], nn.Module],
    networks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    balances: Sequence[float] = BALANCES,
    output: Callable[[Any], Tensor] | None = None,
) -> Chosen:
    """Merge with every balance and keep the one whose outputs are nearest to the parents' mean.

    Args:
        merge: from a balance to a merged network, ready to run.
        networks: the parents, in evaluation mode.
        batches: inputs without labels; best those that no similarity was measured on.
        balances: to try.
        output: the tensor to compare, from what a network returns; by default that itself, or its logits.

    Raises:
        ParameterError: If there is no parent, no balance or no batch, or a network returns no tensor.
    """
    if not networks:
        raise ParameterError("there is no parent to judge by")
    if not balances or not batches:
        raise ParameterError("there is no balance to try" if not balances else "there is no batch to judge by")
    means = [_mean(networks, batch, output) for batch in batches]
    scale = sum(float(m.square().sum()) for m in means)
    found: Chosen | None = None
    distances: dict[float, float] = {}
    for balance in sorted(balances):
        network = merge(balance)
        far = sum(
            float((_mean([network], batch, output) - m).square().sum()) for m, batch in zip(means, batches, strict=True)
        )
        far = inf if isnan(far) else far
        distances[balance] = far / scale if scale > 0 else far
        if found is None or distances[balance] < distances[found.balance]:
            found = Chosen(balance, network, distances)
    assert found is not None
    return found


def _mean(networks: Sequence[nn.Module], batch: Batch, output: Callable[[Any], Tensor] | None) -> Tensor:
    args, kwargs = batch
    outputs = []
    for network in networks:
        with torch.no_grad():
            result = network(*args, **kwargs)
        x = output(result) if output is not None else getattr(result, "logits", result)
        if not isinstance(x, Tensor):
            raise ParameterError(f"a network returns a {type(x).__name__}", "name its tensor with output=")
        outputs.append(x.double())
    return torch.stack(outputs).mean(0)
