"""Layers as three products, so that what is zero by construction is not stored, nor multiplied where that takes time.

    y_A = W_A [x_A x_m] + b_A      y_m = W_m [x_A x_m x_B] + b_m      y_B = W_B [x_m x_B] + b_B

Where all units are apart, layers that are built densely hold four times the weights of one network, and blocks twice.
Small products are not as fast as their FLOPs are few: some layers are computed in one, zeros and all (`ways`).

Source: the layout of Nasery et al. 2024, arXiv:2407.02447 (PLeaS), and its count of FLOPs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.align.cost import Sides
from merganser.align.layers import Kind, block_kind
from merganser.align.layout import Side
from merganser.align.ways import Way, way
from merganser.align.wider import Record
from merganser.errors import ParameterError

#: Runs of a side and a number of places along an axis.
Runs = Sequence[Sequence[int]]

#: What reads which columns, and is called what.
_READS = {
    Side.FIRST: ("first", (Side.FIRST, Side.BOTH)),
    Side.BOTH: ("both", (Side.FIRST, Side.BOTH, Side.SECOND)),
    Side.SECOND: ("second", (Side.BOTH, Side.SECOND)),
}


class _Blocks(nn.Module):
    """Three weights where a layer has one; parameters `first_weight`, `both_weight`, `second_weight` and `bias`.

    Args:
        dense: the weight, shape (rows, columns, ..); entries of blocks that are zero by construction are left out.
        bias: of all rows.
        rows: runs of sides.
        columns: runs of sides.

    Attributes:
        way: how it is computed; to set blocks or dense here changes nothing but rounding.

    Raises:
        ParameterError: If the runs are of another size than the weight.
    """

    def __init__(self, dense: Tensor, bias: Tensor | None, rows: Runs, columns: Runs) -> None:
        super().__init__()
        for axis, runs in enumerate((rows, columns)):
            if sum(count for _, count in runs) != dense.shape[axis]:
                raise ParameterError(
                    f"sides are of {sum(n for _, n in runs)} places, and the weight is {tuple(dense.shape)}"
                )
        self.rows, self.columns = rows, columns
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self._shape = tuple(dense.shape)
        self._spans: dict[str, tuple[int, int] | None] = {}
        order: list[int] = []
        for side, (name, read) in _READS.items():
            mine, seen = _places(rows, (side,)), _places(columns, read)
            order += mine
            self._note(f"{name}_rows", mine, dense.device)
            self._note(f"{name}_columns", seen, dense.device)
            block = dense.detach()[mine][:, seen].clone() if mine else None
            weight = None if block is None else nn.Parameter(block, requires_grad=dense.requires_grad)
            self.register_parameter(f"{name}_weight", weight)
        self.way = self._way()
        back = torch.tensor(order).argsort()
        sorted_already = order == sorted(order)
        self.register_buffer("_order", None if sorted_already else back.to(dense.device), persistent=False)

    def _note(self, name: str, found: Sequence[int], device: torch.device) -> None:
        """Keep places as a stretch where they are neighbours, else one by one."""
        near = not found or list(found) == list(range(found[0], found[0] + len(found)))
        self._spans[name] = (found[0] if found else 0, len(found)) if near else None
        index = None if near else torch.tensor(found, device=device)
        self.register_buffer(f"_{name}", index, persistent=False)

    def _picked(self, x: Tensor, axis: int, name: str) -> Tensor:
        span = self._spans[name]
        if span is None:
            return x.index_select(axis, self.get_buffer(f"_{name}"))
        return x if span == (0, x.shape[axis]) else x.narrow(axis, *span)

    def _way(self, *, groups: bool = False) -> Way:
        rows, columns = (_sides(runs) for runs in (self.rows, self.columns))
        return way(rows, columns, taps=prod(self._shape[2:]), groups=groups)

    def _apply_blocks(self, x: Tensor, axis: int) -> Tensor:
        """All rows' outputs, along an axis that held the columns."""
        if self.way is Way.DENSE:
            return self._product(x, self.weight, self.bias)
        made = []
        for name, _ in _READS.values():
            weight: Tensor | None = getattr(self, f"{name}_weight")
            if weight is not None:
                bias = None if self.bias is None else self._picked(self.bias, 0, f"{name}_rows")
                made.append(self._product(self._picked(x, axis, f"{name}_columns"), weight, bias))
        y = torch.cat(made, axis)
        order: Tensor | None = self._order  # type: ignore[assignment]
        return y if order is None else y.index_select(axis, order)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, put together anew each time."""
        blocks = [
            self._with_zeros(block, f"{name}_columns")
            for name, _ in _READS.values()
            if (block := getattr(self, f"{name}_weight")) is not None
        ]
        dense = torch.cat(blocks)
        order: Tensor | None = self._order  # type: ignore[assignment]
        return dense if order is None else dense.index_select(0, order)

    def _with_zeros(self, block: Tensor, name: str) -> Tensor:
        """Some rows of the dense weight."""
        span = self._spans[name]
        if span is None:
            rows = block.new_zeros(block.shape[0], *self._shape[1:])
            return rows.index_copy(1, self.get_buffer(f"_{name}"), block)
        start, count = span
        around = start, self._shape[1] - start - count
        return functional.pad(block, (*(0, 0) * (block.ndim - 2), *around)) if any(around) else block

    def extra_repr(self) -> str:
        """Sides of rows and columns."""
        return ", ".join(
            f"{what}=" + "+".join(f"{count} {Side(side).name.lower()}" for side, count in runs)
            for what, runs in (("rows", self.rows), ("columns", self.columns))
        )


def _sides(runs: Runs) -> Sides:
    """How many places are A's, merged, and B's."""
    first, both, second = (len(_places(runs, (side,))) for side in _READS)
    return first, both, second


def _places(runs: Runs, sides: Sequence[Side]) -> list[int]:
    """Places of some sides, ascending."""
    found: list[int] = []
    start = 0
    for side, count in runs:
        if side in sides:
            found += range(start, start + count)
        start += count
    return found


class BlockLinear(_Blocks):
    """nn.Linear in three products.

    Args:
        linear: the dense layer.
        rows: runs of sides.
        columns: runs of sides.
    """

    def __init__(self, linear: nn.Linear, rows: Runs, columns: Runs) -> None:
        super().__init__(linear.weight, linear.bias, rows, columns)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (.., columns) to (.., rows)."""
        return self._apply_blocks(x, -1)


class BlockConv(_Blocks):
    """nn.Conv1d or nn.Conv2d of one group in three convolutions.

    Args:
        convolution: the dense layer.
        rows: runs of sides.
        columns: runs of sides.

    Raises:
        ParameterError: If the runs are of another size than the weight, or some rows have no columns.
    """

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d, rows: Runs, columns: Runs) -> None:
        super().__init__(convolution.weight, convolution.bias, rows, columns)
        if not all(weight.shape[1] for name, weight in self.named_parameters() if name != "bias"):
            raise ParameterError("some outputs of a convolution read none of its inputs", "leave it dense")
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size, self.groups = convolution.kernel_size, 1
        self.stride, self.padding, self.dilation = convolution.stride, convolution.padding, convolution.dilation
        self.padding_mode = convolution.padding_mode
        self._border = list(convolution._reversed_padding_repeated_twice)
        self._convolve: Any = functional.conv1d if len(self.kernel_size) == 1 else functional.conv2d
        in_turn = all([side for side, _ in runs] == [Side.FIRST, Side.SECOND] for runs in (rows, columns))
        self.way = self._way(groups=in_turn)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
        padding = self.padding if self.padding_mode == "zeros" else 0
        y: Tensor = self._convolve(x, weight, bias, self.stride, padding, self.dilation, groups)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Shape (.., columns, places) to (.., rows, places)."""
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._border, mode=self.padding_mode)
        if self.way is Way.GROUPS:
            halves: list[Tensor] = [getattr(self, f"{name}_weight") for name in ("first", "second")]
            return self._product(x, torch.cat(halves), self.bias, 2)
        return self._apply_blocks(x, -1 - len(self.kernel_size))


_KINDS: dict[Kind, type[BlockLinear] | type[BlockConv]] = {
    "linear": BlockLinear,
    "conv1d": BlockConv,
    "conv2d": BlockConv,
}


def blocked(network: nn.Module, record: Record) -> nn.Module:
    """A copy of a wider network in which layers with blocks of zeros are stored as three blocks.

    Layers of other kinds, of several groups or with hooks, and weights that other modules hold too, stay dense.

    Args:
        network: from `widen` or `rewidened`; it is left as it is.
        record: how it was laid out.

    Raises:
        ParameterError: If the record is of another network, or the network cannot be copied.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    if lost := [name for name in record.sides if name not in modules]:
        raise ParameterError(f"the layout has a layer {lost[0]}, and the network has none", "name its network")
    chosen: dict[int, Any] = {}
    for name, (rows, columns) in record.sides.items():
        module = modules[name]
        kind = block_kind(module)
        if kind is not None and "weight" in module._parameters and id(module) not in chosen:
            chosen[id(module)] = _KINDS[kind](module, rows, columns)
    _drop_shared(network, chosen)
    if id(network) in chosen:
        block: nn.Module = chosen[id(network)]
        return block.train(network.training)
    for module in network.modules():
        if id(module) in chosen:
            chosen[id(module)].train(module.training)
    try:
        return copy.deepcopy(network, chosen)
    except (RuntimeError, TypeError) as error:
        raise ParameterError(f"the network cannot be copied: {error}") from error


def skipping_zeros(network: nn.Module) -> nn.Module:
    """The network itself, changed so that no layer multiplies zeros, be it slower: its FLOPs are those of `cost`."""
    for module in network.modules():
        if isinstance(module, _Blocks) and module.way is Way.DENSE:
            module.way = Way.BLOCKS
    return network


def _drop_shared(network: nn.Module, chosen: dict[int, Any]) -> None:
    """Leave out layers whose weight or bias another module holds too: it would no longer be one."""
    holders: dict[int, set[int]] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    for module in network.modules():
        shared = any(len(holders[id(p)]) > 1 for p in module._parameters.values() if p is not None)
        if id(module) in chosen and shared:
            del chosen[id(module)]
