"""Zip networks: correlate their units on data, join them, sum up, and measure BatchNorm anew.

Groups without inner groups are zipped; heads, groups of GroupNorm and the like are brought into the first network's
order, since a cluster of halves of two heads is no head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from merganser.align.activations import Batch, activation_costs, unit_correlations
from merganser.align.match import match
from merganser.align.renorm import reset_batch_norm
from merganser.align.zip import zip_units
from merganser.align.zipped import zipped
from merganser.errors import ParameterError, ShapeError
from merganser.symmetry import Symmetries


def zip_networks(
    found: Symmetries,
    networks: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    repeat: float = 0.5,
    within: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """One network of the size of one from several.

    Args:
        found: symmetries of all, traced on inputs of the shape of a batch.
        networks: of one architecture, in evaluation mode; left as they are.
        batches: inputs without labels, all of one shape; a few thousand examples of all tasks.
        repeat: discount of units that were joined before, in (0, 1].
        within: share of a network's joins that may be between its own units, in [0, 1].
        seed: of the order in which groups are matched.

    Raises:
        ParameterError: If there are fewer than two networks, or a setting is out of range.
        ShapeError: If the networks have other tensors, or a batch another shape.
    """
    if len(networks) < 2:
        raise ParameterError(f"{len(networks)} network; zipping takes two or more")
    first = networks[0]
    states = [{n: x.detach() for n, x in network.state_dict().items()} for network in networks]
    for state in states[1:]:
        if {n: x.shape for n, x in state.items()} != {n: x.shape for n, x in states[0].items()}:
            raise ShapeError("the networks have other tensors", "they must be of one architecture and one size")
    orders: list[dict[str, Tensor]] = [found.spec.identity()]
    for other in networks[1:]:
        orders.append(match(found.spec, activation_costs(found, first, other, batches), seed=seed).orders)
    clusters = {
        group: zip_units(similarity, len(networks), repeat=repeat, within=within).reshape(len(networks), -1)
        for group, similarity in unit_correlations(found, networks, batches).items()
    }
    merged = copy.deepcopy(first)
    with torch.no_grad():
        merged.load_state_dict(zipped(found.spec, states, orders, clusters))
    reset_batch_norm(merged, batches)
    return merged
