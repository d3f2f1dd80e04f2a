"""Noise that belongs to a place: uniform on [0, 1), keyed by (seed, model, tensor, element index).

The same bits come out whatever else is drawn, in any order, chunk or thread: a tensor has a generator of its own
(PCG64, whose stream NumPy keeps from version to version), seeded with the key's sha256 and advanced to the element.
Two elements share one 64-bit draw; a value is a multiple of 2**-24, so it is exact in float32.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


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
    key = hashlib.sha256(f"{seed}\0{model}\0{tensor}".encode()).digest()
    generator = np.random.PCG64(np.random.SeedSequence(int.from_bytes(key, "little")))
    generator.advance(start // 2)
    raw = generator.random_raw((stop + 1) // 2 - start // 2).view(np.int32)
    np.right_shift(raw, 8, out=raw)  # from -2**23 to 2**23 - 1
    draws = torch.from_numpy(raw)[start % 2 : start % 2 + stop - start].float()
    return torch.add(torch.tensor(0.5), draws, alpha=2**-24, out=draws)  # in [0, 1), exactly


def drawn(seed: int, model: str, tensor: str, count: int, wanted: int) -> Tensor:
    """Numbers of some places out of `count`, drawn without replacement: those of least noise, first ones of equals.

    Args:
        seed: as for `uniform`, as `model` and `tensor` are.
        model: see there.
        tensor: see there.
        count: number of places.
        wanted: how many; all where there are no more.

    Returns:
        int64, ascending.

    >>> drawn(0, "a", "w", 10, 3)
    tensor([4, 8, 9])
    """
    if wanted >= count:
        return torch.arange(count)
    if wanted <= 0:
        return torch.arange(0)
    noise = uniform(seed, model, tensor, 0, count)
    most = noise.kthvalue(wanted).values  # a tenth of the time that sorting takes
    chosen = noise < most
    equal = (noise == most).nonzero()[:, 0]
    chosen[equal[: wanted - int(chosen.sum())]] = True
    return chosen.nonzero()[:, 0]
