"""After a merge: statistics of BatchNorm from data, since those of the parents fit no unit of the child.

Units that are averaged are less correlated than their parents' statistics say, so their variance shrinks; measuring it
anew repairs that (Jordan et al. 2022, arXiv:2211.08403, RESET).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from merganser.errors import ParameterError

Batch = tuple[Sequence[Any], Mapping[str, Any]]


def reset_batch_norm(network: nn.Module, batches: Iterable[Batch]) -> int:
    """Set running means and variances to those of the batches, every batch counting alike; weights stay.

    Args:
        network: changed in place; a network without BatchNorm is left alone.
        batches: inputs, positional and named.

    Returns:
        How many layers were set.

    Raises:
        ParameterError: If there are such layers and no batch.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    modes = {module: module.training for module in network.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
        layer.train()
    seen = 0
    try:
        with torch.no_grad():
            for args, kwargs in batches:
                network(*args, **kwargs)
                seen += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    if not seen:
        raise ParameterError("there is no batch to measure BatchNorm's statistics by")
    return len(layers)
