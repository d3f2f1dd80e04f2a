"""Noise that belongs to a place: uniform on [0, 1), keyed by (seed, model, tensor, element index).

The same bits come out whatever else is drawn, in any order, chunk or thread. Elements are drawn in blocks of a fixed
grid; each block has a generator of its own (SFC64, whose stream NumPy keeps from version to version), seeded with the
key's sha256. Two elements share one 64-bit draw; a value is a multiple of 2**-24, so it is exact in float32.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16


def uniform(seed: int, model: str, tensor: str, start: int, stop: int) -> Tensor:
    """Noise of the elements [start, stop) of a flattened tensor.

    Args:
        seed: of the whole merge.
        model: name of the model, so that a model keeps its noise wherever it stands.
        tensor: name of the tensor.
        start: first element, in row-major order.
        stop: one past the last.

    Returns:
        float32, shape (stop - start,), in [0, 1).

    >>> whole = uniform(0, "a", "w", 0, 10)
    >>> torch.equal(whole[4:], uniform(0, "a", "w", 4, 10))
    True
    """
    out = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(stop, first + BLOCK)
        skip, count = low - first, high - low
        key = hashlib.sha256(f"{seed}\0{model}\0{tensor}\0{block}".encode()).digest()
        generator = np.random.SFC64(np.random.SeedSequence(int.from_bytes(key, "little")))
        raw = generator.random_raw((skip + count + 1) // 2)
        halves = raw.view(np.uint32)[skip : skip + count]
        np.multiply(halves >> np.uint32(8), np.float32(2**-24), out=out[low - start : high - start], casting="unsafe")
    return torch.from_numpy(out)
