"""Zip networks: compare their units on data and by their weights, join them, sum up, and measure BatchNorm anew.

Groups without inner groups are zipped; heads, groups of GroupNorm and the like are brought into the first network's
order, since a cluster of halves of two heads is no head.

With a share of the weights, the similarities of one group depend on how the others are zipped: they are taken in turn,
in a new random order every sweep, until a sweep changes nothing.

Sources: Stoica et al. 2023, arXiv:2305.03053 (ZipIt, also in part); Xu et al. 2024, arXiv:2403.01753 (MuDSC).
Here a tensor's other axis is in the places that it will have in the merged network: read axes summed, others averaged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch, activation_costs, crossing, unit_correlations
from merganser.align.costs import Moments, grown, is_statistic, unfold
from merganser.align.match import match
from merganser.align.renorm import Statistics, layer_statistics, repair, reset_batch_norm
from merganser.align.zip import zip_units
from merganser.align.zipped import closed, landed, zipped, zipped_apart
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Orders, Spec, Symmetries
from merganser.symmetry.spec import groups_in

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Zip:
    """How units of several networks are joined.

    Attributes:
        repeat: discount of units that were joined before, in (0, 1].
        within: share of a network's joins that may be between its own units, in [0, 1].
        balance: share of the weights in the similarities, in [0, 1]; 0 looks at activations alone.
        sweeps: over all groups, at most, where weights count.
        seed: of the order in which groups are taken.
    """

    repeat: float = 0.5
    within: float = 1.0
    balance: float = 0.0
    sweeps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a balance that is no share, and no sweep."""
        if not 0 <= self.balance <= 1:
            raise ParameterError(f"balance is {self.balance}; it is the share of the weights, in [0, 1]")
        if self.sweeps < 1:
            raise ParameterError(f"sweeps is {self.sweeps}; it is at least 1")


def zip_networks(
    found: Symmetries,
    networks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    repeat: float = 0.5,
    within: float = 1.0,
    balance: float = 0.0,
    repairs: bool = False,
    seed: int = 0,
) -> nn.Module:
    """One network of the size of one from several.

    Args:
        found: symmetries of all, traced on inputs of the shape of a batch.
        networks: of one architecture, in evaluation mode; left as they are.
        batches: inputs without labels, all of one shape; a few thousand examples of all tasks.
        repeat: discount of units that were joined before, in (0, 1].
        within: share of a network's joins that may be between its own units, in [0, 1].
        balance: share of the weights in the similarities, in [0, 1]: 0 is ZipIt, above it MuDSC.
        repairs: give layers with a bias the means and deviations of their parents back (REPAIR), for networks without
            BatchNorm; that is measured anew in any case.
        seed: of the order in which groups are matched.

    Raises:
        ParameterError: If there are fewer than two networks, or a setting is out of range.
        ShapeError: If the networks have other tensors, or a batch another shape.
    """
    how = Zip(repeat, within, balance, seed=seed)
    states = _states(networks)
    orders = _orders(found, networks, batches, seed)
    clusters = joined_units(found, networks, orders, batches, how)
    merged = _network(networks[0], zipped(found.spec, states, orders, clusters), batches)
    if repairs and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in merged.modules()):
        statistics = [layer_statistics(network, batches) for network in networks]
        repair(merged, [zipped_statistics(found.spec, statistics, orders, clusters)], batches)
    return merged


def zipped_statistics(
    spec: Spec, networks: Sequence[Statistics], orders: Sequence[Orders], clusters: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over clusters of the units' means and deviations, for layers with a bias: they are averaged as it is."""
    known = {layer: f"{layer}.bias" for layer in networks[0] if f"{layer}.bias" in spec.axes}
    means, deviations = (
        zipped(spec, [{bias: n[layer][i] for layer, bias in known.items()} for n in networks], orders, clusters)
        for i in range(2)
    )
    return {layer: (means[bias], deviations[bias]) for layer, bias in known.items()}


def zip_partly(
    found: Symmetries,
    networks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    share: float,
    repeat: float = 0.5,
    within: float = 1.0,
    balance: float = 0.0,
    seed: int = 0,
) -> list[nn.Module]:
    """As many networks as were given, one and the same up to a depth and each its own from there on.

    A tensor that is the same in all of them need be kept once, and what comes before the first that is not, run once.

    Args:
        found: as for `zip_networks`.
        networks: as for `zip_networks`.
        batches: as for `zip_networks`.
        share: of the groups, by the depth of the last tensor that makes their units, in [0, 1]. Groups that cannot be
            zipped without deeper ones are left out: a residual stream goes with its whole stage.
        repeat: as for `zip_networks`.
        within: as for `zip_networks`.
        balance: as for `zip_networks`.
        seed: as for `zip_networks`.

    Raises:
        ParameterError: If a setting is out of range.
        ShapeError: As for `zip_networks`.
    """
    if not 0 <= share <= 1:
        raise ParameterError(f"share is {share}; it is a share of the groups, in [0, 1]")
    how = Zip(repeat, within, balance, seed=seed)
    states, spec = _states(networks), found.spec
    groups = by_depth(spec)
    shared = closed(spec, groups[: round(share * len(groups))])
    # only where groups are compared across one another
    orders = _orders(found, networks, batches, seed) if crossing(found) else [spec.identity()] * len(networks)
    every = joined_units(found, networks, orders, batches, how, only=shared)
    tensors = zipped_apart(spec, states, {g: every[g] for g in closed(spec, [g for g in shared if g in every])})
    return [_network(own, state, batches) for own, state in zip(networks, tensors, strict=True)]


def by_depth(spec: Spec) -> list[str]:
    """Groups that can be zipped, by the last tensor that makes their units."""
    last: dict[str, int] = {}
    for place, (name, parts) in enumerate(spec.axes.items()):
        for axis, part in enumerate(parts):
            for group in groups_in(part) if spec.roles[name][axis] != "consumer" else ():
                last[group] = place
    able = [g for g, it in spec.groups.items() if not it.fixed and it.within is None and not spec.inner(g)]
    return sorted((g for g in able if g in last), key=last.__getitem__)


def joined_units(
    found: Symmetries,
    networks: Sequence[nn.Module],
    orders: Sequence[Orders],
    batches: Sequence[Batch],
    how: Zip,
    only: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The cluster of every unit of every group that can be zipped, shape (networks, n).

    Args:
        found: symmetries of all.
        networks: to compare.
        orders: of groups that are not zipped; and of those that others are compared across.
        batches: inputs.
        how: they are joined.
        only: groups to join; by default all.
    """
    count, states = len(networks), _states(networks)
    shown = {g: s for g, s in unit_correlations(found, networks, batches, orders).items() if only is None or g in only}

    def joined(similarity: Tensor) -> Tensor:
        return zip_units(similarity, count, repeat=how.repeat, within=how.within).reshape(count, -1)

    clusters = {group: joined(similarity) for group, similarity in shown.items()}
    if how.balance == 0 or not clusters:
        return clusters
    best, least = dict(clusters), -torch.inf
    generator = torch.Generator().manual_seed(how.seed)
    names = list(clusters)
    for _ in range(how.sweeps):
        changed, value = False, 0.0
        for place in torch.randperm(len(names), generator=generator).tolist():
            group = names[place]
            weights = weight_correlations(found.spec, group, states, orders, clusters)
            similarity = how.balance * weights + (1 - how.balance) * shown[group]
            new = joined(similarity)
            changed |= not torch.equal(new, clusters[group])
            clusters[group] = new
            value += _likeness(similarity, new)
        if value > least:
            best, least = dict(clusters), value
        if not changed:
            break
    return best


def weight_correlations(
    spec: Spec, group: str, networks: Sequence[Tensors], orders: Sequence[Orders], clusters: Mapping[str, Tensor]
) -> Tensor:
    """Correlations of all units of a group of all networks by everything that touches them, the others being zipped.

    Returns:
        Shape (networks * n, networks * n).
    """
    moments: Moments | None = None
    for name, axis in spec.members(group):
        if name in spec.tied or name not in networks[0] or is_statistic(name):
            continue
        if not networks[0][name].is_floating_point():
            continue
        places = spec.places_in(spec.axes[name][axis], group)
        rows = [
            unfold(landed(spec, name, n[name], k, orders[k], clusters, leave=axis, averaging=True), axis, places)
            for k, n in enumerate(networks)
        ]
        moments = grown(moments, torch.cat(rows), torch.cat(rows))
    assert moments is not None
    return moments.pearson()


def _orders(
    found: Symmetries, networks: Sequence[nn.Module], batches: Sequence[Batch], seed: int
) -> list[dict[str, Tensor]]:
    """The order of every network that is nearest to the first one's by activations."""
    orders = [found.spec.identity()]
    for other in networks[1:]:
        orders.append(match(found.spec, activation_costs(found, networks[0], other, batches), seed=seed).orders)
    return orders


def _likeness(similarity: Tensor, clusters: Tensor) -> float:
    """Mean similarity of two units of one cluster."""
    labels = clusters.reshape(-1)
    pairs = (labels[:, None] == labels[None]).triu(1)
    return float(similarity[pairs].mean()) if bool(pairs.any()) else 0.0


def _states(networks: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    if len(networks) < 2:
        raise ParameterError(f"{len(networks)} network; zipping takes two or more")
    states = [{n: x.detach() for n, x in network.state_dict().items()} for network in networks]
    for state in states[1:]:
        if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in states[0].items()}:
            raise ShapeError("the networks have other tensors", "they must be of one architecture and one size")
    return states


def _network(like: nn.Module, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> nn.Module:
    merged = copy.deepcopy(like)
    with torch.no_grad():
        merged.load_state_dict(tensors)
    reset_batch_norm(merged, batches)
    return merged
