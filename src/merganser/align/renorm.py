"""After a merge: statistics from data, since units that are averaged vary less than their parents did.

    Var((x_a + x_b) / 2) = (var_a + var_b + 2 cov) / 4

With BatchNorm, its statistics are measured anew (RESET). Without, every linear layer and convolution gets the mean of
its parents' means and the mean of their deviations back, unit by unit (REPAIR):

    W <- W sigma* / sigma,   b <- (b - mu) sigma* / sigma + mu*

Source: Jordan et al. 2022, arXiv:2211.08403, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merganser.errors import ParameterError, ShapeError

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


#: Mean and standard deviation of every unit of a layer, each of shape (units,).
Statistics = Mapping[str, tuple[Tensor, Tensor]]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_statistics(network: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of what every linear layer and convolution gives, unit by unit, in float64.

    Args:
        network: in evaluation mode; left as it is.
        batches: inputs.

    Returns:
        By the layer's name; layers that did not run are left out.

    Raises:
        ParameterError: If there is no batch.
    """
    return _measured(network, batches, {})


def repair(network: nn.Module, parents: Sequence[Statistics], batches: Iterable[Batch]) -> int:
    """Give the layers of a merged network the means and deviations of their parents, in one pass over the batches.

    What a layer takes in is already repaired: while it is measured, every batch is brought to its target on the fly.

    Args:
        network: merged; changed in place.
        parents: `layer_statistics` of each, in the order of units of the merged network. Layers that a parent lacks
            are left alone; the last layer may be among these.
        batches: inputs, the same as the parents'.

    Returns:
        How many layers were repaired.

    Raises:
        ParameterError: If there is no parent or no batch.
        ShapeError: If statistics have another number of units than the layer.
    """
    if not parents:
        raise ParameterError("there is no parent to repair by")
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    for name in set(parents[0]).intersection(*parents[1:]):
        means, deviations = (torch.stack([p[name][i] for p in parents]).mean(0) for i in range(2))
        layer = network.get_submodule(name)
        if means.shape != (len(layer.weight),):  # type: ignore[arg-type]
            raise ShapeError(f"{name} has {len(layer.weight)} units, and the statistics {tuple(means.shape)}")  # type: ignore[arg-type]
        targets[name] = means, deviations
    seen = _measured(network, batches, targets)
    with torch.no_grad():
        for name in targets.keys() & seen.keys():
            layer = network.get_submodule(name)
            (mean, deviation), (target, wanted) = seen[name], targets[name]
            factor = _factor(deviation, wanted)
            weight, bias = layer.weight, layer.bias
            assert isinstance(weight, Tensor)
            weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)).to(weight))
            if isinstance(bias, Tensor):
                bias.copy_(((bias.double() - mean) * factor + target).to(bias))
    return len(targets.keys() & seen.keys())


def _measured(network: nn.Module, batches: Iterable[Batch], targets: Statistics) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of layers before they are brought to their targets, where they have some."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def watched(name: str, layer: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
            axis = -1 if isinstance(layer, nn.Linear) else y.ndim - len(layer.weight.shape) + 1  # type: ignore[arg-type]
            rows = y.double().movedim(axis, 0).flatten(1)
            total, squares, count = sums.get(name, (0.0, 0.0, 0))
            sums[name] = total + rows.sum(1), squares + rows.square().sum(1), count + rows.shape[1]
            if name not in targets:
                return None
            target, wanted = targets[name]
            factor = _factor(rows.std(1, correction=0), wanted)
            shift = target - rows.mean(1) * factor if layer.bias is not None else torch.zeros_like(target)
            shape = [1] * y.ndim
            shape[axis] = -1
            return y * factor.reshape(shape).to(y) + shift.reshape(shape).to(y)

        return hook

    hooks = [m.register_forward_hook(watched(n, m)) for n, m in network.named_modules() if isinstance(m, _LAYERS)]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            for args, kwargs in batches:
                network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not sums:
        raise ParameterError("there is no batch to measure layers by")
    return {
        name: (total / n, (squares / n - (total / n).square()).clamp(min=0).sqrt())
        for name, (total, squares, n) in sums.items()
    }


def _factor(deviation: Tensor, wanted: Tensor) -> Tensor:
    """What makes a deviation the wanted one; a unit that never varies stays as it is."""
    live = deviation > 1e-6 * deviation.max()
    return torch.where(live, wanted / deviation.clamp(min=torch.finfo(deviation.dtype).tiny), 1.0)
