"""What a convolution takes in at a place: its window, as a row, or second moments of all windows without unfolding.

The window at place p holds x[c, p + u] for every channel c and tap u. Products of two taps that are a shift s apart

    sum_p x[c, p + u] x[c', p + u + s] = sum_{q in u + G} x[c, q] x[c', q + s]        G: places of the output

differ from u to u only in the rims of u + G: all taps of a shift share one product over what lies in all of them, and
each rim has a small one of its own, so that borders are exact. A 3 x 3 kernel has 13 shifts, and 45 pairs of taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from merganser.numerics import gram_of_rows, product

#: A number along height and along width.
Pair = tuple[int, int]
#: Entries that are looked up at once.
GATHERED = 1 << 18
LARGEST_INT = 2**31 - 1
#: Products in the time that one sum of a matrix with another takes an entry (measured: 20 to 40).
SUM = 24


@dataclass(frozen=True)
class Windows:
    """How a convolution looks at its input; one along a line is one of height 1.

    Attributes:
        kernel: taps.
        stride: places from one window to the next.
        dilation: places from one tap to the next.
        padding: places before and behind, along height and along width.
        mode: what they hold: "constant" (zeros), "reflect", "replicate" or "circular".
        line: whether inputs have no height.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    mode: str = "constant"
    line: bool = False

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d) -> Windows:
        """The windows of a layer."""
        kernel, stride, dilation = map(_two, (layer.kernel_size, layer.stride, layer.dilation))
        if layer.padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = [(n // 2, n - n // 2) for n in whole]
        else:
            sizes = (0,) * len(layer.kernel_size) if layer.padding == "valid" else layer.padding
            padding = [(n, n) for n in _two(cast("tuple[int, ...]", sizes), line=0)]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return cls(kernel, stride, dilation, (padding[0], padding[1]), mode, isinstance(layer, nn.Conv1d))

    @property
    def taps(self) -> int:
        """Number of taps."""
        return self.kernel[0] * self.kernel[1]

    def by_shifts(self, height: int, width: int, images: float = inf) -> bool:
        """Whether shifts can be used on padded inputs, so many at once, and take half the time of unfolding them."""
        return self.stride == self.dilation == (1, 1) and shifts_save(self.grid(height, width), self.kernel, images)

    def pictures(self, x: Tensor) -> Tensor:
        """A layer's input as (images, channels, height, width)."""
        x = x.detach()
        x = x.unsqueeze(-2) if self.line else x
        return x[None] if x.ndim == 3 else x  # one example

    def padded(self, x: Tensor) -> Tensor:
        """A layer's input with its padding, a copy: shape (images, channels, height, width)."""
        x = self.pictures(x)
        framed = self._framed(x)
        return x.clone() if framed is x else framed

    def _framed(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.padding
        if not any((top, bottom, left, right)):
            return x
        return functional.pad(x, (left, right, top, bottom), mode=self.mode)

    def windows_of(self, x: Tensor) -> tuple[int, int, int]:
        """How many windows a layer's input has: images, and those along height and along width of each."""
        x = self.pictures(x)
        (top, bottom), (left, right) = self.padding
        return len(x), *self.grid(x.shape[2] + top + bottom, x.shape[3] + left + right)

    def rows(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Some windows as rows, a copy: shape (n, channels * taps), channels outer.

        Only images that have one of them are padded, and only what lies in one is read.

        Args:
            x: a layer's input.
            chosen: their numbers, ascending, images outermost and then height; shape (n,).
        """
        grid = self.windows_of(x)
        x, chosen = self.pictures(x), chosen.to(x.device)
        taps = x.shape[1] * self.taps
        made = x.new_empty(len(chosen), taps)
        if not made.numel():
            return made
        image, row, column = torch.unravel_index(chosen, grid)
        first, last = int(image[0]), int(image[-1])
        held = self._framed(x[first : last + 1])
        held = held if held.is_contiguous() else held.contiguous()
        n, c, h, w = held.stride()
        at = (image - first) * n + row * (h * self.stride[0]) + column * (w * self.stride[1])
        down, right = (
            torch.arange(k, device=x.device) * (d * step)
            for k, d, step in zip(self.kernel, self.dilation, (h, w), strict=True)
        )
        channel = torch.arange(x.shape[1], device=x.device) * c
        tap = (channel[:, None, None] + down[:, None] + right).reshape(-1)
        if held.numel() <= LARGEST_INT:
            at, tap = at.int(), tap.int()  # half the memory to read
        flat = held.reshape(-1)
        most = max(1, GATHERED // taps)
        for start in range(0, len(at), most):
            index = (at[start : start + most, None] + tap).reshape(-1)
            made[start : start + most] = flat.index_select(0, index).reshape(-1, taps)
        return made

    def grid(self, height: int, width: int) -> Pair:
        """Number of windows along height and along width of a padded input."""
        high, wide = (
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        )
        return high, wide

    def view(self, padded: Tensor) -> Tensor:
        """Windows without a copy, shape (images, *grid, channels, *kernel)."""
        n, c, h, w = padded.stride()
        (images, channels), (high, wide) = padded.shape[:2], self.grid(*padded.shape[2:])
        shape = (images, high, wide, channels, *self.kernel)
        strides = (n, h * self.stride[0], w * self.stride[1], c, h * self.dilation[0], w * self.dilation[1])
        return padded.as_strided(shape, strides)


def _two(numbers: tuple[int, ...], *, line: int = 1) -> Pair:
    """Numbers along height and along width; a line's height has `line`."""
    return (line, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def shifts_save(grid: Pair, kernel: Pair, images: float = inf) -> bool:
    """Whether shifts can be used on neighbouring windows in such a grid, and take half the time of unfolding them.

    Sums of shifts take half as much memory again as what they stand for, so that a little time is not worth it.

    >>> shifts_save((56, 56), (3, 3)), shifts_save((56, 56), (1, 1)), shifts_save((1, 1), (3, 3))
    (True, False, False)
    >>> shifts_save((7, 7), (3, 3)), shifts_save((7, 7), (3, 3), images=10)
    (True, False)
    """
    taps = kernel[0] * kernel[1]
    if taps == 1 or grid[0] < kernel[0] - 1 or grid[1] < kernel[1] - 1:
        return False
    places = sum(
        (1 if (down, right) == (0, 0) else 2)  # a matrix times itself takes half
        * (grid[0] + kernel[0] - 1 - down)
        * (grid[1] + kernel[1] - 1 - abs(right))
        for down, right in _shifts(kernel)
    )
    added = sum(((kernel[0] - down) * (kernel[1] - abs(right))) ** 2 for down, right in _shifts(kernel))
    return 2 * (places + SUM * added / images) < taps * taps * grid[0] * grid[1]


def pair_count(kernel: Pair) -> int:
    """Number of pairs of taps, either order counted once.

    >>> pair_count((3, 3))
    45
    """
    taps = kernel[0] * kernel[1]
    return taps * (taps + 1) // 2


def add_by_shifts(sums: Tensor, x: Tensor, kernel: Pair) -> None:
    """Add second moments of all windows of neighbours to `sums`.

    Args:
        sums: float64, shape (pair_count, channels, channels): for taps u <= v, in the order of (0, 0), (0, 1), ..,
            entry [c, c'] is the sum over windows of x[c, p + u] x[c', p + v]. Changed in place.
        x: padded inputs, float64, contiguous, shape (channels, images, height, width), with a grid of at least
            kernel - 1 windows along each side. Channels are outermost: products are faster along memory.
        kernel: taps.
    """
    channels, _, height, width = x.shape
    high, wide = height - kernel[0] + 1, width - kernel[1] + 1
    taps = kernel[0] * kernel[1]
    for down, right in _shifts(kernel):
        rows, columns, left = kernel[0] - down, kernel[1] - abs(right), max(0, -right)
        for i, (top, bottom) in enumerate(_segments(rows, high)):
            for j, (start, stop) in enumerate(_segments(columns, wide)):
                if top == bottom or start == stop:
                    continue
                here = x[:, :, top:bottom, left + start : left + stop].reshape(channels, -1)
                if (down, right) == (0, 0):
                    cell = gram_of_rows(here)
                else:
                    there = x[:, :, top + down : bottom + down, left + right + start : left + right + stop]
                    cell = product(here, there.reshape(channels, -1).T)
                for first in _covering(i, rows):
                    for second in _covering(j, columns):
                        u = first * kernel[1] + left + second
                        sums[_pair(u, u + down * kernel[1] + right, taps)] += cell


def spread(sums: Tensor, kernel: Pair, out: Tensor) -> None:
    """Add what `add_by_shifts` gave to a matrix of (channel, tap) by (channel, tap), channels outer.

    Args:
        sums: shape (pair_count, channels, channels).
        kernel: taps.
        out: shape (channels * taps, channels * taps); changed in place.
    """
    taps, channels = kernel[0] * kernel[1], sums.shape[1]
    row, column = out.stride()
    shape, strides = (channels, taps, channels, taps), (taps * row, row, taps * column, column)
    blocks = out.as_strided(shape, strides, out.storage_offset())
    for u in range(taps):
        for v in range(u, taps):
            block = sums[_pair(u, v, taps)]
            blocks[:, u, :, v] += block
            if u != v:
                blocks[:, v, :, u] += block.T


def _shifts(kernel: Pair) -> Iterator[Pair]:
    """Shifts from a tap to one that is not before it: down, and to the right (or left, below zero)."""
    for down in range(kernel[0]):
        for right in range(1 - kernel[1] if down else 0, kernel[1]):
            yield down, right


def _segments(starts: int, extent: int) -> Iterator[Pair]:
    """Cut what intervals of one extent cover, that start at 0, 1, .., starts - 1, where any of them starts or ends.

    The segment in the middle lies in all of them; interval p holds the segments p .. p + starts - 1.
    """
    return pairwise([*range(starts), *range(extent, extent + starts)])


def _covering(segment: int, starts: int) -> range:
    """Intervals that hold a segment."""
    return range(max(0, segment - starts + 1), min(segment, starts - 1) + 1)


def _pair(u: int, v: int, taps: int) -> int:
    """Number of a pair of taps, u <= v."""
    return u * taps - u * (u - 1) // 2 + v - u
