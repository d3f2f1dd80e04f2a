"""One network from several that were zipped: what makes units is averaged over a cluster, what reads them summed.

    W* = sum_k M_ok^T W_k U_ik      U: unit -> cluster, one-hot      M = U / cluster size
    an axis that makes units (rows of a weight, a bias, a scale) takes M, an axis that reads them takes U
    a tensor without an axis that makes units that move: (1/N) sum_k W_k U_ik

Groups that were not zipped are in one order by permutation, which is a clustering into N-tuples.

Source: Stoica et al. 2023, arXiv:2305.03053, eq. 2-4; cluster sizes stand as they are, without an epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merganser.errors import ParameterError
from merganser.symmetry import Orders, Spec
from merganser.symmetry.spec import Part, groups_in


def zipped(
    spec: Spec, networks: Sequence[Mapping[str, Tensor]], orders: Sequence[Orders], clusters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of the one network.

    Args:
        spec: symmetries of all.
        networks: tensors by name.
        orders: of every network, for groups that were not zipped.
        clusters: of groups that were, without inner groups: the cluster of every unit, shape (networks, n).

    Raises:
        ParameterError: If a zipped group is unknown, holds others or lies within one, or has clusters of another shape.
    """
    count = len(networks)
    for group, labels in clusters.items():
        if group not in spec.groups or spec.groups[group].within or spec.inner(group):
            raise ParameterError(f"{group} cannot be zipped", "only groups without inner groups can")
        if tuple(labels.shape) != (count, spec.groups[group].size):
            raise ParameterError(f"clusters of {group} are {tuple(labels.shape)}; there are {count} networks")
    merged: dict[str, Tensor] = {}
    for name, first in networks[0].items():
        if not first.is_floating_point():
            merged[name] = first
            continue
        parts = spec.axes.get(name, ())
        makes = [axis for axis, part in enumerate(parts) if _zips(part, clusters) and not _reads(spec, name, axis)]
        total = torch.zeros_like(first, dtype=torch.float64)
        for k, network in enumerate(networks):
            x = network[name].double()
            for axis, part in enumerate(parts):
                if not _zips(part, clusters):
                    continue
                places = _landing(spec, part, clusters, k)
                x = torch.zeros_like(x).index_add_(axis, places, x)
            total += spec.apply(_unzipped(spec, orders[k], clusters), name, x) if name in spec.axes else x
        for axis in makes:
            landings = torch.cat([_landing(spec, parts[axis], clusters, k) for k in range(count)])
            sizes = torch.bincount(landings, minlength=first.shape[axis])
            shape = [1] * first.ndim
            shape[axis] = -1
            total = total / sizes.reshape(shape) * (1 if axis == makes[0] else count)
        merged[name] = (total if makes else total / count).to(first.dtype)
    return merged


def _zips(part: Part, clusters: Mapping[str, Tensor]) -> bool:
    return any(group in clusters for group in groups_in(part))


def _reads(spec: Spec, name: str, axis: int) -> bool:
    return spec.roles[name][axis] == "consumer"


def _unzipped(spec: Spec, orders: Orders, clusters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orders in which zipped groups stay: their clusters have places already."""
    return {**orders, **{group: torch.arange(spec.groups[group].size) for group in clusters}}


def _landing(spec: Spec, part: Part, clusters: Mapping[str, Tensor], network: int) -> Tensor:
    """For every place of an axis, the place that it is summed into, shape (size,)."""
    if isinstance(part, int):
        return torch.arange(part)
    if isinstance(part, str):
        return clusters[part][network] if part in clusters else torch.arange(spec.size(part))
    if "sum" in part:
        pieces, start = [], 0
        for p in part["sum"]:
            pieces.append(_landing(spec, p, clusters, network) + start)
            start += spec.size(p)
        return torch.cat(pieces)
    places = torch.zeros(1, dtype=torch.int64)
    for factor in part["product"]:
        inner = _landing(spec, factor, clusters, network)
        places = (places[:, None] * spec.size(factor) + inner[None]).reshape(-1)
    return places
