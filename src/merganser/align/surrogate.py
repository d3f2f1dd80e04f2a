"""Inputs to compare and fit networks by where there is no data: noise, as near to the data as BatchNorm remembers it.

A first layer y = W x + b that BatchNorm follows tells what it gave on data: means mu and variances s^2 of each output.
Inputs whose entries are independent, with mean m_c and variance v_c in channel c, give

    E y_o = sum_c S_oc m_c + b_o     S_oc = sum_t f_t W_oct        t: taps, f_t: share of places where the input has it
    Var y_o = sum_c Q_oc v_c         Q_oc = sum_t f_t W_oct^2      not counting how the mean changes at the border

With v = v_0 the variance of all channels that meets Var y best, m and v are the least squares of all parents together

    min_m sum_o ((E y_o - mu_o) / s_o)^2 + lambda |m|^2 / v_0
    min_v sum_o (Var y_o / s_o^2 - 1)^2 + lambda' |v / v_0 - 1|^2,  v >= v_0 / 100

so that what the outputs leave open stays plain noise. Where no such layer is first, entries are standard normal.

BatchNorm of a merged network is measured on these inputs like any other, and then carried over to the data's: with
mean over both parents, merged as the network is, marked by a bar,

    mu = mu_noise + bar(mu_data) - bar(mu_noise)     s^2 = s^2_noise bar(s^2_data) / bar(s^2_noise)

which is right where a unit varies from its parents' mean as much on data as on noise; a copy of a network merged with
it keeps its statistics. Nasery et al. 2024, arXiv:2407.02447 (PLeaS), use another data set in place of noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from merganser.align.activations import Batch
from merganser.align.autocorrelation import Windows
from merganser.align.layout import Splits, widened
from merganser.align.orientation import is_turned, matrix_of
from merganser.align.ran import LAYERS, examples, watching
from merganser.errors import ParameterError
from merganser.symmetry import Spec

#: At most so many inputs a batch.
BATCH = 100
#: Pull to plain noise, in mean squares of what the first layer weighs it by.
PULL = 1e-3
#: Least variance of a channel, as a share of that of all.
LEAST = 0.01


@dataclass(frozen=True)
class First:
    """The first layer of a network, where BatchNorm follows it.

    Attributes:
        layer: its name.
        norm: name of the BatchNorm.
        place: which of the inputs it takes in, counted over all of them.
        view: the input as the layer takes it in: shape, strides and offset.
        channels: the axis of that which its weight sums over.
        taps: share of the places at which each tap meets an input, shape (taps,).
    """

    layer: str
    norm: str
    place: int
    view: tuple[tuple[int, ...], tuple[int, ...], int]
    channels: int
    taps: Tensor


@dataclass(frozen=True)
class Noise:
    """Mean and variance of every channel of an input, each of shape (channels,), and the layer that told them."""

    first: First
    mean: Tensor
    variance: Tensor


def first_layer(network: nn.Module, batch: Batch) -> First | None:
    """The layer that takes in an input, turned or flattened at most, and gives its output to BatchNorm.

    Args:
        network: left as it is.
        batch: inputs.

    Returns:
        None where there is none: inputs are changed before, or something else follows.
    """
    leaves, tree = tree_flatten((tuple(batch[0]), dict(batch[1])))
    leaves = [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]
    args, kwargs = tree_unflatten(leaves, tree)
    inputs = {place: x for place, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()}
    met: list[tuple[str, int, Tensor, Tensor]] = []
    found: list[First] = []

    def ran(name: str, layer: nn.Module, given: tuple[Any, ...], y: Tensor) -> None:
        for place, x in inputs.items() if given else ():
            if _same_entries(x, given[0]):
                met.append((name, place, given[0], y))

    def normed(name: str, _norm: nn.Module, given: tuple[Any, ...]) -> None:
        for layer, place, x, y in met:
            if given and given[0] is y and not found:
                module = network.get_submodule(layer)
                axis, shares = _read(module, x)
                view = (tuple(x.shape), x.stride(), int(x.storage_offset()))
                found.append(First(layer, name, place, view, axis, shares))

    with ExitStack() as stack, watching(network):
        for name, module in network.named_modules():
            if (isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1) or is_turned(module):
                stack.callback(module.register_forward_hook(_named(ran, name)).remove)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                stack.callback(module.register_forward_pre_hook(_named(normed, name)).remove)
        network(*args, **kwargs)
    return found[0] if found else None


def _named(hook: Any, name: str) -> Any:
    return lambda *given: hook(name, *given)


def _same_entries(x: Tensor, seen: Any) -> bool:
    """Whether a tensor is another one looked at: all its entries, examples along the first axis."""
    return (
        isinstance(seen, Tensor)
        and seen.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        and seen.numel() == x.numel()
        and (seen.shape[0], seen.stride(0)) == (x.shape[0], x.stride(0))
    )


def _read(layer: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """The axis of its input that a layer's weight sums over, and how often each tap meets it."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return x.ndim - 1, torch.ones(1, dtype=torch.float64)
    windows = Windows.of(layer)
    ones = torch.ones_like(x[:1].select(1, 0).unsqueeze(1), dtype=torch.float64)
    view = windows.view(windows.padded(ones))
    return 1, view.reshape(-1, windows.taps).mean(0)


def matched_noise(first: First, networks: Sequence[nn.Module]) -> Noise:
    """Noise under which the first layer of some networks gives, as far as it can, what their BatchNorm remembers.

    Args:
        first: their first layer.
        networks: all of one architecture, with the statistics of the data.
    """
    sums, squares, offsets, means, variances = [], [], [], [], []
    for network in networks:
        layer, norm = network.get_submodule(first.layer), network.get_submodule(first.norm)
        weight = matrix_of(layer.get_parameter("weight"), turned=is_turned(layer))
        taps = weight.reshape(len(weight), -1, len(first.taps))
        sums.append((taps * first.taps).sum(-1))
        squares.append((taps.square() * first.taps).sum(-1))
        offsets.append(torch.zeros(len(weight)) if layer.bias is None else layer.get_parameter("bias").detach())
        means.append(norm.get_buffer("running_mean"))
        variances.append(norm.get_buffer("running_var"))
    s, q = torch.cat(sums).numpy(), torch.cat(squares).numpy()
    off = (torch.cat(means).double() - torch.cat(offsets).double()).cpu().numpy()
    mean, variance = matched(s, q, off, torch.cat(variances).double().cpu().numpy())
    return Noise(first, torch.from_numpy(mean), torch.from_numpy(variance))


def matched(
    sums: np.ndarray, squares: np.ndarray, means: np.ndarray, variances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every input channel.

    Args:
        sums: S, shape (outputs, channels).
        squares: Q, shape (outputs, channels).
        means: of the outputs without their biases, shape (outputs,).
        variances: of the outputs, shape (outputs,); outputs that do not vary tell nothing.

    >>> import numpy as np
    >>> mean, variance = matched(np.eye(2), np.eye(2), np.array([0.5, -1.0]), np.array([4.0, 1.0]))
    >>> mean.round(1), variance.round(1)
    (array([ 0.5, -1. ]), array([4., 1.]))
    """
    channels = sums.shape[1]
    told = variances > 0
    s, q, spread = sums[told], squares[told], variances[told]
    whole = q.sum(1) / spread
    if not channels or not float(whole @ whole) > 0:
        return np.zeros(channels), np.ones(channels)
    scale = float(whole.sum() / (whole @ whole))  # min |v_0 whole - 1|^2
    deviation = np.sqrt(spread)[:, None]
    a = s * np.sqrt(scale) / deviation
    mean = _ridge(a, means[told] / deviation[:, 0])
    return mean * np.sqrt(scale), _shares(q * scale / spread[:, None]) * scale


def _ridge(a: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares with a ridge about zero, by the smaller of both sides."""
    pull = PULL * float((a * a).sum()) / a.shape[1]
    if len(a) < a.shape[1]:
        return np.asarray(a.T @ np.linalg.solve(a @ a.T + pull * np.eye(len(a)), wanted))
    return np.asarray(np.linalg.solve(a.T @ a + pull * np.eye(a.shape[1]), a.T @ wanted))


def _shares(a: np.ndarray) -> np.ndarray:
    """Variances by channel, as shares of that of all, under which each output varies by 1; see the file's head."""
    from scipy.optimize import minimize

    pull = PULL * float((a * a).sum()) / a.shape[1]

    def missed(u: np.ndarray) -> tuple[float, np.ndarray]:
        off, moved = a @ u - 1, u - 1
        return float(off @ off + pull * moved @ moved) / 2, a.T @ off + pull * moved

    bounds, start = [(LEAST, None)] * a.shape[1], np.ones(a.shape[1])
    options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10}
    return np.asarray(minimize(missed, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options).x)


def surrogate_batches(example: Batch, count: int, *, noise: Noise | None = None, seed: int = 0) -> list[Batch]:
    """Batches of noise, all of one size.

    Args:
        example: inputs of the network. Floating tensors of as many rows as there are examples become noise; of other
            tensors of examples, rows are repeated; everything else stays.
        count: how many inputs, no fewer than 2; rounded down to batches of one size, of `BATCH` at most.
        noise: mean and variance by channel of one of them; by default all entries are standard normal.
        seed: of the drawing.

    Raises:
        ParameterError: If there are too few, or the network takes in no floating numbers.
    """
    if count < 2:
        raise ParameterError(f"{count} surrogate inputs are too few", "give 2 or more")
    many = examples(example)
    leaves, tree = tree_flatten((tuple(example[0]), dict(example[1])))
    drawn = [isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0 and len(x) == many for x in leaves]
    if not any(drawn):
        raise ParameterError(
            "the network takes in no floating numbers, and noise is made of nothing else", "give data, or batches"
        )
    generator = torch.Generator().manual_seed(seed)
    parts = -(-count // BATCH)
    batches: list[Batch] = []
    for _ in range(parts):
        made = [
            _drawn(x, count // parts, generator, noise if noise is not None and noise.first.place == place else None)
            if fresh
            else _repeated(x, many, count // parts)
            for place, (x, fresh) in enumerate(zip(leaves, drawn, strict=True))
        ]
        args, kwargs = tree_unflatten(made, tree)
        batches.append((args, kwargs))
    return batches


def _drawn(x: Tensor, count: int, generator: torch.Generator, noise: Noise | None) -> Tensor:
    """Noise of the shape of an input, for so many examples."""
    made = torch.randn((count, *x.shape[1:]), generator=generator, dtype=torch.float64)
    if noise is not None:
        (shape, strides, offset), axis = noise.first.view, noise.first.channels
        seen = made.as_strided((count, *shape[1:]), strides, offset)  # as the layer takes it in
        along = [-1 if i == axis else 1 for i in range(seen.ndim)]
        seen.mul_(noise.variance.sqrt().reshape(along)).add_(noise.mean.reshape(along))
    return made.to(x)


def _repeated(x: Any, many: int, count: int) -> Any:
    if isinstance(x, Tensor) and x.ndim and len(x) == many:
        return x[torch.arange(count) % many]
    return x


def carried_over(
    spec: Spec,
    splits: Splits,
    merged: Mapping[str, Tensor],
    noise: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    data: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    share: float = 0.5,
) -> dict[str, Tensor]:
    """BatchNorm's statistics of a merged network, from those on noise to those on data.

    Args:
        spec: symmetries of both parents.
        splits: of groups.
        merged: tensors of the merged network, measured on noise.
        noise: tensors of both parents, in one order of units, measured on noise.
        data: the same with the statistics of the data.
        share: of B in what is merged.

    Returns:
        Running means and variances, by name.
    """
    found: dict[str, Tensor] = {}
    for name, x in merged.items():
        kind = name.rpartition(".")[2]
        if kind in ("running_mean", "running_var") and name in data[0]:
            seen, then = (
                widened(spec, name, a[name].double(), b[name].double(), splits, share=share) for a, b in (noise, data)
            )
            if kind == "running_mean":
                found[name] = (x.double() + then - seen).to(x)
            else:
                ratio = torch.where(seen > 0, x.double() / seen.clamp(min=torch.finfo(seen.dtype).tiny), 1.0)
                found[name] = (then * ratio).to(x)
    return found
