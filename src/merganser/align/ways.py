"""By which products a layer with blocks of zeros is computed, by its sizes alone.

Products work on 16 channels at a time: 3 outputs of 16 channels take as long as 16. Counted in such steps, with rows
(a, m, b), columns (c_A, c_m, c_B) and S(n) = ceil(n / 16), there are

    blocks    S(a) S(c_A + c_m) + S(m) S(c_A + c_m + c_B) + S(b) S(c_m + c_B)
    dense     S(a + m + b) S(c_A + c_m + c_B)

Blocks also copy what they read and make. So zeros are multiplied too where that takes at most 1.1 times the steps, and
the weight, which is put together anew at each run, is small. A convolution with nothing merged is one of two groups,
if these are of a multiple of 8 channels. What is stored is the same in all ways, and so is the result but for rounding.

Measured, in times of one network's layer (3 x 3, 100 examples, float32, one thread of an AVX-512 CPU):

    rows        columns     places   FLOPs   blocks   dense   two groups
    16+0+16     16+0+16     32 x 32  2.00    2.3      3.5     2.0
    32+0+32     32+0+32     16 x 16  2.00    2.1      3.4     2.0
    3+13+3      5+11+5      32 x 32  1.44    3.9      2.6     5.0
    12+4+12     12+4+12     32 x 32  1.94    4.1      2.6     4.0
    24+0+24     24+0+24     16 x 16  2.00    2.2      2.3     1.4
    12+0+12     12+0+12     16 x 16  2.00    2.0      4.3     2.8
    11+21+11    10+22+10    16 x 16  1.55    2.6      2.1     4.3
    16+16+16    16+16+16    16 x 16  1.75    2.1      2.1     2.3
    48+16+48    48+16+48    8 x 8    1.94    2.3      2.9     2.3
    60+196+60   60+196+60   14 x 14  1.41    1.6      3.0     2.9      (one example; too large to be dense)
"""

from __future__ import annotations

from enum import Enum

from merganser.align.cost import Sides

#: Channels at a time.
STEP = 16
#: Channels of which each of two groups has a multiple.
HALF_STEP = 8
#: Steps of a dense product for one of blocks, at most.
SLACK = 1.1
#: Entries of a weight that is put together at each run, at most.
SMALL = 2**17


class Way(Enum):
    """How a layer is multiplied."""

    BLOCKS = "blocks"
    DENSE = "dense"
    GROUPS = "two groups"


def way(rows: Sides, columns: Sides, *, taps: int = 1, groups: bool = False) -> Way:
    """The way that takes the least time, going by steps.

    Args:
        rows: how many outputs are A's, merged, and B's.
        columns: how many inputs.
        taps: places of a kernel.
        groups: whether there are groups of channels, and A's come before B's.
    """
    if groups and _in_two(rows) and _in_two(columns):
        return Way.GROUPS
    small = sum(rows) * sum(columns) * taps <= SMALL
    dense = _steps(sum(rows)) * _steps(sum(columns))
    return Way.DENSE if small and dense <= SLACK * _of_blocks(rows, columns) else Way.BLOCKS


def _in_two(sides: Sides) -> bool:
    """Whether two equal halves are all there is."""
    first, both, second = sides
    return both == 0 and first == second and first > 0 and first % HALF_STEP == 0


def _of_blocks(rows: Sides, columns: Sides) -> int:
    (a, m, b), (first, both, second) = rows, columns
    merged = _steps(m) * _steps(first + both + second)
    return _steps(a) * _steps(first + both) + merged + _steps(b) * _steps(both + second)


def _steps(channels: int) -> int:
    return -(-channels // STEP)
