"""After a merge: statistics from data, since units that are averaged vary less than their parents did.

    Var((x_a + x_b) / 2) = (var_a + var_b + 2 cov) / 4

With BatchNorm, its statistics are measured anew (RESET). Without, every linear layer and convolution gets the mean of
its parents' means and the mean of their deviations back, unit by unit (REPAIR):

    W <- W sigma* / sigma,   b <- (b - mu) sigma* / sigma + mu*

Source: Jordan et al. 2022, arXiv:2211.08403, sections 3 and 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch
from merganser.align.ran import joined, watching
from merganser.errors import NonFiniteError, ParameterError, ShapeError
from merganser.numerics import all_finite
from merganser.symmetry.record import evaluating, unrecorded


def reset_batch_norm(network: nn.Module, batches: Iterable[Batch]) -> int:
    """Set running means and variances to those of the batches, every batch counting alike; weights stay.

    Args:
        network: changed in place; a network without BatchNorm is left alone.
        batches: inputs, positional and named.

    Returns:
        How many layers were set.

    Raises:
        ParameterError: If there are such layers and no batch.
        NonFiniteError: If what they take in is not finite. In both cases, and where a run fails, statistics stay.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    momenta = {layer: layer.momentum for layer in layers}
    before = {layer: {n: x.clone() for n, x in layer.named_buffers()} for layer in layers}
    seen = 0
    try:
        with evaluating(network), torch.no_grad():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative mean
                layer.train()
            for args, kwargs in batches:
                network(*args, **kwargs)
                seen += 1
        if not seen:
            raise ParameterError("there is no batch to measure BatchNorm's statistics by")
        if not all(all_finite(x) for layer in layers for x in layer.buffers()):
            raise NonFiniteError("the batches give BatchNorm NaN or infinity", "see that they hold neither")
    except BaseException:
        for layer, buffers in before.items():
            layer.load_state_dict(buffers, strict=False)
        raise
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
    return len(layers)


@contextmanager
def measuring(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode whose BatchNorm takes the statistics of what comes in, and normalises by these.

    In a run in training mode it would normalise by other ones than it keeps, off by n / (n - 1). Where a norm runs
    again, it has the mean of all runs' statistics.

    Raises:
        ParameterError: If there is one value of a unit.
        NonFiniteError: If what comes in is not finite. In both cases, and where a run fails, statistics stay.
    """

    def entered(name: str, norm: nn.modules.batchnorm._BatchNorm, args: tuple[Tensor, ...], kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel() < 2 * x.shape[1]:
            raise ParameterError(f"the batches give {name} one value of each unit", "give more examples")
        with unrecorded():
            runs = norm.get_buffer("num_batches_tracked").add_(1)
            for kind, value in zip(("running_var", "running_mean"), var_mean(x), strict=True):
                buffer = norm.get_buffer(kind)
                now = value.to(buffer)
                if not all_finite(now):
                    raise NonFiniteError(f"the batches give {name} NaN or infinity", "see that they hold neither")
                buffer.lerp_(now, 1 / int(runs))

    before: dict[nn.Module, dict[str, Tensor]] = {}
    with ExitStack() as stack, watching(network):
        for name, norm in network.named_modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                before[norm] = {n: x.clone() for n, x in norm.named_buffers()}
                norm.reset_running_stats()
                hook = norm.register_forward_pre_hook(partial(entered, name), with_kwargs=True)
                stack.callback(hook.remove)
        try:
            yield
        except BaseException:
            for norm, buffers in before.items():
                norm.load_state_dict(buffers, strict=False)
            raise


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance, over one less than there are values, and mean of every unit, along axis 1; both float64.

    A block of examples at a time, about its own mean: a sixth of the time that torch.var_mean takes over pictures.
    """
    count, mean, squares = 0, *torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    axes, along = [axis for axis in range(x.ndim) if axis != 1], [-1, *[1] * (x.ndim - 2)]
    for part in torch.split(x, max(1, BLOCK * len(x) // max(1, x.numel()))):
        values = part.numel() // x.shape[1]
        block = part.double()
        here = block.sum(axes) / values
        block = block - here.reshape(along) if block is part else block.sub_(here.reshape(along))
        apart, count = here - mean, count + values
        squares += block.square_().sum(axes) + apart.square() * (values * (count - values) / count)
        mean += apart * (values / count)
    return squares / (count - 1), mean


def measure_batch_norm(network: nn.Module, batches: Sequence[Batch]) -> None:
    """Give BatchNorm the statistics of all batches, run at once; raises what `joined` and `measuring` do."""
    args, kwargs = joined(batches)[0]
    with measuring(network):
        network(*args, **kwargs)


#: Entries that are summed at once.
BLOCK = 1 << 18
#: Mean and standard deviation of every unit of a layer, each of shape (units,).
Statistics = Mapping[str, tuple[Tensor, Tensor]]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Values of a unit that a batch must have to be brought to a mean and a deviation.
LEAST_ROWS = 8
#: Moves of a layer's outputs, over the wanted deviations, below which `repair` takes them for settled.
SETTLED = 1e-3


def layer_statistics(network: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of what every linear layer and convolution gives, unit by unit, in float64.

    Left out are layers that share a weight or a bias with another, whose weight is computed from others (weight norm),
    and that run more than once or not at all: none of these can be repaired by scaling a weight.

    Args:
        network: in evaluation mode; left as it is.
        batches: inputs.

    Returns:
        By the layer's name.

    Raises:
        ParameterError: If there is no batch.
        NonFiniteError: If a layer gives NaN or infinity.
    """
    return _measured(network, batches, _plain)


def repair(network: nn.Module, parents: Sequence[Statistics], batches: Iterable[Batch]) -> int:
    """Give the layers of a merged network the means and deviations of their parents.

    What a layer takes in while it is measured is already repaired. Of one batch that is done in one pass: what a layer
    gives is brought to its target before the next takes it in. Of several, each would be brought there by its own
    moments, which scatter around those of all. So the network is first measured as it is, and stays if the moments are
    those wanted, as those of copies are; else one such pass sets factors, and further ones measure under the last
    factors of all layers before, until these settle. Each makes one more layer exact, so at most as many are needed as
    there are layers, and it is not far fewer where batches are small.

    Args:
        network: merged; changed in place.
        parents: `layer_statistics` of each, in the order of units of the merged network. Layers that a parent lacks
            are left alone; the last layer may be among these.
        batches: inputs, the same as the parents', each with some values of every unit; the more, the better. Held in
            memory where they are an iterator.

    Returns:
        How many layers were repaired.

    Raises:
        ParameterError: If there is no parent or no batch, or a batch is too small.
        ShapeError: If statistics have another number of units than the layer.
    """
    if not parents:
        raise ParameterError("there is no parent to repair by")
    layers = _repairable(network)
    targets: dict[str, tuple[Tensor, Tensor]] = {}
    for name in set(layers).intersection(*parents):
        means, deviations = (torch.stack([p[name][i] for p in parents]).mean(0) for i in range(2))
        units = len(layers[name].get_parameter("weight"))
        if means.shape != (units,):
            raise ShapeError(f"{name} has {units} units, and the statistics {tuple(means.shape)}")
        targets[name] = means, deviations
    factors = _settled(network, list(batches), targets)
    with torch.no_grad():
        for name, (mean, factor, target) in factors.items():
            weight, bias = layers[name].get_parameter("weight"), layers[name].bias
            weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)).to(weight))
            if isinstance(bias, Tensor):
                bias.copy_(((bias.double() - mean) * factor + target).to(bias))
    return len(factors)


#: Of every unit of a layer a mean, a factor and a target, each of shape (units,): y -> (y - mean) factor + target.
Affine = tuple[Tensor, Tensor, Tensor]


def _settled(network: nn.Module, batches: Sequence[Batch], targets: Statistics) -> dict[str, Affine]:
    """What brings the outputs of each layer to its target where it does so in all layers before."""

    def step(known: Mapping[str, Affine] | None) -> dict[str, Affine]:
        """Measured under known factors, or, where there are none, with every batch brought to its own target."""

        def change(name: str, rows: Tensor) -> Affine | None:
            if name not in targets:
                return None
            if rows.shape[1] < LEAST_ROWS:
                raise ParameterError(
                    f"a batch gives {rows.shape[1]} values of a unit of {name}; to repair by, it takes {LEAST_ROWS}",
                    "give larger batches",
                )
            if known is not None:
                return known.get(name)
            return _affine(rows.mean(1), rows.std(1, correction=0), *targets[name])

        seen = _measured(network, batches, change)
        moments.update(seen)
        return {name: _affine(*seen[name], *targets[name]) for name in targets if name in seen}

    def far(one: Mapping[str, Affine], two: Mapping[str, Affine]) -> float:
        return max((_moved(moments[n], one[n], two[n], targets[n][1]) for n in one), default=0.0)

    moments: dict[str, tuple[Tensor, Tensor]] = {}
    if len(batches) == 1:
        return step(None)
    found = step({})
    if far(found, {n: (mean, torch.ones_like(mean), mean) for n, (mean, *_) in found.items()}) <= SETTLED:
        return found
    found = step(None)
    for _ in range(len(found)):
        last, found = found, step(found)
        if far(found, last) <= SETTLED:
            break
    return found


def _repairable(network: nn.Module) -> dict[str, nn.Module]:
    """Layers that own their weight and bias."""
    owners = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, _LAYERS)
        and "weight" in layer._parameters
        and all(owners[id(p)] == 1 for p in layer.parameters(recurse=False))
    }


def _plain(_name: str, _rows: Tensor) -> Affine | None:
    """Outputs stay."""
    return None


def _measured(
    network: nn.Module, batches: Iterable[Batch], change: Callable[[str, Tensor], Affine | None]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of layers before what they give, shape (units, values), is changed."""
    sums: dict[str, list[Any]] = {}  # sums, sums of squares, values, runs

    def watched(name: str, layer: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
            axis = -1 if isinstance(layer, nn.Linear) else y.ndim - layer.get_parameter("weight").ndim + 1
            rows = y.double().movedim(axis, 0).reshape(y.shape[axis], -1)
            new = [rows.sum(1), rows.square().sum(1), rows.shape[1], 1]
            sums[name] = [x + z for x, z in zip(sums[name], new, strict=True)] if name in sums else new
            changed = change(name, rows)
            if changed is None:
                return None
            mean, factor, target = changed
            shift = target - mean * factor if layer.bias is not None else torch.zeros_like(target)
            shape = [1] * y.ndim
            shape[axis] = -1
            return y * factor.reshape(shape).to(y) + shift.reshape(shape).to(y)

        return hook

    hooks = [m.register_forward_hook(watched(n, m)) for n, m in _repairable(network).items()]
    count = 0
    try:
        with evaluating(network), torch.no_grad():
            for args, kwargs in batches:
                network(*args, **kwargs)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise ParameterError("there is no batch to measure layers by")
    for name, (_, squares, _, _) in sums.items():
        if not all_finite(squares):
            raise NonFiniteError(f"the batches give {name} NaN or infinity", "see that they hold neither")
    return {
        name: (total / n, (squares / n - (total / n).square()).clamp(min=0).sqrt())
        for name, (total, squares, n, runs) in sums.items()
        if runs == count
    }


def _affine(mean: Tensor, deviation: Tensor, target: Tensor, wanted: Tensor) -> Affine:
    """What makes a mean and a deviation the wanted ones; a unit that never varies, but for rounding, has factor 1."""
    live = deviation > 1e-6 * (mean.square() + deviation.square()).sqrt()
    factor = torch.where(live, wanted / deviation.clamp(min=torch.finfo(deviation.dtype).tiny), 1.0)
    return mean, factor, target


def _moved(moments: tuple[Tensor, Tensor], one: Affine, two: Affine, wanted: Tensor) -> float:
    """How far apart two changes bring a layer's mean and deviation, over the deviation that is wanted of its units."""
    mean, deviation = moments
    means = [(mean - m) * factor + target for m, factor, target in (one, two)]
    apart = torch.stack([means[0] - means[1], deviation * (one[1] - two[1])]).norm()
    least = 1e-3 * means[0].norm() + torch.finfo(wanted.dtype).tiny  # of units that never vary
    return float(apart / wanted.norm().clamp(min=least))
