"""How much the experts' changes get in each other's way, layer by layer: known before anything is merged.

    overlap_ij = ||V_i^T V_j||_F^2 / k     V_i: the k leading right singular vectors of change i; k/n where random
    cosine_ij  = <d_i, d_j> / (||d_i|| ||d_j||)

Both as means over pairs. Source of the overlap: Gargiulo et al. 2024, arXiv:2412.00081, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from merganser.checkpoints import open_source
from merganser.continual.roles import assign_roles, is_matrix, matrix_shape
from merganser.merging.conflicts import LEADING
from merganser.merging.spectra import leading
from merganser.types import Source


@dataclass(frozen=True)
class Interference:
    """One linear weight.

    Attributes:
        name: of the tensor.
        overlap: of leading input directions, mean over pairs, in [0, 1].
        chance: what random directions would give.
        cosine: between changes, mean over pairs, in [-1, 1].
    """

    name: str
    overlap: float
    chance: float
    cosine: float


def interference(base: str, experts: Sequence[str], ignore: Sequence[str] = ()) -> list[Interference]:
    """Measure all linear weights, one after the other; embeddings and vectors are left out.

    Args:
        base: reference of the base.
        experts: references of two or more models tuned from it.
        ignore: patterns that are not measured.
    """
    source, opened = open_source(base), [open_source(ref) for ref in experts]
    found = []
    roles = assign_roles(source, freeze=tuple(ignore))
    for name, role in sorted(roles.items(), key=lambda item: _natural(item[0])):
        if not is_matrix(role) or not all(name in expert.infos for expert in opened):
            continue
        changes = [_change(source, expert, name, role == "transposed") for expert in opened]
        changes = [d for d in changes if d.any()]
        if len(changes) < 2 or min(matrix_shape(role, source.infos[name].shape)) < 2:
            continue
        n = changes[0].shape[1]
        k = max(1, min(round(LEADING * n), *changes[0].shape))
        directions = [leading(d, k)[1] for d in changes]
        pairs = list(combinations(range(len(changes)), 2))
        overlap = sum(float((directions[i].T @ directions[j]).square().sum()) for i, j in pairs) / k / len(pairs)
        units = [d / d.norm() for d in changes]
        cosine = sum(float((units[i] * units[j]).sum()) for i, j in pairs) / len(pairs)
        found.append(Interference(name, overlap, k / n, cosine))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _change(base: Source, expert: Source, name: str, transposed: bool) -> Tensor:
    d = expert.read(name).double() - base.read(name).double()
    flat = d.reshape(d.shape[0], -1)
    return flat.T if transposed else flat
