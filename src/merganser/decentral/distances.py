"""How far agents are from one another: as they stand, and with their units brought into one order.

    distance = sqrt( mean_i ||x_i - m||^2 ) / ||m||,    m = mean_i x_i

over all weights; statistics of BatchNorm are none. Where agents stand in different orders of units, the raw distance is
large though their functions may be alike; the aligned one says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from merganser.align.costs import is_statistic
from merganser.decentral.learner import Aligner, Match, Tensors
from merganser.decentral.snapshot import fingerprint_of
from merganser.errors import MerganserError, ParameterError


def consensus_distance(models: Sequence[Tensors]) -> float:
    """Root mean square distance from the mean, as a share of the norm of the mean; 0 for agents that agree.

    Args:
        models: of all agents.

    Raises:
        ParameterError: If there is no model.
    """
    if not models:
        raise ParameterError("there is no agent to measure a distance of")
    apart, length = 0.0, 0.0
    for name, first in models[0].items():
        if not first.is_floating_point() or is_statistic(name):
            continue
        mean = torch.zeros(first.shape, dtype=torch.float64)
        for model in models:
            mean += model[name].double() / len(models)
        apart += sum(float((model[name].double() - mean).square().sum()) for model in models) / len(models)
        length += float(mean.square().sum())
    if apart == 0:
        return 0.0
    return (apart / length) ** 0.5 if length else float("inf")


def aligned_distance(models: Sequence[Tensors], aligner: Aligner) -> float:
    """The same, after every model is brought into the order of units of the first, where that makes it nearer.

    Orders are found by what units do, and for models that agree already they may be no better in weights.

    Args:
        models: of all agents.
        aligner: compares units.

    Raises:
        ParameterError: If there is no model.
    """
    if len(models) < 2:
        return consensus_distance(models)
    first, *others = models
    found = aligner.match(first, others)
    moved = [
        min(model, aligner.moved(match.orders, model), key=lambda x: consensus_distance([first, x]))
        for match, model in zip(found, others, strict=True)
    ]
    return consensus_distance([first, *moved])


def measured(models: Sequence[Tensors], aligner: Aligner | None, *, needed: bool = True) -> dict[str, float | None]:
    """Both distances, for a journal.

    Args:
        models: of all agents.
        aligner: compares units, if anything does.
        needed: whether it must be able to; otherwise a network whose units it cannot compare has no aligned distance.

    Returns:
        "raw" and "aligned"; None for what cannot be said.

    Raises:
        MerganserError: If units are to be compared and cannot be.
    """
    if len({fingerprint_of(model) for model in models}) > 1:
        return {"raw": None, "aligned": None}
    try:
        aligned = None if aligner is None else aligned_distance(models, aligner)
    except MerganserError:
        if needed:
            raise
        aligned = None
    return {"raw": finite(consensus_distance(models)), "aligned": None if aligned is None else finite(aligned)}


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have.

    >>> finite(1.5), finite(float("nan"))
    (1.5, None)
    """
    return value if isfinite(value) else None


def fixed_fraction(order: Tensor) -> float:
    """Share of the units that an order leaves where they are.

    Args:
        order: for every new place the old one, shape (n,) or (outer, n).

    >>> fixed_fraction(torch.tensor([0, 2, 1, 3]))
    0.5
    """
    return float((order == torch.arange(order.shape[-1])).double().mean())


def mean_fixed(matches: Sequence[Match]) -> float | None:
    """Mean share of units that stayed where they were, over groups and neighbours; None where nothing was matched."""
    return _mean([x for match in matches for x in match.fixed.values()])


def mean_correlation(matches: Sequence[Match]) -> float | None:
    """Mean similarity of matched units, over groups and neighbours; None where nothing was matched."""
    return _mean([x for match in matches for x in match.correlation.values()])


def by_group(matches: Sequence[Match]) -> Mapping[str, tuple[float, float]]:
    """By group: the two means over neighbours."""
    names = dict.fromkeys(name for match in matches for name in match.fixed)
    return {
        name: (
            _mean([m.fixed[name] for m in matches if name in m.fixed]) or 0.0,
            _mean([m.correlation[name] for m in matches if name in m.correlation]) or 0.0,
        )
        for name in names
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
