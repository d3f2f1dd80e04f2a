"""More than two networks in one order of units: each to the first, or each in turn to the mean of the others.

    star         pi_i = match(a_1, a_i)
    merge many   repeat: for i in random order  pi_i = match(mean_{j != i} pi_j(a_j), a_i)  until nothing changes

Merge many lowers sum_i ||pi_i(a_i) - mean||^2 in every step, and favours none of the networks but by its start.

Source: Ainsworth et al. 2022, arXiv:2209.04836, algorithm 3 (MergeMany).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merganser.align.costs import Similarity, WeightCosts
from merganser.align.match import match
from merganser.errors import ParameterError
from merganser.symmetry import Orders, Spec

Tensors = Mapping[str, Tensor]


def star(
    spec: Spec, networks: Sequence[Tensors], *, similarity: Similarity = "frobenius", seed: int = 0
) -> list[dict[str, Tensor]]:
    """The order of every network that is nearest to the first.

    Args:
        spec: symmetries of all.
        networks: tensors by name; the first one stays.
        similarity: of units.
        seed: of the order of groups in a sweep.

    Raises:
        ParameterError: If there is no network.
    """
    _check(networks)
    orders = [
        match(spec, WeightCosts(spec, networks[0], other, similarity), seed=seed).orders for other in networks[1:]
    ]
    return [spec.identity(), *orders]


def merge_many(
    spec: Spec,
    networks: Sequence[Tensors],
    *,
    start: Sequence[Orders] | None = None,
    passes: int = 20,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Orders of all networks that bring them as near to their mean as a step at a time can.

    Args:
        spec: symmetries of all.
        networks: tensors by name, in memory.
        start: orders to begin with; by default those of `star`.
        passes: over all networks, at most.
        seed: of the order of networks and groups.

    Raises:
        ParameterError: If there is no network.
    """
    _check(networks)
    orders = star(spec, networks, seed=seed) if start is None else [dict(o) for o in start]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(passes if len(networks) > 2 or start is not None else 0):
        changed = False
        for i in torch.randperm(len(networks), generator=generator).tolist():
            others = mean_of(spec, [n for j, n in enumerate(networks) if j != i], orders[:i] + orders[i + 1 :])
            found = match(spec, WeightCosts(spec, others, networks[i]), start=orders[i], seed=seed).orders
            changed |= any(not torch.equal(found[name], orders[i][name]) for name in found)
            orders[i] = found
        if not changed:
            break
    return orders


def mean_of(spec: Spec, networks: Sequence[Tensors], orders: Sequence[Orders]) -> dict[str, Tensor]:
    """Mean of networks, each in its order; what is not floating is the first one's."""
    return {
        name: torch.stack([_in_order(spec, o, name, n[name]).double() for n, o in zip(networks, orders, strict=True)])
        .mean(0)
        .to(x.dtype)
        if x.is_floating_point()
        else x
        for name, x in networks[0].items()
    }


def _in_order(spec: Spec, orders: Orders, name: str, x: Tensor) -> Tensor:
    return spec.apply(orders, name, x) if name in spec.axes else x


def _check(networks: Sequence[Tensors]) -> None:
    if not networks:
        raise ParameterError("there is no network to align")
