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
    _check(spec, clusters, len(networks))
    return {name: _one(spec, name, [n[name] for n in networks], orders, clusters) for name in networks[0]}


def zipped_apart(
    spec: Spec, networks: Sequence[Mapping[str, Tensor]], clusters: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Tensors of as many networks, one and the same as far as their groups are zipped, each its own from there on.

    What makes units of a zipped group is merged. What only reads them stays a network's own and takes in U, so that it
    reads clusters: W_k U_ik. The rest is left as it is.

    Args:
        spec: symmetries of all.
        networks: tensors by name.
        clusters: of the zipped groups, as for `zipped`.

    Raises:
        ParameterError: As `zipped`; and if what makes a zipped group reads one that is not, whose units stand in
            another order in every network. `closed` leaves such groups out.
    """
    _check(spec, clusters, len(networks))
    if odd := clusters.keys() - set(closed(spec, list(clusters))):
        raise ParameterError(f"{min(odd)} cannot be zipped alone", "what makes it reads groups that are not zipped")
    orders = [spec.identity()] * len(networks)
    apart: list[dict[str, Tensor]] = [{} for _ in networks]
    for name in networks[0]:
        tensors = [n[name] for n in networks]
        parts = spec.axes.get(name, ())
        if any(_zips(part, clusters) and not _reads(spec, name, axis) for axis, part in enumerate(parts)):
            tensors = [_one(spec, name, tensors, orders, clusters)] * len(networks)
        elif tensors[0].is_floating_point():
            tensors = [landed(spec, name, x, k, orders[k], clusters).to(x.dtype) for k, x in enumerate(tensors)]
        for own, x in zip(apart, tensors, strict=True):
            own[name] = x
    return apart


def closed(spec: Spec, groups: Sequence[str]) -> list[str]:
    """Those of some groups whose makers read none but these, so that they can be zipped while the rest is not."""
    kept = list(groups)
    while True:
        odd = {
            made
            for name, parts in spec.axes.items()
            for axis, part in enumerate(parts)
            if not _reads(spec, name, axis)
            for made in groups_in(part)
            if any(g not in kept and not spec.groups[g].fixed for other in parts for g in groups_in(other))
        }
        if not odd & set(kept):
            return kept
        kept = [g for g in kept if g not in odd]


def landed(
    spec: Spec,
    name: str,
    x: Tensor,
    network: int,
    orders: Orders,
    clusters: Mapping[str, Tensor],
    *,
    leave: int | None = None,
    averaging: bool = False,
) -> Tensor:
    """One network's tensor in merged places, float64: entries of a cluster are summed.

    Args:
        spec: symmetries.
        name: of the tensor.
        x: the tensor.
        network: its number in the clusters.
        orders: its order of groups that were not zipped.
        clusters: of those that were.
        leave: an axis to leave as it is.
        averaging: whether axes that make units are averaged over a cluster, times the number of networks, and so of
            the size of one network's.
    """
    x = x.double()
    if name not in spec.axes:
        return x
    for axis, part in enumerate(spec.axes[name]):
        if axis == leave or not _zips(part, clusters):
            continue
        x = torch.zeros_like(x).index_add_(axis, _landing(spec, part, clusters, network), x)
        if averaging and not _reads(spec, name, axis):
            x = _divided(spec, part, x, axis, clusters) * _count(clusters)
    return spec.apply(_unzipped(spec, orders, clusters), name, x)


def _one(
    spec: Spec, name: str, tensors: Sequence[Tensor], orders: Sequence[Orders], clusters: Mapping[str, Tensor]
) -> Tensor:
    """The merged tensor."""
    first, count = tensors[0], len(tensors)
    if not first.is_floating_point():
        return first
    parts = spec.axes.get(name, ())
    makes = [axis for axis, part in enumerate(parts) if _zips(part, clusters) and not _reads(spec, name, axis)]
    total = torch.zeros_like(first, dtype=torch.float64)
    for k, x in enumerate(tensors):
        total += landed(spec, name, x, k, orders[k], clusters)
    for axis in makes:
        total = _divided(spec, parts[axis], total, axis, clusters) * (1 if axis == makes[0] else count)
    return (total if makes else total / count).to(first.dtype)


def _divided(spec: Spec, part: Part, x: Tensor, axis: int, clusters: Mapping[str, Tensor]) -> Tensor:
    """Over the sizes of the clusters of an axis."""
    landings = torch.cat([_landing(spec, part, clusters, k) for k in range(_count(clusters))])
    shape = [1] * x.ndim
    shape[axis] = -1
    return x / torch.bincount(landings, minlength=x.shape[axis]).reshape(shape)


def _count(clusters: Mapping[str, Tensor]) -> int:
    return len(next(iter(clusters.values())))


def _check(spec: Spec, clusters: Mapping[str, Tensor], count: int) -> None:
    for group, labels in clusters.items():
        if group not in spec.groups or spec.groups[group].within or spec.inner(group):
            raise ParameterError(f"{group} cannot be zipped", "only groups without inner groups can")
        if tuple(labels.shape) != (count, spec.groups[group].size):
            raise ParameterError(f"clusters of {group} are {tuple(labels.shape)}; there are {count} networks")


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
