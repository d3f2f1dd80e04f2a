"""Sums over experts from scratch, in float64, and those that a state holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from merganser.continual import Fold
from merganser.numerics import unpack_symmetric
from support import (
    MATRICES,
    Arrays,
    as_matrix,
    load_sums,
)


def gram_sums(changes: list[Arrays], weights: list[float]) -> Arrays:
    """S, G and B of the experts, term by term in float64."""
    sums: Arrays = {}
    for tau, w in zip(changes, weights, strict=True):
        for name, x in tau.items():
            sums[f"s/{name}"] = sums.get(f"s/{name}", 0) + w * x
            if name in MATRICES:
                d = as_matrix(x) if x.size else np.zeros((0, x.shape[-1]))
                square = float(np.sum(d * d)) or 1.0
                sums[f"g/{name}"] = sums.get(f"g/{name}", 0) + w * (d.T @ d) / square
                sums[f"b/{name}"] = sums.get(f"b/{name}", 0) + w * (d @ d.T @ d) / square
    return sums


def stored_sums(state: Path, base: Arrays) -> Arrays:
    """The sums on disk in the shapes of `gram_sums`."""
    found: Arrays = {}
    for slot, x in load_sums(state).items():
        kind, name = slot.split("/", 1)
        shape = base[name].shape
        if kind == "g":
            found[slot] = unpack_symmetric(x, int(np.prod(shape[1:]))).double().numpy()
        else:
            found[slot] = x.double().numpy().reshape(shape if kind == "s" else as_matrix(base[name]).shape)
    return found


def folded(folder: Path, base: Path, experts: list[Path], method: str = "gram", **options: object) -> Fold:
    fold = Fold.init(base, folder, method, threads=1, **options)
    for expert in experts:
        fold.add(expert, threads=1)
    return fold
